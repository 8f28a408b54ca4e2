"""What the tests of the numeric modules share."""

import numpy as np
import pytest
import torch

from apotfx import engine
from apotfx import functional as F
from apotfx.errors import ApotfxError
from apotfx.layers import QuantLayer
from apotfx.levels import SCHEMES, LevelSet
from apotfx.operators import Convolution, MatrixProduct


def _level_sets() -> list[LevelSet]:
    level_sets = []
    for scheme in SCHEMES:
        for bits in range(2, 9):
            for signed in (True, False):
                try:
                    level_sets.append(LevelSet(scheme, bits, signed))
                except ApotfxError:  # PoT with many bits
                    assert scheme == "pot" and bits - signed > 4
    return level_sets


LEVEL_SETS = _level_sets()
needs_kernels = pytest.mark.skipif(
    engine.what_kernels_lack() is not None, reason=f"no compiled kernels: {engine.what_kernels_lack()}"
)
needs_bytes = pytest.mark.skipif(
    engine.what_bytes_lack() is not None, reason=f"no 8-bit arithmetic: {engine.what_bytes_lack()}"
)


def level_set_id(levels: LevelSet) -> str:
    return f"{levels.scheme}{levels.bits}{'s' if levels.signed else 'u'}"


def encoding(levels: LevelSet, rectifier: tuple[float, float] | None = None) -> F.Levels:
    return F.Levels(F.Levels.of(levels).table, levels, rectifier)


def weight_in_clip_units(layer: QuantLayer) -> torch.Tensor:
    """What the clip of a layer's weight is compared to."""
    weight, unit = layer.weight_quantizer.normalize(layer.weight)
    return weight if unit is None else weight / unit


def nearest_level(position: torch.Tensor, levels: LevelSet) -> torch.Tensor:
    """By trying every level: the one nearest to `position` (float64), ties to the larger magnitude."""
    magnitude = position.double().abs() if levels.signed else position.double().clamp(min=0)
    ints = torch.tensor(levels.ints, dtype=torch.float64)
    distance = (magnitude.unsqueeze(-1) - ints).abs().flip(-1)  # argmin takes the first: largest first
    nearest = ints.flip(0)[distance.argmin(-1)]
    return torch.where(position < 0, -nearest, nearest) + 0.0  # and -0 to 0


# The operators, each with the shapes of an input and a weight.

OPERATORS = {
    "conv1d": (Convolution((2,), (1,), (2,), 1), (3, 4, 11), (6, 4, 3)),
    "conv2d": (Convolution((1, 1), (0, 0), (1, 1), 1), (2, 3, 6, 5), (4, 3, 3, 3)),
    "conv2d-strided": (Convolution((2, 3), (1, 2), (1, 2), 1), (2, 3, 9, 10), (4, 3, 3, 3)),
    "conv2d-pointwise": (Convolution((1, 1), (0, 0), (1, 1), 1), (1, 3, 4, 4), (5, 3, 1, 1)),
    "conv2d-grouped": (Convolution((1, 1), (1, 1), (1, 1), 2), (2, 4, 6, 6), (6, 2, 3, 3)),
    "conv2d-depthwise": (Convolution((1, 1), (1, 1), (1, 1), 4), (2, 4, 6, 6), (4, 1, 3, 3)),
    "conv3d": (Convolution((1, 2, 1), (1, 0, 1), (1, 1, 1), 1), (2, 2, 4, 5, 4), (3, 2, 2, 2, 3)),
    "linear": (MatrixProduct(), (7, 5), (4, 5)),
    "linear-sequence": (MatrixProduct(), (2, 3, 5), (4, 5)),
    "linear-vector": (MatrixProduct(), (5,), (4, 5)),
}
every_operator = pytest.mark.parametrize("operator, shape_x, shape_w", OPERATORS.values(), ids=OPERATORS)


def torch_operator(operator):
    """The same by torch's public functions."""
    if isinstance(operator, MatrixProduct):
        return torch.nn.functional.linear
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(operator.stride)]
    return lambda x, w: conv(x, w, None, *operator)


def integer_operator(operator, x, w):
    """The same on int64 arrays of numpy."""
    x, w = x.numpy().astype(np.int64), w.numpy().astype(np.int64)
    if isinstance(operator, MatrixProduct):
        return torch.from_numpy(np.asarray(x @ w.T))
    dims = len(operator.stride)
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in operator.padding)])
    span = [(k - 1) * d + 1 for k, d in zip(w.shape[2:], operator.dilation)]
    windows = np.lib.stride_tricks.sliding_window_view(x, span, axis=tuple(range(2, 2 + dims)))
    steps = [slice(None, None, step) for step in (1, 1, *operator.stride, *operator.dilation)]
    windows = windows[tuple(steps)]  # [N, C, *out, *kernel]
    kernel = range(2 + dims, 2 + 2 * dims)
    groups = zip(np.split(windows, operator.groups, axis=1), np.split(w, operator.groups))
    y = [np.tensordot(a, b, axes=((1, *kernel), (1, *range(2, 2 + dims)))) for a, b in groups]
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(np.concatenate(y, -1), -1, 1)))


def closed_form(x, clip, levels, everywhere=False, rectifier=None):
    """(what x is quantized to, d/dx, the summands of d/dclip) by the formulas, elementwise, in float64."""
    low, high = rectifier or (-torch.inf, torch.inf)
    v = x.clamp(low, high) / clip
    inside = (v >= -1 if levels.signed else v >= 0) & (v <= 1)
    q = nearest_level((v * levels.max).clamp(-levels.max, levels.max), levels) / levels.max
    outside = torch.where(v > 0, 1.0, -1.0 if levels.signed else 0.0)
    passes = inside if rectifier is None else inside & (x > low) & (x < high)
    return q * clip, torch.ones_like(v) if everywhere else passes.double(), torch.where(inside, q - v, outside)


def operands(shape_x, shape_w, per_channel=False, dtype=torch.float64):
    torch.manual_seed(0)
    x, w = torch.randn(shape_x, dtype=dtype), torch.randn(shape_w, dtype=dtype)
    clip_w = torch.tensor(0.9, dtype=dtype)
    if per_channel:
        clip_w = torch.linspace(0.3, 2, shape_w[0], dtype=dtype).reshape(-1, *(1 for _ in shape_w[1:]))
    return [t.requires_grad_() for t in (x, w, torch.tensor(1.1, dtype=dtype), clip_w)]
