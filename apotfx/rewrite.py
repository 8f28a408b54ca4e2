"""Trace and swap: the only file that edits graphs."""

import copy

import torch
from torch import fx, nn

from .analysis import analyze
from .errors import ApotfxError
from .layers import QUANT_LAYERS, QuantLayer
from .policy import BitPolicy, Plan, PlannedLayer, resolve
from .quantizers import InputQuantizer, WeightQuantizer


def trace(model: nn.Module) -> fx.GraphModule:
    """`model` as a graph; shares its parameters and leaf modules. A GraphModule is returned as it is.

    Raises:
        ApotfxError: not a module that can be traced; says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ApotfxError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ApotfxError("model: is wrapped in DistributedDataParallel; quantize model.module, then wrap the result")
    if hasattr(model, "_orig_mod"):
        raise ApotfxError("model: was compiled; quantize model._orig_mod, then torch.compile the result")
    if isinstance(model, fx.GraphModule):
        return model
    try:
        return fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = " ".join(str(error).split())
        raise ApotfxError(
            f"model {type(model).__name__}: torch.fx cannot trace it ({type(error).__name__}: {reason}); make its "
            "forward free of control flow on tensor values"
        ) from error


def plan(model: nn.Module, policy: BitPolicy) -> Plan:
    """What `quantize(model, policy)` would do, layer by layer; the model is untouched. Raises as `quantize`."""
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ApotfxError("model: is already quantized; start from the float model")
    layers = analyze(model, trace(model).graph)
    if not any(layer.obstacle is None for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.obstacle}" for layer in layers)
        raise ApotfxError(f"model {type(model).__name__}: has no layer that can be quantized ({reasons or 'no conv or linear layer'})")
    return resolve(policy, layers)


def quantize(model: nn.Module, policy: BitPolicy) -> fx.GraphModule:
    """A copy of `model` whose conv and linear layers are quantized as `policy` says.

    Everything else keeps its values, mode, device, dtype and state-dict name; a quantized layer keeps its parameters
    and gains `<layer>.weight_quantizer.clip` and `<layer>.input_quantizer.clip`. The clips come from `calibrate`, or
    else from the first training batch; until then they are the paper's constants.

    Args:
        model: a float module that torch.fx can trace, or a GraphModule.
        policy: see `BitPolicy`.

    Returns:
        A GraphModule; its `meta["plan"]` is the resolved `Plan`.

    Raises:
        ApotfxError: the model cannot be traced, is quantized already or has nothing to quantize; the policy has a rule
            that matches nothing, or asks for levels that do not exist.
    """
    if not isinstance(model, nn.Module):
        trace(model)
    resolved = plan(model, policy)
    graph_module = trace(copy.deepcopy(model))
    layers = {
        planned.facts.name: _quantized_layer(graph_module.get_submodule(planned.facts.name), planned)
        for planned in resolved.layers
        if planned.quantized
    }
    swap_layers(graph_module, layers)
    graph_module.meta["plan"] = resolved
    return graph_module


def swap_layers(graph_module: fx.GraphModule, layers: dict[str, nn.Module]) -> None:
    """Put each of `layers` in the place of the submodule of its name, in place."""
    for name, layer in layers.items():
        graph_module.set_submodule(name, layer)
    graph_module.graph.lint()
    graph_module.recompile()
    called = {node.target for node in graph_module.graph.nodes if node.op == "call_module"}
    assert called >= layers.keys(), f"swapped but never called: {layers.keys() - called}"


def _quantized_layer(layer: nn.Module, planned: PlannedLayer) -> QuantLayer:
    weight_quantizer = input_quantizer = None
    if planned.weight is not None:
        per_channel = planned.rule.granularity == "channel"
        weight_quantizer = WeightQuantizer(
            planned.weight, layer.weight, per_channel=per_channel, normalization=planned.rule.normalization
        )
    if planned.input is not None:
        input_quantizer = InputQuantizer(planned.input)
    return QUANT_LAYERS[type(layer)].from_float(layer, weight_quantizer, input_quantizer, planned.rule.clip_grad_factor)
