"""Facts about a traced graph: which layers there are, the sign of their inputs, what stands around them."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx, nn

from apotfx.attention import obstacle as attention_obstacle
from apotfx.graph.operations import torch_name, undecorated, writes
from apotfx.graph.ranges import UNKNOWN, Interval, Ranges, hull, operation
from apotfx.graph.tracing import ByMode
from apotfx.layers import FunctionalLayer, float_type_of, kind_of
from apotfx.modules import attribute, has_hooks
from apotfx.reproducible import Average

BATCH_NORMS = nn.modules.batchnorm._BatchNorm  # of any dimension, synchronized or not
FUNCTIONAL_LAYERS = {"linear"} | {f"conv{kind}{d}d" for kind in ("", "_transpose") for d in (1, 2, 3)}
# What multiplies with weights besides them, and has no quantized version.
OTHER_LAYERS = (nn.RNNBase, nn.RNNCellBase, nn.Bilinear, nn.MultiheadAttention)
PRODUCTS = {
    "matmul", "rmatmul", "mm", "mv", "bmm", "addmm", "addmv", "addbmm", "baddbmm", "addr", "inner", "outer", "ger",
    "dot", "vdot", "kron", "einsum", "tensordot", "bilinear", "chain_matmul", "linalg_multi_dot", "linalg_matmul",
    "linalg_vecdot", "smm", "hspmm", "sspaddmm", "_sparse_mm", "scaled_dot_product_attention",
    "multi_head_attention_forward", "conv_tbc", "convolution", "deform_conv2d", "lstm", "gru", "rnn_tanh", "rnn_relu",
    "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell", "linear_cross_entropy",
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
        input_range: (low, high) that the inputs of all its calls lie in whatever the network's inputs and weights, in
            both modes; infinite where nothing is known. See `ranges`.
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
    input_range: tuple[float, float] = (-math.inf, math.inf)


def analyze(root: nn.Module, graph: fx.Graph, leaves: Mapping[str, str] = {}) -> list[LayerFacts]:
    """Facts on every conv and linear layer of `root`, whose traced graph is `graph`, in order of execution.

    A layer inside a module that tracing keeps whole is listed where that is called; a layer that nothing calls comes
    last, with an obstacle. A module called several times is described by all its calls together.

    Args:
        graph: after `modularize.layers_as_modules`, without writes in place that others see; empty for a model that
            could not be traced.
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
        elif node not in constants and _multiplies_weights(node, constants, root):
            calls[node.op, node.name] = [node]

    around = _Surroundings(graph, {node for nodes in calls.values() for node in nodes})
    ranges = Ranges(graph, modules)
    facts = []
    for (op, name), nodes in calls.items():
        if op == "call_module" and name in inside:
            facts += _hidden_facts(inside[name], name, modules, leaves, *around.position(nodes))
        else:
            facts.append(_facts(name, nodes, modules, leaves, ranges, constants, *around.position(nodes)))
    if "" in leaves:
        inside[""] = _hidden_layers("", modules, leaves)
        guess = "there is no graph; in order of registration"
        facts += _hidden_facts(inside[""], "", modules, leaves, True, True, guess)
    known = {name for op, name in calls if op == "call_module"}.union(*inside.values())
    in_functions = _read_by_functional_layers(modules, known)
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
        if is_layer(module) and name not in known and not any(path.startswith(f"{name}.") for path in in_functions)
    ]


def is_layer(module: nn.Module) -> bool:
    """Whether it is a convolution (also a transposed one) or a linear layer, or of a type derived from one."""
    return isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, FunctionalLayer))


def _multiplies_weights(node: fx.Node, constants: set[fx.Node], root: nn.Module) -> bool:
    """Whether a function that stayed one is a layer, or a product with something that is no result of the network."""
    name = undecorated(torch_name(node) or "")
    if name in FUNCTIONAL_LAYERS:
        return True
    weights = [x for x in _factors(node, name) if x in constants and _holds_tensor(x)]
    if name in ("mul", "multiply"):
        return any(_is_summed(node, weight, root) for weight in weights)
    return bool(weights) and (name in PRODUCTS or name == "embedding_bag" and "per_sample_weights" in node.kwargs)


def _factors(node: fx.Node, name: str) -> list[fx.Node]:
    """What a product multiplies, without what it adds, such as a bias or a mask."""
    added = {"addmm": 0, "addmv": 0, "addbmm": 0, "baddbmm": 0, "addr": 0, "scaled_dot_product_attention": 3}.get(name)
    args = [x for i, x in enumerate(node.args) if i != added]
    kwargs = [x for key, x in node.kwargs.items() if added is None or key not in ("input", "attn_mask", "dropout_p")]
    found: list[fx.Node] = []
    fx.node.map_arg((args, kwargs), found.append)
    return found


def _holds_tensor(constant: fx.Node) -> bool:
    return constant.op == "get_attr" or any(map(_holds_tensor, constant.all_input_nodes))


def _is_summed(product: fx.Node, weight: fx.Node, root: nn.Module) -> bool:
    """Whether an elementwise product is summed over a dimension of `weight`, as a hand-written linear layer does."""
    sums = [user for user in product.users if torch_name(user) in ("sum", "nansum")]
    if not sums or weight.op != "get_attr":
        return bool(sums)
    shape = attribute(root, weight.target).shape
    for node in sums:
        dims = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else range(-len(shape), 0))
        dims = [dims] if isinstance(dims, int) else list(dims)
        if not all(isinstance(d, int) for d in dims):
            return True
        rank = max(len(shape), *(d + 1 for d in dims))  # at least: that of the other factor is not known
        indices = {d if d < 0 else d - r for d in dims for r in (rank, rank + 1)}
        if any(shape[i] > 1 for i in indices if -len(shape) <= i < 0):
            return True
    return False


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
    ranges: Ranges,
    constants: set[fx.Node],
    is_first: bool,
    is_last: bool,
    position_reason: str,
) -> LayerFacts:
    module = modules.get(name) if nodes[0].op == "call_module" else None
    inputs = [x for node in nodes if (x := _input(node, constants)) is not None]
    input_range, sign_reason = _input_range(inputs, ranges, modules)
    if module is not None and has_hooks(module):
        input_range, sign_reason = UNKNOWN, "a hook may change it"
    obstacle = _obstacle(module, nodes[0])
    if obstacle and name in leaves:
        obstacle += f", and cannot be traced ({leaves[name]})"
    return LayerFacts(
        name=name,
        type=_type_name(module, nodes[0]),
        signed_input=input_range.low < 0,
        is_first=is_first,
        is_last=is_last,
        feeds_batch_norm=all(_feeds_batch_norm(node, modules) for node in nodes),
        obstacle=obstacle,
        **_shape_facts(module),
        sign_reason=sign_reason,
        position_reason=position_reason,
        input_range=tuple(input_range),
    )


def _input(node: fx.Node, constants: set[fx.Node]) -> fx.Node | None:
    """What a layer, or a product with constants, is called with."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    if isinstance(first, fx.Node) and first not in constants:
        return first
    return next((x for x in node.all_input_nodes if x not in constants), None)


def _input_range(inputs: list[fx.Node], ranges: Ranges, modules: dict[str, nn.Module]) -> tuple[Interval, str]:
    """(the range of the inputs of all calls of a layer, which operation decides their sign)."""
    if not inputs:
        return UNKNOWN, ""
    found = hull(*map(ranges.__getitem__, inputs))
    found = UNKNOWN if math.isnan(found.low) else found  # complex
    node = ranges.source(next((x for x in inputs if not ranges[x].low >= 0), inputs[0]))
    if node.op == "placeholder":
        return found, f"the network's input {node.name} can be negative"
    what = type(modules[node.target]).__name__ if node.op == "call_module" else torch_name(node)
    sign = "is never negative" if found.low >= 0 else "can be negative"
    down = f", down to {found.low:.3g}" if -math.inf < found.low < 0 else ""
    return found, f"{node.name} ({what or node.op}) {sign}{down}"


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
        pure = node.op in ("call_function", "call_method") and not writes(node, modules) or isinstance(module, Average)
        computed = pure and node.all_input_nodes and found.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or isinstance(module, ByMode) or computed:
            found.add(node)
            yield node


def _read_by_functional_layers(modules: Mapping[str, nn.Module], names: Iterable[str]) -> set[str]:
    """The paths of the tensors that the weights of functional layers are computed from."""
    layers = [modules[name] for name in names if isinstance(modules.get(name), FunctionalLayer)]
    return {path for layer in layers for path in getattr(layer._weight, "sources", ())}


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


def _feeds_batch_norm(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a batch norm is the only consumer of `node`, or of what is the same but for its type."""
    while len(node.users) == 1 and _passes_on(user := next(iter(node.users)), modules):
        node = user
    return batch_norm_after(node, modules) is not None


def _passes_on(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return type(modules[node.target]) is nn.Identity
    return node.op == "call_method" and node.target in ("float", "double", "half", "bfloat16", "to", "type_as", "contiguous")


def batch_norm_after(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The name of the batch norm that is the only consumer of `node`, if there is one."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    return user.target if user.op == "call_module" and isinstance(modules[user.target], BATCH_NORMS) else None


def rectified_range(node: fx.Node, modules: dict[str, nn.Module]) -> tuple[float, float] | None:
    """The range (low, high) that `node` clamps its only input to, if it is an activation function that starts at 0."""
    if len(node.all_input_nodes) != 1:
        return None
    if node.op == "call_module":
        module, name = modules[node.target], operation(node, modules)
        if name in ("hardtanh", "relu6"):
            return (0.0, float(module.max_val)) if module.min_val == 0 else None
        return (0.0, math.inf) if name == "relu" else None
    return {"relu": (0.0, math.inf), "relu6": (0.0, 6.0)}.get(operation(node, modules))
