"""Low-bit quantization-aware training: a plain float network in, exact integers out."""

from .calibrate import calibrate, correct_biases, reestimate_batch_norms
from .engine import use_engine
from .errors import ApotfxError
from .integer.c import export_c
from .integer.format import export_integer, read_integer
from .integer.load import load_integer
from .integer.verify import verify
from .levels import LevelSet
from .policy import BitPolicy, Rule
from .graph.passes import plan, plan_of, quantize
from .state import load_float_state
from .summary import summary
from .graph.network import trace

__all__ = [
    "ApotfxError",
    "BitPolicy",
    "LevelSet",
    "Rule",
    "calibrate",
    "correct_biases",
    "export_c",
    "export_integer",
    "export_onnx",
    "load_float_state",
    "load_integer",
    "plan",
    "plan_of",
    "quantize",
    "read_integer",
    "reestimate_batch_norms",
    "summary",
    "trace",
    "use_engine",
    "verify",
]


def __getattr__(name: str):
    if name == "export_onnx":  # which needs a package that not everybody has
        from .integer.onnx import export_onnx

        return export_onnx
    raise AttributeError(f"module 'apotfx' has no attribute {name!r}")
