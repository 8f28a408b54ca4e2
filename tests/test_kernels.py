import functools
import importlib.util
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import LEVEL_SETS, closed_form, level_set_id, needs_kernels

from apotfx import LevelSet, kernels
from apotfx import functional as F
from apotfx.functional import Operand

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
signed_or_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
RECTIFIERS = {"none": None, "relu": (0.0, math.inf), "relu6": (0.0, 6.0), "hardtanh": (0.0, 1.0)}
with_rectifier = pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)
SIZES = [1, 15, 4095, 4096, 4097, 40000]
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 1e-39, -1e-39, 1.17e-38, 3.4e38, -3.4e38, 1e20, math.inf, -math.inf]
LAYOUTS = {
    "contiguous": lambda x: x, "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0], "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "expanded": lambda x: x[:, :1].expand(-1, x.shape[1], -1, -1), "offset": lambda x: torch.cat([x[:1], x])[1:],
}  # fmt: skip
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def random(*shape, scale=1.0, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def values_that_matter(levels, clip, count=600):
    """Every midpoint of two levels with its neighbours in float32, the ends, special values, and random ones."""
    halves = torch.arange(-2 * levels.max - 3, 2 * levels.max + 4, dtype=torch.float64) / 2
    if len(halves) > 4000:  # all midpoints, and some others
        ints = torch.tensor(levels.ints, dtype=torch.float64)
        midpoints = torch.cat([ints, (ints[1:] + ints[:-1]) / 2])
        halves = torch.cat([midpoints, -midpoints, halves[::37]])
    ties = (halves * clip.double() / levels.max).float()
    around = [torch.nextafter(ties, torch.tensor(end)) for end in (-math.inf, math.inf)]
    return torch.cat([ties, *around, torch.tensor(SPECIAL), random(count, scale=clip.item())])


def check_encode(operand, factor=None):
    """Bit for bit what `functional` gives; the input stays."""
    before = operand.values.clone()
    expected = F.encode(operand.values, operand.used_clip, operand.levels)
    if factor is not None:
        expected = expected * (operand.scale * factor)
    got = kernels.encode(operand, factor)
    assert got.dtype == torch.float32 and got.shape == expected.shape
    assert torch.equal(got, expected) and torch.equal(operand.values, before)
    assert not (got.eq(0) & got.signbit()).any() or factor is not None
    return got


def check_bytes(operand):
    """The bytes make up the levels of `functional`, in one part or two."""
    expected = F.encode(operand.values, operand.used_clip, operand.levels).long()
    level_set = operand.levels.set
    for dtype, zero_point in ((torch.uint8, 128), (torch.int8, 0)) if level_set.signed else ((torch.uint8, 0),):
        parts = kernels.encode_bytes(operand, dtype, zero_point)
        assert [part.dtype for part in parts] == [dtype] * (1 if kernels.fits_byte(level_set) else 2)
        assert torch.equal(sum((part.long() - zero_point) * 256**i for i, part in enumerate(parts)), expected)
        split = kernels.split_bytes(expected, level_set, zero_point)
        assert all(torch.equal(a.long(), b) for a, b in zip(parts, split, strict=True))


# Levels.


@needs_kernels
@every_level_set
@pytest.mark.parametrize("clip", [1.0, 0.37, 3.0000001, 1e-6, 1234.5, -2.0])
def test_levels_are_those_of_functional(levels, clip):
    clip = torch.tensor(clip)
    x = values_that_matter(levels, clip.abs())
    for unit in (None, torch.tensor(0.317)):
        values = x if unit is None else x * unit
        operand = Operand(values, clip, unit, F.Levels(levels))
        n = check_encode(operand)
        assert clip < 0 or n.max() == levels.max
        check_bytes(operand)
        check_encode(operand, torch.tensor(0.71))


@needs_kernels
@with_rectifier
@signed_or_not
@pytest.mark.parametrize("clip", [0.5, 1.0, 5.9, 6.0, 7.3])
def test_levels_behind_a_rectifier_are_those_of_functional(rectifier, signed, clip):
    levels, clip = LevelSet("apot", 5, signed), torch.tensor(clip)
    x = torch.cat(
        [values_that_matter(levels, clip), torch.tensor([1.0, 6.0, 6.0000005, 5.9999995]), random(99, scale=6)]
    )
    operand = Operand(x, clip, None, F.Levels(levels, rectifier))
    n = check_encode(operand)
    check_encode(operand, torch.tensor(1.3))
    check_bytes(operand)
    if rectifier is not None:
        assert n.min() == 0
        rectified = Operand(x.clamp(*rectifier), clip, None, F.Levels(levels))
        assert torch.equal(n, kernels.encode(rectified))


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [None, 1, 3])
def test_every_size_and_number_of_rows(size, rows):
    levels = F.Levels(LevelSet("apot", 4))
    x = random(size) if rows is None else random(rows, size)
    clip = torch.tensor(0.9) if rows is None else torch.tensor([0.9, -1.0, 2.5])[:rows].reshape(-1, 1)
    for unit, factor in itertools.product((None, torch.tensor(1.7)), (None, torch.tensor(0.3))):
        check_encode(Operand(x, clip, unit, levels), factor)
    check_bytes(Operand(x, clip, None, levels))


@needs_kernels
@every_layout
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@signed_or_not
def test_every_layout(layout, per_channel, signed):
    x = layout(random(6, 5, 4, 3))
    clip = torch.linspace(0.3, 2, 6).reshape(-1, 1, 1, 1) if per_channel else torch.tensor(1.1)
    operand = Operand(x, clip, torch.tensor(0.8), F.Levels(LevelSet("apot", 6, signed)))
    check_encode(operand)
    check_encode(operand, torch.tensor(0.3))
    check_bytes(operand)
    n = kernels.encode(operand)
    assert F.is_dense(n) and (n.stride() == x.stride() or not F.is_dense(x))


@needs_kernels
@pytest.mark.parametrize("shape", [(), (1,), (7, 1, 1, 1), (1, 7, 1, 1), (2, 3, 4, 5, 6)], ids=str)
def test_shapes_at_the_edges(shape):
    levels = F.Levels(LevelSet("apot", 4))
    check_encode(Operand(random(*shape), torch.tensor(0.5), None, levels))
    if shape:
        clip = torch.linspace(0.2, 1, shape[0]).reshape(-1, *(1 for _ in shape[1:]))
        check_encode(Operand(random(*shape), clip, None, levels))


@needs_kernels
@pytest.mark.parametrize("position", [0, 7, 4095, 4096, 39999])
@pytest.mark.parametrize("rectifier", [None, (0.0, 6.0)], ids=["none", "relu6"])
def test_nan_is_reported(position, rectifier):
    x = random(40000)
    x[position] = math.nan
    for bits in (4, 8):
        operand = Operand(x, torch.tensor(1.0), None, F.Levels(LevelSet("apot", bits), rectifier))
        assert kernels.encode(operand) is None and kernels.encode(operand, torch.tensor(2.0)) is None
        assert kernels.encode_bytes(operand, torch.uint8, 128) is None


@needs_kernels
def test_a_clip_that_is_nan_gives_what_functional_gives():
    """Training has then diverged, which must not go unseen."""
    x, levels = random(50), F.Levels(LevelSet("apot", 4))
    operand = Operand(x, torch.tensor(math.nan), None, levels)
    assert F.encode(x, operand.used_clip, levels).isnan().all()
    n = kernels.encode(operand)
    assert n is None or n.isnan().all()


@needs_kernels
def test_bytes_of_wide_levels_are_two():
    wide = [levels for levels in LEVEL_SETS if not kernels.fits_byte(levels)]
    assert {level_set_id(levels) for levels in wide} == {
        "apot7s", "apot8s", "apot6u", "apot7u", "apot8u", "pot5s", "pot4u",
    }  # fmt: skip


def test_what_kernels_accept():
    levels = F.Levels(LevelSet("apot", 4))
    one = torch.tensor(1.0)

    def accepts(x, clip=one, unit=None, levels=levels):
        return kernels.accept(Operand(x, clip, unit, levels))

    assert accepts(torch.ones(2)) and accepts(torch.nn.Parameter(torch.ones(2)), unit=one)
    assert accepts(torch.ones(4, 4)[:, ::2], torch.ones(4, 1))
    for other in (torch.ones(2).double(), torch.ones(2).bfloat16(), torch.empty(0), torch.empty(2, device="meta")):
        assert not accepts(other)
    assert not accepts(torch.ones(2), one.double()) and not accepts(torch.ones(2), unit=one.bfloat16())
    assert not accepts(torch.ones(4, 2), torch.ones(4, 2)[:, :1])
    assert not accepts(torch.ones(2), None, None, None)

    class Wrapped(torch.Tensor):
        pass

    assert not accepts(torch.ones(2).as_subclass(Wrapped))


@needs_kernels
def test_scratch_is_used_again_and_fresh_memory_is_not():
    levels = F.Levels(LevelSet("apot", 4))
    a, b = (Operand(random(5, 4, seed=seed), torch.tensor(1.0), None, levels) for seed in (0, 1))
    first, second = kernels.encode(a), kernels.encode(b)
    assert first.data_ptr() != second.data_ptr()
    assert torch.equal(kernels.encode(a, None, "test"), first)
    assert torch.equal(kernels.encode(b, None, "test"), second)
    larger = Operand(random(50, 40), torch.tensor(1.0), None, levels)
    assert torch.equal(kernels.encode(larger, None, "test"), kernels.encode(larger))
    last = Operand(random(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), torch.tensor(1.0), None, levels)
    assert torch.equal(kernels.encode(last, None, "test"), kernels.encode(last))
    (bytes_,) = kernels.encode_bytes(last, torch.int8, 0, "test")
    assert torch.equal(bytes_.float(), kernels.encode(last))


# Gradients.


def check_gradient(operand, factor=None, everywhere=False):
    """For x bit for bit; for the clip within 1e-5 of the sum of its terms' magnitudes, in float64."""
    x, rectifier = operand.values, operand.levels.rectifier
    grad = random(*x.shape, seed=1).as_strided(x.shape, x.stride()) if F.is_dense(x) else random(*x.shape, seed=1)
    clip, unit = operand.used_clip, 1.0 if operand.unit is None else operand.unit
    scaled = grad if factor is None else grad * factor
    n = F.encode(x, clip, operand.levels)
    expected, _ = F.quantization_gradient(scaled, x, n, clip, operand.levels, everywhere)
    grad_x, grad_clip = kernels.gradient(grad.clone(memory_format=torch.preserve_format), operand, factor, everywhere)
    assert torch.equal(grad_x, expected) and grad_clip.shape == operand.clip.shape
    _, _, dclip = closed_form(x.double(), clip.double(), operand.levels.set, everywhere, rectifier)
    terms = scaled.double() * unit
    reference = (terms * dclip).sum_to_size(clip.shape)
    assert ((grad_clip - reference).abs() <= 1e-5 * terms.abs().sum_to_size(clip.shape)).all()
    return grad_x, grad_clip


@needs_kernels
@every_level_set
def test_gradients_are_the_closed_forms(levels):
    x = random(3, 500)
    for clip in (torch.tensor(0.8), torch.tensor([[0.5], [1.5], [1e-3]])):
        for everywhere in (False, True):
            check_gradient(Operand(x, clip, None, F.Levels(levels)), None, everywhere)
        check_gradient(Operand(x, clip, torch.tensor(1.3), F.Levels(levels)), torch.tensor(0.4))


@needs_kernels
@with_rectifier
@signed_or_not
@pytest.mark.parametrize("clip", [0.5, 6.0, 7.0])
def test_gradients_behind_a_rectifier(rectifier, signed, clip):
    x = torch.cat([random(999, scale=5), torch.tensor([0.0, -0.0, 1e-45, 1.0, 6.0, 6.0000005, 5.9999995, 0.5, 7.5])])
    operand = Operand(x, torch.tensor(clip), None, F.Levels(LevelSet("apot", 4, signed), rectifier))
    grad_x, _ = check_gradient(operand)
    check_gradient(operand, torch.tensor(0.4), everywhere=True)
    if rectifier is not None:
        low, high = rectifier
        assert not grad_x[(x <= low) | (x >= high)].any()
        assert grad_x[(x > low) & (x < min(high, clip))].ne(0).all()


@needs_kernels
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("rows", [None, 3])
def test_gradients_of_every_size(size, rows):
    x = random(size) if rows is None else random(rows, size)
    clip = torch.tensor(0.9) if rows is None else torch.tensor([[0.9], [-1.0], [2.5]])
    check_gradient(Operand(x, clip, torch.tensor(0.7), F.Levels(LevelSet("apot", 4))), torch.tensor(1.9))


@needs_kernels
@every_layout
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("layout_of_grad", ["contiguous", "channels_last", "transposed"])
def test_gradients_in_every_layout(layout, layout_of_grad, per_channel):
    x, grad = layout(random(6, 5, 4, 3)), LAYOUTS[layout_of_grad](random(6, 5, 4, 3, seed=1))
    clip = torch.linspace(0.3, 2, 6).reshape(-1, 1, 1, 1) if per_channel else torch.tensor(1.1)
    operand = Operand(x, clip, None, F.Levels(LevelSet("apot", 4, False), (0.0, math.inf)))
    n = F.encode(x, clip, operand.levels)
    expected_x, expected_clip = F.quantization_gradient(grad, x, n, clip, operand.levels)
    grad_x, grad_clip = kernels.gradient(grad.clone(memory_format=torch.preserve_format), operand, None, False)
    assert torch.equal(grad_x, expected_x)
    torch.testing.assert_close(grad_clip, expected_clip, rtol=1e-5, atol=1e-5)


@needs_kernels
def test_infinite_values_have_finite_gradients():
    x = torch.tensor([math.inf, -math.inf, 3e38, 0.0])
    operand = Operand(x, torch.tensor(1e-3), None, F.Levels(LevelSet("apot", 4)))
    grad_x, grad_clip = kernels.gradient(torch.tensor([1.0, 2, 4, 8]), operand, None, False)
    assert grad_x.tolist() == [0, 0, 0, 8] and grad_clip == 1 - 2 + 4


@needs_kernels
@pytest.mark.parametrize("what", ["value", "gradient"])
def test_nan_shows_in_the_gradient_of_the_clip(what):
    x, grad = random(5000), random(5000, seed=1)
    (x if what == "value" else grad)[4500] = math.nan
    operand = Operand(x, torch.tensor(1.0), None, F.Levels(LevelSet("apot", 4)))
    n = F.encode(x, operand.used_clip, operand.levels)
    expected = F.quantization_gradient(grad, x, n, operand.used_clip, operand.levels)
    assert expected[1].isnan() and kernels.gradient(grad.clone(), operand, None, False)[1].isnan()


@needs_kernels
def test_the_gradient_of_large_sums_keeps_its_precision():
    """A million terms of the same sign, where a float32 sum one after another would lose 4 digits."""
    x, grad = torch.full((2**20,), 2.0), torch.full((2**20,), 0.1)
    operand = Operand(x, torch.tensor(1.0), None, F.Levels(LevelSet("apot", 4)))
    _, grad_clip = kernels.gradient(grad, operand, None, False)
    assert grad_clip.item() == pytest.approx(2**20 * torch.tensor(0.1).item(), rel=1e-5)


@needs_kernels
@pytest.mark.parametrize("size", [4097, 40000])
def test_the_number_of_threads_changes_no_bit(size, num_threads):
    levels, results = F.Levels(LevelSet("apot", 4)), []
    for threads in (1, 2):
        num_threads(threads)
        got = []
        for x, clip in ((random(size), torch.tensor(0.9)), (random(3, size), torch.tensor([[0.9], [1.2], [0.1]]))):
            operand = Operand(x, clip, torch.tensor(0.8), levels)
            got += [kernels.encode(operand), *kernels.encode_bytes(operand, torch.int8)]
            got += kernels.gradient(random(*x.shape, seed=1), operand, torch.tensor(0.4), False)
            got.append(kernels.standard_deviation(x))
        results.append(got)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# Standard deviation.


@needs_kernels
@pytest.mark.parametrize("size", [2, *SIZES[1:]])
@pytest.mark.parametrize("mean", [0.0, 0.3, 10.0])
def test_the_standard_deviation_is_that_of_float64(size, mean):
    x = random(size, scale=0.1) + mean
    got = kernels.standard_deviation(x)
    assert got.shape == () and got.dtype == torch.float32
    assert got.item() == pytest.approx(x.double().std().item(), rel=1e-6)
    last = x[: size // 2 * 2].reshape(-1, 2, 1, 1).contiguous(memory_format=torch.channels_last)
    assert kernels.standard_deviation(last).item() == pytest.approx(last.double().std().item(), rel=1e-6)


@needs_kernels
def test_the_standard_deviation_at_its_edges():
    for constant in (torch.full((3, 2), 0.5), torch.zeros(5000), torch.tensor([0.7]), torch.tensor(3.0)):
        assert kernels.standard_deviation(constant) == torch.tensor(F.MIN_CLIP)
    assert kernels.standard_deviation(torch.tensor([1.0, math.nan])).isnan()
    tiny = torch.tensor([1e-12, -1e-12])
    assert kernels.standard_deviation(tiny) == F.standard_deviation(tiny) == torch.tensor(F.MIN_CLIP)


# Compiling and loading.


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """`kernels.library` as in a new process, with its cache in tmp_path."""
    monkeypatch.setenv("APOTFX_CACHE", str(tmp_path / "cache"))
    library = kernels.library.__wrapped__
    monkeypatch.setattr(kernels, "library", functools.cache(library))
    return library


def compiled_files(folder):
    return sorted(folder.rglob("*.so"))


def check_works():
    operand = Operand(random(50), torch.tensor(0.8), None, F.Levels(LevelSet("apot", 4)))
    check_encode(operand)


@pytest.fixture
def no_system_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


def test_no_compiler_is_said(fresh, no_system_compiler, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(kernels.Unavailable, match="no C compiler .cc, gcc or clang. is installed; pip install 'apotfx"):
        fresh()


def test_without_a_compiler_the_one_from_a_package_is_taken(no_system_compiler, monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "ziglang" or None)
    assert kernels.find_compiler() == [sys.executable, "-m", "ziglang", "cc"]
    (tmp_path / "cc").write_text("#!/bin/sh")
    (tmp_path / "cc").chmod(0o755)
    assert kernels.find_compiler() == [str(tmp_path / "cc")]
    monkeypatch.setenv("CC", "ccache gcc")
    assert kernels.find_compiler() == ["ccache", "gcc"]


def test_the_compiler_from_a_package_works(fresh, no_system_compiler):
    pytest.importorskip("ziglang")
    kernels.library()
    check_works()


@needs_kernels
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
@pytest.mark.parametrize("size, more", [(100_000, 2), (10_000, 0)], ids=["large", "small"])
def test_threads_are_those_of_torch(size, more):
    """Which it starts with the first work that it shares."""
    code = f"""
import os, torch
from apotfx import kernels
torch.set_num_threads(3)
x = torch.empty({size})
kernels.library()
before = len(os.listdir("/proc/self/task"))
kernels.standard_deviation(x)
print(len(os.listdir("/proc/self/task")) - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == f"{more}\n", done.stderr


@pytest.mark.parametrize("compiler, reason", [
    ("/nowhere/cc", "No such file or directory"), ("false", "exit status 1"),
    ("sh -c 'echo broken >&2; exit 3'", "failed"),
], ids=["absent", "failing", "quoted"])  # fmt: skip
def test_a_compiler_that_fails_is_said(compiler, reason, fresh, monkeypatch, tmp_path):
    monkeypatch.setenv("CC", compiler)
    with pytest.raises(kernels.Unavailable, match="the C compiler .* failed") as error:
        fresh()
    assert reason in str(error.value) and "\n" not in str(error.value)
    assert not compiled_files(tmp_path)


def test_what_the_compiler_says_is_told(fresh, monkeypatch, tmp_path):
    script = tmp_path / "cc"
    script.write_text("#!/bin/sh\necho 'kernels.c:1: no good' >&2\necho more >&2\nexit 1\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    with pytest.raises(kernels.Unavailable, match="failed .kernels.c:1: no good.$"):
        fresh()


@pytest.fixture(scope="module")
def cached(tmp_path_factory):
    """A cache directory with the compiled library in it; not to be written to."""
    root = tmp_path_factory.mktemp("cached")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APOTFX_CACHE", str(root))
        kernels.library.__wrapped__()
    return root


@needs_kernels
def test_the_library_is_compiled_once(fresh, monkeypatch, tmp_path, cached):
    shutil.copytree(cached, tmp_path / "cache")
    (file,) = compiled_files(tmp_path / "cache")
    before = file.stat().st_mtime_ns
    popen, calls = subprocess.Popen, []
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **kwargs: calls.append(args) or popen(*args, **kwargs))
    kernels.library()
    assert not calls and compiled_files(tmp_path / "cache") == [file] and file.stat().st_mtime_ns == before
    check_works()


@needs_kernels
def test_other_flags_are_another_file(fresh, monkeypatch, tmp_path, cached):
    shutil.copytree(cached, tmp_path / "cache")
    monkeypatch.setattr(kernels, "FLAGS", (*kernels.FLAGS, "-DOTHER"))
    kernels.library()
    assert len(compiled_files(tmp_path / "cache")) == 2
    check_works()


@needs_kernels
def test_a_cache_that_cannot_be_written_does_not_stop_it(fresh, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the directory should be")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kernels.library()
    check_works()
    assert (tmp_path / "cache").is_file()


@needs_kernels
def test_a_cache_without_permission_does_not_stop_it(fresh, monkeypatch, tmp_path):
    def refuse(path, data, mode):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(kernels, "write_atomic", refuse)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    kernels.library()
    check_works()
    assert not compiled_files(tmp_path / "cache") and not list(tmp_path.glob("tmp*"))


@needs_kernels
def test_without_a_home_directory_it_compiles_anew(fresh, monkeypatch):
    for variable in ("APOTFX_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for home in ("/proc/nothing", "", "relative"):
        monkeypatch.setenv("HOME", home)
        assert kernels._cache_directory() is None
    kernels.library()
    check_works()
    assert not os.path.exists("relative")


@needs_kernels
@pytest.mark.parametrize("variable", ["APOTFX_CACHE", "XDG_CACHE_HOME"])
def test_a_relative_cache_is_none(variable, fresh, monkeypatch, tmp_path, cached):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APOTFX_CACHE")
    monkeypatch.setenv(variable, "cache")
    shutil.copytree(cached, tmp_path / "cache")
    monkeypatch.setattr(kernels, "_load", lambda path: path)
    assert kernels.library().parent.parent != tmp_path / "cache"


def open_to_others(place, how):
    if how == "another user's":
        os.chown(place, 12345, 12345, follow_symlinks=False)
    else:
        place.chmod(place.stat().st_mode | {"writable by a group": 0o020, "writable by all": 0o002}[how])


@needs_kernels
@pytest.mark.parametrize("how", ["writable by a group", "writable by all", "another user's"])
@pytest.mark.parametrize("what", ["file", "directory", "above"])
def test_nothing_is_loaded_from_where_others_can_write(what, how, fresh, monkeypatch, tmp_path, cached, caplog):
    if how == "another user's" and os.geteuid():
        pytest.skip("only root can give files away")
    shutil.copytree(cached, tmp_path / "cache")
    (file,) = compiled_files(tmp_path / "cache")
    open_to_others({"file": file, "directory": file.parent, "above": tmp_path / "cache"}[what], how)
    loaded, load = [], kernels._load
    monkeypatch.setattr(kernels, "_load", lambda path: loaded.append(path) or load(path))
    kernels.library()
    assert loaded and file not in loaded
    assert (f"others can write in {file.parent} or above it" in caplog.text) == (what != "file")


@needs_kernels
def test_a_link_is_not_followed(fresh, monkeypatch, tmp_path, cached):
    shutil.copytree(cached, tmp_path / "cache")
    (file,) = compiled_files(tmp_path / "cache")
    file.rename(tmp_path / "elsewhere.so")
    file.symlink_to(tmp_path / "elsewhere.so")
    loaded = []
    monkeypatch.setattr(kernels, "_load", loaded.append)
    kernels.library()
    assert file not in loaded and not file.is_symlink()  # written anew


@needs_kernels
def test_the_cache_is_for_this_user_alone(fresh, tmp_path):
    before = os.umask(0)
    try:
        kernels.library()
    finally:
        os.umask(before)
    (file,) = compiled_files(tmp_path / "cache")
    assert [place.stat().st_mode & 0o777 for place in (file, file.parent, tmp_path / "cache")] == [0o600, 0o700, 0o700]


def test_a_compiler_that_hangs_is_asked_once_and_ended(fresh, monkeypatch, tmp_path):
    script = tmp_path / "cc"
    script.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\nsleep 600 &\necho $! > {tmp_path}/child\nwait\n")
    script.chmod(0o755)
    monkeypatch.setenv("CC", str(script))
    monkeypatch.setattr(kernels, "SECONDS", 1)
    with pytest.raises(kernels.Unavailable, match=rf"the C compiler {script} did not end in 1 seconds"):
        fresh()
    assert (tmp_path / "asked").read_text() == "asked\n"
    child = Path("/proc", (tmp_path / "child").read_text().strip(), "stat")
    if Path("/proc/self/stat").exists():
        assert not child.exists() or child.read_text().rpartition(")")[2].split()[0] in "XZ"


@needs_kernels
def test_a_compiler_behind_a_launcher(fresh, monkeypatch):
    monkeypatch.setenv("CC", f"env {os.environ.get('CC') or 'cc'}")
    kernels.library()
    check_works()


def load_or_say_why():
    try:
        kernels.library()
    except kernels.Unavailable as error:
        return str(error)
    check_works()
    return "works"


@needs_kernels
@pytest.mark.parametrize("content", [b"not a library", b"", b"\x7fELF" + bytes(60)], ids=["garbage", "empty", "header"])
def test_a_cached_file_that_is_no_library_does_no_harm(content, fresh, tmp_path, cached):
    shutil.copytree(cached, tmp_path / "cache")
    compiled_files(tmp_path / "cache")[0].write_bytes(content)
    result = load_or_say_why()
    assert result == "works" or "the C compiler" in result and "\n" not in result


@needs_kernels
def test_a_truncated_cached_library_does_no_harm(tmp_path, cached):
    """In a process of its own, as the system kills one that reads beyond the end of a mapped file."""
    shutil.copytree(cached, tmp_path / "cache")
    (file,) = compiled_files(tmp_path / "cache")
    file.write_bytes(file.read_bytes()[:5000])
    code = "from apotfx.engine import choose; print(choose('compiled').engine.name)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"APOTFX_CACHE": str(tmp_path / "cache")},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0 and result.stdout in ("compiled\n", "eager\n")
