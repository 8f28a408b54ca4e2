"""What the tests of the numeric modules share."""

import torch

from apotfx import functional as F
from apotfx.errors import ApotfxError
from apotfx.levels import SCHEMES, LevelSet


def _level_sets() -> list[LevelSet]:
    level_sets = []
    for scheme in SCHEMES:
        for bits in range(2, 9):
            for signed in (True, False):
                try:
                    level_sets.append(LevelSet(scheme, bits, signed))
                except ApotfxError:  # PoT with many bits
                    assert scheme == "pot" and bits - signed > 4
    return level_sets


LEVEL_SETS = _level_sets()


def level_set_id(levels: LevelSet) -> str:
    return f"{levels.scheme}{levels.bits}{'s' if levels.signed else 'u'}"


def encoding(levels: LevelSet) -> F.Levels:
    return F.Levels.of(levels)


def nearest_level(position: torch.Tensor, levels: LevelSet) -> torch.Tensor:
    """By trying every level: the one nearest to `position` (float64), ties to the larger magnitude."""
    magnitude = position.double().abs() if levels.signed else position.double().clamp(min=0)
    ints = torch.tensor(levels.ints, dtype=torch.float64)
    distance = (magnitude.unsqueeze(-1) - ints).abs().flip(-1)  # argmin takes the first: largest first
    nearest = ints.flip(0)[distance.argmin(-1)]
    return torch.where(position < 0, -nearest, nearest) + 0.0  # and -0 to 0
