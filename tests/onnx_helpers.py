"""Networks and layers in ONNX, for the tests of each flavour."""

import onnx
import torch
from helpers import INPUT_SHAPES, Conv1dNet, Conv3dNet, policy
from torch import nn
from torch.nn import functional

from apotfx import calibrate, export_integer, load_integer, quantize
from apotfx.integer.network import IntegerNetwork
from apotfx.integer.program import Encode, Input, Product, Program
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.onnx import compare_onnx, export_onnx
from apotfx.layers import Geometry
from apotfx.models import build_model


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


# Layers of their own.


def single(layer):
    steps = [Input("x", (), True, None), Encode("layer_codes", ("x",), "layer"), Product("layer", ("layer_codes",), "layer")]
    if layer.input_levels is None:
        steps[1:] = [Product("layer", ("x",), "layer")]
    return IntegerNetwork(Program(tuple(steps), {"value": 0}, ("layer",)), {"layer": layer}, {})


def layer_of(operator, weight, weight_levels, input_levels, clip=1.3, rectifier=None, scale=0.01):
    return IntegerLayer(
        "layer", Geometry(operator, (), "constant"), weight, weight_levels, torch.tensor(scale), input_levels,
        torch.tensor(clip), None, rectifier,
    )  # fmt: skip
