"""Flavour "qdq", for uniform levels: what the 8-bit paths of other runtimes look for.

It rounds ties, and what it folds, differently from the network.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor

from apotfx.errors import ApotfxError
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.network import IntegerNetwork
from apotfx.integer.onnx.graph import MAX_BYTE, Translation, is_uniform
from apotfx.integer.program import Affine, Average, AveragePool, Encode, Product, Step
from apotfx.levels import MAX_BITS
from apotfx.operators import INT32_EXACT, MatrixProduct


class Qdq(Translation):
    """The flavour "qdq". A batch norm that alone reads a layer goes into its scales and its bias."""

    def __init__(self, network: IntegerNetwork, input_shape: tuple[int, ...]):
        super().__init__(network, input_shape)
        products = [step for step in self.program.steps if isinstance(step, Product)]
        layers = [self.layer_of(step) for step in products]
        for layer in layers:
            _require_uniform(layer)
        # At fewer bits 8-bit paths do not take a layer from end to end, as its input is clipped.
        self.all_bytes = all({x.weight_levels.bits, x.input_levels.bits} == {MAX_BITS} for x in layers)
        calls = Counter(step.layer for step in products)
        alone = {step.name for step in products if calls[step.layer] == 1 and len(self.readers[step.name]) == 1}
        self.folded = {step.inputs[0]: step for step in self.program.steps if step.kind == "affine" and step.inputs[0] in alone}

    def translate_affine(self, step: Affine, name: str, x: str) -> str:
        return x if step.inputs[0] in self.folded else super().translate_affine(step, name, x)

    def translate_layer(self, layer: IntegerLayer, step: Step, x: str) -> str:
        if not layer.is_integer:
            _require_uniform(layer)
        name, operator = step.name, layer.geometry.operator
        folded = [self.network.tensor(tensor) for tensor in self.folded[name].tensors()] if name in self.folded else None
        weight, scale, bias = _fold(layer, folded)
        product = isinstance(operator, MatrixProduct)
        x = self._padded(layer, name, x)
        stored = self.constant(f"{layer.name}.weight", weight.mT if product else weight)
        w = self._dequantized(stored, scale, f"{name}.weight_values", np.int8, axis=int(product))
        # In units of the accumulator, as 8-bit paths want it.
        unit = scale * (layer.input_clip / layer.input_levels.max)
        n = None if bias is None else (bias.double() / unit).round()
        inside = n is not None and not product and n.abs().max() < INT32_EXACT
        if inside and self.all_bytes:
            b = self.constant(f"{layer.name}.bias", n.int())
            b = self._dequantized(b, unit.expand_as(bias), f"{name}.bias_values", np.int32, axis=0)
            return self.convolution(layer, [x, w, b], name)
        products = name if bias is None else f"{name}.products"
        y = self.add("MatMul", [x, w], products) if product else self.convolution(layer, [x, w], products)
        return y if bias is None else self.add_bias(layer, y, bias, name)

    def translate_encode(self, step: Encode, name: str, x: str) -> str:
        layer = self.layer_of(step)
        levels, clip = layer.input_levels, layer.input_clip
        low, high = clip * -levels.signed, clip
        if layer.rectifier is not None:
            high = high.minimum(torch.tensor(layer.rectifier[1]))
        if levels.max < MAX_BYTE or high < clip:  # else the type clips
            x = self.clip(layer, x, low, high, f"{name}.clipped")
        return self.add("QuantizeLinear", [x, *self._scale_and_zero(layer)], name)

    def _scale_and_zero(self, layer: IntegerLayer) -> tuple[str, str]:
        levels = layer.input_levels
        scale = self.constant(f"{layer.name}.input_scale", layer.input_clip / levels.max)
        return scale, self.number(0, np.int8 if levels.signed else np.uint8)

    def _padded(self, layer: IntegerLayer, name: str, n: str) -> str:
        """The values that the levels n stand for, padded."""
        scale, zero = self._scale_and_zero(layer)
        n = self.pad_input(layer, name, n, zero)
        return self.add("DequantizeLinear", [n, scale, zero], f"{name}.input")

    def _dequantized(self, constant: str, scale: Tensor, name: str, dtype: type, axis: int) -> str:
        shape = scale.shape if len(scale) > 1 else ()
        scale = self.constant(f"{constant}_scale", scale.reshape(shape))
        zero = self.constant(f"{constant}_zero_point", np.zeros(shape, dtype))  # onnxruntime 1.23 fails without it
        return self.add("DequantizeLinear", [constant, scale, zero], name, axis=axis)

    def translate_average(self, step: Average, name: str, x: str) -> str:
        return self.add("ReduceMean", [x, self.integers(*step.dims)], name, keepdims=int(step.keepdim))

    def translate_average_pool(self, step: AveragePool, name: str, x: str) -> str:
        if step.ceil_mode:  # runtimes divide by different numbers
            return super().translate_average_pool(step, name, x)
        return self.add(
            "AveragePool", [x], name, kernel_shape=step.kernel, strides=step.stride,
            pads=step.padding * 2,
            count_include_pad=int(step.count_include_pad),
        )  # fmt: skip


def _require_uniform(layer: IntegerLayer) -> None:
    for what, levels in (("weight", layer.weight_levels), ("input", layer.input_levels)):
        if not is_uniform(levels):
            got = "float" if levels is None else f"{levels.scheme} at {levels.bits} bits"
            raise ApotfxError(
                f"flavour qdq: the {what} of layer {layer.name} is {got}, expected uniform levels; use flavour exact"
            )


def _fold(layer: IntegerLayer, affine: list[Tensor] | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(levels, scale [1] or [C_out], bias) of a layer's weight with the batch norm behind it."""
    weight, scale, bias = layer.levels, layer.weight_scale.flatten(), layer.bias
    if affine is None:
        return weight, scale, bias
    multiplier, offset = affine
    weight = weight * multiplier.sign().to(weight.dtype).view(-1, *(1 for _ in weight.shape[1:]))
    scale = torch.where(multiplier == 0, scale, scale * multiplier.abs())  # a scale of 0 is none
    return weight, scale, offset if bias is None else bias * multiplier + offset
