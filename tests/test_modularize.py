"""Layers that are no modules of torch's: functional calls, computed and parametrized weights, weights that are shared."""

import copy

import pytest
import torch
import torch.nn.functional as TF
from cycle_helpers import CHANNEL, POLICY, calls, check_equal, cycle, loaded, quantized, trained
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from apotfx.graph.network import record_of
from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, plan, quantize, read_integer
from apotfx.layers import FunctionalLayer, QuantFunctional


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class Calling(nn.Module):
    """`function(x, weight, bias)` with parameters of its own."""

    def __init__(self, function, *shape, bias=None, **settings):
        super().__init__()
        self.function, self.settings = function, settings
        self.weight = nn.Parameter(torch.randn(shape))
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x):
        return self.function(x, self.weight, self.bias, **self.settings)


INPUTS = {1: (3, 4, 9), 2: (2, 4, 6, 7), 3: (2, 4, 4, 5, 4)}
SETTINGS = {
    "plain": {"bias": 8}, "no-bias": {}, "grouped": {"groups": 2, "stride": 2, "padding": 1, "bias": 8},
    "same": {"padding": "same", "dilation": 3}, "valid": {"padding": "valid"}, "tuple": {"stride": (2,), "bias": 8},
}  # fmt: skip
TRANSPOSED = {
    "plain": {"bias": 8}, "no-bias": {},
    "grouped": {"groups": 2, "stride": 2, "padding": 1, "output_padding": 1, "dilation": 2, "bias": 8},
}  # fmt: skip


@pytest.mark.parametrize("dims", INPUTS)
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_convolutions(dims, settings, tmp_path):
    function, groups = getattr(TF, f"conv{dims}d"), settings.get("groups", 1)
    layer = Calling(function, 8, 4 // groups, *[3] * dims, **settings)
    x = torch.randn(INPUTS[dims])
    model = nn.Sequential(nn.Identity(), layer)
    qmodel, names = cycle(model, x, tmp_path, CHANNEL)
    assert names == [f"1.conv{dims}d"]
    assert qmodel.get_submodule(names[0]).weight_quantizer.clip.shape == (8, *[1] * (dims + 1))
    assert qmodel(x[0]).shape == model(x[0]).shape and torch.equal(qmodel(x[0]), qmodel(x[:1])[0])


@pytest.mark.parametrize("dims", INPUTS)
@pytest.mark.parametrize("settings", TRANSPOSED.values(), ids=TRANSPOSED)
def test_transposed_convolutions(dims, settings, tmp_path):
    function, groups = getattr(TF, f"conv_transpose{dims}d"), settings.get("groups", 1)
    layer = Calling(function, 4, 8 // groups, *[3] * dims, **settings)
    qmodel, names = cycle(nn.Sequential(nn.Identity(), layer), torch.randn(INPUTS[dims]), tmp_path, CHANNEL)
    assert names == [f"1.conv_transpose{dims}d"]
    assert qmodel.get_submodule(names[0]).weight_quantizer.clip.shape == (8, *[1] * (dims + 1))


def test_a_functional_layer_computes_what_the_module_does():
    """In evaluation and in its gradients, bit for bit."""
    module = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1, groups=2), nn.ReLU(), nn.ConvTranspose2d(8, 4, 3, stride=2))
    function = nn.Sequential(
        Calling(TF.conv2d, 8, 2, 3, 3, bias=8, padding=1, groups=2), nn.ReLU(),
        Calling(TF.conv_transpose2d, 8, 4, 3, 3, bias=4, stride=2),
    )  # fmt: skip
    function.load_state_dict(module.state_dict())
    x, models = torch.randn(2, 4, 6, 6), []
    for model in (module, function):
        models.append(calibrate(quantize(model, CHANNEL), [x]))
        models[-1](x).square().sum().backward()
    for name, _ in module.named_parameters():
        assert torch.equal(*(qmodel.get_parameter(name).grad for qmodel in models)), name
    check_equal(*(model.eval() for model in models), x)


class Products(nn.Module):
    """`compute(x, m)` behind a layer, with weights of several kinds."""

    def __init__(self, compute):
        super().__init__()
        self.first, self.compute = nn.Linear(6, 6), compute
        self.w, self.b = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))
        self.register_buffer("buffer", torch.randn(6, 6))

    def forward(self, x):
        return self.compute(torch.relu(self.first(x)), self)


def standardized(w):
    return (w - w.mean(1, keepdim=True)) / w.std(1, keepdim=True)


PRODUCTS = {
    "linear": lambda x, m: TF.linear(x, m.w, m.b), "linear-named": lambda x, m: TF.linear(input=x, weight=m.w, bias=m.b),
    "x@w": lambda x, m: x @ m.w, "x@w.T": lambda x, m: x @ m.w.T, "x@w.t()": lambda x, m: x @ m.w.t(),
    "w@x": lambda x, m: m.w @ x, "matmul": lambda x, m: torch.matmul(x, m.w), "x.matmul": lambda x, m: x.matmul(m.w),
    "matmul-named": lambda x, m: torch.matmul(input=x, other=m.w), "w.matmul": lambda x, m: m.w.matmul(x),
    "mm": lambda x, m: torch.mm(x, m.w), "mm-left": lambda x, m: torch.mm(m.w, x), "x.mm": lambda x, m: x.mm(m.w),
    "addmm": lambda x, m: torch.addmm(m.b, x, m.w), "b.addmm": lambda x, m: m.b.addmm(x, m.w),
    "buffer": lambda x, m: TF.linear(x, m.buffer), "x@buffer": lambda x, m: x @ m.buffer,
    "standardized": lambda x, m: TF.linear(x, standardized(m.w)), "exp": lambda x, m: x @ torch.exp(m.w).mul(0.1),
    "concatenated": lambda x, m: TF.linear(x, torch.cat([m.w[:2], m.buffer[2:]])), "sliced": lambda x, m: x @ m.w[:, :4],
    "bias-computed": lambda x, m: TF.linear(x, m.w, 2 * m.b), "tied": lambda x, m: TF.linear(x, m.first.weight),
    "tied-transposed": lambda x, m: x @ m.first.weight, "tied-computed": lambda x, m: x @ standardized(m.first.weight),
    "dropped": lambda x, m: TF.linear(x, TF.dropout(m.w, 0.3, m.training)),
}  # fmt: skip


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(name, tmp_path):
    qmodel, names = cycle(Products(PRODUCTS[name]), torch.randn(6, 6), tmp_path)
    assert names == ["first", "linear"] == calls(qmodel, torch.randn(6, 6))
    assert type(qmodel.linear) is QuantFunctional
    assert (qmodel.first.weight_quantizer is qmodel.linear.weight_quantizer) is (name == "tied")


@pytest.mark.parametrize("name", ["x@w", "w@x", "addmm", "standardized"])
def test_8_bits_keep_the_function(name):
    x, model = torch.randn(6, 6), Products(PRODUCTS[name]).eval()
    policy = BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))
    qmodel = calibrate(quantize(model, policy), [x]).eval()
    with torch.no_grad():
        y, expected = qmodel(x), model(x)
    assert y.shape == expected.shape and (y - expected).norm() < 0.03 * expected.norm()


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6), (2, 3, 5, 6)], ids=str)
@pytest.mark.parametrize("name", ["linear", "x@w"])
def test_inputs_of_any_dimension(name, shape, tmp_path):
    cycle(Products(PRODUCTS[name]), torch.randn(shape), tmp_path)


@pytest.mark.parametrize("shape", [(6,), (6, 5), (2, 6, 5)], ids=str)
def test_a_weight_on_the_left(shape, tmp_path):
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.randn(4, 6))

        def forward(self, x):
            return self.w @ x

    model, x = Left(), torch.randn(shape)
    qmodel, names = cycle(model, x, tmp_path)
    assert names == ["linear"] and qmodel(x).shape == model(x).shape


def test_a_weight_used_twice_is_two_layers_with_one_quantizer(tmp_path):
    model = Products(lambda x, m: TF.linear(torch.relu(TF.linear(x, m.w)), m.w, m.b))
    qmodel, names = cycle(model, torch.randn(5, 6), tmp_path)
    assert names == ["first", "linear", "linear_1"]
    assert qmodel.linear.weight_quantizer is qmodel.linear_1.weight_quantizer
    assert qmodel.linear.input_quantizer is not qmodel.linear_1.input_quantizer


def test_a_module_called_twice_has_a_functional_layer_per_call(tmp_path):
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = nn.Sequential(Calling(TF.linear, 6, 6), nn.ReLU())

        def forward(self, x):
            return self.block(self.block(x))

    qmodel, names = cycle(Repeated(), torch.randn(5, 6), tmp_path)
    assert names == ["block.0.linear", "block.0.linear_1"]
    assert [row.facts.signed_input for row in record_of(qmodel)["plan"].layers] == [True, False]


def test_the_parameters_keep_their_names_and_values():
    model = nn.Sequential(nn.Identity(), Calling(TF.linear, 6, 6, bias=6))
    state = quantize(model, POLICY).state_dict()
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    added = {name for name in state if name not in model.state_dict()}
    assert added == {f"1.linear.{what}_quantizer.clip" for what in ("weight", "input")}


@pytest.mark.parametrize("name", ["linear", "standardized"])
def test_an_export_holds_codes_in_place_of_the_weight(name, tmp_path):
    class Wide(Products):
        def __init__(self):
            super().__init__(PRODUCTS[name])
            self.first, self.w, self.b = (
                nn.Linear(6, 256),
                nn.Parameter(torch.randn(256, 256)),
                nn.Parameter(torch.ones(256)),
            )

    qmodel = trained(Wide(), torch.randn(4, 6))
    path = export_integer(qmodel, tmp_path / "export")
    tensors = read_integer(path)[1]
    assert tensors["linear.weight"].dtype == torch.int8 and not {"w", "1.w"} & tensors.keys()
    assert ("linear.bias" in tensors) is (name == "linear") and "b" not in tensors
    assert (path / "weights.safetensors").stat().st_size < 256 * 256 + 16384  # 4 bits each, where floats have 32


def test_a_float_weight_stays_one(tmp_path):
    for i, rule in enumerate((Rule(name="linear", weight_bits=32), Rule(name="linear", activation_bits=32))):
        qmodel = trained(Products(PRODUCTS["standardized"]), torch.randn(5, 6), BitPolicy((rule, Rule())))
        loaded(qmodel, Products(PRODUCTS["standardized"]), torch.randn(5, 6), tmp_path / str(i))
    qmodel = trained(Products(PRODUCTS["linear"]), torch.randn(5, 6), BitPolicy((Rule(name="first"),)))
    loaded(qmodel, Products(PRODUCTS["linear"]), torch.randn(5, 6), tmp_path / "float")
    assert quantized(qmodel) == ["first"] and type(qmodel.linear) is FunctionalLayer


def test_the_first_batch_names_a_functional_layer():
    qmodel = quantize(nn.Sequential(nn.Identity(), Calling(TF.linear, 6, 6)), POLICY)
    with pytest.raises(ApotfxError, match="first training batch: the input of layer 1.linear is not finite"):
        qmodel(torch.full((2, 6), torch.nan))


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize("model", [Calling(TF.linear, 6, 6), nn.Linear(6, 6)], ids=["function", "module"])
def test_an_input_that_is_not_float_is_refused_by_name(dtype, model):
    qmodel = quantize(nn.Sequential(nn.Identity(), model), POLICY)
    with pytest.raises(ApotfxError, match=rf"layer 1(.linear)?: its input is {dtype}, expected a floating-point type"):
        qmodel(torch.ones(2, 6, dtype=dtype))


# Parametrizations.


class Symmetric(nn.Module):
    def forward(self, w):
        return w.triu() + w.triu(1).mT


class Positive(nn.Module):
    def forward(self, b):
        return b.abs()


def parametrized(key, parametrization):
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, key, parametrization)
    return layer


PARAMETRIZED = {
    "weight_norm": lambda: parametrizations.weight_norm(nn.Linear(6, 6)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(6, 6)),
    "spectral_norm": lambda: parametrizations.spectral_norm(nn.Linear(6, 6)),
    "symmetric": lambda: parametrized("weight", Symmetric()), "bias": lambda: parametrized("bias", Positive()),
}  # fmt: skip


@pytest.mark.parametrize("make", PARAMETRIZED.values(), ids=PARAMETRIZED)
def test_parametrized_layers(make, tmp_path):
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), make())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    qmodel, names = cycle(model, torch.randn(5, 6), tmp_path)
    assert names == ["0", "2"] and before.keys() <= qmodel.state_dict().keys()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    check_equal(copy.deepcopy(qmodel), qmodel, torch.randn(5, 6))


def test_the_quantized_weight_is_the_parametrized_one():
    qmodel = trained(nn.Sequential(parametrized("weight", Symmetric()), nn.Linear(6, 2)), torch.randn(5, 6))
    n, _ = qmodel.get_submodule("0").integer_weight()
    assert torch.equal(n, n.mT) and len(n.unique()) > 3
    assert not torch.equal(
        *(f(qmodel.get_parameter("0.parametrizations.weight.original")) for f in (torch.clone, torch.t))
    )


@pytest.mark.parametrize("make", [
    lambda: parametrizations.weight_norm(nn.Conv2d(2, 6, 3, groups=2)),
    lambda: parametrizations.weight_norm(nn.ConvTranspose2d(2, 6, 3, groups=2), dim=1),
], ids=["conv", "transposed"])  # fmt: skip
def test_parametrized_convolutions(make, tmp_path):
    cycle(nn.Sequential(make(), nn.ReLU(), nn.Conv2d(6, 2, 1)), torch.randn(2, 2, 6, 6), tmp_path, CHANNEL)


def pruned():
    return prune.random_unstructured(nn.Linear(6, 6), "weight", 0.5)


def normed():
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(6, 6))


@pytest.mark.parametrize("make", [pruned, normed])
@pytest.mark.parametrize("do", [quantize, plan])
def test_weights_that_a_hook_sets_are_refused_by_name(do, make):
    with pytest.raises(ApotfxError, match="model: weight of 1.0 is the result of a computation; if a hook sets it"):
        do(nn.Sequential(nn.Linear(6, 6), nn.Sequential(make())), POLICY)


def test_a_pruned_layer_whose_hook_is_removed_is_a_layer(tmp_path):
    layer = pruned()
    prune.remove(layer, "weight")
    assert cycle(nn.Sequential(layer, nn.Linear(6, 2)), torch.randn(5, 6), tmp_path)[1] == ["0", "1"]


@pytest.mark.parametrize("do", [quantize, plan])
def test_lazy_layers_are_layers_once_they_have_shapes(do):
    model, x = (
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyConvTranspose2d(2, 3), nn.LazyBatchNorm2d()),
        torch.randn(2, 3, 6, 6),
    )
    with pytest.raises(
        ApotfxError, match="model: 0.weight is lazy and has no shape yet; run the model on a batch first"
    ):
        do(model, POLICY)
    model(x)
    done = do(model, POLICY)
    assert [row.quantized for row in (done if do is plan else record_of(done)["plan"]).layers] == [True, True]


# Subclasses.


class Plain(nn.Conv2d):
    pass


class Standardizing(nn.Conv2d):
    def forward(self, x):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return TF.conv2d(x, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Doubling(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


@pytest.mark.parametrize("make, name", [
    (Plain, "1"), (Standardizing, "1.conv2d"), (Doubling, "1.conv2d"),
    (lambda *args, **kwargs: Doubling(*args, padding_mode="circular", **kwargs), "1.conv2d"),
], ids=["plain", "standardizing", "doubling", "doubling-circular"])  # fmt: skip
def test_subclasses(make, name, tmp_path):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), make(4, 4, 3, padding=1))
    qmodel, names = cycle(model, torch.randn(2, 2, 6, 6), tmp_path)
    assert names == ["0", name] and model.state_dict().keys() <= qmodel.state_dict().keys()


def test_a_subclass_computes_what_its_base_does():
    models = [
        nn.Sequential(nn.Conv2d(2, 4, 3), cls(4, 4, 3), nn.Flatten(), nn.Linear(16, 2)) for cls in (nn.Conv2d, Plain)
    ]
    models[1].load_state_dict(models[0].state_dict())
    x = torch.randn(2, 2, 6, 6)
    check_equal(*(trained(model, x) for model in models), x)


# Weights that are shared.


def tied():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    return model


def test_layers_that_share_their_weight_share_its_quantizer(tmp_path):
    qmodel, _ = cycle(tied(), torch.randn(5, 6), tmp_path)
    first, second = (qmodel.get_submodule(name) for name in ("0", "2"))
    assert first.weight is second.weight and first.weight_quantizer is second.weight_quantizer
    assert first.input_quantizer is not second.input_quantizer
    copied = copy.deepcopy(qmodel)
    assert copied.get_submodule("0").weight_quantizer is copied.get_submodule("2").weight_quantizer


@pytest.mark.parametrize("key, value", [("weight_bits", 3), ("scheme", "uniform"), ("normalization", "none")])
def test_a_shared_weight_at_two_kinds_of_levels_is_refused(key, value):
    message = (
        r"layer 2 \(rule \*\): shares its weight with 0 \(rule name=0\); the policy must give both the same scheme, "
        "weight_bits and normalization"
    )
    with pytest.raises(ApotfxError, match=message):
        quantize(tied(), BitPolicy((Rule(name="0", **{key: value}), Rule())))


@pytest.mark.parametrize("rules", [
    (Rule(name="0", granularity="channel"), Rule()), (Rule(name="0", weight_bits=32), Rule()),
    (Rule(name="2"), Rule(name="4")), (Rule(name="0", activation_bits=8, scheme="uniform"), Rule(scheme="uniform")),
], ids=["granularity", "float-weight", "float", "input-bits"])  # fmt: skip
def test_what_else_may_differ(rules, tmp_path):
    cycle(tied(), torch.randn(5, 6), tmp_path, BitPolicy(rules))


def test_an_embedding_that_is_the_last_layer_too(tmp_path):
    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.middle, self.head = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 9, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, tokens):
            return self.head(torch.relu(self.middle(self.embedding(tokens))))

    qmodel, names = cycle(Language(), torch.randint(0, 9, (3, 4)), tmp_path)
    assert names == ["middle", "head"] and qmodel.head.weight is qmodel.embedding.weight


def test_a_module_with_two_names_is_one_layer(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.last = nn.Linear(6, 6), nn.Linear(6, 2)
            self.b = self.a

        def forward(self, x):
            return self.last(self.b(torch.relu(self.a(x))))

    x = torch.randn(5, 6)
    qmodel, names = cycle(Two(), x, tmp_path)
    assert names == ["a", "last"] and calls(qmodel, x) == ["a", "a", "last"]
