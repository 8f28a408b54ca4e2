"""What became of each network of tools/zoo.py, in a word and as a table."""

import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping

from bench_common import markdown
from zoo_noise import EQUAL

LEAST = 20.0  # dB, of a network in 8 bits to the float network
EXACT = 60.0  # dB, of a network whose quantizers are off to the float network
MARGIN = 3.0  # dB, between two ways to 8 bits
PRODUCTS_OF_WEIGHTS = {"aten.convolution", "aten.addmm", "aten.mm"}
HEADERS = [
    "network", "input", "verdict", "dB", "by torch", "off, dB", "equal", "layers", "leaves", "MACs, M", "quantized", "quantize, s",
    "total, s",
]  # fmt: skip
EXPLANATION = f"""\
Each network has random weights (made to behave like trained ones: see `tools/zoo_init.py`) and passes, in a process of
its own, through `quantize` (with example inputs unless all of it, or more, can be traced without), `calibrate` on the
input that it is then compared on, a step of SGD, `export_integer` and `load_integer`. It is passed as its package makes
it.

- verdict: *ok* if each of these went through, the reloaded network equals the quantized one in every bit, the quantized
  one has at least {LEAST:g} dB in evaluation, and without quantizers at least {EXACT:g} dB in both modes; *refused* if
  `quantize`, `calibrate` or `export_integer` says why not; *noisy* if all holds but the {LEAST:g} dB, and 8 bits by torch
  keep at most {MARGIN:g} dB more; *wrong* if it is another network; *fails* otherwise.
- dB: signal-to-noise ratio of the output in 8 bits to that of the float network, of the worst output; the signal is only
  what differs between the two samples of the batch. By torch: the same of the float network run by torch with both
  operands of every product with a parameter rounded to 8 bits, which nobody traced; one clip per layer.
- off, dB: the same of the traced network with all its layers left in float, in evaluation / in training from the same
  random state; "=" is equal in every bit.
- equal: whether all outputs of the reloaded network equal those of the quantized one in every bit.
- layers: quantized, of all; leaves: modules that were kept whole.
- MACs: multiply-accumulates of the float network on this input in evaluation, by torch's FlopCounterMode, with padding
  and with the products of two activations, as in attention; quantized: the share of them by `apotfx.summary`.
- quantize, s: of `quantize` alone, the first call in its process; total, s: of everything, in time of the processor.
"""


def verdict(row: Mapping) -> str:
    return next(_faults(row), "ok")


def _faults(row: Mapping) -> Iterator[str]:
    """The gravest first."""
    problems = row["problems"].items()
    yield from (f"fails: {step}: {why}" for step, why in problems if not why.startswith("refused"))
    for key, mode in (("exact", "evaluation"), ("exact_training", "training")):
        if row.get(key, EXACT) < EXACT:
            yield f"wrong: {row[key]:.1f} dB without quantizers in {mode}"
    if "snr" in row and row["snr"] is None:
        yield "wrong: its output does not depend on its input"
    elif row.get("snr", LEAST) < LEAST:
        alone = row.get("snr_of_8_bits")
        worst = row["worst_products"][0]
        if alone is not None and row["snr"] >= alone - MARGIN:
            yield (
                f"noisy: 8 bits alone {alone:.1f} dB; worst product {worst['layer']}: {worst['snr']:.0f} dB, its input "
                f"reaches {worst['peak']:.0f} standard deviations"
            )
        else:
            yield f"wrong: {row['snr']:.1f} dB where 8 bits alone leave {'nothing' if alone is None else f'{alone:.1f}'}"
    yield from (why.replace("refused", f"refused: {step}", 1) for step, why in problems)


def is_ok(row: Mapping) -> bool:
    return verdict(row).startswith(("ok", "refused"))


def report(facts: Mapping[str, object], rows: list[dict], sizes: Mapping[str, int]) -> str:
    """`sizes`: how many networks each list has."""
    commits = ", ".join(dict.fromkeys(str(row.get("commit", "unknown")) for row in rows))
    facts = {**facts, "commit": commits}
    parts = ["# Networks", ", ".join(f"{key} {value}" for key, value in facts.items()), EXPLANATION.rstrip()]
    kinds = Counter(verdict(row).partition(":")[0] for row in rows)
    parts.append(f"{len(rows)} of {sum(sizes.values())} networks: {', '.join(f'{n} {k}' for k, n in kinds.items())}.")
    for list_name in dict.fromkeys(row["list"] for row in rows):
        chosen = [row for row in rows if row["list"] == list_name]
        table = markdown(HEADERS, [cells(row) for row in chosen])
        parts += [f"## {list_name}", totals(chosen, sizes.get(list_name, len(chosen))), table.rstrip()]
        verdicts = [(row["name"], verdict(row), 1) for row in chosen if verdict(row) != "ok"]
        leaves = [(row["name"], reason, 1) for row in chosen for reason in row.get("leaves", {}).values()]
        layers = [(row["name"], reason, len(n)) for row in chosen for reason, n in row.get("unquantized", {}).items()]
        for title, found in (("Not ok", verdicts), ("Leaves", leaves), ("Layers in float", layers)):
            parts += [f"{title}, by reason:", reasons(found)] if found else []
    return "\n\n".join(parts) + "\n"


def totals(rows: list[dict], of_all: int) -> str:
    lines = [f"{rows[0]['package']}: {len(rows)} of {of_all} networks were run, {sum(map(is_ok, rows))} are ok."]
    known = [row for row in rows if "share_of_macs_quantized" in row]
    convolutional = [row for row in known if is_convolutional(row)]
    others = [row for row in known if not is_convolutional(row)]
    kinds = {"have convolutions and multiply no two activations": convolutional, "are others": others}
    for kind, chosen in kinds.items():
        if chosen:
            least = min(chosen, key=lambda row: row["share_of_macs_quantized"])
            lines.append(f"{len(chosen)} {kind}: at least {share(least)} of MACs quantized ({least['name']}).")
    return " ".join(lines)


def is_convolutional(row: Mapping) -> bool:
    operators = row["macs_by_operator"].keys()
    return "aten.convolution" in operators and operators <= PRODUCTS_OF_WEIGHTS


def share(row: Mapping) -> str:
    """Rounded down, so that only what is complete shows as 100%."""
    return f"{math.floor(1e4 * row['share_of_macs_quantized']) / 100:.2f}%"


def cells(row: Mapping) -> list[str]:
    def shown(key: str, show: Callable[[object], str]) -> str:
        return show(row[key]) if row.get(key) is not None else "-"

    modes = [shown(key, decibels) for key in ("exact", "exact_training")]
    return [
        row["name"],
        shown("input_shape", shapes),
        verdict(row).partition(":")[0],
        shown("snr", decibels),
        shown("snr_of_8_bits", decibels),
        modes[0] if modes[0] == modes[1] else " / ".join(modes),
        shown("equal_after_reload", lambda equal: "yes" if equal else "no"),
        shown("layers", lambda count: f"{row['layers_quantized']} of {count}"),
        shown("leaves", lambda leaves: str(len(leaves)) + ", with example" * bool(row.get("example_inputs"))),
        shown("macs", lambda macs: f"{macs / 1e6:,.1f}"),
        shown("share_of_macs_quantized", lambda _: share(row)),
        shown("seconds_quantize", "{:.2f}".format),
        shown("seconds", "{:.0f}".format),
    ]


def decibels(value: float) -> str:
    return "=" if value == EQUAL else f"{value:.0f}"


def shapes(shape: list[int] | Mapping[str, list[int]]) -> str:
    named = shape.values() if isinstance(shape, Mapping) else [shape]
    return ", ".join(dict.fromkeys("x".join(map(str, sizes)) for sizes in named))


def reasons(found: list[tuple[str, str, int]]) -> str:
    """A line per reason of the (network, reason, count); those that differ in a block's number alone are one."""
    counts = defaultdict(Counter)
    for name, reason, count in found:
        counts[re.sub(r"(?<=\.)\d+\b", "*", reason)][name] += count
    return "\n".join(
        f"- {reason}: {', '.join(name if count == 1 else f'{name} ({count})' for name, count in names.items())}"
        for reason, names in counts.items()
    )


def line(row: Mapping) -> str:
    shown = f"{row['list']}/{row['name']}: {verdict(row)}"
    if row.get("snr") is not None:
        shown += f"; {row['snr']:.1f} dB"
    if "layers" in row:
        shown += f"; {row['layers_quantized']} of {row['layers']} layers"
    return f"{shown}; {row['seconds']:.0f} s"
