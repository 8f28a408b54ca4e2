#!/usr/bin/env python
"""Train a matrix of networks, several at once, and write a table of what they reach.

python tools/table.py --recipes default --seeds 0,1,2
python tools/table.py --recipes default --seeds 0,1,2 --name fashion -- --dataset fashion-mnist

What follows `--` goes to every training as it is. Stopped in any way, the same command goes on; finished runs are kept.
"""

import argparse
import shlex
import signal
import sys
import time
from contextlib import nullcontext

import arguments as arg
from command_line import Parser, run_tool

ABLATIONS = (
    "best-no-distillation", "best-no-lowering", "best-no-normalization", "best-fixed-clips", "best-no-ema",
    "best-same-bits", "best-per-channel",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    p = Parser("table.py", description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    what = p.add_argument_group("rows, lists with commas")
    what.add_argument("--archs", type=arg.several(arg.name), default="resnet18,resnet10", help="networks")
    what.add_argument(
        "--bits", type=arg.some_of([*arg.BITS, arg.FLOAT_BITS]), default="5,4,3,2",
        help=f"2 to 8, or {arg.FLOAT_BITS} for float",
    )  # fmt: skip
    what.add_argument("--schemes", type=arg.some_of(arg.SCHEMES), default="apot,uniform", help=", ".join(arg.SCHEMES))
    what.add_argument(
        "--recipes",
        type=arg.some_of([*arg.RECIPES, *ABLATIONS]),
        default="default",
        help=", ".join([*arg.RECIPES, *ABLATIONS]),
    )
    what.add_argument("--seeds", type=arg.several(arg.seed), default="0,1,2", help="a training for each")
    how = p.add_argument_group("running")
    how.add_argument("--name", type=arg.name, default="table", help="of the directory in runs/")
    how.add_argument(
        "--jobs", type=arg.whole(1, 1024), help="at once on this machine or on each GPU (default: a core each, or 1)"
    )
    how.add_argument("--address", type=arg.name, help="of a Ray cluster to run on, or local: one on this machine")
    how.add_argument("--dry-run", action="store_true", help="print the commands that would run, and stop")
    how.add_argument("--report", action="store_true", help="only write the table of what is finished")
    how.add_argument("flags", nargs="*", metavar="-- FLAGS", help="of tools/train.py, for all trainings")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 if a training failed, otherwise as `run_tool` has it."""
    return run_tool("table", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import train
from bench_common import markdown
from table_report import read_rows, require_packages, with_spread, write_report
from table_runs import FLOAT, LocalExecutor, RayExecutor, Run, TableDirectory, execute, parse_flags, with_needed

from apotfx.errors import ApotfxError
from apotfx.models import require_known
from apotfx.policy import FLOAT_BITS
from apotfx.training.config import TrainConfig
from apotfx.training.data import load_dataset


def matrix(args: argparse.Namespace) -> list[Run]:
    """The runs that were asked for; those of the first seed come first."""
    for arch in args.archs:
        require_known(arch)
    return [
        Run(arch, scheme, bits, recipe, seed)
        for recipe in args.recipes
        for seed in args.seeds
        for arch in args.archs
        for bits in args.bits
        for scheme in ([FLOAT] if bits == FLOAT_BITS else args.schemes)
    ]


def shared_settings(flags: list[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """What the flags for all trainings say.

    Raises:
        ApotfxError: they are wrong, or set what the matrix sets.
    """
    args = parse_flags(flags)
    taken = {"arch", "bit", "scheme", "power", "policy", "recipe", "seed", "name", "resume", "evaluate", "pretrained",
             "teacher", "dry_run", "explain"}  # fmt: skip
    for key in sorted(taken.intersection(vars(args))):
        raise ApotfxError(f"-- --{key.replace('_', '-')}: the table sets it; leave it out")
    if "gpu" in args or ":" in getattr(args, "device", ""):
        raise ApotfxError("-- a numbered GPU: each training sees one; choose with CUDA_VISIBLE_DEVICES=N,N...")
    return train.make_config(train.explicit_settings(args)), args


def run(args: argparse.Namespace) -> int:
    """1 if a training failed, else 0."""
    # What a shell starts in the background ignores SIGINT, and so would the trainings, which are stopped with it.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        return carry_out(args)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; the same command goes on") from None


def carry_out(args: argparse.Namespace) -> int:
    shared, flags = shared_settings(args.flags)
    table = TableDirectory(args.name, args.flags)
    wanted = with_needed(matrix(args))
    if args.report and not table.path.is_dir():
        raise ApotfxError(f"--report --name {args.name}: there is no {table.path}")
    with nullcontext() if args.dry_run else table.locked():
        missing = [run for run in wanted if not table.is_finished(run)]
        for each in () if args.report else wanted:
            if each not in missing or table.is_started(each):
                table.require_same(each)
            if each in missing:
                table.require_weights(each)
        if args.dry_run:
            print(f"# {len(wanted) - len(missing)} of {len(wanted)} runs are finished")
            for each in missing:
                if each.policy is not None:
                    print(f"# {table.policy_path(each)} is written before this one is trained")
                print(f"python tools/train.py {shlex.join(table.flags_now(each))}")
            return 0
        print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are finished", flush=True)
        require_packages()
        failures = {}
        if missing and not args.report:
            # A damaged run, another row, or data that is not there ends the table before hours of training.
            read_rows(table.path, {each: table.settings(each) for each in missing})
            load_dataset(
                shared.dataset, getattr(flags, "data", None), image_size=shared.image_size, workers=flags.workers
            )
            failures = train_all(missing, table, args)
        rows = write_report(table.path, shlex.join(["python", "tools/table.py", *args.argv]))
    lines = [
        [row.recipe, row.arch, row.bits, row.scheme, len(row.runs),
         *(with_spread(row.mean(split), row.std(split)) for split in ("test", "train"))]
        for row in rows
    ]  # fmt: skip
    print(markdown(["recipe", "network", "bits", "scheme", "seeds", "test", "training"], lines))
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    print(f"written to {table.path}")
    return 1 if failures else 0


def train_all(missing: list[Run], table: TableDirectory, args: argparse.Namespace) -> dict[str, str]:
    """Train `missing`, and rewrite the table after each; what failed, with the reason, by the run's name."""
    executor = RayExecutor(args.address, args.jobs) if args.address else LocalExecutor(args.jobs)
    failures, began = {}, time.perf_counter()
    command = shlex.join(["python", "tools/table.py", *args.argv])
    for number, (each, failure) in enumerate(execute(missing, table, executor), 1):
        if failure:
            failures[each.name] = failure
        else:
            write_report(table.path, command)
        minutes = (time.perf_counter() - began) / 60
        print(f"[{number}/{len(missing)}, {minutes:.1f} min] {each.name}: {failure or 'finished'}", flush=True)
    return failures
