#!/usr/bin/env python
"""Print what an exported network takes on disk at 2 to 8 bits, as a Markdown table.

python tools/sizes.py
"""

import argparse
import sys
import tempfile
from pathlib import Path

import arguments as arg
from command_line import Parser, run_tool


def make_parser() -> argparse.ArgumentParser:
    p = Parser("sizes.py", description=__doc__.splitlines()[0])
    p.add_argument(
        "--arch", type=arg.name, default="torchvision/resnet18", help="as in tools/train.py, at ImageNet size"
    )
    p.add_argument("--scheme", choices=["apot", "uniform"], default="apot", help="of all layers but first and last")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("sizes", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import safetensors.torch
from tabulate import tabulate
from torch import fx, nn

import apotfx
from apotfx.integer.manifest import WEIGHTS
from apotfx.layers import QuantLayer
from apotfx.levels import MAX_BITS, MIN_BITS
from apotfx.models import build_model

IMAGENET = {"in_channels": 3, "num_classes": 1000, "image_size": 224}


def least_bytes(model: nn.Module, qmodel: fx.GraphModule) -> int:
    """What the bits allow: each quantized weight at its bits, every other float at 32, of a batch norm two per channel."""
    bits = {
        f"{name}.weight": layer.weight_quantizer.levels.bits
        for name, layer in qmodel.named_modules()
        if isinstance(layer, QuantLayer) and layer.weight_quantizer is not None
    }
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    return sum(2 * 4 * norm.num_features for norm in norms.values()) + sum(
        -(-tensor.numel() * bits.get(name, 32) // 8)
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and name.rpartition(".")[0] not in norms
    )


def size(model: nn.Module, policy: apotfx.BitPolicy) -> tuple[int, int]:
    """(bytes of the exported weights, bytes that the bits allow); neither depends on training."""
    qmodel = apotfx.calibrate(apotfx.quantize(model, policy), [], method="paper")
    with tempfile.TemporaryDirectory() as directory:
        path = apotfx.export_integer(qmodel, Path(directory) / "export")
        return (path / WEIGHTS).stat().st_size, least_bytes(model, qmodel)


def sizes(arch: str, scheme: str) -> str:
    model, _ = build_model(arch, **IMAGENET)
    float_bytes = len(safetensors.torch.save(model.state_dict()))
    rows = [["float32", f"{float_bytes:,}", "100%", "", ""]]
    for bits in range(MIN_BITS, MAX_BITS + 1):
        got, least = size(model, apotfx.BitPolicy.default(bits, scheme))
        rows.append([bits, f"{got:,}", f"{got / float_bytes:.2%}", f"{least:,}", f"{got / least - 1:+.2%}"])
    headers = ["bits", f"{WEIGHTS}, bytes", "of float32", "the bits allow, bytes", "above"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=["right"] * 5)


def run(args: argparse.Namespace) -> None:
    print(sizes(args.arch, args.scheme))
