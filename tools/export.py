#!/usr/bin/env python
"""Translate an exported network to ONNX or C.

python tools/export.py runs/resnet18-apot4-mnist --format onnx --data data
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import arguments as arg
from command_line import Parser, run_tool


def make_parser() -> argparse.ArgumentParser:
    p = Parser("export.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "path",
        type=arg.path,
        metavar="RUN_OR_EXPORT",
        help="a run's directory, or its export (integer/ in it or a copy)",
    )
    p.add_argument("--format", required=True, choices=("onnx", "c"))
    p.add_argument(
        "--output",
        type=arg.path,
        help="new file (onnx) or directory (c); default integer.onnx or integer-c beside the export",
    )
    p.add_argument(
        "--flavour",
        choices=("exact", "qdq"),
        help="of onnx: exact equals the network in every bit, but for layers that are left in float (default); qdq, for "
        "uniform levels, is what the 8-bit paths of other runtimes recognise",
    )
    p.add_argument(
        "--input-shape",
        type=arg.sizes,
        metavar="C,H,W",
        help="of one input, where the export does not say it",
    )
    p.add_argument(
        "--data",
        type=arg.path,
        metavar="DIR",
        help="existing data: compare the ONNX file in onnxruntime on the test images",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0; 1 if an exact file computes something else; otherwise as `run_tool` has it."""
    return run_tool("export", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import apotfx
from tabulate import tabulate
from torch import Tensor, nn

from apotfx.errors import ApotfxError
from apotfx.integer.verify import NetworkComparison, Tally
from apotfx.training.data import eval_batches, load_dataset
from apotfx.training.exported import Exported, open_export

BATCH_SIZE = 250


def run(args: argparse.Namespace) -> int:
    """1 if the results differ, where they were asked for and are to be equal; else 0."""
    if args.format == "c" and (args.flavour or args.data):
        raise ApotfxError(f"{'--flavour' if args.flavour else '--data'}: is for --format onnx")
    exported = open_export(args.path)
    if args.data is not None and not exported.is_of_a_run:
        raise ApotfxError(f"--data: {exported.path} does not say what images it takes; compare it with compare_onnx")
    source = load(exported)
    images = None if args.data is None else test_images(exported, args.data)
    output = args.output or exported.path.absolute().parent / f"{exported.path.absolute().name}{SUFFIXES[args.format]}"
    shape = args.input_shape or exported.metadata.get("input_shape")
    if args.format == "onnx":
        apotfx.export_onnx(source, output, input_shape=shape, flavour=args.flavour or "exact")
    else:
        apotfx.export_c(source, output, input_shape=shape, metadata=exported.metadata)
    size = sum(file.stat().st_size for file in (output.rglob("*") if output.is_dir() else [output]))
    print(f"{output}: {size:,} bytes")
    equal = images is None or compare(source, output, images)
    return 0 if equal or args.flavour == "qdq" else 1


def load(exported: Exported) -> nn.Module:
    """The integer network, with the code of the float one only where its program needs it."""
    try:
        return apotfx.load_integer(exported.path)
    except ApotfxError:
        if exported.float_model is None:
            raise
        return apotfx.load_integer(exported.path, exported.float_model)


SUFFIXES = {"onnx": ".onnx", "c": "-c"}


def compare(network: nn.Module, path: Path, images: Iterator[Tensor]) -> bool:
    """Whether onnxruntime computes the same."""
    from apotfx.integer.onnx import compare_onnx

    comparison = compare_onnx(network, path, images)
    print(report(comparison))
    return comparison.first is None


def test_images(exported: Exported, data: Path) -> Iterator[Tensor]:
    m = exported.metadata
    dataset = load_dataset(m["dataset"], data, image_size=m["dataset_image_size"])
    how = {"mean": tuple(m["mean"]), "std": tuple(m["std"]), "image_size": m["image_size"], "device": "cpu"}
    return (images for images, _ in eval_batches(dataset.test, batch_size=BATCH_SIZE, **how))


def report(comparison: NetworkComparison) -> str:
    nodes = comparison.nodes.values()
    rows = [[node.name, differing([node.codes]), differing([node.accumulators])] for node in nodes]
    rows.append(["total", differing([node.codes for node in nodes]), differing([node.accumulators for node in nodes])])
    table = tabulate(rows, ["layer", "codes differ", "accumulators differ"], colalign=("left", "right", "right"))
    return (
        f"\nonnxruntime and the integer network:\n\n{table}\n\nlogits differ: {differing([comparison.logits])}, by at most "
        f"{comparison.logits.largest:.3g}\npredictions differ: {differing([comparison.predictions])}"
    )


def differing(tallies: list[Tally]) -> str:
    compared = sum(tally.compared for tally in tallies)
    return f"{sum(tally.differing for tally in tallies)} of {compared}" if compared else "-"
