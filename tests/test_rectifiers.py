"""Activation functions that the layers behind them absorb."""

import math

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn

from apotfx import (
    ApotfxError,
    BitPolicy,
    Rule,
    calibrate,
    export_integer,
    load_integer,
    quantize,
    read_integer,

)
from apotfx.graph import passes
from apotfx.clips import fit_clip
from apotfx.layers import QuantLayer

POLICY = BitPolicy((Rule(),))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Acting(nn.Module):
    """Two convolutions and a linear layer with `activation` between them, wired up by `wire(model, a, x)`."""

    def __init__(self, activation, wire=lambda m, a, x: m.second(m.act(a)), branch=False):
        super().__init__()
        self.first, self.second, self.last = nn.Conv2d(1, 3, 3), nn.Conv2d(3, 3, 3, padding=1), nn.Linear(108, 3)
        self.branch = nn.Conv2d(3, 3, 1) if branch else None
        if isinstance(activation, nn.Module):
            self.act = activation
        else:
            object.__setattr__(self, "act", activation)
        object.__setattr__(self, "wire", wire)

    def forward(self, x):
        return self.last(self.wire(self, self.first(x), x).flatten(1))


ACTIVATIONS = {
    "nn.ReLU": (lambda: nn.ReLU(), math.inf), "nn.ReLU-in-place": (lambda: nn.ReLU(inplace=True), math.inf),
    "F.relu": (lambda: TF.relu, math.inf), "F.relu-in-place": (lambda: lambda x: TF.relu(x, inplace=True), math.inf),
    "torch.relu": (lambda: torch.relu, math.inf), "torch.relu_": (lambda: torch.relu_, math.inf),
    "method": (lambda: lambda x: x.relu(), math.inf), "method-in-place": (lambda: lambda x: x.relu_(), math.inf),
    "nn.ReLU6": (lambda: nn.ReLU6(), 6.0), "F.relu6": (lambda: TF.relu6, 6.0),
    "nn.Hardtanh-0-1": (lambda: nn.Hardtanh(0, 1), 1.0),
}  # fmt: skip
REMAINING = {
    "nn.Hardtanh-1-1": lambda: nn.Hardtanh(-1, 1), "nn.Hardtanh-above-0": lambda: nn.Hardtanh(0.5, 2),
    "nn.Sigmoid": nn.Sigmoid, "nn.Softplus": nn.Softplus, "nn.LeakyReLU": nn.LeakyReLU, "abs": lambda: torch.abs,
}  # fmt: skip


def rectifiers(qmodel):
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    return {name: layer.rectifier for name, layer in layers.items() if layer.rectifier is not None}


def with_and_without(model, monkeypatch, policy=POLICY):
    """`model` quantized and calibrated, as it is and with the activation functions left in the graph."""
    results = []
    for absorb in (passes.absorb_rectifiers, lambda graph_module, unsigned: {}):
        with monkeypatch.context() as patch:
            patch.setattr(passes, "absorb_rectifiers", absorb)
            results.append(calibrate(quantize(model, policy), [images()]))
    return results


def check_equal_to_unabsorbed(model, monkeypatch, policy=POLICY):
    """Clips, results in evaluation and gradients, bit for bit; returns the model with its layers' rectifiers."""
    qmodel, plain = with_and_without(model, monkeypatch, policy)
    assert not rectifiers(plain)
    for (name, value), other in zip(qmodel.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(value, other), name
    for x in (images(), 3 * images(), images().contiguous(memory_format=torch.channels_last)):
        assert torch.equal(qmodel.eval()(x), plain.eval()(x))
    for net in (qmodel.train(), plain.train()):
        # Clips below and above the end of a rectifier.
        for layer, clip in zip([m for m in net.modules() if isinstance(m, QuantLayer)], (0.6, 1.3, 7.0)):
            if layer.input_quantizer is not None:
                layer.input_quantizer.set_clip(torch.tensor(clip))
        (8 * net(8 * images())).square().sum().backward()
    for (name, one), two in zip(qmodel.named_parameters(), plain.parameters(), strict=True):
        assert (one.grad is None) is (two.grad is None)
        assert one.grad is None or torch.equal(one.grad, two.grad), name
    return qmodel


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_rectifier_before_an_unsigned_layer_is_absorbed(name, monkeypatch):
    make, high = ACTIVATIONS[name]
    model = Acting(make())
    qmodel = check_equal_to_unabsorbed(model, monkeypatch)
    assert rectifiers(qmodel) == {"second": (0.0, high)}
    assert len(qmodel.graph.nodes) == len(fx.symbolic_trace(model).graph.nodes) - 1
    assert not any("relu" in str(node.target) or node.target == "act" for node in qmodel.graph.nodes)


@pytest.mark.parametrize("name", REMAINING)
def test_other_activation_functions_stay(name, monkeypatch):
    model = Acting(REMAINING[name]())
    qmodel = check_equal_to_unabsorbed(model, monkeypatch)
    assert not rectifiers(qmodel)
    assert len(qmodel.graph.nodes) == len(fx.symbolic_trace(model).graph.nodes)


def twice(m, a, x):
    return m.second(torch.relu(m.second(torch.relu(a))))


def through_a_view(m, a, x):
    """The in-place function changes `a` too."""
    return m.second(torch.relu_(a.view(-1, 3, 6, 6))) + a


@pytest.mark.parametrize("wire, absorbed", [
    (lambda m, a, x: m.second(input=torch.relu(a)), {"second"}),
    (lambda m, a, x: (r := torch.relu(a)) + m.second(r), set()),
    (lambda m, a, x: m.second(r := torch.relu(a)) + m.branch(r), {"second", "branch"}),
    (lambda m, a, x: m.second(torch.relu(a)) + m.branch(torch.relu(a)), {"second", "branch"}),
    (lambda m, a, x: m.second(torch.relu_(a)) + a, set()),
    (lambda m, a, x: m.second(torch.relu(a)) + a, {"second"}),
    (lambda m, a, x: (torch.relu_(a), m.second(a))[1], {"second"}),
    (through_a_view, set()),
    (twice, set()),
    (lambda m, a, x: m.second(torch.relu(TF.relu6(a))), {"second"}),
    (lambda m, a, x: m.second(torch.relu(a).neg().neg()), set()),
    (lambda m, a, x: m.second(TF.max_pool2d(torch.relu(a), 3, 1, 1)), set()),
], ids=["keyword", "also-added", "two-layers", "source-read-twice", "in-place-source-read", "source-read",
        "in-place-without-its-result", "in-place-through-a-view", "layer-called-twice", "two-in-a-row", "between",
        "pooling"])  # fmt: skip
def test_what_is_absorbed_depends_on_who_reads(wire, absorbed, monkeypatch):
    """Only where the results stay the same; a source that others read may be changed in place."""
    qmodel = check_equal_to_unabsorbed(Acting(torch.relu, wire, branch=True), monkeypatch)
    assert rectifiers(qmodel).keys() == absorbed


@pytest.mark.parametrize("rule", [{"scheme": "float"}, {"activation_bits": 32}], ids=["float", "weights-only"])
def test_a_rectifier_before_a_layer_with_a_float_input_stays(rule, monkeypatch):
    policy = BitPolicy((Rule(name="second", **rule), Rule()))
    assert not rectifiers(check_equal_to_unabsorbed(Acting(nn.ReLU()), monkeypatch, policy))
    wire = lambda m, a, x: m.second(r := m.act(a)) + m.branch(r)
    model = Acting(nn.ReLU(), wire, branch=True)
    assert not rectifiers(check_equal_to_unabsorbed(model, monkeypatch, policy))


@pytest.mark.parametrize(
    "weights_float", [{"weight_bits": 32}, {"granularity": "channel"}], ids=["input-only", "channel"]
)
def test_a_rectifier_before_other_quantized_layers_is_absorbed(weights_float, monkeypatch):
    policy = BitPolicy((Rule(**weights_float),))
    assert rectifiers(check_equal_to_unabsorbed(Acting(nn.ReLU6()), monkeypatch, policy)) == {"second": (0.0, 6.0)}


@pytest.mark.parametrize("where", ["act", "second"])
@pytest.mark.parametrize(
    "kind",
    ["register_forward_pre_hook", "register_forward_hook", "register_full_backward_hook",
     "register_full_backward_pre_hook"],
)  # fmt: skip
def test_what_has_a_hook_sees_what_it_saw(where, kind):
    model = Acting(nn.ReLU())
    seen = []
    getattr(model.get_submodule(where), kind)(lambda module, *args: seen.append([t.clone() for (t, *_) in args]))
    qmodel = calibrate(quantize(model, POLICY), [images()])
    assert not rectifiers(qmodel)
    seen.clear()
    qmodel(images()).square().sum().backward()
    assert len(seen) == 1
    if where == "second" and "forward" in kind:
        assert seen[0][0].min() == 0


def test_the_clip_of_an_absorbed_rectifier_comes_from_what_it_lets_through():
    """In the first training batch too."""
    model = Acting(nn.Hardtanh(0, 1))
    qmodel, seen = quantize(model, POLICY, self_check=False), []
    qmodel.second.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    qmodel(100 * images())
    expected = fit_clip(seen[0].clamp(0, 1), qmodel.second.input_quantizer.levels, torch.Size([]))
    assert seen[0].max() == 1 and torch.equal(qmodel.second.input_quantizer.clip, expected)


@pytest.mark.parametrize("name", ["nn.ReLU", "F.relu6", "nn.Hardtanh-0-1"])
def test_the_integers_of_an_absorbed_rectifier_are_the_same(name, tmp_path):
    model = Acting(ACTIVATIONS[name][0]())
    qmodel = calibrate(quantize(model, POLICY), [images()])
    qmodel.second.input_quantizer.set_clip(torch.tensor(7.0))
    path = export_integer(qmodel.eval(), tmp_path / "export")
    entry = {layer["name"]: layer for layer in read_integer(path)[0]["layers"]}["second"]
    high = ACTIVATIONS[name][1]
    assert entry["rectifier"] == [0.0, None if high == math.inf else high]
    imodel = load_integer(path, model)
    assert imodel.second.rectifier == (0.0, high)
    for x in (images(), 50 * images()):
        assert torch.equal(imodel(x), qmodel(x))


def test_an_export_with_another_rectifier_is_refused(tmp_path):
    path = export_integer(calibrate(quantize(Acting(nn.ReLU6()), POLICY), [images()]), tmp_path / "export")
    for other in (nn.ReLU(), nn.Sigmoid(), nn.Hardtanh(0, 1)):
        with pytest.raises(ApotfxError, match="export"):
            load_integer(path, Acting(other))


@pytest.mark.parametrize("write", [
    lambda x: x.clamp_(min=0), lambda x: x[:, 1:].mul_(2), lambda x: x.view(-1).add_(1), lambda x: TF.silu(x, inplace=True),
], ids=["clamp_", "slice", "view", "function"])  # fmt: skip
def test_an_input_that_is_written_afterwards_is_kept_for_the_backward_pass(write):
    """ReLU keeps its result, the layer that takes over its work its input."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, inputs):
            x = self.first(inputs)
            out = self.second(torch.relu(x))
            write(x)
            return out, x

    model, inputs = Writing(), torch.randn(6, 4)
    qmodel = calibrate(quantize(model, BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))), [inputs])
    for network in (model, qmodel):
        network.train()(inputs)[0].square().sum().backward()
    expected, got = (network.get_submodule("first").weight.grad for network in (model, qmodel))
    assert (got - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("layer", [
    lambda m, y: TF.linear(y, torch.eye(4)), lambda m, y: m.frozen(y), lambda m, y: y @ torch.eye(4),
], ids=["constant", "frozen", "product"])  # fmt: skip
def test_an_input_that_only_the_quantized_layer_keeps_may_be_written(layer):
    """A float layer whose weight has no gradient does not keep its input."""

    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.frozen = nn.Linear(4, 4), nn.Linear(4, 4).requires_grad_(False)

        def forward(self, inputs):
            y = self.first(inputs)
            z = layer(self, y)
            y.mul_(2)
            return z + y

    model, inputs = Writing(), torch.randn(6, 4)
    qmodel = calibrate(quantize(model, BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))), [inputs])
    for network in (model, qmodel):
        network.train()(inputs).square().sum().backward()
    expected, got = (network.get_submodule("first").weight.grad for network in (model, qmodel))
    assert (got - expected).norm() < 0.05 * expected.norm()
