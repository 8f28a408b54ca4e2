import os
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch

from apotfx.errors import ApotfxError
from apotfx.training.checkpoint import read_checkpoint
from apotfx.training.distributed import Processes, pick_device

ROOT = Path(__file__).parents[1]
PATIENCE = 600  # in seconds; a third of what processes wait for each other

WORKER = """
import sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
import apotfx
from apotfx.training.distributed import Processes, leave, synchronize_batch_norms

torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
torch.manual_seed(0)
processes = Processes("cpu")
net = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3, affine=False),
                    nn.BatchNorm2d(3, momentum=None), nn.Flatten(), nn.Linear(48, 5), nn.BatchNorm1d(5))
x, y = torch.randn(8, 2, 8, 8), torch.randint(5, (8,))
net = apotfx.calibrate(apotfx.quantize(net, apotfx.BitPolicy.default(4)), [x.clone()]).double()
share = slice(processes.rank * 8 // processes.world_size, (processes.rank + 1) * 8 // processes.world_size)
if processes.world_size > 1:
    synchronize_batch_norms(net, torch.device("cpu"))
    wrapped = DistributedDataParallel(net)
else:
    wrapped = net
nn.functional.cross_entropy(wrapped(x[share]), y[share]).backward()
assert processes.sum(float(processes.rank), torch.device("cpu")) == sum(range(processes.world_size))
assert processes.broadcast({"rank": processes.rank}) == {"rank": 0}
processes.wait()
if processes.is_main:
    torch.save({"grad": {k: p.grad for k, p in net.named_parameters()}, "state": net.state_dict()}, sys.argv[1])
processes.close()
leave(0)
"""


EXPERTS = """
import sys, torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
import apotfx
from apotfx.state import uncalibrated
from apotfx.training.distributed import Processes, leave

folder, wrapped, checkpointed = sys.argv[1], sys.argv[2] == "True", sys.argv[3] == "True"

class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.never, self.head = (nn.Linear(4, 4) for _ in range(5))
    def forward(self, x, experts):
        x = self.stem(x)
        if "left" in experts:
            x = self.left(x)
        if "right" in experts:
            x = self.right(x)
        return checkpoint(self.head, x, use_reentrant=False) if checkpointed else self.head(x)

torch.set_num_threads(1)
torch.manual_seed(0)
processes = Processes("cpu")
net = apotfx.quantize(Experts(), apotfx.BitPolicy((apotfx.Rule(granularity="channel"),)))
network = DistributedDataParallel(net, find_unused_parameters=True) if wrapped else net
optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1)
torch.manual_seed(1 + processes.rank)
local, states, waiting, errors = {}, [], [], []
for step, experts in enumerate([("", ""), ("left", ""), ("left", "right"), ("", "left")]):
    experts = experts[processes.rank]
    x = (1 + 3 * processes.rank) * torch.randn(16, 4)
    if step == 0:
        parameters = dict(net.named_parameters())
        handle = net.stem.register_forward_hook(lambda *_: local.update({k: p.detach().clone() for k, p in parameters.items()}))
    y = network(x, experts)
    handle.remove()
    states.append({k: p.detach().clone() for k, p in net.named_parameters() if k.endswith("clip")})
    waiting.append(uncalibrated(net))
    y.square().sum().backward()
    if not wrapped:
        for p in net.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p) if p.requires_grad else None
            if p.grad is not None:
                torch.distributed.all_reduce(p.grad)
    optimizer.step()
    optimizer.zero_grad()
torch.save({"states": states, "waiting": waiting, "local": local["stem.input_quantizer.clip"]}, f"{folder}/{processes.rank}.pt")
processes.wait()
processes.close()
leave(0)
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@contextmanager
def started(*command, processes=2, cwd=None):
    """torchrun, whose output can be read; it and its workers are gone after the block."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", processes]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        [str(part) for part in (*launcher, "--master-port", free_port(), *command)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=cwd, env=env, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def torchrun(*command, processes=2, cwd=None):
    with started(*command, processes=processes, cwd=cwd) as process:
        printed, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, printed[-3000:]
    return printed


def test_two_processes_give_the_gradients_and_statistics_of_one(tmp_path):
    (tmp_path / "worker.py").write_text(WORKER)
    results = []
    for processes in (1, 2):
        torchrun(tmp_path / "worker.py", tmp_path / f"{processes}.pt", processes=processes)
        results.append(torch.load(tmp_path / f"{processes}.pt", weights_only=True))
    for part in ("grad", "state"):
        one, two = (result[part] for result in results)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("checkpointed", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "DDP"])
def test_processes_agree_on_clips_though_not_all_reach_a_layer(wrapped, checkpointed, tmp_path):
    """A layer that a process does not reach in its first batch gets the clip that another one found, and no process waits."""
    (tmp_path / "worker.py").write_text(EXPERTS)
    torchrun(tmp_path / "worker.py", tmp_path, wrapped, checkpointed)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    assert one["waiting"] == two["waiting"]
    expected = [["left", "right", "never"], ["right", "never"], ["never"], ["never"]]
    assert one["waiting"] == expected
    for a, b in zip(one["states"], two["states"], strict=True):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    mean = (one["local"].double() + two["local"].double()) / 2
    assert one["local"] != two["local"] and one["states"][0]["stem.input_quantizer.clip"] == mean.float()


def test_training_on_two_processes_equals_training_on_one(tmp_path):
    command = [
        ROOT / "tools" / "train.py", "--arch", "resnet10", "--dataset", "digits", "--bit", 32, "--epochs", 1, "--lr", 0.01,
        "--image-size", 16,
    ]  # fmt: skip
    states = []
    for processes in (1, 2):
        printed = torchrun(*command, "--name", processes, processes=processes, cwd=tmp_path)
        assert len(re.findall("^test acc", printed, re.MULTILINE)) == 1  # only one process reports
        states.append(read_checkpoint(tmp_path / "runs" / str(processes)).resume["model"])
    one, two = states
    for name in one:
        torch.testing.assert_close(
            two[name].float(), one[name].float(), rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


TRAINING = "--arch mlp --dataset digits --bit 4 --epochs 8 --batch-size 200 --train-images 600".split()


@pytest.mark.parametrize("victim", [1, pytest.param(0, marks=pytest.mark.nightly)])
def test_a_worker_that_dies_ends_all_and_the_run_resumes_to_the_same_weights(victim, tmp_path):
    train = [ROOT / "tools" / "train.py", "--device", "cpu", "-p", 1]
    torchrun(*train, *TRAINING, "--name", "whole", cwd=tmp_path)
    with started(*train, *TRAINING, "--name", "part", cwd=tmp_path) as launcher:
        workers = wait_for_workers(launcher, "epoch 3 step")
        os.kill(workers[victim], signal.SIGKILL)
        rest = launcher.communicate(timeout=PATIENCE)[0]  # 2.5 seconds on two busy cores
        assert launcher.returncode == 1
        assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    if victim == 1:  # of the others the first one tells
        assert "train.py: error: process 0 of 2: another one has ended; continue the run with --resume" in rest
    torchrun(*train, "--resume", "runs/part", cwd=tmp_path)
    whole, part = (read_checkpoint(tmp_path / "runs" / name) for name in ("whole", "part"))
    assert whole.best == part.best
    for key in ("model", "ema", "momentum"):
        a, b = whole.resume[key], part.resume[key]
        assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a), key


def wait_for_workers(launcher, text):
    """The processes of the workers, by rank, once one of them has printed `text`."""
    seen = []
    for line in launcher.stdout:
        seen.append(line)
        if text in line:
            break
    else:
        raise AssertionError("".join(seen))
    children = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    ranks = {int(environment(pid)["RANK"]): int(pid) for pid in children if "RANK" in environment(pid)}
    return [ranks[0], ranks[1]]


def environment(pid):
    lines = Path(f"/proc/{pid}/environ").read_bytes().decode().split("\0")
    return dict(line.split("=", 1) for line in lines if "=" in line)


def test_a_mistake_on_one_process_is_told_once(tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "x").touch()
    with started(ROOT / "tools" / "train.py", *TRAINING, "--name", "x", cwd=tmp_path) as launcher:
        printed = launcher.communicate(timeout=PATIENCE)[0]
    assert launcher.returncode == 1
    assert printed.count("train.py: error: ") == 1 and "--name x: runs/x exists" in printed
    assert printed.count("Traceback (most recent call last)") == 1  # torchrun's own, of two workers with exit code 2


def test_one_process_needs_no_group():
    processes = Processes("cpu")
    assert (processes.rank, processes.world_size, processes.is_main) == (0, 1, True)
    assert processes.sum(2.5, torch.device("cpu")) == 2.5
    assert processes.broadcast("x") == "x"
    processes.wait()
    processes.close()


@pytest.mark.parametrize(
    ("name", "gpu", "message"),
    [
        ("cpu", 0, "--gpu 0 and --device cpu: give one of them"),
        ("nonsense", None, "--device nonsense: unknown; expected cpu, cuda or cuda:N"),
        ("meta", None, "--device meta: not supported"),
        (None, 99, "--device cuda:99: this machine has [0-9]+ GPUs; use --device cpu"),
    ],
)
def test_a_device_that_is_not_there_is_named(name, gpu, message):
    with pytest.raises(ApotfxError, match=message):
        pick_device(name, gpu)


def test_the_device_asked_for_is_picked():
    assert pick_device("cpu", None) == torch.device("cpu")
