#!/usr/bin/env python
"""Draw the level sets of the three schemes as PNG: `python tools/plot_levels.py runs/figures/levels.png`."""

import sys

import matplotlib.pyplot as plt

from apotfx import LevelSet
from apotfx.levels import SCHEMES

COLORS = {"uniform": "tab:gray", "pot": "tab:orange", "apot": "tab:blue"}


def main(path: str) -> None:
    figure, axes = plt.subplots(3, 1, figsize=(9, 4.2), sharex=True, layout="constrained")
    for axis, bits in zip(axes, (3, 4, 5), strict=True):
        for row, scheme in enumerate(reversed(SCHEMES)):
            levels = LevelSet(scheme, bits)
            values = [sign * n / levels.max for n in levels.ints for sign in (-1, 1)]
            axis.plot(values, [row] * len(values), "|", markersize=13, markeredgewidth=1.5, color=COLORS[scheme])
        axis.set_yticks(range(3), list(reversed(SCHEMES)))
        axis.set_ylim(-0.6, 2.6)
        axis.set_title(f"signed, {bits} bits", loc="left", fontsize=10)
    axes[-1].set_xlabel("value / clip")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python tools/plot_levels.py FILE.png")
    main(sys.argv[1])
