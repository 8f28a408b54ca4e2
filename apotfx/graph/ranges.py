"""The range of each value of a graph: what every operation of torch does to an interval.

A range holds in training and in evaluation, whatever values inputs, parameters and buffers take, as far as float32 is
exact and integers do not overflow. It says nothing of NaN. What is not known lies between minus and plus infinity.
"""

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
ZERO, UNIT, ONE = Interval(0.0, 0.0), Interval(0.0, 1.0), Interval(1.0, 1.0)


class Ranges(Mapping[fx.Node, Interval]):
    """The range of every node of a graph.

    Args:
        modules: all that the graph calls, by name; "" is the one that holds its parameters.
    """

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]):
        self._modules = modules
        self._ranges: dict[fx.Node, Interval] = {}
        self.types: dict[fx.Node, str] = {}
        for node in graph.nodes:
            self._ranges[node] = self._range(node)
            self.types[node] = self._type(node)

    def __getitem__(self, node: fx.Node) -> Interval:
        return self._ranges[node]

    def __iter__(self):
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)

    def source(self, node: fx.Node) -> fx.Node:
        """The node that decides the sign of `node`, found by going back over operations that keep it."""
        while len(node.all_input_nodes) == 1 and operation(node, self._modules) in KEEPING:
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

    def _range(self, node: fx.Node) -> Interval:
        if node.op == "get_attr":
            return _of_tensor(node.target, attribute(self._modules[""], node.target))
        if node.op not in ("call_module", "call_function", "call_method") or "out" in node.kwargs:
            return UNKNOWN
        module = self._modules[node.target] if node.op == "call_module" else None
        if isinstance(module, ByMode):
            return hull(self.of(module.in_training), self.of(module.in_evaluation))
        name = operation(node, self._modules)
        if name not in OF_COMPLEX and any(math.isnan(self[x].low) for x in node.all_input_nodes):
            return COMPLEX
        result = RULES[name](Call(node, module, self)) if name in RULES else UNKNOWN
        dtype = node.kwargs.get("dtype")
        return _converted(result, _kind(dtype)) if isinstance(dtype, torch.dtype) else result

    def _type(self, node: fx.Node) -> str:
        """ "bool" and "int", the latter of Python's as of tensors, where that is certain, else ""."""
        if node.op == "get_attr":
            value = attribute(self._modules[""], node.target)
            return "bool" if isinstance(value, Tensor) and value.dtype == torch.bool else ""
        name = operation(node, self._modules)
        types = {self.types[x] for x in node.all_input_nodes}
        if name in BOOLEAN or name in LOGICAL and types == {"bool"}:
            return "bool"
        if name in CONVERSIONS:
            return "bool" if (CONVERSIONS[name] or Call(node, None, self).target_dtype()) == "bool" else ""
        if name in INDEXING:
            return "int"
        return types.pop() if len(types) == 1 and (name in KEEPING or types == {"int"} and name in WHOLE) else ""


class Call:
    """A call of an operation: its arguments, by position and name, and their ranges."""

    def __init__(self, node: fx.Node, module: nn.Module | None, ranges: Ranges):
        self.node, self.module, self.of, self._types = node, module, ranges.of, ranges.types

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

    def is_given(self, position: int | None, name: str) -> bool:
        return self.get(position, name) not in (None, False)

    def has_type(self, position: int, name: str) -> bool:
        """Whether an argument is certain to be of type "bool" or "int"."""
        x = self.get(position)
        return self._types[x] == name if isinstance(x, fx.Node) else type(x).__name__ == name

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
            number, function = function, lambda x, *args: torch.stack([x.new_tensor(number(v, *args)) for v in x.tolist()])
        x = torch.tensor(points, dtype=torch.float64, device="cpu")
        try:
            y, near = (function(t, *args, **kwargs) for t in (x.clone(), x.clamp(-1e30, 1e30)))
        except (RuntimeError, TypeError, ValueError, ArithmeticError):
            return None
        # At infinity many functions have infinity times 0.
        y = torch.where(y.isnan(), torch.where(near.abs() > 1e15, near * INF, near), y)
        return None if tensors or y.isnan().any() else y.tolist()


def operation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """One name for all spellings of an operation: module, function, method, operator, in place or not.

    None for what is not torch's, and for modules that hooks or a forward of their own make another.
    """
    if node.op == "call_module":
        module = modules[node.target]
        own = has_hooks(module) or "forward" in vars(module)
        classes = [] if own else [c for c in type(module).__mro__ if getattr(c, "forward", None) is type(module).forward]
        known = (c for c in classes if c.__module__.startswith(("torch.nn.modules.", "apotfx.")))
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

    return Interval(*(INF * sign if math.isnan(end) else end + sign * error(end) for end, sign in ((low, -1), (high, 1))))


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


def log_add(x: Interval, y: Interval) -> Interval:
    return Interval(max(x.low, y.low), INF)


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
        x, y = call.range(), call.range(1, "other", "exponent")
        return combine(y, x) if swapped else combine(x, y)

    return rule


def _extreme(combine: Callable[[Interval, Interval], Interval]) -> Rule:
    """torch.max and torch.min: of all elements, along a dimension with the indices, or of two tensors."""

    def rule(call: Call) -> Interval:
        if isinstance(call.get(1, "other"), fx.Node) and not call.has_type(1, "int"):
            return _of_two(combine)(call)
        return call.range() if call.size == 1 else _with_indices(call)

    return rule


def _max_pool(position: int) -> Rule:
    return lambda call: _with_indices(call) if call.is_given(position, "return_indices") else call.range()


def _average_pool(call: Call) -> Interval:
    if call.is_given(6, "divisor_override"):
        return _cone(call) if call.number(6, "divisor_override") > 0 else UNKNOWN
    return _keep_or_zero(call)  # the padding may count


def _power_average(call: Call) -> Interval:
    return NON_NEGATIVE if call.number(1, "norm_type") % 2 == 0 else _cone(call)


def _pad(call: Call) -> Interval:
    mode, value = call.get(2, "mode", default="constant"), call.get(3, "value")
    if mode in ("reflect", "replicate", "circular"):
        return call.range()
    return hull(call.range(), ZERO if value is None else call.of(value)) if mode == "constant" else UNKNOWN


def _constant_pad(position: int, *names: str) -> Rule:
    return lambda call: hull(call.range(), call.of(call.get(position, *names, default=0)))


def _block_diagonal(call: Call) -> Interval:
    return hull(call.all(), ZERO)


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
    chosen = 0 if call.node.op == "call_method" else 1  # x.where(condition, y)
    return hull(call.range(chosen, "input", "self"), call.range(2, "other"))


def _filled(position: int) -> Rule:
    """Of a value that the type of the tensor may make an integer or a bool."""
    return lambda call: hull(call.range(position, "fill_value", "value", "src"), UNIT)


def _seen(call: Call) -> Interval:
    """Of a tensor after a write to memory that it may lie in; see `functional.see`."""
    x, written, stored = call.node.args
    return call.of(stored.args[1]) if x is written else call.of((x, stored))


def _repeat_interleave(call: Call) -> Interval:
    return call.range() if call.size > 1 else NON_NEGATIVE  # of repeats alone, indices


def _scatter(call: Call) -> Interval:
    x = hull(call.range(), call.range(3, "src", "value", "source"))
    return x if call.get(4, "reduce") is None else NON_NEGATIVE if x.low >= 0 else UNKNOWN


def _scatter_reduce(call: Call) -> Interval:
    return NON_NEGATIVE if hull(call.range(), call.range(3, "src", "source")).low >= 0 else UNKNOWN


def _index_put(call: Call) -> Interval:
    x = hull(call.range(), call.range(2, "values", "source"))
    return cone(x) if call.is_given(3, "accumulate") else x


def _index_add(call: Call) -> Interval:
    alpha = call.of(call.get(4, "alpha", default=1))
    return cone(hull(call.range(), multiply(alpha, call.range(3, "source", "src"))))


def _pointwise(*critical: float, domain: Interval = UNKNOWN) -> Rule:
    """A function of each element: its values at the ends and at `critical`, between which it is monotonic."""

    def rule(call: Call) -> Interval:
        x = call.range()
        low, high = max(x.low, domain.low), min(x.high, domain.high)
        values = call.evaluate([low, high, *(c for c in critical if low < c < high)]) if low <= high else None
        return UNKNOWN if values is None else rounded(min(values), max(values))

    return rule


def _magnitude(call: Call) -> Interval:
    return NON_NEGATIVE if call.range() == UNKNOWN or math.isnan(call.range().low) else _pointwise(0.0)(call)


def _real(call: Call) -> Interval:
    return UNKNOWN if math.isnan(call.range().low) else call.range()


def _angle(call: Call) -> Interval:
    return Interval(-3.1416 if math.isnan(call.range().low) else 0.0, 3.1416)


def _cosine(call: Call) -> Interval:
    return Interval(0.0 if call.all().low >= 0 else -1.0, 1.0)


def _softplus(call: Call) -> Interval:
    beta, threshold = call.number(1, "beta", default=1), call.number(2, "threshold", default=20)
    if beta > 0 and threshold >= 20:
        return _pointwise()(call)
    return NON_NEGATIVE if beta > 0 and threshold >= 0 else UNKNOWN  # where it steps from log(1 + exp(x)) to x


def _threshold(call: Call) -> Interval:
    x, threshold = call.range(), call.number(1, "threshold")
    if math.isnan(threshold):
        return UNKNOWN
    above = maximum(x, Interval(threshold, threshold))
    return above if x.low > threshold else hull(above, call.range(2, "value"))


def _prelu(call: Call) -> Interval:
    return _leaky(call.range(), call.range(1, "weight") if call.module is None else UNKNOWN)


def _rrelu(call: Call) -> Interval:
    slopes = call.get(1, "lower", default=1 / 8), call.get(2, "upper", default=1 / 3)
    return _leaky(call.range(), call.of(slopes))


def _leaky(x: Interval, slope: Interval) -> Interval:
    positive, below = maximum(x, ZERO), minimum(x, ZERO)
    return positive if x.low >= 0 else hull(positive, multiply(below, slope))


def _glu(call: Call) -> Interval:
    return multiply(call.range(), UNIT)


def _nan_to_num(call: Call) -> Interval:
    replacements = (call.get(i, name) for i, name in ((1, "nan"), (2, "posinf"), (3, "neginf")))
    return hull(_keep_or_zero(call), *(call.of(x) for x in replacements if x is not None))


def _fraction(call: Call) -> Interval:
    return fmod(call.range(), ONE)


def _sum(sign: float = 1.0, swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        if any(isinstance(x, (tuple, list)) for x in call.node.args):
            return call.of(call.node.args)  # a concatenation of shapes
        x, y = call.range(), multiply(call.range(1, "other"), Interval(sign, sign))
        alpha = call.of(call.get(2, "alpha", default=1))
        return add(negative(multiply(x, alpha)), negative(y)) if swapped else add(x, multiply(y, alpha))

    return rule


def _product(call: Call) -> Interval:
    if any(isinstance(x, (tuple, list)) for x in call.node.args):
        return UNKNOWN  # a list so many times
    x, y = call.get(0, "input", "self"), call.get(1, "other")
    return square(call.of(x)) if x is y and isinstance(x, fx.Node) else multiply(call.of(x), call.of(y))


def _quotient(swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        result = _of_two(divide, swapped)(call)
        whole = call.is_given(2, "rounding_mode") or "floor" in (torch_name(call.node) or "")
        return _floor(result) if whole else result

    return rule


def _power(swapped: bool = False) -> Rule:
    def rule(call: Call) -> Interval:
        base, exponent = call.get(0, "input", "self"), call.get(1, "exponent", "other")
        base, exponent = (exponent, base) if swapped else (base, exponent)
        if isinstance(exponent, (int, float)) and exponent >= 0:
            return _pointwise(0.0, domain=NON_NEGATIVE if exponent % 1 else UNKNOWN)(call)
        even = isinstance(exponent, (int, float)) and exponent % 2 != 1
        return NON_NEGATIVE if even or call.of(base).low >= 0 else UNKNOWN

    return rule


def _clamp(call: Call) -> Interval:
    x = call.range()
    for combine, position, name in ((maximum, 1, "min"), (minimum, 2, "max")):
        bound = call.get(position, name)
        x = x if bound is None else combine(x, call.of(bound))
    return x


def _matrix_product(call: Call) -> Interval:
    """Of any number of factors, alone or in a sequence."""
    product = ONE
    for node in call.node.args:
        for x in node if isinstance(node, (tuple, list)) else (node,):
            product = multiply(product, call.of(x)) if isinstance(x, fx.Node) else product
    named = [call.of(x) for x in call.node.kwargs.values() if isinstance(x, fx.Node)]
    for x in named:
        product = multiply(product, x)
    return cone(product)


def _layer(call: Call) -> Interval:
    """F.linear, F.conv2d, ...: of input, weight and bias."""
    product = cone(multiply(call.range(), call.of(call.get(1, "weight"))))
    bias = call.node.kwargs.get("bias", call.node.args[2] if len(call.node.args) > 2 else None)
    return product if bias is None else add(product, call.of(bias))


def _added_product(call: Call) -> Interval:
    """torch.addmm and the like: beta * input + alpha * (sums of products of the next two)."""
    names = ("mat1", "batch1", "mat", "vec1"), ("mat2", "batch2", "vec", "vec2")
    product = cone(multiply(call.range(1, *names[0]), call.range(2, *names[1])))
    beta, alpha = (call.of(call.node.kwargs.get(key, 1)) for key in ("beta", "alpha"))
    return add(multiply(beta, call.range()), multiply(alpha, product))


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
        return UNIT if x.low >= 0 else Interval(-1.0, 1.0)
    return NON_NEGATIVE if x.low >= 0 else UNKNOWN


def _at_least(call: Call) -> Interval:
    return Interval(call.range().low, INF)


def _heaviside(call: Call) -> Interval:
    return hull(UNIT, call.range(1, "values"))


def _copysign(call: Call) -> Interval:
    most = max(-call.range().low, call.range().high)
    return Interval(-most, most)


def _bitwise(call: Call) -> Interval:
    operands = [call.of(x) for x in (*call.node.args, *call.node.kwargs.values())]
    is_bool = all(call.has_type(i, "bool") for i in range(len(call.node.args)))
    return UNIT if is_bool else NON_NEGATIVE if hull(*operands).low >= 0 else UNKNOWN


def _not(call: Call) -> Interval:
    return UNIT if call.has_type(0, "bool") else UNKNOWN


def _numbers(call: Call) -> Interval:
    """Between 0 and the arguments: full, arange, linspace, randint, uniform_, tensor."""
    arguments = (*call.node.args[call.node.op == "call_method" :], *call.node.kwargs.values())
    return hull(ZERO, ONE, *(call.of(x) for x in arguments if isinstance(x, (fx.Node, int, float, tuple, list))))


def _convert(dtype: str = "") -> Rule:
    return lambda call: _converted(call.range(), dtype or call.target_dtype())


def _converted(x: Interval, kind: str) -> Interval:
    if kind in ("", "float"):
        return x
    if kind in ("bool", "complex"):
        return UNIT if kind == "bool" else COMPLEX
    if kind == "unknown":
        return hull(_floor(x), UNIT) if x.low >= 0 else UNKNOWN
    x, limits = _floor(x), torch.iinfo(getattr(torch, kind))
    fits = kind in ("int32", "int64") or limits.min <= x.low and x.high <= limits.max
    return x if fits else Interval(float(limits.min), float(limits.max))


def _table(*groups: tuple[str, Rule]) -> dict[str, Rule]:
    return {name: rule for names, rule in groups for name in names.replace("_", "").split()}


# Their results are elements of their first argument.
KEEP = """
    identity alias view view_as reshape reshape_as flatten unflatten ravel permute transpose swapaxes swapdims movedim
    moveaxis t adjoint .T .mT .H .mH .data .values squeeze unsqueeze expand expand_as broadcast_to repeat tile
    contiguous clone detach cpu cuda pin_memory positive pos conj conj_physical resolve_conj resolve_neg requires_grad
    lift_fresh exchange_last_two as_strided view_copy item tolist as_tensor sym_float sym_int
    getitem index index_select select slice narrow take take_along_dim gather masked_select unbind chunk split
    split_with_sizes tensor_split hsplit vsplit dsplit unsafe_chunk unsafe_split unsafe_split_with_sizes diagonal
    linalg_diagonal roll flip fliplr flipud rot90 msort amax amin aminmax pixel_shuffle pixel_unshuffle
    channel_shuffle native_channel_shuffle .min .max fft_fftshift fft_ifftshift
    reflection_pad1d reflection_pad2d reflection_pad3d replication_pad1d replication_pad2d replication_pad3d
    circular_pad1d circular_pad2d circular_pad3d
"""
KEEP_ALL = """
    cat concat concatenate stack hstack vstack dstack column_stack row_stack meshgrid broadcast_tensors cartesian_prod
    combinations atleast_1d atleast_2d atleast_3d select_scatter slice_scatter diagonal_scatter as_strided_scatter
    fmax fmin
"""
KEEP_OR_ZERO = """
    tril triu diag diag_embed diagflat unfold unfold_copy im2col max_unpool1d max_unpool2d max_unpool3d zero_pad1d zero_pad2d
    zero_pad3d to_dense renorm roi_align roi_pool ps_roi_align ps_roi_pool
"""
# Averages: weights of at least 0 that add up to 1.
AVERAGE = """
    mean nanmean adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d quantile nanquantile
    upsample_nearest upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_bilinear upsample_linear1d
    upsample_bilinear2d upsample_trilinear3d upsample_bilinear2d_aa
"""
# Sums, dropout and other results that have the sign of what they are computed from, but not its size.
CONE = """
    sum nansum sum_to_size cumsum trace fold col2im normalize dropout dropout1d dropout2d dropout3d feature_dropout
    stochastic_depth drop_block2d drop_block3d
"""
MONOTONIC = """
    relu relu6 hardtanh selu celu sigmoid expit hardsigmoid tanh softsign log_sigmoid tanhshrink hardshrink softshrink
    exp exp2 expm1 sinh asinh arcsinh atan arctan erf erfc erfcx ndtr log_ndtr floor ceil round trunc fix sign sgn
    rad2deg deg2rad neg negative
"""
INDICES = """
    argmax argmin argsort searchsorted bucketize nonzero argwhere count_nonzero histc numel nelement size dim
    ndimension .shape .ndim .indices randperm multinomial tril_indices triu_indices matrix_rank linalg_matrix_rank
"""
COMPARISONS = """
    eq ne lt le gt ge equal not_equal less less_equal greater greater_equal isnan isinf isfinite isposinf isneginf isreal
    isin isclose allclose logical_and logical_or logical_xor logical_not any all signbit is_floating_point is_complex
"""
MAGNITUDES = """
    norm linalg_norm linalg_vector_norm linalg_matrix_norm frobenius_norm nuclear_norm dist cdist pdist
    pairwise_distance var std linalg_svdvals hypot mse_loss l1_loss smooth_l1_loss huber_loss poisson exponential
    binomial geometric log_normal fft_rfftfreq linalg_cond
"""
CONVERSIONS = {  # to what
    "to": "", "type": "", "typeas": "", "float": "float", "half": "float", "double": "float", "bfloat16": "float",
    "cfloat": "complex", "cdouble": "complex", "chalf": "complex",
    "bool": "bool", "int": "int32", "long": "int64", "short": "int16", "char": "int8", "byte": "uint8",
}  # fmt: skip
RULES = _table(
    (KEEP, _keep), (KEEP_ALL, Call.all), (KEEP_OR_ZERO, _keep_or_zero), (AVERAGE, _keep), (CONE, _cone),
    ("alias_copy detach_copy permute_copy transpose_copy t_copy squeeze_copy unsqueeze_copy expand_copy narrow_copy "
     "select_copy slice_copy diagonal_copy unbind_copy as_strided_copy split_with_sizes_copy split_copy", _keep),
    (MONOTONIC, _pointwise()), (INDICES, _fixed(NON_NEGATIVE)), (COMPARISONS, _fixed(UNIT)),
    (MAGNITUDES, _fixed(NON_NEGATIVE)),
    ("leaky_relu elu square cosh i0 i0e", _pointwise(0.0)), ("abs absolute", _magnitude), ("real .real", _real),
    ("imag .imag view_as_real", _fixed(UNKNOWN)),
    ("silu", _pointwise(-1.2784645)), ("gelu", _pointwise(-0.7517915, -0.7524613)), ("mish", _pointwise(-1.1924312)),
    ("hardswish", _pointwise(-1.5)), ("softplus", _softplus), ("threshold", _threshold), ("prelu", _prelu),
    ("rrelu", _rrelu), ("glu", _glu), ("nan_to_num", _nan_to_num), ("frac", _fraction),
    ("sqrt rsqrt log log2 log10", _pointwise(domain=NON_NEGATIVE)), ("log1p", _pointwise(domain=Interval(-1.0, INF))),
    ("acosh arccosh", _pointwise(domain=Interval(1.0, INF))), ("logit", _pointwise(domain=UNIT)),
    ("asin arcsin acos arccos atanh arctanh erfinv", _pointwise(domain=Interval(-1.0, 1.0))),
    ("sin cos", _fixed(Interval(-1.0, 1.0))), ("cosine_similarity", _cosine), ("sinc", _fixed(Interval(-0.2173, 1.0))),
    ("angle", _angle), ("atan2 arctan2", lambda call: Interval(0.0 if call.range().low >= 0 else -3.1416, 3.1416)),
    ("igamma igammac gammainc gammaincc", _fixed(UNIT)), ("i1", _pointwise()), ("i1e ldexp", _cone),
    ("bincount", lambda call: NON_NEGATIVE if call.get(1, "weights") is None else cone(call.range(1, "weights"))),
    ("softmax softmin softmax2d gumbel_softmax safe_softmax bernoulli rand rand_like one_hot eye", _fixed(UNIT)),
    ("log_softmax", _fixed(Interval(-INF, 0.0))),
    ("zeros zeros_like new_zeros zero", _fixed(ZERO)), ("ones ones_like new_ones", _fixed(ONE)),
    ("full full_like fill copy", _filled(1)), ("new_full", _filled(2)),
    ("arange linspace randint randint_like uniform tensor scalar_tensor", _numbers),
    ("random", lambda call: hull(_numbers(call), NON_NEGATIVE)),
    ("max", _extreme(maximum)), ("min", _extreme(minimum)),
    ("median nanmedian mode kthvalue sort topk cummax cummin unique unique_consecutive var_mean std_mean "
     "max_pool1d_with_indices max_pool2d_with_indices max_pool3d_with_indices adaptive_max_pool1d_with_indices "
     "adaptive_max_pool2d_with_indices adaptive_max_pool3d_with_indices fractional_max_pool2d_with_indices "
     "fractional_max_pool3d_with_indices", _with_indices),
    ("max_pool1d max_pool2d max_pool3d", _max_pool(6)), ("fractional_max_pool2d fractional_max_pool3d", _max_pool(4)),
    ("adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d", _max_pool(2)),
    ("avg_pool1d avg_pool2d avg_pool3d", _average_pool), ("lp_pool1d lp_pool2d lp_pool3d", _power_average),
    ("pad", _pad), ("constant_pad_nd", _constant_pad(2, "value")), ("pad_sequence", _constant_pad(2, "padding_value")),
    ("constant_pad1d constant_pad2d constant_pad3d", _constant_pad(None, "value")), ("block_diag", _block_diagonal),
    ("interpolate upsample upsampling_nearest2d upsampling_bilinear2d", _interpolate), ("grid_sample", _grid_sample),
    ("local_response_norm cross_map_lrn2d", _response_norm), ("rms_norm", _rms_norm),
    ("where", _where), ("repeat_interleave", _repeat_interleave),
    ("masked_fill masked_scatter", _hull_of((0,), (2, "value", "source"))), ("put", _index_put),
    ("index_fill index_copy", _hull_of((0,), (3, "value", "source"))), ("fill_diagonal", _hull_of((0,), (1,))),
    ("embedding", _hull_of((1, "weight"))), ("setitem", _hull_of((0,), (2, "value"))), ("store", _hull_of((0,), (1,))),
    ("see", _seen), ("scatter", _scatter), ("index_put", _index_put),
    ("scatter_add index_add", _index_add), ("scatter_reduce index_reduce", _scatter_reduce),
    ("add radd", _sum()), ("sub subtract", _sum(-1.0)), ("rsub", _sum(-1.0, swapped=True)),
    ("mul multiply rmul", _product), ("div divide true_divide truediv floor_divide floordiv", _quotient()),
    ("rdiv rtruediv rfloordiv", _quotient(swapped=True)), ("reciprocal", lambda call: divide(ONE, call.range())),
    ("remainder mod", _of_two(remainder)), ("rmod", _of_two(remainder, swapped=True)), ("fmod", _of_two(fmod)),
    ("pow float_power", _power()), ("rpow", _power(swapped=True)),
    ("maximum sym_max", _of_two(maximum)), ("minimum sym_min", _of_two(minimum)), ("logaddexp logaddexp2", _of_two(log_add)),
    ("heaviside", _heaviside), ("copysign", _copysign), ("clamp clip", _clamp),
    ("clamp_min", lambda call: maximum(call.range(), call.range(1, "min"))),
    ("clamp_max", lambda call: minimum(call.range(), call.range(1, "max"))),
    ("matmul rmatmul imatmul mm bmm mv dot vdot inner outer ger einsum tensordot kron chain_matmul linalg_matmul "
     "linalg_multi_dot linalg_vecdot", _matrix_product),
    ("linear conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d functional_layer", _layer),
    ("addmm addmv addbmm baddbmm addr", _added_product), ("addcmul", _added_term(multiply)),
    ("addcdiv", _added_term(divide)), ("lerp", _lerp), ("scaled_dot_product_attention", lambda c: cone(c.range(2, "value"))),
    ("prod cumprod", _factors), ("logsumexp logcumsumexp", _at_least),
    ("and and_ bitwise_and or or_ bitwise_or xor bitwise_xor ror rxor", _bitwise), ("invert bitwise_not", _not),
    *((name, _convert(kind)) for name, kind in CONVERSIONS.items()),
    ("complex polar view_as_complex stft fft_fft fft_fft2 fft_fftn fft_ifft fft_ifft2 fft_ifftn fft_rfft fft_rfft2 "
     "fft_rfftn fft_ihfft fft_ihfft2 fft_ihfftn linalg_eig linalg_eigvals", _fixed(COMPLEX)),
)  # fmt: skip


def _names(names: str) -> set[str]:
    return set(names.replace("_", "").split())


POOLS_AND_PADS = """
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d
    avg_pool3d lp_pool1d lp_pool2d lp_pool3d pad constant_pad_nd constant_pad1d constant_pad2d constant_pad3d
    interpolate upsample upsampling_nearest2d upsampling_bilinear2d grid_sample
"""
KEEPING = _names(KEEP + KEEP_ALL + KEEP_OR_ZERO + AVERAGE + CONE + POOLS_AND_PADS)
BOOLEAN = _names(COMPARISONS)
LOGICAL = _names("and and_ bitwise_and or or_ bitwise_or xor bitwise_xor invert bitwise_not")
INDEXING = _names(INDICES)
WHOLE = _names("add sub mul floordiv mod neg")
OF_COMPLEX = BOOLEAN | _names(INDICES + MAGNITUDES + "abs absolute angle real .real imag .imag view_as_real")
OF_COMPLEX -= {"var", "std"}
