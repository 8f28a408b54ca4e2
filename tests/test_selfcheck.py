import pytest
import torch
from torch import nn

from apotfx import ApotfxError, BitPolicy, calibrate, quantize
from apotfx.graph import network
from apotfx.graph.network import record_of
from apotfx.graph.selfcheck import difference

POLICY = BitPolicy.default(8, scheme="uniform")


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.norm, self.drop = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        y = self.drop(self.norm(self.layer(x)))
        half = y[:, :4]
        half += 1  # which `y` sees
        return self.layer(y)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(8, 8), Inner(), nn.Linear(8, 2)

    def forward(self, x, scale=1.0):
        return {"out": (self.last(self.inner(torch.relu(self.first(x)))) * scale, [x])}


@pytest.fixture
def wrong(monkeypatch):
    """Tracing that loses what is written in place."""
    monkeypatch.setattr(network, "functionalize", lambda graph, modules, constants: without_writes(graph))


def without_writes(graph):
    for node in graph.nodes:
        if "iadd" in node.name:
            node.args = (node.args[0], 0)
    return {}


@pytest.fixture
def inputs():
    torch.manual_seed(0)
    return torch.randn(16, 8)


def test_a_network_is_its_module_and_nothing_changes(inputs):
    model = Net()
    qmodel = quantize(model, POLICY, example_inputs=inputs)
    assert not record_of(qmodel)["unchecked"] and record_of(qmodel)["leaves"] == {}
    state, random = {k: v.clone() for k, v in qmodel.state_dict().items()}, torch.get_rng_state()
    modes = [m.training for m in qmodel.modules()]
    assert difference(qmodel, (inputs,), {}) is None
    assert all(torch.equal(v, state[k]) for k, v in qmodel.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and [m.training for m in qmodel.modules()] == modes


def test_with_examples_the_module_that_differs_is_kept_whole(wrong, inputs):
    model = Net().eval()
    qmodel = quantize(model, POLICY, example_inputs=inputs)
    assert list(record_of(qmodel)["leaves"]) == ["inner"]
    assert "would compute something else (an error of" in record_of(qmodel)["leaves"]["inner"]
    got = calibrate(qmodel, [inputs])(inputs)["out"][0]
    expected = model(inputs)["out"][0]
    assert (got - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("run", [
    lambda qmodel, x: calibrate(qmodel, [x]), lambda qmodel, x: qmodel.train()(x),
], ids=["calibrate", "first batch"])  # fmt: skip
def test_later_on_it_is_refused_by_name(wrong, run, inputs):
    with pytest.raises(ApotfxError, match="^inner: tracing changed what it computes .an error of .* in evaluation"):
        run(quantize(Net(), POLICY), inputs)


def test_it_can_be_left_out(wrong, inputs):
    qmodel = quantize(Net(), POLICY, example_inputs=inputs, self_check=False)
    calibrate(qmodel, [inputs])
    assert record_of(qmodel)["leaves"] == {} and qmodel.train()(inputs)["out"][0].isfinite().all()


class Counting(nn.Module):
    """Kept whole, with a buffer that each run changes."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)
        self.register_buffer("count", torch.tensor(0.0))

    def forward(self, x):
        self.count += 1
        return self.fc(x) * self.count if x.sum() < 1e9 else x


def test_both_run_from_the_same_state():
    qmodel, x = quantize(nn.Sequential(nn.Linear(4, 4), Counting()), POLICY), torch.randn(5, 4)
    calibrate(qmodel, [x])
    assert record_of(qmodel)["leaves"].keys() == {"1"} and qmodel.get_submodule("1").count == 0
