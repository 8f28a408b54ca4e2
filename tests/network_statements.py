"""What random networks are made of: statements as people write them, forms of forward's arguments and results."""

import dataclasses

SAME = 50.0  # dB; what float32 leaves of a network that is computed in another order

HEADER = '''\
import collections, contextlib, copy, dataclasses, functools, itertools, logging, math, operator, random, types
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


class Typed(nn.Module):
    """As in transformers: asks itself for its type and place."""
    def __init__(self, layer):
        super().__init__()
        self.layer, self.scale = layer, 0.5
    @property
    def dtype(self):
        return next(self.parameters()).dtype
    @property
    def device(self):
        return next(self.parameters()).device
    def is_batch(self, x):
        return isinstance(x, torch.Tensor) and len(self.layer.weight) == 8
    def forward(self, x):
        if not self.is_batch(x):
            raise ValueError(f"got {x}")
        x = x.to(self.device, self.dtype)
        return self.layer(x) * self.scale


class Routed(nn.Module):
    """A mixture of experts."""
    def __init__(self, *experts):
        super().__init__()
        self.experts, self.gate = nn.ModuleList(experts), nn.Linear(8, len(experts))
    def forward(self, x):
        flat = x.reshape(-1, 8)
        score, chosen = self.gate(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for i, expert in enumerate(self.experts):
            rows = torch.where(chosen == i)[0]
            if rows.numel():
                out.index_add_(0, rows, expert(flat[rows]) * score[rows, None])
        return out.view(x.shape)


class Growing(nn.Module):
    """A table that grows with its input, as those of rotary embeddings do."""
    def __init__(self, length=2):
        super().__init__()
        self.grow(length)
    def grow(self, length):
        self.length = length
        self.register_buffer("table", torch.cos(torch.arange(length * 1.0)), persistent=False)
    def forward(self, x):
        if x.shape[1] > self.length:
            self.grow(x.shape[1])
        return x * self.table[: x.shape[1]].view(1, -1, *[1] * (x.dim() - 2))


class Walked(nn.Module):
    """Looks at the layer that it calls, in a way that `look` says."""
    def __init__(self, layer, look):
        super().__init__()
        self.layer, self.look, self.held, self.call = layer, look, [layer], layer.forward
    def forward(self, x):
        if x.isnan().any():
            x = torch.zeros_like(x)
        return self.layer(torch.relu(x)) * self.look(self)


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
        {"perm": "0, 2, 3, 1", "ch": "1", "pc": "8, 1, 1", "sizes": "n, c, h, w", "rest": "6, 6"},
    ),
    "sequences": Domain(
        (6, 8),
        {
            "a": "nn.Linear(8, 8)",
            "b": "nn.Linear(8, 8)",
            "c": "nn.Linear(8, 8, bias=False)",
            "d": "nn.Linear(8, 8)",
        },
        {"perm": "0, 2, 1", "ch": "2", "pc": "8", "sizes": "n, t, c", "rest": "8"},
    ),
}


@dataclasses.dataclass(frozen=True)
class Kind:
    """A statement: $x, $y, $z stand for three different variables, $i for a number of its own."""

    body: str
    init: str = ""  # what the statement needs of the constructor
    domains: tuple[str, ...] = tuple(DOMAINS)
    may_refuse: bool = False  # whether an error that names it is right, too
    same: float = SAME  # what it leaves of the float network's result with the quantizers off, in dB


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
    "$t -= 1", "$t *= 0.5", "$t += 0.3", "$t.relu_()", "$t.clamp_(-0.2, 0.9)", "$t.mul_(-0.7)", "$t[:] = 0.25",
    "$t[0] = 0.1", "$t.copy_($t.flip(0))", "$t.masked_fill_($t < 0, 0.1)", "F.relu($t, inplace=True)",
    "$t = F.relu($t, inplace=True)", "self.act($t)", "torch.neg($t, out=$t)", "halve_($t)",
)  # fmt: skip
for name, view in VIEWS.items():
    kinds("write-view", {name: f"u = {view}\n$write_u"}, VIEW_INIT)
    kinds("write-base", {name: f"u = {view}\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"expand": "u = $x[:, :1].expand(-1, 3, $rest)\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"unfold": "u = $x.unfold(1, 3, 1)\n$write_x\n$y = $y + u.mean()"}, VIEW_INIT)
kinds("write-base", {"two-views": "u = $x[:, :4]\nv = $x[:, 2:6]\nu -= 1\nv *= 2\n$y = $y + u.mean()"})
kinds(
    "u",
    {
        "write": "$write_u",
        "read": "$x = $x + u.mean()",
        "max": "$x = $x + u.amax()",
        "view": "u = u[..., :2]\nu += 0.3",
    },
    VIEW_INIT,
)

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
    "contiguous": "if $x.is_contiguous():\n    $x = $x * 0.6",
    "scripting": "if not torch.jit.is_scripting() and not torch.jit.is_tracing():\n    $x = $x * 0.6",
    "compiling": "if torch.compiler.is_compiling():\n    $x = $x * 0.6",
    "try": "try:\n    $x = $x + torch.zeros(3, 5, 7)\nexcept RuntimeError:\n    $x = $x - 0.5",
    "callable": "if not callable($x):\n    $x = $x + 0.1",
    "is-same": "if $x is $y:\n    $x = $x + 1\nelse:\n    $x = $x - 0.5",
    "f-string": 'key = f"{$x.dtype}"\nif key == "torch.float32":\n    $x = $x * 0.6',
})  # fmt: skip
kinds("asks", {  # answered wrongly by a stand-in, which the self-check sees
    "class": "if $x.__class__ is torch.Tensor:\n    $x = $x * 0.5",
}, may_refuse=True)
kinds("asks", {
    "requires_grad": "if $x.requires_grad:\n    $x = $x * 0.6",
    "grad-enabled": "if torch.is_grad_enabled():\n    $x = $x * 0.6",
}, may_refuse=True)  # fmt: skip
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
kinds(
    "random",
    {
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
        "python-depth":
            "for layer in (self.a, self.b):\n    if not self.training or random.random() > 0.5:\n"
            "        $x = layer($x)",
        "choice": "$x = random.choice([self.a, self.b])($x)",
        "shuffle": "order = [self.a, self.b]\nrandom.shuffle(order)\nfor layer in order:\n    $x = layer($x)",
        "numpy": "$x = $x * (0.5 + np.random.rand())",
        "numpy-depth": "if self.training and np.random.uniform() < 0.5:\n    $x = self.c($x)",
        "torch-depth": "if not self.training or torch.rand(1).item() < 0.5:\n    $x = self.c($x)",
        "drop-path":
            "if self.training:\n    keep = 0.8 + torch.rand($x.shape[0], *[1] * ($x.dim() - 1))\n"
            "    $x = $x / 0.8 * keep.floor_()",
        "dropout": "$x = F.dropout($x, 0.3)",
        "dropout-training": "$x = F.dropout($x, 0.3, self.training)\n$x.relu_()",
        "rrelu": "$x = F.rrelu($x, training=self.training)",
        "gumbel": "$x = $x + 0.1 * F.gumbel_softmax($x, dim=-1)",
        "generator": "$x = $x + 0.3 * torch.randn($pc, generator=torch.Generator().manual_seed(3))",
        "distribution": "$x = $x + 0.3 * torch.distributions.Normal(0.0, 1.0).sample(($pc,))",
        "multinomial": "$x = $x[:, torch.multinomial(torch.ones($x.shape[1]), $x.shape[1])]",
        "normal_": "noise = torch.zeros_like($x)\nnoise.normal_(0, 0.3)\n$x += noise",
    },
)
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
kinds(
    "buffer",
    {
        "read": "$x = $x + self.mean$i.view($pc)",
        "write": "self.mean$i.mul_(0.5).add_(0.5 * $x.detach().mean())\n$x = $x - self.mean$i.view($pc)",
        "assign": "self.mean$i = 0.5 * self.mean$i + 0.5 * $x.detach().mean()\n$x = $x - self.mean$i.view($pc)",
        "write-training":
            "if self.training:\n    with torch.no_grad():\n        self.mean$i.lerp_($x.mean(), 0.1)\n"
            "$x = $x - self.mean$i.view($pc)",
        "view": "m = self.mean$i[:4]\n$x[:, :4] += m.mean()",
        "view-write": "m = self.mean$i[:4]\nm += 0.1\n$x = $x - self.mean$i.view($pc)",
    },
    MEAN,
)
kinds(
    "buffer",
    {"not-saved": "$x = $x * self.fixed$i"},
    'self.register_buffer("fixed$i", torch.tensor(0.5), persistent=False)',
)
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
kinds(
    "parameter",
    {"token": "$x = torch.cat([self.token$i.expand($x.shape[0], 1, $rest), $x[:, 1:]], 1)"},
    "self.token$i = nn.Parameter(torch.rand(1, 1, $rest))",
)

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
kinds(
    "checkpoint",
    {"dropout": "$x = checkpoint(self.inner$i, $x, use_reentrant=False)"},
    "self.inner$i = nn.Sequential($layer, nn.ReLU(), nn.Dropout(0.2))",
)
kinds(
    "checkpoint",
    {"sequential": "$x = checkpoint_sequential(self.inner$i, 2, $x, use_reentrant=False)"},
    "self.inner$i = nn.Sequential($layer, nn.ReLU(), $layer)",
)

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
kinds(
    "layers",
    {"dict": "for name, layer in self.table$i.items():\n    $x = $x + layer($x) if name == 'one' else layer($x)"},
    "self.table$i = nn.ModuleDict({'one': $layer, 'two': $layer})",
)
kinds(
    "layers",
    {
        "slice": "$x = self.inner$i[:2]($x)",
        "slice-loop": "for layer in self.inner$i[1:]:\n    $x = layer($x)",
    },
    "self.inner$i = nn.Sequential($layer, nn.ReLU(), $layer)",
)
kinds(
    "layers",
    {"getattr": "for i in range(2):\n    $x = getattr(self, f'step{i}_$i')($x)"},
    "self.step0_$i, self.step1_$i = $layer, $layer",
)
kinds("layers", {
    "shared": "$x = self.b(torch.relu(self.b($x)))",
    "twice": "$x = self.c($x) + self.c($y)",
    "weight-dtype": "$x = $x.to(self.a.weight.dtype)",
    "weight-device": "$x = $x.to(self.a.weight.device) + torch.ones(1, device=next(self.parameters()).device)",
    "no-layer": "$x = torch.relu($x)",
    "forward": "$x = self.b.forward($x)",
    "keyword": "$x = self.b(input=$x)",
    "frozen": "$x = self.b($x.detach())",
})  # fmt: skip
kinds("layers", {
    "weight-read": "$x = $x * self.a.weight.norm() / 10",
    "bias-read": "$x = $x + self.a.bias.view($pc)",
    "parameters": "$x = $x + sum(p.mean() for name, p in self.c.named_parameters() if name == 'weight')",
}, may_refuse=True)  # fmt: skip
kinds("layers", {"in_channels": "$x = $x * self.a.in_channels / 16"}, domains="images")
kinds("layers", {"in_features": "$x = $x * self.a.in_features / 16"}, domains="sequences")
kinds(
    "layers",
    {"tied": "$x = self.tied$i(torch.relu(self.first$i($x)))"},
    "self.first$i, self.tied$i = $layer, $layer\nself.tied$i.weight = self.first$i.weight",
)
kinds(
    "names",
    {"own": "$x = self.engine(torch.relu(self.meta($x))) + self.name($x)"},
    "self.engine, self.meta, self.name = $layer, $layer, nn.ReLU()",
)
kinds(
    "names",
    {"graph": "$x = self.graph(self.weight_quantizer($x))"},
    "self.graph, self.weight_quantizer = $layer, nn.ReLU()",
)
kinds(
    "names",
    {"attributes": "$x = $x * self.rectifier + self.plan['shift']"},
    "self.rectifier, self.plan, self.leaves = 0.5, {'shift': 0.1}, []",
)
kinds(
    "names",
    {"buffers": "$x = $x * self.code + self.kind"},
    'self.register_buffer("code", torch.tensor(0.5))\nself.register_buffer("kind", torch.tensor(0.1))',
)
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
LOOKS = {  # at the weights of a layer, by a module that no tracing enters: a factor
    "named": "1 + sum(p.mean() for _, p in m.layer.named_parameters())",
    "parameters": "1 + sum(p.abs().mean() for p in m.parameters())",
    "first": "next(m.parameters()).abs().mean() + 1",
    "bias": "[*m.layer.parameters()][-1].mean() + 1",
    "vector": "nn.utils.parameters_to_vector(m.parameters()).norm() / 4",
    "numel": "sum(p.numel() for p in m.parameters()) / 500",
    "trainable": "1 + len([p for p in m.parameters() if p.dim() > 1])",
    "state": "1 + m.layer.state_dict()['weight'].std()",
    "states": "1 + sum(t.float().mean() for t in m.state_dict().values())",
    "keys": "1 / len(m.state_dict())",
    "held": "1 + m.layer._parameters['weight'].mean()",
    "getattr": "1 + sum(getattr(m.layer, key).mean() for key in ('weight', 'bias') if hasattr(m.layer, key))",
    "get_parameter": "1 + m.get_parameter('layer.weight').norm()",
    "children": "1 + sum(c.weight.abs().amax() for c in m.children())",
    "modules": "1 + sum(c.weight.mean() for c in m.modules() if isinstance(c, (nn.Linear, nn.Conv2d)))",
    "num-modules": "1 / len(list(m.modules()))",
    "types": "1 / len({type(c).__mro__[-3] for c in m.children()})",
    "class": "0.5 if m.layer.__class__.__name__ in ('Linear', 'Conv2d') else 2.0",
    "is": "0.5 if isinstance(m.layer, (nn.Linear, nn.Conv2d)) else 2.0",
    "data": "1 + m.layer.weight.data.mean()",
    "detach": "1 + m.layer.weight.detach().flatten()[3]",
    "norm": "m.layer.weight.norm(dim=1).mean()",
    "requires_grad": "1 + m.layer.weight.clone().mean()",
    "numpy": "1 + float(m.layer.weight.detach().numpy().mean())",
    "item": "1 + m.layer.weight.flatten()[0].item()",
    "isfinite": "1.0 if m.layer.weight.isfinite().all() else 0.0",
    "sign": "(m.layer.weight > 0).float().mean()",
    "copy": "1 + copy.deepcopy(m.layer).weight.mean()",
    "apply": "(seen := [], m.apply(lambda c: seen.append(c.weight.mean() if hasattr(c, 'weight') else 1)), sum(seen))[2]",
    "settings": "0.1 * (getattr(m.layer, 'in_features', None) or m.layer.in_channels)",
    "repr": "1 / len(str(m.layer.extra_repr()))",
    "shape": "m.layer.weight.shape[0] / 16",
    "dtype": "torch.ones((), dtype=m.layer.weight.dtype, device=m.layer.weight.device)",
}
for name, look in LOOKS.items():
    kinds("look", {name: "$x = self.walked$i($x)"}, f"self.walked$i = Walked($layer, lambda m: {look})")
UNTRACED = "if $x.isnan().any():\n    $x = $y\n"
kinds("look", {name: UNTRACED + body for name, body in {
    "call-copy": "$x = copy.deepcopy(self.b)($x) + self.b($y)",
    "call-method": "$x = self.b.forward(input=$x)",
    "call-class": "$x = self.b.__call__($x) + nn.Module.__call__(self.c, $y)",
    "call-partial": "$x = functools.partial(self.b)($x)",
    "call-sequential": "$x = nn.Sequential(self.b, nn.ReLU())($x)",
}.items()})  # fmt: skip
kinds("look", {name: UNTRACED + body for name, body in {
    "call-held": "for layer in self.walked$i.held:\n    $x = $x + layer($x)",
    "call-bound": "$x = $x + self.walked$i.layer($y) + self.walked$i.call($x)",
}.items()}, "self.walked$i = Walked($layer, None)")  # fmt: skip
kinds("look", {name: UNTRACED + body for name, body in {
    "call-function": "$x = torch.func.functional_call(self.b, {k: 0.5 * v for k, v in self.b.named_parameters()}, ($x,))",
    "type-is": "$x = $x * (0.5 if type(self.b) in (nn.Linear, nn.Conv2d) else 2.0) + self.b($y)",
}.items()}, may_refuse=True)  # fmt: skip
kinds(
    "look",
    {"normed": f"{UNTRACED}$x = self.normed$i($y) * sum(t.mean() for t in self.normed$i.state_dict().values())"},
    "self.normed$i = nn.utils.parametrizations.weight_norm($layer)",
    may_refuse=True,
)
kinds("submodule", {
    "typed": "$x = self.typed$i($x)",
    "typed-property": "$x = self.typed$i($x.to(self.typed$i.dtype)).to(self.typed$i.device)",
}, "self.typed$i = Typed($layer)")  # fmt: skip
kinds("submodule", {"growing": "$x = self.growing$i($x)"}, "self.growing$i = Growing()")
kinds("submodule", {"growing-deep": "$x = self.growing$i($x)"}, "self.growing$i = nn.Sequential($layer, Growing(3))")
kinds(
    "submodule",
    {"routed": "$x = self.routed$i($x)"},
    "self.routed$i = Routed(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))",
    "sequences",
    may_refuse=True,  # an expert may get nothing
)
kinds(
    "submodule",
    {
        "config": "$x = $x * self.config$i.scale\nif self.config$i.use_bias:\n    $x = $x + 0.1",
        "table": "$x = self.config$i.functions[self.config$i.kind]($x)",
    },
    "self.config$i = types.SimpleNamespace(scale=0.5, use_bias=True, kind='gelu', functions={'relu': F.relu, "
    "'gelu': F.gelu})",
)
kinds(
    "submodule",
    {"table-asks": "$x = self.table$i['asks']($x)"},
    "self.table$i = {'asks': lambda t: 0.5 * t if isinstance(t, torch.Tensor) else 2 * t}",
    may_refuse=True,  # code that nothing is done to gets the answer of a stand-in, which the self-check sees
)
kinds(
    "submodule",
    {
        "list-of-pairs": "for name, layer, scale in self.steps$i:\n    $x = $x + scale * layer(torch.relu($x))",
    },
    "self.one$i, self.two$i = $layer, $layer\nself.steps$i = [('one', self.one$i, 0.5), ('two', self.two$i, 0.7)]",
)
kinds(
    "recurrent",
    {"gru": "$x = self.gru$i($x)[0]", "gru-state": "out, h = self.gru$i($x)\n$x = out + h.transpose(0, 1)"},
    "self.gru$i = nn.GRU(8, 8, batch_first=True)",
    domains="sequences",
)
kinds(
    "attention",
    {"encoder": "$x = self.attend_layer$i($x)"},
    "self.attend_layer$i = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)",
    "sequences",
)
kinds("asks", {
    "match": "match $x:\n    case torch.Tensor():\n        $x = $x * 0.5\n    case _:\n        $x = $x[0]",
    "in-dict": "$x = {'a': lambda t: t * (0.5 if isinstance(t, torch.Tensor) else 2)}['a']($x)",
    "in-list": "for f in [lambda t: t * (0.5 if torch.is_tensor(t) else 2), torch.tanh]:\n    $x = f($x)",
    "log": 'logging.getLogger("net").debug(f"shape {$x.shape}")\n$x = $x * 0.5',
    "finfo": "$x = $x.clamp(min=torch.finfo($x.dtype).min / 2, max=1.5)",
    "generator": "def parts(t):\n    for i in range(2):\n        yield t * (i + 0.5)\n$x = sum(parts($x))",
    "finally": "try:\n    $x = self.b($x)\nfinally:\n    $y = $y * 0.5",
    "recursion": "def deep(t, n):\n    return t if n == 0 else deep(torch.tanh(t), n - 1)\n$x = deep($x, 2)",
    "sorted": "$x, $y = sorted([$x, $y], key=lambda t: t.dim())",
    "star": "first, *others = [$x, $y, $z]\n$x = first + 0.5 * others[-1]",
    "chain": "$x = sum(itertools.chain([$x], [0.5 * $y]))",
    "getattr-function": '$x = getattr(F, "relu")($x) + getattr($x, "abs")()',
})  # fmt: skip
kinds("mask", {
    "causal": "t = $x.shape[1]\nmask = torch.full((t, t), torch.finfo($x.dtype).min).triu(1)\n"
        "w = $x.flatten(2) @ $x.flatten(2).mT\n$x = $x * (w + mask).softmax(-1).mean(-1).view($x.shape[0], t, *[1] * ($x.dim() - 2))",
    "topk": "index = $x.topk(2, 1).indices\n$x = $x + $x.gather(1, index).mean(1, keepdim=True)",
    "argsort": "$x = $x.gather(1, $y.detach().argsort(dim=1, stable=True) * 0 + 1)",
    "where-mask": "keep = torch.arange($x.shape[1]) < 3\n$x = torch.where(keep.view(1, -1, *[1] * ($x.dim() - 2)), $x, torch.zeros_like($x))",
    "cumprod": "$x = $x * torch.linspace(0.5, 1, $x.shape[1]).cumprod(0).view(1, -1, *[1] * ($x.dim() - 2))",
    "meshgrid": "i, j = torch.meshgrid(torch.arange($x.shape[-1]), torch.arange($x.shape[-2]), indexing='xy')\n"
        "$x = $x + 0.01 * (i + j)",
    "one_hot": "$x = $x + F.one_hot(torch.arange($x.shape[-1]) % 3, 3).float().sum(-1)",
})  # fmt: skip
kinds("head", {
    "levels": "outs = []\nfor scale in (1, 2):\n    t = F.avg_pool2d($x, scale)\n    outs.append(self.b(t).flatten(2))\n"
        "$x = $x * torch.cat(outs, 2).mean(2)[..., None, None]",
    "pyramid": "t = F.max_pool2d($x, 2)\n$x = $x + F.interpolate(self.b(t), size=$x.shape[-2:], mode='nearest')",
    "permute": "n, c, h, w = $x.shape\nt = self.b($x).view(n, 2, c // 2, h, w).permute(0, 1, 3, 4, 2).contiguous()\n"
        "t[..., 0:2] = t[..., 0:2].sigmoid() * 2 - 0.5\n$x = t.permute(0, 1, 4, 2, 3).reshape(n, c, h, w)",
    "exp": "t = self.b($x)\nt[:, 2:4].clamp_(max=1.0).exp_()\n$x = 0.3 * t",
}, domains="images")  # fmt: skip
kinds(
    "head",
    {"scale": "$x = self.scale$i * self.b($x)\n$y = self.scale$i[0] * $y"},
    "self.scale$i = nn.Parameter(torch.tensor([0.7]))",
)
kinds(
    "submodule",
    {"hook": "$x = self.hooked$i($x)"},
    "self.hooked$i = $layer\nself.hooked$i.register_forward_hook(lambda m, args, out: 0.5 * out)",
)
kinds(
    "submodule",
    {"hook-write": "$x = self.hooked$i($x)"},
    "self.hooked$i = $layer\nself.hooked$i.register_forward_hook(lambda m, args, out: out.relu_())",
    may_refuse=True,
)
kinds(
    "submodule",
    {"pre-hook": "$x = self.hooked$i(torch.relu($x))"},
    "self.hooked$i = $layer\nself.hooked$i.register_forward_pre_hook(lambda m, args: (args[0] - 0.2,))",
    may_refuse=True,
)
kinds(
    "submodule",
    {"weight-norm": "$x = self.normed$i($x)"},
    "self.normed$i = nn.utils.parametrizations.weight_norm($layer)",
)
kinds(
    "submodule",
    {"spectral-norm": "$x = self.normed$i($x)"},
    "self.normed$i = nn.utils.parametrizations.spectral_norm($layer)",
)
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

kinds("functional", {
    "conv": "$x = F.conv2d($x, self.w$i, padding=1)",
    "standardized": "$x = F.conv2d($x, standardize(self.w$i) / 8, padding=1)",
    "transposed": "$x = F.conv_transpose2d($x, self.w$i, padding=1)",
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
    "linear-computed": "$x = F.linear($x, torch.tanh(self.w$i), self.v$i)",
}, "self.w$i = nn.Parameter(torch.randn(8, 8) / 3)\nself.v$i = nn.Parameter(torch.randn(8))", "sequences")  # fmt: skip
kinds("functional", {
    "borrowed": "$x = F.conv2d($x, self.a.weight, self.a.bias)",
    "borrowed-computed": "$x = F.conv2d($x, 0.5 * self.b.weight, padding=1)",
}, domains="images", may_refuse=True)  # fmt: skip
kinds("functional", {
    "borrowed-linear": "$x = F.linear(torch.relu($x), self.a.weight)",
    "borrowed-transposed": "$x = F.linear(torch.relu($x), self.a.weight.t())",
}, domains="sequences", may_refuse=True)  # fmt: skip
kinds(
    "norm",
    {"functional": "$x = self.norm$i(self.b($x))"},
    "self.norm$i = Norm(8)\nself.norm$i.running_var.uniform_(0.5, 2)",
    "images",
)
kinds(
    "norm",
    {
        "batch": "$x = self.norm$i(self.b($x))",
        "batch-relu_": "$x = self.norm$i($x)\n$x.relu_()",
        "batch-twice": "$x = self.norm$i(self.norm$i($x))",
    },
    "self.norm$i = nn.BatchNorm2d(8)\nself.norm$i.running_var.uniform_(0.5, 2)\nself.norm$i.running_mean.normal_()",
    "images",
)
kinds("norm", {"cumulative": "$x = self.norm$i($x)"}, "self.norm$i = nn.BatchNorm2d(8, momentum=None)", "images")
kinds("norm", {"group": "$x = self.norm$i($x)"}, "self.norm$i = nn.GroupNorm(2, 8)", "images")
kinds("norm", {"layer": "$x = self.norm$i($x)"}, "self.norm$i = nn.LayerNorm(8)", "sequences")
kinds("norm", {"own": "$x = $x / ($x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()"})
kinds(
    "attention",
    {"torch": "$x = $x + self.attend$i($x, $x, $x, need_weights=False)[0]"},
    "self.attend$i = nn.MultiheadAttention(8, 2, batch_first=True)",
    "sequences",
)
kinds(
    "attention",
    {
        "sdpa": "$x = F.scaled_dot_product_attention(self.a($x), self.b($x), $y, is_causal=True)",
        "softmax":
            "w = (self.a($x) @ self.b($x).mT) / math.sqrt(8)\n"
            "w = w.masked_fill(torch.ones(w.shape[-2:]).triu(1) > 0, -1e4)\n$x = w.softmax(-1) @ $y",
        "softmax-write":
            "w = self.a($x) @ self.b($x).mT\nw /= math.sqrt(8)\n"
            "w.masked_fill_(torch.ones(w.shape[-1], w.shape[-1]).triu_(1).bool(), -1e4)\n$x = w.softmax(-1) @ $y",
        "qkv":
            "q, k, v = torch.cat([self.a($x), $x, $y], -1).chunk(3, dim=-1)\nq *= 0.5\n"
            "$x = F.scaled_dot_product_attention(q, k, v)",
        "heads":
            "n, t, c = $x.shape\nq = self.a($x).view(n, t, 2, 4).transpose(1, 2)\n"
            "$x = F.scaled_dot_product_attention(q, q, q).transpose(1, 2).reshape(n, t, c)",
    },
    domains="sequences",
)
kinds(
    "attention",
    {"tokens": "t = $x.flatten(2).mT\nt = self.mix$i(t)\nt.relu_()\n$x = t.mT.unflatten(2, (6, 6))"},
    "self.mix$i = nn.Linear(8, 8)",
    "images",
)
kinds(
    "recurrent",
    {
        "loop":
            "h = $x.new_zeros($x.shape[0], 8)\nfor t in range($x.shape[1]):\n"
            "    h = torch.tanh(self.a($x[:, t]) + self.b(h))\n$x = $x + h[:, None]",
        "loop-write":
            "h = torch.zeros($x.shape[0], 8)\nfor t in range($x.shape[1]):\n    h += 0.1 * self.a($x[:, t])\n"
            "    $x[:, t] = h",
    },
    domains="sequences",
)

SMOOTH = {  # pure functions that keep the shape, for what is said of signs and ranges
    "relu": "torch.relu($x)", "relu6": "F.relu6(3 * $x)", "sigmoid": "torch.sigmoid($x)", "gelu": "F.gelu($x)",
    "elu": "F.elu($x)", "softplus": "F.softplus($x)", "hardswish": "F.hardswish($x)",
    "hardsigmoid": "F.hardsigmoid($x)", "silu": "F.silu($x)", "mish": "F.mish($x)", "celu": "F.celu($x)",
    "selu": "F.selu($x)", "tanhshrink": "F.tanhshrink($x)", "softsign": "F.softsign($x)",
    "softmax": "F.softmax($x, -1)", "log_softmax": "F.log_softmax($x, -1)", "cos": "torch.cos($x)", "abs": "$x.abs()",
    "square": "$x.square()", "pow2": "$x ** 2", "pow3": "0.3 * $x ** 3", "pow-half": "($x.abs() + 0.1) ** 0.5",
    "exp": "torch.exp(-$x.abs())", "sqrt": "torch.sqrt($x.abs() + 0.1)", "log1p": "torch.log1p($x.abs())",
    "rsub": "1 - torch.sigmoid($x)", "minus-one": "torch.relu($x) - 1", "minus-max": "$x - $x.amax()",
    "neg": "-torch.relu($x)", "clamp0": "$x.clamp(min=0)", "clamp-max": "$x.clamp(max=0.2)",
    "clamp-min": "$x.clamp_min(-0.2)", "clamp-range": "$x.clamp(0.1, 0.9)", "threshold": "F.threshold($x, 0.1, 0.1)",
    "threshold-negative": "F.threshold($x, -0.1, -0.1)", "hardtanh": "F.hardtanh($x, 0.1, 2)",
    "maximum": "torch.maximum($x, $y)", "maximum-0": "torch.maximum($x, torch.zeros(()))",
    "minimum": "torch.minimum(torch.relu($x), $y)", "where": "torch.where($x > 0, $x, 0.1 * $y)",
    "where-relu": "torch.where($x > -0.1, torch.relu($x), 0 * $y)",
    "cat": "torch.cat([torch.relu($x)[:, :4], $y[:, 4:]], 1)", "flip": "$x.flip(1)", "roll": "$x.roll(1, -1)",
    "index": "$x[:, [1, 0] * ($x.shape[1] // 2)]",
    "index_select": "$x.index_select(1, torch.arange($x.shape[1]).flip(0))",
    "gather": "$x.gather(1, torch.zeros_like($x).long())", "repeat": "torch.relu($x).repeat_interleave(2, 1)[:, ::2]",
    "sort": "$x.sort(1).values", "max-named": "$x + $x.max(1, keepdim=True)[0]", "cumsum": "0.3 * $x.cumsum(1)",
    "mean": "$x - $x.mean(1, keepdim=True)", "mean-function": "$x + torch.mean($x, dim=(1, 2), keepdim=True)",
    "norm": "$x / (1 + $x.norm())", "normalize": "F.normalize($x, dim=1)",
    "var": "$x / (0.1 + $x.var(1, keepdim=True))", "lerp": "torch.lerp($x, $y, 0.3)",
    "addcmul": "torch.addcmul($x, $y, $z, value=0.1)", "product": "torch.relu($x) * torch.sigmoid($y)",
    "product-signs": "torch.relu($x) * torch.tanh($y)", "layer_norm": "F.layer_norm($x, $x.shape[-1:])",
    "glu": "F.glu(torch.cat([$x, $y], 1), 1)", "prelu": "F.prelu($x, torch.tensor(-0.3))",
    "sum-relus": "torch.relu($x) + F.relu6($y)", "difference": "torch.relu($x) - torch.relu($y)",
    "double": "$x.double().mul(0.5).float()", "bfloat16": "$x.bfloat16().float()", "nan_to_num": "torch.nan_to_num($x)",
    "stack": "torch.stack([$x, $y]).amax(0)",
}  # fmt: skip
IMAGE = {
    "max_pool": "F.max_pool2d($x, 3, 1, 1)", "avg_pool": "F.avg_pool2d($x, 3, 1, 1)",
    "lp_pool": "F.interpolate(F.lp_pool2d(torch.relu($x) + 0.1, 2, 2), scale_factor=2)",
    "pad-zero": "F.pad($x, (1, 0, 1, 0))[..., :-1, :-1]",
    "pad-value": "F.pad(torch.relu($x), (1, 0), value=-1.0)[..., :-1]",
    "pad-reflect": "F.pad(torch.relu($x), (1, 1, 1, 1), 'reflect')[..., 1:7, 2:]",
    "pad-replicate": "F.pad($x, (1, 1, 0, 0), 'replicate')[..., 2:]",
    "pad-circular": "F.pad($x, (1, 1, 0, 0), 'circular')[..., 2:]",
    "nearest": "F.max_pool2d(F.interpolate($x, scale_factor=2), 2)",
    "bilinear": "F.avg_pool2d(F.interpolate(torch.relu($x), scale_factor=2, mode='bilinear'), 2)",
    "bicubic": "F.interpolate(torch.relu($x), scale_factor=2, mode='bicubic')[..., ::2, ::2]",
    "adaptive": "$x + F.adaptive_avg_pool2d($x, 1)", "adaptive-max": "$x * torch.sigmoid(F.adaptive_max_pool2d($x, 1))",
    "pixel": "F.pixel_shuffle(F.pixel_unshuffle($x, 2), 2)",
    "shuffle": "$x.view($x.shape[0], 2, 4, 6, 6).transpose(1, 2).reshape($x.shape)",
    "shuffle-module": "F.channel_shuffle($x, 2)", "instance": "F.instance_norm($x)",
    "unfold": "F.fold(F.unfold($x, 3, padding=1), (6, 6), 3, padding=1) / 9",
    "excite": "$x * torch.sigmoid(self.a($x.mean((2, 3), keepdim=True)))",
    "mean-23": "$x * $x.mean((-2, -1), keepdim=True)",
    "grid": "F.grid_sample($x, F.affine_grid(torch.eye(2, 3).expand($x.shape[0], 2, 3), $x.shape))",
}  # fmt: skip
kinds("pure", {name: f"$y = {expression}\n$x = self.b($y)" for name, expression in SMOOTH.items()})
kinds("pure", {name: f"$y = {expression}\n$x = self.b($y)" for name, expression in IMAGE.items()}, domains="images")
kinds("input", {
    "write": "inputs *= 0.5\n$x = $x + inputs",
    "write-view": "t = inputs[:, :4]\nt.relu_()\n$x = $x + inputs",
    "write-data": "inputs.data.clamp_(-1, 1)\n$x = $x + inputs",
    "setitem": "inputs[:, 0] = 0\n$x = $x + inputs",
}, may_refuse=True)  # fmt: skip
kinds("input", {"read": "$x = $x + inputs", "alias": "$x = $x + self.same(inputs)"}, VIEW_INIT)


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
        'if (inputs is None) == (embedded is None):\n    raise ValueError("either or")\n' + MASKED,
        "keyword",
    ),
    "dict": Signature("batch", 'inputs = batch["image"] * batch.get("mask", 0.5)', "dict", may_refuse=True),
    "pair": Signature("pair", "inputs, mask = pair\ninputs = inputs * mask", "pair", may_refuse=True),
}  # fmt: skip
PASSES_OPTIONAL = {"optional-passed", "optional-keyword", "args-passed", "kwargs-passed", "all-optional"}
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
