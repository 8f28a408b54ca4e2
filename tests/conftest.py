"""What several test files share."""

import os
from pathlib import Path

import pytest


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
