import copy
import dataclasses
import json
import re

import pytest
import torch
import torch.nn.functional as TF
import torchvision
from torch import nn

from apotfx import ApotfxError, BitPolicy, Rule, quantize, summary


class Odd(nn.MultiheadAttention):
    """Cannot be quantized, as it might compute something else."""


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
        self.attention, self.odd, self.unused = nn.MultiheadAttention(4, 1), Odd(4, 1), nn.Linear(2, 2)
        self.lstm = nn.LSTM(4, 3)
        self.weight = nn.Parameter(torch.ones(6, 3))

    def forward(self, x):
        x = self.plain(torch.relu(self.partial(torch.relu(self.conv(x))))).flatten(2).transpose(1, 2)
        x = self.odd(x, x, x)[0] + self.attention(x, x, x)[0]
        return TF.linear(self.lstm(self.up(x))[0], self.weight)


POLICY = BitPolicy((
    Rule(name="conv", scheme="uniform", weight_bits=3, activation_bits=5, granularity="channel"),
    Rule(name="partial", weight_bits=2, activation_bits=32), Rule(name="plain", scheme="float"),
    Rule(name="attention.*", scheme="float"), Rule(type="F.linear", weight_bits=3), Rule(weight_bits=32),
))  # fmt: skip
ATTENTION = ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj"]


def images():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def qmodel():
    torch.manual_seed(0)
    return quantize(Net(), POLICY)


@pytest.fixture
def rows(qmodel):
    qmodel.conv.weight_quantizer.set_clip(torch.tensor([1.0, 2, 3, 4, -5]).reshape(5, 1, 1, 1))
    qmodel.up.input_quantizer.set_clip(torch.tensor(0.5))
    return {row.name: row for row in summary(qmodel).layers}


def test_a_row_per_layer_in_the_order_of_the_plan(rows):
    plan = ["conv", "partial", "plain", "odd", *ATTENTION, "up", "lstm", "linear", "odd.out_proj", "unused"]
    assert list(rows) == plan


def test_a_quantized_layer(rows):
    row = dataclasses.asdict(rows["conv"])
    # A clip per channel is given by the mean of the clips that are used: -5 counts as about 0.
    assert row.pop("weight_clip") == pytest.approx(2.0)
    assert row == {
        "name": "conv", "type": "Conv2d", "scheme": "uniform", "weight_bits": 3, "input_bits": 5,
        "signed_input": True,
        "input_clip": 4.0, "parameters": 135, "biases": 5, "float_bytes": 540, "quantized_bytes": 51, "macs": None,
        "decided_by": "rule name=conv",
    }  # fmt: skip  # 51 bytes hold 135 * 3 = 405 bits


def test_layers_that_are_quantized_in_part(rows):
    partial, up = rows["partial"], rows["up"]
    assert (partial.scheme, partial.weight_bits, partial.input_bits, partial.input_clip) == ("apot", 2, 32, None)
    assert (partial.weight_clip, partial.float_bytes, partial.quantized_bytes, partial.signed_input) == (
        4.0,
        100,
        7,
        False,
    )
    assert (up.weight_bits, up.input_bits, up.weight_clip, up.input_clip) == (32, 4, None, 0.5)
    assert up.float_bytes == up.quantized_bytes == 64


def test_a_functional_layer(rows):
    row = rows["linear"]
    assert (row.type, row.scheme, row.weight_bits, row.input_bits) == ("F.linear", "apot", 3, 4)
    assert (row.weight_clip, row.input_clip) == (4.0, 4.0)
    assert (row.parameters, row.biases, row.float_bytes, row.quantized_bytes) == (18, 0, 72, 7)


@pytest.mark.parametrize("name, parameters, biases, decided_by", [
    ("plain", 20, 4, "rule name=plain"), *((name, 16, 4, r"rule name=attention\.\*") for name in ATTENTION),
    ("odd", 48, 12, "float: Odd derives from MultiheadAttention .*"), ("odd.out_proj", 16, 4, "float: .*"),
    ("lstm", 84, 24, "float: LSTM has no quantized version"),
    ("unused", 4, 2, "float: never called by the model's forward"),
])  # fmt: skip
def test_float_layers(rows, name, parameters, biases, decided_by):
    row = rows[name]
    assert (row.scheme, row.weight_bits, row.input_bits, row.weight_clip, row.input_clip) == (
        "float",
        32,
        32,
        None,
        None,
    )
    assert (row.parameters, row.float_bytes, row.quantized_bytes) == (parameters, 4 * parameters, 4 * parameters)
    assert row.biases == biases and re.fullmatch(decided_by, row.decided_by)


def test_a_functional_call_is_not_taken_for_the_module_of_its_name():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.weight = nn.Linear(2, 3), nn.Parameter(torch.ones(2, 2))

        def forward(self, x):
            return self.linear(TF.linear(x, self.weight))

    functional, module = summary(quantize(Both(), BitPolicy((Rule(),))), torch.ones(5, 2)).layers
    assert (functional.parameters, functional.biases, functional.macs) == (4, 0, 20)
    assert (module.name, module.parameters, module.biases, module.macs) == ("linear", 6, 3, 30)


# Multiply-accumulates.


def test_macs_of_every_layer(qmodel):
    # On 2 images of 8x8: 36 positions each, 72 in all.
    result = summary(qmodel, images())
    assert {row.name: row.macs for row in result.layers} == {
        "conv": 72 * 5 * 27, "partial": 72 * 5 * 5, "plain": 72 * 4 * 5, "odd": 72 * 48,
        **dict.fromkeys(ATTENTION, 72 * 16), "up": 72 * 16, "lstm": 72 * (48 + 36), "linear": 72 * 18,
        "odd.out_proj": 72 * 16, "unused": None,
    }  # fmt: skip
    assert result.activation_macs == 2 * 36 * (2 * 2 * 4 * 2) and result.other_macs == 0  # two attentions of one head
    assert result.macs == 72 * (135 + 25 + 20 + 48 + 16 + 5 * 16 + 84 + 18) + result.activation_macs
    assert result.quantized_macs == 72 * (135 + 18)  # weight and input
    assert result.quantized_macs_share == result.quantized_macs / result.macs


LAYERS = {  # a layer, the shape of its input, its multiply-accumulates by hand
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1), (2, 4, 9), 2 * 6 * 5 * 4 * 3),
    "conv2d-unbatched": (nn.Conv2d(3, 5, (1, 3)), (3, 4, 6), 5 * 4 * 4 * 3 * 3),
    "conv2d-groups": (nn.Conv2d(6, 9, 3, groups=3, dilation=2), (1, 6, 7, 7), 9 * 9 * 2 * 9),
    "conv2d-reflect": (nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), (1, 2, 5, 5), 3 * 25 * 2 * 9),
    "depthwise": (nn.Conv2d(8, 8, 3, padding="same", groups=8), (1, 8, 6, 6), 8 * 36 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), (1, 2, 3, 4, 5), 3 * 2 * 3 * 4 * 2 * 8),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3, stride=2), (2, 4, 5), 2 * 4 * 5 * 6 * 3),
    "transposed2d-groups": (
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2), (1, 4, 5, 5), 4 * 25 * 3 * 9,
    ),
    "transposed3d": (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3), 2 * 27 * 3 * 8),
    "linear-3d": (nn.Linear(5, 7), (2, 3, 5), 2 * 3 * 5 * 7),
}  # fmt: skip


@pytest.mark.parametrize("rule", [{}, {"scheme": "float"}], ids=["quantized", "float"])
@pytest.mark.parametrize("layer, shape, macs", LAYERS.values(), ids=LAYERS)
def test_macs_by_hand(layer, shape, macs, rule):
    qmodel = quantize(nn.Sequential(layer), BitPolicy((Rule(**rule),)))
    result = summary(qmodel, torch.ones(shape))
    assert result.layers[0].macs == result.macs == macs
    assert result.quantized_macs == (0 if rule else macs)
    assert result.quantized_macs_share == (0.0 if rule else 1.0)


@pytest.mark.parametrize("scheme", ["apot", "float"])
@pytest.mark.parametrize("call, macs", [
    (lambda x, w, v: TF.conv2d(x, w, stride=2), 6 * 9 * 4 * 9), (lambda x, w, v: TF.conv2d(x, weight=w), 6 * 25 * 4 * 9),
    (lambda x, w, v: TF.conv_transpose2d(x, v), 4 * 49 * 6 * 9),
], ids=["conv2d", "keyword", "conv_transpose2d"])  # fmt: skip
def test_macs_of_functional_convolutions(call, macs, scheme):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.v = nn.Parameter(torch.ones(6, 4, 3, 3)), nn.Parameter(torch.ones(4, 6, 3, 3))

        def forward(self, x):
            return call(x, self.w, self.v)

    (row,) = summary(quantize(Functional(), BitPolicy((Rule(scheme=scheme),))), torch.ones(1, 4, 7, 7)).layers
    assert (row.macs, row.parameters) == (macs, 216)


def test_macs_of_a_network_as_torchvision_states_them():
    qmodel = quantize(torchvision.models.resnet18(), BitPolicy.default(32))
    billions = summary(qmodel, torch.zeros(1, 3, 224, 224)).macs / 1e9
    assert round(billions, 3) == torchvision.models.ResNet18_Weights.IMAGENET1K_V1.meta["_ops"]


def test_every_call_of_a_module_counts():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3)

        def forward(self, x):
            return self.conv(self.conv(x))

    (row,) = summary(quantize(Twice(), BitPolicy((Rule(),))), torch.ones(1, 3, 8, 8)).layers
    assert row.macs == (36 + 16) * 81


def test_layers_in_what_tracing_keeps_whole_are_counted():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 2))

        def forward(self, x):
            return self.inner(x) @ self.weight if x.sum() < 1e9 else x[:, :2]

    qmodel = quantize(nn.Sequential(nn.Linear(4, 4), Whole()), BitPolicy((Rule(),)))
    rows = {row.name: (row.parameters, row.weight_bits, row.macs) for row in summary(qmodel, torch.ones(3, 4)).layers}
    assert rows.keys() == {"0", "1.inner", "1.weight"}
    assert rows["0"] == (16, 4, 48) and rows["1.inner"][:2] == (16, 4) and rows["1.weight"] == (8, 32, 24)


@pytest.mark.parametrize("inputs", [
    (torch.ones(3, 4), torch.ones(3, 4)), [torch.ones(3, 4), torch.ones(3, 4)],
    {"b": torch.ones(3, 4), "a": torch.ones(3, 4)},
], ids=["tuple", "list", "dict"])  # fmt: skip
def test_networks_of_several_inputs(inputs):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.fc(a + b)

    assert summary(quantize(Sum(), BitPolicy((Rule(),))), inputs).macs == 3 * 8


def hooks(model):
    return [[*module._forward_hooks, *module._forward_pre_hooks] for module in model.modules()]


def test_the_model_stays_as_it_is():
    torch.manual_seed(0)
    qmodel = quantize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(), nn.Conv2d(4, 2, 1)), BitPolicy((Rule(),))
    )
    qmodel.train()
    qmodel.get_submodule("1").eval()
    modes = [module.training for module in qmodel.modules()]
    state, before = copy.deepcopy(qmodel.state_dict()), hooks(qmodel)
    summary(qmodel, images())
    assert [module.training for module in qmodel.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())
    assert hooks(qmodel) == before
    assert all(parameter.grad is None for parameter in qmodel.parameters())


def test_the_model_stays_as_it_is_when_inputs_do_not_fit(qmodel):
    before = hooks(qmodel)
    with pytest.raises(RuntimeError):
        summary(qmodel.train(), torch.ones(2, 4, 8, 8))
    assert qmodel.training and hooks(qmodel) == before


def test_a_model_on_the_meta_device():
    torch.manual_seed(0)
    qmodel = quantize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1)), BitPolicy.default(4))
    here, there = summary(qmodel), summary(qmodel.to("meta"))
    assert all(row.weight_clip is row.input_clip is None for row in there.layers)
    assert [dataclasses.replace(row, weight_clip=None, input_clip=None) for row in here.layers] == list(there.layers)
    assert dataclasses.replace(here, layers=()) == dataclasses.replace(there, layers=())


# Totals.


def total(result):
    return (result.layer_parameters, result.parameters, result.float_bytes, result.quantized_bytes)


def test_totals_of_a_network():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1, bias=False))
    rules = Rule(name="0", weight_bits=3, activation_bits=32), Rule(weight_bits=5)
    # Weights of 108 at 3 bits and 20 at 5; a bias and the batch norm's two vectors of 4 each stay float.
    assert total(summary(quantize(model, BitPolicy(rules)))) == (132, 140, 560, 41 + 13 + 12 * 4)


def test_totals_of_every_kind_of_layer(qmodel, rows):
    parameters = sum(p.numel() for p in Net().parameters())
    saved = sum(row.float_bytes - row.quantized_bytes for row in rows.values())
    assert total(summary(qmodel)) == (parameters, parameters, 4 * parameters, 4 * parameters - saved)


def test_a_shared_weight_counts_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    result = summary(quantize(model, BitPolicy((Rule(),))), torch.ones(1, 4))
    assert [row.parameters for row in result.layers] == [16, 16] and result.macs == 32
    assert total(result) == (20, 20, 80, 8 + 16)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.fc, self.head = nn.Embedding(7, 4), nn.Linear(4, 4), nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.fc(self.embedding(x)))


class TiedByFunction(Tied):
    def forward(self, x):
        return TF.linear(self.fc(self.embedding(x)), self.embedding.weight)


@pytest.mark.parametrize("model", [Tied, TiedByFunction])
def test_a_weight_that_an_embedding_shares_stays_in_float(model):
    result = summary(quantize(model(), BitPolicy((Rule(),))))
    assert [row.quantized_bytes for row in result.layers if row.parameters == 28 and row.weight_bits < 32] == [14]
    assert total(result) == (48, 48, 192, 28 * 4 + 8 + 4 * 4)


def test_a_functional_weight_that_is_computed_counts_at_its_bits():
    class Transposed(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.other = nn.Parameter(torch.ones(4, 6)), nn.Parameter(torch.ones(6))

        def forward(self, x):
            return x @ self.weight + self.other

    result = summary(quantize(Transposed(), BitPolicy((Rule(),))), torch.ones(3, 4))
    assert [(row.parameters, row.macs) for row in result.layers] == [(24, 72)]
    assert total(result) == (24, 30, 120, 12 + 24)


def test_a_parametrized_weight_counts_at_its_bits():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 6)))
    result = summary(quantize(model, BitPolicy((Rule(),))), torch.ones(3, 4))
    assert [(row.parameters, row.biases, row.macs) for row in result.layers] == [(24, 6, 72)]
    assert total(result) == (36, 36, 144, 12 + 24)  # 24 directions and 6 lengths become 24 levels


# Output.


def test_the_text_is_a_table_with_totals():
    torch.manual_seed(0)
    qmodel = quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), BitPolicy.default(4))
    table, totals = str(summary(qmodel, torch.ones(5, 4))).split("\n\n")
    lines = [re.split(r"\s{2,}", line.strip()) for line in table.splitlines()]
    assert lines[0] == ["layer", "type", "scheme", "w bits", "in bits", "signed in", "w clip", "in clip",
        "parameters", "biases", "bytes",
                        "quantized", "macs", "decided by"]  # fmt: skip
    assert lines[2:] == [
        ["0", "Linear", "uniform", "8", "8", "True", "4", "4", "16", "4", "64", "16", "80", "rule position=first"],
        ["2", "Linear", "uniform", "8", "8", "False", "4", "4", "8", "2", "32", "8", "40", "rule position=last"],
    ]
    assert totals.splitlines() == [
        "parameters: 30, of them 30 in these layers",
        "bytes: 120 at 32 bits, 48 quantized; without clips and buffers",
        "multiply-accumulates: 120, of them 120 (100.00%) with weight and input quantized",
    ]


def test_the_text_says_what_stays_in_float(qmodel):
    assert "multiply-accumulates" not in str(summary(qmodel))
    total, others = str(summary(qmodel, images())).splitlines()[-2:]
    assert total == "multiply-accumulates: 32,976, of them 11,016 (33.41%) with weight and input quantized"
    assert others == (
        "the others, in float wholly or in part: 21,960, of them 2,304 in products of two activations, such as attention's"
    )


def test_the_data_can_be_written_as_json(qmodel):
    for inputs in (None, images()):
        result = summary(qmodel, inputs)
        content = result.to_dict()
        assert json.loads(json.dumps(content)) == content
        assert content == {
            "layers": [dataclasses.asdict(row) for row in result.layers],
            "layer_parameters": result.layer_parameters, "parameters": result.parameters,
            "float_bytes": result.float_bytes, "quantized_bytes": result.quantized_bytes, "macs": result.macs,
            "quantized_macs": result.quantized_macs, "quantized_macs_share": result.quantized_macs_share,
            "activation_macs": result.activation_macs, "other_macs": result.other_macs,
        }  # fmt: skip
        assert (content["macs"] is None) == (inputs is None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        result.parameters = 0


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), torch.fx.symbolic_trace(nn.ReLU()), None], ids=["module", "graph", "none"]
)
def test_what_does_not_come_from_quantize_is_refused(model):
    with pytest.raises(ApotfxError, match="summary: the model has no plan; pass what apotfx.quantize returned"):
        summary(model)


@pytest.mark.parametrize("inputs", [3, "images", iter(())], ids=["number", "string", "iterator"])
def test_inputs_of_another_type_are_refused(qmodel, inputs):
    with pytest.raises(
        ApotfxError, match=r"summary: inputs is a \w+; pass a tensor, a tuple of positional arguments or"
    ):
        summary(qmodel, inputs)
