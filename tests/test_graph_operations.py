"""What torch does with tensors is what the tables say of it."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.utils._pytree import tree_flatten, tree_map

from apotfx.graph.operations import returns_fresh, writes


def example(*shape):
    return torch.rand(shape or (2, 4, 4), generator=torch.Generator().manual_seed(0)) + 0.5


def node_of(target, *args, **kwargs):
    """(a node that calls `target`: a function, the name of a method or a module; the modules; its tensors by node)."""
    graph, tensors, modules = fx.Graph(), {}, {}

    def placeholder(x):
        if not isinstance(x, torch.Tensor):
            return x
        node = next((node for node, tensor in tensors.items() if tensor is x), None) or graph.placeholder("x")
        tensors[node] = x
        return node

    args, kwargs = tree_map(placeholder, (args, kwargs))
    op = "call_module" if isinstance(target, nn.Module) else "call_method" if isinstance(target, str) else "call_function"
    if op == "call_module":
        modules["called"], target = target, "called"
    return graph.create_node(op, target, tuple(args), dict(kwargs)), modules, tensors


def call(target, *args, **kwargs):
    return getattr(args[0], target)(*args[1:], **kwargs) if isinstance(target, str) else target(*args, **kwargs)


class Heads(nn.Module):
    """`inplace` may be about something else."""

    inplace = True

    def forward(self, features):
        return sum(features)


x, y = example(), example()
WRITING = {
    "iadd": (operator.iadd, (x, y)), "imul": (operator.imul, (x, 2)), "isub": (operator.isub, (x, x)),
    "itruediv": (operator.itruediv, (x, 2.0)), "ipow": (operator.ipow, (x, 2)), "imod": (operator.imod, (x, 2)),
    "ifloordiv": (operator.ifloordiv, (x, 2)), "imatmul": (operator.imatmul, (x, y)),
    "setitem": (operator.setitem, (x, 0, 1.0)), "setitem-method": ("__setitem__", (x, (slice(None), 0), 1.0)),
    "add_": ("add_", (x, y)), "copy_": ("copy_", (x, y)), "fill_": ("fill_", (x, 0.5)), "clamp_": ("clamp_", (x, 0, 1)),
    "__iadd__": ("__iadd__", (x, 1)), "masked_fill_": ("masked_fill_", (x, y > 1, 0)), "squeeze_": ("squeeze_", (x,)),
    "index_add_": ("index_add_", (x, 0, torch.tensor([0]), y[:1])), "bernoulli_": ("bernoulli_", (x,)),
    "relu_": (torch.relu_, (x,)), "F.relu_": (TF.relu_, (x,)), "F.elu_": (TF.elu_, (x,)), "init": (nn.init.zeros_, (x,)),
    "relu-keyword": (TF.relu, (x,), {"inplace": True}), "relu-position": (TF.relu, (x, True)),
    "relu-input": (TF.relu, (), {"input": x, "inplace": True}),
    "relu-off": (TF.relu, (x, False)), "hardtanh": (TF.hardtanh, (x, 0, 1, True)), "elu": (TF.elu, (x, 1.0, True)),
    "threshold": (TF.threshold, (x, 1, 0, True)), "leaky_relu": (TF.leaky_relu, (x, 0.1, True)),
    "rrelu": (TF.rrelu, (x, 0.1, 0.2, True, True)), "dropout": (TF.dropout, (x, 0.5, True, True)),
    "dropout-keyword": (TF.dropout, (x,), {"inplace": True}), "alpha_dropout": (TF.alpha_dropout, (x, 0.5, True, True)),
    "normalize": (TF.normalize, (x,), {"out": y}), "softmax": (TF.softmax, (x, 1)),
    "out": (torch.add, (x, 1), {"out": y}), "out-of-itself": (torch.neg, (x,), {"out": x}),
    "out-tuple": (torch.max, (x, 1), {"out": (example(2, 4), torch.zeros(2, 4, dtype=torch.long))}),
    "out-list": (torch.sort, (x,), {"out": [y, torch.zeros(2, 4, 4, dtype=torch.long)]}),
    "batch_norm": (TF.batch_norm, (x, example(4), example(4)), {"training": True}),
    "batch_norm-evaluating": (TF.batch_norm, (x, example(4), example(4))),
    "batch_norm-position": (TF.batch_norm, (x, example(4), example(4), None, None, True)),
    "torch.batch_norm": (torch.batch_norm, (x, None, None, example(4), example(4), True, 0.1, 1e-5, True)),
    "instance_norm": (TF.instance_norm, (x, example(4), example(4))),
    "embedding": (TF.embedding, (torch.tensor([1]), example(3, 4)), {"max_norm": 0.1}),
    "embedding-without": (TF.embedding, (torch.tensor([1]), example(3, 4))),
    "embedding_bag": (TF.embedding_bag, (torch.tensor([[1, 2]]), example(3, 4)), {"max_norm": 0.1}),
    "foreach": (torch._foreach_add_, ([x, y], 1)), "rrelu_with_noise": (torch._C._nn.rrelu_with_noise, (x, y, 0.1, 0.2, True)),
    "aten": (torch.ops.aten.relu_.default, (x,)), "aten-packet": (torch.ops.aten.add_, (x, y)),
    "ReLU": (nn.ReLU(True), (x,)), "ReLU-off": (nn.ReLU(), (x,)), "SiLU": (nn.SiLU(inplace=True), (x,)),
    "heads": (Heads(), ([x, y],)), "Dropout": (nn.Dropout(inplace=True), (x,)), "Threshold": (nn.Threshold(1, 0, True), (x,)),
    "add": (operator.add, (x, y)), "sort": ("sort", (x,)), "requires_grad_": ("requires_grad_", (x, False)),
    "invert": (operator.invert, (x > 1,)), "index": (torch.index_select, (x, 0, torch.tensor([0]))),
    "ior": (operator.ior, (x > 1, y > 1)), "new": ("new_zeros", (x, 3)), "dunder": ("__add__", (x, y)), "getitem": (operator.getitem, (x, 0)),
}  # fmt: skip


@pytest.mark.parametrize("case", WRITING.values(), ids=WRITING)
def test_writes_names_the_tensors_that_a_call_changes(case):
    target, args, kwargs = (*case, {})[:3]
    args, kwargs = copy.deepcopy((args, kwargs))  # one tensor given twice stays one
    node, modules, tensors = node_of(target, *args, **kwargs)
    before = {n: (t._version, t.clone()) for n, t in tensors.items()}
    call(target, *args, **kwargs)
    # Batch norms change their statistics without counting it as a new version.
    changed = {n for n, t in tensors.items() if t._version != before[n][0] or not torch.equal(t, before[n][1])}
    assert set(writes(node, modules)) == changed


def shares_memory(result, tensors):
    used = {t.untyped_storage().data_ptr() for t in tensors}
    outputs = [t for t in tree_flatten(result)[0] if isinstance(t, torch.Tensor)]
    return len(outputs) != 1 or outputs[0].untyped_storage().data_ptr() in used


image, ones = example(1, 4, 2, 2), torch.ones(1)
FRESH = {
    "linear": (TF.linear, (x, example(3, 4))), "conv2d": (TF.conv2d, (image, example(2, 4, 1, 1))),
    "matmul": (operator.matmul, (x, y)), "imatmul": (operator.imatmul, (x, y)), "bmm": (torch.bmm, (x, y)),
    "add": (operator.add, (x, 1)), "add-method": ("add", (x, y)), "torch.add": (torch.add, (x, y)),
    "rsub": (operator.sub, (1, x)), "neg": (operator.neg, (x,)), "pow": (operator.pow, (x, 1)), "abs": (operator.abs, (x,)),
    "relu": (TF.relu, (x,)), "torch.relu": (torch.relu, (x,)), "relu-method": ("relu", (x,)), "gelu": (TF.gelu, (x,)),
    "hardtanh": (TF.hardtanh, (x, 0, 9)), "clamp": ("clamp", (x, 0, 9)), "softmax": (TF.softmax, (x, -1)),
    "layer_norm": (TF.layer_norm, (x, (4,))), "batch_norm": (TF.batch_norm, (x, example(4), example(4))),
    "max_pool2d": (TF.max_pool2d, (image, 1)), "avg_pool2d": (TF.avg_pool2d, (image, 1)),
    "adaptive_avg_pool2d": (TF.adaptive_avg_pool2d, (image, 3)), "mean": ("mean", (image, (2, 3))),
    "sum": (torch.sum, (ones, 0)), "cat": (torch.cat, ([x],)), "stack": (torch.stack, ([x, y],)),
    "repeat_interleave": (torch.repeat_interleave, (x, 1, 0)), "repeat_interleave-method": ("repeat_interleave", (ones, 1)),
    "repeat_interleave-each": ("repeat_interleave", (ones, torch.tensor([1]))),
    "clone": ("clone", (x,)), "repeat": ("repeat", (x, 1, 1, 1)), "flip": (torch.flip, (ones, (0,))),
    "where": (torch.where, (x > 1, x, y)), "masked_fill": ("masked_fill", (x, x > 9, 0)), "roll": (torch.roll, (x, 0)),
    "index_select": (torch.index_select, (x, 0, torch.tensor([0, 1]))), "cumsum": (torch.cumsum, (ones, 0)),
    "aten": (torch.ops.aten.relu.default, (x,)), "tensordot": (torch.tensordot, (image, y, 1)),
    "Linear": (nn.Linear(4, 4), (x,)), "Conv2d": (nn.Conv2d(4, 4, 1), (image,)),
    "BatchNorm2d": (nn.BatchNorm2d(4), (image,)), "ReLU": (nn.ReLU(), (x,)), "GELU": (nn.GELU(), (x,)),
    "LayerNorm": (nn.LayerNorm(4), (x,)), "MaxPool2d": (nn.MaxPool2d(1), (image,)), "PReLU": (nn.PReLU(), (x,)),
}  # fmt: skip


@pytest.mark.parametrize("target, args", FRESH.values(), ids=FRESH)
def test_results_in_new_memory(target, args):
    node, modules, tensors = node_of(target, *args)
    assert returns_fresh(node, modules) and not shares_memory(call(target, *args), tensors.values())


class Doubling(nn.Linear):
    def forward(self, input):
        return input


hooked = nn.ReLU()
hooked.register_forward_hook(lambda module, args, result: args[0])
replaced = nn.ReLU()
replaced.forward = lambda x: x
NOT_FRESH = {
    "reshape": ("reshape", (x, 2, 16)), "view": ("view", (x, -1)), "flatten": (torch.flatten, (x, 1)),
    "flatten-nothing": (torch.flatten, (ones,)), "permute": ("permute", (x, 0, 2, 1)), "T": (getattr, (x, "mT")),
    "expand": ("expand", (ones, 2, 1)), "contiguous": ("contiguous", (x,)), "to": ("to", (x, torch.float32)),
    "float": ("float", (x,)), "type_as": ("type_as", (x, y)), "detach": ("detach", (x,)), "squeeze": (torch.squeeze, (x,)),
    "getitem": (operator.getitem, (x, 0)), "chunk": ("chunk", (x, 2)), "split": (torch.split, (x, 1)),
    "unbind": (torch.unbind, (x,)), "pos": (operator.pos, (x,)), "max": (torch.max, (x, 1)), "sort": ("sort", (x,)),
    "dropout": (TF.dropout, (x, 0.5, False)), "torch.dropout": (torch.dropout, (x, 0.5, False)),
    "pad": (TF.pad, (x, (0, 0))), "interpolate": (TF.interpolate, (image, 2)), "einsum": (torch.einsum, ("nij->nji", x)),
    "pixel_shuffle": (TF.pixel_shuffle, (image, 1)), "channel_shuffle": (TF.channel_shuffle, (image, 1)),
    "narrow": (torch.narrow, (x, 0, 0, 1)), "unfold": ("unfold", (x, 1, 2, 1)), "real": (torch.real, (x,)),
    "atleast": (torch.atleast_1d, (x,)), "broadcast": (torch.broadcast_tensors, (x, y)), "diagonal": ("diagonal", (x,)),
    "in-place": (operator.iadd, (x.clone(), 1)), "inplace": (TF.relu, (x.clone(), True)),
    "unsafe_view": (torch.ops.aten._unsafe_view, (x, (32,))), "data": (getattr, (x, "data")),
    "indices": (TF.max_pool2d, (image, 1), {"return_indices": True}),
    "Identity": (nn.Identity(), (x,)), "Dropout": (nn.Dropout().eval(), (x,)), "Flatten": (nn.Flatten(), (x,)),
    "Upsample": (nn.Upsample(2), (image,)), "subclass": (Doubling(4, 4), (x,)), "hooked": (hooked, (x,)),
    "replaced": (replaced, (x,)), "inplace-module": (nn.ReLU(True), (x.clone(),)),
    "indices-module": (nn.MaxPool2d(1, return_indices=True), (image,)), "Sequential": (nn.Sequential(), (x,)),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_FRESH.values(), ids=NOT_FRESH)
def test_results_that_may_lie_in_memory_of_others(case):
    target, args, kwargs = (*case, {})[:3]
    node, modules, tensors = node_of(target, *args, **kwargs)
    assert not returns_fresh(node, modules)
