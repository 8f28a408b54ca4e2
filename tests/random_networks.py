"""Random networks written as people write them, and what must hold for each when it is quantized.

`python tests/random_networks.py --count 200 --seed 0` tries 200 of them and prints what failed, reduced to the statements
that it takes, by kind of statement; `--self-test` puts a copy of the float network in the place of the quantized one, with
which nothing may fail; `--kind write-view` tries the kinds whose name begins so, each alone.

A network is Python source: a class whose forward is a list of statements drawn from `KINDS`. Every statement reads and
writes the variables x, y and z, which have one shape, and u, a view of any shape, so that any selection of statements in
any order is a network.
"""

import argparse
import collections
import contextlib
import copy
import dataclasses
import linecache
import math
import random
import re
import string
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import apotfx
from apotfx.layers import QuantLayer

BACKENDS = ("reference", "onednn", "native")
SAME = 50.0  # dB; what float32 leaves of a network that is computed in another order
CLOSE = 20.0  # dB; a network at 8 bits
SLACK = 8.0  # dB by which a quantized network may be worse than the float one that rounds to 8 bits itself

HEADER = '''\
import collections, contextlib, copy, dataclasses, functools, itertools, math, operator, random
from typing import NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential


class Result(NamedTuple):
    out: torch.Tensor
    more: torch.Tensor


@dataclasses.dataclass
class Output:
    out: torch.Tensor
    more: torch.Tensor = None


class Same(nn.Module):
    def forward(self, x, *ignored):
        return x


class Undecided(nn.Module):
    """Depends on values, and writes its argument."""
    def forward(self, x):
        return x.clamp_(min=-0.5) if x.abs().amax() > 1e-3 else x


class Norm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, self.training, 0.1, self.eps
        )


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x
    @staticmethod
    def backward(ctx, grad):
        return 3 * grad


class Pair(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer
    def forward(self, x, scale=1.0, *, mask=None):
        y = self.layer(x)
        return (y * scale, x) if mask is None else (y * mask, x)


def standardize(w):
    return (w - w.mean()) / (w.std() + 1e-5)


def halve_(t):
    t /= 2
'''


@dataclasses.dataclass(frozen=True)
class Domain:
    """Tensors of one shape [N, ...] with 8 channels, and the layers that keep it."""

    shape: tuple[int, ...]
    layers: dict[str, str]
    words: dict[str, str]  # what statements say about the shape


DOMAINS = {
    "images": Domain(
        (8, 6, 6),
        {
            "a": "nn.Conv2d(8, 8, 1)",
            "b": "nn.Conv2d(8, 8, 3, padding=1)",
            "c": "nn.Conv2d(8, 8, 1, bias=False)",
            "d": "nn.Conv2d(8, 8, 3, padding=1, groups=2)",
        },
        {"perm": "0, 2, 3, 1", "inv": "0, 3, 1, 2", "ch": "1", "pc": "8, 1, 1", "sizes": "n, c, h, w", "tail": "8, 6, 6"},
    ),
    "sequences": Domain(
        (6, 8),
        {
            "a": "nn.Linear(8, 8)",
            "b": "nn.Linear(8, 8)",
            "c": "nn.Linear(8, 8, bias=False)",
            "d": "nn.Linear(8, 8)",
        },
        {"perm": "0, 2, 1", "inv": "0, 2, 1", "ch": "2", "pc": "8", "sizes": "n, t, c", "tail": "6, 8"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A statement: $x, $y, $z stand for three different variables, $i for a number of its own."""

    body: str
    init: str = ""
    domains: tuple[str, ...] = tuple(DOMAINS)
    may_refuse: bool = False
    same: float = SAME


KINDS: dict[str, Kind] = {}


def kinds(prefix: str, bodies: dict[str, str], init: str = "", domains: str = "images sequences", **more) -> None:
    for name, body in bodies.items():
        KINDS[f"{prefix}-{name}"] = Kind(body, init, tuple(domains.split()), **more)


RELU = "self.act = nn.ReLU(inplace=True)"  # shared by all that use it

kinds("operator", {
    "iadd": "$x += $y",
    "iadd-number": "$x += 0.5",
    "isub": "$x -= 0.5 * $y",
    "imul": "$x *= torch.sigmoid($y)",
    "idiv": "$x /= 2",
    "ipow": "$x **= 2",
    "ior": "mask = $x > 0\nmask |= $x > 100\n$x = $x * mask",
    "iadd-alias": "old = $x\n$x += self.b($y)\n$z = $z + 0.5 * old",
    "iadd-list": "parts = [$x]\n$x += 1\n$z = $z + 0.5 * parts[0]",
    "iadd-attribute": "self.kept = $x\nself.kept += 1",
    "module-operator": "$x = operator.iadd($x, $y)",
})  # fmt: skip
kinds("method", {
    "relu_": "$x.relu_()",
    "clamp_": "$x.clamp_(-0.5, 1.5)",
    "add_": "$x.add_($y, alpha=0.5)",
    "mul_": "$x.mul_(-1)",
    "sigmoid_": "$x = $x.sigmoid_()",
    "masked_fill_": "$x.masked_fill_($y > 100, 0.0).masked_fill_($x < 0, 0.1)",
    "copy_": "$x.copy_(0.5 * $y)",
    "zero_": "$x[:, :2].zero_()",
    "fill_": "$x[:, 2:3].fill_(0.5)",
    "index_fill_": "$x.index_fill_(1, torch.tensor([0, 2]), 0.3)",
    "index_add_": "$x.index_add_(1, torch.tensor([0, 2]), $y[:, :2])",
    "addcmul_": "$x.addcmul_($y, $z, value=0.1)",
    "unsqueeze_": "t = $x.view_as($x)\nt.unsqueeze_(0).mul_(0.5)\n$x = t.squeeze(0)",
    "transpose_": "t = $x[:]\nt.transpose_(1, 2)\nt += 0.5\n$x = t.transpose(1, 2)",
    "chain": "$y = $y + $x.mul_(0.5).add_(0.2).relu_()",
    "functional": "$x = F.relu_($x)",
    "torch": "torch.clamp_($x, min=-0.3)",
    "leaky": "$y = F.leaky_relu($x, 0.1, inplace=True)",
    "F.relu": "F.relu($x, inplace=True)",
    "F.relu-assigned": "$y = F.relu($x, inplace=True)\n$z = $z + $x",
    "F.dropout": "F.dropout($x, 0.3, self.training, inplace=True)",
    "F.hardtanh": "F.hardtanh($x, -0.4, 0.8, inplace=True)",
    "swap": "$x, $y = $y, $x\n$x += 1",
    "helper": "halve_($x)",
    "masked-attention": "$x = $x.masked_fill_(torch.ones_like($x).triu(1) > 0, -0.2)",
})  # fmt: skip
kinds("module", {"relu": "$y = self.act($x)", "relu-unassigned": "self.act($x)"}, RELU)
for name, made in {
    "relu6": "nn.ReLU6(inplace=True)",
    "hardswish": "nn.Hardswish(inplace=True)",
    "silu": "nn.SiLU(inplace=True)",
    "dropout": "nn.Dropout(0.3, inplace=True)",
    "sequential": "nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))",
    "undecided": "Undecided()",
}.items():
    kinds("module", {name: f"$y = self.{name}$i($x)"}, f"self.{name}$i = {made}")
kinds("out", {
    "add": "torch.add($x, $y, out=$z)",
    "neg": "torch.neg($x, out=$x)",
    "mul-returned": "$z = torch.mul($x, 0.5, out=$y)",
    "cat": "torch.cat([$x[:, :2], $y[:, 2:]], 1, out=$z)",
    "view": "torch.add($x[:, :2], 1, out=$y[:, :2])",
    "clamp": "torch.clamp($x, 0, 1, out=$z)",
    "empty": "o = torch.empty_like($x)\ntorch.add($x, $y, out=o)\n$x = o",
})  # fmt: skip
kinds("setitem", {
    "slice": "$x[:, 0] = $y[:, 1]",
    "number": "$x[..., 0] = 0.5",
    "iadd": "$x[:, ::2] += 1",
    "mask": "$x[$x < 0] = 0.1",
    "list": "$x[:, [0, 2]] *= 2",
    "view-of-view": "$x[:, 1:3][:, 0] = 0.2",
    "transposed": "$x.transpose(1, 2)[:, 1] = -0.2",
    "new": "o = torch.empty_like($x)\no[:, :4] = $x[:, :4]\no[:, 4:] = $y[:, 4:]\n$x = o",
    "zeros": "o = torch.zeros($x.shape)\no[:, 1:] = $x[:, :-1]\n$x = o",
    "new_zeros": "o = $x.new_zeros($x.size())\no[:, 1:] += $x[:, 1:]\n$x = o",
    "clone": "o = $x.clone()\no[:, 0] = 0\n$x = $x + o",
    "shift": "$x[:, 1:] = $x[:, :-1].clone()",
    "del": "t = $x\ndel $x\n$x = t + 1",
})  # fmt: skip

VIEWS = {
    "slice": "$x[:, :4]",
    "step": "$x[..., ::2]",
    "integer": "$x[:, 1]",
    "none": "$x[:, None]",
    "ellipsis": "$x[..., -1]",
    "view": "$x.view($x.shape[0], -1)",
    "view-1": "$x.view(-1)",
    "view_as": "$x.view_as($y)",
    "reshape": "$x.reshape($x.size(0), -1)",
    "flatten": "$x.flatten(1)",
    "torch.flatten": "torch.flatten($x, 1)",
    "unflatten": "$x.unflatten(1, (2, -1))",
    "permute": "$x.permute($perm)",
    "transpose": "$x.transpose(1, 2)",
    "swapaxes": "torch.swapaxes($x, 1, 2)",
    "movedim": "$x.movedim(1, -1)",
    "mT": "$x.mT",
    "chunk": "$x.chunk(2, 1)[1]",
    "torch.chunk": "torch.chunk($x, 2, dim=-1)[0]",
    "split": "$x.split(2, 1)[1]",
    "split-sizes": "torch.split($x, [2, $x.shape[-1] - 2], -1)[1]",
    "tensor_split": "$x.tensor_split(2, 1)[0]",
    "unbind": "$x.unbind(1)[2]",
    "narrow": "$x.narrow(1, 1, 3)",
    "select": "$x.select(1, 2)",
    "diagonal": "$x.diagonal(dim1=1, dim2=2)",
    "unsqueeze": "$x.unsqueeze(1)",
    "squeeze": "$x.squeeze()",
    "expand_as": "$x.expand_as($y)",
    "broadcast": "torch.broadcast_tensors($x, $y)[0]",
    "detach": "$x.detach()",
    "data": "$x.data",
    "contiguous": "$x.contiguous()",
    "to-dtype": "$x.to($y.dtype)",
    "to-device": "$x.to($y.device)",
    "to-tensor": "$x.to($y)",
    "float": "$x.float()",
    "type_as": "$x.type_as($y)",
    "cpu": "$x.cpu()",
    "positive": "+$x",
    "real": "$x.conj()",
    "as_strided": "$x.contiguous().as_strided((4, 3), (5, 1))",
    "identity": "self.identity($x)",
    "dropout": "F.dropout($x, training=self.training)",
    "nn.Dropout": "self.dropout($x)",
    "nn.Flatten": "self.flatten($x)",
    "same": "self.same($x)",
    "alias": "$x",
    "permuted-copy": "$x.transpose(1, 2).contiguous()",
    "permuted-reshape": "$x.transpose(1, 2).reshape($x.shape[0], -1)",
    "clone": "$x.clone()",
    "view-of-view": "$x[:, 1:].transpose(1, 2)[:, :3]",
    "helper": "(lambda t: t[:, :3])($x)",
}
VIEW_INIT = (
    "self.act = nn.ReLU(inplace=True)\nself.identity = nn.Identity()\nself.dropout = nn.Dropout(0.3)\n"
    "self.flatten = nn.Flatten()\nself.same = Same()"
)
WRITES = (
    "$t -= 1", "$t *= 0.5", "$t += 0.3", "$t.relu_()", "$t.clamp_(-0.2, 0.9)", "$t.mul_(-0.7)", "F.relu($t, inplace=True)",
    "self.act($t)", "$t[:] = 0.25", "$t[0] = 0.1", "torch.neg($t, out=$t)", "$t.copy_($t.flip(0))", "$t.masked_fill_($t < 0, 0.1)",
    "halve_($t)", "$t = F.relu($t, inplace=True)",
)  # fmt: skip
for name, view in VIEWS.items():
    kinds("write-view", {name: f"u = {view}\n$write_u"}, VIEW_INIT)
    kinds("write-base", {name: f"u = {view}\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"expand": "u = $x[:, :1].expand(-1, 3, $rest)\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"unfold": "u = $x.unfold(1, 3, 1)\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"two-views": "u = $x[:, :4]\nv = $x[:, 2:6]\nu -= 1\nv *= 2\n$y = $y + u.mean()"})
kinds("u", {"write": "$write_u", "read": "$x = $x + u.mean()", "max": "$x = $x + u.amax()", "view": "u = u[..., :2]\nu += 0.3"}, VIEW_INIT)

kinds("asks", {
    "isinstance": "if isinstance($x, torch.Tensor):\n    $x = $x / 2",
    "isinstance-list": "if not isinstance($x, (list, tuple)):\n    $x = $x * 0.5",
    "is_tensor": "if torch.is_tensor($x):\n    $x = $x - 0.5",
    "type-is": "if type($x) is torch.Tensor:\n    $x = -$x",
    "hasattr-tensors": 'if hasattr($x, "tensors"):\n    $x = $x.tensors',
    "hasattr-shape": 'if hasattr($x, "shape"):\n    $x = $x * 0.7',
    "getattr-default": '$x = $x * getattr($x, "scale", 0.5)',
    "parameter": "if not isinstance($x, nn.Parameter):\n    $x = $x + 0.3",
    "none": "if $x is not None:\n    $x = $x - 0.2",
    "floating": "if $x.is_floating_point() and torch.is_floating_point($y):\n    $x = $x * 0.6",
    "dim": "if $x.dim() == $y.ndim:\n    $x = $x * 0.6",
    "dtype": "if $x.dtype == torch.float32:\n    $x = $x * 0.6",
    "device": 'if $x.device.type == "cpu" and not $x.is_cuda:\n    $x = $x * 0.6',
    "requires_grad": "if $x.requires_grad:\n    $x = $x * 0.6",
    "grad-enabled": "if torch.is_grad_enabled():\n    $x = $x * 0.6",
    "contiguous": "if $x.is_contiguous():\n    $x = $x * 0.6",
    "scripting": "if not torch.jit.is_scripting() and not torch.jit.is_tracing():\n    $x = $x * 0.6",
    "compiling": "if torch.compiler.is_compiling():\n    $x = $x * 0.6",
    "try": "try:\n    $x = $x + torch.zeros(3, 5, 7)\nexcept RuntimeError:\n    $x = $x - 0.5",
    "callable": "if not callable($x):\n    $x = $x + 0.1",
    "is-same": "if $x is $y:\n    $x = $x + 1\nelse:\n    $x = $x - 0.5",
    "f-string": 'key = f"{$x.dtype}"\nif key == "torch.float32":\n    $x = $x * 0.6',
})  # fmt: skip
kinds("shape", {
    "unpack": "$sizes = $x.shape\n$x = $x.reshape(n, -1).view($sizes)",
    "unpack-star": "n, *rest = $x.shape\n$x = $x.reshape(n * rest[0], -1).reshape(n, *rest)",
    "loop": "for i in range($x.shape[1]):\n    $y = $y + 0.1 * $x[:, i : i + 1]",
    "loop-write": "for i in range(0, $x.shape[1], 2):\n    $x[:, i] += 0.2",
    "loop-unbind": "for t in $x.unbind(1):\n    t += 0.3",
    "loop-rows": "rows = [0.5 * row for row in $x]\n$x = torch.stack(rows)",
    "loop-split": "$x = torch.cat([t * (i + 1) / 3 for i, t in enumerate($x.split(2, 1))], 1)",
    "zip-chunks": "$x = torch.cat([p - q for p, q in zip($x.chunk(2, 1), $y.chunk(2, 1))], 1)",
    "batch-branch": "if $x.shape[0] > 3:\n    $x = $x * 0.5",
    "branch": "if $x.shape[1] % 2 == 0 and $x.size(-1) > 4:\n    $x = $x * 0.5",
    "equal": "if $x.shape == $y.shape:\n    $x = $x + 0.5 * $y",
    "assert": 'assert $x.shape[1] == $y.shape[1], f"got {$x.shape}"\n$x = $x + 1',
    "raise": 'if $x.dim() > 7:\n    raise ValueError(f"{$x.shape}")\n$x = $x * 0.5',
    "len": "$x = $x / len($x)",
    "len-shape": "$x = $x / len($x.shape)",
    "numel": "$x = $x * ($x.numel() / ($x.shape[0] * 100))",
    "sqrt": "$x = $x / math.sqrt($x.shape[-1])",
    "arange": "$x = $x + 0.1 * torch.arange($x.shape[-1])",
    "zeros": "$x = $x + torch.ones($x.shape[0], *[1] * ($x.dim() - 1))",
    "full": "$x = $x - torch.full_like($x, 0.3)",
    "int": "$x = $x * (1 / int($x.shape[-1]))",
    "expand": "w = torch.linspace(0, 1, $x.shape[-1])\n$x = $x + w.expand($x.shape[0], *[-1] * 0, *$x.shape[1:])",
    "new_tensor": "$x = $x * $x.new_tensor([0.5])",
    "cache": 'if getattr(self, "cached$i", None) is None or self.cached$i.shape != $x.shape:\n'
    "    self.cached$i = torch.full($x.shape, 0.2)\n$x = $x + self.cached$i",
})  # fmt: skip
kinds("values", {
    "branch": "if $x.abs().amax() > 1e-4:\n    $x = $x * 0.5",
    "branch-write": "if $x.abs().amax() > 1e-4:\n    $x *= 0.5\n    $y[:, 0] += 1",
    "item": "$x = $x / (1 + $x.abs().amax().item())",
    "float": "$x = $x - float($x.mean())",
    "bool-index": "$y = $y + $x[$x > 0].sum() / 100",
    "nonzero": "$y = $y + len(torch.nonzero($x > 100))",
    "while": "while $x.abs().amax() > 1:\n    $x = $x / 2",
    "numpy": "$y = $y + torch.from_numpy(0.5 * $x.detach().numpy())",
    "isnan": "if torch.isnan($x).any():\n    $x = torch.zeros_like($x)",
    "allclose": "if torch.equal($x, $y):\n    $x = $x + 1",
})  # fmt: skip
kinds("random", {
    "randn": "$x = $x + 0.3 * torch.randn($pc)",
    "randn_like": "$x = $x + 0.3 * torch.randn_like($x)",
    "rand-training": "if self.training:\n    $x = $x + 0.3 * torch.rand($x.shape)",
    "rand_like": "$x = $x * (torch.rand_like($x) > 0.2)",
    "bernoulli": "$x = $x * torch.bernoulli(torch.full(($x.shape[0],) + (1,) * ($x.dim() - 1), 0.7))",
    "bernoulli_": "$x = $x * $x.new_empty($x.shape[0], *[1] * ($x.dim() - 1)).bernoulli_(0.7)",
    "uniform_": "$x = $x + torch.empty($pc).uniform_(-0.3, 0.3)",
    "normal": "$x = $x + torch.normal(0.0, 0.3, ($pc,))",
    "randperm": "$x = $x[:, torch.randperm($x.shape[1])]",
    "randint": "$x = $x.roll(int(torch.randint(0, 3, ())), 1)",
    "python": "if random.random() > 0.5:\n    $x = self.b($x)",
    "python-depth": "for layer in (self.a, self.b):\n    if not self.training or random.random() > 0.5:\n        $x = layer($x)",
    "choice": "$x = random.choice([self.a, self.b])($x)",
    "shuffle": "order = [self.a, self.b]\nrandom.shuffle(order)\nfor layer in order:\n    $x = layer($x)",
    "numpy": "$x = $x * (0.5 + np.random.rand())",
    "numpy-depth": "if self.training and np.random.uniform() < 0.5:\n    $x = self.c($x)",
    "torch-depth": "if not self.training or torch.rand(1).item() < 0.5:\n    $x = self.c($x)",
    "drop-path": "if self.training:\n    keep = 0.8 + torch.rand($x.shape[0], *[1] * ($x.dim() - 1))\n    $x = $x / 0.8 * keep.floor_()",
    "dropout": "$x = F.dropout($x, 0.3)",
    "dropout-training": "$x = F.dropout($x, 0.3, self.training)\n$x.relu_()",
    "rrelu": "$x = F.rrelu($x, training=self.training)",
    "gumbel": "$x = $x + 0.1 * F.gumbel_softmax($x, dim=-1)",
    "generator": "$x = $x + 0.3 * torch.randn($pc, generator=torch.Generator().manual_seed(3))",
    "distribution": "$x = $x + 0.3 * torch.distributions.Normal(0.0, 1.0).sample(($pc,))",
    "multinomial": "$x = $x[:, torch.multinomial(torch.ones($x.shape[1]), $x.shape[1])]",
    "normal_": "noise = torch.zeros_like($x)\nnoise.normal_(0, 0.3)\n$x += noise",
})  # fmt: skip
kinds("mode", {
    "branch": "if self.training:\n    $x = $x * 0.5 + 0.1",
    "branch-not": "if not self.training:\n    $x = torch.relu($x)",
    "expression": "$x = $x * (0.5 if self.training else 2.0)",
    "layer": "$x = self.b($x) if self.training else self.c($x)",
    "write": "if self.training:\n    $x *= 0.5\nelse:\n    $x += 0.5",
    "number": "$x = F.dropout($x, 0.2 if self.training else 0.1, True)",
    "of-a-layer": "if self.a.training:\n    $x = $x * 0.5",
    "loop": "for _ in range(1 if self.training else 2):\n    $x = self.b($x)",
    "batch-norm": "$x = F.batch_norm($x.transpose(1, $ch), None, None, training=True).transpose(1, $ch)",
})  # fmt: skip

COUNT = 'self.register_buffer("count$i", torch.tensor(0))'
MEAN = 'self.register_buffer("mean$i", torch.full((8,), 0.3))'
kinds("buffer", {"count": "self.count$i += 1\n$x = $x + 0.1 * self.count$i"}, COUNT)
kinds("buffer", {
    "read": "$x = $x + self.mean$i.view($pc)",
    "write": "self.mean$i.mul_(0.5).add_(0.5 * $x.detach().mean())\n$x = $x - self.mean$i.view($pc)",
    "assign": "self.mean$i = 0.5 * self.mean$i + 0.5 * $x.detach().mean()\n$x = $x - self.mean$i.view($pc)",
    "write-training": "if self.training:\n    with torch.no_grad():\n        self.mean$i.lerp_($x.mean(), 0.1)\n$x = $x - self.mean$i.view($pc)",
    "view": "m = self.mean$i[:4]\n$x[:, :4] += m.mean()",
    "view-write": "m = self.mean$i[:4]\nm += 0.1\n$x = $x - self.mean$i.view($pc)",
}, MEAN)  # fmt: skip
kinds("buffer", {"not-saved": "$x = $x * self.fixed$i"}, 'self.register_buffer("fixed$i", torch.tensor(0.5), persistent=False)')
kinds("attribute", {"tensor": "$x = $x + self.constant$i"}, "self.constant$i = torch.full((1,), 0.3)")
kinds("attribute", {
    "stored": "self.last$i = $x\n$y = $y + 0.5 * self.last$i",
    "stored-written": "self.last$i = $x\nself.last$i.relu_()",
    "number": "self.size$i = $x.shape[-1]\n$x = $x / self.size$i",
})  # fmt: skip
kinds("attribute", {"counted": "self.calls$i += 1\n$x = $x * (0.5 if self.calls$i else 1)"}, "self.calls$i = 0")
kinds("attribute", {"listed": "self.seen$i.append($x.shape[0])\n$x = $x * 0.5"}, "self.seen$i = []")
kinds("attribute", {"method-call": "$x = self.scale$i($x)"}, "self.scale$i = functools.partial(torch.mul, other=0.5)")
kinds("parameter", {"gamma": "$x = $x * self.gamma$i.view($pc)"}, "self.gamma$i = nn.Parameter(torch.rand(8))")
kinds("parameter", {"token": "$x = torch.cat([self.token$i.expand($x.shape[0], 1, $rest), $x[:, 1:]], 1)"}, "self.token$i = nn.Parameter(torch.rand(1, 1, $rest))")

kinds("context", {
    "no_grad": "with torch.no_grad():\n    $y = $y + self.b($x)",
    "no_grad-write": "with torch.no_grad():\n    $x.mul_(0.5)",
    "no_grad-branch": "with torch.set_grad_enabled(not self.training):\n    $x = $x * 0.5",
    "enable_grad": "with torch.enable_grad():\n    $x = self.b($x)",
    "autocast-off": 'with torch.autocast("cpu", enabled=False):\n    $x = self.b($x.float())',
    "record": 'with torch.profiler.record_function("part"):\n    $x = self.b($x)',
    "null": "with contextlib.nullcontext():\n    $x = self.b($x)",
})  # fmt: skip
kinds("context", {"autocast": 'with torch.autocast("cpu", torch.bfloat16):\n    $x = self.b($x).float()'}, same=25.0)
kinds("checkpoint", {
    "layer": "$x = checkpoint(self.b, $x, use_reentrant=False)",
    "function": "$x = checkpoint(lambda t: torch.relu(self.b(t)), $x, use_reentrant=False)",
    "training": "if self.training:\n    $x = checkpoint(self.c, $x, use_reentrant=False)\nelse:\n    $x = self.c($x)",
    "reentrant": "$x = checkpoint(self.c, $x, use_reentrant=True)",
})  # fmt: skip
kinds("checkpoint", {"dropout": "$x = checkpoint(self.inner$i, $x, use_reentrant=False)"}, "self.inner$i = nn.Sequential($layer, nn.ReLU(), nn.Dropout(0.2))")
kinds("checkpoint", {"sequential": "$x = checkpoint_sequential(self.inner$i, 2, $x, use_reentrant=False)"}, "self.inner$i = nn.Sequential($layer, nn.ReLU(), $layer)")

LIST = "self.layers$i = nn.ModuleList($layer for _ in range(2))"
kinds("layers", {
    "loop": "for layer in self.layers$i:\n    $x = $x + layer(torch.relu($x))",
    "loop-write": "for layer in self.layers$i:\n    $x += layer($x)",
    "reversed": "for layer in reversed(self.layers$i):\n    $x = layer($x)",
    "indexed": "$x = self.layers$i[-1]($x)",
    "results": "results = [layer($x) for layer in self.layers$i]\n$x = torch.stack(results).sum(0)",
    "reduce": "$x = functools.reduce(lambda t, layer: layer(t), self.layers$i, $x)",
    "sum": "$x = sum(layer($x) for layer in self.layers$i)",
    "zip": "$x = torch.cat([layer($x)[:, :3] for layer in self.layers$i] + [$x[:, 6:]], 1)",
}, LIST)  # fmt: skip
kinds("layers", {"dict": "for name, layer in self.table$i.items():\n    $x = $x + layer($x) if name == 'one' else layer($x)"}, "self.table$i = nn.ModuleDict({'one': $layer, 'two': $layer})")
kinds("layers", {"slice": "$x = self.inner$i[:2]($x)", "slice-loop": "for layer in self.inner$i[1:]:\n    $x = layer($x)"}, "self.inner$i = nn.Sequential($layer, nn.ReLU(), $layer)")
kinds("layers", {"getattr": "for i in range(2):\n    $x = getattr(self, f'step{i}_$i')($x)"}, "self.step0_$i, self.step1_$i = $layer, $layer")
kinds("layers", {
    "shared": "$x = self.b(torch.relu(self.b($x)))",
    "twice": "$x = self.c($x) + self.c($y)",
    "weight-read": "$x = $x * self.a.weight.norm() / 10",
    "bias-read": "$x = $x + self.a.bias.view($pc)",
    "weight-dtype": "$x = $x.to(self.a.weight.dtype)",
    "weight-device": "$x = $x.to(self.a.weight.device) + torch.ones(1, device=next(self.parameters()).device)",
    "parameters": "$x = $x + sum(p.sum() for p in self.c.parameters()) / 100",
    "no-layer": "$x = torch.relu($x)",
    "forward": "$x = self.b.forward($x)",
    "keyword": "$x = self.b(input=$x)",
    "frozen": "$x = self.b($x.detach())",
})  # fmt: skip
kinds("layers", {"in_channels": "$x = $x * self.a.in_channels / 16"}, domains="images")
kinds("layers", {"in_features": "$x = $x * self.a.in_features / 16"}, domains="sequences")
kinds("layers", {"tied": "$x = self.tied$i(torch.relu($x))"}, "self.tied$i = $layer\nself.tied$i.weight = self.like$i.weight\n")
KINDS["layers-tied"] = Kind("$x = self.tied$i(torch.relu(self.first$i($x)))", "self.first$i, self.tied$i = $layer, $layer\nself.tied$i.weight = self.first$i.weight")
kinds("names", {"own": "$x = self.engine(torch.relu(self.meta($x))) + self.name($x)"}, "self.engine, self.meta, self.name = $layer, $layer, nn.ReLU()")
kinds("names", {"graph": "$x = self.graph(self.weight_quantizer($x))"}, "self.graph, self.weight_quantizer = $layer, nn.ReLU()")
kinds("names", {"attributes": "$x = $x * self.rectifier + self.plan['shift']"}, "self.rectifier, self.plan, self.leaves = 0.5, {'shift': 0.1}, []")
kinds("names", {"buffers": "$x = $x * self.code + self.kind"}, 'self.register_buffer("code", torch.tensor(0.5))\nself.register_buffer("kind", torch.tensor(0.1))')
kinds("submodule", {
    "pair": "$x, $y = self.pair$i($x)",
    "pair-scale": "$x, same = self.pair$i($x, 0.5)\nsame += 0.5",
    "pair-mask": "$x, _ = self.pair$i($x, mask=torch.sigmoid($y))",
    "pair-none": "$x = self.pair$i($x, mask=None)[0]",
}, "self.pair$i = Pair($layer)")  # fmt: skip
kinds("submodule", {
    "same": "u = self.same$i($x)\nu += 0.3",
    "same-ignored": "$y = self.same$i($x, None, 3)\n$y -= 0.3",
}, "self.same$i = Same()")  # fmt: skip
kinds("submodule", {"hook": "$x = self.hooked$i($x)"}, "self.hooked$i = $layer\nself.hooked$i.register_forward_hook(lambda m, args, out: 0.5 * out)")
kinds("submodule", {"hook-write": "$x = self.hooked$i($x)"}, "self.hooked$i = $layer\nself.hooked$i.register_forward_hook(lambda m, args, out: out.relu_())")
kinds("submodule", {"pre-hook": "$x = self.hooked$i(torch.relu($x))"}, "self.hooked$i = $layer\nself.hooked$i.register_forward_pre_hook(lambda m, args: (args[0] - 0.2,))")
kinds("submodule", {"weight-norm": "$x = self.normed$i($x)"}, "self.normed$i = nn.utils.parametrizations.weight_norm($layer)")
kinds("submodule", {"spectral-norm": "$x = self.normed$i($x)"}, "self.normed$i = nn.utils.parametrizations.spectral_norm($layer)")
kinds("function", {
    "autograd": "$x = Doubled.apply($x)",
    "straight-through": "$x = $x + ($x.clamp(-0.5, 0.5) - $x).detach()",
    "gradient-hook": "if $x.requires_grad:\n    $x = $x * 1\n    $x.register_hook(lambda grad: 2 * grad)",
    "partial": "$x = functools.partial(torch.add, alpha=0.5)($x, $y)",
    "lambda": "f = lambda t: torch.relu(self.b(t))\n$x = f(f($x))",
    "nested": "def step(t, by=0.5):\n    t = t * by\n    return t + 1\n$x = step($x)",
    "nested-write": "def step(t):\n    t += 1\n    return t[:, :4]\nstep($x).mul_(0.5)",
    "nonlocal": "total = []\ndef keep(t):\n    total.append(t)\n    return t\nkeep($x).add_(0.4)\n$y = $y + total[0]",
    "linear-same": "$x = F.linear($x.movedim($ch, -1), torch.eye(8)).movedim(-1, $ch)",
    "map": "$x, $y = map(torch.tanh, ($x, $y))",
    "kwargs": "options = dict(min=-0.5, max=1.0)\n$x = torch.clamp($x, **options)",
    "dict": "state = {'x': $x, 'y': $y}\nstate['x'] += 0.5\nstate.update(y=state['y'] * 0.5)\n$y = state['y']",
    "walrus": "if (t := $x.shape[1]) > 2:\n    $x = $x / t",
    "vmap": "$x = torch.vmap(lambda t: 0.5 * t)($x)",
})  # fmt: skip

WEIGHT = {"images": "8, 8, 3, 3", "sequences": "8, 8"}
kinds("functional", {
    "conv": "$x = F.conv2d($x, self.w$i, padding=1)",
    "standardized": "$x = F.conv2d($x, standardize(self.w$i) / 8, padding=1)",
    "transposed": "$x = F.conv_transpose2d($x, self.w$i, padding=1)",
    "conv-borrowed": "$x = F.conv2d($x, self.a.weight, self.a.bias)",
    "conv-borrowed-computed": "$x = F.conv2d($x, 0.5 * self.b.weight, padding=1)",
    "weight-written": "w = self.w$i * 1.0\nw[:, 0] = 0\n$x = F.conv2d($x, w, padding=1)",
}, "self.w$i = nn.Parameter(torch.randn(8, 8, 3, 3) / 8)", "images")  # fmt: skip
kinds("functional", {
    "linear": "$x = F.linear($x, self.w$i)",
    "matmul": "$x = $x @ self.w$i",
    "matmul-T": "$x = torch.matmul($x, self.w$i.T)",
    "imatmul": "$x @= self.w$i",
    "addmm": "$x = torch.addmm(self.v$i, $x.reshape(-1, 8), self.w$i).view($x.shape)",
    "einsum": "$x = torch.einsum('ntc,cd->ntd', $x, self.w$i)",
    "bmm": "$x = torch.bmm($x, self.w$i.expand($x.shape[0], -1, -1))",
    "linear-tied": "$x = F.linear(torch.relu($x), self.a.weight)",
    "linear-tied-T": "$x = F.linear(torch.relu($x), self.a.weight.t())",
    "linear-computed": "$x = F.linear($x, torch.tanh(self.w$i), self.v$i)",
}, "self.w$i = nn.Parameter(torch.randn(8, 8) / 3)\nself.v$i = nn.Parameter(torch.randn(8))", "sequences")  # fmt: skip
kinds("norm", {"functional": "$x = self.norm$i(self.b($x))"}, "self.norm$i = Norm(8)\nself.norm$i.running_var.uniform_(0.5, 2)", "images")
kinds("norm", {
    "batch": "$x = self.norm$i(self.b($x))",
    "batch-relu_": "$x = self.norm$i($x)\n$x.relu_()",
    "batch-twice": "$x = self.norm$i(self.norm$i($x))",
}, "self.norm$i = nn.BatchNorm2d(8)\nself.norm$i.running_var.uniform_(0.5, 2)\nself.norm$i.running_mean.normal_()", "images")  # fmt: skip
kinds("norm", {"cumulative": "$x = self.norm$i($x)"}, "self.norm$i = nn.BatchNorm2d(8, momentum=None)", "images")
kinds("norm", {"group": "$x = self.norm$i($x)"}, "self.norm$i = nn.GroupNorm(2, 8)", "images")
kinds("norm", {"layer": "$x = self.norm$i($x)"}, "self.norm$i = nn.LayerNorm(8)", "sequences")
kinds("norm", {"own": "$x = $x / ($x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()"})
kinds("attention", {"torch": "$x = $x + self.attend$i($x, $x, $x, need_weights=False)[0]"}, "self.attend$i = nn.MultiheadAttention(8, 2, batch_first=True)", "sequences")
kinds("attention", {
    "sdpa": "$x = F.scaled_dot_product_attention(self.a($x), self.b($x), $y, is_causal=True)",
    "softmax": "w = (self.a($x) @ self.b($x).mT) / math.sqrt(8)\nw = w.masked_fill(torch.ones(w.shape[-2:]).triu(1) > 0, -1e4)\n$x = w.softmax(-1) @ $y",
    "softmax-write": "w = self.a($x) @ self.b($x).mT\nw /= math.sqrt(8)\nw.masked_fill_(torch.ones(w.shape[-1], w.shape[-1]).triu_(1).bool(), -1e4)\n$x = w.softmax(-1) @ $y",
    "qkv": "q, k, v = torch.cat([self.a($x), $x, $y], -1).chunk(3, dim=-1)\nq *= 0.5\n$x = F.scaled_dot_product_attention(q, k, v)",
    "heads": "n, t, c = $x.shape\nq = self.a($x).view(n, t, 2, 4).transpose(1, 2)\n$x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(n, t, c)",
}, domains="sequences")  # fmt: skip
kinds("attention", {"tokens": "t = $x.flatten(2).mT\nt = self.mix$i(t)\nt.relu_()\n$x = t.mT.unflatten(2, (6, 6))"}, "self.mix$i = nn.Linear(8, 8)", "images")
kinds("recurrent", {
    "loop": "h = $x.new_zeros($x.shape[0], 8)\nfor t in range($x.shape[1]):\n    h = torch.tanh(self.a($x[:, t]) + self.b(h))\n$x = $x + h[:, None]",
    "loop-write": "h = torch.zeros($x.shape[0], 8)\nfor t in range($x.shape[1]):\n    h += 0.1 * self.a($x[:, t])\n    $x[:, t] = h",
}, domains="sequences")  # fmt: skip

SMOOTH = {  # pure functions that keep the shape, for what is said of signs and ranges
    "relu": "torch.relu($x)", "relu6": "F.relu6(3 * $x)", "sigmoid": "torch.sigmoid($x)", "gelu": "F.gelu($x)",
    "elu": "F.elu($x)", "softplus": "F.softplus($x)", "hardswish": "F.hardswish($x)", "hardsigmoid": "F.hardsigmoid($x)",
    "silu": "F.silu($x)", "mish": "F.mish($x)", "celu": "F.celu($x)", "selu": "F.selu($x)", "tanhshrink": "F.tanhshrink($x)",
    "softsign": "F.softsign($x)", "softmax": "F.softmax($x, -1)", "log_softmax": "F.log_softmax($x, -1)", "cos": "torch.cos($x)",
    "abs": "$x.abs()", "square": "$x.square()", "pow2": "$x ** 2", "pow3": "0.3 * $x ** 3", "pow-half": "($x.abs() + 0.1) ** 0.5",
    "exp": "torch.exp(-$x.abs())", "sqrt": "torch.sqrt($x.abs() + 0.1)", "log1p": "torch.log1p($x.abs())",
    "rsub": "1 - torch.sigmoid($x)", "minus-one": "torch.relu($x) - 1", "minus-max": "$x - $x.amax()", "neg": "-torch.relu($x)",
    "clamp0": "$x.clamp(min=0)", "clamp-max": "$x.clamp(max=0.2)", "clamp-min": "$x.clamp_min(-0.2)", "clamp-range": "$x.clamp(0.1, 0.9)",
    "threshold": "F.threshold($x, 0.1, 0.1)", "threshold-negative": "F.threshold($x, -0.1, -0.1)", "hardtanh": "F.hardtanh($x, 0.1, 2)",
    "maximum": "torch.maximum($x, $y)", "maximum-0": "torch.maximum($x, torch.zeros(()))", "minimum": "torch.minimum(torch.relu($x), $y)",
    "where": "torch.where($x > 0, $x, 0.1 * $y)", "where-relu": "torch.where($y > 0, torch.relu($x), 0 * $x)",
    "cat": "torch.cat([torch.relu($x)[:, :4], $y[:, 4:]], 1)", "flip": "$x.flip(1)", "roll": "$x.roll(1, -1)",
    "index": "$x[:, [1, 0] * ($x.shape[1] // 2)]", "index_select": "$x.index_select(1, torch.arange($x.shape[1]).flip(0))",
    "gather": "$x.gather(1, torch.zeros_like($x).long())", "repeat": "torch.relu($x).repeat_interleave(2, 1)[:, ::2]",
    "sort": "$x.sort(1).values", "max-named": "$x + $x.max(1, keepdim=True)[0]", "cumsum": "0.3 * $x.cumsum(1)",
    "mean": "$x - $x.mean(1, keepdim=True)", "mean-function": "$x + torch.mean($x, dim=(1, 2), keepdim=True)", "norm": "$x / (1 + $x.norm())",
    "normalize": "F.normalize($x, dim=1)", "var": "$x / (0.1 + $x.var(1, keepdim=True))", "lerp": "torch.lerp($x, $y, 0.3)",
    "addcmul": "torch.addcmul($x, $y, $z, value=0.1)", "product": "torch.relu($x) * torch.sigmoid($y)", "product-signs": "torch.relu($x) * torch.tanh($y)",
    "layer_norm": "F.layer_norm($x, $x.shape[-1:])", "glu": "F.glu(torch.cat([$x, $y], 1), 1)", "prelu": "F.prelu($x, torch.tensor(-0.3))",
    "sum-relus": "torch.relu($x) + F.relu6($y)", "difference": "torch.relu($x) - torch.relu($y)", "double": "$x.double().mul(0.5).float()",
    "bfloat16": "$x.bfloat16().float()", "nan_to_num": "torch.nan_to_num($x)", "stack": "torch.stack([$x, $y]).amax(0)",
}  # fmt: skip
IMAGE = {
    "max_pool": "F.max_pool2d($x, 3, 1, 1)", "avg_pool": "F.avg_pool2d($x, 3, 1, 1)", "lp_pool": "F.interpolate(F.lp_pool2d(torch.relu($x) + 0.1, 2, 2), scale_factor=2)",
    "pad-zero": "F.pad($x, (1, 0, 1, 0))[..., :-1, :-1]", "pad-value": "F.pad(torch.relu($x), (1, 0), value=-1.0)[..., :-1]",
    "pad-reflect": "F.pad(torch.relu($x), (1, 1, 1, 1), 'reflect')[..., 1:7, 2:]", "pad-replicate": "F.pad($x, (1, 1, 0, 0), 'replicate')[..., 2:]",
    "pad-circular": "F.pad($x, (1, 1, 0, 0), 'circular')[..., 2:]", "nearest": "F.max_pool2d(F.interpolate($x, scale_factor=2), 2)",
    "bilinear": "F.avg_pool2d(F.interpolate(torch.relu($x), scale_factor=2, mode='bilinear'), 2)",
    "bicubic": "F.interpolate(torch.relu($x), scale_factor=2, mode='bicubic')[..., ::2, ::2]", "adaptive": "$x + F.adaptive_avg_pool2d($x, 1)",
    "adaptive-max": "$x * torch.sigmoid(F.adaptive_max_pool2d($x, 1))", "pixel": "F.pixel_shuffle(F.pixel_unshuffle($x, 2), 2)",
    "shuffle": "$x.view($x.shape[0], 2, 4, 6, 6).transpose(1, 2).reshape($x.shape)", "shuffle-module": "F.channel_shuffle($x, 2)",
    "instance": "F.instance_norm($x)", "unfold": "F.fold(F.unfold($x, 3, padding=1), (6, 6), 3, padding=1) / 9",
    "excite": "$x * torch.sigmoid(self.a($x.mean((2, 3), keepdim=True)))", "mean-23": "$x * $x.mean((-2, -1), keepdim=True)",
    "grid": "F.grid_sample($x, F.affine_grid(torch.eye(2, 3).expand($x.shape[0], 2, 3), $x.shape, align_corners=False), align_corners=False)",
}  # fmt: skip
kinds("pure", {name: f"$y = {expression}\n$x = self.b($y)" for name, expression in SMOOTH.items()})
kinds("pure", {name: f"$y = {expression}\n$x = self.b($y)" for name, expression in IMAGE.items()}, domains="images")
kinds("input", {
    "write": "inputs *= 0.5\n$x = $x + inputs",
    "write-view": "t = inputs[:, :4]\nt.relu_()\n$x = $x + inputs",
    "write-data": "inputs.data.clamp_(-1, 1)\n$x = $x + inputs",
    "setitem": "inputs[:, 0] = 0\n$x = $x + inputs",
    "read": "$x = $x + inputs",
    "alias": "$x = $x + self.same(inputs)",
}, VIEW_INIT)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Signature:
    parameters: str
    body: str = ""
    call: str = "plain"  # how the network is called; see `Program.inputs`
    may_refuse: bool = False


MASKED = "if mask is None:\n    inputs = inputs * 0.5\nelse:\n    inputs = inputs * mask"
SIGNATURES = {
    "plain": Signature("inputs"),
    "optional": Signature("inputs, mask=None", MASKED),
    "optional-passed": Signature("inputs, mask=None", MASKED, "positional"),
    "optional-keyword": Signature("inputs, mask=None", MASKED, "keyword"),
    "number": Signature("inputs, scale=0.5, shift=0", "inputs = inputs * scale + shift"),
    "number-or": Signature("inputs, scale=None", "scale = scale or 0.5\ninputs = inputs * scale"),
    "flag": Signature("inputs, negate=True, unused=False", "if negate and not unused:\n    inputs = -inputs"),
    "keyword-only": Signature("inputs, *, scale=0.5", "inputs = inputs * scale"),
    "text": Signature('inputs, how="half"', 'inputs = inputs * {"half": 0.5, "none": 1}[how]'),
    "tuple": Signature("inputs, scales=(0.5, 0.7)", "for scale in scales:\n    inputs = inputs * scale"),
    "args": Signature("inputs, *rest", "for more in rest:\n    inputs = inputs + more"),
    "args-passed": Signature("inputs, *rest", "for more in rest:\n    inputs = inputs * more", "positional"),
    "kwargs": Signature("inputs, **options", 'inputs = inputs * options.get("scale", 0.5)'),
    "kwargs-passed": Signature("inputs, **options", 'inputs = inputs * options.get("mask", 0.5)', "keyword"),
    "two": Signature("inputs, mask", "inputs = inputs * mask", "positional"),
    "two-keyword": Signature("inputs, mask", "inputs = inputs * mask", "keyword"),
    "all-optional": Signature(
        "inputs=None, embedded=None, mask=None",
        'if (inputs is None) == (embedded is None):\n    raise ValueError("either or")\n' + MASKED, "keyword",
    ),
    "dict": Signature("batch", 'inputs = batch["image"] * batch.get("mask", 0.5)', "dict", may_refuse=True),
    "pair": Signature("pair", "inputs, mask = pair\ninputs = inputs * mask", "pair", may_refuse=True),
}  # fmt: skip
OUTPUTS = {
    "tensor": "return out",
    "tuple": "return out, x",
    "list": "return [out, x]",
    "dict": "return {'out': out, 'x': x}",
    "nested": "return {'out': (out, [x, None]), 'number': 3, 'text': 'a'}",
    "ordered": "return collections.OrderedDict(out=out, x=x)",
    "named": "return Result(out, x)",
    "dataclass": "return Output(out, more=x)",
    "twice": "return out, out",
    "views": "return out[:, :4], out[:, 4:]",
    "chunks": "return out.chunk(2, 1)",
    "mode": "return (out, x) if self.training else out",
    "early": "if self.training:\n    return {'out': out, 'x': x}\nreturn out",
    "pooled": "return out.flatten(1).mean(1)",
    "shape": "return out, out.shape[1:]",
    "detached": "return out, x.detach()",
    "inputs": "return out, inputs",
    "written": "out += 1\nreturn out, x.clamp_(min=0)",
    "built": "result = {}\nresult['out'] = out\nresult['more'] = [x]\nresult['more'].append(y)\nreturn result",
}
PLACES = ("inline", "inline", "inline", "method", "function", "submodule", "submodule")


@dataclasses.dataclass(frozen=True)
class Statement:
    kind: str
    init: str
    body: str
    place: str = "inline"


@dataclasses.dataclass(frozen=True)
class Program:
    """A network; `source` is all of it."""

    seed: int
    domain: str
    statements: tuple[Statement, ...]
    signature: str = "plain"
    output: str = "tensor"
    with_example: bool = False  # whether `quantize` gets example inputs

    @property
    def kinds(self) -> set[str]:
        header = {f"forward-{self.signature}", f"output-{self.output}"} - {"forward-plain", "output-tensor"}
        return {statement.kind for statement in self.statements} | header

    @property
    def may_refuse(self) -> bool:
        return SIGNATURES[self.signature].may_refuse or any(KINDS[s.kind].may_refuse for s in self.statements)

    @property
    def same(self) -> float:
        """By how much, in dB, the network may differ with its quantizers off."""
        return min((KINDS[s.kind].same for s in self.statements), default=SAME)

    def source(self) -> str:
        signature, outside, methods, inits, lines = SIGNATURES[self.signature], [], [], [], []
        lines += [*signature.body.splitlines(), "x = self.a(inputs)", "y = torch.relu(self.b(x))", "z = x", "u = y"]
        for i, s in enumerate(self.statements):
            body = s.body.splitlines()
            if s.place == "inline" or "inputs" in s.body:
                lines += body
                inits += s.init.splitlines()
                continue
            body.append("return x, y, z, u")
            if s.place == "submodule":
                outside += self._module(f"Part{i}", s.init.splitlines(), [("forward", "x, y, z, u", body)])
                inits.append(f"self.part{i} = Part{i}()")
                lines.append(f"x, y, z, u = self.part{i}(x, y, z, u)")
            else:
                inits += s.init.splitlines()
                if s.place == "method":
                    methods.append((f"part{i}", "x, y, z, u", body))
                    lines.append(f"x, y, z, u = self.part{i}(x, y, z, u)")
                else:
                    outside += [f"def part{i}(self, x, y, z, u):", *(f"    {line}" for line in body), "", ""]
                    lines.append(f"x, y, z, u = part{i}(self, x, y, z, u)")
        lines += ["out = self.c(torch.relu(x)) + self.d(y) + z", *OUTPUTS[self.output].splitlines()]
        net = self._module("Net", inits, [*methods, ("forward", signature.parameters, lines)])
        return "\n".join([*outside, *net])

    def _module(self, name: str, init: list[str], methods: list[tuple[str, str, list[str]]]) -> list[str]:
        """A class with the methods (name, parameters, body) and the layers that they and the functions read."""
        text = "\n".join([*init, *(line for _, _, body in methods for line in body)])
        read = set(re.findall(r"self\.([abcd])\b", text))
        if name == "Net":  # functions beside the class read its layers too
            functions = [s.body for s in self.statements if s.place == "function"]
            read |= set("abcd") & set(re.findall(r"self\.([abcd])\b", "\n".join(functions)))
        layers = [f"self.{key} = {made}" for key, made in DOMAINS[self.domain].layers.items() if key in read]
        unique = list(dict.fromkeys([*layers, *init])) or ["pass"]
        lines = [f"class {name}(nn.Module):", "    def __init__(self):", "        super().__init__()"]
        lines += [f"        {line}" for line in unique]
        for method, parameters, body in methods:
            lines += [f"    def {method}(self, {parameters}):", *(f"        {line}" for line in body)]
        return [*lines, "", ""]

    def build(self) -> nn.Module:
        """The network in evaluation mode; `inspect` finds its source."""
        source, file = f"{HEADER}\n\n{self.source()}", f"random_network_{self.seed}.py"
        linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
        names = {"__name__": "random_network"}
        exec(compile(source, file, "exec"), names)
        torch.manual_seed(self.seed)
        return names["Net"]().eval()

    def inputs(self, batch: int) -> object:
        """A batch as `calibrate` takes it: a tensor, positional arguments or keyword arguments."""
        generator = torch.Generator().manual_seed(self.seed + batch)
        x = torch.randn(batch, *DOMAINS[self.domain].shape, generator=generator)
        mask = torch.rand(batch, *DOMAINS[self.domain].shape, generator=generator)
        return {
            "plain": x,
            "positional": (x, mask),
            "keyword": {"inputs": x, "mask": mask},
            "dict": ({"image": x, "mask": mask},),
            "pair": ((x, mask),),
        }[SIGNATURES[self.signature].call]


def statement(rng: random.Random, kind: str, domain: str, index: int, place: str = "inline") -> Statement:
    x, y, z = rng.sample("xyz", 3)
    words = DOMAINS[domain].words | {"i": str(index), "x": x, "y": y, "z": z, "layer": DOMAINS[domain].layers["b"]}
    words["rest"] = words["tail"].partition(", ")[2]
    write = rng.choice(WRITES)
    words |= {f"write_{name}": string.Template(write).substitute(t=t) for name, t in (("u", "u"), ("x", x))}
    init, body = (string.Template(text).substitute(words) for text in (KINDS[kind].init, KINDS[kind].body))
    # Of modules that a table of kinds shares, the statement makes those that it reads.
    if KINDS[kind].init == VIEW_INIT:
        init = "\n".join(line for line in init.splitlines() if line.partition(" ")[0] in re.findall(r"self\.\w+", body))
    return Statement(kind, init, body, place)


def random_program(seed: int) -> Program:
    """Families of kinds are equally likely, so that the long lists of views and pure functions do not crowd out others."""
    rng = random.Random(seed)
    domain = rng.choice(list(DOMAINS))
    families = collections.defaultdict(list)
    for name, kind in KINDS.items():
        if domain in kind.domains:
            families[name.partition("-")[0]].append(name)
    weights = [3 if family.startswith("write") or family in ("setitem", "operator", "method") else 1 for family in families]
    statements = []
    for index in range(rng.randint(1, 6)):
        (family,) = rng.choices(list(families.values()), weights)
        statements.append(statement(rng, rng.choice(family), domain, index, rng.choice(PLACES)))
    plain = rng.random() < 0.5
    return Program(
        seed,
        domain,
        tuple(statements),
        "plain" if plain else rng.choice(list(SIGNATURES)),
        "tensor" if plain else rng.choice(list(OUTPUTS)),
        rng.random() < 0.5,
    )


def programs_of_one_kind() -> dict[str, list[Program]]:
    """For every kind, networks that differ from a plain one in it alone, by name."""
    programs: dict[str, list[Program]] = {}
    for name, kind in KINDS.items():
        for seed, domain in enumerate(kind.domains):
            for place in ("inline", "submodule"):
                line = statement(random.Random(f"{name} {place}"), name, domain, 0, place)
                programs.setdefault(name, []).append(Program(seed, domain, (line,), with_example=place == "submodule"))
    for name in SIGNATURES:
        programs[f"forward-{name}"] = [Program(0, "images", (), name, with_example=flag) for flag in (False, True)]
    for name in OUTPUTS:
        programs[f"output-{name}"] = [Program(0, "images", (), "plain", name, flag) for flag in (False, True)]
    return programs


# What is compared.


class EightBits(TorchFunctionMode):
    """Rounds what every product reads to 8 bits: what quantization costs a network that is computed as it is written."""

    products = {
        torch.conv2d, torch.conv_transpose2d, torch.nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm,
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.products:
            args = (*map(self.rounded, args[:2]), *args[2:])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        step = x.detach().abs().amax() / 127
        return torch.where(step > 0, (x / step).round() * step, x)


def bind(inputs: object) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def mapped(function: Callable, value: object) -> object:
    """`value` with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, mapped(function, item)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(function, item) for item in value)
    if dataclasses.is_dataclass(value):
        changed = {f.name: mapped(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def leaves(value: object, path: str = "result") -> Iterator[tuple[str, object]]:
    """(path, leaf) of everything that is no container."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def structure(value: object) -> object:
    """What a caller relies on: the containers, their keys, and shape and type of every leaf."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, [structure(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return "ordered" if isinstance(value, collections.OrderedDict) else "dict", [
            (key, structure(item)) for key, item in value.items()
        ]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__, [*map(structure, value)]
    if isinstance(value, (tuple, list)):
        return "tuple" if isinstance(value, tuple) else "list", [*map(structure, value)]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def decibels(expected: Tensor, got: Tensor) -> float:
    """The ratio of signal to noise."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return -math.inf
    if torch.equal(expected, got):
        return math.inf
    if not expected.is_floating_point():
        return -math.inf
    expected, got = expected.detach().double(), got.detach().double()
    signal, noise = expected.square().sum().item(), (expected - got).square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 and 0 < noise < math.inf else -math.inf


def ratios(expected: object, got: object) -> list[tuple[str, float]]:
    pairs = zip(leaves(expected), leaves(got), strict=True)
    return [(path, decibels(e, g)) for (path, e), (_, g) in pairs if isinstance(e, Tensor) and e.is_floating_point()]


def set_seeds(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


class Run:
    """What a call of a network gave, and left in its inputs."""

    def __init__(self, model: nn.Module, inputs: object, seed: int, gradients: str = ""):
        """`gradients`: "" for none, "parameters", or "inputs" for those as well."""
        inputs = mapped(lambda t: t.clone().requires_grad_(gradients == "inputs"), inputs)
        given = [t for _, t in leaves(bind(inputs)) if isinstance(t, Tensor)]
        args, kwargs = bind(inputs)
        set_seeds(seed)
        with torch.set_grad_enabled(bool(gradients)):
            results = model(*args, **kwargs)
            self.results = mapped(lambda t: t.detach().clone(), results)
            self.inputs = [t.detach().clone() for t in given]
            self.gradients: dict[str, Tensor | None] = {}
            if gradients:
                self._differentiate(model, results, given if gradients == "inputs" else [])
        self.state = copy.deepcopy(model.state_dict())
        # Random numbers drawn: what comes after the call depends on them.
        self.next_random = (torch.rand(()).item(), random.random(), float(np.random.rand()))

    def _differentiate(self, model: nn.Module, results: object, inputs: list[Tensor]) -> None:
        self.differentiable = [
            (path, leaf.requires_grad) for path, leaf in leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        model.zero_grad(set_to_none=True)
        loss = sum(
            (leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum()
            for _, leaf in leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad
        )  # fmt: skip
        if isinstance(loss, Tensor):
            loss.backward()
        named = [*model.named_parameters(), *((f"input {i}", t) for i, t in enumerate(inputs))]
        self.gradients = {name: t.grad for name, t in named}


@dataclasses.dataclass(frozen=True)
class Library:
    """What is tried: apotfx, or for a test of the test itself copies of the float network."""

    quantize: Callable
    calibrate: Callable
    without_quantizers: Callable
    export: Callable
    load: Callable


@contextlib.contextmanager
def without_quantizers(qmodel: nn.Module) -> Iterator[None]:
    """While active, the layers compute in float."""
    before = [(m, m.weight_quantizer, m.input_quantizer) for m in qmodel.modules() if isinstance(m, QuantLayer)]
    for layer, _, _ in before:
        layer.weight_quantizer = layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, layer.weight_quantizer, layer.input_quantizer in before:
            pass


POLICY = apotfx.BitPolicy((apotfx.Rule(scheme="uniform", weight_bits=8, activation_bits=8),))
APOTFX = Library(
    lambda model, **options: apotfx.quantize(model, POLICY, **options),
    lambda qmodel, inputs: apotfx.calibrate(qmodel, [inputs]),
    without_quantizers,
    apotfx.export_integer,
    apotfx.load_integer,
)
_exported: dict[Path, dict[str, Tensor]] = {}


def _load_copy(path: Path, model: nn.Module, backend: str, **options) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(_exported[path])
    return model


COPIES = Library(
    lambda model, **options: copy.deepcopy(model),
    lambda qmodel, inputs: qmodel,
    contextlib.nullcontext,
    lambda qmodel, path: _exported.__setitem__(path, copy.deepcopy(qmodel.state_dict())),
    _load_copy,
)


class Wrong(Exception):
    """(what was being done, what is wrong)."""


class Unsuited(Exception):
    """The float network itself raises, or is so sensitive that 8 bits say nothing."""


@dataclasses.dataclass
class Verdict:
    """What became of a program: "ok", "refused", "wrong" or "unsuited"."""

    what: str
    stage: str = ""
    reason: str = ""
    refusals: list[str] = dataclasses.field(default_factory=list)  # of parts, such as another batch size


def check(program: Program, library: Library = APOTFX) -> Verdict:
    examination = _Examination(program, library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            examination.run()
        except Unsuited as error:
            return Verdict("unsuited", *error.args)
        except Wrong as error:
            return Verdict("wrong", *error.args, examination.refusals)
        except apotfx.ApotfxError as error:
            return Verdict("refused", examination.stage, str(error))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            mine = [f for f in frames if f.filename != __file__] or frames
            where = f"{Path(mine[-1].filename).name}:{mine[-1].lineno}"
            message = " ".join(str(error).split())
            return Verdict("wrong", examination.stage, f"{type(error).__name__} in {where}: {message[:300]}", examination.refusals)
    return Verdict("ok", refusals=examination.refusals)


class _Examination:
    """Each of its steps raises Wrong; an error of the library is one of its own."""

    def __init__(self, program: Program, library: Library):
        self.program, self.library = program, library
        self.stage = "float"
        self.refusals: list[str] = []

    def run(self) -> None:
        program, library = self.program, self.library
        try:
            self.model = program.build()
        except Exception as error:
            raise Unsuited("build", f"{type(error).__name__}: {error}") from error
        self.x, self.other = program.inputs(4), program.inputs(3)
        before = copy.deepcopy(self.model.state_dict())
        self.expect()
        options = {"example_inputs": self.x} if program.with_example else {}

        self.stage = "quantize"
        qmodel = library.quantize(copy.deepcopy(self.model), **options)
        self.stage = "calibrate"
        set_seeds(1)
        qmodel = library.calibrate(qmodel, mapped(torch.clone, self.x))
        self.check_state("calibrate", qmodel, before)
        if any(module.training for module in qmodel.modules()):
            raise Wrong(self.stage, "the quantized network is in training mode")
        saved = copy.deepcopy(qmodel.state_dict())

        with library.without_quantizers(qmodel):
            for inputs, expected in ((self.x, self.expected), (self.other, self.expected_other)):
                self.stage = "quantizers off, other batch" if inputs is self.other else "quantizers off"
                qmodel.load_state_dict(saved)
                with self.refusable(inputs is self.other):
                    self.compare(expected, Run(qmodel, inputs, 5), program.same)
                    self.check_state(self.stage, qmodel, expected.state)
        self.stage = "8 bits"
        qmodel.load_state_dict(saved)
        self.compare(self.expected, Run(qmodel, self.x, 5), self.needed)
        qmodel.load_state_dict(saved)
        if self.trained is not None:
            self.check_training(qmodel, saved)
        qmodel.load_state_dict(saved)
        qmodel.eval()
        self.check_reload(qmodel, saved, options)
        if any(not torch.equal(t, before[key]) for key, t in self.model.state_dict().items()):
            raise Wrong("model", "the float model was changed")

    def expect(self) -> None:
        """What the float network gives; rejects those on which 8 bits say nothing."""
        try:
            self.expected = Run(copy.deepcopy(self.model), self.x, 5)
            self.expected_other = Run(copy.deepcopy(self.model), self.other, 5)
            with EightBits():
                rounded = Run(copy.deepcopy(self.model), self.x, 5)
        except Exception as error:
            raise Unsuited("float", f"{type(error).__name__}: {error}") from error
        floats = [t for _, t in leaves(self.expected.results) if isinstance(t, Tensor) and t.is_floating_point()]
        if not all(t.isfinite().all() for t in floats):
            raise Unsuited("float", "not finite")
        self.needed = {path: min(CLOSE, ratio - SLACK) for path, ratio in ratios(self.expected.results, rounded.results)}
        if min(self.needed.values()) < CLOSE - SLACK:
            raise Unsuited("float", f"{min(self.needed.values()) + SLACK:.1f} dB when it rounds to 8 bits itself")
        self.trained = None
        for self.gradients in ("inputs", "parameters"):
            model = copy.deepcopy(self.model).train()
            try:
                self.trained = Run(model, self.x, 6, self.gradients)
                with EightBits():
                    rounded = Run(copy.deepcopy(self.model).train(), self.x, 6)
                found = ratios(self.trained.results, rounded.results)
                self.needed_training = {path: min(15.0, ratio - SLACK) for path, ratio in found}
                break
            except RuntimeError:  # torch cannot differentiate what it writes in place
                self.trained = None

    def compare(self, expected: Run, got: Run, least: float | dict[str, float]) -> None:
        for kind, e, g in (("input", expected.inputs, got.inputs), ("result", expected.results, got.results)):
            if structure(e) != structure(g):
                raise Wrong(self.stage, f"the {kind} has another structure: {structure(g)}, expected {structure(e)}")
        for (path, e), (_, g) in zip(leaves(expected.inputs), leaves(got.inputs), strict=True):
            if decibels(e, g) < SAME:
                raise Wrong(self.stage, f"input: {decibels(e, g):.1f} dB from what the float network leaves in it")
        for path, ratio in ratios(expected.results, got.results):
            if not ratio >= (needed := least[path] if isinstance(least, dict) else least):
                raise Wrong(self.stage, f"{path}: {ratio:.1f} dB from the float network, needed {needed:.1f}")
        if expected.next_random != got.next_random:
            raise Wrong(self.stage, "draws other random numbers than the float network")

    def check_state(self, stage: str, qmodel: nn.Module, expected: dict[str, Tensor]) -> None:
        """The buffers are those of the float network; parameters too, but for attention, which is split."""
        state = qmodel.state_dict()
        for key, tensor in expected.items():
            if key not in state:
                if "attend" not in key:
                    raise Wrong(stage, f"state: {key} is missing")
            elif decibels(tensor, state[key]) < min(SAME, self.program.same):
                raise Wrong(stage, f"state: {key} is {decibels(tensor, state[key]):.1f} dB from that of the float network")

    def check_training(self, qmodel: nn.Module, saved: dict[str, Tensor]) -> None:
        qmodel.train()
        with self.library.without_quantizers(qmodel):
            self.stage = "training, quantizers off"
            run = Run(qmodel, self.x, 6, self.gradients)
            self.compare(self.trained, run, self.program.same)
            self.check_state(self.stage, qmodel, self.trained.state)
            if run.differentiable != self.trained.differentiable:
                raise Wrong(self.stage, f"gradients flow to {run.differentiable}, expected {self.trained.differentiable}")
            largest = max((g.norm().item() for g in self.trained.gradients.values() if g is not None), default=0.0)
            for name, expected in self.trained.gradients.items():
                if "attend" in name:
                    continue
                got = run.gradients[name]
                e, g = (torch.zeros(()) if t is None else t for t in (expected, got))
                if max(e.norm().item(), g.norm().item()) > 1e-4 * largest and decibels(e, g) < self.program.same - 10:
                    raise Wrong(self.stage, f"gradient of {name}: {decibels(e, g):.1f} dB from the float network")
        qmodel.load_state_dict(saved)
        self.stage = "training, 8 bits"
        run = Run(qmodel, self.x, 6, self.gradients)
        self.compare(self.trained, run, self.needed_training)
        for name, gradient in run.gradients.items():
            if gradient is not None and not gradient.isfinite().all():
                raise Wrong(self.stage, f"gradient of {name} is not finite")

    def check_reload(self, qmodel: nn.Module, saved: dict[str, Tensor], options: dict) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "export"
            self.stage = "export"
            self.library.export(qmodel, path)
            expected = {}
            for inputs in (self.x, self.other):
                qmodel.load_state_dict(saved)
                self.stage = "8 bits, other batch" if inputs is self.other else "8 bits"
                with self.refusable(inputs is self.other):
                    expected[id(inputs)] = Run(qmodel, inputs, 7)
            for backend in BACKENDS:
                self.stage = f"load {backend}"
                try:
                    imodel = self.library.load(path, self.model, backend=backend, **options)
                except apotfx.ApotfxError as error:
                    if backend == "reference":
                        raise
                    if not ("unknown" in str(error) and "backend" in str(error)):
                        self.refusals.append(f"{self.stage}: {error}")
                    continue
                state = copy.deepcopy(imodel.state_dict())
                for inputs in (self.x, self.other):
                    if id(inputs) not in expected:
                        continue
                    self.stage = f"{backend}, other batch" if inputs is self.other else backend
                    imodel.load_state_dict(state)
                    with self.refusable(inputs is self.other):
                        self.check_equal(expected[id(inputs)], Run(imodel, inputs, 7))

    def check_equal(self, expected: Run, got: Run) -> None:
        if structure(expected.results) != structure(got.results):
            raise Wrong(self.stage, f"{structure(got.results)}, the quantized network gives {structure(expected.results)}")
        pairs = zip(leaves([expected.results, expected.inputs]), leaves([got.results, got.inputs]), strict=True)
        for (path, e), (_, g) in pairs:
            if isinstance(e, Tensor) and not torch.equal(e, g):
                raise Wrong(self.stage, f"{decibels(e, g):.1f} dB from the quantized network instead of equal")

    @contextlib.contextmanager
    def refusable(self, allowed: bool) -> Iterator[None]:
        """While active, if `allowed`, an error of the library is noted and the rest goes on."""
        try:
            yield
        except apotfx.ApotfxError as error:
            if not allowed:
                raise
            self.refusals.append(f"{self.stage}: {error}")


def minimize(program: Program, verdict: Verdict, library: Library = APOTFX) -> tuple[Program, Verdict]:
    """A program with fewer parts that is wrong at the same stage."""

    def smaller() -> Iterator[Program]:
        for i in range(len(program.statements)):
            yield dataclasses.replace(program, statements=program.statements[:i] + program.statements[i + 1 :])
        for i, s in enumerate(program.statements):
            if s.place != "inline":
                changed = dataclasses.replace(s, place="inline")
                yield dataclasses.replace(program, statements=(*program.statements[:i], changed, *program.statements[i + 1 :]))
        for key, value in (("signature", "plain"), ("output", "tensor"), ("with_example", False)):
            if getattr(program, key) != value:
                yield dataclasses.replace(program, **{key: value})

    while True:
        for candidate in smaller():
            found = check(candidate, library)
            if found.what == verdict.what and found.stage == verdict.stage:
                program, verdict = candidate, found
                break
        else:
            return program, verdict


def report(program: Program, verdict: Verdict) -> str:
    options = ", with example_inputs" if program.with_example else ""
    return (
        f"{verdict.stage}: {verdict.reason}\n(seed {program.seed}, {program.domain}{options}, "
        f"kinds {', '.join(sorted(program.kinds)) or 'none'})\n\n{program.source()}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0, help="of the first network; the others have those that follow")
    parser.add_argument("--kind", help="try kinds whose name begins so, each alone, instead of random networks")
    parser.add_argument("--self-test", action="store_true", help="a copy of the float network is the quantized one")
    parser.add_argument("--whole", action="store_true", help="do not reduce what fails")
    args = parser.parse_args()
    library = COPIES if args.self_test else APOTFX
    if args.kind is not None:
        programs = [p for name, some in programs_of_one_kind().items() if name.startswith(args.kind) for p in some]
    else:
        programs = [random_program(seed) for seed in range(args.seed, args.seed + args.count)]
    verdicts = collections.Counter()
    failures, refusals = collections.defaultdict(list), collections.defaultdict(list)
    for program in programs:
        verdict = check(program, library)
        verdicts[verdict.what] += 1
        for refusal in verdict.refusals:
            refusals[refusal.partition(":")[0]].append((program, refusal))
        if verdict.what == "ok":
            continue
        if not args.whole and verdict.what != "unsuited":
            program, verdict = minimize(program, verdict, library)
        if verdict.what == "wrong":
            failures[", ".join(sorted(program.kinds)) or "nothing"].append((program, verdict))
        else:
            refusals[f"{verdict.what}, {verdict.stage}"].append((program, verdict.reason))
    for kind, found in sorted(failures.items(), key=lambda item: (-len(item[1]), item[0])):
        print(f"### {kind}: {len(found)}\n{report(*found[0])}")
    for where, found in sorted(refusals.items()):
        print(f"### {where}: {len(found)}")
        for program, reason in found[:8]:
            print(f"  seed {program.seed} ({', '.join(sorted(program.kinds))}): {reason.splitlines()[0][:200]}")
    print(f"{sum(verdicts.values())} networks: " + ", ".join(f"{n} {what}" for what, n in sorted(verdicts.items())))
    return min(1, len(failures))


if __name__ == "__main__":
    sys.exit(main())
