"""The program: what a network computes in evaluation, step by step, in single assignment.

Every value is a tensor in float32, codes (the integer levels of a layer's input), or a number; a step computes one value
from earlier ones and changes none. An export holds the program as JSON; the interpreter in network.py defines what it
means, and the targets translate it step by step.
"""

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from types import UnionType
from typing import ClassVar, Protocol, get_args, get_origin, get_type_hints

import torch
from torch import Tensor
from torch.nn import functional

from apotfx.errors import ApotfxError
from apotfx.integer.functions import FUNCTIONS
from apotfx.integer.layers import IntegerLayer
from apotfx.layers import Geometry
from apotfx.operators import Convolution, MatrixProduct, Operator, TransposedConvolution
from apotfx.reproducible import affine, in_float64

OPERATORS = {cls.__name__: cls for cls in (Convolution, TransposedConvolution, MatrixProduct)}
MAX_DEPTH = 16


class Numbers(Protocol):
    """What the steps of a program refer to by name."""

    def layer(self, name: str) -> IntegerLayer:
        """A quantized layer."""

    def tensor(self, name: str) -> Tensor:
        """A constant, or a weight or bias of a layer that stays in float."""

    def module(self, name: str) -> Callable:
        """A module of the float network."""


@dataclass(frozen=True)
class Step:
    """One step. All but inputs have `compute(numbers, *values)`: the value, from those that the step reads.

    Attributes:
        name: of the value that it computes.
        inputs: the names of the values that it reads, in order.
    """

    kind: ClassVar[str]
    name: str
    inputs: tuple[str, ...]

    def tensors(self) -> dict[str, int | None]:
        """By name, the tensors that it refers to besides those of layers, with their number of dimensions if that is known."""
        return {}


@dataclass(frozen=True)
class Input(Step):
    """An argument of the network. `default` is what it is if it is not given; `required` says that there is none."""

    kind = "input"
    required: bool
    default: object


@dataclass(frozen=True)
class Constant(Step):
    """A tensor of the export."""

    kind = "constant"
    tensor: str

    def compute(self, numbers: Numbers) -> Tensor:
        return numbers.tensor(self.tensor)

    def tensors(self) -> dict[str, int | None]:
        return {self.tensor: None}


@dataclass(frozen=True)
class Encode(Step):
    """The codes of a layer's input; see `functional.encode`. One product in float32 is rounded, the table is exact."""

    kind = "encode"
    layer: str

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return numbers.layer(self.layer).encode(x)


@dataclass(frozen=True)
class Product(Step):
    """A quantized layer on codes, or on floats where its input stays float.

    Sums of integer products are exact; they are rounded to float32 once, and rounded after the product with the scale
    and after the sum with the bias.
    """

    kind = "product"
    layer: str

    def compute(self, numbers: Numbers, codes: Tensor) -> Tensor:
        return numbers.layer(self.layer).multiply(codes)


@dataclass(frozen=True)
class FloatLayer(Step):
    """A layer that stays in float: torch's convolution or matrix product, which rounds as torch does.

    Attributes:
        layer: its tensors are `<layer>.weight` and, if it has one, `<layer>.bias`.
        operator: its geometry; `pad` comes before it, as `torch.nn.functional.pad` takes it, in `pad_mode`.
    """

    kind = "float_layer"
    layer: str
    operator: Operator
    pad: tuple[int, ...]
    pad_mode: str
    bias: bool

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        geometry = Geometry(self.operator, self.pad, self.pad_mode)
        weight = numbers.tensor(f"{self.layer}.weight")
        bias = numbers.tensor(f"{self.layer}.bias") if self.bias else None
        if isinstance(self.operator, MatrixProduct):
            return functional.linear(x, weight, bias)
        kind = "conv" if isinstance(self.operator, Convolution) else "conv_transpose"
        settings = {key: value for key, value in self.operator._asdict().items()}
        y = getattr(functional, f"{kind}{geometry.dims}d")(geometry.prepare(x), weight, bias, **settings)
        return geometry.finish(y, None, x)

    def tensors(self) -> dict[str, int | None]:
        weight = {f"{self.layer}.weight": 1 + len(self.operator.channel_shape)}
        return weight | ({f"{self.layer}.bias": 1} if self.bias else {})


@dataclass(frozen=True)
class Affine(Step):
    """A batch norm: `x * multiplier + offset` per channel, the second dimension; product and sum are both rounded.

    Attributes:
        norm: the tensors are `<norm>.multiplier` and `<norm>.offset`, [C].
    """

    kind = "affine"
    norm: str

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return affine(x, numbers.tensor(f"{self.norm}.multiplier"), numbers.tensor(f"{self.norm}.offset"))

    def tensors(self) -> dict[str, int | None]:
        return {f"{self.norm}.multiplier": 1, f"{self.norm}.offset": 1}


@dataclass(frozen=True)
class Clamp(Step):
    """`min(max(x, low), high)`, exact. `high` is None for infinity."""

    kind = "clamp"
    low: float
    high: float | None

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return x.relu() if (self.low, self.high) == (0, None) else x.clamp(self.low, self.high)


@dataclass(frozen=True)
class Add(Step):
    """The sum of two tensors, rounded."""

    kind = "add"

    def compute(self, numbers: Numbers, a: Tensor, b: Tensor) -> Tensor:
        return a + b


@dataclass(frozen=True)
class Concatenate(Step):
    """Tensors one behind another along `dim`; exact."""

    kind = "concatenate"
    dim: int

    def compute(self, numbers: Numbers, *values: Tensor) -> Tensor:
        return torch.cat(values, self.dim)


@dataclass(frozen=True)
class Flatten(Step):
    """[N, C, ...] as [N, everything else]; exact."""

    kind = "flatten"

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return x.flatten(1)


@dataclass(frozen=True)
class Window(Step):
    """A pooling window: a number per spatial dimension. `ceil_mode`: a last window may stand out beyond the padding."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    ceil_mode: bool


@dataclass(frozen=True)
class MaxPool(Window):
    """The largest value in each window; exact. Padding never wins."""

    kind = "max_pool"
    dilation: tuple[int, ...]

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        pool = getattr(functional, f"max_pool{len(self.kernel)}d")
        return pool(x, self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode)


@dataclass(frozen=True)
class AveragePool(Window):
    """The mean of each window, summed and divided in float64 and rounded once. `count_include_pad` as torch has it."""

    kind = "average_pool"
    count_include_pad: bool

    @property
    def dilation(self) -> tuple[int, ...]:
        return (1,) * len(self.kernel)

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        pool = getattr(functional, f"avg_pool{len(self.kernel)}d")
        return in_float64(pool, x, self.kernel, self.stride, self.padding, self.ceil_mode, self.count_include_pad)


@dataclass(frozen=True)
class Average(Step):
    """The mean over dimensions, which count from the end where negative; in float64, rounded once."""

    kind = "average"
    dims: tuple[int, ...]
    keepdim: bool

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return in_float64(torch.mean, x, self.dims, self.keepdim)


@dataclass(frozen=True)
class AdaptiveAverage(Step):
    """Means of windows that divide each spatial dimension into `output` parts, None to keep it; as an average pool."""

    kind = "adaptive_average"
    output: tuple[int | None, ...]

    def compute(self, numbers: Numbers, x: Tensor) -> Tensor:
        return in_float64(getattr(functional, f"adaptive_avg_pool{len(self.output)}d"), x, self.output)


@dataclass(frozen=True)
class Function(Step):
    """One of torch's functions; what it rounds, it rounds as torch does on the machine that runs it.

    Attributes:
        function: a key of FUNCTIONS.
        arguments: [positional, by name], as JSON; {"value": i} stands for the i-th of the inputs, and see `_DECODED`.
    """

    kind = "function"
    function: str
    arguments: list

    def compute(self, numbers: Numbers, *values: object) -> object:
        args, kwargs = bound(self.arguments, values)
        return FUNCTIONS[self.function](*args, **kwargs)


@dataclass(frozen=True)
class Foreign(Step):
    """What only the float network's own code can compute.

    Attributes:
        calls: what it is, and why it is foreign.
        module: the name of the module that it calls; "" for anything else.
        settings: of the module, and the types of the modules inside.
        arguments: as those of `Function`; without what JSON cannot say.
    """

    kind = "foreign"
    calls: str
    module: str
    settings: dict
    arguments: list

    def compute(self, numbers: Numbers, *values: object) -> object:
        args, kwargs = bound(self.arguments, values)
        return numbers.module(self.module)(*args, **kwargs)


STEPS: dict[str, type[Step]] = {
    cls.kind: cls
    for cls in (
        Input, Constant, Encode, Product, FloatLayer, Affine, Clamp, Add, Concatenate, Flatten, MaxPool, AveragePool,
        Average, AdaptiveAverage, Function, Foreign,
    )
}  # fmt: skip


@dataclass(frozen=True)
class Program:
    """A network in evaluation.

    Attributes:
        steps: in order of execution.
        outputs: what the network returns, as the arguments of a `Function`, whose inputs are `results`.
        results: the names of the values that `outputs` refers to.
    """

    steps: tuple[Step, ...]
    outputs: object
    results: tuple[str, ...]

    @property
    def foreign(self) -> list[Foreign]:
        return [step for step in self.steps if isinstance(step, Foreign)]

    def readers(self) -> dict[str, list[Step | None]]:
        """By value, the steps that read it; None stands for the result of the network."""
        found: dict[str, list[Step | None]] = {step.name: [] for step in self.steps}
        for step in self.steps:
            for name in step.inputs:
                found[name].append(step)
        for name in self.results:
            found[name].append(None)
        return found

    def needed(self) -> tuple[Step, ...]:
        """The steps that the result depends on: without guards, and what only they read."""
        names = set(self.results)
        for step in reversed(self.steps):
            names |= set(step.inputs) if step.name in names else set()
        return tuple(step for step in self.steps if step.name in names)

    @property
    def result(self) -> str | None:
        """The value that the network returns, if that is a single one as it is."""
        return self.results[0] if self.outputs == {"value": 0} else None

    def to_json(self) -> dict:
        steps = [
            {"step": step.kind} | {f.name: _plain(getattr(step, f.name)) for f in fields(step)} for step in self.steps
        ]
        return {"steps": steps, "outputs": self.outputs, "results": list(self.results)}

    @classmethod
    def from_json(cls, content: dict) -> "Program":
        """Raises: ValueError: not a program; says where."""
        known: set[str] = set()
        steps = []
        for i, entry in enumerate(content["steps"]):
            step = _step(entry, f"program.steps[{i}]")
            _require_known(step.inputs, known, f"program.steps[{i}].inputs")
            if step.name in known:
                raise ValueError(f"program.steps[{i}].name is {step.name[:60]!r}, expected a name that no other step has")
            if isinstance(step, (Function, Foreign)):
                _require_arguments(step.arguments, len(step.inputs), f"program.steps[{i}].arguments")
            known.add(step.name)
            steps.append(step)
        _require_known(content["results"], known, "program.results")
        _require_arguments([[content["outputs"]], {}], len(content["results"]), "program.outputs")
        return cls(tuple(steps), content["outputs"], tuple(content["results"]))


def _plain(value: object) -> object:
    if isinstance(value, tuple(OPERATORS.values())):
        return {"kind": type(value).__name__} | {key: _plain(x) for key, x in value._asdict().items()}
    return [_plain(x) for x in value] if isinstance(value, tuple) else value


def _step(entry: dict, place: str) -> Step:
    cls = STEPS.get(entry.get("step"))
    if cls is None:
        raise ValueError(f"{place}.step is {str(entry.get('step'))[:60]!r}, expected one of {', '.join(STEPS)}")
    hints = _hints(cls)
    if entry.keys() != {"step", *hints}:
        key = min(entry.keys() ^ {"step", *hints})
        raise ValueError(f"{place}.{key[:60]} is {'unknown' if key in entry else 'absent'}, expected of {cls.kind}: {', '.join(hints)}")
    step = cls(**{key: _typed(entry[key], hint, f"{place}.{key}") for key, hint in hints.items()})
    if isinstance(step, Function) and step.function not in FUNCTIONS:
        raise ValueError(f"{place}.function is {step.function[:60]!r}, expected one that this version of apotfx knows")
    if isinstance(step, Window) and len({len(x) for x in (step.kernel, step.stride, step.padding)}) > 1:
        raise ValueError(f"{place}: expected as many numbers of kernel, stride and padding")
    return step


@functools.cache
def _hints(cls: type[Step]) -> dict[str, object]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def _typed(value: object, hint: object, place: str) -> object:
    """A value of a JSON file as a field's type. Raises: ValueError."""
    args, origin = get_args(hint), get_origin(hint)
    if hint is object or hint in (list, dict) and isinstance(value, hint):
        return value
    if origin is UnionType and type(None) in args:
        return None if value is None else _typed(value, args[0], place)
    if origin is tuple and isinstance(value, list) and len(value) <= 2**16:
        return tuple(_typed(x, args[0], place) for x in value)
    if hint is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if hint is int and type(value) is int and abs(value) < 2**31 or hint is bool and type(value) is bool:
        return value
    if hint is str and isinstance(value, str) and len(value) <= 1000 and value.isprintable():
        return value
    if hint == Operator and isinstance(value, dict) and value.get("kind") in OPERATORS:
        cls = OPERATORS[value["kind"]]
        types = get_type_hints(cls)
        if value.keys() == {"kind", *types}:
            return cls(**{key: _typed(value[key], types[key], f"{place}.{key}") for key in types})
    what = {str: "printable text", int: "an integer", float: "a finite number", bool: "true or false", list: "a list", dict: "an object"}
    expected = "a list" if origin is tuple else what.get(hint, "an operator")
    raise ValueError(f"{place} is {str(value)[:60]!r}, expected {expected}")


def _require_known(names: Sequence[str], known: set[str], place: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"{place}: {str(name)[:60]!r} is no value of an earlier step")


def _require_arguments(arguments: list, count: int, place: str) -> None:
    if len(arguments) != 2 or not isinstance(arguments[0], list) or not isinstance(arguments[1], dict):
        raise ValueError(f"{place}: expected a list and an object")
    try:
        for x in (*arguments[0], *arguments[1].values()):
            decode(x, (None,) * count)
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{place}: expected numbers, texts, lists and what stands for values ({error!r:.60})") from None


# Arguments of functions as JSON.

_DECODED: dict[str, Callable[[object], object]] = {
    "tuple": tuple,
    "slice": lambda parts: slice(*parts),
    "dict": dict,
    "float": {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}.__getitem__,
    "dtype": lambda name: {str(d).removeprefix("torch."): d for d in vars(torch).values() if isinstance(d, torch.dtype)}[name],
    "ellipsis": lambda _: ...,
}


def encode(value: object, reference: Callable[[object], int | None]) -> object:
    """An argument as JSON; `reference` gives the number of the input that a value is, None if it is none.

    Raises: ValueError: it cannot be written.
    """
    index = reference(value)
    if index is not None:
        return {"value": index}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, (tuple, list, torch.Size)):
        items = [encode(x, reference) for x in value]
        return items if isinstance(value, list) else {"tuple": items}
    if isinstance(value, slice):
        return {"slice": [encode(x, reference) for x in (value.start, value.stop, value.step)]}
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {"dict": {key: encode(x, reference) for key, x in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if value is ...:
        return {"ellipsis": None}
    raise ValueError(f"a {type(value).__name__}")


def decode(value: object, values: Sequence[object], depth: int = 0) -> object:
    """The inverse of `encode`, with `values` for the inputs."""
    if depth > MAX_DEPTH:
        raise TypeError("nested too deep")
    if isinstance(value, list):
        return [decode(x, values, depth + 1) for x in value]
    if not isinstance(value, dict):
        return value
    ((key, content),) = value.items() if len(value) == 1 else ((None, None),)
    if key == "value":
        if type(content) is not int or content < 0:
            raise TypeError("no number of an input")
        return values[content]
    if key == "dict":
        return {name: decode(x, values, depth + 1) for name, x in content.items()}
    return _DECODED[key](decode(content, values, depth + 1))


def bound(arguments: list, values: Sequence[object]) -> tuple[list, dict]:
    """(positional arguments, arguments by name) with `values` for the inputs."""
    args, kwargs = arguments
    return [decode(x, values) for x in args], {key: decode(x, values) for key, x in kwargs.items()}


def inputs_of(value: object) -> Iterator[object]:
    """What an argument consists of, from left to right."""
    if isinstance(value, (tuple, list)):
        for x in value:
            yield from inputs_of(x)
    elif isinstance(value, dict):
        yield from inputs_of(list(value.values()))
    elif isinstance(value, slice):
        yield from inputs_of((value.start, value.stop, value.step))
    else:
        yield value


def refuse(step: Step, target: str, what: str | None = None) -> ApotfxError:
    """The error that says that `target` has no way to express a step, which may be told more precisely: `what`."""
    key = {"function": "function", "foreign": "calls"}.get(step.kind)
    what = what or (getattr(step, key) if key else step.kind.replace("_", " "))
    return ApotfxError(f"{target}: the step {step.name} ({what}) cannot be expressed; remove it from the network")
