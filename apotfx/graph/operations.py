"""What each operation of torch does: which memory it writes to, which memory its result lies in."""

import functools
import inspect
import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx, nn

from apotfx.layers import float_type_of
from apotfx.modules import has_hooks

# What torch makes of several operators, where the result lies in new memory all the same.
FRESH_COMPOSITES = {
    "linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul",
    "outer", "ger", "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
    "relu6", "selu", "prelu", "rrelu", "softmax", "log_softmax", "log_sigmoid", "square", "absolute", "clip",
    "subtract", "multiply", "divide", "true_divide", "negative", "where", "std", "var", "max", "min",
    "avg_pool1d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "max_pool1d", "max_pool2d", "max_pool3d", "repeat_interleave",
}  # fmt: skip
# Python functions that end in one operator whose result lies in new memory, if they do not work in place.
FRESH_FUNCTIONS = {
    "relu", "relu6", "hardtanh", "leaky_relu", "rrelu", "elu", "selu", "celu", "silu", "mish", "hardswish",
    "hardsigmoid", "sigmoid", "tanh", "softsign", "tanhshrink", "threshold", "glu", "softmax", "softmin", "log_softmax",
    "batch_norm", "layer_norm", "group_norm", "instance_norm", "rms_norm",
    "max_pool1d", "max_pool2d", "max_pool3d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "bilinear", "norm", "tensordot",
}  # fmt: skip
# What gives its argument back all the same where there is nothing to do.
NOT_FRESH = {"dequantize", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"}
# Functions that write to others of their parameters than the first: which, and the parameter that has them do it, "" if
# nothing keeps them from it in every version of torch.
WRITTEN_PARAMETERS = {
    "batch_norm": (("running_mean", "running_var"), "training"),
    "native_batch_norm": (("running_mean", "running_var"), "training"),
    "cudnn_batch_norm": (("running_mean", "running_var"), "training"),
    "miopen_batch_norm": (("running_mean", "running_var"), "training"),
    "instance_norm": (("running_mean", "running_var"), ""),
    "embedding": (("weight",), "max_norm"),
    "embedding_bag": (("weight",), "max_norm"),
}
SETTERS = {"setitem", "__setitem__", "delitem", "__delitem__", "setattr"}
FLAG_METHODS = {"requires_grad_", "retain_grad", "share_memory_", "record_stream"}  # they write, but no values


def torch_name(node: fx.Node) -> str | None:
    """The name of the torch function or tensor method that a node calls; None for anything else."""
    if node.op == "call_method":
        return node.target
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.name.partition("::")[2]
    origin = getattr(node.target, "__module__", None) or "torch"
    is_torch = origin.split(".")[0] in ("torch", "torchvision", "_operator", "apotfx")
    return node.target.__name__.removeprefix("boolean_dispatch_") if is_torch else None


def writes(node: fx.Node, modules: Mapping[str, nn.Module]) -> list[fx.Node]:
    """The arguments of `node` whose values it changes, as far as torch's own operations go.

    Of a function or module that is not torch's nothing is known but its attribute or argument `inplace`.
    """
    written = [*_nodes(node.kwargs.get("out"))]
    name = torch_name(node)
    if node.op == "call_module":
        module = modules[node.target]
        deaf = isinstance(module, (nn.AlphaDropout, nn.FeatureAlphaDropout))  # do not pass their argument on
        works_in_place = not deaf and getattr(module, "inplace", False) not in (False, None)
        first = _first_argument(node) if works_in_place else []
        written += first if len(first) == 1 else []  # one that takes a list is no activation function
    elif node.op in ("call_function", "call_method"):
        if _is_in_place(node, name):
            written += _first_argument(node)
        for parameter in _written_parameters(node, name):
            written += _nodes(_argument(node, parameter))
    return list(dict.fromkeys(written))


def returns_fresh(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether the result of `node` certainly is one tensor in memory that nothing else lies in.

    False for views, for what may give its argument back (a dropout in evaluation, `.to`, `.contiguous`), and for
    whatever is not known.
    """
    if writes(node, modules):
        return False
    if node.op == "call_module":
        module = modules[node.target]
        return not has_hooks(module) and (float_type_of(module) is not None or _is_fresh_module(module))
    name = torch_name(node)
    if name is None or name in NOT_FRESH or name.startswith("_") and not name.startswith("__"):
        return False
    if node.op == "call_function" and inspect.isfunction(node.target):
        own = node.target.__module__ in ("torch.functional", "torch.nn.functional")
        return own and name in FRESH_FUNCTIONS and not _returns_several(node)
    if isinstance(node.target, torch._ops.OpOverload):
        return _is_fresh_schema(node.target._schema)
    schemas = [s for s in _schemas(_operator_name(name)) if _takes(s, node)]
    return bool(schemas) and all(_is_fresh_schema(schema) for schema in schemas)


def _nodes(argument: object) -> list[fx.Node]:
    found: list[fx.Node] = []
    fx.node.map_arg(argument, found.append)
    return found


def _first_argument(node: fx.Node) -> list[fx.Node]:
    if node.args:
        return _nodes(node.args[0])
    return _nodes(node.kwargs.get("input", node.kwargs.get("self", next(iter(node.kwargs.values()), None))))


def _is_in_place(node: fx.Node, name: str | None) -> bool:
    if node.target is setattr or name in SETTERS:
        return True
    if name is None:
        return _inplace_argument(node)
    if name in FLAG_METHODS:
        return False
    if getattr(node.target, "__module__", None) == "_operator":
        # operator.imatmul, for one, makes a new tensor, as tensors have no __imatmul__.
        return name in _in_place_operators() and hasattr(torch.Tensor, f"__{name}__")
    if name.endswith("__"):
        return name.removeprefix("__").removesuffix("__") in _in_place_operators()
    return name.endswith("_") or _inplace_argument(node)


@functools.cache
def _in_place_operators() -> frozenset[str]:
    """The names in the module operator of `+=`, `*=`, ..."""
    names = {name for name in dir(operator) if name.startswith("i") and hasattr(operator, f"__{name}__")}
    return frozenset(name for name in names if hasattr(operator, f"__{name[1:]}__"))  # not of invert and index


def _inplace_argument(node: fx.Node) -> bool:
    """Whether it is given an argument `inplace` that is not False."""
    return node.op == "call_function" and _argument(node, "inplace") not in (False, None)


def _written_parameters(node: fx.Node, name: str | None) -> Iterator[str]:
    if name in WRITTEN_PARAMETERS:
        parameters, switch = WRITTEN_PARAMETERS[name]
        if not switch or _argument(node, switch) not in (False, None):
            yield from parameters
    elif name is not None and name not in FLAG_METHODS and not inspect.isfunction(node.target):
        for schema in _schemas(_operator_name(name)):
            if _takes(schema, node):
                yield from (a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)


def _argument(node: fx.Node, parameter: str) -> object:
    """What a call passes for a parameter, or else its default; None if there is no such parameter."""
    if parameter in node.kwargs:
        return node.kwargs[parameter]
    for i, (name, default) in enumerate(_parameters(node)):
        if name == parameter:
            return node.args[i] if i < len(node.args) else default
    return None


def _parameters(node: fx.Node) -> list[tuple[str, object]]:
    """(name, default) of the parameters of what a node calls, in order; empty where that is not known."""
    target = getattr(torch.Tensor, node.target, None) if node.op == "call_method" else node.target
    try:
        return [(p.name, p.default) for p in inspect.signature(target).parameters.values()]
    except (TypeError, ValueError):  # written in C
        name = torch_name(node)
        schemas = [s for s in _schemas(_operator_name(name)) if _takes(s, node)] if name else []
        return [(a.name, a.default_value) for a in schemas[0].arguments] if schemas else []


def undecorated(name: str) -> str:
    """ "add" for "__iadd__", "iadd", "__add__" and "add"."""
    name = name.removeprefix("__").removesuffix("__") if name.endswith("__") else name
    return name[1:] if name in _in_place_operators() else name


def _operator_name(name: str) -> str:
    """The name in aten of the function of the module operator, or of the method, `name`."""
    name = undecorated(name)
    return {"truediv": "div", "floordiv": "floor_divide", "mod": "remainder", "invert": "bitwise_not",
            "and_": "bitwise_and", "or_": "bitwise_or", "xor": "bitwise_xor", "radd": "add", "rmul": "mul",
            "rsub": "sub", "rtruediv": "div", "rpow": "pow", "pos": "positive"}.get(name, name)  # fmt: skip


@functools.cache
def _schemas(name: str) -> tuple:
    """The overloads of an operator of torch that take a tensor or several first and have no argument `out`."""
    try:
        schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name}")
    except RuntimeError:
        return ()
    tensors = ("Tensor", "Optional[Tensor]", "List[Tensor]", "number")
    return tuple(
        schema
        for schema in schemas
        if schema.arguments
        and str(schema.arguments[0].type) in tensors
        and any("Tensor" in str(a.type) for a in schema.arguments)
        and not any(a.is_out for a in schema.arguments)
        and "name" not in schema.overload_name  # dimensions by name
        and torch._C._dispatch_has_kernel(_overload(schema))  # some are TorchScript's alone
    )


def _overload(schema) -> str:
    return f"{schema.name}.{schema.overload_name}" if schema.overload_name else schema.name


def _takes(schema, node: fx.Node) -> bool:
    """Whether a call fits an overload, by the number and names of its arguments; sizes may be given one by one."""
    given = len(node.args) + len(node.kwargs)
    required = sum(a.default_value is None and "Optional" not in str(a.type) for a in schema.arguments)
    several = any(str(a.type) == "List[int]" for a in schema.arguments)
    return required <= given and (given <= len(schema.arguments) or several)


def _is_fresh_schema(schema) -> bool:
    if len(schema.returns) != 1 or str(schema.returns[0].type) != "Tensor" or schema.returns[0].alias_info is not None:
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(_overload(schema), "CompositeImplicitAutograd")
    return not composite or schema.name.partition("::")[2] in FRESH_COMPOSITES


def _returns_several(node: fx.Node) -> bool:
    return _argument(node, "return_indices") not in (False, None)


FRESH_MODULES = (
    nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm, nn.LayerNorm, nn.GroupNorm, nn.Bilinear,
    nn.ReLU, nn.ReLU6, nn.Hardtanh, nn.LeakyReLU, nn.RReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU,
    nn.Mish, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Softsign, nn.Tanhshrink, nn.LogSigmoid,
    nn.Softshrink, nn.Hardshrink, nn.Threshold, nn.GLU, nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.Softmax2d,
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d,
)  # fmt: skip


def _is_fresh_module(module: nn.Module) -> bool:
    known = next((cls for cls in FRESH_MODULES if isinstance(module, cls)), None)
    return (
        known is not None
        and "forward" not in vars(module)
        and type(module).forward.__module__.startswith("torch.nn.modules.")
        and not getattr(module, "return_indices", False)
    )
