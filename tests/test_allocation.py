import itertools
import math
import random
import sys

import pytest
import torch
from torch import nn

from apotfx import BitPolicy, plan
from apotfx.allocation import END, Option, all_equal, allocate, predicted_loss, solve, trade_off
from apotfx.errors import ApotfxError
from apotfx.sensitivity import Sensitivity


def by_trying_all(costs, losses, limit):
    """The least total loss within the limit."""
    choices = itertools.product(*(range(len(row)) for row in costs))
    total = [(sum(r[i] for r, i in zip(costs, c)), sum(r[i] for r, i in zip(losses, c))) for c in choices]
    return min(loss for cost, loss in total if cost <= limit)


def of(rows, chosen):
    return sum(row[i] for row, i in zip(rows, chosen, strict=True))


@pytest.mark.parametrize("seed", range(40))
def test_the_solution_is_the_best_there_is(seed):
    draw = random.Random(seed)
    lengths = [draw.randint(1, 5) for _ in range(draw.randint(1, 5))]
    largest = draw.choice([3, 1000, 10**12])
    costs = [[draw.randint(0, largest) for _ in range(n)] for n in lengths]
    losses = [[10 ** draw.uniform(-9, -2) for _ in range(n)] for n in lengths]
    limit = draw.randint(sum(map(min, costs)), sum(map(max, costs)))
    chosen = solve(costs, losses, limit)
    assert of(costs, chosen) <= limit
    assert of(losses, chosen) == pytest.approx(by_trying_all(costs, losses, limit), rel=1e-5)


def test_the_budget_is_kept_exactly():
    """One unit less of 10^12 rules the better choice out."""
    costs, losses = [[10**12, 1], [10**12 + 1, 1]], [[0.0, 1.0], [0.0, 2.0]]
    assert solve(costs, losses, 2 * 10**12 + 1) == [0, 0]
    assert solve(costs, losses, 2 * 10**12) == [1, 0]
    assert solve(costs, losses, 10**12 + 1) == [0, 1]


def test_losses_of_zero_and_costs_of_zero():
    assert solve([[0, 0]], [[0.0, 0.0]], 0) in ([0], [1])
    assert solve([[3, 1], [3, 1]], [[0.0, 0.5], [0.0, 0.25]], 4) == [0, 1]


def layer(name, parameters, macs, sensitivity, *, is_end=False, schemes=("apot", "uniform"), bits=range(2, 9)):
    """A layer that loses `sensitivity * 4^-bits`; uniform loses twice that up to 4 bits, and half beyond."""
    loss = {(s, b): sensitivity * 4.0**-b * (1 if s == "apot" else 2 if b <= 4 else 0.5) for s in schemes for b in bits}
    return Sensitivity((name,), is_end, parameters, macs, 1.0, 1.0, loss, {k: 3 * v for k, v in loss.items()})


LAYERS = [
    layer("first", 10, 900, 50.0, is_end=True),
    layer("a", 100, 800, 10.0),
    layer("b", 300, 600, 2.0),
    layer("c", 700, 150, 0.5),
    layer("last", 50, 50, 4.0, is_end=True),
]


def cost(layers, options, budget):
    if budget == "size":
        return sum(layer.parameters * o.weight_bits for layer, o in zip(layers, options))
    return sum(layer.macs * o.weight_bits * o.activation_bits for layer, o in zip(layers, options))


@pytest.mark.parametrize("average", [2, 3, 3.3, 4, 5.5, 8])
@pytest.mark.parametrize("separate", [False, True], ids=["together", "separate"])
@pytest.mark.parametrize("budget", ["size", "macs"])
def test_no_other_options_do_better_within_the_budget(budget, separate, average):
    got = allocate(LAYERS, average, budget=budget, separate=separate)
    inner, chosen = LAYERS[1:4], got.options[1:4]
    assert got.options[0] == got.options[4] == END and got.counted == (False, True, True, True, False)
    total = sum(x.parameters if budget == "size" else x.macs for x in inner)
    limit = total * average ** (1 if budget == "size" else 2)
    assert cost(inner, chosen, budget) <= limit * (1 + 1e-12)
    spent = cost(inner, chosen, budget) / total
    assert got.average_bits(budget) == pytest.approx(spent if budget == "size" else math.sqrt(spent))
    assert separate or all(o.weight_bits == o.activation_bits for o in chosen)
    bits = [(w, a) for w in range(2, 9) for a in range(2, 9) if separate or w == a]
    # The better scheme of each pair of bits is enough, as it costs the same.
    candidates = [
        [min((Option(s, w, a) for s in ("apot", "uniform")), key=lambda o: predicted_loss(x, o)) for w, a in bits]
        for x in inner
    ]
    best = min(
        sum(predicted_loss(x, o) for x, o in zip(inner, options))
        for options in itertools.product(*candidates)
        if cost(inner, options, budget) <= limit * (1 + 1e-12)
    )
    assert got.loss == pytest.approx(best, rel=1e-5)


@pytest.mark.parametrize("budget", ["size", "macs"])
@pytest.mark.parametrize("scheme", ["apot", "uniform"])
@pytest.mark.parametrize("bits", range(2, 9))
def test_never_worse_than_all_layers_equal(budget, scheme, bits):
    equal = all_equal(LAYERS, Option(scheme, bits, bits))
    assert equal.average_bits(budget) == pytest.approx(bits)
    assert allocate(LAYERS, bits, budget=budget).loss <= equal.loss * (1 + 1e-5)


def test_the_ends_can_take_part():
    got = allocate(LAYERS, 4, ends=True)
    assert all(got.counted) and cost(LAYERS, got.options, "size") <= 4 * sum(x.parameters for x in LAYERS)
    assert got.options[0].weight_bits == 8 and got.options[4] != END  # small and sensitive; less so


def test_schemes_are_chosen_by_their_loss():
    chosen = allocate(LAYERS, 4).options[1:4]
    assert {o.scheme for o in chosen if o.weight_bits <= 4} == {"apot"}
    assert {o.scheme for o in chosen if o.weight_bits > 4} == {"uniform"}


@pytest.mark.parametrize("separate", [False, True])
def test_the_trade_off_falls_with_the_budget(separate):
    curve = trade_off(LAYERS, step=0.5, separate=separate)
    assert len(curve) == 13
    assert all(a.average_bits("size") <= 2 + 0.5 * i for i, a in enumerate(curve))
    assert all(later.loss <= earlier.loss * (1 + 1e-5) for earlier, later in itertools.pairwise(curve))
    assert curve[-1].loss == pytest.approx(all_equal(LAYERS, Option("uniform", 8, 8)).loss)


def test_powers_of_two_end_where_their_levels_do():
    """Unsigned inputs have up to 4 bits, weights up to 5."""
    pot = layer("p", 10, 10, 1.0, schemes=("pot",), bits=range(2, 6))
    del pot.input_loss["pot", 5]
    assert allocate([pot], 8).options == (Option("pot", 4, 4),)
    assert allocate([pot], 8, separate=True).options == (Option("pot", 5, 4),)
    assert [a.options[0] for a in trade_off([pot], step=1)] == [Option("pot", b, b) for b in (2, 3, 4)]


class Net(nn.Module):
    """Layers with names that a glob would take for patterns."""

    NAMES = ("a[0]", "a*", "a?", "ab", "a0")

    def __init__(self):
        super().__init__()
        for name in self.NAMES:
            self.add_module(name, nn.Linear(4, 4))
        self.scale = nn.Bilinear(4, 4, 4)

    def forward(self, x):
        for name in self.NAMES:
            x = self.get_submodule(name)(x).relu()
        return self.scale(x, x)


def test_the_policy_gives_each_layer_by_its_name_what_was_chosen(tmp_path):
    options = [Option("apot", 2, 3), Option("uniform", 4, 4), Option("pot", 3, 3), Option("apot", 7, 5), END]
    layers = [layer(name, 16, 16, 1.0) for name in Net.NAMES]
    got = all_equal(layers, END)
    got = type(got)(got.layers, tuple(options), got.counted)
    got.policy().to_yaml(tmp_path / "policy.yaml")
    policy = BitPolicy.from_yaml(tmp_path / "policy.yaml")
    assert policy == got.policy()
    planned = {p.facts.name: p for p in plan(Net(), policy).layers}
    for name, (scheme, weight_bits, activation_bits) in zip(Net.NAMES, options, strict=True):
        assert (planned[name].weight.scheme, planned[name].weight.bits) == (scheme, weight_bits)
        assert (planned[name].input.scheme, planned[name].input.bits) == (scheme, activation_bits)


def test_layers_that_share_a_weight_get_a_rule_each():
    shared = Sensitivity(("a", "b"), False, 4, 8, 1.0, 1.0, {("apot", 3): 1.0}, {("apot", 3): 1.0})
    assert [(r.name, r.weight_bits) for r in allocate([shared], 3).policy().rules] == [("a", 3), ("b", 3)]


@pytest.mark.parametrize("settings, message", [
    ({"average_bits": 1.9}, r"average of 1\.9 bits: cannot be kept; the options take 2 or more"),
    ({"average_bits": float("nan")}, "average of nan bits: cannot be kept"),
    ({"average_bits": float("inf")}, "average of inf bits: cannot be kept"),
    ({"average_bits": -4, "budget": "macs"}, "average of -4 bits: cannot be kept"),
    ({"average_bits": 4, "budget": "time"}, "budget 'time': unknown; choose one of size, macs"),
], ids=itertools.count())  # fmt: skip
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ApotfxError, match=message):
        allocate(LAYERS, **settings)


def test_a_network_of_ends_is_refused_unless_they_take_part():
    ends = [LAYERS[0], LAYERS[4]]
    with pytest.raises(ApotfxError, match="no layer beside its first and last"):
        allocate(ends, 4)
    assert allocate(ends, 4, ends=True).average_bits("size") <= 4


def test_without_scipy_the_error_says_what_to_install(monkeypatch):
    for module in ("scipy", "scipy.linalg", "scipy.optimize"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ApotfxError, match=r"scipy is missing; pip install 'apotfx\[allocate\]'"):
        allocate(LAYERS, 4)


def test_many_layers_are_solved_to_optimality_against_the_bound_of_the_relaxed_problem():
    """Lagrange's bound: no allocation within the budget goes below min over layers of loss + price * cost."""
    draw = torch.Generator().manual_seed(0)
    sizes, weights = torch.randint(1, 10**6, (120,), generator=draw), torch.rand(120, generator=draw)
    layers = [layer(f"l{i}", n, n, w) for i, (n, w) in enumerate(zip(sizes.tolist(), weights.tolist()))]
    got, limit = allocate(layers, 4), 4 * sum(sizes.tolist())
    options = [Option(s, b, b) for s in ("apot", "uniform") for b in range(2, 9)]

    def bound(price):
        return sum(
            min(predicted_loss(x, o) + price * x.parameters * o.weight_bits for o in options) for x in layers
        ) - (price * limit)

    best = max(bound(10**e) for e in torch.linspace(-10, -6, 100).tolist())
    assert best <= got.loss <= best * 1.02
