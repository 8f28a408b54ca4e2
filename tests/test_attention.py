import copy
import itertools

import pytest
import torch
from cycle_helpers import POLICY, calls, cycle, quantized, trained
from torch import nn

from apotfx.graph.network import record_of
from apotfx import BitPolicy, Rule, calibrate, plan, quantize
from apotfx.attention import MultiheadAttention, obstacle, split_attention, split_projections

N, L, S, HEADS = 3, 4, 5, 2
NAMES = ["q_proj", "k_proj", "v_proj", "out_proj"]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def attention(**options):
    """torch's, with biases that are not 0."""
    made = nn.MultiheadAttention(8, HEADS, **options)
    for name, parameter in made.named_parameters():
        if "bias" in name:
            nn.init.normal_(parameter)
    return made


def masks(kind):
    """(attn_mask, key_padding_mask) for a batch."""
    attn = {
        "none": None, "bool": torch.ones(L, S).tril(1) == 0, "float": torch.randn(L, S),
        "bool-3d": torch.rand(N * HEADS, L, S) < 0.3, "float-3d": torch.randn(N * HEADS, L, S),
    }[kind.removesuffix("+padding")]  # fmt: skip
    if not kind.endswith("+padding"):
        return attn, None
    padding = torch.arange(S).expand(N, S) > torch.tensor([[2], [3], [4]])
    return attn, padding if attn is None or attn.dtype == torch.bool else padding.float() * -5


MASKS = [name + suffix for name in ("none", "bool", "float", "bool-3d", "float-3d") for suffix in ("", "+padding")]


@pytest.mark.parametrize("options", [
    {}, {"batch_first": True}, {"bias": False}, {"kdim": 5, "vdim": 6, "batch_first": True}, {"kdim": 5, "bias": False},
], ids=lambda options: "-".join(options) or "default")  # fmt: skip
@pytest.mark.parametrize("kind", MASKS)
def test_computes_what_torchs_does(options, kind):
    theirs = attention(**options)
    ours = MultiheadAttention.from_float(theirs)
    inputs = [torch.randn(N, L, 8), torch.randn(N, S, theirs.kdim), torch.randn(N, S, theirs.vdim)]
    mask, padding = masks(kind)
    for batched, need, average, training in itertools.product([True, False], repeat=4):
        if batched:
            args = inputs if theirs.batch_first else [x.transpose(0, 1) for x in inputs]
            attn_mask, key_padding_mask = mask, padding
        else:
            args = [x[0] for x in inputs]
            attn_mask = mask[:HEADS] if mask is not None and mask.dim() == 3 else mask
            key_padding_mask = None if padding is None else padding[0]
        kwargs = {
            "attn_mask": attn_mask, "key_padding_mask": key_padding_mask, "need_weights": need,
            "average_attn_weights": average,
        }  # fmt: skip
        expected, got = (m.train(training)(*args, **kwargs) for m in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_a_causal_mask():
    theirs = attention(batch_first=True)
    ours, x = MultiheadAttention.from_float(theirs), torch.randn(N, L, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    for need in (True, False):
        expected, got = (m(x, x, x, attn_mask=mask, is_causal=True, need_weights=need) for m in (theirs, ours))
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    for m in (theirs, ours):
        with pytest.raises(RuntimeError, match="Need attn_mask if specifying the is_causal hint"):
            m(x, x, x, is_causal=True)


def test_the_gradients_are_those_of_torch():
    theirs = attention()
    ours, x = MultiheadAttention.from_float(theirs), torch.randn(L, N, 8)
    theirs(x, x, x)[0].square().sum().backward()
    grads = {name: parameter.grad.clone() for name, parameter in theirs.named_parameters()}
    theirs.zero_grad()
    ours(x, x, x)[0].square().sum().backward()
    got = dict(ours.named_parameters())
    for name, grad in split_projections(grads, "").items():
        torch.testing.assert_close(got[name].grad, grad, rtol=1e-4, atol=1e-4)


def test_dropout_is_on_in_training_only():
    ours, x = MultiheadAttention.from_float(attention(dropout=0.5)), torch.randn(L, N, 8)
    for need in (True, False):
        assert not torch.equal(*(ours.train()(x, x, x, need_weights=need)[0] for _ in range(2)))
        assert torch.equal(*(ours.eval()(x, x, x, need_weights=need)[0] for _ in range(2)))


@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 5, "vdim": 6}], ids=["default", "no-bias", "kdim"])
@pytest.mark.parametrize("prefix", ["", "inner.attention."], ids=["alone", "inside"])
def test_loads_the_state_of_torchs(options, prefix):
    def around(module):
        for name in reversed(prefix.split(".")[:-1]):
            module = nn.ModuleDict({name: module})
        return module

    theirs = attention(**options)
    ours = around(MultiheadAttention.from_float(attention(**options)))
    state = around(theirs).state_dict()
    kept = dict(state)
    assert ours.load_state_dict(state) == ([], [])
    assert state.keys() == kept.keys()
    x = [torch.randn(L, N, 8), torch.randn(S, N, theirs.kdim), torch.randn(S, N, theirs.vdim)]
    inner = ours.get_submodule(prefix.removesuffix("."))
    torch.testing.assert_close(inner(*x), theirs(*x), rtol=1e-5, atol=1e-5)
    assert around(MultiheadAttention.from_float(attention(**options))).load_state_dict(ours.state_dict()) == ([], [])


def test_a_state_that_does_not_fit_says_so():
    ours = MultiheadAttention.from_float(attention())
    with pytest.raises(RuntimeError, match=r"size mismatch for q_proj.weight"):
        ours.load_state_dict(nn.MultiheadAttention(4, 2).state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*q_proj.bias"):
        ours.load_state_dict(nn.MultiheadAttention(8, 2, bias=False).state_dict())


def test_from_float_keeps_mode_hooks_and_values():
    theirs, seen = attention(dropout=0.1, batch_first=True).eval(), []
    theirs.register_forward_hook(lambda *_: seen.append("hook"))
    theirs.in_proj_weight.requires_grad_(False)
    before = copy.deepcopy(theirs.state_dict())
    ours = MultiheadAttention.from_float(theirs.requires_grad_(False))
    assert not ours.training and ours.dropout == 0.1 and ours.batch_first and ours.out_proj is theirs.out_proj
    assert not any(p.requires_grad for p in ours.parameters())
    ours(*[torch.randn(N, L, 8)] * 3)
    assert seen == ["hook"]
    with torch.no_grad():
        ours.q_proj.weight.zero_()
    assert all(torch.equal(before[name], value) for name, value in theirs.state_dict().items())


class Derived(nn.MultiheadAttention):
    pass


@pytest.mark.parametrize("make, reason", [
    (lambda: nn.MultiheadAttention(8, 2, add_bias_kv=True), "attention with add_bias_kv or add_zero_attn"),
    (lambda: nn.MultiheadAttention(8, 2, add_zero_attn=True), "attention with add_bias_kv or add_zero_attn"),
    (lambda: Derived(8, 2), "Derived derives from MultiheadAttention and may compute something else"),
], ids=["bias_kv", "zero_attn", "derived"])  # fmt: skip
def test_what_cannot_be_split_stays(make, reason):
    module = make()
    assert obstacle(module) == reason
    with pytest.raises(ValueError, match=reason):
        MultiheadAttention.from_float(module)
    model = nn.ModuleDict({"attention": module, "layer": nn.Linear(8, 8)})
    assert split_attention(model) == {} and model["attention"] is module


# Inside networks.


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention, self.head = nn.MultiheadAttention(8, HEADS, batch_first=True, **options), nn.Linear(8, 3)

    def forward(self, x):
        y, weights = self.attention(x, x, x)
        return self.head(y), weights


def tokens():
    return torch.randn(N, L, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("example", [False, True], ids=["", "example-inputs"])
def test_its_projections_are_quantized(example, tmp_path):
    options = {"example_inputs": tokens()} if example else {}
    model = Attending()
    qmodel, names = cycle(model, tokens(), tmp_path, **options)
    assert names == [*(f"attention.{name}" for name in NAMES), "head"] == calls(qmodel, tokens())
    assert type(model.attention) is nn.MultiheadAttention


def test_attention_that_the_policy_leaves_float_stays_torchs(tmp_path):
    qmodel, names = cycle(Attending(), tokens(), tmp_path, BitPolicy((Rule(name="head"),)))
    assert names == ["head"] and type(qmodel.attention) is nn.MultiheadAttention
    assert "attention.in_proj_weight" in qmodel.state_dict()
    rows = {row.facts.name: row.reason for row in record_of(qmodel)["plan"].layers}
    assert rows["attention.q_proj"] == "float: no rule matches"


@pytest.mark.parametrize("name", NAMES)
def test_one_quantized_projection_is_enough(name, tmp_path):
    qmodel, names = cycle(Attending(), tokens(), tmp_path, BitPolicy((Rule(name=f"*.{name}"),)))
    assert names == [f"attention.{name}"] and type(qmodel.attention) is MultiheadAttention


def test_8_bits_keep_the_function():
    model = Attending().eval()
    policy = BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))
    qmodel = calibrate(quantize(model, policy), [tokens()]).eval()
    with torch.no_grad():
        for y, expected in zip(qmodel(tokens()), model(tokens())):
            assert (y - expected).norm() < 0.03 * expected.norm()


def test_an_attention_under_two_names(tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = Attending().attention
            self.b = self.a

        def forward(self, x):
            x = self.a(x, x, x, need_weights=False)[0]
            return self.b(x, x, x, need_weights=False)[0]

    qmodel, names = cycle(Shared(), tokens(), tmp_path)
    assert names == [f"a.{name}" for name in NAMES] and calls(qmodel, tokens()) == 2 * names


class Encoding(nn.Module):
    def __init__(self, layers=2, **options):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, HEADS, 16, dropout=0.0, batch_first=True, **options)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False) if layers else layer
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


INSIDE = [*(f"self_attn.{name}" for name in NAMES), "linear1", "linear2"]


@pytest.mark.parametrize("layers, options", [
    (0, {}), (2, {}), (1, {"norm_first": True, "activation": "gelu", "bias": False}),
], ids=["layer", "encoder", "norm-first-no-bias"])  # fmt: skip
def test_torchs_encoder_runs_through_the_quantized_layers(layers, options, tmp_path):
    """Also in evaluation and without gradients, where torch's own takes a kernel that reads the weights themselves."""
    model = Encoding(layers, **options)
    qmodel, names = cycle(model, tokens(), tmp_path)
    prefixes = [f"encoder.layers.{i}." for i in range(layers)] or ["encoder."]
    assert names == [*(prefix + name for prefix in prefixes for name in INSIDE), "head"]
    assert calls(qmodel, tokens()) == names
    policy = BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))
    close = calibrate(quantize(model, policy), [tokens()]).eval()
    model.eval()
    with torch.no_grad():
        assert (close(tokens()) - model(tokens())).norm() < 0.05 * model(tokens()).norm()


def test_an_encoder_with_nested_tensors_and_a_padding_mask():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            layer = nn.TransformerEncoderLayer(8, HEADS, 16, dropout=0.0, batch_first=True)
            self.encoder = nn.TransformerEncoder(layer, 2)

        def forward(self, x, padding):
            return self.encoder(x, src_key_padding_mask=padding)

    model, padding = Padded(), torch.arange(L).expand(N, L) > 2
    qmodel = trained(model, (tokens(), padding))
    assert calls(qmodel, (tokens(), padding)) == [f"encoder.layers.{i}.{name}" for i in range(2) for name in INSIDE]
    x = tokens()
    x[:, 3] = 9  # padded
    with torch.no_grad():
        assert torch.equal(qmodel(x, padding)[:, :3], qmodel(tokens(), padding)[:, :3])
    assert model.encoder.use_nested_tensor


def test_a_whole_transformer(tmp_path):
    class Translating(nn.Module):
        def __init__(self):
            super().__init__()
            self.transformer = nn.Transformer(8, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)

        def forward(self, source, target):
            return self.transformer(source, target)

    inputs = (tokens(), torch.randn(N, S, 8))
    qmodel, names = cycle(Translating(), inputs, tmp_path)
    assert len(names) == 6 + 10 and calls(qmodel, inputs) == names
    assert plan(Translating(), POLICY) == record_of(qmodel)["plan"] and quantized(qmodel) == names
