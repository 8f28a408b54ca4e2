"""Writes in place, as people write them, become values that all later readers see."""

import copy
import types

import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn
from torch.utils import _pytree as pytree

from apotfx import ApotfxError, trace
from apotfx.graph.functional import see, store
from apotfx.graph.network import record_of

HEADER = "import math, torch\nimport torch.nn.functional as F\nfrom torch import nn\n"


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.act = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(inplace=True)
        self.drop, self.same, self.flat = nn.Dropout(0.5, inplace=True), nn.Identity(), nn.Flatten(2)
        self.register_buffer("mean", torch.zeros(4))


def network(body):
    """A module whose forward begins with `y = self.a(x)` and goes on with the lines of `body`."""
    lines = "".join(f"    {line}\n" for line in ("y = self.a(x)", *body.splitlines()))
    namespace = {}
    exec(f"{HEADER}def forward(self, x):\n{lines}", namespace)
    torch.manual_seed(0)
    return type("Net", (Layers,), {"forward": namespace["forward"]})()


def images(batch=3):
    return torch.randn(batch, 4, 5, 5, generator=torch.Generator().manual_seed(batch))


def traced(model, **options):
    network = trace(copy.deepcopy(model), **options)
    return network, record_of(network)["leaves"]


def run(model, training=False):
    """What a call gives, leaves in its input, and the gradients of all that have one."""
    x = images().requires_grad_(training)
    given = x * 1
    torch.manual_seed(1)
    with torch.set_grad_enabled(training):
        results = pytree.tree_leaves(model.train(training)(given))
    if training:
        model.zero_grad()
        sum((y * torch.linspace(-1, 2, y.numel()).view_as(y)).sum() for y in results).backward()
    gradients = [p.grad for p in (x, *model.parameters()) if training and p.grad is not None]
    return [y.detach() for y in results], given.detach(), gradients


# Through every kind of view and alias, by every kind of write.
WRITES = {
    "view-method": "t = y.view(3, -1)\nt.mul_(-1)\nreturn self.b(y)",
    "slice-operator": "t = y[:, 1:]\nt -= 0.5\nreturn self.b(torch.relu(y)) + t.mean()",
    "mask-of-a-view": "t = y[:, 1:]\nt[t < 0] = 0\ny[..., 1:-1, 1:-1] += 0.5\nreturn self.b(y)",
    "two-overlapping-views": "t, u = y[:, :3], y[:, 1:]\nt *= 2\nu -= 1\nreturn self.b(y) + t.sum() + u.mean()",
    "transposed": "y.mT[:, 0] += 1\ny.transpose(1, 2)[..., 0].zero_()\nreturn self.b(y)",
    "T": "t = y.flatten(0, 2)\nt.T[0] = 1\nt.t().mul_(0.5)\nreturn self.b(t.view(3, 4, 5, 5))",
    "diagonal": "torch.diagonal(y, dim1=2, dim2=3).fill_(0.1)\nreturn self.b(y)",
    "narrow-select": "y.narrow(1, 1, 2).select(1, 0).add_(1)\nreturn self.b(y)",
    "as_strided": "torch.as_strided(y, (4,), (7,), 1).zero_()\nreturn self.b(y)",
    "unfold": "y.unfold(2, 2, 2)[..., 0] = 0.3\nreturn self.b(y)",
    "expanded-reader": "t = y[:, :1]\ne = t.expand(-1, 4, -1, -1)\nt += 1\nreturn self.b(e)",
    "chunk-unpacked": "t, u = y.detach().chunk(2, 1)\nt += u\nreturn self.b(y)",
    "permute-reshape": "y.permute(0, 2, 3, 1).reshape(3, 25, 4)[:, 0] = 1\nreturn self.b(y)",
    "copy-is-no-view": "t = y.transpose(1, 2).reshape(3, -1)\nt *= 3\nreturn self.b(y) + t.mean()",
    "clone": "t = y.clone()\nt += 1\nreturn self.b(y) + t",
    "identity-in-place": "self.act(self.same(y))\nreturn self.b(y)",
    "flatten-in-place": "t = self.act(self.flat(y))\nreturn self.b(y) + t.mean()",
    "dropout-evaluates": "t = F.dropout(y, 0.3, self.training)\nt *= 2\nreturn self.b(y) + t",
    "dropout-in-place": "self.drop(y)\nF.dropout(y[:, :2], 0.3, self.training, True)\nreturn self.b(y)",
    "contiguous": "t = y.contiguous().to(y.dtype).float()\nt.add_(1)\nreturn self.b(y)",
    "out-into-a-view": "torch.mul(y.detach()[:, :2], 2, out=y.detach()[:, 2:])\nreturn self.b(y)",
    "out-of-another": "t = torch.empty(0)\ntorch.neg(y.detach(), out=t)\nreturn self.b(y) + t",
    "list": "ts = [y, self.b(x)]\nfor t in ts:\n    t.mul_(0.5)\nts[0] += ts[1]\nreturn self.b(y) + ts[1]",
    "list-item": "ts = [y]\nts.append(ts[0])\nts[1] += 1\nreturn self.b(ts[0])",
    "dict": "d = {'y': y}\nd['y'] -= 1\nreturn self.b(y)",
    "function": "def step(t):\n    t += 1\n    return t[:, :2]\nu = step(y)\nu.mul_(2)\nreturn self.b(y)",
    "chain": "y.mul_(0.5).add_(0.2).relu_()\nreturn self.b(y)",
    "functional-writes": "F.hardswish(y, inplace=True)\nF.leaky_relu(y, 0.3, True)\nreturn self.b(y)",
    "shape-of-itself": "y.unsqueeze_(0).squeeze_(0).transpose_(2, 3)\ny += 1\nreturn self.b(y)",
    "index": "i = torch.arange(3)\ny[i, i] = 0.5\ny[:, torch.tensor([1, 3])] *= 2\nreturn self.b(y)",
    "ellipsis": "y[...] = y.flip(0)\ny[None, :, 0] = 1\nreturn self.b(y)",
    "scatter": "y.scatter_(1, torch.zeros_like(y[:, :1]).long(), 0.5)\nreturn self.b(y)",
    "new-tensor": "t = y.new_zeros(3, 4, 5, 5)\nt[:, 1:] = y[:, :-1]\nreturn self.b(t)",
    "zeros-by-size": "n, c, h, w = x.shape\nt = torch.zeros(n, c, h, w, dtype=x.dtype, device=x.device)\n"
    "t[:, :, 1:] = y[:, :, :-1]\nreturn self.b(t)",
    "noise": "t = torch.randn(x.shape[0], 1, 1, 1)\nt *= 0.1\ny += t\nreturn self.b(y)",
    "constant": "m = torch.ones(4, 1, 1)\nm[::2] = 0\nreturn self.b(y * m)",
    "split-cat": "q, k = torch.cat([y, x], 1).split(4, 1)\nq = q * 1\nq *= 0.5\nk = k + q\nreturn self.b(k)",
    "result-read-too": "t = y\nu = y.add_(1)\ny = y * 2\nu -= 3\nreturn self.b(y) + t",
    "written-input": "x -= 0.5\nreturn self.b(self.a(x))",
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("body", WRITES.values(), ids=WRITES)
def test_all_later_readers_see_a_write(body, training):
    model = network(body)
    net, leaves = traced(model)
    assert leaves == {}
    (expected, written, gradients), (got, left, found) = run(model, training), run(net, training)
    assert len(expected) == len(got) and all(map(torch.equal, expected, got)) and torch.equal(written, left)
    assert len(gradients) == len(found)
    for one, other in zip(gradients, found):
        torch.testing.assert_close(other, one)


class Watching(fx.Interpreter):
    """Fails where a node reads a value that is not what it was made."""

    def run_node(self, node):
        for source in node.all_input_nodes:
            assert pytree.tree_all(lambda x: x, self.same(source)), f"{node} reads {source} after a write"
        value = super().run_node(node)
        self.made = vars(self).get("made", {}) | {node: copy.deepcopy(value)}
        return value

    def same(self, node):
        return pytree.tree_map_only(torch.Tensor, lambda x: True, self.env[node]) if node not in self.made else [
            torch.equal(a, b) for a, b in zip(*map(pytree.tree_leaves, (self.env[node], self.made[node])))
            if isinstance(a, torch.Tensor)
        ]  # fmt: skip


@pytest.mark.parametrize("body", WRITES.values(), ids=WRITES)
def test_no_value_that_is_read_changes(body):
    net, _ = traced(network(body))
    with torch.no_grad():
        Watching(net.eval()).run(images())


KEPT = {
    "input-read-too": ("t = x[:, :2]\nt *= 2\nreturn self.b(self.a(x))", "which it also reads"),
    "input-through-dropout": (
        "t = F.dropout(x, 0.3, self.training)\nt.relu_()\nreturn self.b(x) + t", "writes to the input"
    ),
    "buffer": ("self.mean += 1\nreturn self.b(y)", "mean"),
    "view-of-a-buffer": ("self.mean[:2].fill_(0.5)\nreturn self.b(y) + self.mean.sum()", "changes its buffer mean"),
    "several": ("torch._foreach_mul_([x, y], 0.5)\nreturn self.b(y)", "writes to several tensors at once"),
    "several-out": (
        "v, i = torch.empty(0), torch.empty(0, dtype=torch.long)\ntorch.max(y.detach(), 1, out=(v, i))\nreturn self.b(y) + v.sum()",
        "writes to several tensors at once",
    ),
    "real-part": (
        "t = torch.complex(y, 2 * y)\nt.real.mul_(0.5)\nreturn self.b(t.real + t.imag)", "a part of a complex tensor"
    ),
    "attribute": ("self.last = y\nself.last += 1\nreturn self.b(y)", "changes its attribute last"),
    "view-of-a-constant": ("m = torch.ones(4)\nv = m[:2]\nv += y.mean()\nreturn self.b(y) + m.sum()", "reads it through a view"),
}  # fmt: skip


@pytest.mark.parametrize("training", [False, True], ids=["evaluation", "training"])
@pytest.mark.parametrize("body, reason", KEPT.values(), ids=KEPT)
def test_what_cannot_be_resolved_is_kept_whole(body, reason, training):
    model = network(body)
    for whole in (model, nn.Sequential(nn.Identity(), model)):
        net, leaves = traced(whole)
        assert list(leaves) == ["" if whole is model else "1"] and reason in next(iter(leaves.values()))
        if "foreach" not in body or not training:  # which autograd refuses for a view
            (expected, written, _), (got, left, _) = run(copy.deepcopy(whole), training), run(net, training)
            assert torch.equal(*expected, *got) and torch.equal(written, left)


# What is hidden from autograd.
HIDDEN = {
    "detach-of-a-view": "y[:, :2].detach().mul_(0.5)\nt = y[:, 1:]\nt += 1\nreturn self.b(y)",
    "detach": "y.detach()[:, 0] = 0\nreturn self.b(y)",
    "read-detached": "t = y.detach()\ny *= 2\nreturn self.b(y) + t",
    "both": "u = y.detach()\nu[:, :2] = 0.5\ny[:, 1:] *= 2\nv = u + 1\nu += 1\nreturn self.b(y) + u + v",
}  # fmt: skip


@pytest.mark.parametrize("body", HIDDEN.values(), ids=HIDDEN)
def test_what_autograd_does_not_see_it_does_not_see_in_the_graph(body):
    test_all_later_readers_see_a_write(body, True)


# The two functions that a graph calls.
GEOMETRIES = {
    "whole": lambda x: x, "slice": lambda x: x[1:], "columns": lambda x: x[:, ::2], "mT": lambda x: x.mT,
    "row": lambda x: x[2], "diagonal": lambda x: x.diagonal(), "flat": lambda x: x.view(-1)[3:9],
}  # fmt: skip


@pytest.mark.parametrize("read", GEOMETRIES.values(), ids=GEOMETRIES)
@pytest.mark.parametrize("write", GEOMETRIES.values(), ids=GEOMETRIES)
def test_store_and_see_are_a_write_and_a_read(write, read):
    base = torch.arange(12.0).view(3, 4).requires_grad_()
    gradients = []
    for functional in (True, False):
        x = base * 1
        target, reader = write(x), read(x)
        value = -3 * target.clone()
        if functional:
            got = see(reader, target, store(target, value))
            assert torch.equal(x, base)  # nothing was written
        else:
            target.copy_(value)
            expected = read(x)
        result = got if functional else expected
        (result * torch.arange(float(result.numel())).view_as(result)).sum().backward()
        gradients.append(base.grad.clone())
        base.grad = None
    assert torch.equal(got, expected) and got.stride() == expected.stride() and torch.equal(*gradients)


def test_see_leaves_what_shares_no_memory_and_looks_into_containers():
    x, other = torch.arange(4.0), torch.arange(4.0)
    stored = store(x[1:], torch.zeros(3))
    assert see(other, x, stored) is other and see("text", x, stored) == "text"
    first, (second, third) = see((x, [other, x[:2]]), x, stored)
    assert first.tolist() == [0, 0, 0, 0] and second is other and third.tolist() == [0, 0]
    with pytest.raises(ApotfxError, match=r"a torch.float32 tensor is written in place and read as torch.int32; use a copy"):
        see(x.view(torch.int32), x, stored)


@pytest.mark.parametrize("body", [
    "u = y.data\nu.relu_()\nreturn self.b(y)", "y[:, 1].data.mul_(2)\nreturn self.b(y)", "self.act(y.data)\nreturn y",
])  # fmt: skip
def test_what_is_written_unseen_by_autograd_is_kept_whole(body):
    """The gradient of what was computed before depends on it."""
    assert "through the data of a tensor" in traced(network(body))[1][""]


@pytest.mark.parametrize("body", [
    "y.unsqueeze_(0).mul_(2)\nreturn y.squeeze(0)",
    "t = y[:]\nt.transpose_(1, 2)\nt += 1\nreturn self.b(t.transpose(1, 2)) + y",
    "t = y[:1].squeeze_(0)\nreturn t.swapaxes_(0, 1).relu_() + 1 + y.mean()",
])  # fmt: skip
def test_a_tensor_that_is_reshaped_in_place_is_a_view(body):
    model = network(body)
    got, leaves = traced(model)
    assert leaves == {} and torch.equal(got(images()), model(images()))
