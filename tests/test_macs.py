import math

import pytest
import torch
import torch.nn.functional as TF
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from apotfx import BitPolicy, Rule, plan, quantize, summary

QUANTIZED = BitPolicy((Rule(weight_bits=4, activation_bits=4),))


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it."""

    def __init__(self, features, inputs):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(inputs, features)), nn.Parameter(torch.zeros(features))

    def forward(self, x):
        y = torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight)
        return y.view(*x.shape[:-1], self.weight.shape[1])


class Gpt(nn.Module):
    """A GPT-2 of one block, with the two products of its attention in another way each time."""

    def __init__(self, attend, width=16, heads=2, words=11):
        super().__init__()
        self.heads, self.attend = heads, attend
        self.embed = nn.Embedding(words, width)
        self.attention, self.project = Conv1D(3 * width, width), Conv1D(width, width)
        self.up, self.down = Conv1D(4 * width, width), Conv1D(width, 4 * width)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        q, k, v = (
            t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.attention(self.norm(x)).chunk(3, dim=-1)
        )
        x = x + self.project(self.attend(q, k, v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(TF.gelu(self.up(x))))


def by_matmul(q, k, v):
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def by_einsum(q, k, v):
    return torch.einsum("nhls,nhsd->nhld", torch.einsum("nhld,nhsd->nhls", q, k).softmax(-1), v)


def by_baddbmm(q, k, v):
    n, h, length, d = q.shape
    q, k, v = (t.reshape(n * h, length, d) for t in (q, k, v))
    scores = torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0.0, alpha=0.5)
    return torch.bmm(scores.softmax(-1), v).view(n, h, length, d)


@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
@pytest.mark.parametrize("attend", [TF.scaled_dot_product_attention, by_matmul, by_einsum, by_baddbmm])
def test_the_products_of_attention_count(attend, inference):
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 8))
    qmodel = quantize(Gpt(attend), QUANTIZED, example_inputs=ids)
    with torch.inference_mode(inference):
        result = summary(qmodel, ids)
    tokens = 2 * 8
    weights = {"attention.addmm": 16 * 48, "project.addmm": 16 * 16, "up.addmm": 16 * 64, "down.addmm": 64 * 16, "head": 16 * 11}
    assert sorted(row.macs for row in result.layers) == sorted(tokens * n for n in weights.values())
    assert result.activation_macs == 2 * tokens * 8 * 16 and result.other_macs == 0
    assert result.quantized_macs == tokens * sum(weights.values())
    assert result.macs == result.quantized_macs + result.activation_macs
    assert result.quantized_macs_share == result.quantized_macs / result.macs < 0.95


def test_a_network_of_which_a_part_is_quantized_does_not_count_as_quantized():
    torch.manual_seed(0)
    ids = torch.randint(11, (2, 8))  # without examples nothing says how many dimensions a Conv1D has to flatten
    result = summary(quantize(Gpt(by_matmul), QUANTIZED), ids)
    rows = {row.name: (row.weight_bits, row.macs) for row in result.layers}
    assert rows.pop("head") == (4, 16 * 16 * 11)
    assert rows == {f"{name}.weight": (32, 16 * n) for name, n in
                    {"attention": 768, "project": 256, "up": 1024, "down": 1024}.items()}  # fmt: skip
    assert result.quantized_macs_share == 2816 / (16 * 3248 + 4096)


class Rows(nn.Module):
    def __init__(self, compute, **modules):
        super().__init__()
        self.first, self.compute = nn.Linear(4, 4), compute
        self.w, self.v, self.t = (nn.Parameter(torch.randn(shape)) for shape in ((4, 4), (4,), (4, 4, 4)))
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.compute(self, torch.relu(self.first(x)))


FUNCTIONS = {  # on x [2, 4, 4]: the row that it is, and its multiply-accumulates
    "einsum": (lambda m, x: torch.einsum("nij,njk->nik", x, m.t[:2]), "einsum", 2 * 4 * 4 * 4),
    "bmm": (lambda m, x: torch.bmm(x, m.t[:2]), "bmm", 128), "matmul": (lambda m, x: x @ m.t[:2].abs(), "matmul", 128),
    "inner": (lambda m, x: torch.inner(x, m.w), "inner", 128), "mv": (lambda m, x: x[0].mv(m.v), "mv", 16),
    "dot": (lambda m, x: torch.dot(x[0, 0], m.v), "dot", 4), "outer": (lambda m, x: torch.outer(x[0, 0], m.v), "outer", 16),
    "tensordot": (lambda m, x: torch.tensordot(x, m.t, 1), "tensordot", 8 * 4 * 16),
    "multi_dot": (lambda m, x: torch.linalg.multi_dot([x[0], m.w, m.t[0]]), "linalg_multi_dot", 2 * 64),
    "chain_matmul": (lambda m, x: torch.linalg.multi_dot([m.w, x[0], m.t[0]]), "linalg_multi_dot", 2 * 64),
    "baddbmm": (lambda m, x: torch.baddbmm(x, x, m.t[:2]), "baddbmm", 128),
    "addmv": (lambda m, x: torch.addmv(m.v, x[0], m.v), "addmv", 16), "addr": (lambda m, x: torch.addr(x[0], x[0, 0], m.v), "addr", 16),
    "bilinear": (lambda m, x: TF.bilinear(x, x, m.t), "bilinear", 8 * 4 * 16),
    "mul-sum": (lambda m, x: (x[..., None, :] * m.w).sum(-1), "mul", 128),
    "vecdot": (lambda m, x: torch.linalg.vecdot(x, m.v), "linalg_vecdot", 32),
    "conv_tbc": (lambda m, x: torch.conv_tbc(x, m.t[:1], m.v), "conv_tbc", 2 * 4 * 4 * 4),
    "queries": (lambda m, x: TF.scaled_dot_product_attention(m.t[:2], x, x), "scaled_dot_product_attention", 2 * 2 * 4 * 4 * 4),
}  # fmt: skip


@pytest.mark.parametrize("compute, name, macs", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_with_parameters_count_in_their_row(compute, name, macs):
    torch.manual_seed(0)
    result = summary(quantize(Rows(compute), QUANTIZED), torch.randn(2, 4, 4))
    assert {row.name: row.macs for row in result.layers} == {"first": 128, name: macs}
    assert (result.macs, result.quantized_macs, result.activation_macs, result.other_macs) == (128 + macs, 128, 0, 0)


def recurrent(name):
    return lambda m, x: getattr(m, name)(x)[0]


MODULES = {
    "LSTM": (nn.LSTM(4, 3), recurrent("layer"), 8 * (12 * 4 + 12 * 3)),
    "bidirectional": (nn.LSTM(4, 3, 2, bidirectional=True), recurrent("layer"), 8 * 2 * (12 * 4 + 12 * 3 + 12 * 6 + 12 * 3)),
    "GRU": (nn.GRU(4, 3), recurrent("layer"), 8 * (9 * 4 + 9 * 3)), "RNN": (nn.RNN(4, 3), recurrent("layer"), 8 * (12 + 9)),
    "LSTMCell": (nn.LSTMCell(4, 3), lambda m, x: m.layer(x[0])[0], 4 * (12 * 4 + 12 * 3)),
    "Bilinear": (nn.Bilinear(4, 4, 5), lambda m, x: m.layer(x, x), 8 * 5 * 16),
}


@pytest.mark.parametrize("layer, compute, macs", MODULES.values(), ids=MODULES)
def test_modules_that_stay_in_float_count(layer, compute, macs):
    torch.manual_seed(0)
    result = summary(quantize(Rows(compute, layer=layer), QUANTIZED), torch.randn(2, 4, 4))
    assert {row.name: row.macs for row in result.layers} == {"first": 128, "layer": macs}
    assert (result.macs, result.quantized_macs, result.activation_macs, result.other_macs) == (128 + macs, 128, 0, 0)


class Whole(nn.Module):
    """Cannot be traced."""

    def __init__(self):
        super().__init__()
        self.linear, self.weight = nn.Linear(4, 4), nn.Parameter(torch.ones(4, 2))

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        y = self.linear(x)
        return (y @ y.mT @ y) @ self.weight.abs()  # what is computed from a weight is one


def test_what_tracing_keeps_whole_counts():
    torch.manual_seed(0)
    result = summary(quantize(nn.Sequential(nn.Linear(4, 4), Whole()), QUANTIZED), torch.randn(2, 4, 4))
    assert {row.name: row.macs for row in result.layers} == {"0": 128, "1.linear": 128, "1.weight": 64}
    assert result.activation_macs == 2 * 128 and result.other_macs == 0 and result.quantized_macs == 256


@pytest.mark.parametrize("rule", [{}, {"scheme": "float"}], ids=["quantized", "float"])
def test_the_attention_of_torch_counts_the_same_in_float_and_quantized(rule):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    result = summary(quantize(nn.Sequential(layer), BitPolicy((Rule(**rule),))).eval(), torch.randn(2, 5, 8))
    assert result.activation_macs == 2 * 2 * 5 * 5 * 8 and result.other_macs == 0
    assert sum(row.macs for row in result.layers) == 10 * (4 * 64 + 2 * 8 * 16)
    assert result.quantized_macs == (0 if rule else 10 * (4 * 64 + 2 * 8 * 16))


def test_a_weight_of_no_row_counts_as_such():
    class Hidden(nn.Module):
        def forward(self, x, w):
            return x @ w if x.sum() < 1e9 else x

    model = Rows(lambda m, x: m.hidden(x, m.w), hidden=Hidden())
    result = summary(quantize(model, QUANTIZED), torch.randn(2, 4, 4))
    assert (result.quantized_macs, result.other_macs, result.activation_macs) == (128, 128, 0)
    assert str(result).endswith("of them 128 with weights that have no row")


@pytest.mark.parametrize("bits", [4, 32])
@pytest.mark.parametrize("make, x", [
    (lambda: torchvision.models.mobilenet_v3_small(), torch.zeros(1, 3, 64, 64)),
    (lambda: torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 32, 32)),
    (lambda: Gpt(by_matmul), torch.zeros(3, 7, dtype=torch.long)),
], ids=["mobilenet", "shufflenet", "gpt"])  # fmt: skip
def test_the_total_is_what_torch_counts_of_the_float_network(make, x, bits):
    torch.manual_seed(0)
    model = make().eval()
    with FlopCounterMode(display=False) as counter:
        model(x)
    result = summary(quantize(model, BitPolicy.default(bits), example_inputs=x), x)
    assert 2 * result.macs == counter.get_total_flops()
    assert result.quantized_macs == (0 if bits == 32 else result.macs - result.activation_macs)


def test_every_product_of_a_plan_without_a_call_has_no_number():
    model = Rows(lambda m, x: x, unused=nn.LSTM(4, 4))
    assert "unused" not in [p.facts.name for p in plan(model, QUANTIZED).layers]  # torch's, and nothing calls it
    assert summary(quantize(model, QUANTIZED), torch.randn(2, 4, 4)).macs == 128
