import copy
from contextlib import nullcontext

import pytest
import torch
from helpers import level_set_id, nearest_level, weight_in_clip_units
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from apotfx import ApotfxError, LevelSet
from apotfx import functional as F
from apotfx.clips import fit_clip
from apotfx.layers import (
    QUANT_LAYERS,
    FunctionalLayer,
    Geometry,
    QuantConv1d,
    QuantConv2d,
    QuantConv3d,
    QuantConvTranspose1d,
    QuantConvTranspose2d,
    QuantConvTranspose3d,
    QuantFunctional,
    QuantLayer,
    QuantLinear,
    float_type_of,
    kind_of,
)
from apotfx.quantizers import InputQuantizer, WeightQuantizer

LEVELS_X, LEVELS_W = LevelSet("apot", 4, False), LevelSet("apot", 4)

LAYERS = {
    "conv1d": (lambda **k: nn.Conv1d(4, 6, 3, **k), (3, 4, 11)),
    "conv2d": (lambda **k: nn.Conv2d(4, 6, (3, 2), **k), (3, 4, 7, 8)),
    "conv3d": (lambda **k: nn.Conv3d(2, 3, 3, **k), (2, 2, 5, 6, 5)),
}
GEOMETRIES = {
    "plain": {}, "strided": {"stride": 2, "padding": 1}, "grouped": {"groups": 2},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"}, "same-dilated": {"padding": "same", "dilation": 2},
    "valid": {"padding": "valid"},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": 1, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate"},
    "same-reflect": {"padding": "same", "padding_mode": "reflect"},
    "no-bias": {"bias": False},
}  # fmt: skip


def quantized(layer, levels_w=LEVELS_W, levels_x=LEVELS_X, *, per_channel=False, normalization="rescale", factor=1.0):
    weights = inputs = None
    if levels_w is not None:
        weight = Geometry.of(layer).operator.from_parameter(layer.weight)
        weights = WeightQuantizer(levels_w, weight, per_channel=per_channel, normalization=normalization)
    if levels_x is not None:
        inputs = InputQuantizer(levels_x)
    return QUANT_LAYERS[float_type_of(layer)].from_float(layer, weights, inputs, factor)


def fitted(layer, x):
    """`layer` with clips that fit its weight and x."""
    if layer.weight_quantizer is not None:
        quantizer = layer.weight_quantizer
        quantizer.set_clip(fit_clip(weight_in_clip_units(layer), quantizer.levels, quantizer.clip.shape))
    if layer.input_quantizer is not None:
        layer.input_quantizer.set_clip(fit_clip(x, layer.input_quantizer.levels, torch.Size([])))
    return layer


def fake_quantized(x, clip, levels):
    return nearest_level((x * levels.max / clip).clamp(-levels.max, levels.max), levels) * clip / levels.max


def random(*shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")  # of the float layer
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("batched", [True, False], ids=["batched", "unbatched"])
def test_convolutions_equal_those_of_quantized_values(kind, geometry, batched):
    make, shape = LAYERS[kind]
    if kind == "conv3d":
        geometry = {**geometry, "groups": 1}
    layer = make(**geometry).double().eval()
    x = random(*shape if batched else shape[1:], dtype=torch.float64)
    quant = fitted(quantized(layer, normalization="none").double(), x)
    reference = copy.deepcopy(layer)
    reference.weight.data = fake_quantized(layer.weight.data, quant.weight_quantizer.clip.data, LEVELS_W)
    with torch.no_grad():
        expected = reference(fake_quantized(x, quant.input_quantizer.clip, LEVELS_X))
        y = quant(x)
    assert y.shape == expected.shape
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (0, 5)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_linear_equals_that_of_quantized_values(shape, bias):
    layer = nn.Linear(5, 4, bias=bias).double().eval()
    x = random(*shape, dtype=torch.float64)
    quant = fitted(quantized(layer, normalization="none").double(), random(9, 5))
    weight = fake_quantized(layer.weight, quant.weight_quantizer.clip, LEVELS_W)
    expected = nn.functional.linear(fake_quantized(x, quant.input_quantizer.clip, LEVELS_X), weight, layer.bias)
    torch.testing.assert_close(quant(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalization", ["none", "rescale", "standardize"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_every_normalization_computes_its_formula(normalization, per_channel):
    layer = nn.Conv2d(4, 6, 3).double().eval()
    layer.weight.data += 0.3
    x = random(2, 4, 6, 6, dtype=torch.float64)
    quant = fitted(quantized(layer, normalization=normalization, per_channel=per_channel).double(), x)
    w, clip = layer.weight.data, quant.weight_quantizer.clip.data
    weight = {
        "none": lambda: fake_quantized(w, clip, LEVELS_W),
        "rescale": lambda: fake_quantized(w / w.std(), clip, LEVELS_W) * w.std(),
        "standardize": lambda: fake_quantized((w - w.mean()) / w.std(), clip, LEVELS_W),
    }[normalization]()
    expected = torch.conv2d(fake_quantized(x, quant.input_quantizer.clip.data, LEVELS_X), weight, layer.bias)
    torch.testing.assert_close(quant(x), expected, rtol=1e-12, atol=1e-12)
    n, scale = quant.integer_weight()
    torch.testing.assert_close(n * scale, weight, rtol=1e-12, atol=1e-12)
    assert torch.equal(n, n.round()) and not scale.requires_grad


@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
@pytest.mark.parametrize("normalization", ["none", "rescale"])
@pytest.mark.parametrize("scheme", ["uniform", "apot"])
def test_8_bits_keep_the_function(kind, normalization, scheme):
    make, shape = LAYERS.get(kind, (lambda: nn.Linear(8, 6), (64, 8)))
    layer = make().eval()
    layer.weight.data += layer.weight.std()  # a mean that matters
    x = random(*shape).relu()
    levels = LevelSet(scheme, 8, False), LevelSet(scheme, 8)
    quant = fitted(quantized(layer, levels[1], levels[0], normalization=normalization), x)
    with torch.no_grad():
        y, expected = quant(x), layer(x)
    # Half a step, of 1/127 and 1/255 of the clip, or of apot's coarsest gap, is that small beside the values.
    assert (y - expected).norm() < {"uniform": 0.01, "apot": 0.04}[scheme] * expected.norm()


def test_standardizing_changes_scale_and_offset_only():
    """What a batch norm behind the layer absorbs: y_float = std * y + mean * sum of the inputs."""
    layer = nn.Linear(8, 6, bias=False).eval()
    layer.weight.data += 0.5
    x = random(64, 8).relu()
    levels = LevelSet("uniform", 8, False), LevelSet("uniform", 8)
    quant = fitted(quantized(layer, levels[1], levels[0], normalization="standardize"), x)
    with torch.no_grad():
        restored = quant(x) * layer.weight.std() + layer.weight.mean() * x.sum(1, keepdim=True)
        assert (restored - layer(x)).norm() < 0.01 * layer(x).norm()
        assert (quant(x) - layer(x)).norm() > 0.5 * layer(x).norm()


@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("levels", [LEVELS_W, LevelSet("uniform", 8), LevelSet("apot", 8)], ids=level_set_id)
def test_evaluation_is_scale_times_integers(kind, per_channel, levels):
    make, shape = LAYERS.get(kind, (lambda: nn.Linear(5, 4), (3, 5)))
    layer, x = make().eval(), random(*shape)
    levels_x = LevelSet(levels.scheme, levels.bits, False)
    quant = fitted(quantized(layer, levels, levels_x, per_channel=per_channel), x)
    n_w, scale_w = quant.integer_weight()
    n_x = quant.input_quantizer.encode(x)
    accumulators = (torch.conv1d, torch.conv2d, torch.conv3d)[x.dim() - 3] if kind != "linear" else nn.functional.linear
    accumulators = accumulators(n_x.double(), n_w.double())
    assert torch.equal(accumulators, accumulators.round()) and accumulators.abs().max() > 0
    channels = (-1, *(1 for _ in shape[2:])) if kind != "linear" else (-1,)
    scale = quant.input_quantizer.scale * scale_w
    expected = accumulators.float() * (scale.reshape(channels) if per_channel else scale)
    with torch.no_grad():
        assert torch.equal(quant(x), expected + layer.bias.reshape(channels))


@pytest.mark.parametrize("kind", [*LAYERS, "linear"])
def test_training_and_evaluation_compute_the_same(kind):
    make, shape = LAYERS.get(kind, (lambda: nn.Linear(5, 4), (3, 5)))
    x = random(*shape)
    quant = fitted(quantized(make()), x)
    # Up to rounding, as in training the scale may be multiplied into the weight.
    torch.testing.assert_close(quant.train()(x), quant.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("levels_w, levels_x", [(LEVELS_W, None), (None, LEVELS_X), (None, None)],
                         ids=["weight-only", "input-only", "float"])  # fmt: skip
def test_operands_without_quantizer_stay_float(levels_w, levels_x):
    layer, x = nn.Linear(5, 4).double(), random(3, 5, dtype=torch.float64)
    quant = fitted(quantized(layer, levels_w, levels_x, normalization="none").double(), x)
    weight = layer.weight if levels_w is None else fake_quantized(layer.weight, quant.weight_quantizer.clip, levels_w)
    inputs = x if levels_x is None else fake_quantized(x, quant.input_quantizer.clip, levels_x)
    torch.testing.assert_close(quant(x), nn.functional.linear(inputs, weight, layer.bias), rtol=1e-12, atol=1e-12)


# From a float layer.


@pytest.mark.parametrize("layer, expected", [
    (nn.Conv1d(1, 1, 1), QuantConv1d), (nn.Conv2d(1, 1, 1), QuantConv2d), (nn.Conv3d(1, 1, 1), QuantConv3d),
    (nn.ConvTranspose1d(1, 1, 1), QuantConvTranspose1d), (nn.ConvTranspose2d(1, 1, 1), QuantConvTranspose2d),
    (nn.ConvTranspose3d(1, 1, 1), QuantConvTranspose3d), (nn.Linear(1, 1), QuantLinear),
], ids=["conv1d", "conv2d", "conv3d", "transposed1d", "transposed2d", "transposed3d", "linear"])  # fmt: skip
def test_every_type_has_its_quantized_type(layer, expected):
    quant = quantized(layer)
    assert type(quant) is expected and isinstance(quant, QuantLayer) and isinstance(quant, type(layer))


def test_from_float_keeps_parameters_hooks_and_mode():
    layer = nn.Conv2d(3, 4, 3).eval()
    layer.weight.requires_grad_(False)
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("after"))
    layer.register_forward_pre_hook(lambda *_: calls.append("before"))
    quant = quantized(layer)
    assert quant.weight is layer.weight and quant.bias is layer.bias and not quant.weight.requires_grad
    assert not quant.training and not quant.weight_quantizer.training and not quant.input_quantizer.training
    quant(random(1, 3, 5, 5))
    assert calls == ["before", "after"]
    assert quantized(layer.train()).input_quantizer.training


def test_from_float_leaves_the_layer_as_it_is():
    layer = nn.Conv2d(3, 4, 3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    quant = quantized(layer)
    quant.register_buffer("extra", torch.ones(1))
    quant.register_forward_hook(lambda *_: None)
    assert type(layer) is nn.Conv2d and list(layer.children()) == [] and not layer._forward_hooks
    assert layer.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert not hasattr(layer, "geometry")


def test_from_float_adds_to_the_state_dict():
    assert sorted(quantized(nn.Linear(2, 2)).state_dict()) == [
        "bias", "input_quantizer.clip", "weight", "weight_quantizer.clip",
    ]  # fmt: skip


class Shifted(nn.Linear):
    def forward(self, input):
        return super().forward(input) + 1


@pytest.mark.parametrize("layer, cls, message", [
    (Shifted(2, 2), QuantLinear, "QuantLinear replaces Linear, got Shifted"),
    (nn.Conv1d(1, 1, 1), QuantConv2d, "QuantConv2d replaces Conv2d, got Conv1d"),
    (nn.ConvTranspose2d(1, 1, 1), QuantConv2d, "QuantConv2d replaces Conv2d, got ConvTranspose2d"),
    (quantized(nn.Linear(2, 2)), QuantLinear, "QuantLinear replaces Linear, got QuantLinear"),
], ids=["subclass", "dimension", "transposed", "quantized"])  # fmt: skip
def test_other_types_are_refused(layer, cls, message):
    with pytest.raises(ApotfxError, match=message):
        cls.from_float(layer, None, None)


def test_the_input_may_be_passed_by_name():
    quant, x = fitted(quantized(nn.Linear(5, 4)), random(3, 5)), random(3, 5)
    assert torch.equal(quant(input=x), quant(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("normalization", ["none", "rescale", "standardize"])
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_dtype_of_the_layer_is_kept(dtype, normalization, per_channel, training):
    layer = nn.Conv2d(3, 4, 3).to(dtype).train(training)
    x = random(2, 3, 5, 5).abs().to(dtype).requires_grad_()
    quant = quantized(layer, normalization=normalization, per_channel=per_channel)
    y = quant(x)
    y.sum().backward()
    assert y.dtype == x.grad.dtype == quant.weight.grad.dtype == dtype


# Training.


def test_the_first_training_batch_sets_the_clips_once():
    layer, x = nn.Conv2d(3, 4, 3), random(2, 3, 6, 6).abs()
    quant = quantized(layer, per_channel=True)
    quant.eval()(x)
    assert quant.input_quantizer.needs_data() and quant.weight_quantizer.needs_data()
    quant.train()(x)
    weight = weight_in_clip_units(quant)
    assert torch.equal(quant.input_quantizer.clip.detach(), fit_clip(x, LEVELS_X, torch.Size([])))
    assert torch.equal(quant.weight_quantizer.clip.detach(), fit_clip(weight, LEVELS_W, torch.Size([4, 1, 1, 1])))
    assert not quant.input_quantizer.needs_data() and not quant.weight_quantizer.needs_data()
    clips = [p.clone() for p in (quant.input_quantizer.clip, quant.weight_quantizer.clip)]
    quant(100 * x)
    assert torch.equal(quant.input_quantizer.clip, clips[0]) and torch.equal(quant.weight_quantizer.clip, clips[1])


def looked_at(quant, x, how):
    with {"no-grad": torch.no_grad, "inference": torch.inference_mode, "evaluation": nullcontext}[how]():
        quant.train(how != "evaluation")(x)


@pytest.mark.parametrize("how", ["no-grad", "inference", "evaluation"])
def test_only_a_training_step_with_gradients_sets_clips(how):
    quant, x = quantized(nn.Linear(5, 4), per_channel=True), random(3, 5).abs()
    looked_at(quant, x, how)
    assert quant.input_quantizer.has_placeholder() and quant.weight_quantizer.has_placeholder()
    quant.train()(x)
    clips = [quantizer.clip.clone() for quantizer in (quant.input_quantizer, quant.weight_quantizer)]
    looked_at(quant, 5 * x, how)
    assert torch.equal(quant.input_quantizer.clip, clips[0]) and torch.equal(quant.weight_quantizer.clip, clips[1])


@pytest.mark.parametrize("nothing", [torch.zeros(2, 5), torch.empty(0, 5)], ids=["zeros", "empty"])
def test_a_batch_of_nothing_sets_no_clip(nothing):
    """Nor do optimizers move the placeholder, by decay; and what was computed before the clips are set has gradients."""
    quant, x = quantized(nn.Linear(5, 4)), random(3, 5).abs()
    optimizer = torch.optim.AdamW(quant.parameters(), lr=0.1, weight_decay=0.5)
    quant(nothing).sum().backward()
    optimizer.step()
    assert quant.input_quantizer.has_placeholder() and quant.weight_quantizer.has_placeholder()
    (quant(nothing).sum() + quant(x).sum()).backward()
    assert not quant.input_quantizer.needs_data() and not quant.weight_quantizer.needs_data()
    assert quant.input_quantizer.clip.grad is not None


@pytest.mark.parametrize("x", [-random(3, 5).abs(), random(3, 5)], ids=["nothing-left", "something-left"])
def test_clips_come_from_what_a_rectifier_leaves(x):
    quant = quantized(nn.Linear(5, 4))
    quant.rectifier = (0.0, torch.inf)
    quant(x)
    assert quant.input_quantizer.needs_data() is not bool((x > 0).any())
    if (x > 0).any():
        assert quant.input_quantizer.clip == fit_clip(x.relu(), LEVELS_X, torch.Size([]))


def test_weights_of_zero_wait_for_others():
    """As the last layer of a branch that begins as the identity."""
    layer = nn.Linear(5, 4)
    nn.init.zeros_(layer.weight)
    quant, x = quantized(layer), random(3, 5).abs()
    optimizer = torch.optim.SGD(quant.parameters(), lr=0.1)
    quant(x).sum().backward()
    assert quant.weight_quantizer.needs_data() and not quant.input_quantizer.needs_data()
    optimizer.step()
    quant(x)
    assert not quant.weight_quantizer.needs_data()


class Checkpointed(nn.Module):
    def __init__(self, use_reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(quantized(nn.Linear(6, 6)) for _ in range(3))
        self.use_reentrant = use_reentrant

    def forward(self, x):
        if self.use_reentrant is None:
            return self.middle(x)
        return checkpoint(self.middle, x, use_reentrant=self.use_reentrant)

    def middle(self, x):
        for layer in (*self.layers, self.layers[0]):
            x = layer(x).relu()
        return x


def gradients_of(net, x):
    y = net(x)
    y.square().sum().backward()
    return y.detach(), {name: parameter.grad.clone() for name, parameter in net.named_parameters()}


def test_activation_checkpointing_before_the_clips_are_set():
    (y, expected), (got_y, got) = (gradients_of(Checkpointed(how), random(4, 6).abs()) for how in (None, False))
    assert torch.equal(got_y, y) and all(torch.equal(got[name], expected[name]) for name in expected)


def test_activation_checkpointing_that_hides_the_first_batch_is_refused():
    net, x = Checkpointed(True), random(4, 6).abs().requires_grad_()
    message = "first training batch: .* is only seen without gradients .*calibrate the network first, or .*use_reentrant=False"
    with pytest.raises(ApotfxError, match=message):
        gradients_of(net, x)
    for layer in net.layers:
        fitted(layer, x)
    plain = copy.deepcopy(net)
    plain.use_reentrant = None
    (y, expected), (got_y, got) = gradients_of(plain, x), gradients_of(net, x)
    assert torch.equal(got_y, y) and all(torch.equal(got[name], expected[name]) for name in expected)


def test_selective_checkpointing_sets_clips():
    def saves(*_, **__):
        return CheckpointPolicy.MUST_SAVE

    plain, net, x = Checkpointed(None), Checkpointed(None), random(4, 6).abs()
    y = checkpoint(net, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(saves))
    assert not any(layer.input_quantizer.needs_data() for layer in net.layers)
    torch.testing.assert_close(y, plain(x))


@pytest.mark.parametrize("again", ["load", "copy"])
def test_that_the_clips_are_set_is_remembered(again):
    x = random(3, 5).abs()
    quant = quantized(nn.Linear(5, 4))
    quant(x)
    if again == "copy":
        other = copy.deepcopy(quant)
    else:
        other = quantized(nn.Linear(5, 4))
        assert other.load_state_dict(quant.state_dict()) == ([], [])
    other(100 * x)
    assert torch.equal(other.input_quantizer.clip, quant.input_quantizer.clip)
    assert torch.equal(other.eval()(x), quant.eval()(x))


def test_a_copy_shares_nothing():
    quant = fitted(quantized(nn.Linear(5, 4)), random(3, 5))
    copied = copy.deepcopy(quant)
    before = quant.eval()(random(3, 5)).clone()
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(-2)
    assert torch.equal(quant(random(3, 5)), before)


def test_mode_reaches_the_quantizers():
    quant = quantized(nn.Linear(5, 4))
    for training in (False, True):
        quant.train(training)
        assert quant.weight_quantizer.training is quant.input_quantizer.training is training


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_a_negative_clip_gives_no_nan(training):
    quant, x = fitted(quantized(nn.Conv2d(3, 4, 3)), random(2, 3, 6, 6)).train(training), random(2, 3, 6, 6)
    with torch.no_grad():
        quant.input_quantizer.clip.fill_(-0.5)
        quant.weight_quantizer.clip.fill_(-2)
    y = quant(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in quant.parameters())


def gradient_of_weight(bits, clip):
    quant = quantized(nn.Linear(5, 4), LevelSet("apot", bits), None)
    quant.weight_quantizer.set_clip(torch.tensor(clip))
    quant(random(3, 5)).square().sum().backward()
    return quant.weight.grad, weight_in_clip_units(quant).abs() > clip


def test_weights_of_2_bits_get_gradients_beyond_the_clip():
    for bits, passed in ((2, True), (3, False)):
        grad, outside = gradient_of_weight(bits, 0.8)
        assert outside.any() and not outside.all()
        assert (grad[outside] != 0).all() == passed and (grad[outside] == 0).all() != passed
        assert (grad[~outside] != 0).all()


def test_the_factor_scales_the_gradients_of_both_clips():
    grads = {}
    for factor in (1.0, 0.25):
        torch.manual_seed(0)
        quant = fitted(quantized(nn.Linear(5, 4), factor=factor), random(3, 5))
        quant(random(3, 5)).square().sum().backward()
        grads[factor] = {name: parameter.grad for name, parameter in quant.named_parameters()}
    for name, grad in grads[1.0].items():
        assert grad.abs().sum() > 0
        assert torch.equal(grads[0.25][name], 0.25 * grad if name.endswith("clip") else grad)


@pytest.mark.parametrize("levels", [LEVELS_X, LevelSet("apot", 8, False)], ids=level_set_id)
def test_training_under_autocast_computes_in_bfloat16_what_that_holds(levels):
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this processor has no bfloat16 kernels that sum in float32")
    x = random(2, 3, 6, 6)
    quant = fitted(quantized(nn.Conv2d(3, 4, 3, bias=False), levels_x=levels), x).train()
    n_x, (n_w, scale_w) = quant.input_quantizer.encode(x), quant.integer_weight()
    scale = quant.input_quantizer.scale * scale_w
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quant(x)
    exact = torch.conv2d(n_x.double(), n_w.double()).float() * scale
    rounded = torch.conv2d(n_x.bfloat16(), (n_w * scale).bfloat16()).float()
    assert y.dtype == torch.float32
    if levels.max <= 256:
        assert torch.equal(y, rounded)
    else:  # wider levels are not exact in bfloat16, so these layers stay in float32
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)
        assert (y - rounded).abs().max() > 1e-4 * y.abs().max()


def test_evaluation_under_autocast_is_exact():
    x = random(2, 3, 6, 6)
    quant = fitted(quantized(nn.Conv2d(3, 4, 3)), x).eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = quant(x)
    assert torch.equal(y, quant(x))


def test_encode_of_a_layer_is_the_one_of_functional():
    x = random(3, 5)
    quant = fitted(quantized(nn.Linear(5, 4)), x)
    expected = F.encode(x, quant.input_quantizer.clip.detach(), F.Levels(LEVELS_X))
    assert torch.equal(quant.input_quantizer.encode(x), expected)


# What a layer computes, by its type.


class Plain(nn.Conv2d):
    pass


class OtherConvolution(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight, bias) + 1


@pytest.mark.parametrize("layer, float_type, kind", [
    (nn.Conv3d(1, 1, 1), nn.Conv3d, "Conv3d"), (nn.ConvTranspose1d(1, 1, 1), nn.ConvTranspose1d, "ConvTranspose1d"),
    (Plain(1, 1, 1), nn.Conv2d, "Conv2d"),
    (nn.modules.linear.NonDynamicallyQuantizableLinear(1, 1), nn.Linear, "Linear"),
    (nn.utils.parametrizations.weight_norm(Plain(1, 1, 1)), nn.Conv2d, "Conv2d"),
    (FunctionalLayer("conv_transpose2d", lambda: torch.ones(1, 1, 1, 1), None), FunctionalLayer, "ConvTranspose2d"),
    (FunctionalLayer("linear", lambda: torch.ones(1, 1), None), FunctionalLayer, "Linear"),
    (Shifted(1, 1), None, None), (OtherConvolution(1, 1, 1), None, None), (nn.ReLU(), None, None),
    (nn.Bilinear(1, 1, 1), None, None), (quantized(nn.Linear(1, 1)), None, None),
], ids=["conv3d", "transposed", "subclass", "attention", "parametrized", "conv_transpose2d", "F.linear",
        "own-forward", "own-convolution", "relu", "bilinear", "quantized"])  # fmt: skip
def test_the_type_that_a_layer_computes_as(layer, float_type, kind):
    assert float_type_of(layer) is float_type
    assert float_type is None or kind_of(layer) == kind


FUNCTIONS = {
    "linear": (nn.Linear(4, 6), {}), "conv1d": (nn.Conv1d(4, 6, 3, padding="same", dilation=2), {}),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), groups=2, stride=2, padding=1), {}),
    "conv3d": (nn.Conv3d(4, 6, 2, padding="valid"), {}),
    "conv_transpose1d": (nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1), {"output_padding": 1}),
    "conv_transpose2d": (nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, padding=1), {}),
}  # fmt: skip


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_functional_layer_is_the_module_with_its_weight_somewhere_else(function):
    module, settings = FUNCTIONS[function]
    for key in ("stride", "padding", "dilation", "groups"):
        if function != "linear" and getattr(module, key) != 1:
            settings[key] = getattr(module, key)
    layer = FunctionalLayer(function, lambda: module.weight, lambda: module.bias, **settings)
    x = random(2, 4, *[7] * (int(function[-2]) if function != "linear" else 0))
    if function == "linear":
        x = random(3, 4)
    assert torch.equal(layer(x), module(x))
    quant = fitted(quantized(module), x).eval()
    functional = QuantFunctional.from_float(layer, quant.weight_quantizer, quant.input_quantizer).eval()
    assert torch.equal(functional(x), quant(x))
    for got, expected in zip(functional.codes_and_accumulators(x), quant.codes_and_accumulators(x), strict=True):
        assert torch.equal(got, expected)
    assert torch.equal(functional.integer_weight()[0], quant.integer_weight()[0])


def test_an_input_of_integers_is_refused_by_name():
    quant = quantized(nn.Linear(5, 4))
    quant.name = "head"
    with pytest.raises(
        ApotfxError, match="layer head: its input is torch.int64, expected a floating-point type; convert"
    ):
        quant(torch.ones(3, 5, dtype=torch.int64))


@pytest.mark.parametrize("which", ["input", "weight"])
def test_a_first_batch_that_is_not_finite_names_the_layer(which):
    quant, x = quantized(nn.Linear(5, 4)), random(3, 5).abs()
    quant.name = "head"
    with torch.no_grad():
        (x if which == "input" else quant.weight)[0, 0] = torch.nan
    with pytest.raises(ApotfxError, match=f"first training batch: the {which} of layer head is not finite; check the"):
        quant(x)
    quant.eval()(random(3, 5))  # in evaluation nothing is fitted
