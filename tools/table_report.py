"""What the runs of a table reached, as rows with mean and standard deviation: Markdown, JSON and a picture."""

import importlib.util
import io
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from bench_common import markdown
from table_runs import ABLATIONS, SPLITS, Run, differing, read_config, read_result, settings_of

from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.policy import FLOAT_BITS
from apotfx.training.recipes import RECIPES

MIN_PAIRS = 3  # two say too little of their spread
MEASURES = (*SPLITS, "best_epoch_test")
# What APoT's and uniform's runs may differ in, and those of the best recipe with and without a part.
OF_A_SCHEME = {"seed", "scheme", "policy", "pretrained"}
OF_AN_ABLATION = {"seed", "policy", "pretrained", "teacher", "epochs", "clip_lr", "ema"}
# Accuracy in percent on the training images of MNIST, as published; see the README.
PUBLISHED = {
    ("resnet18", "apot"): {5: 99.58, 4: 99.49, 3: 99.30, 2: 98.45},
    ("resnet18", "uniform"): {5: 99.40, 4: 99.39, 3: 99.24, 2: 98.31},
    ("resnet10", "apot"): {5: 99.78, 4: 99.64, 3: 99.39, 2: 98.72},
    ("resnet10", "uniform"): {5: 99.68, 4: 99.54, 3: 99.25, 2: 98.45},
}
SCHEMES = {"apot": "C0", "uniform": "C1", "pot": "C2", "float": "C7"}  # and their colours


@dataclass(frozen=True)
class Row:
    """The finished runs that differ in their seed alone."""

    arch: str
    scheme: str
    bits: int
    recipe: str
    runs: tuple[dict, ...]
    settings: dict  # of `settings_of`, as `_without_seed` leaves them

    @property
    def seeds(self) -> list[int]:
        return [run["seed"] for run in self.runs]

    def accuracies(self, measure: str) -> list[float]:
        return [run[f"{measure}_acc"] for run in self.runs]

    def mean(self, measure: str) -> float:
        return statistics.fmean(self.accuracies(measure))

    def std(self, measure: str) -> float | None:
        """The standard deviation of the population that the seeds are drawn from; None with one seed."""
        return statistics.stdev(self.accuracies(measure)) if len(self.runs) > 1 else None

    def to_dict(self) -> dict:
        statistic = {
            f"{measure}_{name}": None if value is None else round(value, 4)
            for measure in MEASURES
            for name, value in (("mean", self.mean(measure)), ("std", self.std(measure)))
        }
        facts = {"arch": self.arch, "scheme": self.scheme, "bits": self.bits, "recipe": self.recipe}
        return {**facts, "seeds": self.seeds, **statistic, "runs": list(self.runs)}


def require_packages() -> None:
    """Raises: ApotfxError: a package that the report is made with is missing."""
    for package in ("matplotlib", "scipy"):
        if importlib.util.find_spec(package) is None:
            raise ApotfxError(f"tools/table.py needs {package}; pip install 'apotfx[table]'")


def read_rows(directory: Path, planned: Mapping[Run, dict] = MappingProxyType({})) -> list[Row]:
    """The rows of all finished runs below `directory`: by recipe as `RECIPES` has them, network, bits and scheme.

    Args:
        directory: of the table.
        planned: runs that are to come, and their settings as `settings_of` gives them.

    Raises:
        ApotfxError: a run is damaged, or runs of a row, those to come among them, differ in more than their seed, or
            not in that.
    """
    groups: dict[tuple, dict[int, dict]] = defaultdict(dict)
    settings: dict[tuple, tuple[str, dict]] = {}

    def require_equal(key: tuple, name: str, of_run: dict) -> None:
        first, expected = settings.setdefault(key, (name, _without_seed(of_run)))
        for setting in differing(_without_seed(of_run), expected):
            raise ApotfxError(
                f"{name}: {setting.replace('_', '-')} is not as in {first}, and both would be in one row; move one of "
                f"them away, or pass another --name"
            )

    for path in sorted(directory.glob("*/*/result.json")):
        result, config = read_result(path.parent), read_config(path.parent)
        arguments = config["arguments"]
        bits = arguments["bit"]
        scheme = "float" if bits == FLOAT_BITS else arguments["scheme"]
        run = {
            "seed": result["seed"],
            **{f"{split}_acc": result[f"last_{split}_acc"] for split in SPLITS},
            **{f"best_epoch_{split}_acc": result[f"{split}_acc"] for split in SPLITS},
            "best_epoch": result["best_epoch"],
            "integer_test_acc": result["integer_test_acc"],
            "seconds": result["seconds"],
            "directory": str(path.parent.relative_to(directory)),
            "config": {key: value for key, value in config.items() if key != "policy"},
        }
        key = path.parent.parent.name, arguments["arch"], bits, scheme
        require_equal(key, str(path.parent), settings_of(config))
        other = groups[key].setdefault(run["seed"], run)
        if other is not run:
            raise ApotfxError(
                f"{path.parent}: has seed {run['seed']}, as {directory / other['directory']} of the same row has; move "
                f"one of them away"
            )
    for run, of_run in planned.items():
        require_equal((run.recipe, run.arch, run.bits, run.scheme), f"{run.name}, which is to be trained", of_run)

    def place(key: tuple) -> tuple:
        recipe, arch, bits, scheme = key
        rank = list(RECIPES).index(recipe) if recipe in RECIPES else len(RECIPES)
        return rank, recipe, arch, -bits, scheme

    return [
        Row(arch, scheme, bits, recipe, tuple(groups[key][seed] for seed in sorted(groups[key])), settings[key][1])
        for key in sorted(groups, key=place)
        for recipe, arch, bits, scheme in [key]
    ]


def _without_seed(settings: dict) -> dict:
    """Settings as all runs of a row have them: without the seed, also in the path of the weights to start from."""
    pretrained = settings["pretrained"] and re.sub(r"-s\d+(?=/|$)", "-s*", settings["pretrained"])
    return {key: value for key, value in settings.items() if key != "seed"} | {"pretrained": pretrained}


def write_report(directory: Path, command: str) -> list[Row]:
    """Write `table.json`, `table.md` and `accuracy.png` in `directory`; returns the rows."""
    rows = read_rows(directory)
    write_atomic(directory / "table.json", (json.dumps([row.to_dict() for row in rows], indent=1) + "\n").encode())
    parts = [f"# What each recipe reaches\n\nLast extended by `{command}`.\n", EXPLANATION]
    for recipe in dict.fromkeys(row.recipe for row in rows):
        parts.append(f"## {recipe}\n\n{accuracy_table([row for row in rows if row.recipe == recipe])}")
    if any(goal(row) for row in rows):
        parts.append(f"## Against the published figures\n\n{GOALS}\n{goal_table(rows)}")
    if pairs := apot_minus_uniform(rows):
        table = paired_table(pairs, "recipe", "network", "bits")
        parts.append(f"## APoT against uniform\n\n{SCHEMES_COMPARED}\n{table}")
    if pairs := ablated_minus_best(rows):
        table = paired_table(pairs, "recipe", "network", "bits", "scheme")
        parts.append(f"## Ablations\n\n{ABLATIONS_COMPARED}\n{table}")
    drawn = [row for row in rows if row.recipe in RECIPES]
    if drawn:
        plot(drawn, directory / "accuracy.png")
        parts.append("![Test accuracy against bits](accuracy.png)\n")
    write_atomic(directory / "table.md", "\n".join(parts).encode())
    return rows


EXPLANATION = """\
Accuracy in percent: mean and standard deviation over the seeds, of the weights after the last epoch (their moving
average, where the recipe keeps one). "Test" is on the test images, which nothing was chosen by; "training" on all
training images without augmentation, those held out for validation included: the protocol of the published table.
"Best epoch" is on the test images too, by the weights of the epoch that was best on the validation images.
"""
GOALS = """\
The published figures are accuracies on training images; here they are goals for the mean on test images.
"""
SCHEMES_COMPARED = """\
Test accuracy of APoT minus that of uniform, in points, with the same seed (the same initial weights, order of images
and augmentation), and the 95% confidence interval of its mean (Student's t over the pairs). An interval that holds 0
does not tell which is better; differences that are all equal have none. Over several networks or bits, pairs count as
independent. Rows that differ in other settings too are not compared.
"""
ABLATIONS_COMPARED = """\
Test accuracy without one part of the best recipe minus that with all of them, in points, in the same way.
"""


def accuracy_table(rows: Sequence[Row]) -> str:
    headers = ["network", "bits", "scheme", "seeds", "test", "training", "validation", "best epoch", "runs"]
    return markdown(
        headers,
        [
            [
                row.arch, "float" if row.bits == FLOAT_BITS else row.bits, row.scheme,
                ", ".join(map(str, row.seeds)),
                *(with_spread(row.mean(measure), row.std(measure)) for measure in MEASURES),
                " ".join(f"[{run['seed']}]({run['directory']})" for run in row.runs),
            ]
            for row in rows
        ],
    )  # fmt: skip


def with_spread(mean: float, std: float | None) -> str:
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def goal(row: Row) -> float | None:
    """The published accuracy of a row on all of MNIST."""
    if row.settings["dataset"] != "mnist" or row.settings["train_images"] is not None:
        return None
    return PUBLISHED.get((row.arch, row.scheme), {}).get(row.bits)


def goal_table(rows: Sequence[Row]) -> str:
    recipes = list(dict.fromkeys(row.recipe for row in rows if goal(row)))
    cells = {(row.arch, row.scheme, row.bits, row.recipe): row for row in rows}
    lines = []
    for (arch, scheme), published in PUBLISHED.items():
        for bits, figure in published.items():
            found = [cells.get((arch, scheme, bits, recipe)) for recipe in recipes]
            if any(found):
                reached = [
                    "" if row is None else f"{row.mean('test'):.3f}{' reached' * (row.mean('test') > figure)}"
                    for row in found
                ]
                lines.append([arch, bits, scheme, f"{figure:.2f}", *reached])
    return markdown(["network", "bits", "scheme", "published figure", *recipes], lines)


@dataclass(frozen=True)
class Paired:
    """Differences in test accuracy between two groups of runs, by pairs with equal seeds.

    Attributes:
        where: what both have in common, or what the first group is; "all" for several.
        differences: first minus second, in points.
    """

    where: tuple[str, ...]
    differences: tuple[float, ...]

    @property
    def interval(self) -> tuple[float, float] | None:
        """The 95% confidence interval of the mean, by Student's t; None if all differences are equal."""
        from scipy.stats import t

        n = len(self.differences)
        if statistics.stdev(self.differences) == 0:
            return None
        half = t.ppf(0.975, n - 1) * statistics.stdev(self.differences) / math.sqrt(n)
        mean = statistics.fmean(self.differences)
        return mean - half, mean + half


def differences(row: Row, other: Row, may_differ: Set[str]) -> tuple[float, ...]:
    """Test accuracy of `row` minus that of `other`, for each seed that both have; none if more settings differ."""
    if not may_differ.issuperset(differing(row.settings, other.settings)):
        return ()
    accuracies = dict(zip(other.seeds, other.accuracies("test")))
    return tuple(acc - accuracies[seed] for seed, acc in zip(row.seeds, row.accuracies("test")) if seed in accuracies)


def apot_minus_uniform(rows: Iterable[Row]) -> list[Paired]:
    """By recipe, network and bits; then over the networks, and over all bits; where there are `MIN_PAIRS`."""
    rows = list(rows)
    uniform = {(row.recipe, row.arch, row.bits): row for row in rows if row.scheme == "uniform"}
    single, pooled, networks = [], defaultdict(tuple), defaultdict(set)
    for row in rows:
        other = uniform.get((row.recipe, row.arch, row.bits))
        if row.scheme == "apot" and other:
            single.append(Paired((row.recipe, row.arch, str(row.bits)), differences(row, other, OF_A_SCHEME)))
            networks[row.recipe].add(row.arch)
            for bits in (str(row.bits), "all"):
                pooled[row.recipe, bits] += single[-1].differences
    pooled = [
        Paired((recipe, "all", bits), of_all)
        for (recipe, bits), of_all in sorted(pooled.items(), key=lambda item: item[0][1] == "all")
        if bits == "all" or len(networks[recipe]) > 1
    ]
    return [pair for pair in (*single, *pooled) if len(pair.differences) >= MIN_PAIRS]


def ablated_minus_best(rows: Iterable[Row]) -> list[Paired]:
    """By ablation, network, bits and scheme; where there are `MIN_PAIRS`."""
    rows = list(rows)
    best = {(row.arch, row.bits, row.scheme): row for row in rows if row.recipe == "best"}
    pairs = [
        Paired((row.recipe, row.arch, str(row.bits), row.scheme), differences(row, other, OF_AN_ABLATION))
        for row in rows
        if row.recipe in ABLATIONS and (other := best.get((row.arch, row.bits, row.scheme)))
    ]
    return [pair for pair in pairs if len(pair.differences) >= MIN_PAIRS]


def paired_table(pairs: Iterable[Paired], *headers: str) -> str:
    """`headers` name what `Paired.where` holds."""
    lines = [
        [
            *pair.where, len(pair.differences), f"{statistics.fmean(pair.differences):+.3f}",
            "{:+.3f} to {:+.3f}".format(*pair.interval) if pair.interval else "all equal",
        ]
        for pair in pairs
    ]  # fmt: skip
    return markdown([*headers, "pairs", "mean difference", "95% interval"], lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw test accuracy against bits, with the standard deviation over the seeds: networks across, recipes down."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    archs, recipes = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("arch", "recipe"))
    bits = sorted({row.bits for row in rows if row.scheme != "float"})
    figure, axes = plt.subplots(
        len(recipes), len(archs), sharex=True, sharey="row", squeeze=False, layout="constrained",
        figsize=(4.5 * len(archs), 3.2 * len(recipes)),
    )  # fmt: skip
    for i, recipe in enumerate(recipes):
        for j, arch in enumerate(archs):
            _draw(axes[i, j], [row for row in rows if (row.arch, row.recipe) == (arch, recipe)])
            axes[i, j].set_title(f"{arch}, {recipe}")
            axes[i, j].set_xticks(bits)
    for axis in axes[-1]:
        axis.set_xlabel("bits")
    for axis in axes[:, 0]:
        axis.set_ylabel("test accuracy, %")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


def _draw(axis, rows: Sequence[Row]) -> None:
    for scheme, colour in SCHEMES.items():
        of_scheme = sorted((row for row in rows if row.scheme == scheme), key=lambda row: row.bits)
        if not of_scheme:
            continue
        bits, means, stds = zip(*((row.bits, row.mean("test"), row.std("test") or 0.0) for row in of_scheme))
        if scheme == "float":
            axis.axhline(means[0], color=colour, linestyle="--", label="float")
            axis.axhspan(means[0] - stds[0], means[0] + stds[0], color=colour, alpha=0.15)
            continue
        axis.errorbar(bits, means, stds, color=colour, marker="o", capsize=3, label=scheme)
        published = [(row.bits, goal(row)) for row in of_scheme if goal(row)]
        if published:
            label = f"{scheme}, published (training images)"
            axis.plot(*zip(*published), color=colour, marker="x", linestyle=":", label=label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(fontsize=7)
