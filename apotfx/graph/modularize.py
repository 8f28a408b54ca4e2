"""Functional calls of layers as modules, so that whatever can be quantized is a module."""

import copy
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from apotfx.graph.facts import FUNCTIONAL_LAYERS, constant_nodes, torch_name
from apotfx.layers import FunctionalLayer
from apotfx.modules import attribute
from apotfx.graph.tracing import graph_of

CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
PRODUCT_ARGUMENTS = {"matmul": ("input", "other"), "mm": ("input", "mat2"), "addmm": ("input", "mat1", "mat2")}
TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


def layers_as_modules(model: nn.Module) -> dict[str, FunctionalLayer]:
    """Make every functional call that is a layer a call of a `FunctionalLayer`, in place; returns them by name.

    Such are `F.linear`, `F.conv1d` ... `F.conv_transpose3d`, and `torch.matmul`, `torch.mm`, `@` and `torch.addmm` with a
    matrix; the weight is a parameter, or computed from parameters alone.
    """
    graph, constants, layers = graph_of(model), constant_values(model), {}
    for node in list(graph.nodes):
        node = _as_linear(node, constants)
        settings = _layer_settings(node, constants)
        if settings is None:
            continue
        x, weight, bias = (settings.pop(key, None) for key in ("input", "weight", "bias"))
        name = _new_name(model, node)
        layers[name] = FunctionalLayer(torch_name(node), constants[weight].shape, **settings).train(model.training)
        model.add_submodule(name, layers[name])
        with graph.inserting_before(node):
            call = graph.call_module(name, (x, weight) if bias is None else (x, weight, bias))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    if layers:
        model.recompile()
    return layers


def constant_values(model: nn.Module) -> dict[fx.Node, object]:
    """What the nodes of the graph that do not depend on the network's inputs compute in evaluation."""
    modules, values = dict(model.named_modules()), {}
    modes = {module: module.training for module in modules.values()}
    model.eval()
    try:
        with torch.no_grad():
            for node in constant_nodes(graph_of(model), modules):
                args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), values.__getitem__)
                if node.op == "get_attr":
                    values[node] = attribute(model, node.target)
                elif node.op == "call_method":
                    values[node] = getattr(args[0], node.target)(*args[1:], **kwargs)
                else:
                    function = modules[node.target] if node.op == "call_module" else node.target
                    values[node] = function(*args, **kwargs)
    finally:
        for module, training in modes.items():
            module.training = training
    return values


def _as_linear(node: fx.Node, constants: dict[fx.Node, Tensor]) -> fx.Node:
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
    graph = node.graph
    with graph.inserting_before(node):
        if left:  # W x = (x^T W^T)^T
            result = graph.call_function(F.linear, (graph.call_function(exchange_last_two, (x,)), weight))
        else:
            transposed = graph.call_function(torch.t, (weight,))
            constants[transposed] = constants[weight].t()
            result = graph.call_function(F.linear, (x, transposed, *bias))
        linear = result
        linear.meta = dict(node.meta)
        if left:
            result = graph.call_function(exchange_last_two, (result,))
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return linear


def exchange_last_two(x: Tensor) -> Tensor:
    """x with its last two dimensions exchanged; a vector as it is."""
    return x.mT if x.dim() > 1 else x


def _layer_settings(node: fx.Node, constants: dict[fx.Node, Tensor]) -> dict | None:
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
    return settings if constant and not found and isinstance(settings["input"], fx.Node) else None


def _is_weight(value: object, dims: int) -> bool:
    return isinstance(value, Tensor) and value.dim() == dims and value.is_floating_point()


def _new_name(model: fx.GraphModule, node: fx.Node) -> str:
    """The module whose code makes the call, the function, and a number if the name is taken."""
    scope = [path for path, _ in node.meta.get("nn_module_stack", {}).values()][-1:]
    name = first = ".".join([*filter(None, scope), torch_name(node)])
    count = 0
    while _exists(model, name):
        count += 1
        name = f"{first}_{count}"
    return name


def _exists(model: nn.Module, path: str) -> bool:
    try:
        attribute(model, path)
    except AttributeError:
        return False
    return True


def functional_arguments(model: nn.Module) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(weight, bias) of every functional layer of `model`, by name, as they are in evaluation."""
    calls = functional_calls(model)
    values = constant_values(model) if calls else {}
    return {
        name: (values[call.args[1]], values[call.args[2]] if len(call.args) > 2 else None)
        for name, call in calls.items()
    }


def layer_parameters(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """(weight, bias) of each of `layers` of `model`, by name, as they are in evaluation."""
    arguments = functional_arguments(model)
    return {name: arguments[name] if name in arguments else (m.weight, m.bias) for name, m in layers.items()}


def functional_calls(model: nn.Module) -> dict[str, fx.Node]:
    """The node that calls each functional layer of `model`, by name."""
    modules = dict(model.named_modules())
    calls = (node for node in graph_of(model).nodes if node.op == "call_module")
    return {node.target: node for node in calls if isinstance(modules[node.target], FunctionalLayer)}


def without_arguments(model: nn.Module, names: Collection[str]) -> nn.Module:
    """`model` without the weights and biases that the functional layers `names` are called with.

    What computes them and nothing else goes too, with its parameters. The modules are shared.
    """
    if not names:
        return model
    graph, modules = copy.deepcopy(model.graph), dict(model.named_modules())
    for node in graph.nodes:
        if node.op == "call_module" and node.target in names:
            node.args = node.args[:1]
    for node in reversed(list(constant_nodes(graph, modules))):
        if not node.users:
            graph.erase_node(node)
    smaller = fx.GraphModule(model, graph, type(model).__name__)
    smaller.meta = model.meta
    for name, module in smaller.named_modules():
        module.training = modules.get(name, module).training  # torch.fx makes containers anew
    return smaller
