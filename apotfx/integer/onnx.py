"""An integer network as an ONNX file of standard operators, and the proof that onnxruntime computes the same.

Flavour "exact" does what the integer network does, in the same order, so that its results are equal in every bit. An
accumulator becomes an integer tensor before it is scaled, which keeps optimizers from moving the scale into the weights.
Flavour "qdq", for uniform levels, is what the 8-bit paths of other runtimes look for; it rounds ties, and what it folds,
differently.
"""

import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, fx

from apotfx.analysis import has_hooks
from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_atomic
from apotfx.integer.layers import Affine, IntegerLayer
from apotfx.integer.operations import Operation, operations, refuse, shapes
from apotfx.integer.verify import NetworkComparison, NodeComparison
from apotfx.layers import Geometry
from apotfx.levels import MAX_BITS, LevelSet
from apotfx.operators import FLOAT32_EXACT, INT32_EXACT, MatrixProduct

try:
    import onnx
    from onnx import TensorProto, helper, numpy_helper
except ImportError as error:
    raise ApotfxError("ONNX: the package onnx is missing; pip install onnx") from error

BATCH = "N"
OPSET, OPSET_WRAP, OPSET_INT4 = 18, 19, 21
INT4_BITS = 4
BEFORE_HALF = np.array(np.nextafter(np.float32(0.5), np.float32(0)))
MAX_BYTE, MAX_WEIGHT = 2**8 - 1, 2**7 - 1
MAX_PAIR = 2**15 - 1  # x86 without VNNI adds two products of bytes in 16 bits, and saturates
LEAST_RUN = 16  # bytes that lie side by side; to copy windows of fewer costs more than 8-bit arithmetic saves


def export_onnx(
    network: fx.GraphModule, path: str | os.PathLike, *, input_shape: tuple[int, ...], flavour: str = "exact"
) -> Path:
    """Write the network to the new file `path`, with any number of images as its batch.

    Args:
        network: from `load_integer` with the backend "reference".
        input_shape: of one image, (C, H, W).
        flavour: "exact" or "qdq".

    Raises:
        ApotfxError: `path` exists; an operation that ONNX, or a layer that the flavour, cannot express.
    """
    if flavour not in FLAVOURS:
        raise ApotfxError(f"flavour {flavour!r}: unknown; choose one of {', '.join(FLAVOURS)}")
    path = Path(path)
    require_new(path)
    model = FLAVOURS[flavour](network, input_shape).model()
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, model.SerializeToString())
    return path


class _Graph:
    """An ONNX graph that grows. A value has the name of its node; constants have those of their layers."""

    def __init__(self):
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, onnx.TensorProto] = {}
        self.opset = OPSET

    def add(self, kind: str, inputs: list[str], name: str, **attributes) -> str:
        """The value `name` of an operator."""
        self.nodes.append(helper.make_node(kind, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, value: Tensor | np.ndarray) -> str:
        array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
        self.constants.setdefault(name, numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

    def int4(self, name: str, n: Tensor) -> str:
        """A constant of integers from -8 to 7, two to a byte."""
        self.opset = max(self.opset, OPSET_INT4)
        nibbles = (n.flatten().cpu().numpy() & 15).astype(np.uint8)
        nibbles = np.append(nibbles, np.zeros(nibbles.size % 2, np.uint8))
        packed = (nibbles[::2] | nibbles[1::2] << 4).tobytes()
        self.constants[name] = TensorProto(name=name, data_type=TensorProto.INT4, dims=n.shape, raw_data=packed)
        return name

    def integers(self, *values: int) -> str:
        return self.constant("integers." + "_".join(map(str, values)), np.array(values, np.int64))

    def byte(self, value: int) -> str:
        return self.constant(f"uint8.{value}", np.array(value, np.uint8))

    def number(self, value: float, dtype: type = np.float32) -> str:
        return self.constant(f"{np.dtype(dtype).name}.{value!r}", np.array(value, dtype))


class _Translation(_Graph):
    """What both flavours share: everything but layers, batch norms and averages."""

    def __init__(self, network: fx.GraphModule, input_shape: tuple[int, ...]):
        super().__init__()
        self.operations = [_as_layer(o) if o.kind == "float_layer" else o for o in operations(network)]
        self.shapes = shapes(network, input_shape)
        self.values: dict[fx.Node, str] = {}

    def model(self) -> onnx.ModelProto:
        inputs, outputs = [], []
        for operation in self.operations:
            if operation.kind == "constant":
                continue
            if operation.kind == "output":
                outputs.append(self._described(self._result(operation)))
                continue
            translate = getattr(self, f"_{operation.kind}", None)
            if translate is None or (operation.module is not None and has_hooks(operation.module)):
                raise refuse(operation, "ONNX")
            name = operation.node.name
            self.values[operation.node] = translate(operation, name, *(self.values[node] for node in operation.inputs))
            if operation.kind == "input":
                inputs.append(self._described(operation.node))
            if operation.in_place:  # what reads its input from now on sees its result
                self.values[operation.inputs[0]] = self.values[operation.node]
        graph = helper.make_graph(self.nodes, "apotfx", inputs, outputs, list(self.constants.values()))
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]), producer_name="apotfx"
        )
        return onnx.shape_inference.infer_shapes(model)

    def _result(self, operation: Operation) -> fx.Node:
        (result,) = operation.node.args
        if not isinstance(result, fx.Node):
            raise ApotfxError(f"ONNX: the network returns a {type(result).__name__}, expected one tensor")
        return result

    def _described(self, node: fx.Node) -> onnx.ValueInfoProto:
        shape = [BATCH, *self.shapes[node][1:]]
        return helper.make_tensor_value_info(self.values[node], TensorProto.FLOAT, shape)

    def _input(self, operation: Operation, name: str) -> str:
        return name

    def _clamp(self, operation: Operation, name: str, x: str) -> str:
        low, high = operation["low"], operation["high"]
        if (low, high) == (0, math.inf):
            return self.add("Relu", [x], name)
        return self.add("Clip", [x, self.number(low), self.number(high)], name)

    def _add(self, operation: Operation, name: str, a: str, b: str) -> str:
        return self.add("Add", [a, b], name)

    def _concatenate(self, operation: Operation, name: str, *inputs: str) -> str:
        return self.add("Concat", list(inputs), name, axis=operation["dim"])

    def _identity(self, operation: Operation, name: str, x: str) -> str:
        return x

    def _flatten(self, operation: Operation, name: str, x: str) -> str:
        return self.add("Flatten", [x], name, axis=1)

    def _max_pool(self, operation: Operation, name: str, x: str) -> str:
        starts, ends = self._window_padding(operation)
        return self.add(
            "MaxPool", [x], name, kernel_shape=operation["kernel"], strides=operation["stride"],
            dilations=operation["dilation"], pads=[*starts, *ends],
        )  # fmt: skip

    def _affine(self, operation: Operation, name: str, x: str) -> str:
        for kind, key in (("Mul", "multiplier"), ("Add", "offset")):
            values = self._broadcast(getattr(operation.module, key), operation.node)
            result = name if kind == "Add" else f"{name}.multiplied"
            x = self.add(kind, [x, self.constant(f"{operation.node.target}.{key}", values)], result)
        return x

    # Averages, in double as in `reproducible`.

    def _global_average(self, operation: Operation, name: str, x: str) -> str:
        source, dims = self.shapes[operation.inputs[0]], operation["dims"]
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self.add("ReduceSum", [x, self.integers(*dims)], f"{name}.sum", keepdims=int(operation["keepdim"]))
        return self._mean(x, name, [np.array(source[d]) for d in dims])

    def _average_pool(self, operation: Operation, name: str, x: str) -> str:
        sizes, outputs = (self.shapes[node][2:] for node in (operation.inputs[0], operation.node))
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self._pad(x, f"{name}.padded", *self._window_padding(operation), self.number(0.0, np.float64))
        for d, (kernel, stride, output) in enumerate(zip(operation["kernel"], operation["stride"], outputs)):
            x = self._windows(x, f"{name}.{d}", "Sum", 2 + d, kernel, stride, 1, output)
        counts = [_window_sizes(operation, d, size, output) for d, (size, output) in enumerate(zip(sizes, outputs))]
        return self._mean(x, name, np.ix_(*counts))

    def _adaptive_average(self, operation: Operation, name: str, x: str) -> str:
        sizes, outputs = (self.shapes[node][2:] for node in (operation.inputs[0], operation.node))
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        counts = []
        for d, (size, output) in enumerate(zip(sizes, outputs)):
            axis = self.integers(2 + d)
            bounds = [(i * size // output, -(-(i + 1) * size // output)) for i in range(output)]
            counts.append(np.array([end - start for start, end in bounds]))
            if size == output:
                continue
            parts = [
                self.add("Slice", [x, self.integers(start), self.integers(end), axis], f"{name}.{d}.{i}")
                for i, (start, end) in enumerate(bounds)
            ]
            sums = [self.add("ReduceSum", [part, axis], f"{part}.sum", keepdims=1) for part in parts]
            x = self.add("Concat", sums, f"{name}.{d}.sums", axis=2 + d)
        return self._mean(x, name, np.ix_(*counts))

    def _mean(self, sums: str, name: str, counts: Iterable[np.ndarray]) -> str:
        count = self.constant(f"{name}.count", math.prod(counts, start=np.ones(())))
        mean = self.add("Div", [sums, count], f"{name}.mean")
        return self.add("Cast", [mean], name, to=TensorProto.FLOAT)

    def _window_padding(self, operation: Operation) -> tuple[list[int], list[int]]:
        """(before, after) per dimension, the latter as large as the output needs, whatever rounds its size."""
        sizes, outputs = (self.shapes[node][2:] for node in (operation.inputs[0], operation.node))
        after = [
            max((o - 1) * s + (k - 1) * d + 1 - size - p, 0)
            for o, s, k, d, size, p in zip(
                outputs, operation["stride"], operation["kernel"], operation["dilation"], sizes, operation["padding"]
            )
        ]
        return list(operation["padding"]), after

    def _windows(
        self, x: str, name: str, combine: str, axis: int, kernel: int, stride: int, dilation: int, output: int
    ) -> str:
        """What slides over x along an axis, one tensor per position in the window, put together by an operator."""
        if (kernel, stride) == (1, 1):
            return x
        span = (output - 1) * stride + 1
        slices = [
            self.add("Slice", [x, *map(self.integers, (start, start + span, axis, stride))], f"{name}.{tap}")
            for tap, start in enumerate(range(0, kernel * dilation, dilation))
        ]
        if len(slices) == 1:
            return slices[0]
        return self.add(combine, slices, f"{name}.{combine.lower()}", **({"axis": -1} if combine == "Concat" else {}))

    def _pad(self, x: str, name: str, before: list[int], after: list[int], value: str, mode: str = "constant") -> str:
        """x [N, C, ...] with its last dimensions padded."""
        if not any((*before, *after)):
            return x
        if mode == "circular":
            self.opset = max(self.opset, OPSET_WRAP)
        pads = self.integers(0, 0, *before, 0, 0, *after)
        mode = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
        return self.add("Pad", [x, pads, value] if mode == "constant" else [x, pads], name, mode=mode)

    def _convolution(self, layer: IntegerLayer, inputs: list[str], name: str) -> str:
        stride, padding, dilation, groups = layer.geometry.operator
        return self.add(
            "Conv", inputs, name, kernel_shape=layer.weight.shape[2:], strides=stride, pads=padding * 2,
            dilations=dilation, group=groups,
        )  # fmt: skip

    def _geometry_pad(self, layer: IntegerLayer, name: str, x: str, zero: str) -> str:
        pad = layer.geometry.pad  # the last dimension first
        return self._pad(x, f"{name}.padded", pad[::2][::-1], pad[1::2][::-1], zero, layer.geometry.pad_mode)

    def _broadcast(self, values: Tensor, node: fx.Node) -> Tensor:
        """Values [C] in the shape that broadcasts over the output of a node [N, C, ...]."""
        return values.reshape(-1, *(1 for _ in self.shapes[node][2:]))


class _Exact(_Translation):
    """The flavour "exact"."""

    def _layer(self, operation: Operation, name: str, x: str) -> str:
        layer = operation.module
        n = x if layer.input_levels is None else self._encode(operation, name, x)
        scaled = name if layer.bias is None else f"{name}.scaled"
        if layer.is_integer and (_suits_bytes(layer) or layer.accumulator_bound < FLOAT32_EXACT):
            y = (self._in_bytes if _suits_bytes(layer) else self._in_float)(operation, name, n)
            scale = self.constant(f"{layer.name}.scale", layer.scale.flatten() if layer.scale.dim() else layer.scale)
            axis = -1 if isinstance(layer.geometry.operator, MatrixProduct) else 1
            y = self.add("DequantizeLinear", [y, scale], scaled, axis=axis)
        else:
            y = (self._in_double if layer.is_integer else self._in_float)(operation, name, n)
            y = self.add("Mul", [y, self.constant(f"{layer.name}.scale", layer.scale)], scaled)
        if layer.bias is None:
            return y
        bias = layer.bias.reshape(layer.geometry.operator.channel_shape)
        return self.add("Add", [y, self.constant(f"{layer.name}.bias", bias)], name)

    # Levels of the input.

    def _encode(self, operation: Operation, name: str, x: str) -> str:
        """`functional.encode`: levels as bytes, plus the layer's zero point, or as float."""
        layer = operation.module
        levels, to_bytes = layer.encoding, _suits_bytes(layer)
        by = 2 * levels.max / layer.input_clip
        # A product is monotone in its factors, also after rounding: the rectifier's range can follow it.
        low, high = (torch.tensor(bound * 1.0) for bound in (2 * levels.min, 2 * levels.max))
        if levels.rectifier is not None:
            low, high = low.maximum(levels.rectifier[0] * by), high.minimum(levels.rectifier[1] * by)
        if _is_uniform(levels.set) and not levels.set.signed:
            # Half a position, rounded half up: the sum reaches the next integer only if that half is reached.
            half = self._positions(layer, name, x, by / 2, low / 2, high / 2)
            rounding = self.add("Add", [half, self.constant("before_half", BEFORE_HALF)], f"{name}.rounding")
            if to_bytes:
                return self.add("Cast", [rounding], f"{name}.levels", to=TensorProto.UINT8)
            return self.add("Floor", [rounding], f"{name}.levels")
        positions = self._positions(layer, name, x, by, low, high)
        index = self.add("Cast", [positions], f"{name}.index", to=TensorProto.INT32)  # truncates
        # In one dimension, as GatherElements, which is 10 times faster in onnxruntime than Gather, asks for it. Negative
        # indices count from the end.
        index = self.add("Reshape", [index, self.integers(-1)], f"{name}.flat_index")
        zero_point = _zero_point(layer) if to_bytes else 0
        key = f"{_level_set_name(levels.set)}.levels" + (f"_plus_{zero_point}" if zero_point else "")
        table = self.constant(key, (layer.table.roll(2 * levels.min) + zero_point).float())
        n = self.add("GatherElements", [table, index], f"{name}.flat_levels", axis=0)
        shape = self.integers(-1, *self.shapes[operation.inputs[0]][1:])
        n = self.add("Reshape", [n, shape], f"{name}.float_levels" if to_bytes else f"{name}.levels")
        return self.add("Cast", [n], f"{name}.levels", to=TensorProto.UINT8) if to_bytes else n

    def _positions(self, layer: IntegerLayer, name: str, x: str, by: Tensor, low: Tensor, high: Tensor) -> str:
        x = self.add("Mul", [x, self.constant(f"{layer.name}.positions_per_unit", by)], f"{name}.unclipped")
        bounds = [self.constant(f"{layer.name}.{key}", bound) for key, bound in (("lowest", low), ("highest", high))]
        return self.add("Clip", [x, *bounds], f"{name}.positions")

    # Accumulators.

    def _in_float(self, operation: Operation, name: str, n: str) -> str:
        layer, operator = operation.module, operation.module.geometry.operator
        result = f"{name}.sums" if layer.is_integer else f"{name}.accumulators"
        if isinstance(operator, MatrixProduct):
            y = self.add("MatMul", [n, self._weight(layer, name, layer.weight.mT, TensorProto.FLOAT)], result)
        else:
            n = self._geometry_pad(layer, name, n, self.number(0.0))
            y = self._convolution(layer, [n, self._weight(layer, name, layer.weight, TensorProto.FLOAT)], result)
        return self.add("Cast", [y], f"{name}.accumulators", to=TensorProto.INT32) if layer.is_integer else y

    def _in_bytes(self, operation: Operation, name: str, n: str) -> str:
        """As a matrix product of bytes: onnxruntime's is several times faster than its convolutions."""
        layer = operation.module
        zero_point = self.byte(_zero_point(layer))
        rows, weight = self._columns(operation, name, n, zero_point)
        if 2 * int(layer.weight.abs().max()) * (_zero_point(layer) + layer.input_levels.max) <= MAX_PAIR:
            inputs = [rows, self._weight(layer, name, weight, TensorProto.INT8), zero_point]
        else:  # a product of two unsigned bytes is safe everywhere
            weight = (weight.short() + 128).to(torch.uint8)
            inputs = [rows, self.constant(f"{layer.name}.weight_plus_128", weight), zero_point, self.byte(128)]
        if isinstance(layer.geometry.operator, MatrixProduct):
            return self.add("MatMulInteger", inputs, f"{name}.accumulators")
        y = self.add("MatMulInteger", inputs, f"{name}.products")
        return self._channels_second(operation, f"{name}.accumulators", y)

    def _in_double(self, operation: Operation, name: str, n: str) -> str:
        layer, outputs = operation.module, self.shapes[operation.node]
        n = self.add("Cast", [n], f"{name}.double_levels", to=TensorProto.DOUBLE)
        rows, weight = self._columns(operation, name, n, self.number(0, np.float64))
        groups = getattr(layer.geometry.operator, "groups", 1)
        if groups > 1:  # a batch of products, one per group
            channels, taps = layer.weight.shape[1], layer.weight.shape[2:].numel()
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
            y = self._channels_second(operation, f"{name}.sums", y)
        return self.add("Cast", [y], f"{name}.accumulators", to=TensorProto.FLOAT)

    def _columns(self, operation: Operation, name: str, n: str, zero: str) -> tuple[str, Tensor]:
        """(the windows of a layer's input as rows [N, ..., K], its weight [K, C_out]): a matrix product is left."""
        layer, operator = operation.module, operation.module.geometry.operator
        if isinstance(operator, MatrixProduct):
            return n, layer.weight.mT
        n = self._geometry_pad(layer, name, n, zero)
        n = self._pad(n, f"{name}.padded", operator.padding, operator.padding, zero)
        dims = range(len(operator.stride))
        n = self.add("Transpose", [n], f"{name}.channels_last", perm=[0, *(2 + d for d in dims), 1])
        for d in reversed(dims):
            n = self._windows(
                n, f"{name}.{d}", "Concat", 1 + d, layer.weight.shape[2 + d], operator.stride[d], operator.dilation[d],
                self.shapes[operation.node][2 + d],
            )  # fmt: skip
        return n, layer.weight.permute(*(2 + d for d in dims), 1, 0).flatten(0, -2)

    def _channels_second(self, operation: Operation, name: str, y: str) -> str:
        dims = len(self.shapes[operation.node]) - 2
        return self.add("Transpose", [y], name, perm=[0, dims + 1, *range(1, dims + 1)])

    def _weight(self, layer: IntegerLayer, name: str, n: Tensor, dtype: int) -> str:
        """A layer's levels, arranged as n, in an ONNX type; stored as integers, up to 4 bits as indices of levels."""
        levels = layer.weight_levels
        if levels is None or levels.bits > INT4_BITS:
            stored = self.constant(f"{layer.name}.weight", n)
            same = helper.np_dtype_to_tensor_dtype(n.cpu().numpy().dtype) == dtype
            return stored if same else self.add("Cast", [stored], f"{name}.weight_levels", to=dtype)
        if _is_uniform(levels):
            return self.add("Cast", [self.int4(f"{layer.name}.weight", n)], f"{name}.weight_levels", to=dtype)
        index = torch.searchsorted(torch.tensor(levels.ints), n.cpu().abs().long().contiguous()) * n.cpu().sign()
        stored = self.int4(f"{layer.name}.weight_index", index)
        index = self.add("Cast", [stored], f"{name}.weight_indices", to=TensorProto.INT32)
        table = np.array([*levels.ints, *(-n for n in levels.ints[:0:-1])], helper.tensor_dtype_to_np_dtype(dtype))
        table = self.constant(f"{_level_set_name(levels)}.{table.dtype}", table)
        return self.add("Gather", [table, index], f"{name}.weight_levels")


class _Qdq(_Translation):
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

    def _affine(self, operation: Operation, name: str, x: str) -> str:
        return x if operation.inputs[0] in self.folded else super()._affine(operation, name, x)

    def _layer(self, operation: Operation, name: str, x: str) -> str:
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
            return self._convolution(layer, [x, w, b], name)
        products = name if bias is None else f"{name}.products"
        y = self.add("MatMul", [x, w], products) if product else self._convolution(layer, [x, w], products)
        if bias is None:
            return y
        return self.add("Add", [y, self.constant(f"{layer.name}.bias", bias.reshape(operator.channel_shape))], name)

    def _quantized(self, layer: IntegerLayer, name: str, x: str) -> str:
        """The values that the levels of x stand for."""
        levels, clip = layer.input_levels, layer.input_clip
        low, high = clip * -levels.signed, clip
        if layer.rectifier is not None:
            high = high.minimum(torch.tensor(layer.rectifier[1]))
        if levels.max < MAX_BYTE or high < clip:  # else the type clips
            bounds = [
                self.constant(f"{layer.name}.{key}", bound) for key, bound in (("lowest", low), ("highest", high))
            ]
            x = self.add("Clip", [x, *bounds], f"{name}.clipped")
        dtype = np.int8 if levels.signed else np.uint8
        scale = self.constant(f"{layer.name}.input_scale", clip / levels.max)
        zero = self.number(0, dtype)
        n = self.add("QuantizeLinear", [x, scale, zero], f"{name}.levels")
        n = self._geometry_pad(layer, name, n, zero)
        return self.add("DequantizeLinear", [n, scale, zero], f"{name}.input")

    def _dequantized(self, constant: str, scale: Tensor, name: str, dtype: type, axis: int) -> str:
        shape = scale.shape if len(scale) > 1 else ()
        scale = self.constant(f"{constant}_scale", scale.reshape(shape))
        zero = self.constant(f"{constant}_zero_point", np.zeros(shape, dtype))  # onnxruntime 1.23 fails without it
        return self.add("DequantizeLinear", [constant, scale, zero], name, axis=axis)

    def _global_average(self, operation: Operation, name: str, x: str) -> str:
        axes = self.integers(*operation["dims"])
        return self.add("ReduceMean", [x, axes], name, keepdims=int(operation["keepdim"]))

    def _average_pool(self, operation: Operation, name: str, x: str) -> str:
        if operation["ceil_mode"]:  # runtimes divide by different numbers
            return super()._average_pool(operation, name, x)
        return self.add(
            "AveragePool", [x], name, kernel_shape=operation["kernel"], strides=operation["stride"],
            pads=operation["padding"] * 2,
            count_include_pad=int(operation["count_include_pad"]),
        )  # fmt: skip


FLAVOURS = {"exact": _Exact, "qdq": _Qdq}


def _as_layer(operation: Operation) -> Operation:
    """A float layer as an `IntegerLayer` whose weight and input are float."""
    layer, one = operation.module, torch.ones(())
    arguments = (operation.node.target, Geometry.of(layer), layer.weight, None, one, None, None, layer.bias)
    return replace(operation, kind="layer", module=IntegerLayer(*arguments))


def _is_uniform(levels: LevelSet | None) -> bool:
    return levels is not None and levels.max == len(levels.ints) - 1


def _level_set_name(levels: LevelSet) -> str:
    return f"{levels.scheme}{levels.bits}_{'signed' if levels.signed else 'unsigned'}"


def _zero_point(layer: IntegerLayer) -> int:
    """What is added to the levels of a layer's input so that they are bytes."""
    return 128 if layer.input_levels.signed else 0


def _suits_bytes(layer: IntegerLayer) -> bool:
    """Whether a layer is computed, exactly and without loss of time, as a matrix product of bytes."""
    operator, (_, channels, *kernel) = layer.geometry.operator, layer.weight.shape
    suits = isinstance(operator, MatrixProduct) or (
        operator.groups == 1 and (math.prod(kernel) == 1 or channels >= LEAST_RUN)
    )
    fits = _zero_point(layer) + layer.input_levels.max <= MAX_BYTE and int(layer.weight.abs().max()) <= MAX_WEIGHT
    return suits and fits and layer.accumulator_bound < INT32_EXACT


def _window_sizes(operation: Operation, dim: int, size: int, output: int) -> np.ndarray:
    """By how many elements torch divides an average, for every position in a dimension: [output]."""
    kernel, stride, padding = (operation[key][dim] for key in ("kernel", "stride", "padding"))
    start = np.arange(output) * stride - padding
    end = np.minimum(start + kernel, size + padding)
    if not operation["count_include_pad"]:
        start, end = start.clip(min=0), end.clip(max=size)
    return end - start


def _require_uniform(layer: IntegerLayer) -> None:
    for what, levels in (("weight", layer.weight_levels), ("input", layer.input_levels)):
        if not _is_uniform(levels):
            got = "float" if levels is None else f"{levels.scheme} at {levels.bits} bits"
            raise ApotfxError(
                f"flavour qdq: the {what} of layer {layer.name} is {got}, expected uniform levels; use flavour exact"
            )


def _fold(layer: IntegerLayer, affine: Affine | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """(levels, scale [1] or [C_out], bias) of a layer's weight with the batch norm behind it."""
    weight, scale, bias = layer.weight, layer.weight_scale.flatten(), layer.bias
    if affine is None:
        return weight, scale, bias
    multiplier = affine.multiplier
    weight = weight * multiplier.sign().to(weight.dtype).view(-1, *(1 for _ in weight.shape[1:]))
    scale = torch.where(multiplier == 0, scale, scale * multiplier.abs())  # a scale of 0 is none
    return weight, scale, affine.offset if bias is None else bias * multiplier + affine.offset


def compare_onnx(
    network: fx.GraphModule, path: str | os.PathLike, batches: Iterable[Tensor], optimize: bool = True
) -> NetworkComparison:
    """Run images through the network and, in onnxruntime, through its ONNX file.

    Logits and predictions are those of the file as it is; codes and accumulators come from a second run that shows them.

    Args:
        network: what the file was made of.
        batches: images, float32 on the CPU.
        optimize: whether onnxruntime may rearrange the graph, as it does by default.

    Raises:
        ApotfxError: onnxruntime is missing, or cannot run the file.
    """
    path = Path(path)
    model = onnx.load_model_from_string(path.read_bytes())
    names = {
        o.node: o.node.name for o in operations(network) if o.kind == "layer" and o.module.input_levels is not None
    }
    computed = {value for node in model.graph.node for value in node.output}
    shown = [f"{name}.{part}" for name in names.values() for part in ("levels", "accumulators")]
    shown = [value for value in shown if value in computed]
    plain = _session(path, model, optimize)
    model.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in shown)
    verbose = _session(path, model, optimize)
    comparison = NetworkComparison()
    first_image = 0
    for images in batches:
        feed = {plain.get_inputs()[0].name: images.numpy()}
        (logits,) = plain.run(None, feed)
        values = dict(zip(shown, verbose.run(shown, feed) if shown else []))
        recorder = _Recorder(network)
        expected = recorder.run(images)
        for node, (codes, accumulators) in recorder.layers.items():
            layer = network.get_submodule(node.target)
            tallies = comparison.nodes.setdefault(node.name, NodeComparison(node.target))
            levels, sums = (values.get(f"{node.name}.{part}") for part in ("levels", "accumulators"))
            if levels is not None:
                zero_point = _zero_point(layer) if levels.dtype == np.uint8 else 0
                tallies.codes.add(codes, torch.from_numpy(levels).to(codes.dtype) - zero_point, first_image)
            if sums is not None and layer.is_integer:
                tallies.accumulators.add(accumulators, torch.from_numpy(sums).to(accumulators.dtype), first_image)
        logits = torch.from_numpy(logits)
        comparison.logits.add(expected, logits, first_image)
        comparison.predictions.add(expected.argmax(-1), logits.argmax(-1), first_image)
        first_image += len(images)
    return comparison


class _Recorder(fx.Interpreter):
    """Runs a network and keeps, of every layer with a quantized input, its codes before padding and its accumulators."""

    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.layers: dict[fx.Node, tuple[Tensor, Tensor]] = {}

    def run_node(self, n: fx.Node) -> object:
        module = self.module.get_submodule(n.target) if n.op == "call_module" else None
        if isinstance(module, IntegerLayer) and module.input_levels is not None:
            (x,), _ = self.fetch_args_kwargs_from_env(n)
            _, accumulators = module.codes_and_accumulators(x)
            self.layers[n] = module.encode(x), accumulators
        return super().run_node(n)


def _session(path: Path, model: onnx.ModelProto, optimize: bool):
    try:
        import onnxruntime
    except ImportError as error:
        raise ApotfxError("ONNX: the package onnxruntime is missing; pip install onnxruntime") from error
    levels = onnxruntime.GraphOptimizationLevel
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.log_severity_level = 3
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has no class of its own for errors
        reason = " ".join(str(error).split())
        raise ApotfxError(f"{path}: onnxruntime {onnxruntime.__version__} cannot load it ({reason})") from error
