"""The clip that fits a tensor: pure functions."""

import math

import torch
from torch import Tensor

from . import functional as F
from .levels import LevelSet

SAMPLES = 2**16  # elements of a tensor that a clip is fitted to, and of an activation kept per batch
# Clips tried, as fractions of the largest magnitude, in steps of 1/12 octave; 1 is one of them. Beyond it as the levels
# of apot are sparse near the clip: from 5 magnitude bits on up to three times the largest magnitude fits best.
CANDIDATES = torch.logspace(-5, 1.75, 82, base=2, dtype=torch.float32, device="cpu")
# Between the neighbours of the best of them.
REFINEMENT = torch.logspace(-1 / 12, 1 / 12, 9, base=2, dtype=torch.float32, device="cpu")


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
    rows = _rows(x if shape else sample(x), shape)
    largest = _magnitudes(rows, levels).amax(1, keepdim=True)
    something = largest > 0
    largest = torch.where(something, largest, 1.0)
    encoding = F.Levels(levels)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for fractions in (CANDIDATES, REFINEMENT):
        start = best
        for fraction in fractions.tolist():
            clip = start * fraction
            error = (F.fake_quantize(rows, clip, encoding) - rows).square().mean(1, keepdim=True)
            best = torch.where(error < best_error, clip, best)
            best_error = torch.minimum(error, best_error)
    return torch.where(something, best, 1.0).reshape(shape)


@torch.no_grad()
def minmax_clip(x: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The largest magnitude in x (for an unsigned set the largest value): the least clip that cuts nothing off.

    Arguments, shape and exceptions as in `fit_clip`, but for every element of x.
    """
    largest = _magnitudes(_rows(x, shape), levels).amax(1)
    return torch.where(largest > 0, largest, 1.0).reshape(shape)


@torch.no_grad()
def percentile_clip(x: Tensor, levels: LevelSet, percentile: float) -> Tensor:
    """The least magnitude in x that at least `percentile` % of them do not exceed, as a float tensor of shape [].

    Args:
        x: any shape.
        levels: for an unsigned set what is negative counts as 0.
        percentile: more than 0, at most 100.

    Where that magnitude is 0 the clip is the largest magnitude, and where that is 0 it is 1.
    """
    magnitudes = _magnitudes(_rows(x, torch.Size()), levels).flatten()
    rank = max(1, math.ceil(magnitudes.numel() * percentile / 100))
    value = magnitudes.kthvalue(rank).values
    return value if value > 0 else minmax_clip(x, levels, torch.Size())


def _rows(x: Tensor, shape: torch.Size) -> Tensor:
    """x in float32, a row per clip of `shape`."""
    return x.detach().float().reshape(shape[0] if shape else 1, -1)


def _magnitudes(rows: Tensor, levels: LevelSet) -> Tensor:
    return rows.abs() if levels.signed else rows.clamp_min(0)


def extremes(x: Tensor) -> Tensor:
    """(smallest, largest) element of x, shape [2]; [0] for an empty x."""
    x = x.detach().flatten()
    return torch.stack(torch.aminmax(x)) if x.numel() else x


def sample(x: Tensor) -> Tensor:
    """At most SAMPLES elements of x, evenly spread, as a copy of shape [n].

    The distance between them has no factor in common with their number, so that no column of an image is preferred.
    """
    distance = max(1, -(-x.numel() // SAMPLES))
    while distance > 1 and math.gcd(distance, x.numel()) > 1:
        distance += 1
    return x.detach().flatten()[::distance].clone()
