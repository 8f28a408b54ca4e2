"""Translation of an integer network to C99, in which a weight multiplies by shifts and adds.

What does not depend on the network is C in `c_runtime/`, copied as it is; what is written here is the network: its level
sets, its layers, the order of calls and the buffers between them (network.c), and its numbers (weights.h).
"""

import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_directory
from apotfx.integer.codes import pack_codes
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.load import opened
from apotfx.integer.network import IntegerNetwork, shapes_of
from apotfx.integer.program import Encode, Input, Product, Step, refuse
from apotfx.levels import LevelSet
from apotfx.operators import Convolution, TransposedConvolution, accumulator_bits

RUNTIME = Path(__file__).with_name("c_runtime")
NARROW, WIDE = 32, 64  # bits of accumulators


def export_c(
    source: nn.Module | str | os.PathLike,
    path: str | os.PathLike,
    *,
    input_shape: Sequence[int] | None = None,
    metadata: Mapping[str, object] | None = None,
) -> Path:
    """Write a program that computes an integer network to the new directory `path`; its network.c says how to compile it.

    Accumulators, codes and outputs are those of the network in every bit.

    Args:
        source: an export that stands alone, or what `load_integer` returned with backend "reference".
        input_shape: (C, H, W) of an image; by default what the export says.
        metadata: for main.c, which reads images of bytes: `mean` and `std` per channel of images / 255 (0 and 1 where they
            are absent), and perhaps `arch`; by default what the export says.

    Raises:
        ApotfxError: `path` exists; the network has a layer in float, or a step that is none of convolution, linear, batch
            norm, ReLU, ReLU6, addition, maximum and average pool and flatten, or not of 2-D images; no input shape.
    """
    path = Path(path)
    require_new(path)
    network, input_shape, stated = opened(source, input_shape)
    if not isinstance(input_shape, (tuple, list)) or len(input_shape) != 3:
        raise ApotfxError(f"C: input_shape {input_shape!r}: expected (channels, height, width)")
    write_directory(path, _Source(network, input_shape).files(stated if metadata is None else metadata))
    return path


@dataclass(frozen=True)
class _Call:
    """A call of a C function: `{0}`, `{1}` in its text stand for the values that it reads, `{y}` for its result."""

    text: str
    reads: tuple[str, ...]
    result: str
    size: int
    in_place: bool = True  # whether the result may overwrite what it reads


class _Source:
    """Translates step by step; a value is named after the step whose memory holds it."""

    def __init__(self, network: IntegerNetwork, input_shape: tuple[int, int, int]):
        self.input_shape = input_shape
        self.network, self.program = network, network.program
        self.steps = {step.name: step for step in self.program.steps}
        self.values: dict[str, str] = {}
        self.calls: list[_Call] = []
        self.layers: list[str] = []  # definitions of network.c
        self.windows: list[str] = []
        self.weight_sets: dict[LevelSet, None] = {}
        self.input_sets: dict[LevelSet, None] = {}
        self.arrays: dict[str, str] = {}  # definitions of weights.h
        self.names: dict[str, str] = {}  # of arrays: a layer that is called twice has one set of them
        self.widths: set[int] = set()
        self.sizes: dict[str, list[int]] = {"LEVELS": [1], "ACCUMULATORS": [1], "KERNEL": [1]}
        steps = self.program.needed()
        translations = [self._translation(step) for step in steps]  # refuses what C has not before anything runs
        self.shapes = {name: tuple(shape[1:]) for name, shape in shapes_of(network, input_shape).items()}
        for step, translate in zip(steps, translations):
            translate(step)
        self._returns()

    def _translation(self, step: Step) -> Callable[[Step], None]:
        translate = getattr(self, f"_{step.kind}", None)
        if translate is None:
            raise refuse(step, "C")
        return translate

    # Steps.

    def _input(self, step: Input) -> None:
        if self.values:
            raise refuse(step, "C")  # a second input
        self.values[step.name] = "input"

    def _returns(self) -> None:
        result = self.program.result
        if result is None or len(self.shapes[result]) != 1 or self.values[result] == "input":
            raise ApotfxError("C: the network returns something else, expected one tensor [N, classes]")
        self.result = self.values[result]
        (self.num_outputs,) = self.shapes[result]

    def _encode(self, step: Encode) -> None:
        """Part of the layer that takes the codes."""
        self.values[step.name] = self.values[step.inputs[0]]
        self.shapes[step.name] = self.shapes[step.inputs[0]]

    def _flatten(self, step: Step) -> None:
        self.values[step.name] = self.values[step.inputs[0]]

    def _add(self, step: Step) -> None:
        a, b = (self.shapes[name] for name in step.inputs)
        if a != b:
            raise refuse(step, "C")
        self._call(step, f"add({math.prod(a)}, {{0}}, {{1}}, {{y}})")

    def _clamp(self, step: Step) -> None:
        count, low, high = math.prod(self.shapes[step.name]), step.low, step.high
        if (low, high) == (0, None):
            self._call(step, f"relu({count}, {{0}}, {{y}})")
        else:
            self._call(step, f"clamp({_float(low, step)}, {_float(high, step)}, {count}, {{0}}, {{y}})")

    def _affine(self, step: Step) -> None:
        channels, *pixels = self.shapes[step.name]
        name = self.names.setdefault(step.norm, step.name)
        for array, tensor in zip(("multiplier", "offset"), step.tensors()):
            self._floats(f"{name}_{array}", self.network.tensor(tensor), step)
        self._call(step, f"affine({name}_multiplier, {name}_offset, {channels}, {math.prod(pixels)}, {{0}}, {{y}})")

    def _max_pool(self, step: Step) -> None:
        self._pool(
            step, "max_pool(&{}, {{0}}, {{y}})", step.kernel, step.stride, step.padding, step.dilation
        )

    def _average_pool(self, step: Step) -> None:
        text = f"average_pool(&{{}}, {int(step.count_include_pad)}, {{{{0}}}}, {{{{y}}}})"
        self._pool(step, text, step.kernel, step.stride, step.padding, (1, 1))

    def _average(self, step: Step) -> None:
        shape = self.shapes[step.inputs[0]]
        if {d % (len(shape) + 1) for d in step.dims} != {2, 3}:
            raise refuse(step, "C")
        kernel = shape[1:]
        self._pool(step, "average_pool(&{}, 1, {{0}}, {{y}})", kernel, (1, 1), (0, 0), (1, 1))

    def _pool(self, step: Step, text: str, *geometry: tuple[int, ...]) -> None:
        shape = self.shapes[step.inputs[0]]
        if len(shape) != 3:
            raise refuse(step, "C")
        name = f"{step.name}_window"
        window = _window(shape, (*self.shapes[step.name], 1, 1)[:3], *geometry)
        self.windows.append(f"static const Window {name} = {window};")
        self._call(step, text.format(name), in_place=False)

    def _product(self, step: Product) -> None:
        layer = self.network.layer(step.layer)
        if not layer.is_integer:
            self._float_layer(step)
        name = self.names.setdefault(step.layer, step.name)
        scale = layer.scale.flatten()
        window, groups = self._layer_window(step, layer)
        low, high = layer.accumulator_range
        bits = accumulator_bits(low, high)
        width = NARROW if bits <= NARROW else WIDE
        self.widths.add(width)
        if f"{name}_codes" not in self.arrays:
            codes = pack_codes(layer.levels.cpu(), layer.weight_levels).tolist() + [0]  # code_at reads a byte more
            self.arrays[f"{name}_codes"] = _array("uint8_t", f"{name}_codes", map(str, codes), ",")
        self._floats(f"{name}_scale", scale, step)
        if layer.bias is not None:
            self._floats(f"{name}_bias", layer.bias, step)
        weight, inputs = layer.weight_levels, layer.input_levels
        self.weight_sets[weight] = self.input_sets[inputs] = None
        shape = " x ".join(map(str, layer.levels.shape))
        self.layers.append(
            f"/* {shape}; weight {_describe(weight)}; input {_describe(inputs)};\n"
            f"   accumulators from {low} to {high}: {bits} bits */\n"
            f"static const Layer {step.name}_layer = {{\n"
            f'    .name = "{step.name}", .window = {window}, .groups = {groups},\n'
            f"    .encoder = {_encoder(layer, step)},\n"
            f"    .codes = {name}_codes, .bits = {weight.bits}, .magnitude_bits = {weight.magnitude_bits}, "
            f".levels = {_identifier(weight)}_levels,\n"
            f"    .scale = {name}_scale, .per_channel = {int(len(scale) > 1)}, "
            f".bias = {'NULL' if layer.bias is None else f'{name}_bias'},\n}};\n"
        )
        self._call(step, f"convolve{width}(&{step.name}_layer, {{0}}, {{y}})")

    def _float_layer(self, step: Step) -> None:
        raise ApotfxError(f"C: layer {step.layer} computes in float; quantize its input and its weight")

    def _layer_window(self, step: Step, layer: IntegerLayer) -> tuple[str, int]:
        """(the window of a layer in C, its groups)"""
        geometry, kernel = layer.geometry, layer.levels.shape[2:]
        shape_x, shape_y = (self.shapes[name] for name in (step.inputs[0], step.name))
        stride = padding = dilation = (1, 1)
        groups = 1
        if isinstance(geometry.operator, TransposedConvolution):
            raise refuse(step, "C", f"ConvTranspose{geometry.dims}d")
        if isinstance(geometry.operator, Convolution):
            stride, padding, dilation, groups = geometry.operator
            if geometry.pad:
                if geometry.pad_mode != "constant":
                    raise refuse(step, "C")
                padding = geometry.pad[-2::-2]  # where it begins; the size of the output says where it ends
        else:
            shape_x, shape_y, kernel, padding = (*shape_x, 1, 1), (*shape_y, 1, 1), (1, 1), (0, 0)
        if not len(shape_x) == len(shape_y) == 3:
            raise refuse(step, "C")
        self.sizes["LEVELS"].append(math.prod(shape_x))
        self.sizes["ACCUMULATORS"].append(math.prod(shape_y[1:]))
        self.sizes["KERNEL"] += kernel
        return _window(shape_x, shape_y, kernel, stride, padding, dilation), groups

    def _floats(self, name: str, values: Tensor, step: Step) -> None:
        self.arrays[name] = _array("float", name, [_float(v, step) for v in values.tolist()], ", ")

    def _call(self, step: Step, text: str, in_place: bool = True) -> None:
        reads, result = tuple(self.values[name] for name in step.inputs), step.name
        self.values[step.name] = result
        self.calls.append(_Call(f"{text};", reads, result, math.prod(self.shapes[step.name]), in_place))

    # Files.

    def files(self, metadata: Mapping[str, object]) -> dict[str, bytes]:
        files = {
            "network.h": self._header(metadata),
            "network.c": self._source(metadata),
            "weights.h": "".join(self.arrays.values()),
            "levels.h": "\n".join([*map(_shifts, self.weight_sets), *map(_encoding_table, self.input_sets)]),
            "operations.h": (RUNTIME / "operations.h").read_text(),
            "main.c": (RUNTIME / "main.c").read_text(),
        }
        convolution = (RUNTIME / f"convolve{NARROW}.h").read_text()
        for width in self.widths:
            files[f"convolve{width}.h"] = convolution.replace(str(NARROW), str(width))
        return {name: text.encode() for name, text in files.items()}

    def _header(self, metadata: Mapping[str, object]) -> str:
        channels, height, width = self.input_shape
        statistics = {}
        for key in ("mean", "std"):
            values = metadata.get(key, [float(key == "std")] * channels)
            plain = isinstance(values, (list, tuple)) and all(isinstance(value, (int, float)) for value in values)
            if not plain or len(values) != channels or (key == "std" and min(values) <= 0):
                above = " above 0" if key == "std" else ""
                raise ApotfxError(
                    f"C: the metadata have the {key} {values}, expected {channels} numbers{above}; pass the export of a run"
                )
            statistics[key] = ", ".join(_float(value) for value in values)
        return f"""#ifndef APOTFX_NETWORK_H
#define APOTFX_NETWORK_H

#include <stddef.h>
#include <stdint.h>

#define APOTFX_CHANNELS {channels}
#define APOTFX_HEIGHT {height}
#define APOTFX_WIDTH {width}
#define APOTFX_OUTPUTS {self.num_outputs}
#define APOTFX_MEAN {{{statistics["mean"]}}} /* per channel, of images / 255 */
#define APOTFX_STD {{{statistics["std"]}}}

/* From a normalized image [channels, height, width], of finite numbers, to the outputs. One call at a time: the buffers
   are static. */
void apotfx_infer(const float *input, float *output);

/* Unless NULL, called with every accumulator of every layer; `index` counts through [channels, height, width]. */
extern void (*apotfx_trace)(const char *layer, size_t index, int64_t accumulator);

#endif
"""

    def _source(self, metadata: Mapping[str, object]) -> str:
        calls, buffers = _allocate(self.calls, self.result)
        arch = re.sub(r"[^\w/.-]", "_", str(metadata.get("arch", "A network")), flags=re.ASCII)
        sizes = {name: max(sizes) for name, sizes in self.sizes.items()}
        sizes["TERMS"] = max([1, *(len(terms) for levels in self.weight_sets for terms in levels.shift_add_terms)])
        headers = ["operations.h", *(f"convolve{width}.h" for width in sorted(self.widths)), "levels.h", "weights.h"]
        lines = [
            *(f"#define MAX_{name} {size}" for name, size in sizes.items()),
            *(f'#include "{header}"' for header in headers),
            "\nvoid (*apotfx_trace)(const char *layer, size_t index, int64_t accumulator) = NULL;\n",
            *self.layers,
            *self.windows,
            *(f"static float buffer{i}[{size}];" for i, size in enumerate(buffers)),
            "\nvoid apotfx_infer(const float *input, float *output) {",
            *(f"    {call}" for call in calls),
            "}\n",
        ]
        return f"""/* {arch} on integers. To compile and run it (-DAPOTFX_MULTIPLY multiplies by weights where it would shift):

     cc -std=c99 -O2 network.c main.c -o network
     ./network t10k-images-idx3-ubyte t10k-labels-idx1-ubyte
     ./network t10k-images-idx3-ubyte --trace 0
*/
#include "network.h"

""" + "\n".join(lines)


def _allocate(calls: list[_Call], result: str) -> tuple[list[str], list[int]]:
    """(the calls in C, the sizes of the buffers): a buffer is used again once the last reader of its value is done."""
    last_reader = {value: i for i, call in enumerate(calls) for value in call.reads}
    places = {"input": "input"}
    buffers: list[int] = []
    free: set[int] = set()
    held: dict[str, int] = {}
    text = []
    for i, call in enumerate(calls):
        done = {value for value in call.reads if last_reader[value] == i and value in held}
        if call.in_place:
            free.update(held.pop(value) for value in done)
        if call.result == result:
            places[result] = "output"
        else:
            index = _pick(free, buffers, call.size)
            buffers[index] = max(buffers[index], call.size)
            held[call.result] = index
            places[call.result] = f"buffer{index}"
        if not call.in_place:
            free.update(held.pop(value) for value in done)
        text.append(call.text.format(*(places[value] for value in call.reads), y=places[call.result]))
    return text, buffers


def _pick(free: set[int], buffers: list[int], size: int) -> int:
    """Of the free buffers the smallest that is large enough, else the largest, else a new one; taken from `free`."""
    enough = [i for i in free if buffers[i] >= size]
    if enough:
        index = min(enough, key=lambda i: (buffers[i], i))
    elif free:
        index = max(free, key=lambda i: (buffers[i], i))
    else:
        buffers.append(size)
        return len(buffers) - 1
    free.remove(index)
    return index


def _window(shape_x: Iterable[int], shape_y: Iterable[int], *geometry: Iterable[int]) -> str:
    """A `Window`: the shapes [C, H, W], then kernel, stride, padding and dilation, [y, x] each."""
    return "{" + ", ".join("{" + ", ".join(map(str, part)) + "}" for part in (shape_x, shape_y, *geometry)) + "}"


def _encoder(layer: IntegerLayer, step: Step) -> str:
    levels = layer.encoding
    by = 2 * levels.max / layer.input_clip
    # Rounding is monotonic: clamping x before it is multiplied, as an absorbed ReLU6 does, is clamping the product.
    low, high = 2.0 * levels.min, 2.0 * levels.max
    if levels.rectifier is not None:
        low, high = (by.new_tensor(levels.rectifier) * by).clamp(low, high).tolist()
    numbers = ", ".join(_float(value, step) for value in (by.item(), low, high))
    return f"{{{_identifier(levels.set)}_nearest, {numbers}}}"


def _identifier(levels: LevelSet) -> str:
    return f"{levels.scheme}{levels.bits}{'s' if levels.signed else 'u'}"


def _describe(levels: LevelSet) -> str:
    return f"{levels.scheme}, {levels.bits} bits, {'signed' if levels.signed else 'unsigned'}"


def _shifts(levels: LevelSet) -> str:
    rows = []
    for n, terms in zip(levels.ints, levels.shift_add_terms):
        shifts, powers = ([f"{power}{e}" for e in reversed(terms)] for power in ("", "2^"))
        rows.append(f"    {{{n}, {len(terms)}, {{{', '.join(shifts) or 0}}}}}, /* {' + '.join(powers) or 0} */\n")
    return (
        f"/* {_describe(levels)}: value, number of shifts, shifts */\n"
        f"static const Level {_identifier(levels)}_levels[] = {{\n{''.join(rows)}}};\n"
    )


def _encoding_table(levels: LevelSet) -> str:
    nearest = levels.encoding_table[-2 * levels.max - 1 :]  # from 0 on
    return _array("int16_t", f"{_identifier(levels)}_nearest", map(str, nearest), ", ")


def _array(element: str, name: str, values: Iterable[str], separator: str) -> str:
    lines, width = [""], 116
    for value in values:
        if len(lines[-1]) + len(value) + len(separator) > width:
            lines.append("")
        lines[-1] += value + separator
    body = "\n".join(f"    {line.rstrip()}" for line in lines)
    return f"static const {element} {name}[] = {{\n{body}\n}};\n"


def _float(value: float, step: Step | None = None) -> str:
    """The float32 `value`, exactly."""
    value = float(np.float32(value))
    if not math.isfinite(value):
        where = "the metadata" if step is None else step.name
        raise ApotfxError(f"C: {where} has the constant {value}, expected a finite number; train the network again")
    return f"{value}f" if value.is_integer() and abs(value) < 2**16 else re.sub(r"\.?0*p", "p", value.hex()) + "f"
