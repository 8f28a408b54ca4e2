"""The quantized operator, and the engines that run it: plain torch, compiled kernels, 8-bit integer arithmetic.

All engines compute the same function: in evaluation the same bits, in training up to float32 rounding. All but plain torch
hide what they do from whoever follows torch's operations (see `functional.is_traced`), and are not used there.
"""

import functools
import importlib.util
import logging
import os
import shutil
from contextlib import nullcontext
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import functional as F
from . import kernels
from .errors import ApotfxError
from .functional import Levels, Operand
from .operators import (
    HAS_ONEDNN,
    INT32_EXACT,
    Convolution,
    MatrixProduct,
    Operator,
    accumulator_bound,
    output_shaped,
    scaled_op,
)

HAS_TRITON = importlib.util.find_spec("triton") is not None
# Below this many multiplications, packing the weight costs more than 8-bit arithmetic saves (measured at batch 128).
WORTH_BYTES = 2**25


class Eager:
    """Plain torch operations, on any device and dtype."""

    name = "eager"

    def __reduce__(self) -> tuple:
        """A pickled model may be read where this engine does not work."""
        return _chosen, (self.name,)

    def standard_deviation(self, w: Tensor) -> Tensor:
        """Of the whole weight, unbiased; shape []."""
        return F.standard_deviation(w)

    def scale(self, operand: Operand, factor: Tensor | None = None) -> Tensor:
        """`operand.scale`, times a factor (shape []) if there is one."""
        return operand.scale if factor is None else operand.scale * factor

    def levels(
        self,
        operand: Operand,
        factor: Tensor | None = None,
        scratch: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """The operand's integer levels, in float; with a factor (shape []) times it and the float step of a level.

        For a float operand, its values stand for the levels, with step 1. With the name of a `scratch` buffer, the
        result may live there until the next call with that name in the same thread. It is rounded to `dtype`, if given.
        """
        n = operand.values if operand.levels is None else F.encode(operand.values, operand.used_clip, operand.levels)
        n = n if factor is None else n * (operand.scale * factor).to(n.dtype)
        return n if dtype is None else n.to(dtype)

    def level_bytes(
        self, operand: Operand, dtype: torch.dtype, zero_point: int = 0, scratch: str | None = None
    ) -> list[Tensor] | None:
        """The levels plus `zero_point` as a tensor b of bytes, or two (b[0] + 256 b[1]); None if a value is NaN."""
        n = F.encode(operand.values, operand.used_clip, operand.levels)
        if n.isnan().any():
            return None
        return [part.to(dtype) for part in kernels.split_bytes(n, operand.levels.set, zero_point)]

    def gradient(
        self,
        grad: Tensor,
        operand: Operand,
        n: Tensor | None = None,
        factor: Tensor | None = None,
        everywhere: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients for the operand's values and clip, given `grad`, the one for its quantized values / `factor`.

        They have the dtype of the values and of the clip. May overwrite `grad`. `n`: the operand's levels, where they
        are at hand.
        """
        grad = grad.to(operand.values.dtype)
        if factor is not None:
            grad = grad * factor
        if operand.levels is None:
            return grad, None
        clip = operand.used_clip
        n = F.encode(operand.values, clip, operand.levels) if n is None else n
        grad_x, grad_clip = F.quantization_gradient(grad, operand.values, n, clip, operand.levels, everywhere)
        return grad_x, grad_clip if operand.unit is None else grad_clip * operand.unit

    def product(
        self, x: Operand, w: Operand, scale_x: Tensor, operator: Operator, dtype: torch.dtype, exact: bool
    ) -> Tensor:
        """`operator` of the quantized values, multiplied in `dtype`; if `exact`, integers first, the scale afterwards.

        `scale_x` is x.scale.
        """
        if exact:
            scale = output_shaped(self.scale(w, scale_x), operator)
            return scaled_op(self.levels(x, None, "x"), self.levels(w, None, "w"), scale, operator, dtype)
        # The scale goes into the weight, which is smaller than the output; in bfloat16 it is rounded there, as autocast
        # rounds a float weight.
        return operator.forward(self.levels(x, None, "x", dtype), self.levels(w, scale_x, "w", dtype))


class OnGpu(Eager):
    """The quantizer's arithmetic in Triton kernels where they take it."""

    name = "on-gpu"

    def standard_deviation(self, w: Tensor) -> Tensor:
        kernels = _gpu_kernels()
        accepted = w.dtype == torch.float32 and kernels.accept_values(w)
        return kernels.standard_deviation(w) if accepted else super().standard_deviation(w)

    def scale(self, operand: Operand, factor: Tensor | None = None) -> Tensor:
        kernels = _gpu_kernels()
        return kernels.scale(operand, factor) if kernels.accept(operand) else super().scale(operand, factor)

    def levels(self, operand, factor=None, scratch=None, dtype=None):
        kernels = _gpu_kernels()
        if not kernels.accept(operand):
            return super().levels(operand, factor, dtype=dtype)
        return kernels.encode(operand, factor, dtype or torch.float32)

    def gradient(self, grad, operand, n=None, factor=None, everywhere=False):
        kernels = _gpu_kernels()
        if kernels.accept(operand):
            return kernels.gradient(grad, operand, factor, everywhere)
        return super().gradient(grad, operand, n, factor, everywhere)


@functools.cache
def _gpu_kernels() -> ModuleType:
    from . import gpu_kernels  # here, as not every machine has Triton

    return gpu_kernels


class Compiled(Eager):
    """The quantizer's arithmetic in our compiled kernels: C for float32 on the CPU, Triton on a GPU."""

    name = "compiled"

    def standard_deviation(self, w: Tensor) -> Tensor:
        on_cpu = w.dtype == torch.float32 and w.device.type == "cpu" and type(w) in F.PLAIN
        if on_cpu and w.numel() and F.is_dense(w):
            return kernels.standard_deviation(w)
        return _for_device(w).standard_deviation(w)

    def scale(self, operand: Operand, factor: Tensor | None = None) -> Tensor:
        if kernels.describe(operand):
            return kernels.scale(operand, factor)
        return _for_device(operand.values).scale(operand, factor)

    def levels(self, operand, factor=None, scratch=None, dtype=None):
        n = kernels.encode(operand, factor, scratch) if kernels.describe(operand) else None
        if n is None:
            return _for_device(operand.values).levels(operand, factor, dtype=dtype)
        return n if dtype is None else n.to(dtype)

    def level_bytes(
        self, operand: Operand, dtype: torch.dtype, zero_point: int = 0, scratch: str | None = None
    ) -> list[Tensor] | None:
        return kernels.encode_bytes(operand, dtype, zero_point, scratch)

    def gradient(self, grad, operand, n=None, factor=None, everywhere=False):
        if kernels.describe(operand):
            return kernels.gradient(grad.float(), operand, factor, everywhere)
        return _for_device(operand.values).gradient(grad, operand, n, factor, everywhere)


def _for_device(x: Tensor) -> Eager:
    """What computes what our kernels for the CPU do not accept."""
    return ON_GPU if x.device.type == "cuda" and HAS_TRITON else EAGER


class Int8(Eager):
    """The operator's forward on 8-bit integers (oneDNN on x86), where that pays; `base` does everything else."""

    name = "int8"

    def __init__(self, base: Eager):
        self.base = base
        self.standard_deviation, self.scale = base.standard_deviation, base.scale
        self.levels, self.gradient = base.levels, base.gradient

    def product(
        self, x: Operand, w: Operand, scale_x: Tensor, operator: Operator, dtype: torch.dtype, exact: bool
    ) -> Tensor:
        if operator.supports_bytes(x.values) and _fit_bytes(x, w, operator, exact):
            if dtype == torch.float64 or operator.multiplications(x.values, w.values) > WORTH_BYTES:
                zero_point = 128 if x.levels.set.signed else 0
                x_bytes = self.base.level_bytes(x, torch.uint8, zero_point, "x")
                w_bytes = self.base.level_bytes(w, torch.int8, 0, "w")
                if x_bytes is not None and w_bytes is not None:
                    scale = self.scale(w, scale_x).reshape(-1)
                    y = _sum_of_products(x_bytes, zero_point, w_bytes, scale, operator)
                    channels_last = F.suggests_channels_last(x.values) or F.suggests_channels_last(w.values)
                    return F.in_format(y, channels_last)
        return self.base.product(x, w, scale_x, operator, dtype, exact)


def _fit_bytes(x: Operand, w: Operand, operator: Operator, exact: bool) -> bool:
    if not (kernels.describe(x) and kernels.describe(w)):
        return False
    bound = accumulator_bound(w.values.shape, min(w.levels.max, 128), 255)
    if not exact:
        return bound < INT32_EXACT
    # Of several products that are added up, each would be rounded.
    one_byte_each = kernels.fits_byte(x.levels.set) and kernels.fits_byte(w.levels.set)
    return one_byte_each and bound < operator.byte_limit(x.levels.set.signed)


def _sum_of_products(x_bytes: list[Tensor], zero_point: int, w_bytes: list[Tensor], scale: Tensor, operator: Operator):
    total = None
    for i, x in enumerate(x_bytes):
        for j, w in enumerate(w_bytes):
            y = operator.forward_bytes(x, zero_point, w, scale * 256 ** (i + j) if i + j else scale)
            total = y if total is None else total.add_(y)
    return total


EAGER, ON_GPU, COMPILED = Eager(), OnGpu(), Compiled()
ENGINES = ("int8", "compiled", "eager")


class Choice(NamedTuple):
    """An engine, and why it is the one."""

    engine: Eager
    reason: str

    def __str__(self) -> str:
        return f"{self.engine.name} ({self.reason})"


def choose(name: str = "auto", device: torch.device | str = "cpu") -> Choice:
    """The engine of that name, or the next slower one that works here.

    Args:
        name: "int8", "compiled", "eager", or "auto" for the fastest.
        device: where the model lies.

    Raises:
        ApotfxError: there is no such engine.
    """
    if name not in ("auto", *ENGINES):
        raise ApotfxError(f"engine {name!r}: unknown; choose one of auto, {', '.join(ENGINES)}")
    wanted = "the fastest" if name == "auto" else "asked for"
    if name == "eager":
        return Choice(EAGER, wanted)
    on_gpu = torch.device(device).type == "cuda"
    no_kernels = what_gpu_kernels_lack() if on_gpu else what_kernels_lack()
    no_bytes = "it runs on the CPU only" if on_gpu else what_bytes_lack()
    if no_kernels or (no_bytes and not on_gpu):
        say_once(f"quantized layers run slower than they could: {no_kernels or no_bytes}")
    engine, reasons = (EAGER, [f"no compiled kernels: {no_kernels}"]) if no_kernels else (COMPILED, [])
    if name == "int8" or (name == "auto" and not on_gpu):
        if no_bytes:
            reasons.append(f"no 8-bit arithmetic: {no_bytes}")
        else:
            engine = Int8(engine)
    return Choice(engine, ", ".join(reasons) or wanted)


def _chosen(name: str) -> Eager:
    return choose(name).engine


def use_engine(model: nn.Module, name: str = "auto") -> Choice:
    """Let the engine that `choose(name)` gives compute all quantized layers of `model`; returns it."""
    choice = choose(name, next((p.device for p in model.parameters()), "cpu"))
    for module in model.modules():
        if isinstance(getattr(module, "engine", None), Eager):
            module.engine = choice.engine
    return choice


@functools.cache
def say_once(message: str) -> None:
    logging.getLogger("apotfx").warning(message)


@functools.cache
def what_kernels_lack() -> str | None:
    try:
        kernels.library()
    except kernels.Unavailable as error:
        return str(error)
    return None


@functools.cache
def what_gpu_kernels_lack() -> str | None:
    if not HAS_TRITON:
        return "Triton is not installed"
    return None if os.environ.get("CC") or any(map(shutil.which, ("gcc", "clang"))) else "Triton needs gcc or clang"


@functools.cache
def what_bytes_lack() -> str | None:
    if not HAS_ONEDNN:
        return "this torch has no oneDNN"
    if not getattr(torch.cpu, "_is_vnni_supported", bool)():
        return "the processor has no AVX512-VNNI, without which it is not exact"
    try:
        x, w = torch.full((1, 64, 3, 3), 255, dtype=torch.uint8), torch.full((16, 64, 3, 3), -127, dtype=torch.int8)
        x = x.contiguous(memory_format=torch.channels_last)
        convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
        one = torch.ones(1)
        exact = torch.equal(
            convolution.forward_bytes(x, 128, w, one).double(), convolution.forward(x.double() - 128, w.double())
        ) and torch.equal(
            MatrixProduct().forward_bytes(x.flatten(1), 0, w.flatten(1), one).double(),
            MatrixProduct().forward(x.flatten(1).double(), w.flatten(1).double()),
        )
    except (RuntimeError, AttributeError) as error:
        return f"this torch cannot ({str(error).splitlines()[0]})"
    return None if exact else "it is not exact here"


def _one(like: Tensor, engine: Eager) -> Tensor:
    if engine is EAGER or like.dtype != torch.float32 or type(like) not in F.PLAIN:
        return like.new_ones(())
    return _one_on(like.device)


@functools.cache
def _one_on(device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.ones((), dtype=torch.float32, device=device)


class _Settings(NamedTuple):
    """What `quantized_op` is given besides tensors."""

    levels_x: Levels | None
    levels_w: Levels | None
    operator: Operator
    dtype: torch.dtype
    exact: bool
    clip_grad_factor: float
    everywhere: bool
    engine: Eager


class _QuantizedOp(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w, clip_x, clip_w, unit_w, settings):
        engine = settings.engine
        operand_x = Operand(x, clip_x, None, settings.levels_x)
        operand_w = Operand(w, clip_w, unit_w, settings.levels_w)
        scale_x = engine.scale(operand_x)
        ctx.save_for_backward(x, w, clip_x, clip_w, unit_w, scale_x)
        ctx.settings = settings
        return engine.product(operand_x, operand_w, scale_x, settings.operator, settings.dtype, settings.exact)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        settings = ctx.settings._replace(engine=EAGER) if F.is_traced() else ctx.settings
        needs_x = ctx.needs_input_grad[0] or ctx.needs_input_grad[2]
        needs_w = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        gradients = functools.partial(_gradients, grad.to(settings.dtype), *ctx.saved_tensors, settings)
        if needs_x and needs_w and _is_recorded(grad):
            # Replayed side by side, as the kernels of a small layer leave most of a GPU idle.
            stream, beside = torch.cuda.current_stream(grad.device), _second_stream(grad.device)
            beside.wait_stream(stream)
            with torch.cuda.stream(beside):
                _, grad_w, _, grad_clip_w = gradients(False, True)
            grad_x, _, grad_clip_x, _ = gradients(True, False)
            stream.wait_stream(beside)
        else:
            grad_x, grad_w, grad_clip_x, grad_clip_w = gradients(needs_x, needs_w)
        return grad_x, grad_w, grad_clip_x, grad_clip_w, None, None


class _TransformedOp(_QuantizedOp):
    """The same for the transforms of torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x, w, clip_x, clip_w, unit_w, settings):
        operand_x = Operand(x, clip_x, None, settings.levels_x)
        operand_w = Operand(w, clip_w, unit_w, settings.levels_w)
        return EAGER.product(operand_x, operand_w, EAGER.scale(operand_x), settings.operator, settings.dtype, settings.exact)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, w, clip_x, clip_w, unit_w, settings = inputs
        ctx.save_for_backward(x, w, clip_x, clip_w, unit_w, EAGER.scale(Operand(x, clip_x, None, settings.levels_x)))
        ctx.settings = settings


def _is_recorded(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured that x belongs to."""
    return x.is_cuda and not F.is_traced() and torch.cuda.is_current_stream_capturing()


@functools.cache
def _second_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _gradients(
    grad: Tensor,
    x: Tensor,
    w: Tensor,
    clip_x: Tensor | None,
    clip_w: Tensor | None,
    unit_w: Tensor | None,
    scale_x: Tensor,
    settings: _Settings,
    needs_x: bool,
    needs_w: bool,
) -> tuple[Tensor | None, ...]:
    """Gradients for the input, the weight, and the clips of both; None where they are not needed, or there is none."""
    levels_x, levels_w, operator, dtype, _, clip_grad_factor, everywhere, engine = settings
    x, w = Operand(x, clip_x, None, levels_x), Operand(w, clip_w, unit_w, levels_w)
    n_x = engine.levels(x, None, "x", dtype) if needs_w else None
    # The scales go into the smaller operands, which saves a pass over the output and over the input.
    grad_x, grad_w = operator.backward(
        grad,
        n_x if needs_w else x.values.to(dtype),
        engine.levels(w, _one(w.values, engine), "w", dtype) if needs_x else w.values.to(dtype),
        (needs_x, needs_w),
    )
    grad_clip_x = grad_clip_w = None
    if needs_x:
        grad_x, grad_clip_x = engine.gradient(grad_x, x, n_x)
    if needs_w:
        grad_w, grad_clip_w = engine.gradient(grad_w, w, None, scale_x, everywhere)
    if clip_grad_factor != 1:
        grad_clip_x, grad_clip_w = (g if g is None else g * clip_grad_factor for g in (grad_clip_x, grad_clip_w))
    return grad_x, grad_w, grad_clip_x, grad_clip_w


def quantized_op(
    x: Operand,
    w: Operand,
    *,
    operator: Operator,
    dtype: torch.dtype,
    exact: bool,
    clip_grad_factor: float = 1.0,
    everywhere: bool = False,
    engine: Eager = EAGER,
) -> Tensor:
    """`operator(quantized x, quantized w)`, computed on integers, with the paper's gradients.

    See `functional.quantization_gradient` for the gradients. What the backward pass needs besides x and w, which the
    float operator keeps too, it computes again.

    Args:
        x: input, [N, C_in, ...] for a convolution, [..., C_in] for a matrix product.
        w: weight, [C_out, ...]; its clip is [] or [C_out, 1, ...].
        dtype: of the operands while they are multiplied.
        exact: multiply integer levels, so that the accumulators are exact where `dtype` holds them, and their
            scale afterwards; otherwise whatever is faster.
        clip_grad_factor: multiplies the gradients of both clips.
        everywhere: passes the weight's gradient outside its clip too.
        engine: what computes it, where nothing but autograd follows; else torch's operations do.
    """
    device, inputs, traced = x.values.device.type, (x.values, w.values, x.clip, w.clip), F.is_traced()
    engine = EAGER if traced else engine
    with torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext():
        learns = torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in inputs])
        if traced and torch.jit.is_tracing():  # which records no gradient but that of torch's operations
            if learns and not exact:
                raise ApotfxError("torch.jit.trace: loses the gradients of quantized layers; call eval() first")
            return engine.product(x, w, engine.scale(x), operator, dtype, exact).detach()
        if not learns:
            return engine.product(x, w, engine.scale(x), operator, dtype, exact)
        settings = _Settings(x.levels, w.levels, operator, dtype, exact, clip_grad_factor, everywhere, engine)
        transformed = traced and not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
        return (_TransformedOp if transformed else _QuantizedOp).apply(*inputs, w.unit, settings)
