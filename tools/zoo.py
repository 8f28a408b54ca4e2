#!/usr/bin/env python
"""Take networks through quantize, calibrate, a training step, export and reload: a table of what became of each.

python tools/zoo.py
python tools/zoo.py --list timm,yolo --only "*vit*" --jobs 2 --resume
"""

import argparse
import sys
from pathlib import Path

import arguments as arg
from command_line import Parser, run_tool

NETWORK_LISTS = (
    "classification", "segmentation", "video", "detection", "timm", "transformers", "transformers-fx", "smp", "yolo",
)  # of zoo_networks.py  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    p = Parser("zoo.py", description=__doc__.splitlines()[0])
    add = p.add_argument
    # fmt: off
    add("--list", metavar="A,B", type=arg.some_of(NETWORK_LISTS), default=list(NETWORK_LISTS),
        help=f"of {', '.join(NETWORK_LISTS)} (default all)")
    add("--only", metavar="GLOB", default="*", help="the networks whose name matches (default all)")
    add("--output", metavar="DIR", type=arg.path, default=Path("runs/zoo"), help="for zoo.json and zoo.md (default %(default)s)")
    add("--resume", action="store_true", help="keep the rows that zoo.json has of this commit")
    add("--retry-failed", action="store_true", help="with --resume: but not those that are not ok")
    add("--jobs", metavar="N", type=arg.positive, default=1, help="networks at a time (default %(default)s)")
    add("--bits", metavar="N", type=arg.one_of(arg.BITS), default=8, help="2 to 8 (default 8)")
    add("--scheme", metavar="NAME", type=arg.one_of(arg.SCHEMES), default="uniform",
        help=f"one of {', '.join(arg.SCHEMES)} (default uniform)")
    add("--timeout", metavar="N", type=arg.positive, default=400, help="seconds of the processor that a network may take (default 400)")
    add("--memory", metavar="N", type=arg.positive, default=16, help="GiB that a network may take (default 16)")
    add("--limit-seconds", metavar="N", type=arg.positive, help="begin no network after that; --resume goes on")
    # fmt: on
    return p


def main(argv: list[str] | None = None) -> int:
    """The exit code: 1 if a network is neither ok nor refused, otherwise as `run_tool` has it."""
    return run_tool("zoo", make_parser(), argv)


if __name__ == "__main__":  # what follows takes seconds to import; `main` imports this file as a module
    sys.exit(main())

import concurrent.futures
import copy
import fnmatch
import importlib.metadata
import json
import logging
import math
import multiprocessing
import random
import resource
import signal
import subprocess
import tempfile
import threading
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only
from zoo_init import bind
from zoo_networks import LISTS, Subject, missing
from zoo_noise import EQUAL, in_8_bits, signal_to_noise
from zoo_report import is_ok, line, report

import apotfx
from apotfx.errors import ApotfxError
from apotfx.graph.network import record_of
from apotfx.files import write_atomic
from apotfx.policy import FLOAT_BITS

SEED = 0
LEARNING_RATE = 1e-6
PATIENCE = 10
TOOLS = str(Path(__file__).parent)


class Passage:
    """A network on its way; each step puts what it finds into `row`.

    Those that are `ASIDE` may fail without ending it, and an ApotfxError of those that `REFUSE` is no failure.
    """

    STEPS = ("quantize", "trace", "calibrate", "compare", "summary", "train", "export", "reload", "equal")
    ASIDE = ("trace", "compare", "summary", "train")
    REFUSE = ("quantize", "calibrate", "export")

    def __init__(self, subject: Subject, policy: apotfx.BitPolicy, row: dict, directory: Path):
        self.model, self.inputs, self.policy, self.row, self.directory = (
            subject.model, subject.inputs, policy, row, directory,
        )  # fmt: skip
        self.training = self.model.training
        self.expected = evaluate(self.model, self.inputs)
        self.model.train(self.training)
        row["input_shape"] = tree_map_only(Tensor, lambda x: list(x.shape), self.inputs)
        row["parameters"] = sum(p.numel() for p in self.model.parameters())
        row["macs"], row["macs_by_operator"] = sum(subject.macs.values()), dict(subject.macs)
        if not any(x.isfinite().any() and x.is_floating_point() for x in self.expected):
            raise ValueError(f"the float network gives nothing: {len(self.expected)} outputs")

    def quantize(self) -> None:
        """With example inputs unless all of it, or more, can be traced without."""
        self.examples = None
        try:
            self.qmodel, self.row["seconds_quantize"] = timed(apotfx.quantize, self.model, self.policy)
            hidden = hidden_layers(self.qmodel)
        except ApotfxError:
            hidden = (True, math.inf, math.inf)
        if any(hidden):
            other, seconds = timed(apotfx.quantize, self.model, self.policy, example_inputs=self.inputs)
            if hidden_layers(other) <= hidden:  # where it is as much, they give better reasons
                self.qmodel, self.examples = other, self.inputs
                self.row |= {"seconds_quantize": seconds, "example_inputs": True}
        self.row |= layer_facts(self.qmodel)

    def trace(self) -> None:
        """With every layer left in float, the network must be the one that was handed over, in both modes."""
        policy = apotfx.BitPolicy.default(FLOAT_BITS)
        traced = apotfx.quantize(self.model, policy, example_inputs=self.examples)
        self.row["exact"] = difference(self.expected, evaluate(traced, self.inputs))
        try:
            expected = train(copy.deepcopy(self.model), self.inputs)  # which changes its buffers
        except Exception as error:  # the float network cannot be trained on these inputs either
            self.row["no_training"] = describe(error)
            return
        self.row["exact_training"] = difference(expected, train(traced, self.inputs))

    def calibrate(self) -> None:
        apotfx.calibrate(self.qmodel.eval(), [self.inputs])

    def compare(self) -> None:
        """With the float network, and that with the same network in 8 bits that nobody traced."""
        self.row["snr"] = signal_to_noise(self.expected, evaluate(self.qmodel, self.inputs))
        outputs, products = in_8_bits(self.model.eval(), self.inputs)
        self.model.train(self.training)
        self.row["snr_of_8_bits"] = signal_to_noise(self.expected, tensors(outputs))
        self.row["worst_products"] = products[:3]

    def summary(self) -> None:
        self.row["share_of_macs_quantized"] = apotfx.summary(self.qmodel, self.inputs).quantized_macs / self.row["macs"]

    def train(self) -> None:
        if "no_training" not in self.row:
            self.row["without_gradient"] = train_step(self.qmodel, self.inputs)

    def export(self) -> None:
        self.quantized = evaluate(self.qmodel, self.inputs)
        self.path = apotfx.export_integer(self.qmodel, self.directory / "export")
        del self.qmodel

    def reload(self) -> None:
        imodel = apotfx.load_integer(self.path, self.model.train(self.training), example_inputs=self.examples)
        self.reloaded = evaluate(imodel, self.inputs)

    def equal(self) -> None:
        self.row["equal_after_reload"] = False
        require_equal(self.quantized, self.reloaded)
        self.row["equal_after_reload"] = True


class Unequal(Exception):
    """What must hold of a network does not."""


def timed(function: Callable, *args, **kwargs) -> tuple[object, float]:
    begin = time.process_time()
    return function(*args, **kwargs), time.process_time() - begin


def hidden_layers(qmodel: nn.Module) -> tuple[bool, int, int]:
    """(whether the model itself is a leaf, leaves, layers in float)."""
    layers, leaves = plan_and_leaves(qmodel)
    return "" in leaves, len(leaves), sum(not planned.quantized for planned in layers)


def layer_facts(qmodel: nn.Module) -> dict:
    layers, leaves = plan_and_leaves(qmodel)
    unquantized = defaultdict(list)
    for planned in layers:
        if not planned.quantized:
            unquantized[planned.reason].append(planned.facts.name)
    return {
        "layers": len(layers),
        "layers_quantized": sum(planned.quantized for planned in layers),
        "leaves": dict(leaves),
        "unquantized": dict(unquantized),
    }


def plan_and_leaves(qmodel: nn.Module) -> tuple[list, Mapping[str, str]]:
    return record_of(qmodel)["plan"].layers, record_of(qmodel)["leaves"]


def seed_all() -> None:
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(SEED)


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    seed_all()
    args, kwargs = bind(inputs)
    return tensors(model.eval()(*args, **kwargs))


@torch.no_grad()
def train(model: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> list[Tensor]:
    seed_all()
    args, kwargs = bind(inputs)
    return tensors(model.train()(*args, **kwargs))


def tensors(outputs: object) -> list[Tensor]:
    return [x for x in tree_leaves(outputs) if isinstance(x, Tensor)]


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The signal-to-noise ratio in dB of all of `got`, 0 where its shapes are others."""
    if [x.shape for x in expected] != [y.shape for y in got]:
        return 0.0
    if all(torch.equal(x, y) for x, y in zip(expected, got, strict=True)):
        return EQUAL
    found = signal_to_noise(expected, got)
    return 0.0 if found is None else found


def train_step(qmodel: nn.Module, inputs: Tensor | Mapping[str, Tensor]) -> list[str]:
    """One step in training mode; returns the parameters without gradient."""
    args, kwargs = bind(inputs)
    outputs = [x for x in tensors(qmodel.train()(*args, **kwargs)) if x.requires_grad]
    if not outputs:
        raise Unequal("no output has a gradient")
    loss = sum(x.where(x.isfinite(), 0).square().mean() for x in outputs)
    if not loss.isfinite():
        raise Unequal(f"the loss is {loss.item()}")
    loss.backward()
    trained = {name: p for name, p in qmodel.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            raise Unequal(f"the gradient of {name} is not finite")
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    # Without foreach it needs no second copy of all gradients.
    torch.optim.SGD(trained.values(), lr=LEARNING_RATE, foreach=False).step()
    for parameter in trained.values():
        parameter.grad = None
    return without


def require_equal(expected: list[Tensor], got: list[Tensor]) -> None:
    """Raises: Unequal: anything differs, or is no number."""
    if not expected or len(expected) != len(got):
        raise Unequal(f"{len(expected)} outputs, after reload {len(got)}")
    for i, (x, y) in enumerate(zip(expected, got, strict=True)):
        if x.isnan().any():
            raise Unequal(f"output {i} is not a number")
        if x.shape != y.shape:
            raise Unequal(f"output {i} has shape {list(x.shape)}, after reload {list(y.shape)}")
        if not torch.equal(x, y):
            count, largest = (x != y).sum(), (x.double() - y.double()).abs().max()
            raise Unequal(f"output {i}: {count} of {x.numel()} values differ after reload, by up to {largest:.3g}")


def examine(list_name: str, name: str, bits: int, scheme: str, send: Callable[[dict], None]) -> None:
    """Send the row of one network again at each step, so that the last one tells where its process ended."""
    row = {"list": list_name, "name": name, "step": "build", "problems": {}, "package": package(list_name)}
    row |= {"example_inputs": False, "seconds_of": {}}
    send(row)
    with warnings.catch_warnings(record=True) as caught, tempfile.TemporaryDirectory() as directory:
        warnings.simplefilter("always")
        try:
            seed_all()
            passage = Passage(
                LISTS[list_name].build(name), apotfx.BitPolicy.default(bits, scheme), row, Path(directory)
            )
        except Exception as error:  # whatever goes wrong is what the table is for
            row["problems"]["build"] = describe(error)
        else:
            row["seconds_of"]["build"] = time.process_time()
            for step in Passage.STEPS:
                row["step"], begin = step, time.process_time()
                send(row)
                try:
                    getattr(passage, step)()
                except Exception as error:
                    row["problems"][step] = describe(error, step)
                    if step not in Passage.ASIDE:
                        break
                row["seconds_of"][step] = time.process_time() - begin
    row["step"] = "end"
    row["warnings"] = list(dict.fromkeys(one_line(warning.message) for warning in caught))
    row["seconds"] = time.process_time()
    row["peak_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    send(row)


def describe(error: Exception, step: str = "") -> str:
    """One line: "refused: why" for an error that is an answer; else its type, and where it was raised."""
    refusal = isinstance(error, ApotfxError)
    # An error of torch that calibrate names the layer of is a wrong graph: the float network takes this input.
    if refusal and step in Passage.REFUSE and not (step == "calibrate" and error.__cause__ is not None):
        return f"refused: {one_line(error)}"
    if isinstance(error, Unequal):
        return one_line(error)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith((TOOLS, "<"))]
    place = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno} " if frames else ""
    return f"{place}{type(error).__name__}: {one_line(error)[:400]}"


def one_line(message: object) -> str:
    return " ".join(str(message).split())


def package(list_name: str) -> str:
    name = LISTS[list_name].package
    return f"{name} {importlib.metadata.version(name)}"


def in_own_process(function: Callable, *args, timeout: float, memory: int = 2**40) -> tuple[dict, str | None]:
    """(the last row that `function(*args, send)` sent, what ended its process early).

    Args:
        timeout: seconds of the processor; on a busy machine a process has `PATIENCE` times as many by the clock.
        memory: in bytes.
    """
    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=serve, args=(sender, timeout, memory, function, *args), daemon=True)
    process.start()
    sender.close()
    row, patience = {}, PATIENCE * timeout
    deadline = time.monotonic() + patience
    try:
        while receiver.poll(max(0, deadline - time.monotonic())):
            row = receiver.recv()
        return row, f"was not done after {patience:g} s"
    except EOFError:
        process.join()
        code = process.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        return row, f"its process was ended {how}" if code else None
    finally:
        process.kill()
        process.join()
        receiver.close()


def serve(sender: Connection, timeout: int, memory: int, function: Callable, *args) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the caller ends this process
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (timeout, timeout + 1))
    logging.getLogger("apotfx").setLevel(logging.ERROR)
    function(*args, sender.send)


# A server that has imported torch forks much faster than a new interpreter starts; forking this process is not safe.
METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
PROCESSES = multiprocessing.get_context(METHOD)


class Results:
    """The rows in `zoo.json`, and `zoo.md` made from them."""

    def __init__(self, directory: Path, facts: Mapping[str, object]):
        self.json, self.markdown = directory / "zoo.json", directory / "zoo.md"
        self.facts, self.rows = dict(facts), {}
        self.lock = threading.Lock()
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
        with self.lock:
            self._read()  # another run may have written rows of other networks
            self.rows[row["list"], row["name"]] = row
            self._write()

    def _write(self) -> None:
        known = [(each, name) for each in LISTS for name in LISTS[each].names()]
        rows = [self.rows[key] for key in known if key in self.rows]
        write_atomic(self.json, (json.dumps({"facts": self.facts, "rows": rows}, indent=1) + "\n").encode())
        write_atomic(
            self.markdown, report(self.facts, rows, {each: len(LISTS[each].names()) for each in LISTS}).encode()
        )


def commit() -> str:
    """Of the library that is imported; "unknown" outside of a repository, and with "-dirty" where it was edited."""
    command = ["git", "-C", str(Path(apotfx.__file__).parent)]
    try:
        found = [
            subprocess.run([*command, *arguments], capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (["log", "-1", "--format=%h", "--", "."], ["status", "--porcelain", "--", "."])
        ]
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return found[0] + "-dirty" * bool(found[1])


def run(args: argparse.Namespace) -> int:
    try:
        return 0 if carry_out(args) else 1
    except KeyboardInterrupt:
        raise KeyboardInterrupt("stopped; --resume goes on") from None


def carry_out(args: argparse.Namespace) -> bool:
    """Whether every chosen network that was run, now or before, is ok."""
    chosen, made_by = choose(args.list, args.only), commit()
    facts = {"bits": args.bits, "scheme": args.scheme, "torch": torch.__version__}
    results, start = Results(args.output, facts), time.monotonic()
    PROCESSES.set_forkserver_preload(["apotfx", *{LISTS[each].module for each, _ in chosen}])

    def is_done(key: tuple[str, str]) -> bool:
        row = results.rows.get(key)
        same = row is not None and row.get("commit") == made_by and "-" not in made_by and made_by != "unknown"
        return args.resume and same and (is_ok(row) or not args.retry_failed)

    def one(key: tuple[str, str]) -> None:
        begin = time.monotonic()
        if args.limit_seconds is not None and begin - start >= args.limit_seconds:
            late.append(key)
            return
        limits = {"timeout": args.timeout, "memory": args.memory * 2**30}
        row, ended = in_own_process(examine, *key, args.bits, args.scheme, **limits)
        row = {"list": key[0], "name": key[1], "step": "start", "problems": {}, "package": package(key[0])} | row
        row |= {"commit": made_by}
        if ended:
            row["problems"][row["step"]] = ended
            row["seconds"] = time.monotonic() - begin
        if not stopped.is_set():
            results.add(row)
            print(line(row), flush=True)

    late, stopped = [], threading.Event()
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        try:
            for future in [pool.submit(one, key) for key in chosen if not is_done(key)]:
                future.result()
        except BaseException:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            for process in multiprocessing.active_children():
                process.kill()
            raise
    if late:
        print(f"stopped after {args.limit_seconds} s; --resume goes on")
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
