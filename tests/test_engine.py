import copy
import importlib.util
import itertools
import math
import os
import pickle
import shutil
import threading

import pytest
import torch
from helpers import (
    LEVEL_SETS,
    OPERATORS,
    closed_form,
    every_operator,
    integer_operator,
    level_set_id,
    nearest_level,
    needs_bytes,
    needs_kernels,
    operands,
    torch_operator,
)
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, engine, kernels, operators, quantize
from apotfx import functional as F
from apotfx.engine import COMPILED, EAGER, Int8, choose, quantized_op, use_engine
from apotfx.functional import Operand
from apotfx.layers import QuantLayer
from apotfx.operators import Convolution, MatrixProduct, accumulator_bound, exact_dtype
from apotfx.state import uncalibrated

signed_or_not = pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
per_tensor_or_channel = pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
FAST = {
    "compiled": pytest.param(COMPILED, marks=needs_kernels),
    "int8": pytest.param(Int8(COMPILED), marks=[needs_kernels, needs_bytes]),
    "int8-eager": pytest.param(Int8(EAGER), marks=needs_bytes),
}
fast_engine = pytest.mark.parametrize("fast", FAST.values(), ids=FAST)
every_engine = pytest.mark.parametrize("engine_", [EAGER, *FAST.values()], ids=["eager", *FAST])
LAST = torch.channels_last


@pytest.fixture(autouse=True)
def bytes_are_always_worth_it(monkeypatch):
    monkeypatch.setattr(engine, "WORTH_BYTES", -1)


@pytest.fixture
def byte_calls(monkeypatch):
    """A list that gets the name of the operator at each call of its `forward_bytes`."""
    calls = []
    for operator in (Convolution, MatrixProduct):

        def counting(self, *args, forward_bytes=operator.forward_bytes):
            calls.append(type(self).__name__)
            return forward_bytes(self, *args)

        monkeypatch.setattr(operator, "forward_bytes", counting)
    return calls


@pytest.fixture
def num_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def run(
    operator, tensors, levels_x, levels_w, *, engine=EAGER, dtype=None, exact=True, unit=None, rectifier=None, **options
):
    """As a layer does in evaluation, unless `exact` is False or there is a dtype."""
    x, w, clip_x, clip_w = tensors
    if dtype is None:
        dtype = exact_dtype(
            accumulator_bound(w.shape, levels_w.max, levels_x.max), max(levels_w.max, levels_x.max), x.device
        )
    return quantized_op(
        Operand(x, clip_x if levels_x else None, None, levels_x and F.Levels(levels_x, rectifier)),
        Operand(
            w, clip_w if levels_w else None, unit if levels_w else None, levels_w and F.Levels(levels_w)
        ),
        operator=operator, dtype=dtype, exact=exact, engine=engine, **options,
    )  # fmt: skip


# Against the formulas.


def check_against_closed_form(
    operator,
    tensors,
    levels_x,
    levels_w,
    *,
    unit=None,
    rectifier=None,
    clip_grad_factor=1.0,
    everywhere=False,
    **run_as,
):
    """Output and all four gradients of `quantized_op`: to a few roundings in float64, to 1e-5 in float32.

    The latter relative to the largest magnitude or, for a clip, to the sum of the terms that its gradient is made of.
    """
    dtype = tensors[0].dtype
    unit = None if unit is None else torch.tensor(unit, dtype=dtype)
    y = run(
        operator, tensors, levels_x, levels_w, unit=unit, rectifier=rectifier, dtype=dtype,
        clip_grad_factor=clip_grad_factor, everywhere=everywhere, **run_as,
    )  # fmt: skip
    grad = torch.randn(y.shape, dtype=dtype)
    wanted = [t for t, used in zip(tensors, (True, True, levels_x, levels_w), strict=True) if used]
    got = torch.autograd.grad(y, wanted, grad.clone())

    x, w, clip_x, clip_w = (t.detach().double() for t in tensors)
    unit = torch.ones(()) if unit is None or not levels_w else unit.double()
    as_is = torch.ones((), dtype=torch.float64)
    xq, dx, dclip_x = closed_form(x, clip_x, levels_x, rectifier=rectifier) if levels_x else (x, as_is, as_is)
    wq, dw, dclip_w = closed_form(w, clip_w * unit, levels_w, everywhere) if levels_w else (w, as_is, as_is)
    xq, wq = xq.clone().requires_grad_(), wq.clone().requires_grad_()
    expected_y = torch_operator(operator)(xq, wq)
    grad_x, grad_w = torch.autograd.grad(expected_y, (xq, wq), grad.double())
    expected = [expected_y.detach(), grad_x * dx, grad_w * dw]
    sizes = [expected_y.detach().abs().max(), grad_x.abs().max(), grad_w.abs().max()]
    for levels, g, dclip, clip, per in (
        (levels_x, grad_x, dclip_x, clip_x, 1.0),
        (levels_w, grad_w, dclip_w, clip_w, unit),
    ):
        if levels:
            expected.append(clip_grad_factor * (g * dclip * per).sum_to_size(clip.shape))
            sizes.append(clip_grad_factor * (g * per).abs().sum_to_size(clip.shape))
    relative = 1e-12 if dtype == torch.float64 else 1e-5
    for a, b, size in zip([y.detach(), *got], expected, sizes, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        assert ((a.double() - b).abs() <= relative * size + 1e-30).all()


dtype_and_engine = pytest.mark.parametrize("dtype, engine_", [
    pytest.param(torch.float64, EAGER, id="float64"), pytest.param(torch.float32, EAGER, id="eager"),
    *(pytest.param(torch.float32, *FAST[name].values, marks=FAST[name].marks, id=name) for name in ("compiled", "int8")),
])  # fmt: skip


@dtype_and_engine
@every_operator
@per_tensor_or_channel
def test_gradients_are_the_closed_forms(operator, shape_x, shape_w, per_channel, dtype, engine_):
    for exact, signed in itertools.product((True, False), repeat=2):
        tensors = operands(shape_x, shape_w, per_channel, dtype)
        levels = LevelSet("apot", 4, signed), LevelSet("apot", 4)
        check_against_closed_form(operator, tensors, *levels, exact=exact, engine=engine_)


@dtype_and_engine
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_gradients_for_every_level_set(levels, dtype, engine_):
    for name in ("linear", "conv2d"):
        operator, shape_x, shape_w = OPERATORS[name]
        tensors = operands(shape_x, shape_w, dtype=dtype)
        check_against_closed_form(operator, tensors, levels, LevelSet("uniform", 3), exact=False, engine=engine_)
        if levels.signed:
            check_against_closed_form(operator, tensors, None, levels, exact=False, engine=engine_)
            check_against_closed_form(operator, tensors, levels, levels, exact=False, engine=engine_)


@dtype_and_engine
@every_operator
def test_gradients_with_float_operands(operator, shape_x, shape_w, dtype, engine_):
    inputs, weights = LevelSet("apot", 3, False), LevelSet("apot", 3)
    for levels in ((inputs, None), (None, weights), (None, None)):
        tensors = operands(shape_x, shape_w, True, dtype)
        check_against_closed_form(operator, tensors, *levels, unit=0.7, exact=False, engine=engine_)


@dtype_and_engine
@pytest.mark.parametrize("options", [
    {"everywhere": True}, {"clip_grad_factor": 0.01}, {"unit": 2.5}, {"unit": 0.3, "exact": False},
    {"rectifier": (0.0, math.inf), "exact": False}, {"rectifier": (0.0, 0.8)}, {"rectifier": (0.0, 6.0), "unit": 0.5},
    {"everywhere": True, "clip_grad_factor": 0.0, "unit": 0.4, "exact": False, "rectifier": (0.0, 0.8)},
], ids=lambda options: "-".join(f"{key}={value}" for key, value in options.items()))  # fmt: skip
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_gradients_with_options(options, name, dtype, engine_):
    operator, shape_x, shape_w = OPERATORS[name]
    levels = LevelSet("apot", 4, False), LevelSet("apot", 2)
    for per_channel in (False, True):
        tensors = operands(shape_x, shape_w, per_channel, dtype)
        check_against_closed_form(operator, tensors, *levels, engine=engine_, **options)


@dtype_and_engine
@pytest.mark.parametrize("layout", ["channels_last", "mixed", "permuted"])
def test_gradients_in_every_layout(layout, dtype, engine_):
    for name in ("conv2d-strided", "conv2d-grouped", "conv2d-pointwise"):
        operator, shape_x, shape_w = OPERATORS[name]
        x, w, *clips = operands(shape_x, shape_w, True, dtype)
        x = x.detach().contiguous(memory_format=LAST) if layout != "permuted" else x.detach().mT.contiguous().mT
        w = w.detach().contiguous(memory_format=LAST) if layout == "channels_last" else w.detach()
        tensors = x.requires_grad_(), w.requires_grad_(), *clips
        levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
        check_against_closed_form(operator, tensors, *levels, exact=False, engine=engine_, rectifier=(0.0, math.inf))


@every_engine
def test_only_what_is_asked_for_gets_a_gradient(engine_):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    everything = operands(shape_x, shape_w, dtype=torch.float32)
    run(operator, everything, LevelSet("apot", 4), LevelSet("apot", 4), engine=engine_, exact=False).sum().backward()
    for wanted in range(4):
        tensors = operands(shape_x, shape_w, dtype=torch.float32)
        for i, tensor in enumerate(tensors):
            tensor.requires_grad_(i == wanted)
        y = run(operator, tensors, LevelSet("apot", 4), LevelSet("apot", 4), engine=engine_, exact=False)
        y.sum().backward()
        assert [tensor.grad is not None for tensor in tensors] == [i == wanted for i in range(4)]
        assert torch.equal(tensors[wanted].grad, everything[wanted].grad)


@every_engine
def test_a_clip_below_zero_counts_as_the_smallest_clip(engine_):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    results = []
    for clip in (-3.0, 0.0, F.MIN_CLIP):
        x, w, clip_x, clip_w = tensors = operands(shape_x, shape_w, dtype=torch.float32)
        clip_x.data.fill_(clip)
        clip_w.data.fill_(clip)
        y = run(operator, tensors, LevelSet("apot", 4), LevelSet("apot", 4), engine=engine_)
        y.sum().backward()
        results.append([y, x.grad, w.grad, clip_x.grad, clip_w.grad])
    assert all(t.isfinite().all() for t in results[0]) and results[0][4] != 0
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


@every_engine
def test_the_gradient_that_comes_in_is_left_as_it_is(engine_):
    """autograd may hand the same tensor to others."""
    for name in ("linear", "conv2d-pointwise"):
        operator, shape_x, shape_w = OPERATORS[name]
        tensors = operands(shape_x, shape_w, dtype=torch.float32)
        y = run(operator, tensors, LevelSet("apot", 4), LevelSet("apot", 4), engine=engine_, exact=False)
        grad, values = torch.randn(y.shape), [t.detach().clone() for t in tensors]
        before = grad.clone()
        y.backward(grad)
        assert torch.equal(grad, before)
        assert all(torch.equal(t, value) for t, value in zip(tensors, values, strict=True))


@fast_engine
def test_passes_that_overlap_do_not_disturb_each_other(fast):
    """Two graphs at once, one of them walked through twice."""
    results = []
    for engine_ in (EAGER, fast):
        every = []
        for names in (("conv2d", "linear"), ("conv2d", "conv2d-grouped")):
            tensors = [operands(*OPERATORS[name][1:], dtype=torch.float32) for name in names]
            ys = [
                run(OPERATORS[name][0], t, LevelSet("apot", 4, False), LevelSet("apot", 4), engine=engine_, exact=False)
                for name, t in zip(names, tensors)
            ]
            ys[0].square().sum().backward(retain_graph=True)
            ys[1].square().sum().backward()
            ys[0].square().sum().backward()
            every += [*ys, *(t.grad for group in tensors for t in group)]
        results.append(every)
    for expected, got in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@fast_engine
def test_threads_of_python_do_not_disturb_each_other(fast):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
    cases = [
        [t.detach() * (i + 1) for t in operands((8, *shape_x[1:]), shape_w, dtype=torch.float32)] for i in range(4)
    ]
    expected = [run(operator, case, *levels) for case in cases]
    failures = []

    def work(i):
        for _ in range(20):
            if not torch.equal(run(operator, cases[i], *levels, engine=fast), expected[i]):
                failures.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@every_engine
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_an_empty_batch_goes_through(name, engine_):
    operator, shape_x, shape_w = OPERATORS[name]
    for exact in (True, False):
        x, w, clip_x, clip_w = tensors = operands((0, *shape_x[1:]), shape_w, dtype=torch.float32)
        y = run(operator, tensors, LevelSet("apot", 4), LevelSet("apot", 4), engine=engine_, exact=exact)
        y.sum().backward()
        assert y.shape[0] == 0 and x.grad.shape == x.shape
        assert not w.grad.any() and clip_x.grad == 0 and clip_w.grad == 0


# In evaluation every engine gives the same bits.

EXACT_PAIRS = [
    (LevelSet("apot", 4, False), LevelSet("apot", 4)), (LevelSet("uniform", 8), LevelSet("uniform", 8)),
    (LevelSet("apot", 6, False), LevelSet("apot", 6)), (LevelSet("pot", 4, False), LevelSet("pot", 5)),
    (LevelSet("apot", 8, False), LevelSet("apot", 8)),
]  # fmt: skip
exact_pairs = pytest.mark.parametrize("levels_x, levels_w", EXACT_PAIRS, ids=level_set_id)
GEOMETRIES = {
    **OPERATORS,
    "dilated": (Convolution((2, 1), (2, 0), (2, 3), 1), (2, 3, 9, 11), (4, 3, 3, 3)),
    "1x1-map": (Convolution((1, 1), (1, 1), (1, 1), 1), (3, 8, 1, 1), (4, 8, 3, 3)),
    "1x1-map-strided": (Convolution((2, 2), (1, 1), (1, 1), 1), (3, 8, 1, 1), (4, 8, 3, 3)),
    "2x1-map": (Convolution((1, 2), (1, 1), (1, 1), 1), (3, 4, 2, 1), (4, 4, 3, 3)),
    "depthwise-strided": (Convolution((2, 2), (2, 2), (1, 1), 5), (2, 5, 7, 9), (5, 1, 5, 5)),
    "depthwise-twice": (Convolution((1, 1), (1, 1), (1, 1), 3), (1, 3, 5, 7), (6, 1, 3, 3)),
    "groups": (Convolution((1, 1), (1, 1), (1, 1), 3), (2, 9, 5, 5), (6, 3, 3, 3)),
    "one-channel": (Convolution((1, 1), (1, 1), (1, 1), 1), (1, 1, 7, 5), (1, 1, 3, 3)),
    "one-row": (Convolution((1, 1), (0, 1), (1, 1), 1), (2, 17, 1, 13), (19, 17, 1, 3)),
    "one-output": (Convolution((1, 1), (0, 0), (1, 1), 1), (2, 3, 3, 3), (33, 3, 3, 3)),
    "wide": (Convolution((1, 1), (1, 1), (1, 1), 1), (1, 64, 5, 5), (16, 64, 3, 3)),
    "linear-single": (MatrixProduct(), (1, 1), (1, 1)),
    "linear-odd": (MatrixProduct(), (3, 129), (7, 129)),
}
every_geometry = pytest.mark.parametrize("operator, shape_x, shape_w", GEOMETRIES.values(), ids=GEOMETRIES)
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=LAST) if x.dim() == 4 else x,
    "transposed": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "sliced": lambda x: torch.stack([x, x + 1], -1)[..., 0],
    "batch-last": lambda x: x.movedim(0, -1).contiguous().movedim(-1, 0),
}


def evaluated(operator, tensors, levels_x, levels_w, fast, **options):
    """The output of `fast`, equal to the eager one in every bit."""
    with torch.no_grad():
        expected = run(operator, tensors, levels_x, levels_w, **options)
        y = run(operator, tensors, levels_x, levels_w, engine=fast, **options)
    assert torch.equal(y, expected) and y.dtype == expected.dtype
    return y


def takes_bytes(operator, x, w, levels_x, levels_w, fast):
    fits = all(kernels.fits_byte(levels) for levels in (levels_x, levels_w))
    fits &= w[0].numel() * levels_w.max * 255 < operator.byte_limit(levels_x.signed)
    return isinstance(fast, Int8) and fits and operator.supports_bytes(x)


@fast_engine
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_every_level_set_gives_the_bits_of_eager(levels, fast, byte_calls):
    levels_w = LevelSet(levels.scheme, levels.bits, True)
    for name, per_channel in itertools.product(("conv2d-strided", "linear-sequence"), (False, True)):
        operator, shape_x, shape_w = OPERATORS[name]
        tensors = operands(shape_x, shape_w, per_channel, torch.float32)
        y = evaluated(operator, tensors, levels, levels_w, fast, unit=torch.tensor(0.7))
        assert len(y.unique()) > 2
        assert bool(byte_calls) is takes_bytes(operator, *tensors[:2], levels, levels_w, fast)
        byte_calls.clear()


@fast_engine
@every_geometry
@pytest.mark.parametrize("levels_x, levels_w", EXACT_PAIRS[:3], ids=level_set_id)
def test_every_geometry_and_layout_gives_the_bits_of_eager(
    operator, shape_x, shape_w, levels_x, levels_w, fast, byte_calls
):
    x, w, *clips = (t.detach() for t in operands(shape_x, shape_w, True, torch.float32))
    for lay_x, lay_w in itertools.product(LAYOUTS.values(), (LAYOUTS["contiguous"], LAYOUTS["channels_last"])):
        evaluated(operator, (lay_x(x), lay_w(w), *clips), levels_x, levels_w, fast)
    for batch in (x[:1], x[:0]) if x.dim() > 1 else ():
        evaluated(operator, (batch, w, *clips), levels_x, levels_w, fast)
    assert bool(byte_calls) is takes_bytes(operator, x, w, levels_x, levels_w, fast)


@fast_engine
@every_geometry
def test_outputs_have_the_strides_of_eager(operator, shape_x, shape_w, fast):
    """On which depends how torch sums in the float layers that follow."""
    x, w, *clips = (t.detach() for t in operands(shape_x, shape_w, True, torch.float32))
    levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
    differing = {}
    for (name_x, lay_x), name_w in itertools.product(LAYOUTS.items(), ("contiguous", "channels_last")):
        tensors = lay_x(x), LAYOUTS[name_w](w), *clips
        expected, y = (run(operator, tensors, *levels, engine=e).stride() for e in (EAGER, fast))
        if y != expected:
            differing[name_x, name_w] = f"{y}, eager {expected}"
    assert not differing


@fast_engine
@signed_or_not
@pytest.mark.parametrize("rectifier", [(0.0, math.inf), (0.0, 0.8)], ids=["relu", "relu6"])
def test_rectifiers_give_the_bits_of_eager(rectifier, signed, fast):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    x, *others = operands(shape_x, shape_w, True, torch.float32)
    levels = LevelSet("apot", 5, signed), LevelSet("apot", 5)
    y = evaluated(operator, (x, *others), *levels, fast, rectifier=rectifier)
    assert torch.equal(y, run(operator, (x.clamp(*rectifier), *others), *levels))


@every_engine
@every_operator
@exact_pairs
def test_accumulators_are_those_of_integer_arithmetic(operator, shape_x, shape_w, levels_x, levels_w, engine_):
    torch.manual_seed(0)
    x, w = torch.randn(shape_x) * levels_x.max, torch.randn(shape_w) * levels_w.max
    clip_x, clip_w = torch.tensor(float(levels_x.max)), torch.tensor(float(levels_w.max))
    n_x = nearest_level(x.clamp(-levels_x.max, levels_x.max), levels_x)
    n_w = nearest_level(w.clamp(-levels_w.max, levels_w.max), levels_w)
    expected = integer_operator(operator, n_x, n_w)
    dtype = exact_dtype(
        accumulator_bound(w.shape, levels_w.max, levels_x.max), max(levels_w.max, levels_x.max), x.device
    )
    accumulators = operator.forward(n_x.to(dtype), n_w.to(dtype))
    assert torch.equal(accumulators.long(), expected) and torch.equal(accumulators, accumulators.round())
    # With clips of max the scale is 1.
    tensors = x, w, clip_x, clip_w
    assert torch.equal(run(operator, tensors, levels_x, levels_w, engine=engine_), expected.float())
    tensors = x * 0.25, w * 0.5, clip_x * 0.25, clip_w
    scaled = run(operator, tensors, levels_x, levels_w, engine=engine_, unit=torch.tensor(0.5))
    assert torch.equal(scaled, expected.float() * 0.125)


@every_engine
@per_tensor_or_channel
def test_the_scale_is_applied_once_after_the_accumulators(per_channel, engine_):
    levels_x, levels_w = LevelSet("apot", 4, False), LevelSet("apot", 4)
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    x, w, clip_x, clip_w = tensors = [t.detach() for t in operands(shape_x, shape_w, per_channel, torch.float32)]
    unit = torch.tensor(0.7)
    n_x, n_w = F.encode(x, clip_x, F.Levels(levels_x)), F.encode(w, clip_w * unit, F.Levels(levels_w))
    scale = (clip_x / levels_x.max) * (clip_w * unit / levels_w.max)
    expected = integer_operator(operator, n_x, n_w).float() * (scale.reshape(-1, 1, 1) if per_channel else scale)
    assert torch.equal(run(operator, tensors, levels_x, levels_w, engine=engine_, unit=unit), expected)


@every_engine
@signed_or_not
@pytest.mark.parametrize("num_inputs", [518, 519, 4096, 65792])
def test_the_largest_accumulators_are_exact(num_inputs, signed, engine_, byte_calls):
    """8-bit uniform levels, all at the maximum; 2^24 lies between 518 and 519, 2^31 above the last."""
    levels = LevelSet("uniform", 8, signed), LevelSet("uniform", 8)
    x, w = torch.full((4, num_inputs), float(levels[0].max)), torch.full((5, num_inputs), 127.0)
    x[1, ::7] -= 1
    x[2, ::2] *= -1
    x[3, 0] = 1
    w[1] = -127
    w[2, ::3] = 127 - 128
    w[3, ::2] = -127
    w[4, 0] = 126
    tensors = x, w, torch.tensor(float(levels[0].max)), torch.tensor(127.0)
    expected = integer_operator(MatrixProduct(), x if signed else x.relu(), w)
    assert torch.equal(run(MatrixProduct(), tensors, *levels, engine=engine_), expected.float())
    assert bool(byte_calls) is isinstance(engine_, Int8)


@every_engine
@signed_or_not
def test_the_largest_accumulators_of_a_convolution_are_exact(signed, engine_, byte_calls):
    levels = LevelSet("uniform", 8, signed), LevelSet("uniform", 8)
    x, w = torch.full((2, 300, 4, 3), float(levels[0].max)), torch.full((4, 300, 3, 3), 127.0)
    x[1, ::7] -= 1
    w[1] = -127
    w[2, ::3] = -1
    w[3, 0, 1, 1] = 126
    tensors = x, w, torch.tensor(float(levels[0].max)), torch.tensor(127.0)
    operator = Convolution((1, 1), (1, 1), (1, 1), 1)
    expected = integer_operator(operator, x, w)
    assert expected.abs().max() > 2**24
    assert torch.equal(run(operator, tensors, *levels, engine=engine_), expected.float())
    # oneDNN would round such sums before it takes off the zero point that signed inputs have.
    assert bool(byte_calls) is (isinstance(engine_, Int8) and not signed)


@needs_bytes
def test_accumulators_beyond_32_bits_take_no_bytes(byte_calls):
    levels = LevelSet("uniform", 8, False), LevelSet("uniform", 8)
    x, w = torch.full((1, 66400), 255.0), torch.full((1, 66400), 127.0)
    y = run(MatrixProduct(), (x, w, torch.tensor(255.0), torch.tensor(127.0)), *levels, engine=Int8(EAGER))
    assert y.item() == torch.tensor(66400 * 255 * 127).float() and not byte_calls


@every_engine
@pytest.mark.parametrize("name, shape_x, shape_w", [
    ("conv2d", (17, 16, 14, 14), (24, 16, 3, 3)), ("conv2d-pointwise", (17, 16, 14, 14), (24, 16, 1, 1)),
    ("linear", (65, 400), (50, 400)),
])  # fmt: skip
@pytest.mark.parametrize("levels_x, levels_w", EXACT_PAIRS[:3], ids=level_set_id)
def test_threads_layout_and_batch_change_no_bit(name, shape_x, shape_w, levels_x, levels_w, num_threads, engine_):
    operator = OPERATORS[name][0]
    torch.manual_seed(0)
    x, w, clips = torch.randn(shape_x), torch.randn(shape_w), (torch.tensor(1.7), torch.tensor(2.3))

    def result(x, w):
        return run(operator, (x, w, *clips), levels_x, levels_w, engine=engine_)

    num_threads(1)
    expected = result(x, w)
    num_threads(2)
    assert torch.equal(result(x, w), expected)
    assert torch.equal(torch.cat([result(row.unsqueeze(0), w) for row in x]), expected)
    assert torch.equal(torch.cat([result(part, w) for part in x.split(16)]), expected)
    if x.dim() == 4:
        assert torch.equal(result(x.contiguous(memory_format=LAST), w.contiguous(memory_format=LAST)), expected)
    else:
        assert torch.equal(result(x.T.contiguous().T, w.T.contiguous().T), expected)


# Values and dtypes that are special.


@fast_engine
@pytest.mark.parametrize("exact", [True, False], ids=["evaluation", "training"])
@pytest.mark.parametrize("where", ["input", "weight"])
@pytest.mark.parametrize("name", ["conv2d", "linear"])
def test_nan_comes_through_as_with_eager(name, where, exact, fast):
    operator, shape_x, shape_w = OPERATORS[name]
    x, w, *clips = (t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32))
    (x if where == "input" else w).view(-1)[3] = math.nan
    levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
    expected, y = (run(operator, (x, w, *clips), *levels, engine=e, exact=exact) for e in (EAGER, fast))
    assert expected.isnan().any() and not expected.isnan().all()
    torch.testing.assert_close(y, expected, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, equal_nan=True)


@fast_engine
@signed_or_not
def test_infinity_is_the_largest_level(signed, fast):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    x, w, *clips = (t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32))
    x[0, 0, 0], x[1, 1, 1] = math.inf, -math.inf
    levels = LevelSet("apot", 4, signed), LevelSet("apot", 4)
    y = evaluated(operator, (x, w, *clips), *levels, fast)
    assert torch.equal(y, run(operator, (x.clamp(-9, 9), w, *clips), *levels))


@every_engine
def test_float64_is_computed_in_float64(engine_):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    for exact in (True, False):
        tensors = operands(shape_x, shape_w, True)
        levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
        check_against_closed_form(operator, tensors, *levels, exact=exact, engine=engine_, unit=0.6)


@fast_engine
@pytest.mark.parametrize("clip_dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_clips_of_another_dtype_than_the_values(clip_dtype, fast):
    """Such as a float32 input of a float64 model."""
    operator, shape_x, shape_w = OPERATORS["linear"]
    x, w, clip_x, clip_w = (t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32))
    tensors = x, w, clip_x.to(clip_dtype), clip_w.to(clip_dtype)
    evaluated(operator, tensors, LevelSet("apot", 4, False), LevelSet("apot", 4), fast)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@fast_engine
def test_half_precision_values_are_those_of_eager(dtype, fast):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
    results = []
    for engine_ in (EAGER, fast):
        tensors = [t.detach().to(dtype).requires_grad_() for t in operands(shape_x, shape_w, dtype=torch.float32)]
        y = run(operator, tensors, *levels, engine=engine_)
        y.square().sum().backward()
        results.append([y, *(t.grad for t in tensors)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b) and a.dtype == b.dtype


needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    reason="this processor has no bfloat16 kernels that sum in float32",
)


@needs_bfloat16
@every_operator
@pytest.mark.parametrize("engine_", [EAGER, FAST["compiled"]], ids=["eager", "compiled"])
def test_bfloat16_rounds_the_weight_and_the_accumulators(operator, shape_x, shape_w, engine_):
    levels = LevelSet("apot", 5, False), LevelSet("apot", 5)
    x, w, clip_x, clip_w = tensors = [t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32)]
    n_x, n_w = F.encode(x, clip_x, F.Levels(levels[0])), F.encode(w, clip_w, F.Levels(levels[1]))
    scale = clip_x / levels[0].max * (clip_w / levels[1].max)
    exact = operator.forward(n_x.double(), (n_w * scale).bfloat16().double())
    for autocast in (True, False):
        with torch.autocast("cpu", enabled=autocast):
            y = run(operator, tensors, *levels, dtype=torch.bfloat16, exact=False, engine=engine_)
        assert y.dtype == torch.bfloat16
        # Sums of exact products, rounded once, by at most 2^-8.
        torch.testing.assert_close(y.double(), exact, rtol=1.001 * 2**-8, atol=1e-6)


@needs_bfloat16
@every_engine
@pytest.mark.parametrize("name", ["conv2d-grouped", "linear", "1x1-map"])
def test_gradients_in_bfloat16_are_near_those_of_float32(name, engine_):
    operator, shape_x, shape_w = GEOMETRIES[name]
    levels = LevelSet("apot", 4, False), LevelSet("apot", 4)
    results = []
    for dtype, e in ((torch.float32, EAGER), (torch.bfloat16, engine_)):
        tensors = operands(shape_x, shape_w, True, torch.float32)
        y = run(operator, tensors, *levels, dtype=dtype, exact=False, engine=e)
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
        results.append([y.detach().float(), *(t.grad for t in tensors)])
    for expected, got in zip(*results, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.02 * expected.norm()


@every_engine
def test_autocast_leaves_exact_operands_alone(engine_):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    tensors = [t.detach() for t in operands(shape_x, shape_w, dtype=torch.float32)]
    levels = LevelSet("uniform", 8), LevelSet("uniform", 8)
    expected = run(operator, tensors, *levels)
    with torch.autocast("cpu"):
        assert torch.equal(run(operator, tensors, *levels, engine=engine_), expected)


# When bytes are worth it.


@needs_bytes
def test_bytes_are_used_where_the_work_is_large_or_the_alternative_is_float64(monkeypatch, byte_calls):
    operator, shape_x, shape_w = OPERATORS["conv2d"]
    tensors = operands(shape_x, shape_w, dtype=torch.float32)
    work = operator.multiplications(*tensors[:2])
    narrow, wide = (LevelSet("apot", 4, False), LevelSet("apot", 4)), (LevelSet("uniform", 8),) * 2
    for threshold, dtype, expected in (
        (work, torch.float32, False), (work - 1, torch.float32, True), (work, torch.float64, True),
    ):  # fmt: skip
        monkeypatch.setattr(engine, "WORTH_BYTES", threshold)
        for levels in (narrow, wide):
            run(operator, tensors, *levels, engine=Int8(EAGER), dtype=dtype)
            assert bool(byte_calls) is expected
            byte_calls.clear()


# Which engine there is.


@pytest.fixture
def here(monkeypatch):
    """Sets what is missing here."""

    def set_missing(kernels=None, bytes=None):
        monkeypatch.setattr(engine, "what_kernels_lack", lambda: kernels)
        monkeypatch.setattr(engine, "what_bytes_lack", lambda: bytes)

    return set_missing


@pytest.mark.parametrize("missing, name, engine_, base, reason", [
    ({}, "auto", "int8", "compiled", "the fastest"), ({}, "int8", "int8", "compiled", "asked for"),
    ({}, "compiled", "compiled", None, "asked for"), ({}, "eager", "eager", None, "asked for"),
    ({"kernels": "K"}, "auto", "int8", "eager", "no compiled kernels: K"),
    ({"kernels": "K"}, "int8", "int8", "eager", "no compiled kernels: K"),
    ({"kernels": "K"}, "compiled", "eager", None, "no compiled kernels: K"),
    ({"kernels": "K"}, "eager", "eager", None, "asked for"),
    ({"bytes": "B"}, "auto", "compiled", None, "no 8-bit arithmetic: B"),
    ({"bytes": "B"}, "compiled", "compiled", None, "asked for"),
    ({"kernels": "K", "bytes": "B"}, "auto", "eager", None, "no compiled kernels: K, no 8-bit arithmetic: B"),
], ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value))  # fmt: skip
def test_the_engine_is_the_one_of_the_name_or_the_next_slower_one(missing, name, engine_, base, reason, here):
    here(**missing)
    choice = choose(name)
    assert choice.engine.name == engine_ and choice.reason == reason
    assert getattr(getattr(choice.engine, "base", None), "name", None) == base
    assert str(choice) == f"{engine_} ({reason})"


@pytest.mark.parametrize("name", ["cuda", "", "Eager"])
def test_an_unknown_engine_is_refused(name):
    model = small_model()
    before = {module: module.engine for module in model.modules() if isinstance(module, QuantLayer)}
    for call in (lambda: choose(name), lambda: use_engine(model, name)):
        with pytest.raises(ApotfxError, match=f"engine '{name}': unknown; choose one of auto, int8, compiled, eager"):
            call()
    assert all(module.engine is engine_ for module, engine_ in before.items())


def test_why_bytes_cannot_be_used(monkeypatch):
    lack = engine.what_bytes_lack.__wrapped__
    with monkeypatch.context() as patch:
        patch.setattr(engine, "HAS_ONEDNN", False)
        assert lack() == "this torch has no oneDNN"
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "_is_vnni_supported", lambda: False, raising=False)
        assert lack().startswith("the processor has no AVX512-VNNI")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)

    def broken(*args):
        raise RuntimeError("no such operator\nmore")

    with monkeypatch.context() as patch:
        patch.setattr(Convolution, "forward_bytes", broken)
        assert lack() == "this torch cannot (no such operator)"
    with monkeypatch.context() as patch:
        patch.setattr(Convolution, "forward_bytes", lambda self, x, zero_point, w, scale: torch.zeros(1, 16, 3, 3))
        assert lack() == "it is not exact here"


def test_why_kernels_cannot_be_used(monkeypatch):
    def unavailable():
        raise kernels.Unavailable("no compiler")

    monkeypatch.setattr(kernels, "library", unavailable)
    assert engine.what_kernels_lack.__wrapped__() == "no compiler"


# In a model.


def small_model(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU6(), nn.Flatten(), nn.Linear(144, 3)
    )
    return calibrate(quantize(model, BitPolicy((Rule(),))), [images()])


def images():
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_quantize_takes_the_fastest_engine(here):
    here(kernels="K", bytes="B")
    assert all(m.engine is EAGER for m in small_model().modules() if isinstance(m, QuantLayer))
    here(bytes="B")
    assert all(m.engine is COMPILED for m in small_model().modules() if isinstance(m, QuantLayer))


@pytest.mark.parametrize("name", ["eager", "compiled", "int8"])
def test_every_engine_computes_a_model(name):
    expected, qmodel = small_model(), small_model()
    use_engine(expected, "eager")
    choice = use_engine(qmodel, name)
    layers = [module for module in qmodel.modules() if isinstance(module, QuantLayer)]
    assert len(layers) == 3 and all(layer.engine is choice.engine for layer in layers)
    grads = []
    for model in (expected, qmodel):
        model(images()).square().sum().backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, grad in grads[0].items():
        torch.testing.assert_close(grads[1][key], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())
    assert torch.equal(qmodel.eval()(images()), expected.eval()(images()))


@pytest.mark.parametrize("name", ["eager", "compiled", "int8"])
def test_a_copy_and_the_state_keep_working(name):
    qmodel = small_model()
    use_engine(qmodel, name)
    assert not any("engine" in key for key in qmodel.state_dict())
    copied, loaded = copy.deepcopy(qmodel), small_model(seed=1)
    assert [m.engine.name for m in copied.modules() if isinstance(m, QuantLayer)] == [choose(name).engine.name] * 3
    assert loaded.load_state_dict(qmodel.state_dict()) == ([], [])
    use_engine(loaded, name)
    expected = qmodel.eval()(images())
    assert torch.equal(copied.eval()(images()), expected) and torch.equal(loaded.eval()(images()), expected)
    copied.train()(images()).sum().backward()
    assert all(p.grad is None for p in qmodel.parameters())


@pytest.mark.filterwarnings("ignore")  # what torch says of its own compiler
@pytest.mark.parametrize("name", ["eager", "compiled", "int8"])
def test_torch_compile_computes_the_same(name):
    qmodel = small_model().eval()
    use_engine(qmodel, name)
    torch.compiler.reset()
    with torch.no_grad():
        expected = qmodel(images())
        torch.testing.assert_close(torch.compile(qmodel, backend="aot_eager")(images()), expected)
    torch.compiler.reset()


@pytest.mark.filterwarnings("ignore")  # what torch says of its own compiler
def test_training_through_torch_compile_breaks_no_graph_and_gives_the_gradients_of_eager():
    gradients = []
    torch.compiler.reset()
    for compiled in (False, True):
        torch.manual_seed(0)
        qmodel = small_model().train()
        use_engine(qmodel, "auto" if compiled else "eager")
        run_model = torch.compile(qmodel, backend="aot_eager", fullgraph=True) if compiled else qmodel
        run_model(images()).square().sum().backward()
        gradients.append({name: p.grad for name, p in qmodel.named_parameters() if p.grad is not None})
    torch.compiler.reset()
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@fast_engine
def test_a_model_in_float64_gives_the_bits_of_eager(fast):
    qmodel, x = small_model().double().eval(), images().double()
    expected = use_engine(qmodel, "eager") and qmodel(x)
    for module in qmodel.modules():
        if isinstance(module, QuantLayer):
            module.engine = fast
    assert expected.dtype == torch.float64 and torch.equal(qmodel(x), expected)


@fast_engine
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_a_float_operand_of_any_type_beside_a_quantized_one(fast, dtype):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    qmodel = calibrate(quantize(model, BitPolicy((Rule(activation_bits=32),))), [images()])
    layer, x = qmodel.get_submodule("0"), images().to(dtype)

    def compute(engine_, training):
        layer.engine = engine_
        y = layer.train(training)(x)
        return y, torch.autograd.grad(y.float().square().sum(), list(layer.parameters()))

    assert torch.equal(compute(fast, False)[0], compute(EAGER, False)[0])
    (mine, my_gradients), (expected, gradients) = compute(fast, True), compute(EAGER, True)
    for a, b in zip((mine, *my_gradients), (expected, *gradients), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@every_engine
def test_tensors_on_different_devices_are_torchs_error(engine_):
    qmodel = small_model().eval()
    for module in qmodel.modules():
        if isinstance(module, QuantLayer):
            module.engine = engine_
    qmodel.get_submodule("2").to("meta")
    with pytest.raises(RuntimeError, match="meta"):  # NotImplementedError is one
        qmodel(images())


@fast_engine
def test_the_default_device_may_be_another(fast):
    qmodel, x = small_model().train(), images()
    for module in qmodel.modules():
        if isinstance(module, QuantLayer):
            module.engine = fast
    expected = qmodel(x)
    kernels._scratch.buffers.clear()
    kernels._describe_levels.cache_clear()
    kernels._byte_tables.cache_clear()
    F._cached_table.cache_clear()
    with torch.device("meta"):
        assert torch.equal(qmodel(x), expected)


# Those who follow torch's operations, to whom our kernels would be constants.


class Followed(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1, stride=2), nn.BatchNorm2d(4)
        self.up, self.fc = nn.ConvTranspose2d(4, 4, 2), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(torch.relu(self.up(torch.relu(self.norm(self.conv(x))))).mean((2, 3)))


def followed(name="auto", calibrated=True, **rule):
    qmodel = quantize(Followed(), BitPolicy((Rule(**rule),)))
    if calibrated:
        calibrate(qmodel, [images()])
    use_engine(qmodel, name)
    return qmodel.eval()


def others(n=5, size=8):
    """Inputs that nothing was traced with."""
    return torch.randn(n, 1, size, size, generator=torch.Generator().manual_seed(1))


def parameters_of(qmodel):
    """Those that learn, and all other tensors."""
    learn = {name: parameter for name, parameter in qmodel.named_parameters() if parameter.requires_grad}
    rest = {name: tensor for name, tensor in qmodel.named_parameters() if name not in learn}
    return learn, rest | dict(qmodel.named_buffers())


def gradients(qmodel, learn, rest, x):
    loss = functional_call(qmodel, (learn, rest), (x,)).square().sum()
    return dict(zip(learn, torch.autograd.grad(loss, list(learn.values())), strict=True))


def check_gradients(got, expected):
    assert got.keys() == expected.keys()
    for name, grad in expected.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item(), msg=name)


@pytest.mark.parametrize("mode, normalization", [("real", "rescale"), ("fake", "none"), ("symbolic", "standardize")])
def test_make_fx_records_the_network(mode, normalization):
    qmodel = followed(normalization=normalization, granularity="channel")
    state = {name: tensor.detach() for part in parameters_of(qmodel) for name, tensor in part.items()}
    with torch.no_grad():
        graph = make_fx(lambda state, x: functional_call(qmodel, state, (x,)), tracing_mode=mode)(state, images())
        for x in (others(), others(3, 12)) if mode == "symbolic" else (others(),):
            assert torch.equal(graph(state, x), qmodel(x))
    other = {name: tensor * 1.1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    with torch.no_grad():
        assert torch.equal(graph(other, others()), functional_call(qmodel, other, (others(),)))


def test_make_fx_records_the_gradients():
    qmodel = followed().train()
    learn, rest = parameters_of(qmodel)
    graph = make_fx(lambda learn, rest, x: gradients(qmodel, learn, rest, x))(learn, rest, images())
    check_gradients(graph(learn, rest, others()), gradients(qmodel, learn, rest, others()))


@pytest.mark.filterwarnings("ignore")  # torch.jit is deprecated, and warns of Python numbers
@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
def test_jit_trace_records_the_network(grad, tmp_path):
    qmodel = followed()
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(qmodel, images())
    torch.jit.save(traced, tmp_path / "traced.pt")
    for module in (traced, torch.jit.load(tmp_path / "traced.pt")):
        for x in (others(), others(3), others(2, 10)):
            assert torch.equal(module(x), qmodel(x))
    with pytest.raises(RuntimeError, match="not have been used in the graph"):  # no gradient rather than a wrong one
        torch.autograd.grad(traced(images()).sum(), qmodel.conv.weight)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace_in_training_is_refused():
    with pytest.raises(ApotfxError, match=r"torch.jit.trace: loses the gradients of quantized layers; call eval\(\) first"):
        torch.jit.trace(followed().train(), images())


@pytest.mark.filterwarnings("ignore")  # what torch says of its own compiler
@pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])
def test_export_records_the_network(strict):
    qmodel = followed()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(qmodel, (images(),), strict=strict, dynamic_shapes=({0: batch},)).module()
    for x in (others(), others(9)):
        assert torch.equal(exported(x), qmodel(x))


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["fresh", "calibrated"])
def test_fake_tensors_have_the_shapes_and_leave_the_network_alone(calibrated, training):
    qmodel = followed(calibrated=calibrated).train(training)
    before = copy.deepcopy(qmodel.state_dict())
    mode = FakeTensorMode()
    state = {name: mode.from_tensor(tensor) for part in parameters_of(qmodel) for name, tensor in part.items()}
    with mode:
        y = functional_call(qmodel, state, (torch.empty(7, 1, 10, 10),))
    assert type(y) is FakeTensor and y.shape == (7, 3)
    assert all(torch.equal(value, before[name]) for name, value in qmodel.state_dict().items())
    assert type(qmodel(images())) is torch.Tensor


def test_a_counter_of_operations_sees_them_and_sets_no_clip():
    qmodel = followed(calibrated=False).train()
    with FlopCounterMode(display=False) as counter:
        qmodel(images()).sum().backward()
    float_model = Followed()
    with FlopCounterMode(display=False) as expected:
        float_model(images()).sum().backward()
    assert counter.get_total_flops() >= expected.get_total_flops() > 0
    assert len(uncalibrated(qmodel)) == 3
    assert all(p.grad is None for name, p in qmodel.named_parameters() if name.endswith("clip"))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("normalization", ["none", "rescale"])
def test_transforms_of_torch_func(normalization):
    """Gradients, those of each sample, and several networks at once."""
    qmodel, x = followed(normalization=normalization, granularity="channel"), others()
    learn, rest = parameters_of(qmodel)

    def loss(learn, x):
        return functional_call(qmodel, (learn, rest), (x,)).square().sum()

    check_gradients(torch.func.grad(loss)(learn, x), gradients(qmodel, learn, rest, x))
    each = torch.func.vmap(torch.func.grad(lambda learn, x: loss(learn, x[None])), in_dims=(None, 0))(learn, x)
    for i in range(len(x)):
        check_gradients({k: v[i] for k, v in each.items()}, gradients(qmodel, learn, rest, x[i : i + 1]))
    stacked = {name: torch.stack([p.detach(), 1.2 * p.detach()]) for name, p in learn.items()}
    both = torch.func.vmap(lambda learn: functional_call(qmodel, (learn, rest), (x,)))(stacked)
    for i in range(2):
        one = functional_call(qmodel, ({k: v[i] for k, v in stacked.items()}, rest), (x,))
        torch.testing.assert_close(both[i], one, rtol=1e-5, atol=1e-5)


FOLLOWERS = {
    "make_fx": lambda qmodel, x: make_fx(qmodel)(x),
    "torch.func": lambda qmodel, x: torch.func.grad(lambda x: qmodel(x).sum())(x),
    "jit": lambda qmodel, x: torch.jit.trace(qmodel, x),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("follow", FOLLOWERS.values(), ids=FOLLOWERS)
def test_a_training_step_that_is_recorded_sets_no_clip(follow):
    qmodel = quantize(nn.Sequential(nn.Linear(4, 3)), BitPolicy((Rule(),)), self_check=False).train()
    with pytest.raises(ApotfxError, match="traced in training mode before its clips come from data; calibrate the network"):
        follow(qmodel, torch.randn(5, 4))
    assert uncalibrated(qmodel) == ["0"]


def test_a_subclass_of_tensor_is_left_to_torch():
    class Logged(torch.Tensor):
        seen = []

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            cls.seen.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    qmodel = quantize(nn.Sequential(nn.Linear(4, 3)), BitPolicy((Rule(),)))
    calibrate(qmodel, [torch.randn(5, 4)]).eval()
    x = torch.randn(5, 4)
    assert torch.equal(qmodel(x.as_subclass(Logged)).as_subclass(torch.Tensor), qmodel(x)) and len(Logged.seen) > 3


def test_a_table_made_in_inference_mode_serves_training():
    F._cached_table.cache_clear()
    qmodel = small_model()
    use_engine(qmodel, "eager")
    with torch.inference_mode():
        qmodel.eval()(images())
    qmodel.train()(images()).sum().backward()


def test_a_pickled_model_chooses_its_engine_where_it_is_read(monkeypatch):
    qmodel = small_model()
    use_engine(qmodel, "auto")
    stored = pickle.dumps(qmodel)
    monkeypatch.setattr(engine, "what_kernels_lack", lambda: "none")
    monkeypatch.setattr(engine, "what_bytes_lack", lambda: "none")
    names = {module.engine.name for module in pickle.loads(stored).modules() if isinstance(module, QuantLayer)}
    assert names == {"eager"}


def test_nothing_is_skipped_that_could_run():
    """What the marks of helpers.py skip for, this finds out in another way."""
    named = bool(os.environ.get("CC")) or any(map(shutil.which, ("cc", "gcc", "clang")))
    assert (engine.what_kernels_lack() is None) is (named or importlib.util.find_spec("ziglang") is not None)
    assert (engine.what_bytes_lack() is None) is (operators.HAS_ONEDNN and torch.cpu._is_vnni_supported())
