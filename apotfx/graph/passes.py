"""Trace, plan and swap."""

import copy
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx, nn

from apotfx import reproducible
from apotfx.graph.facts import LayerFacts, analyze, rectified_range, torch_name
from apotfx.attention import MultiheadAttention, split_attention
from apotfx.engine import use_engine
from apotfx.errors import ApotfxError
from apotfx.generated_code import forgetting
from apotfx.layers import QUANT_LAYERS, FunctionalLayer, Geometry, QuantLayer, float_type_of
from apotfx.graph.functional import written_after
from apotfx.graph.modularize import layers_as_modules
from apotfx.graph.network import Network, graph_of, record_of, require_traceable, trace
from apotfx.graph.selfcheck import difference
from apotfx.graph.tracing import TWO_PATHS, bind
from apotfx.modules import become, disguise, has_hooks, look_at_as_float, replace_modules
from apotfx.operators import accumulator_bits, accumulator_bound
from apotfx.policy import BitPolicy, Plan, PlannedLayer, resolve
from apotfx.state import synchronize_clips
from apotfx.quantizers import InputQuantizer, WeightQuantizer


def plan(
    model: nn.Module,
    policy: BitPolicy,
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
) -> Plan:
    """What `quantize(model, policy)` would do, layer by layer; the model is untouched and may be on the meta device.

    Raises as `quantize`.
    """
    settings = {"concrete_args": concrete_args, "example_inputs": example_inputs}
    return _planned(model, policy, self_check=False, **settings)[1]


class Prepared:
    """A copy of a float model, traced, with a module for every layer that can be quantized.

    Attributes:
        model: what `trace` returned, a Network or, if it could not be traced, the copy.
        copied: the copy itself, which also has what forward never calls.
        unchecked: whether the traced network has yet to be compared with the float one.
    """

    def __init__(
        self,
        model: nn.Module,
        concrete_args: dict[str, object] | None = None,
        example_inputs: object | None = None,
        self_check: bool = True,
    ):
        require_traceable(model)
        kept: dict[str, str] = {}
        self.self_check = self.unchecked = self_check
        while True:
            with forgetting():  # of what is a graph already
                self.copied = copy.deepcopy(model)
            self._attention = split_attention(self.copied)
            self.model = trace(self.copied, concrete_args=concrete_args, example_inputs=example_inputs, kept=kept)
            again = {}
            if isinstance(self.model, Network):
                if self.unchecked and example_inputs is not None:
                    again = self._differing(model, *bind(example_inputs), kept)
                if not again:
                    again = self._make_layers()
            if not again:
                break
            kept |= again
            self.unchecked = self_check

    def _differing(self, model: nn.Module, args: tuple, kwargs: dict, kept: Mapping[str, str]) -> dict[str, str]:
        """By name, a module that must be kept whole as traced it computes something else, and why."""
        try:
            with forgetting():
                untouched = copy.deepcopy(model) if self._attention else None
            found = difference(self.model, args, kwargs, untouched)
        except ApotfxError:  # the examples, which stand for shapes only, are no inputs
            return {}
        self.unchecked = False
        if found is None:
            return {}
        path, how = found
        while path in kept:  # no module that is called
            path = path.rpartition(".")[0]
        return {path: f"traced, it would compute something else ({how})"}

    def _make_layers(self) -> dict[str, str]:
        """Make functional layers modules. By name, the modules that must be kept whole for that, and why.

        The model's own forward, which runs where training takes another path, would not call them.
        """
        layers_as_modules(self.model)
        made = any(isinstance(module, FunctionalLayer) for module in self.model.modules())
        return dict.fromkeys(self.model.two_paths, TWO_PATHS) if made else {}

    def weight(self, name: str) -> Tensor:
        """The weight of a layer as its operator takes it, [C_out, ...]."""
        layer = self.model.get_submodule(name)
        return Geometry.of(layer).operator.from_parameter(layer.weight)

    @property
    def leaves(self) -> dict[str, str]:
        """What could not be traced, and why."""
        return record_of(self.model)["leaves"]

    def keep_attention(self, quantized: Collection[str]) -> None:
        """Take torch's own attention back where none of the layers `quantized` is inside."""
        names = {module: name for name, module in self.model.named_modules()}
        unused = {
            new: attention
            for new, attention in self._attention.items()
            if not any(layer.startswith(f"{names.get(new)}.") for layer in quantized)
        }
        replace_modules(self.model, unused)

    def finish(self, layers: Mapping[str, nn.Module], unsigned: Collection[str]) -> dict[str, tuple[float, float]]:
        """Let `layers` take the places of float ones, and everything between them round alike everywhere.

        Args:
            unsigned: names of the layers whose input levels are unsigned.

        Returns:
            Per layer that takes over the activation function before it, its range; see `absorb_rectifiers`.
        """
        self.keep_attention(layers.keys())
        rectifiers = absorb_rectifiers(self.model, set(unsigned))
        if layers:
            make_reproducible(self.model)
        for name, layer in layers.items():
            layer.rectifier = rectifiers.get(name)
        swap_layers(self.model, layers)
        # The code around layers inside modules kept whole may tell them from float ones.
        self.unchecked |= look_at_layers_as_float(self.model, layers) and self.self_check
        if isinstance(self.model, Network):
            self.model.watch()
        return rectifiers


def _planned(model: nn.Module, policy: BitPolicy, **settings) -> tuple[Prepared, Plan]:
    if not isinstance(policy, BitPolicy):
        raise ApotfxError(
            f"policy: expected a BitPolicy, got {type(policy).__name__}; use BitPolicy.from_yaml or from_dict"
        )
    _require_float(model)
    prepared = Prepared(model, **settings)
    layers = analyze(prepared.model, graph_of(prepared.model), prepared.leaves)
    if graph := record_of(prepared.model).pop("in_training", None):
        layers = _in_both_paths(layers, analyze(prepared.model, graph, prepared.leaves))
    layers = _alike_where_shared(layers, prepared.model)
    if not any(layer.obstacle is None for layer in layers):
        reasons = "; ".join(f"{layer.name}: {layer.obstacle}" for layer in layers)
        raise ApotfxError(
            f"model {type(model).__name__}: has no layer that can be quantized ({reasons or 'no conv or linear layer'})"
        )
    resolved = resolve(policy, layers)
    for planned in resolved.layers:
        if planned.quantized and planned.rule.max_accumulator_bits is not None:
            _require_accumulator(planned, prepared.weight(planned.facts.name).shape)
    return prepared, resolved


def _alike_where_shared(layers: list[LayerFacts], model: nn.Module) -> list[LayerFacts]:
    """Layers that share their weight stand where any of them does, so that rules by position give all the same."""
    modules, groups = dict(model.named_modules()), defaultdict(list)
    for facts in layers:
        if facts.obstacle is None:
            weight = modules[facts.name].weight
            groups[weight if isinstance(weight, nn.Parameter) else facts.name].append(facts)
    merged = {}
    for group in (group for group in groups.values() if len(group) > 1):
        names = ", ".join(facts.name for facts in group)
        first, last, normed = (
            any(facts.is_first for facts in group), any(facts.is_last for facts in group),
            all(facts.feeds_batch_norm for facts in group),
        )  # fmt: skip
        for facts in group:
            reason = f"{facts.position_reason}; the weight is that of {names}"
            merged[facts.name] = replace(
                facts, is_first=first, is_last=last, feeds_batch_norm=normed, position_reason=reason
            )
    return [merged.get(facts.name, facts) for facts in layers]


def _in_both_paths(layers: list[LayerFacts], in_training: list[LayerFacts]) -> list[LayerFacts]:
    """What holds of layers in evaluation and in training, which takes other paths."""
    others, merged = {facts.name: facts for facts in in_training}, []
    for facts in layers:
        other = others[facts.name]
        if facts.obstacle is None and other.obstacle is None:
            low, high = zip(facts.input_range, other.input_range)
            newly = other.signed_input and not facts.signed_input
            facts = replace(
                facts,
                signed_input=facts.signed_input or other.signed_input,
                sign_reason=f"{other.sign_reason} in training" if newly else facts.sign_reason,
                feeds_batch_norm=facts.feeds_batch_norm and other.feeds_batch_norm,
                input_range=(min(low), max(high)),
            )
        elif other.obstacle is None:
            facts = replace(facts, obstacle="called in training only")
        merged.append(facts)
    return merged


def _require_float(model: nn.Module) -> None:
    """Raises: ApotfxError: a model that cannot be traced, is quantized, a single layer, or not initialised."""
    require_traceable(model)
    if any(isinstance(module, QuantLayer) for module in model.modules()):
        raise ApotfxError("model: is already quantized; start from the float model")
    if float_type_of(model) is not None or isinstance(model, nn.MultiheadAttention):
        raise ApotfxError(f"model: is a single {type(model).__name__}; wrap it in torch.nn.Sequential")
    for name, module in model.named_modules():
        computed = [
            key for key, value in vars(module).items() if isinstance(value, Tensor) and value.grad_fn is not None
        ]
        if computed:
            raise ApotfxError(
                f"model: {computed[0]} of {name or type(model).__name__} is the result of a computation; if a hook sets it "
                "(torch.nn.utils.weight_norm, prune), use torch.nn.utils.parametrizations or remove the hook, else delete it"
            )
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise ApotfxError(f"model: {name} is lazy and has no shape yet; run the model on a batch first")


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


def quantize(
    model: nn.Module,
    policy: BitPolicy,
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
    self_check: bool = True,
) -> nn.Module:
    """A copy of `model` whose conv and linear layers are quantized as `policy` says.

    Everything else that forward calls keeps its values, mode, device, dtype and state-dict name; a quantized layer keeps
    its parameters and gains `<layer>.weight_quantizer.clip` and `<layer>.input_quantizer.clip`. The clips come from
    `calibrate`, or else from the first training batch; until then they are placeholders, which no export takes. All of
    them learn but those of layers whose weight does not and those of the first layers' inputs; `requires_grad_` changes
    that.

    A module that tracing cannot enter is kept whole, and the layers inside it are quantized all the same; `plan` says
    why, and what is not known of them for that. Functional calls of layers become modules. torch's multi-head attention
    is replaced by one with layers for its projections (see `attention`). Layers that share their weight share its
    quantizer.

    An activation function whose results only layers with unsigned input levels read is left to them, batch norms and
    average pools evaluate reproducibly (see `reproducible`), and the layers run on the fastest engine there is
    (`use_engine`).

    Args:
        model: a float module, or a GraphModule of one.
        policy: see `BitPolicy`.
        concrete_args, example_inputs: see `trace`; `load_integer` then needs them too.
        self_check: compare the traced network with `model`, in both modes, on the first inputs at hand: the examples,
            the first batch of `calibrate` or of training. See `selfcheck`.

    Returns:
        A Network; if forward itself cannot be traced, a copy of `model` with other layers. `plan_of` has its `Plan`.

    Raises:
        ApotfxError: the model is quantized already, has nothing to quantize or no values (meta device); the policy has a
            rule that matches nothing, asks for levels that do not exist, caps accumulators below what a layer needs, or
            gives layers that share their weight different levels.
    """
    settings = {"concrete_args": concrete_args, "example_inputs": example_inputs, "self_check": self_check}
    prepared, resolved = _planned(model, policy, **settings)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ApotfxError(
                f"model: {name} is on the meta device, which holds no values; only plan() takes such a model"
            )
    qmodel, traced_alike = prepared.model, not prepared.unchecked
    layers = _quantized_layers(prepared, resolved)
    prepared.finish(layers, {p.facts.name for p in resolved.layers if p.input is not None and not p.input.signed})
    use_engine(qmodel)
    synchronize_clips(qmodel)
    record_of(qmodel).update(plan=resolved, unchecked=prepared.unchecked, traced_alike=traced_alike)
    return qmodel


def plan_of(qmodel: nn.Module) -> Plan | None:
    """The resolved plan of what `quantize` returned; None for any other module."""
    return record_of(qmodel).get("plan")


def leave_in_float(qmodel: nn.Module, reasons: Mapping[str, str]) -> None:
    """Take the quantizers of some layers out again, in place, and say so in the plan.

    Args:
        reasons: why, by name of the layer.
    """
    swap_layers(qmodel, {name: qmodel.get_submodule(name).to_float() for name in reasons})
    record = record_of(qmodel)
    record["plan"] = record["plan"].left_in_float(reasons)


def _quantized_layers(prepared: Prepared, resolved: Plan) -> dict[str, QuantLayer]:
    """By name, the layers that take the place of float ones."""
    layers: dict[str, QuantLayer] = {}
    sharing: dict[tuple, PlannedLayer] = {}  # (parameter, shape of the clip) -> the first layer that has it
    for planned in resolved.layers:
        if not planned.quantized:
            continue
        name = planned.facts.name
        layer = prepared.model.get_submodule(name)
        with torch.enable_grad():
            parameter = layer.weight
        weight, trains = prepared.weight(name), parameter.requires_grad
        weight_quantizer = input_quantizer = None
        if planned.weight is not None:
            weight_quantizer = WeightQuantizer(
                planned.weight,
                weight,
                per_channel=planned.rule.granularity == "channel",
                normalization=planned.rule.normalization,
            ).to(weight.device)
            weight_quantizer.clip.requires_grad_(trains)
            key = (parameter if isinstance(parameter, nn.Parameter) else name, weight_quantizer.clip.shape)
            first = sharing.setdefault(key, planned)
            if first is not planned:
                _require_same_weight(first, planned)
                weight_quantizer = layers[first.facts.name].weight_quantizer
        if planned.input is not None:
            input_quantizer = InputQuantizer(planned.input, weight.dtype).to(weight.device)
            # To learn a first one would take a backward pass to the network's own input, which costs as much as several
            # layers.
            input_quantizer.clip.requires_grad_(trains and not planned.facts.is_first)
        layers[name] = QUANT_LAYERS[float_type_of(layer)].from_float(
            layer, weight_quantizer, input_quantizer, planned.rule.clip_grad_factor
        )
        layers[name].name, layers[name].sign_reason = name, planned.facts.sign_reason
    return layers


def _require_same_weight(first: PlannedLayer, planned: PlannedLayer) -> None:
    """Raises: ApotfxError: two layers that share their weight would have it at different levels."""
    asked = [(p.weight, p.rule.normalization) for p in (first, planned)]
    if asked[0] != asked[1]:
        raise ApotfxError(
            f"layer {planned.facts.name} ({planned.rule}): shares its weight with {first.facts.name} ({first.rule}); the "
            "policy must give both the same scheme, weight_bits and normalization"
        )


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
    graph, modules = graph_of(graph_module), dict(graph_module.named_modules())
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    unsuited = {name for name in unsigned if has_hooks(modules[name]) or calls[name] != 1}
    writers = written_after(graph, modules)
    absorbed = {}
    for node in list(graph.nodes):
        rectifier = rectified_range(node, modules)
        if rectifier is None or not node.users:
            continue
        takers = [user.target for user in node.users if user.op == "call_module" and user.all_input_nodes[0] is node]
        (source,) = node.all_input_nodes
        if writers[source] not in ([], [node]):  # the layers keep it for the backward pass
            continue
        if len(takers) == len(node.users) and unsigned - unsuited >= set(takers):
            node.replace_all_uses_with(source)
            call = fx.node.map_arg((node.args, node.kwargs), lambda _: Tensor)
            graph_module.absorbed.append((tuple(takers), (node.op, node.target, *call)))
            graph.erase_node(node)
            absorbed |= dict.fromkeys(takers, rectifier)
    return absorbed


def make_reproducible(graph_module: fx.GraphModule) -> None:
    """Replace, in place, batch norms and average pools of torch by those of `reproducible`.

    Modules keep their names and state.
    """
    for module in graph_module.modules():
        module.__class__ = reproducible.REPRODUCIBLE.get(type(module), type(module))
    for node in list(graph_of(graph_module).nodes):
        averages = torch_name(node) in reproducible.AVERAGE_FUNCTIONS and "dtype" not in node.kwargs
        if averages and isinstance((*node.args, node.kwargs.get("input"))[0], fx.Node):
            name = f"{node.name}_average"
            function = torch.mean if node.op == "call_method" else node.target
            graph_module.add_submodule(name, reproducible.Average(function).train(graph_module.training))
            with graph_module.graph.inserting_before(node):
                node.replace_all_uses_with(graph_module.graph.call_module(name, node.args, node.kwargs))
            graph_module.graph.erase_node(node)


def swap_layers(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Make the submodule of each name what that of `layers` is, wherever `model` or its code refers to it, in place."""
    for layer, other in [(model.get_submodule(name), layer) for name, layer in layers.items()]:
        become(layer, other)
    if isinstance(model, Network):
        model.recompile()


def look_at_layers_as_float(model: nn.Module, layers: Collection[str]) -> bool:
    """Let modules kept whole see those of `layers` that are inside as float layers. Returns whether there are any."""
    found = False
    called = {node.target for node in graph_of(model).nodes if node.op == "call_module"}
    for path in sorted(called - set(layers)) if isinstance(model, Network) else [""]:
        module = model.get_submodule(path)
        hidden = [name for name in layers if name.startswith(f"{path}." if path else "")]
        if hidden and not isinstance(module, MultiheadAttention):
            found = True
            look_at_as_float(module)
            for layer in map(model.get_submodule, hidden):
                disguise(layer)
    return found
