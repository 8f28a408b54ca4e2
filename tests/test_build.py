import pytest
import torch
from torch import nn
from torch.nn import functional

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.integer.build import build_program
from apotfx.integer.network import as_program, shapes_of
from apotfx.integer.program import (
    Add,
    Average,
    AveragePool,
    Clamp,
    Concatenate,
    FloatLayer,
    Foreign,
    Function,
    MaxPool,
    refuse,
)


class Net(nn.Module):
    """A layer, an operation given as a function, and another layer that takes what comes of it."""

    def __init__(self, operation):
        super().__init__()
        self.first, self.operation, self.last = nn.Conv2d(2, 4, 3), operation, nn.LazyConv2d(2, 1)

    def forward(self, x):
        return self.last(self.operation(self.first(x), self.training))


def quantized(operation):
    x = torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    model = Net(operation).eval()
    model(x)
    return calibrate(quantize(model, BitPolicy.default(4)), [x]).eval(), model


def steps(operation):
    """The steps between the two layers."""
    found = build_program(quantized(operation)[0]).steps
    assert [step.kind for step in (*found[:3], *found[-2:])] == ["input", "encode", "product", "encode", "product"]
    return found[3:-2]


@pytest.mark.parametrize("operation, kind", [
    (lambda x, _: torch.relu(x) + x, Add), (lambda x, _: x.add(torch.relu(x)), Add),
    (lambda x, _: torch.cat([x, torch.relu(x)], dim=1), Concatenate), (lambda x, _: torch.cat([x, x]), Concatenate),
    (lambda x, _: functional.relu6(x) * 2, Function), (lambda x, _: functional.gelu(x), Function),
    (lambda x, _: torch.add(x, x, alpha=2), Function), (lambda x, _: x + 1, Function),
    (lambda x, _: functional.hardswish(x, inplace=True), Function), (lambda x, _: torch.relu(x).mul_(x), Function),
    (lambda x, _: functional.dropout(x), Foreign), (lambda x, _: x + torch.rand_like(x), Add),
])  # fmt: skip
def test_kinds(operation, kind):
    """A dropout that its network does not turn off is none that can be left out."""
    assert type(steps(operation)[-1]) is kind


@pytest.mark.parametrize("operation", [
    lambda x, training: functional.dropout(x, 0.5, training), lambda x, _: functional.dropout(x, 0.5, False),
    lambda x, training: functional.dropout2d(x, training=training), lambda x, _: x.contiguous(),
    lambda x, _: x.detach().clone(),
])  # fmt: skip
def test_what_gives_its_argument_back_is_no_step(operation):
    assert steps(operation) == ()


@pytest.mark.parametrize("operation, expected", [
    (lambda x, _: functional.max_pool2d(x, (3, 2), 2, (1, 0)),
     MaxPool("", (), (3, 2), (2, 2), (1, 0), False, (1, 1))),
    (lambda x, _: functional.avg_pool2d(x, (3, 2), 2, (1, 0), count_include_pad=False),
     AveragePool("", (), (3, 2), (2, 2), (1, 0), False, False)),
    (lambda x, _: functional.adaptive_avg_pool2d(x, 1), Average("", (), (-2, -1), True)),
    (lambda x, _: x.mean((-1, -2), keepdim=True), Average("", (), (-1, -2), True)),
    (lambda x, _: torch.relu(x) + x, Clamp("", (), 0.0, None)),
    (lambda x, _: functional.relu6(x) + x, Clamp("", (), 0.0, 6.0)),
    (lambda x, _: x.relu() + x, Clamp("", (), 0.0, None)),
])  # fmt: skip
def test_settings(operation, expected):
    """An activation function that something else reads too is not absorbed."""
    found = next(step for step in steps(operation) if type(step) is type(expected))
    assert vars(found) | {"name": "", "inputs": ()} == vars(expected)


def test_a_refusal_names_the_step_and_the_target():
    (step,) = steps(lambda x, _: functional.gelu(x))
    error = refuse(step, "C")
    assert isinstance(error, ApotfxError) and "C: the step gelu (functional.gelu) cannot be expressed" in str(error)


@pytest.mark.parametrize("network", [
    nn.Sequential(nn.Linear(2, 2)), torch.fx.symbolic_trace(nn.Sequential(nn.Linear(2, 2))),
    quantize(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), BitPolicy.default(4)),
], ids=["module", "float", "quantized"])  # fmt: skip
def test_networks_without_integer_layers_are_refused(network):
    with pytest.raises(ApotfxError, match="network: expected what load_integer returns with backend reference, got a"):
        as_program(network)


@pytest.mark.parametrize("shape", [None, 5, (2, 0, 8), (2, -1, 8), (2.0, 8, 8), (True, 8, 8)], ids=str)
def test_shapes_that_no_image_has_are_refused(shape, tmp_path):
    network = load_integer(export_integer(quantized(lambda x, _: x)[0], tmp_path / "export"))
    with pytest.raises(ApotfxError, match="input_shape .*: expected sizes of at least 1"):
        shapes_of(network, shape)


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.weight = nn.Conv2d(2, 4, 3), nn.Parameter(torch.randn(4, 4, 1, 1))

    def forward(self, x):
        return functional.conv2d(torch.relu(self.first(x)), self.weight - self.weight.mean())


def test_layers_that_stay_in_float():
    policy = BitPolicy((Rule(name="0"),))
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ConvTranspose2d(4, 2, 3), nn.Flatten(), nn.Linear(72, 2, bias=False))
    qmodel = calibrate(quantize(model, policy), [torch.randn(2, 2, 6, 6)]).eval()
    kinds = [(type(step), getattr(step, "bias", None)) for step in build_program(qmodel).steps]
    assert [kind for kind in kinds if kind[0] is FloatLayer] == [(FloatLayer, True), (FloatLayer, False)]


def test_a_functional_layer_is_a_layer():
    x = torch.randn(2, 2, 6, 6)
    qmodel = calibrate(quantize(Functional(), BitPolicy.default(4)), [x]).eval()
    program = build_program(qmodel)
    assert [step.kind for step in program.needed()] == ["input", "encode", "product", "encode", "product"]


def test_a_network_without_a_graph_is_one_foreign_step(tmp_path):
    class Branching(nn.Sequential):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x

    model, x = Branching(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [x]).eval()
    path = export_integer(qmodel, tmp_path / "export")
    with pytest.raises(ApotfxError, match="network: expected .* got a Branching without a graph of integer layers"):
        as_program(load_integer(path, model))
    with pytest.raises(ApotfxError, match=r"the step model \(Branching, which could not be traced\) can be computed only"):
        load_integer(path)


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.GELU(), r"2 \(functional.gelu\)"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), r"_2_0 \(clamp\)"),
        (nn.Hardtanh(0, 6), r"_2 \(clamp\)"),
    ],
    ids=["another activation", "one more", "another type"],
)
def test_a_network_with_the_same_parameters_that_computes_something_else_is_refused(other, message, tmp_path):
    def net(activation):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation, nn.Flatten(), nn.Linear(64, 3))

    qmodel = calibrate(quantize(net(nn.ReLU()), BitPolicy.default(4)), [torch.rand(2, 1, 6, 6)])
    export_integer(qmodel, tmp_path / "out")
    load_integer(tmp_path / "out", net(nn.ReLU()))
    with pytest.raises(ApotfxError, match=f"its network has .* where the model has .*({message})"):
        load_integer(tmp_path / "out", net(other))


def test_other_settings_of_a_module_are_refused(tmp_path):
    def net(kernel):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(kernel, stride=2), nn.Flatten(), nn.Linear(16, 3))

    qmodel = calibrate(quantize(net(2), BitPolicy.default(4)), [torch.rand(2, 1, 6, 6)])
    export_integer(qmodel, tmp_path / "out")
    with pytest.raises(
        ApotfxError, match=r"_1 \(max_pool\) where the model has _1 \(max_pool\), or with other settings"
    ):
        load_integer(tmp_path / "out", net(3))


class Leaf(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.layer = inner, nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(self.inner(x)) if x.sum() < 1e9 else x


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.Linear(4, 2))], ids=["whole", "inside"])
def test_what_is_inside_a_module_that_was_kept_whole_is_compared(wrap, tmp_path):
    qmodel = calibrate(quantize(wrap(Leaf(nn.ReLU())), BitPolicy.default(4)), [torch.randn(3, 4)])
    path = export_integer(qmodel, tmp_path / "out")
    load_integer(path, wrap(Leaf(nn.ReLU())))
    with pytest.raises(ApotfxError, match="pass the float model that was exported"):
        load_integer(path, wrap(Leaf(nn.GELU())))


class Call(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.first, self.weight, self.compute = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4)), compute

    def forward(self, x):
        return self.compute(self.first(x), self.weight)


CALLS = {
    "linear": lambda x, w: torch.nn.functional.linear(x, w), "convolution": lambda x, w: torch.conv1d(x[:, :, None], w[:, :, None]),
    "batches": lambda x, w: x[:, None] @ w[None], "activation": lambda x, w: torch.nn.functional.linear(torch.relu(x), w),
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in CALLS if name != "linear"])
def test_another_functional_call_is_refused(name, tmp_path):
    qmodel = calibrate(quantize(Call(CALLS["linear"]), BitPolicy.default(4)), [torch.randn(3, 4)])
    path = export_integer(qmodel, tmp_path / "out")
    load_integer(path, Call(CALLS["linear"]))
    with pytest.raises(ApotfxError, match="pass the float model that was exported"):
        load_integer(path, Call(CALLS[name]))


class Counting(nn.Module):
    """Counts its calls in a method that forward reaches, and has a setting."""

    def __init__(self, scale=1.0):
        super().__init__()
        self.layer, self.calls, self.size, self.scale = nn.Linear(4, 4), 0, None, scale

    def count(self, x):
        self.calls += 1
        measure(self, x)

    def set_scale(self, scale):
        self.scale = scale

    def forward(self, x):
        self.count(x)
        return self.layer(x) * self.scale


def measure(module, x):
    module.size = x.shape[-1]


def test_what_runs_leave_in_attributes_is_no_setting(tmp_path):
    x, model = torch.randn(3, 4), Counting()
    qmodel = calibrate(quantize(model, BitPolicy.default(8)), [x]).eval()
    expected = qmodel(x), qmodel(x)[0]
    path = export_integer(qmodel, tmp_path / "export")
    model(x)
    assert torch.equal(load_integer(path, model)(x), expected[0])
    with pytest.raises(ApotfxError, match="or with other settings"):
        load_integer(path, Counting(scale=2.0))
