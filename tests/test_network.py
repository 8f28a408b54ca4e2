import copy
import io
import pickle

import pytest
import torch
from torch import nn

from apotfx import ApotfxError, BitPolicy, Rule, calibrate, plan_of, quantize
from apotfx.graph.network import Network, graph_of, reached_state, record_of, trace

POLICY = BitPolicy.default(4)


class Net(nn.Module):
    """With a module and a parameter that forward never reads, and a weight that a function reads."""

    def __init__(self):
        super().__init__()
        self.first, self.act, self.last, self.unused = nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2), nn.Linear(3, 3)
        self.weight, self.spare = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return self.last(self.act(nn.functional.linear(self.act(self.first(x)), self.weight)))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def qmodel():
    return calibrate(quantize(Net(), POLICY), [torch.randn(16, 8)]).eval()


def test_a_network_holds_what_the_module_holds():
    model = Net()
    network = trace(model)
    assert isinstance(network, Network) and network.original is model
    assert network.state_dict().keys() == Net().state_dict().keys()
    network.first = nn.Linear(8, 8)
    assert model.first is network.first and not network.eval().original.training


def test_reached_state_is_what_the_graph_reads():
    assert reached_state(trace(Net())).keys() == {
        "first.weight", "first.bias", "weight", "last.weight", "last.bias",
    }  # fmt: skip
    class Whole(Net):
        def forward(self, x):
            return super().forward(x) if x.sum() < 1e9 else x
    assert reached_state(trace(Whole())).keys() == Net().state_dict().keys()


def through_file(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), through_file], ids=["deepcopy", "pickle", "file"])
def test_a_copy_is_a_network_of_its_own(qmodel, copied):
    x, other = torch.randn(5, 8), copied(qmodel)
    assert isinstance(other, Network) and torch.equal(other(x), qmodel(x))
    assert plan_of(other) == plan_of(qmodel) and record_of(other)["leaves"] == {}
    with torch.no_grad():
        other.weight.mul_(-1)  # of the functional layer
    assert not torch.equal(other(x), qmodel(x)) and other.get_submodule("linear").weight is other.weight


def test_activations_are_given_back_to_whoever_looks(qmodel):
    x, seen = torch.randn(16, 8), []
    expected, nodes = qmodel(x), len(qmodel.graph.nodes)
    assert not any("act" in str(node.target) for node in qmodel.graph.nodes)  # the layers took them over
    for name in ("last", "act"):
        module = qmodel.get_submodule(name)
        handles = [module.register_forward_pre_hook(lambda m, args: seen.append(args[0].min().item()))]
        handles.append(module.register_forward_hook(lambda m, args, y: seen.append(y.min().item())))
        assert torch.equal(qmodel(x), expected)
        for handle in handles:
            handle.remove()
    assert seen[0] == 0 and len(seen) == 2 + 2 * 2 and seen[2] < 0 and seen[3] == 0
    assert torch.equal(qmodel(x), expected) and len(seen) == 6 and len(qmodel.graph.nodes) == nodes


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base, self.seen = base, []

    def forward(self, x):
        self.seen.append(x.min().item())
        return self.base(x) + 0 * x.sum()


def test_a_module_around_a_layer_sees_what_the_layer_does(qmodel):
    x = torch.randn(16, 8)
    expected = qmodel(x)
    for network in (qmodel, copy.deepcopy(qmodel)):
        network.last = Adapted(qmodel.get_submodule("last"))
        assert torch.equal(network(x), expected) and network.last.seen == [0]


@pytest.mark.parametrize("name", ["graph", "meta", "code", "original"])
def test_names_that_torch_fx_needs_keep_the_model_whole(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    qmodel = calibrate(quantize(model, POLICY), [torch.randn(4, 8)])
    assert not isinstance(qmodel, Network) and not list(graph_of(qmodel).nodes)
    assert f"its {name} has a name that torch.fx keeps" in record_of(qmodel)["leaves"][""] and plan_of(qmodel).layers[0].quantized


@pytest.mark.parametrize("name", ["class", 'x"y'])
def test_names_that_make_no_code_are_refused(name):
    model = nn.Sequential()
    model.add_module(name, nn.Linear(8, 8))
    with pytest.raises(ApotfxError, match="torch.fx cannot write .* as code; rename it"):
        quantize(model, POLICY)


@pytest.mark.parametrize("look", ["hook", "hook on a layer", "module"])
def test_a_compiled_network_sees_who_looked_before_its_first_call(look):
    x, seen = torch.randn(16, 8), []
    network = calibrate(quantize(Net(), BitPolicy((Rule(),))), [x]).eval()
    expected = network(x)
    if look == "module":
        network.last = nn.Sequential(nn.Identity(), network.get_submodule("last"))
        network.last[0].register_forward_hook(lambda m, args, y: seen.append(y.min().item()))
    elif look == "hook":
        network.act.register_forward_hook(lambda m, args, y: seen.append(y.min().item()))
    else:
        network.last.register_forward_pre_hook(lambda m, args: seen.append(args[0].min().item()))
    torch._dynamo.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(network, backend="eager")(x), expected)
    assert set(seen) == {0.0}


def test_tensors_that_are_plain_attributes_are_read():
    class Shifted(Net):
        def __init__(self):
            super().__init__()
            self.shift = torch.full((8,), 0.5)

        def forward(self, x):
            return super().forward(x + self.shift)

    model, x = Shifted().eval(), torch.randn(16, 8)
    qmodel = calibrate(quantize(model, BitPolicy.default(8)), [x])
    for network in (qmodel, copy.deepcopy(qmodel)):
        assert (network(x) - model(x)).norm() < 0.1 * model(x).norm()
