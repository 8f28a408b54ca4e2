"""The clip that fits a tensor: pure functions."""

import math

import torch
from torch import Tensor

from . import functional as F
from .levels import LevelSet

SAMPLES = 2**16  # elements of a tensor that a clip is fitted to, and of an activation kept per batch
# Clips tried, as fractions of the largest magnitude, in steps of 1/12 octave; 1 is one of them. Beyond it as the levels
# of apot are sparse near the clip: from 5 magnitude bits on up to three times the largest magnitude fits best.
CANDIDATES = torch.logspace(-5, 1.75, 82, base=2)
REFINEMENT = torch.logspace(-1 / 12, 1 / 12, 9, base=2)  # between the neighbours of the best of them


@torch.no_grad()
def fit_clip(x: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The clip that minimizes the mean squared quantization error of x.

    Args:
        x: any shape; [C, ...] with a clip per channel.
        levels: the level set.
        shape: of the clip: [] or [C, 1, ...].

    Returns:
        A float tensor of `shape`. Where x has nothing to represent (all zero, or nothing positive for an
        unsigned set) the clip is 1.
    """
    rows = x.detach().float().reshape(shape[0], -1) if shape else sample(x).float().unsqueeze(0)
    largest = rows.abs().amax(1, keepdim=True) if levels.signed else rows.amax(1, keepdim=True)
    something = largest > 0
    largest = torch.where(something, largest, 1.0)
    encoding = F.Levels.of(levels, x.device)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for fractions in (CANDIDATES, REFINEMENT):
        start = best
        for fraction in fractions.tolist():
            clip = start * fraction
            error = (F.fake_quantize(rows, clip, encoding) - rows).square().mean(1, keepdim=True)
            best = torch.where(error < best_error, clip, best)
            best_error = torch.minimum(error, best_error)
    return torch.where(something, best, 1.0).reshape(shape)


def sample(x: Tensor) -> Tensor:
    """At most SAMPLES elements of x, evenly spread, as a copy of shape [n].

    The distance between them has no factor in common with their number, so that no column of an image is preferred.
    """
    distance = max(1, -(-x.numel() // SAMPLES))
    while distance > 1 and math.gcd(distance, x.numel()) > 1:
        distance += 1
    return x.detach().flatten()[::distance].clone()
