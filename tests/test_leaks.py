"""What is loaded or trained a thousand times leaves nothing behind."""

import copy
import ctypes
import gc
import linecache
import pickle
import sys
import traceback
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import MIXED, policy, trained
from torch import fx, nn
from torch.fx import graph_module

from apotfx import ApotfxError, calibrate, export_integer, load_integer, plan, quantize, summary, trace
from apotfx.generated_code import require_writable_names
from apotfx.training.augment import Augment
from apotfx.training.data import Split, TrainBatches

MEBIBYTE = 2**20


class _Mallinfo(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_size_t) for name in
        ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
    ]  # fmt: skip


def used() -> dict[str, int]:
    """Python's blocks of memory, torch.fx's sources; the bytes in use of malloc's and those of the process, where told."""
    for _ in range(3):
        gc.collect()
    found = {"blocks": sys.getallocatedblocks(), "sources": len(graph_module._loader.eval_cache) + len(linecache.cache)}
    mallinfo = getattr(ctypes.CDLL(None), "mallinfo2", None) if sys.platform == "linux" else None
    if mallinfo is not None:
        mallinfo.restype = _Mallinfo
        info = mallinfo()
        found["bytes"] = info.uordblks + info.hblkhd
        lines = Path("/proc/self/status").read_text().splitlines()
        found["resident"] = sum(2**10 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:"))
    return found


def check_constant(do, count, warmup, most_bytes=None):
    for i in range(warmup):  # caches
        do()
        if i % 20 == 0:
            gc.collect()
    before = used()
    for i in range(count):
        do()
        if i % 20 == 0:  # or cycles would pile up until there are a quarter of all objects
            gc.collect()
    after = used()
    assert after["sources"] == before["sources"]
    assert after["blocks"] - before["blocks"] < max(200, count)  # one leaked object each would be more
    print({key: after[key] - before[key] for key in before})
    for key in {"bytes", "resident"} & before.keys() if most_bytes else ():
        assert after[key] - before[key] < most_bytes, key


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


class Float(nn.Module):
    """With all that is made anew in tracing: modules of functions, constants, another attention, a part kept whole."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.whole = Whole()
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        x = self.conv(x).relu_().flatten(2).transpose(1, 2)
        x = F.dropout(self.attention(x, x, x)[0], 0.1, self.training) + torch.arange(4.0)
        return self.fc(self.whole(F.layer_norm(x, (4,))).mean(1))


class Whole(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x) if x.sum() > 1e9 else self.fc(-x)


X = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make():
    """Tracing, quantizing and copying in all ways."""
    model = Float()
    graph = fx.symbolic_trace(nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Conv2d(2, 2, 1)))

    def do():
        trace(Float())
        plan(model, policy())
        quantize(graph, policy(), example_inputs=X)
        qmodel = calibrate(quantize(model, policy(), example_inputs=X), [X])
        summary(qmodel, X)
        copy.deepcopy(qmodel)(X)
        pickle.loads(pickle.dumps(qmodel))(X)

    return do


WHAT = {"load": 2000, "refuse": 2000, "step": 2000, "make": 200}  # how often in the nightly tests


@pytest.mark.parametrize("what", WHAT)
def test_nothing_is_left_behind(what, request):
    count, warmup = (8, 4) if what == "make" else (40, 50)
    check_constant(request.getfixturevalue(what), count, warmup)


@pytest.mark.nightly
@pytest.mark.parametrize("what", WHAT)
def test_2000_times_end_where_they_began(what, request):
    check_constant(request.getfixturevalue(what), WHAT[what], warmup=100, most_bytes=MEBIBYTE)


@pytest.mark.parametrize("make", [
    lambda: quantize(Float(), policy()), lambda: copy.deepcopy(trace(Float())),
    lambda: pickle.loads(pickle.dumps(trace(Float()))),
], ids=["quantize", "copy", "pickle"])  # fmt: skip
def test_the_source_of_what_lives_is_in_tracebacks(make):
    before = set(graph_module._loader.eval_cache)
    network = make()
    with pytest.raises(RuntimeError) as error:
        network(torch.zeros(1, 3, 4, 4))
    gc.collect()
    frames = traceback.extract_tb(error.value.__traceback__)
    lines = [frame.line for frame in frames if "eval_with_key" in frame.filename]
    assert len(lines) == 1 and lines[0].startswith("conv = self.conv(")
    (name,) = graph_module._loader.eval_cache.keys() - before
    del error, frames
    network.recompile()
    gc.collect()
    (other,) = graph_module._loader.eval_cache.keys() - before
    assert other != name and name not in linecache.cache and other in linecache.cache
    del network
    gc.collect()
    assert graph_module._loader.eval_cache.keys() == before and other not in linecache.cache


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
