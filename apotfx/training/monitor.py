"""What a training run shows in TensorBoard: curves, plan, quantized graph, the state of every quantizer."""

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from tabulate import tabulate
from tensorboard.compat.proto.attr_value_pb2 import AttrValue
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.graph_pb2 import GraphDef
from tensorboard.compat.proto.node_def_pb2 import NodeDef
from tensorboard.compat.proto.tensor_shape_pb2 import TensorShapeProto
from tensorboard.compat.proto.versions_pb2 import VersionDef
from torch import Tensor, fx, nn
from torch.profiler import ProfilerActivity
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams as hparams_summaries

from ..calibrate import observed_inputs
from ..clips import sample
from ..functional import decode, encode
from ..layers import QuantLayer
from ..levels import LevelSet
from ..policy import Plan
from ..quantizers import Quantizer

HISTOGRAM_BINS = 64
PICTURE_WIDTH, ROW_HEIGHT = 768, 12  # in pixels: three columns for each of the 255 levels of 8 bits
SEPARATOR = 0.3  # brightness of the line above each row
FLUSH_SECONDS = 10
PRODUCER = 22  # of a GraphDef, as torch's own writer has it


def _if_enabled(method: Callable) -> Callable:
    @functools.wraps(method)
    def call(self: "Monitor", *args, **kwargs) -> None:
        if self.writer is not None:
            method(self, *args, **kwargs)

    return call


class Monitor:
    """Writes one run into one directory for TensorBoard; use it as a context manager, or `close()` it.

    Args:
        log_dir: the run's directory; it is created. Event files already there stay, and the run goes on.
        purge_step: hides what earlier event files of the directory hold from this step on (to resume a run).
        enabled: False, for all but one process of a distributed run, makes every call do nothing.
    """

    def __init__(self, log_dir: Path, *, purge_step: int | None = None, enabled: bool = True):
        self.writer = None
        if enabled:
            self.writer = SummaryWriter(str(log_dir), purge_step=purge_step, flush_secs=FLUSH_SECONDS)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    @_if_enabled
    def close(self) -> None:
        """Write what is pending and close the event file."""
        self.writer.close()

    @_if_enabled
    def scalars(self, step: int, values: dict[str, float]) -> None:
        """One point of each curve. Tags: the keys as they are, such as `train/loss` or `val/accuracy`."""
        for tag, value in values.items():
            self.writer.add_scalar(tag, value, step)

    @_if_enabled
    def plan(self, plan: Plan) -> None:
        """The plan as a table in the Text tab. Tag: `plan`."""
        rows = [[_escaped(cell) for cell in row] for row in plan.rows()]
        self.writer.add_text("plan", tabulate(rows, plan.HEADERS, tablefmt="github", disable_numparse=True))

    @_if_enabled
    def graph(self, graph_module: fx.GraphModule) -> None:
        """The graph in the Graphs tab, a node per fx node, nested by module path. It has no tag.

        A node's type is that of its module or the name of its function. A layer has the attribute
        `weight_shape` and, where Q = `weight` or `input` is quantized, `Q_bits`, `Q_scheme`, `Q_signed` and
        `Q_clip` (its mean over the channels).
        """
        graph_def = GraphDef(node=_graph_nodes(graph_module), versions=VersionDef(producer=PRODUCER))
        self.writer.file_writer.add_event(Event(graph_def=graph_def.SerializeToString()))

    @_if_enabled
    def layers(self, qmodel: nn.Module, images: Tensor, step: int) -> None:
        """How well every quantizer represents its values, in evaluation mode. Nothing in `qmodel` changes.

        Tags, for each layer L in order of execution, and Q = `weight` or `input` where that is quantized:
            clip/L/Q: the clip, its mean over the channels.
            clipped/L/Q: share of the values outside the clip, 0 to 1; for unsigned levels of those above it.
            sqnr_db/L/Q: `10 log10(sum x^2 / sum (x - q(x))^2)` in the unit of the clip. Not written where it
                is not finite: every value is a level (so for all zeros), or a value is not finite.
            weight/L/float, weight/L/quantized: histograms of the weight that the layer computes with, before
                and after quantization (with normalization "standardize", of the standardized weight).
            level_usage/Q: a picture. A row per layer, a column per level, ascending, stretched to the same
                width for all layers. Brightness is the square root of the share of values at a level,
                relative to the row's most frequent level: a level that no value takes is black.

        A tensor of more than 2^16 elements is represented by at most 2^16 of them, evenly spread.

        Args:
            qmodel: what `quantize` returned, not wrapped or compiled.
            images: float batch [N, C, H, W] on the model's device; runs through the model once.
            step: the step that the values belong to.
        """
        scalars, histograms, usages = {}, {}, {"weight": [], "input": []}
        inputs = _observe_inputs(qmodel, images)
        layers = {name: qmodel.get_submodule(name) for name in inputs}
        for name, x in inputs.items():
            layer, measured = layers[name], {}
            if layer.weight_quantizer is not None:
                measured["weight"] = _measure_weight(layer, layer.weight)
                histograms[f"weight/{name}/float"] = _histogram(measured["weight"].values)
                histograms[f"weight/{name}/quantized"] = _histogram(measured["weight"].quantized)
            if layer.input_quantizer is not None:
                measured["input"] = _measure(layer.input_quantizer, x, layer.input_quantizer.used_clip)
            for kind, (clip, clipped, sqnr_db, _, _, usage) in measured.items():
                usages[kind].append(usage)
                scalars[f"clip/{name}/{kind}"], scalars[f"clipped/{name}/{kind}"] = clip, clipped
                scalars[f"sqnr_db/{name}/{kind}"] = sqnr_db
        # Written last, as a GPU is waited for when its results are read.
        values = dict(zip(scalars, torch.stack(list(scalars.values())).tolist())) if scalars else {}
        self.scalars(step, {tag: v for tag, v in values.items() if math.isfinite(v) or not tag.startswith("sqnr_db")})
        for tag, histogram in zip(histograms, torch.stack(list(histograms.values())).tolist() if histograms else []):
            self._write_histogram(tag, histogram, step)
        for kind, rows in usages.items():
            if rows:
                picture = _usage_picture(torch.cat(rows).cpu().split(list(map(len, rows))))
                self.writer.add_image(f"level_usage/{kind}", picture, step, dataformats="HW")

    def _write_histogram(self, tag: str, histogram: list[float], step: int) -> None:
        """`histogram`: as `_histogram` gives it."""
        count, low, high, total, squares, *counts = histogram
        if not count:
            return
        half = 0 if low < high else 0.5
        limits = torch.linspace(low - half, high + half, HISTOGRAM_BINS + 1, dtype=torch.float64)
        self.writer.add_histogram_raw(
            tag, min=low, max=high, num=count, sum=total, sum_squares=squares, bucket_limits=limits.tolist(),
            bucket_counts=[0, *counts], global_step=step,
        )  # fmt: skip

    @_if_enabled
    def hparams(self, config: dict, metrics: dict[str, float]) -> None:
        """The run's row in the HParams tab; once, at its end.

        Tags: the keys of `metrics`, each a scalar at step 0; take others than those of the curves, such as
        `hparam/accuracy`. A value of `config` that is no bool, str or finite number is written as its str,
        None as "none".
        """
        # Not add_hparams, which opens a second event file: TensorBoard may then stop reading the first one.
        for summary in hparams_summaries({key: _hparam(value) for key, value in config.items()}, metrics):
            self.writer.file_writer.add_summary(summary)
        self.scalars(0, metrics)


def profiler(log_dir: Path, *, steps: int = 5) -> torch.profiler.profile:
    """A context that profiles `steps` training steps, for the PyTorch Profiler plugin of TensorBoard.

    It skips one step and warms up for another. Call its `.step()` after every step. After `steps + 2` of them
    it writes `<log_dir>/<host>_<pid>.<time>.pt.trace.json`; with 3 to `steps + 1`, when the context ends.
    """
    gpu = [ProfilerActivity.CUDA] if torch.cuda.is_available() else []
    return torch.profiler.profile(
        activities=[ProfilerActivity.CPU, *gpu],
        schedule=torch.profiler.schedule(wait=1, warmup=1, active=steps, repeat=1),
        on_trace_ready=torch.profiler.tensorboard_trace_handler(str(log_dir)),
        record_shapes=True,
    )


def _escaped(cell: str) -> str:
    return re.sub(r"([\\`*_|\[\]])", r"\\\1", cell)


def _hparam(value: object) -> int | float | str:
    """The value as the HParams tab shows it; it leaves out None and what is not finite, unless as text."""
    if value is None:
        return "none"
    is_number = isinstance(value, (int, float)) and math.isfinite(value)
    return value if is_number else str(value)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def _observe_inputs(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """A sample of the input of every quantized layer, by the layer's name, in order of execution."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    with observed_inputs(layers) as samples, _evaluating(model):
        model(images)
    return {name: torch.cat(parts) for name, parts in samples.items()}


class _Measured(NamedTuple):
    """What one quantizer does to n values; all on their device."""

    clip: Tensor  # float64 [], as the next two
    clipped: Tensor
    sqnr_db: Tensor  # infinite or NaN where there is no error or no signal
    values: Tensor  # float64 [n], as `quantized`
    quantized: Tensor
    usage: Tensor  # float64 [levels], the share of values at each level, ascending


@torch.no_grad()
def _measure_weight(layer: QuantLayer, weight: Tensor) -> _Measured:
    operand = layer.weight_operand(weight)
    values, clip = operand.values, operand.used_clip
    return _measure(layer.weight_quantizer, sample(values), sample(clip.expand_as(values)))


@torch.no_grad()
def _measure(quantizer: Quantizer, x: Tensor, clip: Tensor) -> _Measured:
    """x: float [n]; clip: [] or [n]."""
    x = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    n = encode(x, clip, quantizer.encoding)
    quantized = decode(n, clip, quantizer.encoding)
    clipped = (x.abs() if quantizer.levels.signed else x) > clip
    x, n, quantized = (tensor.double() for tensor in (x, n, quantized))
    ratio = x.square().sum() / (x - quantized).square().sum()
    return _Measured(
        clip=quantizer.used_clip.double().mean(),
        clipped=clipped.double().mean(),
        sqnr_db=10 * ratio.log10(),
        values=x,
        quantized=quantized,
        usage=_usage(n, quantizer.levels),
    )


def _usage(n: Tensor, levels: LevelSet) -> Tensor:
    """The share of n (integer-valued, [n]) at each level, ascending; NaN is at none."""
    negative = [-i for i in reversed(levels.ints[1:])] if levels.signed else []
    axis = torch.tensor([*negative, *levels.ints], dtype=n.dtype, device=n.device)
    return _count(torch.searchsorted(axis, n), len(axis) + 1)[:-1] / n.numel()


def _count(index: Tensor, size: int) -> Tensor:
    """How often each of 0 to size - 1 is in index; float64 [size]. A GPU is not waited for, as by torch.bincount."""
    counts = torch.zeros(size, dtype=torch.float64, device=index.device)
    return counts.index_add_(0, index, counts.new_ones(()).expand(len(index)))


def _histogram(x: Tensor) -> Tensor:
    """Of the finite ones among x, float64 [n]: their number, minimum, maximum, sum, sum of squares, and the counts.

    The bins are as wide as each other, from minimum to maximum. What the writer computes by itself it computes on the
    CPU, and there several times as long.
    """
    finite = x.isfinite()
    low, high = (torch.where(finite, x, end) for end in (math.inf, -math.inf))
    low, high, x = low.amin(), high.amax(), torch.where(finite, x, 0.0)
    position = torch.where(high > low, (x - low) / (high - low), 0.5) * HISTOGRAM_BINS
    index = position.nan_to_num(0.0).clamp(0, HISTOGRAM_BINS - 1).long()
    counts = _count(torch.where(finite, index, HISTOGRAM_BINS), HISTOGRAM_BINS + 1)[:-1]
    return torch.cat([torch.stack([finite.sum().double(), low, high, x.sum(), x.square().sum()]), counts])


def _usage_picture(rows: Sequence[Tensor]) -> Tensor:
    """A gray picture [ROW_HEIGHT * len(rows), PICTURE_WIDTH] in [0, 1]; see `Monitor.layers`."""
    columns = torch.arange(PICTURE_WIDTH)
    bright = [(row / row.max().clamp_min(1e-12)).sqrt()[columns * len(row) // PICTURE_WIDTH] for row in rows]
    picture = torch.stack(bright).repeat_interleave(ROW_HEIGHT, 0)
    picture[::ROW_HEIGHT] = SEPARATOR
    return picture


def _graph_nodes(graph_module: fx.GraphModule) -> list[NodeDef]:
    modules = dict(graph_module.named_modules())
    names: dict[fx.Node, str] = {}
    for node in graph_module.graph.nodes:
        names[node] = _unique("/".join(_path(node)), set(names.values()))
    return [
        NodeDef(
            name=name,
            op=_type_name(node, modules),
            input=[names[source] for source in node.all_input_nodes],
            attr=_attributes(modules[node.target]) if node.op == "call_module" else {},
        )
        for node, name in names.items()
    ]


def _path(node: fx.Node) -> list[str]:
    """The module path of a node; that of a function or method is the module that calls it, then its name."""
    if node.op in ("call_module", "get_attr"):
        return node.target.split(".")
    if node.op in ("placeholder", "output"):
        return [node.name]
    callers = [path for path, _ in node.meta.get("nn_module_stack", {}).values() if path]
    return [*(callers[-1].split(".") if callers else []), _function_name(node)]


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{i}" for i in itertools.count(1))
    return next(candidate for candidate in itertools.chain([name], numbered) if candidate not in taken)


def _type_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    if node.op == "call_module":
        return type(modules[node.target]).__name__
    return _function_name(node) if node.op in ("call_function", "call_method") else node.op


def _function_name(node: fx.Node) -> str:
    return node.target if node.op == "call_method" else getattr(node.target, "__name__", str(node.target))


def _attributes(module: nn.Module) -> dict[str, AttrValue]:
    attributes = {}
    if isinstance(weight := getattr(module, "weight", None), Tensor):
        dims = [TensorShapeProto.Dim(size=size) for size in weight.shape]
        attributes["weight_shape"] = AttrValue(shape=TensorShapeProto(dim=dims))
    if isinstance(module, QuantLayer):
        for kind, quantizer in (("weight", module.weight_quantizer), ("input", module.input_quantizer)):
            if quantizer is not None:
                attributes |= _quantizer_attributes(kind, quantizer)
    return attributes


def _quantizer_attributes(kind: str, quantizer: Quantizer) -> dict[str, AttrValue]:
    levels = quantizer.levels
    return {
        f"{kind}_bits": AttrValue(i=levels.bits),
        f"{kind}_scheme": AttrValue(s=levels.scheme.encode()),
        f"{kind}_signed": AttrValue(b=levels.signed),
        f"{kind}_clip": AttrValue(f=quantizer.used_clip.mean().item()),
    }
