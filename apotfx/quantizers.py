"""Modules that hold a level set and its clip."""

import enum
from collections.abc import Callable

import torch
import torch.distributed
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from . import functional as F
from .clips import fit_clip
from .errors import ApotfxError
from .levels import LevelSet

PAPER_WEIGHT_CLIP = 3.0  # in standard deviations of the weight; both from the authors' code
PAPER_INPUT_CLIP = 8.0
# What a clip holds until it comes from data, by which it is known wherever it is copied to. As a power of two it stays
# the same in every type and, unlike other numbers, in every moving average.
PLACEHOLDER = 4.0
DRIFT = 1 / 16  # relative; as far as an optimizer's decay moves a placeholder, step by step
NORMALIZATIONS = ("none", "standardize", "rescale")


class Origin(enum.Enum):
    """Where a clip comes from, as far as its process knows."""

    UNKNOWN = enum.auto()  # to look waits for the device
    PLACEHOLDER = enum.auto()
    LOCAL = enum.auto()  # the first training batch of this process, which has yet to agree with the others
    AGREED = enum.auto()  # those of all processes, after a forward pass with another clip
    DATA = enum.auto()


class Quantizer(nn.Module):
    """A level set and its learnable clip threshold.

    Its state is `clip`, a parameter of shape [] (per tensor) or [C, 1, ...] (per output channel), all of it PLACEHOLDER
    until it comes from data. `origin` mirrors that.
    """

    clip_before: Tensor | None = None  # that of the forward pass, if the processes have agreed on another one since

    def __init__(self, levels: LevelSet, clip: Tensor):
        super().__init__()
        self.levels = levels
        self.clip = nn.Parameter(clip)
        self.origin = Origin.UNKNOWN

    @property
    def encoding(self) -> F.Levels:
        """The level set as the arithmetic needs it."""
        return F.Levels(self.levels)

    @property
    def used_clip(self) -> Tensor:
        """The clip as the arithmetic uses it: positive, without gradient."""
        return self.clip.detach().clamp_min(F.MIN_CLIP)

    @property
    def scale(self) -> Tensor:
        """The float step of one integer: `clip / levels.max`; shape of clip."""
        return F.level_step(self.used_clip, self.levels.max)

    @property
    def operand_clip(self) -> Tensor:
        """The clip for an `Operand`; as long as it may be set before the backward pass, a copy.

        The placeholder learns nothing; but where processes train together, every parameter must take part.
        """
        if self.origin is Origin.DATA:
            return self.clip
        if self.origin is Origin.AGREED:
            return self._agreed_clip()
        clip = self.clip.clone()
        return clip.detach() if self.training and self.origin is Origin.PLACEHOLDER and not is_distributed() else clip

    @torch.compiler.disable
    def _agreed_clip(self) -> Tensor:
        if is_in_backward():  # where activation checkpointing repeats the forward pass
            return self.clip_before + (self.clip - self.clip.detach())
        self.origin, self.clip_before = Origin.DATA, None
        return self.clip

    @torch.no_grad()
    def agree_on(self, clip: Tensor) -> None:
        """Take over the clip that the first training batches of all processes gave."""
        before = self.clip.clone()
        self.set_clip(clip)
        self.origin, self.clip_before = Origin.AGREED, before

    def encode(self, x: Tensor) -> Tensor:
        """Integer levels of x; see `functional.encode`."""
        return F.encode(x, self.used_clip, self.encoding)

    def has_placeholder(self) -> bool:
        """Whether the clip is the placeholder; waits for the device."""
        return bool((self.clip.detach() == PLACEHOLDER).all())

    @torch.no_grad()
    def needs_data(self) -> bool:
        """Whether the clip is yet to come from data; waits for the device until it has come.

        A placeholder that has drifted since the last time is put back.
        """
        if self.origin in (Origin.UNKNOWN, Origin.PLACEHOLDER) and not self.has_placeholder():
            drifted = self.origin is Origin.PLACEHOLDER and (self.clip / PLACEHOLDER - 1).abs().max() < DRIFT
            if drifted:
                self.clip.fill_(PLACEHOLDER)
            else:
                self.origin = Origin.DATA
        elif self.origin is Origin.UNKNOWN:
            self.origin = Origin.PLACEHOLDER
        return self.origin is Origin.PLACEHOLDER

    @torch.no_grad()
    def set_clip(self, clip: Tensor | float) -> None:
        """Set the clip from data. `clip` broadcasts to the parameter's shape."""
        self.clip.copy_(torch.as_tensor(clip))
        if self.has_placeholder():
            self.clip.mul_(1 + torch.finfo(self.clip.dtype).eps)
        self.origin = Origin.DATA

    @torch.no_grad()
    def fit_first_batch(self, x: Tensor, what: str) -> None:
        """Set the clip from a first training batch, if that has anything but zeros; see `state.synchronize_clips`.

        Raises:
            ApotfxError: x, which is `what`, is not finite; or the batch went through before, without gradients.
        """
        if not x.isfinite().all():
            raise ApotfxError(f"first training batch: {what} is not finite; check the data and the weights")
        if not x.any():
            return
        if is_in_backward():
            raise ApotfxError(
                f"first training batch: {what} is only seen without gradients before the backward pass; calibrate the "
                "network first, or checkpoint activations with use_reentrant=False"
            )
        self.set_clip(fit_clip(x, self.levels, self.clip.shape))
        self.origin = Origin.LOCAL if is_distributed() else Origin.DATA

    def _save_to_state_dict(self, *args) -> None:
        if self.origin is Origin.PLACEHOLDER:
            self.needs_data()  # which puts it back
        super()._save_to_state_dict(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        clip = state_dict.get(f"{prefix}clip")
        # A flag in the state of earlier versions.
        if not state_dict.pop(f"{prefix}calibrated", True) and clip is not None:
            state_dict[f"{prefix}clip"] = torch.full_like(clip, PLACEHOLDER)
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.origin = Origin.UNKNOWN
        if not self.clip.is_meta and F.is_plain(self.clip):
            self.needs_data()

    def extra_repr(self) -> str:
        sign = "signed" if self.levels.signed else "unsigned"
        return f"{self.levels.scheme}, bits={self.levels.bits}, {sign}"


def is_distributed() -> bool:
    """Whether this process trains together with others."""
    distributed = torch.distributed
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def is_in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def require_unrecorded(layer: str) -> list[type]:
    """The types of the dispatch modes that look at a training step of the layer of that name.

    Selective activation checkpointing is none of them.

    Raises:
        ApotfxError: the step is recorded, which would make a constant of whether clips come from it.
    """
    if not F.is_traced():
        return []
    modes = [type(mode) for mode in _get_current_dispatch_mode_stack()]
    recorded = torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    if recorded or any(issubclass(mode, ProxyTorchDispatchMode) for mode in modes):
        raise ApotfxError(
            f"layer {layer}: traced in training mode before its clips come from data; calibrate the network first"
        )
    return [mode for mode in modes if mode.__module__ != torch.utils.checkpoint.__name__]


class InputQuantizer(Quantizer):
    """Quantizes a layer's input, per tensor."""

    def __init__(self, levels: LevelSet, dtype: torch.dtype = torch.float32):
        super().__init__(levels, torch.tensor(PLACEHOLDER, dtype=dtype, device="cpu"))

    def require_sign(self, low: float, layer: str, when: str, reason: str) -> None:
        """
        Args:
            low: the smallest value of the input of the layer of that name, as it is brought to levels.
            reason: why it cannot be negative.

        Raises:
            ApotfxError: it is negative, and the levels are unsigned.
        """
        if not self.levels.signed and low < 0:
            raise ApotfxError(
                f"layer {layer}: {when}, its input reaches {low:.3g}, expected at least 0 for its unsigned levels "
                f"({reason or 'it was taken for non-negative'}); leave the layer in float (scheme: float)"
            )


class WeightQuantizer(Quantizer):
    """Normalizes, then quantizes a layer's weight.

    Args:
        weight: the float weight, [C_out, ...]; gives the clip its shape and device, and float64 if it has it.
        per_channel: one clip per output channel.
        normalization: what happens to the weight before it is clipped. "standardize" (paper, section 2.3):
            `(w - mean) / std`, which changes the layer's function by a factor and an offset that a batch norm
            must absorb. "rescale": the weight as it is, with a clip that counts standard deviations, which is
            `w / std` multiplied back by std after quantization; the function is kept. "none": the weight as it is,
            with a clip in its own unit. Mean and (unbiased) standard deviation are those of the whole
            weight and constant in the backward pass, as in the authors' code.
    """

    def __init__(self, levels: LevelSet, weight: Tensor, *, per_channel: bool, normalization: str):
        if normalization not in NORMALIZATIONS:
            raise ApotfxError(f"normalization {normalization!r}: unknown; choose one of {', '.join(NORMALIZATIONS)}")
        shape = (weight.shape[0],) + (1,) * (weight.dim() - 1) if per_channel else ()
        dtype = torch.promote_types(weight.dtype, torch.float32)
        super().__init__(levels, torch.full(shape, PLACEHOLDER, dtype=dtype, device=weight.device))
        self.normalization = normalization

    def normalize(
        self, w: Tensor, standard_deviation: Callable[[Tensor], Tensor] = F.standard_deviation
    ) -> tuple[Tensor, Tensor | None]:
        """(the weight that is quantized, the unit of shape [] that the clip counts; None for 1)."""
        if self.normalization == "none":
            return w, None
        std = standard_deviation(w.detach())
        if self.normalization == "standardize":
            return (w - w.detach().mean()) / std, None
        return w, std

    def in_clip_units(self, w: Tensor) -> Tensor:
        """The weight that is quantized, as the clip counts it."""
        weight, unit = self.normalize(w)
        return weight if unit is None else weight / unit

    def paper_clip(self, w: Tensor) -> Tensor:
        """The paper's clip for the weight w, shape []."""
        unit = F.standard_deviation(w.detach()) if self.normalization == "none" else w.new_ones(())
        return PAPER_WEIGHT_CLIP * unit

    def extra_repr(self) -> str:
        granularity = "per channel" if self.clip.dim() else "per tensor"
        return f"{super().extra_repr()}, {granularity}, normalization={self.normalization}"
