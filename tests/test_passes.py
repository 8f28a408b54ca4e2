import copy
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn

from apotfx import (
    ApotfxError,
    BitPolicy,
    LevelSet,
    Rule,
    calibrate,
    plan,
    plan_of,
    quantize,
)
from apotfx.layers import QuantConv2d, QuantLayer, QuantLinear
from apotfx.graph.passes import swap_layers
from apotfx.graph.network import record_of, trace

POLICY = BitPolicy((Rule(),))


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.relu(self.bn1(self.conv1(x)))
        return self.relu(self.bn2(self.conv2(y)) + x)


class Net(nn.Module):
    """A small residual network; `share` calls one block twice."""

    def __init__(self, share=False):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.block1 = Block(4)
        self.block2 = self.block1 if share else Block(4)
        self.up = nn.ConvTranspose2d(4, 4, 2)
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(self.pool(self.up(self.block2(self.block1(self.stem(x))))).flatten(1))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images(dtype=torch.float32):
    return torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).to(dtype)


def snapshot(model):
    """What `quantize` must not change."""
    return (
        {name: tensor.clone() for name, tensor in model.state_dict().items()},
        {name: (type(module), module.training, sorted(vars(module))) for name, module in model.named_modules()},
        {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()},
    )


def check_same(before, after):
    assert before[1:] == after[1:] and before[0].keys() == after[0].keys()
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("do", [quantize, plan])
def test_the_model_stays_as_it_is(do, training):
    model = Net().train(training)
    model.block1.bn1.eval()
    before = snapshot(model)
    do(model, POLICY)
    check_same(before, snapshot(model))


@pytest.mark.parametrize("do", [quantize, plan])
def test_what_the_forward_leaves_on_the_model_is_not_left_by_tracing(do):
    class Marking(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls, self.features, self.layer = 0, None, nn.Linear(2, 2)

        def forward(self, x):
            self.calls += 1
            self.features = self.layer(x)
            return self.features

    model = Marking()
    do(model, POLICY)
    assert model.calls == 0 and model.features is None


def test_the_copy_shares_no_memory():
    model = Net()
    qmodel = quantize(model, POLICY)
    mine = {tensor.data_ptr() for tensor in model.state_dict().values()}
    assert not mine & {tensor.data_ptr() for tensor in qmodel.state_dict().values()}


def test_layers_are_swapped_as_planned():
    policy = BitPolicy((
        Rule(name="block1.*", scheme="uniform", weight_bits=3, activation_bits=5, granularity="channel",
            normalization="none"),
        Rule(type="Linear", weight_bits=32, clip_grad_factor=0.1),
        Rule(name="block2.conv1", activation_bits=32),
        Rule(name="block2.conv2", scheme="float"), Rule(position="first"),
    ))  # fmt: skip
    qmodel = quantize(Net(), policy)
    conv = qmodel.block1.conv1
    assert type(conv) is QuantConv2d and type(qmodel.fc) is QuantLinear
    assert conv.weight_quantizer.levels == LevelSet("uniform", 3) and conv.weight_quantizer.clip.shape == (4, 1, 1, 1)
    assert conv.weight_quantizer.normalization == "none" and conv.clip_grad_factor == 1
    assert conv.input_quantizer.levels == LevelSet("uniform", 5, False)
    assert qmodel.fc.weight_quantizer is None and qmodel.fc.clip_grad_factor == 0.1
    assert qmodel.fc.input_quantizer.levels == LevelSet("apot", 4)  # a transposed convolution comes before it
    assert qmodel.block2.conv1.input_quantizer is None
    assert qmodel.block2.conv1.weight_quantizer.levels == LevelSet("apot", 4)
    assert type(qmodel.block2.conv2) is nn.Conv2d and type(qmodel.up) is nn.ConvTranspose2d
    stem = qmodel.get_submodule("stem.0")
    assert stem.input_quantizer.levels == LevelSet("apot", 4) and stem.weight_quantizer.normalization == "rescale"


def test_names_and_values_are_kept():
    model = Net()
    qmodel = quantize(model, POLICY)
    expected, got = model.state_dict(), qmodel.state_dict()
    added = {key for key in got if ".weight_quantizer." in key or ".input_quantizer." in key}
    assert got.keys() - added == expected.keys()
    assert all(torch.equal(got[key], expected[key]) for key in expected)
    quantized = ("stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "up", "fc")
    assert added == {f"{name}.{which}_quantizer.clip" for name in quantized for which in ("weight", "input")}


def test_plan_is_what_quantize_does():
    qmodel = quantize(Net(), BitPolicy.default(3))
    assert plan(Net(), BitPolicy.default(3)) == record_of(qmodel)["plan"]
    rows = {row.facts.name: row for row in record_of(qmodel)["plan"].layers}
    assert list(rows) == ["stem.0", "block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2", "up", "fc"]
    assert [row.reason for row in rows.values()] == ["rule position=first", *["rule *"] * 5, "rule position=last"]
    assert {name: rows[name].facts.signed_input for name in rows} == {
        "stem.0": True, "block1.conv1": False, "block1.conv2": False, "block2.conv1": False,
        "block2.conv2": False,
        "up": False, "fc": True,
    }  # fmt: skip


def test_meta_survives_a_copy():
    qmodel = quantize(Net(), POLICY)
    copied = copy.deepcopy(qmodel)
    assert record_of(copied)["plan"] == record_of(qmodel)["plan"]
    assert type(copied.fc) is QuantLinear
    assert torch.equal(copied.eval()(images()), qmodel.eval()(images()))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_modes_are_kept(training):
    model = Net().train(training)
    model.block1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    qmodel = quantize(model, POLICY)
    for name, module in qmodel.named_modules():
        if not name.endswith("_quantizer"):
            assert module.training is modes[name]
    assert not qmodel.block1.conv1.input_quantizer.training


def test_frozen_parameters_stay_frozen():
    model = Net()
    model.stem.requires_grad_(False)
    qmodel = quantize(model, POLICY)
    frozen = {name for name, parameter in qmodel.named_parameters() if not parameter.requires_grad}
    clips = {f"stem.0.{which}_quantizer.clip" for which in ("weight", "input")}
    assert frozen == {f"stem.{name}" for name, _ in model.stem.named_parameters()} | clips
    with torch.no_grad():
        before = {name: parameter.clone() for name, parameter in qmodel.named_parameters() if name in frozen}
    calibrate(qmodel, [images()])
    assert any(not torch.equal(before[name], qmodel.get_parameter(name)) for name in clips)  # they still calibrate


def test_the_clip_of_the_networks_own_input_does_not_learn_unless_asked_to():
    qmodel = quantize(Net(), POLICY)
    frozen = {name: parameter for name, parameter in qmodel.named_parameters() if not parameter.requires_grad}
    assert list(frozen) == ["stem.0.input_quantizer.clip"]
    frozen["stem.0.input_quantizer.clip"].requires_grad_()
    qmodel(images()).sum().backward()
    assert frozen["stem.0.input_quantizer.clip"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_the_dtype_is_kept(dtype, training):
    qmodel = quantize(Net().to(dtype).train(training), POLICY)
    assert all(p.dtype == dtype for name, p in qmodel.named_parameters() if not name.endswith("clip"))
    assert qmodel(images(dtype)).dtype == dtype


@pytest.mark.parametrize("normalization", ["none", "rescale"])
def test_8_bits_keep_the_function_of_a_network(normalization):
    model = Net().eval()
    rule = Rule(scheme="uniform", weight_bits=8, activation_bits=8, normalization=normalization)
    qmodel = calibrate(quantize(model, BitPolicy((rule,))), [images()])
    with torch.no_grad():
        expected = model(images())
        assert (qmodel(images()) - expected).abs().max() < 0.02 * expected.abs().max()


def test_a_graph_module_is_quantized_too():
    model = Net()
    traced = fx.symbolic_trace(model)
    before = snapshot(traced)
    code = traced.code
    qmodel = quantize(traced, POLICY)
    check_same(before, snapshot(traced))
    assert traced.code == code and type(traced.fc) is nn.Linear
    expected = quantize(model, POLICY)
    assert record_of(qmodel)["plan"] == record_of(expected)["plan"]
    assert torch.equal(qmodel.eval()(images()), expected.eval()(images()))


def test_a_shared_module_is_one_layer_everywhere():
    qmodel = quantize(Net(share=True), POLICY)
    layers = [name for name, module in qmodel.named_modules() if isinstance(module, QuantLayer)]
    assert layers == ["stem.0", "block1.conv1", "block1.conv2", "up", "fc"]
    assert [node.target for node in qmodel.graph.nodes].count("block1.conv1") == 2
    qmodel(images()).sum().backward()
    assert all(parameter.grad is not None for parameter in qmodel.parameters() if parameter.requires_grad)


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3))
    model[2].weight = model[0].weight
    qmodel = quantize(model, POLICY)
    first, second = (module for module in qmodel.modules() if isinstance(module, QuantLayer))
    assert first.weight is second.weight and first is not second


def test_hooks_of_layers_are_kept():
    model, seen = Net(), []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(type(module)))
    quantize(model, POLICY, self_check=False)(images())
    assert seen == [QuantLinear]


# Mode.


class Dropping(nn.Module):
    """Uses its mode in every way that a trace would freeze."""

    def __init__(self):
        super().__init__()
        self.first, self.last, self.p = nn.Linear(8, 8), nn.Linear(8, 8), 0.5

    def forward(self, x):
        x = TF.dropout(self.first(x), self.p, self.training)
        x = TF.dropout(x, p=0.5 if self.training else 0.0)
        return self.last(TF.dropout(x, 0.0, training=True))


@pytest.mark.parametrize("quantized_in", [True, False], ids=["from-training", "from-evaluation"])
def test_arguments_that_depend_on_the_mode_follow_it(quantized_in):
    model = Dropping().train(quantized_in)
    qmodel = calibrate(quantize(model, POLICY), [], method="paper")
    assert sorted(name for name, _ in qmodel.named_children()) == ["by_mode", "by_mode_1", "first", "last"]
    assert not any("by_mode" in key for key in qmodel.state_dict())
    x = torch.ones(2, 8)
    assert torch.equal(qmodel(x), qmodel(x)) is not quantized_in
    for training in (False, True):
        run = copy.deepcopy(qmodel).train(training)
        assert torch.equal(run(x), run(x)) is not training
    # The same values are dropped as by the module.
    layered = nn.Sequential(model.first, nn.Dropout(0.5), nn.Dropout(0.5), nn.Dropout(0.0), model.last).train()
    expected = calibrate(quantize(layered, POLICY), [], method="paper").train()
    results = []
    for net in (qmodel.train(), expected):
        torch.manual_seed(2)
        results.append(net(x))
    assert torch.equal(*results)


def test_arguments_that_do_not_depend_on_the_mode_stay():
    assert not [node for node in trace(Net()).graph.nodes if "by_mode" in str(node.target)]


class TwoPaths(Dropping):
    """Takes other paths in training, as networks with auxiliary heads and detectors do."""

    def __init__(self, rectified_in: tuple[bool, ...]):
        super().__init__()
        self.rectified_in, self.auxiliary = rectified_in, nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(x)
        z = self.last(torch.relu(y) if self.training in self.rectified_in else y)
        return (z, self.auxiliary(y)) if self.training else z


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("rectified_in", [(True, False), (True,), (False,)])
def test_code_with_another_path_in_training_runs_as_written_there(rectified_in, training, inside):
    torch.manual_seed(0)
    model, x = TwoPaths(rectified_in), torch.randn(64, 8)
    model = (nn.Sequential(nn.Identity(), model) if inside else model).train(training)
    path = "1" if inside else ""
    qmodel = calibrate(quantize(model, BitPolicy.default(8, scheme="uniform")), [x])
    assert record_of(qmodel)["leaves"] == {} and qmodel.two_paths == (path,)
    layers = {p.facts.name.rpartition(".")[2]: p for p in plan_of(qmodel).layers}
    assert layers["last"].input.signed == (len(rectified_in) == 1)  # in either mode it may be negative
    assert layers["auxiliary"].reason == "float: called in training only"
    assert len(qmodel.absorbed) == (len(rectified_in) == 2)
    for network in (qmodel, copy.deepcopy(qmodel), pickle.loads(pickle.dumps(qmodel))):
        for mode in (True, False, True):
            expected, got = model.train(mode)(x), network.train(mode)(x)
            for a, b in zip(*((y if mode else [y]) for y in (expected, got)), strict=True):
                assert 0 < (b - a).norm() < 0.03 * a.norm()


def test_a_functional_layer_is_quantized_in_both_modes_even_where_training_takes_another_path():
    class Functional(TwoPaths):
        def forward(self, x):
            return super().forward(TF.linear(x, self.auxiliary.weight))

    model, x = Functional((True, False)), torch.randn(64, 8)
    qmodel = quantize(model, BitPolicy.default(8, scheme="uniform"))
    assert record_of(qmodel)["leaves"] == {"": "its forward takes another path in training than in evaluation"}


# Preconditions.


class Functional(nn.Module):
    def forward(self, x):
        return TF.linear(x, x)


class Subclass(nn.Linear):
    pass


class Wrapped(nn.parallel.DistributedDataParallel):
    """Without the process group that it would ask for."""

    def __init__(self, module):
        nn.Module.__init__(self)
        self.module = module


def scripted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # newer versions of torch call it deprecated
        return torch.jit.script(model)


@pytest.mark.parametrize("make, message", [
    (lambda: None, "model: expected a torch.nn.Module, got NoneType"),
    (lambda: Net, "model: expected a torch.nn.Module, got type"),
    (lambda: Wrapped(Net()), "model: is wrapped in Wrapped; quantize model.module, then wrap the result"),
    (lambda: nn.DataParallel(Net()), "model: is wrapped in DataParallel; quantize model.module, then wrap the result"),
    (lambda: scripted(Net()), "model: was compiled by torch.jit; quantize the module that it was made from"),
    (lambda: torch.compile(Net()),
     "model: was compiled; quantize model._orig_mod, then torch.compile the result"),
    (lambda: quantize(Net(), POLICY), "model: is already quantized; start from the float model"),
    (lambda: nn.Sequential(quantize(Net(), POLICY)), "model: is already quantized"),
    (lambda: nn.Sequential(nn.ReLU()),
     "model Sequential: has no layer that can be quantized .no conv or linear layer"),
    (lambda: nn.Linear(2, 2), "model: is a single Linear; wrap it in torch.nn.Sequential"),
    (lambda: Subclass(2, 2), "model: is a single Subclass; wrap it in torch.nn.Sequential"),
    (lambda: nn.Sequential(nn.LSTM(2, 2)),
     "has no layer that can be quantized .0: LSTM has no quantized version"),
    (Functional, "has no layer that can be quantized .linear: its weight.* computed from the network's input"),
    (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)),
     "model: 1.weight is lazy and has no shape yet; run the model on a batch first"),
    (nn.ReLU, "model ReLU: has no layer that can be quantized"),
], ids=[
    "none", "class", "ddp", "dp", "jit", "compiled", "quantized", "quantized-inside", "layerless",
    "layer", "subclass", "lstm", "computed", "lazy", "relu",
])  # fmt: skip
@pytest.mark.parametrize("do", [quantize, plan])
def test_what_cannot_be_quantized_is_refused(do, make, message):
    with pytest.raises(ApotfxError, match=message) as error:
        do(make(), POLICY)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("policy", [None, "policy.yaml", {"rules": []}, Rule()], ids=["none", "path", "dict", "rule"])
def test_what_is_no_policy_is_refused(policy):
    with pytest.raises(ApotfxError, match=f"policy: expected a BitPolicy, got {type(policy).__name__}"):
        quantize(Net(), policy)


def test_a_policy_that_does_not_fit_is_refused_and_the_model_stays():
    model = Net()
    before = snapshot(model)
    for policy, message in (
        (BitPolicy((Rule(), Rule(name="block9.*"))), r"policy: rule 2 \(rule name=block9.\*\) matches no layer"),
        (
            BitPolicy((Rule(scheme="pot", activation_bits=5),)),
            r"layer block1.conv1 \(rule \*\): pot at 5 bits unsigned",
        ),
    ):
        with pytest.raises(ApotfxError, match=message):
            quantize(model, policy)
    check_same(before, snapshot(model))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 8, 3, groups=2)

    def forward(self, x):
        return self.conv(torch.relu(self.stem(x)))


# 4-bit weights reach 10 in apot and 7 in uniform, 4-bit unsigned inputs 48 and 15; the second layer adds 4 * 9 of them.
@pytest.mark.parametrize("scheme, bits", [("apot", 16), ("uniform", 13)])
@pytest.mark.parametrize("do", [plan, quantize])
def test_a_cap_on_accumulators_is_kept_by_every_layer_or_names_one(do, scheme, bits):
    bound = {"apot": 36 * 10 * 48, "uniform": 36 * 7 * 15}[scheme]
    assert 2 ** (bits - 2) <= bound < 2 ** (bits - 1)
    do(Grouped(), BitPolicy((Rule(scheme=scheme, max_accumulator_bits=bits),)))
    rules = (
        Rule(name="stem", max_accumulator_bits=64),
        Rule(name="conv", scheme=scheme, max_accumulator_bits=bits - 1),
    )
    message = (
        rf"layer conv \(rule name=conv\): sums of 36 products of 4-bit weights and 4-bit inputs \({scheme}\) can need "
        f"{bits} bits, max_accumulator_bits allows {bits - 1}; use fewer weight_bits or activation_bits"
    )
    with pytest.raises(ApotfxError, match=message):
        do(Grouped(), BitPolicy(rules))
    do(Grouped(), BitPolicy((rules[0], Rule(scheme=scheme))))


def test_an_all_float_policy_changes_nothing():
    model = Net().eval()
    qmodel = quantize(model, BitPolicy.default(32))
    assert not any(isinstance(module, QuantLayer) for module in qmodel.modules())
    assert torch.equal(qmodel(images()), model(images()))


def test_swapping_reaches_every_name_of_a_module():
    graph_module, layer = trace(Net(share=True)), nn.Linear(2, 2)
    shared = graph_module.get_submodule("block1.conv1")
    graph_module.add_module("also", nn.ModuleDict({"deep": shared}))
    swap_layers(graph_module, {"block1.conv1": layer})
    assert graph_module.block1.conv1 is layer is graph_module.also.deep and shared not in set(graph_module.modules())


def test_swapping_what_is_not_there_is_refused():
    with pytest.raises(AttributeError, match="extra"):
        swap_layers(trace(Net()), {"stem.1.extra": nn.Linear(2, 2)})


# With the rest of torch.

# torch 2.6 instantiates the class of an autograd function while it compiles one, which it then warns of.
may_warn = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@may_warn
@pytest.mark.parametrize("granularity", ["tensor", "channel"])
def test_compiled_evaluation_is_equal(granularity):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(64, 3))
    qmodel = calibrate(quantize(model, BitPolicy((Rule(granularity=granularity),))), [images()]).eval()
    compiled = torch.compile(qmodel, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(images()), qmodel(images()))


@may_warn
def test_compiled_training_computes_the_same_gradients():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    qmodel = calibrate(quantize(model, POLICY), [images()])
    grads = []
    for run in (qmodel, torch.compile(qmodel, backend="aot_eager")):
        qmodel.zero_grad()
        run(images()).square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in qmodel.parameters() if parameter.requires_grad])
    for expected, got in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_the_state_round_trips_between_two_quantized_models():
    source = calibrate(quantize(Net(), POLICY), [images()]).eval()
    torch.manual_seed(1)
    target = quantize(Net(), POLICY).eval()
    assert not torch.equal(target(images()), source(images()))
    assert target.load_state_dict(source.state_dict()) == ([], [])
    assert torch.equal(target(images()), source(images()))
