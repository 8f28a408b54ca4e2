"""A run's directory: what is written there besides checkpoints and events, and the results at its end."""

import contextlib
import functools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from tabulate import tabulate
from torch import fx, nn

from apotfx.engine import Choice
from apotfx.errors import ApotfxError
from apotfx.files import locked, remove_temporaries, write_atomic
from apotfx.integer.format import export_integer
from apotfx.integer.load import load_integer
from apotfx.integer.manifest import MANIFEST, WEIGHTS
from apotfx.policy import FLOAT_BITS, BitPolicy
from apotfx.tensors import printable
from apotfx.training.build import Network, is_quantized
from apotfx.training.checkpoint import BEST, LAST, Checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, eval_batches
from apotfx.training.distributed import Processes
from apotfx.training.exported import EXPORT, export_metadata
from apotfx.training.loop import EVAL_BATCH_SIZE, Stopwatch, evaluate

RUNS = Path("runs")
CONFIG, RESULT, LOCK = "config.yaml", "result.json", "run.lock"
LONGEST_NAME, LONGEST_PATH = 255, 4096  # in bytes; what file systems allow
ROOM = 300  # for the names of a run's files


def run_path(name: str) -> Path:
    """`runs/<name>`.

    Raises:
        ApotfxError: that would lie elsewhere, or no file system or terminal takes it.
    """
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts):
        raise ApotfxError(f"--name {name!r}: expected the name of a directory in {RUNS}, such as 'a' or 'a/b'")
    if not name.isprintable():  # nor are bytes that are no UTF-8
        raise ApotfxError(f"--name {printable(name)}: expected printable characters in UTF-8, without line breaks")
    if any(len(os.fsencode(part)) > LONGEST_NAME for part in parts):
        raise ApotfxError(f"--name {printable(name)}: expected at most {LONGEST_NAME} bytes between slashes")
    if len(os.fsencode(RUNS.absolute() / name)) > LONGEST_PATH - ROOM:
        raise ApotfxError(f"--name {printable(name)}: expected a path of at most {LONGEST_PATH - ROOM} bytes")
    return RUNS / name


@contextmanager
def new_run(name: str | None, config: TrainConfig, dataset: str) -> Iterator[Path]:
    """The directory `runs/<name>`, locked; without a name one is made up from the configuration and numbered.

    What a run leaves that was killed before its first checkpoint does not take the name.

    Args:
        name: of the directory, which may lie in folders of `runs`: "table/first".

    Raises:
        ApotfxError: the name is taken, or lies in another run or export.
    """
    with ExitStack() as held:
        if name is not None:
            path = run_path(name)
            _require_no_run_around(path)
            if not held.enter_context(_claimed(path)):
                raise ApotfxError(
                    f"--name {name}: {path} exists; choose another name, or continue it with --resume {path}"
                )
            yield path
            return
        bit, scheme = _bit_and_scheme(config)
        kind = "policy" if bit is None else "float" if bit == FLOAT_BITS else f"{scheme}{bit}"
        base = f"{config.arch.replace('/', '-')}-{kind}-{dataset}"
        _require_no_run_around(RUNS / base)
        for suffix in ("", *(f"-{i}" for i in range(2, 10**6))):
            if held.enter_context(_claimed(RUNS / (base + suffix))):
                yield RUNS / (base + suffix)
                return
        raise ApotfxError(f"{RUNS}: too many runs named {base}; pass --name")


@contextmanager
def continued_run(path: Path) -> Iterator[None]:
    """The directory of a run that was stopped, locked.

    Raises:
        ApotfxError: another process works on it, or it is finished.
    """
    require_unfinished(path)
    with _locked_run(path) as held:
        if not held:
            raise ApotfxError(f"--resume {path}: another process works on it; wait for its end, or stop it")
        require_unfinished(path)
        yield


def require_unfinished(path: Path) -> None:
    """Raises: ApotfxError: the run in this directory has its result."""
    if (path / RESULT).exists():
        raise ApotfxError(f"--resume {path}: the run is finished; -e --resume {path} evaluates it")


@contextmanager
def _locked_run(path: Path) -> Iterator[bool]:
    """Whether this process alone works in the directory `path`, freed of what killed ones left.

    The lock file is there for as long as the run has no result.
    """
    with locked(path / LOCK) as held:
        if held:
            remove_temporaries(path)
        try:
            yield held
        finally:
            if held and (path / RESULT).exists():
                (path / LOCK).unlink(missing_ok=True)


@contextmanager
def _claimed(path: Path) -> Iterator[bool]:
    """Whether the directory `path` is now this process's for a new run."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # a file, or a link to none
        if not os.path.lexists(path):  # but in the place of a parent
            raise
        yield False
        return
    if _is_taken(path):
        yield False
        return
    with _locked_run(path) as held:
        yield held and not _is_taken(path)


def _is_taken(path: Path) -> bool:
    """Whether a directory holds something that a new run would overwrite."""
    if any((path / name).exists() for name in (LAST, BEST, RESULT)):
        return True
    if (path / EXPORT).exists() and not (path / LOCK).exists():  # not of a run that was killed
        return True
    return any(file.parent != path for file in path.rglob(CONFIG))


def _require_no_run_around(path: Path) -> None:
    """Raises: ApotfxError: the directory `path` would lie in another run or in an export."""
    for around in Path(os.path.realpath(path)).parents:  # which takes links in a circle, too
        is_run = (around / CONFIG).is_file() and any((around / name).exists() for name in (LAST, RESULT, LOCK))
        if is_run or all((around / name).is_file() for name in (MANIFEST, WEIGHTS)):
            what = "run" if is_run else "export"
            raise ApotfxError(f"{path}: lies in the {what} {around}; choose another name or directory")


def _bit_and_scheme(config: TrainConfig) -> tuple[int | None, str]:
    """Bits and scheme of a run; None and "policy" where a policy of its own decides."""
    standard = [make(config.bit, config.scheme) for make in (BitPolicy.default, BitPolicy.published)]
    return (config.bit, config.scheme) if config.bit_policy() in standard else (None, "policy")


def write_config(
    run_dir: Path, config: TrainConfig, dataset: str, device: torch.device, processes: Processes, engine: Choice
) -> None:
    """`config.yaml`: everything needed to repeat the run."""
    content = {
        "command": shlex.join(sys.argv),
        "arguments": asdict(config) | {"policy": None},
        "dataset": dataset,
        "policy": config.bit_policy().to_dict(),
        "device": str(device),
        "processor": processor_name(),
        "processes": processes.world_size,
        "threads": torch.get_num_threads(),
        "engine": str(engine),
        "versions": _versions(),
        "git_commit": _git_commit(),
    }
    write_atomic(run_dir / CONFIG, yaml.safe_dump(content, sort_keys=False).encode())


def _versions() -> dict[str, str]:
    return {"python": platform.python_version()} | {
        package: version(package) for package in ("apotfx", "torch", "torchvision")
    }


def environment(device: torch.device, processes: Processes, engine: Choice) -> dict[str, str]:
    """What the last bits of a training depend on besides its configuration, by name; it goes into checkpoints."""
    found = {
        "device": device.type,
        "processor": processor_name(),
        "threads": str(torch.get_num_threads()),
        "processes": str(processes.world_size),
        "engine": engine.engine.name,
        **_versions(),
        "commit": str(_git_commit()),
    }
    if device.type == "cuda":
        found |= {"gpu": torch.cuda.get_device_name(device), "cudnn": str(torch.backends.cudnn.version())}
    return found


def tell_differences(checkpoint: Checkpoint, now: dict[str, str]) -> str | None:
    """What a run that goes on from `checkpoint` cannot keep, in a line; None for nothing."""
    before = checkpoint.made_with
    consequence = "an uninterrupted run may end with other bits, though not another quality"
    if not before:
        return f"{checkpoint.path} does not say what it was made with; {consequence}"
    differing = [key for key in now if now[key] != before.get(key)]
    if not differing:
        return None
    changes = [f"{key} {printable(now[key])} (before: {printable(before.get(key, 'none'))})" for key in differing]
    return f"goes on with {', '.join(changes)}; {consequence}"


def processor_name() -> str:
    """The model, and the instructions that torch uses: results differ in rounding between machines that differ here."""
    return f"{_processor_model()}, {torch.backends.cpu.get_cpu_capability()}"


def _processor_model() -> str:
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor() or platform.machine()


def _git_commit() -> str | None:
    """The commit of the checkout that this file lies in, with `+changes` where it has any; None outside of one."""
    try:
        describe = [
            "git",
            "-C",
            str(Path(__file__).parent),
            "describe",
            "--always",
            "--abbrev=40",
            "--dirty=+changes",
            "--exclude=*",
        ]
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def accuracies(
    model: nn.Module, dataset: Dataset, image_size: int, device: torch.device, processes: Processes
) -> dict[str, float]:
    """Accuracy of `model` in evaluation mode on all splits, in percent.

    `train_acc` is over all training images, those held out for validation included, without augmentation: the
    published table's protocol.
    """
    splits = {"test_acc": dataset.test, "train_acc": dataset.all_train, "val_acc": dataset.val}
    return {
        key: round(evaluate(model, split, dataset, image_size, device, processes), 4) for key, split in splits.items()
    }


def report(
    network: Network,
    config: TrainConfig,
    dataset: Dataset,
    device: torch.device,
    processes: Processes,
    run_dir: Path | None,
    facts: dict,
    clock: Stopwatch,
    before_end: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Measure `network.qmodel` on all splits, export it to `run_dir`, check the export, and write `result.json`.

    An export that is there, of a run that was killed before its result, stays if it is the network's.

    Args:
        run_dir: None to write nothing and leave the export out.
        facts: further entries of the result.
        clock: what it measured before goes into the result with what this takes.
        before_end: is called with the result before that is written, by which the run is finished.

    Returns:
        The result: names, settings, and `accuracies`.
    """
    model = network.qmodel
    with clock("final evaluation"):
        reached = accuracies(model, dataset, network.image_size, device, processes)
    bit, scheme = _bit_and_scheme(config)
    result = {
        "dataset": dataset.name,
        "arch": config.arch,
        "bit": bit,
        "scheme": scheme,
        "recipe": config.recipe,
        "epochs": config.epochs,
        **reached,
        "integer_test_acc": None,
        "seed": config.seed,
        **facts,
    }
    if run_dir is not None and processes.is_main:
        if is_quantized(model):
            with clock("export"):
                accuracy = _export(network, config, dataset, device, run_dir / EXPORT)
            result["integer_test_acc"] = round(accuracy, 4)
        result["seconds_by_part"] = {part: round(seconds, 2) for part, seconds in clock.seconds.items()}
        before_end(result)
        write_atomic(run_dir / RESULT, json.dumps(result, indent=1).encode())
    return result


def _export(network: Network, config: TrainConfig, dataset: Dataset, device: torch.device, path: Path) -> float:
    """Export to `path` what is not there already; the accuracy of the export, as `verify_export` finds it."""
    verified = functools.partial(
        verify_export, path, network.qmodel, network.float_model, dataset, network.image_size, device
    )
    if path.exists():
        try:
            return verified()
        except (ApotfxError, RuntimeError):
            shutil.rmtree(path)
    export_integer(network.qmodel, path, export_metadata(config, dataset, network.image_size))
    return verified()


@torch.no_grad()
def verify_export(
    path: Path, qmodel: fx.GraphModule, float_model: nn.Module, dataset: Dataset, image_size: int, device: torch.device
) -> float:
    """Accuracy in percent of the export at `path`, read back from disk, on the test images.

    Raises:
        RuntimeError: a logit differs from the quantized model's in any bit.
    """
    imodel = load_integer(path, float_model).to(device)
    qmodel.eval()
    correct = 0
    for images, labels in eval_batches(
        dataset.test,
        batch_size=EVAL_BATCH_SIZE,
        mean=dataset.mean,
        std=dataset.std,
        image_size=image_size,
        device=device,
    ):
        logits, expected = imodel(images), qmodel(images)
        if not torch.equal(logits, expected):
            difference = (logits - expected).abs().max().item()
            raise RuntimeError(
                f"{path}: the reloaded network's logits differ from the quantized model's by up to {difference:g}"
            )
        correct += (logits.argmax(1) == labels).sum().item()
    return 100 * correct / len(dataset.test)


def result_table(result: dict, run_dir: Path | None) -> str:
    """The result as text for people."""
    parts = result.get("seconds_by_part")
    rows = [(k.replace("_", " "), v) for k, v in result.items() if v is not None and k != "seconds_by_part"]
    if parts:
        total = sum(parts.values())
        rows.append(("share of time", ", ".join(f"{part} {100 * s / total:.1f}%" for part, s in parts.items())))
    if result["integer_test_acc"] is not None:
        rows.append(("integer model", "logits equal the quantized model's on every test image"))
    if run_dir is not None:
        rows.append(("written to", str(run_dir)))
    return tabulate(rows, tablefmt="simple", disable_numparse=True)
