"""Flavour "qdq", for uniform levels: what the 8-bit paths of other runtimes look for.

It rounds ties, and what it folds, differently from the network.
"""

from collections import Counter

import numpy as np
import torch
from torch import Tensor, fx

from apotfx.errors import ApotfxError
from apotfx.integer.layers import Affine, IntegerLayer
from apotfx.integer.onnx.graph import MAX_BYTE, Translation, is_uniform
from apotfx.integer.operations import Operation
from apotfx.levels import MAX_BITS
from apotfx.operators import INT32_EXACT, MatrixProduct


class Qdq(Translation):
    """The flavour "qdq". A batch norm that alone reads a layer goes into its scales and its bias."""

    def __init__(self, network: fx.GraphModule, input_shape: tuple[int, ...]):
        super().__init__(network, input_shape)
        layers = {operation.node: operation.module for operation in self.operations if operation.kind == "layer"}
        for layer in layers.values():
            _require_uniform(layer)
        # At fewer bits 8-bit paths do not take a layer from end to end, as its input is clipped.
        self.all_bytes = all({x.weight_levels.bits, x.input_levels.bits} == {MAX_BITS} for x in layers.values())
        calls = Counter(layers.values())
        self.folded = {
            operation.inputs[0]: operation.module
            for operation in self.operations
            if operation.kind == "affine" and calls[layers.get(operation.inputs[0])] == 1
            and len(operation.inputs[0].users) == 1
        }  # fmt: skip

    def translate_affine(self, operation: Operation, name: str, x: str) -> str:
        return x if operation.inputs[0] in self.folded else super().translate_affine(operation, name, x)

    def translate_layer(self, operation: Operation, name: str, x: str) -> str:
        layer, operator = operation.module, operation.module.geometry.operator
        weight, scale, bias = _fold(layer, self.folded.get(operation.node))
        product = isinstance(operator, MatrixProduct)
        x = self._quantized(layer, name, x)
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

    def _quantized(self, layer: IntegerLayer, name: str, x: str) -> str:
        """The values that the levels of x stand for."""
        levels, clip = layer.input_levels, layer.input_clip
        low, high = clip * -levels.signed, clip
        if layer.rectifier is not None:
            high = high.minimum(torch.tensor(layer.rectifier[1]))
        if levels.max < MAX_BYTE or high < clip:  # else the type clips
            x = self.clip(layer, x, low, high, f"{name}.clipped")
        dtype = np.int8 if levels.signed else np.uint8
        scale = self.constant(f"{layer.name}.input_scale", clip / levels.max)
        zero = self.number(0, dtype)
        n = self.add("QuantizeLinear", [x, scale, zero], f"{name}.levels")
        n = self.pad_input(layer, name, n, zero)
        return self.add("DequantizeLinear", [n, scale, zero], f"{name}.input")

    def _dequantized(self, constant: str, scale: Tensor, name: str, dtype: type, axis: int) -> str:
        shape = scale.shape if len(scale) > 1 else ()
        scale = self.constant(f"{constant}_scale", scale.reshape(shape))
        zero = self.constant(f"{constant}_zero_point", np.zeros(shape, dtype))  # onnxruntime 1.23 fails without it
        return self.add("DequantizeLinear", [constant, scale, zero], name, axis=axis)

    def translate_global_average(self, operation: Operation, name: str, x: str) -> str:
        axes = self.integers(*operation["dims"])
        return self.add("ReduceMean", [x, axes], name, keepdims=int(operation["keepdim"]))

    def translate_average_pool(self, operation: Operation, name: str, x: str) -> str:
        if operation["ceil_mode"]:  # runtimes divide by different numbers
            return super().translate_average_pool(operation, name, x)
        return self.add(
            "AveragePool", [x], name, kernel_shape=operation["kernel"], strides=operation["stride"],
            pads=operation["padding"] * 2,
            count_include_pad=int(operation["count_include_pad"]),
        )  # fmt: skip


def _require_uniform(layer: IntegerLayer) -> None:
    for what, levels in (("weight", layer.weight_levels), ("input", layer.input_levels)):
        if not is_uniform(levels):
            got = "float" if levels is None else f"{levels.scheme} at {levels.bits} bits"
            raise ApotfxError(
                f"flavour qdq: the {what} of layer {layer.name} is {got}, expected uniform levels; use flavour exact"
            )


def _fold(layer: IntegerLayer, affine: Affine | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(levels, scale [1] or [C_out], bias) of a layer's weight with the batch norm behind it."""
    weight, scale, bias = layer.levels, layer.weight_scale.flatten(), layer.bias
    if affine is None:
        return weight, scale, bias
    multiplier = affine.multiplier
    weight = weight * multiplier.sign().to(weight.dtype).view(-1, *(1 for _ in weight.shape[1:]))
    scale = torch.where(multiplier == 0, scale, scale * multiplier.abs())  # a scale of 0 is none
    return weight, scale, affine.offset if bias is None else bias * multiplier + affine.offset
