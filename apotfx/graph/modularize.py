"""Functional calls of layers and of batch norms as modules, so that whatever can be quantized is a module."""

import inspect
from collections.abc import Iterable

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from apotfx.graph.facts import FUNCTIONAL_LAYERS, constant_nodes
from apotfx.graph.operations import torch_name
from apotfx.graph.tracing import ByMode, new_name, owner
from apotfx.layers import FunctionalLayer
from apotfx.modules import attribute
from apotfx.reproducible import BATCH_NORMS, AttachedBatchNorm

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PRODUCT_ARGUMENTS = {"matmul": ("input", "other"), "mm": ("input", "mat2"), "addmm": ("input", "mat1", "mat2")}
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def norms_as_modules(graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
    """Make calls of `F.batch_norm` with the state of a batch norm calls of an `AttachedBatchNorm` to it; edits both."""
    for node in list(graph.nodes):
        if torch_name(node) != "batch_norm" or node.op != "call_function" or not inspect.isfunction(node.target):
            continue
        call = inspect.signature(F.batch_norm).bind(*node.args, **node.kwargs)
        call.apply_defaults()
        given = call.arguments
        paths = {key: getattr(given[key], "target", None) for key in ("running_mean", "running_var", "weight", "bias")}
        path = str(paths["running_mean"]).rpartition(".")[0]
        norm = modules.get(path)
        if not path or not isinstance(norm, tuple(BATCH_NORMS)):
            continue
        own = {key: f"{path}.{key}" if getattr(norm, key) is not None else None for key in paths}
        training = given["training"]
        if isinstance(training, fx.Node) and isinstance(by_mode := modules.get(training.target), ByMode):
            training = by_mode.in_training if not by_mode.in_evaluation else None
        # In training the settings matter too; in evaluation only what is the norm's own.
        settings = given["eps"] == norm.eps and (training is False or given["momentum"] == norm.momentum)
        if paths != own or type(training) is not bool or not settings or isinstance(given["training"], bool) and training:
            continue
        name = new_name(modules, path, "batch_norm")
        counts = f"{path}.num_batches_tracked" in node.meta["counted"]
        modules[name] = AttachedBatchNorm.to(norm, frozen=not training, counts=counts)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_module(name, (given["input"],)))
        graph.erase_node(node)
        for unread in [x for x in graph.nodes if x.op == "get_attr" and x.target in own.values() and not x.users]:
            graph.erase_node(unread)


class Computed:
    """A tensor that is computed from the tensors of a module alone, as they are when it is called.

    Attributes:
        sources: the paths of the tensors.
    """

    def __init__(self, model: nn.Module, node: fx.Node):
        self.model = model
        order: dict[fx.Node, int] = {}
        self.steps: list[tuple] = []

        def add(node: fx.Node) -> None:
            for argument in node.all_input_nodes:
                if argument not in order:
                    add(argument)
            arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: _Step(order[n]))
            self.steps.append((node.op, node.target, *arguments))
            order[node] = len(order)

        add(node)
        self.sources = [target for op, target, *_ in self.steps if op == "get_attr"]

    def __call__(self) -> Tensor:
        if len(self.steps) == 1 and self.sources:
            return attribute(self.model, self.sources[0])
        values: list = []
        for op, target, *arguments in self.steps:
            args, kwargs = fx.node.map_aggregate(
                tuple(arguments), lambda a: values[a.index] if isinstance(a, _Step) else a
            )
            if op == "get_attr":
                values.append(attribute(self.model, target))
            elif op == "call_method":
                values.append(getattr(args[0], target)(*args[1:], **kwargs))
            else:
                function = self.model.get_submodule(target) if op == "call_module" else target
                values.append(function(*args, **kwargs))
        return values[-1]

    @property
    def tensors(self) -> list[Tensor]:
        """What it is computed from."""
        return [attribute(self.model, path) for path in self.sources]


class _Step:
    """A reference to the value of an earlier step."""

    def __init__(self, index: int):
        self.index = index


def layers_as_modules(model: nn.Module) -> None:
    """Make every functional call in a Network that is a layer a call of a `FunctionalLayer`, in place.

    Such are `F.linear`, `F.conv1d` ... `F.conv_transpose3d`, and `torch.matmul`, `torch.mm`, `@` and `torch.addmm` with a
    matrix; the weight is a parameter, or computed from parameters alone.
    """
    graph, modules = model.graph, dict(model.named_modules())
    constants = _Constants(model.original, constant_nodes(graph, modules))
    edited = False
    for node in list(graph.nodes):
        node = _as_linear(node, constants)
        settings = _layer_settings(node, constants)
        if settings is None:
            continue
        x, weight, bias = (settings.pop(key, None) for key in ("input", "weight", "bias"))
        name = new_name(modules, owner(node), torch_name(node))
        made_of = [None if tensor is None else Computed(model.original, tensor) for tensor in (weight, bias)]
        layer = modules[name] = FunctionalLayer(torch_name(node), *made_of, **settings).train(model.training)
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent).add_module(key, layer)
        with graph.inserting_before(node):
            call = graph.call_module(name, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        edited = True
    if edited:
        for node in reversed(list(constant_nodes(graph, modules))):
            if not node.users:
                graph.erase_node(node)
        model.recompile()


class _Constants(dict):
    """What the nodes that do not depend on the network's inputs compute, each when it is asked for."""

    def __init__(self, model: nn.Module, nodes: Iterable[fx.Node]):
        self.model, self.nodes = model, set(nodes)

    def __contains__(self, node: object) -> bool:
        return node in self.nodes

    def __missing__(self, node: fx.Node) -> object:
        with torch.no_grad():
            self[node] = Computed(self.model, node)()
        return self[node]

    def get(self, node: object, default: object = None) -> object:
        return self[node] if node in self else default


def _as_linear(node: fx.Node, constants: _Constants) -> fx.Node:
    """`F.linear` in the place of a product with a constant matrix; any other node is returned as it is."""
    names = PRODUCT_ARGUMENTS.get(torch_name(node), ())
    operands = dict(zip(names, node.args)) | node.kwargs
    if not names or operands.keys() != set(names):
        return node
    *bias, x, weight = (operands[name] for name in names)
    left = not bias and x in constants
    if left:
        x, weight = weight, x
    if not isinstance(x, fx.Node) or x in constants or not _is_weight(constants.get(weight), 2):
        return node
    if bias and bias[0] not in constants:
        return node
    graph = node.graph
    with graph.inserting_before(node):
        if left:  # W x = (x^T W^T)^T
            result = linear = graph.call_function(F.linear, (graph.call_function(exchange_last_two, (x,)), weight))
        else:
            transposed = graph.call_function(torch.t, (weight,))
            constants.nodes.add(transposed)
            result = linear = graph.call_function(F.linear, (x, transposed, *bias))
        linear.meta = dict(node.meta)
        if left:
            result = graph.call_function(exchange_last_two, (result,))
            result.meta["is_wrapped"] = linear.args[0].meta["is_wrapped"] = True
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return linear


def exchange_last_two(x: Tensor) -> Tensor:
    """x with its last two dimensions exchanged; a vector as it is."""
    return x.mT if x.dim() > 1 else x


def _layer_settings(node: fx.Node, constants: _Constants) -> dict | None:
    """The arguments by name of a call of F.linear or F.conv*, if its weight, bias and settings are constant."""
    name = torch_name(node)
    if node.op != "call_function" or name not in FUNCTIONAL_LAYERS:
        return None
    names = CONVOLUTION[:3] if name == "linear" else TRANSPOSED if "transpose" in name else CONVOLUTION
    settings = dict(zip(names, node.args)) | node.kwargs
    weight, bias = (constants.get(settings.get(key)) for key in ("weight", "bias"))
    constant = _is_weight(weight, 2 if name == "linear" else 2 + int(name[-2]))
    constant &= settings.get("bias") is None or _is_weight(bias, 1)
    found: list[fx.Node] = []
    fx.node.map_arg([settings[key] for key in settings if key not in CONVOLUTION[:3]], found.append)
    x = settings.get("input")
    return settings if constant and not found and isinstance(x, fx.Node) and x not in constants else None


def _is_weight(value: object, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims and value.is_floating_point()
