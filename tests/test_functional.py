import math

import numpy as np
import pytest
import torch
from helpers import LEVEL_SETS, encoding, level_set_id, nearest_level

from apotfx import LevelSet
from apotfx import functional as F

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
signed_or_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])

CLIPS = (1.0, 0.37, 3.0000001, 1e-6, 1234.5)
SPECIAL = [0.0, -0.0, 1e-45, -1e-45, 0.1, -0.1, 3.4e38, -3.4e38, math.inf, -math.inf, math.nan]


def is_minus_zero(x):
    return (x == 0) & x.signbit()


@every_level_set
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_representable_integer_comes_back(levels, dtype):
    ints = torch.tensor(levels.ints, dtype=dtype)
    n = torch.cat([-ints.flip(0)[:-1], ints]) if levels.signed else ints
    for clip in torch.tensor(CLIPS, dtype=dtype):
        x = F.decode(n, clip, encoding(levels))
        assert torch.equal(F.encode(x, clip, encoding(levels)), n)
        assert torch.equal(F.fake_quantize(x, clip, encoding(levels)), x)


@every_level_set
@pytest.mark.parametrize("exponent", [-3, 0, 5])
def test_encode_takes_the_nearest_level(levels, exponent):
    """The clip is a power of two times max, so that float32 makes no error, on any input."""
    torch.manual_seed(0)
    position = torch.cat([
        torch.randn(2000) * levels.max / 2,
        torch.randn(2000) * 4,
        torch.arange(-2 * levels.max - 4, 2 * levels.max + 5) / 2,  # every tie, and beyond the clip
    ])  # fmt: skip
    x, clip = position * 2.0**exponent, torch.tensor(levels.max * 2.0**exponent)
    n = F.encode(x, clip, encoding(levels))
    assert n.dtype == torch.float32
    expected = nearest_level(position.clamp(-levels.max, levels.max), levels)
    assert torch.equal(n.double(), expected)
    assert not is_minus_zero(n).any()


@every_level_set
def test_encode_is_nearest_up_to_rounding_for_any_clip(levels):
    torch.manual_seed(0)
    ints = torch.tensor(levels.ints, dtype=torch.float64)
    x = torch.randn(4000)
    for clip in (torch.tensor(0.7312), torch.tensor(2.9)):
        n = F.encode(x, clip, encoding(levels)).double()
        assert torch.isin(n.abs(), ints).all()
        position = (x.double() / clip.double() * levels.max).clamp(-levels.max if levels.signed else 0, levels.max)
        smallest = (position.abs().unsqueeze(1) - ints).abs().amin(1)
        assert ((position - n).abs() <= smallest + position.abs() * 2**-22).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@signed_or_not
def test_special_values(dtype, signed):
    levels = LevelSet("apot", 4, signed)
    limit = torch.finfo(dtype).max
    x = torch.tensor([min(max(v, -limit), limit) if math.isfinite(v) else v for v in SPECIAL], dtype=dtype)
    low = -levels.max if signed else 0
    expected = torch.tensor([0, 0, 0, 0, 1, -1 if signed else 0, levels.max, low, levels.max, low, math.nan])
    n = F.encode(x, torch.tensor(1.0), encoding(levels))
    expected[4], expected[5] = nearest_level(x[4:6].double() * levels.max, levels)
    assert n.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert torch.equal(n[:-1], expected[:-1].to(n.dtype)) and n[-1].isnan()
    assert not is_minus_zero(n).any()


@every_level_set
def test_special_values_at_the_smallest_clip(levels):
    n = F.encode(torch.tensor([0.0, 1e-30, 1.0, 3e38, math.inf]), torch.tensor(F.MIN_CLIP), encoding(levels))
    assert n.tolist() == [0, 0, levels.max, levels.max, levels.max]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@signed_or_not
def test_half_precision_is_encoded_in_float32(dtype, signed):
    levels = encoding(LevelSet("apot", 5, signed))
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    for clip in (torch.tensor(1.3), torch.tensor(1.3, dtype=dtype)):
        assert torch.equal(F.encode(x, clip, levels), F.encode(x.float(), clip.float(), levels))


@pytest.mark.parametrize("shape", [(0,), (0, 3, 4, 4), (2, 0)], ids=str)
def test_nothing_is_encoded_to_nothing(shape):
    assert F.encode(torch.empty(shape), torch.tensor(1.0), encoding(LevelSet("apot", 4))).shape == shape


def test_a_scalar_is_encoded():
    assert F.encode(torch.tensor(-1.0), torch.tensor(1.0), encoding(LevelSet("apot", 4))) == torch.tensor(-10.0)


@pytest.mark.parametrize("layout", [
    lambda x: x.contiguous(memory_format=torch.channels_last), lambda x: x.transpose(0, 3),
    lambda x: x[:, ::2, :, 1:],
    lambda x: x[:, :1].expand(-1, 5, -1, -1), lambda x: x.permute(3, 1, 0, 2),
], ids=["channels_last", "transposed", "sliced", "expanded", "permuted"])  # fmt: skip
@signed_or_not
def test_memory_layout_changes_nothing(layout, signed):
    levels = encoding(LevelSet("apot", 4, signed))
    x = layout(torch.randn(4, 6, 5, 7, generator=torch.Generator().manual_seed(0)))
    before = x.clone()
    assert torch.equal(F.encode(x, torch.tensor(1.1), levels), F.encode(x.contiguous(), torch.tensor(1.1), levels))
    assert torch.equal(x, before)


@signed_or_not
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_clip_per_channel(signed, memory_format):
    levels = encoding(LevelSet("apot", 4, signed))
    w = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=memory_format)
    clip = torch.tensor([0.1, 0.5, 1, 2, 30.0]).reshape(5, 1, 1, 1)
    rows = [F.encode(row, c.reshape(()), levels) for row, c in zip(w, clip)]
    assert torch.equal(F.encode(w, clip, levels), torch.stack(rows))
    assert torch.equal(F.decode(torch.stack(rows), clip, levels), torch.stack(rows) * (clip / levels.max))


# The operators, each with the shapes of an input and a weight.

OPERATORS = {
    "conv1d": (F.Convolution((2,), (1,), (2,), 1), (3, 4, 11), (6, 4, 3)),
    "conv2d": (F.Convolution((1, 1), (0, 0), (1, 1), 1), (2, 3, 6, 5), (4, 3, 3, 3)),
    "conv2d-strided": (F.Convolution((2, 3), (1, 2), (1, 2), 1), (2, 3, 9, 10), (4, 3, 3, 3)),
    "conv2d-pointwise": (F.Convolution((1, 1), (0, 0), (1, 1), 1), (1, 3, 4, 4), (5, 3, 1, 1)),
    "conv2d-grouped": (F.Convolution((1, 1), (1, 1), (1, 1), 2), (2, 4, 6, 6), (6, 2, 3, 3)),
    "conv2d-depthwise": (F.Convolution((1, 1), (1, 1), (1, 1), 4), (2, 4, 6, 6), (4, 1, 3, 3)),
    "conv3d": (F.Convolution((1, 2, 1), (1, 0, 1), (1, 1, 1), 1), (2, 2, 4, 5, 4), (3, 2, 2, 2, 3)),
    "linear": (F.MatrixProduct(), (7, 5), (4, 5)),
    "linear-sequence": (F.MatrixProduct(), (2, 3, 5), (4, 5)),
    "linear-vector": (F.MatrixProduct(), (5,), (4, 5)),
}
every_operator = pytest.mark.parametrize("operator, shape_x, shape_w", OPERATORS.values(), ids=OPERATORS)


def torch_operator(operator):
    """The same by torch's public functions."""
    if isinstance(operator, F.MatrixProduct):
        return torch.nn.functional.linear
    conv = {1: torch.conv1d, 2: torch.conv2d, 3: torch.conv3d}[len(operator.stride)]
    return lambda x, w: conv(x, w, None, *operator)


def integer_operator(operator, x, w):
    """The same on int64 arrays of numpy."""
    x, w = x.numpy().astype(np.int64), w.numpy().astype(np.int64)
    if isinstance(operator, F.MatrixProduct):
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


def closed_form(x, clip, levels, everywhere=False):
    """(what x is quantized to, d/dx, the summands of d/dclip) by the formulas, elementwise, in float64."""
    v = x / clip
    inside = (v >= -1 if levels.signed else v >= 0) & (v <= 1)
    q = nearest_level((v * levels.max).clamp(-levels.max, levels.max), levels) / levels.max
    outside = torch.where(v > 0, 1.0, -1.0 if levels.signed else 0.0)
    return q * clip, torch.ones_like(v) if everywhere else inside.double(), torch.where(inside, q - v, outside)


def operands(shape_x, shape_w, per_channel=False, dtype=torch.float64):
    torch.manual_seed(0)
    x, w = torch.randn(shape_x, dtype=dtype), torch.randn(shape_w, dtype=dtype)
    clip_w = torch.tensor(0.9, dtype=dtype)
    if per_channel:
        clip_w = torch.linspace(0.3, 2, shape_w[0], dtype=dtype).reshape(-1, *(1 for _ in shape_w[1:]))
    return [t.requires_grad_() for t in (x, w, torch.tensor(1.1, dtype=dtype), clip_w)]


def check_against_closed_form(operator, tensors, levels_x, levels_w, *, rescale=1.0, factor=1.0, everywhere=False):
    """Output and all four gradients of `quantized_op` to within a few roundings of float64."""
    x, w, clip_x, clip_w = tensors
    y = F.quantized_op(
        x, w, clip_x if levels_x else None, clip_w if levels_w else None,
        levels_x=levels_x and encoding(levels_x), levels_w=levels_w and encoding(levels_w), operator=operator,
        dtype=torch.float64, rescale=torch.tensor(rescale, dtype=torch.float64), clip_grad_factor=factor,
        everywhere=everywhere,
    )  # fmt: skip
    grad = torch.randn(y.shape, dtype=torch.float64)
    wanted = [t for t, used in ((x, True), (w, True), (clip_x, levels_x), (clip_w, levels_w)) if used]
    got = torch.autograd.grad(y, wanted, grad)

    with torch.no_grad():
        as_is = torch.ones((), dtype=torch.float64)
        xq, dx, dclip_x = closed_form(x, clip_x, levels_x) if levels_x else (x, as_is, None)
        wq, dw, dclip_w = closed_form(w, clip_w, levels_w, everywhere) if levels_w else (w, as_is, None)
    xq, wq = xq.detach().clone().requires_grad_(), wq.detach().clone().requires_grad_()
    expected_y = torch_operator(operator)(xq, wq * rescale)
    grad_x, grad_w = torch.autograd.grad(expected_y, (xq, wq), grad)
    expected = [grad_x * dx, grad_w * dw]
    if levels_x:
        expected.append(factor * (grad_x * dclip_x).sum())
    if levels_w:
        expected.append(factor * (grad_w * dclip_w).sum_to_size(clip_w.shape))
    for a, b in zip([y, *got], [expected_y, *expected], strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@every_operator
@signed_or_not
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_gradients_are_the_closed_forms(operator, shape_x, shape_w, signed, per_channel):
    tensors = operands(shape_x, shape_w, per_channel)
    check_against_closed_form(operator, tensors, LevelSet("apot", 4, signed), LevelSet("apot", 4))


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_gradients_for_every_level_set(levels):
    operator, shape_x, shape_w = OPERATORS["linear"]
    check_against_closed_form(operator, operands(shape_x, shape_w), levels, LevelSet("uniform", 3))
    if levels.signed:
        check_against_closed_form(operator, operands(shape_x, shape_w), None, levels)


@every_operator
@pytest.mark.parametrize("quantized", ["weight", "input"])
def test_gradients_with_one_float_operand(operator, shape_x, shape_w, quantized):
    levels_x, levels_w = (None, LevelSet("apot", 3)) if quantized == "weight" else (LevelSet("apot", 3, False), None)
    check_against_closed_form(operator, operands(shape_x, shape_w, True), levels_x, levels_w, rescale=0.3)


@pytest.mark.parametrize("options", [
    {"everywhere": True}, {"factor": 0.01}, {"rescale": 2.5},
    {"everywhere": True, "factor": 0.0, "rescale": 0.1},
], ids=lambda options: "-".join(options))  # fmt: skip
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_gradients_with_options(options, name):
    operator, shape_x, shape_w = OPERATORS[name]
    check_against_closed_form(
        operator, operands(shape_x, shape_w, True), LevelSet("apot", 4, False), LevelSet("apot", 2), **options
    )


@signed_or_not
@pytest.mark.parametrize("everywhere", [False, True], ids=["inside", "everywhere"])
def test_gradient_of_single_values(signed, everywhere):
    """Levels 0 1 2 4 of 4, or 0 1, each with the clip 2."""
    levels = LevelSet("apot", 3, True) if signed else LevelSet("apot", 2, False)
    x = torch.tensor([-9.0, -2.0, -0.3, 0.0, 0.6, 1.4, 2.0, 2.1, 50.0], dtype=torch.float64)
    clip, grad = torch.tensor(2.0, dtype=torch.float64), torch.full_like(x, 3)
    n = F.encode(x, clip, encoding(levels))
    assert n.tolist() == ([-4, -4, -1, 0, 1, 2, 4, 4, 4] if signed else [0, 0, 0, 0, 1, 2, 4, 4, 4])
    grad_x, grad_clip = F.quantization_gradient(grad, x, n, clip, encoding(levels), everywhere)
    passed = [0, 1, 1, 1, 1, 1, 1, 0, 0] if signed else [0, 0, 0, 1, 1, 1, 1, 0, 0]
    assert grad_x.tolist() == [3] * 9 if everywhere else [3 * p for p in passed]
    errors = [-1, 0, -1 / 4 + 0.15, 0, 1 / 4 - 0.3, 2 / 4 - 0.7, 0, 1, 1]
    assert grad_clip.item() == pytest.approx(3 * sum(errors if signed else [0, 0, 0, *errors[3:]]), rel=1e-14)


@pytest.mark.parametrize(
    "levels", [LevelSet("apot", 4, False), LevelSet("uniform", 8), LevelSet("pot", 4)], ids=level_set_id
)
def test_levels_kept_in_bfloat16_do_not_change_the_gradient_of_the_clip(levels):
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    clip, grad = torch.tensor(1.3), torch.randn(1000, generator=torch.Generator().manual_seed(1))
    n = F.encode(x, clip, encoding(levels))
    expected = F.quantization_gradient(grad, x, n, clip, encoding(levels))
    got = F.quantization_gradient(grad, x, n.bfloat16(), clip, encoding(levels))
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_gradient_of_the_clip_for_half_precision_values(dtype):
    levels = encoding(LevelSet("apot", 4))
    x = torch.tensor([60000.0, -60000.0, 0.01, -0.02, 0.03], dtype=dtype)
    clip, grad = torch.tensor(0.05), torch.ones(5)
    n = F.encode(x, clip, levels)
    expected = F.quantization_gradient(grad, x.float(), n, clip, levels)[1]
    assert expected.isfinite() and torch.equal(F.quantization_gradient(grad, x, n, clip, levels)[1], expected)


def test_infinite_values_have_finite_gradients():
    levels = encoding(LevelSet("apot", 4))
    x, clip = torch.tensor([math.inf, -math.inf, 3e38, 0.0]), torch.tensor(1e-3)
    grad_x, grad_clip = F.quantization_gradient(
        torch.tensor([1.0, 2, 4, 8]), x, F.encode(x, clip, levels), clip, levels
    )
    assert grad_x.tolist() == [0, 0, 0, 8] and grad_clip == 1 - 2 + 4


def test_only_what_is_asked_for_gets_a_gradient():
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    for wanted in range(4):
        tensors = operands(shape_x, shape_w)
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == wanted)
        y = run(operator, *tensors, LevelSet("apot", 4), LevelSet("apot", 4), torch.float64)
        y.sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(4)]


def test_a_clip_below_zero_counts_as_the_smallest_clip():
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    results = []
    for clip in (-3.0, 0.0, F.MIN_CLIP):
        x, w, clip_x, clip_w = operands(shape_x, shape_w, dtype=torch.float32)
        clip_x.data.fill_(clip)
        clip_w.data.fill_(clip)
        y = run(operator, x, w, clip_x, clip_w, LevelSet("apot", 4), LevelSet("apot", 4), torch.float32)
        y.sum().backward()
        results.append([y, x.grad, w.grad, clip_x.grad, clip_w.grad])
    assert all(t.isfinite().all() for t in results[0]) and results[0][4] != 0
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


# Exactness.


def run(operator, x, w, clip_x, clip_w, levels_x, levels_w, dtype, rescale=1.0):
    return F.quantized_op(
        x, w, clip_x, clip_w, levels_x=encoding(levels_x), levels_w=encoding(levels_w), operator=operator,
        dtype=dtype,
        rescale=torch.tensor(rescale, dtype=x.dtype),
    )  # fmt: skip


EXACT_PAIRS = [
    (LevelSet("apot", 4, False), LevelSet("apot", 4)), (LevelSet("uniform", 8), LevelSet("uniform", 8)),
    (LevelSet("apot", 6, False), LevelSet("apot", 6)), (LevelSet("pot", 4, False), LevelSet("pot", 5)),
    (LevelSet("apot", 8, False), LevelSet("apot", 8)),
]  # fmt: skip


@every_operator
@pytest.mark.parametrize("levels_x, levels_w", EXACT_PAIRS, ids=lambda levels: level_set_id(levels))
def test_accumulators_are_those_of_integer_arithmetic(operator, shape_x, shape_w, levels_x, levels_w):
    torch.manual_seed(0)
    x, w = torch.randn(shape_x) * levels_x.max, torch.randn(shape_w) * levels_w.max
    clip_x, clip_w = torch.tensor(float(levels_x.max)), torch.tensor(float(levels_w.max))
    n_x = nearest_level(x.clamp(-levels_x.max, levels_x.max), levels_x)
    n_w = nearest_level(w.clamp(-levels_w.max, levels_w.max), levels_w)
    expected = integer_operator(operator, n_x, n_w)
    dtype = F.exact_dtype(w.shape, levels_w.max, levels_x.max, x.device)
    accumulators = operator.forward(n_x.to(dtype), n_w.to(dtype))
    assert torch.equal(accumulators.long(), expected) and torch.equal(accumulators, accumulators.round())
    # With clips of max the scale is 1.
    assert torch.equal(run(operator, x, w, clip_x, clip_w, levels_x, levels_w, dtype), expected.float())
    scaled = run(operator, x, w, clip_x, clip_w, levels_x, levels_w, dtype, rescale=0.3)
    assert torch.equal(scaled, expected.float() * torch.tensor(0.3))


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_the_scale_is_applied_once_after_the_accumulators(per_channel):
    levels_x, levels_w = LevelSet("apot", 4, False), LevelSet("apot", 4)
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    x, w, clip_x, clip_w = (t.detach() for t in operands(shape_x, shape_w, per_channel, torch.float32))
    n_x, n_w = F.encode(x, clip_x, encoding(levels_x)), F.encode(w, clip_w, encoding(levels_w))
    scale = (clip_x / levels_x.max) * (clip_w / levels_w.max * torch.tensor(0.7))
    expected = integer_operator(operator, n_x, n_w).float() * (scale.reshape(-1, 1, 1) if per_channel else scale)
    assert torch.equal(run(operator, x, w, clip_x, clip_w, levels_x, levels_w, torch.float32, rescale=0.7), expected)


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("name, shape_x, shape_w", [
    ("conv2d", (17, 16, 14, 14), (24, 16, 3, 3)), ("conv2d-pointwise", (17, 16, 14, 14), (24, 16, 1, 1)),
    ("linear", (65, 400), (50, 400)),
])  # fmt: skip
@pytest.mark.parametrize("levels_x, levels_w", EXACT_PAIRS[:3], ids=lambda levels: level_set_id(levels))
def test_threads_layout_and_batch_change_no_bit(name, shape_x, shape_w, levels_x, levels_w, num_threads):
    operator = OPERATORS[name][0]
    torch.manual_seed(0)
    x, w, clips = torch.randn(shape_x), torch.randn(shape_w), (torch.tensor(1.7), torch.tensor(2.3))
    dtype = F.exact_dtype(w.shape, levels_w.max, levels_x.max, x.device)

    def result(x, w):
        return run(operator, x, w, *clips, levels_x, levels_w, dtype)

    num_threads(1)
    expected = result(x, w)
    num_threads(2)
    assert torch.equal(result(x, w), expected)
    assert torch.equal(torch.cat([result(row.unsqueeze(0), w) for row in x]), expected)
    assert torch.equal(torch.cat([result(part, w) for part in x.split(16)]), expected)
    if x.dim() == 4:
        last = torch.channels_last
        assert torch.equal(result(x.contiguous(memory_format=last), w.contiguous(memory_format=last)), expected)
    else:
        assert torch.equal(result(x.T.contiguous().T, w.T.contiguous().T), expected)


CPU = torch.device("cpu")


@pytest.mark.parametrize("num_inputs, max_w, max_x, expected", [
    (518, 127, 255, torch.float32), (519, 127, 255, torch.float64),  # 2^24 = 16 777 216 lies between
    (2**24 - 1, 1, 1, torch.float32), (2**24, 1, 1, torch.float64),
    (1, 256, 256, torch.float32), (1, 257, 1, torch.float64), (1, 1, 257, torch.float64),  # beyond bfloat16
])  # fmt: skip
def test_exact_dtype_at_its_bounds(num_inputs, max_w, max_x, expected):
    assert F.exact_dtype(torch.Size([10, num_inputs]), max_w, max_x, CPU) == expected


def test_the_bound_counts_a_group_and_the_kernel():
    assert F.accumulator_bound(torch.Size([64, 8, 3, 5]), 10, 7) == 8 * 3 * 5 * 10 * 7


def test_exact_dtype_on_a_gpu_is_float64():
    assert F.exact_dtype(torch.Size([4, 4, 3, 3]), 1, 1, torch.device("cuda")) == torch.float64


def test_accumulators_are_exact_without_onednn(monkeypatch):
    """NNPACK, which torch then uses for batches of 16, computes by Winograd."""
    operator = F.Convolution((1, 1), (0, 0), (1, 1), 1)
    n_x = torch.randint(0, 100, (16, 16, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    n_w = torch.randint(-100, 101, (4, 16, 3, 3), generator=torch.Generator().manual_seed(1)).float()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    dtype = F.exact_dtype(n_w.shape, 100, 100, CPU)
    expected = integer_operator(operator, n_x, n_w)
    assert torch.equal(operator.forward(n_x.to(dtype), n_w.to(dtype)).to(torch.float64), expected.double())


@pytest.mark.parametrize("num_inputs", [518, 519])
def test_the_largest_accumulators_are_exact(num_inputs):
    levels_x, levels_w = LevelSet("uniform", 8, False), LevelSet("uniform", 8)
    x, w = torch.full((3, num_inputs), 255.0), torch.full((2, num_inputs), 127.0)
    w[1] = -127
    dtype = F.exact_dtype(w.shape, 127, 255, CPU)
    n = F.MatrixProduct().forward(F.encode(x, torch.tensor(255.0), encoding(levels_x)).to(dtype),
                                  F.encode(w, torch.tensor(127.0), encoding(levels_w)).to(dtype))  # fmt: skip
    assert n.tolist() == [[num_inputs * 127 * 255, -num_inputs * 127 * 255]] * 3


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 kernels that sum in float32",
)


@needs_bfloat16
@every_operator
def test_bfloat16_operands_cost_one_rounding_of_the_accumulators(operator, shape_x, shape_w):
    levels_x, levels_w = LevelSet("apot", 5, False), LevelSet("apot", 5)
    x, w, clip_x, clip_w = (t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32))
    n_x, n_w = F.encode(x, clip_x, encoding(levels_x)), F.encode(w, clip_w, encoding(levels_w))
    scale = clip_x / levels_x.max * (clip_w / levels_w.max)
    expected = integer_operator(operator, n_x, n_w).float().bfloat16().float() * scale
    for autocast in (True, False):
        with torch.autocast("cpu", enabled=autocast):
            y = run(operator, x, w, clip_x, clip_w, levels_x, levels_w, torch.bfloat16)
        assert y.dtype == torch.float32 and torch.equal(y, expected)


def test_autocast_leaves_exact_operands_alone():
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    x, w, clip_x, clip_w = (t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32))
    arguments = operator, x, w, clip_x, clip_w, LevelSet("uniform", 8), LevelSet("uniform", 8), torch.float32
    expected = run(*arguments)
    with torch.autocast("cpu"):
        assert torch.equal(run(*arguments), expected)


@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_an_empty_batch_goes_through(name):
    operator, shape_x, shape_w = OPERATORS[name]
    x, w, clip_x, clip_w = operands((0, *shape_x[1:]), shape_w)
    y = run(operator, x, w, clip_x, clip_w, LevelSet("apot", 4), LevelSet("apot", 4), torch.float64)
    y.sum().backward()
    assert y.shape[0] == 0 and x.grad.shape == x.shape
    assert not w.grad.any() and clip_x.grad == 0 and clip_w.grad == 0
