"""Random networks, written as people write them, against what `quantize` makes of them; see `random_networks`.

A plain run tries 100 of them, `pytest tests/test_fuzz_graph.py -m nightly` 2,000, and every kind of statement alone.
"""

import collections
import dataclasses

import pytest
from network_examination import APOTFX, COPIES, check
from random_networks import minimize, programs_of_one_kind, random_program, report
from torch import fx

COUNT, NIGHTLY = 100, 2000
REFUSED = 0.05  # the share of networks that may be refused although none of their parts may
BY_KIND = programs_of_one_kind()


def examine(programs):
    """Fails with the source, as short as it gets, of the first network that is wrong; and if too many are refused."""
    refused = []
    for program in programs:
        verdict = check(program)
        if verdict.what == "wrong":
            pytest.fail(report(*minimize(program, verdict)), pytrace=False)
        if verdict.what == "refused" and not program.may_refuse:
            refused.append(f"seed {program.seed}, {verdict.stage}: {verdict.reason}")
        refused += [f"seed {program.seed}, {part}" for part in verdict.refusals if not program.may_refuse]
    assert len(refused) <= REFUSED * len(programs), "\n".join(refused)


def test_random_networks():
    examine([random_program(seed) for seed in range(COUNT)])


@pytest.mark.nightly
@pytest.mark.parametrize("start", range(COUNT, COUNT + NIGHTLY, 100))
def test_more_random_networks(start):
    examine([random_program(seed) for seed in range(start, start + 100)])


@pytest.mark.nightly
@pytest.mark.parametrize("kind", BY_KIND)
def test_every_kind_alone(kind):
    """It computes the same, and is refused only where that is right, for another shape only where shapes decide."""
    for program in BY_KIND[kind]:
        verdict = check(program)
        wrong = verdict.what != "ok" and not (verdict.what == "refused" and program.may_refuse)
        assert not wrong, f"{verdict.what}, {report(program, verdict)}"
        if not kind.startswith("shape"):
            assert not [part for part in verdict.refusals if "other batch" in part], report(program, verdict)


# The test itself.


def test_copies_pass():
    """With the float network in the place of the quantized one nothing is wrong, and hardly a network is unsuited."""
    programs = [random_program(seed) for seed in range(60)]
    verdicts = [check(program, COPIES) for program in programs]
    wrong = [report(p, v) for p, v in zip(programs, verdicts) if v.what not in ("ok", "unsuited")]
    assert not wrong, wrong[0]
    assert collections.Counter(v.what for v in verdicts)["ok"] >= 57


PLAIN_FX = dataclasses.replace(
    APOTFX, quantize=lambda model, **options: fx.symbolic_trace(model), calibrate=lambda qmodel, inputs: qmodel
)


@pytest.mark.parametrize("kind, stage", {
    "operator-iadd-alias": "quantizers off",  # a proxy has no __iadd__
    "asks-isinstance": "quantizers off",
    "forward-optional": "quantizers off",
    "random-randn": "quantizers off",
    "buffer-write": "calibrate",
    "mode-layer": "training, quantizers off",
    "context-no_grad": "training, quantizers off",
    "output-early": "training, quantizers off",
}.items())  # fmt: skip
def test_what_plain_tracing_loses_is_seen(kind, stage):
    verdicts = [check(program, PLAIN_FX) for program in BY_KIND[kind][:1]]
    assert {(v.what, v.stage) for v in verdicts} == {("wrong", stage)}


def test_a_failure_is_reduced_to_what_it_takes():
    program = next(p for p in map(random_program, range(1000)) if "mode-layer" in p.kinds and len(p.statements) > 3)
    short, verdict = minimize(program, check(program, PLAIN_FX), PLAIN_FX)
    assert verdict.what == "wrong" and len(short.statements) <= 1
