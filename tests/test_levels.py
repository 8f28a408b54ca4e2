import pytest
import torch
from helpers import LEVEL_SETS, level_set_id, nearest_level

from apotfx import ApotfxError, LevelSet
from apotfx.levels import MAX_LEVEL, apot_exponents

PUBLISHED_APOT = {
    1: "0 1",
    2: "0 1 2 4",
    3: "0 1 2 3 4 6 8 10",
    4: "0 1 2 3 4 6 8 9 12 16 18 24 32 33 36 48",
    5: "0 1 2 3 4 5 6 7 8 10 12 14 16 17 20 21 24 28 32 34 36 38 48 52 64 65 68 69 72 76 96 100",
}
EXPONENTS = {
    1: [[1]],
    2: [[1, 2, 3]],
    3: [[1, 2, 4], [3]],
    4: [[1, 3, 5], [2, 4, 6]],
    5: [[1, 3, 6], [2, 4, 7], [5]],
    6: [[1, 4, 7], [2, 5, 8], [3, 6, 9]],
}

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)


@pytest.mark.parametrize("magnitude_bits", PUBLISHED_APOT)
def test_apot_levels_are_the_published_ones(magnitude_bits):
    expected = tuple(int(n) for n in PUBLISHED_APOT[magnitude_bits].split())
    assert LevelSet("apot", magnitude_bits + 1).ints == expected
    if magnitude_bits > 1:
        assert LevelSet("apot", magnitude_bits, signed=False).ints == expected


def test_apot_with_6_magnitude_bits():
    assert len(LevelSet("apot", 7).ints) == 64
    assert LevelSet("apot", 7).max == LevelSet("apot", 6, signed=False).max == 448


@pytest.mark.parametrize("magnitude_bits", EXPONENTS)
def test_exponents_are_handed_out_in_rounds(magnitude_bits):
    exponents = apot_exponents(magnitude_bits)
    assert [sorted(term) for term in exponents] == EXPONENTS[magnitude_bits]


@pytest.mark.parametrize("magnitude_bits", range(1, 9))
def test_every_exponent_is_used_once(magnitude_bits):
    exponents = sorted(e for term in apot_exponents(magnitude_bits) for e in term)
    assert exponents == list(range(1, 3 * (magnitude_bits // 2) + magnitude_bits % 2 + 1))


@pytest.mark.parametrize("bits", range(2, 9))
def test_uniform_levels_are_all_integers(bits):
    assert LevelSet("uniform", bits).ints == tuple(range(2 ** (bits - 1)))
    assert LevelSet("uniform", bits, signed=False).ints == tuple(range(2**bits))


@pytest.mark.parametrize(
    "magnitude_bits, expected",
    [
        (1, (0, 1)),
        (2, (0, 1, 2, 4)),
        (3, (0, 1, 2, 4, 8, 16, 32, 64)),
        (4, (0, *(2**e for e in range(15)))),
    ],
)
def test_pot_levels_are_powers_of_two(magnitude_bits, expected):
    assert LevelSet("pot", magnitude_bits + 1).ints == expected


@every_level_set
def test_levels_are_ascending_and_as_many_as_the_bits_say(levels):
    assert levels.magnitude_bits == levels.bits - levels.signed
    assert len(levels.ints) == 2**levels.magnitude_bits
    assert levels.ints[0] == 0
    assert all(low < high for low, high in zip(levels.ints, levels.ints[1:]))
    assert levels.max == levels.ints[-1] <= MAX_LEVEL
    assert all(type(n) is int for n in levels.ints)


def test_all_but_wide_pot_exists():
    assert len(LEVEL_SETS) == 3 * 7 * 2 - (8 - 5) - (8 - 4)


@pytest.mark.parametrize("scheme", ["apot", "pot", "uniform"])
def test_weights_of_2_bits_are_ternary(scheme):
    assert LevelSet(scheme, 2).ints == (0, 1)


def test_what_fits_8_bit_arithmetic():
    assert LevelSet("apot", 6).max == 100 < 2**7
    assert LevelSet("apot", 5, signed=False).max == 100 < 2**8


@every_level_set
def test_shift_add_terms_sum_to_the_levels(levels):
    assert len(levels.shift_add_terms) == len(levels.ints)
    for n, exponents in zip(levels.ints, levels.shift_add_terms):
        assert sum(2**e for e in exponents) == n
        assert list(exponents) == sorted(set(exponents))
    most = {"pot": 1, "apot": -(-levels.magnitude_bits // 2), "uniform": levels.magnitude_bits}[levels.scheme]
    assert max(len(exponents) for exponents in levels.shift_add_terms) == most


@every_level_set
def test_encoding_table_holds_the_nearest_level(levels):
    """An entry stands for positions from j/2 on to the next multiple of 1/2 away from zero, which is left out."""
    position = torch.arange(-2 * levels.max if levels.signed else 0, 2 * levels.max + 1, dtype=torch.float64) / 2
    table = torch.tensor(levels.encoding_table, dtype=torch.float64)
    assert torch.equal(table, nearest_level(position, levels))
    away = position + torch.where(position < 0, -0.5, 0.5)
    inside = away.abs() <= levels.max
    assert torch.equal(table[inside], nearest_level(torch.nextafter(away, position)[inside], levels))


def test_the_reference_gives_ties_to_the_larger_magnitude():
    position = torch.tensor([0.0, 0.49, 0.5, 2.99, 3.0, 4.0, 99.0, -0.5, -3.0, -0.49])
    expected = torch.tensor([0, 0, 1, 2, 4, 4, 4, -1, -4, 0], dtype=torch.float64)
    assert torch.equal(nearest_level(position, LevelSet("apot", 3)), expected)


@pytest.mark.parametrize("arguments, message", [
    (("apod", 4), r"scheme 'apod': unknown; choose one of apot, pot, uniform"),
    (("float", 4), r"scheme 'float': unknown"),
    (("apot", 1), r"bits 1: out of range; a level set has 2 to 8 bits"),
    (("uniform", 9), r"bits 9: out of range"),
    (("uniform", 4.0), r"bits 4.0: out of range"),
    (("uniform", "4"), r"bits '4': out of range"),
    (("uniform", True), r"bits True: out of range"),
    (("pot", 6), r"pot at 6 bits signed: its largest level 2\^30 exceeds 32767; use at most 5 bits"),
    (("pot", 5, False), r"pot at 5 bits unsigned: its largest level 2\^30 exceeds 32767; use at most 4 bits"),
    (("pot", 8, False), r"pot at 8 bits unsigned: its largest level 2\^254"),
], ids=lambda value: "-".join(map(str, value)) if isinstance(value, tuple) else "")  # fmt: skip
def test_what_cannot_be_represented_is_refused(arguments, message):
    with pytest.raises(ApotfxError, match=message):
        LevelSet(*arguments)


def test_a_level_set_is_a_value():
    assert LevelSet("apot", 4) == LevelSet("apot", 4, True)
    assert len({LevelSet("apot", 4), LevelSet("apot", 4), LevelSet("apot", 4, False)}) == 2
    with pytest.raises(AttributeError):
        LevelSet("apot", 4).bits = 5
