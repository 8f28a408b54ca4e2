"""The range of each value of a graph: what every operation of torch does to an interval.

A range holds in training and in evaluation, whatever values inputs, parameters and buffers take, as far as float32 is
exact and integers do not overflow. It says nothing of NaN and infinite values. What is not known lies between minus and
plus infinity.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, fx, nn

from apotfx.graph.operations import torch_name, undecorated
from apotfx.graph.tracing import ByMode
from apotfx.modules import attribute, has_hooks

INF = math.inf
# Where functions are what their names say; torch.masked, torch.sparse and others have namesakes.
ORIGINS = ("torch.functional", "torch.nn.functional", "torch._C", "torch._ops.", "torch.nn.utils.rnn", "_operator",
           "torchvision.ops.", "apotfx.")  # fmt: skip
MATH = {"sqrt", "exp", "log", "log2", "log10", "log1p", "pow", "floor", "ceil", "prod", "sinh", "cosh", "tanh"}


class Interval(NamedTuple):
    """All numbers from low to high; of complex numbers, which have no order, both are NaN."""

    low: float
    high: float


UNKNOWN, NON_NEGATIVE, COMPLEX = Interval(-INF, INF), Interval(0.0, INF), Interval(math.nan, math.nan)
ZERO, ONE, UNIT, SYMMETRIC = Interval(0.0, 0.0), Interval(1.0, 1.0), Interval(0.0, 1.0), Interval(-1.0, 1.0)


class Ranges(Mapping[fx.Node, Interval]):
    """The range of every node of a graph.

    Args:
        modules: all that the graph calls, by name; "" is the one that holds its parameters.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self._ranges: dict[fx.Node, Interval] = {}
        for node in graph.nodes:
            self._ranges[node] = self._range(node)

    def __getitem__(self, node: fx.Node) -> Interval:
        return self._ranges[node]

    def __iter__(self):
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def source(self, node: fx.Node) -> fx.Node:
        """The node that decides the sign of `node`, found by going back over operations that keep it."""
        while len(node.all_input_nodes) == 1 and operation(node, self._modules) in {*KEEPING, *CONVERSIONS}:
            (before,) = node.all_input_nodes
            if (self[before].low >= 0) != (self[node].low >= 0):
                break
            node = before
        return node

    def of(self, argument: object) -> Interval:
        """Of an argument of a call: a node, a number, or a sequence of them."""
        if isinstance(argument, fx.Node):
            return self._ranges[argument]
        if isinstance(argument, (bool, int, float)):
            return rounded(float(argument), float(argument))
        if isinstance(argument, (tuple, list)) and argument:
            return hull(*map(self.of, argument))
        return COMPLEX if isinstance(argument, complex) else UNKNOWN

    def has_type(self, argument: object, kind: type) -> bool:
        """Whether an argument is certain to hold bools (kind bool), or integers that index or measure (kind int)."""
        if not isinstance(argument, fx.Node):
            return type(argument) is kind
        if argument.op == "get_attr":
            value = attribute(self._modules[""], argument.target)
            return kind is bool and isinstance(value, Tensor) and value.dtype == torch.bool
        name = operation(argument, self._modules)
        if name in (BOOLEAN if kind is bool else INDEXING) or kind is bool and torch.bool in argument.args:
            return True
        passing = (NEGATABLE if kind is bool else WHOLE) | KEEPING
        inputs = argument.all_input_nodes
        return name in passing and bool(inputs) and all(self.has_type(x, kind) for x in inputs)

    def where(self, x: object, condition: object, holds: bool = True) -> Interval:
        """Of x where a condition holds, or does not, which may compare x itself, as in `where(x > 0, x, 0)`."""
        found, name = self.of(x), None
        while isinstance(condition, fx.Node) and name not in GREATER | LESS:
            name = operation(condition, self._modules)
            if name in COPYING:
                condition, holds = condition.args[0], holds != (name in ("invert", "bitwisenot", "logicalnot"))
            elif name not in GREATER | LESS:
                return found
        if not isinstance(condition, fx.Node) or len(condition.args) != 2:
            return found
        sides = [self._uncopied(side) for side in condition.args]
        if self._uncopied(x) not in sides:
            return found
        left = sides[0] is self._uncopied(x)
        bound = self.of(condition.args[left])
        greater = ((name in GREATER) == left) == holds
        low, high = (max(found.low, bound.low), found.high) if greater else (found.low, min(found.high, bound.high))
        return Interval(low, high) if low <= high else found

    def _uncopied(self, x: object) -> object:
        while isinstance(x, fx.Node) and operation(x, self._modules) in ("clone", "detach", "contiguous"):
            x = x.all_input_nodes[0]
        return x

    def _range(self, node: fx.Node) -> Interval:
        if node.op == "get_attr":
            return _of_tensor(node.target, attribute(self._modules[""], node.target))
        if node.op not in ("call_module", "call_function", "call_method") or node.kwargs.get("out") is not None:
            return UNKNOWN
        module = self._modules[node.target] if node.op == "call_module" else None
        if isinstance(module, ByMode):
            return hull(self.of(module.in_training), self.of(module.in_evaluation))
        name = operation(node, self._modules)
        if name not in OF_COMPLEX and any(math.isnan(self[x].low) for x in node.all_input_nodes):
            return COMPLEX
        result = RULES[name](Call(node, module, self)) if name in RULES else UNKNOWN
        dtype = node.kwargs.get("dtype")
        return converted(result, _kind(dtype)) if isinstance(dtype, torch.dtype) else result


class Call:
    """A call of an operation: its arguments, by position and name, and their ranges."""

    def __init__(self, node: fx.Node, module: nn.Module | None, ranges: Ranges):
        self.node, self.module = node, module
        self.of, self.where, self.has_type = ranges.of, ranges.where, ranges.has_type

    def get(self, position: int | None, *names: str, default: object = None) -> object:
        """An argument, or a setting of the module."""
        for name in names:
            if hasattr(self.module, name):
                return getattr(self.module, name)
            if name in self.node.kwargs:
                return self.node.kwargs[name]
        return self.node.args[position] if position is not None and position < len(self.node.args) else default

    def range(self, position: int = 0, *names: str) -> Interval:
        """Of an argument that is a tensor, a number or a sequence of them; UNKNOWN if there is none."""
        return self.of(self.get(position, *names or ("input", "self", "tensors", "x")))

    def number(self, position: int, *names: str, default: object = None) -> float:
        """A setting; NaN, which fails every comparison, if it is no plain number."""
        value = self.get(position, *names, default=default)
        return value if isinstance(value, (int, float)) else math.nan

    def all(self) -> Interval:
        """Of all arguments that are tensors, alone or in sequences."""
        return hull(*map(self.of, self.node.all_input_nodes)) if self.node.all_input_nodes else UNKNOWN

    @property
    def size(self) -> int:
        return len(self.node.args) + len(self.node.kwargs)

    @property
    def is_of_lists(self) -> bool:
        """Whether it is an operator on sequences, such as shapes, in place of tensors."""
        return any(isinstance(x, (tuple, list)) for x in self.node.args)

    def is_given(self, position: int | None, name: str) -> bool:
        return self.get(position, name) not in (None, False)

    def target_dtype(self) -> str:
        """What `.to` and the like convert to, as `_kind` has it, "unknown", or "" for the type it has."""
        for argument in (*self.node.args[1:], *self.node.kwargs.values()):
            if isinstance(argument, fx.Node):  # a tensor, or its dtype or device
                kind = "" if argument.target is getattr and argument.args[1] == "device" else "unknown"
            elif isinstance(argument, str):  # a device or a type such as "torch.FloatTensor"
                kind = "unknown" if argument.endswith("Tensor") else ""
            else:
                kind = _kind(argument) if isinstance(argument, (torch.dtype, type)) else ""
            if kind:
                return kind
        return ""

    def evaluate(self, points: list[float]) -> list[float] | None:
        """What the operation makes of numbers in the place of its first argument; None if others are tensors."""
        args, kwargs = self.node.args[1:], {k: v for k, v in self.node.kwargs.items() if k not in ("input", "self")}
        tensors: list[fx.Node] = []
        fx.node.map_arg((args, kwargs), tensors.append)
        function = self.node.target if self.module is None else self.module.forward
        if self.node.op == "call_method":
            function = getattr(Tensor, self.node.target)
        elif function.__module__ == "math":
            function = _on_tensors(function)
        x = torch.tensor(points, dtype=torch.float64, device="cpu")
        try:
            y, near = (function(t, *args, **kwargs) for t in (x.clone(), x.clamp(-1e30, 1e30)))
        except (RuntimeError, TypeError, ValueError, ArithmeticError):
            return None
        # At infinity many functions have infinity times 0.
        y = torch.where(y.isnan(), torch.where(near.abs() > 1e15, near * INF, near), y)
        return None if tensors or y.isnan().any() else y.tolist()


def _on_tensors(function: Callable) -> Callable:
    return lambda x, *args: torch.stack([x.new_tensor(function(value, *args)) for value in x.tolist()])


def operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """One name for all spellings of an operation: module, function, method, operator, in place or not.

    None for what is not torch's, and for modules that hooks or a forward of their own make another.
    """
    if node.op == "call_module":
        module = modules[node.target]
        if has_hooks(module) or "forward" in vars(module):
            return None
        same = (c for c in type(module).__mro__ if getattr(c, "forward", None) is type(module).forward)
        known = (c for c in same if c.__module__.startswith(("torch.nn.modules.", "apotfx.")))
        return next((c.__name__.lower() for c in known), None)
    if node.target is getattr:
        return f".{node.args[1]}"
    origin, name = getattr(node.target, "__module__", None) or "torch", torch_name(node)
    if node.op == "call_function" and not origin.startswith(ORIGINS) and origin != "torch":
        return node.target.__name__ if origin == "math" and node.target.__name__ in MATH else None
    if name == "__rand__":  # not torch.rand
        return "and"
    return None if name is None else undecorated(name).removeprefix("special_").replace("_", "").lower()


def hull(*intervals: Interval) -> Interval:
    """The smallest interval that holds all of them."""
    lows, highs = zip(*intervals)
    return COMPLEX if any(map(math.isnan, lows)) else Interval(min(lows), max(highs))


def rounded(low: float, high: float) -> Interval:
    """[low, high], wider by what float32 may round off, but for ends that are exact even in bfloat16."""

    def error(value: float) -> float:
        return 0.0 if math.isinf(value) or math.frexp(value)[0] * 256 % 1 == 0 else abs(value) * 1e-6

    low, high = (-INF if math.isnan(low) else low), (INF if math.isnan(high) else high)
    return Interval(low - error(low), high + error(high))


def converted(x: Interval, kind: str) -> Interval:
    """Of values in x as another type."""
    if kind in ("", "float"):
        return x
    if kind in ("bool", "complex"):
        return UNIT if kind == "bool" else COMPLEX
    if kind == "unknown":
        return hull(_floor(x), UNIT) if x.low >= 0 else UNKNOWN
    x, limits = _floor(x), torch.iinfo(getattr(torch, kind))
    fits = kind in ("int32", "int64") or limits.min <= x.low and x.high <= limits.max
    return x if fits else Interval(float(limits.min), float(limits.max))


def cone(x: Interval) -> Interval:
    """Of sums of any number of values in x, each times any factor of at least 0."""
    return Interval(0.0 if x.low >= 0 else -INF, 0.0 if x.high <= 0 else INF)


def negative(x: Interval) -> Interval:
    return Interval(-x.high, -x.low)


def add(x: Interval, y: Interval) -> Interval:
    return rounded(x.low + y.low, x.high + y.high)


def multiply(x: Interval, y: Interval) -> Interval:
    ends = [a * b if a and b else 0.0 for a in x for b in y]  # infinite ends stand for large numbers
    return rounded(min(ends), max(ends))


def divide(x: Interval, y: Interval) -> Interval:
    if y.low < 0 < y.high or y == ZERO:
        return UNKNOWN
    return multiply(x, rounded(1 / y.high if y.high else -INF, 1 / y.low if y.low else INF))


def square(x: Interval) -> Interval:
    ends = [x.low * x.low, x.high * x.high]
    return rounded(0.0 if x.low < 0 < x.high else min(ends), max(ends))


def maximum(x: Interval, y: Interval) -> Interval:
    return Interval(max(x.low, y.low), max(x.high, y.high))


def minimum(x: Interval, y: Interval) -> Interval:
    return Interval(min(x.low, y.low), min(x.high, y.high))


def remainder(x: Interval, y: Interval) -> Interval:
    return Interval(min(y.low, 0.0), max(y.high, 0.0))  # has the sign of y


def fmod(x: Interval, y: Interval) -> Interval:
    most = max(-y.low, y.high)  # has the sign of x
    return Interval(max(x.low, -most) if x.low < 0 else 0.0, min(x.high, most) if x.high > 0 else 0.0)


def leaky(x: Interval, slope: Interval) -> Interval:
    return x if x.low >= 0 else hull(maximum(x, ZERO), multiply(minimum(x, ZERO), slope))


def non_negative_if(condition: bool) -> Interval:
    return NON_NEGATIVE if condition else UNKNOWN


def _floor(x: Interval) -> Interval:
    """x with its ends rounded outwards to integers."""
    low, high = (end if math.isinf(end) else float(math.floor(end)) for end in (x.low, -x.high))
    return Interval(low, -high)


def _of_tensor(name: str, value: object) -> Interval:
    """Of a tensor that the network holds; training and loading may change its values, but not its type."""
    if not isinstance(value, Tensor):
        return UNKNOWN
    if value.is_complex():
        return COMPLEX
    if name.startswith("_tensor_constant") and value.numel() and not value.is_meta:  # forward itself makes it
        return rounded(float(value.min()), float(value.max()))
    return {torch.bool: UNIT, torch.uint8: Interval(0.0, 255.0)}.get(value.dtype, UNKNOWN)


def _kind(dtype: torch.dtype | type) -> str:
    """ "float", "complex", "bool", or the name of the integer type."""
    if isinstance(dtype, torch.dtype):
        return "float" if dtype.is_floating_point else "complex" if dtype.is_complex else str(dtype)[len("torch.") :]
    return {bool: "bool", float: "float", int: "int64", complex: "complex"}.get(dtype, "")


# Rules: from a call to the range of its result.

Rule = Callable[[Call], Interval]


def _fixed(interval: Interval) -> Rule:
    return lambda call: interval


def _keep(call: Call) -> Interval:
    return call.range()


def _keep_or_zero(call: Call) -> Interval:
    return hull(call.range(), ZERO)


def _cone(call: Call) -> Interval:
    return cone(call.range())


def _hull_of(*arguments: tuple) -> Rule:
    """The results are elements of some arguments, each (position, names...)."""
    return lambda call: hull(*(call.range(*argument) for argument in arguments))


def _with_indices(call: Call) -> Interval:
    return hull(call.range(), NON_NEGATIVE)


def _of_two(combine: Callable[[Interval, Interval], Interval], swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        x, y = call.range(), call.range(1, "other", "exponent", "min", "max")
        return combine(y, x) if swapped else combine(x, y)

    return rule


def _extreme(combine: Callable[[Interval, Interval], Interval]) -> Rule:
    """torch.max and torch.min: of all elements, along a dimension with the indices, or of two tensors."""

    def rule(call: Call) -> Interval:
        other = call.get(1, "other")
        if isinstance(other, fx.Node) and not call.has_type(other, int):
            return _of_two(combine)(call)
        return call.range() if call.size == 1 else _with_indices(call)

    return rule


def _max_pool(position: int, namesake: bool = True) -> Rule:
    """`namesake`: the function of that name that is written in C gives the indices, too."""

    def rule(call: Call) -> Interval:
        both = call.is_given(position, "return_indices") or namesake and inspect.isbuiltin(call.node.target)
        return _with_indices(call) if both else call.range()

    return rule


def _average_pool(call: Call) -> Interval:
    if call.is_given(6, "divisor_override"):
        return _cone(call) if call.number(6, "divisor_override") > 0 else UNKNOWN
    return _keep_or_zero(call)  # the padding may count


def _pad(call: Call) -> Interval:
    mode, value = call.get(2, "mode", default="constant"), call.get(3, "value")
    if mode in ("reflect", "replicate", "circular"):
        return call.range()
    return hull(call.range(), ZERO if value is None else call.of(value)) if mode == "constant" else UNKNOWN


def _constant_pad(position: int | None, name: str) -> Rule:
    return lambda call: hull(call.range(), call.of(call.get(position, name, default=0)))


def _interpolate(call: Call) -> Interval:
    averaging = ("nearest", "nearest-exact", "linear", "bilinear", "trilinear", "area")  # bicubic overshoots
    return call.range() if call.get(3, "mode", default="nearest") in averaging else UNKNOWN


def _grid_sample(call: Call) -> Interval:
    return _keep_or_zero(call) if call.get(2, "mode", default="bilinear") in ("bilinear", "nearest") else UNKNOWN


def _response_norm(call: Call) -> Interval:
    shrinks = call.number(2, "alpha", default=1e-4) >= 0 and call.number(4, "k", default=1.0) >= 0
    return _cone(call) if shrinks else UNKNOWN


def _rms_norm(call: Call) -> Interval:
    weight = call.get(2, "weight")
    return cone(call.range() if weight is None else multiply(call.range(), call.of(weight)))


def _where(call: Call) -> Interval:
    if call.size == 1:
        return NON_NEGATIVE  # indices
    condition, x, y = call.get(0, "condition"), call.get(1, "input", "self"), call.get(2, "other")
    if call.node.op == "call_method":  # x.where(condition, y)
        condition, x = call.get(1, "condition"), call.get(0)
    return hull(call.where(x, condition), call.where(y, condition, False))


def _masked(call: Call) -> Interval:
    """masked_fill, masked_scatter and item assignment: (x, mask or key, value)."""
    return hull(call.where(call.get(0), call.get(1, "mask"), False), call.range(2, "value", "source"))


def _scatter(call: Call) -> Interval:
    x = hull(call.range(), call.range(3, "src", "value", "source"))
    return non_negative_if(x.low >= 0) if call.is_given(4, "reduce") else x


def _index_put(call: Call) -> Interval:
    x = hull(call.range(), call.range(2, "values", "source"))
    return cone(x) if call.is_given(3, "accumulate") else x


def _index_add(call: Call) -> Interval:
    alpha = call.of(call.get(4, "alpha", default=1))
    return cone(hull(call.range(), multiply(alpha, call.range(3, "source", "src"))))


def _filled(position: int) -> Rule:
    """Of a value that the type of the tensor may make an integer or a bool."""
    return lambda call: hull(call.range(position, "fill_value", "value", "src"), UNIT)


def _seen(call: Call) -> Interval:
    """Of a tensor after a write to memory that it may lie in; see `functional.see`."""
    x, written, stored = call.node.args
    return call.of(stored.args[1]) if x is written else call.of((x, stored))


def _pointwise(*critical: float, domain: Interval = UNKNOWN) -> Rule:
    """A function of each element: its values at the ends and at `critical`, between which it is monotonic."""

    def rule(call: Call) -> Interval:
        x = call.range()
        low, high = max(x.low, domain.low), min(x.high, domain.high)
        values = call.evaluate([low, high, *(c for c in critical if low < c < high)]) if low <= high else None
        return UNKNOWN if values is None else rounded(min(values), max(values))

    return rule


def _magnitude(call: Call) -> Interval:
    return NON_NEGATIVE if math.isnan(call.range().low) else _pointwise(0.0)(call)


def _softplus(call: Call) -> Interval:
    beta, threshold = call.number(1, "beta", default=1), call.number(2, "threshold", default=20)
    if beta > 0 and threshold >= 20:
        return _pointwise()(call)
    return non_negative_if(beta > 0 and threshold >= 0)  # it steps from log(1 + exp(x)) to x


def _threshold(call: Call) -> Interval:
    x, threshold = call.range(), call.number(1, "threshold")
    if math.isnan(threshold):
        return UNKNOWN
    above = maximum(x, Interval(threshold, threshold))
    return above if x.low > threshold else hull(above, call.range(2, "value"))


def _rrelu(call: Call) -> Interval:
    slopes = call.get(1, "lower", default=1 / 8), call.get(2, "upper", default=1 / 3)
    return leaky(call.range(), call.of(slopes))


def _nan_to_num(call: Call) -> Interval:
    replacements = (call.get(i, name) for i, name in ((1, "nan"), (2, "posinf"), (3, "neginf")))
    return hull(_keep_or_zero(call), *(call.of(x) for x in replacements if x is not None))


def _sum(sign: float = 1.0, swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        if call.is_of_lists:
            return call.of(call.node.args)
        x, y = call.range(), multiply(call.range(1, "other"), Interval(sign, sign))
        alpha = call.of(call.get(2, "alpha", default=1))
        return add(negative(multiply(x, alpha)), negative(y)) if swapped else add(x, multiply(y, alpha))

    return rule


def _product(call: Call) -> Interval:
    x, y = call.get(0, "input", "self"), call.get(1, "other")
    if call.is_of_lists:
        return UNKNOWN
    if x is y and isinstance(x, fx.Node):
        return square(call.of(x))
    for a, b in ((x, y), (y, x)):
        if call.of(b) == UNIT and call.where(a, b) != call.of(a):  # x * (x > 0)
            return hull(call.where(a, b), ZERO)
    return multiply(call.of(x), call.of(y))


def _quotient(swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        whole = call.is_given(2, "rounding_mode") or "floor" in (torch_name(call.node) or "")
        return _floor(_of_two(divide, swapped)(call)) if whole else _of_two(divide, swapped)(call)

    return rule


def _power(swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        base, exponent = call.get(0, "input", "self"), call.get(1, "exponent", "other")
        base, exponent = (exponent, base) if swapped else (base, exponent)
        if not isinstance(exponent, (int, float)) or exponent < 0 and exponent % 2 == 1:
            return non_negative_if(call.of(base).low >= 0)
        if exponent < 0:
            return NON_NEGATIVE
        return _pointwise(0.0, domain=NON_NEGATIVE if exponent % 1 else UNKNOWN)(call)

    return rule


def _clamp(call: Call) -> Interval:
    x = call.range()
    for combine, position, name in ((maximum, 1, "min"), (minimum, 2, "max")):
        bound = call.get(position, name)
        x = x if bound is None else combine(x, call.of(bound))
    return x


def _matrix_product(call: Call) -> Interval:
    """Sums of products of all arguments that are tensors, alone or in a sequence."""
    factors: list[fx.Node] = []  # one may come twice
    fx.node.map_arg((call.node.args, dict(call.node.kwargs)), factors.append)
    product = ONE
    for factor in factors:
        product = multiply(product, call.of(factor))
    return cone(product)


def _layer(call: Call) -> Interval:
    """F.linear, F.conv2d, ...: of input, weight and bias."""
    product, bias = multiply(call.range(), call.of(call.get(1, "weight"))), call.get(2, "bias")
    return cone(product) if bias is None else add(cone(product), call.of(bias))


def _added_product(call: Call) -> Interval:
    """torch.addmm and the like: beta * input + alpha * (sums of products of the next two)."""
    factors = call.range(1, "mat1", "batch1", "mat", "vec1"), call.range(2, "mat2", "batch2", "vec", "vec2")
    beta, alpha = (call.of(call.node.kwargs.get(key, 1)) for key in ("beta", "alpha"))
    return add(multiply(beta, call.range()), multiply(alpha, cone(multiply(*factors))))


def _added_term(combine: Callable[[Interval, Interval], Interval]) -> Rule:
    def rule(call: Call) -> Interval:
        term = combine(call.range(1, "tensor1"), call.range(2, "tensor2"))
        return add(call.range(), multiply(call.of(call.get(3, "value", default=1)), term))

    return rule


def _lerp(call: Call) -> Interval:
    start, end, weight = call.range(), call.range(1, "end"), call.range(2, "weight")
    if 0 <= weight.low and weight.high <= 1:
        return hull(start, end)
    return add(start, multiply(weight, add(end, negative(start))))


def _factors(call: Call) -> Interval:
    x = call.range()
    if max(-x.low, x.high) <= 1:
        return UNIT if x.low >= 0 else SYMMETRIC
    return non_negative_if(x.low >= 0)


def _bitwise(call: Call) -> Interval:
    operands = (*call.node.args, *call.node.kwargs.values())
    is_bool = all(call.has_type(x, bool) for x in operands)
    return UNIT if is_bool else non_negative_if(call.of(operands).low >= 0)


def _numbers(call: Call) -> Interval:
    """Between 0, 1 and the arguments: arange, linspace, randint, uniform_, tensor."""
    settings = ("device", "dtype", "layout", "generator")
    kwargs = [x for key, x in call.node.kwargs.items() if key not in settings]
    arguments = (*call.node.args[call.node.op == "call_method" :], *kwargs)
    return hull(UNIT, *(call.of(x) for x in arguments if isinstance(x, (fx.Node, int, float, tuple, list))))


def _conversion(kind: str) -> Rule:
    return lambda call: converted(call.range(), kind or call.target_dtype())


def _names(names: str) -> list[str]:
    """As `operation` has them; "pool#" is short for pool1d, pool2d and pool3d."""
    spelled = (name.replace("#", f"{d}d") for name in names.split() for d in ("123" if "#" in name else "1"))
    return [name.replace("_", "") for name in spelled]


def _table(*groups: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in groups for name in _names(names)}


# Their results are elements of their first argument.
KEEP = """
    identity alias view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim
    moveaxis t adjoint .T .mT .H .mH .data .values .min .max squeeze unsqueeze expand expand_as broadcast_to repeat tile
    contiguous clone detach cpu cuda pin_memory positive pos conj conj_physical resolve_conj resolve_neg requires_grad
    lift_fresh exchange_last_two as_strided item tolist as_tensor sym_float sym_int
    getitem reversed index index_select select slice narrow take take_along_dim gather masked_select unbind chunk split
    split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes diagonal
    linalg_diagonal roll flip fliplr flipud rot90 msort amax amin aminmax pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle fft_fftshift fft_ifftshift reflection_pad# replication_pad# circular_pad#
    alias_copy detach_copy permute_copy transpose_copy t_copy squeeze_copy unsqueeze_copy expand_copy narrow_copy
    view_copy select_copy slice_copy diagonal_copy unbind_copy as_strided_copy split_with_sizes_copy split_copy
"""
KEEP_ALL = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack meshgrid broadcast_tensors cartesian_prod
    combinations atleast_# select_scatter slice_scatter diagonal_scatter as_strided_scatter fmax fmin
"""
KEEP_OR_ZERO = """
    tril triu diag diag_embed diagflat unfold unfold_copy im2col max_unpool# zero_pad# to_dense renorm roi_align
    roi_pool ps_roi_align ps_roi_pool
"""
# Averages: weights of at least 0 that add up to 1.
AVERAGE = """
    mean nanmean quantile nanquantile adaptive_avg_pool# upsample_nearest upsample_nearest# upsample_bilinear
    upsample_linear1d upsample_bilinear2d upsample_trilinear3d upsample_bilinear2d_aa
"""
# Sums, dropout and other results that have the sign of what they are computed from, but not its size.
CONE = """
    sum nansum sum_to_size cumsum trace fold col2im normalize dropout dropout# feature_dropout stochastic_depth
    drop_block2d drop_block3d i1e ldexp
"""
MONOTONIC = """
    relu relu6 hardtanh selu celu sigmoid expit hardsigmoid tanh softsign log_sigmoid tanhshrink hardshrink softshrink
    exp exp2 expm1 sinh asinh arcsinh atan arctan erf erfc erfcx ndtr log_ndtr floor ceil round trunc fix sign sgn
    rad2deg deg2rad neg negative i1
"""
INDICES = """
    argmax argmin argsort searchsorted bucketize nonzero argwhere count_nonzero histc numel nelement size dim
    ndimension .shape .ndim .indices randperm multinomial tril_indices triu_indices matrix_rank linalg_matrix_rank
"""
WITH_INDICES = """
    median nanmedian mode kthvalue sort topk cummax cummin unique unique_consecutive var_mean std_mean
    max_pool#_with_indices adaptive_max_pool#_with_indices fractional_max_pool#_with_indices
"""
COMPARISONS = """
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal isnan isinf isfinite isposinf isneginf
    isreal isin isclose allclose logical_and logical_or logical_xor logical_not any all signbit
    is_floating_point is_complex
"""
MAGNITUDES = """
    norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm nuclear_norm dist cdist pdist
    pairwise_distance linalg_svdvals hypot mse_loss l1_loss smooth_l1_loss huber_loss poisson exponential binomial
    geometric log_normal fft_rfftfreq linalg_cond
"""
PRODUCTS = """
    matmul rmatmul imatmul mm bmm mv dot vdot inner outer ger einsum tensordot kron chain_matmul linalg_matmul
    linalg_multi_dot linalg_vecdot
"""
TO_COMPLEX = """
    complex polar view_as_complex stft fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft fft_rfft2
    fft_rfftn fft_ihfft fft_ihfft2 fft_ihfftn linalg_eig linalg_eigvals
"""
LOGICAL = _names("and and_ bitwise_and or or_ bitwise_or xor bitwise_xor ror rxor")
CONVERSIONS = {  # to what
    "to": "", "type": "", "typeas": "", "float": "float", "half": "float", "double": "float", "bfloat16": "float",
    "cfloat": "complex", "cdouble": "complex", "chalf": "complex",
    "bool": "bool", "int": "int32", "long": "int64", "short": "int16", "char": "int8", "byte": "uint8",
}  # fmt: skip
RULES = _table(
    (KEEP, _keep), (KEEP_ALL, Call.all), (KEEP_OR_ZERO, _keep_or_zero), (AVERAGE, _keep), (CONE, _cone),
    (INDICES, _fixed(NON_NEGATIVE)), (WITH_INDICES, _with_indices), (COMPARISONS, _fixed(UNIT)),
    (MAGNITUDES + "var std", _fixed(NON_NEGATIVE)), (PRODUCTS, _matrix_product), (TO_COMPLEX, _fixed(COMPLEX)),
    # Functions of each element.
    (MONOTONIC, _pointwise()), ("leaky_relu elu square cosh i0 i0e", _pointwise(0.0)), ("abs absolute", _magnitude),
    ("silu", _pointwise(-1.2784645)), ("gelu", _pointwise(-0.7517915, -0.7524613)), ("mish", _pointwise(-1.1924312)),
    ("hardswish", _pointwise(-1.5)), ("softplus", _softplus), ("threshold", _threshold), ("rrelu", _rrelu),
    ("prelu", lambda c: leaky(c.range(), c.range(1, "weight") if c.module is None else UNKNOWN)),
    ("sqrt rsqrt log log2 log10", _pointwise(domain=NON_NEGATIVE)), ("log1p", _pointwise(domain=Interval(-1.0, INF))),
    ("acosh arccosh", _pointwise(domain=Interval(1.0, INF))), ("logit", _pointwise(domain=UNIT)),
    ("asin arcsin acos arccos atanh arctanh erfinv", _pointwise(domain=SYMMETRIC)), ("sin cos", _fixed(SYMMETRIC)),
    ("sinc", _fixed(Interval(-0.2173, 1.0))), ("igamma igammac gammainc gammaincc", _fixed(UNIT)),
    ("angle", lambda c: Interval(-3.1416 if math.isnan(c.range().low) else 0.0, 3.1416)),
    ("atan2 arctan2", lambda c: Interval(0.0 if c.range().low >= 0 else -3.1416, 3.1416)),
    ("frac", lambda c: fmod(c.range(), ONE)), ("nan_to_num", _nan_to_num), ("clamp clip", _clamp),
    ("real .real", lambda c: UNKNOWN if math.isnan(c.range().low) else c.range()),
    *((name, _conversion(kind)) for name, kind in CONVERSIONS.items()),
    # Of two elements.
    ("add radd", _sum()), ("sub subtract", _sum(-1.0)), ("rsub", _sum(-1.0, swapped=True)),
    ("mul multiply rmul", _product),
    ("div divide true_divide truediv floor_divide floordiv idiv", _quotient()), ("pow float_power", _power()),
    ("rdiv rtruediv rfloordiv", _quotient(swapped=True)), ("rpow", _power(swapped=True)),
    ("reciprocal", lambda c: divide(ONE, c.range())), ("remainder mod", _of_two(remainder)), ("fmod", _of_two(fmod)),
    ("rmod", _of_two(remainder, swapped=True)), ("maximum sym_max clamp_min", _of_two(maximum)),
    ("minimum sym_min clamp_max", _of_two(minimum)),
    ("logaddexp logaddexp2", _of_two(lambda x, y: Interval(max(x.low, y.low), INF))),
    ("heaviside", lambda c: hull(UNIT, c.range(1, "values"))), ("copysign", lambda c: multiply(c.range(), SYMMETRIC)),
    ("lerp", _lerp), ("addcmul", _added_term(multiply)), ("addcdiv", _added_term(divide)),
    (" ".join(LOGICAL), _bitwise), ("invert bitwise_not", lambda c: UNIT if c.has_type(c.get(0), bool) else UNKNOWN),
    # Along dimensions.
    ("softmax softmin softmax2d gumbel_softmax safe_softmax", _fixed(UNIT)),
    ("log_softmax", _fixed(Interval(-INF, 0.0))),
    ("logsumexp logcumsumexp", lambda c: Interval(c.range().low, INF)), ("prod cumprod", _factors),
    ("max", _extreme(maximum)), ("min", _extreme(minimum)), ("glu", lambda c: multiply(c.range(), UNIT)),
    ("cosine_similarity", lambda c: UNIT if c.all().low >= 0 else SYMMETRIC), ("rms_norm", _rms_norm),
    ("local_response_norm cross_map_lrn2d", _response_norm),
    ("bincount", lambda c: NON_NEGATIVE if c.get(1, "weights") is None else cone(c.range(1, "weights"))),
    # Neighbourhoods.
    ("max_pool#", _max_pool(6, namesake=False)), ("fractional_max_pool#", _max_pool(4)),
    ("adaptive_max_pool#", _max_pool(2)),
    ("avg_pool#", _average_pool),
    ("lp_pool#", lambda c: NON_NEGATIVE if c.number(1, "norm_type") % 2 == 0 else _cone(c)),
    ("pad", _pad), ("constant_pad_nd", _constant_pad(2, "value")), ("constant_pad#", _constant_pad(None, "value")),
    ("pad_sequence", _constant_pad(2, "padding_value")), ("grid_sample", _grid_sample),
    ("interpolate upsample upsampling_nearest2d upsampling_bilinear2d", _interpolate),
    # Elements chosen or put in place.
    ("where", _where), ("repeat_interleave", lambda c: c.range() if c.size > 1 else NON_NEGATIVE),
    ("masked_fill masked_scatter setitem", _masked),
    ("index_fill index_copy", _hull_of((0,), (3, "value", "source"))), ("fill_diagonal store", _hull_of((0,), (1,))),
    ("scatter", _scatter), ("index_put put", _index_put), ("scatter_add index_add", _index_add), ("see", _seen),
    ("scatter_reduce index_reduce", lambda c: non_negative_if(hull(c.range(), c.range(3, "src", "source")).low >= 0)),
    ("embedding", _hull_of((1, "weight"))), ("block_diag", lambda c: hull(c.all(), ZERO)),
    # Products.
    ("linear conv# conv_transpose#", _layer), ("addmm addmv addbmm baddbmm addr", _added_product),
    ("scaled_dot_product_attention", lambda c: cone(c.range(2, "value"))),
    # Constants and random numbers.
    ("zeros zeros_like new_zeros zero", _fixed(ZERO)), ("ones ones_like new_ones", _fixed(ONE)),
    ("full full_like fill copy", _filled(1)), ("new_full", _filled(2)),
    ("arange linspace randint randint_like uniform tensor scalar_tensor", _numbers),
    ("bernoulli rand rand_like one_hot eye", _fixed(UNIT)), ("random", lambda c: hull(_numbers(c), NON_NEGATIVE)),
)  # fmt: skip
KEEPING = {*_names(KEEP + KEEP_ALL + KEEP_OR_ZERO + AVERAGE + CONE), *_names("""
    max_pool# adaptive_max_pool# avg_pool# lp_pool# pad constant_pad_nd constant_pad# interpolate upsample
    upsampling_nearest2d upsampling_bilinear2d grid_sample
""")}  # fmt: skip
GREATER, LESS = {"gt", "ge", "greater", "greaterequal"}, {"lt", "le", "less", "lessequal"}
# What leaves a condition as it is, or makes its opposite of it.
COPYING = {*CONVERSIONS, *_names("clone detach contiguous invert bitwise_not logical_not")}
BOOLEAN = {*_names(COMPARISONS), "bool"}
NEGATABLE = {*LOGICAL, *_names("invert bitwise_not")}
INDEXING = {*_names(INDICES)}
WHOLE = {*_names("add sub mul floordiv mod neg")}
OF_COMPLEX = BOOLEAN | INDEXING | {*_names(MAGNITUDES + "abs absolute angle real .real imag .imag view_as_real")}
