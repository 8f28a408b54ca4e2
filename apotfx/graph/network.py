"""A traced network: the user's module, and the graph of its forward over the same modules and parameters."""

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn
from torch.fx.graph_module import reduce_graph_module

from apotfx.errors import ApotfxError
from apotfx.functional import is_traced
from apotfx.generated_code import GraphModule, forgetting, require_writable_names
from apotfx.graph.functional import functionalize
from apotfx.graph.modularize import norms_as_modules
from apotfx.graph.tracing import HOOKS, trace_graph, with_fixed
from apotfx.layers import FunctionalLayer
from apotfx.modules import attribute, has_hooks, looked_at_as_float
from apotfx.reproducible import AttachedBatchNorm

_RECORD = "_apotfx"
GLOBAL_HOOKS = (  # on all modules
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip


class Network(GraphModule):
    """A graph over the modules, parameters and buffers of a module, under their names.

    Attributes:
        original: the module; what it holds, the network holds, and the other way round.
        meta: see `record_of`.
        absorbed: the activation functions that layers have taken over, as (names of the layers, the call that it was).
        two_paths: the names of modules whose code takes another path in training. While any of them trains, the forward
            of `original` runs in place of the graph, over the same modules.
        fixed: the arguments of the original's forward that the network does not take, by name.
    """

    def __init__(
        self,
        original: nn.Module,
        graph: fx.Graph,
        class_name: str,
        two_paths: Sequence[str] = (),
        fixed: Mapping[str, object] = MappingProxyType({}),
    ):
        empty = fx.Graph()
        empty.output(None)
        super().__init__(nn.Module(), empty, class_name)
        shared = ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "training")
        vars(self).update({key: vars(original)[key] for key in shared}, original=original)
        vars(self).update({key: vars(original)[key].copy() for key in HOOKS})
        vars(self).update({key: value for key, value in vars(original).items() if isinstance(value, Tensor)})
        vars(self).update(two_paths=tuple(two_paths), fixed=dict(fixed))
        vars(self).update(absorbed=[], _watched=[], _absorbing=True, _visible=None, _after=None)
        self.graph = graph

    def recompile(self) -> fx.graph.PythonCode:
        """As torch's; before the generated code runs, `_choose` says whether it does."""
        code, cls = super().recompile(), type(self)
        generated = cls.forward

        @functools.wraps(generated)
        def forward(self, *args, **kwargs):
            as_written, compiling = self.is_as_written, torch.compiler.is_compiling()
            absorbing = self._choose(as_written)
            if not compiling:
                self._require_same(args, kwargs)
            if as_written:
                args, kwargs = with_fixed(self.original, args, kwargs, self.fixed)
                with nullcontext() if compiling else looked_at_as_float():
                    output = self.original.forward(*args, **kwargs)
            else:
                output = (generated if absorbing else self._visible)(self, *args, **kwargs)
            if self._after is not None and not compiling:
                self._after(self, args, output)
            return output

        cls.forward = forward
        return code

    @property
    def is_as_written(self) -> bool:
        """Whether the forward of `original` runs in place of the graph."""
        return any(self.get_submodule(path).training for path in self.two_paths)

    def _choose(self, as_written: bool) -> bool:
        """Whether layers compute the activation functions that they have absorbed, for which they are prepared.

        Compiled code keeps the answer that it was compiled with.
        """
        seen = as_written or any(getattr(nn.modules.module, hooks) for hooks in GLOBAL_HOOKS)
        absorbing = not seen and all(held.get(key) is m and not has_hooks(m) for held, key, m in self._watched)
        if absorbing != self._absorbing:
            vars(self)["_absorbing"] = absorbing
            for _, _, module in self._watched:
                if hasattr(module, "rectifies"):
                    module.rectifies = absorbing
        if not absorbing and not as_written and self._visible is None:
            vars(self)["_visible"] = _generate(self._with_activations())
        return absorbing

    _choose._dynamo_marked_constant = True  # as torch.compiler.assume_constant_result does, which imports the compiler

    def _require_same(self, args: tuple, kwargs: dict) -> None:
        if self.meta.get("unchecked") and self.training and torch.is_grad_enabled() and not is_traced():
            from apotfx.graph.selfcheck import require_same  # which needs networks

            require_same(self, args, kwargs)

    def watch(self) -> None:
        """From now on compute absorbed activation functions where they were, whenever somebody looks at one or at its
        layers (a hook) or has put another module in the place of one of them."""
        paths = {path for takers, call in self.absorbed for path in (*takers, *[call[1]] * (call[0] == "call_module"))}
        split = (path.rpartition(".") for path in sorted(paths))
        vars(self)["_watched"] = [
            (modules, key, modules[key]) for modules, key in ((self.get_submodule(p)._modules, k) for p, _, k in split)
        ]

    def _with_activations(self) -> fx.Graph:
        graph = copy.deepcopy(self.graph)
        calls = {node.target: node for node in graph.nodes if node.op == "call_module"}
        for takers, (op, target, args, kwargs) in self.absorbed:
            source = calls[takers[0]].all_input_nodes[0]
            with graph.inserting_after(source):
                given = fx.node.map_aggregate((args, kwargs), lambda a: source if a is Tensor else a)
                activation = graph.create_node(op, target, *given)
            for taker in takers:
                calls[taker].replace_input_with(source, activation)
        return graph

    def train(self, mode: bool = True) -> "Network":
        self.original.training = mode
        return super().train(mode)

    def __deepcopy__(self, memo: dict) -> "Network":
        made_of = copy.deepcopy(self.original, memo), copy.deepcopy(self.graph), type(self).__name__
        network = Network(*made_of, self.two_paths, self.fixed)
        memo[id(self)] = network
        own = vars(network).keys() - {"meta", "training", "absorbed", "_watched", "_absorbing", "_after", *HOOKS}
        vars(network).update({key: copy.deepcopy(v, memo) for key, v in vars(self).items() if key not in own})
        return network

    def __reduce__(self) -> tuple:
        """Pickled as torch.fx does, by its code; with what that would lose."""
        state, imports = super().__reduce__()[1]
        return _restore, (type(self).__name__, state | {"_visible": None}, imports)


def _generate(graph: fx.Graph) -> Callable:
    code = graph.python_code("self")
    namespace = dict(code.globals)
    exec(code.src, namespace)
    return namespace["forward"]


def _restore(class_name: str, state: dict, imports: str) -> Network:
    with forgetting():
        graph = reduce_graph_module(dict(state), imports).graph
    network = Network(state["original"], graph, class_name, state["two_paths"], state["fixed"])
    kept = vars(network).keys() - {"meta", "training", "absorbed", "_watched", "_absorbing", "_after", *HOOKS}
    vars(network).update({key: value for key, value in state.items() if key not in kept})
    return network


def trace(
    model: nn.Module,
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
    kept: Mapping[str, str] = MappingProxyType({}),
) -> nn.Module:
    """`model` as a graph of what its forward does, in which no value changes; shares its parameters and modules.

    Arguments of calls that depend on the mode, such as `F.dropout(x, training=self.training)`, follow `train()` and
    `eval()` of the graph too. Random numbers stay random. What is written in place is seen by all later readers.

    A module that tracing cannot enter is kept whole, as one node. Where that is the model itself, there is no graph, and
    the model is returned. Where code takes another path in training than in evaluation, the graph is that of evaluation,
    and training runs the model's own forward.

    Args:
        model: is changed where constants of the code become its buffers; pass a copy.
        concrete_args: arguments of forward that are fixed, by name; the result does not take them any more.
        example_inputs: inputs of forward, of which only shapes and types are used: a tensor, a sequence of positional
            arguments or a dict of keyword arguments. What depends on shapes, a branch or a loop, is then taken as it is
            for these, and other shapes are refused where it matters. Arguments that have a default and are not among
            them keep it.
        kept: modules that are kept whole in any case, and why.

    Returns:
        A `Network`, or `model`. `record_of` says by module name why a module was kept whole ("" for the model itself).

    Raises:
        ApotfxError: not a module, or one that is wrapped; says what to pass instead. Or arguments that forward lacks.
    """
    require_traceable(model)
    require_writable_names(model)

    def refused(graph: fx.Graph, modules: dict[str, nn.Module], constants: Mapping[str, Tensor]) -> dict[str, str]:
        norms_as_modules(graph, modules)
        return functionalize(graph, modules, constants)

    if reserved := {*model._modules, *model._parameters, *model._buffers} & RESERVED:
        kept = {"": f"its {min(reserved)} has a name that torch.fx keeps for itself"}
    traced = trace_graph(model, concrete_args or {}, example_inputs, kept, refused)
    if traced.graph is None:
        vars(model)[_RECORD] = {"leaves": traced.leaves}
        return model
    for name, addition in traced.additions.items():
        path, _, key = name.rpartition(".")
        parent = model.get_submodule(path)
        if isinstance(addition, Tensor):
            parent.register_buffer(key, addition, persistent=False)
        else:
            parent.add_module(key, addition)
    for node in traced.graph.nodes:  # so that a pickled graph calls them, and does not look inside
        own = node.op == "call_function" and (getattr(node.target, "__module__", None) or "torch").split(".")[0]
        node.meta["is_wrapped"] = own not in (False, "torch", "_operator", "builtins", "math")
    network = Network(model, traced.graph, type(model).__name__, traced.two_paths, concrete_args or {})
    network.meta.update(leaves=traced.leaves, in_training=traced.in_training)
    return network


def record_of(model: nn.Module) -> dict:
    """What is kept of a network that `trace` or `quantize` returned: "leaves", and from `quantize` "plan".

    "leaves" says by module name why a module was kept whole. Empty for any other module.
    """
    return model.meta if isinstance(model, Network) else getattr(model, "__dict__", {}).get(_RECORD, {})


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph of what `trace` returned; an empty one for a model that could not be traced."""
    return model.graph if isinstance(model, Network) else fx.Graph()


def reached_state(model: nn.Module) -> dict[str, Tensor]:
    """By state-dict name, the tensors that a network computes with, apart from the weights of quantized functional layers."""
    state = dict(model.state_dict(keep_vars=True))
    if not isinstance(model, Network):
        return state
    read = {node.target for node in model.graph.nodes if node.op == "get_attr"}
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    for layer in map(model.get_submodule, sorted(called)):
        if type(layer) is FunctionalLayer:
            read |= {path for made in (layer._weight, layer._bias) if made is not None for path in made.sources}
    norms = {name.rpartition(".")[0] for name in called if isinstance(model.get_submodule(name), AttachedBatchNorm)}
    found = {}
    for name in state:
        parents = name.split(".")[:-1]
        inside = any(".".join(parents[: depth + 1]) in called for depth in range(len(parents)))
        if inside or name in read or ".".join(parents) in norms:
            found[name] = state[name]
    return found | {name: attribute(model, name) for name in sorted(read - found.keys())}


@torch.no_grad()
def load_reached_state(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy tensors into those that `reached_state` names."""
    own = reached_state(model)
    for name, tensor in state.items():
        own[name].copy_(tensor)


def require_traceable(model: nn.Module) -> None:
    """Raises: ApotfxError: not a module, or one that is wrapped or compiled."""
    if not isinstance(model, nn.Module):
        raise ApotfxError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ApotfxError(f"model: is wrapped in {type(model).__name__}; quantize model.module, then wrap the result")
    if hasattr(model, "_orig_mod"):
        raise ApotfxError("model: was compiled; quantize model._orig_mod, then torch.compile the result")
    if isinstance(model, torch.jit.ScriptModule):
        raise ApotfxError("model: was compiled by torch.jit; quantize the module that it was made from")


def _reserved() -> set[str]:
    graph = fx.Graph()
    graph.output(None)
    return {*dir(fx.GraphModule(nn.Module(), graph)), "original", "meta"} - {*dir(nn.Module())}


RESERVED = _reserved()
