#!/usr/bin/env python
"""Train a float network with low-bit weights and activations, and export its integer weights.

python tools/train.py --arch resnet18 --bit 4
"""

import argparse
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path

from apotfx.errors import ApotfxError
from apotfx.models import require_known
from apotfx.policy import BitPolicy
from apotfx.rewrite import plan
from apotfx.training.build import build_float, build_network, build_teacher, restore_network, with_published_policy
from apotfx.training.checkpoint import Checkpoint, load_state, read_checkpoint
from apotfx.training.config import AUGMENTATIONS, CLIP_INITS, RECIPES, SCHEDULES, TrainConfig
from apotfx.training.data import DATASETS, load_dataset
from apotfx.training.distributed import Processes, pick_device
from apotfx.training.loop import Interrupted, Trainer
from apotfx.training.monitor import Monitor
from apotfx.training.run import create_run_dir, report, result_table, write_config


def make_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0], argument_default=argparse.SUPPRESS)
    d = {field.name: field.default for field in fields(TrainConfig)}

    what = p.add_argument_group("network and data")
    what.add_argument("-a", "--arch", help=f"resnet10 ... resnet110 or torchvision/NAME (default {d['arch']})")
    what.add_argument("--bit", type=int, help=f"2 to 8 bits, or 32 for a float network (default {d['bit']})")
    what.add_argument("--scheme", help=f"apot, pot or uniform (default {d['scheme']})")
    what.add_argument("--power", type=int, choices=(0, 1), help="1: scheme apot, 0: scheme uniform")
    what.add_argument("--policy", metavar="FILE", help="YAML file with rules per layer, in place of --bit and --scheme")
    what.add_argument("--dataset", help=f"one of {', '.join(DATASETS)} (default mnist)")
    what.add_argument(
        "--data", type=Path, metavar="DIR", help="existing data; default APOTFX_DATA, or a download into data/"
    )
    what.add_argument("--image-size", type=int, help="resize images to this many pixels (default: as they are)")
    what.add_argument("--dry-run", action="store_true", help="print what each layer would get, and stop")

    how = p.add_argument_group("training")
    how.add_argument(
        "--recipe", help=f"{' or '.join(RECIPES)}: hyperparameters that the flags below change (default default)"
    )
    how.add_argument("--epochs", type=int, help=f"(default {d['epochs']})")
    how.add_argument("-b", "--batch-size", type=int, help=f"over all processes (default {d['batch_size']})")
    how.add_argument("--lr", type=float, help=f"peak learning rate (default {d['lr']})")
    how.add_argument("--momentum", type=float, help=f"(default {d['momentum']})")
    how.add_argument("--wd", "--weight-decay", dest="weight_decay", type=float, help=f"(default {d['weight_decay']})")
    how.add_argument("--schedule", help=f"{', '.join(SCHEDULES)} (default {d['schedule']})")
    how.add_argument(
        "--ema", type=float, metavar="DECAY", help=f"moving average of the weights, 0 for none (default {d['ema']})"
    )
    how.add_argument("--augment", help=f"{', '.join(AUGMENTATIONS)} (default {d['augment']})")
    how.add_argument("--label-smoothing", type=float, help=f"(default {d['label_smoothing']})")
    how.add_argument("--clip-init", help=f"{', '.join(CLIP_INITS)} (default {d['clip_init']})")
    how.add_argument(
        "--clip-lr", type=float, metavar="FACTOR", help=f"of the clips' learning rate (default {d['clip_lr']})"
    )
    how.add_argument("--pretrained", metavar="CKPT", help="start from these weights: float, other bits, or published")
    how.add_argument("--teacher", metavar="CKPT", help="distil from this float network")
    how.add_argument(
        "--teacher-weight", type=float, help=f"share of distillation in the loss (default {d['teacher_weight']})"
    )
    how.add_argument("--temperature", type=float, help=f"of the distillation (default {d['temperature']})")
    how.add_argument("--seed", type=int, help=f"(default {d['seed']})")
    how.add_argument("--amp", action="store_true", help="compute in bfloat16 where it is safe")
    how.add_argument("--compile", action="store_true", help="run the network through torch.compile")

    run = p.add_argument_group("running")
    run.add_argument("--name", help="of the new directory in runs/ (default: made up)")
    run.add_argument("--resume", metavar="RUN", help="continue the stopped run in this directory")
    run.add_argument("-e", "--evaluate", action="store_true", help="only evaluate --pretrained or --resume")
    run.add_argument("--device", help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    run.add_argument("--gpu", type=int, metavar="N", help="short for --device cuda:N")
    run.add_argument("-j", "--workers", type=int, default=0, help="processes that decode a folder's images (default 0)")
    run.add_argument("-p", "--print-freq", type=int, default=100, help="steps between lines of progress (default 100)")
    run.add_argument(
        "--profile", action="store_true", help="write a trace of some steps for the PyTorch Profiler plugin"
    )
    return p


def explicit_settings(args: argparse.Namespace) -> dict:
    """What the command line says about the configuration, and nothing that it leaves open."""
    given = {key: value for key, value in vars(args).items() if key in {field.name for field in fields(TrainConfig)}}
    if "power" in args:
        scheme = "apot" if args.power else "uniform"
        if given.setdefault("scheme", scheme) != scheme:
            raise ApotfxError(
                f"--power {args.power} means --scheme {scheme}, got --scheme {given['scheme']}; give one of them"
            )
    if "policy" in given:
        given["policy"] = BitPolicy.from_yaml(given["policy"]).to_dict()
    return given


def make_config(given: dict) -> TrainConfig:
    """The recipe, changed by what was given."""
    recipe = given.get("recipe", "default")
    return TrainConfig(**(RECIPES.get(recipe, {}) | given))


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


def run(args: argparse.Namespace) -> None:
    given = explicit_settings(args)
    resume = read_checkpoint(args.resume) if "resume" in args else None
    pretrained = read_checkpoint(given["pretrained"]) if "pretrained" in given else None
    evaluated = (resume or pretrained) if "evaluate" in args else None
    if "evaluate" in args and evaluated is None:
        raise ApotfxError("--evaluate: nothing to evaluate; pass --pretrained CKPT or --resume RUN")
    if resume is not None and resume.resume is None:
        raise ApotfxError(f"--resume {args.resume}: holds weights only; pass a run's directory or its checkpoint.pt")
    if resume is not None and evaluated is None and (resume.path.parent / "result.json").exists():
        raise ApotfxError(f"--resume {args.resume}: the run is finished; -e --resume {args.resume} evaluates it")
    if resume is not None and "name" in args and evaluated is None:
        raise ApotfxError(f"--name {args.name}: a resumed run keeps its directory; leave the flag out")

    if resume is not None:
        config = require_same(resume, given, "--resume")
    elif evaluated is not None and not evaluated.is_published:
        network_keys = {"arch", "bit", "scheme", "policy", "dataset", "image_size"}
        config = require_same(evaluated, given, "--evaluate", network_keys)
    else:
        if evaluated is not None:
            given.setdefault("recipe", "published")
        config = with_published_policy(make_config(given), pretrained)

    require_known(config.arch)
    device = pick_device(getattr(args, "device", None), getattr(args, "gpu", None))
    processes = Processes(device.type)
    try:
        with processes.main_first():  # so that a download happens once
            dataset = load_dataset(
                config.dataset, getattr(args, "data", None), image_size=config.image_size, workers=args.workers
            )
        if resume is not None and evaluated is None and dataset.name != config.dataset:
            raise ApotfxError(f"--resume {args.resume}: the run was made on {config.dataset}, got {dataset.name}")
        config = replace(config, dataset=dataset.name)
        if "dry_run" in args:
            print(plan(build_float(config, dataset)[0], config.bit_policy()))
        elif evaluated is not None:
            evaluate_only(args, config, dataset, device, processes, evaluated)
        else:
            train(args, config, dataset, device, processes, pretrained, resume)
    finally:
        processes.close()


def evaluate_only(args, config, dataset, device, processes, checkpoint) -> None:
    network = restore_network(config, dataset, device, checkpoint)
    run_dir = None
    if "name" in args:
        run_dir = processes.broadcast(create_run_dir(args.name, config, dataset.name) if processes.is_main else None)
        if processes.is_main:
            write_config(run_dir, config, dataset.name, device, processes)
    result = report(network, config, dataset, device, processes, run_dir, {"seconds": 0.0})
    if processes.is_main:
        print(result_table(result, run_dir))


def train(args, config, dataset, device, processes, pretrained, resume) -> None:
    network = build_network(config, dataset, device, pretrained)
    teacher = build_teacher(config.teacher, dataset, device, network.image_size) if config.teacher else None
    trainer = Trainer(config, network.qmodel, dataset, network.image_size, teacher, device, processes)
    if resume is not None:
        trainer.load_state_dict(resume.resume)
        run_dir = resume.path.parent
    else:
        name = getattr(args, "name", None)
        run_dir = processes.broadcast(create_run_dir(name, config, dataset.name) if processes.is_main else None)
    with Monitor(run_dir, purge_step=trainer.step if resume else None, enabled=processes.is_main) as monitor:
        if resume is None and processes.is_main:
            write_config(run_dir, config, dataset.name, device, processes)
            monitor.plan(network.qmodel.meta["plan"])
            monitor.graph(network.qmodel)
            trainer.save(run_dir)
        trainer.fit(run_dir, monitor, print_freq=args.print_freq, profile="profile" in args)
        processes.wait()
        load_state(network.qmodel, read_checkpoint(run_dir / "best.pt"))
        facts = {"seconds": round(trainer.seconds, 1), "best_epoch": trainer.best["epoch"]}
        result = report(network, config, dataset, device, processes, run_dir, facts)
        if processes.is_main:
            metrics = {key: value for key, value in result.items() if key.endswith("_acc") and value is not None}
            monitor.hparams({key: value for key, value in asdict(config).items() if key != "policy"}, metrics)
            print(result_table(result, run_dir))


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for a user's mistake or a failing disk, 130 when stopped by a signal."""
    args = make_parser().parse_args(argv)
    try:
        run(args)
    except (ApotfxError, OSError) as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        return 2
    except Interrupted as stopped:
        print(f"stopped at {stopped}; continue with: python tools/train.py --resume {stopped.run_dir}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
