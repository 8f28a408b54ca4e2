"""What several test files share."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings

if not torch.cuda.is_available():  # Triton reads it when torchvision imports it
    os.environ["TRITON_INTERPRET"] = "1"

from helpers import MIXED, trained

from apotfx import export_integer

UNHURRIED = {"deadline": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=50, phases=(Phase.explicit, Phase.generate), **UNHURRIED)
settings.register_profile("nightly", max_examples=500, **UNHURRIED)
settings.load_profile("default")


@pytest.fixture
def default_dtype():
    """`torch.set_default_dtype`, taken back after the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """A directory with MNIST's raw files in torchvision's layout; skips the test where there is none."""
    beside = Path(__file__).parents[1].parent / "shared" / "data"
    root = Path(os.environ.get("APOTFX_DATA") or beside)
    if not (root / "MNIST" / "raw" / "train-images-idx3-ubyte").is_file():
        pytest.skip(f"no MNIST in {root}: set APOTFX_DATA to a directory with MNIST/raw")
    return root


@pytest.fixture(scope="session")
def published_root() -> Path:
    """The directory of the published MNIST checkpoints; skips the test where there is none."""
    beside = Path(__file__).parents[1].parent / "shared" / "upstream" / "checkpoints"
    root = Path(os.environ.get("APOTFX_PUBLISHED") or beside)
    if not (root / "resnet10_4bit" / "model_best.pth.tar").is_file():
        pytest.skip(f"no published checkpoints in {root}: set APOTFX_PUBLISHED to their directory")
    return root


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export, the float model and another export; not to be written to."""
    directory = tmp_path_factory.mktemp("exported")
    qmodel, model = trained(MIXED)
    other, _ = trained(MIXED)
    with torch.no_grad():
        other.fc.weight.neg_()
    return export_integer(qmodel, directory / "one"), model, export_integer(other, directory / "two")


@pytest.fixture
def export(exported, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(exported[0], tmp_path / "export"))
