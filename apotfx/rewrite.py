"""Trace and swap: the only file that edits graphs."""

import copy
import warnings
from collections import Counter

import torch
from torch import fx, nn

from . import reproducible
from .analysis import analyze, has_hooks, is_read_once, rectified_range, torch_name
from .engine import use_engine
from .errors import ApotfxError
from .layers import QUANT_LAYERS, QuantLayer
from .operators import accumulator_bits, accumulator_bound
from .policy import BitPolicy, Plan, PlannedLayer, resolve
from .quantizers import InputQuantizer, WeightQuantizer


class ByMode(nn.Module):
    """A constant of the traced code that depends on the mode, such as `training=self.training`."""

    def __init__(self, in_training: object, in_evaluation: object):
        super().__init__()
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self) -> object:
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        return f"{self.in_training} in training, {self.in_evaluation} in evaluation"


def trace(model: nn.Module) -> fx.GraphModule:
    """`model` as a graph; shares its parameters and leaf modules. A GraphModule is returned as it is.

    Tracing runs the model's forward, which may leave marks on it: pass a copy. Arguments of calls that depend on
    the mode, such as `F.dropout(x, training=self.training)`, follow `train()` and `eval()` of the graph too.

    Raises:
        ApotfxError: not a module that can be traced; says what to pass instead.
    """
    _require_traceable(model)
    if isinstance(model, fx.GraphModule):
        return model
    try:
        graph_module = fx.symbolic_trace(model)
    except Exception as error:  # tracing runs the model's own code, which may raise anything
        reason = " ".join(str(error).split())
        raise ApotfxError(
            f"model {type(model).__name__}: torch.fx cannot trace it ({type(error).__name__}: {reason}); make its "
            "forward free of control flow on tensor values"
        ) from error
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in graph_module.named_modules():
        module.training = modes.get(name, module.training)  # torch.fx makes containers anew
    _follow_mode(graph_module, model, _nodes_in_other_mode(model))
    return graph_module


def _require_traceable(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise ApotfxError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, nn.parallel.DistributedDataParallel):
        raise ApotfxError("model: is wrapped in DistributedDataParallel; quantize model.module, then wrap the result")
    if hasattr(model, "_orig_mod"):
        raise ApotfxError("model: was compiled; quantize model._orig_mod, then torch.compile the result")


def _nodes_in_other_mode(model: nn.Module) -> list[fx.Node]:
    """The graph of `model` where every module that trains evaluates, and the other way round; [] if there is none."""

    def toggle() -> None:
        for module in model.modules():
            module.training = not module.training

    toggle()
    try:
        return list(fx.symbolic_trace(model).graph.nodes)
    except Exception:  # the model's own code may raise anything; `_follow_mode` then warns that the paths differ
        return []
    finally:
        toggle()


def _follow_mode(graph_module: fx.GraphModule, model: nn.Module, others: list[fx.Node]) -> None:
    """Make numbers and flags that differ from those in `others`, the nodes in the other mode, depend on the mode.

    Each becomes a `ByMode` that both `graph_module` and `model` hold.
    """
    nodes = list(graph_module.graph.nodes)
    # Constants, which are read as get_attr, get another name in every trace.
    path, other_path = ([(n.op, n.target if n.op != "get_attr" else "") for n in graph] for graph in (nodes, others))
    if path != other_path:
        warnings.warn(
            f"model {graph_module._get_name()}: its forward takes another path in training than in evaluation; the "
            f"graph keeps the path of {'training' if graph_module.training else 'evaluation'}",
            stacklevel=4,
        )
        return
    differing = [
        (node, update, key, here, there)
        for node, twin in zip(nodes, others, strict=True)
        for update, mine, theirs in (
            (node.update_arg, enumerate(node.args), twin.args),
            (node.update_kwarg, node.kwargs.items(), twin.kwargs),
        )
        for key, here in mine
        if isinstance(here, (bool, int, float)) and here != (there := theirs[key])
    ]
    for i, (node, update, key, here, there) in enumerate(differing):
        by_mode = ByMode(here, there) if graph_module.training else ByMode(there, here)
        for root in (graph_module, model):
            root.add_module(f"by_mode_{i}", by_mode.train(graph_module.training))
        with graph_module.graph.inserting_before(node):
            update(key, graph_module.graph.call_module(f"by_mode_{i}"))
    graph_module.recompile()


def plan(model: nn.Module, policy: BitPolicy) -> Plan:
    """What `quantize(model, policy)` would do, layer by layer; the model is untouched. Raises as `quantize`."""
    return _traced_and_planned(model, policy)[1]


def _traced_and_planned(model: nn.Module, policy: BitPolicy) -> tuple[fx.GraphModule, Plan]:
    if not isinstance(policy, BitPolicy):
        raise ApotfxError(
            f"policy: expected a BitPolicy, got {type(policy).__name__}; use BitPolicy.from_yaml or from_dict"
        )
    _require_traceable(model)
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ApotfxError("model: is already quantized; start from the float model")
    copied = copy.deepcopy(model)
    graph_module = trace(copied)
    layers = analyze(copied, graph_module.graph)
    if type(model) in QUANT_LAYERS:
        raise ApotfxError(f"model: is a single {type(model).__name__}; wrap it in torch.nn.Sequential")
    if not any(layer.obstacle is None for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.obstacle}" for layer in layers)
        raise ApotfxError(
            f"model {type(model).__name__}: has no layer that can be quantized ({reasons or 'no conv or linear layer'})"
        )
    resolved = resolve(policy, layers)
    for planned in resolved.layers:
        if planned.quantized and planned.rule.max_accumulator_bits is not None:
            _require_accumulator(planned, graph_module.get_submodule(planned.facts.name).weight.shape)
    return graph_module, resolved


def _require_accumulator(planned: PlannedLayer, weight_shape: torch.Size) -> None:
    """Raises: ApotfxError: the layer's accumulators need more bits than its rule allows."""
    bound = accumulator_bound(weight_shape, planned.weight.max, planned.input.max)
    needed, allowed = accumulator_bits(-bound, bound), planned.rule.max_accumulator_bits
    if needed > allowed:
        raise ApotfxError(
            f"layer {planned.facts.name} ({planned.rule}): sums of {weight_shape[1:].numel()} products of "
            f"{planned.weight.bits}-bit weights and {planned.input.bits}-bit inputs ({planned.rule.scheme}) can need "
            f"{needed} bits, max_accumulator_bits allows {allowed}; use fewer weight_bits or activation_bits, another "
            "scheme, or allow more"
        )


def quantize(model: nn.Module, policy: BitPolicy) -> fx.GraphModule:
    """A copy of `model` whose conv and linear layers are quantized as `policy` says.

    Everything else that forward calls keeps its values, mode, device, dtype and state-dict name; a quantized layer keeps
    its parameters and gains `<layer>.weight_quantizer.clip` and `<layer>.input_quantizer.clip`. The clips come from
    `calibrate`, or else from the first training batch; until then they are the paper's constants. All of them learn but
    those of the first layers' inputs, which `requires_grad_` can let learn too.

    An activation function whose results only layers with unsigned input levels read is left to them, batch norms and
    average pools evaluate reproducibly (see `reproducible`), and the layers run on the fastest engine there is
    (`use_engine`).

    Args:
        model: a float module that torch.fx can trace, or a GraphModule.
        policy: see `BitPolicy`.

    Returns:
        A GraphModule; its `meta["plan"]` is the resolved `Plan`.

    Raises:
        ApotfxError: the model cannot be traced, is quantized already or has nothing to quantize; the policy has a rule
            that matches nothing, asks for levels that do not exist, or caps accumulators below what a layer needs.
    """
    graph_module, resolved = _traced_and_planned(model, policy)
    layers = {
        planned.facts.name: _quantized_layer(graph_module.get_submodule(planned.facts.name), planned)
        for planned in resolved.layers
        if planned.quantized
    }
    unsigned = {p.facts.name for p in resolved.layers if p.input is not None and not p.input.signed}
    for name, rectifier in absorb_rectifiers(graph_module, unsigned).items():
        layers[name].rectifier = rectifier
    if layers:
        make_reproducible(graph_module)
    swap_layers(graph_module, layers)
    use_engine(graph_module)
    graph_module.meta["plan"] = resolved
    return graph_module


def absorb_rectifiers(graph_module: fx.GraphModule, unsigned: set[str]) -> dict[str, tuple[float, float]]:
    """Take out of the graph each activation function that is left to the layers behind it, which clip at 0 anyway.

    That is a ReLU, or a ReLU6 or Hardtanh from 0 on, all of whose consumers are layers of `unsigned`. The results stay
    the same, and a training step saves a pass over memory forwards and one backwards.

    Args:
        graph_module: changed in place.
        unsigned: names of the layers whose input levels are unsigned.

    Returns:
        Per layer that takes over, the range (low, high) that it must clamp its input to.
    """
    modules = dict(graph_module.named_modules())
    calls = Counter(node.target for node in graph_module.graph.nodes if node.op == "call_module")
    unsuited = {name for name in unsigned if has_hooks(modules[name]) or calls[name] != 1}
    absorbed = {}
    for node in list(graph_module.graph.nodes):
        rectifier = rectified_range(node, modules)
        if rectifier is None or not node.users:
            continue
        takers = [user.target for user in node.users if user.op == "call_module" and user.all_input_nodes == [node]]
        (source,) = node.all_input_nodes
        if len(takers) == len(node.users) and unsigned - unsuited >= set(takers) and is_read_once(source, modules):
            node.replace_all_uses_with(source)
            graph_module.graph.erase_node(node)
            absorbed |= dict.fromkeys(takers, rectifier)
    return absorbed


def make_reproducible(graph_module: fx.GraphModule) -> None:
    """Replace, in place, batch norms and average pools of torch by those of `reproducible`.

    Modules keep their names and state.
    """
    for module in graph_module.modules():
        module.__class__ = reproducible.REPRODUCIBLE.get(type(module), type(module))
    for node in list(graph_module.graph.nodes):
        averages = torch_name(node) in reproducible.AVERAGE_FUNCTIONS and "dtype" not in node.kwargs
        if averages and isinstance((*node.args, node.kwargs.get("input"))[0], fx.Node):
            name = f"{node.name}_average"
            function = torch.mean if node.op == "call_method" else node.target
            graph_module.add_submodule(name, reproducible.Average(function).train(graph_module.training))
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(graph_module.graph.call_module(name, node.args, node.kwargs))
            graph_module.graph.erase_node(node)


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
        # To learn it would take a backward pass to the network's own input, which costs as much as several layers.
        input_quantizer.clip.requires_grad_(not planned.facts.is_first)
    return QUANT_LAYERS[type(layer)].from_float(layer, weight_quantizer, input_quantizer, planned.rule.clip_grad_factor)
