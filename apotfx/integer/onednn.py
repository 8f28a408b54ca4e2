"""The integer network on 8-bit arithmetic: oneDNN's convolutions, and one pass over memory between two of them.

A layer takes bytes of levels and returns its accumulators times their scale. Biases, batch norms, ReLUs, residual
additions and the next layers' encoders between them are gathered into one `Pointwise` operation, which computes them in
the order and with the roundings of the reference network, so that the results are the same bits.
"""

import math
import operator
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx, nn

from apotfx import kernels
from apotfx.engine import what_bytes_lack, what_kernels_lack
from apotfx.errors import ApotfxError
from apotfx.functional import is_plain
from apotfx.generated_code import GraphModule
from apotfx.graph.network import Network
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.network import IntegerNetwork, as_program
from apotfx.integer.program import Add, Affine, Clamp, Encode, Input, MaxPool, Product, Step, decode
from apotfx.kernels import Encoder, Term
from apotfx.modules import has_hooks
from apotfx.operators import Convolution, TransposedConvolution, exact_dtype

SHAPES_KEPT = 4  # of inputs, per layer, with a weight packed for them
CACHED_FLOATS = 2**22  # of one activation; beyond the caches, memory is what a network waits for
# Fewer multiplications than this are quicker in float32, as oneDNN's 8-bit operators take 40 us more to call (measured).
WORTH_BYTES = 2**21


def what_onednn_lacks(network: nn.Module) -> str | None:
    """Why `network` cannot run on oneDNN's 8-bit operators here; None if it can."""
    if not isinstance(network, (Network, IntegerNetwork)):
        return "the network could not be traced"
    if not any(_takes_bytes(module) for module in network.modules()):
        return "no layer of the network fits 8-bit arithmetic"
    if (reason := as_program(network).what_lacks()) is not None:
        return reason
    if any(tensor.device.type != "cpu" for tensor in network.buffers()):
        return "the network is not on the CPU"
    return what_bytes_lack() or what_kernels_lack()


def _takes_bytes(module: nn.Module | None) -> bool:
    """Whether a layer can compute on bytes, exactly."""
    if not isinstance(module, IntegerLayer) or not module.is_integer or module.geometry.pad or has_hooks(module):
        return False
    operator, signed = module.geometry.operator, module.input_levels.signed
    if isinstance(operator, TransposedConvolution) or module.geometry.dims not in (0, 2):
        return False
    # With a zero point the sums are of bytes, not of levels.
    bound = 255 * module.levels.long().abs().flatten(1).sum(1).amax().item() if signed else module.accumulator_bound
    return (
        kernels.fits_byte(module.input_levels)
        and kernels.fits_byte(module.weight_levels)
        and bound < operator.byte_limit(signed)
    )


class CannotRun(Exception):
    """Shapes that the fused network has no way for; the reference has."""


def channels_innermost(x: Tensor) -> Tensor:
    """x in channels-last format if it has four dimensions, contiguous otherwise."""
    layout = torch.channels_last if x.dim() == 4 else torch.contiguous_format
    return x if x.is_contiguous(memory_format=layout) else x.contiguous(memory_format=layout)


class ByteLayer(nn.Module):
    """An integer layer without its encoder and its bias: bytes of levels in, accumulators times scale out.

    Attributes:
        layer: the reference.
        sign: int8 [C_out] of 1 and -1, by which the weights of a channel, and so its outputs, are multiplied.
    """

    def __init__(self, layer: IntegerLayer):
        super().__init__()
        self.layer = layer
        self.sign = torch.ones(len(layer.levels), dtype=torch.int8)
        self.zero_point = 128 if layer.input_levels.signed else 0
        self.packed: OrderedDict[torch.Size, Callable[[Tensor], Tensor]] = OrderedDict()

    @property
    def encoder(self) -> Encoder:
        return Encoder(self.layer.input_clip, self.layer.encoding, self.zero_point)

    def forward(self, codes: Tensor) -> Tensor:
        multiply = self.packed.get(codes.shape)
        if multiply is None:
            self.layer.require_shape(codes.shape)
            if codes.dim() != 4 and isinstance(self.layer.geometry.operator, Convolution):
                raise CannotRun
            multiply = self.packed[codes.shape] = self._operator(codes)
            if len(self.packed) > SHAPES_KEPT:
                self.packed.popitem(last=False)
        return multiply(channels_innermost(codes))

    def _operator(self, codes: Tensor) -> Callable[[Tensor], Tensor]:
        layer, weight = self.layer, self._signed_weight()
        operator, scale, zero_point = layer.geometry.operator, layer.scale, self.zero_point
        is_exact = exact_dtype(layer.accumulator_bound, 256, codes.device) == torch.float32
        if not is_exact or operator.multiplications(codes, weight) > WORTH_BYTES:
            return operator.pack_bytes(codes.shape, zero_point, weight, scale.reshape(-1), often=True)
        operator, weight = operator.for_shape(codes.shape, weight.float())
        weight = channels_innermost(weight)
        if zero_point:
            return lambda codes: operator.forward(codes.float().sub_(zero_point), weight).mul_(scale)
        return lambda codes: operator.forward(codes.float(), weight).mul_(scale)

    def _signed_weight(self) -> Tensor:
        return self.layer.levels * self.sign.view(-1, *(1 for _ in self.layer.levels.shape[1:]))

    def accumulators(self, codes: Tensor) -> Tensor:
        """The accumulators of an input of bytes, rounded to float32."""
        operator = self.layer.geometry.operator
        y = operator.forward_bytes(channels_innermost(codes), self.zero_point, self._signed_weight(), torch.ones(1))
        return y * self.sign.view(operator.channel_shape)


@dataclass(frozen=True)
class Summand:
    """A term of an expression: a node of the fused graph, and what is done to its value.

    Attributes:
        layer: whose output the node is, if the layer is called once; None for anything else.
        axes: the dimensions that `arithmetic` may count as the channels: 1 and -1 for the second and the last.
    """

    node: fx.Node
    arithmetic: Term = Term()  # noqa: RUF009 (immutable)
    layer: ByteLayer | None = None
    axes: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Expression:
    """What a node of the network computes from nodes of the fused graph: `clamp(sum of terms, low, high)`."""

    terms: tuple[Summand, ...]
    low: float = -math.inf
    high: float = math.inf

    @property
    def clamps(self) -> bool:
        return (self.low, self.high) != (-math.inf, math.inf)

    @property
    def is_node(self) -> bool:
        """Whether it is the value of a node as it is."""
        plain = all(part is None for part in self.terms[0].arithmetic)
        return len(self.terms) == 1 and plain and not self.clamps

    def can_enter(self, step: Step | None) -> bool:
        """Whether the expression with `step` applied to it is one too; None for the result of the network."""
        if isinstance(step, Clamp):
            return not self.clamps
        if self.clamps and not isinstance(step, MaxPool) or len(self.terms) > 1:
            return False
        (term,) = self.terms
        if isinstance(step, Affine):
            return term.arithmetic.multiplier is None
        if isinstance(step, MaxPool):
            return term.layer is not None and len(step.kernel) == 2
        return isinstance(step, Add)


class Pointwise(nn.Module):
    """An expression of one or two tensors, computed as floats and as the bytes that layers take.

    Returns a tensor, or a list where there are several.
    """

    def __init__(self, expression: Expression, layers: list[ByteLayer], keep_float: bool):
        super().__init__()
        self.made_of = expression, layers, keep_float
        self.axes = frozenset().union(*(term.axes for term in expression.terms))
        self.single = len(layers) + keep_float == 1
        self.run = kernels.pointwise(
            [term.arithmetic for term in expression.terms],
            expression.low,
            expression.high,
            [layer.encoder for layer in layers],
            keep_float=keep_float,
        )

    def forward(self, a: Tensor, b: Tensor | None = None) -> Tensor | list[Tensor]:
        if b is not None and b.shape != a.shape:
            return self._broadcast(a, b)
        tensors = [a] if b is None else [a, b]
        if not self.axes or a.dim() == 2 or self.axes == {1} and a.dim() == 4:
            results = self.run(*map(channels_innermost, tensors))
        elif self.axes == {-1}:
            results = self.run(*(x.contiguous() for x in tensors))
        elif self.axes == {1}:
            results = [x.movedim(-1, 1) for x in self.run(*(x.movedim(1, -1).contiguous() for x in tensors))]
        else:
            raise CannotRun
        return results[0] if self.single else results

    def _broadcast(self, a: Tensor, b: Tensor) -> Tensor | list[Tensor]:
        """Term by term, as the sum has another shape than one of them."""
        expression, layers, keep_float = self.made_of
        x, y = (Pointwise(Expression((term,)), [], True)(value) for term, value in zip(expression.terms, (a, b)))
        plain = replace(expression, terms=(Summand(expression.terms[0].node),))
        return Pointwise(plain, layers, keep_float)(x + y)


class Unfused(nn.Module):
    """A step as the reference computes it."""

    def __init__(self, step: Step, network: IntegerNetwork):
        super().__init__()
        self.step, self.numbers = step, (network,)  # in a tuple: it is no submodule

    def forward(self, *values: object) -> object:
        return self.step.compute(*self.numbers, *values)


class _Fusion:
    """Builds the fused graph, step by step in order of execution."""

    def __init__(self, network: IntegerNetwork):
        self.network, self.program = network, network.program
        self.readers = self.program.readers()
        self.encoded = {step.name: step for step in self.program.steps if isinstance(step, Encode)}
        self.calls = Counter(step.layer for step in self.program.steps if isinstance(step, Product))
        self.modules: dict[str, nn.Module] = {}
        self.graph = fx.Graph()
        self.floats: dict[str, fx.Node] = {}  # of values to nodes of the fused graph
        self.codes: dict[str, fx.Node] = {}  # the same of codes
        self.pending: dict[str, Expression] = {}  # what the only reader of a value takes over
        self.layers = {name: ByteLayer(network.layer(name)) for name in self.calls if _takes_bytes(network.layer(name))}

    def build(self) -> fx.GraphModule:
        for step in self.program.steps:
            if not self._takes_codes(step):  # its codes come with what it encodes
                self._settle(step, self._express(step))
        self.graph.output(decode(self.program.outputs, [self.floats[name] for name in self.program.results]))
        self.graph.lint()
        return GraphModule(self.modules, self.graph)

    def _express(self, step: Step) -> Expression:
        if isinstance(step, Input):
            default = () if step.required else (step.default,)
            return Expression((Summand(self.graph.create_node("placeholder", step.name, default)),))
        if isinstance(step, Product) and step.layer in self.layers:
            return self._layer(step)
        if isinstance(step, Affine):
            return self._affine(step)
        if isinstance(step, Clamp):
            high = math.inf if step.high is None else step.high
            return replace(self._take(step.inputs[0]), low=step.low, high=high)
        if isinstance(step, Add):
            terms = [self._take(x) for x in step.inputs]
            return Expression(tuple(term for inner in terms for term in inner.terms))
        if isinstance(step, MaxPool) and len(step.kernel) == 2:
            return self._max_pool(step)
        return Expression((Summand(self._unfused(step, *map(self.floats.__getitem__, step.inputs))),))

    def _take(self, name: str) -> Expression:
        """What a value is as an expression, if it has been left to its reader; else the value."""
        return self.pending.pop(name, None) or Expression((Summand(self.floats[name]),))

    def _layer(self, step: Product) -> Expression:
        layer = self.layers[step.layer]
        raw = self._call(step.layer, layer, self.codes[step.inputs[0]])
        axis = 1 if isinstance(layer.layer.geometry.operator, Convolution) else -1
        axes = frozenset() if layer.layer.bias is None else frozenset({axis})
        called_once = self.calls[step.layer] == 1
        return Expression((Summand(raw, Term(layer.layer.bias), layer if called_once else None, axes),))

    def _affine(self, step: Affine) -> Expression:
        (term,) = self._take(step.inputs[0]).terms
        multiplier, offset = map(self.network.tensor, step.tensors())
        arithmetic = term.arithmetic._replace(multiplier=multiplier, offset=offset)
        return Expression((replace(term, arithmetic=arithmetic, axes=term.axes | {1}),))

    def _max_pool(self, step: MaxPool) -> Expression:
        """The largest of the values that the arithmetic starts from: it keeps their order once its factors are positive."""
        inner = self._take(step.inputs[0])
        (term,) = inner.terms
        if term.layer is not None and term.arithmetic.multiplier is not None:
            bias, multiplier, offset = term.arithmetic
            sign = torch.where(multiplier < 0, -1.0, 1.0)
            term.layer.sign = sign.to(torch.int8)
            term = replace(term, arithmetic=Term(None if bias is None else bias * sign, multiplier * sign, offset))
        return replace(inner, terms=(replace(term, node=self._unfused(step, term.node)),))

    def _settle(self, step: Step, expression: Expression) -> None:
        """Leave what a step computes to its only reader, or compute it in the forms that its readers take."""
        readers = self.readers[step.name]
        if len(readers) == 1 and expression.can_enter(readers[0]):
            self.pending[step.name] = expression
            return
        taking = [reader for reader in readers if self._takes_codes(reader)]
        keep_float = len(taking) < len(readers) and not expression.is_node
        if expression.is_node:
            self.floats[step.name] = expression.terms[0].node
        if not taking and not keep_float:
            return
        module = Pointwise(expression, [self.layers[reader.layer] for reader in taking], keep_float)
        result = self._call(f"_between.{step.name}", module, *(term.node for term in expression.terms))
        results = [result]
        if not module.single:
            results = [self.graph.call_function(operator.getitem, (result, i)) for i in range(len(taking) + keep_float)]
        if keep_float:
            self.floats[step.name] = results.pop(0)
        self.codes |= {reader.name: codes for reader, codes in zip(taking, results, strict=True)}

    def _takes_codes(self, step: Step | None) -> bool:
        """Whether it encodes for a layer that computes on bytes."""
        return isinstance(step, Encode) and step.layer in self.layers

    def _unfused(self, step: Step, *args: fx.Node) -> fx.Node:
        return self._call(f"_steps.{step.name}", Unfused(step, self.network), *args)

    def _call(self, name: str, module: nn.Module, *args: fx.Node) -> fx.Node:
        self.modules[name] = module
        return self.graph.call_module(name, args)


class ByteNetwork(nn.Module):
    """An integer network whose layers compute on bytes; see the module's docstring.

    A large batch goes through in parts that fit the caches. Inputs that are not float32 on the CPU, of a shape that the
    network was not made for, or followed by a tracer, go through the reference.

    Attributes:
        reference: the network that it was made of, an `IntegerNetwork` or a GraphModule.
        fused: the graph of `ByteLayer`, `Pointwise` and what is left of the reference.
    """

    def __init__(self, reference: nn.Module):
        super().__init__()
        self.reference = reference
        network = as_program(reference)
        kinds = Counter(step.kind for step in network.program.steps)
        self.is_sequential = (
            kinds["input"] == 1 and network.program.result is not None and not kinds["function"] and not kinds["foreign"]
        )
        self.fused = _Fusion(network).build().eval()
        self.images_at_once: dict[torch.Size, int] = {}

    def forward(self, *tensors: Tensor, **more: Tensor) -> object:
        fits = all(
            is_plain(x) and x.dtype == torch.float32 and x.device.type == "cpu" and x.numel() for x in tensors
        )
        if more or not fits or torch.is_autocast_enabled("cpu"):
            return self.reference(*tensors, **more)
        try:
            return self._in_parts(*tensors) if self.is_sequential else self.fused(*tensors)
        except CannotRun:
            return self.reference(*tensors)

    def _in_parts(self, x: Tensor) -> Tensor:
        if len(x) < 2 or x.dim() not in (2, 4):
            return self.fused(x)
        count = self.images_at_once.get(x.shape[1:])
        if count is None:
            count = max(1, CACHED_FLOATS // _largest_output(self.fused, x[:1]))
            self.images_at_once[x.shape[1:]] = count
        if len(x) <= count:
            return self.fused(x)
        return torch.cat([self.fused(part) for part in x.tensor_split(-(-len(x) // count))])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ByteNetwork":
        moved = fn(torch.empty(0))
        if moved.dtype != torch.float32 or moved.device.type != "cpu":
            raise ApotfxError(
                f"backend onednn: the network stays in float32 on the CPU, asked for {moved.dtype} on {moved.device}; "
                "load it with backend reference"
            )
        return self

    def __reduce__(self) -> tuple:
        return ByteNetwork, (self.reference,)  # what is packed is for one process


def _largest_output(network: fx.GraphModule, x: Tensor) -> int:
    """The number of elements of the largest output of a byte layer."""
    sizes = [1]
    layers = [module for module in network.modules() if isinstance(module, ByteLayer)]
    hooks = [layer.register_forward_hook(lambda *call: sizes.append(call[2].numel())) for layer in layers]
    try:
        network(x)
    finally:
        for hook in hooks:
            hook.remove()
    return max(sizes)
