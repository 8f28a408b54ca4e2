"""Quantized layers: torch's own layers with a quantizer for the weight and one for the input.

A `QuantLayer` holds float weights that train; an `integer.layers.IntegerLayer` holds integer levels and only computes.
Both bring an input to levels with `functional.encode`, add up products of integers exactly, and multiply the sums by the
same float, which is why their results are equal in every bit.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import functional as F
from .engine import EAGER, Eager, quantized_op
from .errors import ApotfxError
from .functional import Operand
from .operators import BFLOAT16_EXACT, Convolution, MatrixProduct, Operator, accumulator_bound, exact_dtype
from .quantizers import InputQuantizer, WeightQuantizer


class Geometry(NamedTuple):
    """What a layer computes, apart from quantization: the padding before its operator, and the operator."""

    operator: Operator
    pad: tuple[int, ...]  # as torch.nn.functional.pad takes it; () for none
    pad_mode: str

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        if isinstance(layer, nn.Linear):
            return cls(MatrixProduct(), (), "constant")
        # Padding that the operator cannot express itself (another mode than zeros, "same") goes before it.
        before = layer.padding_mode != "zeros" or layer.padding == "same"
        padding = (0,) * len(layer.stride) if before or layer.padding == "valid" else tuple(layer.padding)
        operator = Convolution(tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
        pad = tuple(layer._reversed_padding_repeated_twice) if before else ()
        return cls(operator, pad, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)

    def prepare(self, x: Tensor) -> Tensor:
        """x with its padding and, for a convolution, with the batch dimension that it may lack."""
        if isinstance(self.operator, Convolution) and x.dim() == len(self.operator.stride) + 1:
            x = x.unsqueeze(0)
        return nn.functional.pad(x, self.pad, mode=self.pad_mode) if self.pad else x

    def finish(self, y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """y plus bias, with as many dimensions as the layer's input x has."""
        if bias is not None:
            y = y + bias.reshape(self.operator.channel_shape)
        return y.squeeze(0) if y.dim() > x.dim() else y


class QuantLayer(nn.Module):
    """What the quantized layers share. Mixed into a torch layer type, whose parameters and names it keeps.

    Attributes:
        weight_quantizer: or None for a float weight.
        input_quantizer: or None for a float input.
        clip_grad_factor: multiplies the gradients of both clips.
        rectifier: the range (low, high) of the activation function before the layer, where the layer has taken over
            its work (see `rewrite.absorb_rectifiers`); else None.
        engine: what computes the layer; see `engine.use_engine`.
    """

    float_type: type[nn.Module]
    rectifier: tuple[float, float] | None = None
    engine: Eager = EAGER

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: InputQuantizer | None,
        clip_grad_factor: float = 1.0,
    ) -> "QuantLayer":
        """A quantized layer around the parameters, hooks and mode of `layer`, which itself stays as it is.

        Raises:
            ApotfxError: `layer` is not exactly of `cls.float_type`; what a subclass computes is unknown.
        """
        if type(layer) is not cls.float_type:
            raise ApotfxError(f"{cls.__name__} replaces {cls.float_type.__name__}, got {type(layer).__name__}")
        quant = cls.__new__(cls)
        quant.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(layer).items()}
        quant.weight_quantizer = weight_quantizer
        quant.input_quantizer = input_quantizer
        quant.clip_grad_factor = clip_grad_factor
        quant.geometry = Geometry.of(layer)
        for quantizer in quant.children():
            quantizer.to(layer.weight.device).train(layer.training)
        return quant

    def forward(self, input: Tensor) -> Tensor:
        prepared = self.geometry.prepare(input)
        if self.training:
            self._fit_first_batch(prepared)
        weights = self.weight_quantizer
        y = quantized_op(
            self._input_operand(prepared),
            self.weight_operand(),
            operator=self.geometry.operator,
            dtype=self._operand_dtype(prepared),
            exact=not self.training,
            clip_grad_factor=self.clip_grad_factor,
            everywhere=weights is not None and weights.levels.bits == 2,
            engine=self.engine,
        ).to(self.weight.dtype)
        return self.geometry.finish(y, self.bias, input)

    @torch.no_grad()
    def codes_and_accumulators(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer computes on in evaluation: (levels of the padded input, sums of their products), integer-valued.

        For a float input, or a float weight, its values stand for the levels.
        """
        prepared = self.geometry.prepare(input)
        codes, weight = self.engine.levels(self._input_operand(prepared)), self.engine.levels(self.weight_operand())
        dtype = self._operand_dtype(prepared)
        return codes, self.geometry.operator.forward(codes.to(dtype), weight.to(dtype))

    def rectify(self, x: Tensor) -> Tensor:
        """x after the activation function that the layer has absorbed, if it has."""
        return x if self.rectifier is None else x.clamp(*self.rectifier)

    def _input_operand(self, x: Tensor) -> Operand:
        quantizer = self.input_quantizer
        if quantizer is None:
            return Operand(self.rectify(x), None, None, None)
        return Operand(x, quantizer.clip, None, F.Levels(quantizer.table, quantizer.levels, self.rectifier))

    def weight_operand(self) -> Operand:
        """The weight as the operator takes it."""
        quantizer = self.weight_quantizer
        if quantizer is None:
            return Operand(self.weight, None, None, None)
        # In evaluation the same bits on every engine.
        standard_deviation = self.engine.standard_deviation if self.training else F.standard_deviation
        weight, unit = quantizer.normalize(self.weight, standard_deviation)
        return Operand(weight, quantizer.clip, unit, quantizer.encoding)

    @torch.no_grad()
    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """(integer-valued levels [C_out, ...], their scale [] or [C_out, 1, ...]): the weight is their product."""
        quantizer = self.weight_quantizer
        weight, unit = quantizer.normalize(self.weight)
        operand = Operand(weight, quantizer.clip, unit, quantizer.encoding)
        return EAGER.levels(operand), operand.scale

    def _fit_first_batch(self, x: Tensor) -> None:
        if self.input_quantizer is not None and self.input_quantizer.needs_clip:
            self.input_quantizer.fit_first_batch(self.rectify(x))
        if self.weight_quantizer is not None and self.weight_quantizer.needs_clip:
            self.weight_quantizer.fit_first_batch(self.weight_quantizer.in_clip_units(self.weight))

    def _operand_dtype(self, x: Tensor) -> torch.dtype:
        """In training whatever is fast; in evaluation what makes the accumulators exact, or nearly so for a float operand."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        if not self.training:
            if inputs is None or weights is None:
                return torch.float64  # so that the order of summation does not matter
            bound = accumulator_bound(self.weight.shape, weights.levels.max, inputs.levels.max)
            return exact_dtype(bound, max(weights.levels.max, inputs.levels.max), x.device)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            levels = [q.levels.max for q in (inputs, weights) if q is not None]
            # float16 is left out: integer accumulators overflow it.
            if dtype == torch.bfloat16 and max(levels, default=0) <= BFLOAT16_EXACT:
                return dtype
        return torch.float64 if x.dtype == torch.float64 else torch.float32


class QuantConv1d(QuantLayer, nn.Conv1d):
    float_type = nn.Conv1d


class QuantConv2d(QuantLayer, nn.Conv2d):
    float_type = nn.Conv2d


class QuantConv3d(QuantLayer, nn.Conv3d):
    float_type = nn.Conv3d


class QuantLinear(QuantLayer, nn.Linear):
    float_type = nn.Linear


QUANT_LAYERS = {cls.float_type: cls for cls in (QuantConv1d, QuantConv2d, QuantConv3d, QuantLinear)}
