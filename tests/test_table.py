"""tools/table.py: which runs there are, how they are run, and what is made of their results."""

import fcntl
import importlib.util
import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import table
import table_report
import table_runs
from table_runs import ABLATIONS, LocalExecutor, Run, TableDirectory, execute, parse_flags, with_needed

from apotfx.errors import ApotfxError
from apotfx.policy import BitPolicy
from apotfx.training.checkpoint import read_checkpoint
from apotfx.training.recipes import RECIPES, best

TOOL = Path(table.__file__)
QUICK = ["--dataset", "digits", "--image-size", "16", "--epochs", "1", "--train-images", "96", "--batch-size", "32"]
FLOAT_10 = Run("resnet10", "float", 32, best.START, 7)
TEACHERS = tuple(Run(arch, "float", 32, best.START, seed) for arch, seed in best.TEACHERS)


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APOTFX_DATA", raising=False)


def call(*flags, quick=QUICK):
    return table.main([*map(str, flags), "--", *quick])


def value(flags, flag):
    return flags[flags.index(flag) + 1]


class TestWhichRuns:
    def test_names_differ(self):
        every = [
            Run(arch, scheme, bits, recipe, seed)
            for arch in ("resnet10", "torchvision/resnet18")
            for scheme, bits in (("apot", 2), ("uniform", 2), ("apot", 3), ("float", 32))
            for recipe in (*RECIPES, *ABLATIONS)
            for seed in (0, 1)
        ]
        assert len({run.name for run in every}) == len(every)
        assert all(len(Path(run.name).parts) == 2 for run in every)

    @pytest.mark.parametrize("recipe", ["default", "published"])
    def test_other_recipes_need_no_other_runs(self, recipe):
        assert Run("resnet10", "apot", 2, recipe, 0).needs == ()

    def test_the_best_recipe_lowers_the_bits_and_has_teachers(self):
        chain = [Run("resnet10", "uniform", bits, "best", 7) for bits in best.LOWERING]
        assert [run.pretrained for run in chain] == [FLOAT_10, *chain[:-1]]
        assert all(run.teachers == TEACHERS for run in chain)
        assert FLOAT_10.needs == ()

    @pytest.mark.parametrize("bits", [8, 6, 5])
    def test_bits_above_the_lowering_start_from_float(self, bits):
        assert Run("resnet10", "apot", bits, "best", 7).pretrained == FLOAT_10

    def test_ablations_of_what_a_run_starts_from(self):
        run = Run("resnet10", "apot", 2, "best-no-distillation", 7)
        assert run.teachers == () and run.pretrained == replace(run, bits=3)
        run = replace(run, recipe="best-no-lowering")
        assert run.pretrained == FLOAT_10 and run.teachers == TEACHERS

    def test_what_is_needed_comes_before(self):
        ordered = with_needed(
            [Run("resnet10", "apot", bits, recipe, 7) for recipe in ("best", *ABLATIONS) for bits in (2, 3)]
        )
        assert len(set(ordered)) == len(ordered)
        for i, run in enumerate(ordered):
            assert set(run.needs) <= set(ordered[:i])

    def test_the_matrix(self):
        args = table.make_parser().parse_args(["--archs", "resnet10", "--bits", "32,3", "--seeds", "4,5"])
        assert table.matrix(args) == [
            Run("resnet10", scheme, bits, "default", seed)
            for seed in (4, 5)
            for scheme, bits in (("float", 32), ("apot", 3), ("uniform", 3))
        ]
        assert len(table.matrix(table.make_parser().parse_args([]))) == 48


class TestFlags:
    def test_of_a_run(self):
        directory = TableDirectory("t", ["--epochs", "3"])
        flags = directory.new_flags(Run("resnet10", "uniform", 3, "published", 5))
        assert flags == [
            "--arch", "resnet10", "--bit", "3", "--recipe", "published", "--scheme", "uniform",
            "--epochs", "3", "--seed", "5", "--name", "t/published/resnet10-uniform3-s5",
        ]  # fmt: skip

    def test_of_the_best_recipe(self):
        run = Run("resnet10", "apot", 3, "best", 5)
        flags = TableDirectory("t").new_flags(run)
        assert value(flags, "--pretrained") == "runs/t/best/resnet10-apot4-s5/checkpoint.pt"
        assert [b for a, b in zip(flags, flags[1:]) if a == "--teacher"] == [
            f"runs/t/{best.START}/{arch}-float-s{seed}/checkpoint.pt" for arch, seed in best.TEACHERS
        ]

    @pytest.mark.parametrize("flags, epochs", [((), best.SETTINGS["epochs"]), (("--epochs", "2"), 2)])
    def test_without_lowering_a_run_has_the_epochs_of_all_of_it(self, flags, epochs):
        for stages, bits in enumerate(best.LOWERING, 1):
            run = Run("resnet10", "apot", bits, "best-no-lowering", 5)
            assert parse_flags(TableDirectory("t", flags).new_flags(run)).epochs == stages * epochs

    @pytest.mark.parametrize("recipe", ABLATIONS)
    def test_every_ablation_differs_from_the_best_recipe_in_its_part(self, recipe):
        directory = TableDirectory("t")
        run = Run("resnet10", "apot", 3, "best", 5)
        best_flags, flags = directory.new_flags(run), directory.new_flags(replace(run, recipe=recipe))
        assert value(flags, "--recipe") == "best"
        changes = {
            "best-no-distillation": "--teacher" not in flags,
            "best-no-lowering": value(flags, "--pretrained") == f"runs/t/{best.START}/resnet10-float-s5/checkpoint.pt",
            "best-fixed-clips": "--clip-lr 0" in " ".join(flags),
            "best-no-ema": "--ema 0" in " ".join(flags),
        }
        assert "--policy" not in best_flags and not any(f"--{part}" in best_flags for part in ("clip-lr", "ema"))
        if recipe in changes:
            assert changes[recipe] and "--policy" not in flags
            return
        run = replace(run, recipe=recipe)
        for needed in run.needs:
            directory.run_dir(needed).mkdir(parents=True)
            (directory.run_dir(needed) / "checkpoint.pt").touch()
        directory.prepare(run)
        policy = BitPolicy.from_yaml(value(flags, "--policy"))
        default = BitPolicy.default(3, "apot")
        assert policy != default
        if recipe == "best-same-bits":
            assert policy.rules == default.rules[-1:]
        else:
            changed = {
                "best-no-normalization": {"normalization": "none"},
                "best-per-channel": {"granularity": "channel"},
            }
            assert policy.rules == tuple(replace(rule, **changed[recipe]) for rule in default.rules)

    @pytest.mark.parametrize(
        "flags, message",
        [
            (["--bit", "3"], "-- --bit: the table sets it; leave it out"),
            (["--resume", "x"], "-- --resume: the table sets it"),
            (["--teacher", "x"], "-- --teacher: the table sets it"),
            (["--no-such-flag"], "-- --no-such-flag: unrecognized arguments: --no-such-flag; see python tools/"),
            (["--lr", "abc"], "-- --lr abc: argument --lr: got 'abc', expected a finite number above 0; see python tools/"),
            (["--lr", "-1"], "-- --lr -1: argument --lr: got '-1', expected a finite number above 0"),
            (["--gpu", "1"], "-- a numbered GPU: each training sees one; choose with CUDA_VISIBLE_DEVICES"),
            (["--device", "cuda:1"], "-- a numbered GPU: each training sees one"),
            (["--dataset", "mnits"], "unknown data set 'mnits': expected one of mnist, "),
        ],
    )  # fmt: skip
    def test_wrong_flags_for_all(self, flags, message, capsys):
        assert table.main(["--", *flags]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"table.py: error: {message}") and error.count("\n") == 1
        assert not os.path.exists("runs") or not list(Path("runs").rglob("config.yaml"))

    def test_a_stopped_run_keeps_the_flags_for_all(self):
        directory = TableDirectory("t", ["--device", "cpu", "--ema", "0.9"])
        run = Run("resnet10", "apot", 3, "best-no-ema", 5)
        directory.run_dir(run).mkdir(parents=True)
        (directory.run_dir(run) / "checkpoint.pt").touch()
        flags = directory.flags_now(run)
        assert flags == ["--resume", f"runs/t/{run.name}", "--device", "cpu", "--ema", "0.9", "--ema", "0"]
        assert table_runs.parse_flags(flags).ema == 0  # what an ablation takes out stays out


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--archs", "resnet9"], "resnet9"),
        (["--bits", "9"], "argument --bits: got '9', expected one of 2, 3, 4, 5, 6, 7, 8, 32"),
        (["--recipes", "worst"], "argument --recipes: got 'worst', expected one of published, default, best, best-no-"),
        (["--seeds", "-1"], "argument --seeds: "),
        (["--name", "../x"], "--name '../x': expected the name of a directory in runs, such as 'a' or 'a/b'"),
        (["--archs", ","], "argument --archs: got ',', expected a list such as a,b"),
        (["--report", "--name", "none"], "--report --name none: there is no runs/none"),
        (["--jobs", "0"], "argument --jobs: got '0', expected a whole number of at least 1"),
    ],
)
def test_mistakes(flags, message, capsys):
    assert table.main(flags) == 2
    error = capsys.readouterr().err
    assert error.startswith("table.py: error: ") and message in error and error.count("\n") == 1


class FakeExecutor:
    """Runs nothing: the exit code of each command is decided by its name."""

    def __init__(self, code, at_once=math.inf):
        self.code, self.names, self.stopped, self.at_once = code, [], False, at_once

    def submit(self, command, log):
        name = command[-1].removeprefix("t/")
        self.names.append(name)
        future = Future()
        result = self.code(name)
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
        return future

    def stop(self):
        self.stopped = True


class TestExecute:
    @staticmethod
    def directory(monkeypatch):
        directory = TableDirectory("t")
        monkeypatch.setattr(directory, "prepare", lambda run: None)
        monkeypatch.setattr(directory, "is_finished", lambda run: True)
        return directory

    def test_a_run_waits_for_what_it_needs(self, monkeypatch):
        ordered = with_needed([Run("resnet10", "apot", 2, "best", 7)])
        executor = FakeExecutor(lambda name: 0)
        ended = list(execute(ordered, self.directory(monkeypatch), executor))
        assert ended and all(failure is None for _, failure in ended)
        for i, name in enumerate(executor.names):
            needs = next(run.needs for run in ordered if run.name == name)
            assert {run.name for run in needs} <= set(executor.names[:i])
        assert {run for run, _ in ended} == set(ordered)

    @pytest.mark.parametrize(
        "result, reason", [(2, "exit code 2: it printed nothing"), (OSError("of a\nlost\n"), "lost")]
    )
    def test_a_failure_fails_what_needs_it_and_nothing_else(self, monkeypatch, result, reason):
        ordered = with_needed([Run("resnet10", scheme, 2, "best", 7) for scheme in ("apot", "uniform")])
        executor = FakeExecutor(lambda name: result if name == "best/resnet10-apot4-s7" else 0)
        failures = {run.name: failure for run, failure in execute(ordered, self.directory(monkeypatch), executor)}
        assert failures.pop("best/resnet10-apot4-s7").startswith(reason)
        assert failures.pop("best/resnet10-apot3-s7") == "best/resnet10-apot4-s7 failed"
        assert failures.pop("best/resnet10-apot2-s7") == "best/resnet10-apot3-s7 failed"
        assert set(failures.values()) == {None} and len(failures) == len(ordered) - 3

    def test_the_first_run_that_can_start_is_started(self, monkeypatch):
        ordered = with_needed([Run("resnet10", "apot", bits, "best", seed) for seed in (7, 8) for bits in (2, 5)])
        executor = FakeExecutor(lambda name: 0, at_once=1)
        assert len(list(execute(ordered, self.directory(monkeypatch), executor))) == len(ordered)
        assert executor.names == [run.name for run in ordered]

    def test_a_run_that_leaves_no_result_has_failed(self, monkeypatch):
        directory = self.directory(monkeypatch)
        monkeypatch.setattr(directory, "is_finished", lambda run: False)
        run = Run("resnet10", "apot", 2, "default", 7)
        ended = list(execute([run], directory, FakeExecutor(lambda name: 0)))
        assert ended == [(run, f"ended without runs/t/{run.name}/result.json")]

    def test_an_interruption_stops_the_others(self, monkeypatch):
        executor = FakeExecutor(lambda name: 0)
        ending = execute([Run("resnet10", "apot", 2, "default", 7)], self.directory(monkeypatch), executor)
        next(ending)
        with pytest.raises(KeyboardInterrupt):
            ending.throw(KeyboardInterrupt)
        assert executor.stopped

    def test_the_last_line_of_the_log_is_the_reason(self, tmp_path):
        executor = LocalExecutor(2)
        command = [sys.executable, "-c", "print('first'); print('why'); raise SystemExit(3)"]
        future = executor.submit(command, tmp_path / "log")
        assert table_runs._failure(future, tmp_path / "log") == f"exit code 3: why ({tmp_path / 'log'})"

    def test_the_cores_are_divided(self, tmp_path, monkeypatch):
        monkeypatch.setattr(table_runs, "usable_cores", lambda: 6)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
        executor = LocalExecutor(2)
        assert executor.submit(["sh", "-c", "echo $OMP_NUM_THREADS"], tmp_path / "log").result() == 0
        assert (tmp_path / "log").read_text() == "3\n"

    @pytest.mark.parametrize("visible, count", [("-1", 0), ("", 0), ("3,-1,5", 1)])
    def test_hidden_gpus_are_not_used(self, monkeypatch, visible, count):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        monkeypatch.setattr(table_runs, "usable_cores", lambda: 4)
        assert LocalExecutor(None).at_once == (count or 4)

    @pytest.mark.parametrize("visible, gpus", [(None, "0 1"), ("3,5", "3 5")])
    def test_each_job_has_a_gpu(self, tmp_path, monkeypatch, visible, gpus):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if visible:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        executor = LocalExecutor(2)
        command = ["sh", "-c", "while [ $(ls | grep -c ^go) -lt 4 ]; do sleep 0.01; done; echo $CUDA_VISIBLE_DEVICES"]
        futures = [executor.submit(command, tmp_path / "log") for _ in range(4)]
        for i in range(4):
            (tmp_path / f"go{i}").write_text("\n")
        assert [future.result() for future in futures] == [0] * 4
        assert sorted((tmp_path / "log").read_text().split()) == sorted(2 * gpus.split())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The directory in which the smallest table was made."""
    directory = tmp_path_factory.mktemp("finished")
    before = os.getcwd()
    os.chdir(directory)
    try:
        assert call("--archs", "resnet10", "--bits", 3, "--seeds", "0,1", "--jobs", 2) == 0
    finally:
        os.chdir(before)
    return directory


ONE = ("--archs", "resnet10", "--bits", 3, "--schemes", "apot", "--seeds", 0)
SMALLEST = ("--archs", "resnet10", "--bits", 3, "--seeds", "0,1", "--jobs", 2)


class TestWhole:
    def test_the_table_has_a_row_per_scheme_with_its_runs(self, finished):
        rows = json.loads((finished / "runs/table/table.json").read_text())
        assert [(row["arch"], row["scheme"], row["bits"], row["recipe"], row["seeds"]) for row in rows] == [
            ("resnet10", scheme, 3, "default", [0, 1]) for scheme in ("apot", "uniform")
        ]
        for row in rows:
            for run in row["runs"]:
                result = json.loads((finished / "runs/table" / run["directory"] / "result.json").read_text())
                for split in ("test", "train", "val"):
                    assert run[f"{split}_acc"] == result[f"last_{split}_acc"]
                    assert run[f"best_epoch_{split}_acc"] == result[f"{split}_acc"]
                assert run["seed"] == result["seed"]
                assert run["config"]["arguments"]["train_images"] == 96
            for split in ("test", "train"):
                a, b = (run[f"{split}_acc"] for run in row["runs"])
                assert row[f"{split}_mean"] == pytest.approx((a + b) / 2, abs=1e-4)
                assert row[f"{split}_std"] == pytest.approx(abs(a - b) / math.sqrt(2), abs=1e-4)

    def test_markdown_links_to_each_run_and_the_picture(self, finished):
        text = (finished / "runs/table/table.md").read_text()
        for seed in (0, 1):
            assert f"[{seed}](default/resnet10-apot3-s{seed})" in text
            assert (finished / "runs/table/default" / f"resnet10-apot3-s{seed}" / "config.yaml").is_file()
        assert "(accuracy.png)" in text and (finished / "runs/table/accuracy.png").read_bytes()[:4] == b"\x89PNG"
        assert "published" not in text.split("## default")[1]  # digits have no published figures

    def test_finished_runs_are_not_repeated(self, finished, monkeypatch, capsys):
        monkeypatch.chdir(finished)
        before = {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("result.json")}
        assert call(*SMALLEST) == 0
        assert "4 of 4 runs are finished" in capsys.readouterr().out
        assert before == {path: path.stat().st_mtime_ns for path in (finished / "runs").rglob("result.json")}

    def test_finished_runs_of_other_settings_are_refused(self, finished, monkeypatch, capsys):
        monkeypatch.chdir(finished)
        assert call(*SMALLEST, quick=[*QUICK, "--lr", "0.2"]) == 2
        error = capsys.readouterr().err
        assert "resnet10-apot3-s0: was trained with --lr 0.1, this table asks for 0.2; pass another --name, or" in error

    def test_finished_runs_of_another_policy_are_refused(self, finished, monkeypatch):
        monkeypatch.chdir(finished)
        monkeypatch.setattr(BitPolicy, "default", classmethod(lambda cls, bits, scheme: cls.published(bits, scheme)))
        with pytest.raises(ApotfxError, match="was trained with another policy; pass another --name"):
            TableDirectory("table", QUICK).require_same(Run("resnet10", "apot", 3, "default", 0))

    def test_dry_run_prints_the_commands(self, finished, capsys):
        assert call(*ONE, "--dry-run") == 0
        first, line = capsys.readouterr().out.strip().splitlines()
        assert first == "# 0 of 1 runs are finished"
        assert line.startswith("python tools/train.py --arch resnet10 --bit 3 ")
        assert call(*ONE, "--recipes", "best-same-bits", "--dry-run") == 0
        assert not Path("runs").exists()
        shutil.copytree(finished / "runs", "runs")
        Path("runs/table/default/resnet10-apot3-s0/result.json").unlink()
        capsys.readouterr()
        assert call(*SMALLEST, "--dry-run") == 0
        first, line = capsys.readouterr().out.strip().splitlines()
        assert first == "# 3 of 4 runs are finished"
        assert line.startswith("python tools/train.py --resume runs/table/default/resnet10-apot3-s0 --dataset digits")

    def test_another_process_works_on_it(self, capsys):
        Path("runs/table/logs").mkdir(parents=True)
        with open("runs/table/logs/lock", "w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            assert call(*SMALLEST) == 2
        assert "runs/table: another table.py works on it; wait, or pass another --name" in capsys.readouterr().err

    @pytest.mark.parametrize(
        "file, content, message",
        [
            ("result.json", '{"se', "result.json: cannot be read (not JSON (Unterminated string"),
            ("result.json", "{}", "result.json: cannot be read (has no test_acc); put it back, or delete"),
            ("result.json", "[]", "result.json: cannot be read (list indices must be"),
            ("result.json", {"last_val_acc": None}, "result.json: cannot be read (must be real number, not NoneType)"),
            ("result.json", {"train_acc": math.nan}, "result.json: cannot be read (not JSON (the number NaN))"),
            ("config.yaml", "arguments: 3\npolicy: {}", "config.yaml: cannot be read (arguments: is a int, expected settings by name"),
            ("config.yaml", "arguments: {lr: -1}\npolicy: {}", "config.yaml: cannot be read (arguments: --lr -1: expected more"),
            ("config.yaml", "arguments: {}", "config.yaml: cannot be read (has no policy"),
            ("config.yaml", "", "config.yaml: cannot be read ('NoneType' object is not subscriptable"),
            ("config.yaml", "{", "config.yaml: cannot be read (while parsing"),
            ("config.yaml", None, "config.yaml: cannot be read (No such file or directory); put it back, or delete"),
        ],
    )
    def test_a_damaged_run_is_named(self, finished, capsys, file, content, message):
        shutil.copytree(finished / "runs", "runs")
        path = Path("runs/table/default/resnet10-apot3-s1") / file
        if isinstance(content, dict):
            content = json.dumps(json.loads(path.read_text()) | content)
        path.unlink()
        if content is not None:
            path.write_text(content)
        assert call(*SMALLEST) == 2
        error = capsys.readouterr().err
        assert f"table.py: error: {path.parent}/{message}" in error and error.count("\n") == 1

    @pytest.mark.parametrize("key", ["epochs", "policy"])
    def test_runs_of_different_settings_make_no_row(self, finished, capsys, key):
        shutil.copytree(finished / "runs", "runs")
        path = Path("runs/table/default/resnet10-apot3-s1/config.yaml")
        config = yaml.safe_load(path.read_text())
        if key == "policy":
            config["policy"] = BitPolicy.default(5, "apot").to_dict()
        else:
            config["arguments"][key] = 77
        path.write_text(yaml.safe_dump(config))
        assert call(*ONE) == 2
        error = capsys.readouterr().err
        assert f"{path.parent}: {key} is not as in runs/table/default/resnet10-apot3-s0, and both" in error

    def test_settings_that_make_no_row_with_others_are_told_before_the_first_training(self, finished, capsys):
        shutil.copytree(finished / "runs", "runs")
        assert call(*ONE, "--seeds", 7, quick=[*QUICK, "--lr", "0.2"]) == 2
        error = capsys.readouterr().err
        assert "default/resnet10-apot3-s7, which is to be trained: lr is not as in runs/table/default/resnet" in error
        assert not Path("runs/table/default/resnet10-apot3-s7").exists()

    def test_runs_with_other_teachers_make_no_row(self, finished):
        shutil.copytree(finished / "runs", "runs")
        paths = [Path(f"runs/table/default/resnet10-apot3-s{seed}/config.yaml") for seed in (0, 1)]
        configs = [yaml.safe_load(path.read_text()) for path in paths]
        for path, config, seed in zip(paths, configs, (0, 1)):
            config["arguments"] |= {"pretrained": f"runs/float-s{seed}/checkpoint.pt", "teacher": ["t"]}
            path.write_text(yaml.safe_dump(config))
        assert [row.seeds for row in table_report.read_rows(Path("runs/table")) if row.scheme == "apot"] == [[0, 1]]
        paths[1].write_text(yaml.safe_dump(configs[1] | {"arguments": configs[1]["arguments"] | {"teacher": ["u"]}}))
        with pytest.raises(ApotfxError, match="teacher is not as in"):
            table_report.read_rows(Path("runs/table"))

    def test_two_runs_of_one_seed_are_refused(self, finished):
        shutil.copytree(finished / "runs", "runs")
        shutil.copytree("runs/table/default/resnet10-apot3-s0", "runs/table/default/resnet10-apot3-s0-copy")
        with pytest.raises(ApotfxError, match=r"s0-copy: has seed 0, as runs/table/default/resnet10-apot3-s0 of the"):
            table_report.read_rows(Path("runs/table"))

    def test_a_report_needs_no_flags_of_the_trainings(self, finished, capsys):
        shutil.copytree(finished / "runs", "runs")
        assert call("--report", quick=[]) == 0

    def test_data_that_is_missing_is_told_before_the_first_training(self, capsys):
        assert call(*SMALLEST, quick=["--dataset", "mnist", "--data", "nowhere"]) == 2
        assert "nowhere" in capsys.readouterr().err
        assert not list(Path("runs").rglob("config.yaml"))

    @pytest.mark.parametrize("package", ["matplotlib", "scipy"])
    def test_a_missing_package_is_told_before_the_first_training(self, package, monkeypatch, capsys):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find_spec(name))
        assert call(*ONE) == 2
        assert f"tools/table.py needs {package}; pip install 'apotfx[table]'" in capsys.readouterr().err
        assert not list(Path("runs").rglob("config.yaml"))

    def test_a_stopped_run_of_other_settings_is_refused(self, finished, capsys):
        shutil.copytree(finished / "runs", "runs")
        Path("runs/table/default/resnet10-apot3-s1/result.json").unlink()
        assert call(*SMALLEST, quick=[*QUICK, "--lr", "0.2"]) == 2
        assert "was trained with --lr 0.1, this table asks for 0.2" in capsys.readouterr().err

    def test_what_was_stopped_before_its_first_checkpoint_starts_anew(self):
        directory = Path("runs/table/default/resnet10-apot3-s0")
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("half")
        assert call(*ONE) == 0
        assert (directory / "result.json").is_file()

    def test_a_failed_run_is_told_and_tried_again(self, capsys):
        assert call(*ONE, quick=[*QUICK, "--batch-size", "1000"]) == 1
        error = capsys.readouterr().err
        assert "failed: default/resnet10-apot3-s0: exit code 2: train.py: error: --batch-size 1000" in error
        assert call(*ONE) == 0

    def test_the_chain_of_the_best_recipe(self, monkeypatch, capsys):
        monkeypatch.setattr(best, "TEACHERS", (("resnet10", 0), ("resnet10", 1)))
        monkeypatch.setattr(best, "LOWERING", (4, 2))
        flags = (*ONE, "--bits", 2, "--recipes", "best", "--jobs", 2)
        assert call(*flags) == 0
        config = yaml.safe_load(Path("runs/table/best/resnet10-apot2-s0/config.yaml").read_text())["arguments"]
        assert config["pretrained"] == "runs/table/best/resnet10-apot4-s0/checkpoint.pt"
        assert config["teacher"] == [f"runs/table/{best.START}/resnet10-float-s{seed}/checkpoint.pt" for seed in (0, 1)]
        # What is needed by a run that is missing must still have its weights.
        Path("runs/table/best/resnet10-apot2-s0/result.json").unlink()
        Path("runs/table/best/resnet10-apot2-s0/checkpoint.pt").unlink()
        Path("runs/table/best/resnet10-apot4-s0/checkpoint.pt").unlink()
        capsys.readouterr()
        assert call(*flags) == 2
        assert "needs runs/table/best/resnet10-apot4-s0/checkpoint.pt, which is missing" in capsys.readouterr().err


def wait_for(condition, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_stopped_table_goes_on_to_the_same_weights(number, monkeypatch, capsys):
    quick = [*QUICK[:4], "--epochs", "12", "--train-images", "320", "--batch-size", "32"]
    flags = ["--archs", "resnet10", "--bits", "3", "--schemes", "apot", "--seeds", "0", "--jobs", "2"]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    process = subprocess.Popen(
        [sys.executable, TOOL, *flags, "--name", "stopped", "--", *quick], stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    log = Path("runs/stopped/logs/default-resnet10-apot3-s0.log")
    wait_for(lambda: log.is_file() and "epoch  1/12" in log.read_text())
    process.send_signal(number)
    _, error = process.communicate(timeout=600)
    if number == signal.SIGTERM:
        assert process.returncode == 130 and error.strip() == "stopped; the same command goes on"
        assert not Path("runs/stopped/default/resnet10-apot3-s0/result.json").exists()
    else:
        # The training goes on by itself, and holds the lock until it is through.
        assert call(*flags, "--name", "stopped", quick=quick) == 2
        assert "another table.py works on it" in capsys.readouterr().err
        wait_for(Path("runs/stopped/default/resnet10-apot3-s0/result.json").exists)
        wait_for(lambda: not is_locked("runs/stopped/logs/lock"))
    for name in ("stopped", "whole"):
        assert call(*flags, "--name", name, quick=quick) == 0
    a, b = (read_checkpoint(f"runs/{name}/default/resnet10-apot3-s0/best.pt").state for name in ("stopped", "whole"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def is_locked(path):
    with open(path) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_over_ray():
    pytest.importorskip("ray")
    flags = ["--archs", "resnet10", "--bits", "3", "--schemes", "apot", "--seeds", "0,1", "--jobs", "2"]
    command = [sys.executable, TOOL, *flags, "--address", "local", "--", *QUICK]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads(Path("runs/table/table.json").read_text())
    assert [row["seeds"] for row in rows] == [[0, 1]]


def test_a_cluster_that_does_not_answer(capsys):
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
        assert call(*ONE, "--address", address) == 2
    error = capsys.readouterr().err
    assert f"--address {address}: cannot be reached (" in error and error.count("\n") == 1


def test_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert call(*SMALLEST, "--address", "local") == 2
    assert "--address: needs Ray; pip install 'apotfx[ray]'" in capsys.readouterr().err


def row(scheme, bits, accuracies, recipe="default", dataset="mnist", arch="resnet10", **settings):
    runs = tuple(
        {"seed": seed, "directory": f"d/{seed}"} | {f"{m}_acc": acc for m in table_report.MEASURES}
        for seed, acc in accuracies.items()
    )
    settings = {"dataset": dataset, "train_images": None, "scheme": scheme, "ema": 0.9, "lr": 0.1} | settings
    return table_report.Row(arch, scheme, bits, recipe, runs, settings)


class TestReport:
    def test_mean_and_standard_deviation(self):
        three = row("apot", 4, {0: 99.1, 1: 99.2, 2: 99.6})
        assert three.mean("test") == pytest.approx(99.3)
        assert three.std("test") == pytest.approx(math.sqrt((0.04 + 0.01 + 0.09) / 2))
        one = row("apot", 4, {0: 99.1})
        assert (one.mean("test"), one.std("test"), one.to_dict()["test_std"]) == (99.1, None, None)

    def test_goals_are_reached_above_the_published_figure_only(self):
        rows = [row("apot", 2, {0: 98.72}), row("uniform", 2, {0: 98.46}), row("pot", 2, {0: 99.9})]
        lines = table_report.goal_table(rows).splitlines()[2:]
        assert [("reached" in line, "98.72" in line) for line in lines] == [(False, True), (True, False)]
        assert table_report.goal(row("apot", 2, {0: 99.0}, dataset="digits")) is None

    def test_pairs_have_equal_seeds(self):
        rows = [
            row("apot", 3, {0: 99.2, 1: 99.5, 2: 99.3, 4: 99.2}),
            row("uniform", 3, {1: 99.4, 2: 99.0, 3: 98.0, 4: 99.0}),
        ]
        single, *pooled = table_report.apot_minus_uniform(rows)
        assert single.where == ("default", "resnet10", "3")
        assert single.differences == pytest.approx((0.1, 0.3, 0.2))
        # Student's t for two degrees of freedom is 4.3027 at 97.5%; the standard deviation is 0.1.
        half = 4.3027 * 0.1 / math.sqrt(3)
        assert single.interval == pytest.approx((0.2 - half, 0.2 + half), abs=1e-4)
        assert [pair.where[1:] for pair in pooled] == [("all", "all")]  # over one network there is nothing to pool

    def test_pairs_are_pooled_over_networks_and_bits(self):
        rows = [
            row(scheme, bits, {0: 99.0 + (scheme == "apot") * bits / 10, 1: 99.0, 2: 99.0}, arch=arch)
            for arch in ("resnet10", "resnet18")
            for bits in (2, 3)
            for scheme in ("apot", "uniform")
        ]
        pairs = {pair.where[1:]: pair.differences for pair in table_report.apot_minus_uniform(rows)}
        assert list(pairs)[-1] == ("all", "all")
        assert sorted(pairs["all", "3"]) == pytest.approx([0, 0, 0, 0, 0.3, 0.3])
        assert sorted(pairs["all", "all"]) == pytest.approx([*8 * [0], 0.2, 0.2, 0.3, 0.3])
        assert len(pairs) == 4 + 2 + 1

    def test_two_pairs_have_no_interval(self):
        both = {0: 99.2, 1: 99.3}
        assert table_report.apot_minus_uniform([row("apot", 3, both), row("uniform", 3, both)]) == []

    def test_equal_differences_have_no_interval(self):
        three = {0: 99.5, 1: 99.25, 2: 99.0}
        pair, _ = table_report.apot_minus_uniform([row("apot", 3, three), row("uniform", 3, three)])
        assert pair.interval is None
        assert "| all equal |" in " ".join(table_report.paired_table([pair], "recipe", "network", "bits").split())

    def test_rows_of_other_settings_are_not_compared(self):
        three = {0: 99.5, 1: 99.25, 2: 99.0}
        rows = [row("apot", 3, three), row("uniform", 3, three, lr=0.2)]
        assert table_report.apot_minus_uniform(rows) == []
        best_row, ablated = row("apot", 3, three, recipe="best"), {"recipe": "best-no-ema", "ema": 0}
        assert len(table_report.ablated_minus_best([best_row, row("apot", 3, three, **ablated)])) == 1
        assert table_report.ablated_minus_best([best_row, row("apot", 3, three, lr=0.2, **ablated)]) == []

    def test_ablations_are_compared_with_the_best_recipe(self):
        rows = [
            row("apot", 3, {0: 99.5, 1: 99.4, 3: 99.5}, recipe="best"),
            row("uniform", 3, {0: 99.9, 1: 99.9}, recipe="best"),
            row("apot", 3, {1: 99.1, 0: 99.3, 2: 98.0, 3: 99.25}, recipe="best-no-ema"),
            row("apot", 2, {0: 99.3, 1: 99.1, 2: 99.2}, recipe="best-no-ema"),  # there is no best one
        ]
        (pair,) = table_report.ablated_minus_best(rows)
        assert pair.where == ("best-no-ema", "resnet10", "3", "apot")
        assert sorted(pair.differences) == pytest.approx([-0.3, -0.25, -0.2])
        header, _, line = table_report.paired_table([pair], "recipe", "network", "bits", "scheme").splitlines()
        assert header.count("|") == line.count("|") == 8 and "-0.250" in line

    def test_the_picture_draws_rows_of_every_kind(self, tmp_path):
        rows = [row("apot", 2, {0: 99.0, 1: 99.1}), row("apot", 3, {0: 99.2}), row("float", 32, {0: 99.3, 1: 99.4})]
        table_report.plot([*rows, row("uniform", 3, {0: 99.1}, recipe="best", arch="mlp")], tmp_path / "a.png")
        assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"
