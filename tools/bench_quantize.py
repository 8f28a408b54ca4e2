"""How long `apotfx.quantize` takes, without calibration, and how that grows with the number of layers."""

import argparse
import gc
import time

import torch
import torchvision
from bench_common import (
    SEED,
    Case,
    Report,
    build_stack,
    describe_machine,
    markdown,
    quartiles,
)
from torch import nn

import apotfx
from apotfx.graph.network import record_of

NETWORK = "resnet152"
WIDTH = 16
LAYERS = [50, 100, 200, 500, 1000, 2000]


def build_chain(layers: int) -> nn.Module:
    """`layers` layers: convolutions with batch norm and ReLU, and a classifier."""
    return build_stack(Case("stack", 1, 32, "contiguous", "cpu", 1, width=WIDTH, depth=layers - 1))


def measure(model: nn.Module, policy: apotfx.BitPolicy, rounds: int) -> dict:
    """Layers, and the seconds of `quantize` in each round after one that is not counted."""
    seconds, cpu_seconds = [], []
    for _ in range(rounds + 1):
        gc.collect()  # what earlier rounds left is not this one's cost
        start, cpu_start = time.perf_counter(), time.process_time()
        qmodel = apotfx.quantize(model, policy)
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - cpu_start)
    layers = sum(planned.quantized for planned in record_of(qmodel)["plan"].layers)
    times = quartiles(seconds[1:])
    return {
        "layers": layers,
        "seconds": seconds[1:],
        "seconds_quartiles": times,
        "microseconds_per_layer": 1e6 * times[1] / layers,
        "cpu_seconds": cpu_seconds[1:],
        "cpu_seconds_quartiles": quartiles(cpu_seconds[1:]),
    }


def run_quantize(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(SEED)
    policy = apotfx.BitPolicy.default(args.bits, args.scheme)
    facts = {
        "rounds": f"{args.rounds} after one of warm-up; median and quartiles",
        "levels": f"{args.bits} bits, {args.scheme}",
        **describe_machine("cpu", args.threads),
    }
    report = Report(args, facts, networks={})
    builders = {NETWORK: lambda: torchvision.models.get_model(NETWORK)}
    builders |= {f"chain of {count}": lambda count=count: build_chain(count) for count in args.layers}
    rows = []
    for name, build in builders.items():
        found = report.parts["networks"][name] = measure(build(), policy, args.rounds)
        report.save()
        low, median, high = (f"{value:.3f}" for value in found["seconds_quartiles"])
        cells = [f"{found['microseconds_per_layer']:.0f}", f"{found['cpu_seconds_quartiles'][1]:.3f}"]
        rows.append([name, found["layers"], median, f"{low} to {high}", *cells])
    print(
        f"## quantize\n\nA chain is of convolutions of {WIDTH} channels, each with batch norm and ReLU, and a linear "
        "layer. Where CPU time is shorter, other programs ran beside.\n"
    )
    print(markdown(["network", "layers", "seconds", "quartiles", "microseconds per layer", "seconds of CPU"], rows))
