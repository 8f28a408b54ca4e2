"""From the graph of a quantized network to its program: what each node computes, however torch spells it."""

import functools
import inspect
import json
import math
import operator
import os
import types
from collections.abc import Iterator, Sequence
from dis import get_instructions
from itertools import zip_longest

import torch
from torch import Tensor, fx, nn

from apotfx.errors import ApotfxError
from apotfx.graph.facts import BATCH_NORMS, rectified_range
from apotfx.graph.network import Network
from apotfx.graph.operations import torch_name
from apotfx.graph.tracing import ByMode, setitem
from apotfx.integer.functions import FUNCTIONS, MODULES
from apotfx.integer.layers import Affine as AffineModule
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.program import (
    AdaptiveAverage,
    Add,
    Affine,
    Average,
    AveragePool,
    Clamp,
    Concatenate,
    Constant,
    Encode,
    Flatten,
    FloatLayer,
    Foreign,
    Function,
    Input,
    MaxPool,
    Product,
    Program,
    Step,
    encode,
    inputs_of,
)
from apotfx.layers import FunctionalLayer, Geometry, QuantLayer, float_type_of, kind_of
from apotfx.modules import has_hooks
from apotfx.reproducible import AVERAGE_POOLS, Average as AverageModule, ReproducibleBatchNorm

# Of torch's functions, which torch.fx cannot ask for them in every version.
MAX_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVERAGE_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout", "stochastic_depth")
DROPOUT_MODULES = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def build_program(network: nn.Module) -> Program:
    """The program of a network with quantized, or with integer, layers in evaluation; says nothing of its numbers.

    One that could not be traced is a single foreign step.
    """
    if not isinstance(network, Network):
        name, settings = describe_module(network)
        step = Foreign("model", (), f"{name}, which could not be traced", "", settings, [[], {}])
        return Program((step,), {"value": 0}, ("model",))
    return _Builder(network).build()


class _Builder:
    def __init__(self, network: Network):
        self.network = network
        self.modules = dict(network.named_modules())
        self.steps: list[Step] = []
        self.values: dict[fx.Node, object] = {}  # the name of a node's value, or what it is if that is known now
        self.names = {node.name for node in network.graph.nodes}
        self.constants: dict[str, str] = {}  # by tensor, the name of its value

    def build(self) -> Program:
        for node in self.network.graph.nodes:
            if node.op == "output":
                names, arguments = self._arguments((node.args[0],), {})
                return Program(tuple(self.steps), arguments[0][0], names)
            self.values[node] = self._value(node)
        raise AssertionError("a graph ends with its output")

    def _value(self, node: fx.Node) -> object:
        """The name of the node's value, after adding its steps."""
        if node.op == "placeholder":
            default = node.args[0] if node.args else None
            return self._add(Input(node.name, (), not node.args, default))
        if node.op == "get_attr":
            return _Value(self._constant(node.target))
        module = self.modules[node.target] if node.op == "call_module" else None
        if isinstance(module, ByMode):
            return module.in_evaluation
        alone = len(node.args) == 1 and not node.kwargs and isinstance(node.args[0], fx.Node)
        if module is not None and has_hooks(module):
            return self._foreign(node, ", which has hooks")
        if isinstance(module, (QuantLayer, IntegerLayer)) and alone:
            return self._layer(node, module)
        if float_type_of(module) is not None and alone:
            geometry = Geometry.of(module)
            return self._add(FloatLayer(node.name, self._names(node), node.target, *geometry, module.bias is not None))
        normed = isinstance(module, ReproducibleBatchNorm) and module.running_var is not None
        if (normed or isinstance(module, AffineModule)) and alone:
            return self._add(Affine(node.name, self._names(node), node.target))
        limits = rectified_range(node, self.modules)
        if limits is not None and self._is_value(node.all_input_nodes[0]):
            low, high = limits
            name = self._names_of(node.all_input_nodes)
            return self._add(Clamp(node.name, name, low, None if high == math.inf else high))
        step = self._interpreted(node, module)
        if isinstance(step, fx.Node):  # the identity
            return self.values[step]
        return self._add(step) if step is not None else self._function(node, module)

    def _add(self, step: Step) -> "_Value":
        self.steps.append(step)
        return _Value(step.name)

    def _layer(self, node: fx.Node, layer: QuantLayer | IntegerLayer) -> "_Value":
        quantized = layer.input_levels if isinstance(layer, IntegerLayer) else layer.input_quantizer
        inputs = self._names(node)
        if quantized is not None:
            inputs = (self._add(Encode(self._new(f"{node.name}_codes"), inputs, node.target)),)
        return self._add(Product(node.name, inputs, node.target))

    def _constant(self, tensor: str) -> str:
        if tensor not in self.constants:
            layer, _, key = tensor.rpartition(".")
            if isinstance(self.modules.get(layer), (QuantLayer, IntegerLayer)) and key == "weight":
                stored = f"{layer}.float_weight"
            else:
                stored = tensor
            self.constants[tensor] = self._add(Constant(self._new(tensor.replace(".", "_")), (), stored))
        return self.constants[tensor]

    def _new(self, name: str) -> str:
        base, count = name, 0
        while name in self.names:
            count += 1
            name = f"{base}_{count}"
        self.names.add(name)
        return name

    def _is_value(self, argument: object) -> bool:
        return isinstance(argument, fx.Node) and isinstance(self.values[argument], _Value)

    def _names(self, node: fx.Node) -> tuple[str, ...]:
        return self._names_of(node.all_input_nodes)

    def _names_of(self, nodes: Sequence[fx.Node]) -> tuple[str, ...]:
        return tuple(str(self.values[n]) for n in nodes)

    def _arguments(self, args: tuple, kwargs: dict) -> tuple[tuple[str, ...], list]:
        """(names of the inputs, arguments as JSON). Raises: ValueError: they cannot be written."""

        def known(value: object) -> object:
            return self.values[value] if isinstance(value, fx.Node) else value

        args, kwargs = fx.node.map_aggregate((args, dict(kwargs)), known)
        names = tuple(dict.fromkeys(str(x) for x in inputs_of((args, kwargs)) if isinstance(x, _Value)))
        number = {name: i for i, name in enumerate(names)}
        refer = lambda x: number[str(x)] if isinstance(x, _Value) else None  # noqa: E731
        return names, [[encode(x, refer) for x in args], {key: encode(x, refer) for key, x in kwargs.items()}]

    def _foreign(self, node: fx.Node, calls: str) -> "_Value":
        """`calls`: a function; of a module, what there is to say besides its type."""
        module, settings = "", {}
        if node.op == "call_module":
            name, settings = describe_module(self.modules[node.target])
            calls, module = f"{name} {node.target}{calls}", node.target
        try:
            inputs, arguments = self._arguments(node.args, node.kwargs)
        except ValueError:  # of which nothing more can be said
            inputs, arguments = self._names_of([n for n in node.all_input_nodes if self._is_value(n)]), [[], {}]
            module = ""
        return self._add(Foreign(node.name, inputs, calls, module, settings, arguments))

    def _function(self, node: fx.Node, module: nn.Module | None) -> "_Value":
        """A step that calls one of `FUNCTIONS`; foreign if there is none."""
        name, args, kwargs = function_of(node), node.args, dict(node.kwargs)
        if module is not None:
            known = MODULES.get(type(module))
            if known is None:
                return self._foreign(node, "")
            name, attributes = known
            kwargs |= {key: getattr(module, attribute) for key, attribute in attributes.items()}
            for key, value in kwargs.items():
                if isinstance(value, Tensor):
                    kwargs[key] = _Value(self._constant(f"{node.target}.{attributes[key]}"))
        elif name is not None:
            if name.startswith("attribute."):
                args = args[:1]
            elif inspect.isfunction(FUNCTIONS[name]) and "inplace" in (known := inspect.signature(FUNCTIONS[name]).parameters):
                args, kwargs = (), dict(zip(known, args)) | kwargs | {"inplace": False}
        try:
            if name is None:
                raise ValueError("no function that a program knows")
            inputs, arguments = self._arguments(args, kwargs)
        except ValueError as error:
            called = torch_name(node) or getattr(node.target, "__name__", str(node.target))
            return self._foreign(node, f"{called} ({error})")
        return self._add(Function(node.name, inputs, name, arguments))

    def _interpreted(self, node: fx.Node, module: nn.Module | None) -> Step | fx.Node | None:
        """A step of its own kind, or the node that `node` gives back; None for anything else."""
        first = node.args[0] if node.args else node.kwargs.get("input")
        if isinstance(module, (AverageModule, *AVERAGE_POOLS)):
            return self._average(node, module)
        if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and not module.return_indices:
            return self._max_pool(node, vars(module), dims=_dims(module))
        if isinstance(module, (*DROPOUT_MODULES, nn.Identity)):
            return first
        if isinstance(module, nn.Flatten):
            return Flatten(node.name, self._names(node)) if (module.start_dim, module.end_dim) == (1, -1) else None
        name = torch_name(node)
        if not self._is_value(first) and name not in ("cat", "concat"):
            return None
        if name in ("add", "iadd", "add_"):
            plain = len(node.args) == 2 and not node.kwargs and all(self._is_tensor(arg) for arg in node.args)
            return Add(node.name, self._names_of(node.args)) if plain else None
        if name in ("cat", "concat") and node.args and all(map(self._is_value, node.args[0])):
            dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
            return Concatenate(node.name, self._names_of(node.args[0]), dim) if isinstance(dim, int) else None
        if name == "flatten" and (*node.args[1:], *node.kwargs.values()) in ((1,), (1, -1)):
            return Flatten(node.name, self._names(node))
        if name in DROPOUTS:
            position = 3 if name == "stochastic_depth" else 2
            training = node.kwargs.get("training", node.args[position] if len(node.args) > position else True)
            training = self.values[training] if isinstance(training, fx.Node) else training
            return first if training is False else None
        if name in ("contiguous", "detach", "clone") and len(node.args) == 1 and not node.kwargs:
            return first
        if name is not None and name.rstrip("123d") == "max_pool":
            arguments = dict(zip(MAX_POOL_ARGUMENTS, node.args)) | node.kwargs
            if not arguments.get("return_indices"):
                return self._max_pool(node, arguments, dims=int(name[-2]))
        return None

    def _is_tensor(self, argument: object) -> bool:
        return self._is_value(argument) and argument.meta.get("type", Tensor) in (Tensor, None)

    def _max_pool(self, node: fx.Node, settings: dict, dims: int) -> MaxPool | None:
        dilation = _per_dim(settings.get("dilation", 1), dims)
        return _checked(MaxPool(node.name, self._names(node), *_window(settings, dims), dilation))

    def _average(self, node: fx.Node, average: nn.Module) -> Step | None:
        inputs = self._names_of(node.all_input_nodes[:1])
        if isinstance(average, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
            return _adaptive(node.name, inputs, average.output_size, _dims(average))
        if isinstance(average, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
            return _average_pool(node.name, inputs, vars(average), _dims(average))
        name, rest = average.function.__name__, node.args[1:]
        if name.startswith("adaptive_avg_pool") and len(rest) == 1 and not node.kwargs:
            return _adaptive(node.name, inputs, rest[0], int(name[-2]))
        if name.startswith("avg_pool"):
            settings = dict(zip(AVERAGE_POOL_ARGUMENTS, rest)) | node.kwargs
            return _average_pool(node.name, inputs, settings, int(name[-2]))
        if name == "mean":
            dims = node.kwargs.get("dim", rest[0] if rest else None)
            keepdim = node.kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
            dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
            return _checked(Average(node.name, inputs, dims, keepdim)) if dims else None
        return None


class _Value(str):
    """The name of a value of the program."""


def function_of(node: fx.Node) -> str | None:
    """The key of FUNCTIONS that a node calls; None for any other."""
    if node.op == "call_method":
        name = f"Tensor.{node.target.rstrip('_')}"
        return name if name in FUNCTIONS else None
    if node.target is getattr:
        name = f"attribute.{node.args[1]}"
        return name if name in FUNCTIONS else None
    if node.op != "call_function" or id(node.target) in _NAMES:
        return _NAMES.get(id(node.target))
    called = node.target.__name__
    if node.target in (setitem, operator.setitem):
        return "setitem"
    for prefix, owner in (("torch", torch), ("functional", nn.functional), ("operator", operator)):
        if getattr(owner, called, None) is node.target:  # in place
            name = f"{prefix}.{called[1:] if prefix == 'operator' else called.rstrip('_')}"
            return name if name in FUNCTIONS else None
    return None


_NAMES = {id(function): name for name, function in FUNCTIONS.items()}


def _checked(step: Step) -> Step | None:
    """A step whose settings are numbers; None if one is computed by the network."""
    plain = all(not isinstance(x, fx.Node) for value in vars(step).values() for x in inputs_of(value))
    return step if plain else None


def _dims(module: nn.Module) -> int:
    return int(type(module).__name__[-2])


def _per_dim(value: object, dims: int) -> tuple:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def _window(settings: dict, dims: int) -> tuple:
    """(kernel, stride, padding, ceil_mode) of a pooling module or function."""
    kernel, stride = _per_dim(settings["kernel_size"], dims), settings.get("stride")
    stride = kernel if stride is None or stride == [] else _per_dim(stride, dims)
    return kernel, stride, _per_dim(settings.get("padding", 0), dims), bool(settings.get("ceil_mode", False))


def _average_pool(name: str, inputs: tuple[str, ...], settings: dict, dims: int) -> Step | None:
    if settings.get("divisor_override") is not None:
        return None
    count = bool(settings.get("count_include_pad", True))
    return _checked(AveragePool(name, inputs, *_window(settings, dims), count))


def _adaptive(name: str, inputs: tuple[str, ...], output: object, dims: int) -> Step | None:
    output = _per_dim(output, dims)
    if output == (1,) * dims:
        return Average(name, inputs, tuple(range(-dims, 0)), True)
    return _checked(AdaptiveAverage(name, inputs, output))


def describe_module(module: nn.Module) -> tuple[str, dict]:
    """Its type and its settings, as JSON; of one that tracing kept whole, the types of the modules inside too."""
    plain = (bool, int, float, str, tuple, type(None))
    changing = _assigned_by_forward(type(module)) | {"training"}
    settings = {k: v for k, v in vars(module).items() if k[0] != "_" and k not in changing and type(v) in plain}
    # JSON has no infinity.
    settings = {k: str(v) if v in (math.inf, -math.inf) else v for k, v in settings.items()}
    if isinstance(module, (QuantLayer, IntegerLayer)):
        return layer_type(module), {}
    inside = dict(_inner_types(module, ""))
    described = settings | ({"modules": inside} if inside else {})
    return _type_name(module), json.loads(json.dumps(described, default=str))  # as it will be read: lists for tuples


@functools.cache
def _assigned_by_forward(cls: type[nn.Module]) -> frozenset[str]:
    """The attributes that its forward, or a function that this calls, assigns: how often it ran, not what it is."""
    reached, assigned, waiting = {"forward"}, set(), [cls.forward]
    for function in waiting:
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            continue
        assigned.update(i.argval for i in get_instructions(function.__code__) if i.opname == "STORE_ATTR")
        for name in function.__code__.co_names:
            own = None if hasattr(nn.Module, name) else getattr(cls, name, None)
            if name not in reached:
                reached.add(name)
                waiting.append(own or function.__globals__.get(name))
    return frozenset(assigned)


def _inner_types(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    for name, child in module.named_children():
        is_layer = isinstance(child, (QuantLayer, IntegerLayer)) or float_type_of(child) is not None
        yield f"{path}{name}", layer_type(child) if is_layer else _type_name(child)
        if not is_layer:
            yield from _inner_types(child, f"{path}{name}.")


def layer_type(layer: nn.Module) -> str:
    """What a layer is called as a float one."""
    kind = layer.kind if isinstance(layer, (QuantLayer, IntegerLayer)) else kind_of(layer)
    return f"F.{layer.function}" if isinstance(layer, FunctionalLayer) else kind


def _type_name(module: nn.Module) -> str:
    return (BATCH_NORMS if isinstance(module, BATCH_NORMS) else type(module)).__name__  # synchronized ones compute the same


def require_same_program(stored: dict, found: dict, path: str | os.PathLike) -> None:
    """Raises: ApotfxError: the program of a model is not that of the export at `path`; both as JSON."""
    ends = [{"step": "output", "name": "output", "outputs": p["outputs"], "results": p["results"]} for p in (stored, found)]
    for a, b in zip_longest([*stored["steps"], ends[0]], [*found["steps"], ends[1]], fillvalue={"name": "the end"}):
        # Settings are compared where both have them: versions of torch may add some.
        settings = [d.get("settings", {}) for d in (a, b)]
        shared = settings[0].keys() & settings[1].keys()
        plain = [{key: value for key, value in d.items() if key != "settings"} for d in (a, b)]
        if plain[0] != plain[1] or any(settings[0][key] != settings[1][key] for key in shared):
            here, there = (f"{d['name']} ({d.get('calls', d.get('function', d.get('step', '-')))})" for d in (a, b))
            raise ApotfxError(
                f"export {path}: its network has {here} where the model has {there}, or with other settings; pass the "
                "float model that was exported"
            )
