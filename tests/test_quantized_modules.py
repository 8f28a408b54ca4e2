"""Quantized networks with layers of every kind are modules like any other: copied, stored, moved, frozen, compiled."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.nn.utils import parametrize

from apotfx.graph.network import record_of
from apotfx import BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.layers import QuantLayer

POLICY = BitPolicy((Rule(),))
# torch 2.6 instantiates the class of an autograd function while it compiles one, which it then warns of.
may_warn = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(dtype=torch.float32):
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


class Centered(nn.Module):
    def forward(self, weight):
        return weight - weight.mean()


class Mixed(nn.Module):
    """A functional call with a computed weight, a parametrized layer, attention and, if `leaf`, a module kept whole."""

    def __init__(self, leaf=True):
        super().__init__()
        self.conv, self.up = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2, groups=2)
        self.weight, self.attention = nn.Parameter(torch.randn(4, 4)), nn.MultiheadAttention(4, 2, batch_first=True)
        self.leaf, self.last = Untraceable() if leaf else nn.Identity(), nn.Linear(4, 3)
        parametrize.register_parametrization(self.last, "weight", Centered())

    def forward(self, x):
        x = torch.relu(self.up(torch.relu(self.conv(x)))).flatten(2).mT
        x = TF.linear(x, self.weight - self.weight.mean())
        return self.last(self.leaf(self.attention(x, x, x)[0].mean(1)))


class Untraceable(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x) if x.sum() < 1e9 else x


def wholes():
    """Networks of all kinds: traced, with a leaf, without a graph."""
    return {"traced": Mixed(leaf=False), "leaf": Mixed(), "untraced": Untraced()}


class Untraced(Mixed):
    def forward(self, x):
        return super().forward(x) if x.sum() < 1e9 else x


every_whole = pytest.mark.parametrize("kind", ["traced", "leaf", "untraced"])


def trained_whole(kind):
    qmodel = quantize(wholes()[kind], POLICY)
    qmodel(images()).square().sum().backward()
    qmodel.zero_grad()
    return qmodel.eval()


@every_whole
def test_a_whole_network_has_every_kind_of_layer(kind):
    qmodel = trained_whole(kind)
    assert isinstance(qmodel, fx.GraphModule) is (kind != "untraced")
    layers = {name for name, module in qmodel.named_modules() if isinstance(module, QuantLayer)}
    functions = {"linear"} if kind != "untraced" else set()
    leaf = {"leaf.layer"} if kind != "traced" else set()
    projections = {f"attention.{name}_proj" for name in ("q", "k", "v", "out")}
    assert layers == {"conv", "up", "last"} | functions | leaf | projections


COPIES = {
    "deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)),
    "torch.save": lambda m: through_file(m),
}  # fmt: skip


def through_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), **{"weights_only": False, **options})


@every_whole
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_is_the_same_network(kind, duplicate, tmp_path):
    qmodel = trained_whole(kind)
    copied = duplicate(qmodel)
    assert torch.equal(copied(images()), qmodel(images()))
    if duplicate is copy.deepcopy or kind == "untraced":  # torch.fx pickles no meta, and names nodes anew
        assert record_of(copied)["plan"] == record_of(qmodel)["plan"] and record_of(copied)["leaves"] == record_of(qmodel)["leaves"]
        imodel = load_integer(export_integer(copied, tmp_path / "export"), wholes()[kind])
        assert torch.equal(imodel(images()), qmodel(images()))
    if kind == "traced" or duplicate is copy.deepcopy:
        for network in (copied, qmodel):
            network.train()(images()).square().sum().backward()
        grads = {name: parameter.grad for name, parameter in qmodel.named_parameters()}
        for name, parameter in copied.named_parameters():
            assert (parameter.grad is None) is (grads[name] is None)
            assert parameter.grad is None or torch.equal(parameter.grad, grads[name]), name


@every_whole
def test_its_state_goes_through_a_file(kind):
    source, target = trained_whole(kind), quantize(wholes()[kind], POLICY).eval()
    assert not torch.equal(target(images()), source(images()))
    assert target.load_state_dict(through_file(source.state_dict(), weights_only=True)) == ([], [])
    assert torch.equal(target(images()), source(images()))


@every_whole
def test_it_runs_in_float64(kind):
    qmodel = trained_whole(kind).double()
    y = qmodel(images(torch.float64))
    assert y.dtype == torch.float64 and y.isfinite().all()
    qmodel.train()(images(torch.float64)).sum().backward()
    assert all(p.grad.dtype == torch.float64 for p in qmodel.parameters() if p.requires_grad)


@every_whole
def test_it_runs_in_channels_last(kind):
    qmodel = trained_whole(kind)
    expected = qmodel(images())
    qmodel = qmodel.to(memory_format=torch.channels_last)
    for x in (images(), images().to(memory_format=torch.channels_last)):
        assert torch.equal(qmodel(x), expected)


@every_whole
def test_parts_change_their_mode(kind):
    qmodel = quantize(wholes()[kind], POLICY).train()
    qmodel.up.eval()
    assert not qmodel.up.weight_quantizer.training and qmodel.conv.weight_quantizer.training
    qmodel(images())
    assert qmodel.up.input_quantizer.needs_data() and not qmodel.conv.input_quantizer.needs_data()
    qmodel.up.train()
    qmodel(images())
    assert not qmodel.up.input_quantizer.needs_data()


@every_whole
def test_the_clips_of_frozen_parts_do_not_learn(kind):
    model = wholes()[kind]
    for part in (model.up, model.attention, model.last):
        part.requires_grad_(False)
    model.weight.requires_grad_(False)
    qmodel = quantize(model, POLICY)
    learning = {name.partition(".")[0] for name, parameter in qmodel.named_parameters() if parameter.requires_grad}
    assert learning == ({"conv"} if kind == "traced" else {"conv", "leaf"})
    qmodel(images()).square().sum().backward()
    assert qmodel.conv.weight.grad.any() and qmodel.up.weight_quantizer.clip.grad is None


class Patches(nn.Module):
    """A leaf and a functional call, and a linear layer that reads a transposed tensor."""

    def __init__(self):
        super().__init__()
        self.conv, self.up, self.leaf = nn.Conv2d(1, 4, 3), nn.ConvTranspose2d(4, 4, 2, groups=2), Untraceable()
        self.first, self.weight = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        x = self.first(torch.relu(self.up(self.conv(x))).flatten(2).mT)
        return self.leaf(TF.linear(x, self.weight - self.weight.mean()))


@may_warn
def test_compiled_it_computes_the_same():
    qmodel = calibrate(quantize(Patches(), POLICY), [images()]).eval()
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(qmodel, backend="aot_eager")(images()), qmodel(images()))
