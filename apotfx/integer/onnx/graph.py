"""The ONNX graph as it grows, and what both flavours translate alike: everything but layers."""

import math
from collections.abc import Iterable

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from apotfx.errors import ApotfxError
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.network import IntegerNetwork, shapes_of
from apotfx.integer.program import Encode, FloatLayer, Input, Product, Step, refuse
from apotfx.layers import Geometry
from apotfx.levels import LevelSet
from apotfx.operators import TransposedConvolution

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
    """Step by step: `translate_KIND` takes a step, its name and the values it reads, and returns its value.

    A flavour adds `translate_encode` and `translate_layer`, and may replace others.
    """

    def __init__(self, network: IntegerNetwork, input_shape: tuple[int, ...]):
        super().__init__()
        self.network, self.program = network, network.program
        self.shapes = shapes_of(network, input_shape)
        self.steps = {step.name: step for step in self.program.steps}
        self.readers = self.program.readers()
        self.values: dict[str, str] = {}

    def model(self) -> onnx.ModelProto:
        if self.program.result is None:
            raise ApotfxError("ONNX: the network returns several values, or a part of one, expected one tensor")
        for step in self.program.needed():
            translate = getattr(self, f"translate_{step.kind}", None)
            if translate is None:
                raise refuse(step, "ONNX")
            self.values[step.name] = translate(step, step.name, *(self.values[name] for name in step.inputs))
        inputs = [self._described(name) for name, step in self.steps.items() if name in self.values and step.kind == "input"]
        outputs = [self._described(self.program.result)]
        graph = helper.make_graph(self.nodes, "apotfx", inputs, outputs, self._used_constants())
        opset = helper.make_opsetid("", self.opset)
        model = helper.make_model(
            graph, opset_imports=[opset], ir_version=helper.find_min_ir_version_for([opset]), producer_name="apotfx"
        )
        return onnx.shape_inference.infer_shapes(model)

    def _used_constants(self) -> list[onnx.TensorProto]:
        used = {name for node in self.nodes for name in node.input}
        return [constant for name, constant in self.constants.items() if name in used]

    def _described(self, name: str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(self.values[name], TensorProto.FLOAT, [BATCH, *self.shapes[name][1:]])

    def layer_of(self, step: Encode | Product) -> IntegerLayer:
        return self.network.layer(step.layer)

    def translate_input(self, step: Input, name: str) -> str:
        if name not in self.shapes:
            raise refuse(step, "ONNX")
        return name

    def translate_product(self, step: Product, name: str, x: str) -> str:
        layer = self.layer_of(step)
        if isinstance(layer.geometry.operator, TransposedConvolution):
            raise refuse(step, "ONNX", f"ConvTranspose{layer.geometry.dims}d")
        return self.translate_layer(layer, step, x)

    def translate_float_layer(self, step: FloatLayer, name: str, x: str) -> str:
        """As a layer whose weight and input are float."""
        if isinstance(step.operator, TransposedConvolution):
            raise refuse(step, "ONNX")
        weight, one = self.network.tensor(f"{step.layer}.weight"), torch.ones(())
        bias = self.network.tensor(f"{step.layer}.bias") if step.bias else None
        geometry = Geometry(step.operator, step.pad, step.pad_mode)
        return self.translate_layer(IntegerLayer(step.layer, geometry, weight, None, one, None, None, bias), step, x)

    def translate_clamp(self, step: Step, name: str, x: str) -> str:
        low, high = step.low, step.high
        if (low, high) == (0, None):
            return self.add("Relu", [x], name)
        return self.add("Clip", [x, self.number(low), self.number(high)], name)

    def translate_add(self, step: Step, name: str, a: str, b: str) -> str:
        return self.add("Add", [a, b], name)

    def translate_concatenate(self, step: Step, name: str, *inputs: str) -> str:
        return self.add("Concat", list(inputs), name, axis=step.dim)

    def translate_flatten(self, step: Step, name: str, x: str) -> str:
        return self.add("Flatten", [x], name, axis=1)

    def translate_max_pool(self, step: Step, name: str, x: str) -> str:
        starts, ends = self._window_padding(step)
        return self.add(
            "MaxPool", [x], name, kernel_shape=step.kernel, strides=step.stride,
            dilations=step.dilation, pads=[*starts, *ends],
        )  # fmt: skip

    def translate_affine(self, step: Step, name: str, x: str) -> str:
        for kind, tensor in zip(("Mul", "Add"), step.tensors()):
            values = self._broadcast(self.network.tensor(tensor), name)
            x = self.add(kind, [x, self.constant(tensor, values)], name if kind == "Add" else f"{name}.multiplied")
        return x

    # Averages, in double as in `reproducible`.

    def translate_average(self, step: Step, name: str, x: str) -> str:
        source, dims = self.shapes[step.inputs[0]], step.dims
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self.add("ReduceSum", [x, self.integers(*dims)], f"{name}.sum", keepdims=int(step.keepdim))
        return self._mean(x, name, [np.array(source[d]) for d in dims])

    def translate_average_pool(self, step: Step, name: str, x: str) -> str:
        sizes, outputs = self._sizes(step)
        x = self.add("Cast", [x], f"{name}.double", to=TensorProto.DOUBLE)
        x = self.pad(x, f"{name}.padded", *self._window_padding(step), self.number(0.0, np.float64))
        for d, (kernel, stride, output) in enumerate(zip(step.kernel, step.stride, outputs)):
            x = self.windows(x, f"{name}.{d}", "Sum", 2 + d, kernel, stride, 1, output)
        counts = [_window_sizes(step, d, size, output) for d, (size, output) in enumerate(zip(sizes, outputs))]
        return self._mean(x, name, np.ix_(*counts))

    def translate_adaptive_average(self, step: Step, name: str, x: str) -> str:
        sizes, outputs = self._sizes(step)
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

    def _sizes(self, step: Step) -> tuple[torch.Size, torch.Size]:
        """Of the input and of the output, without batch and channels."""
        return self.shapes[step.inputs[0]][2:], self.shapes[step.name][2:]

    def _window_padding(self, step: Step) -> tuple[list[int], list[int]]:
        """(before, after) per dimension, the latter as large as the output needs, whatever rounds its size."""
        sizes, outputs = self._sizes(step)
        after = [
            max((o - 1) * s + (k - 1) * d + 1 - size - p, 0)
            for o, s, k, d, size, p in zip(
                outputs, step.stride, step.kernel, step.dilation, sizes, step.padding
            )
        ]
        return list(step.padding), after

    def _broadcast(self, values: Tensor, name: str) -> Tensor:
        """Values [C] in the shape that broadcasts over a value [N, C, ...]."""
        return values.reshape(-1, *(1 for _ in self.shapes[name][2:]))

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


def _window_sizes(step: Step, dim: int, size: int, output: int) -> np.ndarray:
    """By how many elements torch divides an average, for every position in a dimension: [output]."""
    kernel, stride, padding = (getattr(step, key)[dim] for key in ("kernel", "stride", "padding"))
    start = np.arange(output) * stride - padding
    end = np.minimum(start + kernel, size + padding)
    if not step.count_include_pad:
        start, end = start.clip(min=0), end.clip(max=size)
    return end - start
