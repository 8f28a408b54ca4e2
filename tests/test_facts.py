import math
import operator

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.nn.utils import parametrizations, prune

from apotfx.graph.facts import LayerFacts, analyze
from apotfx.graph.passes import Prepared
from apotfx.graph.network import graph_of


class Net(nn.Module):
    """`between` makes the input of `last` from (the net, a signed tensor, a non-negative tensor)."""

    def __init__(self, between=None, **modules):
        super().__init__()
        self.first, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)
        self.between = between
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        signed = self.first(x)
        return self.last(self.between(self, signed, torch.relu(signed)))


def facts_of(model) -> dict[str, LayerFacts]:
    return {layer.name: layer for layer in analyze(model, fx.symbolic_trace(model).graph)}


def is_signed(between, **modules):
    return facts_of(Net(between, **modules))["last"].signed_input


def with_module(module, operand):
    return lambda net, signed, positive: net.module(signed if operand == "signed" else positive)


MAKE_NON_NEGATIVE = [
    nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.Sigmoid(), nn.Hardsigmoid(), nn.Softmax(1),
    nn.Softplus(), nn.Hardtanh(0, 3),
]  # fmt: skip
KEEP_SIGN = [
    nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1), nn.AdaptiveMaxPool2d(1), nn.Dropout(),
    nn.Identity(), nn.Flatten(2), nn.ChannelShuffle(2), nn.ZeroPad2d(1),
    nn.Sequential(nn.Dropout2d(), nn.MaxPool2d(2)),
]  # fmt: skip
MAY_BE_NEGATIVE = [
    nn.GELU(), nn.SiLU(), nn.Hardswish(), nn.Tanh(), nn.LeakyReLU(), nn.ELU(), nn.Hardtanh(),
    nn.Hardtanh(-2, 5), nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1),
    nn.LogSoftmax(1),
]  # fmt: skip


@pytest.mark.parametrize("module", MAKE_NON_NEGATIVE, ids=repr)
def test_modules_that_are_never_negative(module):
    assert not is_signed(with_module(module, "signed"), module=module)


@pytest.mark.parametrize("module", KEEP_SIGN, ids=repr)
def test_modules_that_keep_the_sign(module):
    assert not is_signed(with_module(module, "positive"), module=module)
    assert is_signed(with_module(module, "signed"), module=module)


@pytest.mark.parametrize("module", MAY_BE_NEGATIVE, ids=repr)
def test_modules_that_may_be_negative(module):
    assert is_signed(with_module(module, "signed"), module=module)


NORMS = [nn.LayerNorm(4), nn.BatchNorm2d(4), nn.GroupNorm(2, 4), nn.Conv2d(4, 4, 1), nn.LogSoftmax(1)]


@pytest.mark.parametrize("module", NORMS, ids=repr)
def test_modules_that_may_be_negative_whatever_their_input_is(module):
    assert is_signed(with_module(module, "positive"), module=module)


NON_NEGATIVE = {
    "TF.relu": lambda s, p: TF.relu(s),
    "x.relu()": lambda s, p: s.relu(),
    "TF.relu6": lambda s, p: TF.relu6(s),
    "relu_": lambda s, p: s.relu_(),
    "torch.sigmoid": lambda s, p: torch.sigmoid(s),
    "x.sigmoid()": lambda s, p: s.sigmoid(),
    "TF.softmax": lambda s, p: TF.softmax(s, 1),
    "hardsigmoid": lambda s, p: TF.hardsigmoid(s),
    "abs": lambda s, p: abs(s),
    "square": lambda s, p: s.square(),
    "exp": lambda s, p: s.exp(),
    "softplus": lambda s, p: TF.softplus(s),
    "clamp": lambda s, p: torch.clamp(s, 0, 1),
    "clamp-min": lambda s, p: s.clamp(min=0),
    "clamp_min": lambda s, p: s.clamp_min(0.5),
    "clamp-max": lambda s, p: p.clamp(max=6),
    "max_pool": lambda s, p: TF.max_pool2d(p, 2),
    "avg_pool": lambda s, p: TF.avg_pool2d(p, 2),
    "adaptive_avg_pool": lambda s, p: TF.adaptive_avg_pool2d(p, 1),
    "dropout": lambda s, p: TF.dropout(p, 0.2),
    "flatten": lambda s, p: torch.flatten(p, 1),
    "x.flatten()": lambda s, p: p.flatten(1),
    "view": lambda s, p: p.view(1, 4, -1, 1),
    "permute": lambda s, p: p.permute(0, 1, 3, 2),
    "mean": lambda s, p: p.mean((2, 3), keepdim=True),
    "getitem": lambda s, p: p[:, :4],
    "chunk": lambda s, p: p.chunk(2, 2)[0],
    "contiguous": lambda s, p: p.contiguous(),
    "p + p": lambda s, p: p + p,
    "p + 1": lambda s, p: p + 1,
    "1 + p": lambda s, p: 1 + p,
    "p * 2": lambda s, p: p * 2,
    "p * p": lambda s, p: p * p,
    "p / 2": lambda s, p: p / 2,
    "torch.add": lambda s, p: torch.add(p, p),
    "add-alpha": lambda s, p: torch.add(p, p, alpha=2),
    "add-named": lambda s, p: torch.add(input=p, other=p),
    "add_": lambda s, p: p.add_(p),
    "cat": lambda s, p: torch.cat([p, p, p * 2], 1),
    "cat-named": lambda s, p: torch.cat(tensors=[p, p], dim=-1),
    "cat-negative-dim": lambda s, p: torch.cat((p, p), -1),
    "stack": lambda s, p: torch.stack([p, p]),
    "matmul": lambda s, p: p @ p,
    "maximum": lambda s, p: torch.maximum(p, p),
}
SIGNED = {
    "nothing": lambda s, p: s,
    "gelu": lambda s, p: TF.gelu(s),
    "tanh": lambda s, p: s.tanh(),
    "neg": lambda s, p: -p,
    "layer_norm": lambda s, p: TF.layer_norm(p, (4,)),
    "leaky_relu": lambda s, p: TF.leaky_relu(s),
    "log": lambda s, p: p.log(),
    "p + s": lambda s, p: p + s,
    "s + p": lambda s, p: s + p,
    "p - p": lambda s, p: p - p,
    "p - 1": lambda s, p: p - 1,
    "p + -1": lambda s, p: p + -1,
    "p * -2": lambda s, p: p * -2,
    "p * s": lambda s, p: p * s,
    "p / -3": lambda s, p: p / -3,
    "add-named": lambda s, p: torch.add(p, other=s),
    "add-both-named": lambda s, p: torch.add(input=p, other=s),
    "add-alpha": lambda s, p: torch.add(p, p, alpha=-1),
    "add_": lambda s, p: p.add_(s),
    "cat": lambda s, p: torch.cat([p, s, p], 1),
    "cat-named": lambda s, p: torch.cat(tensors=[p, s]),
    "stack": lambda s, p: torch.stack([s, p]),
    "matmul": lambda s, p: p @ s,
    "bmm-named": lambda s, p: torch.bmm(p, mat2=s),
    "clamp": lambda s, p: s.clamp(-1, 1),
    "clamp-max": lambda s, p: s.clamp(max=6),
    "clamp-below-0": lambda s, p: p.clamp(max=-1),
    "clamp_min": lambda s, p: s.clamp_min(-0.5),
    "flatten": lambda s, p: torch.flatten(s, 1),
    "max_pool": lambda s, p: TF.max_pool2d(s, 2),
    "user-function": lambda s, p: user_function(p),
    "sin": lambda s, p: p.sin(),
    "cumsum-of-signed": lambda s, p: s.cumsum(1),
    "interpolate": lambda s, p: TF.interpolate(p, scale_factor=2, mode="bicubic"),
}


@fx.wrap
def user_function(x):
    return x - 1


def user_relu(x):
    return x - 1


user_relu.__name__ = user_relu.__qualname__ = "relu"


@pytest.mark.parametrize("between", NON_NEGATIVE.values(), ids=NON_NEGATIVE)
def test_functions_whose_value_is_never_negative(between):
    assert not is_signed(lambda net, signed, positive: between(signed, positive))


@pytest.mark.parametrize("between", SIGNED.values(), ids=SIGNED)
def test_functions_whose_value_may_be_negative(between):
    assert is_signed(lambda net, signed, positive: between(signed, positive))


def test_only_functions_of_torch_are_known_by_name():
    graph = fx.Graph()
    y = graph.call_function(user_relu, (graph.placeholder("x"),))
    graph.output(graph.call_module("layer", (y,)))
    root = nn.ModuleDict({"layer": nn.Linear(2, 2)})
    assert analyze(root, graph)[0].signed_input


# What is written in place, the graph computes as a new value; see test_functional.


@pytest.mark.parametrize("change, signed", [
    (lambda p, s: p.add_(s), True), (lambda p, s: p.sub_(1), True), (lambda p, s: p.mul_(-1), True),
    (lambda p, s: p.copy_(s), True), (lambda p, s: p.neg_(), True), (lambda p, s: p.clamp_(-3, -1), True),
    (lambda p, s: operator.iadd(p, -1), True), (lambda p, s: operator.itruediv(p, -2), True),
    (lambda p, s: operator.setitem(p, 0, s[0]), True), (lambda p, s: p[:, :2].neg_(), True),
    (lambda p, s: p.add_(1), False), (lambda p, s: p.add_(p).mul_(2), False), (lambda p, s: operator.imul(p, 2), False),
    (lambda p, s: operator.setitem(p, 0, 1.0), False), (lambda p, s: p[:, :2].add_(1), False),
    (lambda p, s: p.flatten(1).sqrt_(), False), (lambda p, s: operator.setitem(p, p > 6, 6.0), False),
], ids=["add_", "sub_", "mul_", "copy_", "neg_", "clamp_", "iadd", "itruediv", "setitem", "view", "add_-1", "twice", "imul",
        "setitem-1", "view-1", "flatten", "mask"])  # fmt: skip
def test_a_change_in_place_is_seen_by_later_readers(change, signed):
    def between(net, signed, positive):
        change(positive, signed)
        return positive

    assert planned_facts(Net(between))["last"].signed_input is signed


@pytest.mark.parametrize("change", [
    lambda s: s.relu_(), lambda s: s.masked_fill_(s < 0, 0), lambda s: operator.setitem(s, s < 0, 0.0),
], ids=["relu_", "masked_fill_", "setitem"])  # fmt: skip
def test_a_tensor_that_is_overwritten_where_it_is_negative_is_not_any_more(change):
    def between(net, signed, positive):
        change(signed)
        return signed

    assert not planned_facts(Net(between))["last"].signed_input


@pytest.mark.parametrize("between, low, high", [
    (lambda net, s, p: s.clamp(-0.5, 2), -0.5, 2), (lambda net, s, p: TF.relu6(s) / 2 - 1, -1, 2),
    (lambda net, s, p: TF.gelu(s), -0.17004, math.inf), (lambda net, s, p: torch.cat([s.sigmoid(), s.tanh()]), -1, 1),
    (lambda net, s, p: s, -math.inf, math.inf), (lambda net, s, p: -p, -math.inf, 0),
    (lambda net, s, p: torch.fft.fft(s).abs(), 0, math.inf), (lambda net, s, p: torch.fft.fft(p).real, -math.inf, math.inf),
], ids=["clamp", "relu6", "gelu", "cat", "layer", "neg", "complex", "real"])  # fmt: skip
def test_the_range_of_an_input(between, low, high):
    facts = planned_facts(Net(between))["last"]
    assert facts.input_range == (pytest.approx(low, abs=1e-4), pytest.approx(high, abs=1e-4))
    assert facts.signed_input is (low < 0)


def test_the_range_of_the_inputs_of_all_calls():
    class Thrice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            y = self.layer(x.sigmoid())
            return self.layer(TF.relu6(y) + 2) + self.layer(y.clamp(-3, 1))

    assert planned_facts(Thrice())["layer"].input_range == (-3, 8)


def test_what_a_hook_or_a_leaf_hides_has_no_range():
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(4, 4)

        def forward(self, x):
            return self.inner(x.relu()) if x.sum() > 0 else x

    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), Whole(), nn.ReLU(), nn.Linear(4, 4))
    model[4].register_forward_pre_hook(lambda module, args: (-args[0],))
    facts = planned_facts(model)
    for name in ("2.inner", "4"):
        assert facts[name].signed_input and facts[name].input_range == (-math.inf, math.inf)


def test_the_input_of_the_model_is_signed():
    assert facts_of(nn.Sequential(nn.Linear(2, 2)))["0"].signed_input


def test_the_input_passed_by_name_has_its_sign():
    class Named(Net):
        def forward(self, x):
            return self.last(input=torch.relu(self.first(input=x)))

    facts = facts_of(Named())
    assert facts["first"].signed_input and not facts["last"].signed_input


class Twice(nn.Module):
    def __init__(self, after):
        super().__init__()
        self.layer, self.bn, self.after = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), after

    def forward(self, x):
        return self.after(self, self.layer(torch.relu(x)))


@pytest.mark.parametrize("after, signed", [
    (lambda net, y: net.layer(torch.relu(y)), False), (lambda net, y: net.layer(y), True),
], ids=["both-non-negative", "one-signed"])  # fmt: skip
def test_a_module_called_twice_is_one_layer(after, signed):
    facts = facts_of(Twice(after))
    assert list(facts) == ["layer"]
    assert facts["layer"].signed_input is signed
    assert facts["layer"].is_first and facts["layer"].is_last


@pytest.mark.parametrize("after, expected", [
    (lambda net, y: net.bn(net.layer(net.bn(y))), True), (lambda net, y: net.layer(net.bn(y)), False),
    (lambda net, y: net.bn(y), True), (lambda net, y: net.bn(y) + y, False),
    (lambda net, y: net.bn(torch.relu(y)), False),
    (lambda net, y: y, False),
], ids=["both", "one-of-two", "once", "other-consumer", "not-directly", "none"])  # fmt: skip
def test_batch_norm_as_the_only_consumer(after, expected):
    assert facts_of(Twice(after))["layer"].feeds_batch_norm is expected


@pytest.mark.parametrize("between, expected", [
    (lambda x: x.float(), True), (lambda x: x.to(torch.float32).contiguous(), True), (lambda x: x.abs().float(), False),
    (lambda x: (y := x.float()) * y.mean(), False),
], ids=["float", "to", "abs", "two consumers"])  # fmt: skip
def test_a_batch_norm_behind_another_type(between, expected):
    class Between(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm = nn.Linear(2, 2), nn.BatchNorm1d(2)

        def forward(self, x):
            return self.norm(between(self.layer(x)))

    assert facts_of(Between())["layer"].feeds_batch_norm is expected


@pytest.mark.parametrize("batch_norm, expected", [
    (nn.BatchNorm1d(2), True), (nn.SyncBatchNorm(2), True), (nn.LayerNorm(2), False),
    (nn.InstanceNorm1d(2), False),
], ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "")  # fmt: skip
def test_which_norms_are_batch_norms(batch_norm, expected):
    assert facts_of(nn.Sequential(nn.Linear(2, 2), batch_norm))["0"].feeds_batch_norm is expected


def ends(model):
    facts = facts_of(model).values()
    return {f.name for f in facts if f.is_first}, {f.name for f in facts if f.is_last}


def test_first_and_last_of_a_chain():
    chain = nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.Linear(4, 4), nn.Softmax(1))
    assert ends(chain) == ({"1"}, {"4"})


def test_a_single_layer_is_first_and_last():
    assert ends(nn.Sequential(nn.Linear(2, 2))) == ({"0"}, {"0"})


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        for name in ("stem", "left", "right", "shortcut", "head_a", "head_b", "middle"):
            self.add_module(name, nn.Linear(2, 2))

    def forward(self, x, y):
        stem = self.stem(x)
        merged = self.left(stem) + self.right(y) + self.shortcut(x)
        return self.head_a(merged), torch.relu(self.head_b(self.middle(merged)))


def test_first_and_last_of_branches():
    assert ends(Branches()) == ({"stem", "right", "shortcut"}, {"head_a", "head_b"})


def test_layers_come_in_order_of_execution():
    assert list(facts_of(Branches())) == ["stem", "left", "right", "shortcut", "head_a", "middle", "head_b"]


# As `plan` has it: functional calls are layers, and what cannot be traced is a leaf.


def planned_facts(model) -> dict[str, LayerFacts]:
    prepared = Prepared(model)
    return {layer.name: layer for layer in analyze(prepared.copied, graph_of(prepared.model), prepared.leaves)}


class Functional(nn.Module):
    def __init__(self, function, *shape, **settings):
        super().__init__()
        self.weight, self.function, self.settings = nn.Parameter(torch.randn(shape)), function, settings

    def forward(self, x):
        return self.function(x, self.weight, **self.settings)


@pytest.mark.parametrize("function, name, kind, shape", [
    (TF.linear, "linear", "Linear", (2, 4)), (torch.matmul, "linear", "Linear", (4, 2)),
    (TF.conv1d, "conv1d", "Conv1d", (2, 4, 3)), (TF.conv2d, "conv2d", "Conv2d", (2, 4, 3, 1)),
    (torch.conv2d, "conv2d", "Conv2d", (2, 4, 3, 1)), (TF.conv3d, "conv3d", "Conv3d", (2, 4, 3, 1, 2)),
    (TF.conv_transpose1d, "conv_transpose1d", "ConvTranspose1d", (4, 2, 3)),
    (TF.conv_transpose2d, "conv_transpose2d", "ConvTranspose2d", (4, 2, 3, 1)),
    (TF.conv_transpose3d, "conv_transpose3d", "ConvTranspose3d", (4, 2, 3, 1, 2)),
], ids=["linear", "matmul", "conv1d", "conv2d", "torch.conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
        "conv_transpose3d"])  # fmt: skip
def test_functional_layers_are_layers(function, name, kind, shape):
    facts = planned_facts(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), Functional(function, *shape)))
    assert list(facts) == ["0", f"2.{name}"] and not facts["0"].is_last
    layer = facts[f"2.{name}"]
    assert (layer.type, layer.kind, layer.kernel_size) == (f"F.{name}", kind, shape[2:] if kind != "Linear" else ())
    assert layer.is_last and not layer.signed_input and layer.obstacle is None and not layer.depthwise


def test_a_functional_call_and_a_module_of_the_same_name_are_two_layers():
    class Both(Functional):
        def __init__(self):
            super().__init__(TF.linear, 2, 2)
            self.linear = nn.Linear(2, 2)

        def forward(self, x):
            return self.linear(super().forward(x))

    facts = planned_facts(Both()).values()
    assert [(f.name, f.type, f.obstacle) for f in facts] == [("linear_1", "F.linear", None), ("linear", "Linear", None)]


MODULES = {
    "Conv1d": (lambda: nn.Conv1d(4, 8, 3), "Conv1d", (3,), False),
    "Conv2d": (lambda: nn.Conv2d(4, 8, (3, 1), groups=2), "Conv2d", (3, 1), False),
    "Conv3d": (lambda: nn.Conv3d(4, 8, 2), "Conv3d", (2, 2, 2), False),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, groups=4), "Conv2d", (3, 3), True),
    "one-channel": (lambda: nn.Conv2d(1, 8, 3), "Conv2d", (3, 3), False),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 8, 3), "ConvTranspose1d", (3,), False),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 8, (1, 3)), "ConvTranspose2d", (1, 3), False),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(4, 8, 2), "ConvTranspose3d", (2, 2, 2), False),
    "depthwise-transposed": (lambda: nn.ConvTranspose1d(4, 8, 3, groups=4), "ConvTranspose1d", (3,), True),
    "Linear": (lambda: nn.Linear(4, 8), "Linear", (), False),
    "functional-depthwise": (lambda: Functional(TF.conv1d, 4, 1, 3, groups=4), "Conv1d", (3,), True),
    "functional-transposed": (
        lambda: Functional(TF.conv_transpose1d, 4, 1, 3, groups=4),
        "ConvTranspose1d",
        (3,),
        True,
    ),
    "parametrized": (lambda: parametrizations.weight_norm(nn.Conv2d(4, 8, 3)), "Conv2d", (3, 3), False),
    "subclass": (lambda: MyLinear(4, 8), "Linear", (), False),
}


@pytest.mark.parametrize("make, kind, kernel, depthwise", MODULES.values(), ids=MODULES)
def test_kind_kernel_and_depthwise(make, kind, kernel, depthwise):
    (layer,) = planned_facts(nn.Sequential(make())).values()
    assert (layer.kind, layer.kernel_size, layer.depthwise) == (kind, kernel, depthwise)
    assert layer.obstacle is None and layer.is_first and layer.is_last


SIGN_REASONS = {
    "the network's input x can be negative": lambda x, y, layer: x.flatten(1),
    "layer (Linear) can be negative": lambda x, y, layer: layer(x),
    "relu (relu) is never negative": lambda x, y, layer: torch.relu(layer(x)).mean(1, keepdim=True).expand(-1, 4),
    "sub (sub) can be negative, down to -1": lambda x, y, layer: torch.relu(layer(x)) - 1,
    "gelu (gelu) can be negative, down to -0.17": lambda x, y, layer: TF.gelu(layer(x)).flatten(1),
    "interpolate (interpolate) can be negative": lambda x, y, layer: TF.interpolate(
        torch.relu(layer(x))[:, None, None], (1, 4), mode="bicubic")[:, 0, 0],
    "add (add) can be negative": lambda x, y, layer: torch.relu(layer(x)) + y,
    "add (add) is never negative": lambda x, y, layer: torch.relu(layer(x)) + torch.exp(y),
    "the network's input y can be negative": lambda x, y, layer: TF.dropout(y, 0.1, False),
}


@pytest.mark.parametrize("reason", SIGN_REASONS)
def test_the_reason_of_a_sign(reason):
    class Signs(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.last(SIGN_REASONS[reason](x, y, self.layer))

    layer = planned_facts(Signs())["last"]
    assert layer.sign_reason == reason and layer.signed_input is ("can be" in reason)


def test_the_reason_of_a_position():
    reasons = {name: facts.position_reason for name, facts in planned_facts(Branches()).items()}
    assert reasons == {
        "stem": "no layer before it", "left": "after stem, before head_a", "right": "no layer before it",
        "shortcut": "no layer before it", "head_a": "no layer after it", "middle": "after left, before head_b",
        "head_b": "no layer after it",
    }  # fmt: skip
    (single,) = planned_facts(nn.Sequential(nn.Linear(2, 2))).values()
    assert single.position_reason == "no layer before it, no layer after it"


def test_first_and_last_where_inputs_and_outputs_are_no_single_tensor():
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("image", "text", "trunk", "boxes", "scores", "unused"):
                self.add_module(name, nn.Linear(2, 2))

        def forward(self, batch, extra=None):
            trunk = self.trunk(self.image(batch["image"]) + self.text(batch["text"]))
            return {"boxes": [self.boxes(trunk)], "scores": (self.scores(trunk), extra), "trunk": trunk}

    facts = planned_facts(Heads())
    assert {f.name for f in facts.values() if f.is_first} == {"image", "text"}
    assert {f.name for f in facts.values() if f.is_last} == {"boxes", "scores"}
    assert facts["unused"].obstacle == "never called by the model's forward"


# What cannot be quantized.


class MyLinear(nn.Linear):
    pass


class Doubled(nn.Linear):
    def forward(self, input):
        return super().forward(input) * 2


HOOK = (
    "its weight is not a parameter of its own, but set by a hook; use torch.nn.utils.parametrizations instead of "
    "torch.nn.utils.weight_norm"
)


@pytest.mark.parametrize("layer, obstacle", [
    (prune.random_unstructured(nn.Linear(2, 2), "weight", 0.5), HOOK),
    (nn.utils.spectral_norm(nn.Linear(2, 2)), HOOK),
    (nn.LSTM(2, 2), "LSTM has no quantized version"), (nn.GRUCell(2, 2), "GRUCell has no quantized version"),
    (nn.Bilinear(2, 2, 2), "Bilinear has no quantized version"),
    (nn.Linear(2, 2, dtype=torch.complex64), "its weight is complex64, not a floating-point type"),
    (nn.ConvTranspose2d(2, 2, 1), None), (nn.Linear(2, 2), None), (parametrizations.orthogonal(nn.Linear(2, 2)), None),
], ids=["pruned", "spectral_norm", "lstm", "gru-cell", "bilinear", "complex", "transposed", "linear", "parametrized"])  # fmt: skip
def test_obstacles_of_modules(layer, obstacle):
    class Calling(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = layer

        def forward(self, x, y):
            return self.layer(x, y) if isinstance(layer, nn.Bilinear) else self.layer(x)

    assert facts_of(Calling())["layer"].obstacle == obstacle


class Leaves(fx.Tracer):
    def is_leaf_module(self, module, name):
        return isinstance(module, nn.Linear) or super().is_leaf_module(module, name)


def test_a_subclass_with_a_forward_of_its_own_that_is_kept_whole_is_an_obstacle():
    model = nn.Sequential(Doubled(2, 2))
    (facts,) = analyze(model, Leaves().trace(model))
    assert facts.type == "Doubled" and facts.obstacle == "Doubled computes something of its own"


def test_a_subclass_is_a_layer_and_one_with_a_forward_of_its_own_is_traced_through():
    facts = planned_facts(nn.Sequential(MyLinear(2, 2), Doubled(2, 2)))
    assert list(facts) == ["0", "1.linear"]
    assert (facts["0"].type, facts["0"].kind, facts["0"].obstacle) == ("MyLinear", "Linear", None)
    assert (facts["1.linear"].type, facts["1.linear"].kind, facts["1.linear"].obstacle) == ("F.linear", "Linear", None)


UNLISTED = [
    lambda x, m: x @ x.mT, lambda x, m: torch.bmm(x, x.mT), lambda x, m: x * m.p[0, 0],
    lambda x, m: TF.layer_norm(x, (4,), m.p[0, 0]), lambda x, m: TF.scaled_dot_product_attention(x, x, x),
    lambda x, m: TF.scaled_dot_product_attention(x, x, x, m.p), lambda x, m: torch.baddbmm(m.p, x, x),
    lambda x, m: (x * m.q).sum((-3, -2)), lambda x, m: (x * 2).sum(-1), lambda x, m: (x * x).sum(-1), lambda x, m: x * m.p,
    lambda x, m: TF.scaled_dot_product_attention(x, x, x, dropout_p=0.1 if m.training else 0.0),
    lambda x, m: (x * m.s).sum(-1),
]  # fmt: skip
REMAINING = {
    "inner": (lambda x, m: torch.inner(x, m.p), "inner", "torch.inner"),
    "dot": (lambda x, m: torch.dot(x[0, 0], m.p[0, 0]), "dot", "torch.dot"),
    "outer": (lambda x, m: torch.outer(x[0, 0], m.p[0, 0]), "outer", "torch.outer"),
    "kron": (lambda x, m: torch.kron(x, m.p), "kron", "torch.kron"),
    "multi_dot": (lambda x, m: torch.linalg.multi_dot([x[0], m.p[0], m.p[1]]), "linalg_multi_dot", "torch.linalg_multi_dot"),
    "chain_matmul": (lambda x, m: torch.chain_matmul(x[0], m.p[0]), "chain_matmul", "torch.chain_matmul"),
    "vecdot": (lambda x, m: torch.linalg.vecdot(x, m.p), "linalg_vecdot", "torch.linalg_vecdot"),
    "addmv": (lambda x, m: torch.addmv(m.p[0, 0], x[0], m.p[0, 1]), "addmv", "torch.addmv"),
    "baddbmm": (lambda x, m: torch.baddbmm(x, x, m.p), "baddbmm", "torch.baddbmm"),
    "conv_tbc": (lambda x, m: torch.conv_tbc(x, m.p, m.p[0, 0]), "conv_tbc", "torch.conv_tbc"),
    "learned-queries": (lambda x, m: TF.scaled_dot_product_attention(m.p, x, x), "scaled_dot_product_attention",
                        "torch.scaled_dot_product_attention"),
    "mul-sum": (lambda x, m: (x[..., None, :] * m.p[0]).sum(-1), "mul", "torch.mul"),
    "mul-sum-of-dim": (lambda x, m: torch.mul(m.p[0].t(), x.unsqueeze(-1)).sum(dim=2), "mul", "torch.mul"),
    "mul-sum-of-all": (lambda x, m: torch.sum(x * m.p), "mul", "torch.mul"),
    "mul-of-computed": (lambda x, m: (x[..., None, :] * m.p[0].abs()).sum(-1), "mul", "torch.mul"),
    "weight-of-input": (lambda x, m: TF.linear(x, x[0]), "linear", "F.linear"),
    "weight-times-input": (lambda x, m: TF.linear(x, m.p[0] * x.mean()), "linear", "F.linear"),
    "bmm": (lambda x, m: torch.bmm(x, m.p), "bmm", "torch.bmm"),
    "matmul-of-batches": (lambda x, m: x @ m.p, "matmul", "torch.matmul"),
    "einsum": (lambda x, m: torch.einsum("nij,njk->nik", x, m.p), "einsum", "torch.einsum"),
    "tensordot": (lambda x, m: torch.tensordot(x, m.p, 1), "tensordot", "torch.tensordot"),
    "bilinear": (lambda x, m: TF.bilinear(x, x, m.p), "bilinear", "torch.bilinear"),
    "mv": (lambda x, m: x[0].mv(m.p[0, 0]), "mv", "torch.mv"),
    "vector": (lambda x, m: TF.linear(x, m.p[0, 0]), "linear", "F.linear"),
    "computed-batches": (lambda x, m: x @ m.p.abs(), "matmul", "torch.matmul"),
    "computed-einsum": (lambda x, m: torch.einsum("nij,njk->nik", x, 2 * m.p), "einsum", "torch.einsum"),
}


class Product(nn.Module):
    def __init__(self, compute):
        super().__init__()
        self.layer, self.p, self.compute = nn.Linear(4, 4), nn.Parameter(torch.randn(4, 4, 4)), compute
        self.q, self.s = nn.Parameter(torch.ones(4)), nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.compute(self.layer(x), self)


@pytest.mark.parametrize("compute, name, kind", REMAINING.values(), ids=REMAINING)
def test_products_with_weights_that_stay_float_are_listed_with_a_reason(compute, name, kind):
    facts = planned_facts(Product(compute))
    assert list(facts) == ["layer", name]
    assert facts[name].type == kind and facts[name].kind == "" and facts[name].is_last
    computed = kind == "F.linear"
    expected = "computed from the network's input" if computed else "a product with parameters that is no linear layer"
    assert expected in facts[name].obstacle


@pytest.mark.parametrize("compute", UNLISTED, ids=[
    "x-xT", "bmm", "scale", "layer_norm", "attention", "mask", "bias", "scale-sum", "number-sum", "square-sum", "no-sum",
    "dropout", "scalar-sum",
])
def test_products_of_results_are_no_layers(compute):
    assert list(planned_facts(Product(compute))) == ["layer"]


class Attending(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, **options)

    def forward(self, x):
        return self.attention(x, x, x)[0]


def test_the_projections_of_attention_are_layers():
    facts = planned_facts(nn.Sequential(nn.Linear(4, 4), Attending()))
    assert list(facts) == ["0", *(f"1.attention.{name}_proj" for name in ("q", "k", "v", "out"))]
    assert all(f.obstacle is None and f.kind == "Linear" for f in facts.values())
    assert [f.name for f in facts.values() if f.is_last] == ["1.attention.out_proj"]


@pytest.mark.parametrize("option", ["add_bias_kv", "add_zero_attn"])
def test_attention_that_cannot_be_split_is_listed(option):
    facts = planned_facts(nn.Sequential(nn.Linear(4, 4), Attending(**{option: True})))
    assert list(facts) == ["0", "1.attention", "1.attention.out_proj"]
    assert facts["1.attention"].type == "MultiheadAttention" and facts["1.attention"].is_last
    assert facts["1.attention"].obstacle == "attention with add_bias_kv or add_zero_attn"


@pytest.mark.parametrize("between, unsigned", [
    (lambda x, m: TF.linear(x, m.p[0]), True), (lambda x, m: m.p[0] @ x, True), (lambda x, m: m.p[0].mm(x), True),
    (lambda x, m: m.p[0].T.matmul(x.T), True), (lambda x, m: x.t() @ m.p[0], True), (lambda x, m: -x @ m.p[0], False),
    (lambda x, m: torch.addmm(-m.p[0, 0], x, m.p[0]), True), (lambda x, m: m.p[0] @ -x, False),
], ids=["linear", "left", "mm-left", "transposed", "t", "negative", "addmm", "negative-left"])  # fmt: skip
def test_the_sign_of_a_product_is_that_of_its_input(between, unsigned):
    class Between(Product):
        def forward(self, x):
            return between(torch.relu(self.layer(x)), self)

    facts = planned_facts(Between(None))
    assert facts["linear"].obstacle is None and facts["linear"].signed_input is not unsigned


def test_a_layer_that_is_never_called():
    model = Net(lambda net, signed, positive: positive, auxiliary=nn.Linear(2, 2))
    facts = facts_of(model)
    assert list(facts) == ["first", "last", "auxiliary"]
    assert facts["auxiliary"].obstacle == "never called by the model's forward"


def test_a_model_without_layers_has_no_facts():
    assert facts_of(nn.Sequential(nn.ReLU())) == {}
