"""Level sets: the integers that a quantized value may take. Pure Python, no tensors.

With a clip threshold `alpha > 0` a level set represents `± alpha * ints[i] / ints[-1]` (only `+` if
unsigned). Uniform, powers-of-two (PoT) and additive-powers-of-two (APoT) quantization differ in
`ints` and in nothing else.
"""

from dataclasses import dataclass
from functools import cached_property
from itertools import product

from .errors import ApotfxError

MIN_BITS, MAX_BITS = 2, 8
MAX_LEVEL = 2**15 - 1  # the largest level that 16-bit storage and exact float64 accumulators allow


def _uniform(magnitude_bits: int) -> list[int]:
    return list(range(2**magnitude_bits))


def _pot(magnitude_bits: int) -> list[int]:
    return [0] + [2**e for e in range(2**magnitude_bits - 1)]


def apot_exponents(magnitude_bits: int) -> list[list[int]]:
    """The exponents `e` of the terms `{0, 2^-e, ...}` whose sums are the APoT levels.

    `magnitude_bits // 2` two-bit terms with three exponents each and, where `magnitude_bits` is odd,
    one one-bit term with one exponent. Li, Dong, Wang, "Additive Powers-of-Two Quantization",
    ICLR 2020, arXiv 1909.13144, eq. 5, with base k = 2.

    >>> apot_exponents(5)
    [[1, 3, 6], [2, 4, 7], [5]]
    """
    two_bit = [[] for _ in range(magnitude_bits // 2)]
    one_bit = [[]] if magnitude_bits % 2 else []
    for e, term in enumerate(two_bit + two_bit + one_bit + two_bit, start=1):
        term.append(e)
    return two_bit + one_bit


def _apot(magnitude_bits: int) -> list[int]:
    terms = apot_exponents(magnitude_bits)
    smallest = max(e for term in terms for e in term)
    choices = [[0] + [2 ** (smallest - e) for e in term] for term in terms]
    return sorted(sum(choice) for choice in product(*choices))


SCHEMES = {"apot": _apot, "pot": _pot, "uniform": _uniform}


@dataclass(frozen=True)
class LevelSet:
    """The levels of one quantizer.

    Attributes:
        scheme: "apot", "pot" or "uniform".
        bits: 2 to 8, the sign included. A signed set has `bits - 1` magnitude bits, an unsigned one `bits`.
        signed: whether every level but zero exists with both signs.

    Raises:
        ApotfxError: unknown scheme, bits out of range, or levels that 16 bits cannot hold (PoT beyond
            4 magnitude bits).

    >>> LevelSet("apot", 4).ints
    (0, 1, 2, 3, 4, 6, 8, 10)
    >>> LevelSet("apot", 4).shift_add_terms[-1]   # 10 = 2^1 + 2^3
    (1, 3)
    """

    scheme: str
    bits: int
    signed: bool = True

    def __post_init__(self):
        if self.scheme not in SCHEMES:
            raise ApotfxError(f"scheme {self.scheme!r}: unknown; choose one of {', '.join(SCHEMES)}")
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not MIN_BITS <= self.bits <= MAX_BITS:
            raise ApotfxError(f"bits {self.bits!r}: out of range; a level set has {MIN_BITS} to {MAX_BITS} bits")
        # Asked before the levels are listed: PoT at 8 bits would need 2^254.
        if self.scheme == "pot" and 2 ** (2**self.magnitude_bits - 2) > MAX_LEVEL:
            sign = "signed" if self.signed else "unsigned"
            raise ApotfxError(
                f"pot at {self.bits} bits {sign}: its largest level 2^{2**self.magnitude_bits - 2} exceeds "
                f"{MAX_LEVEL}; use at most {5 if self.signed else 4} bits, or scheme apot"
            )

    @property
    def magnitude_bits(self) -> int:
        return self.bits - 1 if self.signed else self.bits

    @cached_property
    def ints(self) -> tuple[int, ...]:
        """The magnitudes, ascending, `2 ** magnitude_bits` of them, the first one 0."""
        return tuple(SCHEMES[self.scheme](self.magnitude_bits))

    @property
    def max(self) -> int:
        """The largest magnitude; the clip threshold stands for it."""
        return self.ints[-1]

    @cached_property
    def shift_add_terms(self) -> tuple[tuple[int, ...], ...]:
        """Per level the exponents of the powers of two that it is the sum of, ascending; () for 0."""
        return tuple(tuple(e for e in range(n.bit_length()) if n >> e & 1) for n in self.ints)

    @cached_property
    def encoding_table(self) -> tuple[int, ...]:
        """The level of x for every value of `trunc(2 * max * x / alpha)`, ascending.

        The midpoint of two neighbouring levels is a multiple of 1/2, so that this number decides the level; as it is
        truncated towards zero, a tie goes to the larger magnitude. There are `2 * max + 1` entries, from 0 on, for an
        unsigned set, and `4 * max + 1` entries, from `-2 * max` on, for a signed one.
        """
        table, index = [], 0
        for j in range(2 * self.max + 1):
            if index + 1 < len(self.ints) and j >= self.ints[index] + self.ints[index + 1]:
                index += 1
            table.append(self.ints[index])
        return tuple([-n for n in table[:0:-1]] + table if self.signed else table)
