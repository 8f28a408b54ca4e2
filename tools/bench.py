#!/usr/bin/env python
"""Measure what quantization and training with it cost, and how fast the exported network runs.

python tools/bench.py train --network resnet18
python tools/bench.py inference --network resnet18
python tools/bench.py quantize
"""

import argparse
import sys

import arguments as arg
from command_line import Parser, run_tool

NETWORKS = ("resnet18", "mobilenet_v2", "mnist-resnet18", "vit-tiny", "stack")
FORMATS = ("channels-last", "contiguous")
COMPILE = ("float-compile", "compile")
TRAIN_VARIANTS = (
    "float", "float-amp", "float-compile", "eager", "compiled", "int8", "amp", "compile", "brevitas", "torch.ao",
)  # fmt: skip
INFERENCE_VARIANTS = (
    "eager", "compile", "ort-float32", "ort-int8", "onednn", "onednn-contiguous", "ort-exact", "reference",
)  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    p = Parser("bench.py", description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True, metavar="{train,inference,quantize}")
    for add in (add_train, add_inference, add_quantize):
        add(commands)
    return p


def add_train(commands) -> None:
    train = commands.add_parser("train", help="a training step", description=(
        "Time a training step (zero_grad, forward, cross entropy, backward, SGD with momentum) of every variant, in "
        "turns, and print Markdown. float always runs, as the ratios, per round, refer to it."
    ))  # fmt: skip
    add = train.add_argument
    # fmt: off
    add("--network", metavar="A,B", type=arg.some_of(NETWORKS), default=[name for name in NETWORKS if name != "stack"],
        help=f"of {', '.join(NETWORKS)}, which is 8 plain convolutions of 64 channels (default all but that)")
    add("--variants", metavar="A,B", type=arg.some_of(TRAIN_VARIANTS),
        help=f"of {', '.join(TRAIN_VARIANTS)} (default all but {' and '.join(COMPILE)}, which compile for minutes; for "
             "several levels the fastest engine)")
    add("--bits", metavar="N,N", type=arg.some_of(arg.BITS), default=[4], help="2 to 8 (default 4)")
    add("--scheme", metavar="A,B", type=arg.some_of(arg.SCHEMES), default=["apot"],
        help=f"of {', '.join(arg.SCHEMES)} (default apot); brevitas and torch.ao are uniform")
    add("--batch", metavar="N", type=arg.positive, help="images per step (default: the network's)")
    add("--image-size", metavar="N", type=arg.positive, help="in pixels (default: the network's)")
    add("--memory-format", metavar="NAME", type=arg.one_of(FORMATS), default="channels-last",
        help=f"of convolutional networks: {' or '.join(FORMATS)} (default channels-last)")
    add("--threads", metavar="N", type=arg.positive, default=min(2, arg.usable_cores()), help="(default 2)")
    add("--rounds", metavar="N", type=arg.positive, default=15, help="steps that are timed (default 15)")
    add("--warmup", metavar="N", type=arg.positive, default=3, help="steps before them (default 3)")
    add("--device", type=arg.name, default="cpu", help="cpu, cuda or cuda:N (default cpu)")
    add("--memory", action="store_true", help="measure the peak of memory too, each in 3 fresh processes, median")
    add("--first-step", action="store_true",
        help="measure the first step too, each in a fresh process, with an empty and a filled cache of compiled code")
    add("--growth", action="store_true",
        help="measure how time and memory of stack grow with batch, width, depth and bits, in float and with the "
             "fastest engine")
    add("--json", metavar="FILE", type=arg.output, help="write every figure there")
    # fmt: on
    commands.add_parser("fresh").add_argument("job")  # which train starts


def add_inference(commands) -> None:
    inference = commands.add_parser("inference", help="the exported network", description=(
        "Time the integer network of every backend, and float and 8-bit networks of PyTorch and onnxruntime, in turns, "
        "and print Markdown. eager always runs, as the ratios, per round, refer to it."
    ))  # fmt: skip
    threads = list(range(1, min(2, arg.usable_cores()) + 1))
    add = inference.add_argument
    # fmt: off
    add("--network", metavar="A,B", type=arg.some_of(NETWORKS), default=["resnet18", "mnist-resnet18"],
        help=f"of {', '.join(NETWORKS)} (default resnet18,mnist-resnet18)")
    add("--variants", metavar="A,B", type=arg.some_of(INFERENCE_VARIANTS),
        help=f"of {', '.join(INFERENCE_VARIANTS)} (default all)")
    add("--bits", metavar="N", type=arg.one_of(arg.BITS), default=4, help="2 to 8 (default 4)")
    add("--scheme", metavar="NAME", type=arg.one_of(arg.SCHEMES), default="apot",
        help=f"one of {', '.join(arg.SCHEMES)} (default apot)")
    add("--batch", metavar="N,N", type=arg.several(arg.positive), help="images (default 1,16; mnist-resnet18: 1,256)")
    add("--image-size", metavar="N", type=arg.positive, help="in pixels (default: the network's)")
    add("--threads", metavar="N,N", type=arg.several(arg.positive), default=threads,
        help=f"of PyTorch and onnxruntime (default {','.join(map(str, threads))})")
    add("--rounds", metavar="N", type=arg.positive, default=15, help="samples of each variant (default 15)")
    add("--warmup", metavar="N", type=arg.positive, default=3, help="inferences before them (default 3)")
    add("--json", metavar="FILE", type=arg.output, help="write every figure there")
    # fmt: on


def add_quantize(commands) -> None:
    quantize = commands.add_parser("quantize", help="the call of quantize", description=(
        "Time apotfx.quantize on torchvision's resnet152 and on chains of more and more layers, and print Markdown."
    ))  # fmt: skip
    add = quantize.add_argument
    # fmt: off
    add("--layers", metavar="N,N", type=arg.several(arg.positive), default=[50, 100, 200, 500, 1000, 2000],
        help="of the chains (default 50,100,200,500,1000,2000)")
    add("--bits", metavar="N", type=arg.one_of(arg.BITS), default=4, help="2 to 8 (default 4)")
    add("--scheme", metavar="NAME", type=arg.one_of(arg.SCHEMES), default="apot",
        help=f"one of {', '.join(arg.SCHEMES)} (default apot)")
    add("--threads", metavar="N", type=arg.positive, default=1, help="(default 1)")
    add("--rounds", metavar="N", type=arg.positive, default=5, help="calls that are timed (default 5)")
    add("--json", metavar="FILE", type=arg.output, help="write every figure there")
    # fmt: on


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("bench", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import bench_inference
import bench_quantize
import bench_train

RUNS = {
    "train": bench_train.run_train, "fresh": bench_train.run_fresh, "inference": bench_inference.run_inference,
    "quantize": bench_quantize.run_quantize,
}  # fmt: skip


def run(args: argparse.Namespace) -> None:
    RUNS[args.command](args)
