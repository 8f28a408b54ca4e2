"""apotfx/integer/onnx/graph.py: the file, and what is refused."""

import math

import pytest
import torch
from onnx import TensorProto
from onnx_helpers import Vgg, batch, check_exact, constants, integer_network, layer_of, single, translate
from torch import nn
from torch.nn import functional

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, export_integer, load_integer, quantize
from apotfx.integer.onnx import export_onnx
from apotfx.operators import MatrixProduct


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
    assert {"_0_codes", "_0.accumulators", "_3_codes", "_3.accumulators", "_5_codes", "_5"} <= set(names)
    assert all(node.domain == "" for node in file.graph.node)
    weights = [c for name, c in constants(file).items() if ".weight" in name]
    assert sum(len(c.raw_data) for c in weights) == 16 * 27 + 144 * 17 // 2 + math.ceil(17 * 5 / 2)


def test_the_same_network_gives_the_same_file(tmp_path):
    torch.manual_seed(0)
    x = batch(2, 3, 13, 11)
    network = integer_network(tmp_path, Vgg(), x, BitPolicy.default(3))
    files = [export_onnx(network, tmp_path / f"{i}.onnx", input_shape=tuple(x.shape[1:])) for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


class Other(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.conv1, self.conv2, self.function = nn.Conv2d(2, 3, 3), nn.Conv2d(3, 2, 1), function

    def forward(self, x):
        return self.function(self.conv2(self.conv1(x)))


def add_hook(network):
    network.conv2.register_forward_hook(lambda module, args, output: output * 2)


@pytest.mark.parametrize("function, message", [
    (torch.sigmoid, r"ONNX: the step sigmoid \(torch.sigmoid\) cannot be expressed; remove it from the network"),
    (lambda x: functional.avg_pool2d(x, 2, divisor_override=3), r"ONNX: the step \w+ \(Average "),
    (lambda x: x + 1.0, r"ONNX: the step add \(operator.add\) cannot"),
    (lambda x: (x, x), "ONNX: the network returns several values, or a part of one, expected one tensor"),
], ids=["sigmoid", "avg_pool2d", "add-number", "tuple"])  # fmt: skip
def test_what_cannot_be_expressed_is_refused(tmp_path, function, message):
    x = batch(2, 2, 6, 6)
    network = integer_network(tmp_path, Other(function), x, BitPolicy.default(4))
    with pytest.raises(ApotfxError, match=message):
        translate(tmp_path, network, x)
    assert not (tmp_path / "exact.onnx").exists()


class WithArgument(nn.Module):
    """A second input, which has a default or none."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3)


class Optional(WithArgument):
    def forward(self, x, mask=None):
        return self.conv(x)


class Required(WithArgument):
    def forward(self, x, y):
        return self.conv(x) + self.conv(y)


@pytest.mark.parametrize("make, inputs, message", [
    (Required, 2, "the network takes the inputs x, y, expected one"),
])  # fmt: skip
def test_more_than_one_input_is_refused(make, inputs, message, tmp_path):
    x, model = batch(2, 2, 6, 6), make()
    qmodel = quantize(model, BitPolicy.default(4))
    qmodel(*[x] * inputs)
    network = load_integer(export_integer(qmodel.eval(), tmp_path / "export"), model)
    with pytest.raises(ApotfxError, match=message):
        translate(tmp_path, network, x)


def test_hooks_are_refused(tmp_path):
    x = batch(2, 2, 6, 6)
    network = integer_network(tmp_path, Other(functional.relu), x, BitPolicy.default(4))
    add_hook(network)
    with pytest.raises(ApotfxError, match=r"ONNX: the step conv2 \(Conv2d conv2, which has hooks\) cannot be expressed"):
        translate(tmp_path, network, x)


def test_a_shape_that_does_not_fit_is_refused(tmp_path):
    network = integer_network(tmp_path, Other(functional.relu), batch(2, 2, 6, 6), BitPolicy.default(4))
    with pytest.raises(ApotfxError, match=r"^layer conv1: its input has the shape \[1, 5, 6, 6\], expected .*$"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(5, 6, 6))


def test_unknown_flavours_and_existing_files_are_refused(tmp_path):
    network = single(layer_of(MatrixProduct(), torch.ones(1, 1).char(), LevelSet("uniform", 8), LevelSet("apot", 4)))
    with pytest.raises(ApotfxError, match="flavour fast|flavour 'fast': unknown; choose one of exact, qdq"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(1,), flavour="fast")
    (tmp_path / "x.onnx").write_text("mine")
    with pytest.raises(ApotfxError, match="x.onnx: exists already"):
        export_onnx(network, tmp_path / "x.onnx", input_shape=(1,))
    assert (tmp_path / "x.onnx").read_text() == "mine"
