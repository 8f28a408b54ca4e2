"""An ONNX file in onnxruntime beside the network that it was made of."""

import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, fx

from apotfx.errors import ApotfxError
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.onnx.exact import byte_zero_point
from apotfx.integer.operations import operations
from apotfx.integer.verify import NetworkComparison, NodeComparison


def compare_onnx(
    network: fx.GraphModule, path: str | os.PathLike, batches: Iterable[Tensor], optimize: bool = True
) -> NetworkComparison:
    """Run images through the network and, in onnxruntime, through its ONNX file.

    Logits and predictions are those of the file as it is; codes and accumulators come from a second run, which
    shows them.

    Args:
        network: what the file was made of.
        batches: images, float32 on the CPU.
        optimize: whether onnxruntime may rearrange the graph, as it does by default.

    Raises:
        ApotfxError: onnxruntime is missing, or cannot run the file.
    """
    path = Path(path)
    model = onnx.load_model_from_string(path.read_bytes())
    computed = {value for node in model.graph.node for value in node.output}
    layers = [o.node.name for o in operations(network) if o.kind == "layer" and o.module.input_levels is not None]
    shown = [value for name in layers for value in (f"{name}.levels", f"{name}.accumulators") if value in computed]
    plain = _session(path, model, optimize)
    model.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in shown)
    verbose = _session(path, model, optimize)
    comparison = NetworkComparison()
    first_image = 0
    for images in batches:
        feed = {plain.get_inputs()[0].name: images.numpy()}
        (logits,) = map(torch.from_numpy, plain.run(None, feed))
        values = dict(zip(shown, map(torch.from_numpy, verbose.run(shown, feed)))) if shown else {}
        recorder = _Recorder(network)
        expected = recorder.run(images)
        _compare_layers(comparison, recorder, values, first_image)
        comparison.logits.add(expected, logits, first_image)
        comparison.predictions.add(expected.argmax(-1), logits.argmax(-1), first_image)
        first_image += len(images)
    return comparison


class _Recorder(fx.Interpreter):
    """Runs a network and keeps the codes, before padding, and accumulators of every layer with a quantized input."""

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


def _compare_layers(
    comparison: NetworkComparison, recorder: _Recorder, values: dict[str, Tensor], first_image: int
) -> None:
    for node, (codes, accumulators) in recorder.layers.items():
        layer = recorder.module.get_submodule(node.target)
        tallies = comparison.nodes.setdefault(node.name, NodeComparison(node.target))
        levels, sums = values.get(f"{node.name}.levels"), values.get(f"{node.name}.accumulators")
        if levels is not None:
            zero_point = byte_zero_point(layer) if levels.dtype == torch.uint8 else 0
            tallies.codes.add(codes, levels.to(codes.dtype) - zero_point, first_image)
        if sums is not None and layer.is_integer:
            tallies.accumulators.add(accumulators, sums.to(accumulators.dtype), first_image)


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
