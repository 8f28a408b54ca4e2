"""What the tests of the numeric modules and of the integer networks share."""

import json

import numpy as np
import pytest
import torch
from torch import nn

from apotfx import BitPolicy, Rule, calibrate, engine, quantize
from apotfx import functional as F
from apotfx.errors import ApotfxError
from apotfx.integer.format import export_integer, read_integer
from apotfx.integer.load import load_integer
from apotfx.integer.manifest import checksum
from apotfx.integer.program import Program
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


def weight_in_clip_units(layer: QuantLayer) -> torch.Tensor:
    """What the clip of a layer's weight is compared to."""
    weight, unit = layer.weight_quantizer.normalize(layer.weight)
    return weight if unit is None else weight / unit


def num_hooks(model: nn.Module) -> list[int]:
    """The hooks on every module's calls."""
    return [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]


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


# Networks to export.


class Net(nn.Module):
    """Convolutions of all kinds of padding, a branch, batch norms, a float layer and a linear layer."""

    def __init__(self, padding_mode="circular", classes=3, bias=True, stride=1, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding="same", groups=2)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, padding_mode=padding_mode)
        self.pointwise = nn.Conv2d(6, 4, 1, stride=2)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(4, classes, bias=bias)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv3(self.conv2(x)) + x)
        return self.fc(torch.relu(self.bn2(self.pointwise(x))).mean((2, 3)))


class Conv1dNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(),
            nn.Conv1d(4, 4, 3, padding="same", dilation=2), nn.Flatten(),
                         nn.Linear(32, 3))  # fmt: skip


class Conv3dNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 3),
            nn.Flatten(),
                         nn.Linear(24, 3))  # fmt: skip


INPUT_SHAPES = {Net: (5, 2, 8, 8), Conv1dNet: (5, 2, 8), Conv3dNet: (5, 2, 4, 4, 4)}
MIXED = BitPolicy((
    Rule(name="conv1", scheme="uniform", weight_bits=8, activation_bits=32),
    Rule(name="conv2", scheme="float"),
    Rule(name="conv3", scheme="pot", weight_bits=5, activation_bits=4, granularity="channel",
        normalization="none"),
    Rule(name="pointwise", scheme="apot", weight_bits=32, activation_bits=6),
    Rule(normalization="standardize"),
))  # fmt: skip


def data(model_type=Net):
    return torch.randn(INPUT_SHAPES[model_type], generator=torch.Generator().manual_seed(1))


def trained(policy, model_type=Net, **options):
    """A quantized network, calibrated and trained for a step, in evaluation mode; and its float model."""
    torch.manual_seed(0)
    model = model_type(**options)
    qmodel = calibrate(quantize(model, policy), [data(model_type)])
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    qmodel(data(model_type)).square().sum().backward()
    optimizer.step()
    return qmodel.eval(), model


def policy(**rule):
    return BitPolicy((Rule(**rule),))


def check_equal(qmodel, imodel, x):
    with torch.no_grad():
        expected, y = qmodel(x), imodel(x)
    assert torch.equal(y, expected) and expected.isfinite().all() and len(expected.unique()) > 1


def export_and_compare(tmp_path, qmodel, model, x):
    path = export_integer(qmodel, tmp_path / "export")
    imodel = load_integer(path, model)
    check_equal(qmodel, imodel, x)
    if not Program.from_json(read_integer(path)[0]["program"]).foreign:
        check_equal(qmodel, load_integer(path), x)
    return imodel


def edit_manifest(path, change, sign=False):
    """Apply `change` to the manifest of the export `path`; `sign` gives it a valid checksum."""
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["manifest_sha256"] = checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def check_refused(path, model, message):
    for read in (lambda: read_integer(path), lambda: load_integer(path, model)):
        with pytest.raises(ApotfxError, match=message) as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


# What the tools print.


def table_rows(text):
    """The cells of every row of the Markdown tables, headers included."""
    lines = (line for line in text.splitlines() if line.startswith("| "))
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
