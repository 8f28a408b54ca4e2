"""The Triton kernels: here by Triton's interpreter on the CPU, and on a GPU where there is one."""

import importlib
import math

import pytest
import torch
from helpers import LEVEL_SETS, level_set_id

from apotfx import engine
from apotfx import functional as F
from apotfx.functional import Operand
from apotfx.levels import LevelSet

RELU, RELU6 = (0.0, math.inf), (0.0, 6.0)
LEVELS = LevelSet("apot", 4)

pytestmark = [
    pytest.mark.skipif(not engine.HAS_TRITON, reason="Triton is not installed"),
    # what numpy 2 says of Triton 3.2's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim > 0 to a scalar:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def kernels():
    return importlib.import_module("apotfx.gpu_kernels")


DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make(x, clip, unit=None, levels=LEVELS, rectifier=None):
    """An operand on the device of the kernels."""
    x, clip, unit = (None if t is None else t.to(DEVICE) for t in (x, clip, unit))
    return Operand(x, clip, unit, F.Levels(levels, rectifier))


def values(*shape, dtype=torch.float32):
    return (1.5 * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def assert_same(a, b):
    assert a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
    assert a.stride() == b.stride()


every_clip = pytest.mark.parametrize(
    "clip", [torch.tensor(1.7), torch.linspace(0.3, 3, 6).reshape(6, 1, 1, 1)], ids=["tensor", "channel"]
)
every_unit = pytest.mark.parametrize("unit", [None, torch.tensor(0.37)], ids=["no-unit", "unit"])


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_levels_are_those_of_encode_in_every_bit(kernels, levels):
    step = 0.5 / levels.max
    ties = torch.arange(-2.0 * levels.max - 4, 2 * levels.max + 5) * step
    x = torch.cat([ties, ties.nextafter(torch.tensor(9.0)), ties.nextafter(torch.tensor(-9.0)), values(1500)])
    x[-3:] = torch.tensor([math.nan, math.inf, -math.inf])
    for rectifier in (None, RELU, RELU6):
        operand = make(x, torch.tensor(1.0), None, levels, rectifier)
        n = F.encode(operand.values, operand.used_clip, operand.levels)
        assert_same(kernels.encode(operand), n)


def test_levels_beside_ties_are_those_of_encode_at_any_clip(kernels):
    """Where another order of rounding would show."""
    clips = 0.3 + 3 * torch.rand(200, 1, generator=torch.Generator().manual_seed(0))
    x = clips * (torch.arange(1.0, 2 * LEVELS.max) * (0.5 / LEVELS.max))
    near = [x]
    for direction in (0.0, 99.0):
        for _ in range(2):
            near.append(near[-1].nextafter(torch.tensor(direction)))
        near.append(x)
    operand = make(torch.cat(near, 1), clips)
    assert_same(kernels.encode(operand), F.encode(operand.values, operand.used_clip, operand.levels))


@every_clip
@every_unit
@pytest.mark.parametrize("channels_last", [False, True])
def test_levels_times_their_step(kernels, clip, unit, channels_last):
    x = values(6, 5, 7, 33).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    operand = make(x, clip, unit)
    factor = torch.tensor(0.123, device=operand.values.device)
    expected = F.encode(operand.values, operand.used_clip, operand.levels) * (operand.scale * factor)
    assert_same(kernels.encode(operand, factor), expected)
    assert_same(kernels.scale(operand), operand.scale)
    assert_same(kernels.scale(operand, factor), operand.scale * factor)


@every_clip
@every_unit
@pytest.mark.parametrize("rectifier", [None, RELU, RELU6], ids=["none", "relu", "relu6"])
@pytest.mark.parametrize("everywhere", [False, True])
def test_gradients_are_those_of_the_closed_form(kernels, clip, unit, rectifier, everywhere):
    x = values(6, 5, 7, 33)
    x[0, 0, 0, :4] = torch.tensor([math.inf, -math.inf, 0.0, 6.0])
    levels = LevelSet("apot", 4, rectifier is None)
    operand = make(x, clip, unit, levels, rectifier)
    grad = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(operand.values.device)
    for factor in (None, torch.tensor(0.123, device=grad.device)):
        expected = F.quantization_gradient(
            grad if factor is None else grad * factor, operand.values,
            F.encode(operand.values, operand.used_clip, operand.levels), operand.used_clip, operand.levels, everywhere,
        )  # fmt: skip
        grad_x, grad_clip = kernels.gradient(grad, operand, factor, everywhere)
        assert_same(grad_x, expected[0])
        magnitude = (grad * (1 if factor is None else factor)).abs().sum_to_size(clip.shape)
        tolerance = 1e-6 * magnitude * (1 if unit is None else unit.item())
        expected_clip = expected[1] if unit is None else expected[1] * operand.unit
        assert grad_clip.shape == clip.shape and ((grad_clip - expected_clip).abs() <= tolerance).all()


def test_many_blocks_are_summed_by_few_programs(kernels, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)
    operand = make(values(2, 7001), torch.tensor(1.7))
    grad = torch.randn_like(operand.values)
    n = F.encode(operand.values, operand.used_clip, operand.levels)
    expected = F.quantization_gradient(grad, operand.values, n, operand.used_clip, operand.levels)
    grad_x, grad_clip = kernels.gradient(grad, operand, None, False)
    assert torch.equal(grad_x, expected[0]) and abs(grad_clip - expected[1]) <= 1e-6 * grad.abs().sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(kernels, dtype):
    operand = make(values(6, 5, 7, 33, dtype=dtype), torch.tensor(1.7))
    n = F.encode(operand.values, operand.used_clip, operand.levels)
    assert_same(kernels.encode(operand, None, dtype), n.to(dtype))
    grad = torch.randn_like(n)  # transposed, as it may come
    grad = grad.transpose(2, 3).contiguous().transpose(2, 3)
    expected = F.quantization_gradient(grad, operand.values, n, operand.used_clip, operand.levels)
    grad_x, grad_clip = kernels.gradient(grad, operand, None, False)
    assert grad_x.dtype == dtype and grad_x.stride() == operand.values.stride()
    # One unit in the last place: the interpreter cuts where a GPU rounds.
    torch.testing.assert_close(grad_x.float(), expected[0], rtol=torch.finfo(dtype).eps, atol=1e-6)
    torch.testing.assert_close(grad_clip, expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "operand",
    [
        Operand(values(3), None, None, None), make(values(3).double(), torch.tensor(1.0)),
        make(values(3), torch.tensor(1.0).double()), make(values(0), torch.tensor(1.0)),
        make(values(4, 6).to(DEVICE)[:, ::2], torch.tensor(1.0)),
        make(values(3), torch.tensor(1.0), torch.tensor(1.0).double()),
    ],
    ids=["float", "float64", "float64-clip", "empty", "not-dense", "float64-unit"],
)  # fmt: skip
def test_what_the_kernels_leave_to_others(kernels, operand):
    assert not kernels.accept(operand)
    n = engine.ON_GPU.levels(operand)
    expected = engine.EAGER.levels(operand)
    assert torch.equal(n, expected) and engine.ON_GPU.levels(operand, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert torch.equal(engine.ON_GPU.scale(operand), engine.EAGER.scale(operand))


@pytest.mark.parametrize(
    "x", [values(6, 5, 7, 33), 1e3 + values(3001), values(1), torch.full((5,), 3.0), values(9).bfloat16()]
)
def test_standard_deviation(kernels, x, monkeypatch):
    monkeypatch.setattr(kernels, "MAX_PROGRAMS", 3)
    x = x.to(DEVICE)
    deviation = kernels.standard_deviation(x)
    assert deviation.shape == () and deviation.dtype == torch.float32
    torch.testing.assert_close(deviation, F.standard_deviation(x.double()).float(), rtol=1e-7, atol=1e-7)
    assert kernels.standard_deviation(torch.cat([x.flatten(), x.new_full((1,), math.nan)])).isnan()
