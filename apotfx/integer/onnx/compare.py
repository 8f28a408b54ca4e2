"""An ONNX file in onnxruntime beside the network that it was made of."""

import os
from collections.abc import Iterable
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor, nn

from apotfx.errors import ApotfxError
from apotfx.integer.onnx.exact import byte_zero_point
from apotfx.integer.network import IntegerNetwork, as_program
from apotfx.integer.program import Encode, Product
from apotfx.integer.verify import NetworkComparison, NodeComparison


def compare_onnx(
    network: nn.Module, path: str | os.PathLike, batches: Iterable[Tensor], optimize: bool = True
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
    network = as_program(network)
    steps = [step for step in network.program.steps if isinstance(step, (Encode, Product))]
    names = (step.name if isinstance(step, Encode) else f"{step.name}.accumulators" for step in steps)
    shown = [name for name in names if name in computed]
    plain = _session(path, model, optimize)
    model.graph.output.extend(helper.make_empty_tensor_value_info(value) for value in shown)
    verbose = _session(path, model, optimize)
    comparison = NetworkComparison()
    first_image = 0
    for images in batches:
        feed = {plain.get_inputs()[0].name: images.numpy()}
        (logits,) = map(torch.from_numpy, plain.run(None, feed))
        values = dict(zip(shown, map(torch.from_numpy, verbose.run(shown, feed)))) if shown else {}
        expected = _recorded(network, images, values, comparison, first_image)
        comparison.logits.add(expected, logits, first_image)
        comparison.predictions.add(expected.argmax(-1), logits.argmax(-1), first_image)
        first_image += len(images)
    return comparison


@torch.no_grad()
def _recorded(
    network: IntegerNetwork, images: Tensor, values: dict[str, Tensor], comparison: NetworkComparison, first_image: int
) -> Tensor:
    """The result of the network, after comparing codes, before padding, and accumulators on the way."""
    results, codes = {}, {}
    for step, value in network.run((images,), {}):
        if step.name in network.program.results:
            results[step.name] = value
        if not isinstance(step, (Encode, Product)):
            continue
        layer = network.layer(step.layer)
        tallies = comparison.nodes.setdefault(step.layer, NodeComparison(step.layer))
        if isinstance(step, Encode):
            codes = {step.name: value}
            if (levels := values.get(step.name)) is not None:
                zero_point = byte_zero_point(layer) if levels.dtype == torch.uint8 else 0
                tallies.codes.add(value, levels.to(value.dtype) - zero_point, first_image)
        elif layer.is_integer and (sums := values.get(f"{step.name}.accumulators")) is not None:
            accumulators = layer.accumulate(codes[step.inputs[0]])
            tallies.accumulators.add(accumulators, sums.to(accumulators.dtype), first_image)
    return network.result(results)


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
