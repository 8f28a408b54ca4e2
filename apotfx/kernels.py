"""Compiles kernels.c with the machine's C compiler, keeps the result, and calls it on tensors."""

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import logging
import math
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from ctypes import POINTER, c_float, c_int, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import ApotfxError
from .files import write_atomic
from .functional import PLAIN, Levels, Operand, is_dense
from .levels import LevelSet

SOURCE = Path(__file__).with_name("kernels.c")
PIECE = 1024  # as in kernels.c
# Without contraction (fused multiply-add), which would change the last bit.
FLAGS = ("-std=gnu11", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fPIC")
NATIVE = (("-march=native", "-mprefer-vector-width=512"), ("-march=native",), ("-mcpu=native",), ())
SIMD = (("-fopenmp-simd",), ())
SECONDS = 120  # that the compiler may take
MAX_BYTES = 2**26  # of a compiled library


class _Levels(ctypes.Structure):
    _fields_ = [
        ("table", c_void_p), ("max", c_int32), ("is_signed", c_int32), ("rectified", c_int32), ("low", c_float),
        ("high", c_float),
    ]  # fmt: skip


class _Operand(ctypes.Structure):
    _fields_ = [
        ("values", c_void_p), ("rows", c_int64), ("cols", c_int64), ("clip", c_void_p), ("unit", c_void_p),
        ("levels", c_void_p),
    ]  # fmt: skip


class _Term(ctypes.Structure):
    _fields_ = [("bias", c_void_p), ("multiplier", c_void_p), ("offset", c_void_p)]


class _Encoder(ctypes.Structure):
    _fields_ = [
        ("low", c_float), ("high", c_float), ("by", c_float), ("bottom", c_float), ("top", c_float),
        ("zero_point", c_int32), ("is_uniform", c_int32), ("num_steps", c_int32),
        ("start", c_void_p), ("step", c_void_p), ("table", c_void_p),
    ]  # fmt: skip


class _Pointwise(ctypes.Structure):
    _fields_ = [
        ("channels", c_int64), ("term", _Term * 2), ("low", c_float), ("high", c_float),
        ("num_encoders", c_int32), ("encoder", c_void_p),
    ]  # fmt: skip


class Unavailable(Exception):
    """There is no way to compile or load the kernels; the message says why."""


def find_compiler() -> list[str] | None:
    """The command of the C compiler: CC, or the system's, or Zig's, which is a Python package."""
    given = os.environ.get("CC", "").split()
    if given:
        return given
    found = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if found is None and importlib.util.find_spec("ziglang") is not None:
        return [sys.executable, "-m", "ziglang", "cc"]
    return None if found is None else [found]


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernels, from the cache where an earlier process left them.

    Raises:
        Unavailable: no compiler, or none of its results can be loaded.
    """
    compiler, problems = find_compiler(), []
    if compiler is None:
        raise Unavailable("no C compiler (cc, gcc or clang) is installed; pip install 'apotfx[compiler]' brings one")
    for simd in SIMD:
        for native in NATIVE:
            try:
                return _compile([*compiler, *FLAGS, *simd, *native])
            except subprocess.TimeoutExpired:  # with other flags it would take as long
                raise Unavailable(f"the C compiler {' '.join(compiler)} did not end in {SECONDS} seconds") from None
            except (OSError, subprocess.SubprocessError) as error:
                problems.append(error)
    raise Unavailable(f"the C compiler {' '.join(compiler)} failed ({_first_line(problems[0])})")


def _first_line(error: Exception) -> str:
    text = (getattr(error, "stderr", None) or "").strip()
    if not text and isinstance(error, subprocess.CalledProcessError):
        return f"exit status {error.returncode}"
    return (text or str(error) or type(error).__name__).splitlines()[0]


def _compile(command: list[str]) -> ctypes.CDLL:
    """The library that `command` makes of kernels.c, from the cache or into it."""
    key = _digest("\n".join([SOURCE.read_text(), *command, _processor()]).encode())
    cache = _cache_directory()
    for cached in cache.glob(f"kernels-{key}-*.so") if cache else ():
        with contextlib.suppress(OSError):
            if cached.name == _file_name(key, _read_own(cached)):  # to load a damaged one would kill the process
                return _load(cached)
    with tempfile.TemporaryDirectory() as folder:
        if not _is_private(Path(folder).resolve()):
            raise OSError(f"others can write where temporary files are, {tempfile.gettempdir()}; set TMPDIR")
        compiled, linked = Path(folder, "kernels.o"), Path(folder, "kernels.so")
        link = ["-undefined", "dynamic_lookup"] if platform.system() == "Darwin" else []
        for step in (
            [*command, "-c", str(SOURCE), "-o", str(compiled)],
            [*command, "-shared", *link, str(compiled), "-o", str(linked)],
        ):
            _run(step)
        loaded, content = _load(linked), linked.read_bytes()
    if cache:
        with contextlib.suppress(OSError):  # without a cache the next process compiles again
            write_atomic(cache / _file_name(key, content), content, mode=0o600)
    return loaded


def _run(command: list[str]) -> None:
    """Raises: SubprocessError, OSError: it failed, or took more than `SECONDS`; then what it started is ended too."""
    with tempfile.TemporaryFile() as said:  # a pipe would be waited for as long as a child of the compiler's has it
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True
        )
        try:
            code = process.wait(SECONDS)
        except BaseException:
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            raise
        if code:
            said.seek(0)
            raise subprocess.CalledProcessError(code, command, stderr=said.read(2**16).decode(errors="replace"))


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:24]


def _file_name(key: str, content: bytes) -> str:
    return f"kernels-{key}-{_digest(content)}.so"


def _cache_directory() -> Path | None:
    """Where compiled kernels are kept: `apotfx` in APOTFX_CACHE or in the user's cache; made if need be.

    None where there is no such place, or where somebody else could put code that this process would run.
    """
    root = os.environ.get("APOTFX_CACHE") or os.environ.get("XDG_CACHE_HOME")
    if not root:
        home = os.environ.get("HOME", os.path.expanduser("~"))
        root = os.path.join(home, ".cache") if os.path.isdir(home) else ""
    directory = Path(os.path.expanduser(root), "apotfx")
    if not directory.is_absolute():
        return None
    try:
        directory = directory.resolve()
        for place in reversed((directory, *directory.parents)):
            if not place.exists():
                place.mkdir(mode=0o700)
        if _is_private(directory):
            return directory
    except (OSError, RuntimeError):  # RuntimeError: a circle of links
        return None
    logging.getLogger("apotfx").warning(
        f"compiled code is not kept: others can write in {directory} or above it; take their permission (chmod go-w)"
    )
    return None


def _is_private(directory: Path) -> bool:
    """Whether nobody but this user, and root, can put or exchange files in `directory`, which has no links in it."""
    if not hasattr(os, "geteuid"):
        return True
    for place in (directory, *directory.parents):
        status = place.lstat()
        is_sticky = place != directory and status.st_mode & stat.S_ISVTX
        if status.st_uid not in (os.geteuid(), 0) or (status.st_mode & 0o022 and not is_sticky):
            return False
    return directory.is_dir() and directory.stat().st_uid == os.geteuid()


def _read_own(path: Path) -> bytes:
    """Raises: OSError: not a file of this user's that nobody else can write to."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_mode & 0o022:
            raise PermissionError(f"{path}: others can write to it")
        if hasattr(os, "geteuid") and status.st_uid != os.geteuid():
            raise PermissionError(f"{path}: is another user's")
        return file.read(MAX_BYTES)


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
    operand = POINTER(_Operand)
    for function, result, arguments in (
        (loaded.scale, None, [operand, c_void_p, c_void_p]),
        (loaded.encode_float, c_int, [operand, c_void_p, c_void_p, c_void_p]),
        (loaded.encode_byte, c_int, [operand, c_void_p, c_void_p, c_void_p]),
        (loaded.gradient, c_int, [operand, c_void_p, c_void_p, c_void_p, c_int32, c_void_p]),
        (loaded.standard_deviation, c_int, [c_void_p, c_int64, c_void_p]),
        (loaded.pointwise, c_int, [POINTER(_Pointwise), c_int64, c_void_p, c_void_p, c_void_p, POINTER(c_void_p)]),
    ):
        function.argtypes, function.restype = arguments, result
    return loaded


class Described(NamedTuple):
    """An operand as the kernels take it, and the tensor with its values, which are dense."""

    operand: _Operand
    values: Tensor
    table: int  # where the levels of all encodings are, as float32


def describe(operand: Operand) -> Described | None:
    """`operand` for the kernels; None if they do not work on such a one. It must outlive what is returned.

    What takes an operand below takes one for which this is not None.
    """
    described = operand.described
    if described is None:
        described = operand.described = _describe(operand) if accept(operand) else False
    return described or None


def accept(operand: Operand) -> bool:
    """Whether the kernels can work on `operand`, or on a dense copy of its values; see also `functional.is_traced`."""
    x, clip, unit = operand.values, operand.clip, operand.unit
    return (
        operand.levels is not None
        and x.dtype == clip.dtype == torch.float32
        and (unit is None or unit.dtype == torch.float32)
        and x.device.type == clip.device.type == "cpu"
        and (unit is None or unit.device.type == "cpu")
        and type(x) in PLAIN
        and type(clip) in PLAIN
        and x.numel() > 0
        and clip.is_contiguous()
    )


def _describe(operand: Operand) -> Described:
    values, clip, unit, levels = operand.values, operand.clip, operand.unit, operand.levels
    if not is_dense(values):
        values = values.contiguous()
    rows, (address, table, _) = clip.numel(), _describe_levels(levels.set, levels.rectifier)
    described = _Operand(values.data_ptr(), rows, values.numel() // rows, clip.data_ptr(), _pointer(unit), address)
    return Described(described, values, table)


@functools.cache
def _describe_levels(level_set: LevelSet, rectifier: tuple[float, float] | None) -> tuple[int, int, tuple]:
    """Addresses of a `_Levels` and of its table, and both, which live as long as the cache."""
    table = torch.tensor(level_set.encoding_table, dtype=torch.float32, device="cpu")
    low, high = rectifier or (0.0, 0.0)
    levels = _Levels(table.data_ptr(), level_set.max, level_set.signed, rectifier is not None, low, high)
    return ctypes.addressof(levels), table.data_ptr(), (levels, table)


class _Scratch(threading.local):
    """Buffers by name that are used again, as a fresh one would have to be mapped into memory page by page."""

    def __init__(self):
        torch.get_num_threads()  # by which torch hands its number of threads to OpenMP, in every thread anew
        self.buffers: dict[tuple[str, torch.dtype], Tensor] = {}

    def like(self, x: Tensor, name: str | None, dtype: torch.dtype) -> Tensor:
        """An uninitialised tensor of x's shape and strides; without a name a fresh one."""
        if name is None:
            return torch.empty_like(x, dtype=dtype)
        buffer = self.buffers.get((name, dtype))
        if buffer is None or buffer.numel() < x.numel():
            buffer = self.buffers[name, dtype] = torch.empty(x.numel(), dtype=dtype, device="cpu")
        return buffer.as_strided(x.shape, x.stride())


_scratch = _Scratch()


def scale(operand: Operand, factor: Tensor | None = None) -> Tensor:
    """`operand.scale`, times a factor (shape []) if there is one; shape of the clip."""
    steps, factor = torch.empty_like(operand.clip), _as_float(factor)
    library().scale(describe(operand).operand, _pointer(factor), steps.data_ptr())
    return steps


def encode(operand: Operand, factor: Tensor | None = None, scratch: str | None = None) -> Tensor | None:
    """The levels of `operand`, with a factor (shape []) times it and their float step; None if a value is NaN.

    As `functional.encode` and `functional.decode` compute them, in every bit. With the name of a `scratch` buffer, they
    last until the next call with that name in the same thread.
    """
    described, values, table = describe(operand)
    n, factor = _scratch.like(values, scratch, torch.float32), _as_float(factor)
    has_nan = library().encode_float(described, table, n.data_ptr(), _pointer(factor))
    return None if has_nan else n


def encode_bytes(
    operand: Operand, dtype: torch.dtype, zero_point: int = 0, scratch: str | None = None
) -> list[Tensor] | None:
    """The levels of `operand` plus `zero_point` as `split_bytes` gives them; None for NaN. `scratch` as in `encode`."""
    described, values, _ = describe(operand)
    parts = []
    for i, table in enumerate(_byte_tables(operand.levels.set, zero_point)):
        parts.append(_scratch.like(values, scratch and f"{scratch}{i}", dtype))
        if library().encode_byte(described, table.data_ptr(), parts[-1].data_ptr(), None):
            return None
    return parts


def gradient(grad: Tensor, operand: Operand, factor: Tensor | None, everywhere: bool) -> tuple[Tensor, Tensor]:
    """`functional.quantization_gradient` of `factor * grad`, for the values and for the clip in its unit.

    Overwrites `grad`, where that has the strides of the values, with the result.
    """
    described, values, _ = describe(operand)
    if grad.stride() != values.stride():
        grad = torch.empty_like(values).copy_(grad)
    grad_clip, address, factor = torch.empty_like(operand.clip), grad.data_ptr(), _as_float(factor)
    if library().gradient(described, address, address, _pointer(factor), everywhere, grad_clip.data_ptr()):
        raise MemoryError("no memory for the gradient of a clip")
    return grad, grad_clip


def standard_deviation(x: Tensor) -> Tensor:
    """`functional.standard_deviation` of a dense float32 x on the CPU that is not empty, summed in float64."""
    result = torch.empty((), dtype=torch.float32, device="cpu")
    if library().standard_deviation(x.data_ptr(), x.numel(), result.data_ptr()):
        raise MemoryError("no memory for a standard deviation")
    return result


class Term(NamedTuple):
    """A summand of `pointwise`: (value + bias) * multiplier + offset, each float32 [C] or None; the last two together."""

    bias: Tensor | None = None
    multiplier: Tensor | None = None
    offset: Tensor | None = None


class Encoder(NamedTuple):
    """How `pointwise` encodes: as `encode_bytes`, with a clip of shape []."""

    clip: Tensor
    levels: Levels
    zero_point: int


def pointwise(
    terms: Sequence[Term], low: float, high: float, encoders: Sequence[Encoder], *, keep_float: bool
) -> Callable[..., list[Tensor]]:
    """What lies between two integer layers, in one pass: `x = clamp(sum of terms, low, high)`, then encoded.

    Returns:
        A function of one float32 tensor per term (one or two), whose channels are innermost in memory and whose
        strides are equal. It returns x, if `keep_float`, and the levels plus zero point for every encoder, uint8.

    Raises (the function):
        ApotfxError: x has NaN.
    """
    channels = next((len(part) for term in terms for part in term if part is not None), 1)
    repeats = -(-PIECE // channels) + 1
    alive = [[None if part is None else part.repeat(repeats) for part in term] for term in terms]
    array = (_Encoder * max(len(encoders), 1))(*map(_describe_encoder, encoders))
    settings = _Pointwise(
        channels, (_Term * 2)(*(_Term(*map(_pointer, term)) for term in alive)), low, high, len(encoders),
        ctypes.addressof(array),
    )  # fmt: skip
    reference, call, num_codes = ctypes.byref(settings), library().pointwise, len(encoders)
    pointer_array = c_void_p * max(num_codes, 1)
    kept = (alive, array)  # as long as the function lives

    def run(a: Tensor, b: Tensor | None = None) -> list[Tensor]:
        results = [torch.empty_like(a)] if keep_float else []
        results += [torch.empty_like(a, dtype=torch.uint8) for _ in range(num_codes)]
        pointers = [result.data_ptr() for result in results]
        out = pointers.pop(0) if keep_float else None
        if call(reference, a.numel(), a.data_ptr(), _pointer(b), out, pointer_array(*pointers)) and kept:
            raise ApotfxError("integer network: its input has NaN, or numbers so large that they become NaN")
        return results

    return run


def _describe_encoder(encoder: Encoder) -> _Encoder:
    levels, zero_point = encoder.levels, encoder.zero_point
    low, high = levels.rectifier or (-math.inf, math.inf)
    by = (2 * levels.max / encoder.clip).item()  # as functional.encode has it
    starts, steps = _steps(levels.set)
    (table,) = _byte_tables(levels.set, zero_point)
    return _Encoder(
        low, high, by, 2 * levels.min, 2 * levels.max, zero_point, levels.set.scheme == "uniform", len(starts),
        starts.data_ptr(), steps.data_ptr(), table.data_ptr(),
    )  # fmt: skip


@functools.cache
def _steps(level_set: LevelSet) -> tuple[Tensor, Tensor]:
    """uint8 (entries of the encoding table that differ from the one before, by how much); none if they are too many."""
    table = torch.tensor(level_set.encoding_table, device="cpu")
    steps = table.diff()
    starts = steps.nonzero().flatten() + 1
    if len(table) > 256 or len(starts) > 32:
        starts = starts[:0]
    return starts.to(torch.uint8), steps[starts - 1].to(torch.uint8)


def fits_byte(level_set: LevelSet) -> bool:
    """Whether one byte holds every level; two do otherwise."""
    return level_set.max < (2**7 if level_set.signed else 2**8)


@functools.cache
def _byte_tables(level_set: LevelSet, zero_point: int) -> list[Tensor]:
    """int32 tables of the bytes of `level + zero_point`, the lowest first."""
    return split_bytes(torch.tensor(level_set.encoding_table, dtype=torch.int32, device="cpu"), level_set, zero_point)


def split_bytes(n: Tensor, level_set: LevelSet, zero_point: int) -> list[Tensor]:
    """Tensors b with `n = b[0] - zero_point`, or `n = (b[0] - zero_point) + 256 (b[1] - zero_point)` for wide levels."""
    parts = [n]
    if not fits_byte(level_set):
        low = torch.remainder(n + 128, 256) - 128 if level_set.signed else torch.remainder(n, 256)
        parts = [low, (n - low) // 256]
    return [part + zero_point for part in parts]


def _as_float(factor: Tensor | None) -> Tensor | None:
    """A factor as the kernels read it: that of the other operand, which may have another type or device."""
    return None if factor is None else factor.float().cpu()


def _pointer(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
