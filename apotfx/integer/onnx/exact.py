"""Flavour "exact": what the integer network does, in the same order, so that its results are equal in every bit.

An accumulator becomes an integer tensor before it is scaled, which keeps optimizers from moving the scale into the
weights.
"""

import math

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor

from apotfx.integer.layers import IntegerLayer
from apotfx.integer.onnx.graph import MAX_BYTE, Translation, is_uniform
from apotfx.integer.program import Encode, Step
from apotfx.levels import LevelSet
from apotfx.operators import FLOAT32_EXACT, INT32_EXACT, MatrixProduct

INT4_BITS = 4
BEFORE_HALF = np.array(np.nextafter(np.float32(0.5), np.float32(0)))
MAX_WEIGHT = 2**7 - 1
MAX_PAIR = 2**15 - 1  # x86 without VNNI adds two products of bytes in 16 bits, and saturates
LEAST_RUN = 16  # bytes that lie side by side; to copy windows of fewer costs more than 8-bit arithmetic saves


class Exact(Translation):
    """The flavour "exact"."""

    def translate_layer(self, layer: IntegerLayer, step: Step, n: str) -> str:
        name = step.name
        if _suits_bytes(layer):
            y, is_int32 = self._in_bytes(layer, step, n), True
        elif layer.is_integer and layer.accumulator_bound >= FLOAT32_EXACT:
            y, is_int32 = self._in_double(layer, step, n), False
        else:
            y, is_int32 = self._in_float(layer, step, n), layer.is_integer
        scaled = name if layer.bias is None else f"{name}.scaled"
        if is_int32:
            scale = self.constant(f"{layer.name}.scale", layer.scale.flatten() if layer.scale.dim() else layer.scale)
            axis = -1 if isinstance(layer.geometry.operator, MatrixProduct) else 1
            y = self.add("DequantizeLinear", [y, scale], scaled, axis=axis)
        else:
            y = self.add("Mul", [y, self.constant(f"{layer.name}.scale", layer.scale)], scaled)
        return y if layer.bias is None else self.add_bias(layer, y, layer.bias, name)

    # Levels of the input.

    def translate_encode(self, step: Encode, name: str, x: str) -> str:
        """`functional.encode`: levels as bytes, plus the layer's zero point, or as float."""
        layer = self.layer_of(step)
        levels, to_bytes = layer.encoding, _suits_bytes(layer)
        by = 2 * levels.max / layer.input_clip
        # A product is monotone in its factors, also after rounding: the rectifier's range can follow it.
        low, high = (torch.tensor(bound * 1.0) for bound in (2 * levels.min, 2 * levels.max))
        if levels.rectifier is not None:
            low, high = low.maximum(levels.rectifier[0] * by), high.minimum(levels.rectifier[1] * by)
        if is_uniform(levels.set) and not levels.set.signed:
            # Half a position, rounded half up: the sum reaches the next integer only if that half is reached.
            half = self._positions(layer, name, x, by / 2, low / 2, high / 2)
            rounding = self.add("Add", [half, self.constant("before_half", BEFORE_HALF)], f"{name}.rounding")
            if to_bytes:
                return self.add("Cast", [rounding], name, to=TensorProto.UINT8)
            return self.add("Floor", [rounding], name)
        n = self._look_up(layer, step, self._positions(layer, name, x, by, low, high), to_bytes)
        return self.add("Cast", [n], name, to=TensorProto.UINT8) if to_bytes else n

    def _positions(self, layer: IntegerLayer, name: str, x: str, by: Tensor, low: Tensor, high: Tensor) -> str:
        x = self.add("Mul", [x, self.constant(f"{layer.name}.positions_per_unit", by)], f"{name}.unclipped")
        return self.clip(layer, x, low, high, f"{name}.positions")

    def _look_up(self, layer: IntegerLayer, step: Encode, positions: str, to_bytes: bool) -> str:
        """The levels at positions, as float; `to_bytes` adds the zero point.

        In one dimension, as GatherElements, which is 10 times faster in onnxruntime than Gather, asks for it.
        """
        name, levels = step.name, layer.encoding
        index = self.add("Cast", [positions], f"{name}.index", to=TensorProto.INT32)  # truncates
        index = self.add("Reshape", [index, self.integers(-1)], f"{name}.flat_index")
        zero_point = byte_zero_point(layer) if to_bytes else 0
        key = f"{_level_set_name(levels.set)}.levels" + (f"_plus_{zero_point}" if zero_point else "")
        table = torch.tensor(levels.set.encoding_table, dtype=torch.float32)
        rolled = table.roll(2 * levels.min)  # negative indices count from the end
        n = self.add(
            "GatherElements", [self.constant(key, rolled + zero_point), index], f"{name}.flat_levels", axis=0
        )
        shape = self.integers(-1, *self.shapes[step.inputs[0]][1:])
        return self.add("Reshape", [n, shape], f"{name}.float_levels" if to_bytes else name)

    # Accumulators.

    def _in_float(self, layer: IntegerLayer, step: Step, n: str) -> str:
        name, operator = step.name, layer.geometry.operator
        result = f"{name}.sums" if layer.is_integer else f"{name}.accumulators"
        if isinstance(operator, MatrixProduct):
            y = self.add("MatMul", [n, self._weight(layer, name, layer.levels.mT, TensorProto.FLOAT)], result)
        else:
            n = self.pad_input(layer, name, n, self.number(0.0))
            y = self.convolution(layer, [n, self._weight(layer, name, layer.levels, TensorProto.FLOAT)], result)
        return self.add("Cast", [y], f"{name}.accumulators", to=TensorProto.INT32) if layer.is_integer else y

    def _in_bytes(self, layer: IntegerLayer, step: Step, n: str) -> str:
        """As a matrix product of bytes: onnxruntime's is several times faster than its convolutions."""
        name = step.name
        zero_point = self.byte(byte_zero_point(layer))
        rows, weight = self._columns(layer, step, n, zero_point)
        if 2 * int(layer.levels.abs().max()) * (byte_zero_point(layer) + layer.input_levels.max) <= MAX_PAIR:
            inputs = [rows, self._weight(layer, name, weight, TensorProto.INT8), zero_point]
        else:  # a product of two unsigned bytes is safe everywhere
            weight = (weight.short() + 128).to(torch.uint8)
            inputs = [rows, self.constant(f"{layer.name}.weight_plus_128", weight), zero_point, self.byte(128)]
        if isinstance(layer.geometry.operator, MatrixProduct):
            return self.add("MatMulInteger", inputs, f"{name}.accumulators")
        y = self.add("MatMulInteger", inputs, f"{name}.products")
        return self._channels_second(step, f"{name}.accumulators", y)

    def _in_double(self, layer: IntegerLayer, step: Step, n: str) -> str:
        name, outputs = step.name, self.shapes[step.name]
        n = self.add("Cast", [n], f"{name}.double_levels", to=TensorProto.DOUBLE)
        rows, weight = self._columns(layer, step, n, self.number(0, np.float64))
        groups = getattr(layer.geometry.operator, "groups", 1)
        if groups > 1:  # a batch of products, one per group
            channels, taps = layer.levels.shape[1], layer.levels.shape[2:].numel()
            split = self.integers(-1, outputs[2:].numel(), taps, groups, channels)
            rows = self.add("Reshape", [rows, split], f"{name}.by_group")
            rows = self.add("Transpose", [rows], f"{name}.group_first", perm=[0, 3, 1, 2, 4])
            rows = self.add("Reshape", [rows, self.integers(0, 0, 0, -1)], f"{name}.group_rows")
            weight = weight.unflatten(1, (groups, -1)).transpose(0, 1)
        y = self.add("MatMul", [rows, self._weight(layer, name, weight, TensorProto.DOUBLE)], f"{name}.products")
        if groups > 1:
            y = self.add("Transpose", [y], f"{name}.group_products", perm=[0, 1, 3, 2])
            y = self.add("Reshape", [y, self.integers(-1, *outputs[1:])], f"{name}.sums")
        elif not isinstance(layer.geometry.operator, MatrixProduct):
            y = self._channels_second(step, f"{name}.sums", y)
        return self.add("Cast", [y], f"{name}.accumulators", to=TensorProto.FLOAT)

    def _columns(self, layer: IntegerLayer, step: Step, n: str, zero: str) -> tuple[str, Tensor]:
        """(the windows of a layer's input as rows [N, ..., K], its weight [K, C_out]): a matrix product is left."""
        name, operator = step.name, layer.geometry.operator
        if isinstance(operator, MatrixProduct):
            return n, layer.levels.mT
        n = self.pad_input(layer, name, n, zero)
        n = self.pad(n, f"{name}.padded", operator.padding, operator.padding, zero)
        dims = range(len(operator.stride))
        n = self.add("Transpose", [n], f"{name}.channels_last", perm=[0, *(2 + d for d in dims), 1])
        for d in reversed(dims):
            n = self.windows(
                n, f"{name}.{d}", "Concat", 1 + d, layer.levels.shape[2 + d], operator.stride[d], operator.dilation[d],
                self.shapes[step.name][2 + d],
            )  # fmt: skip
        return n, layer.levels.permute(*(2 + d for d in dims), 1, 0).flatten(0, -2)

    def _channels_second(self, step: Step, name: str, y: str) -> str:
        dims = len(self.shapes[step.name]) - 2
        return self.add("Transpose", [y], name, perm=[0, dims + 1, *range(1, dims + 1)])

    def _weight(self, layer: IntegerLayer, name: str, n: Tensor, dtype: int) -> str:
        """A layer's levels, arranged as n, in an ONNX type; stored as integers, up to 4 bits as indices of levels."""
        levels = layer.weight_levels
        if levels is None or levels.bits > INT4_BITS:
            stored = self.constant(f"{layer.name}.weight", n)
            same = helper.np_dtype_to_tensor_dtype(n.cpu().numpy().dtype) == dtype
            return stored if same else self.add("Cast", [stored], f"{name}.weight_levels", to=dtype)
        if is_uniform(levels):
            return self.add("Cast", [self.int4(f"{layer.name}.weight", n)], f"{name}.weight_levels", to=dtype)
        index = torch.searchsorted(torch.tensor(levels.ints), n.cpu().abs().long().contiguous()) * n.cpu().sign()
        stored = self.int4(f"{layer.name}.weight_index", index)
        index = self.add("Cast", [stored], f"{name}.weight_indices", to=TensorProto.INT32)
        table = np.array([*levels.ints, *(-n for n in levels.ints[:0:-1])], helper.tensor_dtype_to_np_dtype(dtype))
        table = self.constant(f"{_level_set_name(levels)}.{table.dtype}", table)
        return self.add("Gather", [table, index], f"{name}.weight_levels")


def _level_set_name(levels: LevelSet) -> str:
    return f"{levels.scheme}{levels.bits}_{'signed' if levels.signed else 'unsigned'}"


def byte_zero_point(layer: IntegerLayer) -> int:
    """What is added to the levels of a layer's input so that they are bytes."""
    return 128 if layer.input_levels.signed else 0


def _suits_bytes(layer: IntegerLayer) -> bool:
    """Whether a layer is computed, exactly and without loss of time, as a matrix product of bytes."""
    if not layer.is_integer:
        return False
    operator, (_, channels, *kernel) = layer.geometry.operator, layer.levels.shape
    suits = isinstance(operator, MatrixProduct) or (
        operator.groups == 1 and (math.prod(kernel) == 1 or channels >= LEAST_RUN)
    )
    fits = byte_zero_point(layer) + layer.input_levels.max <= MAX_BYTE and int(layer.levels.abs().max()) <= MAX_WEIGHT
    return suits and fits and layer.accumulator_bound < INT32_EXACT
