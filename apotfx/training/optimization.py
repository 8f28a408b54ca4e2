"""How weights follow their gradients: the learning rate over time and by kind of parameter, and the average of weights."""

import math

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from apotfx.training.config import TrainConfig


def lr_factor(schedule: str, progress: float) -> float:
    """The learning rate as a share of its peak, at `progress` (0 to 1) of the run; see `TrainConfig.schedule`."""
    if schedule == "constant":
        return 1.0
    if schedule == "step":
        return 1.0 if progress < 0.5 else 0.1 if progress < 0.75 else 0.01
    rise = 0.3 if schedule == "onecycle" else 0.05
    if progress < rise:
        return 0.04 + 0.96 * progress / rise
    return 0.5 + 0.5 * math.cos(math.pi * (progress - rise) / (1 - rise))


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict]:
    """Weights with decay; biases and batch norms, and clips at their own rate, without (unless `decay_all`)."""
    groups: dict[str, list[nn.Parameter]] = {"weights": [], "scales": [], "clips": []}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name.endswith("_quantizer.clip"):
            groups["clips"].append(parameter)
        else:
            groups["weights" if parameter.dim() > 1 else "scales"].append(parameter)
    decays = {"weights": config.weight_decay}
    default = config.weight_decay if config.decay_all else 0.0
    return [
        {
            "params": p,
            "weight_decay": decays.get(kind, default),
            "lr_factor": config.clip_lr if kind == "clips" else 1.0,
        }
        for kind, p in groups.items()
        if p
    ]


class MovingAverage(AveragedModel):
    """An exponential moving average of parameters and batch-norm statistics.

    The decay starts low and rises to `decay`, so that a short run is not dominated by its initial weights.
    """

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model, use_buffers=True)
        self.decay = decay
        # Listed once: to group tensors anew in each step, as the base class does, costs more than to average them.
        pairs = [
            (average.detach(), value.detach())
            for kind in ("parameters", "buffers")
            for average, value in zip(getattr(self.module, kind)(), getattr(model, kind)(), strict=True)
        ]
        self.floats = [pair for pair in pairs if pair[0].is_floating_point()]
        self.others = [pair for pair in pairs if not pair[0].is_floating_point()]

    def update_parameters(self, model: nn.Module | None = None) -> None:
        """Average in the values of the model that was passed at the start."""
        self.average_in(self.next_weight())
        self.copy_others()

    def next_weight(self) -> float:
        """Of the values that are averaged in next, which are counted."""
        n = int(self.n_averaged)
        self.n_averaged += 1
        return 1 - min(self.decay, (1 + n) / (10 + n)) if n else 1.0

    @torch.no_grad()
    def average_in(self, weight: float | Tensor) -> None:
        """Move the averages to the model's values by this share of the way; a tensor is a float32 [] on its device."""
        if self.floats:
            averages, values = zip(*self.floats)
            if isinstance(weight, Tensor):
                moves = torch._foreach_sub(values, averages)
                torch._foreach_mul_(moves, weight)
                torch._foreach_add_(averages, moves)
            else:
                torch._foreach_lerp_(averages, values, weight)

    @torch.no_grad()
    def copy_others(self) -> None:
        """Take over what is not averaged: counts and flags."""
        if self.others:
            torch._foreach_copy_(*zip(*self.others))
