"""The operators that a network multiplies with: convolutions and the matrix product, on floats and on 8-bit integers."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .functional import is_traced

FLOAT32_EXACT = 2**24  # integers, and sums of integers, are exact in float32 below this
BFLOAT16_EXACT = 2**8
INT32_EXACT = 2**31
HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked here, as torch.compile would break the graph on it


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

    def from_parameter(self, weight: Tensor) -> Tensor:
        """A layer's weight parameter as the operator takes it, [C_out, ...]."""
        return weight

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        convolution, w = self.for_shape(x.shape, w)
        return torch.convolution(x, w, None, *_arguments(convolution))

    def for_shape(self, shape: torch.Size, w: Tensor) -> tuple["Convolution", Tensor]:
        """The same for inputs of `shape`, without idle taps of w."""
        convolution, taps = without_idle_taps(self, shape[2:], w.shape[2:])
        return convolution, w[taps] if taps else w

    def as_matrix_product(self, x: Tensor, w: Tensor) -> Tensor:
        """`forward`, in two dimensions, as one matrix product per group (im2col), which no library takes for Winograd's."""
        convolution, w = self.for_shape(x.shape, w)
        stride, padding, dilation, groups = convolution
        columns = nn.functional.unfold(x, w.shape[2:], dilation, padding, stride)  # [N, C_in * kernel, positions]
        columns = columns.unflatten(1, (groups, -1))
        y = w.reshape(groups, w.shape[0] // groups, -1) @ columns  # [N, groups, C_out / groups, positions]
        spans = (d * (k - 1) + 1 for d, k in zip(dilation, w.shape[2:]))
        sizes = [(n + 2 * p - span) // s + 1 for n, p, span, s in zip(x.shape[2:], padding, spans, stride)]
        return y.reshape(len(x), -1, *sizes)

    def backward(self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]):
        """Gradients for x and w, None where `needs` is false."""
        convolution, taps = without_idle_taps(self, x.shape[2:], w.shape[2:])
        used = w[taps] if taps else w
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad, x, used, None, *_arguments(convolution), [*needs, False]
        )
        if taps and grad_w is not None:
            grad_used, grad_w = grad_w, torch.zeros_like(w, dtype=grad_w.dtype)
            grad_w[taps] = grad_used
        return grad_x, grad_w

    def multiplications(self, x: Tensor, w: Tensor) -> int:
        """How many the forward takes, up to what padding saves."""
        return x.shape[0] * w.numel() * math.prod(size // stride for size, stride in zip(x.shape[2:], self.stride))

    def supports_bytes(self, x: Tensor) -> bool:
        return len(self.stride) == 2

    def byte_limit(self, signed_x: bool) -> int:
        """What `forward_bytes` computes exactly below: oneDNN takes a zero point off after rounding to float32."""
        return FLOAT32_EXACT if signed_x else INT32_EXACT

    def forward_bytes(self, x: Tensor, zero_point: int, w: Tensor, scale: Tensor) -> Tensor:
        """`scale * convolution(x - zero_point, w)`, summed in int32 and rounded to float32 before the multiplication.

        Args:
            x: uint8 [N, C_in, H, W]; zero_point is its value for 0.
            w: int8 [C_out, C_in / groups, kernel height, kernel width].
            scale: float32 [1] or [C_out].

        Returns:
            float32 [N, C_out, H', W'] in channels-last format.
        """
        return self.pack_bytes(x.shape, zero_point, w, scale)(x)

    def pack_bytes(
        self, shape: torch.Size, zero_point: int, w: Tensor, scale: Tensor, often: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """`forward_bytes` for inputs of `shape`, with w in the layout that oneDNN takes, chosen for them if `often`."""
        (stride, padding, dilation, groups), w = self.for_shape(shape, w)
        packed = torch.ops.onednn.qconv_prepack(
            w, scale, 1.0, zero_point, stride, padding, dilation, groups, shape if often else None
        )
        zeros, run = _zeros(len(scale)), torch.ops.onednn.qconv2d_pointwise.default
        return lambda x: run(
            x, 1.0, zero_point, packed, scale, zeros, None, stride, padding, dilation, groups,
            1.0, 0, torch.float32, "none", [], "",
        )  # fmt: skip


def _arguments(convolution: Convolution) -> tuple:
    stride, padding, dilation, groups = convolution
    return stride, padding, dilation, False, [0] * len(stride), groups


def without_idle_taps(
    convolution: Convolution, sizes: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[Convolution, tuple[slice, ...] | None]:
    """The same convolution without the taps of its kernel that meet padding only, such as 8 of 9 on a 1x1 map.

    Besides being work for nothing, they are where oneDNN leaves bfloat16 weight gradients unset.

    Args:
        sizes, kernel: of the input and of the weight, without batch and channels.

    Returns:
        (the convolution, the slices that cut the weight to the taps it uses; None if it uses all).
    """
    if is_traced():  # to other sizes, it may be, than these
        return convolution, None
    return _without_idle_taps(convolution, sizes, kernel)


@functools.lru_cache(maxsize=1024)
def _without_idle_taps(convolution: Convolution, sizes: tuple[int, ...], kernel: tuple[int, ...]):
    padding, taps = [], []
    for size, k, s, p, d in zip(sizes, kernel, convolution.stride, convolution.padding, convolution.dilation):
        outputs = (size + 2 * p - d * (k - 1) - 1) // s + 1
        used = [t for t in range(k) if any(0 <= o * s - p + t * d < size for o in range(max(outputs, 0)))]
        first, count = (used[0], used[-1] + 1 - used[0]) if used else (0, k)
        less = p - first * d
        if less < 0 or (size + 2 * less - d * (count - 1) - 1) // s + 1 != outputs:
            first, count, less = 0, k, p
        padding.append(less)
        taps.append(slice(first, first + count))
    if all(tap.stop - tap.start == k for tap, k in zip(taps, kernel)):
        return convolution, None
    return convolution._replace(padding=tuple(padding)), (slice(None), slice(None), *taps)


class TransposedConvolution(NamedTuple):
    """A transposed convolution of any dimension, without bias.

    Its weight is laid out as a convolution's, [C_out, C_in / groups, kernel...], where torch has
    [C_in, C_out / groups, kernel...]: what holds per output channel then holds per row.
    """

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int

    @property
    def channel_shape(self) -> tuple[int, ...]:
        """As that of `Convolution`."""
        return (-1, *(1 for _ in self.stride))

    def from_parameter(self, weight: Tensor) -> Tensor:
        """As `Convolution.from_parameter`."""
        return self._exchange_channels(weight)

    def _exchange_channels(self, w: Tensor) -> Tensor:
        """From torch's layout of the weight to ours, and back."""
        return w.unflatten(0, (self.groups, -1)).transpose(1, 2).flatten(0, 1).contiguous()

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return torch.convolution(x, self._exchange_channels(w), None, *self._arguments())

    def _arguments(self) -> tuple:
        return self.stride, self.padding, self.dilation, True, self.output_padding, self.groups

    def _least_sizes(self, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
        """Of the output without output padding, for inputs of `sizes`."""
        geometry = zip(sizes, kernel, self.stride, self.padding, self.dilation)
        return [(n - 1) * s - 2 * p + d * (k - 1) + 1 for n, k, s, p, d in geometry]

    def for_output_size(
        self, sizes: Sequence[int], kernel: Sequence[int], output_size: Sequence[int]
    ) -> "TransposedConvolution":
        """The same with the output padding that brings inputs of `sizes` to `output_size`, as torch allows it.

        Args:
            sizes, kernel: of the input and of the weight, without batch and channels.
            output_size: without batch and channels, or with both.

        Raises:
            ValueError: no output padding below the stride or the dilation does.
        """
        wanted = list(output_size)[-len(self.stride) :]
        output_padding = tuple(w - n for w, n in zip(wanted, self._least_sizes(sizes, kernel)))
        if not all(0 <= o < max(s, d) for o, s, d in zip(output_padding, self.stride, self.dilation)):
            raise ValueError(
                f"output_size {wanted}: cannot be reached from inputs of {list(sizes)}; the sizes possible start at "
                f"{self._least_sizes(sizes, kernel)}"
            )
        return self._replace(output_padding=output_padding)

    def backward(self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]):
        """As `Convolution.backward`."""
        grad_x, grad_w, _ = torch.ops.aten.convolution_backward(
            grad, x, self._exchange_channels(w), None, *self._arguments(), [*needs, False]
        )
        return grad_x, None if grad_w is None else self._exchange_channels(grad_w)

    def supports_bytes(self, x: Tensor) -> bool:
        return False


class MatrixProduct(NamedTuple):
    """`x @ w.T`, a linear layer without bias."""

    channel_shape: tuple[int, ...] = (-1,)

    def from_parameter(self, weight: Tensor) -> Tensor:
        """As `Convolution.from_parameter`."""
        return weight

    def for_shape(self, shape: torch.Size, w: Tensor) -> tuple["MatrixProduct", Tensor]:
        return self, w

    def as_matrix_product(self, x: Tensor, w: Tensor) -> Tensor:
        return self.forward(x, w)

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        return x @ w.mT

    def backward(self, grad: Tensor, x: Tensor, w: Tensor, needs: tuple[bool, bool]):
        grad_x = grad @ w if needs[0] else None
        grad_w = grad.reshape(-1, grad.shape[-1]).mT @ x.reshape(-1, x.shape[-1]) if needs[1] else None
        return grad_x, grad_w

    def multiplications(self, x: Tensor, w: Tensor) -> int:
        return x.numel() * w.shape[0]

    def supports_bytes(self, x: Tensor) -> bool:
        return x.dim() > 1

    def byte_limit(self, signed_x: bool) -> int:
        return INT32_EXACT

    def forward_bytes(self, x: Tensor, zero_point: int, w: Tensor, scale: Tensor) -> Tensor:
        """`scale * ((x - zero_point) @ w.T)`, as `Convolution.forward_bytes`: x uint8 [..., C_in], w int8 [C_out, C_in]."""
        return self.pack_bytes(x.shape, zero_point, w, scale)(x)

    def pack_bytes(
        self, shape: torch.Size, zero_point: int, w: Tensor, scale: Tensor, often: bool = False
    ) -> Callable[[Tensor], Tensor]:
        """As `Convolution.pack_bytes`."""
        rows = [shape[:-1].numel(), shape[-1]]
        packed = torch.ops.onednn.qlinear_prepack(w.contiguous(), rows)
        zeros, run = _zeros(len(scale)), torch.ops.onednn.qlinear_pointwise.default

        def multiply(x: Tensor) -> Tensor:
            x = x.reshape(rows).contiguous()  # other strides give wrong results
            y = run(x, 1.0, zero_point, packed, scale, zeros, None, 1.0, 0, torch.float32, "none", [], "")
            return y.reshape(*shape[:-1], len(w))

        return multiply


Operator = Convolution | TransposedConvolution | MatrixProduct


@functools.cache
def _zeros(count: int) -> Tensor:
    """The zero points of weights, which oneDNN asks for."""
    return torch.zeros(count, dtype=torch.int64)


def accumulator_bound(weight_shape: torch.Size, max_w: int, max_x: int) -> int:
    """The largest magnitude that an accumulator of a layer can reach: `K * max_w * max_x`.

    K = in_channels / groups * kernel size = elements of the weight per output channel.
    """
    return weight_shape[1:].numel() * max_w * max_x


def accumulator_bits(low: int, high: int) -> int:
    """The bits of the smallest two's complement register that holds 0 and every integer from `low` to `high`."""
    return max(high, -low - 1, 0).bit_length() + 1


def exact_dtype(bound: int, max_level: int, device: torch.device) -> torch.dtype:
    """A dtype in which the accumulators of a layer are exact, whatever the order of summation.

    float32 where the bound on their magnitude allows it, and the levels too, should the user let float32 products run
    in bfloat16. float64 elsewhere: cuDNN and NNPACK (used where oneDNN is missing or off) may compute float32
    convolutions by Winograd or FFT, which are not exact on integers; they have none for float64.

    Args:
        bound: the largest magnitude of an accumulator or a partial sum.
        max_level: the largest magnitude of a level of the input or the weight.
    """
    exact = bound < FLOAT32_EXACT and max_level <= BFLOAT16_EXACT
    direct = device.type == "cpu" and HAS_ONEDNN and torch.backends.mkldnn.enabled
    return torch.float32 if exact and direct else torch.float64


def accumulators(operator: Operator, n_x: Tensor, n_w: Tensor, bound: int, max_level: int) -> Tensor:
    """`operator(n_x, n_w)` of integer-valued tensors, exact; the arguments are those of `exact_dtype`.

    On a GPU a convolution, not a transposed one, that float32 holds is a matrix product there, in TF32 or bfloat16 if the user lets it: products
    of such levels are exact in them, and sums are kept in float32.
    """
    dtype = exact_dtype(bound, max_level, n_x.device)
    exact = bound < FLOAT32_EXACT and max_level <= BFLOAT16_EXACT
    multiplies = n_x.dim() in (2, 4) and not isinstance(operator, TransposedConvolution)
    if n_x.device.type == "cuda" and exact and multiplies:
        return operator.as_matrix_product(n_x.float(), n_w.float())
    return operator.forward(n_x.to(dtype), n_w.to(dtype))


def scaled_op(n_x: Tensor, n_w: Tensor, scale: Tensor, operator: Operator, dtype: torch.dtype) -> Tensor:
    """`scale * operator(n_x, n_w)`, the accumulators computed in `dtype`, the result in scale's dtype.

    Args:
        n_x: integer levels of the input (or, for a float input, its values).
        n_w: integer levels of the weight (or its values).
        scale: shape [], or whatever broadcasts over the output.
    """
    return operator.forward(n_x.to(dtype), n_w.to(dtype)).to(scale.dtype) * scale


def output_shaped(scale: Tensor, operator: Operator) -> Tensor:
    """A factor of the weight's clip's shape as it broadcasts over the output."""
    return scale.reshape(operator.channel_shape) if scale.dim() else scale
