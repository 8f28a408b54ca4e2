"""A run's directory: what is written there besides checkpoints and events, and the results at its end."""

import contextlib
import json
import platform
import shlex
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from tabulate import tabulate
from torch import fx, nn

from apotfx.engine import Choice
from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.integer.format import export_integer
from apotfx.integer.load import load_integer
from apotfx.policy import FLOAT_BITS, BitPolicy
from apotfx.training.build import Network, is_quantized
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, eval_batches
from apotfx.training.distributed import Processes
from apotfx.training.exported import EXPORT, export_metadata
from apotfx.training.loop import EVAL_BATCH_SIZE, Stopwatch, evaluate

RUNS = Path("runs")


def run_path(name: str) -> Path:
    """`runs/<name>`. Raises: ApotfxError: that would lie elsewhere."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        raise ApotfxError(f"--name {name!r}: expected the name of a directory in {RUNS}, such as 'a' or 'a/b'")
    return RUNS / name


def create_run_dir(name: str | None, config: TrainConfig, dataset: str) -> Path:
    """A new directory `runs/<name>`; without a name one is made up from the configuration and numbered.

    Args:
        name: of the directory, which may lie in folders of `runs`: "table/first".

    Raises:
        ApotfxError: the name exists.
    """
    if name is not None:
        path = run_path(name)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            raise ApotfxError(
                f"--name {name}: {path} exists; choose another name, or continue it with --resume {path}"
            ) from None
        return path
    bit, scheme = _bit_and_scheme(config)
    kind = "policy" if bit is None else "float" if bit == FLOAT_BITS else f"{scheme}{bit}"
    base = f"{config.arch.replace('/', '-')}-{kind}-{dataset}"
    for suffix in ("", *(f"-{i}" for i in range(2, 10**6))):
        try:
            (RUNS / (base + suffix)).mkdir(parents=True)
            return RUNS / (base + suffix)
        except FileExistsError:
            continue
    raise ApotfxError(f"{RUNS}: too many runs named {base}; pass --name")


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
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in ("apotfx", "torch", "torchvision")},
        "git_commit": _git_commit(),
    }
    write_atomic(run_dir / "config.yaml", yaml.safe_dump(content, sort_keys=False).encode())


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
) -> dict:
    """Measure `network.qmodel` on all splits, export it to `run_dir`, check the export, and write `result.json`.

    Args:
        run_dir: None to write nothing and leave the export out.
        facts: further entries of the result.
        clock: what it measured before goes into the result with what this takes.

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
            shutil.rmtree(run_dir / EXPORT, ignore_errors=True)  # of a run that was stopped before its result
            with clock("export"):
                metadata = export_metadata(config, dataset, network.image_size)
                export_integer(model, run_dir / EXPORT, metadata)
                accuracy = verify_export(
                    run_dir / EXPORT, model, network.float_model, dataset, network.image_size, device
                )
            result["integer_test_acc"] = round(accuracy, 4)
        result["seconds_by_part"] = {part: round(seconds, 2) for part, seconds in clock.seconds.items()}
        write_atomic(run_dir / "result.json", json.dumps(result, indent=1).encode())
    return result


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
