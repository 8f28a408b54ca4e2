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
