"""Python code gets the answers about stand-ins that it gets about tensors, and other code of the process none."""

import builtins
import copy
import math
import sys
import textwrap
import types

import pytest
import torch
import torch.nn.functional as TF
from torch import Tensor, _assert, fx, nn

from apotfx import trace
from apotfx.graph.network import record_of
from apotfx.graph.python import recorded


def helper_module():
    """A module of the user's, as `import helpers` gives it."""
    module = types.ModuleType("test_python_helpers")
    source = """
        import math, torch
        from torch import Tensor
        from torch import zeros
        class Config:
            scale = 0.5
        def halve(x):
            return x / 2 if isinstance(x, Tensor) else x
        def both(x):
            return [halve(v) for v in x] if isinstance(x, (list, tuple)) else halve(x)
        def grow(x):
            return x * math.sqrt(x.shape[-1]) + zeros(x.shape[0], 1, dtype=x.dtype, device=x.device)
    """
    exec(textwrap.dedent(source), vars(module))
    sys.modules[module.__name__] = module
    return module


helpers = helper_module()


def nested(x):
    return [nested(v) for v in x] if isinstance(x, (list, tuple)) else x * 2 if torch.is_tensor(x) else x


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.scale = nn.Linear(4, 4), nn.Linear(4, 4), 0.5
        self.inner = staticmethod(nested).__func__

    def forward(self, x):
        return self.b(self.ask(self.a(x)))

    def ask(self, y):
        return y * self.scale if isinstance(y, Tensor) else y

    @staticmethod
    def fixed(y):
        return y - 0.5 if torch.is_tensor(y) else y

    @classmethod
    def of_class(cls, y):
        return y * 3 if hasattr(y, "numel") and not hasattr(y, "tensors") and issubclass(cls, Base) else y


class ByLength(Base):
    def ask(self, y, n=1):
        return y + 1 if not isinstance(y, Tensor) else super().ask(y) + 0.1


class Mixin:
    def ask(self, y):
        y = super().ask(y)
        return y * 0.5 if isinstance(y, Tensor) else y


class Mixed(Mixin, ByLength):
    def forward(self, x):
        return super().forward(x) + super(ByLength, self).ask(x)


class Decorated(Base):
    def forward(self, x):
        def twice(function):
            def call(*args, **kwargs):
                return function(function(*args, **kwargs), **kwargs)

            return call

        @twice
        def step(y, by=2):
            return y / by if isinstance(y, Tensor) else y

        return self.b(step(self.a(x), by=3))


def asking(expression):
    """A module whose result depends on what Python says to a question about y, a tensor."""
    return type("Asking", (Base,), {"forward": lambda self, x: (y := self.a(x), self.b(y) if expression(self, y) else y)[1]})


NETWORKS = {
    "method": Base, "super": ByLength, "mixin": Mixed, "closure": Decorated,
    "static": asking(lambda s, y: s.fixed(y) is not y), "class": asking(lambda s, y: s.of_class(y) is not y),
    "instance": asking(lambda s, y: s.inner([y])[0] is not y), "isinstance": asking(lambda s, y: isinstance(y, Tensor)),
    "union": asking(lambda s, y: isinstance(y, Tensor | None)), "type-is": asking(lambda s, y: type(y) is Tensor),
    "type-in": asking(lambda s, y: type(y) in (Tensor, nn.Parameter)), "name": asking(lambda s, y: type(y).__name__ == "Tensor"),
    "not-parameter": asking(lambda s, y: not isinstance(y, nn.Parameter)), "not-list": asking(lambda s, y: not isinstance(y, (list, tuple))),
    "parameter": asking(lambda s, y: isinstance(s.a.weight, nn.Parameter)),
    "size": asking(lambda s, y: isinstance(y.shape, tuple) and isinstance(y.size(0), int)),
    "dtype": asking(lambda s, y: isinstance(y.dtype, torch.dtype) and isinstance(y.device, torch.device)),
    "callable": asking(lambda s, y: not callable(y) and callable(y.relu) and callable(s.a) and callable(len)),
    "hasattr": asking(lambda s, y: hasattr(y, "relu") and not hasattr(y, "mask") and hasattr(s, "scale")),
    "getattr": asking(lambda s, y: getattr(y, "mask", None) is None), "none": asking(lambda s, y: y is not None),
    "split": asking(lambda s, y: isinstance(y.split(2, -1)[0], Tensor)), "chunk": asking(lambda s, y: isinstance(y.chunk(2)[0], Tensor)),
    "cat": asking(lambda s, y: isinstance(torch.cat([y, y]), Tensor)), "cast": asking(lambda s, y: isinstance(y.double(), Tensor)),
    "factory": asking(lambda s, y: isinstance(torch.zeros(y.shape[0]), Tensor)),
    "math": asking(lambda s, y: isinstance(math.sqrt(y.shape[-1]), float) and isinstance(y.shape[0] * 2, int)),
    "limits": asking(lambda s, y: isinstance(torch.finfo(y.dtype).eps, float) and isinstance(torch.iinfo(y.int().dtype).max, int)),
    "subclass": asking(lambda s, y: issubclass(type(y), Tensor) and isinstance(type(s), type)),
}  # fmt: skip


class Helped(Base):
    def forward(self, x):
        return self.b(helpers.grow(helpers.both([self.a(x)])[0])) * helpers.Config.scale


@pytest.mark.parametrize("make", (NETWORKS | {"module": Helped}).values(), ids=[*NETWORKS, "module"])
def test_questions_get_the_answers_of_a_tensor(make):
    torch.manual_seed(0)
    model, x = make(), torch.randn(3, 4)
    net = trace(copy.deepcopy(model))
    assert record_of(net)["leaves"] == {} and torch.equal(net(x), model(x))
    assert len([n for n in net.graph.nodes if n.op == "call_module"]) == 2


UNKNOWN = {
    "grad": (lambda s, y: y.grad is None, "grad of a tensor"), "grad_fn": (lambda s, y: y.grad_fn is None, "grad_fn of a tensor"),
    "requires_grad": (lambda s, y: y.requires_grad, "requires_grad of a tensor"),
    "grad-enabled": (lambda s, y: torch.is_grad_enabled(), "whether gradients are computed"),
    "name": (lambda s, y: y.name is None, "name of a tensor"), "value": (lambda s, y: y.sum() > 0, "bool of gt"),
    "item": (lambda s, y: int(y.sum().item()), "int of item"), "device-text": (lambda s, y: "cpu" in str(y.device), "text of getattr"),
    "dtype-text": (lambda s, y: f"{y.dtype}" == "torch.float32", "text of getattr"), "what": (lambda s, y: isinstance(y.max(0)[0], Tensor), "type of"),
    "sets": (lambda s, y: setattr(y, "mask", 1), "sets mask of a tensor"), "length": (lambda s, y: len(y) > 1, "len of a"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("question, reason", UNKNOWN.values(), ids=UNKNOWN)
def test_what_nothing_answers_keeps_the_module_whole(question, reason):
    torch.manual_seed(0)
    model = asking(question)()
    for whole in (model, nn.Sequential(nn.Linear(4, 4), model)):
        net = trace(copy.deepcopy(whole))
        assert list(record_of(net)["leaves"]) == ["" if whole is model else "1"]
        assert reason in next(iter(record_of(net)["leaves"].values()))
        for grad in (False, True):
            with torch.set_grad_enabled(grad):
                assert torch.equal(net(x := torch.randn(3, 4)), whole(x))


@pytest.mark.parametrize("imported", [False, True])
def test_a_size_in_a_message_is_no_question(imported):
    class Checked(Base):
        def forward(self, x):
            (_assert if imported else torch._assert)(x.ndim == 2, f"expected 2 dimensions, got {x.ndim}: {x.shape}")
            return super().forward(x)

    net, x = trace(Checked()), torch.randn(3, 4)
    assert record_of(net)["leaves"] == {} and net(x).shape == x.shape
    with pytest.raises(AssertionError, match="expected 2 dimensions"):
        net(x[None])


FACTORIES = {
    "zeros": lambda x: torch.zeros(x.shape[0], 4, dtype=x.dtype, device=x.device), "ones-list": lambda x: torch.ones([x.size(0), 1]),
    "ones-size": lambda x: torch.ones(x.shape), "full": lambda x: torch.full((x.shape[0], 1), 0.5, device=x.device),
    "arange": lambda x: torch.arange(x.shape[1], device=x.device), "arange-range": lambda x: torch.arange(0, x.shape[1], dtype=x.dtype),
    "linspace": lambda x: torch.linspace(0, 1, x.shape[1]), "eye": lambda x: x @ torch.eye(x.shape[1]),
    "tensor": lambda x: torch.tensor([x.shape[0], 2.0]).sum(), "as_tensor": lambda x: torch.as_tensor(0.5, device=x.device),
    "tril": lambda x: torch.tril(torch.ones(x.shape[1], x.shape[1], device=x.device)).mean(0),
    "rand": lambda x: torch.rand(x.shape[0], 1, device=x.device), "randperm": lambda x: torch.randperm(x.shape[1], device=x.device),
    "triu_indices": lambda x: torch.triu_indices(x.shape[1], x.shape[1]).sum(), "scalar": lambda x: torch.scalar_tensor(x.shape[1]),
    "limit": lambda x: torch.full((x.shape[0], 1), torch.finfo(x.dtype).eps * 1e6, dtype=x.dtype),
}  # fmt: skip


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_tensors_are_made_of_the_sizes_that_an_input_has(make):
    class Made(Base):
        def forward(self, x):
            return self.b(self.a(x) + make(x))

    torch.manual_seed(0)
    model = Made()
    net = trace(copy.deepcopy(model))
    assert record_of(net)["leaves"] == {}
    for size in (3, 5):
        results = [(torch.manual_seed(1), m(torch.ones(size, 4)))[1] for m in (model, net)]
        assert torch.equal(*results)


def test_recorded_is_one_node_for_stand_ins_and_a_call_for_others():
    graph, calls = fx.Graph(), []
    tracer = fx.proxy.GraphAppendingTracer(graph)
    x = fx.Proxy(graph.placeholder("x"), tracer)
    function = recorded(lambda *args, **kwargs: calls.append((args, kwargs)))
    assert function(1, y=2) is None and calls == [((1,), {"y": 2})]
    for args in ((x,), ([1, (x,)],), ({"a": x},)):
        assert function(*args).node.op == "call_function" and len(calls) == 1


def test_nothing_of_the_process_changes():
    names = ("isinstance", "hasattr", "callable", "type", "super")
    before = [getattr(builtins, name) for name in names], dict(vars(helpers)), nested.__globals__["torch"], TF.relu
    forwards = [vars(cls).get("forward") for cls in (Base, Mixed, Decorated, Helped, nn.Linear)]
    model = nn.Sequential(Mixed(), Decorated(), Helped(), asking(UNKNOWN["value"][0])())
    state = [dict(vars(m)) for m in model.modules()]
    trace(model)
    assert before == ([getattr(builtins, name) for name in names], dict(vars(helpers)), nested.__globals__["torch"], TF.relu)
    assert forwards == [vars(cls).get("forward") for cls in (Base, Mixed, Decorated, Helped, nn.Linear)]
    assert [dict(vars(m)) for m in model.modules()] == state


class Matching(Base):
    def ask(self, y):
        match y:
            case Tensor():
                return y - 0.25
        return y


def test_what_is_matched_with_classes_keeps_the_module_whole():
    model, x = Matching(), torch.randn(3, 4)
    network = trace(copy.deepcopy(model))
    assert "matches values with classes" in record_of(network)["leaves"][""] and torch.equal(network(x), model(x))


class Keyed(Base):
    def __init__(self):
        super().__init__()
        self.leaf = Undecided()

    def ask(self, y):
        return y * {"torch.float32": 0.5}.get(f"{self.leaf(y).dtype}", 1)


class Undecided(nn.Module):
    def forward(self, x):
        return x if x.sum() < 1e9 else -x


def test_the_text_of_what_is_not_known_keeps_the_module_whole():
    model, x = Keyed(), torch.randn(3, 4)
    assert torch.equal(trace(copy.deepcopy(model))(x), model(x))
    assert "asks for the text of" in record_of(trace(model))["leaves"][""]
