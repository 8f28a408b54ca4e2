#!/usr/bin/env python
"""Train a float network with low-bit weights and activations, and export its integer weights.

python tools/train.py --arch resnet18 --bit 4
"""

import argparse
import ctypes
import shlex
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import arguments as arg
from command_line import Parser, run_tool

SCHEDULES = ("constant", "cosine", "onecycle", "step")
AUGMENTATIONS = ("default", "strong", "flip", "none")
DEFAULTS = {
    "arch": "resnet18", "bit": 4, "scheme": "apot", "epochs": 25, "batch_size": 128, "lr": 0.1, "momentum": 0.9,
    "weight_decay": 5e-4, "schedule": "onecycle", "ema": 0.998, "augment": "default", "label_smoothing": 0.0,
    "clip_init": "mse", "clip_lr": 1.0, "teacher_weight": 0.7, "temperature": 4.0, "seed": 0,
}  # of TrainConfig  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    p = Parser("train.py", description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    d = DEFAULTS

    what = p.add_argument_group("network and data")
    what.add_argument(
        "-a",
        "--arch",
        type=arg.name,
        help=f"resnet10 ... resnet110, mlp, vgg7, vit or torchvision/NAME (default {d['arch']})",
    )
    what.add_argument(
        "--bit",
        type=arg.one_of([*arg.BITS, arg.FLOAT_BITS]),
        help=f"2 to 8 bits, or 32 for a float network (default {d['bit']})",
    )
    what.add_argument("--scheme", type=arg.name, help=f"apot, pot or uniform (default {d['scheme']})")
    what.add_argument("--power", type=int, choices=(0, 1), help="1: scheme apot, 0: scheme uniform")
    what.add_argument(
        "--policy", type=arg.name, metavar="FILE", help="YAML file with rules per layer, in place of --bit and --scheme"
    )
    what.add_argument("--dataset", type=arg.name, help=f"one of {', '.join(arg.DATASETS)} (default mnist)")
    what.add_argument(
        "--data", type=arg.path, metavar="DIR", help="existing data; default APOTFX_DATA, or a download into data/"
    )
    what.add_argument(
        "--image-size", type=arg.positive, help="resize images to this many pixels (default: as they are)"
    )
    what.add_argument(
        "--train-images", type=arg.positive, metavar="N", help="learn from N training images (default: from all)"
    )
    what.add_argument("--dry-run", action="store_true", help="print what each layer would get, and stop")
    what.add_argument("--explain", action="store_true", help="with --dry-run: print the reason for each decision")

    how = p.add_argument_group("training")
    how.add_argument(
        "--recipe",
        type=arg.name,
        help=f"{', '.join(arg.RECIPES)}: settings that the flags below change (default default)",
    )
    how.add_argument("--epochs", type=arg.positive, help=f"(default {d['epochs']})")
    how.add_argument("-b", "--batch-size", type=arg.positive, help=f"over all processes (default {d['batch_size']})")
    how.add_argument("--lr", type=arg.above_0, help=f"peak learning rate (default {d['lr']})")
    how.add_argument("--momentum", type=arg.decay, help=f"(default {d['momentum']})")
    how.add_argument(
        "--wd", "--weight-decay", dest="weight_decay", type=arg.factor, help=f"(default {d['weight_decay']})"
    )
    how.add_argument("--schedule", type=arg.name, help=f"{', '.join(SCHEDULES)} (default {d['schedule']})")
    how.add_argument(
        "--ema", type=arg.decay, metavar="DECAY", help=f"moving average of the weights, 0 for none (default {d['ema']})"
    )
    how.add_argument("--augment", type=arg.name, help=f"{', '.join(AUGMENTATIONS)} (default {d['augment']})")
    how.add_argument("--label-smoothing", type=arg.share, help=f"(default {d['label_smoothing']})")
    how.add_argument("--clip-init", type=arg.name, help=f"{', '.join(arg.CALIBRATIONS)} (default {d['clip_init']})")
    how.add_argument(
        "--clip-lr", type=arg.factor, metavar="FACTOR", help=f"of the clips' learning rate (default {d['clip_lr']})"
    )
    how.add_argument(
        "--pretrained", type=arg.name, metavar="CKPT", help="start from these weights: float, other bits, or published"
    )
    how.add_argument(
        "--teacher",
        type=arg.name,
        metavar="CKPT",
        action="append",
        help="distil from this float network; several times: from each in turn, step by step",
    )
    how.add_argument(
        "--teacher-weight", type=arg.share, help=f"share of distillation in the loss (default {d['teacher_weight']})"
    )
    how.add_argument("--temperature", type=arg.above_0, help=f"of the distillation (default {d['temperature']})")
    how.add_argument("--seed", type=arg.seed, help=f"(default {d['seed']})")
    how.add_argument("--amp", action="store_true", help="compute in bfloat16 where it is safe")
    how.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    how.add_argument(
        "--engine", type=arg.name, help=f"what computes quantized layers: auto, {', '.join(arg.ENGINES)} (default auto)"
    )

    run = p.add_argument_group("running")
    run.add_argument("--name", type=arg.name, help="of the new directory in runs/ (default: made up)")
    run.add_argument("--resume", type=arg.name, metavar="RUN", help="continue the stopped run in this directory")
    run.add_argument("-e", "--evaluate", action="store_true", help="only evaluate --pretrained or --resume")
    run.add_argument("--device", type=arg.name, help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    run.add_argument("--gpu", type=arg.whole(0, 2**15), metavar="N", help="short for --device cuda:N")
    run.add_argument(
        "-j", "--workers", type=arg.count, default=0, help="processes that decode a folder's images (default 0)"
    )
    run.add_argument(
        "-p", "--print-freq", type=arg.positive, default=100, help="steps between lines of progress (default 100)"
    )
    run.add_argument(
        "--profile", action="store_true", help="write a trace of some steps for the PyTorch Profiler plugin"
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("train", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    exit_code = main()
    if "apotfx.training.distributed" in sys.modules:
        sys.modules["apotfx.training.distributed"].leave(exit_code)
    sys.exit(exit_code)

import torch

from apotfx.engine import Choice
from apotfx.errors import ApotfxError
from apotfx.models import require_known
from apotfx.policy import BitPolicy
from apotfx.graph.network import record_of
from apotfx.graph.passes import plan
from apotfx.training.build import (
    Network,
    build_float,
    build_network,
    build_teachers,
    is_quantized,
    restore_network,
    with_published_policy,
)
from apotfx.training.checkpoint import BEST, LAST, Checkpoint, load_state, read_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, load_dataset
from apotfx.training.distributed import Processes, pick_device
from apotfx.training.loop import Interrupted, Stopwatch, Trainer, evaluate
from apotfx.training.monitor import Monitor
from apotfx.training.recipes import settings_of
from apotfx.training.run import (
    accuracies,
    continued_run,
    environment,
    new_run,
    report,
    require_unfinished,
    result_table,
    run_path,
    tell_differences,
    write_config,
)

NETWORK_SETTINGS = {"arch", "bit", "scheme", "policy", "dataset", "image_size", "recipe"}
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def explicit_settings(args: argparse.Namespace) -> dict:
    """What the command line says about the configuration, and nothing that it leaves open."""
    given = {key: value for key, value in vars(args).items() if key in {field.name for field in fields(TrainConfig)}}
    if "power" in args:
        scheme = "apot" if args.power else "uniform"
        if given.setdefault("scheme", scheme) != scheme:
            raise ApotfxError(
                f"--power {args.power} means --scheme {scheme}, got --scheme {given['scheme']}; give one of them"
            )
    if "teacher" in given:
        given["teacher"] = tuple(given["teacher"])
    if "policy" in given:
        ignored = [f"--{key}" for key in ("bit", "scheme", "power") if key in args]
        if ignored:
            print(f"note: --policy decides about bits; {' and '.join(ignored)} is not used", file=sys.stderr)
        given["policy"] = BitPolicy.from_yaml(given["policy"]).to_dict()
    return given


def make_config(given: dict) -> TrainConfig:
    """The recipe, changed by what was given."""
    return TrainConfig(**(settings_of(given.get("recipe", "default")) | given))


def require_same(checkpoint: Checkpoint, given: dict, flag: str, keys: set[str] | None = None) -> TrainConfig:
    """The checkpoint's configuration, which whatever was given must agree with."""
    config = checkpoint.config
    for key, value in given.items():
        if (keys is None or key in keys) and getattr(config, key) != value:
            name = key.replace("_", "-")
            raise ApotfxError(
                f"--{name} {value}: {checkpoint.path} was made with --{name} {getattr(config, key)}; leave the flag "
                f"out, or start a new run without {flag}"
            )
    return config


@dataclass(frozen=True)
class Job:
    """What the command line asks for, with the data loaded and the device picked."""

    args: argparse.Namespace
    config: TrainConfig
    dataset: Dataset
    device: torch.device
    processes: Processes
    resume: Checkpoint | None
    pretrained: Checkpoint | None

    @contextmanager
    def run_dir(self, engine: Choice) -> Iterator[Path]:
        """The run's directory, the same on every process, for this run alone: the one to resume, or a new one."""
        with ExitStack() as held:

            def claim() -> Path:
                if self.resume is not None and "evaluate" not in self.args:
                    held.enter_context(continued_run(self.resume.path.parent))
                    return self.resume.path.parent
                path = held.enter_context(new_run(getattr(self.args, "name", None), self.config, self.dataset.name))
                write_config(path, self.config, self.dataset.name, self.device, self.processes, engine)
                return path

            yield self.processes.on_main(claim)


def choose_config(
    args: argparse.Namespace, given: dict, resume: Checkpoint | None, pretrained: Checkpoint | None
) -> TrainConfig:
    """The configuration of the run to resume, of the checkpoint to evaluate, or a new one."""
    if "evaluate" in args:
        evaluated = resume or pretrained
        if evaluated is None:
            raise ApotfxError("--evaluate: nothing to evaluate; pass --pretrained CKPT or --resume RUN")
        if resume is not None and pretrained is not None:
            raise ApotfxError("--evaluate: --resume and --pretrained name two networks; pass one of them")
        require_of_use(args, given)
        if not evaluated.is_published:
            config = require_same(evaluated, given, "--evaluate", NETWORK_SETTINGS)
            return replace(config, engine=given.get("engine", "auto"))
        given = {"recipe": "published"} | given
    elif resume is not None:
        require_resumable(args, resume)
        engine = given.pop("engine", resume.config.engine)
        return replace(require_same(resume, given, "--resume"), engine=engine)
    return with_published_policy(make_config(given), pretrained)


def require_of_use(args: argparse.Namespace, given: dict) -> None:
    """Raises: ApotfxError: a flag for training, beside --evaluate."""
    idle = [key for key in given if key not in NETWORK_SETTINGS | {"engine", "pretrained"}]
    for key in (*idle, *(["profile"] if "profile" in args else [])):
        raise ApotfxError(f"--{key.replace('_', '-')}: does nothing with --evaluate; leave one of them out")


def require_resumable(args: argparse.Namespace, resume: Checkpoint) -> None:
    if resume.resume is None:
        raise ApotfxError(f"--resume {args.resume}: holds weights only; pass a run's directory or its {LAST}")
    require_unfinished(resume.path.parent)
    if "name" in args:
        raise ApotfxError(f"--name {args.name}: a resumed run keeps its directory; leave the flag out")


def read_run(args: argparse.Namespace) -> Checkpoint:
    """The checkpoint that --resume names: of a run's directory the last one, and the best one to evaluate."""
    best = Path(args.resume, BEST)
    return read_checkpoint(best if "evaluate" in args and best.is_file() else args.resume)


def tell_which(checkpoint: Checkpoint) -> None:
    """Which epoch of a run is evaluated, and how to evaluate another one."""
    which, other, name = ("the last weights", "the best epoch's", BEST)
    if checkpoint.resume is None:
        epoch = f", {checkpoint.best['epoch']}" if checkpoint.best else ""
        which, other, name = (f"the weights of the best epoch{epoch}, which are exported", "the last", LAST)
    path = checkpoint.path.with_name(name)
    print(f"evaluating {checkpoint.path}, {which}" + (f"; {other}: -e --pretrained {path}" if path.is_file() else ""))


def run(args: argparse.Namespace) -> None:
    keep_freed_memory()
    try:
        carry_out(args)
    except Interrupted as stopped:
        command = resume_command(args, stopped.run_dir)
        raise KeyboardInterrupt(f"stopped at {stopped}; continue with: {command}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped before training began; nothing to continue") from None


def carry_out(args: argparse.Namespace) -> None:
    if "explain" in args and "dry_run" not in args:
        raise ApotfxError("--explain: explains the plan that --dry-run prints; add --dry-run")
    if "name" in args:
        run_path(args.name)
    given = explicit_settings(args)
    resume = read_run(args) if "resume" in args else None
    pretrained = read_checkpoint(given["pretrained"]) if "pretrained" in given else None
    config = choose_config(args, given, resume, pretrained)
    require_known(config.arch)
    device = pick_device(getattr(args, "device", None), getattr(args, "gpu", None))
    processes = Processes(device.type)
    try:
        with processes.together():
            work(args, config, device, processes, resume, pretrained)
    finally:
        processes.close()


def work(
    args: argparse.Namespace,
    config: TrainConfig,
    device: torch.device,
    processes: Processes,
    resume: Checkpoint | None,
    pretrained: Checkpoint | None,
) -> None:
    """Load the data, and train, evaluate or plan."""
    with processes.main_first():  # so that a download happens once
        data = getattr(args, "data", None)
        dataset = load_dataset(config.dataset, data, image_size=config.image_size, workers=args.workers)
        dataset = dataset.with_train_images(config.train_images)
    config = replace(config, dataset=dataset.name)
    job = Job(args, config, dataset, device, processes, resume, pretrained)
    if "dry_run" in args:
        if processes.is_main:
            planned = plan(build_float(config, dataset)[0], config.bit_policy())
            print(planned.explain() if "explain" in args else planned)
    elif "evaluate" in args:
        evaluate_only(job)
    else:
        train(job)


def evaluate_only(job: Job) -> None:
    config, dataset, processes = job.config, job.dataset, job.processes
    checkpoint = job.resume or job.pretrained
    network = restore_network(config, dataset, job.device, checkpoint)
    print_engine(job, network)
    if job.resume is not None and processes.is_main:
        tell_which(job.resume)
    facts = {"seconds": 0.0}
    if checkpoint.is_published:
        require_published_accuracy(job, network, checkpoint)
        facts |= {"epochs": checkpoint.published["epoch"], "seed": None}
    with job.run_dir(network.engine) if "name" in job.args else nullcontext() as run_dir:
        result = report(network, config, dataset, job.device, processes, run_dir, facts, Stopwatch())
    if processes.is_main:
        print(result_table(result, run_dir))


def require_published_accuracy(job: Job, network: Network, checkpoint: Checkpoint) -> None:
    """A published checkpoint does not say its bits, but what it reached on the training images of MNIST."""
    config, stated = job.config, checkpoint.published["train_acc"]
    if job.dataset.name != "mnist" or config.bit_policy() != BitPolicy.published(config.bit, config.scheme):
        return
    images = job.dataset.all_train
    reached = evaluate(network.qmodel, images, job.dataset, network.image_size, job.device, job.processes)
    if abs(reached - stated) > 0.02:
        raise ApotfxError(
            f"checkpoint {checkpoint.path}: states {stated:.2f}% on the training images, but reaches {reached:.2f}% at "
            f"--bit {config.bit} --scheme {config.scheme}; pass the bits and the scheme that it was trained with"
        )


def train(job: Job) -> None:
    config, dataset, device, processes, resume = job.config, job.dataset, job.device, job.processes, job.resume
    if resume is not None:
        network = restore_network(config, dataset, device, resume)
    else:
        network = build_network(config, dataset, device, job.pretrained)
    print_engine(job, network)
    teachers = build_teachers(config, dataset, device, network.image_size)
    where = environment(device, processes, network.engine)
    trainer = Trainer(config, network.qmodel, dataset, network.image_size, teachers, device, processes, where)
    with job.run_dir(network.engine) as run_dir:
        if resume is not None:
            resume = read_checkpoint(resume.path)  # again, as another process may have worked on it until now
            trainer.load_state_dict(resume.resume, f"checkpoint {resume.path}")
            processes.on_main(lambda: trainer.require_best(run_dir))
            if processes.is_main and (differences := tell_differences(resume, where)):
                print(f"note: {differences}", file=sys.stderr)
        else:
            trainer.save(run_dir)
        try:
            result = finish(job, network, trainer, run_dir)
        except KeyboardInterrupt:
            raise Interrupted(trainer.step, run_dir) from None
    if processes.is_main:
        print(result_table(result, run_dir))


def finish(job: Job, network: Network, trainer: Trainer, run_dir: Path) -> dict:
    """Train to the end from where `trainer` is, and do whatever else the run lacks; returns its result."""
    config, dataset, device, processes = job.config, job.dataset, job.device, job.processes
    # What was logged at the step of the checkpoint stays.
    purge_step = trainer.step + 1 if job.resume else None
    with Monitor(run_dir, purge_step=purge_step, enabled=processes.is_main) as monitor:
        if job.resume is None:
            monitor.plan(record_of(network.qmodel)["plan"])
            monitor.graph(network.qmodel)
        trainer.fit(run_dir, monitor, print_freq=job.args.print_freq, profile="profile" in job.args)
        processes.wait()
        facts = {"seconds": round(trainer.seconds, 1), "best_epoch": trainer.best["epoch"]}
        with trainer.clock("final evaluation"):
            last = accuracies(trainer.evaluated, dataset, network.image_size, device, processes)
        facts |= {f"last_{key}": value for key, value in last.items()}
        load_state(network.qmodel, read_checkpoint(run_dir / BEST))

        def log(result: dict) -> None:
            metrics = {key: value for key, value in result.items() if key.endswith("_acc") and value is not None}
            monitor.hparams({key: value for key, value in asdict(config).items() if key != "policy"}, metrics)

        return report(network, config, dataset, device, processes, run_dir, facts, trainer.clock, log)


def print_engine(job: Job, network: Network) -> None:
    if job.processes.is_main and is_quantized(network.qmodel):
        print(f"engine: {network.engine}")


def resume_command(args: argparse.Namespace, run_dir: Path) -> str:
    """How to continue the run in `run_dir` where and on what it runs now."""
    kept = [("--data", "data"), ("--device", "device"), ("--gpu", "gpu")]
    flags = [part for flag, key in kept if key in args for part in (flag, str(getattr(args, key)))]
    return shlex.join(["python", "tools/train.py", "--resume", str(run_dir), *flags])


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, which each step would get back page by page: a tenth of its time."""
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        for parameter, value in ((M_MMAP_THRESHOLD, 2**25), (M_TRIM_THRESHOLD, 2**31 - 1)) if mallopt else ():
            mallopt(parameter, value)
