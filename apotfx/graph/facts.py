"""Facts about a traced graph: which layers there are, the sign of their inputs, what stands around them."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from apotfx.attention import obstacle as attention_obstacle
from apotfx.layers import FunctionalLayer, float_type_of, kind_of
from apotfx.modules import has_hooks
from apotfx.reproducible import Average
from apotfx.graph.tracing import ByMode
from apotfx.graph.operations import torch_name

BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, synchronized or not
FUNCTIONAL_LAYERS = {"linear"} | {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}
# What multiplies with weights besides them, and has no quantized version.
OTHER_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)
PRODUCTS = {"matmul", "mm", "mv", "bmm", "addmm", "baddbmm", "einsum", "tensordot", "bilinear"}

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
    "t", "swapaxes", "swapdims", "movedim", "moveaxis", "exchange_last_two",
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
        kind: what it computes, whatever it is called: "Conv1d" to "Conv3d", "ConvTranspose1d" to "ConvTranspose3d",
            "Linear"; "" for what cannot be quantized.
        depthwise: a convolution that reads a single input channel for every output channel.
        kernel_size: of a convolution; () for a linear layer.
        sign_reason: why `signed_input` is what it is.
        position_reason: why `is_first` and `is_last` are what they are.
    """

    name: str
    type: str
    signed_input: bool
    is_first: bool
    is_last: bool
    feeds_batch_norm: bool
    obstacle: str | None
    kind: str = ""
    depthwise: bool = False
    kernel_size: tuple[int, ...] = ()
    sign_reason: str = ""
    position_reason: str = ""


def analyze(root: nn.Module, graph: fx.Graph, leaves: Mapping[str, str] = {}) -> list[LayerFacts]:
    """Facts on every conv and linear layer of `root`, whose traced graph is `graph`, in order of execution.

    A layer inside a module that tracing keeps whole is listed where that is called; a layer that nothing calls comes
    last, with an obstacle. A module called several times is described by all its calls together.

    Args:
        graph: after `modularize.layers_as_modules`; empty for a model that could not be traced.
        leaves: per module that could not be traced why; "" for `root` itself.
    """
    modules = dict(root.named_modules())
    calls: dict[tuple[str, str], list[fx.Node]] = {}  # a functional call may bear the name of a module
    inside: dict[str, list[str]] = {}  # by leaf, the layers that it hides
    constants = set(constant_nodes(graph, modules))
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        if is_layer(module) or isinstance(module, OTHER_LAYERS):
            calls.setdefault((node.op, node.target), []).append(node)
        elif module is not None and (hidden := _hidden_layers(node.target, modules, leaves)):
            calls.setdefault((node.op, node.target), []).append(node)
            inside[node.target] = hidden
        elif node not in constants and _multiplies_weights(node, constants):
            calls[node.op, node.name] = [node]

    around = _Surroundings(graph, {node for nodes in calls.values() for node in nodes})
    non_negative = non_negative_nodes(graph, modules)
    facts = []
    for (op, name), nodes in calls.items():
        if op == "call_module" and name in inside:
            facts += _hidden_facts(inside[name], name, modules, leaves, *around.position(nodes))
        else:
            facts.append(_facts(name, nodes, modules, leaves, non_negative, *around.position(nodes)))
    if "" in leaves:
        inside[""] = _hidden_layers("", modules, leaves)
        guess = "there is no graph; in order of registration"
        facts += _hidden_facts(inside[""], "", modules, leaves, True, True, guess)
    known = {name for op, name in calls if op == "call_module"}.union(*inside.values())
    return facts + [
        LayerFacts(
            name,
            type(module).__name__,
            True,
            False,
            False,
            False,
            _read_by_attention(name, modules) or _uncalled(name, graph),
            _kind(module),
            sign_reason="nothing calls it",
        )
        for name, module in modules.items()
        if is_layer(module) and name not in known and not _is_in_function(name, constants, modules)
    ]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution (also a transposed one) or a linear layer, or of a type derived from one."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, FunctionalLayer))


def _multiplies_weights(node: fx.Node, constants: set[fx.Node]) -> bool:
    """Whether a function that stayed one is a layer, or a product with something that is no result of the network."""
    name = torch_name(node)
    return name in FUNCTIONAL_LAYERS or name in PRODUCTS and any(x in constants for x in node.all_input_nodes)


def _hidden_layers(leaf: str, modules: dict[str, nn.Module], leaves: Mapping[str, str]) -> list[str]:
    """What has weights inside the leaf: layers, and parameters that are matrices of modules that could not be traced."""
    hidden = []
    for name, module in modules[leaf].named_modules(prefix=leaf):
        if name == leaf or module is not modules.get(name):
            continue
        if is_layer(module) or isinstance(module, OTHER_LAYERS):
            hidden.append(name)
    covered = tuple(f"{name}." for name in hidden)
    for name, module in modules[leaf].named_modules(prefix=leaf) if leaf in leaves else ():
        if name not in hidden and not name.startswith(covered) and not type(module).__module__.startswith("torch.nn"):
            matrices = (
                key for key, parameter in module._parameters.items() if parameter is not None and parameter.dim() > 1
            )
            hidden += [f"{name}.{key}" if name else key for key in matrices]
    return hidden


def _facts(
    name: str,
    nodes: list[fx.Node],
    modules: dict[str, nn.Module],
    leaves: Mapping[str, str],
    non_negative: dict[fx.Node, bool],
    is_first: bool,
    is_last: bool,
    position_reason: str,
) -> LayerFacts:
    module = modules.get(name) if nodes[0].op == "call_module" else None
    inputs = [node.all_input_nodes[0] for node in nodes if node.all_input_nodes]
    hooked = module is not None and has_hooks(module)
    signed = [x for x in inputs if hooked or not non_negative[x]]
    obstacle = _obstacle(module, nodes[0])
    if obstacle and name in leaves:
        obstacle += f", and cannot be traced ({leaves[name]})"
    return LayerFacts(
        name=name,
        type=_type_name(module, nodes[0]),
        signed_input=bool(signed),
        is_first=is_first,
        is_last=is_last,
        feeds_batch_norm=all(_feeds_batch_norm(node, modules) for node in nodes),
        obstacle=obstacle,
        **_shape_facts(module),
        sign_reason="a hook may change it"
        if hooked
        else _sign_reason((signed or inputs)[0], modules, bool(signed))
        if inputs
        else "",
        position_reason=position_reason,
    )


def _hidden_facts(
    names: list[str],
    leaf: str,
    modules: dict[str, nn.Module],
    leaves: Mapping[str, str],
    is_first: bool,
    is_last: bool,
    reason: str,
) -> list[LayerFacts]:
    """Of the layers inside a leaf, whose inputs are not known; the first and the last of them stand at its ends."""
    where = f"inside {_leaf_name(leaf, modules, leaves)}"
    layers = [name for name in names if is_layer(modules.get(name, modules[leaf]))]
    first, last = (layers[0], layers[-1]) if layers else (None, None)
    return [
        LayerFacts(
            name=name,
            type=type(modules[name]).__name__ if name in modules else "Parameter",
            signed_input=True,
            is_first=is_first and name == first,
            is_last=is_last and name == last,
            feeds_batch_norm=False,
            obstacle=_hidden_obstacle(name, modules, where),
            **_shape_facts(modules.get(name)),
            sign_reason=f"not known {where}",
            position_reason=reason if is_first and name == first or is_last and name == last else "",
        )
        for name in names
    ]


def _leaf_name(leaf: str, modules: dict[str, nn.Module], leaves: Mapping[str, str]) -> str:
    reason = leaves.get(leaf)
    what = f"{leaf or 'the model'} ({type(modules[leaf]).__name__})"
    return f"{what}, which cannot be traced ({reason})" if reason else f"{what}, which tracing keeps whole"


def _read_by_attention(name: str, modules: dict[str, nn.Module]) -> str | None:
    parent = modules.get(name.rpartition(".")[0])
    if not isinstance(parent, nn.MultiheadAttention):
        return None
    return f"its weight is read by {type(parent).__name__} ({attention_obstacle(parent)})"


def _hidden_obstacle(name: str, modules: dict[str, nn.Module], where: str) -> str | None:
    module = modules.get(name)
    if module is None:
        return f"a parameter {where}"
    if reason := _read_by_attention(name, modules):
        return reason
    reason = _obstacle(module, None)
    return f"{reason}, {where}" if reason and float_type_of(module) is None else reason


def _type_name(module: nn.Module | None, node: fx.Node) -> str:
    if module is None:
        return f"{'F' if torch_name(node) in FUNCTIONAL_LAYERS else 'torch'}.{torch_name(node)}"
    return f"F.{module.function}" if isinstance(module, FunctionalLayer) else type(module).__name__


def _kind(module: nn.Module | None) -> str:
    return kind_of(module) if module is not None and float_type_of(module) is not None else ""


def _shape_facts(module: nn.Module | None) -> dict:
    """Of a layer that can be quantized: its kind, its kernel, whether it is depthwise."""
    kind = _kind(module)
    kernel = () if kind in ("", "Linear") else tuple(module.kernel_size)
    depthwise = bool(kernel) and module.groups > 1 and module.in_channels == module.groups
    return {"kind": kind, "kernel_size": kernel, "depthwise": depthwise}


def _obstacle(module: nn.Module | None, node: fx.Node | None) -> str | None:
    if module is None:
        if torch_name(node) in FUNCTIONAL_LAYERS:
            return "its weight, bias or settings are computed from the network's input, or have another shape than a layer's"
        return "a product with parameters that is no linear layer"
    if isinstance(module, nn.MultiheadAttention):
        return attention_obstacle(module)
    if isinstance(module, OTHER_LAYERS):
        return f"{type(module).__name__} has no quantized version"
    if float_type_of(module) is None:
        return f"{type(module).__name__} computes something of its own"
    if isinstance(module, FunctionalLayer):
        return None
    parametrized = "weight" in getattr(module, "parametrizations", ())
    if not parametrized and not isinstance(module._parameters.get("weight"), nn.Parameter):
        return (
            "its weight is not a parameter of its own, but set by a hook; use torch.nn.utils.parametrizations instead of "
            "torch.nn.utils.weight_norm"
        )
    if not module.weight.is_floating_point():
        return f"its weight is {str(module.weight.dtype).removeprefix('torch.')}, not a floating-point type"
    return None


def constant_nodes(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> Iterator[fx.Node]:
    """The nodes, in order, that do not depend on the network's inputs."""
    found = set()
    for node in graph.nodes:
        module = modules[node.target] if node.op == "call_module" else None
        pure = node.op in ("call_function", "call_method") and not _works_in_place(node) or isinstance(module, Average)
        computed = pure and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or isinstance(module, ByMode) or computed:
            found.add(node)
            yield node


def _is_in_function(name: str, constants: set[fx.Node], modules: dict[str, nn.Module]) -> bool:
    """Whether the weight of a module that is never called goes into a functional layer, which is listed instead."""
    reached = [node for node in constants if node.op == "get_attr" and node.target.startswith(f"{name}.")]
    for node in reached:
        for user in node.users:
            if user.op == "call_module" and isinstance(modules[user.target], FunctionalLayer):
                return node in user.args[1:]
        reached += [user for user in node.users if user in constants and user not in reached]
    return False


def _uncalled(name: str, graph: fx.Graph) -> str:
    for node in graph.nodes:
        if node.op == "get_attr" and node.target == f"{name}.weight":
            users = ", ".join(sorted({torch_name(user) or str(user.target) for user in node.users}))
            return f"never called; its weight is passed to {users}"
    return "never called by the model's forward"


class _Surroundings:
    """Which nodes of a graph come before and after its layers."""

    def __init__(self, graph: fx.Graph, layers: set[fx.Node]):
        ends = {op: {node for node in graph.nodes if node.op == op} for op in ("placeholder", "output")}
        self.after = _reached(graph.nodes, layers, lambda node: node.all_input_nodes)
        self.before = _reached(reversed(graph.nodes), layers, lambda node: node.users)
        self.fed = _reached(graph.nodes, ends["placeholder"], lambda node: node.all_input_nodes)
        self.used = _reached(reversed(graph.nodes), ends["output"], lambda node: node.users)

    def position(self, nodes: list[fx.Node]) -> tuple[bool, bool, str]:
        """(whether one of a layer's calls is first, whether one is last, why)."""
        first = any(node in self.fed and node not in self.after for node in nodes)
        last = any(node in self.used and node not in self.before for node in nodes)
        reasons = ["no layer before it"] * first + ["no layer after it"] * last
        if not reasons:
            before, after = self.after.get(nodes[0]), self.before.get(nodes[-1])
            reasons = [
                f"{where} {node.name}" for where, node in (("after", before), ("before", after)) if node is not None
            ]
        if not any(node in self.fed for node in nodes):
            reasons.append("no input of the network reaches it")
        return first, last, ", ".join(reasons)


def _reached(nodes: Iterator[fx.Node], sources: set[fx.Node], neighbours) -> dict[fx.Node, fx.Node]:
    """The nodes that a path leads to from one of `sources`, each with the nearest such source that was found.

    `nodes` are in the direction of the paths.
    """
    reached = {}
    for node in nodes:
        for n in neighbours(node):
            if n in sources or n in reached:
                reached[node] = n if n in sources else reached[n]
                break
    return reached


def _sign_reason(node: fx.Node, modules: dict[str, nn.Module], signed: bool) -> str:
    """Which operation decides the sign of `node`, found by going back over those that keep it."""
    while len(node.all_input_nodes) == 1 and _preserves_sign(node, modules):
        node = node.all_input_nodes[0]
    if node.op == "placeholder":
        return f"the network's input {node.name} can be negative"
    what = type(modules[node.target]).__name__ if node.op == "call_module" else torch_name(node)
    return f"{node.name} ({what or node.op}) {'can be' if signed else 'is never'} negative"


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
    return facts


def _works_in_place(node: fx.Node) -> bool:
    name = torch_name(node) or ""
    return name in IN_PLACE_OPERATORS or name.endswith("_") and not name.endswith("__")


def _is_non_negative(node: fx.Node, modules: dict[str, nn.Module], facts: dict[fx.Node, bool]) -> bool:
    if node.op == "call_module":
        module = modules[node.target]
        if has_hooks(module) or "forward" in vars(module):
            return False
        if isinstance(module, nn.Hardtanh):  # ReLU6 is one
            return module.min_val >= 0
        if isinstance(module, NON_NEGATIVE_MODULES):
            return True
        return _preserves_sign(node, modules) and facts[node.all_input_nodes[0]]
    name = torch_name(node)
    if name in NON_NEGATIVE_FUNCTIONS:
        return True
    if _preserves_sign(node, modules):
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


def _preserves_sign(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[node.target], PRESERVING_MODULES)
    transposes = node.target is getattr and node.args[1] in ("T", "mT")
    return transposes or torch_name(node) in PRESERVING_FUNCTIONS


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
