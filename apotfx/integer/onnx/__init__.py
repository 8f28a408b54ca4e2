"""An integer network as an ONNX file of standard operators, and the proof that onnxruntime computes the same."""

import os
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_atomic

try:
    import onnx
except ImportError as error:
    raise ApotfxError("ONNX: the package onnx is missing; pip install onnx") from error

from apotfx.integer.load import opened
from apotfx.integer.onnx.compare import compare_onnx
from apotfx.integer.onnx.exact import Exact
from apotfx.integer.onnx.qdq import Qdq

__all__ = ["compare_onnx", "export_onnx"]

FLAVOURS = {"exact": Exact, "qdq": Qdq}


def export_onnx(
    source: nn.Module | str | os.PathLike,
    path: str | os.PathLike,
    *,
    input_shape: Sequence[int] | None = None,
    flavour: str = "exact",
) -> Path:
    """Write an integer network to the new file `path`, with any number of inputs as its batch.

    Args:
        source: an export that stands alone, or what `load_integer` returned with backend "reference".
        input_shape: of one input, such as (C, H, W); by default what the export says.
        flavour: "exact", equal in every bit, or "qdq", for uniform levels, which the 8-bit paths of runtimes recognise.
            OpenVINO runs "exact" exactly with the hint INFERENCE_PRECISION_HINT=f32.

    Raises:
        ApotfxError: `path` exists; a step that ONNX, or a layer that the flavour, cannot express; no input shape.
    """
    if flavour not in FLAVOURS:
        raise ApotfxError(f"flavour {flavour!r}: unknown; choose one of {', '.join(FLAVOURS)}")
    path = Path(path)
    require_new(path)
    network, input_shape, _ = opened(source, input_shape)
    model = FLAVOURS[flavour](network, input_shape).model()
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, model.SerializeToString())
    return path
