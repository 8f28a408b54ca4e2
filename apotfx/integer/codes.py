"""Integer levels as bit-packed codes: `bits` bits each, the index of the level's magnitude and, above it, the sign."""

import numpy as np
import torch
from torch import Tensor

from apotfx.levels import LevelSet


def code_table(levels: LevelSet) -> np.ndarray:
    """The level of every code, [2 ** bits]; the code above the largest magnitude's is another one for 0."""
    table = [*levels.ints, *(-n for n in levels.ints)] if levels.signed else levels.ints
    return torch.tensor(table, dtype=storage_dtype(levels)).numpy()


def pack_codes(n: Tensor, levels: LevelSet) -> Tensor:
    """Integer levels (any shape) as codes of `levels.bits` bits, first code in the lowest bits: uint8 [bytes]."""
    table = code_table(levels)
    codes = np.zeros(2 * levels.max + 1, dtype=np.uint8)  # by level; negative ones count from the end
    codes[table[::-1]] = np.arange(len(table), dtype=np.uint8)[::-1]  # the last one stays: for 0 the code 0
    bits = np.unpackbits(
        codes[n.flatten().to(torch.int16).numpy()][:, np.newaxis], axis=1, count=levels.bits, bitorder="little"
    )
    return torch.from_numpy(np.packbits(bits, bitorder="little"))


def unpack_codes(codes: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The inverse of `pack_codes`: integer levels of `shape` in the smallest integer type that holds them."""
    count = torch.Size(shape).numel()
    bits = np.zeros((count, 8), dtype=np.uint8)
    bits[:, : levels.bits] = np.unpackbits(codes.numpy(), count=count * levels.bits, bitorder="little").reshape(
        count, levels.bits
    )
    return torch.from_numpy(code_table(levels)[np.packbits(bits, bitorder="little")]).reshape(shape)


def storage_dtype(levels: LevelSet) -> torch.dtype:
    """The smallest integer type that holds every level."""
    if not levels.signed:
        return torch.uint8 if levels.max < 2**8 else torch.int16
    return torch.int8 if levels.max < 2**7 else torch.int16
