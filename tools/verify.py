#!/usr/bin/env python
"""Check that an exported network is the trained one: its files, then every layer on test images.

python tools/verify.py runs/resnet18-apot4-mnist
"""

import argparse
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import arguments as arg
from command_line import Parser, run_tool


def make_parser() -> argparse.ArgumentParser:
    p = Parser("verify.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "path",
        type=arg.path,
        metavar="RUN_OR_EXPORT",
        help="a run's directory, or its export (integer/ in it or a copy)",
    )
    p.add_argument("--data", type=arg.path, metavar="DIR", help="existing data; default APOTFX_DATA, or data/")
    p.add_argument(
        "--input-shape",
        type=arg.sizes,
        metavar="C,H,W",
        help="of one input; random ones are compared where the export does not say what images it takes",
    )
    p.add_argument("--images", type=arg.positive, metavar="N", help="the first N test images (default: all)")
    p.add_argument("-b", "--batch-size", type=arg.positive, default=250, help="(default %(default)s)")
    p.add_argument(
        "--backend",
        default="onednn",
        choices=arg.BACKENDS,
        help="onednn is compared beside reference (default %(default)s)",
    )
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 if everything is equal, 1 if anything differs, otherwise as `run_tool` has it."""
    return run_tool("verify", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import torch
from tabulate import tabulate
from torch import Tensor, fx, nn

from apotfx.errors import ApotfxError
from apotfx.integer.verify import (
    Alteration,
    LayerAccumulators,
    NetworkComparison,
    Tally,
    Verification,
    verify,
)
from apotfx.training.build import restore_network
from apotfx.training.checkpoint import read_checkpoint
from apotfx.training.data import Split, eval_batches, load_dataset
from apotfx.training.exported import find_export, open_export

SHOWN = 20  # alterations


@dataclass(frozen=True)
class Subject:
    """What is verified: the export at `path`, with its networks and how they take images."""

    path: Path
    best: Path | None
    float_model: nn.Module | None
    qmodel: fx.GraphModule | None
    test: Split
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batches(self, batch_size: int, count: int) -> Iterator[Tensor]:
        images = Split(self.test.images[:count], self.test.labels[:count])
        for batch, _ in eval_batches(
            images, batch_size=batch_size, mean=self.mean, std=self.std, image_size=self.image_size, device="cpu"
        ):
            yield batch


def open_subject(path: Path, data: Path | None, input_shape: tuple[int, ...] | None) -> "Subject | Stranger":
    """The network as its checkpoint has it, or, where there is none, as the export says."""
    export, best = find_export(path)
    if best is None:
        exported = open_export(export)
        m = exported.metadata
        if not exported.is_of_a_run:
            shape = input_shape or m.get("input_shape")
            if shape is None:
                raise ApotfxError(f"export {export}: does not say the shape of an input; pass --input-shape, such as 3,224,224")
            return Stranger(export, tuple(shape))
        dataset = load_dataset(m["dataset"], data, image_size=m["dataset_image_size"])
        if dataset.in_channels != m["in_channels"]:
            raise ApotfxError(
                f"{dataset.name}: its images have {dataset.in_channels} channels, the network takes {m['in_channels']}; "
                "name the data that it was trained on with --data"
            )
        images = (dataset.test, m["image_size"], tuple(m["mean"]), tuple(m["std"]))
        return Subject(export, None, exported.float_model, None, *images)
    checkpoint = read_checkpoint(best)
    if checkpoint.config is None:
        raise ApotfxError(f"checkpoint {best}: is a published one; pass the run that made the export")
    dataset = load_dataset(checkpoint.config.dataset, data, image_size=checkpoint.config.image_size)
    network = restore_network(checkpoint.config, dataset, torch.device("cpu"), checkpoint)
    images = (dataset.test, network.image_size, dataset.mean, dataset.std)
    return Subject(export, best, network.float_model, network.qmodel.eval(), *images)


RANDOM_INPUTS = 64


@dataclass(frozen=True)
class Stranger:
    """An export of somebody's own network: nothing is known but its program, and perhaps the shape of an input."""

    path: Path
    input_shape: tuple[int, ...]
    best = float_model = qmodel = None
    test = range(RANDOM_INPUTS)

    def batches(self, batch_size: int, count: int) -> Iterator[Tensor]:
        generator = torch.Generator().manual_seed(0)
        yield from torch.randn(count, *self.input_shape, generator=generator).split(batch_size)


def run(args: argparse.Namespace) -> int:
    """1 if anything differs, else 0."""
    subject = open_subject(args.path, args.data, args.input_shape)
    total = len(subject.test)
    count = args.images or total
    if count > total:
        raise ApotfxError(f"--images {count}: expected 1 to {total}")
    batches = subject.batches(args.batch_size, count)
    found = verify(subject.path, subject.float_model, batches, subject.qmodel, args.backend)
    print("\n".join(report(found, subject, count)))
    return 0 if found.equal else 1


def report(found: Verification, subject: "Subject | Stranger", count: int) -> Iterator[str]:
    yield f"export {subject.path}"
    yield from found.problems
    if subject.best is not None:
        yield from alterations(found.alterations, subject.best)
    elif not found.problems:
        yield "its files fit their checksums"
    yield from (f"note: {line}" for line in found.left_out)
    for label, comparison in found.comparisons.items():
        yield f"\n{found.against} and {label} on {count} images:\n"
        yield layer_table(comparison)
        yield first_difference(comparison, found.against, label)
    if found.comparisons:
        yield f"\n{result_table(found)}"
        yield f"\nAccumulators: bits in two's complement\n\n{accumulator_table(found.accumulators)}"
    yield "\nequal" if found.equal else "\nNOT EQUAL"


def alterations(found: list[Alteration], best: Path) -> Iterator[str]:
    if not found:
        yield f"its files hold what {best} gives"
        return
    for a in found[:SHOWN]:
        where = a.name + (str(list(a.index)) if a.index else "")
        more = f" (and {a.count - 1} more of its elements)" if a.count > 1 else ""
        yield f"altered: {where} is {abbreviated(a.stored)}, {best} gives {abbreviated(a.expected)}{more}"
    if len(found) > SHOWN:
        yield f"altered: {len(found) - SHOWN} more"


def abbreviated(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def layer_table(comparison: NetworkComparison) -> str:
    """Every node that shows codes, and whichever else differs."""
    rows = [
        [node.name, *map(differing, (node.codes, node.accumulators, node.outputs)), largest(node.outputs)]
        for node in comparison.nodes.values()
        if node.codes.compared or node.first
    ]
    headers = ["layer", "codes differ", "accumulators differ", "outputs differ", "by at most"]
    return tabulate(rows, headers, colalign=("left", *["right"] * 4), disable_numparse=True)


def differing(tally: Tally) -> str:
    return f"{tally.differing} of {tally.compared}" if tally.compared else "-"


def largest(tally: Tally) -> str:
    return f"{tally.largest:.3g}" if tally.compared else "-"


def first_difference(comparison: NetworkComparison, against: str, label: str) -> str:
    node = comparison.first
    if node is None:
        return "\nno difference"
    part, tally = node.first
    index, expected, got = tally.first
    return f"\nfirst difference: {node.name}, {part}{list(index)}: {against} {expected:.9g}, {label} {got:.9g}"


def result_table(found: Verification) -> str:
    rows = [
        [f"{found.against}, {label}", differing(c.logits), largest(c.logits), differing(c.predictions)]
        for label, c in found.comparisons.items()
    ]
    headers = ["networks", "logits differ", "by at most", "predictions differ"]
    return tabulate(rows, headers, colalign=("left", *["right"] * 3), disable_numparse=True)


def accumulator_table(layers: list[LayerAccumulators]) -> str:
    rows = []
    for layer in layers:
        by_levels, by_weights, observed = layer.bits
        rows.append([layer.name, layer.products])
        for limits, bits in ((layer.by_levels, by_levels), (layer.by_weights, by_weights), (layer.observed, observed)):
            rows[-1] += ["-", "-"] if limits is None else [f"{limits[0]} to {limits[1]}", bits]
    headers = ["layer", "products", "by levels", "bits", "by weights", "bits", "observed", "bits"]
    return tabulate(rows, headers, colalign=("left", *["right"] * 7), disable_numparse=True)
