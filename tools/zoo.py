#!/usr/bin/env python
"""Take networks through quantize, a training step, export and reload, and write a table of what became of each.

python tools/zoo.py
python tools/zoo.py --list classification,timm --only "resnet*"
"""

import argparse
import fnmatch
import importlib.metadata
import json
import logging
import math
import multiprocessing
import re
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from bench_common import Parser, markdown, one_of, positive, some_of
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_networks import LISTS, Subject, missing

import apotfx
from apotfx.graph.network import record_of
from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.levels import MAX_BITS, MIN_BITS, SCHEMES
from apotfx.graph.tracing import bind, explain

SEED = 0
LEARNING_RATE = 1e-6
PRODUCTS_OF_WEIGHTS = {"aten.convolution", "aten.addmm", "aten.mm"}
HEADERS = [
    "network", "input", "result", "traced", "layers quantized", "MACs, M", "quantized", "quantize, s", "total, s",
    "equal",
]  # fmt: skip
EXPLANATION = """\
Each network has random weights and passes through `quantize`, a forward and a backward pass in training mode, a step of
SGD, `export_integer` and `load_integer`, in a process of its own.

- traced: whether torch.fx could enter all of it, all but some leaves, or not its forward at all; *with example inputs*
  where these left fewer leaves.
- MACs: multiply-accumulates of the float network on this input in evaluation, by torch's FlopCounterMode, with padding
  and with the products of two activations, as in attention.
- quantized: the share of them in layers that have weight and input quantized, by `apotfx.summary`.
- quantize, s: of `quantize` alone, the first call in its process; total, s: of everything.
- equal: whether all outputs of the reloaded network equal those of the quantized one in every bit.
"""


def pass_through(subject: Subject, policy: apotfx.BitPolicy, row: dict) -> Iterator[str]:
    """Yields the name of each step before it; what it finds goes into `row`."""
    model, inputs = subject.model, subject.inputs
    row["input_shape"] = tree_map_only(Tensor, lambda x: list(x.shape), inputs)
    row["parameters"] = sum(p.numel() for p in model.parameters())
    row["macs"], row["macs_by_operator"] = sum(subject.macs.values()), dict(subject.macs)

    yield "quantize"
    qmodel, example_inputs = quantized(model, policy, inputs, row)
    row |= layer_facts(qmodel)

    yield "summary"
    row["share_of_macs_quantized"] = apotfx.summary(qmodel, inputs).quantized_macs / row["macs"]

    yield "train"
    row["without_gradient"] = train_step(qmodel, inputs)

    yield "evaluate"
    expected = evaluate(qmodel, inputs)
    with tempfile.TemporaryDirectory() as directory:
        yield "export"
        path = apotfx.export_integer(qmodel, Path(directory) / "export")
        del qmodel
        yield "reload"
        imodel = apotfx.load_integer(path, model, example_inputs=example_inputs)
    yield "compare"
    row["equal_after_reload"] = False
    require_equal(expected, evaluate(imodel, inputs))
    row["equal_after_reload"] = True


def quantized(
    model: nn.Module, policy: apotfx.BitPolicy, inputs: Tensor | Mapping[str, Tensor], row: dict
) -> tuple[nn.Module, Tensor | Mapping[str, Tensor] | None]:
    """The quantized network, and the example inputs if with these more of it could be traced."""

    def timed(example_inputs: object) -> tuple[nn.Module, float]:
        start = time.perf_counter()
        qmodel = apotfx.quantize(model, policy, example_inputs=example_inputs)
        return qmodel, time.perf_counter() - start

    qmodel, row["seconds_quantize"] = timed(None)
    if record_of(qmodel)["leaves"]:
        other, seconds = timed(inputs)
        if hidden_layers(other) < hidden_layers(qmodel):
            row |= {"seconds_quantize": seconds, "example_inputs": True}
            return other, inputs
    return qmodel, None


def hidden_layers(qmodel: nn.Module) -> tuple[int, int]:
    """(layers in float, leaves)."""
    return sum(not planned.quantized for planned in record_of(qmodel)["plan"].layers), len(record_of(qmodel)["leaves"])


def layer_facts(qmodel: nn.Module) -> dict:
    layers, leaves = record_of(qmodel)["plan"].layers, record_of(qmodel)["leaves"]
    unquantized = defaultdict(list)
    for planned in layers:
        if not planned.quantized:
            unquantized[planned.reason].append(planned.facts.name)
    return {
        "traced": "no" if "" in leaves else "with leaves" if leaves else "yes",
        "layers": len(layers),
        "layers_quantized": sum(planned.quantized for planned in layers),
        "leaves": dict(leaves),
        "unquantized": dict(unquantized),
    }


def train_step(qmodel: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> list[str]:
    """One step in training mode, which also gives the clips their values; returns the parameters without gradient."""
    args, kwargs = bind(inputs)
    outputs = [x for x in tensors(qmodel.train()(*args, **kwargs)) if x.is_floating_point()]
    loss = sum(x.square().mean() for x in outputs)
    if not loss.isfinite():
        raise ApotfxError(f"the loss is {loss.item()}")
    loss.backward()
    trained = {name: p for name, p in qmodel.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise ApotfxError(f"the gradient of {name} is not finite")
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    # Without foreach it needs no second copy of all gradients.
    torch.optim.SGD(trained.values(), lr=LEARNING_RATE, foreach=False).step()
    for parameter in trained.values():
        parameter.grad = None
    return without


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    args, kwargs = bind(inputs)
    return tensors(model.eval()(*args, **kwargs))


def tensors(outputs: object) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def require_equal(expected: list[Tensor], got: list[Tensor]) -> None:
    """Raises: ApotfxError: anything differs or is not finite."""
    if not expected or len(expected) != len(got):
        raise ApotfxError(f"{len(expected)} outputs, after reload {len(got)}")
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        if not x.isfinite().all():
            raise ApotfxError(f"output {i} is not finite")
        if x.shape != y.shape:
            raise ApotfxError(f"output {i} has shape {list(x.shape)}, after reload {list(y.shape)}")
        if not torch.equal(x, y):
            count, largest = (x != y).sum(), (x.double() - y.double()).abs().max()
            raise ApotfxError(f"output {i}: {count} of {x.numel()} values differ after reload, by up to {largest:.3g}")


def examine(list_name: str, name: str, bits: int, scheme: str, send: Callable[[dict], None]) -> None:
    """Send the row of one network again at each step, so that the last one tells where its process ended."""
    row = {"list": list_name, "name": name, "status": "build", "package": package(list_name), "example_inputs": False}
    start = time.perf_counter()
    send(row)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.manual_seed(SEED)
            subject = LISTS[list_name].build(name)
            for step in pass_through(subject, apotfx.BitPolicy.default(bits, scheme), row):
                row["status"] = step
                send(row)
            row["status"] = "ok"
        except Exception as error:  # whatever goes wrong is what the table is for
            row["status"] += f": {one_line(error) if isinstance(error, ApotfxError) else explain(error)}"
    row["warnings"] = list(dict.fromkeys(one_line(warning.message) for warning in caught))
    row["seconds"] = time.perf_counter() - start
    row["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send(row)


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def package(list_name: str) -> str:
    name = LISTS[list_name].package
    return f"{name} {importlib.metadata.version(name)}"


def in_own_process(function: Callable, *args, timeout: float) -> tuple[dict, str | None]:
    """(the last row that `function(*args, send)` sent, what ended its process early)."""
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=serve, args=(sender, function, *args), daemon=True)
    process.start()
    sender.close()
    row, deadline = {}, time.monotonic() + timeout
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            row = receiver.recv()
        return row, f"took longer than {timeout:g} s"
    except EOFError:
        process.join()
        code = process.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return row, f"its process was ended {how}" if code else None
    finally:
        process.kill()
        process.join()
        receiver.close()


def serve(sender: Connection, function: Callable, *args) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends this process
    logging.getLogger("apotfx").setLevel(logging.ERROR)
    function(*args, sender.send)


# A server that has imported torch forks much faster than a new interpreter starts; forking this process is not safe.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)
PROCESSES.set_forkserver_preload(["torchvision", "apotfx"])


class Results:
    """The rows in `zoo.json`, and `zoo.md` made from them."""

    def __init__(self, directory: Path, facts: Mapping[str, object]):
        self.json, self.markdown = directory / "zoo.json", directory / "zoo.md"
        self.facts, self.rows = dict(facts), {}
        directory.mkdir(parents=True, exist_ok=True)
        self._read()

    def _read(self) -> None:
        if not self.json.exists():
            return
        try:
            content = json.loads(self.json.read_text())
            facts, self.rows = content["facts"], {(row["list"], row["name"]): row for row in content["rows"]}
        except (ValueError, TypeError, KeyError) as error:
            raise ApotfxError(f"{self.json}: cannot be read ({error!r}); choose another --output") from None
        for key, value in self.facts.items():
            if facts.get(key) != value:
                raise ApotfxError(
                    f"{self.json}: holds rows with {key} {facts.get(key)}, not {value}; choose another --output"
                )

    def add(self, row: dict) -> None:
        self._read()  # another run may have written rows of other networks
        self.rows[row["list"], row["name"]] = row
        self._write()

    def _write(self) -> None:
        order = [(each, name) for each in LISTS for name in LISTS[each].names()]
        known = [key for key in order if key in self.rows]
        rows = [self.rows[key] for key in [*known, *(key for key in self.rows if key not in known)]]
        write_atomic(self.json, (json.dumps({"facts": self.facts, "rows": rows}, indent=1) + "\n").encode())
        write_atomic(self.markdown, report(self.facts, rows).encode())


def is_ok(row: Mapping) -> bool:
    return row["status"] == "ok"


def report(facts: Mapping[str, object], rows: list[dict]) -> str:
    parts = ["# Networks", ", ".join(f"{key} {value}" for key, value in facts.items()), EXPLANATION.rstrip()]
    for list_name in dict.fromkeys(row["list"] for row in rows):
        chosen = [row for row in rows if row["list"] == list_name]
        table = markdown(HEADERS, [cells(row) for row in chosen])
        parts += [f"## {list_name}", totals(list_name, chosen), table.rstrip()]
        leaves = [(row["name"], reason, 1) for row in chosen for reason in row.get("leaves", {}).values()]
        layers = [(row["name"], reason, len(n)) for row in chosen for reason, n in row.get("unquantized", {}).items()]
        for title, found in (("Leaves", leaves), ("Layers in float", layers)):
            parts += [f"{title}, by reason:", reasons(found)] if found else []
    return "\n\n".join(parts) + "\n"


def totals(list_name: str, rows: list[dict]) -> str:
    count, of_all = sum(map(is_ok, rows)), len(LISTS[list_name].names())
    lines = [f"{rows[0]['package']}: {len(rows)} of {of_all} networks were run, {count} are ok."]
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
        return show(row[key]) if key in row else "-"

    return [
        row["name"],
        shown("input_shape", shapes),
        row["status"].replace("|", "\\|"),
        shown("traced", str) + (" with example inputs" if row.get("example_inputs") else ""),
        shown("layers", lambda count: f"{row['layers_quantized']} of {count}"),
        shown("macs", lambda macs: f"{macs / 1e6:,.1f}"),
        shown("share_of_macs_quantized", lambda _: share(row)),
        shown("seconds_quantize", "{:.2f}".format),
        shown("seconds", "{:.0f}".format),
        shown("equal_after_reload", lambda equal: "yes" if equal else "no"),
    ]


def shapes(shape: list[int] | Mapping[str, list[int]]) -> str:
    named = shape if isinstance(shape, Mapping) else {"": shape}
    return ", ".join(f"{name} {'x'.join(map(str, sizes))}".strip() for name, sizes in named.items())


def reasons(found: list[tuple[str, str, int]]) -> str:
    """A line per reason of the (network, reason, count); those that differ in a block's number alone are one."""
    counts = defaultdict(Counter)
    for name, reason, count in found:
        counts[re.sub(r"(?<=\.)\d+\b", "*", reason)][name] += count
    return "\n".join(
        f"- {reason}: {', '.join(f'{name} ({count})' for name, count in names.items())}"
        for reason, names in counts.items()
    )


def line(row: Mapping) -> str:
    shown = f"{row['list']}/{row['name']}: {row['status']}"
    if "share_of_macs_quantized" in row:
        shown += f"; {row['layers_quantized']} of {row['layers']} layers, {share(row)} of MACs"
    return f"{shown}; {row['seconds']:.0f} s"


def run(args: argparse.Namespace) -> bool:
    """Whether every chosen network that was run, now or before, went through."""
    chosen = choose(args.list, args.only)
    facts = {"bits": args.bits, "scheme": args.scheme, "torch": torch.__version__}
    results, start = Results(args.output, facts), time.monotonic()
    for key in chosen:
        if key in results.rows and not (args.retry_failed and not is_ok(results.rows[key])):
            continue
        begin = time.monotonic()
        if args.limit_seconds is not None and begin - start >= args.limit_seconds:
            print(f"stopped after {args.limit_seconds} s; the same command goes on")
            break
        row, ended = in_own_process(examine, *key, args.bits, args.scheme, timeout=args.timeout)
        row = {"list": key[0], "name": key[1], "status": "start", "package": package(key[0])} | row
        if ended:
            row |= {"status": f"{row['status']}: {ended}", "seconds": time.monotonic() - begin}
        results.add(row)
        print(line(row), flush=True)
    rows = [results.rows[key] for key in chosen if key in results.rows]
    print(f"{sum(map(is_ok, rows))} of {len(chosen)} ok; {results.markdown}")
    return all(map(is_ok, rows))


def choose(lists: list[str], glob: str) -> list[tuple[str, str]]:
    """(list, name) of every network of `lists` whose name matches; says which lists lack their package."""
    chosen = [(each, name) for each in lists for name in fnmatch.filter(LISTS[each].names(), glob)]
    if not chosen:
        raise ApotfxError(f"--only {glob}: matches no network of {', '.join(lists)}")
    for each in dict.fromkeys(list_name for list_name, _ in chosen):
        reason = missing(each)
        if reason:
            print(f"zoo.py: {each} is left out: {reason}; pip install 'apotfx[zoo]'", file=sys.stderr)
            chosen = [key for key in chosen if key[0] != each]
    if not chosen:
        raise ApotfxError("no network is left to run")
    return chosen


def make_parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__.splitlines()[0])
    add = p.add_argument
    # fmt: off
    add("--list", metavar="A,B", type=some_of(LISTS), default=list(LISTS), help=f"of {', '.join(LISTS)} (default all)")
    add("--only", metavar="GLOB", default="*", help="the networks whose name matches (default all)")
    add("--output", metavar="DIR", type=Path, default=Path("runs/zoo"),
        help="for zoo.json and zoo.md; what zoo.json has is not run again (default %(default)s)")
    add("--bits", metavar="N", type=one_of(range(MIN_BITS, MAX_BITS + 1)), default=4, help="2 to 8 (default 4)")
    add("--scheme", metavar="NAME", type=one_of(SCHEMES), default="apot",
        help=f"one of {', '.join(SCHEMES)} (default apot)")
    add("--timeout", metavar="N", type=positive, default=600, help="seconds that a network may take (default 600)")
    add("--limit-seconds", metavar="N", type=positive, help="begin no network after that; the same command goes on")
    add("--retry-failed", action="store_true", help="run the networks again that failed")
    # fmt: on
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 0 if every network is ok, 1 if one failed, 2 for a user's mistake, 130 when stopped by Ctrl-C."""
    try:
        return 0 if run(make_parser().parse_args(argv)) else 1
    except (ApotfxError, OSError) as error:
        print(f"zoo.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
