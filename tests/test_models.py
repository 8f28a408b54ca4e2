import itertools

import pytest
import torch
import torchvision
from torchvision.models.resnet import BasicBlock, Bottleneck

from apotfx import BitPolicy, plan
from apotfx.errors import ApotfxError
from apotfx.models import build_model, list_models
from apotfx.models.resnet import CIFAR_RESNETS, MNIST_RESNETS
from apotfx.models.small import SMALL
from apotfx.models.zoo import _build


def build(arch, in_channels=1, num_classes=10, image_size=28):
    return build_model(arch, in_channels=in_channels, num_classes=num_classes, image_size=image_size)


def num_parameters(model):
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "arch, in_channels, expected",
    [
        ("resnet10", 1, 309_178),
        ("resnet18", 1, 701_818),  # published
        ("resnet20", 3, 272_474),
        ("resnet56", 3, 855_770),
        ("resnet110", 3, 1_730_714),
    ],
)
def test_number_of_parameters(arch, in_channels, expected):
    assert num_parameters(build(arch, in_channels)[0]) == expected


@pytest.mark.parametrize(
    "arch, block, depths",
    [
        ("resnet10", BasicBlock, [1, 1, 1, 1]),
        ("resnet14", BasicBlock, [2, 1, 1, 2]),
        ("resnet34", BasicBlock, [3, 4, 6, 3]),
        ("resnet50", Bottleneck, [3, 4, 6, 3]),
        ("resnet152", Bottleneck, [3, 8, 36, 3]),
    ],
)
def test_mnist_resnets_have_the_module_names_of_torchvision(arch, block, depths):
    theirs = torchvision.models.ResNet(block, depths)
    names = [name for name, _ in theirs.named_modules()]
    assert [name for name, _ in build(arch)[0].named_modules()] == names


def test_cifar_resnets_have_three_stages_and_no_max_pool():
    model, _ = build("resnet20", in_channels=3, image_size=32)
    names = [name for name, _ in model.named_children()]
    assert names == ["conv1", "bn1", "relu", "layer1", "layer2", "layer3", "avgpool", "fc"]
    assert [name for name, _ in model.layer2[0].downsample.named_children()] == ["0", "1"]
    assert model.layer1[0].downsample is None
    assert model.conv1(torch.zeros(1, 3, 32, 32)).shape == (1, 16, 32, 32)
    assert model.fc.in_features == 64


def test_initialization_is_kaiming_normal_fan_out():
    torch.manual_seed(0)
    model, _ = build("resnet18")
    weight = model.layer4[1].conv2.weight
    expected = (2 / (128 * 9)) ** 0.5
    assert weight.std().item() == pytest.approx(expected, rel=0.01)
    assert weight.abs().max() > 3 * expected  # normal, not uniform
    assert torch.equal(model.bn1.weight, torch.ones(16)) and torch.equal(model.bn1.bias, torch.zeros(16))


@pytest.mark.parametrize("arch", [*MNIST_RESNETS, *CIFAR_RESNETS])
def test_resnets_are_traceable(arch):
    model, size = build(arch)
    assert size == 28 and model.training
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model).eval()(images), model.eval()(images))


@pytest.mark.parametrize("in_channels, image_size", [(1, 28), (3, 32), (2, 8), (1, 15), (1, 31), (1, 1)])
@pytest.mark.parametrize("arch", SMALL)
def test_small_networks_take_any_images_and_have_no_batch_norm(arch, in_channels, image_size):
    torch.manual_seed(0)
    model, size = build(arch, in_channels, num_classes=7, image_size=image_size)
    assert size == (max(8, image_size) if arch == "vgg7" else image_size) and model.training
    assert not any(isinstance(module, torch.nn.modules.batchnorm._BatchNorm) for module in model.modules())
    images = torch.randn(5, in_channels, size, size)
    with torch.no_grad():
        logits = model(images)
    assert logits.shape == (5, 7) and logits.isfinite().all() and logits.std() > 0.05


@pytest.mark.parametrize("arch, expected", [("mlp", 235_146), ("vgg7", 77_562), ("vit", 204_938)])
def test_small_networks_on_mnist(arch, expected):
    model, size = build(arch)
    assert num_parameters(model) == expected
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(torch.fx.symbolic_trace(model).eval()(images), model.eval()(images))


@pytest.mark.parametrize(
    "arch, layers",
    [
        ("mlp", ["1", "3", "5"]),
        ("vgg7", [*(f"features.{i}" for i in (0, 2, 5, 7, 10, 12)), "classifier"]),
        ("vit", ["patches", *(f"blocks.{i}.{layer}" for i in range(4) for layer in (
            "attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.out_proj", "mlp.0", "mlp.2")), "head"]),
    ],
)  # fmt: skip
def test_every_layer_of_the_small_networks_is_quantized(arch, layers):
    planned = plan(build(arch)[0], BitPolicy.default(4)).layers
    assert [layer.facts.name for layer in planned if layer.quantized] == layers
    assert all(layer.quantized for layer in planned)


@pytest.mark.parametrize(
    "name, expected_size",
    [
        ("alexnet", 64),
        ("squeezenet1_0", 28),
        ("mobilenet_v2", 28),
        ("googlenet", 28),
        ("regnet_y_400mf", 28),
        ("densenet121", 32),
        ("vit_b_16", 32),
    ],
)
def test_torchvision_networks_fit_the_data_set(name, expected_size):
    model, size = build(f"torchvision/{name}")
    assert size == expected_size and model.training
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    images = torch.randn(2, 1, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert model(images).shape == (2, 10)
        logits = model.eval()(images)
        assert logits.isfinite().all()
        torch.testing.assert_close(torch.fx.symbolic_trace(model)(images), logits)


def test_a_torchvision_network_takes_larger_images_as_they_are():
    assert build("torchvision/squeezenet1_1", image_size=100)[1] == 100


def test_only_the_channels_of_the_first_conv_change():
    first = build("torchvision/mobilenet_v2")[0].features[0][0]
    theirs = torchvision.models.mobilenet_v2(weights=None).features[0][0]
    assert first.in_channels == 1
    for attribute in ("out_channels", "kernel_size", "stride", "padding", "dilation", "groups"):
        assert getattr(first, attribute) == getattr(theirs, attribute)
    assert first.bias is None and theirs.bias is None


def test_three_channels_give_exactly_the_network_of_torchvision():
    torch.manual_seed(3)
    model, _ = build("torchvision/mobilenet_v3_small", in_channels=3)
    after = torch.get_rng_state()
    torch.manual_seed(3)
    theirs = torchvision.models.mobilenet_v3_small(weights=None, num_classes=10)
    assert torch.equal(torch.get_rng_state(), after)
    state = theirs.state_dict()
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_list_models_names_all_networks():
    names = list_models()
    assert names[:7] == ["resnet10", "resnet14", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"]
    assert names[7:12] == ["resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]
    theirs = torchvision.models.list_models(module=torchvision.models)
    assert names[12:15] == ["mlp", "vgg7", "vit"]
    assert names[15:] == [f"torchvision/{name}" for name in theirs]


@pytest.mark.parametrize(
    "arch, hint",
    [
        ("resnet19", "resnet10"),
        ("alexnet", "torchvision/alexnet"),
        ("torchvision/mobilnet_v2", "mobilenet_v2"),
        ("torchvision/quantized_googlenet", "torchvision/googlenet"),
    ],
)
def test_unknown_network(arch, hint):
    with pytest.raises(ApotfxError, match=rf"unknown network '{arch}': did you mean .*{hint}.*list_models"):
        build(arch)


def test_unknown_network_that_resembles_none():
    with pytest.raises(ApotfxError, match=r"unknown network '': apotfx\.models\.list_models\(\) lists all"):
        build("")


def test_a_network_that_takes_no_size():
    with pytest.raises(ApotfxError, match=r"torchvision/maxvit_t takes none of the image sizes \[225, 299\]"):
        build("torchvision/maxvit_t", image_size=225)


@pytest.mark.parametrize("arch, sizes", [
    ("mlp", {"image_size": 65536}), ("mlp", {"image_size": 2**31 - 1, "in_channels": 65536}), ("vit", {"image_size": 65536}),
    ("vgg7", {"image_size": 65536, "num_classes": 65536}),
], ids=itertools.count())  # fmt: skip
def test_a_network_beyond_the_memory_is_refused_before_it_takes_any(arch, sizes):
    with pytest.raises(ApotfxError, match=f"^{arch} for .* classes and .* pixels has .* parameters, expected at most"):
        build(arch, **sizes)


def test_the_number_of_parameters_may_be_limited():
    model, _ = build_model("resnet10", in_channels=1, num_classes=10, image_size=28)
    count = sum(p.numel() for p in model.parameters())
    build_model("resnet10", in_channels=1, num_classes=10, image_size=28, max_parameters=count)
    with pytest.raises(ApotfxError, match=f"has {count} parameters, expected at most {count - 1}"):
        build_model("resnet10", in_channels=1, num_classes=10, image_size=28, max_parameters=count - 1)


@pytest.mark.parametrize("arch", ["resnet10", "vit", "torchvision/mobilenet_v3_small", "torchvision/regnet_x_400mf"])
def test_weights_are_drawn_once(arch):
    """Whatever is found out about a network before, its weights are those of its first draw."""
    torch.manual_seed(3)
    model, size = build_model(arch, in_channels=3, num_classes=10, image_size=32)
    torch.manual_seed(3)
    again, _ = _build(arch, 3, 10, 32)
    for (name, a), (_, b) in zip(model.state_dict().items(), again.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert model.training
