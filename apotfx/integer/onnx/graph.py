"""The ONNX graph as it grows, and what both flavours translate alike: everything but layers."""

import math
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from apotfx.errors import ApotfxError
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.operations import Operation, operations, refuse, shapes
from apotfx.layers import Geometry
from apotfx.levels import LevelSet
from apotfx.modules import has_hooks

BATCH = "N"
OPSET, OPSET_WRAP, OPSET_INT4 = 18, 19, 21
MAX_BYTE = 2**8 - 1


class Graph:
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


class Translation(Graph):
    """Node by node: `translate_KIND` takes an operation, its name and the values it reads, and returns its value.

    A flavour adds `translate_layer`, and may replace others.
    """

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
            translate = getattr(self, f"translate_{operation.kind}", None)
            if translate is None or (operation.module is not None and has_hooks(operation.module)):
                raise refuse(operation, "ONNX")
            name = operation.node.name
            self.values[operation.node] = translate(operation, name, *(self.values[node] for node in operation.inputs))
            if operation.kind == "input":
                inputs.append(self._described(operation.node))
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

    def translate_input(self, operation: Operation, name: str) -> str:
        if operation.node not in self.shapes:  # an input with a default that is no tensor
            raise refuse(operation, "ONNX")
        return name

    def translate_clamp(self, operation: Operation, name: str, x: str) -> str:
        low, high = operation["low"], operation["high"]
        if (low, high) == (0, math.inf):
            return self.add("Relu", [x], name)
        return self.add("Clip", [x, self.number(low), self.number(high)], name)

    def translate_add(self, operation: Operation, name: str, a: str, b: str) -> str:
        return self.add("Add", [a, b], name)

    def translate_concatenate(self, operation: Operation, name: str, *inputs: str) -> str:
        return self.add("Concat", list(inputs), name, axis=operation["dim"])

    def translate_identity(self, operation: Operation, name: str, x: str) -> str:
        return x

    def translate_flatten(self, operation: Operation, name: str, x: str) -> str:
        return self.add("Flatten", [x], name, axis=1)

    def translate_max_pool(self, operation: Operation, name: str, x: str) -> str:
        starts, ends = self._window_padding(operation)
        return self.add(
            "MaxPool", [x], name, kernel_shape=operation["kernel"], strides=operation["stride"],
            dilations=operation["dilation"], pads=[*starts, *ends],
        )  # fmt: skip

    def translate_affine(self, operation: Operation, name: str, x: str) -> str:
        for kind, key in (("Mul", "multiplier"), ("Add", "offset")):
            values = self._broadcast(getattr(operation.module, key), operation.node)
            result = name if kind == "Add" else f"{name}.multiplied"
            x = self.add(kind, [x, self.constant(f"{operation.node.target}.{key}", values)], result)
        return x

    # Averages, in double as in `reproducible`.

    def translate_global_average(self, operation: Operation, name: str, x: str) -> str:
        source, dims = self.shapes[operation.inputs[0]], operation["dims"]
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self.add("ReduceSum", [x, self.integers(*dims)], f"{name}.sum", keepdims=int(operation["keepdim"]))
        return self._mean(x, name, [np.array(source[d]) for d in dims])

    def translate_average_pool(self, operation: Operation, name: str, x: str) -> str:
        sizes, outputs = self._sizes(operation)
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self.pad(x, f"{name}.padded", *self._window_padding(operation), self.number(0.0, np.float64))
        for d, (kernel, stride, output) in enumerate(zip(operation["kernel"], operation["stride"], outputs)):
            x = self.windows(x, f"{name}.{d}", "Sum", 2 + d, kernel, stride, 1, output)
        counts = [_window_sizes(operation, d, size, output) for d, (size, output) in enumerate(zip(sizes, outputs))]
        return self._mean(x, name, np.ix_(*counts))

    def translate_adaptive_average(self, operation: Operation, name: str, x: str) -> str:
        sizes, outputs = self._sizes(operation)
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

    def _sizes(self, operation: Operation) -> tuple[torch.Size, torch.Size]:
        """Of the input and of the output, without batch and channels."""
        return self.shapes[operation.inputs[0]][2:], self.shapes[operation.node][2:]

    def _window_padding(self, operation: Operation) -> tuple[list[int], list[int]]:
        """(before, after) per dimension, the latter as large as the output needs, whatever rounds its size."""
        sizes, outputs = self._sizes(operation)
        after = [
            max((o - 1) * s + (k - 1) * d + 1 - size - p, 0)
            for o, s, k, d, size, p in zip(
                outputs, operation["stride"], operation["kernel"], operation["dilation"], sizes, operation["padding"]
            )
        ]
        return list(operation["padding"]), after

    def _broadcast(self, values: Tensor, node: fx.Node) -> Tensor:
        """Values [C] in the shape that broadcasts over the output of a node [N, C, ...]."""
        return values.reshape(-1, *(1 for _ in self.shapes[node][2:]))

    # Parts of layers and pools.

    def windows(
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

    def pad(self, x: str, name: str, before: list[int], after: list[int], value: str, mode: str = "constant") -> str:
        """x [N, C, ...] with its last dimensions padded."""
        if not any((*before, *after)):
            return x
        if mode == "circular":
            self.opset = max(self.opset, OPSET_WRAP)
        pads = self.integers(0, 0, *before, 0, 0, *after)
        mode = {"replicate": "edge", "circular": "wrap"}.get(mode, mode)
        return self.add("Pad", [x, pads, value] if mode == "constant" else [x, pads], name, mode=mode)

    def clip(self, layer: IntegerLayer, x: str, low: Tensor, high: Tensor, name: str) -> str:
        bounds = [self.constant(f"{layer.name}.{key}", bound) for key, bound in (("lowest", low), ("highest", high))]
        return self.add("Clip", [x, *bounds], name)

    def convolution(self, layer: IntegerLayer, inputs: list[str], name: str) -> str:
        stride, padding, dilation, groups = layer.geometry.operator
        return self.add(
            "Conv", inputs, name, kernel_shape=layer.levels.shape[2:], strides=stride, pads=padding * 2,
            dilations=dilation, group=groups,
        )  # fmt: skip

    def pad_input(self, layer: IntegerLayer, name: str, x: str, zero: str) -> str:
        pad = layer.geometry.pad  # the last dimension first
        return self.pad(x, f"{name}.padded", pad[::2][::-1], pad[1::2][::-1], zero, layer.geometry.pad_mode)

    def add_bias(self, layer: IntegerLayer, y: str, bias: Tensor, name: str) -> str:
        bias = bias.reshape(layer.geometry.operator.channel_shape)
        return self.add("Add", [y, self.constant(f"{layer.name}.bias", bias)], name)


def is_uniform(levels: LevelSet | None) -> bool:
    """Whether the magnitudes are all integers from 0 to the largest."""
    return levels is not None and levels.max == len(levels.ints) - 1


def _as_layer(operation: Operation) -> Operation:
    """A float layer as an `IntegerLayer` whose weight and input are float."""
    layer, one = operation.module, torch.ones(())
    arguments = (operation.node.target, Geometry.of(layer), layer.weight, None, one, None, None, layer.bias)
    return replace(operation, kind="layer", module=IntegerLayer(*arguments))


def _window_sizes(operation: Operation, dim: int, size: int, output: int) -> np.ndarray:
    """By how many elements torch divides an average, for every position in a dimension: [output]."""
    kernel, stride, padding = (operation[key][dim] for key in ("kernel", "stride", "padding"))
    start = np.arange(output) * stride - padding
    end = np.minimum(start + kernel, size + padding)
    if not operation["count_include_pad"]:
        start, end = start.clip(min=0), end.clip(max=size)
    return end - start
