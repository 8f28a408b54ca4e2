"""apotfx/integer/onnx.py in onnxruntime, and tools/export.py as a user calls it, on scikit-learn's digits."""

import importlib.util
import itertools
import math
import sys
from pathlib import Path

import onnx
import pytest
import torch
from helpers import INPUT_SHAPES, LEVEL_SETS, MIXED, Conv1dNet, Conv3dNet, Net, level_set_id, policy
from onnx import TensorProto
from torch import fx, nn
from torch.nn import functional

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.onnx import compare_onnx, export_onnx
from apotfx.layers import Geometry
from apotfx.models import build_model
from apotfx.operators import FLOAT32_EXACT, Convolution, MatrixProduct
from apotfx.training.build import build_network
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset
from apotfx.training.exported import export_metadata

spec = importlib.util.spec_from_file_location("export_tool", Path(__file__).parents[1] / "tools" / "export.py")
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)


def batch(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def at(bits, **rule):
    return policy(weight_bits=bits, activation_bits=bits, **rule)


def integer_network(tmp_path, model, x, rules):
    """The reference, with batch norms that multiply by both signs."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
            if module.affine:
                module.weight.data.normal_(generator=generator)
                module.bias.data.normal_(generator=generator)
    qmodel = calibrate(quantize(model, rules), [x]).eval()
    return load_integer(export_integer(qmodel, tmp_path / "export"), model)


def translate(tmp_path, network, x, flavour="exact"):
    path = export_onnx(network, tmp_path / f"{flavour}.onnx", input_shape=tuple(x.shape[1:]), flavour=flavour)
    return path, onnx.load(path)


def check_equal(network, path, x):
    """In batches of two sizes, with the optimizations of onnxruntime and without."""
    expected = network(x)
    assert expected.isfinite().all() and len(expected.unique()) > 1
    for optimize in (True, False):
        comparison = compare_onnx(network, path, [x[:1], x], optimize)
        assert comparison.first is None and comparison.logits.compared == expected.numel() // len(x) * (len(x) + 1)
        assert not comparison.predictions.differing
        layers = {node.name for node in comparison.nodes.values() if node.codes.compared}
        assert len(layers) == sum(isinstance(m, IntegerLayer) for m in network.modules())


def check_exact(tmp_path, model, x, rules):
    torch.manual_seed(0)
    network = integer_network(tmp_path, model, x, rules)
    path, file = translate(tmp_path, network, x)
    check_equal(network, path, x)
    return network, file


def kinds(file):
    return {node.op_type for node in file.graph.node}


def constants(file):
    return {constant.name: constant for constant in file.graph.initializer}


# Networks.


class Vgg(nn.Sequential):
    """Biases and no batch norm; a max-pool with dilation, an average to sizes that do not divide its input's."""

    def __init__(self, pool=(2, 3)):
        super().__init__(
            nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(16, 16, 3), nn.ReLU(inplace=True),
            nn.MaxPool2d(3, 2, padding=1, ceil_mode=True), nn.Conv2d(16, 20, 3, 2, 2, 2), nn.ReLU(),
            nn.MaxPool2d(2, 1, dilation=2), nn.AdaptiveAvgPool2d(pool), nn.Flatten(), nn.Linear(120, 24),
            nn.ReLU(), nn.Dropout(), nn.Linear(24, 5),
        )  # fmt: skip


class InvertedResidual(nn.Module):
    """ReLU6, depthwise and grouped convolutions, signed inputs between."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 16, 3, 2, 1, bias=False)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
        self.project = nn.Conv2d(16, 16, 1, bias=False)
        self.grouped = nn.Conv2d(16, 16, 3, stride=(1, 2), groups=2)
        self.bn = nn.ModuleList(nn.BatchNorm2d(16) for _ in range(3))
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = functional.relu6(self.bn[0](self.stem(x)))
        y = functional.relu6(self.bn[1](self.depthwise(x)))
        x = self.bn[2](self.project(y)) + x
        x = functional.dropout(self.grouped(x), 0.2, training=self.training)
        return self.fc(functional.relu6(x).mean((2, 3)))


class Fire(nn.Module):
    """Concatenation; an activation in place whose input has another reader; averages over windows."""

    def __init__(self):
        super().__init__()
        self.squeeze = nn.Conv2d(3, 16, 3)
        self.expand1, self.expand3 = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1)
        self.pools = nn.ModuleList([
            nn.AvgPool2d(3, 2, padding=1, count_include_pad=False, ceil_mode=True), nn.AvgPool2d(3, 2, padding=1),
            nn.AvgPool2d(2, ceil_mode=True),
        ])  # fmt: skip
        self.last = nn.Conv2d(16, 5, (1, 2))

    def forward(self, x):
        squeezed = self.squeeze(x)
        activated = functional.relu(squeezed, inplace=True)
        x = torch.cat([self.expand1(activated), self.expand3(squeezed)], 1)
        for pool in self.pools:
            x = pool(x)
        return functional.adaptive_avg_pool2d(self.last(x), 1).flatten(1)


class Shared(nn.Module):
    """One layer that is called twice."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16 * 36, 3)

    def forward(self, x):
        return self.fc(functional.relu(self.bn2(self.conv(functional.relu(self.bn1(self.conv(x)))))).flatten(1))


NETWORKS = {
    "resnet": (lambda: build_model("resnet10", in_channels=1, num_classes=10, image_size=12)[0], (1, 12, 12)),
    "vgg": (Vgg, (3, 13, 11)),
    "mobilenet": (InvertedResidual, (2, 9, 10)),
    "squeezenet": (Fire, (3, 12, 13)),
    "shared": (Shared, (16, 6, 6)),
    "linear": (lambda: nn.Sequential(nn.Linear(7, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)), (7,)),
    "sequence": (lambda: nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4)), (5, 7)),
    "conv1d": (Conv1dNet, INPUT_SHAPES[Conv1dNet][1:]),
    "conv3d": (Conv3dNet, INPUT_SHAPES[Conv3dNet][1:]),
}


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


# Layers of their own.


def single(layer):
    graph = fx.Graph()
    graph.output(graph.call_module("layer", (graph.placeholder("x"),)))
    return fx.GraphModule(nn.ModuleDict({"layer": layer}), graph)


def layer_of(operator, weight, weight_levels, input_levels, clip=1.3, rectifier=None, scale=0.01):
    return IntegerLayer(
        "layer", Geometry(operator, (), "constant"), weight, weight_levels, torch.tensor(scale), input_levels,
        torch.tensor(clip), None, rectifier,
    )  # fmt: skip


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


# The file.


def test_names_types_and_shapes(tmp_path):
    torch.manual_seed(0)
    rules = BitPolicy((
        Rule(name="0", scheme="uniform", weight_bits=8, activation_bits=8),
        Rule(name="5", scheme="uniform", weight_bits=4, activation_bits=4), Rule(),
    ))  # fmt: skip
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 17, 3, bias=False), nn.Flatten(),
        nn.Linear(17, 5),
    )  # fmt: skip
    _, file = check_exact(tmp_path, model, batch(2, 3, 5, 5), rules)
    assert [(o.domain, o.version) for o in file.opset_import] == [("", 21)]
    (image,), (result,) = file.graph.input, file.graph.output
    for value, name, shape in ((image, "input_1", ["N", 3, 5, 5]), (result, "_5", ["N", 5])):
        assert value.name == name
        assert [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim] == shape
    found = {name: (c.data_type, tuple(c.dims)) for name, c in constants(file).items()}
    expected = {
        "0.weight": (TensorProto.INT8, (16, 3, 3, 3)), "0.scale": (TensorProto.FLOAT, ()),
        "0.bias": (TensorProto.FLOAT, (16, 1, 1)), "1.multiplier": (TensorProto.FLOAT, (16, 1, 1)),
        "1.offset": (TensorProto.FLOAT, (16, 1, 1)), "3.weight_index": (TensorProto.INT4, (144, 17)),
        "apot4_unsigned.levels": (TensorProto.FLOAT, (97,)), "5.weight": (TensorProto.INT4, (17, 5)),
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected
    names = [node.name for node in file.graph.node]
    assert len(set(names)) == len(names) and all(node.output == [node.name] for node in file.graph.node)
    assert {"_0.levels", "_0.accumulators", "_3.levels", "_3.accumulators", "_5.levels", "_5"} <= set(names)
    assert all(node.domain == "" for node in file.graph.node)
    weights = [c for name, c in constants(file).items() if ".weight" in name]
    assert sum(len(c.raw_data) for c in weights) == 16 * 27 + 144 * 17 // 2 + math.ceil(17 * 5 / 2)


def test_the_same_network_gives_the_same_file(tmp_path):
    torch.manual_seed(0)
    x = batch(2, 3, 13, 11)
    network = integer_network(tmp_path, Vgg(), x, BitPolicy.default(3))
    files = [export_onnx(network, tmp_path / f"{i}.onnx", input_shape=tuple(x.shape[1:])) for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_comparison_finds_an_altered_file(tmp_path):
    network, file = check_exact(tmp_path, Vgg(), batch(2, 3, 13, 11), BitPolicy.default(4))
    scale = constants(file)["2.scale"]
    scale.raw_data = (torch.frombuffer(bytearray(scale.raw_data), dtype=torch.float32) * 1.5).numpy().tobytes()
    onnx.save(file, tmp_path / "altered.onnx")
    comparison = compare_onnx(network, tmp_path / "altered.onnx", [batch(2, 3, 13, 11)])
    assert comparison.first.name == "5" and comparison.logits.differing
    assert not comparison.nodes["_2"].codes.differing and not comparison.nodes["_2"].accumulators.differing


# QDQ.


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "sequence"])
def test_qdq_is_close(tmp_path, name, bits):
    """Not equal: QuantizeLinear brings ties to the even level, and products are scaled before they are added."""
    make, shape = NETWORKS[name]
    torch.manual_seed(0)
    x = 3 * batch(6, *shape)
    network = integer_network(tmp_path, make(), x, at(bits, scheme="uniform", granularity="channel"))
    path, file = translate(tmp_path, network, x, "qdq")
    if bits < 8:  # where onnxruntime does not round to 8 bits what the network does not
        for comparison in (compare_onnx(network, path, [x], optimize) for optimize in (True, False)):
            codes = [node.codes for node in comparison.nodes.values()]
            assert sum(tally.differing for tally in codes) <= 0.02 * sum(tally.compared for tally in codes)
    spread = (network(x) - network(x).mean(0)).abs().mean()
    assert compare_onnx(network, path, [x]).logits.largest < spread
    producers = {node.name: node for node in file.graph.node}
    for node in file.graph.node:
        if node.op_type in ("Conv", "MatMul"):
            dequantized, weight = (producers[value] for value in node.input[:2])
            assert (dequantized.op_type, weight.op_type) == ("DequantizeLinear",) * 2
            assert producers[dequantized.input[0]].op_type in ("QuantizeLinear", "Pad")
            assert constants(file)[weight.input[0]].data_type == TensorProto.INT8
    scales = [c for key, c in constants(file).items() if key.endswith("_scale")]
    assert scales and all((torch.from_numpy(onnx.numpy_helper.to_array(c).copy()) > 0).all() for c in scales)
    if name not in ("shared", "linear"):
        assert "Mul" not in kinds(file)  # batch norms went into the scales


def test_qdq_of_a_channel_that_a_batch_norm_takes_out(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(36, 3)).eval()
    x = batch(3, 2, 5, 5)
    qmodel = calibrate(quantize(model, at(5, scheme="uniform")), [x]).eval()
    qmodel.get_submodule("1").weight.data[1] = 0
    network = load_integer(export_integer(qmodel, tmp_path / "export"), model)
    path, _ = translate(tmp_path, network, x, "qdq")
    comparison = compare_onnx(network, path, [x])
    assert comparison.logits.largest < 0.05 and network(x).abs().max() > 0.2


# What is refused.


class Other(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv1, self.conv2, self.function = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1), function

    def forward(self, x):
        return self.function(self.conv2(self.conv1(x)))


def add_hook(network):
    network.conv2.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("function, message", [
    (torch.sigmoid, r"ONNX: the operation sigmoid \(sigmoid\) cannot be expressed; remove it from the network"),
    (lambda x: functional.avg_pool2d(x, 2), r"ONNX: the operation \w+ \(Average\) cannot"),
    (lambda x: torch.cat([x, x], 1), r"ONNX: the operation cat \(cat\) cannot"),
    (lambda x: x + 1.0, r"ONNX: the operation add \(add\) cannot"),
    (lambda x: (x, x), "ONNX: the network returns a tuple, expected one tensor"),
], ids=["sigmoid", "avg_pool2d", "cat-twice", "add-number", "tuple"])  # fmt: skip
def test_what_cannot_be_expressed_is_refused(tmp_path, function, message):
    x = batch(2, 2, 6, 6)
    network = integer_network(tmp_path, Other(function), x, BitPolicy.default(4))
    with pytest.raises(ApotfxError, match=message):
        translate(tmp_path, network, x)
    assert not (tmp_path / "exact.onnx").exists()


def test_hooks_are_refused(tmp_path):
    x = batch(2, 2, 6, 6)
    network = integer_network(tmp_path, Other(functional.relu), x, BitPolicy.default(4))
    add_hook(network)
    with pytest.raises(ApotfxError, match=r"ONNX: the operation conv2 \(IntegerLayer\) cannot be expressed"):
        translate(tmp_path, network, x)


def test_a_shape_that_does_not_fit_is_refused(tmp_path):
    network = integer_network(tmp_path, Other(functional.relu), batch(2, 2, 6, 6), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match=r"^layer conv1: its input has the shape \[1, 5, 6, 6\], expected .*$"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(5, 6, 6))


@pytest.mark.parametrize("rules, message", [
    (BitPolicy.default(4), "the weight of layer 2 is apot at 4 bits, expected uniform levels; use flavour exact"),
    (policy(scheme="uniform", weight_bits=32, activation_bits=8), "the weight of layer 0 is float, expected"),
    (BitPolicy((Rule(name="5", scheme="float"), Rule(scheme="uniform"))), "the weight of layer 5 is float, expected"),
], ids=["apot", "float-weight", "float-layer"])  # fmt: skip
def test_qdq_refuses_what_is_not_uniform(tmp_path, rules, message):
    x = batch(2, 3, 13, 11)
    network = integer_network(tmp_path, Vgg(), x, rules)
    with pytest.raises(ApotfxError, match=f"^flavour qdq: {message}"):
        translate(tmp_path, network, x, "qdq")


def test_unknown_flavours_and_existing_files_are_refused(tmp_path):
    network = single(layer_of(MatrixProduct(), torch.ones(1, 1).char(), LevelSet("uniform", 8), LevelSet("apot", 4)))
    with pytest.raises(ApotfxError, match="flavour fast|flavour 'fast': unknown; choose one of exact, qdq"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(1,), flavour="fast")
    (tmp_path / "x.onnx").write_text("mine")
    with pytest.raises(ApotfxError, match="x.onnx: exists already"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(1,))
    assert (tmp_path / "x.onnx").read_text() == "mine"


def test_what_onnxruntime_cannot_load_is_one_line(tmp_path):
    layer = layer_of(MatrixProduct(), torch.ones(1, 1).char(), LevelSet("uniform", 8), LevelSet("apot", 4))
    path, file = translate(tmp_path, single(layer), torch.zeros(1, 1))
    file.graph.node[0].op_type = "Nothing"
    onnx.save(file, path)
    with pytest.raises(ApotfxError, match=r"^[^\n]*exact.onnx: onnxruntime [\d.]+ cannot load it \([^\n]*\)$"):
        compare_onnx(single(layer), path, [torch.zeros(1, 1)])


# The tool.


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's directory with the export of an untrained network."""
    path = tmp_path_factory.mktemp("runs") / "run"
    path.mkdir()
    config = TrainConfig(arch="resnet10", bit=3, scheme="uniform", dataset="digits", image_size=12)
    dataset = load_dataset("digits", None, image_size=12)
    torch.manual_seed(0)
    network = build_network(config, dataset, torch.device("cpu"), None)
    network.qmodel.train()(batch(16, 1, 12, 12))  # for clips and batch norms
    export_integer(network.qmodel.eval(), path / "integer", export_metadata(config, dataset, network.image_size))
    return path


def call(*flags):
    return tool.main([*map(str, flags)])


def test_the_tool_writes_compares_and_counts(run, tmp_path, capsys):
    assert call(run, "--format", "onnx", "--output", tmp_path / "x.onnx", "--data", tmp_path) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path / 'x.onnx'}: {(tmp_path / 'x.onnx').stat().st_size:,} bytes"
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["layer1.0.conv1"].count(" 0 of ") == rows["total"].count(" 0 of ") == 2
    assert lines[-2].startswith("logits differ: 0 of ") and lines[-1].startswith("predictions differ: 0 of ")
    assert call(run / "integer", "--format", "onnx", "--output", tmp_path / "q.onnx", "--flavour", "qdq") == 0
    assert "QuantizeLinear" in kinds(onnx.load(tmp_path / "q.onnx"))


def test_where_the_tool_writes_by_default(run, capsys):
    assert call(run, "--format", "onnx") == 0
    assert capsys.readouterr().out.startswith(f"{run / 'integer.onnx'}: ")
    assert call(run, "--format", "onnx") == 2
    assert capsys.readouterr().err == (
        f"export.py: error: export {run / 'integer.onnx'}: exists already; choose another path or remove it\n"
    )


@pytest.mark.parametrize("flags, message", [
    (["nowhere", "--format", "onnx"], "nowhere: no run with an export"),
    (["RUN", "--format", "c", "--flavour", "qdq"], "--flavour: is for --format onnx"),
    (["RUN", "--format", "c", "--data", "x"], "--data: is for --format onnx"),
], ids=itertools.count())  # fmt: skip
def test_mistakes_get_one_line_and_2(run, capsys, flags, message):
    assert call(*(run if flag == "RUN" else flag for flag in flags)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"export.py: error: {message}") and error.count("\n") == 1


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_is_one_line(run, tmp_path, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    if package == "onnx":
        monkeypatch.delitem(sys.modules, "apotfx.integer.onnx")
    assert call(run, "--format", "onnx", "--output", tmp_path / "x.onnx", "--data", tmp_path) == 2
    assert (
        capsys.readouterr().err == f"export.py: error: ONNX: the package {package} is missing; pip install {package}\n"
    )


# Trained on MNIST.


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
