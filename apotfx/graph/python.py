"""What Python code asks of a tensor, answered for the stand-ins that tracing passes in place of tensors.

`isinstance(x, torch.Tensor)` or `math.sqrt(x.size(-1))` cannot be overloaded by the object that is asked. So the functions
of a model run, while it is traced, as copies whose builtins know stand-ins; nothing that other threads use changes.
"""

import builtins
import functools
import math
import operator
import sys
import types
from collections.abc import Callable
from dis import get_instructions

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

NUMBERS = (bool, int, float)
_INTEGER_METHODS = {"dim", "numel", "nelement", "ndim", "stride_int", "__len__", "get_device", "element_size"}
_ATTRIBUTE_TYPES = {
    "shape": torch.Size, "dtype": torch.dtype, "device": torch.device, "layout": torch.layout, "ndim": int,
    "itemsize": int, "nbytes": int, "requires_grad": bool, "is_cuda": bool, "is_leaf": bool,
}  # fmt: skip


class Untraceable(Exception):
    """Why the module whose code runs is kept whole."""


def known_type(proxy: fx.Proxy) -> type:
    """The type of the value that a stand-in stands for.

    Raises:
        Untraceable: nothing says it.
    """
    held = vars(proxy).get("tensor")
    found = proxy.tracer.type_of(proxy.node) if held is None else type(held)
    if found is None:
        raise Untraceable(f"its forward asks for the type of {proxy.node.name}, which depends on what computes it")
    return found


def static_type(node: fx.Node, module: nn.Module | None) -> type | None:
    """The type of a node's value as far as the graph alone says it; None where it does not.

    A placeholder counts as a tensor. `module` is the one that the node calls.
    """
    if node.op in ("placeholder", "get_attr", "output"):
        return Tensor
    if node.op == "call_function" and (node.target in _FACTORIES or _says_tensor(node.target)):
        return Tensor
    if node.op == "call_module":
        if _says_tensor(type(module).forward):
            return Tensor
        several = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention)
        plain = type(module).__module__.startswith("torch.nn.modules") and not isinstance(module, several)
        return Tensor if plain and not getattr(module, "return_indices", False) else None
    arguments = [a.meta["type"] if isinstance(a, fx.Node) else type(a) for a in node.args]
    if node.target in _LIMITS:
        return node.target
    if node.target is getattr:
        if arguments[0] in _LIMITS:
            return _LIMITS[arguments[0]]
        known = Tensor if node.args[1] in ("T", "mT", "H", "mH", "data", "real", "imag", "grad") else None
        return _ATTRIBUTE_TYPES.get(node.args[1], known) if arguments[0] is Tensor else None
    name = node.target if node.op == "call_method" else node.target.__name__
    if name == "getitem":
        one = type(node.args[1]) is int
        return {Tensor: Tensor, torch.Size: int if one else torch.Size, tuple: Tensor if one else tuple}.get(arguments[0])
    if name == "size":
        return int if len(node.args) + len(node.kwargs) > 1 else torch.Size
    if name in _INTEGER_METHODS and Tensor in arguments:
        return int
    if arguments and all(t in NUMBERS for t in arguments) and hasattr(operator, name):
        return float if float in arguments or name == "truediv" else bool if name in _COMPARISONS else int
    if getattr(node.target, "__module__", None) == "math":
        return int if name in ("floor", "ceil", "isqrt", "gcd") else float
    known = Tensor if _returns(name, "Tensor") else tuple if _returns(name, "List[Tensor]") else None
    return known if any(n.meta["type"] is Tensor for n in node.all_input_nodes) else None


def _says_tensor(function: Callable) -> bool:
    return getattr(function, "__annotations__", {}).get("return") in (Tensor, "Tensor", "torch.Tensor")


_CASTS = {"bfloat16", "bool", "cpu", "cuda", "double", "float", "half", "int", "long"}
_COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "not_", "is_", "contains"}


@functools.cache
def _returns(name: str, kind: str) -> bool:
    """Whether all of torch's operators of that name, or Python's, return one result of a kind."""
    name = {"truediv": "div", "invert": "bitwise_not", "and_": "bitwise_and", "or_": "bitwise_or"}.get(name, name)
    name = name[1:] + "_" if name in ("iadd", "isub", "imul", "ipow") else name
    schemas = torch._C._jit_get_schemas_for_operator(f"aten::{name.strip('_') if name.startswith('__') else name}")
    python = name in _CASTS or callable(getattr(nn.functional, name, None)) and name != "max_pool2d_with_indices"
    tensors = [s for s in schemas if any("Tensor" in str(a.type) for a in s.arguments)]
    return all([str(r.type) for r in s.returns] == [kind] for s in tensors) if tensors else python and kind == "Tensor"


def rebound(function: object, memo: dict) -> types.FunctionType | None:
    """A copy of a Python function, and of those that it calls by name, whose builtins answer for stand-ins too.

    None for whatever is no plain Python function or belongs to torch.

    Args:
        memo: of one trace; by function what it became.
    """
    if type(function) is not types.FunctionType or (function.__module__ or "").split(".")[0] in ("torch", "numpy"):
        return None
    if function not in memo:
        operations = {i.opname for i in get_instructions(function.__code__)}
        if operations & {"STORE_GLOBAL", "DELETE_GLOBAL"}:  # it would change the copy's globals
            memo[function] = None
            return None
        if "MATCH_CLASS" in operations:
            memo[function] = functools.wraps(function)(lambda *args, **kwargs: _refuse_to_match())
            return memo[function]
        scope = memo.setdefault(id(function.__globals__), {})
        if not scope:
            scope.update(function.__globals__, __builtins__=BUILTINS | {"super": functools.partial(_Super, memo)})
        cells = tuple(types.CellType() for _ in function.__closure__ or ())
        copied = types.FunctionType(
            function.__code__, scope, function.__name__, function.__defaults__, cells if function.__closure__ else None
        )
        memo[function] = copied
        copied.__dict__.update(function.__dict__)
        copied.__kwdefaults__, copied.__module__ = function.__kwdefaults__, function.__module__
        copied.__qualname__, copied.__annotations__ = function.__qualname__, function.__annotations__
        for cell, original in zip(cells, function.__closure__ or ()):
            try:
                cell.cell_contents = rebound(original.cell_contents, memo) or original.cell_contents
            except ValueError:  # an empty cell
                continue
        for name in _names(function.__code__):
            if name in function.__globals__:
                scope[name] = _understanding(function.__globals__[name], function.__globals__, name, memo)
    return memo[function]


def _names(code: types.CodeType) -> set[str]:
    inner = (_names(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return set(code.co_names).union(*inner)


def _understanding(value: object, scope: dict, name: str, memo: dict) -> object:
    """What stands for the global `name`, which is `value`, in a function that is rebound."""
    if value is math:
        return _MATH
    if value is torch:
        return _TORCH
    if isinstance(value, types.ModuleType):
        root = value.__name__.partition(".")[0]
        return value if root in ("torch", "numpy", *sys.stdlib_module_names) else _Rebound(value, _memo=memo)
    if (id(scope), name) in fx._symbolic_trace._wrapped_fns_to_patch or getattr(math, name, None) is value:
        return recorded(value)
    known = _ANSWERS.get(value) if callable(value) and getattr(value, "__hash__", None) else None
    return known or rebound(value, memo) or value


class _Super:
    """What `super()` gives, with methods that are rebound."""

    def __init__(self, memo: dict, *args):
        if not args:  # Python takes them from the function that calls
            frame = sys._getframe(1)
            args = frame.f_locals["__class__"], frame.f_locals[frame.f_code.co_varnames[0]]
        object.__setattr__(self, "found", (super(*args), memo))

    def __getattribute__(self, name: str):
        parent, memo = object.__getattribute__(self, "found")
        value = getattr(parent, name)
        copied = rebound(getattr(value, "__func__", value), memo)
        return copied.__get__(value.__self__) if copied and hasattr(value, "__self__") else copied or value


def recorded(function: Callable) -> Callable:
    """`function`, written down as one call where a stand-in is among its arguments."""

    def call(*args, **kwargs):
        for argument in pytree.tree_leaves((args, kwargs)):
            if isinstance(argument, fx.Proxy):
                return argument.tracer.create_proxy("call_function", function, args, kwargs)
        return function(*args, **kwargs)

    return call


def _isinstance(value: object, classes: object) -> bool:
    return issubclass(known_type(value), classes) if isinstance(value, fx.Proxy) else isinstance(value, classes)


def _hasattr(value: object, name: str) -> bool:
    return hasattr(known_type(value), name) if isinstance(value, fx.Proxy) else hasattr(value, name)


def _callable(value: object) -> bool:
    return callable(value) and isinstance(value, fx.proxy.Attribute) >= isinstance(value, fx.Proxy)


def _refuse_to_match() -> None:
    raise Untraceable("its forward matches values with classes")


def _is_grad_enabled() -> bool:
    raise Untraceable("its forward asks whether gradients are computed")


def _is_tensor(value: object) -> bool:
    return _isinstance(value, Tensor)


class _Type:
    """`type`, which code calls, subclasses and compares with."""

    def __call__(self, *args, **kwargs):
        asks = len(args) == 1 and isinstance(args[0], fx.Proxy)
        return known_type(args[0]) if asks else type(*args, **kwargs)

    def __getattr__(self, name: str):
        return getattr(type, name)

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, type)

    def __subclasscheck__(self, cls: type) -> bool:
        return issubclass(cls, type)

    def __mro_entries__(self, bases: tuple) -> tuple:
        return (type,)


class _Module(types.ModuleType):
    """A module with some of its functions replaced."""

    def __init__(self, module: types.ModuleType, **replaced: Callable):
        super().__init__(module.__name__)
        vars(self).update(_module=module, **replaced)

    def __getattr__(self, name: str):
        return getattr(vars(self)["_module"], name)


class _Rebound(_Module):
    """A module of the user's, with functions that are rebound."""

    def __getattr__(self, name: str):
        module, memo = vars(self)["_module"], vars(self)["_memo"]
        return _understanding(getattr(module, name), vars(module), name, memo)


BUILTINS = vars(builtins) | {"isinstance": _isinstance, "hasattr": _hasattr, "callable": _callable, "type": _Type()}
_MATH = _Module(math, **{name: recorded(f) for name, f in vars(math).items() if callable(f)})
# What makes a tensor of none takes no stand-ins as sizes, types and devices.
_FACTORIES = {
    torch.arange, torch.as_tensor, torch.empty, torch.empty_strided, torch.eye, torch.full, torch.linspace,
    torch.logspace, torch.normal, torch.ones, torch.rand, torch.randint, torch.randn, torch.randperm,
    torch.scalar_tensor, torch.tensor, torch.tril_indices, torch.triu_indices, torch.zeros,
}  # fmt: skip
_LIMITS = {torch.finfo: float, torch.iinfo: int}  # of types, and what their attributes are
_RECORDED = {f.__name__: recorded(f) for f in (*_FACTORIES, *_LIMITS)}
_TORCH = _Module(torch, is_tensor=_is_tensor, is_grad_enabled=_is_grad_enabled, **_RECORDED)
_ANSWERS = {isinstance: _isinstance, hasattr: _hasattr} | {getattr(torch, key): f for key, f in vars(_TORCH).items() if callable(f)}
