import copy
import math
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as TF
from torch import fx, nn

from apotfx import reproducible
from apotfx.graph.passes import make_reproducible, trace
from apotfx.training.distributed import CpuSyncBatchNorm, synchronize_batch_norms

SHAPES = {1: (6, 5, 24), 2: (6, 5, 12, 10), 3: (6, 5, 6, 4, 8)}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def data(dims, seed=0):
    """Activations over four orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(SHAPES[dims], generator=generator)
    return x * 10 ** torch.empty(SHAPES[dims]).uniform_(-2, 2, generator=generator)


def batch_norm(kind, seed=0, **options):
    """One that has seen data; torch's own with the name `kind`."""
    generator = torch.Generator().manual_seed(seed)
    bn = getattr(nn, kind)(5, **options)
    for tensor in (bn.running_mean, *(p.data for p in bn.parameters())):
        tensor.normal_(generator=generator)
    bn.running_var.uniform_(0.01, 30, generator=generator)
    return bn


def ours(module):
    """The reproducible one in place of torch's."""
    graph_module = trace(nn.Sequential(copy.deepcopy(module)).train(module.training))
    make_reproducible(graph_module)
    graph_module.recompile()
    return graph_module


BATCH_NORMS = [("BatchNorm1d", 1), ("BatchNorm2d", 2), ("BatchNorm3d", 3), ("SyncBatchNorm", 2)]
every_batch_norm = pytest.mark.parametrize("kind, dims", BATCH_NORMS, ids=[kind for kind, _ in BATCH_NORMS])
AVERAGES = {
    "AvgPool1d": (nn.AvgPool1d(3, 2, 1), 1), "AvgPool2d": (nn.AvgPool2d(3, 2, 1), 2),
    "AvgPool2d-ceil": (nn.AvgPool2d((2, 3), ceil_mode=True, count_include_pad=False), 2),
    "AvgPool3d": (nn.AvgPool3d(2), 3), "AdaptiveAvgPool1d": (nn.AdaptiveAvgPool1d(7), 1),
    "AdaptiveAvgPool2d": (nn.AdaptiveAvgPool2d((5, 3)), 2), "AdaptiveAvgPool2d-1": (nn.AdaptiveAvgPool2d(1), 2),
    "AdaptiveAvgPool3d": (nn.AdaptiveAvgPool3d(2), 3),
}  # fmt: skip


class Calls(nn.Module):
    def __init__(self, call):
        super().__init__()
        self.call = call

    def forward(self, x):
        return self.call(x)


CALLS = {
    "avg_pool1d": (lambda x: TF.avg_pool1d(x, 3, 2, 1), 1), "avg_pool2d": (lambda x: TF.avg_pool2d(x, 3, 2, 1), 2),
    "avg_pool3d": (lambda x: TF.avg_pool3d(x, 2), 3),
    "adaptive_avg_pool1d": (lambda x: TF.adaptive_avg_pool1d(x, 7), 1),
    "adaptive_avg_pool2d": (lambda x: TF.adaptive_avg_pool2d(x, 1), 2),
    "adaptive_avg_pool3d": (lambda x: TF.adaptive_avg_pool3d(x, 2), 3),
    "mean": (lambda x: x.mean((2, 3)), 2), "mean-keepdim": (lambda x: x.mean(dim=(-1, -2), keepdim=True), 2),
    "mean-of-all": (lambda x: x.mean(), 2), "torch.mean": (lambda x: torch.mean(x, 1), 1),
    "torch.mean-keywords": (lambda x: torch.mean(input=x, dim=2), 1),
    "avg_pool2d-keywords": (lambda x: TF.avg_pool2d(input=x, kernel_size=2), 2),
}  # fmt: skip
EVERY_AVERAGE = AVERAGES | {name: (Calls(call), dims) for name, (call, dims) in CALLS.items()}
every_average = pytest.mark.parametrize("average, dims", EVERY_AVERAGE.values(), ids=EVERY_AVERAGE)


def check_reproducible(module, x, by_image=True):
    """The same bits for every memory format, batch size and number of threads."""
    with torch.no_grad():
        y = module(x)
        if x.dim() in CHANNELS_LAST:
            assert torch.equal(module(x.contiguous(memory_format=CHANNELS_LAST[x.dim()])), y)
        assert torch.equal(module(x.transpose(0, -1).contiguous().transpose(0, -1)), y)
        if by_image:
            for size in (1, 4):
                assert torch.equal(torch.cat([module(part) for part in x.split(size)]), y)
        threads = torch.get_num_threads()
        try:
            for count in (1, 3):
                torch.set_num_threads(count)
                assert torch.equal(
                    module(x.repeat(40, *(1 for _ in x.shape[1:])))[: len(y)] if by_image else module(x), y
                )
        finally:
            torch.set_num_threads(threads)
    return y


# Batch norms.


@every_batch_norm
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"eps": 0.1}], ids=["default", "no-affine", "eps"])
def test_a_batch_norm_is_a_rounded_product_and_a_rounded_sum(kind, dims, options):
    bn, x = batch_norm(kind, **options), data(dims)
    y = check_reproducible(ours(bn.eval()), x)
    weight, bias = (np.float64(1), np.float64(0)) if bn.weight is None else (bn.weight, bn.bias)
    mean, var, weight, bias = (np.asarray(t.tolist()) for t in (bn.running_mean, bn.running_var, weight, bias))
    multiplier = weight / np.sqrt(var + bn.eps)
    multiplier, offset = multiplier.astype(np.float32), (bias - mean * multiplier).astype(np.float32)
    shape = (-1, *(1 for _ in SHAPES[dims][2:]))
    expected = x.numpy() * multiplier.reshape(shape) + offset.reshape(shape)
    assert expected.dtype == np.float32 and np.array_equal(y.numpy(), expected)
    torch.testing.assert_close(y, TF.batch_norm(x, bn.running_mean, bn.running_var, bn.weight, bn.bias, eps=bn.eps))


def test_the_factors_of_a_batch_norm_are_rounded_once():
    """torch's square root of float32 is one of the two nearest numbers, often not the nearest."""
    bn = nn.BatchNorm1d(10**5, affine=False).eval()
    bn.running_var.uniform_(0.01, 30, generator=torch.Generator().manual_seed(0))
    multiplier, offset = reproducible.folded_batch_norm(bn)
    exact = 1 / np.sqrt(bn.running_var.double().numpy() + bn.eps)
    assert np.array_equal(multiplier.numpy(), exact.astype(np.float32)) and not offset.any()


def test_a_batch_norm_of_rows():
    bn, x = batch_norm("BatchNorm1d").eval(), data(1)[:, :, 0]
    y = check_reproducible(ours(bn), x)
    multiplier, offset = reproducible.folded_batch_norm(bn)
    assert torch.equal(y, x * multiplier + offset)


@pytest.mark.parametrize("kind, dims", BATCH_NORMS[:3])
def test_a_batch_norm_trains_as_torchs(kind, dims):
    theirs, x = batch_norm(kind, momentum=0.3), data(dims)
    mine = ours(theirs)
    for _ in range(2):
        a, b = theirs(x), mine(x)
        assert torch.equal(a, b)
        gradients = [torch.autograd.grad(y.square().sum(), m.parameters()) for y, m in ((a, theirs), (b, mine))]
        assert all(map(torch.equal, *gradients))
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[f"0.{name}"], tensor)


def test_a_batch_norm_without_running_statistics_uses_the_batchs():
    bn = nn.BatchNorm2d(5, track_running_stats=False).eval()
    assert torch.equal(ours(bn)(data(2)), bn(data(2)))


@pytest.mark.parametrize("kind, dims", BATCH_NORMS)
def test_a_batch_norm_refuses_what_torchs_does(kind, dims):
    bn = ours(batch_norm(kind).eval())
    with pytest.raises(ValueError, match="expected"):
        bn(torch.zeros(5))
    if kind != "SyncBatchNorm":
        with pytest.raises(ValueError, match="expected"):
            bn(torch.zeros(1, 5, *(1 for _ in range(dims + 1))))


def test_other_dtypes_keep_theirs():
    bn = ours(batch_norm("BatchNorm2d").eval())
    assert bn.double()(data(2).double()).dtype == torch.float64
    assert bn.bfloat16()(data(2).bfloat16()).dtype == torch.bfloat16
    assert ours(nn.AvgPool2d(2).eval())(data(2).bfloat16()).dtype == torch.bfloat16


# Averages.


@every_average
def test_an_average_is_reproducible(average, dims):
    check_reproducible(ours(average.eval()), data(dims), by_image=average(data(dims)).dim() > 0)


@every_average
def test_an_average_trains_as_torchs(average, dims):
    x = data(dims).requires_grad_()
    for y in (average.train()(x), ours(average.train())(x)):
        assert torch.equal(y, average(x))
        assert torch.equal(*(torch.autograd.grad(z.square().sum(), x)[0] for z in (y, average(x))))


def exactly(values):
    """The sum without any rounding, divided once, then rounded to float32."""
    return np.float32(math.fsum(values) / len(values))


@pytest.mark.parametrize("seed", range(3))
def test_averages_are_the_rounded_exact_sums(seed):
    x = data(2, seed)
    everything = [[exactly(channel.flatten().tolist()) for channel in image] for image in x]
    for average in (nn.AdaptiveAvgPool2d(1), Calls(lambda x: x.mean((2, 3))), nn.AvgPool2d((12, 10)),
                    Calls(lambda x: TF.adaptive_avg_pool2d(x, (1, 1)))):  # fmt: skip
        assert torch.equal(ours(average.eval())(x).flatten(1), torch.tensor(np.array(everything)))
    windows = x.unfold(2, 4, 2).unfold(3, 4, 3).flatten(4)
    expected = [exactly(window.tolist()) for window in windows.flatten(0, 3)]
    for average in (nn.AvgPool2d(4, (2, 3)), Calls(lambda x: TF.avg_pool2d(x, 4, (2, 3)))):
        assert torch.equal(ours(average.eval())(x).flatten(), torch.tensor(np.array(expected)))


def test_an_order_of_summation_that_matters_in_float32_does_not_matter():
    x = torch.tensor([2.0**24, 1.0, -(2.0**24), 1.0]).reshape(1, 1, 2, 2)
    assert x[0, 0, 0].sum() + x[0, 0, 1].sum() != 2  # what float32 may give
    assert ours(nn.AvgPool2d(2).eval())(x) == 0.5
    assert ours(Calls(lambda x: x.mean()).eval())(x) == 0.5


def test_a_mean_with_a_dtype_is_left_alone():
    graph_module = ours(Calls(lambda x: x.mean(1, dtype=torch.float64)).eval())
    assert not any(isinstance(m, reproducible.Average) for m in graph_module.modules())
    assert graph_module(data(1)).dtype == torch.float64


# In a network.


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.MaxPool2d(1), nn.BatchNorm2d(5), nn.ReLU(), nn.AvgPool2d(2))
        self.bn = nn.BatchNorm1d(5, affine=False)

    def forward(self, x):
        return self.bn(self.features(x).mean((2, 3)))


@pytest.mark.parametrize("training", [True, False])
def test_make_reproducible_keeps_names_state_modes_and_hooks(training):
    model = Net().train(training)
    model.features[1].register_forward_hook(lambda module, args, y: 2 * y)
    expected = copy.deepcopy(model).train()(data(2))
    graph_module = trace(copy.deepcopy(model))
    make_reproducible(graph_module)
    graph_module.graph.lint()
    graph_module.recompile()
    types = {name: type(module) for name, module in graph_module.named_modules()}
    assert types["features.1"] is reproducible.BatchNorm2d and types["bn"] is reproducible.BatchNorm1d
    assert types["features.3"] is reproducible.AvgPool2d and types["mean_average"] is reproducible.Average
    assert types["features.0"] is nn.MaxPool2d and types["features.2"] is nn.ReLU
    assert all(module.training is training for module in graph_module.modules())
    before, after = model.state_dict(), graph_module.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert type(model.features[1]) is nn.BatchNorm2d
    assert torch.equal(graph_module.train()(data(2)), expected)
    make_reproducible(graph_module)  # changes nothing any more
    assert {name: type(module) for name, module in graph_module.named_modules()} == types


class Derived(nn.BatchNorm2d):
    """Whose forward may be another one."""


def test_subclasses_and_other_modules_stay():
    modules = [
        Derived(5),
        nn.LayerNorm(4),
        nn.GroupNorm(1, 5),
        nn.InstanceNorm2d(5),
        nn.MaxPool2d(2),
        nn.LPPool2d(2, 2),
    ]
    graph_module = fx.symbolic_trace(nn.Sequential(nn.Identity()))
    graph_module.others = nn.ModuleList(modules)
    make_reproducible(graph_module)
    assert [type(module) for module in graph_module.others] == [type(module) for module in modules]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("kind", [*reproducible.REPRODUCIBLE.values(), *CALLS], ids=str)
def test_copies_evaluate_alike(kind, copied):
    if isinstance(kind, str):
        call, dims = CALLS[kind]
        graph_module = ours(Calls(call).eval())
        module = next(m for m in graph_module.modules() if isinstance(m, reproducible.Average))
        assert copied(module).function is module.function and not copied(module).training
        if copied is copy.deepcopy:
            assert torch.equal(copied(graph_module)(data(dims)), graph_module(data(dims)))
        return
    dims = int(kind.__name__[-2]) if kind.__name__[-2].isdigit() else 2
    module = batch_norm(kind.__name__) if "Norm" in kind.__name__ else kind(2)
    module.__class__ = kind
    again = copied(module.eval())
    assert type(again) is kind and again.state_dict().keys() == module.state_dict().keys()
    assert torch.equal(again(data(dims)), module(data(dims)))


# Over several processes.


@pytest.mark.parametrize("device, kind", [("cpu", CpuSyncBatchNorm), ("cuda", reproducible.SyncBatchNorm)])
def test_synchronized_batch_norms_evaluate_alike(device, kind):
    """The conversion for a GPU needs none itself."""
    model = Net()
    for bn in (model.features[1], model.bn):
        bn.running_mean.normal_(generator=torch.Generator().manual_seed(0))
        bn.running_var.uniform_(0.1, 9, generator=torch.Generator().manual_seed(1))
    graph_module = trace(model)
    make_reproducible(graph_module)
    graph_module.recompile()
    with torch.no_grad():
        expected = graph_module.eval()(data(2))
        synchronized = synchronize_batch_norms(copy.deepcopy(graph_module), torch.device(device)).eval()
        assert type(synchronized.bn) is type(synchronized.get_submodule("features.1")) is kind
        assert synchronized.state_dict().keys() == graph_module.state_dict().keys()
        assert torch.equal(check_reproducible(synchronized, data(2)), expected)
