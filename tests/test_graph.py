import pytest
import torch
from torch import nn

from apotfx import ApotfxError, BitPolicy, calibrate, quantize
from apotfx.integer.format import export_integer
from apotfx.integer.load import load_integer


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.GELU(), r"2 \(GELU\)"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), r"_2_1 \(ReLU\)|_2_0 \(ReLU\)|2_0 \(ReLU\)"),
        (nn.Hardtanh(0, 6), r"_2 \(Hardtanh\)"),
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
        ApotfxError, match=r"_1 \(MaxPool2d\) where the model has _1 \(MaxPool2d\), or with other settings"
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
