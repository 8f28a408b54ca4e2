"""A run's directory: who may have it, and what it says of where it was made."""

import os
import re
import shutil
from pathlib import Path

import pytest
import torch

from apotfx import engine
from apotfx.errors import ApotfxError
from apotfx.files import locked
from apotfx.training.checkpoint import Checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.distributed import Processes
from apotfx.training.run import LOCK, continued_run, environment, new_run, run_path, tell_differences

CONFIG = TrainConfig(arch="mlp")


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def make(directory, *names):
    directory.mkdir(parents=True, exist_ok=True)
    for name in names:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(b"")
    return directory


def claim(name="a"):
    with new_run(name, CONFIG, "digits") as path:
        return path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "--name '': expected the name of a directory in runs"),
        ("a//b", "--name 'a//b': expected the name of a directory in runs"),
        ("../a", "--name '../a': expected the name of a directory in runs"),
        ("/a", "--name '/a': expected the name of a directory in runs"),
        ("a\nb", r"--name a\nb: expected printable characters in UTF-8"),
        ("a\x1b[2J", r"--name a\x1b[2J: expected printable characters in UTF-8"),
        ("a\0", r"--name a\x00: expected printable characters in UTF-8"),
        (os.fsdecode(b"a\xff"), r"--name a\udcff: expected printable characters in UTF-8"),
        ("é" * 128, "expected at most 255 bytes between slashes"),
        ("/".join(["x" * 250] * 16), "expected a path of at most 3796 bytes"),
    ],
)
def test_a_name_that_no_directory_could_have_is_refused(name, message):
    with pytest.raises(ApotfxError, match=re.escape(message)) as error:
        run_path(name)
    assert "\n" not in str(error.value) and os.listdir() == []


@pytest.mark.parametrize("name", ["a", "é" * 127, "a b", "table/default/resnet10"])
def test_any_other_name_gives_a_directory(name):
    assert claim(name) == Path("runs", name) and Path("runs", name).is_dir()


@pytest.mark.parametrize(
    "names",
    [
        [],
        ["config.yaml"],
        ["config.yaml", LOCK],
        ["notes.txt", LOCK],
        ["config.yaml", LOCK, "integer/manifest.json"],
    ],
    ids=" ".join,
)
def test_a_directory_without_a_checkpoint_does_not_block_its_name(names):
    make(Path("runs/a"), *names, ".checkpoint.pt.01234567.apotfx-tmp")
    with new_run("a", CONFIG, "digits") as path:
        assert path == Path("runs/a")
        assert sorted(os.listdir(path)) == sorted({name.split("/")[0] for name in [*names, LOCK]})


@pytest.mark.parametrize(
    "names",
    [
        ["checkpoint.pt", LOCK],
        ["best.pt"],
        ["result.json"],
        ["config.yaml", "result.json", LOCK],
        ["integer/manifest.json"],
        ["b/config.yaml"],
        ["b/c/config.yaml"],
    ],
    ids=" ".join,
)
def test_a_directory_with_something_to_lose_keeps_its_name(names):
    for name in names:
        make(Path("runs/a") / Path(name).parent, Path(name).name)
    with pytest.raises(ApotfxError, match="--name a: runs/a exists; choose another name, or continue it"):
        claim()
    shutil.rmtree("runs/a")
    Path("runs/a").touch()
    with pytest.raises(ApotfxError, match="--name a: runs/a exists"):
        claim()


@pytest.mark.parametrize("target", ["a", "nowhere", "/dev/null"])
def test_a_link_that_is_no_directory_keeps_its_name(target):
    Path("runs").mkdir()
    Path("runs/a").symlink_to(target)
    with pytest.raises(ApotfxError, match="--name a: runs/a exists; choose another name"):
        claim()
    assert os.listdir("runs") == ["a"] and os.readlink("runs/a") == target


def test_a_link_in_the_place_of_a_parent_is_named():
    Path("runs").symlink_to("nowhere")
    with pytest.raises(FileExistsError, match="File exists: 'runs'"):
        claim()


def test_two_processes_do_not_get_one_directory():
    with new_run("a", CONFIG, "digits") as path, pytest.raises(ApotfxError, match="--name a: runs/a exists"):
        claim()
    make(path, "checkpoint.pt")
    with continued_run(path), pytest.raises(ApotfxError, match="--resume runs/a: another process works on it"):
        with continued_run(path):
            pass
    with continued_run(path):  # the lock is free again
        pass
    with locked(path / LOCK), pytest.raises(ApotfxError, match="another process works on it"), continued_run(path):
        pass


def test_a_run_that_was_finished_meanwhile_is_not_continued():
    path = make(Path("runs/a"), "checkpoint.pt")
    with continued_run(path):
        make(path, "result.json")
    assert not (path / LOCK).exists()
    with pytest.raises(ApotfxError, match="--resume runs/a: the run is finished; -e --resume runs/a evaluates it"):
        with continued_run(path):
            pass


def test_names_are_made_up_past_those_that_are_taken():
    base = Path("runs/mlp-apot4-digits")
    with new_run(None, CONFIG, "digits") as first, new_run(None, CONFIG, "digits") as second:
        assert (first, second) == (base, Path(f"{base}-2"))
    assert claim(None) == base  # left without a checkpoint
    make(base, "checkpoint.pt")
    assert claim(None) == Path(f"{base}-2")


@pytest.mark.parametrize(
    ("around", "names", "what"),
    [
        ("runs/a", ["config.yaml", "checkpoint.pt"], "run"),
        ("runs/a", ["config.yaml", "run.lock"], "run"),
        ("runs", ["manifest.json", "weights.safetensors"], "export"),
        (".", ["config.yaml", "result.json"], "run"),
    ],
)
def test_no_run_lies_in_another_run_or_export(around, names, what, tmp_path):
    make(Path(around), *names)
    message = f"runs/a/b: lies in the {what} {(tmp_path / around).resolve()};"
    with pytest.raises(ApotfxError, match=re.escape(message)):
        claim("a/b")
    assert not Path("runs/a/b").exists()
    make(Path("runs/c"), "config.yaml", "manifest.json")  # neither
    if around == "runs/a":
        assert claim("c/d") == Path("runs/c/d")


def test_what_differs_from_where_a_run_was_made_is_told():
    now = environment(torch.device("cpu"), Processes("cpu"), engine.choose("eager"))
    assert {"device", "processor", "threads", "processes", "engine", "torch", "python", "apotfx", "commit"} <= now.keys()
    assert all(isinstance(value, str) for value in now.values()) and now["engine"] == "eager"
    made = [Checkpoint(Path("x.pt"), {}, CONFIG, made_with=before) for before in (now, now | {"threads": "64"}, {})]
    told = [tell_differences(checkpoint, now) for checkpoint in made]
    consequence = "an uninterrupted run may end with other bits, though not another quality"
    assert told[0] is None
    assert told[1] == f"goes on with threads {torch.get_num_threads()} (before: 64); {consequence}"
    assert told[2] == f"x.pt does not say what it was made with; {consequence}"
