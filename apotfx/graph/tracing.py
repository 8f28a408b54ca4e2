"""From a module to a graph: torch.fx, which goes around what it cannot enter."""

import dataclasses
import inspect
import operator
import traceback
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from apotfx.attention import MultiheadAttention
from apotfx.errors import ApotfxError
from apotfx.layers import float_type_of
from apotfx.modules import attribute, has_hooks

TORCH_FILES = str(Path(torch.__file__).parent)


class ByMode(nn.Module):
    """A constant of the traced code that depends on the mode, such as `training=self.training`."""

    def __init__(self, in_training: object, in_evaluation: object):
        super().__init__()
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self) -> object:
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        return f"{self.in_training} in training, {self.in_evaluation} in evaluation"


def trace(
    model: nn.Module,
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
) -> nn.Module:
    """`model` as a graph; shares its parameters and leaf modules. A GraphModule is returned as it is.

    Tracing runs the model's forward, which may leave marks on it: pass a copy. Arguments of calls that depend on
    the mode, such as `F.dropout(x, training=self.training)`, follow `train()` and `eval()` of the graph too.

    A module that torch.fx cannot enter is kept whole, as one node. Where that is the model itself, there is no graph,
    and the model is returned.

    Args:
        concrete_args: arguments of forward that are fixed, by name; the result does not take them any more.
        example_inputs: inputs of forward, of which only shapes and types are used: a tensor, a sequence of positional
            arguments or a dict of keyword arguments. What depends on shapes, a branch or a
            loop, is then taken as it is for these.

    Returns:
        A GraphModule, or `model`. Its `meta["leaves"]` says by module name why a module was kept whole ("" for the
        model itself).

    Raises:
        ApotfxError: not a module, or one that is wrapped; says what to pass instead. Or arguments that forward lacks.
    """
    require_traceable(model)
    if isinstance(model, fx.GraphModule):
        model.meta.setdefault("leaves", {})
        return model
    _require_arguments(model, concrete_args or {})
    kept: dict[str, str] = {}
    while True:
        tracer = _Tracer(model, example_inputs, kept)
        try:
            graph = tracer.trace(model, concrete_args)
        except ApotfxError:
            raise
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            vars(model)["meta"] = {"leaves": {"": explain(error)}}
            return model
        others, other_leaves = _trace_in_other_mode(model, concrete_args, example_inputs, kept)
        in_one_mode = {name: why for name, why in (tracer.leaves | other_leaves).items() if name not in kept}
        in_one_mode = {k: v for k, v in in_one_mode.items() if (k in tracer.leaves) != (k in other_leaves)}
        if others and in_one_mode:  # leaves in one mode are leaves in both
            kept |= in_one_mode
            continue
        differing = _modules_with_two_paths(graph.nodes, others)
        if not differing or "" in differing:
            break
        kept |= dict.fromkeys(differing, "its forward takes another path in training than in evaluation")
    graph_module = fx.GraphModule(tracer.root, graph, type(model).__name__)
    graph_module.meta["leaves"] = tracer.leaves
    vars(graph_module).update({key: value.copy() for key, value in vars(model).items() if "_hooks" in key})
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in graph_module.named_modules():
        module.training = modes.get(name, module.training)  # torch.fx makes containers anew
    _follow_mode(graph_module, model, others)
    return graph_module


def _require_arguments(model: nn.Module, concrete_args: Mapping[str, object]) -> None:
    known = inspect.signature(model.forward).parameters
    for name in concrete_args:
        if name not in known:
            raise ApotfxError(f"concrete_args: {name!r} is no argument of forward, which takes {', '.join(known)}")


def graph_of(model: nn.Module) -> fx.Graph:
    """The graph of what `trace` returned; an empty one for a model that could not be traced."""
    return model.graph if isinstance(model, fx.GraphModule) else fx.Graph()


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


def explain(error: Exception) -> str:
    """Where the traced code raised `error`, and what, in one line."""
    if isinstance(error, _ChangesBuffer):
        return str(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(TORCH_FILES)]
    frames = [f for f in frames if f.filename != __file__ and not f.filename.startswith("<")]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`, " if frames else ""
    reason = " ".join(str(error).split()).partition(". ")[0]
    return f"{place}{type(error).__name__}: {reason[:200]}"


class _Tracer(fx.Tracer):
    """Enters what it can; what it cannot becomes a leaf on the spot.

    Args:
        kept: modules that it shall not enter, and why.

    Attributes:
        leaves: the names of all modules that it did not enter, and why, but for those of torch.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        example_inputs: object = None,
        kept: Mapping[str, str] = MappingProxyType({}),
    ):
        super().__init__()  # pickled graphs make a tracer without arguments
        self.leaves: dict[str, str] = {}
        self._kept = kept
        self._names = {} if model is None else {id(tensor): name for name, tensor in model.named_parameters()}
        self._attributes: dict[str, fx.Proxy] = {}
        self._shapes = None if example_inputs is None else _Shapes(model, example_inputs)

    def trace(self, root: nn.Module, concrete_args: dict[str, object] | None = None) -> fx.Graph:
        with _unchanged_buffers(root):
            graph = super().trace(root, concrete_args)
        for node in reversed(list(graph.nodes) if concrete_args else []):
            # torch.fx keeps arguments that are fixed, under other names, and asserts their values.
            if "_assert" in getattr(node.target, "__name__", "") and "has been specialized" in str(node.args[-1]):
                unneeded = [node]
                while unneeded:
                    node = unneeded.pop()
                    unneeded += [x for x in node.all_input_nodes if len(x.users) == 1]
                    graph.erase_node(node)
        return graph

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        layer = float_type_of(m) is not None or isinstance(m, MultiheadAttention)
        if layer or super().is_leaf_module(m, module_qualified_name):
            return True
        reason = "it has hooks, which run when it is called" if has_hooks(m) else self._kept.get(module_qualified_name)
        if reason is not None:
            self.leaves[module_qualified_name] = reason
        return reason is not None

    def create_arg(self, a: object) -> object:
        """As torch's, which makes a plain dict of any other, such as an OrderedDict."""
        if isinstance(a, dict) and type(a) is not dict:
            if dataclasses.is_dataclass(a):
                fields = {f.name: self.create_arg(getattr(a, f.name)) for f in dataclasses.fields(a)}
                return self.create_node("call_function", type(a), (), fields)
            if type(a) is not OrderedDict:
                raise TypeError(f"a {type(a).__name__} among its results or arguments, which no graph can make")
            return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return super().proxy(node) if self._shapes is None else _Sized(node, self)

    def value(self, proxy: fx.Proxy, convert: Callable) -> object:
        """What `convert` (to a bool or to an int) makes of a value that depends on shapes."""
        return self._shapes.value(proxy.node, convert)

    def call_module(self, m, forward, args, kwargs):
        if self._is_evaluating:
            return forward(*args, **kwargs)
        last, stack = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy()
        try:
            with _unchanged_buffers(m):
                return super().call_module(m, forward, args, kwargs)
        except ApotfxError:
            raise
        except Exception as error:  # the module's own code may raise anything
            name = self.path_of_module(m)
            self.leaves[name] = explain(error)
            self.module_stack = stack
            self._forget_after(last)
            return self.create_proxy("call_module", name, args, kwargs)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            self._attributes = {key: proxy for key, proxy in self._attributes.items() if proxy.node is not node}
            self.graph.erase_node(node)

    def getattr(self, attr, attr_val, parameter_proxy_cache):
        """As torch's, which looks for the name in all parameters on every call."""
        if self._is_evaluating or not isinstance(attr_val, nn.Parameter) or id(attr_val) not in self._names:
            return attr_val
        name = self._names[id(attr_val)]
        if name not in self._attributes:
            self._attributes[name] = self.create_proxy("get_attr", name, (), {})
        return self._attributes[name]

    def to_bool(self, obj: fx.Proxy) -> bool:
        return super().to_bool(obj) if self._shapes is None else self.value(obj, bool)

    @property
    def _is_evaluating(self) -> bool:
        return self._shapes is not None and self._shapes.is_evaluating


class _Sized(fx.Proxy):
    """A proxy that Python can loop over and measure, as it is for the example inputs."""

    def __getattr__(self, name: str) -> fx.Proxy:
        return _SizedAttribute(self, name)

    def __len__(self) -> int:
        return self.tracer.value(self, len)

    def __index__(self) -> int:
        return self.tracer.value(self, operator.index)


class _SizedAttribute(_Sized, fx.proxy.Attribute):
    pass


class _ChangesBuffer(Exception):
    pass


@contextmanager
def _unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Raises _ChangesBuffer if tracing ran code that changes a buffer of `module` itself, after changing it back."""
    before = {key: (buffer, buffer.clone()) for key, buffer in module._buffers.items() if buffer is not None}
    versions = {key: buffer._version for key, (buffer, _) in before.items()}
    yield
    changed = [
        key for key, (buffer, _) in before.items()
        if module._buffers.get(key) is not buffer or buffer._version != versions[key]
    ]  # fmt: skip
    for key in changed:
        buffer, value = before[key]
        module._buffers[key] = buffer.copy_(value)
    # Batch norms count their batches, which matters to no result if they have a momentum.
    counts = isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None
    changed = [key for key in changed if not (counts and key == "num_batches_tracked")]
    if changed:
        raise _ChangesBuffer(f"its forward changes its buffer {changed[0]}, which tracing would do once and for all")


class _Shapes:
    """Decides control flow on shapes, while a graph is made, by running it on tensors that hold no values."""

    def __init__(self, model: nn.Module, example_inputs: object):
        self.model = model
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.inputs = bind(example_inputs)
        self.device = next((x.device for x in (*model.parameters(), *model.buffers())), torch.device("cpu"))
        self.values: dict[fx.Node, object] = {}
        self.is_evaluating = False

    def value(self, node: fx.Node, convert: Callable) -> object:
        """Raises whatever the network or torch raises, also where `node` depends on the values of tensors."""
        self.is_evaluating = True
        try:
            with self.mode, torch.no_grad():
                for n in node.graph.nodes:
                    if n not in self.values:
                        self.values[n] = self._evaluate(n)
                    if n is node:
                        return convert(self.values[n])
        finally:
            self.is_evaluating = False
        raise AssertionError("the node is not in the graph")

    def _evaluate(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self._input(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        if node.op == "get_attr":
            return self._empty(attribute(self.model, node.target))
        if node.op == "call_module":
            module = self.model.get_submodule(node.target)
            state = {name: self._empty(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
            return torch.func.functional_call(module, state, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _input(self, node: fx.Node) -> object:
        args, kwargs = self.inputs
        position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
        if node.target in kwargs:
            value = kwargs[node.target]
        elif position < len(args):
            value = args[position]
        elif node.args:  # its default
            value = node.args[0]
        else:
            raise ApotfxError(f"example_inputs: the model's input {node.target} is missing; pass an example for it")
        return torch.utils._pytree.tree_map(self._empty_input, value)

    def _empty_input(self, value: object) -> object:
        return self._empty(value).to(self.device) if isinstance(value, Tensor) else value

    def _empty(self, value: object) -> object:
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


def bind(inputs: Tensor | Sequence | Mapping[str, object]) -> tuple[tuple, dict]:
    """Inputs of a network as (positional, keyword) arguments: a tensor, a sequence of the first, a dict of the others."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def _trace_in_other_mode(
    model: nn.Module, concrete_args: dict | None, example_inputs: object, kept: Mapping[str, str]
) -> tuple[list[fx.Node], dict[str, str]]:
    """(the nodes, the leaves) of `model` where every module that trains evaluates, and the other way round.

    Both are empty if it cannot be traced so.
    """

    def toggle() -> None:
        for module in model.modules():
            module.training = not module.training

    toggle()
    try:
        tracer = _Tracer(model, example_inputs, kept)
        return list(tracer.trace(model, concrete_args).nodes), tracer.leaves
    except Exception:  # the model's own code may raise anything; `_follow_mode` then warns that the paths differ
        return [], {}
    finally:
        toggle()


def _modules_with_two_paths(nodes: Iterable[fx.Node], others: Iterable[fx.Node]) -> set[str]:
    """The modules whose own calls differ between two graphs of a model; "" for the model itself."""
    calls = [defaultdict(list), defaultdict(list)]
    for graph, by_module in zip((nodes, others), calls):
        for node in graph:
            callers = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
            if node.op == "call_module":
                callers = callers[:-1]  # the last one is what it calls
            by_module[callers[-1] if callers else ""].append(_call(node))
    return {path for path in calls[0].keys() | calls[1].keys() if calls[0][path] != calls[1][path]}


def _call(node: fx.Node) -> tuple[str, object]:
    """What a node calls. Constants, which are read as get_attr, get another name in every trace."""
    return node.op, node.target if node.op != "get_attr" else ""


def _follow_mode(graph_module: fx.GraphModule, model: nn.Module, others: list[fx.Node]) -> None:
    """Make numbers and flags that differ from those in `others`, the nodes in the other mode, depend on the mode.

    Each becomes a `ByMode` that both `graph_module` and `model` hold.
    """
    nodes = list(graph_module.graph.nodes)
    if [*map(_call, nodes)] != [*map(_call, others)]:
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
    if differing:
        graph_module.recompile()
