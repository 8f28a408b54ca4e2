"""The modules of a loaded integer network."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations

from apotfx import functional as F
from apotfx import reproducible
from apotfx.errors import ApotfxError
from apotfx.layers import Geometry
from apotfx.levels import LevelSet
from apotfx.modules import StandIn, float_attributes, is_in_kept_module
from apotfx.operators import accumulators, output_shaped


class IntegerLayer(StandIn):
    """A convolution or matrix product of integer levels; what `load_integer` puts in a float layer's place.

    A float input or weight, which the policy may ask for, stands for its levels; then the accumulators are float.

    Attributes:
        name: in the network.
        kind: what it is called as a float layer.
        input_levels, weight_levels: level sets; None for float.
        rectifier, rectifies: as of `QuantLayer`.

    Code of a module kept whole, or the graph, may read what a float layer has: `weight` is then the float weight where the
    export has it; else the graph, which asks for its type only, gets NaN, and code is refused.

    Buffers: `levels` (of the weight, in the smallest integer type that holds them, or float, [C_out, ...]); `weight_scale`
    ([] or [C_out, 1, ...]); `input_clip` ([]; None for a float input); `bias` ([C_out]; None without); `scale`, from
    accumulators to outputs ([], or broadcasting over the output).
    """

    own_names = frozenset(
        ("name", "kind", "geometry", "rectifier", "rectifies", "weight_levels", "input_levels", "accumulator_range",
         "float_class", "float_state", "has_float_weight", "own_names")
    )  # fmt: skip

    def __init__(
        self,
        name: str,
        geometry: Geometry,
        levels: Tensor,
        weight_levels: LevelSet | None,
        weight_scale: Tensor,
        input_levels: LevelSet | None,
        input_clip: Tensor | None,
        bias: Tensor | None,
        rectifier: tuple[float, float] | None = None,
        kind: str = "",
    ):
        super().__init__()
        self.name, self.kind = name, kind
        self.geometry = geometry
        self.rectifier, self.rectifies = rectifier, True
        self.weight_levels, self.input_levels = weight_levels, input_levels
        self.register_buffer("levels", levels)
        self.register_buffer("weight_scale", weight_scale)
        self.register_buffer("input_clip", input_clip)
        self.register_buffer("bias", bias)
        input_scale = weight_scale.new_ones(()) if input_levels is None else input_clip / input_levels.max
        self.register_buffer("scale", output_shaped(input_scale * weight_scale, geometry.operator), persistent=False)
        self.accumulator_range = self._accumulator_range() if self.is_integer else None

    def stand_in_for(self, layer: nn.Module, weight: Tensor | None) -> None:
        """Have the attributes of the float layer that code around it may read, and its weight, if the export has it."""
        settings = {key: value for key, value in vars(layer).items() if key[0] != "_" and not hasattr(self, key)}
        vars(self).update(settings, float_class=type_before_parametrizations(layer), float_state=float_attributes(layer))
        self.has_float_weight = weight is not None
        like = layer.weight
        self.register_buffer("float_weight", self.scale.new_full((), torch.nan).expand(like.shape), persistent=False)
        if weight is not None:
            self.float_weight = weight.to(like.device)

    def float_view(self, kind: str) -> Mapping:
        names = ("weight", "bias") if kind == "_parameters" else ()
        return MappingProxyType({name: self.float_parameter(name) for name in names})

    def float_parameter(self, name: str) -> nn.Parameter | None:
        if name == "weight" and is_in_kept_module() and not self.has_float_weight:
            raise ApotfxError(
                f"layer {self.name}: code around it reads its float weight, which the export has not, as it did not while "
                "the network was calibrated; calibrate with a batch that makes it, and export again"
            )
        value = self.float_weight if name == "weight" else self.bias
        return None if value is None else nn.Parameter(value, requires_grad=False)

    @property
    def weight(self) -> Tensor:
        return self.float_weight

    @property
    def is_integer(self) -> bool:
        """Whether both the input and the weight are integers."""
        return self.input_levels is not None and self.weight_levels is not None

    @property
    def encoding(self) -> F.Levels:
        """How the input is encoded."""
        return F.Levels(self.input_levels, self.rectifier if self.rectifies else None)

    def _accumulator_range(self) -> tuple[int, int]:
        """The smallest and the largest value that any input can bring an accumulator to, partial sums included."""
        w = self.levels.flatten(1).long()
        positive, negative = w.clamp(min=0).sum(1), w.clamp(max=0).sum(1)
        high, low = self.input_levels.max, -self.input_levels.max if self.input_levels.signed else 0
        return (
            (positive * low + negative * high).amin().item() if len(w) else 0,
            (positive * high + negative * low).amax().item() if len(w) else 0,
        )

    @property
    def accumulator_bound(self) -> int:
        """The largest magnitude in `accumulator_range`."""
        return max(-self.accumulator_range[0], self.accumulator_range[1])

    @torch.no_grad()
    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """`output_size`: of a transposed convolution, as torch takes it."""
        return self.multiply(self.encode(input), output_size)

    def encode(self, x: Tensor) -> Tensor:
        """The levels of an input, integer-valued float; a float input is returned as it is."""
        if not x.is_floating_point():
            raise ApotfxError(f"layer {self.name}: its input is {x.dtype}, expected a floating-point type; convert it")
        self.require_shape(x.shape)
        return x if self.input_levels is None else F.encode(x, self.input_clip, self.encoding)

    def multiply(self, n: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The output for an encoded input."""
        y = self.accumulate(n, output_size)
        return self.geometry.finish(y.to(self.scale.dtype) * self.scale, self.bias, n)

    def codes_and_accumulators(self, input: Tensor, output_size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """As those of `QuantLayer`."""
        codes = self.encode(input)
        return self.geometry.prepare(codes), self.accumulate(codes, output_size)

    def require_shape(self, shape: torch.Size) -> None:
        """Raises: ApotfxError: an input of that shape does not fit the layer."""
        dims, weight = self.geometry.dims, self.levels.shape
        if dims:
            channels = weight[1] * self.geometry.operator.groups
            fits = len(shape) in (dims + 1, dims + 2) and shape[-dims - 1] == channels
            expected = f"[N, {channels}, {', '.join('DHW'[-dims:])}]"
        else:
            fits, expected = len(shape) > 0 and shape[-1] == weight[1], f"[..., {weight[1]}]"
        if not fits:
            raise ApotfxError(
                f"layer {self.name}: its input has the shape {list(shape)}, expected {expected}; pass images of the "
                "size and the channels that the network was trained with"
            )

    def accumulate(self, n: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        """The accumulators of an encoded input: sums of products of levels, exact in the dtype they have.

        With a float operand they are sums in float64, whose order hardly ever shows in float32.
        """
        operator = self.geometry.for_output_size(n, self.levels.shape[2:], output_size).operator
        n = self.geometry.prepare(n)
        with torch.autocast(n.device.type, enabled=False):
            if not self.is_integer:
                return operator.forward(n.double(), self.levels.double())
            largest = max(self.input_levels.max, self.weight_levels.max)
            return accumulators(operator, n, self.levels, self.accumulator_bound, largest)

    def extra_repr(self) -> str:
        return (
            f"{tuple(self.levels.shape)}, {self.levels.dtype}, weight={self.weight_levels}, input={self.input_levels}"
        )


class Affine(nn.Module):
    """`x * multiplier + offset` per channel, both rounded: a batch norm of the trained network. Buffers: both, [C]."""

    def __init__(self, multiplier: Tensor, offset: Tensor):
        super().__init__()
        self.register_buffer("multiplier", multiplier)
        self.register_buffer("offset", offset)

    def forward(self, x: Tensor) -> Tensor:
        return reproducible.affine(x, self.multiplier, self.offset)

    def extra_repr(self) -> str:
        return str(len(self.multiplier))
