"""Integer levels as bit-packed codes: `bits` bits each, the index of the level's magnitude and, above it, the sign."""

import numpy as np
import torch
from torch import Tensor

from apotfx.levels import LevelSet


def pack_codes(n: Tensor, levels: LevelSet) -> Tensor:
    """Integer levels (any shape) as codes of `levels.bits` bits, first code in the lowest bits: uint8 [bytes]."""
    magnitudes = torch.tensor(levels.ints)
    index = torch.searchsorted(magnitudes, n.abs().flatten().to(magnitudes.dtype))
    code = index | ((n.flatten() < 0).to(index.dtype) << levels.magnitude_bits)
    bits = (code.unsqueeze(1) >> torch.arange(levels.bits)) & 1
    return torch.from_numpy(np.packbits(bits.to(torch.uint8).numpy().ravel(), bitorder="little"))


def unpack_codes(codes: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The inverse of `pack_codes`: integer levels of `shape` in the smallest integer type that holds them."""
    count = torch.Size(shape).numel()
    bits = np.unpackbits(codes.numpy(), count=count * levels.bits, bitorder="little").reshape(count, levels.bits)
    code = torch.from_numpy(bits).long() @ (2 ** torch.arange(levels.bits))
    magnitude = torch.tensor(levels.ints)[code & (2**levels.magnitude_bits - 1)]
    return (
        torch.where(code >> levels.magnitude_bits == 1, -magnitude, magnitude).reshape(shape).to(storage_dtype(levels))
    )


def storage_dtype(levels: LevelSet) -> torch.dtype:
    """The smallest integer type that holds every level."""
    if not levels.signed:
        return torch.uint8 if levels.max < 2**8 else torch.int16
    return torch.int8 if levels.max < 2**7 else torch.int16
