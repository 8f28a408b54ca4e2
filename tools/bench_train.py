"""What quantization-aware training costs, against the float step of the same run."""

import argparse
import contextlib
import ctypes
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from bench_common import (
    NETWORKS,
    SEED,
    Case,
    Report,
    Skip,
    describe_machine,
    import_or_skip,
    markdown,
    milliseconds,
    print_skipped,
    quartiles,
    ratio_quartiles,
    spread,
    time_in_turns,
)
from torch import nn

import apotfx
from apotfx.engine import choose, use_engine
from apotfx.errors import ApotfxError
from apotfx.training.distributed import pick_device
from apotfx.training.recording import CALLS_BEFORE, Recorded

MEMORY_STEPS, MEMORY_PROCESSES = 3, 3
CALIBRATION_IMAGES = 2  # clips do not change the time of a step
GROWTH = {"batch": (4, 8, 16, 32), "width": (16, 32, 64, 128), "depth": (2, 4, 8, 16), "bits": tuple(range(2, 9))}


@dataclass(frozen=True)
class Variant:
    """A way to train a network: a mode from `MODES`, with the levels where it quantizes."""

    mode: str
    bits: int | None = None
    scheme: str | None = None

    @classmethod
    def of(cls, mode: str, bits: int, scheme: str) -> "Variant":
        """With the levels that `mode` has: none in float, uniform ones in the other packages."""
        own = MODES[mode].scheme or scheme
        return cls(mode) if own == "float" else cls(mode, bits, own)

    @property
    def levels(self) -> str:
        return f"{self.bits}-bit {self.scheme}" if self.bits else "-"

    def __str__(self) -> str:
        return f"{self.mode} {self.levels}" if self.bits else self.mode

    @property
    def policy(self) -> apotfx.BitPolicy:
        return apotfx.BitPolicy.default(bits=self.bits, scheme=self.scheme)


FLOAT = Variant("float")


def as_it_is(model: nn.Module, case: Case, variant: Variant) -> nn.Module:
    return model


def quantized(model: nn.Module, case: Case, variant: Variant, *, engine: str) -> nn.Module:
    """apotfx, calibrated, computed by `engine`; skipped where another one would take its place."""
    try:
        qmodel = apotfx.quantize(model, variant.policy)
    except ApotfxError as error:
        raise Skip(str(error)) from None
    if case.device != "cpu" and engine == "int8":
        raise Skip(f"its arithmetic runs on the CPU, not on {case.device}")
    choice = use_engine(qmodel, engine)
    if engine not in ("auto", choice.engine.name):
        raise Skip(f"only {choice} works here")
    images, _ = case.batch_on_device()
    apotfx.calibrate(case.to_device(qmodel), [images[:CALIBRATION_IMAGES]])
    return qmodel


def with_brevitas(model: nn.Module, case: Case, variant: Variant) -> nn.Module:
    """Brevitas: the same bits and signs in the same layers, scales that are learned."""
    qnn, quant = import_or_skip("brevitas.nn"), import_or_skip("brevitas.quant.scaled_int")
    for planned in apotfx.plan(model, variant.policy).layers:
        if not planned.quantized:
            continue
        layer, name = model.get_submodule(planned.facts.name), f"Quant{planned.facts.type}"
        keys = ("in_features", "out_features") if isinstance(layer, nn.Linear) else (
            "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
        )  # fmt: skip
        if planned.input.signed:
            inputs = {"input_quant": quant.Int8ActPerTensorFloatMinMaxInit, "input_min_val": -3.0}
        else:
            inputs = {"input_quant": quant.Uint8ActPerTensorFloatMaxInit}
        replacement = getattr(qnn, name)(
            **{key: getattr(layer, key) for key in keys},
            bias=layer.bias is not None,
            weight_quant=quant.Int8WeightPerTensorFloat,
            weight_scaling_impl_type="parameter_from_stats",
            weight_bit_width=planned.weight.bits,
            input_bit_width=planned.input.bits,
            input_max_val=3.0,
            **inputs,
        )
        model.set_submodule(planned.facts.name, replacement)
    return model


def with_torch_ao(model: nn.Module, case: Case, variant: Variant) -> nn.Module:
    """torch.ao in FX mode: the same bits in the same layers, and in their outputs; scales from observed extremes."""
    ao, fx = import_or_skip("torch.ao.quantization"), import_or_skip("torch.ao.quantization.quantize_fx")
    if not hasattr(fx, "prepare_qat_fx"):
        raise Skip(f"torch {torch.__version__} has no torch.ao.quantization.quantize_fx.prepare_qat_fx")

    def fake_quantize(low: int, high: int, dtype: torch.dtype, qscheme: torch.qscheme):
        return ao.FusedMovingAvgObsFakeQuantize.with_args(
            observer=ao.MovingAverageMinMaxObserver, quant_min=low, quant_max=high, dtype=dtype, qscheme=qscheme
        )

    mapping = ao.QConfigMapping()
    for planned in apotfx.plan(model, variant.policy).layers:
        if planned.quantized:
            half = 2 ** (planned.weight.bits - 1)
            weight = fake_quantize(-half, half - 1, torch.qint8, torch.per_tensor_symmetric)
            activation = fake_quantize(0, 2**planned.input.bits - 1, torch.quint8, torch.per_tensor_affine)
            mapping.set_module_name(planned.facts.name, ao.QConfig(activation=activation, weight=weight))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is deprecated
        return fx.prepare_qat_fx(model, mapping, (case.batch_on_device()[0].cpu(),))


@dataclass(frozen=True)
class Mode:
    """How a variant's model is made of the float one, and how it runs.

    Attributes:
        make: called with the float model, the case and the variant; raises Skip where it cannot.
        scheme: of its levels, "float" for none; None for any.
        amp: under autocast to bfloat16.
        compile: as a whole through torch.compile.
    """

    make: Callable[[nn.Module, Case, Variant], nn.Module]
    scheme: str | None = None
    amp: bool = False
    compile: bool = False


MODES = {
    "float": Mode(as_it_is, "float"),
    "float-amp": Mode(as_it_is, "float", amp=True),
    "float-compile": Mode(as_it_is, "float", compile=True),
    "eager": Mode(functools.partial(quantized, engine="eager")),
    "compiled": Mode(functools.partial(quantized, engine="compiled")),
    "int8": Mode(functools.partial(quantized, engine="int8")),
    "amp": Mode(functools.partial(quantized, engine="auto"), amp=True),
    "compile": Mode(functools.partial(quantized, engine="eager"), compile=True),
    "brevitas": Mode(with_brevitas, "uniform"),
    "torch.ao": Mode(with_torch_ao, "uniform"),
}


class Step:
    """A variant's training step; calling it takes one and returns the seconds."""

    least_warmup = 0  # calls before its steps take the time that they take from then on

    def __init__(self, case: Case, variant: Variant):
        mode = MODES[variant.mode]
        torch.manual_seed(SEED)
        model = mode.make(NETWORKS[case.network].build(case).train(), case, variant)
        self.num_parameters = sum(p.numel() for p in model.parameters())
        self.engine = next((m.engine.name for m in model.modules() if hasattr(m, "engine")), None)
        model = case.to_device(model)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        self.model = torch.compile(model) if mode.compile else model
        self.batch = case.batch_on_device()
        self.device, self.amp, self.loss = torch.device(case.device), mode.amp, None
        self.update = self._update
        if self.device.type == "cuda" and not mode.compile:  # as in training
            self.update, self.least_warmup = Recorded(self._update), CALLS_BEFORE + 1

    def __call__(self) -> float:
        self._synchronize()
        start = time.perf_counter()
        self.loss = self.update(*self.batch)
        self._synchronize()
        return time.perf_counter() - start

    def _update(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, torch.bfloat16) if self.amp else contextlib.nullcontext():
            loss = nn.functional.cross_entropy(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure_time(case: Case, variants: Sequence[Variant], rounds: int, warmup: int) -> tuple[dict, dict[str, str]]:
    """(per variant its seconds, their quartiles and those of its ratio to float in the same round; reasons of skips).

    Raises:
        Skip: the network does not exist here.
        ApotfxError: a loss became infinite or NaN, whose arithmetic takes another time.
    """
    steps, skipped = {}, {}
    for variant in variants:
        try:
            steps[variant] = Step(case, variant)
        except Skip as skip:
            if variant == FLOAT:
                raise
            skipped[str(variant)] = str(skip)
    for step in steps.values():
        for _ in range(max(warmup, step.least_warmup)):
            step()
    seconds, results = time_in_turns(steps, rounds), {}
    for variant, step in steps.items():
        if not math.isfinite(step.loss):
            raise ApotfxError(f"{case.network} {variant}: the loss became {step.loss.item()}; use another batch")
        results[variant] = asdict(variant) | {
            "engine": step.engine,
            "parameters": step.num_parameters,
            "seconds": seconds[variant],
            "seconds_quartiles": quartiles(seconds[variant]),
            "ratio_quartiles": ratio_quartiles(seconds[variant], seconds[FLOAT]),
        }
    return results, skipped


def measure_memory(case: Case, variant: Variant) -> dict:
    """Bytes: resident in this process before the first step, the peak of the first steps, and the increase."""
    # Libraries allocate what they keep at their first use, which calibration would hide from the steps.
    Step(replace(case, batch=min(2, case.batch)), FLOAT)()
    step, device = Step(case, variant), torch.device(case.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)  # give back what building freed
            Path("/proc/self/clear_refs").write_text("5")  # forget the peak of building
        before = process_memory()[0]
    for _ in range(max(MEMORY_STEPS, step.least_warmup)):
        step()
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else process_memory()[1]
    return {"before": before, "peak": peak, "increase": peak - before}


def process_memory() -> tuple[int, int]:
    """(resident bytes of this process, their peak).

    On Linux not from getrusage, whose peak a process inherits from the one that started it.
    """
    with contextlib.suppress(OSError, KeyError):
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return tuple(1024 * int(status[key].split()[0]) for key in ("VmRSS", "VmHWM"))
    import resource  # does not exist on Windows

    resident = subprocess.check_output(["ps", "-o", "rss=", "-p", str(os.getpid())])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return 1024 * int(resident), peak * (1 if sys.platform == "darwin" else 1024)


def measure_first_step(case: Case, variant: Variant) -> dict:
    """Seconds to build the model, which compiles the kernels, and of the first step."""
    start = time.perf_counter()
    step = Step(case, variant)
    return {"prepare": time.perf_counter() - start, "step": step()}


FRESH = {"memory": measure_memory, "first_step": measure_first_step}


def in_fresh_process(what: str, case: Case, variant: Variant, **environment: str) -> dict:
    """What `FRESH[what]` measures in a new process."""
    job = json.dumps({"what": what, "case": asdict(case), "variant": asdict(variant)})
    command = [sys.executable, Path(__file__).with_name("bench.py"), "fresh", job]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=os.environ | environment)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ApotfxError(f"{case.network} {variant}: its process for {what.replace('_', ' ')} failed ({reason})")
    return json.loads(done.stdout.splitlines()[-1])


def run_fresh(args: argparse.Namespace) -> None:
    """What `in_fresh_process` starts."""
    try:
        job = json.loads(args.job)
        what, case, variant = FRESH[job["what"]], Case(**job["case"]), Variant(**job["variant"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ApotfxError("fresh: expected the job that bench.py train makes; call that") from None
    torch.set_num_threads(case.threads)
    print(json.dumps(what(case, variant)))


def memory_of(case: Case, variant: Variant) -> dict:
    """`measure_memory` in the fresh process with the median increase of several, and all increases, ascending."""
    runs = [in_fresh_process("memory", case, variant) for _ in range(MEMORY_PROCESSES)]
    runs.sort(key=lambda run: run["increase"])
    return runs[len(runs) // 2] | {"increases": [run["increase"] for run in runs]}


def first_steps(case: Case, variant: Variant) -> dict:
    """`measure_first_step` with an empty cache of compiled code, then with the one that this left."""
    with tempfile.TemporaryDirectory() as cache:
        measure = functools.partial(
            in_fresh_process, "first_step", case, variant, APOTFX_CACHE=cache, TORCHINDUCTOR_CACHE_DIR=cache
        )
        return {"empty_cache": measure(), "filled_cache": measure()}


def print_results(results: Sequence[dict], headers: Sequence[str], cells: Callable[[dict], Sequence[str]]) -> None:
    rows = [[r["mode"], Variant(r["mode"], r["bits"], r["scheme"]).levels, *cells(r)] for r in results]
    print(markdown(["variant", "levels", *headers], rows))


def mebibytes(size: float) -> str:
    return f"{size / 2**20:.1f}"


def times_float(value: float, base: float) -> str:
    return f"{value / base:.2f}" if base > 0 else "-"


def time_cells(result: dict) -> list[str]:
    times, ratios = result["seconds_quartiles"], result["ratio_quartiles"]
    return [*spread(times, milliseconds), *spread(ratios, "{:.2f}".format)]


def memory_cells(result: dict, base: dict) -> list[str]:
    memory, base = result["memory"], base["memory"]
    peak, increase = ([mebibytes(memory[key]), times_float(memory[key], base[key])] for key in ("peak", "increase"))
    lowest, highest = mebibytes(min(memory["increases"])), mebibytes(max(memory["increases"]))
    return [f"{result['parameters']:,}", *peak, increase[0], f"{lowest} to {highest}", increase[1]]


def first_step_cells(result: dict) -> list[str]:
    caches = (result["first_step"][key] for key in ("empty_cache", "filled_cache"))
    return [f"{seconds:.2f}" for cache in caches for seconds in (cache["prepare"], cache["step"])]


def bench_network(case: Case, variants: Sequence[Variant], args: argparse.Namespace) -> dict:
    """Measure and print what `args` ask for on one network; its part of the JSON file."""
    print(f"## {case}\n")
    try:
        results, skipped = measure_time(case, variants, args.rounds, args.warmup)
    except Skip as skip:
        results, skipped = {}, {case.network: str(skip)}
    rows = list(results.values())
    if rows:
        print_results(rows, ["step, ms", "quartiles", "x float", "quartiles"], time_cells)
    print_skipped(skipped)
    if rows and args.memory:
        for variant, result in results.items():
            result["memory"] = memory_of(case, variant)
        headers = ["parameters", "peak, MiB", "x float", "of it by steps, MiB", "range", "x float"]
        print_results(rows, headers, functools.partial(memory_cells, base=rows[0]))
    if rows and args.first_step:
        for variant, result in results.items():
            result["first_step"] = first_steps(case, variant)
        headers = ["prepare, empty cache, s", "first step, s", "prepare, filled cache, s", "first step, s"]
        print_results(rows, headers, first_step_cells)
    return asdict(case) | {"variants": rows, "skipped": skipped}


def bench_growth(axis: str, case: Case, variant: Variant, args: argparse.Namespace) -> list[dict]:
    """A row per value of `axis`: time and memory of float and of `variant`."""
    report, table = [], []
    for value in GROWTH[axis]:
        here = case if axis == "bits" else replace(case, **{axis: value})
        mine = replace(variant, bits=value) if axis == "bits" else variant
        results, skipped = measure_time(here, [FLOAT, mine], args.rounds, args.warmup)
        report.append({axis: value, "variants": list(results.values()), "skipped": skipped})
        if skipped:
            print(f"Skipped: {axis} {value}: {skipped[str(mine)]}\n")
            continue
        for each, result in results.items():
            result["memory"] = memory_of(here, each)
        base, result = results.values()
        times = [milliseconds(r["seconds_quartiles"][1]) for r in (base, result)]
        sizes = [r["memory"]["increase"] for r in (base, result)]
        ratio = f"{result['ratio_quartiles'][1]:.2f}"
        table.append([value, *times, ratio, *map(mebibytes, sizes), times_float(sizes[1], sizes[0])])
    name = variant.mode
    headers = [axis, "float, ms", f"{name}, ms", "x float", "float steps, MiB", f"{name} steps, MiB", "x float"]
    print(f"## Growth with {axis}\n\n{case}, {variant}, but for {axis}\n\n{markdown(headers, table)}")
    return report


def own_engine(args: argparse.Namespace) -> str:
    """The one that quantized layers choose themselves on the device."""
    return choose("auto", args.device).engine.name


def chosen_variants(args: argparse.Namespace) -> list[Variant]:
    """Float first, then every mode with every combination of levels that it has."""
    several = len(args.bits) * len(args.scheme) > 1
    every = [name for name, mode in MODES.items() if not mode.compile]
    modes = args.variants or ([own_engine(args)] if several else every)
    variants = (Variant.of(mode, bits, scheme) for scheme in args.scheme for bits in args.bits for mode in modes)
    return list(dict.fromkeys([FLOAT, *variants]))


def make_case(name: str, args: argparse.Namespace) -> Case:
    network = NETWORKS[name]
    batch, image_size = args.batch or network.batch, args.image_size or network.image_size
    return Case(name, batch, image_size, args.memory_format, args.device, args.threads)


def run_train(args: argparse.Namespace) -> None:
    args.device = str(pick_device(args.device, None))
    torch.set_num_threads(args.threads)
    facts = {
        "rounds": f"{args.rounds} after {args.warmup} steps of warm-up; median and quartiles",
        **describe_machine(args.device, args.threads),
    }
    report = Report(args, facts, networks={}, growth={})
    for name in args.network:
        report.parts["networks"][name] = bench_network(make_case(name, args), chosen_variants(args), args)
        report.save()
    for axis in GROWTH if args.growth else ():
        variant = Variant(own_engine(args), args.bits[0], args.scheme[0])
        report.parts["growth"][axis] = bench_growth(axis, make_case("stack", args), variant, args)
        report.save()
