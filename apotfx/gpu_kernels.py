"""The arithmetic of `functional` on a GPU, in Triton: one pass over memory for levels, one for both gradients.

Importing this module needs Triton. With TRITON_INTERPRET=1 in the environment it computes on the CPU, slowly.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functional import MIN_CLIP, PLAIN, Operand, encoding_table, is_dense

BLOCK = 1024  # values that a program holds at once
MAX_PROGRAMS = 2048  # for each clip; they share its values, and leave a sum each
MAX_CLIPS = 65535  # what the second dimension of a grid holds


def accept(operand: Operand) -> bool:
    """Whether the kernels can work on `operand`; see also `functional.is_traced`. All functions below need that."""
    x, clip, unit, levels = operand.values, operand.clip, operand.unit, operand.levels
    return (
        levels is not None
        and accept_values(x)
        and clip.dtype == torch.float32
        and clip.is_contiguous()
        and clip.numel() <= MAX_CLIPS
        and (unit is None or unit.dtype == torch.float32)
        and all(x.device == other.device for other in (clip, unit) if other is not None)
    )


def accept_values(x: Tensor) -> bool:
    """Whether the kernels can work on the values x."""
    known = x.dtype in (torch.float32, torch.bfloat16, torch.float16) and type(x) in PLAIN
    return known and x.numel() > 0 and is_dense(x)


@triton.jit
def _load_clip(clip_ptr, unit_ptr, row, min_clip, HAS_UNIT: tl.constexpr):
    clip = tl.load(clip_ptr + row)
    if HAS_UNIT:
        clip = clip * tl.load(unit_ptr)
    return tl.where(clip < min_clip, min_clip, clip)  # lets NaN through, as all comparisons below


@triton.jit
def _clamp(x, low, high):
    x = tl.where(x < low, low, x)
    return tl.where(x > high, high, x)


@triton.jit
def _divide(a, b):
    """The quotient of scalars, correctly rounded, as `/` is not."""
    return tl.div_rn(tl.full((), a, tl.float32), tl.full((), b, tl.float32))


@triton.jit
def _over(a, clip):
    """`a / clip` for a Python number a, as torch computes it."""
    return _divide(1.0, clip) * a


@triton.jit
def _levels(x, clip, table_ptr, lowest, highest):
    """`functional.encode` of rectified values; lowest and highest level as float32."""
    position = _clamp(x * _over(2 * highest, clip), 2 * lowest, 2 * highest)
    is_number = position == position
    index = tl.where(is_number, position, 0.0).to(tl.int32) - tl.full((), 2 * lowest, tl.float32).to(tl.int32)
    return tl.where(is_number, tl.load(table_ptr + index).to(tl.float32), position)


@triton.jit
def _scale(
    clip_ptr, unit_ptr, factor_ptr, scale_ptr, highest, min_clip, HAS_UNIT: tl.constexpr, HAS_FACTOR: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0)
    scale = _divide(_load_clip(clip_ptr, unit_ptr, row, min_clip, HAS_UNIT), highest)
    if HAS_FACTOR:
        scale = scale * tl.load(factor_ptr)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _encode(
    x_ptr, clip_ptr, unit_ptr, factor_ptr, table_ptr, n_ptr, count, lowest, highest, low, high, min_clip,
    HAS_UNIT: tl.constexpr, HAS_FACTOR: tl.constexpr, RECTIFIED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1)
    column = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = column < count
    position = row.to(tl.int64) * count + column
    clip = _load_clip(clip_ptr, unit_ptr, row, min_clip, HAS_UNIT)
    x = tl.load(x_ptr + position, mask=inside, other=0.0).to(tl.float32)
    n = _levels(_clamp(x, low, high) if RECTIFIED else x, clip, table_ptr, lowest, highest)
    if HAS_FACTOR:
        n = n * (_divide(clip, highest) * tl.load(factor_ptr))
    tl.store(n_ptr + position, n.to(n_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gradient(
    grad_ptr, x_ptr, clip_ptr, unit_ptr, factor_ptr, table_ptr, grad_x_ptr, sum_ptr, count, lowest, highest, low, high,
    min_clip, HAS_UNIT: tl.constexpr, HAS_FACTOR: tl.constexpr, RECTIFIED: tl.constexpr, EVERYWHERE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, first, programs = tl.program_id(1), tl.program_id(0), tl.num_programs(0)
    clip = _load_clip(clip_ptr, unit_ptr, row, min_clip, HAS_UNIT)
    per_clip = _over(highest, clip)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(first, tl.cdiv(count, BLOCK), programs):
        column = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        mask = column < count
        position = row.to(tl.int64) * count + column
        x = tl.load(x_ptr + position, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(grad_ptr + position, mask=mask, other=0.0).to(tl.float32)
        if HAS_FACTOR:
            grad = grad * tl.load(factor_ptr)
        rectified = _clamp(x, low, high) if RECTIFIED else x
        value = rectified * per_clip
        clamped = _clamp(value, lowest, highest)
        passes = value == clamped
        error = _levels(rectified, clip, table_ptr, lowest, highest) - tl.where(passes, clamped, 0.0)
        total += tl.where(mask, grad * error, 0.0)
        if RECTIFIED:
            passes = passes & (x > low) & (x < high)
        grad_x = grad if EVERYWHERE else grad * passes.to(tl.float32)
        tl.store(grad_x_ptr + position, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
    tl.store(sum_ptr + row * programs + first, tl.sum(total))


@triton.jit
def _finish(sum_ptr, unit_ptr, grad_clip_ptr, count, highest, HAS_UNIT: tl.constexpr, BLOCK: tl.constexpr):
    row, column = tl.program_id(0), tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sum_ptr + row * count + column, mask=column < count, other=0.0)) / highest
    if HAS_UNIT:
        total = total * tl.load(unit_ptr)
    tl.store(grad_clip_ptr + row, total)


@triton.jit
def _moments(x_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    first, programs = tl.program_id(0), tl.num_programs(0)
    total, squares = tl.zeros([BLOCK], tl.float64), tl.zeros([BLOCK], tl.float64)
    for block in range(first, tl.cdiv(count, BLOCK), programs):
        position = tl.cast(block, tl.int64) * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + position, mask=position < count, other=0.0).to(tl.float64)
        total += x
        squares += x * x
    tl.store(sums_ptr + first, tl.sum(total))
    tl.store(sums_ptr + programs + first, tl.sum(squares))


@triton.jit
def _deviation(sums_ptr, result_ptr, programs, count, correction, least, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    total = tl.sum(tl.load(sums_ptr + column, mask=column < programs, other=0.0))
    squares = tl.sum(tl.load(sums_ptr + programs + column, mask=column < programs, other=0.0))
    n = tl.full((), count, tl.float64)
    variance = (squares - total * total / n) / (n - correction)
    variance = tl.where(variance < 0, 0.0, variance)
    deviation = tl.sqrt(variance).to(tl.float32)
    tl.store(result_ptr, tl.where(deviation < least, least, deviation))


def standard_deviation(x: Tensor) -> Tensor:
    """`functional.standard_deviation`, summed in float64; float32 []."""
    programs = min(triton.cdiv(x.numel(), BLOCK), MAX_PROGRAMS)
    sums, result = x.new_empty(2 * programs, dtype=torch.float64), x.new_empty((), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _moments[(programs,)](x, sums, x.numel(), BLOCK=BLOCK)
        _deviation[(1,)](
            sums, result, programs, x.numel(), int(x.numel() > 1), MIN_CLIP, BLOCK=triton.next_power_of_2(programs)
        )
    return result


def _describe(operand: Operand) -> tuple[int, tuple, dict]:
    """(values for each clip, the arguments that `_encode` and `_gradient` share after their pointers, their flags)."""
    levels = operand.levels
    low, high = levels.rectifier or (0.0, 0.0)
    count = operand.values.numel() // operand.clip.numel()
    arguments = (count, float(levels.min), float(levels.max), float(low), float(high), MIN_CLIP)
    return count, arguments, {"HAS_UNIT": operand.unit is not None, "RECTIFIED": levels.rectifier is not None}


def _table(operand: Operand) -> Tensor:
    return encoding_table(operand.levels.set, operand.values, torch.int32)


def scale(operand: Operand, factor: Tensor | None = None) -> Tensor:
    """`operand.scale`, times a factor (float32 []) if there is one; shape of the clip."""
    clip, unit = operand.clip, operand.unit
    result = torch.empty_like(clip)
    with torch.cuda.device_of(clip):
        _scale[(clip.numel(),)](
            clip, clip if unit is None else unit, clip if factor is None else factor, result, float(operand.levels.max),
            MIN_CLIP, HAS_UNIT=unit is not None, HAS_FACTOR=factor is not None,
        )  # fmt: skip
    return result


def encode(operand: Operand, factor: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """The levels of `operand` in `dtype`, with a factor (float32 []) times it and their float step.

    As `functional.encode` and `functional.decode` compute them in float32, in every bit.
    """
    x, clip, unit = operand.values, operand.clip, operand.unit
    count, arguments, flags = _describe(operand)
    n = torch.empty_like(x, dtype=dtype)
    with torch.cuda.device_of(x):
        _encode[(triton.cdiv(count, BLOCK), clip.numel())](
            x, clip, clip if unit is None else unit, clip if factor is None else factor, _table(operand), n,
            *arguments, HAS_FACTOR=factor is not None, BLOCK=BLOCK, **flags,
        )  # fmt: skip
    return n


def gradient(grad: Tensor, operand: Operand, factor: Tensor | None, everywhere: bool) -> tuple[Tensor, Tensor]:
    """`functional.quantization_gradient` of `factor * grad`, for the values in their dtype and the clip in its unit.

    Sums in float32, in the same order every time.
    """
    x, clip, unit = operand.values, operand.clip, operand.unit
    if grad.stride() != x.stride():
        grad = torch.empty_like(x, dtype=grad.dtype).copy_(grad)
    count, arguments, flags = _describe(operand)
    programs = min(triton.cdiv(count, BLOCK), MAX_PROGRAMS)
    grad_x, grad_clip = torch.empty_like(x), torch.empty_like(clip)
    sums = torch.empty(clip.numel() * programs, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        _gradient[(programs, clip.numel())](
            grad, x, clip, clip if unit is None else unit, clip if factor is None else factor, _table(operand),
            grad_x, sums, *arguments, HAS_FACTOR=factor is not None, EVERYWHERE=everywhere, BLOCK=BLOCK, **flags,
        )  # fmt: skip
        _finish[(clip.numel(),)](
            sums, clip if unit is None else unit, grad_clip, programs, float(operand.levels.max),
            HAS_UNIT=unit is not None, BLOCK=triton.next_power_of_2(programs),
        )  # fmt: skip
    return grad_x, grad_clip
