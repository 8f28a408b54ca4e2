"""What each node of an integer network computes, under one name however torch spells it.

The compiled backend and the translations to ONNX and C read a network through this.
"""

from dataclasses import dataclass, field

import torch
from torch import fx, nn

from apotfx.graph.facts import rectified_range, torch_name
from apotfx.errors import ApotfxError
from apotfx.integer.layers import Affine, IntegerLayer
from apotfx.layers import float_type_of, kind_of
from apotfx.operators import TransposedConvolution
from apotfx.reproducible import AVERAGE_POOLS, Average
from apotfx.graph.network import Network
from apotfx.graph.tracing import GUARDS, ByMode

PLAIN_KINDS = ("Conv1d", "Conv2d", "Conv3d", "Linear")
# Of torch's functions, which torch.fx cannot ask for them in every version.
MAX_POOL_ARGUMENTS = ("input", "kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
AVERAGE_POOL_ARGUMENTS = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
DROPOUTS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout")


@dataclass(frozen=True)
class Operation:
    """One node.

    Attributes:
        kind: "input"; "output"; "layer" (an IntegerLayer, unless it is a transposed convolution); "float_layer" (one that
            the policy left in float, likewise); "affine" (an
            Affine); "clamp" (to `low`, `high`, which may be infinite); "add" (two tensors); "max_pool" and
            "average_pool" (`kernel`, `stride`, `padding` and, for a maximum, `dilation`, one number per dimension;
            `ceil_mode`; `count_include_pad`); "global_average" (over `dims`, which count from the end where negative, with or without `keepdim`);
            "adaptive_average" (to `output`, one size per dimension, None to keep it); "flatten" (from dimension 1 on);
            "concatenate" (along `dim`, no tensor twice); "constant" (a number or flag, which no operation lists among
            its inputs); "identity"; "other".
        node: the node; its name is the operation's.
        inputs: the nodes that it reads.
        module: that the node calls; None if it calls none.
        settings: as `kind` says.
    """

    kind: str
    node: fx.Node
    inputs: tuple[fx.Node, ...] = ()
    module: nn.Module | None = None
    settings: dict = field(default_factory=dict)

    def __getitem__(self, key: str):
        return self.settings[key]


def operations(network: fx.GraphModule) -> list[Operation]:
    """The operations of a network from `load_integer`, in order of execution.

    Raises:
        ApotfxError: it is not one with the backend "reference".
    """
    if not isinstance(network, Network) or not any(isinstance(m, IntegerLayer) for m in network.modules()):
        raise ApotfxError(
            f"network: expected what load_integer(path, float_model) returns with backend reference, got a "
            f"{type(network).__name__} without a graph of integer layers"
        )
    modules = dict(network.named_modules())
    return [_operation(node, modules) for node in network.graph.nodes]


def shapes(network: fx.GraphModule, input_shape: tuple[int, ...]) -> dict[fx.Node, torch.Size]:
    """The shape of every node's tensor for a single image of `input_shape`.

    Raises:
        ApotfxError: the network takes several inputs; or the shape is none.
    """
    if not isinstance(input_shape, (tuple, list)) or not all(type(size) is int and size > 0 for size in input_shape):
        raise ApotfxError(
            f"input_shape {input_shape!r}: expected sizes of at least 1, such as (channels, height, width)"
        )
    needed = [node.name for node in network.graph.nodes if node.op == "placeholder" and not node.args]
    if len(needed) != 1:
        raise ApotfxError(
            f"the network takes the inputs {', '.join(needed)}, expected one; only such can be translated"
        )
    recorder = _Shapes(network)
    recorder.extra_traceback = False  # errors stay one line
    recorder.run(torch.zeros(1, *input_shape))
    return recorder.shapes


class _Shapes(fx.Interpreter):
    def __init__(self, network: fx.GraphModule):
        super().__init__(network)
        self.shapes: dict[fx.Node, torch.Size] = {}

    @torch.no_grad()
    def run_node(self, n: fx.Node) -> object:
        result = super().run_node(n)
        if isinstance(result, torch.Tensor):
            self.shapes[n] = result.shape
        return result


def refuse(operation: Operation, target: str) -> ApotfxError:
    """The error that says that `target` has no way to express an operation."""
    node, module = operation.node, operation.module
    what = getattr(node.target, "__name__", node.target) if module is None else type(module).__name__
    if isinstance(module, IntegerLayer) and isinstance(module.geometry.operator, TransposedConvolution):
        what = f"ConvTranspose{module.geometry.dims}d"
    return ApotfxError(f"{target}: the operation {node.name} ({what}) cannot be expressed; remove it from the network")


def _operation(node: fx.Node, modules: dict[str, nn.Module]) -> Operation:
    inputs = tuple(x for x in node.all_input_nodes if not isinstance(modules.get(x.target), ByMode))
    if node.op in ("placeholder", "output"):
        return Operation("input" if node.op == "placeholder" else "output", node, inputs)
    module = modules[node.target] if node.op == "call_module" else None
    if isinstance(module, IntegerLayer):
        transposed = isinstance(module.geometry.operator, TransposedConvolution)
        return Operation("other" if transposed else "layer", node, inputs, module)
    if isinstance(module, Affine):
        return Operation("affine", node, inputs, module)
    if isinstance(module, ByMode):
        return Operation("constant", node)
    if float_type_of(module) is not None and kind_of(module) in PLAIN_KINDS and len(inputs) == 1:
        return Operation("float_layer", node, inputs, module)
    limits = rectified_range(node, modules)
    if limits is not None:
        return Operation("clamp", node, inputs, module, {"low": limits[0], "high": limits[1]})
    if node.target in (*GUARDS, torch._assert):
        return Operation("constant", node)
    kind, settings = _interpret(node, module)
    if kind == "add":
        inputs = node.args  # which may be the same twice
    return Operation(kind, node, inputs, module, settings)


def _interpret(node: fx.Node, module: nn.Module | None) -> tuple[str, dict]:
    if isinstance(module, (Average, *AVERAGE_POOLS)):
        return _average(node, module)
    if isinstance(module, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)) and not module.return_indices:
        return "max_pool", _window(vars(module), dims=_dims(module))
    if isinstance(module, (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity)):
        return "identity", {}
    if isinstance(module, nn.Flatten):
        return ("flatten", {}) if (module.start_dim, module.end_dim) == (1, -1) else ("other", {})
    name = torch_name(node)
    if name in ("add", "iadd", "add_"):
        plain = len(node.args) == 2 and not node.kwargs and all(isinstance(arg, fx.Node) for arg in node.args)
        return ("add" if plain else "other"), {}
    if name in ("cat", "concat"):
        dim = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        distinct = node.args and list(node.args[0]) == node.all_input_nodes
        return ("concatenate", {"dim": dim}) if distinct else ("other", {})
    if name == "flatten":
        dims = (*node.args[1:], *node.kwargs.values())
        return ("flatten", {}) if dims in ((1,), (1, -1)) else ("other", {})
    if name in DROPOUTS:
        training = node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True)
        return ("other" if training is True else "identity"), {}  # what follows the mode is off
    if name in ("contiguous", "detach", "clone"):
        return "identity", {}
    if name is not None and name.removeprefix("boolean_dispatch_").rstrip("123d") == "max_pool":
        arguments = dict(zip(MAX_POOL_ARGUMENTS, node.args)) | node.kwargs
        if not arguments.get("return_indices"):
            return "max_pool", _window(arguments, dims=int(name[-2]))
    return "other", {}


def _dims(module: nn.Module) -> int:
    return int(type(module).__name__[-2])


def _per_dim(value: object, dims: int) -> tuple[int, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims


def _window(settings: dict, dims: int) -> dict:
    """Of a pooling module or function, under one set of names."""
    kernel = _per_dim(settings["kernel_size"], dims)
    stride = settings.get("stride")
    return {
        "kernel": kernel,
        "stride": kernel if stride is None or stride == [] else _per_dim(stride, dims),
        "padding": _per_dim(settings.get("padding", 0), dims),
        "dilation": _per_dim(settings.get("dilation", 1), dims),
        "ceil_mode": bool(settings.get("ceil_mode", False)),
        "count_include_pad": bool(settings.get("count_include_pad", True)),
    }


def _average(node: fx.Node, average: nn.Module) -> tuple[str, dict]:
    if isinstance(average, (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)):
        return _adaptive_average(average.output_size, _dims(average))
    if isinstance(average, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        window = _window(vars(average), _dims(average))
        return ("average_pool", window) if getattr(average, "divisor_override", None) is None else ("other", {})
    name, rest = average.function.__name__, node.args[1:]
    if name.startswith("adaptive_avg_pool") and not node.kwargs:
        return _adaptive_average(rest[0], int(name[-2]))
    if name.startswith("avg_pool"):
        settings = dict(zip(AVERAGE_POOL_ARGUMENTS, rest)) | node.kwargs
        if settings.get("divisor_override") is None:
            return "average_pool", _window(settings, int(name[-2]))
    if name == "mean":
        dims = node.kwargs.get("dim", rest[0] if rest else None)
        keepdim = node.kwargs.get("keepdim", rest[1] if len(rest) > 1 else False)
        dims = (dims,) if isinstance(dims, int) else tuple(dims or ())
        if dims and all(isinstance(d, int) for d in dims):
            return "global_average", {"dims": dims, "keepdim": keepdim}
    return "other", {}


def _adaptive_average(output: object, dims: int) -> tuple[str, dict]:
    output = _per_dim(output, dims)
    if output == (1,) * dims:
        return "global_average", {"dims": tuple(range(2, 2 + dims)), "keepdim": True}
    return "adaptive_average", {"output": output}
