import copy
import io
import pickle

import pytest
import torch
from helpers import num_hooks
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn, update_bn

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, quantize
from apotfx.layers import QuantLayer
from apotfx.quantizers import PLACEHOLDER, Quantizer
from apotfx.state import load_float_state, uncalibrated

POLICY = BitPolicy((Rule(),))


class Net(nn.Sequential):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
        )


def images(n=8, scale=1.0):
    return scale * torch.randn(n, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized(calibrated=True, **rule):
    qmodel = quantize(Net(), BitPolicy((Rule(**rule),)))
    return calibrate(qmodel, [images()]) if calibrated else qmodel


def clips(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("_quantizer.clip")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def step(model, x, optimizer=None):
    model(x).square().sum().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()


# Which clips come from data.


def test_fresh_clips_are_listed_by_layer():
    qmodel = quantized(calibrated=False)
    assert uncalibrated(qmodel) == ["0", "3", "6"]
    qmodel.get_submodule("3").weight_quantizer.set_clip(1.0)
    assert uncalibrated(qmodel) == ["0", "3", "6"]
    qmodel.get_submodule("3").input_quantizer.set_clip(1.0)
    assert uncalibrated(qmodel) == ["0", "6"]
    step(qmodel, images())
    assert uncalibrated(qmodel) == []


@pytest.mark.parametrize("bits", [{"weight_bits": 32}, {"activation_bits": 32}], ids=["float-weights", "float-inputs"])
def test_an_operand_that_stays_float_has_no_clip_to_wait_for(bits):
    qmodel = quantized(calibrated=False, **bits)
    assert uncalibrated(qmodel) == ["0", "3", "6"]
    assert uncalibrated(calibrate(qmodel, [images()])) == []


def test_a_float_model_has_nothing_uncalibrated():
    assert uncalibrated(Net()) == []


# Averages of weights.

AVERAGES = {
    f"{name}{'-buffers' * use_buffers}": options | {"use_buffers": use_buffers}
    for name, options in {
        "swa": {},
        "swa-foreach": {"multi_avg_fn": get_swa_multi_avg_fn()},
        "ema": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
        "by-hand": {"avg_fn": lambda average, value, n: 0.9 * average + 0.1 * value},
    }.items()
    for use_buffers in (False, True)
    if not (use_buffers and name == "swa-foreach")  # torch itself fails on a batch norm's count of batches
}
every_average = pytest.mark.parametrize("options", AVERAGES.values(), ids=AVERAGES)


@every_average
def test_averaging_a_network_that_does_not_change_changes_nothing(options):
    qmodel = quantized().eval()
    average = AveragedModel(qmodel, **options)
    for _ in range(3):
        average.update_parameters(qmodel)
    assert uncalibrated(average.module) == []
    torch.testing.assert_close(average(images()), qmodel(images()), rtol=1e-5, atol=1e-5)


@every_average
def test_an_average_that_began_before_the_clips_came_from_data_knows_that_they_did(options):
    qmodel = quantized(calibrated=False)
    average = AveragedModel(qmodel, **options)
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    assert uncalibrated(average.module) == ["0", "3", "6"]
    for _ in range(2):
        step(qmodel, images(), optimizer)
        average.update_parameters(qmodel)
    before = clips(average.module)
    assert uncalibrated(average.module) == []
    update_bn([images(scale=5.0)], average)
    step(average.train(), images(scale=5.0))
    assert same(clips(average.module), before)


@every_average
def test_the_average_of_placeholders_is_the_placeholder(options):
    qmodel = quantized(calibrated=False)
    average = AveragedModel(qmodel, **options)
    for _ in range(50):
        average.update_parameters(qmodel)
    assert uncalibrated(average.module) == ["0", "3", "6"]


@pytest.mark.parametrize("kind", ["ModelEma", "ModelEmaV2", "ModelEmaV3"])
def test_the_averages_of_timm(kind):
    timm_utils = pytest.importorskip("timm.utils")
    if not hasattr(timm_utils, kind):
        pytest.skip(f"this timm has no {kind}")
    fresh, trained = quantized(calibrated=False), quantized()
    for qmodel, expected in ((fresh, ["0", "3", "6"]), (trained, [])):
        average = getattr(timm_utils, kind)(qmodel, decay=0.9998)
        for _ in range(20):
            average.update(qmodel)
        module = getattr(average, "module", None) or average.ema
        assert uncalibrated(module) == expected
        torch.testing.assert_close(module.eval()(images()), qmodel.eval()(images()), rtol=1e-4, atol=1e-4)


# Copies and files.


def pickled(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "torch.save": pickled, "pickle": lambda model: pickle.loads(pickle.dumps(model))}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("calibrated", [False, True], ids=["fresh", "calibrated"])
def test_a_copy_of_the_network_has_the_same_state_and_its_own(copied, calibrated):
    qmodel = quantized(calibrated)
    other = copied(qmodel)
    assert uncalibrated(other) == uncalibrated(qmodel) and same(clips(other), clips(qmodel))
    for a, b in zip(*([m for m in net.modules() if isinstance(m, QuantLayer)] for net in (qmodel, other)), strict=True):
        assert a.engine.name == b.engine.name and a.rectifier == b.rectifier
    assert torch.equal(other.eval()(images()), qmodel.eval()(images()))
    assert num_hooks(other) == num_hooks(qmodel)  # the one that processes agree by
    before = clips(qmodel)
    calibrate(other, [images(scale=3.0)])
    assert same(clips(qmodel), before) and not same(clips(other), before)


def test_loading_a_state_says_which_clips_come_from_data():
    fresh, trained = quantized(calibrated=False), quantized()
    start = copy.deepcopy(fresh.state_dict())
    fresh.load_state_dict(trained.state_dict())
    step(fresh, images(scale=3.0))
    assert same(clips(fresh), clips(trained))
    trained.load_state_dict(start)
    assert uncalibrated(trained) == ["0", "3", "6"]
    step(trained, images(scale=3.0))
    assert uncalibrated(trained) == [] and not same(clips(trained), clips(fresh))


def test_states_of_earlier_versions_load():
    qmodel, old = quantized(calibrated=False), quantized().state_dict()
    for key in list(old):
        if key.endswith("_quantizer.clip"):
            old[key.replace("clip", "calibrated")] = torch.tensor(not key.startswith("6."))
    qmodel.load_state_dict(old)
    assert uncalibrated(qmodel) == ["6"]
    assert (qmodel.get_submodule("6").weight_quantizer.clip == PLACEHOLDER).all()


# States of float networks.


class Attentive(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 3)
        self.matrix = nn.Parameter(torch.randn(4, 3))

    def forward(self, x):
        x = self.norm(self.attention(x, x, x, need_weights=False)[0])
        return nn.functional.linear(self.head(x), self.matrix)


@pytest.mark.parametrize("make, x", [(Net, images()), (Attentive, torch.randn(2, 5, 8))], ids=["conv", "attention"])
def test_the_state_of_a_float_network_loads(make, x):
    source = make(seed=5)
    expected, got = quantize(source, POLICY), calibrate(quantize(make(), POLICY), [x])
    before = clips(got)
    load_float_state(got, source.state_dict())
    assert same(clips(got), before)
    values = expected.state_dict()
    assert same({k: v for k, v in got.state_dict().items() if k not in before}, {k: v for k, v in values.items() if k not in before})
    assert torch.equal(calibrate(got, [x]).eval()(x), calibrate(expected, [x]).eval()(x))


@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop("3.bias"), r"3\.bias is absent, the quantized network has \[4\]"),
    (lambda s: s.update(extra=torch.ones(2)), r"extra is \[2\], the quantized network has absent"),
    (lambda s: s.update({"3.bias": torch.ones(5)}), r"3\.bias is \[5\], the quantized network has \[4\]"),
], ids=["missing", "unknown", "shape"])  # fmt: skip
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    qmodel, state = quantized(), Net(seed=5).state_dict()
    change(state)
    before = copy.deepcopy(qmodel.state_dict())
    with pytest.raises(ApotfxError, match=message):
        load_float_state(qmodel, state)
    assert same(qmodel.state_dict(), before)


def test_the_state_of_the_quantized_network_loads_with_its_clips():
    source, target = quantized(), quantized(calibrated=False)
    load_float_state(target, source.state_dict())
    assert same(clips(target), clips(source)) and uncalibrated(target) == []


# The default dtype.


def test_the_default_dtype_changes_no_bit_of_a_float32_network(default_dtype):
    model, x, states = Net(), images(), []
    for default in (torch.float32, torch.float64):
        default_dtype(default)
        for calibrated in (True, False):
            qmodel = quantize(model, POLICY)
            if calibrated:
                calibrate(qmodel, [x])
            optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
            for _ in range(2):
                step(qmodel, x, optimizer)
            assert all(parameter.dtype == torch.float32 for parameter in qmodel.parameters())
            states.append(qmodel.state_dict() | {"output": qmodel.eval()(x)})
    assert same(states[0], states[2]) and same(states[1], states[3]) and not same(states[0], states[1])


def test_a_float64_network_works_whatever_the_default_is(default_dtype):
    model, x, results = Net().double(), images().double(), []
    for default in (torch.float32, torch.float64):
        default_dtype(default)
        qmodel = calibrate(quantize(model, POLICY), [x])
        step(qmodel, x, torch.optim.SGD(qmodel.parameters(), lr=0.01))
        results.append(qmodel.eval()(x))
    assert results[0].dtype == torch.float64 and torch.equal(*results)


def test_quantizers_have_no_buffers():
    assert not [name for m in quantized().modules() if isinstance(m, Quantizer) for name, _ in m.named_buffers()]
