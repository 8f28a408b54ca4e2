"""Modules that hold a level set and its clip."""

from collections.abc import Callable

import torch
import torch.distributed
from torch import Tensor, nn

from . import functional as F
from .clips import fit_clip
from .errors import ApotfxError
from .levels import LevelSet

PAPER_WEIGHT_CLIP = 3.0  # in standard deviations of the weight; both from the authors' code
PAPER_INPUT_CLIP = 8.0
NORMALIZATIONS = ("none", "standardize", "rescale")


class Quantizer(nn.Module):
    """A level set and its learnable clip threshold.

    State: `clip`, a parameter of shape [] (per tensor) or [C, 1, ...] (per output channel), and `calibrated`, a bool buffer: whether `clip` came from data.
    """

    def __init__(self, levels: LevelSet, clip: Tensor):
        super().__init__()
        self.levels = levels
        self.clip = nn.Parameter(clip)
        self.register_buffer("calibrated", torch.tensor(False))
        self.register_buffer("table", F.Levels.of(levels).table, persistent=False)
        self.needs_clip = True  # mirrors `calibrated`, to be read without waiting for the device

    @property
    def encoding(self) -> F.Levels:
        """The level set as the arithmetic needs it."""
        return F.Levels(self.table, self.levels)

    @property
    def used_clip(self) -> Tensor:
        """The clip as the arithmetic uses it: positive, without gradient."""
        return self.clip.detach().clamp_min(F.MIN_CLIP)

    @property
    def scale(self) -> Tensor:
        """The float step of one integer: `clip / levels.max`; shape of clip."""
        return F.level_step(self.used_clip, self.levels.max)

    def encode(self, x: Tensor) -> Tensor:
        """Integer levels of x; see `functional.encode`."""
        return F.encode(x, self.used_clip, self.encoding)

    @torch.no_grad()
    def set_clip(self, clip: Tensor) -> None:
        """Set the clip from data. `clip` broadcasts to the parameter's shape."""
        self.clip.copy_(clip)
        self.calibrated.fill_(True)
        self.needs_clip = False

    @torch.compiler.disable
    @torch.no_grad()
    def fit_first_batch(self, x: Tensor, what: str) -> None:
        """Set the clip from a first training batch, the same one on every process of a distributed run.

        Raises:
            ApotfxError: x, which is `what`, is not finite.
        """
        if not x.numel():
            return
        if not x.isfinite().all():
            raise ApotfxError(f"first training batch: {what} is not finite; check the data and the weights")
        clip = fit_clip(x, self.levels, self.clip.shape)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.all_reduce(clip)
            clip /= torch.distributed.get_world_size()
        self.set_clip(clip)

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        self.needs_clip = not self.calibrated.item()

    def extra_repr(self) -> str:
        sign = "signed" if self.levels.signed else "unsigned"
        return f"{self.levels.scheme}, bits={self.levels.bits}, {sign}"


class InputQuantizer(Quantizer):
    """Quantizes a layer's input, per tensor."""

    def __init__(self, levels: LevelSet):
        super().__init__(levels, torch.tensor(PAPER_INPUT_CLIP))


class WeightQuantizer(Quantizer):
    """Normalizes, then quantizes a layer's weight.

    Args:
        weight: the float weight, [C_out, ...]; gives the clip its shape, device and default.
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
        super().__init__(levels, torch.full(shape, PAPER_WEIGHT_CLIP, device=weight.device))
        self.normalization = normalization
        if normalization == "none":
            with torch.no_grad():
                self.clip.mul_(F.standard_deviation(weight))

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

    def extra_repr(self) -> str:
        granularity = "per channel" if self.clip.dim() else "per tensor"
        return f"{super().extra_repr()}, {granularity}, normalization={self.normalization}"
