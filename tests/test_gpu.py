"""What only a GPU shows: the same levels and results as on the CPU, and training steps that are replayed."""

import functools
import math
from dataclasses import replace

import pytest
import test_loop
import torch
from test_engine import GEOMETRIES, operands, run
from test_loop import CONFIG, dataset, equal, fit, network, whole_and_resumed
from torch import nn

import apotfx
from apotfx.engine import EAGER, ON_GPU, choose
from apotfx.errors import ApotfxError
from apotfx.levels import LevelSet
from apotfx.models import build_model
from apotfx.training import recording
from apotfx.training.recording import Recorded

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
GPU = torch.device("cuda", 0)
LEVELS = LevelSet("apot", 4, False), LevelSet("apot", 4)


@pytest.fixture(autouse=True)
def without_tf32(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def on_gpu(tensors):
    return [t.detach().to(GPU).requires_grad_(t.requires_grad) for t in tensors]


def test_the_engine_is_the_one_with_kernels():
    assert str(choose("auto", GPU)) == "compiled (the fastest)"
    assert str(choose("int8", GPU)) == "compiled (no 8-bit arithmetic: it runs on the CPU only)"


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize(
    "levels", [LEVELS, (LevelSet("uniform", 8), LevelSet("uniform", 8))], ids=["apot4", "uniform8"]
)
def test_evaluation_gives_the_bits_of_the_cpu(name, levels):
    operator, shape_x, shape_w = GEOMETRIES[name]
    tensors = operands(shape_x, shape_w, dtype=torch.float32)
    with torch.no_grad():
        expected = run(operator, tensors, *levels)
        for engine in (EAGER, ON_GPU):
            assert torch.equal(run(operator, on_gpu(tensors), *levels, engine=engine).cpu(), expected)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("rectifier", [None, (0.0, math.inf)], ids=["none", "relu"])
def test_training_gives_the_results_of_float64(name, rectifier):
    operator, shape_x, shape_w = GEOMETRIES[name]
    results = []
    for engine, dtype in ((EAGER, torch.float64), (ON_GPU, torch.float32)):
        tensors = operands(shape_x, shape_w, dtype=torch.float32)
        tensors = on_gpu([t.detach().to(dtype).requires_grad_() for t in tensors])
        y = run(operator, tensors, *LEVELS, engine=engine, dtype=dtype, exact=False, rectifier=rectifier)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(GPU, dtype))
        results.append([y.detach(), *(t.grad for t in tensors)])
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_bfloat16_is_near_float32(name):
    operator, shape_x, shape_w = GEOMETRIES[name]
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        tensors = on_gpu(operands(shape_x, shape_w, dtype=torch.float32))
        y = run(operator, tensors, *LEVELS, engine=ON_GPU, dtype=dtype, exact=False)
        assert y.dtype == dtype
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(GPU, dtype))
        results.append([y.detach().float(), *(t.grad for t in tensors)])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == torch.float32 and (got - expected).norm() < 0.02 * expected.norm()


trainer = functools.partial(test_loop.trainer, device=GPU)


def states(t):
    return {
        key: value for key, value in t.state_dict().items() if key in ("model", "ema", "momentum", "running", "best")
    }


@pytest.mark.parametrize("option", [{}, {"amp": True}, {"ema": 0.0}], ids=str)
@pytest.mark.parametrize("num_teachers", [0, 2])
def test_a_replayed_training_gives_the_bits_of_one_that_is_not(tmp_path, monkeypatch, option, num_teachers):
    config, results = replace(CONFIG, epochs=3, **option), []
    for recorded in (True, False):
        torch.manual_seed(0)
        t = trainer(config, teachers=[network(32, seed).eval() for seed in range(num_teachers)])
        if not recorded:
            t.recorded, t.batches._make_images = False, t.batches._images
        fit(t, tmp_path / str(recorded))
        if recorded:
            assert len(t.recordings) == 1 + num_teachers
            assert all(recording.graph for recording in (t.batches._make_images, *t.recordings.values()))
        results.append(states(t))
    for key, value in results[0].items():
        assert equal(value, results[1][key]), key


def test_two_trainings_of_a_resnet_give_the_same_bits(tmp_path):
    results = []
    for name in ("first", "second"):
        torch.manual_seed(0)
        model, _ = build_model("resnet18", in_channels=1, num_classes=3, image_size=28)
        qmodel = apotfx.quantize(model.to(memory_format=torch.channels_last), apotfx.BitPolicy.default(4)).to(GPU)
        t = trainer(replace(CONFIG, epochs=2, batch_size=32), qmodel, data=dataset(320, 28))
        results.append(states(fit(t, tmp_path / name)))
    assert equal(*results)


@pytest.mark.parametrize("stop_at", [2, 7])
def test_a_stopped_run_resumes_to_the_same_bits(tmp_path, stop_at):
    a, b = map(states, whole_and_resumed(tmp_path, stop_at, GPU))
    for key in a:
        assert equal(a[key], b[key]), key


def test_divergence_is_told_with_its_step_and_changes_no_weight(tmp_path):
    t = trainer(replace(CONFIG, epochs=4))
    step, epoch, before = t._train_step, t.batches.epoch, {}

    def poisoned_epoch(number, start=0):
        for i, (images, labels) in enumerate(epoch(number, start), start):
            yield (torch.full_like(images, math.nan) if (number, i) == (2, 1) else images), labels

    def watched_step(images, labels):
        if t.step == 11:
            before.update({name: p.clone() for name, p in t.model.named_parameters()})
        step(images, labels)

    t.batches.epoch, t._train_step = poisoned_epoch, watched_step
    with pytest.raises(ApotfxError, match="training diverged at step 11: the first value .* is in the input images;"):
        fit(t, tmp_path / "run")
    assert all(torch.equal(before[name], p) for name, p in t.model.named_parameters())


@pytest.mark.parametrize("bits", [2, 4])
def test_an_export_gives_the_bits_of_the_network(tmp_path, bits):
    """Scales too, which the manifest checks on the CPU."""
    torch.manual_seed(0)
    model, _ = build_model("resnet10", in_channels=1, num_classes=3, image_size=28)
    qmodel = apotfx.quantize(model, apotfx.BitPolicy.default(bits)).to(GPU)
    images = torch.rand(16, 1, 28, 28, device=GPU)
    apotfx.calibrate(qmodel, [images])
    qmodel.eval()
    with torch.no_grad():
        for parameter in qmodel.parameters():
            if not parameter.dim():
                parameter.mul_(1.2345678)
    path = apotfx.export_integer(qmodel, tmp_path / "export")
    expected = qmodel(images)
    assert torch.equal(apotfx.load_integer(path, model).to(GPU)(images), expected)


def test_what_cannot_be_recorded_runs_as_it_is(caplog):
    recording.say_once.cache_clear()

    def waits(x):
        return x * x.sum().item()

    recorded = Recorded(waits)
    for i in range(6):
        assert recorded(torch.full((2,), float(i), device=GPU)).tolist() == [2.0 * i * i] * 2
    assert recorded.graph is None and "it cannot be recorded" in caplog.text


def test_a_network_that_waits_still_trains(tmp_path):
    class Waits(nn.Module):
        def forward(self, x):
            return x * (1.0 if x.sum().item() > -1e9 else 0.0)

    model = nn.Sequential(network(32), Waits())
    t = fit(trainer(replace(CONFIG, epochs=3), model), tmp_path / "run")
    assert t.step == 15 and t.recordings["update"].graph is None
