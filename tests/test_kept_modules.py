"""Code of modules that tracing keeps whole sees the layers inside as the float layers that they were."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, export_integer, load_integer, quantize
from apotfx.graph.network import record_of
from apotfx.layers import QuantLayer
from apotfx.modules import looked_at_as_float

POLICY = BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))


class Scaled(nn.Linear):
    """A layer with more than a layer has, under names that quantized layers use too."""

    def __init__(self, *sizes):
        super().__init__(*sizes)
        self.scale, self.name, self.engine = 0.7, "own", 0.3

    @property
    def size(self):
        return self.weight.abs().mean()

    def penalty(self, by=2):
        return by * self.weight.square().mean()


class Kept(nn.Module):
    """Cannot be traced, and looks at its layer."""

    def __init__(self, look, make=nn.Linear):
        super().__init__()
        self.layer, self.look = make(6, 6), look

    def forward(self, x):
        if x.abs().max() > 1e9:
            return x
        return self.layer(x) * (1 + self.look(self))


class Net(nn.Sequential):
    def __init__(self, *args):
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.ReLU(), Kept(*args), nn.Linear(6, 6))


def weight_norm(*sizes):
    return nn.utils.parametrizations.weight_norm(nn.Linear(*sizes))


def as_type(m):
    return 0.5 if isinstance(m.layer, Scaled) and m.layer.__class__ is Scaled else 2.0


LOOKS = {
    "own attribute": (lambda m: m.layer.scale, Scaled),
    "own attributes of taken names": (lambda m: len(m.layer.name) / 10 + m.layer.engine, Scaled),
    "attribute with default": (lambda m: getattr(m.layer, "scale", 0.25) + hasattr(m.layer, "levels"),),
    "own property": (lambda m: m.layer.size, Scaled),
    "own method": (lambda m: m.layer.penalty(by=3), Scaled),
    "own type": (as_type, Scaled),
    "vars": (lambda m: ("geometry" in vars(m.layer)) + vars(m.layer)["_parameters"]["weight"].mean(),),
    "dir": (lambda m: "weight_quantizer" in dict(m.layer.named_children()) or "scale" in m.layer.__dict__,),
    "named_parameters": (lambda m: sum(len(n) * p.mean() for n, p in m.named_parameters()),),
    "state_dict": (lambda m: sum(t.square().mean() for t in m.layer.state_dict().values()),),
    "parametrized": (lambda m: m.layer.weight.norm() / 5, weight_norm),
    "buffers": (lambda m: len(list(m.buffers())),),
    "walk": (lambda m: sum(len(list(c.parameters(recurse=False))) for c in m.modules()),),
    "text": (lambda m: len(repr(m.layer)) / 100,),
    "get_parameter": (lambda m: m.get_parameter("layer.bias").mean(),),
    "copied": (lambda m: copy.deepcopy(m.layer).weight.mean() + copy.copy(m.layer).bias.mean(),),
    "written through data": (lambda m: m.layer.weight.data.abs().amax(0).mean(),),
    "gradient": (lambda m: m.layer.weight.detach().requires_grad_().sum().item(),),
    "parameters": (lambda m: torch.cat([p.flatten() for p in m.parameters()]).std(),),
}


@pytest.fixture
def x():
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("args", LOOKS.values(), ids=LOOKS)
def test_a_look_shows_the_float_layer(args, x, tmp_path):
    model = Net(*args).eval()
    qmodel = calibrate(quantize(model, POLICY), [x])
    assert list(record_of(qmodel)["leaves"]) == ["2"]
    got, expected = qmodel(x), model(x)
    assert (got - expected).norm() < 0.05 * expected.norm()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        path = export_integer(qmodel, tmp_path / "export")
        for parameter in model.parameters():  # the export has what counts
            patch.setattr(parameter, "data", torch.full_like(parameter, torch.nan))
        assert torch.equal(load_integer(path, model)(x), got)


def test_outside_of_such_code_the_layer_is_what_it_is(x):
    qmodel = calibrate(quantize(Net(*LOOKS["own method"]).eval(), POLICY), [x])
    layer = qmodel.get_submodule("2.layer")
    assert isinstance(layer, QuantLayer) and layer.name == "2.layer" and layer.__class__ is type(layer)
    assert {"weight", "bias", "weight_quantizer.clip", "input_quantizer.clip"} == dict(layer.named_parameters()).keys()
    with looked_at_as_float():
        code = {}
        exec("def look(layer): return layer.__class__, [*dict(layer.named_parameters())], layer.name", code)
        assert code["look"](layer) == (Scaled, ["weight", "bias"], "own")
    with pytest.raises(AttributeError, match="nothing"):
        layer.nothing


def test_hooks_on_the_layer_have_what_it_is(x):
    qmodel, seen = calibrate(quantize(Net(*LOOKS["own method"]).eval(), POLICY), [x]), []

    def hook(layer, args, output):
        seen.append((layer.input_quantizer.levels.bits, layer.codes_and_accumulators(*args)[0].abs().max().item()))

    qmodel.get_submodule("2.layer").register_forward_hook(hook)
    qmodel(x)
    ((bits, largest),) = seen
    assert bits == 8 and 100 < largest <= 127


@pytest.mark.parametrize("copied", [
    copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)),
    lambda m: (f := io.BytesIO(), torch.save(m, f), f.seek(0), torch.load(f, weights_only=False))[-1],
], ids=["deepcopy", "pickle", "torch.save"])  # fmt: skip
def test_a_copy_is_disguised_too(copied, x):
    qmodel = calibrate(quantize(Net(as_type, Scaled).eval(), POLICY), [x])
    assert torch.equal(copied(qmodel)(x), qmodel(x))
    assert {k for k, _ in copied(qmodel).named_parameters()} == {k for k, _ in qmodel.named_parameters()}


class Holding(nn.Module):
    """Calls its layers through other references than the names that they have."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)
        self.held, self.table = [self.one], {"two": (self.two, 0.5)}

    def forward(self, x):
        layer, scale = self.table["two"]
        return x if x.isnan().any() else scale * layer(self.held[0](x))


def test_all_references_to_a_layer_are_to_the_quantized_one(x, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Holding()).eval()
    qmodel = calibrate(quantize(model, POLICY), [x])
    holding = qmodel.get_submodule("1")
    assert holding.held[0] is holding.one and isinstance(holding.one, QuantLayer)
    path = export_integer(qmodel, tmp_path / "export")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(load_integer(path, model)(x), qmodel(x))


@pytest.mark.parametrize("look, make, message", [
    (lambda m: sum(p.mean() for p in m.parameters()), weight_norm, "2.layer has parametrizations, which no export holds"),
    (lambda m: torch.func.functional_call(m.layer, {"weight": 0 * m.layer.weight}, torch.ones(6)).mean(), nn.Linear,
     "around layer 2.layer, kept whole, calls it with other weights than its own"),
], ids=["parametrization", "functional_call"])  # fmt: skip
def test_what_no_export_holds_is_refused_by_name(look, make, message, x, tmp_path):
    qmodel = calibrate(quantize(Net(look, make).eval(), POLICY), [x])
    with pytest.raises(ApotfxError, match=message):
        export_integer(qmodel, tmp_path / "export")


@pytest.mark.parametrize("examples", [False, True])
def test_code_that_asks_for_the_exact_type_is_refused(examples, x):
    model = Net(lambda m: 0.5 if type(m.layer) is nn.Linear else 2.0).eval()
    qmodel = quantize(model, POLICY, **{"example_inputs": x} if examples else {})
    with pytest.raises(ApotfxError, match="changed what it computes .an error of"):
        calibrate(qmodel, [x])


def test_a_weight_that_is_read_only_later_is_refused_by_name(x, tmp_path):
    model = Net(lambda m: m.layer.weight.mean() if getattr(m, "looks", False) else 0.0).eval()
    path = export_integer(calibrate(quantize(model, POLICY), [x]), tmp_path / "export")
    imodel = load_integer(path, model)
    imodel(x)
    imodel.get_submodule("2").looks = True
    with pytest.raises(ApotfxError, match="layer 2.layer: code around it reads its float weight"):
        imodel(x)
