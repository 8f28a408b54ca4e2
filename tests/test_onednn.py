import copy
import logging
import pickle

import pytest
import torch
import torchvision
from helpers import LEVEL_SETS, level_set_id, needs_bytes, needs_kernels
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import relu

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, export_integer, kernels, load_integer, quantize
from apotfx import functional as F
from apotfx.integer import load, onednn
from apotfx.integer.onednn import ByteLayer, ByteNetwork, Pointwise
from apotfx.kernels import Encoder, Term
from apotfx.models import build_model


@pytest.fixture(autouse=True)
def bytes_for_small_layers(monkeypatch):
    monkeypatch.setattr(onednn, "WORTH_BYTES", 0)


def batch(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def networks(model, x, tmp_path, policy=None):
    """The quantized network, the reference and the one on oneDNN; batch norms have both signs."""
    generator = torch.Generator().manual_seed(2)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight.data, module.bias.data, module.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            module.running_var.uniform_(0.3, 3, generator=generator)
    qmodel = calibrate(quantize(model, policy or BitPolicy.default(4)), [x]).eval()
    path = export_integer(qmodel, tmp_path / "export")
    return qmodel, load_integer(path, model), load_integer(path, model, backend="onednn")


def check_equal(qmodel, reference, ours, *inputs):
    with torch.no_grad():
        expected, y = qmodel(*inputs), ours(*inputs)
        assert torch.equal(reference(*inputs), expected)
    assert y.shape == expected.shape and torch.equal(y, expected)
    assert expected.isfinite().all() and len(expected.unique()) > 1


def kinds(network):
    """How many modules of each kind the fused graph calls."""
    called = [network.fused.get_submodule(n.target) for n in network.fused.graph.nodes if n.op == "call_module"]
    return {kind: sum(type(module) is kind for module in called) for kind in {type(module) for module in called}}


# Networks, each with the shape of an input.


class Residual(nn.Module):
    """All that is gathered between layers: batch norms, additions of several kinds, ReLUs, a max-pool, branches."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 20, 3, padding=1, bias=False), nn.BatchNorm2d(20)
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.conv2, self.bn2 = nn.Conv2d(20, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.conv3, self.bn3 = nn.Conv2d(20, 20, 1), nn.BatchNorm2d(20)
        self.conv4 = nn.Conv2d(20, 20, 3, padding=1, groups=20)
        self.fc = nn.Linear(20, 5)

    def forward(self, x):
        x = self.pool(relu(self.bn1(self.conv1(x))))
        x = relu(self.bn2(self.conv2(x)) + self.bn3(self.conv3(x)))
        x = relu(self.conv4(x) + x)
        return self.fc((x + self.conv4.bias.view(-1, 1, 1)).mean((2, 3)))


def vgg():
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(6, 9, 3), nn.MaxPool2d(2),
        nn.ReLU(), nn.Flatten(), nn.Linear(9, 12), nn.ReLU(), nn.Dropout(), nn.Linear(12, 4),
    )  # fmt: skip


def perceptron():
    return nn.Sequential(
        nn.Linear(12, 70), nn.BatchNorm1d(70), nn.ReLU(), nn.Identity(), nn.Linear(70, 9, bias=False),
        nn.BatchNorm1d(9), nn.Linear(9, 3),
    )  # fmt: skip


class Attention(nn.Module):
    """Linear layers of sequences, layer norms, an activation that stays in float."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.b(nn.functional.gelu(self.a(self.norm(x))))


class PreActivation(nn.Module):
    """Batch norms before layers, concatenation, one layer called twice, one value encoded three times."""

    def __init__(self):
        super().__init__()
        self.bn, self.twice = nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)
        self.bn_twice, self.pool = nn.BatchNorm2d(4), nn.MaxPool2d(2)
        self.left, self.right, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(8, 3, 1)

    def forward(self, x):
        x = self.twice(relu(self.bn(x)))
        x = self.pool(relu(self.bn_twice(self.twice(x))))
        return self.last(torch.cat([self.left(x), self.right(x)], 1))


class OddPadding(nn.Module):
    """Layers that stay on the reference among others that do not."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding="same")
        self.b = nn.Conv2d(6, 6, 3, padding=1, padding_mode="circular")
        self.c = nn.Conv2d(6, 6, 3, padding=2, dilation=2, stride=2)

    def forward(self, x):
        return self.c(relu(self.b(relu(self.a(x)))))


class Shuffle(nn.Module):
    """Views, which ask for a contiguous tensor, with sizes read from another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 6, 3), nn.Conv2d(6, 4, 1)

    def forward(self, x):
        x = self.a(x)
        n, c, h, w = x.size()
        return self.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, -1, h, w))


class Conv1d(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 6), nn.ReLU(),
            nn.Linear(6, 2))  # fmt: skip


NETWORKS = {
    "residual": (Residual, (4, 3, 9, 9)), "vgg": (vgg, (4, 3, 8, 8)), "perceptron": (perceptron, (6, 12)),
    "attention": (Attention, (3, 5, 8)), "pre-activation": (PreActivation, (4, 4, 6, 6)),
    "odd-padding": (OddPadding, (2, 3, 7, 7)), "conv1d": (Conv1d, (4, 3, 10)),
    "shuffle": (Shuffle, (2, 4, 5, 5)),
    "resnet10": (lambda: build_model("resnet10", in_channels=1, num_classes=10, image_size=28)[0], (4, 1, 28, 28)),
}  # fmt: skip
every_network = pytest.mark.parametrize("make, shape", NETWORKS.values(), ids=NETWORKS)


@needs_bytes
@needs_kernels
@every_network
def test_results_are_those_of_the_reference(make, shape, tmp_path):
    torch.manual_seed(0)
    triple = networks(make(), batch(*shape), tmp_path)
    assert isinstance(triple[2], ByteNetwork)
    check_equal(*triple, batch(*shape))
    check_equal(*triple, batch(*shape, seed=3)[:1])


@needs_bytes
@needs_kernels
@pytest.mark.parametrize("rule", [
    {"bits": 2}, {"bits": 3, "scheme": "pot"}, {"bits": 5}, {"bits": 6}, {"bits": 8, "scheme": "uniform"},
    {"granularity": "channel"}, {"granularity": "channel", "bits": 8, "scheme": "uniform"},
    {"normalization": "standardize"}, {"weight_bits": 32}, {"activation_bits": 32},
], ids=lambda rule: "-".join(map(str, rule.values())))  # fmt: skip
def test_every_kind_of_level(rule, tmp_path):
    torch.manual_seed(0)
    rules = {"rules": [{"name": "conv1", "scheme": "uniform", "bits": 8}, {"name": "*"} | rule]}
    x = batch(4, 3, 9, 9)
    check_equal(*networks(Residual(), x, tmp_path, BitPolicy.from_dict(rules)), x)


@needs_bytes
@needs_kernels
@pytest.mark.parametrize("name", ["mobilenet_v2", "squeezenet1_1"])
def test_networks_of_torchvision(name, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.get_model(name, num_classes=7)
    x = batch(2, 3, 64, 64)
    qmodel, reference, ours = networks(model, x, tmp_path)
    check_equal(qmodel, reference, ours, x)
    assert kinds(ours)[ByteLayer] == len(qmodel.meta["plan"].layers)


# What is fused.


@needs_bytes
@needs_kernels
def test_what_lies_between_layers_is_one_operation(tmp_path):
    torch.manual_seed(0)
    model = build_model("resnet18", in_channels=1, num_classes=10, image_size=28)[0]
    x = batch(2, 1, 28, 28)
    _, _, ours = networks(model, x, tmp_path)
    # A pointwise operation for the image, one per layer but for the three of downsampling, and one for the mean.
    assert kinds(ours) == {ByteLayer: 21, Pointwise: 20, type(ours.reference.avgpool): 1}
    left = {node.target for node in ours.fused.graph.nodes if node.op == "call_function"}
    assert "max_pool2d" in {target.__name__ for target in left}
    assert not any("relu" in str(node) and node.op != "call_module" for node in ours.fused.graph.nodes)


@needs_bytes
@needs_kernels
def test_negative_batch_norms_turn_the_weights_before_a_max_pool(tmp_path):
    torch.manual_seed(0)
    x = batch(4, 3, 9, 9)
    triple = networks(Residual(), x, tmp_path)
    layer, multiplier = triple[2].fused.conv1, triple[1].bn1.multiplier
    assert (multiplier < 0).any() and (multiplier > 0).any()
    assert torch.equal(layer.sign.bool(), torch.ones(20).bool()) and (layer.sign < 0).equal(multiplier < 0)
    check_equal(*triple, x)


@needs_bytes
@needs_kernels
@every_network
def test_codes_and_accumulators_are_those_of_the_reference(make, shape, tmp_path):
    torch.manual_seed(0)
    _, reference, ours = networks(make(), batch(*shape), tmp_path)
    found = {"reference": {}, "ours": {}}

    def keep(side, name):
        def hook(layer, args, output):
            pair = (args[0].float() - layer.zero_point, layer.accumulators(args[0])) if side == "ours" else (
                layer.codes_and_accumulators(args[0]))  # fmt: skip
            found[side].setdefault(name, []).append(pair)

        return hook

    names = [name for name, module in ours.fused.named_modules() if isinstance(module, ByteLayer)]
    assert names
    for name in names:
        reference.get_submodule(name).register_forward_hook(keep("reference", name))
        ours.fused.get_submodule(name).register_forward_hook(keep("ours", name))
    reference(batch(*shape))
    ours.fused(batch(*shape))
    assert found["ours"].keys() == found["reference"].keys() == set(names)
    for name in names:
        for mine, theirs in zip(found["ours"][name], found["reference"][name], strict=True):
            assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1].float())


@needs_bytes
@needs_kernels
def test_small_layers_compute_in_float32_and_give_the_same(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = batch(4, 3, 9, 9)
    triple = networks(Residual(), x, tmp_path)
    monkeypatch.setattr(onednn, "WORTH_BYTES", 2**40)
    called = []
    monkeypatch.setattr(type(triple[1].conv1.geometry.operator), "pack_bytes", lambda *args, **more: called.append(1))
    check_equal(*triple, x)
    assert not called


# Inputs.


@needs_bytes
@needs_kernels
def test_threads_batches_and_formats_give_the_same_bits(tmp_path):
    torch.manual_seed(0)
    model = build_model("resnet10", in_channels=3, num_classes=10, image_size=28)[0]
    x = batch(7, 3, 28, 28)
    qmodel, reference, ours = networks(model, x, tmp_path)
    with torch.no_grad():
        expected = qmodel(x)
        threads = torch.get_num_threads()
        try:
            for count in (1, 2):
                torch.set_num_threads(count)
                for layout in (torch.contiguous_format, torch.channels_last):
                    for network in (qmodel.to(memory_format=layout), reference, ours):
                        laid_out = x.contiguous(memory_format=layout)
                        assert torch.equal(network(laid_out), expected)
                        assert torch.equal(torch.cat([network(part) for part in laid_out.split(3)]), expected)
        finally:
            torch.set_num_threads(threads)


@needs_bytes
@needs_kernels
@pytest.mark.parametrize("floats", [1, 5000, 10**9])
def test_large_batches_go_through_in_parts(floats, tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = batch(11, 3, 9, 9)
    triple = networks(Residual(), x, tmp_path)
    monkeypatch.setattr(onednn, "CACHED_FLOATS", floats)
    sizes = []
    # The forward has an operation that is not known, an addition of a parameter, so that it runs whole.
    triple[2].is_sequential = True
    triple[2].fused.conv1.register_forward_hook(lambda layer, args, output: sizes.append(len(args[0])))
    check_equal(*triple, x)
    assert sum(sizes[1:]) == 11 and max(sizes[1:]) == {1: 1, 5000: 3, 10**9: 11}[floats]


@needs_bytes
@needs_kernels
def test_networks_with_unknown_operations_run_whole(tmp_path):
    torch.manual_seed(0)
    assert not networks(Residual(), batch(2, 3, 9, 9), tmp_path / "a")[2].is_sequential
    assert networks(vgg(), batch(2, 3, 8, 8), tmp_path / "b")[2].is_sequential


@needs_bytes
@needs_kernels
def test_inputs_that_only_the_reference_takes(tmp_path):
    torch.manual_seed(0)
    _, reference, ours = networks(OddPadding(), batch(2, 3, 7, 7), tmp_path)
    for x in (batch(3, 7, 7), batch(2, 3, 7, 7).double(), batch(0, 3, 7, 7)):
        assert torch.equal(ours(x), reference(x))
    x = batch(2, 3, 7, 7)
    assert torch.equal(ours(x=x), reference(x))


@needs_kernels
def test_a_tracer_sees_the_reference(tmp_path):
    """And no constant in the place of what the kernels write."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))
    _, reference, _ = networks(model, batch(2, 3, 8, 8), tmp_path)
    graph, x = make_fx(ByteNetwork(reference))(batch(2, 3, 8, 8)), batch(2, 3, 8, 8, seed=3)
    assert torch.equal(graph(x), reference(x))


@needs_bytes
@needs_kernels
def test_sums_of_different_shapes(tmp_path):
    class Broadcasting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(4, 2, 1)

        def forward(self, x):
            return self.c(self.a(x) + nn.functional.adaptive_avg_pool2d(self.b(x), 1))

    torch.manual_seed(0)
    x = batch(2, 3, 5, 5)
    check_equal(*networks(Broadcasting(), x, tmp_path), x)


@needs_bytes
@needs_kernels
def test_several_inputs_and_outputs(tmp_path):
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)

        def forward(self, x, y):
            z = relu(self.a(x) + self.b(y))
            return {"sum": z, "out": self.c(z)}

    torch.manual_seed(0)
    x, y = batch(2, 3, 5, 5), batch(2, 3, 5, 5, seed=4)
    model = Several()
    qmodel = quantize(model, BitPolicy.default(4))
    qmodel(x, y)
    path = export_integer(qmodel.eval(), tmp_path / "export")
    found, expected = load_integer(path, model, backend="onednn")(x, y), qmodel(x, y)
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in found)


@needs_bytes
@needs_kernels
def test_an_input_that_is_not_a_number_is_refused(tmp_path):
    torch.manual_seed(0)
    ours = networks(vgg(), batch(2, 3, 8, 8), tmp_path)[2]
    x = batch(2, 3, 8, 8)
    x[1, 2, 3, 4] = float("nan")
    with pytest.raises(ApotfxError, match="integer network: its input has NaN"):
        ours(x)
    x[1, 2, 3, 4] = float("inf")
    assert torch.equal(ours(x), ours.reference(x))


@needs_bytes
@needs_kernels
@pytest.mark.parametrize("shape, message", [
    ((2, 1, 8, 8), r"layer 0: its input has the shape \[[12], 1, 8, 8\], expected \[N, 3, H, W\]; pass images of the size"),
    ((2, 3, 16, 16), r"layer 7: its input has the shape \[[12], 81\], expected \[..., 9\]"),
], ids=["channels", "size"])  # fmt: skip
def test_images_of_the_wrong_shape_are_refused(shape, message, tmp_path):
    torch.manual_seed(0)
    _, reference, ours = networks(vgg(), batch(2, 3, 8, 8), tmp_path)
    for network in (reference, ours):
        with pytest.raises(ApotfxError, match=message):
            network(batch(*shape))


# The module.


@needs_bytes
@needs_kernels
def test_copies_and_pickles_compute_the_same(tmp_path):
    torch.manual_seed(0)
    x = batch(2, 3, 8, 8)
    ours = networks(vgg(), x, tmp_path)[2]
    expected = ours(x)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours)), ours.to("cpu"), ours.float(), ours.eval()):
        assert isinstance(again, ByteNetwork) and torch.equal(again(x), expected)


@needs_bytes
@needs_kernels
@pytest.mark.parametrize("move", [lambda m: m.double(), lambda m: m.to("meta"), lambda m: m.half()])
def test_it_stays_where_it_can_run(move, tmp_path):
    ours = networks(vgg(), batch(2, 3, 8, 8), tmp_path)[2]
    with pytest.raises(
        ApotfxError, match="the network stays in float32 on the CPU, .*; load it with backend reference"
    ):
        move(ours)


@needs_bytes
@needs_kernels
def test_hooks_of_the_float_model_go_on_working(tmp_path):
    model = vgg()
    model[3].register_forward_hook(lambda module, args, output: 2 * output)
    x = batch(2, 3, 8, 8)
    check_equal(*networks(model, x, tmp_path), x)


@needs_bytes
@needs_kernels
def test_a_network_that_overwrites_what_others_read_stays_on_the_reference(tmp_path, caplog):
    class Overwriting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            z = y.relu_()
            return self.b(y) + z

    x = batch(3, 4)
    model = Overwriting()
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [x]).eval()
    with caplog.at_level(logging.WARNING, "apotfx"):
        ours = load_integer(export_integer(qmodel, tmp_path / "export"), model, backend="onednn")
    assert isinstance(ours, fx.GraphModule) and torch.equal(ours(x), qmodel(x))
    assert "backend onednn: the operation relu_ overwrites what others read; the integer network runs" in caplog.text


@pytest.mark.parametrize("lacking", ["what_bytes_lack", "what_kernels_lack"])
def test_without_what_it_needs_it_is_the_reference_and_says_so_once(lacking, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(onednn, "what_bytes_lack", lambda: None)
    monkeypatch.setattr(onednn, lacking, lambda: f"there is no {lacking}")
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    path = export_integer(calibrate(quantize(model, BitPolicy.default(4)), [batch(3, 4)]), tmp_path / "export")
    with caplog.at_level(logging.WARNING, "apotfx"):
        loaded = [load_integer(path, model, backend="onednn") for _ in range(2)]
    assert all(isinstance(network, fx.GraphModule) for network in loaded)
    assert [record.getMessage() for record in caplog.records] == [
        f"backend onednn: there is no {lacking}; the integer network runs as reference, which is slower"
    ]


def test_a_network_without_a_layer_that_fits_bytes(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    rule = Rule(scheme="apot", weight_bits=7, activation_bits=8)
    path = export_integer(calibrate(quantize(model, BitPolicy((rule,))), [batch(3, 4)]), tmp_path / "export")
    assert isinstance(load_integer(path, model, backend="onednn"), fx.GraphModule)


def test_an_unknown_backend_is_refused(tmp_path):
    with pytest.raises(ApotfxError, match="backend 'tpu': unknown; choose one of reference, onednn"):
        load.load_integer(tmp_path, nn.Linear(1, 1), backend="tpu")


# Pointwise operations in one pass.


@needs_kernels
@pytest.mark.parametrize("levels", [s for s in LEVEL_SETS if kernels.fits_byte(s)], ids=level_set_id)
@pytest.mark.parametrize("rectifier", [None, (0.0, float("inf")), (0.0, 0.7)], ids=str)
def test_bytes_are_those_of_encode(levels, rectifier):
    """At every boundary between two levels, and the floats around it."""
    clip = torch.tensor(0.83)
    boundaries = torch.arange(-2 * levels.max - 2, 2 * levels.max + 3) * (clip / (2 * levels.max))
    above, below = (boundaries.nextafter(torch.tensor(sign * torch.inf)) for sign in (1, -1))
    x = torch.cat([boundaries, above, below, torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-45]), batch(3000)])
    encoder = Encoder(clip, F.Levels(levels, rectifier), 128 if levels.signed else 0)
    (codes,) = kernels.pointwise([Term()], -torch.inf, torch.inf, [encoder], keep_float=False)(x)
    assert codes.dtype == torch.uint8
    assert torch.equal(codes.float() - encoder.zero_point, F.encode(x, clip, encoder.levels))


@needs_kernels
@pytest.mark.parametrize("channels", [1, 3, 16, 1000, 1024, 2500])
@pytest.mark.parametrize("second", [None, "plain", "bias", "affine"])
@pytest.mark.parametrize("first", ["plain", "bias", "affine", "all"])
def test_terms_are_added_up_as_torch_does(first, second, channels):
    rows = 5000 // channels + 1

    def term(kind, seed):
        bias, multiplier, offset = batch(3, channels, seed=seed)
        return Term(
            bias if kind in ("bias", "all") else None, *((multiplier, offset) if kind in ("affine", "all") else ())
        )

    terms = [term(first, 1)] + ([] if second is None else [term(second, 2)])
    inputs = [batch(rows, channels, seed=5 + i) for i in range(len(terms))]
    expected = 0
    for x, (bias, multiplier, offset) in zip(inputs, terms):
        x = x if bias is None else x + bias
        expected = expected + (x if multiplier is None else x * multiplier + offset)
    levels = F.Levels(LevelSet("apot", 4, False))
    encoders = [Encoder(torch.tensor(1.5), levels, 0), Encoder(torch.tensor(0.4), levels, 0)]
    for low, high in ((-torch.inf, torch.inf), (0.0, 1.0)):
        clamped = expected.clamp(low, high)
        value, *codes = kernels.pointwise(terms, low, high, encoders, keep_float=True)(*inputs)
        assert torch.equal(value, clamped)
        for found, encoder in zip(codes, encoders, strict=True):
            assert torch.equal(found.float(), F.encode(clamped, encoder.clip, levels))
