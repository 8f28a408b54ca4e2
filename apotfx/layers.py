"""Quantized layers: torch's own layers with a quantizer for the weight and one for the input.

A `QuantLayer` holds float weights that train; an `integer.layers.IntegerLayer` holds integer levels and only computes.
Both bring an input to levels with `functional.encode`, add up products of integers exactly, and multiply the sums by the
same float, which is why their results are equal in every bit.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parametrize

from . import functional as F
from .engine import EAGER, Eager, quantized_op
from .errors import ApotfxError
from .functional import Operand
from .modules import StandIn, become, float_attributes, is_in_kept_module
from .operators import (
    BFLOAT16_EXACT,
    Convolution,
    MatrixProduct,
    Operator,
    TransposedConvolution,
    accumulator_bound,
    exact_dtype,
)
from .quantizers import InputQuantizer, Origin, Quantizer, WeightQuantizer, require_unrecorded


class Geometry(NamedTuple):
    """What a layer computes, apart from quantization: the padding before its operator, and the operator."""

    operator: Operator
    pad: tuple[int, ...]  # as torch.nn.functional.pad takes it; () for none
    pad_mode: str

    @classmethod
    def of(cls, layer: nn.Module) -> "Geometry":
        if isinstance(layer, nn.Linear) or getattr(layer, "function", None) == "linear":
            return cls(MatrixProduct(), (), "constant")
        if layer.transposed:
            settings = (layer.stride, layer.padding, layer.output_padding, layer.dilation)
            return cls(TransposedConvolution(*map(tuple, settings), layer.groups), (), "constant")
        # Padding that the operator cannot express itself (another mode than zeros, "same") goes before it.
        before = layer.padding_mode != "zeros" or layer.padding == "same"
        padding = (0,) * len(layer.stride) if before or layer.padding == "valid" else tuple(layer.padding)
        operator = Convolution(tuple(layer.stride), padding, tuple(layer.dilation), layer.groups)
        pad = tuple(layer._reversed_padding_repeated_twice) if before else ()
        return cls(operator, pad, "constant" if layer.padding_mode == "zeros" else layer.padding_mode)

    @property
    def dims(self) -> int:
        """Spatial dimensions of a convolution; 0 for a matrix product."""
        return len(self.operator.channel_shape) - 1

    def prepare(self, x: Tensor) -> Tensor:
        """x with its padding and, for a convolution, with the batch dimension that it may lack."""
        if self.dims and x.dim() == self.dims + 1:
            x = x.unsqueeze(0)
        return nn.functional.pad(x, self.pad, mode=self.pad_mode) if self.pad else x

    def finish(self, y: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """y plus bias, with as many dimensions as the layer's input x has."""
        if bias is not None:
            y = y + bias.to(y.dtype).reshape(self.operator.channel_shape)
        return y.squeeze(0) if y.dim() > x.dim() else y

    def for_output_size(self, x: Tensor, kernel: Sequence[int], output_size: Sequence[int] | None) -> "Geometry":
        """The same for a call of a transposed convolution that may ask for the size of its output."""
        if output_size is None:
            return self
        operator = self.operator.for_output_size(x.shape[-self.dims :], kernel, output_size)
        return self._replace(operator=operator)


class FunctionalLayer(nn.Module):
    """A call of `F.linear`, `F.conv1d` ... or `F.conv_transpose3d` as a module, whose weight and bias belong to others.

    Args:
        function: its name in `torch.nn.functional`.
        weight: gives the weight, whatever it is computed from, when it is called.
        bias: gives the bias; None without.
        settings: of a convolution, by torch's names; ints or one per dimension, as torch takes them.
    """

    padding_mode = "zeros"

    def __init__(self, function: str, weight: Callable[[], Tensor], bias: Callable[[], Tensor] | None, **settings):
        super().__init__()
        self.function = function
        self.kind = kind_of_function(function)
        self._weight, self._bias = weight, bias
        with torch.no_grad():
            shape = self.weight.shape
        if self.kind == "Linear":
            self.out_features, self.in_features = shape
            return
        self.transposed, self.kernel_size = "transpose" in function, tuple(shape[2:])
        self.groups = settings.get("groups", 1)
        self.in_channels = shape[0] if self.transposed else shape[1] * self.groups
        defaults = {"stride": 1, "padding": 0, "dilation": 1} | ({"output_padding": 0} if self.transposed else {})
        for key, default in defaults.items():
            setattr(self, key, _per_dimension(settings.get(key, default), len(self.kernel_size)))
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
            self._reversed_padding_repeated_twice = [n for t in reversed(total) for n in (t // 2, t - t // 2)]

    @property
    def weight(self) -> Tensor:
        return self._weight()

    @property
    def bias(self) -> Tensor | None:
        return None if self._bias is None else self._bias()

    def forward(self, input: Tensor) -> Tensor:
        settings = {} if self.kind == "Linear" else {"stride": self.stride, "padding": self.padding}
        settings |= {key: getattr(self, key) for key in ("output_padding", "groups", "dilation") if hasattr(self, key)}
        return getattr(nn.functional, self.function)(input, self.weight, self.bias, **settings)

    def extra_repr(self) -> str:
        return self.function


def _per_dimension(value: int | Sequence[int] | str, dims: int) -> tuple[int, ...] | str:
    if isinstance(value, str):
        return value
    values = tuple(value) if isinstance(value, Sequence) else (value,)
    return values * dims if len(values) == 1 else values


def kind_of_function(name: str) -> str:
    """The layer type that computes what a function of `torch.nn.functional` does: "ConvTranspose2d" for conv_transpose2d."""
    return "".join(part.capitalize() for part in name.split("_"))


class QuantLayer(StandIn):
    """What the quantized layers share. Mixed into a torch layer type, whose parameters and names it keeps.

    Attributes:
        kind: what it computes, by the name of torch's layer type.
        name: in the network, for messages.
        weight_quantizer: or None for a float weight. Layers that share their weight share it too.
        input_quantizer: or None for a float input.
        clip_grad_factor: multiplies the gradients of both clips.
        sign_reason: why its input cannot be negative, where it cannot.
        rectifier: the range (low, high) of the activation function before the layer, where the layer has taken over
            its work (see `passes.absorb_rectifiers`); else None.
        rectifies: whether it does that work; not while the network computes the activation function itself.
        weight_is_read: whether the code of a module kept whole has read the float weight besides calling the layer.
        is_walked: whether such code has looked through all parameters, buffers or modules of the layer.
        is_replaced: whether such code has called it with another weight or bias, as `torch.func.functional_call` does.
        engine: what computes the layer; see `engine.use_engine`.
    """

    float_type: type[nn.Module]
    kind: str
    name: str = "quantized layer"
    sign_reason: str = ""
    rectifier: tuple[float, float] | None = None
    rectifies = True
    weight_is_read = False
    is_walked = is_replaced = False
    engine: Eager = EAGER
    own_names = frozenset(
        ("name", "sign_reason", "clip_grad_factor", "geometry", "rectifier", "rectifies", "weight_is_read", "is_walked",
         "is_replaced", "engine", "kind", "float_type", "float_class", "float_state", "own_names")
    )  # fmt: skip

    @classmethod
    def from_float(
        cls,
        layer: nn.Module,
        weight_quantizer: WeightQuantizer | None,
        input_quantizer: InputQuantizer | None,
        clip_grad_factor: float = 1.0,
    ) -> "QuantLayer":
        """A quantized layer around the parameters, parametrizations, hooks and mode of `layer`, which stays as it is.

        Raises:
            ApotfxError: `layer` does not compute what `cls.float_type` does.
        """
        if float_type_of(layer) is not cls.float_type:
            raise ApotfxError(f"{cls.__name__} replaces {cls.float_type.__name__}, got {type(layer).__name__}")
        quant = cls.__new__(cls)
        own = {key: value for key, value in vars(layer).items() if key not in cls.own_names}
        quant.__dict__ = {key: value.copy() if isinstance(value, dict) else value for key, value in own.items()}
        quant.weight_quantizer = weight_quantizer
        quant.input_quantizer = input_quantizer
        quant.clip_grad_factor = clip_grad_factor
        quant.geometry, quant.float_class = Geometry.of(layer), parametrize.type_before_parametrizations(layer)
        quant.float_state = float_attributes(layer)
        for quantizer in (weight_quantizer, input_quantizer):
            if quantizer is not None:
                quantizer.train(layer.training)
        return quant

    def __getattr__(self, name: str):
        return self._parameter(name) if name in ("weight", "bias") else super().__getattr__(name)

    def float_view(self, kind: str) -> dict:
        if is_in_kept_module():
            vars(self).update(is_walked=True, weight_is_read=self.weight_is_read or kind == "_parameters")
        held = vars(self)[kind]
        return {k: v for k, v in held.items() if k not in _QUANTIZERS} if kind == "_modules" else held

    def float_parameter(self, name: str) -> Tensor | None:
        if name == "weight" and is_in_kept_module():
            vars(self)["weight_is_read"] = True
        return self._parameter(name)

    @property
    def additions(self) -> list[str]:
        """The names of what the layer holds besides weight, bias and quantizers, such as a parametrization."""
        held = (key for kind in ("_parameters", "_buffers", "_modules") for key in vars(self)[kind])
        return [key for key in held if key not in ("weight", "bias", *_QUANTIZERS)]

    def _parameter(self, name: str) -> Tensor | None:
        """The weight or the bias, as the layer itself reads it."""
        if isinstance(self, FunctionalLayer):
            return getattr(self, name)
        parametrizations = vars(self)["_modules"].get("parametrizations", ())
        if name in parametrizations:
            return parametrizations[name]()
        parameter = vars(self)["_parameters"][name]
        if is_in_kept_module() and not isinstance(parameter, (nn.Parameter, type(None))):
            vars(self)["is_replaced"] = True
        return parameter

    def forward(self, input: Tensor) -> Tensor:
        return self._compute(input, self._parameter("weight"), self._parameter("bias"), self.geometry)

    def to_float(self) -> nn.Module:
        """A float layer around the parameters, parametrizations, hooks and mode of this one."""
        layer = self.float_class.__new__(self.float_class)
        state = {key: value.copy() if isinstance(value, dict) else value for key, value in vars(self).items()}
        state["_modules"] = {key: module for key, module in state["_modules"].items() if key not in _QUANTIZERS}
        user = {key: value for key, value in self.float_state.items() if key in self.own_names}
        layer.__dict__ = {k: v for k, v in state.items() if k not in (*_QUANTIZERS, *self.own_names)} | user
        if "parametrizations" in layer._modules:  # for which torch makes a type of its own
            parametrize._inject_new_class(layer)
            for name in layer.parametrizations:
                parametrize._inject_property(layer, name)
        return layer

    def _compute(self, input: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        if not input.is_floating_point():
            raise ApotfxError(
                f"layer {self.name}: its input is {input.dtype}, expected a floating-point type; convert it"
            )
        prepared = geometry.prepare(input)
        weights = self.weight_quantizer
        if self.training and torch.is_grad_enabled():
            unsettled = [q for q in (self.input_quantizer, weights) if q is not None and q.origin is not Origin.DATA]
            if unsettled:
                self._fit_first_batch(unsettled, prepared, weight)
        x, w = self._input_operand(prepared), self.weight_operand(weight)
        dtype = self._operand_dtype(prepared, w.values.shape)
        y = quantized_op(
            x,
            w,
            operator=geometry.operator,
            dtype=dtype,
            exact=not self.training,
            clip_grad_factor=self.clip_grad_factor,
            everywhere=weights is not None and weights.levels.bits == 2,
            engine=self.engine,
        )
        # A GPU has half to move in bfloat16; on the CPU the kernels take float32.
        y = y.to(dtype if dtype == torch.bfloat16 and y.is_cuda else weight.dtype)
        return geometry.finish(y, bias, input)

    @torch.no_grad()
    def codes_and_accumulators(self, input: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer computes on in evaluation: (levels of the padded input, sums of their products), integer-valued.

        Takes the arguments of `forward`. For a float input, or a float weight, its values stand for the levels.
        """
        return self._compute_integers(input, self.weight, self.geometry)

    def _compute_integers(self, input: Tensor, weight: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
        prepared = geometry.prepare(input)
        engine = EAGER if F.is_traced() else self.engine
        codes, n_w = engine.levels(self._input_operand(prepared)), engine.levels(self.weight_operand(weight))
        dtype = self._operand_dtype(prepared, n_w.shape)
        return codes, geometry.operator.forward(codes.to(dtype), n_w.to(dtype))

    def rectify(self, x: Tensor) -> Tensor:
        """x after the activation function that the layer has absorbed, if it has."""
        return x.clamp(*self.rectifier) if self.rectifier is not None and self.rectifies else x

    def _input_operand(self, x: Tensor) -> Operand:
        quantizer = self.input_quantizer
        if quantizer is None:
            return Operand(self.rectify(x), None, None, None)
        rectifier = self.rectifier if self.rectifies else None
        return Operand(x, quantizer.operand_clip, None, F.Levels(quantizer.levels, rectifier))

    def weight_operand(self, weight: Tensor) -> Operand:
        """The weight parameter (of a functional layer, the argument) as the operator takes it."""
        weight = self.geometry.operator.from_parameter(weight)
        quantizer = self.weight_quantizer
        if quantizer is None:
            return Operand(weight, None, None, None)
        # In evaluation the same bits on every engine.
        fast = self.training and not F.is_traced()
        standard_deviation = self.engine.standard_deviation if fast else F.standard_deviation
        weight, unit = quantizer.normalize(weight, standard_deviation)
        return Operand(weight, quantizer.operand_clip, unit, quantizer.encoding)

    @torch.no_grad()
    def integer_weight(self) -> tuple[Tensor, Tensor]:
        """(integer-valued levels [C_out, ...], their scale [] or [C_out, 1, ...]): the weight is their product."""
        quantizer = self.weight_quantizer
        weight, unit = quantizer.normalize(self.geometry.operator.from_parameter(self.weight))
        operand = Operand(weight, quantizer.clip, unit, quantizer.encoding)
        return EAGER.levels(operand), operand.scale

    @torch.compiler.disable
    @torch.no_grad()
    def _fit_first_batch(self, quantizers: list[Quantizer], x: Tensor, weight: Tensor) -> None:
        """Set those clips of `quantizers` that need it, from the layer's padded input and its weight.

        Zeros set none, nor does a step that somebody only looks at, such as a counter of operations.

        Raises:
            ApotfxError: x or the weight is not finite, or x is negative where the levels are unsigned; or the step is
                recorded, or hidden by activation checkpointing.
        """
        observers = require_unrecorded(self.name)
        if any(issubclass(observer, FakeTensorMode) for observer in observers):
            return
        quantizers, x = [quantizer for quantizer in quantizers if quantizer.needs_data()], self.rectify(x)
        if observers or not quantizers or not x.any():
            return
        for quantizer in quantizers:
            if quantizer is self.input_quantizer:
                quantizer.require_sign(x.amin().item(), self.name, "in the first training batch", self.sign_reason)
                quantizer.fit_first_batch(x, f"the input of layer {self.name}")
            else:
                parameter = self.geometry.operator.from_parameter(weight)
                quantizer.fit_first_batch(quantizer.in_clip_units(parameter), f"the weight of layer {self.name}")

    def _operand_dtype(self, x: Tensor, weight_shape: torch.Size) -> torch.dtype:
        """In training whatever is fast; in evaluation what makes the accumulators exact, or nearly so for a float operand."""
        inputs, weights = self.input_quantizer, self.weight_quantizer
        if not self.training:
            if inputs is None or weights is None:
                return torch.float64  # so that the order of summation does not matter
            bound = accumulator_bound(weight_shape, weights.levels.max, inputs.levels.max)
            return exact_dtype(bound, max(weights.levels.max, inputs.levels.max), x.device)
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            levels = [q.levels.max for q in (inputs, weights) if q is not None]
            # float16 is left out: integer accumulators overflow it.
            if dtype == torch.bfloat16 and max(levels, default=0) <= BFLOAT16_EXACT:
                return dtype
        return torch.float64 if x.dtype == torch.float64 else torch.float32


class QuantConv1d(QuantLayer, nn.Conv1d):
    float_type, kind = nn.Conv1d, "Conv1d"


class QuantConv2d(QuantLayer, nn.Conv2d):
    float_type, kind = nn.Conv2d, "Conv2d"


class QuantConv3d(QuantLayer, nn.Conv3d):
    float_type, kind = nn.Conv3d, "Conv3d"


class QuantLinear(QuantLayer, nn.Linear):
    float_type, kind = nn.Linear, "Linear"


class _QuantTransposed(QuantLayer):
    def forward(self, input: Tensor, output_size: Sequence[int] | None = None) -> Tensor:
        geometry = self.geometry.for_output_size(input, self.kernel_size, output_size)
        return self._compute(input, self._parameter("weight"), self._parameter("bias"), geometry)

    def codes_and_accumulators(self, input: Tensor, output_size: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        geometry = self.geometry.for_output_size(input, self.kernel_size, output_size)
        return self._compute_integers(input, self.weight, geometry)


class QuantConvTranspose1d(_QuantTransposed, nn.ConvTranspose1d):
    float_type, kind = nn.ConvTranspose1d, "ConvTranspose1d"


class QuantConvTranspose2d(_QuantTransposed, nn.ConvTranspose2d):
    float_type, kind = nn.ConvTranspose2d, "ConvTranspose2d"


class QuantConvTranspose3d(_QuantTransposed, nn.ConvTranspose3d):
    float_type, kind = nn.ConvTranspose3d, "ConvTranspose3d"


class QuantFunctional(QuantLayer, FunctionalLayer):
    float_type = FunctionalLayer
    own_names = QuantLayer.own_names - {"kind"}


QUANT_LAYERS = {
    cls.float_type: cls
    for cls in (
        QuantConv1d, QuantConv2d, QuantConv3d, QuantConvTranspose1d, QuantConvTranspose2d, QuantConvTranspose3d,
        QuantLinear, QuantFunctional,
    )
}  # fmt: skip


def float_type_of(layer: nn.Module) -> type[nn.Module] | None:
    """The key of QUANT_LAYERS that computes what `layer` computes: its type, or one it derives from unchanged."""
    if "forward" in getattr(layer, "__dict__", ()):  # replaced on the instance; None is no layer
        return None
    for float_type in QUANT_LAYERS:
        if isinstance(layer, float_type):
            same = (
                getattr(type(layer), key, None) is getattr(float_type, key, None)
                for key in ("forward", "_conv_forward")
            )
            return float_type if all(same) else None
    return None


def kind_of(layer: nn.Module) -> str:
    """What a layer that `float_type_of` knows computes."""
    float_type = float_type_of(layer)
    return layer.kind if float_type is FunctionalLayer else float_type.__name__


_QUANTIZERS = ("weight_quantizer", "input_quantizer")


@contextmanager
def being_float(model: nn.Module) -> Iterator[None]:
    """While active, the quantized layers of `model` are float layers, of the types that they had in the float model."""
    states = [(layer, type(layer), vars(layer)) for layer in model.modules() if isinstance(layer, QuantLayer)]
    try:
        for layer, _, _ in states:
            become(layer, layer.to_float())
        yield
    finally:
        for layer, cls, state in states:
            layer.__dict__, layer.__class__ = state, cls


@contextmanager
def computing_in_float(model: nn.Module) -> Iterator[None]:
    """While active, the quantized layers of `model` compute what their float layers do, in the same way."""
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLayer)]
    try:
        for layer in layers:
            vars(layer)["forward"] = functools.partial(_float_forward, layer)
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]


def _float_forward(layer: QuantLayer, input: Tensor, *args, **kwargs) -> Tensor:
    return layer.float_type.forward(layer, layer.rectify(input), *args, **kwargs)
