"""From a module to a graph of what its Python code did.

Tracing runs the model's forward once in each mode on stand-ins for its tensors and writes down every call of torch. It
changes nothing that another thread could see: calls of modules are seen through their instances, calls of torch through
a function mode, questions of Python through `python.rebound`. What a stand-in cannot answer for (values, random numbers,
side effects, contexts) keeps the module whose code asks whole, as one node.
"""

import contextlib
import functools
import inspect
import operator
import random
import sys
import threading
import traceback
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from apotfx.attention import MultiheadAttention
from apotfx.errors import ApotfxError
from apotfx.graph.python import Untraceable, known_type, rebound, static_type
from apotfx.layers import float_type_of
from apotfx.modules import has_hooks

OWN_FILES = (str(Path(torch.__file__).parent), str(Path(__file__).parent), contextlib.__file__, "<")
PLAIN = (bool, int, float, str, torch.dtype, torch.device, type(None))
HOOKS = tuple(key for key in vars(nn.Module()) if key.endswith(("_hooks", "_hooks_with_kwargs", "_always_called")))
# What may be asked of a parameter or a buffer: what does not depend on its values and does not change with `to`.
METADATA = {
    "shape", "size", "dim", "ndim", "numel", "nelement", "stride", "layout", "requires_grad", "is_floating_point",
    "is_complex", "is_contiguous", "is_sparse", "is_quantized", "is_nested", "is_meta", "is_leaf", "__len__",
    "element_size", "itemsize", "is_signed", "grad_fn", "storage_offset", "is_nonzero_metadata", "_is_view",
}  # fmt: skip
TWO_PATHS = "its forward takes another path in training than in evaluation"
_LOCK = threading.RLock()  # torch.fx numbers generated code without one


class Traced(NamedTuple):
    """What `trace_graph` found.

    Attributes:
        graph: of the forward; None if it cannot be traced.
        leaves: by module name why a module of the user's was kept whole; "" for the model itself.
        additions: what the graphs read besides the model, by name: constants that the code made, as tensors, and
            modules that stand for constants that follow the mode.
        two_paths: the names of the modules whose code takes another path in training; `graph` is that of evaluation.
        in_training: the graph of these modules' training; None if there are none.
    """

    graph: fx.Graph | None
    leaves: dict[str, str]
    additions: dict[str, Tensor | nn.Module]
    two_paths: tuple[str, ...] = ()
    in_training: fx.Graph | None = None


class ByMode(nn.Module):
    """A constant of the traced code that depends on the mode, such as `training=self.training`."""

    def __init__(self, in_training: object, in_evaluation: object):
        super().__init__()
        self.in_training, self.in_evaluation = in_training, in_evaluation

    def forward(self) -> object:
        return self.in_training if self.training else self.in_evaluation

    def extra_repr(self) -> str:
        return f"{self.in_training} in training, {self.in_evaluation} in evaluation"


class _AnotherContext(Untraceable):
    """Keeps the module that entered the context, not the one that runs in it."""


def trace_graph(
    model: nn.Module,
    concrete_args: Mapping[str, object],
    example_inputs: object,
    kept: Mapping[str, str],
    refused: Callable[[fx.Graph, dict[str, nn.Module], Mapping[str, Tensor]], dict[str, str]],
) -> Traced:
    """Trace `model`; see `network.trace`.

    Args:
        concrete_args: arguments of forward that are fixed, by name.
        example_inputs: see `bind`; None without.
        kept: modules that are kept whole in any case, and why.
        refused: of a graph, its modules and its constants, why modules must be kept whole all the same, by name; may
            edit the graph and add modules.
    """
    kept, two_paths = dict(kept), set()
    with _LOCK, torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        while "" not in kept:
            own = dict(model.named_modules())
            modules, constants, leaves, graphs = own.copy(), {}, {}, []
            for training in (False, True) if two_paths else (False,):
                pinned = {own[path]: training for path in two_paths}
                make = functools.partial(_Tracer, model, concrete_args, example_inputs, kept, len(constants))
                tracer, again = _in_both_modes(make, pinned, modules)
                again = again or refused(tracer.graph, modules, tracer.constants)
                if again:
                    break
                graphs.append(tracer.graph)
                leaves |= tracer.leaves
                constants |= tracer.constants
            else:
                added = {name: module for name, module in modules.items() if name not in own}
                return Traced(graphs[0], leaves, constants | added, tuple(sorted(two_paths)), *graphs[1:])
            splits = {path for path, reason in again.items() if reason is TWO_PATHS} - two_paths
            inner = {path for path in splits if any(_is_inside(path, other) for other in splits)}
            kept |= {path: reason for path, reason in again.items() if path not in splits}
            two_paths = (two_paths | (splits - inner)) - kept.keys()  # what is inside may differ for that alone
    return Traced(None, {"": kept[""]}, {})


def _in_both_modes(
    make: Callable[[], "_Tracer"], pinned: Mapping[nn.Module, bool], modules: dict[str, nn.Module]
) -> tuple["_Tracer", dict[str, str]]:
    """Trace in the mode at hand and in the other one.

    Args:
        pinned: modules that are in the same mode both times: whether in training.
        modules: of the model, by name; what the graph calls besides is added.

    Returns:
        (the tracer of the mode at hand, by name why modules have to be kept whole).
    """
    tracers = []
    for toggled in (False, True):
        tracer = make()
        try:
            with _modes(tracer.root, pinned, toggled):
                tracer.run()
        except ApotfxError:
            raise
        except Exception as error:  # tracing runs the model's own code, which may raise anything
            return tracer, {"": explain(error)}
        tracers.append(tracer)
    here, there = tracers
    again = {k: v for k, v in (here.leaves | there.leaves).items() if (k in here.leaves) != (k in there.leaves)}
    return here, again or _follow_mode(here, there, modules)  # leaves in one mode are leaves in both


@contextmanager
def _modes(model: nn.Module, pinned: Mapping[nn.Module, bool], toggled: bool) -> Iterator[None]:
    """While active, `pinned` modules are in their mode, and if `toggled`, all others in the one in which they are not."""
    modes = [(module, module.training) for module in model.modules()]
    for module, training in modes:
        module.training = pinned.get(module, training != toggled)
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _is_inside(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}."))


def explain(error: BaseException) -> str:
    """Where the traced code raised `error`, and what, in one line."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith(OWN_FILES)]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno} `{frames[-1].line}`, " if frames else ""
    if isinstance(error, (DataDependentOutputException, DynamicOutputShapeException)):
        return f"{place}which depends on the values of tensors"
    reason = " ".join(str(error).split()).partition(". ")[0][:200]
    return f"{place}{reason}" if isinstance(error, Untraceable) else f"{place}{type(error).__name__}: {reason}"


def bind(inputs: Tensor | Sequence | Mapping[str, object]) -> tuple[tuple, dict]:
    """Inputs of a network as (positional, keyword) arguments: a tensor, a sequence of the first, a dict of the others."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


def with_fixed(model: nn.Module, args: tuple, kwargs: dict, fixed: Mapping[str, object]) -> tuple[tuple, dict]:
    """All arguments of `model.forward`: those of a network, and those that were `fixed` when it was traced."""
    if not fixed:
        return args, kwargs
    free = [name for name in inspect.signature(model.forward).parameters if name not in fixed]
    return (), dict(zip(free, args)) | kwargs | dict(fixed)


# What a graph may hold besides torch's functions.


def require_argument(value: object, expected: object, name: str) -> None:
    """Raises: ApotfxError: `value` is another one than the network was traced with."""
    if value is not expected and not (isinstance(value, PLAIN) and value == expected):
        got = f"a {type(value).__name__}" if not isinstance(value, PLAIN) else repr(value)
        raise ApotfxError(
            f"argument {name}: the network was traced with {expected!r}, got {got}; pass example_inputs that have it"
        )


def require_as_traced(value: object, question: str, expected: object, where: str) -> None:
    """Raises: ApotfxError: `question` of a value that depends on shapes has another answer than while tracing."""
    got = _QUESTIONS[question](value)
    if got != expected:
        raise ApotfxError(
            f"{where}: was traced for example_inputs where its forward found {expected}, now it finds {got}; pass inputs "
            "of the shape of the examples, or quantize without example_inputs"
        )


def setitem(x: Tensor, key: object, value: object) -> Tensor:
    """x after `x[key] = value`."""
    x[key] = value
    return x


GUARDS = (require_argument, require_as_traced)
_QUESTIONS = {"bool": bool, "len": len, "index": operator.index, "int": int, "float": float}


class _Tracer(fx.Tracer):
    """Enters what it can; what it cannot becomes a leaf on the spot.

    Attributes:
        leaves: the names of all modules that it did not enter, and why, but for those of torch.
        constants: the tensors that the code made without the network's inputs.
    """

    def __init__(
        self,
        model: nn.Module | None = None,
        concrete_args: Mapping[str, object] = MappingProxyType({}),
        example_inputs: object = None,
        kept: Mapping[str, str] = MappingProxyType({}),
        first_constant: int = 0,
    ):
        super().__init__()  # pickled graphs make a tracer without arguments
        self.leaves: dict[str, str] = {}
        self.constants: dict[str, Tensor] = {}
        if model is None:
            return
        self.root, self.graph, self.tensor_attrs = model, fx.Graph(), {}
        self.modules = dict(model.named_modules())
        self.submodule_paths = {module: name for name, module in self.modules.items()}
        self._kept, self._concrete_args, self._first_constant = kept, concrete_args, first_constant
        self._inputs = None if example_inputs is None else bind(example_inputs)
        self._shapes = None if example_inputs is None else _Shapes(self)
        self.tensors = dict(_tensors(model))
        self._names = {id(tensor): name for name, tensor in self.tensors.items()}
        self._written: set[int] = set()  # storages of constants that the graph writes to
        self._counted: set[str] = set()  # the counters of batches that the code increments
        self._attributes: dict[str, fx.Node] = {}
        self._context, self._entered = _context(), 0
        self._hooked = {module for module in self.submodule_paths if has_hooks(module)}
        known = (module for module in self.submodule_paths if isinstance(module, MultiheadAttention))
        self._layers = {*known, *(module for module in self.submodule_paths if float_type_of(module) is not None)}
        self._own: dict[nn.Module, dict[str, object]] = {}  # what tracing puts into the modules' instances
        self._holders: dict[int, _Held] = {}

    def run(self) -> None:
        """Fill `graph`."""
        with self._calls_seen(), _Recording(self), self._pure(self.root):
            forward = self._forward
            args, kwargs = self._arguments(inspect.signature(forward))
            self.create_node("output", "output", (self.create_arg(forward(*args, **kwargs)),), {})

    @contextmanager
    def _calls_seen(self) -> Iterator[None]:
        """While active, calls of modules come to `call_module`, and the code of the user's runs as `rebound` copies."""
        memo: dict = {}
        for module in self.submodule_paths:
            methods = _rebound_methods(module, memo)
            if module is self.root:
                self._forward = methods["forward"]
            methods["forward"] = self._seen(module, methods["forward"])
            self._own[module] = methods | {key: self._held(tensor) for key, tensor in _own_tensors(module)}
        saved = {m: {k: v for k, v in vars(m).items() if k in own or k in HOOKS} for m, own in self._own.items()}
        self._saved = saved
        try:
            for module, own in self._own.items():
                vars(module).update(own | {key: OrderedDict() for key in HOOKS})
            yield
        finally:
            for module, own in self._own.items():
                for key in own:
                    vars(module).pop(key, None)
                vars(module).update(saved[module])

    @contextmanager
    def out_of(self, module: nn.Module) -> Iterator[None]:
        """While active, `module` and what is inside are as they were, but that hooks are not called."""
        own = {m: self._own[m] for m in module.modules()}
        try:
            for m, names in own.items():
                for key in names:
                    vars(m).pop(key, None)
                vars(m).update({k: v for k, v in self._saved[m].items() if k not in HOOKS})
            yield
        finally:
            for m, names in own.items():
                vars(m).update(names)

    def _held(self, tensor: Tensor) -> "_Held":
        if id(tensor) not in self._holders:
            self._holders[id(tensor)] = _Held(self, tensor)
        return self._holders[id(tensor)]

    def _seen(self, module: nn.Module, forward: Callable) -> Callable:
        return lambda *args, **kwargs: self.call_module(module, forward, args, kwargs)

    def _arguments(self, signature: inspect.Signature) -> tuple[list, dict]:
        """What forward is called with: stand-ins, and values for the arguments that are no tensors.

        An argument that has a default and is not among the examples keeps it. The graph takes such arguments too, with
        the value that they have here.
        """
        known = signature.parameters
        if unknown := self._concrete_args.keys() - known.keys():
            name = min(unknown)
            raise ApotfxError(f"concrete_args: {name!r} is no argument of forward, which takes {', '.join(known)}")
        positional, given = self._inputs or ((), {})
        names = [name for name, p in known.items() if p.kind <= p.POSITIONAL_OR_KEYWORD]
        given = dict(zip(names, positional)) | given
        args, kwargs, guards = [], {}, []

        def stand_in(name: str, *default: object) -> fx.Proxy:
            default = default or (None,) * bool(guards)  # Python wants one behind another
            return self.create_proxy("placeholder", name, default, {})

        for name, p in known.items():
            put = args.append if p.kind <= p.POSITIONAL_OR_KEYWORD else functools.partial(kwargs.__setitem__, name)
            if name in self._concrete_args:
                put(self._concrete_args[name])
            elif p.kind == p.VAR_POSITIONAL:
                args += [stand_in(f"{name}_{i}") for i, _ in enumerate(positional[len(names) :])]
            elif p.kind == p.VAR_KEYWORD:
                for key in sorted(given.keys() - known.keys()):
                    if isinstance(given[key], PLAIN):
                        kwargs[key] = given[key]
                        guards.append((stand_in(key, given[key]), given[key], key))
                    else:
                        kwargs[key] = stand_in(key)
            elif name in given and not isinstance(given[name], PLAIN) or name not in given and p.default is p.empty:
                if self._inputs is not None and name not in given:
                    raise ApotfxError(f"example_inputs: the model's input {name} is missing; pass an example for it")
                put(stand_in(name))
            else:
                value = given.get(name, p.default)
                put(value)
                default = value if p.default is p.empty else p.default
                if isinstance(value, PLAIN) and isinstance(default, PLAIN):
                    guards.append((stand_in(name, default), value, name))
        for guard in guards:
            self.create_proxy("call_function", require_argument, guard, {})
        return args, kwargs

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if m in self._layers:
            return True
        if super().is_leaf_module(m, module_qualified_name):
            return True
        reason = self._kept.get(module_qualified_name)
        if m in self._hooked:
            reason = "it has hooks, which run when it is called"
        if reason is not None:
            self.leaves[module_qualified_name] = reason
        return reason is not None

    def call_module(self, m: nn.Module, forward: Callable, args: tuple, kwargs: dict) -> object:
        if self.is_evaluating:
            return forward(*args, **kwargs)
        last, stack = next(iter(reversed(self.graph.nodes)), None), self.module_stack.copy()
        context, scope = _context(), self.scope
        try:
            with nullcontext() if self.is_leaf_module(m, self.submodule_paths[m]) else self._pure(m):
                return super().call_module(m, forward, args, kwargs)
        except ApotfxError:
            raise
        except Exception as error:  # the module's own code may raise anything
            if isinstance(error, _AnotherContext) and context != self._context:
                raise
            name = self.path_of_module(m)
            self.leaves[name] = explain(error)
            self.module_stack, self.scope = stack, scope
            self._forget_after(last)
            return self.create_proxy("call_module", name, args, kwargs)

    def _forget_after(self, last: fx.Node | None) -> None:
        for node in reversed(list(self.graph.nodes)):
            if node is last:
                break
            if node.op == "get_attr":
                self._attributes.pop(node.target, None)
            self.graph.erase_node(node)

    @contextmanager
    def _pure(self, module: nn.Module) -> Iterator[None]:
        """Raises Untraceable if code that ran changed the module itself, which is undone, or drew random numbers."""
        own = {*self._own[module], *HOOKS, "training"}
        before, held, drawn = _state(module, own), contents(module, own), _random_state()
        try:
            yield
        finally:
            overridden = [key for key, value in self._own[module].items() if vars(module).get(key) is not value]
            after = _state(module, own)
            changed = [key for key in {**before, **after} if not _same(before.get(key, module), after.get(key, module))]
            changed = [f"its attribute {key}" for key in overridden + changed]
            changed += [_changed_item(key, *both) for key, both in held.items() if not _same_items(*both)]
            for key in after.keys() - before.keys():
                del vars(module)[key]
            vars(module).update(self._own[module] | before)
            put_back(held)
        if changed:
            raise Untraceable(f"its forward changes {changed[0]}, which tracing would do once")
        if _random_state() != drawn:
            raise Untraceable("its forward draws random numbers from Python or numpy, which tracing would do once")

    def create_node(self, kind: str, *args, **kwargs) -> fx.Node:
        if _context() != self._context:
            raise _AnotherContext("its forward runs code in a context (no_grad, autocast, checkpoint, ...)")
        node = super().create_node(kind, *args, **kwargs)
        node.meta["counted"] = self._counted
        node.meta["type"] = static_type(node, self.modules.get(node.target) if kind == "call_module" else None)
        return node

    def create_arg(self, a: object) -> object:
        """As torch's, which makes a plain dict of any other, such as an OrderedDict."""
        if isinstance(a, fx.Proxy):
            return a.node
        if isinstance(a, nn.Module):
            raise Untraceable(f"its forward passes the module {self.submodule_paths.get(a, type(a).__name__)} to a function")
        if isinstance(a, Tensor):
            if id(a) not in self._names:
                self._names[id(a)] = name = f"_tensor_constant{self._first_constant + len(self.constants)}"
                self.constants[name] = a
            return self._attribute(self._names[id(a)])
        if isinstance(a, dict) and type(a) is not dict:
            if is_dataclass(a):
                values = {f.name: self.create_arg(getattr(a, f.name)) for f in fields(a)}
                return self.create_node("call_function", type(a), (), values)
            if type(a) is OrderedDict:
                return self.create_node("call_function", OrderedDict, (self.create_arg(dict(a)),), {})
        with contextlib.suppress(NotImplementedError):  # torch's word for a type that no graph can hold
            if not isinstance(a, dict) or type(a) is dict:
                return super().create_arg(a)
        raise Untraceable(f"a {type(a).__name__} is among its results or arguments, which no graph can make")

    def _attribute(self, name: str) -> fx.Node:
        if name not in self._attributes:
            self._attributes[name] = self.create_node("get_attr", name, (), {})
        return self._attributes[name]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Value(node, self)

    def create_proxy(self, kind: str, target: object, args: tuple, kwargs: dict, *rest, **more) -> fx.Proxy:
        if target == "add_" and self._counts_batches(args[0]):
            self._counted.add(self._names[id(vars(args[0])["tensor"])])
            return args[0]  # batch norms count their batches, which matters to no result if they have a momentum
        return super().create_proxy(kind, target, args, kwargs, *rest, **more)

    def record(self, function: Callable, args: tuple, kwargs: dict) -> fx.Proxy:
        """Write down a call of torch."""
        name = getattr(function, "__name__", "")
        if name == "__get__":
            return self.create_proxy("call_function", getattr, (args[0], name_of(function)), {})
        if name == "__set__":
            raise Untraceable(f"its forward sets {name_of(function)} of a tensor")
        if name == "__setitem__":
            function, name = setitem, ""
        elif name.startswith("__") and hasattr(operator, name):
            function, name = getattr(operator, name), ""
        args, kwargs = pytree.tree_map_only(_Held, lambda held: held.tensor, (args, kwargs))
        if (first := args[0] if args else None) is not None and isinstance(first, Tensor) and _writes(function):
            self._written.add(first.untyped_storage()._cdata)
        method = bool(name) and torch.overrides.is_tensor_method_or_property(function)
        return self.create_proxy("call_method" if method else "call_function", name if method else function, args, kwargs)

    def _counts_batches(self, x: object) -> bool:
        path, _, key = self._names.get(id(vars(x).get("tensor")), "").rpartition(".")
        norm = self.modules.get(path)
        counts = key == "num_batches_tracked" and isinstance(norm, nn.modules.batchnorm._BatchNorm)
        return counts and norm.momentum is not None

    def is_tracked(self, x: object) -> bool:
        """Whether operations on x are written down: x is the model's, or the graph reads it."""
        if not isinstance(x, Tensor):
            return False
        if id(x) in self._names:
            return True
        if self._written and x.untyped_storage()._cdata in self._written:
            raise Untraceable("its forward makes a tensor, writes to it and reads it through a view")
        return False

    def type_of(self, node: fx.Node) -> type | None:
        """Of the value of a node; None where nothing says it."""
        if self._shapes is not None and node.meta["type"] is None or node.op == "placeholder" and self._shapes:
            value = self._shapes.value(node)
            node.meta["type"] = Tensor if isinstance(value, Tensor) else type(value)
        return node.meta["type"]

    def ask(self, proxy: fx.Proxy, question: str) -> object:
        """The answer that shapes give to `bool`, `len` ... of a value; from here on the graph insists on it.

        Raises whatever torch raises where it depends on the values of tensors.
        """
        if self._shapes is None:
            raise Untraceable(f"its forward asks for {question} of {proxy.node.name}, which is not known while tracing")
        answer = _QUESTIONS[question](self._shapes.value(proxy.node))
        scope = self.scope.module_path or type(self.root).__name__
        self.create_proxy("call_function", require_as_traced, (proxy, question, answer, scope), {})
        return answer

    def to_bool(self, obj: fx.Proxy) -> bool:
        return self.ask(obj, "bool")

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        return iter([obj[i] for i in range(self.ask(obj, "len"))])

    @property
    def is_evaluating(self) -> bool:
        return self._shapes is not None and self._shapes.is_evaluating


class _Value(fx.Proxy):
    """Stands for a value while code is traced."""

    def __getattr__(self, name: str) -> fx.Proxy:
        if name in ("grad", "grad_fn", "requires_grad", "is_leaf", "name", "_base"):
            raise Untraceable(f"its forward asks for {name} of a tensor, which is not known while tracing")
        if name.startswith("__") or not hasattr(Tensor, name) and self.tracer.type_of(self.node) is Tensor:
            raise AttributeError(f"'Tensor' object has no attribute {name!r}")
        return _Attribute(self, name)

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("node", "tracer", "root", "attr", "_node"):
            raise Untraceable(f"its forward sets {name} of a tensor")
        object.__setattr__(self, name, value)

    def __setitem__(self, key: object, value: object) -> None:
        self._written_in_place(setitem, key, value)

    def _written_in_place(self, function: Callable, *operands: object) -> fx.Proxy:
        if not issubclass(known_type(self), Tensor):  # Python makes a new number
            if function is setitem:
                raise Untraceable(f"its forward sets items of {self.node.name}, which is no tensor")
            return getattr(operator, _IN_PLACE[function])(self, *operands)
        return self.tracer.create_proxy("call_function", function, (self, *operands), {})

    def __repr__(self) -> str:  # of sizes it is there for messages
        asked = self.node.args[1] if self.node.target is getattr else None
        if self.node.meta["type"] not in (int, float, torch.Size, Tensor) and asked != "shape":
            raise Untraceable(f"its forward asks for the text of {self.node.name}, which is not known while tracing")
        return super().__repr__()

    def __len__(self) -> int:
        return self.tracer.ask(self, "len")

    def __index__(self) -> int:
        return self.tracer.ask(self, "index")

    def __int__(self) -> int:
        return self.tracer.ask(self, "int")

    def __float__(self) -> float:
        return self.tracer.ask(self, "float")


class _Attribute(_Value, fx.proxy.Attribute):
    pass


class _Held(_Value):
    """Stands for a parameter or a buffer, in the graph once it is used; answers what does not depend on its values."""

    def __init__(self, tracer: _Tracer, tensor: Tensor):
        vars(self).update(tracer=tracer, tensor=tensor)

    @property
    def node(self) -> fx.Node:
        return self.tracer.create_arg(self.tensor)

    def __getattr__(self, name: str) -> object:
        return getattr(self.tensor, name) if name in METADATA else super().__getattr__(name)

    def __len__(self) -> int:
        return len(self.tensor)


_IN_PLACE = {
    getattr(operator, f"i{name.strip('_')}"): name
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
}
for _function in _IN_PLACE:
    setattr(_Value, f"__{_function.__name__}__", lambda self, other, f=_function: self._written_in_place(f, other))


class _Recording(TorchFunctionMode):
    """Sends calls of torch on the model's tensors, and those that draw random numbers, to a tracer."""

    def __init__(self, tracer: _Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, tracer = kwargs or {}, self.tracer
        if tracer.is_evaluating:
            return func(*args, **kwargs)
        operands, name = pytree.tree_leaves((args, kwargs)), name_of(func)
        if not any(isinstance(x, fx.Proxy) for x in operands):
            tracked = any([tracer.is_tracked(x) for x in operands])
            if name in METADATA if tracked else not is_random(name):
                return func(*args, **kwargs)
        return tracer.record(func, args, kwargs)


def name_of(function: Callable) -> str:
    """Of a torch function; of the getter or setter of a property the property's name."""
    name = getattr(function, "__name__", type(function).__name__)
    return getattr(function.__self__, "__name__", name) if name in ("__get__", "__set__") else name


@functools.cache
def is_random(name: str) -> bool:
    """Whether torch's operator of that name draws random numbers."""
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    return any(argument.name == "generator" for schema in schemas for argument in schema.arguments)


def _writes(function: Callable) -> bool:
    name = function.__name__
    return function is setitem or function in _IN_PLACE or name.endswith("_") and not name.endswith("__")


def _context() -> tuple:
    """What a `with` statement around calls of torch may change."""
    depth = torch.autocast_increment_nesting()
    torch.autocast_decrement_nesting()
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    hooks = _checkpoints() if top is None else top(True)
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), depth, hooks


def _checkpoints() -> int:
    """How many calls of `torch.utils.checkpoint` run; torch 2.6 does not tell its hooks of saved tensors."""
    frame, count = sys._getframe(), 0
    while frame is not None:
        count += frame.f_code.co_filename == torch.utils.checkpoint.__file__
        frame = frame.f_back
    return count


def _rebound_methods(module: nn.Module, memo: dict) -> dict[str, object]:
    """`forward`, and whatever else of a module's functions is the user's, as tracing runs them."""
    methods = {"forward": module.forward}
    if isinstance(module, nn.modules.batchnorm._NormBase):
        methods["_check_input_dim"] = lambda x: None  # which would ask for a dimension
    for cls in reversed(type(module).__mro__):
        for name, value in vars(cls).items() if not cls.__module__.startswith("torch.") else ():
            if name == "forward":
                methods[name] = module.forward
            else:
                methods.pop(name, None)
            if not (name.startswith("__") and name.endswith("__")) and (
                copied := rebound(getattr(value, "__func__", value), memo)
            ):
                bound = type(value)(copied) if isinstance(value, (staticmethod, classmethod)) else copied
                methods[name] = bound.__get__(module, type(module))
    for name, value in vars(module).items():
        if copied := rebound(getattr(value, "__func__", value), memo):
            methods[name] = copied.__get__(value.__self__) if hasattr(value, "__self__") else copied
        elif name in methods:
            methods[name] = value
    return methods


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a model by name: plain attributes, buffers, parameters."""
    for path, module in reversed(list(model.named_modules())):
        for key, value in _own_tensors(module):
            yield f"{path}.{key}" if path else key, value


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    state = vars(module)
    for held in (state, state["_parameters"], state["_buffers"]):
        for key, value in held.items():
            if isinstance(value, Tensor) and not isinstance(getattr(type(module), key, None), property):
                yield key, value


def _state(module: nn.Module, own: Collection[str]) -> dict[str, object]:
    return {key: value for key, value in vars(module).items() if key not in own}


def contents(module: nn.Module, own: Collection[str] = ()) -> dict[str, tuple]:
    """The containers that the module holds, each with a copy, but for those under the names `own`."""
    state = _state(module, own).items()
    return {key: (value, value.copy()) for key, value in state if isinstance(value, (list, dict, set))}


def put_back(contents: Mapping[str, tuple]) -> None:
    for held, copied in contents.values():
        held.clear()
        held.extend(copied) if isinstance(held, list) else held.update(copied)


@contextmanager
def attributes_kept(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Afterwards `modules` have the attributes that they had, and containers among them hold what they held."""
    states = [(vars(m), vars(m).copy(), contents(m)) for m in modules]
    try:
        yield
    finally:
        for state, saved, held in states:
            state.clear()
            state.update(saved)
            put_back(held)


def _same(a: object, b: object) -> bool:
    return a is b or type(a) is type(b) and isinstance(a, PLAIN) and a == b


def _same_items(held: list | dict | set, copied: list | dict | set) -> bool:
    if isinstance(held, set):
        return held == copied
    if len(held) != len(copied) or isinstance(held, dict) and list(held) != list(copied):
        return False
    pairs = zip(held.values(), copied.values()) if isinstance(held, dict) else zip(held, copied)
    return all(_same(a, b) for a, b in pairs)


def _changed_item(name: str, held: list | dict | set, copied: list | dict | set) -> str:
    """What to call the item of a module's container `name` that changed: a buffer by its own name."""
    if name not in ("_buffers", "_parameters", "_modules"):
        return f"its attribute {name}"
    return f"its {name[1:-1]} {next(key for key in {**copied, **held} if held.get(key) is not copied.get(key))}"


def _random_state() -> tuple:
    """Of the generators that code may draw from behind torch's back."""
    numpy = sys.modules.get("numpy")
    drawn = numpy and numpy.random.get_state()
    return random.getstate(), drawn and (drawn[1].tobytes(), *drawn[2:])


class _Shapes:
    """The values of a graph's nodes for the example inputs, as tensors that hold shapes and types only."""

    def __init__(self, tracer: _Tracer):
        self.tracer = tracer
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        tensors = (*tracer.root.parameters(), *tracer.root.buffers())
        self.device = next((x.device for x in tensors), torch.device("cpu"))
        self.values: dict[fx.Node, object] = {}
        self.is_evaluating = False

    def value(self, node: fx.Node) -> object:
        """Raises whatever the network or torch raises, also where `node` depends on the values of tensors."""
        self.is_evaluating = True
        try:
            with self.mode, torch.no_grad():
                for n in node.graph.nodes:
                    if n not in self.values:
                        self.values[n] = None if n.target in GUARDS else self._evaluate(n)
                    if n is node:
                        return self.values[n]
        finally:
            self.is_evaluating = False
        raise AssertionError("the node is not in the graph")

    def _evaluate(self, node: fx.Node) -> object:
        if node.op == "placeholder":
            return self._input(node)
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), self.values.__getitem__)
        if node.op == "get_attr":
            constant = self.tracer.constants.get(node.target)
            return self._empty(self.tracer.tensors[node.target] if constant is None else constant)
        if node.op == "call_module":
            module = self.tracer.modules[node.target]
            with self.tracer.out_of(module), attributes_kept(module.modules()):
                state = {name: self._empty(x) for name, x in (*module.named_parameters(), *module.named_buffers())}
                return torch.func.functional_call(module, state, args, kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _input(self, node: fx.Node) -> object:
        args, kwargs = self.tracer._inputs
        position = [n for n in node.graph.nodes if n.op == "placeholder"].index(node)
        value = kwargs[node.target] if node.target in kwargs else args[position] if position < len(args) else node.args[0]
        return pytree.tree_map(lambda x: self._empty(x).to(self.device) if isinstance(x, Tensor) else x, value)

    def _empty(self, value: object) -> object:
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


def owner(node: fx.Node) -> str:
    """The name of the module whose code makes a node's call; "" for the model itself."""
    callers = [path for path, _ in node.meta.get("nn_module_stack", {}).values()]
    if node.op == "call_module" and callers and callers[-1] == node.target:
        callers = callers[:-1]
    return callers[-1] if callers else ""


def new_name(modules: Mapping[str, nn.Module], scope: str, function: str) -> str:
    """The module whose code makes a call, the function, and a number if the name is taken."""
    count, key = 0, function
    while hasattr(modules[scope], key) or f"{scope}.{key}".lstrip(".") in modules:
        count += 1
        key = f"{function}_{count}"
    return f"{scope}.{key}".lstrip(".")


def _follow_mode(here: _Tracer, there: _Tracer, modules: dict[str, nn.Module]) -> dict[str, str]:
    """Make constants that differ between the graphs of both modes follow the mode, in the graph of `here`.

    Adds to `modules` what the graph then calls. Returns why modules have to be kept whole, where more differs.
    """
    graphs = [list(tracer.graph.nodes) for tracer in (here, there)]
    calls: list[dict[str, list]] = [defaultdict(list), defaultdict(list)]
    for nodes, by_module in zip(graphs, calls):
        for node in nodes:
            by_module[owner(node)].append((node.op, node.target))
    differing = [path for path in calls[0].keys() | calls[1].keys() if calls[0][path] != calls[1][path]]
    if differing or len(graphs[0]) != len(graphs[1]):
        return dict.fromkeys(differing or [""], TWO_PATHS)
    twins = dict(zip(*graphs))
    for node, twin in list(twins.items()):
        mine, form = _leaves(node)
        theirs, other_form = _leaves(twin)
        same = (node.op, node.target, form) == (twin.op, twin.target, other_form)
        if node.op == "get_attr" and node.target in here.constants:
            same &= torch.equal(here.constants[node.target], there.constants[twin.target])
        for i, (a, b) in enumerate(zip(mine, theirs)):
            if isinstance(a, fx.Node) or isinstance(b, fx.Node):
                same &= twins.get(a) is b
            elif type(a) is not type(b) or a != b:
                scope = owner(node)
                name = new_name(modules, scope, "by_mode")
                training = here.modules[scope].training
                modules[name] = (ByMode(a, b) if training else ByMode(b, a)).train(training)
                with here.graph.inserting_before(node):
                    mine[i] = here.graph.create_node("call_module", name)
        if not same:
            return {owner(node): TWO_PATHS}
        remaining = iter(mine)
        node.args, node.kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda _: next(remaining))
    return {}


def _leaves(node: fx.Node) -> tuple[list, object]:
    """(what a node's arguments consist of, their form)."""
    found: list = []
    return found, fx.node.map_aggregate((node.args, node.kwargs), found.append)
