"""tools/train.py as a user calls it, on scikit-learn's digits."""

import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import train
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import apotfx
from apotfx.models import build_model
from apotfx.training.checkpoint import read_checkpoint
from apotfx.training.data import load_dataset

ROOT = Path(__file__).parents[1]
TRAIN = ROOT / "tools" / "train.py"
QUICK = ["--arch", "resnet10", "--dataset", "digits", "--image-size", "16"]


@pytest.fixture(autouse=True)
def in_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APOTFX_DATA", raising=False)


def call(*flags):
    return train.main([*QUICK, *map(str, flags)])


def load(path):
    """The weights in a checkpoint; of `checkpoint.pt`, with those that are averaged."""
    checkpoint = read_checkpoint(path)
    averaged = checkpoint.resume["model"] if checkpoint.resume else {}
    return checkpoint.state | {f"averaged {name}": tensor for name, tensor in averaged.items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def run_4_bit(tmp_path_factory):
    """The directory of a finished run: resnet10 at 4 bits, two epochs."""
    directory = tmp_path_factory.mktemp("run")
    before = os.getcwd()
    os.chdir(directory)
    try:
        assert call("--bit", 4, "--epochs", 2, "--name", "r", "--seed", 3) == 0
    finally:
        os.chdir(before)
    return directory / "runs" / "r"


@pytest.fixture(scope="module")
def run_float(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float")
    before = os.getcwd()
    os.chdir(directory)
    try:
        assert call("--bit", 32, "--epochs", 1, "--name", "f") == 0
    finally:
        os.chdir(before)
    return directory / "runs" / "f"


def test_a_run_writes_everything(run_4_bit):
    names = {path.name for path in run_4_bit.iterdir()}
    assert {"config.yaml", "checkpoint.pt", "best.pt", "result.json", "integer"} <= names
    assert not [name for name in names if name.startswith(".")]  # no temporary file is left
    result = json.loads((run_4_bit / "result.json").read_text())
    expected = {"dataset": "digits", "arch": "resnet10", "bit": 4, "scheme": "apot", "epochs": 2, "seed": 3}
    assert expected.items() <= result.items()
    assert {"test_acc", "train_acc", "val_acc", "integer_test_acc", "seconds"} <= result.keys()
    assert result["test_acc"] == result["integer_test_acc"]
    config = yaml.safe_load((run_4_bit / "config.yaml").read_text())
    assert config["arguments"]["bit"] == 4 and config["arguments"]["dataset"] == "digits"
    assert apotfx.BitPolicy.from_dict(config["policy"]) == apotfx.BitPolicy.default(4)
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert config["processor"].endswith(f", {torch.backends.cpu.get_cpu_capability()}")
    assert len(config["processor"].split(", ")[0]) > 2


def test_the_export_of_a_run_gives_the_accuracy_that_it_reports(run_4_bit):
    data = load_dataset("digits", None, image_size=16)
    model, _ = build_model("resnet10", in_channels=1, num_classes=10, image_size=16)
    imodel = apotfx.load_integer(run_4_bit / "integer", model)
    images = (data.test.images.float() / 255 - torch.tensor(data.mean)) / torch.tensor(data.std)
    accuracy = 100 * (imodel(images).argmax(1) == data.test.labels).float().mean().item()
    assert accuracy == pytest.approx(json.loads((run_4_bit / "result.json").read_text())["integer_test_acc"], abs=1e-3)


def test_the_last_epoch_is_reported_beside_the_best():
    # Without an average and at this rate the second epoch is worse than the first.
    assert call("--bit", 4, "--epochs", 2, "--name", "r", "--lr", 2, "--ema", 0, "--schedule", "constant") == 0
    result = json.loads(Path("runs/r/result.json").read_text())
    for name, prefix in (("best.pt", ""), ("checkpoint.pt", "last_")):
        assert train.main(["-e", "--pretrained", f"runs/r/{name}", "--name", name]) == 0
        again = json.loads(Path(f"runs/{name}/result.json").read_text())
        for key in ("test_acc", "train_acc", "val_acc"):
            assert result[prefix + key] == again[key]
    assert (result["best_epoch"] == 2) == (result["val_acc"] == result["last_val_acc"])


def test_the_events_of_a_run_show_what_quantization_does(run_4_bit):
    accumulator = EventAccumulator(str(run_4_bit)).Reload()
    events = accumulator.Tags()
    scalars = {
        "train/loss",
        "train/accuracy",
        "train/lr",
        "val/accuracy",
        "clip/conv1/weight",
        "sqnr_db/layer4.0.conv2/input",
    }
    assert scalars <= set(events["scalars"])
    assert "weight/layer1.0.conv1/quantized" in events["histograms"]
    assert {"level_usage/weight", "level_usage/input"} <= set(events["images"])
    assert events["graph"]
    assert accumulator.PluginTagToContent("hparams") and accumulator.PluginTagToContent("text")


def test_a_run_is_repeatable(run_4_bit):
    assert call("--bit", 4, "--epochs", 2, "--name", "again", "--seed", 3) == 0
    for name in ("best.pt", "checkpoint.pt"):
        assert same(load(run_4_bit / name), load(Path("runs/again") / name))


def test_evaluate_agrees_with_the_run_and_leaves_it_alone(run_4_bit, capsys):
    before = {path.name: path.stat().st_mtime_ns for path in run_4_bit.iterdir()}
    assert (
        train.main(["-e", "--pretrained", str(run_4_bit / "best.pt"), "--name", "e"]) == 0
    )  # arch and bits from the file
    results = [json.loads(path.read_text()) for path in (run_4_bit / "result.json", Path("runs/e/result.json"))]
    for key in ("test_acc", "train_acc", "val_acc", "integer_test_acc", "bit", "dataset"):
        assert results[0][key] == results[1][key]
    assert before == {path.name: path.stat().st_mtime_ns for path in run_4_bit.iterdir()}
    assert (run_4_bit / "integer" / "weights.safetensors").read_bytes() == Path(
        "runs/e/integer/weights.safetensors"
    ).read_bytes()


def test_a_run_stopped_before_its_result_still_gets_it(run_4_bit):
    shutil.copytree(run_4_bit, "run", ignore=shutil.ignore_patterns("result.json"))
    assert train.main(["--resume", "run"]) == 0
    results = [json.loads((path / "result.json").read_text()) for path in (Path("run"), run_4_bit)]
    times = {"seconds_by_part": {}}
    assert results[0]["seconds_by_part"].keys() == results[1]["seconds_by_part"].keys()
    assert results[0] | times == results[1] | times


def test_a_resumed_run_says_what_it_cannot_keep(run_4_bit, capsys):
    shutil.copytree(run_4_bit, "run", ignore=shutil.ignore_patterns("result.json"))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert train.main(["--resume", "run"]) == 0
    finally:
        torch.set_num_threads(threads)
    consequence = "an uninterrupted run may end with other bits, though not another quality"
    note = f"note: goes on with threads {threads + 1} (before: {threads})"
    assert re.search(rf"^{re.escape(note)}.*; {consequence}$", capsys.readouterr().err, re.MULTILINE)


def test_evaluating_a_run_takes_the_weights_that_it_exports():
    # As above, the second epoch is worse than the first.
    assert call("--bit", 4, "--epochs", 2, "--name", "r", "--lr", 2, "--ema", 0, "--schedule", "constant") == 0
    result = json.loads(Path("runs/r/result.json").read_text())
    for name, resume, prefix in (("best", "runs/r", ""), ("last", "runs/r/checkpoint.pt", "last_")):
        assert train.main(["-e", "--resume", resume, "--name", name]) == 0
        again = json.loads(Path(f"runs/{name}/result.json").read_text())
        assert again["test_acc"] == result[f"{prefix}test_acc"]
    exports = [Path(f"runs/{name}/integer/weights.safetensors").read_bytes() for name in ("r", "best", "last")]
    assert exports[0] == exports[1] and (exports[0] == exports[2]) == (result["best_epoch"] == 2)


@pytest.mark.parametrize(
    ("path", "evaluated", "other"),
    [
        ("", "best.pt, the weights of the best epoch, [12], which are exported; the last", "checkpoint.pt"),
        ("checkpoint.pt", "checkpoint.pt, the last weights; the best epoch's", "best.pt"),
    ],
)
def test_which_weights_of_a_run_are_evaluated_is_told(path, evaluated, other, run_4_bit, capsys):
    assert train.main(["-e", "--resume", str(run_4_bit / path)]) == 0
    line = f"^evaluating {run_4_bit}/{evaluated}: -e --pretrained {run_4_bit}/{other}$"
    assert re.search(line, capsys.readouterr().out, re.MULTILINE)


def test_a_policy_of_its_own_is_named_as_such(capsys):
    Path("policy.yaml").write_text("rules:\n- {bits: 8, scheme: uniform}\n")
    assert call("--policy", "policy.yaml", "--bit", 2, "--epochs", 1, "--momentum", 0) == 0
    assert "note: --policy decides about bits; --bit is not used" in capsys.readouterr().err
    result = json.loads(Path("runs/resnet10-policy-digits/result.json").read_text())
    assert (result["bit"], result["scheme"]) == (None, "policy")


def test_names_are_made_up_and_numbered():
    for _ in range(2):
        assert call("--bit", 3, "--epochs", 1, "--scheme", "uniform") == 0
    assert sorted(os.listdir("runs")) == ["resnet10-uniform3-digits", "resnet10-uniform3-digits-2"]


def test_dry_run_prints_the_plan_and_writes_nothing(capsys):
    Path("policy.yaml").write_text(
        "rules:\n- {name: 'layer4.*', bits: 2, scheme: pot}\n- {bits: 5, granularity: channel}\n"
    )
    assert call("--policy", "policy.yaml", "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"layer4\.0\.conv1 +Conv2d +2-bit pot +2-bit pot +unsigned .*name=layer4", out)
    assert re.search(r"conv1 +Conv2d +5-bit apot +5-bit apot +signed +channel", out)
    assert os.listdir() == ["policy.yaml"]


def test_a_dry_run_explains(capsys):
    assert call("--bit", 4, "--dry-run", "--explain") == 0
    out = capsys.readouterr().out
    assert out.startswith("conv1 (Conv2d): weight 8-bit uniform per tensor, rescale; input 8-bit uniform\n")
    assert re.search(
        r"\nlayer1\.0\.conv1 \(Conv2d\): weight 4-bit apot .*\n    decided by: rule \*\n    input unsigned", out
    )
    assert os.listdir() == []


def test_explain_needs_a_dry_run(capsys):
    assert call("--explain") == 2
    error = "train.py: error: --explain: explains the plan that --dry-run prints; add --dry-run\n"
    assert capsys.readouterr().err == error and os.listdir() == []


def test_float_then_teacher_then_lower_bits(run_float):
    result = json.loads((run_float / "result.json").read_text())
    assert result["bit"] == 32 and result["integer_test_acc"] is None and not (run_float / "integer").exists()
    teach = ["--pretrained", run_float / "best.pt", "--teacher", run_float / "best.pt", "--epochs", 1]
    assert call("--bit", 4, "--name", "4", *teach, "--teacher", run_float / "best.pt") == 0
    arguments = yaml.safe_load(Path("runs/4/config.yaml").read_text())["arguments"]
    assert arguments["teacher"] == [str(run_float / "best.pt")] * 2
    assert (
        call("--bit", 2, "--name", "2", "--epochs", 1, "--lr", 1e-9, "--ema", 0, "--pretrained", "runs/4/best.pt") == 0
    )
    four, two = (load(f"runs/{bits}/best.pt") for bits in (4, 2))
    for name in (
        "layer1.0.conv1.weight",
        "layer1.0.conv1.input_quantizer.clip",
        "layer3.0.conv2.weight_quantizer.clip",
    ):
        torch.testing.assert_close(two[name], four[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "flags",
    [
        ["--amp"],
        ["--recipe", "published"],
        ["--recipe", "best"],
        ["--train-images", "200"],
        ["--schedule", "step", "--label-smoothing", "0.1"],
        ["--profile"],
    ],
    ids=lambda flags: flags[0],
)
def test_other_ways_to_train(flags):
    assert call("--bit", 4, "--epochs", 1, "--name", "x", *flags) == 0
    assert bool(list(Path("runs/x").glob("*.pt.trace.json"))) == (flags == ["--profile"])


def test_the_published_recipe_trains_the_published_networks():
    assert call("--bit", 3, "--epochs", 1, "--name", "x", "--recipe", "published") == 0
    config = yaml.safe_load(Path("runs/x/config.yaml").read_text())
    assert apotfx.BitPolicy.from_dict(config["policy"]) == apotfx.BitPolicy.published(3)
    assert config["arguments"]["lr"] == 0.01 and config["arguments"]["schedule"] == "constant"


def test_without_mnist_the_run_falls_back_to_digits_and_says_so(monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("apotfx.training.data._download", refuse)
    assert train.main(["--arch", "resnet10", "--epochs", "1", "--name", "x", "--image-size", "16"]) == 0
    assert "WARNING: using scikit-learn's 8x8 digits" in capsys.readouterr().err
    assert json.loads(Path("runs/x/result.json").read_text())["dataset"] == "digits"
    assert train.main(["--dataset", "mnist", "--epochs", "1", "--name", "y"]) == 2
    assert "--dataset digits" in capsys.readouterr().err
    assert not Path("runs/y").exists()


def start(*flags):
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, TRAIN, *QUICK, "--bit", "4", "--epochs", "6", "-p", "1", *flags]
    return subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)


def wait_for_line(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"never printed {text!r}: {process.stderr.read()}")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("whole")
    before = os.getcwd()
    os.chdir(directory)
    try:
        process = start("--name", "whole")
        out, err = process.communicate(timeout=240)
        assert process.returncode == 0, err
    finally:
        os.chdir(before)
    return directory / "runs" / "whole"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["SIGKILL", "Ctrl-C"])
def test_a_stopped_run_resumes_to_the_same_weights(how, uninterrupted):
    process = start("--name", "part", "--device", "cpu")
    wait_for_line(process, f"epoch {random.Random(how).randint(2, 5)} step")
    time.sleep(random.Random(how).random() * 0.3)
    process.send_signal(how)
    _, err = process.communicate(timeout=240)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "continue with: python tools/train.py --resume runs/part --device cpu" in err
    else:
        assert process.returncode == -signal.SIGKILL
    assert not Path("runs/part/result.json").exists()
    resumed = start("--resume", "runs/part")
    _, err = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, err
    whole, part = (load(path / "checkpoint.pt") for path in (uninterrupted, Path("runs/part")))
    assert same(whole, part)
    assert same(load(uninterrupted / "best.pt"), load("runs/part/best.pt"))
    steps = [
        [event.step for event in EventAccumulator(str(path)).Reload().Scalars("val/accuracy")]
        for path in (uninterrupted, Path("runs/part"))
    ]
    # A signal between the checkpoint and its event, which is rare, costs that one point of the curve.
    assert len(steps[0]) == 6 and len(set(steps[0]) - set(steps[1])) <= 1 and set(steps[1]) <= set(steps[0])
    results = [json.loads((path / "result.json").read_text()) for path in (uninterrupted, Path("runs/part"))]
    times = {"seconds": 0, "seconds_by_part": {}}
    assert results[0]["seconds_by_part"].keys() == results[1]["seconds_by_part"].keys()
    assert results[0] | times == results[1] | times


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--arch resnet9", "unknown network 'resnet9'"),
        ("--dataset imagenet", "unknown data set 'imagenet'"),
        ("--scheme log", "--scheme log: expected one of apot, pot, uniform"),
        ("--bit 1", "argument --bit: got '1', expected one of 2, 3, 4, 5, 6, 7, 8, 32"),
        ("--scheme pot --bit 5", "layer layer1.0.conv1 .*pot at 5 bits unsigned"),
        ("--power 0 --scheme apot", "--power 0 means --scheme uniform"),
        ("--lr 0", "argument --lr: got '0', expected a finite number above 0"),
        ("--gpu 77", "--device cuda:77: this machine has"),
        ("--policy missing.yaml", "policy file missing.yaml: cannot be read"),
        ("--policy bad.yaml", "policy file bad.yaml: not YAML"),
        ("--policy key.yaml", "policy file key.yaml: rule 1: unknown key 'bitz'"),
        ("--policy nothing.yaml", r"rule 1 \(rule name=encoder.*\) matches no layer"),
        ("--pretrained missing.pt", "checkpoint missing.pt: no such file"),
        ("--pretrained truncated.pt", "checkpoint truncated.pt: .*damaged"),
        ("--pretrained evil.pt", "checkpoint evil.pt: holds pickled code"),
        (
            "--arch resnet18 --pretrained best.pt",
            r"checkpoint best.pt \(written by --arch resnet10\): layer1.1.conv1.weight is absent",
        ),
        ("-e", "--evaluate: nothing to evaluate"),
        ("-e --bit 3 --pretrained best.pt", "--bit 3: best.pt was made with --bit 4"),
        ("-e --power 0 --pretrained best.pt", "--scheme uniform: best.pt was made with --scheme apot"),
        ("--resume nowhere", "checkpoint nowhere: no such file"),
        ("--resume best.pt", "--resume best.pt: holds weights only"),
        ("--resume run --lr 0.5", "--lr 0.5: run/checkpoint.pt was made with --lr 0.1"),
        ("--resume run --epochs 9", "--epochs 9: run/checkpoint.pt was made with --epochs 2"),
        ("--resume finished", "--resume finished: the run is finished; -e --resume finished evaluates it"),
        ("--resume run --name other", "--name other: a resumed run keeps its directory"),
        ("--teacher best.pt", "--teacher best.pt: is not a float network"),
        ("--data . --dataset mnist", "mnist: found no MNIST/raw/train-images-idx3-ubyte"),
        ("--data corrupt --dataset mnist", "corrupt/MNIST/raw: the training split of mnist is damaged"),
        ("--batch-size 5000", "--batch-size 5000: expected 1 to"),
        ("--name taken", "--name taken: runs/taken exists"),
        ("--name ../elsewhere", "--name '../elsewhere': expected the name of a directory in runs"),
        ("--print-freq 0", "argument -p/--print-freq: got '0', expected a whole number of at least 1"),
        ("-j -1", "argument -j/--workers: got '-1', expected a whole number of at least 0"),
        ("--seed -1", "argument --seed: got '-1', expected a whole number of at least 0"),
        ("--pretrained flipped.pt", "checkpoint flipped.pt: damaged"),
        (
            "--teacher float.pt",
            "--teacher float.pt: was trained with --image-size 16, the student with --image-size 20",
        ),
        ("--name runs\nb", r"--name runs\\nb: expected printable characters in UTF-8, without line breaks"),
        ("--name \udcff", r"--name \\udcff: expected printable characters in UTF-8"),
        (f"--name {'x' * 256}", "--name x+...: expected at most 255 bytes between slashes"),
        (f"--name {'/'.join(['y' * 200] * 20)}", "--name y+...: expected a path of at most 3796 bytes"),
        ("--name taken/b", "runs/taken/b: lies in the run .*/runs/taken;"),
        ("--name folder", "--name folder: runs/folder exists"),
        ("-e --resume run --pretrained best.pt", "--evaluate: --resume and --pretrained name two networks"),
        ("-e --resume run --lr 0.5", "--lr: does nothing with --evaluate"),
        ("-e --pretrained best.pt --profile", "--profile: does nothing with --evaluate"),
    ],
)
def test_bad_input_gets_one_clear_line(flags, message, run_4_bit, run_float, capsys):
    shutil.copytree(run_4_bit, "finished")
    shutil.copytree(run_4_bit, "run", ignore=shutil.ignore_patterns("result.json"))
    shutil.copy(run_4_bit / "best.pt", "best.pt")
    shutil.copy(run_float / "best.pt", "float.pt")
    data = bytearray(Path("best.pt").read_bytes())
    data[len(data) // 2] ^= 255
    Path("flipped.pt").write_bytes(data)
    Path("truncated.pt").write_bytes(Path("best.pt").read_bytes()[:-1000])
    torch.save({"model": Bomb()}, "evil.pt")
    Path("bad.yaml").write_text("rules: [}")
    Path("key.yaml").write_text("rules:\n- {bitz: 4}\n")
    Path("nothing.yaml").write_text("rules:\n- {name: 'encoder.*', bits: 4}\n- {bits: 4}\n")
    shutil.copytree("run", "runs/taken")
    shutil.copytree("run", "runs/folder/a")
    raw = Path("corrupt/MNIST/raw")
    raw.mkdir(parents=True)
    for name in (
        "train-images-idx3-ubyte",
        "train-labels-idx1-ubyte",
        "t10k-images-idx3-ubyte",
        "t10k-labels-idx1-ubyte",
    ):
        (raw / name).write_bytes(struct.pack(">IIII", 2051, 100, 28, 28) + b"\0" * 50)
    before = sorted(path for path in Path().rglob("*"))

    size = ["--image-size", "20"] if "teacher float" in flags else []
    assert call(*flags.split(" "), *size) == 2
    error = capsys.readouterr().err.strip()
    assert re.match(f"train.py: error: .*{message}", error)
    assert "\n" not in error
    assert sorted(path for path in Path().rglob("*")) == before


def test_a_full_disk_keeps_the_last_checkpoint_and_exits_2(run_4_bit):
    shutil.copytree(run_4_bit, "run")
    code = (
        "import resource, runpy, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1)); "
        f"sys.path.insert(0, {str(TRAIN.parent)!r}); sys.argv = ['train.py', *sys.argv[1:]]; "
        f"runpy.run_path({str(TRAIN)!r}, run_name='__main__')"
    )
    command = [sys.executable, "-c", code, *QUICK, "--epochs", "1", "--name", "full"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)}, timeout=120
    )
    assert done.returncode == 2
    assert re.search(r"train.py: error: .*File too large", done.stderr)
    assert not list(Path("runs/full").glob("*.pt")) and not list(Path("runs/full").glob(".*"))
