"""The whole way of a network: quantized, trained for a step, exported and loaded."""

import copy

import torch
from torch.utils import _pytree as pytree

from apotfx import BitPolicy, Rule, export_integer, load_integer, quantize
from apotfx.integer.format import read_integer
from apotfx.integer.program import Program
from apotfx.layers import QuantLayer
from apotfx.state import uncalibrated

POLICY = BitPolicy((Rule(),))
CHANNEL = BitPolicy((Rule(granularity="channel"),))


def tensors(result):
    return [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def call(model, inputs):
    """`inputs` as `example_inputs` takes them."""
    if isinstance(inputs, dict):
        return tensors(model(**inputs))
    return tensors(model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs))


def trained(model, inputs, policy=POLICY, **options):
    """Quantized and trained for a step, in evaluation mode; every parameter that learns has a gradient, all are finite."""
    qmodel = quantize(model, policy, **options).train()
    sum(y.square().sum() for y in call(qmodel, inputs) if y.requires_grad).backward()
    reference = copy.deepcopy(model).train()
    sum(y.square().sum() for y in call(reference, inputs) if y.requires_grad).backward()
    unused = {name for name, parameter in reference.named_parameters() if parameter.grad is None}
    for name, parameter in qmodel.named_parameters():
        learns = parameter.requires_grad and name not in unused
        assert not learns or parameter.grad is not None, f"{name} has no gradient"
        assert parameter.grad is None or parameter.grad.isfinite().all(), name
    assert not uncalibrated(qmodel)
    learning = [p for p in qmodel.parameters() if p.requires_grad]
    torch.optim.SGD(learning, lr=1e-3).step()
    return qmodel.eval()


def loaded(qmodel, model, inputs, directory, backend="reference", **options):
    """What is loaded from an export of `qmodel`; it computes the same bits."""
    path = export_integer(qmodel, directory / "export")
    imodel = load_integer(path, model, backend, **options)
    check_equal(imodel, qmodel, inputs)
    if not Program.from_json(read_integer(path)[0]["program"]).foreign:
        check_equal(load_integer(path, backend=backend), qmodel, inputs)
    return imodel


def check_equal(one, two, inputs):
    with torch.no_grad():
        results = [call(model, inputs) for model in (one, two)]
    assert len(results[0]) == len(results[1]) > 0
    for a, b in zip(*results):
        assert torch.equal(a, b) and a.isfinite().all()
    assert any(len(a.unique()) > 1 for a in results[0])


def cycle(model, inputs, directory, policy=POLICY, **options):
    """The quantized network, and the names of its quantized layers."""
    qmodel = trained(model, inputs, policy, **options)
    loaded(qmodel, model, inputs, directory, **options)
    return qmodel, quantized(qmodel)


def quantized(qmodel):
    return [name for name, module in qmodel.named_modules() if isinstance(module, QuantLayer)]


def calls(qmodel, inputs):
    """The names of the quantized layers in the order in which they run, in evaluation."""
    seen, handles = [], []
    for name, module in qmodel.named_modules():
        if isinstance(module, QuantLayer):
            handles.append(module.register_forward_hook(lambda *_, name=name: seen.append(name)))
    with torch.no_grad():
        call(qmodel.eval(), inputs)
    for handle in handles:
        handle.remove()
    return seen
