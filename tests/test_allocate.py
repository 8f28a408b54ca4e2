"""tools/allocate.py as a user calls it, on scikit-learn's digits."""

import itertools
import os
import sys
from dataclasses import asdict
from pathlib import Path

import allocate as tool
import pytest
import train

from apotfx import BitPolicy, plan, quantize
from apotfx.training.build import build_float
from apotfx.training.checkpoint import save_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset

ROOT = Path(__file__).parents[1]


CONFIG = TrainConfig(arch="resnet10", bit=32, dataset="digits", image_size=12)


@pytest.fixture(scope="module")
def network():
    dataset = load_dataset("digits", None, image_size=12)
    model, _ = build_float(CONFIG, dataset)
    return model


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, network):
    """Of an untrained float network."""
    path = tmp_path_factory.mktemp("runs") / "best.pt"
    save_checkpoint(path, {"model": network.state_dict(), "ema": None, "config": asdict(CONFIG)})
    return path


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APOTFX_DATA", raising=False)


def call(*flags):
    return tool.main([*map(str, flags), "--device", "cpu"])


QUICK = ["--images", "16", "--batch-size", "8", "--schemes", "apot", "--bits", "2,4"]


@pytest.mark.parametrize("budget", ["size", "macs"])
def test_the_tool_writes_a_policy_that_training_takes_as_it_is(checkpoint, network, capsys, budget):
    flags = [
        checkpoint,
        *QUICK,
        "--schemes",
        "apot,uniform",
        "--bits",
        "8,2,4",
        "--budget",
        budget,
        "--output",
        "policy.yaml",
    ]
    assert call(*flags, "--plot", "trade-off.png") == 0
    out = capsys.readouterr().out
    assert out.endswith("\npolicy: policy.yaml\ntrade-off: trade-off.png\n")
    assert Path("trade-off.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(os.listdir()) == ["policy.yaml", "trade-off.png"]

    planned = plan(network, BitPolicy.from_yaml("policy.yaml")).layers
    rows = {cells[1]: cells for cells in (line.split(" ") for line in out.splitlines()) if len(cells) > 2}
    for p in planned:
        assert f"{p.weight.bits}-bit" in rows[p.facts.name] and p.weight.scheme in rows[p.facts.name]
        assert p.input.bits == p.weight.bits in (2, 4, 8)
        if p.facts.is_first or p.facts.is_last:
            assert (p.weight.bits, p.weight.scheme) == (8, "uniform") and "(kept)" in rows[p.facts.name]
    inner = [p for p in planned if not (p.facts.is_first or p.facts.is_last)]
    weights = {p.facts.name: network.get_submodule(p.facts.name).weight.numel() for p in inner}
    if budget == "size":
        spent = sum(weights[p.facts.name] * p.weight.bits for p in inner)
        assert spent <= 4 * sum(weights.values())
        assert f"| allocated         |             {spent / sum(weights.values()):.3f} |" in out

    assert train.main(["--arch", "resnet10", "--dataset", "digits", "--policy", "policy.yaml", "--dry-run"]) == 0


def test_all_the_settings_together(checkpoint, network, capsys):
    flags = [
        "--images",
        20,
        "--batch-size",
        10,
        "--schemes",
        "pot,apot",
        "--bits",
        "5,3",
        "--separate",
        "--allocate-ends",
    ]
    assert (
        call(checkpoint, *flags, "--average-bits", 3.5, "--budget", "macs", "--output", "p.yaml", "--plot", "p.svg")
        == 0
    )
    planned = plan(network, BitPolicy.from_yaml("p.yaml")).layers
    assert {p.weight.bits for p in planned} | {p.input.bits for p in planned} == {3, 5}
    assert any(p.weight.bits != p.input.bits for p in planned)
    assert "kept" not in capsys.readouterr().out and "<svg" in Path("p.svg").read_text()


def test_a_run_directory_will_do(checkpoint):
    (checkpoint.parent / "checkpoint.pt").write_bytes(checkpoint.read_bytes())
    assert call(checkpoint.parent, *QUICK, "--output", "policy.yaml") == 0


@pytest.fixture(scope="module")
def quantized_checkpoint(tmp_path_factory, network):
    path = tmp_path_factory.mktemp("runs") / "best.pt"
    state = quantize(network, BitPolicy.default()).state_dict()
    save_checkpoint(path, {"model": state, "ema": None, "config": asdict(CONFIG) | {"bit": 4}})
    return path


@pytest.mark.parametrize("flags, message", [
    (["nowhere.pt"], "checkpoint nowhere.pt: no such file"),
    (["QUANTIZED"], "checkpoint QUANTIZED: is not a float network; train one with --bit 32"),
    (["CKPT", "--average-bits", "1"], "average of 1 bits: cannot be kept; the options take 2 or more"),
    (["CKPT", "--budget", "time"], "argument --budget: got 'time', expected one of size, macs"),
    (["CKPT", "--schemes", "apot,log"], "argument --schemes: got 'log', expected one of apot, pot, uniform"),
    (["CKPT", "--bits", "4,9"], "argument --bits: got '9', expected one of 2, 3"),
    (["CKPT", "--bits", "4,x"], "argument --bits: got 'x', expected one of 2, 3"),
    (["CKPT", "--images", "2000"], "--images 2000: expected 1 to 1294"),
    (["CKPT", "--batch-size", "33"], "--batch-size 33: expected 1 to 16"),
    (["CKPT", "--output", "no/where.yaml"], "--output no/where.yaml: there is no directory no; create it"),
    (["CKPT", "--plot", "plot.txt"], "--plot plot.txt: expected a name that ends in .png, .svg, .pdf"),
    (["CKPT", "--device", "tpu"], "--device tpu: unknown"),
], ids=itertools.count())  # fmt: skip
def test_mistakes_get_one_line_and_2(checkpoint, quantized_checkpoint, capsys, flags, message):
    paths = {"CKPT": str(checkpoint), "QUANTIZED": str(quantized_checkpoint)}
    flags = [paths.get(flag, flag) for flag in flags]
    assert tool.main(["--output", "policy.yaml", "--device", "cpu", *QUICK, *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"allocate.py: error: {message.replace('QUANTIZED', paths['QUANTIZED'])}")
    assert error.count("\n") == 1 and not os.listdir()


@pytest.mark.parametrize("package", ["scipy", "matplotlib"])
def test_a_missing_package_is_one_line(checkpoint, capsys, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    assert call(checkpoint, *QUICK, "--output", "policy.yaml", "--plot", "plot.png") == 2
    assert capsys.readouterr().err == (
        f"allocate.py: error: the package {package} is missing; pip install 'apotfx[allocate]'\n"
    )
    if package == "matplotlib":
        assert call(checkpoint, *QUICK, "--output", "policy.yaml") == 0


def test_what_the_solver_prints_itself_is_not_shown(capfd):
    with tool.silent_solver():
        os.write(1, b"debugging\n")
    print("shown")
    assert capfd.readouterr().out == "shown\n"


def test_a_failing_disk_leaves_the_old_policy(checkpoint, capsys, monkeypatch):
    Path("policy.yaml").write_text("old")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    assert call(checkpoint, *QUICK, "--output", "policy.yaml") == 2
    assert "No space left on device" in capsys.readouterr().err
    assert Path("policy.yaml").read_text() == "old" and os.listdir() == ["policy.yaml"]


def test_the_network_is_measured_on_training_images_alone(checkpoint, monkeypatch):
    seen = []
    load = tool.load_dataset

    def without_test_images(*args, **kwargs):
        dataset = load(*args, **kwargs)
        for split in (dataset.val, dataset.test):
            split.images.fill_(0)
            split.labels.fill_(10**6)  # no class
        seen.append(dataset)
        return dataset

    assert call(checkpoint, *QUICK, "--output", "a.yaml") == 0
    monkeypatch.setattr(tool, "load_dataset", without_test_images)
    Path("b.yaml").write_text("of before")
    assert call(checkpoint, *QUICK, "--output", "b.yaml") == 0
    assert seen and Path("a.yaml").read_bytes() == Path("b.yaml").read_bytes()
