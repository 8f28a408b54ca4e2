"""Bits and schemes per layer under a budget: the policy of the least predicted loss.

Each layer takes one option; the predicted losses of `sensitivity.measure` and the costs both add up over layers, which
makes it a multiple-choice knapsack problem. SciPy's integer programming (HiGHS) solves it to optimality.
"""

import glob
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from .errors import ApotfxError
from .policy import BitPolicy, Rule
from .sensitivity import Sensitivity

BUDGETS = {"size": 1, "macs": 2}  # how many of a layer's two bit widths the cost multiplies


class Option(NamedTuple):
    """What a layer may get; bits as in `Rule`."""

    scheme: str
    weight_bits: int
    activation_bits: int

    def __str__(self) -> str:
        bits = f"{self.weight_bits}" if self.weight_bits == self.activation_bits else "/".join(map(str, self[1:]))
        return f"{bits}-bit {self.scheme}"


END = Option("uniform", 8, 8)  # of the first and the last layer, as in `BitPolicy.default`


@dataclass(frozen=True)
class Allocation:
    """An option per layer.

    Attributes:
        layers: all of the network's that can be quantized.
        options: of each of `layers`.
        counted: whether each is part of the budget; else it is one of the ends, kept at `END`.
    """

    layers: tuple[Sensitivity, ...]
    options: tuple[Option, ...]
    counted: tuple[bool, ...]

    @property
    def loss(self) -> float:
        """The predicted increase of the loss, of the layers that count."""
        pairs = zip(self.layers, self.options, self.counted)
        return sum(predicted_loss(layer, option) for layer, option, counts in pairs if counts)

    def average_bits(self, budget: str) -> float:
        """Of the layers that count. "size": per weight. "macs": root of the mean product of both bits, per MAC."""
        counted = [i for i, counts in enumerate(self.counted) if counts]
        total = sum(_quantity(self.layers[i], budget) for i in counted)
        average = sum(_cost(self.layers[i], self.options[i], budget) for i in counted) / total
        return average ** (1 / BUDGETS[budget])

    def policy(self) -> BitPolicy:
        """A rule per layer, by its exact name; what cannot be quantized matches none and stays in float."""
        return BitPolicy(
            tuple(
                Rule(glob.escape(name), scheme=o.scheme, weight_bits=o.weight_bits, activation_bits=o.activation_bits)
                for layer, o in zip(self.layers, self.options, strict=True)
                for name in layer.names
            )
        )


def predicted_loss(layer: Sensitivity, option: Option) -> float:
    """How much the loss should increase from giving `option` to `layer`."""
    scheme, weight_bits, activation_bits = option
    return layer.weight_loss[scheme, weight_bits] + layer.input_loss[scheme, activation_bits]


def all_equal(layers: Sequence[Sensitivity], option: Option, *, ends: bool = False) -> Allocation:
    """`option` for every layer but the ends, or for those too if `ends`."""
    counted = _counted(layers, ends)
    return Allocation(tuple(layers), tuple(option if c else END for c in counted), counted)


def allocate(
    layers: Sequence[Sensitivity],
    average_bits: float,
    *,
    budget: str = "size",
    separate: bool = False,
    ends: bool = False,
) -> Allocation:
    """The options of the least predicted loss within a budget.

    Args:
        layers: what `sensitivity.measure` returned; its schemes and bits are the options.
        average_bits: the network may cost as much as with this many bits in every layer, which need not be whole.
        budget: "size": the weights' bits, `sum(parameters * weight_bits)`. "macs": the multiply-accumulates' bit
            operations, `sum(macs * weight_bits * activation_bits)`.
        separate: let a layer's weight and its input have different bits.
        ends: let the first and the last layer take part; else they stay at 8-bit uniform and do not count, as with
            `BitPolicy.default`.

    Raises:
        ApotfxError: nothing to choose, fewer bits than the least option takes, an unknown budget, or SciPy is missing.
    """
    if budget not in BUDGETS:
        raise ApotfxError(f"budget {budget!r}: unknown; choose one of {', '.join(BUDGETS)}")
    counted = _counted(layers, ends)
    free = [layer for layer, counts in zip(layers, counted) if counts]
    if not free:
        raise ApotfxError("allocation: the network has no layer beside its first and last; let these take part")
    options = [_options(layer, separate) for layer in free]
    costs = [[_cost(layer, option, budget) for option in choices] for layer, choices in zip(free, options)]
    losses = [[predicted_loss(layer, option) for option in choices] for layer, choices in zip(free, options)]
    total, power = sum(_quantity(layer, budget) for layer in free), BUDGETS[budget]
    least = sum(map(min, costs))
    limit = math.floor(total * Fraction(average_bits) ** power) if 0 < average_bits < math.inf else -1
    if limit < least:
        raise ApotfxError(
            f"average of {average_bits:g} bits: cannot be kept; the options take {(least / total) ** (1 / power):g} or more"
        )
    chosen = solve(costs, losses, limit)
    remaining = iter([choices[i] for choices, i in zip(options, chosen)])
    return Allocation(tuple(layers), tuple(next(remaining) if c else END for c in counted), counted)


def trade_off(
    layers: Sequence[Sensitivity],
    *,
    step: float = 0.25,
    budget: str = "size",
    separate: bool = False,
    ends: bool = False,
) -> list[Allocation]:
    """`allocate` for averages from the least bits that every layer can have to the most that any can, in steps."""
    options = [_options(layer, separate) for layer, counts in zip(layers, _counted(layers, ends)) if counts]
    first = max(min(max(option[1:]) for option in choices) for choices in options)
    last = max(max(option[1:]) for choices in options for option in choices)
    averages = [first + step * i for i in range(math.floor((last - first) / step) + 1)]
    return [allocate(layers, average, budget=budget, separate=separate, ends=ends) for average in averages]


def _counted(layers: Sequence[Sensitivity], ends: bool) -> tuple[bool, ...]:
    return tuple(ends or not layer.is_end for layer in layers)


def _options(layer: Sensitivity, separate: bool) -> list[Option]:
    options = [
        Option(scheme, weight_bits, activation_bits)
        for scheme, weight_bits in layer.weight_loss
        for other, activation_bits in layer.input_loss
        if other == scheme and (separate or activation_bits == weight_bits)
    ]
    if not options:
        raise ApotfxError(f"layer {layer.name}: no scheme has levels at the bits measured; measure more of them")
    return options


def _quantity(layer: Sensitivity, budget: str) -> int:
    return layer.parameters if budget == "size" else layer.macs


def _cost(layer: Sensitivity, option: Option, budget: str) -> int:
    return _quantity(layer, budget) * option.weight_bits * (1 if budget == "size" else option.activation_bits)


def solve(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int) -> list[int]:
    """Per row the index of its choice: the choices of the least total loss whose total cost is at most `limit`.

    Args:
        costs: non-negative, by row and choice; rows may differ in length.
        losses: in the same shape.
        limit: at least the sum of the rows' least costs.

    Raises:
        ApotfxError: SciPy is missing.
    """
    try:
        from scipy.linalg import block_diag
        from scipy.optimize import LinearConstraint, milp
    except ImportError:
        raise ApotfxError("allocation: the package scipy is missing; pip install 'apotfx[allocate]'") from None
    kept = [_not_dominated(*row) for row in zip(costs, losses)]
    costs, losses = ([[row[i] for i in indices] for row, indices in zip(rows, kept)] for rows in (costs, losses))
    # HiGHS stops within an absolute gap of 1e-6: in units of what no choice can go below, that is a relative one.
    unit = sum(map(min, losses)) or max(map(max, losses)) or 1.0
    objective = np.concatenate([np.asarray(row) / unit for row in losses])
    one_each = LinearConstraint(block_diag(*(np.ones(len(row)) for row in costs)), 1, 1)
    divisor = math.gcd(*(cost for row in costs for cost in row)) or 1
    weights = np.concatenate([np.asarray(row) // divisor for row in costs])[None]
    allowed = limit // divisor
    while True:
        within = LinearConstraint(weights, ub=allowed)
        result = milp(
            objective, integrality=1, bounds=(0, 1), constraints=[one_each, within], options={"mip_rel_gap": 0}
        )
        if result.x is None:
            raise RuntimeError(f"the solver found no allocation: {result.message}")
        rows = np.split(result.x, np.cumsum([len(row) for row in costs])[:-1])
        chosen = [int(row.argmax()) for row in rows]
        excess = sum(row[i] for row, i in zip(costs, chosen)) - limit
        if excess <= 0:
            return [indices[i] for indices, i in zip(kept, chosen)]
        allowed -= -(-excess // divisor)  # constraints hold up to a tolerance only


def _not_dominated(costs: Sequence[int], losses: Sequence[float]) -> list[int]:
    """The choices that lose less than every one that costs no more, by rising cost."""
    kept: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], losses[i])):
        if not kept or losses[i] < losses[kept[-1]]:
            kept.append(i)
    return kept
