import pytest
import torch
from helpers import LEVEL_SETS, level_set_id

from apotfx import LevelSet
from apotfx.integer.codes import pack_codes, storage_dtype, unpack_codes

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)


def all_levels(levels):
    ints = torch.tensor(levels.ints)
    return torch.cat([-ints.flip(0)[:-1], ints]) if levels.signed else ints


@every_level_set
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3, 3, 3), (0,)], ids=str)
def test_codes_round_trip(levels, shape):
    choice = torch.randint(len(all_levels(levels)), shape, generator=torch.Generator().manual_seed(0))
    n = all_levels(levels)[choice]
    codes = pack_codes(n.float(), levels)
    assert codes.dtype == torch.uint8 and codes.shape == (-(-n.numel() * levels.bits // 8),)
    back = unpack_codes(codes, levels, torch.Size(shape))
    assert back.dtype == storage_dtype(levels) and torch.equal(back.long(), n)


@every_level_set
def test_every_level_has_its_own_code(levels):
    n = all_levels(levels)
    assert torch.equal(unpack_codes(pack_codes(n, levels), levels, n.shape).long(), n)
    codes = {int.from_bytes(pack_codes(level.reshape(1), levels).numpy().tobytes(), "little") for level in n}
    assert len(codes) == len(n) and max(codes) < 2**levels.bits


def test_the_layout_of_codes():
    """The index in the low bits, the sign above it, the first code in the lowest bits of the first byte."""
    n = torch.tensor([[0, 1, -1], [4, -10, 10]])  # indices 0 1 1 4 7 7 in 0 1 2 3 4 6 8 10
    assert [f"{byte:08b}" for byte in pack_codes(n, LevelSet("apot", 4)).tolist()] == [
        "00010000",
        "01001001",
        "01111111",
    ]
    assert [f"{byte:08b}" for byte in pack_codes(torch.tensor([1, -1, 0, 1, 1]),
        LevelSet("uniform", 2)).tolist()] == [
        "01001101", "00000001",
    ]  # fmt: skip


def test_codes_do_not_depend_on_the_memory_format():
    n = torch.randint(-7, 8, (4, 3, 5, 2), generator=torch.Generator().manual_seed(0)).float()
    levels = LevelSet("uniform", 4)
    assert torch.equal(pack_codes(n.contiguous(memory_format=torch.channels_last), levels), pack_codes(n, levels))


@every_level_set
def test_the_storage_type_is_the_smallest_that_holds_the_levels(levels):
    candidates = [torch.int8, torch.int16] if levels.signed else [torch.uint8, torch.int16]
    large_enough = [dtype for dtype in candidates if torch.iinfo(dtype).max >= levels.max]
    assert storage_dtype(levels) == large_enough[0]


@pytest.mark.parametrize("levels, expected", [
    (LevelSet("apot", 6), torch.int8), (LevelSet("apot", 5, False), torch.uint8),
    (LevelSet("apot", 6, False), torch.int16),
    (LevelSet("uniform", 8), torch.int8), (LevelSet("uniform", 8, False), torch.uint8),
    (LevelSet("pot", 4), torch.int8),
    (LevelSet("pot", 5), torch.int16),
], ids=str)  # fmt: skip
def test_storage_types_that_matter(levels, expected):
    assert storage_dtype(levels) == expected
