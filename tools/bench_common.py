"""What the benchmarks share: networks, timing in turns, facts about the machine, tables and the JSON file."""

import argparse
import contextlib
import importlib
import importlib.metadata
import itertools
import json
import platform
import shlex
import warnings
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass

import torch
import torchvision
from arguments import usable_cores
from tabulate import tabulate
from torch import nn

from apotfx.engine import choose
from apotfx.files import write_atomic
from apotfx.models import build_model
from apotfx.training.run import processor_name

SEED = 0
MEMORY_FORMATS = {"channels-last": torch.channels_last, "contiguous": torch.contiguous_format}
PACKAGES = ("timm", "brevitas", "onnx", "onnxruntime")


class Skip(Exception):
    """What was asked for does not exist here; the message says why."""


def import_or_skip(name: str):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Skip(f"{name} cannot be imported ({error})") from None


@dataclass(frozen=True)
class Case:
    """What is trained, and on what.

    Attributes:
        network: a name from `NETWORKS`.
        batch: images per step.
        image_size: height and width of the images in pixels.
        memory_format: a name from `MEMORY_FORMATS`, for networks of convolutions.
        device: "cpu" or "cuda:N".
        threads: that torch uses on the CPU.
        width, depth: channels and convolutions of the network "stack"; others ignore them.
    """

    network: str
    batch: int
    image_size: int
    memory_format: str
    device: str
    threads: int
    width: int = 64
    depth: int = 8

    def __str__(self) -> str:
        channels = NETWORKS[self.network].channels
        size = f" of width {self.width} and depth {self.depth}" if self.network == "stack" else ""
        return (
            f"{self.network}{size}: batch {self.batch}, {channels}x{self.image_size}x{self.image_size}, {self.layout}"
        )

    @property
    def layout(self) -> str:
        return self.memory_format if NETWORKS[self.network].convolutional else "contiguous"

    def to_device(self, x: nn.Module | torch.Tensor) -> nn.Module | torch.Tensor:
        """A model, or images, on the device and in the memory format."""
        return x.to(self.device, memory_format=MEMORY_FORMATS[self.layout])

    def batch_on_device(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(random images [batch, channels, S, S], random labels [batch])."""
        network, generator = NETWORKS[self.network], torch.Generator().manual_seed(SEED)
        images = torch.randn(self.batch, network.channels, self.image_size, self.image_size, generator=generator)
        labels = torch.randint(network.num_classes, (self.batch,), generator=generator)
        return self.to_device(images), labels.to(self.device)


@dataclass(frozen=True)
class Network:
    """A float network and its usual input; `build` raises Skip where its package is missing."""

    build: Callable[[Case], nn.Module]
    channels: int
    image_size: int
    batch: int
    num_classes: int
    convolutional: bool = True


def build_stack(case: Case) -> nn.Module:
    """`depth` convolutions of `width` channels with batch norm and ReLU, all at the size of the image, and a classifier."""
    channels = [3] + [case.width] * case.depth
    blocks = [
        nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        for c_in, c_out in itertools.pairwise(channels)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(case.width, 10))


def build_mnist_resnet18(case: Case) -> nn.Module:
    return build_model("resnet18", in_channels=1, num_classes=10, image_size=case.image_size)[0]


def build_vit_tiny(case: Case) -> nn.Module:
    return import_or_skip("timm").create_model("vit_tiny_patch16_224", img_size=case.image_size)


NETWORKS = {
    "resnet18": Network(lambda case: torchvision.models.resnet18(), 3, 224, 16, 1000),
    "mobilenet_v2": Network(lambda case: torchvision.models.mobilenet_v2(), 3, 224, 16, 1000),
    "mnist-resnet18": Network(build_mnist_resnet18, 1, 28, 128, 10),
    "vit-tiny": Network(build_vit_tiny, 3, 224, 16, 1000, convolutional=False),
    "stack": Network(build_stack, 3, 32, 16, 10),
}


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    return tuple(torch.tensor(values, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist())


def time_in_turns(
    runs: dict[Hashable, Callable[[], float]], rounds: int, once: Collection = ()
) -> dict[Hashable, list[float]]:
    """The seconds of each run, round by round.

    Each round takes every run once, those `once` in the first round only, and begins with another one.
    """
    order, seconds = list(runs), {name: [] for name in runs}
    for i in range(rounds):
        first = i % len(order)
        for name in order[first:] + order[:first]:
            if not i or name not in once:
                seconds[name].append(runs[name]())
    return seconds


def ratio_quartiles(seconds: Sequence[float], base: Sequence[float]) -> tuple[float, float, float]:
    """Of the ratios of both in the same round."""
    return quartiles([mine / other for mine, other in zip(seconds, base)])


def describe_machine(device: str, threads: int | list[int]) -> dict:
    """What the figures depend on."""
    packages = {"torch": torch.__version__, "torchvision": torchvision.__version__}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            packages[name] = importlib.metadata.version(name)
    gpu = {"GPU": torch.cuda.get_device_name(device)} if device != "cpu" else {}
    return {
        "processor": processor_name(),
        "cores": usable_cores(),
        "threads": threads,
        **gpu,
        "system": platform.platform(),
        "Python": platform.python_version(),
        **packages,
        "fastest engine": str(choose("auto", device)),
    }


def markdown(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    alignment = ["left", *("right" for _ in headers[1:])]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=alignment) + "\n"


def spread(values: tuple[float, float, float], show: Callable[[float], str]) -> list[str]:
    """The cells of quartiles: the median, and the range between the others."""
    low, median, high = map(show, values)
    return [median, f"{low} to {high}"]


def milliseconds(seconds: float, decimals: int = 1) -> str:
    return f"{1000 * seconds:.{decimals}f}"


class Report:
    """What was measured, kept in a JSON file."""

    def __init__(self, args: argparse.Namespace, facts: dict, **parts: dict):
        self.path = args.json
        command = shlex.join(["python", "tools/bench.py", *args.argv])
        facts = {"command": command, "seed": SEED, **facts}
        self.parts = {"facts": facts, **parts}
        self.save()  # a path that cannot be written is told before hours of measuring
        print("\n".join(f"- {key}: {value}" for key, value in facts.items()) + "\n")

    def save(self) -> None:
        if self.path:
            write_atomic(self.path, (json.dumps(self.parts, indent=1) + "\n").encode())


def print_skipped(skipped: dict[str, str]) -> None:
    for name, reason in skipped.items():
        print(f"Skipped: {name}: {reason}\n")
