import math

import pytest
import torch
from helpers import weight_in_clip_units
from torch import nn

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, quantize
from apotfx.clips import fit_clip
from apotfx.layers import QuantLayer

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
    hooks = [len(module._forward_pre_hooks) for module in qmodel.modules()]
    layers = [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)]
    assert calibrate(qmodel, batches()) is qmodel
    after = qmodel.state_dict()
    assert list(after) == list(before)
    changed = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith(("clip", "calibrated"))}
    assert [module.training for module in qmodel.modules()] == modes
    assert [len(module._forward_pre_hooks) for module in qmodel.modules()] == hooks
    assert [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)] == layers
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert not any(quantizer.needs_clip for pair in layers for quantizer in pair)


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
    assert len(clips) == 3 and all(qmodel.state_dict()[name.replace("clip", "calibrated")] for name in clips)


def test_weights_only_need_no_batch():
    calibrate(quantized(activation_bits=32), [])


@pytest.mark.parametrize("container", [tuple, list])
def test_several_inputs(container):
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)

        def forward(self, x, y):
            return self.a(x) + self.b(y)

    qmodel = quantize(Sum(), BitPolicy((Rule(),)))
    x, y = torch.randn(8, 2), 100 * torch.randn(8, 2)
    calibrate(qmodel, [container([x, y])])
    assert torch.equal(qmodel.a.input_quantizer.clip, fit_clip(x, LevelSet("apot", 4), PER_TENSOR))
    assert torch.equal(qmodel.b.input_quantizer.clip, fit_clip(y, LevelSet("apot", 4), PER_TENSOR))


def test_method_paper_keeps_the_constants_and_reads_no_batch():
    qmodel = quantized(normalization="none")
    before = state(qmodel)
    assert calibrate(qmodel, None, method="paper") is qmodel
    for layer in quant_layers(qmodel):
        assert layer.input_quantizer.clip == 8 and layer.weight_quantizer.clip == 3 * layer.weight.std()
        assert layer.input_quantizer.calibrated and not layer.weight_quantizer.needs_clip
    changed = {name for name, tensor in qmodel.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {name for name in before if name.endswith("calibrated")}


def test_an_unknown_method_is_refused():
    with pytest.raises(ApotfxError, match="calibration method 'max': unknown; choose one of mse, paper"):
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


def test_a_batch_that_fails_leaves_the_model_usable():
    qmodel = quantized()
    layers = [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)]
    before = {name: buffer.clone() for name, buffer in qmodel.named_buffers() if "calibrated" not in name}
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        calibrate(qmodel, [batches()[0], torch.randn(4, 1, 9, 9)])
    assert [(layer.weight_quantizer, layer.input_quantizer) for layer in quant_layers(qmodel)] == layers
    assert not any(layer._forward_pre_hooks for layer in quant_layers(qmodel))
    assert all(torch.equal(buffer, before[name]) for name, buffer in qmodel.named_buffers() if name in before)
    calibrate(qmodel, batches())


def test_batches_with_labels_are_refused():
    qmodel = quantize(nn.Sequential(nn.Linear(3, 2)), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match="a batch has 2 parts, the model takes 1; pass inputs only"):
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
