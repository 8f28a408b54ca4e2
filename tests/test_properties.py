"""Random small networks under random policies: quantize, train a step, export, reload.

`pytest tests/test_properties.py --hypothesis-profile nightly` runs ten times as many as a plain run.
"""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, note
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import apotfx
from apotfx.graph.network import record_of
from apotfx.layers import QuantLayer
from apotfx.graph.network import graph_of

CHANNELS = 4  # of every block's input and output, so that blocks fit together in any order


class Norm(nn.Module):
    """What most blocks end with: maybe a batch norm, maybe an activation function."""

    def __init__(self, batch_norm: bool, activation: str):
        super().__init__()
        self.bn = nn.BatchNorm2d(CHANNELS) if batch_norm else nn.Identity()
        self.activation = activation

    def forward(self, x):
        return getattr(torch, self.activation)(self.bn(x)) if self.activation else self.bn(x)


class Functional(nn.Module):
    """Layers that are no modules: a convolution with a parameter or a computed weight, products on both sides."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how
        self.weight = nn.Parameter(torch.randn(CHANNELS, CHANNELS, 3, 3) / 6)
        self.matrix = nn.Parameter(torch.randn(CHANNELS, CHANNELS) / 2)
        self.bias = nn.Parameter(torch.randn(CHANNELS))

    def forward(self, x):
        if self.how == "conv":
            return F.conv2d(x, self.weight, self.bias, padding="same")
        if self.how == "standardized":
            return F.conv2d(x, self.weight / self.weight.std((1, 2, 3), keepdim=True), padding=1)
        if self.how == "transposed":
            return F.conv_transpose2d(x, self.weight, self.bias, padding=1)
        if self.how == "linear":
            return F.linear(x.movedim(1, -1), self.matrix, self.bias).movedim(-1, 1)
        if self.how == "right":
            return (x.movedim(1, -1) @ self.matrix).movedim(-1, 1)
        return (self.matrix @ x.flatten(2)).unflatten(2, x.shape[2:])


class Untraceable(nn.Module):
    """Takes a path that depends on values."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.abs().amax() >= 0 else x


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x):
        tokens = x.flatten(2).mT
        return self.attention(tokens, tokens, tokens, need_weights=False)[0].mT.unflatten(2, x.shape[2:])


class Branches(nn.Module):
    def __init__(self, how: str, branches: list[nn.Module]):
        super().__init__()
        self.how, self.branches = how, nn.ModuleList(branches)

    def forward(self, x):
        if self.how == "residual":
            return x + self.branches[0](x)
        results = torch.cat([branch(x) for branch in self.branches], 1)
        return results.unflatten(1, (len(self.branches), -1)).sum(1)


class Twice(nn.Module):
    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(self.inner(x))


class Network(nn.Module):
    def __init__(self, blocks: list[nn.Module], heads: int, tied: bool):
        super().__init__()
        self.stem = nn.Conv2d(2, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.heads = nn.ModuleDict({f"head{i}": nn.Linear(CHANNELS, 3) for i in range(heads)})
        if tied:
            for head in self.heads.values():
                head.weight = self.heads["head0"].weight

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        pooled = x.mean((2, 3))
        return {name: head(pooled) for name, head in self.heads.items()}


@st.composite
def convolutions(draw) -> nn.Module:
    groups = draw(st.sampled_from([1, 2, CHANNELS]))
    bias, dilation = draw(st.booleans()), draw(st.integers(1, 2))
    if draw(st.booleans()):
        conv = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation, groups=groups, bias=bias)
    else:
        mode = draw(st.sampled_from(["zeros", "reflect", "circular", "replicate"]))
        conv = nn.Conv2d(
            CHANNELS, CHANNELS, 3, padding=dilation, dilation=dilation, groups=groups, bias=bias, padding_mode=mode
        )
    return nn.utils.parametrizations.weight_norm(conv) if draw(st.integers(0, 3)) == 0 else conv


def leaf_blocks() -> st.SearchStrategy[nn.Module]:
    norms = st.builds(Norm, st.booleans(), st.sampled_from(["", "relu", "sigmoid", "tanh"]))
    functional = st.builds(
        Functional, st.sampled_from(["conv", "standardized", "transposed", "linear", "right", "left"])
    )
    layers = st.one_of(convolutions(), functional)
    return st.one_of(
        st.builds(lambda layer, norm: nn.Sequential(layer, norm), layers, norms),
        st.builds(Attention),
        st.sampled_from([nn.MaxPool2d, nn.AvgPool2d]).map(lambda pool: pool(3, stride=1, padding=1)),
        st.just(nn.GELU()),
    )


def blocks() -> st.SearchStrategy[nn.Module]:
    return st.recursive(
        leaf_blocks(),
        lambda inner: st.one_of(
            st.builds(Untraceable, inner),
            st.builds(Twice, inner),
            st.builds(Branches, st.just("residual"), st.lists(inner, min_size=1, max_size=1)),
            st.builds(Branches, st.just("concatenated"), st.lists(inner, min_size=2, max_size=2)),
        ),
        max_leaves=3,
    )


@st.composite
def networks(draw) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 2**16)))
    network = Network(draw(st.lists(blocks(), max_size=4)), draw(st.integers(1, 2)), draw(st.booleans()))
    return Untraceable(network) if draw(st.integers(0, 7)) == 0 else network


@st.composite
def rules(draw, name: tuple[str, ...] | str = "*", floats: tuple[int, ...] = (32,)) -> apotfx.Rule:
    scheme = draw(st.sampled_from(["apot", "uniform", "pot"]))
    whole = st.integers(2, 4 if scheme == "pot" else 8)
    return apotfx.Rule(
        name=name,
        scheme=scheme,
        weight_bits=draw(st.one_of(whole, *map(st.just, floats))),
        activation_bits=draw(st.one_of(whole, st.just(32))),
        granularity=draw(st.sampled_from(["tensor", "channel"])),
        normalization=draw(st.sampled_from(["rescale", "standardize", "none"])),
    )


@st.composite
def policies(draw) -> apotfx.BitPolicy:
    """The stem and the heads get something, the blocks anything."""
    rest = draw(st.one_of(st.just([]), st.lists(rules(), min_size=1, max_size=1)))
    return apotfx.BitPolicy((draw(rules(("*stem", "*heads.*"), floats=())), *rest))


@given(networks(), policies(), st.integers(5, 7))
def test_a_quantized_network_keeps_what_it_must(network: nn.Module, policy: apotfx.BitPolicy, size: int):
    images = torch.randn(3, 2, size, size)
    before = {key: value.clone() for key, value in network.state_dict().items()}
    expected = network(images)
    network.load_state_dict(before)
    qmodel = apotfx.quantize(network, policy)
    note(str(record_of(qmodel)["plan"]))
    _check_plan(qmodel)
    _check_state(qmodel, network, before)

    results = qmodel(images)
    assert results.keys() == expected.keys()
    assert all(results[key].shape == expected[key].shape and results[key].isfinite().all() for key in results)
    sum(result.square().mean() for result in results.values()).backward()
    for name, parameter in qmodel.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert qmodel.get_parameter(f"{_prefix(network)}stem.weight").grad is not None
    torch.optim.SGD(qmodel.parameters(), 1e-3).step()
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())

    qmodel.eval().requires_grad_(False)  # torch adds up in another order where the weight of a float layer trains
    with torch.no_grad():
        results, codes = _run(qmodel, images)
        for name, n in codes.items():
            _check_levels(n, qmodel.get_submodule(name).input_quantizer)
        with tempfile.TemporaryDirectory() as directory:
            imodel = apotfx.load_integer(apotfx.export_integer(qmodel, Path(directory) / "export"), network)
        reloaded = imodel(images)
    assert all(torch.equal(results[key], reloaded[key]) for key in results)


def _prefix(network: nn.Module) -> str:
    return "inner." if isinstance(network, Untraceable) else ""


def _check_plan(qmodel: nn.Module) -> None:
    modules = dict(qmodel.named_modules())
    for planned in record_of(qmodel)["plan"].layers:
        layer = modules.get(planned.facts.name)
        assert isinstance(layer, QuantLayer) == planned.quantized, planned
        if planned.quantized:
            for quantizer, levels in ((layer.weight_quantizer, planned.weight), (layer.input_quantizer, planned.input)):
                assert (quantizer and quantizer.levels) == levels
    names = {planned.facts.name for planned in record_of(qmodel)["plan"].layers if planned.quantized}
    assert names == {name for name, module in qmodel.named_modules(remove_duplicate=False) if isinstance(module, QuantLayer)}


def _check_state(qmodel: nn.Module, network: nn.Module, before: dict[str, torch.Tensor]) -> None:
    """Whatever both have is the same; what the quantized network lacks was split, or is not used."""
    state = qmodel.state_dict()
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in before)
    assert all(torch.equal(state[key], before[key]) for key in state.keys() & before.keys())
    read = {node.target for node in graph_of(qmodel).nodes if node.op == "get_attr"}
    assert read <= before.keys()
    added = {key for key in state.keys() - before.keys() if "_quantizer." not in key}
    assert all(".attention." in key and "_proj." in key for key in added)


def _run(qmodel: nn.Module, images: torch.Tensor) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The results, and the levels of the input of every layer that quantizes it."""
    codes = {}

    def observe(name):
        return lambda layer, args: codes.update({name: layer.codes_and_accumulators(*args)[0]})

    layers = {n: m for n, m in qmodel.named_modules() if isinstance(m, QuantLayer) and m.input_quantizer is not None}
    hooks = [layer.register_forward_pre_hook(observe(name)) for name, layer in layers.items()]
    results = qmodel(images)
    for hook in hooks:
        hook.remove()
    return results, codes


def _check_levels(n: torch.Tensor, quantizer: nn.Module) -> None:
    levels = quantizer.levels
    allowed = torch.tensor([*levels.ints, *(-i for i in levels.ints if levels.signed)], dtype=n.dtype)
    assert torch.isin(n, allowed).all()
