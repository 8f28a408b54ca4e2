import copy
import functools
import itertools
import math

import pytest
import torch
from helpers import nearest_level
from torch import nn
from torch.nn import functional as TF
from torch.nn.utils import parametrizations, parametrize

from apotfx import BitPolicy, Rule, calibrate, quantize, sensitivity
from apotfx.clips import fit_clip
from apotfx.errors import ApotfxError

measure = functools.partial(sensitivity.measure, schemes=["uniform"], bits=[4])
cross_entropy = functools.partial(TF.cross_entropy, reduction="none")


def half_square(output, target):
    return (output - target).square().flatten(1).sum(1) / 2


def one_by_one(x, targets):
    return [(x[i : i + 1], targets[i : i + 1]) for i in range(len(x))]


def linear(seed=0, count=6, inputs=5, outputs=3):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(inputs, outputs))
    return model, torch.randn(count, inputs), torch.randn(count, outputs)


def test_of_a_linear_layer_in_closed_form():
    """With the loss |Wx + b - t|^2 / 2 and r = Wx + b - t, the gradients are r x^T and W^T r."""
    model, x, targets = linear()
    (got,) = measure(model, one_by_one(x, targets), half_square)
    residual = (model(x) - targets).detach()
    assert got.weight_trace == pytest.approx((residual.square().sum(1) * x.square().sum(1)).mean().item(), rel=1e-5)
    assert got.input_trace == pytest.approx((residual @ model[0].weight).square().sum(1).mean().item(), rel=1e-5)
    assert (got.names, got.is_end, got.parameters, got.macs) == (("0",), True, 15, 15)


def test_of_a_batch_whose_gradients_are_orthogonal_it_is_exact_too():
    model, _, targets = linear(count=5)
    x = torch.diag(torch.arange(1.0, 6))
    (alone,) = measure(model, one_by_one(x, targets), half_square)
    for seed in range(4):
        (together,) = measure(model, [(x[:3], targets[:3]), (x[3:], targets[3:])], half_square, seed=seed)
        assert together.weight_trace == pytest.approx(alone.weight_trace, rel=1e-5)
        assert together.input_trace == pytest.approx(alone.input_trace, rel=1e-5)
        assert together.macs == alone.macs


def test_of_any_batch_it_is_unbiased():
    """Two examples have two signs, up to a common one: the mean of what comes of them is exact."""
    model, x, targets = linear(count=2)
    (alone,) = measure(model, one_by_one(x, targets), half_square)
    together = [measure(model, [(x, targets)], half_square, seed=seed)[0] for seed in range(12)]
    found = {round(m.weight_trace, 4): m.weight_trace for m in together}
    assert len(found) == 2
    assert sum(found.values()) / 2 == pytest.approx(alone.weight_trace, rel=1e-5)
    assert {round(m.input_trace, 4) for m in together} == {round(alone.input_trace, 4)}


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=2)
        self.down = nn.Conv2d(4, 4, 1, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.relu(self.bn(self.stem(x)))
        x = self.relu(self.conv(x) + self.down(x))
        return self.fc(x.mean((2, 3)))


class Twice(nn.Module):
    """One module called twice, and two that share a weight."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(98, 6)
        self.again = nn.Linear(6, 6)
        self.tied = nn.Linear(6, 6)
        self.tied.weight = self.again.weight
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        x = self.again(self.again(x).relu()).tanh()
        return self.fc(self.tied(x))


class Transposed(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, stride=2)
        self.up = nn.ConvTranspose2d(4, 6, 3, stride=2, groups=2)
        self.fc = nn.Linear(6, 3)

    def forward(self, x):
        x = self.up(self.first(x).relu(), output_size=[8, 8])
        return self.fc(x.amax((2, 3)))


class Parametrized(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.inner = parametrizations.weight_norm(nn.Conv2d(4, 4, 3))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.inner(self.first(x).relu()).relu().mean((2, 3)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3)
        self.kernel = nn.Parameter(torch.randn(5, 4, 3, 3))
        self.fc = nn.Linear(5, 3)

    def forward(self, x):
        x = TF.conv2d(self.first(x).relu(), self.kernel, padding=1)
        return self.fc(x.relu().mean((2, 3)))


def directly(model, x, targets, loss):
    """By the names of modules: the mean squared norms of the gradients of single examples, from the float network."""
    model = copy.deepcopy(model).eval()
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))}
    inputs = {}

    def keep(name, module, args):
        copied = args[0].clone() if args[0].requires_grad else args[0].clone().requires_grad_()
        inputs.setdefault(name, []).append(copied)
        return copied, *args[1:]

    for name, layer in layers.items():
        layer.register_forward_pre_hook(functools.partial(keep, name))
    weight_trace, input_trace = (dict.fromkeys(layers, 0.0) for _ in range(2))
    for i in range(len(x)):
        inputs.clear()
        with parametrize.cached():
            weights = {name: layer.weight for name, layer in layers.items()}
            total = loss(model(x[i : i + 1]), targets[i : i + 1]).sum()
        for name in layers:
            (grad,) = torch.autograd.grad(total, weights[name], retain_graph=True)
            weight_trace[name] += grad.square().sum().item() / len(x)
            grads = torch.autograd.grad(total, inputs[name], retain_graph=True)
            input_trace[name] += sum(g.square().sum().item() for g in grads) / len(x)
    return weight_trace, input_trace


def settled(model, seed=0):
    """The model after its batch norms have seen something, and a few examples."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, 2, 7, 7, generator=generator)
    with torch.no_grad():
        model.train()(x)
    return model.eval(), x, torch.randint(0, 3, (5,), generator=generator)


def build(kind):
    torch.manual_seed(1)
    return settled(kind())


@pytest.mark.parametrize("kind", [Residual, Twice, Transposed, Parametrized, Functional])
def test_of_networks_as_torch_computes_it(kind):
    model, x, targets = build(kind)
    weight_trace, input_trace = directly(model, x, targets, cross_entropy)
    measured = measure(model, one_by_one(x, targets), cross_entropy)
    names = [name for layer in measured for name in layer.names]
    assert set(weight_trace) <= set(names) and len(names) == len(set(names))
    for layer in measured:
        if set(layer.names) <= set(weight_trace):
            assert layer.weight_trace == pytest.approx(weight_trace[layer.names[0]], rel=1e-4), layer.name
            assert layer.input_trace == pytest.approx(sum(input_trace[n] for n in layer.names), rel=1e-4), layer.name


def test_layers_that_share_a_weight_are_one():
    model, x, targets = build(Twice)
    measured = {layer.names: layer for layer in measure(model, one_by_one(x, targets), cross_entropy)}
    assert list(measured) == [("first",), ("again", "tied"), ("fc",)]
    tied = measured["again", "tied"]
    assert (tied.parameters, tied.macs, tied.is_end) == (36, 3 * 36, False)


def test_a_functional_call_by_its_gradient():
    model, x, targets = build(Functional)
    (layer,) = (m for m in measure(model, one_by_one(x, targets), cross_entropy) if m.parameters == 180)
    expected = 0.0
    for images, labels in one_by_one(x, targets):
        (grad,) = torch.autograd.grad(cross_entropy(model(images), labels).sum(), model.kernel)
        expected += grad.square().sum().item() / len(x)
    assert layer.weight_trace == pytest.approx(expected, rel=1e-4) and layer.macs == 5 * 25 * 36


def test_what_a_network_multiplies():
    model, x, targets = build(Residual)
    found = {m.name: (m.parameters, m.macs, m.is_end) for m in measure(model, [(x, targets)], cross_entropy)}
    assert found == {
        "stem": (72, 4 * 49 * 18, True),
        "conv": (72, 4 * 16 * 18, False),
        "down": (16, 4 * 16 * 4, False),
        "fc": (12, 12, True),
    }
    model, x, targets = build(Transposed)
    found = {m.name: m.macs for m in measure(model, [(x, targets)], cross_entropy)}
    assert found["up"] == 4 * 9 * 3 * 9  # each of 4 x 3 x 3 inputs meets 3 outputs of its group at 9 taps


@pytest.mark.parametrize("scheme, bits", [("apot", 2), ("apot", 4), ("uniform", 3), ("uniform", 8), ("pot", 4)])
def test_the_predicted_loss_is_that_of_the_noise_of_the_quantized_network(scheme, bits):
    model, x, targets = build(Residual)
    measured = measure(model, one_by_one(x, targets), cross_entropy, schemes=[scheme], bits=[bits])
    qmodel = quantize(model.eval(), BitPolicy((Rule(scheme=scheme, weight_bits=bits, activation_bits=bits),)))
    calibrate(qmodel, [x])
    inputs = {}
    for layer in measured:
        module = model.get_submodule(layer.name)
        module.register_forward_pre_hook(
            functools.partial(lambda name, _, args: inputs.update({name: args[0] * 1}), layer.name)
        )
    model(x)
    for layer in measured:
        quantized = qmodel.get_submodule(layer.name)
        levels, scale = quantized.integer_weight()
        error = (levels * scale - quantized.weight).square().mean().item()
        assert layer.weight_loss == {(scheme, bits): pytest.approx(layer.weight_trace * error / 2, rel=1e-4)}
        levels, seen = quantized.input_quantizer.levels, inputs[layer.name].detach()
        assert levels.signed == (layer.name == "stem")
        scale = fit_clip(seen, levels, torch.Size()) / levels.max
        error = (nearest_level(seen / scale, levels) * scale - seen).square().mean().item()
        assert layer.input_loss == {(scheme, bits): pytest.approx(layer.input_trace * error / 2, rel=1e-3)}


def test_more_bits_lose_less():
    model, x, targets = build(Residual)
    for layer in measure(model, [(x, targets)], cross_entropy, schemes=["apot", "uniform"], bits=[2, 4, 6, 8]):
        for scheme, losses in itertools.product(("apot", "uniform"), (layer.weight_loss, layer.input_loss)):
            assert all(losses[scheme, b + 2] < losses[scheme, b] for b in (2, 4, 6)), (layer.name, scheme)


def test_powers_of_two_only_where_their_levels_exist():
    model, x, targets = build(Residual)
    for layer in measure(model, [(x, targets)], cross_entropy, schemes=["pot"], bits=range(2, 9)):
        assert [bits for _, bits in layer.weight_loss] == [2, 3, 4, 5]
        assert [bits for _, bits in layer.input_loss] == [2, 3, 4] + [5] * (layer.name == "stem")


def test_the_prediction_is_close_where_the_fisher_information_is_the_hessian():
    """A linear layer whose residuals are unit noise: E[r r^T] = 1, so that both are the same."""
    torch.manual_seed(0)
    model, count = nn.Sequential(nn.Linear(40, 30, bias=False)), 4000
    x = torch.randn(count, 40)
    targets = (model(x) + torch.randn(count, 30)).detach()
    (layer,) = measure(model, [(x[i : i + 50], targets[i : i + 50]) for i in range(0, count, 50)], half_square)
    before = half_square(model(x), targets).mean().item()
    qmodel = quantize(model, BitPolicy((Rule(scheme="uniform", weight_bits=4, activation_bits=32),)))
    after = half_square(calibrate(qmodel, [x]).eval()(x), targets).mean().item()
    assert layer.weight_loss["uniform", 4] == pytest.approx(after - before, rel=0.15)


def test_the_model_stays_as_it_is():
    model, x, targets = build(Residual)
    model.train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        measure(model, [(x, targets)], cross_entropy)
    assert model.training and all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_it_is_reproducible_and_does_not_touch_the_global_generator():
    model, x, targets = build(Residual)
    before = torch.get_rng_state()
    assert measure(model, [(x, targets)], cross_entropy) == measure(model, [(x, targets)], cross_entropy)
    assert torch.equal(torch.get_rng_state(), before)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


def test_a_network_of_several_inputs():
    torch.manual_seed(0)
    model, x, y, targets = TwoInputs(), torch.randn(4, 3), torch.randn(4, 2), torch.zeros(4, 4)
    assert [m.name for m in measure(model, [((x, y), targets)], half_square)] == ["a", "b"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_the_precision_of_the_network(dtype):
    model, x, targets = linear()
    (got,) = measure(model.to(dtype), one_by_one(x.to(dtype), targets.to(dtype)), half_square)
    assert math.isfinite(got.weight_loss["uniform", 4])


def test_an_input_that_is_not_finite_is_refused():
    model, x, targets = linear()
    x[2, 1] = float("inf")
    with pytest.raises(ApotfxError, match="layer 0: its input or a gradient is not finite"):
        measure(model, [(x, targets)], half_square)


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.other = nn.Linear(5, 3), nn.Linear(5, 3)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_is_not_called_stays_out():
    _, x, targets = linear()
    assert [m.name for m in measure(Unreached(), [(x, targets)], half_square)] == ["used"]


@pytest.mark.parametrize("change, message", [
    ({"batches": []}, "no batch was given"),
    ({"loss": TF.mse_loss}, r'shape \[\], expected \[6\], one number per example; pass reduction="none"'),
    ({"schemes": ["log"]}, "scheme 'log': unknown"),
    ({"bits": [4, 9]}, "bits 9: out of range"),
], ids=itertools.count())  # fmt: skip
def test_mistakes_are_named(change, message):
    model, x, targets = linear()
    settings = {"model": model, "batches": [(x, targets)], "loss": half_square} | change
    with pytest.raises(ApotfxError, match=message):
        measure(**settings)


def test_a_quantized_network_is_refused():
    model, x, targets = linear()
    with pytest.raises(ApotfxError, match="already quantized"):
        measure(quantize(model, BitPolicy.default()), [(x, targets)], half_square)
