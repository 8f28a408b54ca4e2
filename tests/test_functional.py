import math

import pytest
import torch
from helpers import LEVEL_SETS, closed_form, level_set_id, nearest_level

from apotfx import LevelSet
from apotfx import functional as F

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
signed_or_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

CLIPS = (1.0, 0.37, 3.0000001, 1e-6, 1234.5)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 0.1, -0.1, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]


def is_minus_zero(x):
    return (x == 0) & x.signbit()


@every_level_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_representable_integer_comes_back(levels, dtype):
    ints = torch.tensor(levels.ints, dtype=dtype)
    n = torch.cat([-ints.flip(0)[:-1], ints]) if levels.signed else ints
    for clip in torch.tensor(CLIPS, dtype=dtype):
        x = F.decode(n, clip, F.Levels(levels))
        assert torch.equal(F.encode(x, clip, F.Levels(levels)), n)
        assert torch.equal(F.fake_quantize(x, clip, F.Levels(levels)), x)


@every_level_set
@pytest.mark.parametrize("exponent", [-3, 0, 5])
def test_encode_takes_the_nearest_level(levels, exponent):
    """The clip is a power of two times max, so that float32 makes no error, on any input."""
    torch.manual_seed(0)
    position = torch.cat([
        torch.randn(2000) * levels.max / 2,
        torch.randn(2000) * 4,
        torch.arange(-2 * levels.max - 4, 2 * levels.max + 5) / 2,  # every tie, and beyond the clip
    ])  # fmt: skip
    x, clip = position * 2.0**exponent, torch.tensor(levels.max * 2.0**exponent)
    n = F.encode(x, clip, F.Levels(levels))
    assert n.dtype == torch.float32
    expected = nearest_level(position.clamp(-levels.max, levels.max), levels)
    assert torch.equal(n.double(), expected)
    assert not is_minus_zero(n).any()


@every_level_set
def test_encode_is_nearest_up_to_rounding_for_any_clip(levels):
    torch.manual_seed(0)
    ints = torch.tensor(levels.ints, dtype=torch.float64)
    x = torch.randn(4000)
    for clip in (torch.tensor(0.7312), torch.tensor(2.9)):
        n = F.encode(x, clip, F.Levels(levels)).double()
        assert torch.isin(n.abs(), ints).all()
        position = (x.double() / clip.double() * levels.max).clamp(-levels.max if levels.signed else 0, levels.max)
        smallest = (position.abs().unsqueeze(1) - ints).abs().amin(1)
        assert ((position - n).abs() <= smallest + position.abs() * 2**-22).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@signed_or_not
def test_special_values(dtype, signed):
    levels = LevelSet("apot", 4, signed)
    limit = torch.finfo(dtype).max
    x = torch.tensor([min(max(v, -limit), limit) if math.isfinite(v) else v for v in SPECIAL], dtype=dtype)
    low = -levels.max if signed else 0
    expected = torch.tensor([0, 0, 0, 0, 1, -1 if signed else 0, levels.max, low, levels.max, low, math.nan])
    n = F.encode(x, torch.tensor(1.0), F.Levels(levels))
    expected[4], expected[5] = nearest_level(x[4:6].double() * levels.max, levels)
    assert n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(n[:-1], expected[:-1].to(n.dtype)) and n[-1].isnan()
    assert not is_minus_zero(n).any()


@every_level_set
def test_special_values_at_the_smallest_clip(levels):
    n = F.encode(torch.tensor([0.0, 1e-30, 1.0, 3e38, math.inf]), torch.tensor(F.MIN_CLIP), F.Levels(levels))
    assert n.tolist() == [0, 0, levels.max, levels.max, levels.max]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@signed_or_not
def test_half_precision_is_encoded_in_float32(dtype, signed):
    levels = F.Levels(LevelSet("apot", 5, signed))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for clip in (torch.tensor(1.3), torch.tensor(1.3, dtype=dtype)):
        assert torch.equal(F.encode(x, clip, levels), F.encode(x.float(), clip.float(), levels))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0)], ids=str)
def test_nothing_is_encoded_to_nothing(shape):
    assert F.encode(torch.empty(shape), torch.tensor(1.0), F.Levels(LevelSet("apot", 4))).shape == shape


def test_a_scalar_is_encoded():
    assert F.encode(torch.tensor(-1.0), torch.tensor(1.0), F.Levels(LevelSet("apot", 4))) == torch.tensor(-10.0)


@pytest.mark.parametrize("layout", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(0, 3),
    lambda x: x[:, ::2, :, 1:],
    lambda x: x[:, :1].expand(-1, 5, -1, -1), lambda x: x.permute(3, 1, 0, 2),
], ids=["channels_last", "transposed", "sliced", "expanded", "permuted"])  # fmt: skip
@signed_or_not
def test_memory_layout_changes_nothing(layout, signed):
    levels = F.Levels(LevelSet("apot", 4, signed))
    x = layout(torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)))
    before = x.clone()
    assert torch.equal(F.encode(x, torch.tensor(1.1), levels), F.encode(x.contiguous(), torch.tensor(1.1), levels))
    assert torch.equal(x, before)


@signed_or_not
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_clip_per_channel(signed, memory_format):
    levels = F.Levels(LevelSet("apot", 4, signed))
    w = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    clip = torch.tensor([0.1, 0.5, 1, 2, 30.0]).reshape(5, 1, 1, 1)
    rows = [F.encode(row, c.reshape(()), levels) for row, c in zip(w, clip)]
    assert torch.equal(F.encode(w, clip, levels), torch.stack(rows))
    assert torch.equal(F.decode(torch.stack(rows), clip, levels), torch.stack(rows) * (clip / levels.max))


RECTIFIERS = {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}
with_rectifier = pytest.mark.parametrize("rectifier", RECTIFIERS.values(), ids=RECTIFIERS)


@with_rectifier
@signed_or_not
@pytest.mark.parametrize("clip", [0.7, 6.0, 9.0])
def test_a_rectifier_comes_before_the_levels(rectifier, signed, clip):
    levels, clip = LevelSet("apot", 4, signed), torch.tensor(clip)
    x = torch.cat([torch.randn(999, generator=torch.Generator().manual_seed(0)) * 5, torch.tensor(SPECIAL)])
    n = F.encode(x, clip, F.Levels(levels, rectifier))
    assert torch.equal(n[:-1], F.encode(x.clamp(*rectifier), clip, F.Levels(levels))[:-1]) and n[-1].isnan()
    assert n[:-1].min() == 0 and not is_minus_zero(n).any()


# Gradients.


def clip_of(shape, per_channel, around=1.0):
    if not per_channel:
        return torch.tensor(1.1 * around, dtype=torch.float64)
    return torch.linspace(0.3, 2, shape[0], dtype=torch.float64).reshape(-1, *(1 for _ in shape[1:])) * around


def check_gradient(levels, clip, rectifier=None, everywhere=False):
    """In float64 to within a few roundings."""
    torch.manual_seed(0)
    x, grad = torch.randn(6, 5, 4, 3).double() * 5, torch.randn(6, 5, 4, 3).double()
    encoded = F.Levels(levels, rectifier)
    q, dx, dclip = closed_form(x, clip, levels, everywhere, rectifier)
    n = F.encode(x, clip, encoded)
    torch.testing.assert_close(F.decode(n, clip, encoded), q, rtol=1e-14, atol=0)
    grad_x, grad_clip = F.quantization_gradient(grad, x, n, clip, encoded, everywhere)
    assert torch.equal(grad_x, grad * dx)
    expected = (grad * dclip).sum_to_size(clip.shape)
    torch.testing.assert_close(grad_clip, expected, rtol=1e-12, atol=1e-12)
    assert (grad_x == 0).any() is not everywhere and (grad_x != 0).any()


@every_level_set
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_gradients_are_the_closed_forms(levels, per_channel):
    check_gradient(levels, clip_of((6, 5, 4, 3), per_channel, 4))
    check_gradient(levels, clip_of((6, 5, 4, 3), per_channel, 4), everywhere=True)


@with_rectifier
@signed_or_not
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("clip", [3, 8])
def test_gradients_with_a_rectifier_are_the_closed_forms(rectifier, signed, per_channel, clip):
    check_gradient(LevelSet("apot", 4, signed), clip_of((6, 5, 4, 3), per_channel, clip), rectifier)


@with_rectifier
@signed_or_not
@pytest.mark.parametrize("clip", [2.0, 6.0, 8.0])
def test_no_gradient_passes_at_the_ends_of_a_rectifier(rectifier, signed, clip):
    """As torch does it: its ReLU and Hardtanh pass nothing at 0, and Hardtanh nothing at its upper end."""
    x = torch.tensor([-math.inf, -2.0, -0.0, 0.0, 1e-45, 1.0, 2.0, 5.9999995, 6.0, 6.0000005, 7.0, math.inf])
    levels, clip = F.Levels(LevelSet("apot", 4, signed), rectifier), torch.tensor(clip)
    n = F.encode(x, clip, levels)
    grad_x, _ = F.quantization_gradient(torch.ones_like(x), x, n, clip, levels)
    rectified = x.clone().requires_grad_()
    (torch.relu if rectifier[1] == math.inf else torch.nn.functional.relu6)(rectified).sum().backward()
    assert torch.equal(grad_x, rectified.grad * (x <= clip))


@signed_or_not
@pytest.mark.parametrize("everywhere", [False, True], ids=["inside", "everywhere"])
def test_gradient_of_single_values(signed, everywhere):
    """Levels 0 1 2 4 of 4, or 0 1, each with the clip 2."""
    levels = LevelSet("apot", 3, True) if signed else LevelSet("apot", 2, False)
    x = torch.tensor([-9.0, -2.0, -0.3, 0.0, 0.6, 1.4, 2.0, 2.1, 50.0], dtype=torch.float64)
    clip, grad = torch.tensor(2.0, dtype=torch.float64), torch.full_like(x, 3)
    n = F.encode(x, clip, F.Levels(levels))
    assert n.tolist() == ([-4, -4, -1, 0, 1, 2, 4, 4, 4] if signed else [0, 0, 0, 0, 1, 2, 4, 4, 4])
    grad_x, grad_clip = F.quantization_gradient(grad, x, n, clip, F.Levels(levels), everywhere)
    passed = [0, 1, 1, 1, 1, 1, 1, 0, 0] if signed else [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert grad_x.tolist() == [3] * 9 if everywhere else [3 * p for p in passed]
    errors = [-1, 0, -1 / 4 + 0.15, 0, 1 / 4 - 0.3, 2 / 4 - 0.7, 0, 1, 1]
    assert grad_clip.item() == pytest.approx(3 * sum(errors if signed else [0, 0, 0, *errors[3:]]), rel=1e-14)


@pytest.mark.parametrize(
    "levels", [LevelSet("apot", 4, False), LevelSet("uniform", 8), LevelSet("pot", 4)], ids=level_set_id
)
def test_levels_kept_in_bfloat16_do_not_change_the_gradient_of_the_clip(levels):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    clip, grad = torch.tensor(1.3), torch.randn(1000, generator=torch.Generator().manual_seed(1))
    n = F.encode(x, clip, F.Levels(levels))
    expected = F.quantization_gradient(grad, x, n, clip, F.Levels(levels))
    got = F.quantization_gradient(grad, x, n.bfloat16(), clip, F.Levels(levels))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_the_clip_for_half_precision_values(dtype):
    levels = F.Levels(LevelSet("apot", 4))
    x = torch.tensor([60000.0, -60000.0, 0.01, -0.02, 0.03], dtype=dtype)
    clip, grad = torch.tensor(0.05), torch.ones(5)
    n = F.encode(x, clip, levels)
    expected = F.quantization_gradient(grad, x.float(), n, clip, levels)[1]
    assert expected.isfinite() and torch.equal(F.quantization_gradient(grad, x, n, clip, levels)[1], expected)


def test_infinite_values_have_finite_gradients():
    levels = F.Levels(LevelSet("apot", 4))
    x, clip = torch.tensor([math.inf, -math.inf, 3e38, 0.0]), torch.tensor(1e-3)
    grad_x, grad_clip = F.quantization_gradient(
        torch.tensor([1.0, 2, 4, 8]), x, F.encode(x, clip, levels), clip, levels
    )
    assert grad_x.tolist() == [0, 0, 0, 8] and grad_clip == 1 - 2 + 4


# Helpers.


def test_standard_deviation_is_unbiased_and_positive():
    w = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 3
    expected = ((w - w.mean()).square().sum() / 49).sqrt()
    torch.testing.assert_close(F.standard_deviation(w.reshape(5, 2, 5)), expected, rtol=1e-14, atol=0)
    for constant in (torch.full((3, 2), 0.5), torch.zeros(3), torch.tensor([0.7])):
        assert F.standard_deviation(constant) == torch.tensor(F.MIN_CLIP)


@pytest.mark.parametrize("x, dense", [
    (torch.empty(2, 3, 4), True), (torch.empty(2, 3, 4, 5), True),
    (torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), True),
    (torch.empty(2, 3, 4, 5, 6).contiguous(memory_format=torch.channels_last_3d), True),
    (torch.empty(()), True), (torch.empty(2, 4)[:, ::2], False), (torch.empty(2, 3, 4, 5)[:, 1:], False),
    (torch.empty(1, 3, 4, 5)[:, 1:], True), (torch.empty(3, 4).T, False),
    (torch.empty(2, 3, 4, 5).permute(1, 0, 2, 3), False),
    (torch.empty(2, 1, 4, 5).expand(-1, 3, -1, -1), False),
])  # fmt: skip
def test_is_dense(x, dense):
    assert F.is_dense(x) is dense


def test_flat_is_the_order_of_memory():
    x = torch.arange(24.0).reshape(2, 3, 2, 2)
    last = x.contiguous(memory_format=torch.channels_last)
    assert F.flat(x).tolist() == list(range(24))
    assert F.flat(last).tolist() == last.permute(0, 2, 3, 1).flatten().tolist()
    assert F.flat(last).data_ptr() == last.data_ptr()


@pytest.mark.parametrize("shape", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 3, 4, 1), (1, 1, 1, 1), (0, 3, 4, 5)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("batches", [1, 2])
def test_channels_last_is_suggested_where_torch_takes_it_to_be(shape, memory_format, batches):
    x = torch.randn(batches * shape[0], *shape[1:]).contiguous(memory_format=memory_format)[::batches]
    expected = torch._prims_common.suggest_memory_format(x) == torch.channels_last
    assert F.suggests_channels_last(x) is expected
    assert not F.suggests_channels_last(x.flatten(1))
