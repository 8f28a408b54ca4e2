"""apotfx/integer/onnx/exact.py in onnxruntime."""

import math

import pytest
import torch
from helpers import INPUT_SHAPES, LEVEL_SETS, MIXED, Net, level_set_id, policy
from onnx import TensorProto
from onnx_helpers import (
    NETWORKS,
    at,
    batch,
    check_equal,
    check_exact,
    constants,
    integer_network,
    kinds,
    layer_of,
    single,
    translate,
)
from torch import nn

from apotfx import BitPolicy, LevelSet, Rule
from apotfx.integer.onnx import compare_onnx
from apotfx.models import build_model
from apotfx.operators import FLOAT32_EXACT, Convolution, MatrixProduct
from apotfx.training.data import load_dataset


@pytest.mark.parametrize("rules", [
    at(4), at(8, scheme="uniform", granularity="channel"), at(3, scheme="uniform"),
], ids=["apot4", "uniform8-channel", "uniform3"])  # fmt: skip
@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_equal_in_every_bit(tmp_path, name, rules):
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    check_exact(tmp_path, make(), 3 * batch(5, *shape), rules)


@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect", "replicate"])
@pytest.mark.parametrize("width", [6, 16], ids=["float", "bytes"])
def test_padding(tmp_path, mode, width):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(width, width, (3, 2), padding=(2, 1), padding_mode=mode), nn.ReLU(),
        nn.Conv2d(width, width, (2, 3), padding="same", padding_mode=mode), nn.Flatten(), nn.Linear(width * 56, 3),
    )  # fmt: skip
    _, file = check_exact(tmp_path, model, batch(3, width, 5, 7), BitPolicy.default(4))
    assert "Pad" in kinds(file) and ("Conv" in kinds(file)) == (width == 6)


@pytest.mark.parametrize("bits", [{"weight_bits": 32}, {"activation_bits": 32}], ids=["weight", "input"])
def test_a_float_operand_in_a_shape_that_bytes_would_suit(tmp_path, bits):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    x = batch(2, 16, 5, 5)
    network = integer_network(tmp_path, model, x, policy(**{"weight_bits": 8, "activation_bits": 8, **bits}))
    path, file = translate(tmp_path, network, x)
    comparison = compare_onnx(network, path, [x])
    assert comparison.logits.largest < 1e-4 and not comparison.predictions.differing
    assert "MatMulInteger" not in kinds(file)


def test_a_float_weight_and_a_float_input_and_a_float_layer(tmp_path):
    """Sums of floats depend on their order: equal up to that; the layers on integers are exact given their inputs."""
    torch.manual_seed(0)
    x = batch(*INPUT_SHAPES[Net])
    network = integer_network(tmp_path, Net(), x, MIXED)
    path, file = translate(tmp_path, network, x)
    comparison = compare_onnx(network, path, [x])
    assert comparison.logits.largest < 1e-4 and not comparison.predictions.differing
    types = {name: constant.data_type for name, constant in constants(file).items()}
    assert types["conv1.weight"] == TensorProto.INT8 and types["conv3.weight"] == TensorProto.INT16
    assert types["conv2.weight"] == types["pointwise.weight"] == TensorProto.FLOAT


@pytest.mark.parametrize("clip", [0.37, 3.0])
@pytest.mark.parametrize("to_bytes", [True, False], ids=["bytes", "float"])
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_the_code_of_every_position_and_of_its_neighbours(tmp_path, levels, clip, to_bytes):
    weight = torch.ones(1, 1, dtype=torch.int8) if to_bytes else torch.full((1, 1), 200, dtype=torch.int16)
    rectifier = None if levels.signed else (0.0, 0.83 * clip)
    layer = layer_of(MatrixProduct(), weight, LevelSet("uniform", 8), levels, clip, rectifier)
    x = torch.arange(-2 * levels.max - 2, 2 * levels.max + 3) * (torch.tensor(clip) / (2 * levels.max))
    for _ in range(2):
        x = torch.cat([x, x.nextafter(torch.tensor(math.inf)), x.nextafter(torch.tensor(-math.inf))]).unique()
    x = torch.cat([x, torch.tensor([0.0, -0.0, 1e-45, 3e38, -3e38, math.inf, -math.inf])]).unsqueeze(1)
    path, _ = translate(tmp_path, single(layer), x)
    comparison = compare_onnx(single(layer), path, [x])
    codes = comparison.nodes["layer"].codes
    assert (codes.compared, codes.differing) == (len(x), 0) and comparison.first is None


def random_levels(levels, shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = torch.tensor(levels.ints)[torch.randint(len(levels.ints), shape, generator=generator)]
    return n * (torch.randint(2, shape, generator=generator) * 2 - 1)


POT = LevelSet("pot", 5), LevelSet("pot", 4, False)  # levels up to 2^14


@pytest.mark.parametrize("operator, shape_x, shape_w", [
    (Convolution((2, 1), (1, 0), (1, 2), 1), (2, 3, 6, 7), (4, 3, 3, 3)),
    (Convolution((1, 1), (1, 1), (1, 1), 2), (2, 6, 5, 4), (8, 3, 3, 3)),
    (Convolution((1,), (1,), (1,), 4), (2, 4, 9), (4, 1, 3)),
    (MatrixProduct(), (3, 50), (5, 50)), (MatrixProduct(), (3, 2, 50), (5, 50)),
], ids=["conv2d", "grouped", "depthwise", "linear", "sequence"])  # fmt: skip
def test_accumulators_beyond_what_float32_holds(tmp_path, operator, shape_x, shape_w):
    layer = layer_of(operator, random_levels(POT[0], shape_w).short(), *POT, scale=1e-9)
    assert layer.accumulator_bound > 2 * FLOAT32_EXACT
    x = batch(*shape_x)
    path, file = translate(tmp_path, single(layer), x)
    assert {node.op_type for node in file.graph.node} >= {"MatMul"} and "Conv" not in kinds(file)
    check_equal(single(layer), path, x)


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_products_of_bytes(tmp_path, signed, sign):
    """Pairs beyond 16 bits, which x86 without VNNI would saturate: both operands are unsigned then."""
    weight_levels, input_levels = LevelSet("uniform", 8), LevelSet("uniform", 8, signed)
    weight = torch.full((3, 1000), 127 * sign, dtype=torch.int8)
    weight[1, ::2] *= -1
    layer = layer_of(MatrixProduct(), weight, weight_levels, input_levels)
    x = torch.tensor([[9.0], [-9.0], [0.0]]).expand(3, 1000)
    path, file = translate(tmp_path, single(layer), x)
    assert constants(file)["layer.weight_plus_128"].data_type == TensorProto.UINT8
    check_equal(single(layer), path, x)


def test_accumulators_just_below_the_limit_of_float32(tmp_path):
    weight = torch.full((2, 4, 11, 11), 127, dtype=torch.int8)
    layer = layer_of(
        Convolution((1, 1), (0, 0), (1, 1), 1), weight, LevelSet("uniform", 8), LevelSet("uniform", 8, False)
    )
    assert FLOAT32_EXACT * 0.9 < layer.accumulator_bound < FLOAT32_EXACT
    x = batch(2, 4, 12, 12).abs() * 3
    path, file = translate(tmp_path, single(layer), x)
    assert "Conv" in kinds(file)
    check_equal(single(layer), path, x)


def test_mnist_images(mnist_root, tmp_path):
    """The first batches of the test images through a network at mixed bits."""
    dataset = load_dataset("mnist", mnist_root)
    x = ((dataset.test.images[:200].float() / 255) - dataset.mean[0]) / dataset.std[0]
    model = build_model("resnet10", in_channels=1, num_classes=10, image_size=28)[0]
    rules = BitPolicy((
        Rule(name="layer2.*", scheme="uniform", weight_bits=3, activation_bits=5),
        Rule(name="layer3.*", scheme="pot", weight_bits=4, activation_bits=3), Rule(scheme="apot", weight_bits=5),
    ))  # fmt: skip
    check_exact(tmp_path, model, x.reshape(-1, 1, 28, 28), rules)


class Functional(nn.Module):
    """A functional call with a computed weight, and a parametrized layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 3))
        self.weight, self.bias = nn.Parameter(torch.randn(3, 4, 3, 3)), nn.Parameter(torch.randn(3))

    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return nn.functional.conv2d(torch.relu(self.first(x)), weight, self.bias, padding="same")


@pytest.mark.parametrize("rules", [at(4), at(8, scheme="uniform", granularity="channel")], ids=["apot4", "uniform8"])
def test_functional_and_parametrized_layers(tmp_path, rules):
    torch.manual_seed(0)
    check_exact(tmp_path, Functional(), batch(3, 2, 7, 6), rules)
