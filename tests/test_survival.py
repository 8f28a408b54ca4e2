"""Campaigns: runs that are killed wherever they write, and checkpoints that are damaged.

Seeded, and small enough for every run of the tests; `pytest -m nightly tests/test_survival.py` runs the full counts.
"""

import dataclasses
import io
import json
import os
import random
import re
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from killing_helpers import server
from test_loop import fit, network, trainer

from apotfx.errors import ApotfxError
from apotfx.tensors import pack, unpack
from apotfx.training.checkpoint import FORMAT, load_state, read_checkpoint

NIGHTLY = pytest.param(True, marks=pytest.mark.nightly, id="full")
SMALL = pytest.param(False, id="small")


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


# Killed runs.

FLAGS = "--arch mlp --dataset digits --bit 4 --epochs 3 --batch-size 200 --train-images 600 -p 1 --device cpu".split()
RUN = Path("runs/r")
TIMES = {"seconds": 0, "seconds_by_part": {}}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A server, a directory where it trained undisturbed, how many calls wrote, and how many seconds it took."""
    with server() as trains:
        for name in ("first", "whole"):  # the first one compiles kernels
            directory, began = tmp_path_factory.mktemp(name), time.perf_counter()
            code, calls = trains.train(directory, *FLAGS, "--name", "r")
            assert code == 0, (directory / "log").read_text()
        yield trains, directory, calls, time.perf_counter() - began


def check_same(whole, part):
    """The runs in the two directories ended alike, and nothing is left of the kills."""
    whole, part = whole / RUN, part / RUN
    for name in ("checkpoint.pt", "best.pt"):
        a, b = (read_checkpoint(directory / name) for directory in (whole, part))
        for field in ("state", "config", "best"):
            assert equal(getattr(a, field), getattr(b, field)), (name, field)
        if name == "checkpoint.pt":
            for key in a.resume.keys() - {"seconds", "clock"}:
                assert equal(a.resume[key], b.resume[key]), key
    for name in ("weights.safetensors", "manifest.json"):
        assert (whole / "integer" / name).read_bytes() == (part / "integer" / name).read_bytes()
    a, b = (json.loads((directory / "result.json").read_text()) for directory in (whole, part))
    assert a | TIMES == b | TIMES
    names = [{name for name in os.listdir(directory) if "tfevents" not in name} for directory in (whole, part)]
    assert names[0] == names[1]


@pytest.mark.parametrize("full", [SMALL, NIGHTLY])
def test_killed_runs_end_as_if_nothing_had_happened(full, trained, tmp_path):
    trains, whole, calls, seconds = trained
    rng = random.Random(0)
    kills = [{"point": point} for point in rng.sample(range(calls), min(calls, 45) if full else 5)]
    kills += [{"seconds": rng.uniform(0, seconds)} for _ in range(60 - len(kills) if full else 1)]
    states = Counter()
    for i, kill in enumerate(kills):
        directory = tmp_path / str(i)
        directory.mkdir()
        code, _ = trains.train(directory, *FLAGS, "--name", "r", **kill)
        assert code == -signal.SIGKILL or code == 0 and "seconds" in kill, (directory / "log").read_text()
        started, finished = ((directory / RUN / name).exists() for name in ("checkpoint.pt", "result.json"))
        states["finished" if finished else "resumed" if started else "started again"] += 1
        if i % 3 == 0 and not finished:  # killed a second time
            again = ["--resume", RUN] if started else [*FLAGS, "--name", "r"]
            trains.train(directory, *again, point=rng.randrange(20))
            started, finished = ((directory / RUN / name).exists() for name in ("checkpoint.pt", "result.json"))
        if not finished:
            code, _ = trains.train(directory, *(["--resume", RUN] if started else [*FLAGS, "--name", "r"]))
            assert code == 0, (kill, (directory / "log").read_text())
            check_same(whole, directory)
    print(f"{len(kills)} kills: {dict(states)}")
    assert states["resumed"] > 1 and states["started again"] > 0


def test_a_killed_evaluation_is_repeated_by_the_same_command(trained, tmp_path):
    trains, whole, _, _ = trained
    flags = ["-e", "--resume", whole / RUN, "--name", "r"]
    code, calls = trains.train(tmp_path, *flags)
    assert code == 0, (tmp_path / "log").read_text()
    export = (tmp_path / RUN / "integer" / "weights.safetensors").read_bytes()
    for point in random.Random(0).sample(range(3, calls), 2):
        directory = tmp_path / str(point)
        directory.mkdir()
        assert trains.train(directory, *flags, point=point)[0] == -signal.SIGKILL
        if not (directory / RUN / "result.json").exists():
            assert trains.train(directory, *flags)[0] == 0, (directory / "log").read_text()
        assert sorted(os.listdir(directory / RUN)) == ["config.yaml", "integer", "result.json"] + ["run.lock"] * (
            directory / RUN / "run.lock"
        ).exists()
        assert (directory / RUN / "integer" / "weights.safetensors").read_bytes() == export


# Damaged checkpoints.


def damaged(data, rng):
    """`data` with a random damage, half of the time where its structure is described."""
    data = bytearray(data)
    ends = [range(min(4096, len(data))), range(max(0, len(data) - 4096), len(data))]
    place = rng.choice(rng.choice([*ends, range(len(data)), range(len(data))]))
    size = rng.choice([1, 2, 8, 100, 5000])
    match rng.randrange(9):
        case 0:
            data[place] ^= 1 << rng.randrange(8)
        case 1:
            data[place] = rng.randrange(256)
        case 2:
            data[place : place + size] = rng.randbytes(len(data[place : place + size]))
        case 3:
            data[place : place + size] = bytes(len(data[place : place + size]))
        case 4:
            del data[place:]
        case 5:
            del data[place : place + size]
        case 6:
            data[place:place] = rng.randbytes(size)
        case 7:
            data[place:place] = data[place : place + size]
        case 8:
            other = rng.randrange(len(data))
            first, second = slice(place, place + size), slice(other, other + size)
            data[first], data[second] = data[second], data[first]
    return bytes(data)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each sort of file one, by name."""
    directory = tmp_path_factory.mktemp("checkpoints")
    t = fit(trainer(), directory)
    files = {path.name: path.read_bytes() for path in directory.glob("*.pt")}
    state = t.state_dict()
    old = {"format": FORMAT, "version": 1, "config": dataclasses.asdict(t.config), **state}
    old["random"] = {"torch": torch.get_rng_state(), "cuda": [], "python": [1, 2, 3]}
    old["optimizer"] = t.optimizer.state_dict()
    del old["momentum"]
    torch.save(old, directory / "old.pt")
    published = {
        "conv1.weight": torch.rand(4, 1, 3, 3),
        "layer1.0.conv1.weight": torch.rand(4, 4, 3, 3),
        "layer1.0.conv1.act_alpha": torch.tensor(8.0),
        "layer1.0.conv1.weight_alpha": torch.tensor(3.0),
        "fc.weight": torch.rand(3, 4),
    }
    published = {f"module.{name}": tensor for name, tensor in published.items()}
    torch.save({"epoch": 3, "state_dict": published, "best_acc1": torch.tensor(99.0)}, directory / "published.pt")
    return files | {name: (directory / name).read_bytes() for name in ("old.pt", "published.pt")}


def read(path, data):
    """What the checkpoint says, or None if it is refused, in one short line."""
    path.write_bytes(data)
    try:
        return dataclasses.asdict(read_checkpoint(path))
    except ApotfxError as error:
        assert re.match(r"checkpoint \S+: ", str(error)) and str(error).isprintable() and len(str(error)) < 1000
        return None


@pytest.mark.parametrize("full", [SMALL, NIGHTLY])
def test_damaged_checkpoints_are_refused_or_equal(full, checkpoints, tmp_path):
    rng, outcomes = random.Random(0), Counter()
    expected = {name: read(tmp_path / "x.pt", data) for name, data in checkpoints.items()}
    assert None not in expected.values() and len(expected) == 4
    for i in range(20_000 if full else 2000):
        name = sorted(checkpoints)[i % 4]
        found = read(tmp_path / "x.pt", damaged(checkpoints[name], rng))
        outcomes["refused" if found is None else "equal" if equal(found, expected[name]) else "different"] += 1
    print(dict(outcomes))
    assert outcomes["different"] == 0 and outcomes["refused"] > 0.7 * outcomes.total()


BAD = [None, True, -1, 2**70, 0.5, 1e300, "x", "a\n" * 500, [], {}, [[]], {"a": 1}, {"a": {"b": [1]}}]


def forged(data):
    """(tensors, document) of `data`, one of ours, with each part replaced by each of `BAD`, or by other tensors."""
    tensors, document = unpack(data, FORMAT)
    places = [(key,) for key in document] + [(k, key) for k, v in document.items() if isinstance(v, dict) for key in v]
    for place in places:
        for bad in BAD:
            changed = json.loads(json.dumps(document))
            (changed if len(place) == 1 else changed[place[0]])[place[-1]] = bad
            yield tensors, changed
    for name, tensor in tensors.items():
        others = [tensor[None], tensor.reshape(-1)[:0], tensor.double(), tensor.to(torch.int8), tensor.bool()]
        for other in [*others, *([tensor.float() * torch.nan] if tensor.numel() else [])]:
            yield tensors | {name: other}, document
        yield {key: value for key, value in tensors.items() if key != name}, document
        yield tensors | {f"{name}.more": tensor}, document


def forged_version_1(data):
    """The content of `data`, a file of `torch.save`, with each part replaced by each of `BAD` and by tensors."""
    content = torch.load(io.BytesIO(data), weights_only=True)
    for place in [(key,) for key in content] + [(k, key) for k, v in content.items() if isinstance(v, dict) for key in v]:
        for bad in [*BAD, torch.ones(3), torch.empty(0), torch.tensor(1), {"": torch.ones(2)}, {3: torch.ones(2)}]:
            inner = content if len(place) == 1 else content[place[0]]
            changed = inner | {place[-1]: bad}
            yield changed if len(place) == 1 else content | {place[0]: changed}


def saved(content):
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


@pytest.mark.parametrize("full", [SMALL, NIGHTLY])
@pytest.mark.parametrize("name", ["checkpoint.pt", "best.pt", "old.pt", "published.pt"])
def test_forged_checkpoints_are_refused_or_train(name, full, checkpoints, tmp_path):
    """Their checksums are right; whatever a stranger writes there, nothing but a refusal or a network comes of it."""
    outcomes, net, t = Counter(), network(), trainer()
    is_ours = name in ("checkpoint.pt", "best.pt")
    contents = list((forged if is_ours else forged_version_1)(checkpoints[name]))
    for content in contents if full else random.Random(0).sample(contents, 60):
        (tmp_path / "checkpoint.pt").write_bytes(pack(*content, FORMAT) if is_ours else saved(content))
        try:
            checkpoint = read_checkpoint(tmp_path)
            load_state(net, checkpoint)
            t.load_state_dict(checkpoint.resume or t.state_dict(), "checkpoint")
            outcomes["taken"] += 1
        except ApotfxError as error:
            assert str(error).isprintable() and len(str(error)) < 1000
            assert "Error: " not in str(error)  # what nobody foresaw
            outcomes["refused"] += 1
    print(f"{name}: {dict(outcomes)} of {len(contents)}")
    assert outcomes["refused"] > 0.5 * outcomes.total()
