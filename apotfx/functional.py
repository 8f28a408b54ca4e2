"""The arithmetic of quantization: pure functions of tensors, no state.

`encode` is the only place where a float becomes an integer level; training, export and the integer
model all call it. `quantized_op` is a convolution or matrix product of integer levels with one
multiplication after it, and carries the paper's gradients. Equations: Li, Dong, Wang, "Additive
Powers-of-Two Quantization", ICLR 2020, arXiv 1909.13144.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .levels import LevelSet

MIN_CLIP = 1e-8  # a clip that training drives to zero or below would turn the whole layer into NaN
FLOAT32_EXACT = 2**24  # integers, and sums of integers, are exact in float32 below this
BFLOAT16_EXACT = 2**8
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked here, as torch.compile would break the graph on it


class Levels(NamedTuple):
    """What the arithmetic needs of a `LevelSet`: its encoding table as an integer tensor, and its signs."""

    table: Tensor  # int32 [2 * max + 1], or [4 * max + 1] if signed
    max: int
    signed: bool

    @classmethod
    def of(cls, level_set: LevelSet, device: torch.device | None = None) -> "Levels":
        return cls(
            torch.tensor(level_set.encoding_table, dtype=torch.int32, device=device), level_set.max, level_set.signed
        )


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
    high = 2 * levels.max
    low = -high if levels.signed else 0
    position = (x * (high / clip.to(x.dtype))).clamp_(low, high)
    index = position.to(torch.int32)  # truncates towards zero
    if low:
        index.sub_(low)
    index.clamp_(0, high - low)  # what NaN turned into differs between devices
    table = levels.table.to(x.dtype)
    if index.is_contiguous():
        n = table.index_select(0, index.view(-1)).view(index.shape)  # twice as fast as table[index]
    else:
        n = table[index]
    return n.add_(position, alpha=0.0)  # carries NaN through


def decode(n: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """The float values `clip * n / max` that integer levels n stand for; shapes as in `encode`."""
    return n * (clip / levels.max)


def fake_quantize(x: Tensor, clip: Tensor, levels: Levels) -> Tensor:
    """`decode(encode(x))`: x moved to its nearest representable value. No gradient."""
    return decode(encode(x, clip, levels), clip, levels)


def quantization_gradient(
    grad: Tensor, x: Tensor, n: Tensor, clip: Tensor, levels: Levels, everywhere: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of `decode(encode(x))` for x and clip, given the gradient for its result (eq. 6-7).

    With `v = x / clip` and `q = n / max`: for x it is `grad` inside the clip and 0 outside (straight-through);
    for clip `sum(grad * (q - v))` inside and `sum(grad * sign(x))` outside. An unsigned set is clipped at 0
    as well. `everywhere` passes the gradient for x outside too (calibrated gradient, the paper's choice
    for 2-bit weights).

    Returns:
        (gradient for x, of x's shape; gradient for clip, of clip's shape).
    """
    # In units of n, which bfloat16 holds exactly; outside, n is already max * sign(x), or 0 below an unsigned set.
    position = x.to(torch.promote_types(clip.dtype, torch.float32)) * (levels.max / clip)
    clamped = position.clamp(-levels.max if levels.signed else 0, levels.max)
    inside = position.eq_(clamped)
    grad_x = grad if everywhere else grad * inside.to(grad.dtype)
    error = torch.addcmul(n.to(clamped.dtype), clamped, inside, value=-1)
    return grad_x, _sum_of_products(grad, error, clip.shape) / levels.max


def _sum_of_products(a: Tensor, b: Tensor, shape: torch.Size) -> Tensor:
    if not shape and a.dtype == b.dtype and a.is_contiguous() and b.is_contiguous():
        return torch.dot(a.view(-1), b.view(-1))  # without the product in memory
    return (a * b).sum_to_size(shape)


class Convolution(NamedTuple):
    """A convolution of any dimension, without bias."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """The shape that broadcasts one value per output channel over the output."""
        return (-1, *(1 for _ in self.stride))

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(
            x, w, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride), self.groups
        )

    def backward(self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]):
        """Gradients for x and w, None where `needs` is false."""
        if grad.dtype == torch.bfloat16 and grad.device.type == "cpu":
            # oneDNN leaves bfloat16 weight gradients unset where a tap meets padding only (3x3 on a 1x1 map).
            grad, x, w = grad.float(), x.float(), w.float()
        return torch.ops.aten.convolution_backward(
            grad, x, w, None, self.stride, self.padding, self.dilation, False, [0] * len(self.stride),
            self.groups, [*needs, False],
        )[:2]  # fmt: skip


class MatrixProduct(NamedTuple):
    """`x @ w.T`, a linear layer without bias."""

    channel_shape: tuple[int, ...] = (-1,)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT

    def backward(self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]):
        grad_x = grad @ w if needs[0] else None
        grad_w = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return grad_x, grad_w


Operator = Convolution | MatrixProduct


def accumulator_bound(weight_shape: torch.Size, max_w: int, max_x: int) -> int:
    """The largest magnitude that an accumulator of a layer can reach: `K * max_w * max_x`.

    K = in_channels / groups * kernel size = elements of the weight per output channel.
    """
    return weight_shape[1:].numel() * max_w * max_x


def exact_dtype(weight_shape: torch.Size, max_w: int, max_x: int, device: torch.device) -> torch.dtype:
    """A dtype in which the accumulators of a layer are exact, whatever the order of summation.

    float32 where `accumulator_bound` allows it, and the levels too, should the user let float32 products run
    in bfloat16. float64 elsewhere: cuDNN and NNPACK (used where oneDNN is missing or off) may compute float32
    convolutions by Winograd or FFT, which are not exact on integers; they have none for float64.
    """
    exact = accumulator_bound(weight_shape, max_w, max_x) < FLOAT32_EXACT and max(max_w, max_x) <= BFLOAT16_EXACT
    direct = device.type == "cpu" and HAS_ONEDNN and torch.backends.mkldnn.enabled
    return torch.float32 if exact and direct else torch.float64


def scaled_op(n_x: Tensor, n_w: Tensor, scale: Tensor, operator: Operator, dtype: torch.dtype) -> Tensor:
    """`scale * operator(n_x, n_w)`, the accumulators computed in `dtype`.

    Args:
        n_x: integer levels of the input (or, for a float input, its values).
        n_w: integer levels of the weight (or its values).
        scale: shape [], or whatever broadcasts over the output.

    Returns:
        A tensor of scale's dtype.
    """
    device = n_x.device.type
    if torch.is_autocast_enabled(device):
        with torch.autocast(device, enabled=False):
            return scaled_op(n_x, n_w, scale, operator, dtype)
    return operator.forward(n_x.to(dtype), n_w.to(dtype)).to(scale.dtype) * scale


class _QuantizedOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, clip_x, clip_w, rescale, levels_x, levels_w, operator, dtype, clip_grad_factor, everywhere):
        n_x, scale_x, clip_x = _encode_operand(x, clip_x, levels_x)
        n_w, scale_w, clip_w = _encode_operand(w, clip_w, levels_w)
        scale_w = scale_w * rescale
        n_x, n_w = n_x.to(dtype), n_w.to(dtype)
        ctx.save_for_backward(x, w, clip_x, clip_w, n_x, n_w, scale_x, scale_w)
        ctx.rescale = rescale
        ctx.levels_x, ctx.levels_w, ctx.operator = levels_x, levels_w, operator
        ctx.clip_grad_factor, ctx.everywhere = clip_grad_factor, everywhere
        return scaled_op(n_x, n_w, output_scale(scale_x, scale_w, operator), operator, dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, w, clip_x, clip_w, n_x, n_w, scale_x, scale_w = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        needs_w = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        # The scales go into the smaller operands, which saves a pass over the output and over the input.
        grad_x, grad_w = ctx.operator.backward(
            grad.to(n_x.dtype), n_x, (n_w * scale_w).to(n_x.dtype), (needs_x, needs_w)
        )
        grad_clip_x = grad_clip_w = None
        if needs_x:
            grad_x = grad_x.to(x.dtype)
            if ctx.levels_x is not None:
                grad_x, grad_clip_x = quantization_gradient(grad_x, x, n_x, clip_x, ctx.levels_x)
                grad_clip_x = grad_clip_x * ctx.clip_grad_factor
        if needs_w:
            grad_w = grad_w.to(w.dtype) * (scale_x * ctx.rescale)
            if ctx.levels_w is not None:
                grad_w, grad_clip_w = quantization_gradient(grad_w, w, n_w, clip_w, ctx.levels_w, ctx.everywhere)
                grad_clip_w = grad_clip_w * ctx.clip_grad_factor
        return grad_x, grad_w, grad_clip_x, grad_clip_w, *(None for _ in range(7))


def _encode_operand(x: Tensor, clip: Tensor | None, levels: Levels | None):
    """(levels or values of x, the float step of one level, the clip), for a quantized or a float operand."""
    if levels is None:
        return x, x.new_ones(()), None
    clip = clip.clamp_min(MIN_CLIP)
    return encode(x, clip, levels), clip / levels.max, clip


def output_scale(scale_x: Tensor, scale_w: Tensor, operator: Operator) -> Tensor:
    """The factor from accumulators to outputs: shape [] or, per output channel, broadcasting over the output."""
    scale = scale_x * scale_w
    return scale.reshape(operator.channel_shape) if scale.dim() else scale


def quantized_op(
    x: Tensor,
    w: Tensor,
    clip_x: Tensor | None,
    clip_w: Tensor | None,
    *,
    levels_x: Levels | None,
    levels_w: Levels | None,
    operator: Operator,
    dtype: torch.dtype,
    rescale: Tensor,
    clip_grad_factor: float = 1.0,
    everywhere: bool = False,
) -> Tensor:
    """`operator(fake_quantize(x), rescale * fake_quantize(w))`, computed on integers, with the paper's gradients.

    The operator sees integer levels; their scales are multiplied in afterwards, so its accumulators are exact
    where `dtype` holds them. See `quantization_gradient` for the gradients.

    Args:
        x: input, [N, C_in, ...] for a convolution, [..., C_in] for a matrix product.
        w: normalized weight, [C_out, ...].
        clip_x, clip_w: clips; clip_w is [] or [C_out, 1, ...]. None goes with levels None.
        levels_x, levels_w: level sets; None leaves that operand in float.
        dtype: of the operands while they are multiplied.
        rescale: shape [], a factor of the weight that is constant in the backward pass.
        clip_grad_factor: multiplies the gradients of both clips.
        everywhere: passes the weight's gradient outside its clip too.
    """
    return _QuantizedOp.apply(
        x, w, clip_x, clip_w, rescale, levels_x, levels_w, operator, dtype, clip_grad_factor, everywhere
    )
