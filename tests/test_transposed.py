"""Transposed convolutions: the operator, and the layer."""

import functools
import itertools

import pytest
import torch
from cycle_helpers import CHANNEL, cycle, loaded, trained
from helpers import nearest_level
from torch import nn

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule
from apotfx.integer.c import export_c
from apotfx.integer.onnx import export_onnx
from apotfx.layers import QUANT_LAYERS
from apotfx.operators import FLOAT32_EXACT, TransposedConvolution, accumulator_bound, accumulators
from apotfx.quantizers import InputQuantizer, WeightQuantizer

# Settings, and the shapes of an input and of torch's weight.
OPERATORS = {
    "1d": (TransposedConvolution((1,), (0,), (0,), (1,), 1), (3, 4, 5), (4, 6, 3)),
    "1d-all": (TransposedConvolution((3,), (2,), (1,), (2,), 2), (3, 4, 5), (4, 3, 3)),
    "2d": (TransposedConvolution((1, 1), (0, 0), (0, 0), (1, 1), 1), (2, 3, 4, 5), (3, 4, 3, 2)),
    "2d-strided": (TransposedConvolution((2, 3), (1, 0), (1, 2), (1, 1), 1), (2, 3, 4, 5), (3, 4, 3, 3)),
    "2d-dilated": (TransposedConvolution((1, 2), (2, 1), (1, 0), (2, 3), 1), (2, 3, 4, 5), (3, 4, 3, 2)),
    "2d-grouped": (TransposedConvolution((2, 2), (1, 1), (0, 1), (1, 1), 2), (2, 4, 4, 3), (4, 3, 3, 3)),
    "2d-depthwise": (TransposedConvolution((2, 2), (0, 0), (0, 0), (1, 1), 4), (2, 4, 4, 3), (4, 1, 2, 2)),
    "3d": (TransposedConvolution((1, 2, 1), (1, 0, 1), (0, 1, 0), (1, 1, 2), 2), (2, 4, 3, 2, 3), (4, 3, 2, 2, 3)),
}
every_operator = pytest.mark.parametrize("operator, shape_x, shape_w", OPERATORS.values(), ids=OPERATORS)


def torch_operator(operator):
    function = getattr(torch, f"conv_transpose{len(operator.stride)}d")
    stride, padding, output_padding, dilation, groups = operator
    return lambda x, w: function(x, w, None, stride, padding, output_padding, groups, dilation)


def integers(*shape, seed=0, low=-9, high=10, dtype=torch.float64):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# The operator.


@every_operator
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_forward_and_gradients_are_those_of_torch(operator, shape_x, shape_w, dtype):
    """On integers, so that every order of summation gives the same."""
    x, w = integers(*shape_x, dtype=dtype).requires_grad_(), integers(*shape_w, seed=1, dtype=dtype).requires_grad_()
    expected = torch_operator(operator)(x, w)
    grad = integers(*expected.shape, seed=2, dtype=dtype)
    grad_x, grad_w = torch.autograd.grad(expected, (x, w), grad)
    rows = operator.from_parameter(w.detach())
    assert rows.shape == (shape_w[1] * operator.groups, shape_w[0] // operator.groups, *shape_w[2:])
    assert torch.equal(operator.forward(x, rows), expected)
    for needs in itertools.product([True, False], repeat=2):
        got = operator.backward(grad, x, rows, needs)
        for g, wanted, needed in zip(got, (grad_x, operator.from_parameter(grad_w)), needs, strict=True):
            assert torch.equal(g, wanted) if needed else g is None or not g.numel()


@every_operator
def test_a_row_of_the_weight_makes_an_output_channel(operator, shape_x, shape_w):
    x, rows = integers(*shape_x, low=1), operator.from_parameter(integers(*shape_w, seed=1, low=1))
    y = operator.forward(x, rows)
    factors = torch.arange(1, len(rows) + 1.0).double()
    scaled = operator.forward(x, rows * factors.reshape(-1, *(1 for _ in rows.shape[1:])))
    assert y.shape[1] == len(rows) and y.any() and torch.equal(scaled, y * factors.reshape(operator.channel_shape))


@every_operator
def test_the_gradient_reaches_the_parameter_through_its_layout(operator, shape_x, shape_w):
    w = integers(*shape_w).requires_grad_()
    weights = integers(*operator.from_parameter(w).shape, seed=1)
    (operator.from_parameter(w) * weights).sum().backward()
    assert torch.equal(operator.from_parameter(w.grad), weights)


@every_operator
def test_on_a_gpu_it_is_computed_in_float64(operator, shape_x, shape_w):
    class OnGpu(torch.Tensor):
        """A tensor that says it is on a GPU."""

        @property
        def device(self):
            return torch.device("cuda")

    x, rows = integers(*shape_x, dtype=torch.float32), operator.from_parameter(integers(*shape_w, dtype=torch.float32))
    y = accumulators(operator, x.as_subclass(OnGpu), rows, 1000, 10).as_subclass(torch.Tensor)
    assert y.dtype == torch.float64 and torch.equal(y, operator.forward(x, rows).double())


@every_operator
@pytest.mark.parametrize("max_x, max_w", [(15, 7), (255, 127), (16384, 16384)], ids=["4-bit", "8-bit", "pot"])
def test_accumulators_are_exact(operator, shape_x, shape_w, max_x, max_w):
    """At their largest too, where float32 just holds them or no longer does."""
    rows = operator.from_parameter(integers(*shape_w, low=-max_w, high=max_w + 1))
    for x, n in ((integers(*shape_x, seed=1, low=-max_x, high=max_x + 1), rows),
                 (torch.full(shape_x, max_x).double(), torch.full_like(rows, max_w))):  # fmt: skip
        bound = accumulator_bound(rows.shape, max_w, max_x)
        y = accumulators(operator, x.float(), n.float(), bound, max(max_x, max_w))
        assert y.dtype == torch.float64 or bound < FLOAT32_EXACT
        assert torch.equal(y.double(), operator.forward(x, n)) and 0 < y.abs().max() <= bound


@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 1), (3, 2), (2, 4)])
def test_every_output_size_that_torch_reaches(stride, dilation):
    operator = TransposedConvolution((stride,), (1,), (0,), (dilation,), 1)
    x, w = integers(1, 1, 4), integers(1, 1, 3, seed=1)
    reachable = {}
    for output_padding in range(max(stride, dilation)):
        y = torch.conv_transpose1d(x, w, None, stride, 1, output_padding, 1, dilation)
        reachable[y.shape[2]] = y
    for size in range(1, 25):
        for given in ([size], [1, 1, size]):
            if size in reachable:
                found = operator.for_output_size((4,), (3,), given)
                assert torch.equal(found.forward(x, operator.from_parameter(w)), reachable[size])
            else:
                with pytest.raises(
                    ValueError, match=rf"output_size \[{size}\]: cannot be reached from inputs of \[4\]"
                ):
                    operator.for_output_size((4,), (3,), given)
    assert len(reachable) == max(stride, dilation)


# The layer.


KINDS = {
    1: (nn.ConvTranspose1d, (3, 4, 5)),
    2: (nn.ConvTranspose2d, (2, 4, 5, 4)),
    3: (nn.ConvTranspose3d, (2, 4, 3, 2, 3)),
}
GEOMETRIES = {
    "plain": {}, "strided": {"stride": 2, "padding": 1}, "output-padding": {"stride": 3, "output_padding": 2},
    "dilated": {"dilation": 2}, "grouped": {"groups": 2}, "depthwise": {"groups": 4, "stride": 2},
    "no-bias": {"bias": False},
}  # fmt: skip
every_geometry = pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
every_kind = pytest.mark.parametrize("dims", KINDS, ids=lambda dims: f"{dims}d")


@every_kind
@every_geometry
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_equals_torchs_of_quantized_values(dims, geometry, per_channel):
    make, shape = KINDS[dims]
    layer, x = make(4, 8, 3, **geometry).double().eval(), torch.randn(shape, dtype=torch.float64)
    levels_w, levels_x = LevelSet("apot", 4), LevelSet("apot", 4, False)
    groups = geometry.get("groups", 1)
    rows = layer.weight.detach().unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)
    weights = WeightQuantizer(levels_w, rows, per_channel=per_channel, normalization="none").double()
    clip = torch.linspace(0.05, 0.4, 8).double() if per_channel else torch.tensor(0.2).double()
    weights.set_clip(clip.reshape(weights.clip.shape))
    inputs = InputQuantizer(levels_x).double()
    inputs.set_clip(torch.tensor(1.5))
    quant = QUANT_LAYERS[make].from_float(layer, weights, inputs)
    expected_rows = nearest_level((rows * 10 / weights.clip).clamp(-10, 10), levels_w) * weights.clip / 10
    levels = nearest_level((x * levels_x.max / 1.5).clamp(0, levels_x.max), levels_x) * 1.5 / levels_x.max
    with torch.no_grad():
        layer.weight.copy_(expected_rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))
        expected = layer(levels)
        layer.weight.copy_(rows.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1))
        torch.testing.assert_close(quant(x), expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(quant(x[0]), expected[0], rtol=1e-12, atol=1e-12)
    n, scale = quant.integer_weight()
    assert n.shape == rows.shape and scale.shape == weights.clip.shape
    torch.testing.assert_close(n * scale, expected_rows, rtol=1e-12, atol=1e-12)


class Upsampling(nn.Module):
    """Two transposed convolutions; the second is asked for a size."""

    def __init__(self, dims, **geometry):
        super().__init__()
        make = KINDS[dims][0]
        self.first = make(4, 8, 3, **geometry)
        self.norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1](8)
        self.second, self.dims = make(8, 2, 3, stride=2, groups=2), dims

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        return self.second(x, output_size=[2 * n + 2 for n in x.shape[-self.dims :]])


@every_kind
@every_geometry
def test_the_whole_way(dims, geometry, tmp_path):
    x = torch.randn(KINDS[dims][1])
    qmodel, names = cycle(Upsampling(dims, **geometry), x, tmp_path, CHANNEL)
    assert names == ["first", "second"]
    assert qmodel.second.weight_quantizer.clip.shape == (2, *(1 for _ in range(dims + 1)))
    assert list(qmodel(x).shape[2:]) == [2 * n + 2 for n in qmodel.first(x).shape[2:]]


@every_kind
def test_without_a_batch(dims, tmp_path):
    make, shape = KINDS[dims]
    cycle(nn.Sequential(make(4, 8, 3), nn.ReLU(), make(8, 2, 3, stride=2)), torch.randn(shape[1:]), tmp_path)


@pytest.fixture
def upsampling(tmp_path):
    """A loaded network whose middle layer is a transposed convolution."""
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 4, 2), nn.ReLU(), nn.Conv2d(4, 2, 3))
    x = torch.randn(2, 2, 6, 6)
    return loaded(trained(model, x, BitPolicy((Rule(scheme="uniform"),))), model, x, tmp_path), model, x


def test_the_onednn_backend_computes_the_same(upsampling, tmp_path):
    """The layers around it may take bytes."""
    _, model, x = upsampling
    for inputs in (x, x[0]):
        loaded(trained(model, inputs), model, inputs, tmp_path / str(inputs.dim()), "onednn")


WRITERS = {
    "onnx": export_onnx, "onnx-qdq": functools.partial(export_onnx, flavour="qdq"),
    "c": functools.partial(export_c, metadata={"mean": [0.0, 0.0], "std": [1.0, 1.0]}),
}  # fmt: skip


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_what_cannot_express_it_names_it(write, upsampling, tmp_path):
    with pytest.raises(ApotfxError, match=r"the step _2 \(ConvTranspose2d\) cannot be expressed") as error:
        write(upsampling[0], tmp_path / "translated", input_shape=(2, 6, 6))
    assert "\n" not in str(error.value)


def test_an_output_size_out_of_reach_is_an_error_of_the_layer():
    qmodel = trained(Upsampling(1), torch.randn(3, 4, 5))
    with pytest.raises(ValueError, match=r"output_size \[99\]: cannot be reached from inputs of \[7\]"):
        qmodel.second(torch.randn(3, 8, 7), output_size=[99])
