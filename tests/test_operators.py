import itertools

import pytest
import torch
from helpers import (
    OPERATORS,
    every_operator,
    integer_operator,
    needs_bytes,
    operands,
    torch_operator,
)

from apotfx import LevelSet
from apotfx import functional as F
from apotfx.operators import (
    Convolution,
    MatrixProduct,
    accumulator_bits,
    accumulator_bound,
    accumulators,
    exact_dtype,
    output_shaped,
    scaled_op,
    without_idle_taps,
)

CPU = torch.device("cpu")


def integers(*shape, low=-9, high=10, seed=0, dtype=torch.float64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# What they compute.


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_gradients_are_those_of_torch(operator, shape_x, shape_w, dtype):
    """On integers, so that every order of summation gives the same."""
    x, w = integers(*shape_x, dtype=dtype).requires_grad_(), integers(*shape_w, seed=1, dtype=dtype).requires_grad_()
    expected = torch_operator(operator)(x, w)
    grad = integers(*expected.shape, seed=2, dtype=dtype)
    y = operator.forward(x, w)
    assert torch.equal(y, expected) and torch.equal(y.long(), integer_operator(operator, x.detach(), w.detach()))
    grads = torch.autograd.grad(expected, (x, w), grad)
    for needs in itertools.product([True, False], repeat=2):
        for got, wanted, needed in zip(operator.backward(grad, x, w, needs), grads, needs, strict=True):
            assert torch.equal(got, wanted) if needed else got is None or not got.numel()


@every_operator
def test_multiplications(operator, shape_x, shape_w):
    """Exactly, where no padding saves any and strides divide the size."""
    x, w = torch.empty(shape_x), torch.empty(shape_w)
    y = operator.forward(x, w)
    expected = y.numel() * w[0].numel()
    assert 0.5 * expected <= operator.multiplications(x, w) <= 2.5 * expected
    if isinstance(operator, MatrixProduct):
        assert operator.multiplications(x, w) == expected


# Taps that meet padding only.


def check_idle_taps(convolution, sizes, kernel):
    """Forward and both gradients are those of torch, exactly; returns the kernel that is used."""
    x, w = integers(2, 2, *sizes).requires_grad_(), integers(3, 2, *kernel, seed=1).requires_grad_()
    expected = torch_operator(convolution)(x, w)
    grad = integers(*expected.shape, seed=2)
    assert torch.equal(convolution.forward(x, w), expected)
    for got, wanted in zip(
        convolution.backward(grad, x, w, (True, True)), torch.autograd.grad(expected, (x, w), grad), strict=True
    ):
        assert got.shape == wanted.shape and torch.equal(got, wanted)
    used, taps = without_idle_taps(convolution, sizes, kernel)
    assert used._replace(padding=convolution.padding) == convolution
    return tuple(w[taps].shape[2:]) if taps else kernel


def meeting_taps(size, k, s, p, d):
    """The taps of a kernel that meet a value of the input, by trying all."""
    outputs = (size + 2 * p - d * (k - 1) - 1) // s + 1
    return [t for t in range(k) if any(0 <= o * s - p + t * d < size for o in range(outputs))]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_idle_taps_in_one_dimension(size, k):
    fewer = 0
    for s, p, d in itertools.product([1, 2, 3], [0, 1, 2, 4], [1, 2, 3]):
        if size + 2 * p < d * (k - 1) + 1:
            continue
        (used,) = check_idle_taps(Convolution((s,), (p,), (d,), 1), (size,), (k,))
        taps = meeting_taps(size, k, s, p, d)
        assert used in (k, taps[-1] + 1 - taps[0] if taps else k)
        fewer += used < k
    assert fewer or k == 1 or size > 1  # on a map of 1 there is always something to save


@pytest.mark.parametrize("sizes", [(1, 1), (1, 4), (2, 1), (3, 2)], ids=str)
@pytest.mark.parametrize("kernel", [(3, 3), (1, 3), (5, 2)], ids=str)
def test_idle_taps_in_two_dimensions(sizes, kernel):
    for stride, padding, dilation in itertools.product([(1, 1), (2, 1)], [(1, 1), (2, 1), (2, 3)], [(1, 1), (1, 2)]):
        fits = [n + 2 * p > d * (k - 1) for n, p, d, k in zip(sizes, padding, dilation, kernel)]
        if all(fits):
            check_idle_taps(Convolution(stride, padding, dilation, 1), sizes, kernel)


def test_a_3x3_kernel_on_a_1x1_map_is_a_1x1_kernel():
    for stride in (1, 2):
        convolution = Convolution((stride, stride), (1, 1), (1, 1), 1)
        used, taps = without_idle_taps(convolution, (1, 1), (3, 3))
        assert used == convolution._replace(padding=(0, 0))
        assert taps == (slice(None), slice(None), slice(1, 2), slice(1, 2))
        assert check_idle_taps(convolution, (1, 1), (3, 3)) == (1, 1)


def test_a_convolution_without_idle_taps_is_left_as_it_is():
    convolution = Convolution((1, 1), (1, 1), (1, 1), 1)
    assert without_idle_taps(convolution, (2, 2), (3, 3)) == (convolution, None)


@pytest.mark.parametrize("groups", [1, 2])
def test_bfloat16_gradients_on_a_1x1_map(groups):
    """oneDNN leaves those of idle taps unset."""
    convolution = Convolution((1, 1), (1, 1), (1, 1), groups)
    for seed in range(5):
        x, grad = integers(4, 16, 1, 1, seed=seed), integers(4, 8, 1, 1, seed=seed + 9)
        w = integers(8, 16 // groups, 3, 3, seed=seed + 20)
        expected = convolution.backward(grad, x, w, (True, True))
        got = convolution.backward(grad.bfloat16(), x.bfloat16(), w.bfloat16(), (True, True))
        assert not expected[1][:, :, 0].any() and expected[1][:, :, 1, 1].any()
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


# On bytes.


@needs_bytes
@every_operator
@pytest.mark.parametrize("zero_point", [0, 128])
def test_bytes_give_the_integers(operator, shape_x, shape_w, zero_point):
    x = integers(*shape_x, low=0, high=256).to(torch.uint8)
    w = integers(*shape_w, low=-127, high=128, seed=1).to(torch.int8)
    if not operator.supports_bytes(x):
        assert x.dim() in (1, 3, 5)
        return
    if x.dim() == 4:
        x = x.contiguous(memory_format=torch.channels_last)
    n = integer_operator(operator, x.long() - zero_point, w.long())
    for scale in (torch.ones(1), torch.tensor([0.3]), torch.rand(shape_w[0]) + 0.1):
        y = operator.forward_bytes(x, zero_point, w, scale)
        assert y.dtype == torch.float32
        assert torch.equal(y, n.float() * (scale.reshape(operator.channel_shape) if len(scale) > 1 else scale))


@needs_bytes
@pytest.mark.parametrize("name", ["conv2d-strided", "linear", "linear-sequence"])
def test_bytes_in_every_layout(name):
    operator, shape_x, shape_w = OPERATORS[name]
    x = integers(*shape_x, low=0, high=256).to(torch.uint8)
    w = integers(*shape_w, low=-127, high=128, seed=1).to(torch.int8)
    layouts = {
        "contiguous": lambda t: t,
        "transposed": lambda t: t.mT.contiguous().mT,
        "sliced": lambda t: torch.stack([t, t + 1], -1)[..., 0],
        "batch-last": lambda t: t.movedim(0, -1).contiguous().movedim(-1, 0),
    }
    n, wrong = integer_operator(operator, x.long(), w.long()).float(), []
    for (name_x, lay_x), (name_w, lay_w) in itertools.product(layouts.items(), repeat=2):
        if not torch.equal(operator.forward_bytes(lay_x(x), 0, lay_w(w), torch.ones(1)), n):
            wrong.append((name_x, name_w))
    assert not wrong


# The dtype in which accumulators are exact.


@pytest.mark.parametrize("num_inputs, max_w, max_x, expected", [
    (518, 127, 255, torch.float32), (519, 127, 255, torch.float64),  # 2^24 = 16 777 216 lies between
    (2**24 - 1, 1, 1, torch.float32), (2**24, 1, 1, torch.float64),
    (1, 256, 256, torch.float32), (1, 257, 1, torch.float64), (1, 1, 257, torch.float64),  # beyond bfloat16
])  # fmt: skip
def test_exact_dtype_at_its_bounds(num_inputs, max_w, max_x, expected):
    bound = accumulator_bound(torch.Size([10, num_inputs]), max_w, max_x)
    assert exact_dtype(bound, max(max_w, max_x), CPU) == expected


def test_the_bound_counts_a_group_and_the_kernel():
    assert accumulator_bound(torch.Size([64, 8, 3, 5]), 10, 7) == 8 * 3 * 5 * 10 * 7


@pytest.mark.parametrize("low, high, bits", [
    (0, 0, 1), (-1, 0, 1), (0, 1, 2), (-2, 1, 2), (-3, 1, 3), (-2, 2, 3), (-128, 127, 8), (-129, 0, 9), (0, 128, 9),
    (5, 6, 4), (-6, -5, 4), (-(2**63), 2**63 - 1, 64),
])  # fmt: skip
def test_bits_of_an_accumulator(low, high, bits):
    assert accumulator_bits(low, high) == bits


def test_exact_dtype_on_a_gpu_is_float64():
    assert exact_dtype(1, 1, torch.device("cuda")) == torch.float64


@pytest.mark.parametrize("name", [name for name in OPERATORS if name.startswith(("conv2d", "linear"))])
def test_a_convolution_as_a_matrix_product(name):
    """What a GPU runs; on integers, so that every order of summation gives the same."""
    operator, shape_x, shape_w = OPERATORS[name]
    x, w = integers(*shape_x, dtype=torch.float32), integers(*shape_w, seed=1, dtype=torch.float32)
    assert torch.equal(operator.as_matrix_product(x, w), operator.forward(x, w))


@pytest.mark.parametrize("bound, max_level, is_product", [
    (2**24 - 1, 256, True), (2**24, 256, False), (2**24 - 1, 257, False),
])  # fmt: skip
def test_accumulators_on_a_gpu_are_a_matrix_product_where_float32_holds_them(bound, max_level, is_product):
    class OnGpu(torch.Tensor):
        """A tensor that says it is on a GPU."""

        @property
        def device(self):
            return torch.device("cuda")

    operator, shape_x, shape_w = OPERATORS["conv2d-grouped"]
    x, w = integers(*shape_x, dtype=torch.float32), integers(*shape_w, seed=1, dtype=torch.float32)
    y = accumulators(operator, x.as_subclass(OnGpu), w, bound, max_level)
    assert y.dtype == (torch.float32 if is_product else torch.float64)
    assert torch.equal(y.as_subclass(torch.Tensor).double(), operator.forward(x, w).double())


def test_accumulators_are_exact_without_onednn(monkeypatch):
    """NNPACK, which torch then uses for batches of 16, computes by Winograd."""
    operator = Convolution((1, 1), (0, 0), (1, 1), 1)
    n_x = torch.randint(0, 100, (16, 16, 32, 32), generator=torch.Generator().manual_seed(0)).float()
    n_w = torch.randint(-100, 101, (4, 16, 3, 3), generator=torch.Generator().manual_seed(1)).float()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    dtype = exact_dtype(accumulator_bound(n_w.shape, 100, 100), 100, CPU)
    expected = integer_operator(operator, n_x, n_w)
    assert torch.equal(operator.forward(n_x.to(dtype), n_w.to(dtype)).to(torch.float64), expected.double())


@pytest.mark.parametrize("num_inputs", [518, 519])
def test_the_largest_accumulators_are_exact(num_inputs):
    levels_x, levels_w = LevelSet("uniform", 8, False), LevelSet("uniform", 8)
    x, w = torch.full((3, num_inputs), 255.0), torch.full((2, num_inputs), 127.0)
    w[1] = -127
    dtype = exact_dtype(accumulator_bound(w.shape, 127, 255), 255, CPU)
    n_x = F.encode(x, torch.tensor(255.0), F.Levels(levels_x))
    n_w = F.encode(w, torch.tensor(127.0), F.Levels(levels_w))
    n = MatrixProduct().forward(n_x.to(dtype), n_w.to(dtype))
    assert n.tolist() == [[num_inputs * 127 * 255, -num_inputs * 127 * 255]] * 3


@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
@every_operator
def test_the_scale_is_applied_once_after_the_accumulators(operator, shape_x, shape_w, per_channel):
    levels_x, levels_w = LevelSet("apot", 4, False), LevelSet("apot", 4)
    x, w, clip_x, clip_w = (t.detach() for t in operands(shape_x, shape_w, per_channel, torch.float32))
    n_x, n_w = F.encode(x, clip_x, F.Levels(levels_x)), F.encode(w, clip_w, F.Levels(levels_w))
    scale = output_shaped(clip_x / levels_x.max * (clip_w / levels_w.max), operator)
    expected = (clip_x / levels_x.max) * (clip_w / levels_w.max)
    expected = integer_operator(operator, n_x, n_w).float() * (
        expected.reshape(operator.channel_shape) if per_channel else expected
    )
    for dtype in (torch.float32, torch.float64):
        y = scaled_op(n_x, n_w, scale, operator, dtype)
        assert y.dtype == torch.float32 and torch.equal(y, expected)
