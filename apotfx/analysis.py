"""Facts about a traced graph: which layers there are, the sign of their inputs, what stands around them."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx, nn

from .layers import QUANT_LAYERS

BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, synchronized or not
FUNCTIONAL_LAYERS = {"linear"} | {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}

# Modules, functions and methods of torch and torchvision by what they do to the sign of their input.
NON_NEGATIVE_MODULES = (nn.ReLU, nn.ReLU6, nn.Sigmoid, nn.Hardsigmoid, nn.Softmax, nn.Softmax2d, nn.Softplus)
PRESERVING_MODULES = (
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d,
    nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d,
    nn.Flatten, nn.Unflatten, nn.Identity, nn.ChannelShuffle, nn.PixelShuffle, nn.PixelUnshuffle, nn.ZeroPad2d,
)  # fmt: skip
NON_NEGATIVE_FUNCTIONS = {
    "relu", "relu_", "relu6", "sigmoid", "hardsigmoid", "softmax", "softplus", "abs", "square", "exp",
}  # fmt: skip
PRESERVING_FUNCTIONS = {
    "max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d",
    "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d",
    "dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth", "channel_shuffle", "pixel_shuffle",
    "flatten", "unflatten", "reshape", "view", "permute", "transpose", "squeeze", "unsqueeze", "expand", "repeat",
    "contiguous", "clone", "detach", "to", "float", "roll", "flip", "getitem", "chunk", "split", "unbind",
    "mean", "sum", "amax", "sqrt",
}  # fmt: skip
IN_PLACE_OPERATORS = {"iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}
COMBINING_FUNCTIONS = {
    "add", "add_", "iadd", "mul", "mul_", "imul", "truediv", "div", "matmul", "bmm", "maximum",
}  # fmt: skip


@dataclass(frozen=True)
class LayerFacts:
    """What the graph says of one conv or linear layer.

    Attributes:
        name: qualified module name, or the node's name for a functional call.
        type: type of the module, such as "Conv2d", or the name of the function.
        signed_input: whether its input can be negative.
        is_first: no other layer comes before it.
        is_last: no other layer comes after it.
        feeds_batch_norm: its only consumer is a batch norm.
        obstacle: why it cannot be quantized; None if it can.
    """

    name: str
    type: str
    signed_input: bool
    is_first: bool
    is_last: bool
    feeds_batch_norm: bool
    obstacle: str | None


def analyze(root: nn.Module, graph: fx.Graph) -> list[LayerFacts]:
    """Facts on every conv and linear layer of `root`, whose traced graph is `graph`, in order of execution.

    A layer that the graph never calls, as it lies inside a module or function that tracing keeps whole, comes last,
    with an obstacle. A module called several times is described by all its calls together.
    """
    modules = dict(root.named_modules())
    calls: dict[tuple[str, str], list[fx.Node]] = {}  # a functional call may bear the name of a module
    for node in graph.nodes:
        if name := _layer_name(node, modules):
            calls.setdefault((node.op, name), []).append(node)

    layer_nodes = {node for nodes in calls.values() for node in nodes}
    after_layer = _reached(graph.nodes, layer_nodes, lambda node: node.all_input_nodes)
    before_layer = _reached(reversed(graph.nodes), layer_nodes, lambda node: node.users)
    non_negative = non_negative_nodes(graph, modules)

    facts = [
        LayerFacts(
            name=name,
            type=_type_name(nodes[0], modules),
            signed_input=not all(non_negative[node.all_input_nodes[0]] for node in nodes),
            is_first=any(node not in after_layer for node in nodes),
            is_last=any(node not in before_layer for node in nodes),
            feeds_batch_norm=all(_feeds_batch_norm(node, modules) for node in nodes),
            obstacle=_obstacle(nodes[0], modules),
        )
        for (_, name), nodes in calls.items()
    ]
    return facts + [
        LayerFacts(name, type(module).__name__, True, False, False, False, _hiding_place(name, modules, graph))
        for name, module in modules.items()
        if is_layer(module) and ("call_module", name) not in calls
    ]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution (also a transposed one) or a linear layer, or of a type derived from one."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear))


def _layer_name(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_module" and is_layer(modules[node.target]):
        return node.target
    return node.name if node.op == "call_function" and torch_name(node) in FUNCTIONAL_LAYERS else None


def _type_name(node: fx.Node, modules: dict[str, nn.Module]) -> str:
    return type(modules[node.target]).__name__ if node.op == "call_module" else f"F.{torch_name(node)}"


def _obstacle(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    if node.op == "call_function":
        return "a functional call; use the module instead"
    module = modules[node.target]
    if type(module) not in QUANT_LAYERS:
        supported = ", ".join(t.__name__ for t in QUANT_LAYERS)
        return f"{type(module).__name__} is not one of {supported}"
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is not a parameter of its own"
    return None


def _hiding_place(name: str, modules: dict[str, nn.Module], graph: fx.Graph) -> str:
    leaves = {node.target for node in graph.nodes if node.op == "call_module"}
    path = name.split(".")
    for depth in range(len(path) - 1, 0, -1):
        parent = ".".join(path[:depth])
        if parent in leaves:
            return f"inside {parent} ({type(modules[parent]).__name__}), which tracing keeps whole"
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == f"{name}.weight":
            users = ", ".join(sorted({torch_name(user) or str(user.target) for user in node.users}))
            return f"never called; its weight is passed to {users}"
    return "never called by the model's forward"


def _reached(nodes: Iterator[fx.Node], sources: set[fx.Node], neighbours) -> set[fx.Node]:
    """The nodes that a path leads to from one of `sources`; `nodes` are in the direction of the paths."""
    reached = set()
    for node in nodes:
        if any(n in sources or n in reached for n in neighbours(node)):
            reached.add(node)
    return reached


def _feeds_batch_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    return batch_norm_after(node, modules) is not None


def batch_norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the batch norm that is the only consumer of `node`, if there is one."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user.target if user.op == "call_module" and isinstance(modules[user.target], BATCH_NORMS) else None


def non_negative_nodes(graph: fx.Graph, modules: dict[str, nn.Module]) -> dict[fx.Node, bool]:
    """For every node whether its value is known to be at least 0. What is not known counts as signed."""
    facts: dict[fx.Node, bool] = {}
    for node in graph.nodes:
        facts[node] = _is_non_negative(node, modules, facts)
        # What works in place also changes what later readers of its first operand see.
        name = torch_name(node) or ""
        if (name in IN_PLACE_OPERATORS or name.endswith("_")) and node.args and isinstance(node.args[0], fx.Node):
            facts[node.args[0]] &= facts[node]
    return facts


def _is_non_negative(node: fx.Node, modules: dict[str, nn.Module], facts: dict[fx.Node, bool]) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val >= 0
        if isinstance(module, NON_NEGATIVE_MODULES):
            return True
        return isinstance(module, PRESERVING_MODULES) and facts[node.all_input_nodes[0]]
    name = torch_name(node)
    if name in NON_NEGATIVE_FUNCTIONS:
        return True
    if name in PRESERVING_FUNCTIONS:
        return bool(node.all_input_nodes) and facts[node.all_input_nodes[0]]
    if name in ("clamp", "clamp_min"):
        low, high = (node.kwargs.get(key, (*node.args, None, None)[i]) for i, key in ((1, "min"), (2, "max")))
        above = _is_at_least_0(low, facts) or low is None and facts[node.all_input_nodes[0]]
        return above and (high is None or _is_at_least_0(high, facts))
    if name in ("cat", "concat", "stack"):
        return all(facts[x] for x in node.all_input_nodes)
    if name in COMBINING_FUNCTIONS:
        return all(_is_at_least_0(x, facts) for x in (*node.args, *node.kwargs.values()))
    return False


def rectified_range(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    """The range (low, high) that `node` clamps its only input to, if it is an activation function that starts at 0."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module = modules[node.target]
        if has_hooks(module):
            return None
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return (0.0, float(module.max_val)) if module.min_val == 0 else None
        return (0.0, math.inf) if type(module) is nn.ReLU else None
    return {"relu": (0.0, math.inf), "relu_": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(torch_name(node))


def has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def is_read_once(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether the value of `node` has a single reader and memory that nothing else reads or writes.

    Known of the results of layers, batch norms and additions; views, for example, share their memory.
    """
    if len(node.users) != 1:
        return False
    if node.op == "call_module":
        return is_layer(modules[node.target]) or isinstance(modules[node.target], BATCH_NORMS)
    name = torch_name(node)
    if name == "iadd":
        return isinstance(node.args[0], fx.Node) and is_read_once(node.args[0], modules)
    return name == "add"


def _is_at_least_0(x: object, facts: dict[fx.Node, bool]) -> bool:
    return facts[x] if isinstance(x, fx.Node) else isinstance(x, (int, float)) and x >= 0


def torch_name(node: fx.Node) -> str | None:
    """The name of the torch function or tensor method that a node calls; None for anything else."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return None
    origin = getattr(node.target, "__module__", None) or "torch"
    is_torch = origin.split(".")[0] in ("torch", "torchvision", "_operator")
    return node.target.__name__.removeprefix("boolean_dispatch_") if is_torch else None
