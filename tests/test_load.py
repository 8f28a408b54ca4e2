import re

import pytest
import torch
from cycle_helpers import CHANNEL, cycle, loaded
from cycle_helpers import trained as trained_on
from helpers import INPUT_SHAPES, MIXED, Net, check_equal, data, edit_manifest, export_and_compare, policy, trained
from torch import nn

from apotfx import ApotfxError, BitPolicy, calibrate, quantize
from apotfx.integer.format import export_integer, read_integer
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.load import load_integer
from apotfx.layers import QuantLayer


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("scheme", ["apot", "uniform", "pot"])
def test_the_loaded_network_equals_the_exported_one(scheme, bits, tmp_path):
    widest = {"pot": 4}.get(scheme, 8)  # unsigned inputs of pot have at most 4 bits
    qmodel, model = trained(policy(scheme=scheme, weight_bits=min(bits, widest + 1), activation_bits=min(bits, widest)))
    export_and_compare(tmp_path, qmodel, model, data())


@pytest.mark.parametrize("model_type", INPUT_SHAPES)
@pytest.mark.parametrize("rule", [
    {}, {"granularity": "channel"}, {"normalization": "none", "granularity": "channel"},
    {"normalization": "standardize"},
    {"scheme": "uniform", "weight_bits": 8, "activation_bits": 8},
    {"scheme": "apot", "weight_bits": 8, "activation_bits": 8},
    {"activation_bits": 32}, {"weight_bits": 32}, {"granularity": "channel", "activation_bits": 32},
], ids=lambda rule: "-".join(map(str, rule.values())) or "default")  # fmt: skip
def test_every_kind_of_layer_and_rule(model_type, rule, tmp_path):
    qmodel, model = trained(policy(**rule), model_type)
    export_and_compare(tmp_path, qmodel, model, data(model_type))


def test_a_mixed_policy(tmp_path):
    qmodel, model = trained(MIXED)
    imodel = export_and_compare(tmp_path, qmodel, model, data())
    types = {name: type(module) for name, module in imodel.named_modules()}
    integers = {name for name, kind in types.items() if kind is IntegerLayer}
    assert integers == {"conv1", "conv3", "pointwise", "fc"} and types["conv2"] is nn.Conv2d
    assert [imodel.get_submodule(name).levels.dtype for name in ("conv1", "conv3", "pointwise", "fc")] == [
        torch.int8, torch.int16, torch.float32, torch.int8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"padding_mode": "reflect"}, {"stride": 2}], ids=lambda o: next(iter(o))
)
def test_options_of_layers(options, tmp_path):
    qmodel, model = trained(policy(), **options)
    export_and_compare(tmp_path, qmodel, model, data())


def test_an_export_in_training_mode_is_the_same(tmp_path):
    qmodel, model = trained(MIXED)
    path = export_integer(qmodel.train(), tmp_path / "export")
    assert qmodel.training
    check_equal(qmodel.eval(), load_integer(path, model), data())


def test_dropout_that_depends_on_the_mode_is_off_after_loading(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x), training=self.training))

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for name, training in (("training", True), ("evaluation", False)):
        model = Dropping().train(training)
        qmodel = calibrate(quantize(model, policy()), [x]).eval()
        check_equal(qmodel, load_integer(export_integer(qmodel, tmp_path / name), model), x)


def test_tied_float_weights_are_exported(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        model[2].weight = model[0].weight
        return model

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    qmodel = calibrate(quantize(make(), policy(name="4")), [x]).eval()
    export_and_compare(tmp_path, qmodel, make(), x)


def test_weights_in_channels_last_are_exported(tmp_path):
    qmodel, model = trained(policy())
    expected = qmodel(data())
    path = export_integer(qmodel.to(memory_format=torch.channels_last), tmp_path / "export")
    assert torch.equal(load_integer(path, model)(data()), expected)


def test_loading_leaves_the_model_and_its_values_alone(tmp_path):
    qmodel, _ = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "export")
    torch.manual_seed(9)
    other = Net()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    imodel = load_integer(path, other)
    check_equal(qmodel, imodel, data())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert other.training and type(other.conv1) is nn.Conv2d
    assert not imodel.training and not any(parameter.requires_grad for parameter in imodel.parameters())
    assert str(load_integer(str(path), other)) == str(imodel)


def test_hooks_of_the_float_model_go_on_working(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [torch.rand(8, 4)]).eval()
    export_integer(qmodel, tmp_path / "out")
    x = torch.rand(3, 4)
    assert torch.equal(load_integer(tmp_path / "out", model)(x), qmodel(x))


class Extra(Net):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x) + self.shift


class WithoutBatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.Identity()


class Subclassed(nn.Linear):
    """Traced through, so that no layer of the name is left."""

    def forward(self, input):
        return super().forward(input) + 1


def with_layer(name, layer):
    model = Net()
    setattr(model, name, layer)
    return model


@pytest.mark.parametrize("make, message", [
    (lambda: Net(classes=4), r"layer fc has shape \[3, 4\], in the model \[4, 4\]"),
    (lambda: Net(bias=False), "layer fc has bias True, in the model False"),
    (lambda: Net(stride=2),
     r"layer conv1 has operator .*'stride': \[1, 1\].*, in the model .*'stride': \[2, 2\].*"),
    (lambda: Net(padding_mode="reflect"), "layer conv3 has pad_mode circular, in the model reflect"),
    (lambda: Net(padding_mode="zeros"),
     r"layer conv3 has operator .*'padding': \[0, 0\].*, in the model .*'padding': \[1, 1\].*"),
    (lambda: with_layer("fc", nn.Conv1d(4, 3, 1)), "layer fc has type Linear, in the model Conv1d"),
    (lambda: with_layer("pointwise", nn.ConvTranspose2d(6, 4, 1)),
     "layer pointwise has type Conv2d, in the model ConvTranspose2d"),
    (lambda: with_layer("conv2", nn.Conv2d(6, 6, 3, padding="same")),
     r"conv2.weight is float32 \[6, 3, 3, 3\], the model has float32 \[6, 6, 3, 3\]"),
    (lambda: with_layer("conv2", nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False)),
     r"conv2.bias is float32 \[6\], the model has absent"),
    (WithoutBatchNorm, r"bn1.multiplier is float32 \[6\], the model has absent"),
    (Extra, r"shift is absent, the model has float32 \[3\]"),
    (lambda: with_layer("fc", Subclassed(4, 3)), "layer fc has type Linear, in the model (Module|Subclassed)"),
    (lambda: Net().double(), r"bn1.multiplier is float32 \[6\], the model has float64 \[6\]"),
    (lambda: nn.Sequential(nn.Linear(4, 3)), "layer conv1 is not in the model"),
    (lambda: quantize(Net(), MIXED), "layer conv1 has type Conv2d, in the model QuantConv2d"),
], ids=[
    "shape", "bias", "stride", "padding-mode", "padding", "type", "transposed", "float-shape", "float-bias",
    "batch-norm", "extra", "subclass", "double", "other", "quantized",
])  # fmt: skip
def test_another_model_is_refused(make, message, exported):
    with pytest.raises(
        ApotfxError, match=f"export {re.escape(str(exported[0]))}: {message}; pass the .*model that was exported"
    ):
        load_integer(exported[0], make())


def test_what_is_no_model_is_refused(exported):
    with pytest.raises(ApotfxError, match="model: expected a torch.nn.Module, got str"):
        load_integer(exported[0], "resnet18")


def test_the_exports_that_the_refusals_start_from_are_fine(exported):
    path, model, other = exported
    assert isinstance(load_integer(path, model).fc, IntegerLayer)
    assert not torch.equal(read_integer(path)[1]["fc.weight"], read_integer(other)[1]["fc.weight"])
    assert not any(isinstance(module, QuantLayer) for module in load_integer(other, model).modules())


@pytest.mark.parametrize("rectifier", [None, [0.0, 6.0], [None, None]], ids=str)
def test_another_activation_function_than_the_models_is_refused(rectifier, export, exported):
    edit_manifest(export, lambda manifest: manifest["layers"][2].update(rectifier=rectifier), sign=True)
    expected = rf"the input of layer pointwise is clamped to {re.escape(str(rectifier))}, in the model to "
    with pytest.raises(ApotfxError, match=expected):
        load_integer(export, exported[1])


# Every kind of layer, from its first training step to the integers.

KINDS = {"conv1d": (nn.Conv1d, (3, 4, 9)), "conv2d": (nn.Conv2d, (2, 4, 7, 8)), "conv3d": (nn.Conv3d, (2, 4, 5, 6, 5))}
GEOMETRIES = {
    "plain": {}, "strided": {"stride": 2, "padding": 1}, "grouped": {"groups": 2}, "depthwise": {"groups": 4},
    "dilated": {"dilation": 2, "padding": 1}, "same": {"padding": "same", "dilation": 2}, "no-bias": {"bias": False},
    "circular": {"padding": 1, "padding_mode": "circular"}, "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": "same", "padding_mode": "replicate"},
}  # fmt: skip


def two_layers(kind, geometry):
    make, shape = KINDS[kind]
    return nn.Sequential(make(4, 8, 3, **geometry), nn.ReLU(), make(8, 2, 1)), torch.randn(shape)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_every_geometry_the_whole_way(kind, geometry, tmp_path):
    torch.manual_seed(0)
    model, x = two_layers(kind, geometry)
    qmodel, names = cycle(model, x, tmp_path, CHANNEL)
    assert names == ["0", "2"]
    loaded(qmodel, model, x[0], tmp_path / "unbatched")


@pytest.mark.parametrize("kind", KINDS)
def test_the_onednn_backend_is_equal_or_the_reference(kind, tmp_path):
    torch.manual_seed(0)
    model, x = two_layers(kind, {"padding": 1})
    qmodel = trained_on(model, x)
    for i, inputs in enumerate((x, x[0])):
        loaded(qmodel, model, inputs, tmp_path / str(i), "onednn")


def test_a_subclass_loads_as_its_base(tmp_path):
    class Plain(nn.Linear):
        pass

    torch.manual_seed(0)
    qmodel = trained_on(nn.Sequential(Plain(4, 4), nn.ReLU(), Plain(4, 2)), torch.randn(3, 4))
    plain = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    loaded(qmodel, plain, torch.randn(3, 4), tmp_path)
