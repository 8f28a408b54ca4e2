"""The whole way: the README's own code, and the published networks."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import train
from torch import nn

import apotfx
from apotfx.models import build_model
from apotfx.training.build import restore_network
from apotfx.training.checkpoint import read_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset
from apotfx.training.distributed import Processes
from apotfx.training.loop import Stopwatch
from apotfx.training.run import report

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

# Accuracy in percent on the 60,000 training and the 10,000 test images, by the authors' own code.
PUBLISHED = {
    "resnet10_5bit": (99.780, 99.04),
    "resnet10_4bit": (99.638, 98.77),
    "resnet10_3bit": (99.387, 98.81),
    "resnet10_2bit": (98.718, 98.40),
    "resnet10_5bit_uniform": (99.675, 98.94),
    "resnet10_4bit_uniform": (99.535, 98.73),
    "resnet10_3bit_uniform": (99.253, 98.91),
    "resnet10_2bit_uniform": (98.448, 98.27),
}


@pytest.fixture(scope="module")
def mnist(mnist_root):
    return load_dataset("mnist", mnist_root)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_give_their_measured_accuracy(name, published_root, mnist, tmp_path):
    bits, scheme = int(name[9]), "uniform" if name.endswith("uniform") else "apot"
    config = TrainConfig(arch="resnet10", bit=bits, scheme=scheme, recipe="published", dataset="mnist")
    network = restore_network(config, mnist, CPU, read_checkpoint(published_root / name / "model_best.pth.tar"))
    result = report(network, config, mnist, CPU, Processes("cpu"), tmp_path, {}, Stopwatch())
    assert result["train_acc"] == pytest.approx(PUBLISHED[name][0], abs=0.02)
    assert result["test_acc"] == pytest.approx(PUBLISHED[name][1], abs=0.02)
    assert result["integer_test_acc"] == result["test_acc"]
    assert json.loads((tmp_path / "result.json").read_text()) == result


def test_a_published_checkpoint_at_other_bits_is_refused(published_root, mnist_root, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = published_root / "resnet10_4bit" / "model_best.pth.tar"
    command = ["--arch", "resnet10", "-e", "--pretrained", path, "--data", mnist_root, "--name", "x"]
    assert train.main([*map(str, command), "--bit", "3"]) == 2
    assert "states 99.64% on the training images, but reaches" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert train.main([*map(str, command), "--bit", "4"]) == 0
    result = json.loads((tmp_path / "runs" / "x" / "result.json").read_text())
    assert (result["recipe"], result["epochs"], result["seed"]) == ("published", 25, None)


def python_blocks():
    return re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("block", python_blocks(), ids=lambda block: block.splitlines()[0])
def test_python_in_the_readme_runs(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, "README.md", "exec"), {})


def test_the_policy_in_the_readme_fits_its_network(tmp_path):
    (block,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    (tmp_path / "policy.yaml").write_text(block)
    model, _ = build_model("resnet18", in_channels=1, num_classes=10, image_size=28)
    policy = apotfx.BitPolicy.from_yaml(tmp_path / "policy.yaml")
    layers = apotfx.plan(model, policy).layers
    assert {layer.rule for layer in layers} == set(policy.rules)  # every rule decides somewhere
    assert len(layers) == 21


@pytest.mark.parametrize("scheme", ["apot", "uniform", "pot"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_float_model_to_integer_file_in_ones_own_loop(bits, scheme, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3), nn.GELU(),
        nn.Flatten(), nn.Linear(128, 4),
    )  # fmt: skip
    images, labels = torch.randn(64, 1, 12, 12), torch.arange(64) % 4
    qmodel = apotfx.quantize(model, apotfx.BitPolicy.default(bits=bits, scheme=scheme))
    apotfx.calibrate(qmodel, [images])
    optimizer = torch.optim.Adam(qmodel.parameters(), 3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        nn.functional.cross_entropy(qmodel(images), labels).backward()
        optimizer.step()
    qmodel.eval()
    assert (qmodel(images).argmax(1) == labels).float().mean() > 0.9  # chance is 0.25
    apotfx.export_integer(qmodel, tmp_path / "out")
    imodel = apotfx.load_integer(tmp_path / "out", model)
    for batch in (images, images[:1], images[5:12].contiguous(memory_format=torch.channels_last)):
        assert torch.equal(imodel(batch), qmodel(batch))


PRINT_BITS = """
import hashlib, sys, torch, apotfx
from apotfx.models import build_model
model, _ = build_model("resnet10", in_channels=1, num_classes=10, image_size=28)
qmodel = apotfx.quantize(model, apotfx.BitPolicy.default(bits=4))
qmodel.load_state_dict(torch.load(sys.argv[2], weights_only=True))
for network in (qmodel.eval(), *(apotfx.load_integer(sys.argv[1], model, backend=b) for b in ("reference", "onednn"))):
    print(hashlib.sha256(network(torch.load(sys.argv[3])).detach().numpy().tobytes()).hexdigest())
"""


def test_results_do_not_depend_on_the_instructions_that_a_processor_has(tmp_path):
    """Torch's kernels and oneDNN's are others in each process; what they round, and in which order, must not be."""
    torch.manual_seed(0)
    model, _ = build_model("resnet10", in_channels=1, num_classes=10, image_size=28)
    images = torch.randn(8, 1, 28, 28)
    model(images)  # gives the batch norms statistics
    qmodel = apotfx.calibrate(apotfx.quantize(model, apotfx.BitPolicy.default(bits=4)), [images]).eval()
    files = apotfx.export_integer(qmodel, tmp_path / "out"), tmp_path / "state.pt", tmp_path / "images.pt"
    torch.save(qmodel.state_dict(), files[1])
    torch.save(images, files[2])
    command = [sys.executable, "-W", "ignore", "-c", PRINT_BITS, *map(str, files)]
    plain = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "OMP_NUM_THREADS": "1"}
    found = [
        subprocess.run(command, env=os.environ | more, capture_output=True, text=True, check=True).stdout.split()
        for more in ({}, plain)
    ]
    assert [len(digests) for digests in found] == [3, 3] and len({*found[0], *found[1]}) == 1
