"""The arithmetic of quantization: pure functions of tensors, no state.

`encode` defines which integer level a float becomes; kernels.c and gpu_kernels.py repeat it for speed. Equations: Li, Dong,
Wang, "Additive Powers-of-Two Quantization", ICLR 2020, arXiv 1909.13144.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active, _get_tracing_state, _len_torch_dispatch_stack
from torch.compiler import is_compiling
from torch.nn import Parameter

from .levels import LevelSet

PLAIN = (Tensor, Parameter)
MIN_CLIP = 1e-8  # a clip that training drives to zero or below would turn the whole layer into NaN


def is_traced() -> bool:
    """Whether something besides autograd follows what is computed now.

    A tracer (torch.compile, torch.export, make_fx, torch.jit.trace), a dispatch mode (fake tensors, a counter of
    operations) or a transform (vmap, grad of torch.func) sees torch's operations only. What our own kernels write, and
    what comes from a cache, would be a constant to it.
    """
    return (
        is_compiling()  # first, as torch.compile cannot enter the others
        or _len_torch_dispatch_stack() > 0
        or _are_functorch_transforms_active()
        or _get_tracing_state() is not None
    )


def is_plain(x: Tensor) -> bool:
    """Whether x is a tensor and nothing else, that nothing but autograd follows."""
    return type(x) in PLAIN and not is_traced()


def encoding_table(level_set: LevelSet, like: Tensor, dtype: torch.dtype) -> Tensor:
    """`level_set.encoding_table` beside the tensor `like`, not to be written to; in `dtype`, which holds 2^15 exactly."""
    if is_compiling():
        return _compiled_table(level_set.scheme, level_set.bits, level_set.signed, dtype, like.device)
    if is_plain(like):
        return _cached_table(level_set, dtype, like.device)
    return like.new_tensor(level_set.encoding_table, dtype=dtype)


@functools.cache
def _cached_table(level_set: LevelSet, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(level_set.encoding_table, dtype=dtype, device=device)


@torch.compiler.allow_in_graph  # with constants for arguments
def _compiled_table(scheme: str, bits: int, signed: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(LevelSet(scheme, bits, signed).encoding_table, dtype=dtype, device=device)


class Levels(NamedTuple):
    """What the arithmetic needs to know of a level set.

    `rectifier` is the range (low, high) of an activation function `clamp(low, high)` that comes before the levels, such
    as (0, inf) for ReLU: values are clamped to it, and no gradient passes at its ends or beyond them.
    """

    set: LevelSet
    rectifier: tuple[float, float] | None = None

    @property
    def max(self) -> int:
        return self.set.max

    @property
    def min(self) -> int:
        return -self.set.max if self.set.signed else 0


@dataclass(eq=False)
class Operand:
    """One factor of a quantized operator: float values and, unless they stay float, how they are quantized."""

    values: Tensor
    clip: Tensor | None  # [] or [C, 1, ...], as it was learned
    unit: Tensor | None  # [], what the clip counts; None for 1
    levels: Levels | None
    described: object = None  # see `kernels.describe`

    @property
    def used_clip(self) -> Tensor:
        """The clip as the arithmetic uses it: in the unit of the values, positive."""
        return (self.clip if self.unit is None else self.clip * self.unit).clamp_min(MIN_CLIP)

    @property
    def scale(self) -> Tensor:
        """The float step of one level; 1 for a float operand, in float32 whatever its values are."""
        if self.levels is None:
            return self.values.new_ones((), dtype=torch.float32)
        return level_step(self.used_clip, self.levels.max)


def level_step(clip: Tensor, max_level: int) -> Tensor:
    """`clip / max_level`, the float step of one level."""
    # By a tensor: CUDA divides by a number through its reciprocal, which rounds unlike the CPU.
    return clip / clip.new_full((), max_level)


def encode(x: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """The integer level of every element: the level nearest to `max * x / clip`, with the sign of x.

    Args:
        x: float tensor of any shape; float16 and bfloat16 are encoded in float32.
        clip: positive, broadcastable to x: shape [] or [C, 1, ...].
        levels: the level set.

    Returns:
        Integer-valued float tensor (float32, or float64 for a float64 x) of x's shape, in [-max, max], or
        [0, max] if unsigned. A tie goes to the larger magnitude; zero has no sign; NaN stays NaN.
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        x = x.float()
    low, high = 2 * levels.min, 2 * levels.max
    position = (rectify(x, levels) * (high / clip.to(x.dtype))).clamp_(low, high)
    index = position.to(torch.int32)  # truncates towards zero
    if low:
        index.sub_(low)
    index.clamp_(0, high - low)  # what NaN turned into differs between devices
    n = _look_up(encoding_table(levels.set, x, x.dtype), index)
    return n.add_(position, alpha=0.0)  # carries NaN through


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """`table[index]`, which costs twice as much where nothing traces it; `index` is dense, as it is new."""
    if is_compiling():
        # Of other formats torch.compile expects other strides than the look-up has.
        return table[index if suggests_channels_last(index) else index.contiguous()]
    if not is_plain(index):
        return table[index]
    return table.index_select(0, flat(index)).as_strided(index.shape, index.stride())


def rectify(x: Tensor, levels: Levels) -> Tensor:
    """x after the activation function that `levels` contain, if they do."""
    return x if levels.rectifier is None else x.clamp(*levels.rectifier)


def decode(n: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """The float values `clip * n / max` that integer levels n stand for; shapes as in `encode`."""
    return n * level_step(clip, levels.max)


def fake_quantize(x: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """`decode(encode(x))`: x moved to its nearest representable value. No gradient."""
    return decode(encode(x, clip, levels), clip, levels)


def quantization_gradient(
    grad: Tensor, x: Tensor, n: Tensor, clip: Tensor, levels: Levels, everywhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `decode(n)` with `n = encode(x)` for x and clip, given the gradient for its result (eq. 6-7).

    With `v = x / clip` and `q = n / max`: for x it is `grad` inside the clip and 0 outside (straight-through);
    for clip `sum(grad * (q - v))` inside and `sum(grad * sign(x))` outside. An unsigned set is clipped at 0
    as well. `everywhere` passes the gradient for x outside too (calibrated gradient, the paper's choice
    for 2-bit weights).

    Returns:
        (gradient for x, of x's shape; gradient for clip, of clip's shape).
    """
    # In units of n, which bfloat16 holds exactly; outside, n is already max * sign(x), or 0 below an unsigned set.
    position = rectify(x.to(torch.promote_types(clip.dtype, torch.float32)), levels) * (levels.max / clip)
    clamped = position.clamp(levels.min, levels.max)
    inside = position.eq_(clamped)
    error = torch.addcmul(n.to(clamped.dtype), clamped, inside, value=-1)
    if levels.rectifier is not None:
        low, high = levels.rectifier
        inside.mul_(x > low).mul_(x < high)
    grad_x = grad if everywhere else grad * inside.to(grad.dtype)
    return grad_x, _sum_of_products(grad, error, clip.shape) / levels.max


def _sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    if not shape and is_plain(a) and a.dtype == b.dtype and a.stride() == b.stride() and is_dense(a):
        return torch.dot(flat(a), flat(b))  # without the product in memory
    return (a * b).sum_to_size(shape)


def is_dense(x: Tensor) -> bool:
    """Whether x lies in memory without gaps, the first dimension outermost."""
    if x.is_contiguous():
        return True
    if x.dim() == 4:
        return x.is_contiguous(memory_format=torch.channels_last)
    return x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d)


def flat(x: Tensor) -> Tensor:
    """The elements of a dense x in the order of memory, as a view [x.numel()]."""
    return x.as_strided((x.numel(),), (1,))


def suggests_channels_last(x: Tensor) -> bool:
    """Whether torch takes x for channels-last when it picks the format of a convolution's output.

    Strides alone cannot tell it where a size is 1; this is the rule of c10's `is_channels_last_strides_2d`.
    """
    if x.dim() != 4 or not x.stride(1):
        return False
    least = 0
    for d in (1, 3, 2, 0):
        size, stride = x.size(d), x.stride(d)
        if not size or stride < least or (d == 0 and least == x.stride(1)):
            return False
        least = stride * max(size, 1)
    return True


def in_format(y: Tensor, channels_last: bool) -> Tensor:
    """y in the memory format, with the strides that torch gives a fresh tensor in it also where a size is 1."""
    if y.dim() != 4:
        return y.contiguous()
    y = y.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    _, c, h, w = y.shape
    return y.as_strided(y.shape, (c * h * w, 1, w * c, c) if channels_last else (c * h * w, h * w, w, 1))


def standard_deviation(w: Tensor) -> Tensor:
    """Unbiased, of all elements (0 for a single one), but never less than MIN_CLIP; shape []."""
    return w.std(correction=1 if w.numel() > 1 else 0).clamp_min(MIN_CLIP)
