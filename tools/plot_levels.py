#!/usr/bin/env python
"""Draw the level sets of the three schemes: `python tools/plot_levels.py runs/figures/levels.png`."""

import argparse
import io
import sys

import arguments as arg
from command_line import Parser, run_tool

FORMATS = (".png", ".svg", ".pdf")
COLORS = {"uniform": "tab:gray", "pot": "tab:orange", "apot": "tab:blue"}


def make_parser() -> argparse.ArgumentParser:
    p = Parser("plot_levels.py", description=__doc__.splitlines()[0])
    p.add_argument("path", type=arg.output, metavar="FILE", help=f"the picture; {', '.join(FORMATS)}")
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code; see `run_tool`."""
    return run_tool("plot_levels", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.levels import SCHEMES, LevelSet


def draw(format: str) -> bytes:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ApotfxError("the package matplotlib is missing; pip install matplotlib") from None
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    for axis, bits in zip(axes, (3, 4, 5), strict=True):
        for row, scheme in enumerate(reversed(SCHEMES)):
            levels = LevelSet(scheme, bits)
            values = [sign * n / levels.max for n in levels.ints for sign in (-1, 1)]
            axis.plot(values, [row] * len(values), "|", markersize=13, markeredgewidth=1.5, color=COLORS[scheme])
        axis.set_yticks(range(3), list(reversed(SCHEMES)))
        axis.set_ylim(-0.6, 2.6)
        axis.set_title(f"signed, {bits} bits", loc="left", fontsize=10)
    axes[-1].set_xlabel("value / clip")
    buffer = io.BytesIO()
    figure.savefig(buffer, format=format, dpi=130)
    return buffer.getvalue()


def run(args: argparse.Namespace) -> None:
    if args.path.suffix not in FORMATS:
        raise ApotfxError(f"{args.path}: expected a name that ends in {', '.join(FORMATS)}")
    write_atomic(args.path, draw(args.path.suffix[1:]))
