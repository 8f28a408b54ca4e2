#!/usr/bin/env python
"""Measure what quantization and training with it cost, and how fast the exported network runs.

python tools/bench.py train --network resnet18
python tools/bench.py inference --network resnet18
python tools/bench.py quantize
"""

import argparse
import sys

import bench_inference
import bench_quantize
import bench_train
from bench_common import Parser

from apotfx.errors import ApotfxError


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__.splitlines()[0])
    commands = p.add_subparsers(dest="command", required=True, metavar="{train,inference,quantize}")
    bench_train.add_parsers(commands)
    bench_inference.add_parser(commands)
    bench_quantize.add_parser(commands)
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0, 2 for a user's mistake or a failing disk, 130 when stopped by Ctrl-C."""
    try:
        args = make_parser().parse_args(argv)
        args.argv = sys.argv[1:] if argv is None else argv
        args.run(args)
        return 0
    except (ApotfxError, OSError) as error:
        print(f"bench.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
