"""What is loaded or trained a thousand times leaves nothing behind."""

import ctypes
import gc
import linecache
import sys
from pathlib import Path

import pytest
import torch
from helpers import MIXED, policy, trained
from torch import nn
from torch.fx import graph_module

from apotfx import ApotfxError, calibrate, export_integer, load_integer, quantize
from apotfx.generated_code import forgets_sources, require_writable_names
from apotfx.training.augment import Augment
from apotfx.training.data import Split, TrainBatches

MEBIBYTE = 2**20


def used() -> dict[str, int]:
    """Python's blocks of memory, torch.fx's sources, and the bytes of this process where Linux tells."""
    for _ in range(3):
        gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        trim and trim(0)
    found = {"blocks": sys.getallocatedblocks(), "sources": len(graph_module._loader.eval_cache) + len(linecache.cache)}
    statm = Path("/proc/self/statm")
    if statm.exists():
        found["bytes"] = int(statm.read_text().split()[1]) * 4096
    return found


def check_constant(do, count, warmup, most_bytes=None):
    for _ in range(warmup):  # caches, and the heap that they leave in pieces
        do()
    before = used()
    for _ in range(count):
        do()
    after = used()
    assert after["sources"] == before["sources"]
    assert after["blocks"] - before["blocks"] < max(200, count)  # one leaked object each would be more
    if most_bytes and "bytes" in before:
        assert after["bytes"] - before["bytes"] < most_bytes


@pytest.fixture
def load(tmp_path):
    qmodel, model = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "export")
    return lambda: load_integer(path, model)


@pytest.fixture
def refuse(tmp_path):
    path = export_integer(trained(MIXED)[0], tmp_path / "export")
    other = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten(), nn.Linear(4, 3))

    def do():
        with pytest.raises(ApotfxError):
            load_integer(path, other)

    return do


@pytest.fixture
def step():
    images = torch.randint(0, 256, (64, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    batches = TrainBatches(
        Split(images, torch.arange(64) % 10), batch_size=16, seed=0, augment=Augment.named("default", "digits"), mean=(0.5,),
        std=(0.5,), image_size=8, device="cpu",
    )  # fmt: skip
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 10),
    )
    qmodel = calibrate(quantize(model, policy()), [next(batches.epoch(0))[0]]).train()
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=1e-3, momentum=0.9)

    def epochs():
        for epoch in iter(int, 1):
            yield from batches.epoch(epoch)

    stream = epochs()

    def do():
        x, labels = next(stream)
        optimizer.zero_grad()
        nn.functional.cross_entropy(qmodel(x), labels).backward()
        optimizer.step()

    return do


@pytest.mark.parametrize("what", ["load", "refuse", "step"])
def test_nothing_is_left_behind(what, request):
    check_constant(request.getfixturevalue(what), count=40, warmup=50)


@pytest.mark.nightly
@pytest.mark.parametrize("what", ["load", "refuse", "step"])
def test_2000_times_end_where_they_began(what, request):
    check_constant(request.getfixturevalue(what), count=2000, warmup=400, most_bytes=MEBIBYTE)


def test_the_source_of_what_lives_is_kept():
    @forgets_sources
    def compiled():
        first = torch.fx.symbolic_trace(nn.Sequential(nn.ReLU()))
        first.recompile()
        return first

    before = set(graph_module._loader.eval_cache)
    module = compiled()
    (name,) = graph_module._loader.eval_cache.keys() - before
    assert "relu" in "".join(linecache.getlines(name)).lower() or "forward" in "".join(linecache.getlines(name))
    del module
    gc.collect()
    assert graph_module._loader.eval_cache.keys() == before and name not in linecache.cache


@pytest.mark.parametrize("name", ["class", "None", "lambda", 'x"y', "a\nb", "\\"])
def test_names_that_make_no_code_are_refused_by_name(name, tmp_path):
    path = export_integer(trained(MIXED)[0], tmp_path / "export")
    model = nn.ModuleDict({name: nn.Conv2d(2, 6, 3)})
    for refuses in (require_writable_names, lambda model: load_integer(path, model)):
        with pytest.raises(ApotfxError, match="torch.fx cannot write .* as code; rename it") as error:
            refuses(model)
        assert repr(name) in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "name", ["a b", "1; import os", "int", "switch", "self", "0", "a-b", "é", "a'b", "{x}", "%s", "forward1"]
)
def test_names_that_are_no_identifiers_work(name, tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleDict({name: nn.Conv2d(1, 2, 3)})
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            return self.fc(torch.relu(self.layers[name](x)).flatten(1))

    model, x = Net(), torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    qmodel = calibrate(quantize(model, policy()), [x]).eval()
    network = load_integer(export_integer(qmodel, tmp_path / "export"), model)
    assert torch.equal(network(x), qmodel(x))
