#!/usr/bin/env python
"""Choose bits and scheme of every layer under a budget, from how sensitive each layer of a trained float network is.

python tools/allocate.py runs/resnet18-float-mnist/best.pt --average-bits 4 --output policy.yaml --plot trade-off.png
python tools/train.py --pretrained runs/resnet18-float-mnist/best.pt --policy policy.yaml
"""

import argparse
import ctypes
import functools
import importlib.util
import io
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

import arguments as arg
from command_line import Parser, run_tool

BUDGETS = ("size", "macs")
PLOT_FORMATS = (".png", ".svg", ".pdf")


def make_parser() -> argparse.ArgumentParser:
    p = Parser("allocate.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "checkpoint", type=arg.name, metavar="CKPT", help="a float network that tools/train.py --bit 32 trained"
    )
    p.add_argument(
        "--average-bits", type=arg.above_0, default=4.0, metavar="B", help="the budget (default %(default)g)"
    )
    p.add_argument(
        "--budget",
        type=arg.one_of(BUDGETS),
        default="size",
        help=f"{' or '.join(BUDGETS)}: bits per weight, or bit operations per multiply-accumulate (default %(default)s)",
    )
    p.add_argument(
        "--schemes", type=arg.some_of(arg.SCHEMES), default="apot,uniform", help="to choose from (default %(default)s)"
    )
    p.add_argument(
        "--bits",
        type=arg.some_of(arg.BITS),
        default=",".join(map(str, arg.BITS)),
        help="to choose from (default %(default)s)",
    )
    p.add_argument("--separate", action="store_true", help="let weight and input of a layer have different bits")
    p.add_argument("--allocate-ends", action="store_true", help="count first and last layer too, else 8-bit uniform")
    p.add_argument(
        "--images", type=arg.positive, default=1024, metavar="N", help="training images to measure on (default 1024)"
    )
    p.add_argument("-b", "--batch-size", type=arg.positive, default=32, help="(default %(default)s)")
    p.add_argument("--seed", type=arg.seed, default=0, help="of the images (default %(default)s)")
    p.add_argument(
        "--output", type=arg.output, required=True, metavar="FILE", help="the policy, for tools/train.py --policy"
    )
    p.add_argument("--plot", type=arg.path, metavar="FILE", help=f"the trade-off; {', '.join(PLOT_FORMATS)}")
    p.add_argument("--data", type=arg.output, metavar="DIR", help="existing data; default APOTFX_DATA, or data/")
    p.add_argument("--device", type=arg.name, help="cpu, cuda or cuda:N (default: a GPU where there is one)")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("allocate", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import torch
from tabulate import tabulate

from apotfx.allocation import Allocation, Option, all_equal, allocate, predicted_loss, trade_off
from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.graph.passes import plan
from apotfx.sensitivity import Sensitivity, measure
from apotfx.training.augment import Augment
from apotfx.training.build import build_float
from apotfx.training.checkpoint import load_state, read_checkpoint
from apotfx.training.data import TrainBatches, load_dataset
from apotfx.training.distributed import pick_device


def measured_layers(args: argparse.Namespace, schemes: list[str], bits: list[int]):
    """(the float network of the checkpoint, the sensitivity of its layers on training images)."""
    checkpoint = read_checkpoint(args.checkpoint)
    if checkpoint.config is None or not checkpoint.is_float:
        raise ApotfxError(f"checkpoint {args.checkpoint}: is not a float network; train one with --bit 32")
    config, device = checkpoint.config, pick_device(args.device, None)
    dataset = load_dataset(config.dataset, args.data, image_size=config.image_size)
    for flag, value, most in (
        ("--images", args.images, len(dataset.train)),
        ("--batch-size", args.batch_size, args.images),
    ):
        if not 1 <= value <= most:
            raise ApotfxError(f"{flag} {value}: expected 1 to {most}")
    model, image_size = build_float(config, dataset)
    load_state(model, checkpoint)
    batches = TrainBatches(
        dataset.train, batch_size=args.batch_size, seed=args.seed, augment=Augment.named("default", dataset.name),
        mean=dataset.mean, std=dataset.std, image_size=image_size, device=device,
    )  # fmt: skip
    loss = functools.partial(torch.nn.functional.cross_entropy, reduction="none")
    some = islice(batches.epoch(0), args.images // args.batch_size)
    return model, measure(model.to(device), some, loss, schemes=schemes, bits=bits, seed=args.seed)


def require_writable(args: argparse.Namespace) -> None:
    """What would fail only after minutes of measuring. Raises: ApotfxError."""
    for flag, path in (("--output", args.output), ("--plot", args.plot)):
        if path is not None and not path.parent.is_dir():
            raise ApotfxError(f"{flag} {path}: there is no directory {path.parent}; create it")
    if args.plot is not None and args.plot.suffix not in PLOT_FORMATS:
        raise ApotfxError(f"--plot {args.plot}: expected a name that ends in {', '.join(PLOT_FORMATS)}")
    for package in ["scipy"] + ["matplotlib"] * (args.plot is not None):
        if importlib.util.find_spec(package) is None:
            raise ApotfxError(f"the package {package} is missing; pip install 'apotfx[allocate]'")


def equal_policies(layers: Sequence[Sensitivity], schemes: list[str], bits: list[int], ends: bool) -> list[Allocation]:
    """Every layer at the same bits and scheme, wherever all layers have such levels."""
    return [
        all_equal(layers, Option(scheme, b, b), ends=ends)
        for scheme in schemes
        for b in bits
        if all((scheme, b) in layer.weight_loss and (scheme, b) in layer.input_loss for layer in layers)
    ]


def layer_table(allocation: Allocation, bits: list[int]) -> str:
    """A row per layer; the predicted losses are those of the better scheme."""
    rows = []
    for layer, option, counted in zip(allocation.layers, allocation.options, allocation.counted):
        row = [layer.name, f"{layer.parameters:,}", f"{layer.macs:,}"]
        for b in bits:
            losses = [
                predicted_loss(layer, Option(s, b, b))
                for s, n in layer.input_loss
                if n == b and (s, b) in layer.weight_loss
            ]
            row.append(f"{min(losses):.1e}" if losses else "-")
        rows.append([*row, f"{option}{'' if counted else ' (kept)'}"])
    headers = ["layer", "parameters", "MACs", *(f"{b} bits" for b in bits), "gets"]
    return tabulate(
        rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * (2 + len(bits)), "left")
    )


def policy_table(policies: dict[str, Allocation]) -> str:
    rows = [
        [name, f"{a.average_bits('size'):.3f}", f"{a.average_bits('macs'):.3f}", f"{a.loss:.2e}"]
        for name, a in policies.items()
    ]
    headers = ["policy", "bits per weight", "bits per MAC", "predicted increase of the loss"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 3))


def draw(chosen: Allocation, curve: list[Allocation], equal: list[Allocation], budget: str, format: str) -> bytes:
    """Predicted loss against average bits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axis = figure.subplots()
    points = sorted({(a.average_bits(budget), a.loss) for a in curve})
    axis.plot(*zip(*points), ".-", color="tab:blue", label="allocated")
    first = chosen.counted.index(True)
    for scheme, marker, color in (("uniform", "s", "tab:gray"), ("pot", "^", "tab:orange"), ("apot", "o", "tab:green")):
        points = [(a.average_bits(budget), a.loss) for a in equal if a.options[first].scheme == scheme]
        if points:
            axis.plot(*zip(*points), marker, color=color, markersize=5, label=f"all layers equal, {scheme}")
    axis.plot(chosen.average_bits(budget), chosen.loss, "*", color="tab:red", markersize=13, label="chosen")
    axis.set_yscale("log")
    axis.set_xlabel({"size": "average bits per weight", "macs": "average bits per multiply-accumulate"}[budget])
    axis.set_ylabel("predicted increase of the loss")
    axis.grid(alpha=0.3)
    axis.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=130)
    return buffer.getvalue()


@contextmanager
def silent_solver() -> Iterator[None]:
    """Without what some versions of HiGHS print, past sys.stdout, of their own debugging."""
    sys.stdout.flush()
    kept = os.dup(1)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        yield
    finally:
        if sys.platform != "win32":
            ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)


def run(args: argparse.Namespace) -> None:
    require_writable(args)
    schemes, bits = args.schemes, sorted(args.bits)
    model, layers = measured_layers(args, schemes, bits)
    settings = {"budget": args.budget, "separate": args.separate, "ends": args.allocate_ends}
    with silent_solver():
        chosen = allocate(layers, args.average_bits, **settings)
        curve = trade_off(layers, **settings) if args.plot else []
    plan(model, chosen.policy())  # raises what tools/train.py would
    equal = equal_policies(layers, schemes, bits, args.allocate_ends)
    names = {f"all {policy.options[chosen.counted.index(True)]}": policy for policy in equal}
    print(layer_table(chosen, bits), policy_table({"allocated": chosen} | names), sep="\n\n")
    chosen.policy().to_yaml(args.output)
    print(f"\npolicy: {args.output}")
    if args.plot is not None:
        write_atomic(args.plot, draw(chosen, curve, equal, args.budget, args.plot.suffix[1:]))
        print(f"trade-off: {args.plot}")
