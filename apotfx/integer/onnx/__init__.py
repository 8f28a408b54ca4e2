"""An integer network as an ONNX file of standard operators, and the proof that onnxruntime computes the same."""

import os
from pathlib import Path

from torch import nn

from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_atomic

try:
    import onnx
except ImportError as error:
    raise ApotfxError("ONNX: the package onnx is missing; pip install onnx") from error

from apotfx.integer.network import as_program
from apotfx.integer.onnx.compare import compare_onnx
from apotfx.integer.onnx.exact import Exact
from apotfx.integer.onnx.qdq import Qdq

__all__ = ["compare_onnx", "export_onnx"]

FLAVOURS = {"exact": Exact, "qdq": Qdq}


def export_onnx(
    network: nn.Module, path: str | os.PathLike, *, input_shape: tuple[int, ...], flavour: str = "exact"
) -> Path:
    """Write the network to the new file `path`, with any number of images as its batch.

    Args:
        network: from `load_integer` with the backend "reference", with or without the float model.
        input_shape: of one image, (C, H, W).
        flavour: "exact" or "qdq".

    Raises:
        ApotfxError: `path` exists; an operation that ONNX, or a layer that the flavour, cannot express.
    """
    if flavour not in FLAVOURS:
        raise ApotfxError(f"flavour {flavour!r}: unknown; choose one of {', '.join(FLAVOURS)}")
    path = Path(path)
    require_new(path)
    model = FLAVOURS[flavour](as_program(network), input_shape).model()
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, model.SerializeToString())
    return path
