import math
import sys

import pytest
import torch
from helpers import num_hooks, weight_in_clip_units
from torch import nn
from torch.nn import functional as F

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, quantize
from apotfx.calibrate import correct_biases, reestimate_batch_norms
from apotfx.clips import SAMPLES, fit_clip, sample
from apotfx.layers import QuantFunctional, QuantLayer
from apotfx.state import uncalibrated

PER_TENSOR = torch.Size([])


def model():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4), nn.ReLU(),
        nn.Flatten(), nn.Linear(64, 3),
    )  # fmt: skip


def quantized(**rule):
    return quantize(model(), BitPolicy((Rule(**rule),)))


def batches(n=2):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(4, 1, 8, 8, generator=generator) for _ in range(n)]


def state(qmodel):
    return {name: tensor.clone() for name, tensor in qmodel.state_dict().items()}


def quant_layers(qmodel):
    return [module for module in qmodel.modules() if isinstance(module, QuantLayer)]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_only_clips_change(training):
    qmodel = quantized(granularity="channel").train(training)
    before, modes = state(qmodel), [module.training for module in qmodel.modules()]
    hooks = num_hooks(qmodel)
    layers = [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)]
    assert calibrate(qmodel, batches()) is qmodel
    after = qmodel.state_dict()
    assert list(after) == list(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("clip")}
    assert [module.training for module in qmodel.modules()] == modes
    assert num_hooks(qmodel) == hooks
    assert [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)] == layers
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert not any(quantizer.needs_data() for pair in layers for quantizer in pair)


def inputs_of(qmodel, data):
    """The inputs of every quantized layer, all batches together."""
    inputs = {layer: [] for layer in quant_layers(qmodel)}
    for layer, kept in inputs.items():
        layer.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].detach().clone()))
    for x in data:
        qmodel(x)
    return [torch.cat(kept) for kept in inputs.values()]


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_clips_fit_the_weights_and_the_inputs_that_float_inputs_lead_to(training):
    """In training mode batch norms use the batch."""
    qmodel, weights_only = (quantized(activation_bits=bits).train(training) for bits in (4, 32))
    for module in (*qmodel.modules(), *weights_only.modules()):
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = batches(3)
    calibrate(qmodel, iter(data))
    for layer, x in zip(quant_layers(qmodel), inputs_of(calibrate(weights_only, []), data), strict=True):
        assert torch.equal(layer.input_quantizer.clip, fit_clip(x, layer.input_quantizer.levels, PER_TENSOR))
        weight = weight_in_clip_units(layer)
        assert torch.equal(layer.weight_quantizer.clip, fit_clip(weight, layer.weight_quantizer.levels, PER_TENSOR))


def test_calibration_does_not_depend_on_the_clips_before():
    once, twice = quantized().eval(), quantized().eval()
    calibrate(once, batches())
    calibrate(calibrate(twice, [10 * x for x in batches()]), batches())
    assert all(torch.equal(a, b) for a, b in zip(state(once).values(), state(twice).values(), strict=True))


def test_a_calibrated_model_keeps_its_clips_in_training():
    qmodel = calibrate(quantized(), batches())
    before = [parameter.clone() for name, parameter in qmodel.named_parameters() if name.endswith("clip")]
    qmodel(100 * batches()[0])
    after = [parameter for name, parameter in qmodel.named_parameters() if name.endswith("clip")]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("bits", [{"weight_bits": 32}, {"activation_bits": 32}], ids=["input-only", "weight-only"])
def test_operands_that_stay_float_need_no_clip(bits):
    qmodel = calibrate(quantized(**bits), batches())
    clips = [name for name in qmodel.state_dict() if name.endswith("clip")]
    assert len(clips) == 3 and not uncalibrated(qmodel)


def test_weights_only_need_no_batch():
    calibrate(quantized(activation_bits=32), [])


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x, y):
        return self.a(x) + self.b(y)


@pytest.mark.parametrize(
    "container",
    [lambda x, y: (x, y), lambda x, y: [x, y], lambda x, y: {"y": y, "x": x}],
    ids=["tuple", "list", "dict"],
)
def test_several_inputs(container):
    qmodel = quantize(Sum(), BitPolicy((Rule(),)))
    x, y = torch.randn(8, 2), 100 * torch.randn(8, 2)
    calibrate(qmodel, [container(x, y)])
    assert torch.equal(qmodel.a.input_quantizer.clip, fit_clip(x, LevelSet("apot", 4), PER_TENSOR))
    assert torch.equal(qmodel.b.input_quantizer.clip, fit_clip(y, LevelSet("apot", 4), PER_TENSOR))


@pytest.mark.parametrize(
    "batch, message",
    [
        ({"x": torch.ones(1, 2)}, r"a batch has the parts \['x'\], the model takes \(x, y\) \(missing .* 'y'\)"),
        ({"x": torch.ones(1, 2), "z": torch.ones(1)}, r"the parts \['x', 'z'\]"),
        (torch.ones(1, 2), r"a batch has 1 parts, the model takes \(x, y\)"),
        ((torch.ones(1, 2), "label"), "a batch holds Tensor, str; expected tensors"),
    ],
    ids=["missing", "unknown", "too-few", "no-tensor"],
)
def test_a_batch_that_is_no_input_of_the_model_is_refused(batch, message):
    with pytest.raises(ApotfxError, match=message):
        calibrate(quantize(Sum(), BitPolicy((Rule(),))), [batch])


@pytest.mark.parametrize("batch", [torch.ones(1, 1, 8, 8), {"input": torch.ones(1, 1, 8, 8)}], ids=["tensor", "dict"])
def test_a_single_batch_in_the_place_of_an_iterable_is_refused(batch):
    with pytest.raises(ApotfxError, match=r"expected an iterable of inputs; pass \[x\]"):
        calibrate(quantized(), batch)


def test_minmax_takes_the_largest_magnitude_of_all_values_of_all_batches():
    data = [torch.zeros(2, 1, 400, 400), torch.zeros(2, 1, 8, 8)]
    unseen = next(i for i in range(data[0].numel()) if i not in sample(torch.arange(data[0].numel())))
    data[0].view(-1)[unseen] = -7
    data[1][0] = 3
    assert data[0].numel() > SAMPLES and not sample(data[0]).any()
    qmodel = quantize(nn.Sequential(nn.Conv2d(1, 1, 3)), BitPolicy.default(4))
    calibrate(qmodel, data, method="minmax")
    layer = qmodel.get_submodule("0")
    assert layer.input_quantizer.clip == 7
    assert layer.weight_quantizer.clip == weight_in_clip_units(layer).abs().max()


def test_minmax_of_unsigned_inputs_and_of_weights_per_channel():
    qmodel = quantized(granularity="channel").eval()
    weights_only = calibrate(quantized(granularity="channel", activation_bits=32).eval(), [], method="minmax")
    calibrate(qmodel, batches(), method="minmax")
    for layer, x in zip(quant_layers(qmodel), inputs_of(weights_only, batches()), strict=True):
        quantizer = layer.input_quantizer
        assert quantizer.clip == (x.abs() if quantizer.levels.signed else x).max()
        assert torch.equal(layer.weight_quantizer.clip.flatten(), weight_in_clip_units(layer).abs().flatten(1).amax(1))


@pytest.mark.parametrize("percentile, rank", [(100, 512), (99.9, 512), (99, 507), (50, 256), (0.01, 1)])
def test_percentile_is_a_rank_among_the_magnitudes(percentile, rank):
    qmodel = calibrate(quantized().eval(), batches(2), method="percentile", percentile=percentile)
    layer = qmodel.get_submodule("0")
    magnitudes = torch.cat(batches(2)).abs().flatten().sort().values
    assert len(magnitudes) == 512 and layer.input_quantizer.clip == magnitudes[rank - 1]
    assert torch.equal(
        layer.weight_quantizer.clip, fit_clip(weight_in_clip_units(layer), layer.weight_quantizer.levels, PER_TENSOR)
    )


@pytest.mark.parametrize("percentile", [0, -1, 100.1, math.nan])
def test_a_percentile_out_of_range_is_refused(percentile):
    with pytest.raises(ApotfxError, match=f"percentile {percentile} is out of range; use more than 0, at most 100"):
        calibrate(quantized(), batches(), method="percentile", percentile=percentile)


class Functional(nn.Module):
    """A functional convolution and a functional linear layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.kernel, self.matrix = nn.Parameter(torch.randn(4, 2, 3, 3)), nn.Parameter(torch.randn(3, 4))

    def forward(self, x):
        return F.linear(F.conv2d(x, self.kernel).relu().mean((2, 3)), 2 * self.matrix)


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile", "paper"])
def test_functional_layers_get_the_clips_of_the_weights_they_are_called_with(method):
    model = Functional()
    qmodel = quantize(model, BitPolicy((Rule(normalization="none"),)))
    calibrate(qmodel, [torch.randn(4, 2, 8, 8)], method=method)
    layers = [layer for layer in quant_layers(qmodel) if isinstance(layer, QuantFunctional)]
    for layer, weight in zip(layers, (model.kernel, 2 * model.matrix), strict=True):
        quantizer = layer.weight_quantizer
        expected = fit_clip(weight, quantizer.levels, PER_TENSOR)
        expected = {"minmax": weight.abs().max(), "paper": 3 * weight.std()}.get(method, expected)
        assert torch.equal(quantizer.clip, expected)
        assert not quantizer.needs_data() and not layer.input_quantizer.needs_data()


def test_layers_that_share_a_weight_are_fitted_once(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    qmodel = quantize(model, BitPolicy((Rule(activation_bits=32),)))
    calls = []
    monkeypatch.setattr(
        sys.modules["apotfx.calibrate"], "fit_clip", lambda *args: calls.append(args) or fit_clip(*args)
    )
    calibrate(qmodel, [])
    first, second = quant_layers(qmodel)
    assert first.weight_quantizer is second.weight_quantizer and len(calls) == 1


def test_a_transposed_convolution_has_a_clip_per_output_channel():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 3), nn.ReLU())
    qmodel = quantize(model, BitPolicy((Rule(granularity="channel", normalization="none"),)))
    calibrate(qmodel, [torch.randn(2, 2, 5, 5)], method="minmax")
    clip = qmodel.get_submodule("0").weight_quantizer.clip
    assert torch.equal(clip.flatten(), model[0].weight.abs().amax((0, 2, 3)))


class Branching(nn.Module):
    """Cannot be traced; `extra` is used in training only."""

    def __init__(self):
        super().__init__()
        self.fc, self.extra = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        if x.sum() > 1e9 or self.training:
            return self.extra(self.fc(x))
        return self.fc(x)


class Rotary(nn.Module):
    """Grows a table with the length of its input and notes that length; counts its calls in place."""

    def __init__(self):
        super().__init__()
        self.fc, self.length = nn.Linear(4, 4), 2
        self.register_buffer("table", torch.ones(2, 1))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        if x.shape[1] > self.length:
            self.length = x.shape[1]
            self.register_buffer("table", torch.arange(1.0, 1 + self.length)[:, None])
            self.register_buffer("other", self.table.sin())
        return self.fc(x * self.table[: x.shape[1]])


def test_state_that_forward_grows_is_as_before():
    qmodel = quantize(nn.Sequential(nn.Linear(3, 4), Rotary()), BitPolicy((Rule(),))).eval()
    short, x = torch.randn(2, 2, 3), torch.randn(2, 5, 3)
    calibrate(qmodel, [short, x])
    rotary = qmodel.get_submodule("1")
    assert rotary.length == len(rotary.table) == 2 and rotary.calls == 0 and not hasattr(rotary, "other")
    assert qmodel(x).shape == (2, 5, 4) and rotary.length == len(rotary.table) == 5


def test_layers_of_a_leaf_that_no_batch_reaches_are_left_to_training():
    qmodel = quantize(nn.Sequential(nn.Linear(3, 3), Branching()), BitPolicy((Rule(),))).eval()
    with pytest.warns(UserWarning, match=r"layers 1\.extra: no batch of the calibration reached them") as caught:
        calibrate(qmodel, [torch.randn(4, 3)])
    assert len(caught) == 1 and caught[0].filename == __file__
    extra = qmodel.get_submodule("1.extra").input_quantizer
    assert extra.needs_data() and not qmodel.get_submodule("1.fc").input_quantizer.needs_data()
    qmodel.train()(torch.randn(4, 3))
    assert not extra.needs_data()


class Growing(nn.Module):
    """Holds a table that grows with its input, tensors without memory of their own, and what a run leaves behind."""

    def __init__(self):
        super().__init__()
        self.fc, self.length, self.seen, self.last = nn.Linear(3, 3), 2, [], None
        self.register_buffer("table", torch.arange(2.0))
        self.register_buffer("expanded", torch.tensor(0.5).expand(3))
        self.register_buffer("row", torch.arange(3.0)[None].expand(2, -1))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x):
        if len(x) > self.length:
            self.length = len(x)
            self.register_buffer("table", torch.arange(self.length * 1.0))
        self.seen.append(len(x))
        self.last = x
        self.mean.lerp_(x.detach().mean(0), 0.5)
        return self.fc(x + self.table[: len(x), None] + self.expanded + self.row[0]) - self.mean


def test_what_a_run_changes_is_put_back():
    model = nn.Sequential(nn.Linear(3, 3), Growing())
    qmodel = quantize(model, BitPolicy((Rule(),))).eval()
    growing, before = qmodel.get_submodule("1"), state(qmodel)
    calibrate(qmodel, [torch.randn(n, 3) for n in (2, 4, 7)])
    assert all(torch.equal(t, before[name]) for name, t in qmodel.state_dict().items() if not name.endswith("clip"))
    assert (growing.length, growing.seen, growing.last, growing.table.shape) == (2, [], None, (2,))
    assert qmodel(torch.randn(7, 3)).isfinite().all() and growing.seen == [7]


class Direct(nn.Module):
    """Cannot be traced, and calls the forward of its layer, not the layer."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(3, 3)

    def forward(self, x):
        return self.fc.forward(input=x) if x.isfinite().all() else x


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_a_layer_is_seen_however_it_is_called(method):
    qmodel = quantize(nn.Sequential(nn.Linear(3, 3), Direct()), BitPolicy((Rule(),))).eval()
    calibrate(qmodel, [torch.randn(4, 3)], method=method)
    assert uncalibrated(qmodel) == [] and "forward" not in vars(qmodel.get_submodule("1.fc"))


@pytest.mark.parametrize(
    "net, shape, message",
    [
        (nn.Sequential(nn.Conv1d(2, 3, 3)), (4, 1, 8), r"layer 0: refuses its input \[4, 1, 8\] float32, expected \[N, 2, W\]"),
        (nn.Sequential(nn.Conv2d(2, 3, 3)), (4, 2, 2, 2), r"layer 0: .*expected \[N, 2, H, W\] \(.*[Kk]ernel size"),
        (nn.Sequential(nn.ConvTranspose3d(2, 3, 3)), (4, 3, 2, 2, 2), r"expected \[N, 2, D, H, W\] \("),
        (Functional(), (4, 3, 8, 8), r"layer conv2d: refuses its input \[4, 3, 8, 8\] float32, expected \[N, 2, H, W\]"),
        (nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2)), (4, 2), r"layer 0: .*expected \[N, 3, ...\]"),
        (Sum(), None, r"the model: refuses its input \[4, 2\] float32 and \[3, 2\] float32 \(The size"),
    ],
    ids=["conv1d", "small-image", "transposed", "functional", "batch-norm", "no-layer"],
)  # fmt: skip
def test_a_batch_of_the_wrong_shape_is_refused_by_the_name_of_the_layer(net, shape, message):
    qmodel = quantize(net, BitPolicy((Rule(),)))
    batch, hooks = (torch.randn(4, 2), torch.randn(3, 2)) if shape is None else torch.randn(shape), num_hooks(qmodel)
    with pytest.raises(ApotfxError, match=message) as error:
        calibrate(qmodel, [batch])
    assert "\n" not in str(error.value)
    assert num_hooks(qmodel) == hooks


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.complex64], ids=str)
def test_inputs_that_are_not_floating_point_are_refused(dtype):
    with pytest.raises(ApotfxError, match=f"layer 0: its input is {dtype}, expected a floating-point type"):
        calibrate(quantized(), [torch.ones(1, 1, 8, 8, dtype=dtype)])


def test_an_error_in_the_iterable_passes_through():
    def data():
        yield batches()[0]
        raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="^disk$"):
        calibrate(quantized(), data())


@pytest.mark.parametrize("before", ["fresh", "calibrated", "learned"])
@pytest.mark.parametrize("normalization", ["none", "rescale", "standardize"])
def test_method_paper_sets_its_constants_and_reads_no_batch(normalization, before):
    qmodel = quantized(normalization=normalization, granularity="channel")
    if before != "fresh":
        calibrate(qmodel, batches())
    if before == "learned":
        with torch.no_grad():
            for layer in quant_layers(qmodel):
                layer.weight_quantizer.clip.mul_(1.5)
    assert calibrate(qmodel, None, method="paper") is qmodel
    for layer in quant_layers(qmodel):
        expected = 3 * layer.weight.std() if normalization == "none" else torch.tensor(3.0)
        assert layer.input_quantizer.clip == 8 and (layer.weight_quantizer.clip == expected).all()
    assert not uncalibrated(qmodel)


class Experts(nn.Module):
    """Sends the rows that begin with a positive number to one layer, the others to another."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x):
        goes_left = x[:, 0] > 0
        x = self.stem(x)
        return torch.cat([self.left(x[goes_left]), self.right(x[~goes_left])])


@pytest.mark.parametrize("method", ["mse", "minmax", "percentile"])
def test_an_expert_may_get_nothing_in_some_batches(method):
    x = torch.randn(16, 3)
    x[:8, 0], x[8:, 0] = x[:8, 0].abs() + 0.1, -x[8:, 0].abs()
    clips = []
    for data in ([x[:8], x[8:]], [x]):
        qmodel = calibrate(quantize(Experts(), BitPolicy((Rule(),))), data, method=method)
        assert not uncalibrated(qmodel)
        clips.append([p.detach().clone() for name, p in qmodel.named_parameters() if name.endswith("clip")])
    assert all(map(torch.equal, *clips))


def test_an_expert_that_never_gets_anything_is_left_to_training():
    qmodel = quantize(Experts(), BitPolicy((Rule(),)))
    x = torch.randn(8, 3).abs() + 0.1
    with pytest.warns(UserWarning, match=r"layers right: no batch of the calibration reached them") as caught:
        calibrate(qmodel, [x, x])
    assert len(caught) == 1 and caught[0].filename == __file__
    assert uncalibrated(qmodel) == ["right"] and not qmodel.right.weight_quantizer.has_placeholder()
    qmodel.train()(x)
    assert uncalibrated(qmodel) == ["right"]
    qmodel(-x)
    assert not uncalibrated(qmodel)


def test_batches_without_images_are_refused():
    with pytest.raises(ApotfxError, match="layer 0: its input during calibration is empty; pass at least one image"):
        calibrate(quantized().eval(), [torch.empty(0, 1, 8, 8)])


@pytest.mark.parametrize("training", [False, True], ids=["calibration", "training"])
def test_an_input_that_was_taken_for_non_negative_and_is_not_is_refused(training):
    qmodel = quantize(nn.Sequential(nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2)), BitPolicy((Rule(),)))
    layer, x = qmodel.get_submodule("2"), torch.randn(16, 4)
    layer.sign_reason = "_1 (Sigmoid) is never negative"
    layer.register_forward_pre_hook(lambda _, args: (args[0].clamp(0.5, 0.5) - 1,))
    when = "in the first training batch" if training else "during calibration"
    message = rf"layer 2: {when}, its input reaches -0\.5, expected at least 0 .*\(_1 \(Sigmoid\) is never negative\)"
    with pytest.raises(ApotfxError, match=message) as error:
        qmodel.train()(x) if training else calibrate(qmodel, [x])
    assert "\n" not in str(error.value)


def test_what_a_layer_rectifies_itself_may_be_negative():
    qmodel = quantize(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), BitPolicy((Rule(),)))
    assert qmodel.get_submodule("2").rectifier is not None
    calibrate(qmodel, [torch.randn(16, 4)])


def test_the_plan_hears_of_the_range_of_the_inputs():
    class Plan:
        def with_observed(self, ranges):
            plan = Plan()
            plan.ranges = ranges
            return plan

    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    nn.init.eye_(model[0].weight), nn.init.zeros_(model[0].bias)
    qmodel = quantize(model, BitPolicy((Rule(weight_bits=32),)))
    qmodel.meta["plan"] = Plan()
    calibrate(qmodel, [torch.tensor([[-2.0, 0.0]]), torch.empty(0, 2), torch.tensor([[1.0, 3.0]])])
    assert qmodel.meta["plan"].ranges == {"0": (-2, 3), "2": (0, 3)}


def test_an_unknown_method_is_refused():
    with pytest.raises(
        ApotfxError, match="calibration method 'max': unknown; choose one of mse, minmax, percentile, paper"
    ):
        calibrate(quantized(), batches(), method="max")


@pytest.mark.parametrize("net", [model(), quantize(model(), BitPolicy.default(32))], ids=["float", "all-float-policy"])
def test_a_model_without_quantized_layers_is_refused(net):
    with pytest.raises(
        ApotfxError, match="calibrate: the model has no quantized layer; pass what apotfx.quantize returned"
    ):
        calibrate(net, batches())


def test_no_batch_is_refused():
    with pytest.raises(ApotfxError, match="layer 0: calibration never reached it; pass at least one batch"):
        calibrate(quantized(), [])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused(value):
    data = batches()
    data[1][0, 0, 0, 0] = value
    with pytest.raises(
        ApotfxError, match="layer 0: its input during calibration is not finite; check the batches and weights"
    ):
        calibrate(quantized().eval(), data)


def test_a_value_that_is_not_finite_is_found_outside_of_the_sample():
    x = torch.zeros(2, 1, 400, 400)
    unseen = next(i for i in range(x.numel()) if i not in sample(torch.arange(x.numel())))
    x.view(-1)[unseen] = math.nan
    qmodel = quantize(nn.Sequential(nn.Conv2d(1, 1, 3)), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match="layer 0: its input during calibration is not finite"):
        calibrate(qmodel, [x])


def test_the_layer_that_first_sees_a_value_that_is_not_finite_is_named():
    qmodel = quantized().eval()
    with torch.no_grad():
        qmodel.get_submodule("1").running_var.fill_(math.nan)
    with pytest.raises(ApotfxError, match="layer 4: its input during calibration is not finite"):
        calibrate(qmodel, batches())


def test_a_weight_that_is_not_finite_is_refused():
    qmodel = quantized()
    with torch.no_grad():
        qmodel.get_submodule("4").weight[0, 0, 0, 0] = math.inf
    with pytest.raises(ApotfxError, match="layer 4: its weight is not finite"):
        calibrate(qmodel, batches())


def test_a_batch_that_fails_leaves_the_model_usable():
    qmodel = quantized()
    layers = [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)]
    before = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    with pytest.raises(
        ApotfxError, match=r"layer 8: refuses its input \[4, 100\] float32, expected \[..., 64\] \(mat1"
    ):
        calibrate(qmodel, [batches()[0], torch.randn(4, 1, 9, 9)])
    assert [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)] == layers
    assert not any(layer._forward_pre_hooks for layer in quant_layers(qmodel))
    assert all(torch.equal(buffer, before[name]) for name, buffer in qmodel.named_buffers() )
    calibrate(qmodel, batches())


def test_batches_with_labels_are_refused():
    qmodel = quantize(nn.Sequential(nn.Linear(3, 2)), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match=r"a batch has 2 parts, the model takes \(input\) .*; pass inputs only"):
        calibrate(qmodel, [(torch.rand(4, 3), torch.zeros(4))])


def test_an_input_passed_by_name_is_observed():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x):
            return self.fc(input=x)

    qmodel = quantize(Named(), BitPolicy.default(4))
    x = torch.rand(4, 3)
    calibrate(qmodel, [x])
    assert torch.equal(qmodel.fc.input_quantizer.clip, fit_clip(x, qmodel.fc.input_quantizer.levels, torch.Size()))


# Batch norms.


def statistics(qmodel):
    return {n: b.clone() for n, b in qmodel.named_buffers() if n.endswith(("running_mean", "running_var"))}


def test_batch_norms_of_a_float_network_are_those_of_torch():
    ours, theirs = model().train(), model().train()
    for net in (ours, theirs):
        net[3].p = 0.0
    reestimate_batch_norms(ours, batches(3))
    torch.optim.swa_utils.update_bn(batches(3), theirs)
    assert len(statistics(ours)) == 4
    assert all(torch.equal(a, b) for a, b in zip(ours.buffers(), theirs.buffers(), strict=True))


def test_batch_norms_average_what_the_quantized_layers_before_them_give():
    qmodel = calibrate(quantized(weight_bits=3, activation_bits=3), batches()).eval()
    seen = []
    qmodel.get_submodule("1").register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    before = statistics(qmodel)
    assert reestimate_batch_norms(qmodel, iter(batches(3))) is qmodel
    norm = qmodel.get_submodule("1")
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert norm.num_batches_tracked == 3
    with torch.no_grad():
        expected = qmodel.get_submodule("0")(batches(3)[2])  # as in evaluation: exactly
    assert torch.equal(seen[2], expected)
    assert not any(torch.equal(tensor, before[name]) for name, tensor in statistics(qmodel).items())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_but_batch_norm_statistics_changes(training):
    qmodel = calibrate(quantized(), batches()).train(training)
    hooks = num_hooks(qmodel)
    qmodel.get_submodule("5").eval()  # as a network that keeps some of its batch norms fixed
    qmodel.get_submodule("1").momentum = 0.3
    before, modes = state(qmodel), [module.training for module in qmodel.modules()]
    reestimate_batch_norms(qmodel, batches())
    changed = {name for name, tensor in state(qmodel).items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if "running_" in name or "num_batches" in name}
    assert [module.training for module in qmodel.modules()] == modes
    assert (qmodel.get_submodule("1").momentum, qmodel.get_submodule("5").momentum) == (0.3, 0.1)
    assert num_hooks(qmodel) == hooks


def test_reestimated_statistics_normalize_the_batch_they_come_from():
    qmodel = calibrate(quantized(weight_bits=2, activation_bits=2), batches()).eval()
    outputs = []
    qmodel.get_submodule("5").register_forward_hook(lambda _, args, y: outputs.append(y))
    with torch.no_grad():
        reestimate_batch_norms(qmodel, batches(1))
        qmodel(batches(1)[0])
    mean, var = outputs[-1].mean((0, 2, 3)), outputs[-1].var((0, 2, 3))
    torch.testing.assert_close(mean, torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(var, torch.ones(4), atol=1e-3, rtol=0)  # eps


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "batch norm 1: no batch reached it; pass at least one"),
        ([batches()[0], torch.full((4, 1, 8, 8), math.nan)], "batch norm 1: its input is not finite"),
        (
            [batches()[0], torch.randn(4, 3, 8, 8)],
            r"layer 0: refuses its input \[4, 3, 8, 8\] float32, expected \[N, 1",
        ),
        ([torch.randn(1, 1, 5, 5)], r"layer 5: refuses its input .*more than 1 value per channel"),
        (torch.randn(4, 1, 8, 8), r"expected an iterable of inputs; pass \[x\]"),
    ],
    ids=["no-batch", "nan", "wrong-shape", "single-value", "tensor"],
)
def test_statistics_survive_batches_that_are_refused(data, message):
    qmodel = calibrate(quantized(), batches())
    reestimate_batch_norms(qmodel, batches())
    before, modes = state(qmodel), [module.training for module in qmodel.modules()]
    with pytest.raises(ApotfxError, match=message):
        reestimate_batch_norms(qmodel, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(qmodel).items())
    assert [module.training for module in qmodel.modules()] == modes
    assert [qmodel.get_submodule(name).momentum for name in "15"] == [0.1, 0.1]


@pytest.mark.parametrize(
    "net",
    [nn.Sequential(nn.Linear(2, 2)), nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2, track_running_stats=False))],
    ids=["none", "without-statistics"],
)
def test_a_network_without_batch_norm_is_refused(net):
    with pytest.raises(ApotfxError, match="the model has no batch norm with running statistics; leave it out"):
        reestimate_batch_norms(net, [torch.randn(4, 2)])


def test_a_batch_norm_that_no_batch_reaches_keeps_its_statistics():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.BatchNorm1d(2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.used(x)

    net = Skipping()
    net.unused.running_mean.fill_(5)
    with pytest.warns(
        UserWarning, match="batch norms unused: no batch reached them; they keep their statistics"
    ) as caught:
        reestimate_batch_norms(net, [torch.randn(4, 2)])
    assert caught[0].filename == __file__
    assert net.unused.running_mean.tolist() == [5, 5] and net.used.num_batches_tracked == 1


# Biases.


def without_batch_norm():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Dropout(0.5), nn.Conv2d(4, 4, 3, bias=False), nn.GELU(),
        nn.ConvTranspose2d(4, 6, 3, groups=2), nn.ReLU6(), nn.Flatten(2), nn.Linear(36, 5), nn.Sigmoid(), nn.Linear(5, 3),
    )  # fmt: skip


def mean_outputs(net, data, names):
    """The mean of each layer's output per channel, over all batches together."""
    outputs = {name: [] for name in names}
    hooks = [net.get_submodule(n).register_forward_hook(lambda _, a, y, n=n: outputs[n].append(y)) for n in names]
    with torch.no_grad():
        for x in data:
            net(x)
    for hook in hooks:
        hook.remove()
    return [torch.cat(y).mean((0, 2, 3) if y[0].dim() == 4 else (0, 1)) for y in outputs.values()]


WITH_BIAS = ["0", "5", "8", "10"]


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_every_layer_with_a_bias_has_the_mean_output_of_the_float_network(bits, granularity):
    """What a layer after it changes leaves a layer's own output alone, so that all hold at once."""
    net, data = without_batch_norm().eval(), [*batches(2), batches(1)[0][:1]]
    rule = Rule(weight_bits=bits, activation_bits=bits, granularity=granularity)
    qmodel = calibrate(quantize(net, BitPolicy((rule,))), data)
    expected, before = mean_outputs(net, data, WITH_BIAS), mean_outputs(qmodel, data, WITH_BIAS)
    assert not any(torch.allclose(a, b, atol=1e-4) for a, b in zip(before, expected, strict=True))
    assert correct_biases(qmodel, iter(data)) is qmodel
    for got, wanted in zip(mean_outputs(qmodel, data, WITH_BIAS), expected, strict=True):
        torch.testing.assert_close(got, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_nothing_but_biases_changes(training):
    qmodel = calibrate(quantize(without_batch_norm(), BitPolicy.default(4)), batches()).train(training)
    layers = [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)]
    before, hooks = state(qmodel), num_hooks(qmodel)
    correct_biases(qmodel, batches())
    changed = {name for name, tensor in state(qmodel).items() if not torch.equal(tensor, before[name])}
    assert changed == {f"{name}.bias" for name in WITH_BIAS}
    assert [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)] == layers
    assert all(module.training is training for module in qmodel.modules())
    assert num_hooks(qmodel) == hooks


@pytest.mark.parametrize(
    "data, message",
    [
        ([], "layer 0: no batch reached it; pass at least one"),
        ([torch.full((1, 1, 8, 8), math.nan)], "layer 0: its output is not finite"),
        (
            [batches()[0], torch.randn(4, 3, 8, 8)],
            r"layer 0: refuses its input \[4, 3, 8, 8\] float32, expected \[N, 1",
        ),
        (torch.randn(4, 1, 8, 8), r"expected an iterable of inputs; pass \[x\]"),
    ],
    ids=["no-batch", "nan", "wrong-shape", "tensor"],
)
def test_biases_survive_batches_that_are_refused(data, message):
    qmodel = calibrate(quantize(without_batch_norm(), BitPolicy.default(4)), batches())
    before = state(qmodel)
    with pytest.raises(ApotfxError, match=message):
        correct_biases(qmodel, data)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(qmodel).items())
    assert all(
        layer.weight_quantizer is not None and layer.input_quantizer is not None for layer in quant_layers(qmodel)
    )


def test_layers_whose_bias_cannot_be_corrected_are_refused():
    no_bias = quantize(nn.Sequential(nn.Linear(3, 2, bias=False)), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match="the model has no quantized layer with a bias; leave it out"):
        correct_biases(no_bias, [torch.randn(4, 3)])
    with pytest.raises(ApotfxError, match="layer 0: its weight is standardized, not what it was in float"):
        correct_biases(quantized(normalization="standardize"), batches())
