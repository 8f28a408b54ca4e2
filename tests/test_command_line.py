"""What all tools do alike: they tell a mistake, a failing disk, a closed pipe and Ctrl-C in one line, and help at once."""

import dataclasses
import importlib
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path

import allocate
import arguments as arg
import bench
import bench_common
import bench_inference
import bench_train
import pytest
import table
import table_runs
import train
import zoo
import zoo_networks
from command_line import LONGEST_MESSAGE, Mistake, Parser, one_line, run_tool

from apotfx import ApotfxError, allocation, calibrate, engine, levels, policy
from apotfx.integer import load
from apotfx.training import config, data
from apotfx.training.recipes import RECIPES

DIRECTORY = Path(train.__file__).parent
TOOLS = sorted(path.stem for path in DIRECTORY.glob("*.py") if "__main__" in path.read_text())
SECONDS = 600  # after which a command line hangs; on a machine that does other things many of them take long


def test_the_parsers_know_what_the_library_takes():
    assert arg.SCHEMES == tuple(levels.SCHEMES)
    assert arg.BITS == range(levels.MIN_BITS, levels.MAX_BITS + 1) and arg.FLOAT_BITS == policy.FLOAT_BITS
    assert arg.DATASETS == data.DATASETS and arg.RECIPES == tuple(RECIPES)
    assert arg.CALIBRATIONS == sys.modules[calibrate.__module__].METHODS
    assert arg.ENGINES == engine.ENGINES and arg.BACKENDS == load.BACKENDS
    assert train.SCHEDULES == config.SCHEDULES and train.AUGMENTATIONS == config.AUGMENTATIONS
    defaults = {field.name: field.default for field in dataclasses.fields(config.TrainConfig)}
    assert train.DEFAULTS.items() <= defaults.items()
    assert allocate.BUDGETS == tuple(allocation.BUDGETS) and table.ABLATIONS == tuple(table_runs.ABLATIONS)
    assert bench.NETWORKS == tuple(bench_common.NETWORKS) and bench.FORMATS == tuple(bench_common.MEMORY_FORMATS)
    assert bench.TRAIN_VARIANTS == tuple(bench_train.MODES)
    assert bench.COMPILE == tuple(name for name, mode in bench_train.MODES.items() if mode.compile)
    assert bench.INFERENCE_VARIANTS[0] == bench_inference.BASE
    assert bench.INFERENCE_VARIANTS == tuple(bench_inference.MODES)
    assert zoo.NETWORK_LISTS == tuple(zoo_networks.LISTS)


# Arguments.


@pytest.mark.parametrize("parse, text, value", [
    (arg.count, "0", 0), (arg.positive, "7", 7), (arg.seed, str(2**63 - 1), 2**63 - 1), (arg.above_0, "1e-3", 1e-3),
    (arg.factor, "0", 0.0), (arg.share, "1", 1.0), (arg.decay, "0.5", 0.5), (arg.percent, "100", 100.0),
    (arg.path, "a b", Path("a b")), (arg.name, "x", "x"), (arg.several(arg.seed), "2,1,2", [2, 1]),
    (arg.some_of([2, 3]), "3", [3]),
], ids=lambda x: x if isinstance(x, str) else "")  # fmt: skip
def test_what_arguments_are_read_as(parse, text, value):
    assert parse(text) == value and type(parse(text)) is type(value)


NO_NUMBER = ["", "x", "1,5", "--", "nan", "inf", "-inf", "1e400", "-1", "\u0663x", "\udcff"]
NO_WHOLE = [*NO_NUMBER, "1.0", "1e3", "0x10", "1_000", " 1", "+1", "\uff11", "\u0663", "9" * 30, "9" * 5000, "1\n"]
BAD = {
    "count": NO_WHOLE, "positive": [*NO_WHOLE, "0", str(2**31)], "seed": [*NO_WHOLE, str(2**63)],
    "above_0": [*NO_NUMBER, "0", "1e-400"], "factor": NO_NUMBER, "share": [*NO_NUMBER, "1.0001"],
    "decay": [*NO_NUMBER, "1"], "percent": [*NO_NUMBER, "0", "100.1"], "path": ["", "a\0b"], "name": ["", "a\0b"],
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_arguments_refuse(name):
    for text in BAD[name]:
        with pytest.raises(arg.argparse.ArgumentTypeError, match="^got .*, expected ") as error:
            getattr(arg, name)(text)
        assert len(str(error.value)) < 200


def test_an_output_replaces_no_device(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    for text in ("/dev/null", str(tmp_path), str(tmp_path / "pipe"), str(tmp_path / "link")):
        with pytest.raises(arg.argparse.ArgumentTypeError, match="expected the name of a file, or a new one"):
            arg.output(text)
    assert arg.output(str(tmp_path / "new")) == tmp_path / "new" and arg.output(__file__) == Path(__file__)


# How a tool ends.


def ends(monkeypatch, run, argv=()):
    """The exit code of a tool that does `run`."""
    module = type(sys)("a_tool")
    module.run = run
    monkeypatch.setitem(sys.modules, "a_tool", module)
    return run_tool("a_tool", Parser("tool.py"), list(argv))


def failing(error):
    def run(args):
        raise error

    return run


@pytest.mark.parametrize("error, code, line", [
    (ApotfxError("layer x: no"), 2, "tool.py: error: layer x: no"),
    (FileNotFoundError(2, "No such file", "a\nb"), 2, "tool.py: error: [Errno 2] No such file: 'a\\nb'"),
    (BrokenPipeError(32, "Broken pipe"), 2, "tool.py: error: its output is not read to the end"),
    (KeyboardInterrupt(), 130, "stopped"), (KeyboardInterrupt("stopped at step 3"), 130, "stopped at step 3"),
    (MemoryError(), 2, "tool.py: error: not enough memory (MemoryError); take smaller images, batches or networks"),
    (ApotfxError("a\nb\x1b[2J\udcff"), 2, "tool.py: error: a b\\x1b[2J\\udcff"), (Mistake("no"), 2, "tool.py: error: no"),
], ids=lambda x: type(x).__name__ if isinstance(x, BaseException) else "")  # fmt: skip
def test_how_a_tool_ends(error, code, line, monkeypatch, capsys):
    assert ends(monkeypatch, failing(error)) == code
    assert capsys.readouterr() == ("", line + "\n")


def test_a_defect_shows_where_it_is(monkeypatch):
    with pytest.raises(ZeroDivisionError):
        ends(monkeypatch, lambda args: 1 / 0)


def test_the_exit_code_is_that_of_the_work(monkeypatch):
    assert [ends(monkeypatch, lambda args, code=code: code) for code in (None, 0, 1)] == [0, 0, 1]


def test_out_of_memory_is_told(monkeypatch, capsys):
    import torch

    assert ends(monkeypatch, lambda args: torch.empty(2**61, dtype=torch.uint8)) == 2
    assert capsys.readouterr().err.startswith("tool.py: error: not enough memory (")


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    assert ends(monkeypatch, failing(ApotfxError("no"))) == 2
    assert capsys.readouterr().err == ""


def test_a_long_message_keeps_both_ends():
    line = one_line("a" * 5000 + " z")
    assert len(line) < LONGEST_MESSAGE + 10 and line.startswith("aaa") and line.endswith("z")


def python(*command, **options):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    return subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, text=True, env=environment, **options)


@pytest.mark.parametrize("name", TOOLS)
def test_help_comes_before_torch(name):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = python("-X", "importtime", DIRECTORY / f"{name}.py", "--help", stdout=subprocess.PIPE)
    out, imports = process.communicate(timeout=SECONDS)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert process.returncode == 0 and out.startswith(f"usage: {name}.py")
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in imports.splitlines()}
    assert "argparse" in imported and not imported & {"torch", "apotfx", "numpy"}
    assert after.ru_utime - before.ru_utime < 1


@pytest.mark.parametrize("name", TOOLS)
def test_a_closed_pipe_is_one_line(name):
    reading, writing = os.pipe()
    os.close(reading)
    process = python(DIRECTORY / f"{name}.py", "--help", stdout=writing)
    os.close(writing)
    _, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, error) == (2, f"{name}.py: error: its output is not read to the end\n")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_behind_the_output_is_one_line():
    with open("/dev/full", "w") as full:
        process = python(DIRECTORY / "table.py", "--help", stdout=full)
        _, error = process.communicate(timeout=SECONDS)
    assert (process.returncode, error) == (2, "table.py: error: [Errno 28] No space left on device\n")


def test_ctrl_c_while_torch_is_imported_is_one_line():
    process = python(
        "-X", "importtime", DIRECTORY / "sizes.py", stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    with process.stderr:
        for line in process.stderr:
            if "torch" in line:  # the first part of it that was imported
                process.send_signal(signal.SIGINT)
                break
        rest = [line for line in process.stderr if not line.startswith("import time:")]
    assert (process.wait(timeout=SECONDS), rest) == (130, ["stopped\n"])


# Bad command lines.

HOSTILE = {
    "empty": lambda path: path.touch(), "directory": lambda path: path.mkdir(), "pipe": os.mkfifo,
    "zeros": lambda path: path.symlink_to("/dev/zero"), "loop": lambda path: path.symlink_to("loop"),
    "binary": lambda path: path.write_bytes(random.Random(0).randbytes(5000)),
    "text": lambda path: path.write_text("rules: [}\n"), "deep": lambda path: path.write_text("[" * 5000),
    "zip": lambda path: path.write_bytes(b"PK\3\4" + bytes(100)), "pickle": lambda path: path.write_bytes(b"\x80\4K\1."),
    "huge": lambda path: path.touch() or os.truncate(path, 2**40),
}  # fmt: skip
NO_FILE = [
    *HOSTILE,
    "nowhere",
    "x" * 300,
    "a/b/c",
    "\udcff",
    "a\nb",
    ".",
    "/",
    "/dev/zero",
    "/proc/self/mem",
    "",
    "~",
    "-",
]
NO_CHOICE = ["", "x", ",", "apot,", "APOT", "a" * 100_000, "apot\n", "\udcff", "4 4", "'", "__class__", "None", "1,,2"]
NO_NAME = ["../x", "/tmp/x", "a/../../b", "", ".", "a\nb", "x" * 300, "\udcff"]
CHECKPOINT = ["no.pt"]
FLAGS = {  # of each tool: how its command line begins, and what each flag does not take
    "train": ([], {
        "--bit": [*NO_WHOLE, "1", "9", "33"], "--epochs": BAD["positive"], "-b": BAD["positive"], "--seed": BAD["seed"],
        "--lr": BAD["above_0"], "--momentum": BAD["decay"], "--wd": BAD["factor"], "--ema": BAD["decay"],
        "--label-smoothing": BAD["share"], "--clip-lr": BAD["factor"], "--teacher-weight": BAD["share"],
        "--temperature": BAD["above_0"], "--image-size": BAD["positive"], "--train-images": [*BAD["positive"], "1"],
        "-j": BAD["count"], "-p": BAD["positive"], "--gpu": [*NO_WHOLE, "999"], "--power": NO_CHOICE,
        "--arch": NO_CHOICE, "--scheme": NO_CHOICE, "--schedule": NO_CHOICE, "--augment": NO_CHOICE, "--recipe": NO_CHOICE,
        "--clip-init": NO_CHOICE, "--engine": NO_CHOICE, "--device": [*NO_CHOICE, "cuda:99", "cuda:999", "cuda:-1", "mps", "meta"], "--dataset": NO_CHOICE, "--policy": NO_FILE,
        "--pretrained": NO_FILE, "--resume": NO_FILE, "--dataset folder --data": NO_FILE, "--dataset mnist --data": NO_FILE,
        "--no-such-flag": NO_CHOICE, "--explain": ["--seed"], "-e": ["--seed"],
    }),
    "verify": (["directory"], {"--images": BAD["positive"], "-b": BAD["positive"], "--backend": NO_CHOICE, "--data": [""]}),
    "verify ": ([], {"": NO_FILE}),
    "export": ([], {"--format c": NO_FILE, "--format onnx": NO_FILE, "x --format": NO_CHOICE}),
    "ptq": (CHECKPOINT, {
        "--bit": NO_CHOICE, "--scheme": NO_CHOICE, "--images": BAD["positive"], "--percentile": BAD["percent"],
        "--seed": BAD["seed"], "--policy": NO_FILE, "--json": ["", "directory", "pipe"],
    }),
    "ptq ": ([], {"": NO_FILE}),
    "allocate": ([*CHECKPOINT, "--output", "policy.yaml"], {
        "--average-bits": BAD["above_0"], "--budget": NO_CHOICE, "--schemes": NO_CHOICE, "--bits": NO_CHOICE,
        "--images": BAD["positive"], "-b": BAD["positive"], "--seed": BAD["seed"], "--plot": ["", "x.txt", "directory"],
        "--output": ["", "directory", "pipe", "no/where"],
    }),
    "allocate ": (["--output", "policy.yaml"], {"": NO_FILE}),
    "sizes": ([], {"--arch": NO_CHOICE, "--scheme": NO_CHOICE}),
    "bench": (["train"], {
        "--network": NO_CHOICE, "--variants": NO_CHOICE, "--bits": NO_CHOICE, "--scheme": NO_CHOICE, "--batch": BAD["positive"],
        "--image-size": BAD["positive"], "--memory-format": NO_CHOICE, "--threads": BAD["positive"],
        "--rounds": BAD["positive"], "--warmup": BAD["positive"], "--device": NO_CHOICE, "--json": ["", "directory", "pipe"],
    }),
    "bench ": ([], {"": NO_CHOICE, "fresh": [*NO_CHOICE, "{}", "[" * 5000, "[]", '{"what": "memory"}']}),
    "table": ([], {
        "--archs": NO_CHOICE, "--bits": NO_CHOICE, "--schemes": NO_CHOICE, "--recipes": NO_CHOICE, "--seeds": [text for text in BAD["seed"] if text != "1,5"],
        "--jobs": BAD["positive"], "--name": NO_NAME, "--dry-run -- --lr": BAD["above_0"], "--dry-run -- --seed": ["1"],
        "--dry-run -- --policy": NO_FILE,
    }),
    "zoo": ([], {
        "--list": NO_CHOICE, "--only": ["x", "resnet[", "\udcff"], "--jobs": BAD["positive"], "--bits": [*NO_WHOLE, "1", "9"],
        "--scheme": NO_CHOICE, "--timeout": BAD["positive"], "--memory": BAD["positive"],
        "--limit-seconds": BAD["positive"], "--only resnet18 --output": ["", "a\0b", "empty", "pipe", "x" * 300, "no\0"],
    }),
    "plot_levels": ([], {"": ["", "--help.pdf", "x.txt", "directory", "pipe", "no/where.png", "x" * 300 + ".png"]}),
}  # fmt: skip


def bad_lines():
    for tool, (start, flags) in FLAGS.items():
        for flag, values in flags.items():
            yield from ((tool.strip(), [*start, *flag.split(), value]) for value in values)


def chosen_lines(count):
    lines = list(bad_lines())
    return random.Random(0).sample(lines, count)


def stop(*_):
    raise TimeoutError(f"more than {SECONDS} s")


def check_bad_lines(lines, capfd, monkeypatch, tmp_path):
    for name in ("home", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # where matplotlib keeps what it found out
    for variable in ("APOTFX_DATA", "CC"):
        monkeypatch.delenv(variable, raising=False)
    for name, make in HOSTILE.items():
        make(Path(name))
    before = sorted(os.listdir())
    alarm = signal.signal(signal.SIGALRM, stop)
    try:
        for tool, argv in lines:
            shown = f"{tool}.py {' '.join(text[:80] for text in argv)!a}"
            signal.alarm(SECONDS)
            try:
                code = importlib.import_module(tool).main(argv)
            except BaseException as error:
                raise AssertionError(f"{shown}: {type(error).__name__}: {error}") from error
            finally:
                signal.alarm(0)
            out, err = capfd.readouterr()
            last = err.splitlines()[-1] if err else ""
            assert code == 2, f"{shown}: exit code {code}: {out[:300]}{err[:300]}"
            assert last.startswith(f"{tool}.py: error: ") and err.endswith(last + "\n"), f"{shown}: {err[:500]}"
            assert last.isprintable() and len(last) < 1200 and "Traceback" not in err, f"{shown}: {err[:500]}"
            assert err.count("\n") == 1 or "note: " in err, f"{shown}: {err[:500]}"
            assert sorted(os.listdir()) == before, f"{shown}: wrote {set(os.listdir()) - set(before)}"
    finally:
        signal.signal(signal.SIGALRM, alarm)


def test_bad_command_lines_are_one_line_and_write_nothing(capfd, monkeypatch, tmp_path):
    check_bad_lines(chosen_lines(150), capfd, monkeypatch, tmp_path)


@pytest.mark.nightly
def test_every_bad_command_line(capfd, monkeypatch, tmp_path):
    lines = list(bad_lines())
    assert len(lines) > 500
    check_bad_lines(lines, capfd, monkeypatch, tmp_path)
