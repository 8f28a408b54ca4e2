#!/usr/bin/env python
"""Quantize a trained float network without training, and print what accuracy that costs, as a Markdown table.

python tools/ptq.py runs/resnet18-float-mnist/best.pt --bit 8,5,4 --scheme uniform,apot --reestimate-bn
"""

import argparse
import json
import sys
from collections.abc import Iterator

import arguments as arg
from command_line import Parser, run_tool


def make_parser() -> argparse.ArgumentParser:
    p = Parser("ptq.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "checkpoint",
        type=arg.name,
        help="of a float network: best.pt, checkpoint.pt or the directory of a --bit 32 run",
    )
    p.add_argument(
        "--bit", type=arg.some_of(arg.BITS), default="8,5,4", help="2 to 8, separated by commas (default %(default)s)"
    )
    p.add_argument(
        "--scheme",
        type=arg.some_of(arg.SCHEMES),
        default="uniform,apot",
        help=f"of {', '.join(arg.SCHEMES)} (default %(default)s)",
    )
    p.add_argument(
        "--policy", type=arg.name, metavar="FILE", help="YAML file with rules per layer, in place of --bit and --scheme"
    )
    p.add_argument("--images", type=arg.positive, default=1024, help="training images to calibrate on (default 1024)")
    p.add_argument(
        "--method", type=arg.name, default="mse", help=f"of calibration: {', '.join(arg.CALIBRATIONS)} (default mse)"
    )
    p.add_argument("--percentile", type=arg.percent, default=99.9, help="for that method (default 99.9)")
    after = p.add_mutually_exclusive_group()
    after.add_argument("--reestimate-bn", action="store_true", help="batch-norm statistics anew, from the same images")
    after.add_argument("--correct-bias", action="store_true", help="keep mean outputs; for networks without batch norm")
    p.add_argument("--dataset", type=arg.name, help=f"one of {', '.join(arg.DATASETS)} (default: that of the run)")
    p.add_argument("--data", type=arg.path, metavar="DIR", help="existing data; default APOTFX_DATA or data/")
    p.add_argument("--seed", type=arg.seed, default=0, help="of the choice of images (default 0)")
    p.add_argument("--json", type=arg.output, metavar="FILE", help="write the table's numbers here too")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("ptq", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import torch
from tabulate import tabulate
from torch import Tensor

from apotfx.calibrate import calibrate, correct_biases, reestimate_batch_norms
from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.policy import BitPolicy
from apotfx.graph.passes import quantize
from apotfx.training.build import build_float
from apotfx.training.checkpoint import load_state, read_checkpoint
from apotfx.training.data import Dataset, Split, eval_batches, load_dataset
from apotfx.training.distributed import Processes
from apotfx.training.loop import evaluate

BATCH_SIZE = 128
DEVICE = torch.device("cpu")


def policies(args: argparse.Namespace) -> dict[str, BitPolicy]:
    """The policies to try, by what the table calls them."""
    if args.policy is not None:
        return {args.policy: BitPolicy.from_yaml(args.policy)}
    return {f"{bit}-bit {scheme}": BitPolicy.default(bit, scheme) for scheme in args.scheme for bit in args.bit}


def calibration_split(dataset: Dataset, num_images: int, seed: int) -> Split:
    """`num_images` of the training images, chosen at random."""
    images, labels = dataset.train.images, dataset.train.labels
    if not 2 <= num_images <= len(labels):
        raise ApotfxError(f"--images {num_images}: expected 2 to {len(labels)}, the number of training images")
    chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:num_images]
    return Split(images[chosen], labels[chosen])


def measure(args: argparse.Namespace) -> dict:
    """The accuracy on the test images, in percent, of the float network and of what each policy makes of it."""
    chosen = policies(args)
    checkpoint = read_checkpoint(args.checkpoint)
    if checkpoint.is_published or not checkpoint.is_float:
        raise ApotfxError(f"checkpoint {checkpoint.path}: is not a float network; train one with --bit 32")
    config = checkpoint.config
    dataset = load_dataset(args.dataset or config.dataset, args.data, image_size=config.image_size)
    float_model, image_size = build_float(config, dataset)
    load_state(float_model, checkpoint)
    split = calibration_split(dataset, args.images, args.seed)

    def batches() -> Iterator[Tensor]:
        options = {"batch_size": BATCH_SIZE, "mean": dataset.mean, "std": dataset.std}
        for images, _ in eval_batches(split, image_size=image_size, device=DEVICE, **options):
            yield images

    def accuracy(model: torch.nn.Module) -> float:
        return round(evaluate(model, dataset.test, dataset, image_size, DEVICE, Processes(DEVICE.type)), 4)

    result = {
        "checkpoint": str(checkpoint.path), "arch": config.arch, "dataset": dataset.name, "images": args.images,
        "method": args.method, "reestimate_bn": args.reestimate_bn, "correct_bias": args.correct_bias, "seed": args.seed,
        "float": accuracy(float_model), "quantized": {},
    }  # fmt: skip
    for name, policy in chosen.items():
        qmodel = quantize(float_model, policy).eval()
        calibrate(qmodel, batches(), method=args.method, percentile=args.percentile)
        if args.reestimate_bn:
            reestimate_batch_norms(qmodel, batches())
        if args.correct_bias:
            correct_biases(qmodel, batches())
        result["quantized"][name] = accuracy(qmodel)
    return result


def table(result: dict) -> str:
    rows = [["float32", f"{result['float']:.2f}", ""]]
    rows += [[name, f"{acc:.2f}", f"{acc - result['float']:+.2f}"] for name, acc in result["quantized"].items()]
    headers = [f"{result['arch']} on {result['dataset']}", "test accuracy, %", "difference"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["left", "right", "right"])


def run(args: argparse.Namespace) -> None:
    result = measure(args)
    print(table(result))
    if args.json is not None:
        write_atomic(args.json, json.dumps(result, indent=1).encode())
