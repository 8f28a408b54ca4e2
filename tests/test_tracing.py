"""From a module to a graph, and what becomes of a network of which there is none or a part."""

import collections
import copy
import dataclasses
import re
import typing

import pytest
import torch
import torch.nn.functional as TF
from cycle_helpers import POLICY, call, calls, cycle, loaded, quantized, trained
from torch import fx, nn

from apotfx import ApotfxError, BitPolicy, Rule, load_integer, plan, quantize, summary, trace
from apotfx.graph.network import graph_of, record_of
from apotfx.graph.tracing import bind


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


class OnValues(nn.Module):
    """Two layers with control flow on values between them."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = torch.relu(self.a(x))
        if x.sum() > 1e9:
            return x
        return self.b(x)


class OnShapes(OnValues):
    def forward(self, x):
        x = torch.relu(self.a(x))
        if x.dim() > 2 and x.shape[1] != 1:
            x = x.flatten(1, 2)[:, :6]
        if x.ndim == 3:
            raise ValueError("one token")
        return self.b(x)


class Around(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(6, 6), inner, nn.Linear(6, 2)

    def forward(self, x):
        return self.last(torch.relu(self.inner(torch.relu(self.first(x)))))


def facts(model):
    return {row.facts.name: row.facts for row in plan(model, POLICY).layers}


ON_VALUES = r"test_tracing.py:\d+ `if x.sum\(\) > 1e9:`, its forward asks for bool of gt, which is not known while tracing"


# Leaves.


def test_a_module_with_control_flow_on_values_is_a_leaf(tmp_path):
    model, x = Around(OnValues()), torch.randn(5, 6)
    qmodel, names = cycle(model, x, tmp_path)
    assert isinstance(qmodel, fx.GraphModule) and list(record_of(qmodel)["leaves"]) == ["inner"]
    assert names == ["first", "inner.a", "inner.b", "last"] == calls(qmodel, x)
    assert type(model.inner.a) is nn.Linear and not hasattr(model, "meta")


def test_a_leaf_says_where_and_why():
    found = facts(Around(OnValues()))
    assert list(found) == ["first", "inner.a", "inner.b", "last"]
    for name in ("inner.a", "inner.b"):
        reason = found[name].sign_reason
        assert found[name].signed_input and found[name].obstacle is None
        assert re.match(rf"not known inside inner \(OnValues\), which cannot be traced \({ON_VALUES}", reason)
    assert not found["first"].feeds_batch_norm and not found["last"].signed_input
    assert [(f.is_first, f.is_last) for f in found.values()] == [(True, False), *[(False, False)] * 2, (False, True)]


@pytest.mark.parametrize("model, first, last", [
    (nn.Sequential(OnValues(), nn.Linear(6, 6)), "0.a", "1"), (nn.Sequential(nn.Linear(6, 6), OnValues()), "0", "1.b"),
    (nn.Sequential(OnValues()), "0.a", "0.b"), (nn.Sequential(OnValues(), OnValues()), "0.a", "1.b"),
    (nn.Sequential(nn.Linear(6, 6), OnValues(), nn.Linear(6, 6)), "0", "2"),
], ids=["first", "last", "only", "both", "middle"])  # fmt: skip
def test_the_ends_of_a_network_inside_leaves(model, first, last):
    found = facts(model).values()
    assert [f.name for f in found if f.is_first] == [first] and [f.name for f in found if f.is_last] == [last]


def test_leaves_inside_what_can_be_traced_and_inside_leaves(tmp_path):
    class Outer(OnValues):
        def __init__(self):
            super().__init__()
            self.inner = OnValues()

        def forward(self, x):
            return super().forward(self.inner(x))

    model, x = nn.Sequential(nn.Linear(6, 6), Around(nn.Sequential(Outer())), Around(OnValues())), torch.randn(5, 6)
    x = x[:, :6]
    model[1].last, model[2].last = nn.Linear(6, 6), nn.Linear(6, 2)
    qmodel, names = cycle(model, x, tmp_path)
    inner = ["1.inner.0.inner.a", "1.inner.0.inner.b", "1.inner.0.a", "1.inner.0.b"]
    expected = ["0", "1.first", *inner, "1.last", "2.first", "2.inner.a", "2.inner.b", "2.last"]
    assert calls(qmodel, x) == expected and sorted(names) == sorted(expected)
    assert {"1.inner.0", "2.inner"} <= record_of(qmodel)["leaves"].keys() and "1" not in record_of(qmodel)["leaves"]


def test_the_parameters_of_a_leaf_are_listed():
    class Product(OnValues):
        def __init__(self):
            super().__init__()
            self.matrix, self.vector = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6))

        def forward(self, x):
            return super().forward(x) @ self.matrix + self.vector

    row = facts(Around(Product()))["inner.matrix"]
    assert (
        row.type == "Parameter"
        and row.kind == ""
        and row.obstacle.startswith("a parameter inside inner (Product), which")
    )
    assert "inner.vector" not in facts(Around(Product()))


def test_a_leaf_called_twice(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.leaf, self.last = OnValues(), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(self.leaf(self.leaf(x)))

    x = torch.randn(5, 6)
    qmodel, names = cycle(Twice(), x, tmp_path)
    assert names == ["leaf.a", "leaf.b", "last"] and calls(qmodel, x) == ["leaf.a", "leaf.b"] * 2 + ["last"]


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self, in_place=True):
        super().__init__()
        self.layer, self.in_place = nn.Linear(6, 6), in_place
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        if self.in_place:
            self.count += 1
        else:
            self.count = self.count + 1
        return self.layer(x)


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "new"])
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["whole", "inside"])
def test_a_buffer_that_forward_changes_goes_on_changing(in_place, wrap):
    model = wrap(Counting(in_place))
    qmodel = quantize(model, POLICY)
    name = "count" if isinstance(model, Counting) else "0.count"
    assert qmodel.get_buffer(name) == 0 == model.get_buffer(name)
    for calls_so_far in (1, 2, 3):
        qmodel(torch.randn(5, 6))
        assert qmodel.get_buffer(name) == calls_so_far
    assert model.get_buffer(name) == 0
    assert "changes its buffer count" in next(iter(record_of(qmodel)["leaves"].values()))


# A whole model without a graph.


def test_a_model_that_cannot_be_traced_is_quantized_all_the_same(tmp_path):
    model, x = OnValues(), torch.randn(5, 6)
    qmodel, names = cycle(model, x, tmp_path)
    assert type(qmodel) is OnValues and names == ["a", "b"] == calls(qmodel, x)
    assert record_of(qmodel)["plan"] == plan(model, POLICY) and list(record_of(qmodel)["leaves"]) == [""]
    assert len(graph_of(qmodel).nodes) == 0 and not hasattr(model, "meta") and type(model.a) is nn.Linear


def test_its_plan_and_its_summary(tmp_path):
    found = facts(OnValues())
    assert list(found) == ["a", "b"] and found["a"].is_first and found["b"].is_last and found["b"].signed_input
    assert found["a"].position_reason == "there is no graph; in order of registration"
    assert "not known inside the model (OnValues), which cannot be traced (test_tracing.py:" in found["a"].sign_reason
    explained = plan(OnValues(), POLICY).explain()
    assert "a (Linear): weight 4-bit apot" in explained and "no graph; in order of registration" in explained
    qmodel = trained(OnValues(), torch.randn(5, 6))
    text = str(summary(qmodel, torch.randn(5, 6)))
    assert "a" in text and "b" in text


def test_its_export_fits_no_other_model(tmp_path):
    qmodel = trained(OnValues(), torch.randn(5, 6))
    loaded(qmodel, OnValues(), torch.randn(5, 6), tmp_path)
    with pytest.raises(ApotfxError, match="export"):
        load_integer(tmp_path / "export", OnShapes())
    loaded(qmodel, OnValues(), torch.randn(5, 6), tmp_path / "again", "onednn")


def test_the_batch_norms_of_a_model_without_a_graph(tmp_path):
    class Normed(OnValues):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(6)

        def forward(self, x):
            return self.norm(super().forward(x))

    for i, model in enumerate((Normed(), Around(Normed()))):
        cycle(model, torch.randn(5, 6), tmp_path / str(i))


# Shapes and fixed arguments.


def test_control_flow_on_shapes_without_example_inputs_keeps_a_module_whole(tmp_path):
    qmodel, names = cycle(Around(OnShapes()), torch.randn(5, 6), tmp_path)
    assert "inner" in record_of(qmodel)["leaves"] and names == ["first", "inner.a", "inner.b", "last"]


@pytest.mark.parametrize("shape", [(5, 6), (5, 2, 6)], ids=str)
@pytest.mark.parametrize("wrap", [lambda m: m, Around], ids=["whole", "inside"])
def test_control_flow_on_shapes_follows_example_inputs(shape, wrap, tmp_path):
    model, x = wrap(OnShapes()), torch.randn(shape)
    if wrap is Around:
        model.first = nn.Linear(6, 6)
    qmodel, _ = cycle(model, x, tmp_path, example_inputs=x)
    assert isinstance(qmodel, fx.GraphModule) and record_of(qmodel)["leaves"] == {}
    assert plan(model, POLICY, example_inputs=x) == record_of(qmodel)["plan"]
    found = {row.facts.name: row.facts for row in record_of(qmodel)["plan"].layers}
    assert not found["b" if "b" in found else "inner.b"].signed_input


LOOPS = {
    "range": lambda x: [n for n in range(x.size(1) // 3)], "len": lambda x: [0] * len(x.shape),
    "shape": lambda x: [0] * int(x.shape[0] > 2) * 2,
}  # fmt: skip


@pytest.mark.parametrize("loop", LOOPS.values(), ids=LOOPS)
def test_loops_on_shapes_follow_example_inputs(loop, tmp_path):
    class Looping(OnValues):
        def forward(self, x):
            for _ in loop(x):
                x = torch.relu(self.a(x))
            return self.b(x)

    x = torch.randn(5, 6)
    qmodel, names = cycle(Looping(), x, tmp_path, example_inputs=x)
    assert record_of(qmodel)["leaves"] == {} and names == ["a", "b"] and calls(qmodel, x) == ["a", "a", "b"]


def test_where_the_path_depends_on_the_mode_the_graph_is_that_of_evaluation():
    class Modal(OnValues):
        def forward(self, x):
            return self.b(torch.relu(self.a(x)) if self.training else self.a(x))

    x = torch.randn(5, 6)
    qmodel = trained(Around(Modal()), x)
    y = qmodel(x)
    assert record_of(qmodel)["leaves"] == {} and qmodel.two_paths == ("inner",)
    assert not torch.equal(qmodel.train()(x), y) and torch.equal(qmodel.eval()(x), y)
    qmodel.train().inner.eval()  # such as a backbone that is frozen
    assert torch.equal(qmodel(x), y)


def test_what_the_example_inputs_make_forward_raise_is_the_reason():
    qmodel = quantize(Around(OnShapes()), POLICY, example_inputs=torch.randn(5, 1, 6))
    assert re.fullmatch(
        'test_tracing.py:.* `raise ValueError."one token".`, ValueError: one token', record_of(qmodel)["leaves"]["inner"]
    )


def test_example_inputs_hold_no_values():
    """Control flow on values is not followed, also with them, and they stay as they are."""
    x = torch.randn(5, 6)
    before = x.clone()
    qmodel = quantize(Around(OnValues()), POLICY, example_inputs=x)
    (path, reason), = record_of(qmodel)["leaves"].items()
    assert path == "inner" and torch.equal(x, before)
    assert re.fullmatch(r"test_tracing.py:\d+ `if x.sum\(\) > 1e9:`, which depends on the values of tensors", reason)


class Arguments(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x, mask=None, act=False, repeats=2, *, scale=1.0):
        x = self.a(x)
        if act:
            x = torch.relu(x)
        for _ in range(repeats):
            x = x * scale
        return self.b(x if mask is None else x * mask)


def test_arguments_can_be_fixed(tmp_path):
    fixed = {"act": True, "repeats": 1, "scale": 0.5, "mask": None}
    model, x = Arguments(), torch.randn(5, 6)
    qmodel, names = cycle(model, x, tmp_path, concrete_args=fixed)
    assert isinstance(qmodel, fx.GraphModule) and record_of(qmodel)["leaves"] == {} and names == ["a", "b"]
    assert not record_of(qmodel)["plan"].layers[1].facts.signed_input
    assert [node.target for node in qmodel.graph.nodes if node.op == "placeholder"] == ["x"]
    float_model = trace(copy.deepcopy(model), concrete_args=fixed)
    torch.testing.assert_close(float_model(x), model(x, act=True, repeats=1, scale=0.5))


def test_arguments_that_forward_lacks_are_refused():
    message = "concrete_args: 'flag' is no argument of forward, which takes x, mask, act, repeats, scale"
    for do in (quantize, plan):
        with pytest.raises(ApotfxError, match=message):
            do(Arguments(), POLICY, concrete_args={"flag": True})


def test_an_input_that_the_examples_lack_is_named():
    class Two(OnShapes):
        def forward(self, x, y):
            return super().forward(x + y if y.dim() > 1 else x)

    with pytest.raises(ApotfxError, match="example_inputs: the model's input y is missing; pass an example for it"):
        quantize(Two(), POLICY, example_inputs=torch.randn(5, 6))
    for inputs in ([torch.randn(5, 6)] * 2, {"x": torch.randn(5, 6), "y": torch.randn(5, 6)}):
        assert record_of(quantize(Two(), POLICY, example_inputs=inputs))["leaves"] == {}


@pytest.mark.parametrize("inputs, expected", [
    (1, ((1,), {})), ([1, 2], ((1, 2), {})), ((1,), ((1,), {})), ({"x": 1}, ((), {"x": 1})),
], ids=["single", "list", "tuple", "dict"])  # fmt: skip
def test_inputs_are_bound_to_arguments(inputs, expected):
    assert bind(inputs) == expected


# Inputs and outputs of all kinds.


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor


class Pair(typing.NamedTuple):
    logits: torch.Tensor
    hidden: torch.Tensor


OUTPUTS = {
    "tuple": lambda y, h: (y, h), "list": lambda y, h: [y, [h]], "dict": lambda y, h: {"logits": y, "nested": {"h": (h,)}},
    "named-tuple": Pair, "with-none": lambda y, h: (y, None, h),
}  # fmt: skip


class Wiring(nn.Module):
    def __init__(self, wire):
        super().__init__()
        self.a, self.b, self.wire = nn.Linear(6, 6), nn.Linear(6, 6), wire

    def forward(self, x):
        hidden = torch.relu(self.a(x))
        return self.wire(self.b(hidden), hidden)


@pytest.mark.parametrize("wire", OUTPUTS.values(), ids=OUTPUTS)
def test_outputs(wire, tmp_path):
    model, x = Wiring(wire), torch.randn(5, 6)
    qmodel, _ = cycle(model, x, tmp_path)
    assert isinstance(qmodel, fx.GraphModule)
    assert torch.utils._pytree.tree_structure(qmodel(x)) == torch.utils._pytree.tree_structure(model(x))


@pytest.mark.parametrize("wire", [Output, lambda y, h: collections.OrderedDict(logits=y)], ids=["dataclass", "ordered"])
def test_outputs_of_other_types(wire):
    model, x = Wiring(wire), torch.randn(5, 6)
    qmodel = quantize(model, POLICY)
    y = qmodel(x)
    assert type(y) is type(model(x)) and len(quantized(qmodel)) == 2
    logits = y.logits if isinstance(y, Output) else y["logits"]
    logits.sum().backward()
    assert qmodel.a.weight.grad.any()


class Cache:
    """As a decoder returns one."""

    def __init__(self, keys, values):
        self.keys, self.values = keys, values


@pytest.mark.parametrize("make", [Cache, lambda y, h: collections.defaultdict(list, y=y)], ids=["object", "dict"])
def test_an_output_that_no_graph_can_make_is_the_reason(make):
    qmodel = quantize(Wiring(make), POLICY)
    assert type(qmodel(torch.randn(5, 6))) is type(make(None, None)) and len(quantized(qmodel)) == 2
    name = type(make(None, None)).__name__
    assert record_of(qmodel)["leaves"] == {"": f"a {name} is among its results or arguments, which no graph can make"}


class Inputs(nn.Module):
    def __init__(self, read):
        super().__init__()
        self.a, self.b, self.head, self.read = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2), read


class Positional(Inputs):
    def forward(self, x, y):
        return self.head(self.a(x) + self.b(y))


class Keyword(Inputs):
    def forward(self, x, *, y=None, flag=True):
        return self.head(self.a(x) + self.b(y))


class Dict(Inputs):
    def forward(self, batch):
        return self.head(self.a(batch["x"]) + self.b(batch["y"]))


@pytest.mark.parametrize("make, arrange", [
    (Positional, lambda x, y: (x, y)), (Keyword, lambda x, y: {"x": x, "y": y}),
    (Dict, lambda x, y: {"batch": {"x": x, "y": y}}), (Positional, lambda x, y: {"y": y, "x": x}),
], ids=["positional", "keyword", "dict", "by-name"])  # fmt: skip
def test_several_inputs(make, arrange, tmp_path):
    inputs = arrange(torch.randn(5, 6), torch.randn(5, 6))
    qmodel, _ = cycle(make(None), inputs, tmp_path, example_inputs=inputs)
    found = {row.facts.name: row.facts for row in record_of(qmodel)["plan"].layers}
    assert found["a"].is_first and found["b"].is_first and found["head"].is_last and not found["a"].is_last
    assert call(qmodel, inputs)[0].shape == (5, 2)


# How modules hold modules.


class Lists(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.ReLU()) for _ in range(3))
        self.heads = nn.ModuleDict({"one": nn.Linear(6, 2), "two": nn.Linear(6, 3)})
        self.scales = nn.ParameterList([torch.ones(6), torch.ones(6)])

    def forward(self, x):
        for i, block in enumerate(self.blocks):
            x = block(x) * self.scales[i % 2]
        return {name: head(x) for name, head in self.heads.items()}


def test_lists_and_dicts_of_modules(tmp_path):
    x = torch.randn(5, 6)
    qmodel, names = cycle(Lists(), x, tmp_path)
    assert names == ["blocks.0.0", "blocks.1.0", "blocks.2.0", "heads.one", "heads.two"] == calls(qmodel, x)


def test_a_graph_module_and_one_inside_a_model(tmp_path):
    traced, x = fx.symbolic_trace(Around(nn.Identity())), torch.randn(5, 6)
    for i, model in enumerate((traced, nn.Sequential(traced, nn.ReLU(), nn.Linear(2, 2)))):
        qmodel, names = cycle(model, x, tmp_path / str(i))
        assert len(names) == 2 + i and record_of(qmodel)["leaves"] == {}
        assert names[0] == ("first" if not i else "0.first")


def test_a_graph_module_that_cannot_be_traced_is_kept_whole(tmp_path):
    layers, graph, x = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)), fx.Graph(), torch.randn(5, 6)
    hidden = graph.call_module("0", (graph.placeholder("x"),))
    ask = graph.call_function(bool, (graph.call_method("any", (hidden,)),))
    graph.output(graph.call_module("1", (graph.call_function(torch.mul, (hidden, ask)),)))
    qmodel, _ = cycle(fx.GraphModule(layers, graph), x, tmp_path)
    assert list(record_of(qmodel)["leaves"]) == [""] and len(quantized(qmodel)) == 2
    assert not list(graph_of(qmodel).nodes)


@pytest.mark.parametrize("make", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_listed_and_stay(make, tmp_path):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.rnn, self.head = nn.Linear(6, 6), make(6, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0][:, -1])

    qmodel, names = cycle(Recurrent(), torch.randn(5, 3, 6), tmp_path)
    rows = {row.facts.name: row for row in record_of(qmodel)["plan"].layers}
    assert names == ["embed", "head"] and rows["rnn"].reason == f"float: {make.__name__} has no quantized version"
    assert rows["head"].facts.signed_input and not rows["embed"].facts.is_last


# What the trace keeps of the model.


def test_hooks_of_containers_and_of_the_model_still_run(tmp_path):
    model, seen, x = Around(nn.Sequential(nn.Linear(6, 6), nn.ReLU())), [], torch.randn(5, 6)
    model.register_forward_hook(lambda *_: seen.append("model"))
    model.inner.register_forward_hook(lambda module, args, y: 2 * y)
    model.inner.register_forward_pre_hook(lambda *_: seen.append("inner"))
    model.first.register_forward_hook(lambda *_: seen.append("first"))
    qmodel, names = cycle(model, x, tmp_path)
    assert names == ["first", "inner.0", "last"]
    assert record_of(qmodel)["leaves"] == {"inner": "it has hooks, which run when it is called"}
    seen.clear()
    y = qmodel(x)
    assert seen == ["first", "inner", "model"]
    del qmodel.inner._forward_hooks[next(iter(qmodel.inner._forward_hooks))]
    assert not torch.equal(qmodel(x), y)


def test_trace_is_public_and_traces_a_graph_module_again():
    model = Around(nn.Sequential(nn.Linear(6, 6)))
    graph_module = trace(model)
    assert isinstance(graph_module, fx.GraphModule) and trace(graph_module).code == graph_module.code
    assert graph_module.first is model.first and graph_module.get_submodule("inner.0") is model.inner[0]
    x = torch.randn(5, 6)
    assert torch.equal(graph_module(x), model(x)) and record_of(trace(OnValues()))["leaves"].keys() == {""}


def test_dropout_inside_a_leaf_follows_the_mode():
    class Dropping(OnValues):
        def forward(self, x):
            return TF.dropout(super().forward(x), 0.5, self.training)

    qmodel = trained(Around(Dropping()), torch.randn(5, 6))
    x = torch.randn(5, 6)
    assert torch.equal(qmodel(x), qmodel(x)) and not torch.equal(qmodel.train()(x), qmodel(x))


# Without values.


def test_a_model_on_the_meta_device_has_a_plan():
    with torch.device("meta"):
        model = Lists()
    assert plan(model, BitPolicy.default()) == plan(Lists(), BitPolicy.default())
    message = "model: blocks.0.0.weight is on the meta device, which holds no values; only plan.. takes such a model"
    with pytest.raises(ApotfxError, match=message):
        quantize(model, POLICY)


def test_weights_of_other_types_stay_with_a_reason():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6, dtype=torch.complex64)
            self.c = nn.Linear(6, 6, bias=False)
            self.c.weight = nn.Parameter(torch.ones(6, 6, dtype=torch.int8), requires_grad=False)

        def forward(self, x):
            return self.b(self.a(x).to(torch.complex64)), self.c(x.to(torch.int8))

    reasons = {row.facts.name: row.reason for row in quantize(Other(), POLICY).meta["plan"].layers}
    assert reasons == {
        "a": "rule *", "b": "float: its weight is complex64, not a floating-point type",
        "c": "float: its weight is int8, not a floating-point type",
    }  # fmt: skip
    with pytest.raises(ApotfxError, match="has no layer that can be quantized .0: its weight is complex64"):
        quantize(nn.Sequential(nn.Linear(6, 6, dtype=torch.complex64)), BitPolicy((Rule(name="0"),)))


class Growing(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.length = nn.Linear(6, 6), 1
        self.register_buffer("table", torch.ones(1), persistent=False)

    def forward(self, x):
        if x.shape[0] > self.length:
            self.length, self.table = len(x), torch.arange(len(x) * 1.0)
        return self.fc(x * self.table[: len(x), None])


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.growing, self.last = nn.Linear(6, 6), Growing(), nn.Linear(6, 6)

    def forward(self, x):
        y = self.growing(self.first(x))
        return self.last(y) if y.shape[-1] == 6 else y


def test_shapes_are_asked_for_without_a_trace_on_the_modules():
    model, x = Branching(), torch.randn(4, 6)
    network = trace(copy.deepcopy(model), example_inputs=x)
    growing = network.get_submodule("growing")
    assert record_of(network)["leaves"].keys() == {"growing"} and (growing.length, growing.table.shape) == (1, (1,))
    assert torch.equal(network(x), model(x))
