import dataclasses
import re

import pytest
import torch
import torch.nn.functional as TF
from torch import nn

from apotfx import ApotfxError, BitPolicy, Rule, quantize, summary


class Net(nn.Module):
    """One layer of every kind: quantized in full and in part, float, functional, hidden, never called."""

    def __init__(self):
        super().__init__()
        self.conv, self.partial, self.plain, self.up = (
            nn.Conv2d(3, 5, 3),
            nn.Conv2d(5, 5, 1),
            nn.Conv2d(5, 4, 1),
            nn.Linear(4, 4),
        )
        self.attention, self.unused = nn.MultiheadAttention(4, 1), nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(4, 4))

    def forward(self, x):
        x = self.plain(torch.relu(self.partial(torch.relu(self.conv(x))))).flatten(2).transpose(1, 2)
        return TF.linear(self.attention(x, x, x)[0] + self.up(x), self.weight)


POLICY = BitPolicy((
    Rule(name="conv", scheme="uniform", weight_bits=3, activation_bits=5, granularity="channel"),
    Rule(name="partial", weight_bits=2, activation_bits=32), Rule(name="plain", scheme="float"),
    Rule(weight_bits=32),
))  # fmt: skip


@pytest.fixture
def rows():
    torch.manual_seed(0)
    qmodel = quantize(Net(), POLICY)
    qmodel.conv.weight_quantizer.set_clip(torch.tensor([1.0, 2, 3, 4, -5]).reshape(5, 1, 1, 1))
    qmodel.up.input_quantizer.set_clip(torch.tensor(0.5))
    return {row.name: row for row in summary(qmodel).layers}


def test_a_row_per_layer_in_the_order_of_the_plan(rows):
    assert list(rows) == ["conv", "partial", "plain", "up", "linear", "attention.out_proj", "unused"]


def test_a_quantized_layer(rows):
    row = dataclasses.asdict(rows["conv"])
    # A clip per channel is given by the mean of the clips that are used: -5 counts as about 0.
    assert row.pop("weight_clip") == pytest.approx(2.0)
    assert row == {
        "name": "conv", "type": "Conv2d", "scheme": "uniform", "weight_bits": 3, "input_bits": 5,
        "signed_input": True,
        "input_clip": 8.0, "parameters": 135, "float_bytes": 540, "quantized_bytes": 51,
        "decided_by": "rule name=conv",
    }  # fmt: skip  # 51 bytes hold 135 * 3 = 405 bits


def test_layers_that_are_quantized_in_part(rows):
    partial, up = rows["partial"], rows["up"]
    assert (partial.scheme, partial.weight_bits, partial.input_bits, partial.input_clip) == ("apot", 2, 32, None)
    assert (partial.weight_clip, partial.float_bytes, partial.quantized_bytes, partial.signed_input) == (
        3.0,
        100,
        7,
        False,
    )
    assert (up.weight_bits, up.input_bits, up.weight_clip, up.input_clip) == (32, 4, None, 0.5)
    assert up.float_bytes == up.quantized_bytes == 64


@pytest.mark.parametrize("name, parameters, decided_by", [
    ("plain", 20, "rule name=plain"), ("linear", 0, "float: a functional call; use the module instead"),
    ("attention.out_proj", 16, r"float: inside attention \(MultiheadAttention\), which tracing keeps whole"),
    ("unused", 0, "float: never called by the model's forward"),
])  # fmt: skip
def test_float_layers(rows, name, parameters, decided_by):
    row = rows[name]
    assert (row.scheme, row.weight_bits, row.input_bits, row.weight_clip, row.input_clip) == (
        "float",
        32,
        32,
        None,
        None,
    )
    assert (row.parameters, row.float_bytes, row.quantized_bytes) == (parameters, 4 * parameters, 4 * parameters)
    assert re.fullmatch(decided_by, row.decided_by)


def test_a_functional_call_is_not_taken_for_the_module_of_its_name():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.weight = nn.Linear(2, 2), nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return self.linear(TF.linear(x, self.weight))

    functional, module = summary(quantize(Both(), BitPolicy((Rule(),)))).layers
    assert (functional.parameters, functional.weight_bits) == (0, 32)
    assert (module.parameters, module.weight_bits) == (4, 4)


def test_the_text_is_a_table_with_totals():
    torch.manual_seed(0)
    result = summary(quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), BitPolicy.default(4)))
    lines = [re.split(r"\s{2,}", line.strip()) for line in str(result).splitlines()]
    assert lines[0] == ["layer", "type", "scheme", "w bits", "in bits", "signed in", "w clip", "in clip",
        "parameters", "bytes",
                        "quantized", "decided by"]  # fmt: skip
    assert lines[2:] == [
        ["0", "Linear", "uniform", "8", "8", "True", "3", "8", "16", "64", "16", "rule position=first"],
        ["2", "Linear", "uniform", "8", "8", "False", "3", "8", "8", "32", "8", "rule position=last"],
        ["total", "-", "-", "-", "-", "-", "-", "-", "24", "96", "24", "-"],
    ]


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.ReLU()), None], ids=["module", "graph", "none"]
)
def test_what_does_not_come_from_quantize_is_refused(model):
    with pytest.raises(ApotfxError, match="summary: the model has no plan; pass what apotfx.quantize returned"):
        summary(model)
