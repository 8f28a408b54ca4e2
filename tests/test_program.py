import json
import math

import pytest
import torch
from cycle_helpers import cycle, loaded
from torch import nn
from torch.nn import functional
from torchvision.models import mobilenet_v3_small, shufflenet_v2_x0_5

from apotfx import ApotfxError, BitPolicy, calibrate, export_integer, load_integer, quantize
from apotfx.integer.format import read_integer
from apotfx.integer.functions import FUNCTIONS, MODULES
from apotfx.integer.network import IntegerNetwork
from apotfx.integer.program import STEPS, Program, bound, decode, encode

ARGUMENTS = [
    1, -2.5, True, None, "same", [1, 2], (1, [2, (3,)]), slice(None, -1, 2), {"key": (1,)}, torch.float64, ..., math.inf,
    [slice(1, None), ..., None], torch.Size((2, 3)),
]  # fmt: skip


@pytest.mark.parametrize("argument", ARGUMENTS, ids=str)
def test_arguments_are_written_and_read(argument):
    content = json.loads(json.dumps(encode(argument, lambda value: None), allow_nan=False))
    expected = tuple(argument) if isinstance(argument, torch.Size) else argument
    got = decode(content, ())
    assert got == expected and type(got) is type(expected)


def test_values_stand_in_arguments_by_their_number():
    values = {"a": 0, "b": 1}
    content = encode(["a", ("b", {"x": "a"}), slice("b", None)], lambda x: values.get(x) if isinstance(x, str) else None)
    assert decode(content, [7, 8]) == [7, (8, {"x": 7}), slice(8, None)]
    assert bound([[{"value": 1}], {"dim": 3}], [7, 8]) == ([8], {"dim": 3})


@pytest.mark.parametrize("argument", [torch.zeros(1), object(), {1: 2}, torch.device("cpu"), b"x"], ids=lambda x: type(x).__name__)
def test_what_json_cannot_say_is_refused(argument):
    with pytest.raises(ValueError):
        encode(argument, lambda value: None)


def test_every_function_of_a_module_is_known():
    assert all(name in FUNCTIONS for name, _ in MODULES.values())
    assert not any(name.rpartition(".")[2].endswith("_") for name in FUNCTIONS if "operator" not in name)


class Everything(nn.Module):
    """A step of every kind but the foreign one, and functions of every namespace."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.left = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)
        self.shift, self.last = nn.Parameter(torch.randn(8, 1, 1)), nn.Linear(16, 4)
        self.silu, self.group = nn.SiLU(inplace=True), nn.GroupNorm(2, 8)

    def forward(self, x, scale=2.0):
        x = self.norm(self.first(x))
        x = torch.relu(x) + x * self.shift
        x = functional.max_pool2d(x, 3, 2, 1) + functional.avg_pool2d(x, 3, 2, 1)
        x = torch.cat([self.left(x), functional.hardswish(self.silu(x + 0))], 1)[:, ::2]
        x = functional.interpolate(self.group(x), scale_factor=2)
        b, c, h, w = x.shape
        x = x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)
        x[:, 0] *= scale
        y, z = functional.adaptive_avg_pool2d(x, (1, 2)).flatten(1).chunk(2, dim=1)
        y = torch.cat((y.clamp(-1, 1), z.sigmoid()), 1)
        return {"logits": self.last(y), "means": (x.mean((2, 3)), y.amax(1) - math.sqrt(c))}


POLICY = """
rules:
- {name: left, scheme: float}
- {weight_bits: 4, activation_bits: 4, scheme: apot}
"""


def test_a_program_of_everything_is_executed_as_the_network(tmp_path):
    torch.manual_seed(0)
    (tmp_path / "policy.yaml").write_text(POLICY)
    model, x = Everything(), torch.randn(2, 3, 12, 12)
    qmodel, names = cycle(model, x, tmp_path, BitPolicy.from_yaml(tmp_path / "policy.yaml"))
    assert names == ["first", "last"]
    program = Program.from_json(read_integer(tmp_path / "export")[0]["program"])
    assert STEPS.keys() - {step.kind for step in program.steps} == {"foreign", "average"} - {step.kind for step in program.steps}
    network = load_integer(tmp_path / "export")
    assert type(network) is IntegerNetwork and network.input_names == ["x", "scale"]
    for odd in (torch.randn(1, 3, 9, 15), torch.randn(5, 3, 20, 8)):
        expected, got = qmodel(odd), network(odd)
        assert expected.keys() == got.keys() and torch.equal(expected["logits"], got["logits"])
        assert all(torch.equal(a, b) for a, b in zip(expected["means"], got["means"], strict=True))
    with pytest.raises(ApotfxError, match="the network takes the arguments x, scale: x is missing; pass these"):
        network()
    with pytest.raises(ApotfxError, match="argument scale: the network was traced with 2.0, got 3.0"):
        network(x, scale=3.0)


@pytest.mark.parametrize("make", [mobilenet_v3_small, shufflenet_v2_x0_5])
def test_networks_of_others_stand_alone(make, tmp_path):
    torch.manual_seed(0)
    qmodel, _ = cycle(make(num_classes=5), torch.randn(2, 3, 48, 48), tmp_path)
    network = load_integer(tmp_path / "export")
    x = torch.randn(3, 3, 64, 40)
    assert torch.equal(network(x), qmodel(x)) and "steps" in repr(network)
    assert {tensor.device.type for tensor in network.state_dict().values()} == {"cpu"}


def test_a_step_that_needs_the_model_is_named(tmp_path):
    class Noisy(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + torch.rand_like(x[:, :2])

    model, x = Noisy(nn.Linear(4, 2)), torch.randn(3, 4)
    path = export_integer(calibrate(quantize(model, BitPolicy.default(4)), [x]).eval(), tmp_path / "export")
    message = r"the step rand_like \(rand_like \(no function that a program knows\)\) can be computed only by the float"
    with pytest.raises(ApotfxError, match=f"{message} network's code; pass it: load_integer.path, float_model."):
        load_integer(path)
    load_integer(path, model)(x)


class Gated(nn.Module):
    """A module that tracing keeps whole stands between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.gate, self.last = nn.Linear(4, 4), Branch(), nn.Linear(4, 2)

    def forward(self, x):
        return self.last(self.gate(torch.relu(self.first(x))))


class Branch(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x


def test_a_module_kept_whole_is_called_where_the_model_is_at_hand(tmp_path):
    torch.manual_seed(0)
    model, x = Gated(), torch.randn(3, 4)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [x]).eval()
    loaded(qmodel, model, x, tmp_path, "onednn")
    with pytest.raises(ApotfxError, match=r"the step gate \(Branch gate\) can be computed only by the float network's code"):
        load_integer(tmp_path / "export")


def test_a_bias_that_forward_reads_too_is_a_constant(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            x = self.norm(self.conv(x)) + self.conv.bias.view(-1, 1, 1)
            return self.last(x * self.norm.weight.view(-1, 1, 1))

    torch.manual_seed(0)
    cycle(Net(), torch.randn(2, 2, 6, 6), tmp_path)
