"""Data sets as uint8 tensors, and the batches that training and evaluation read from them."""

import contextlib
import io
import os
import socket
import stat
import sys
import textwrap
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms import functional as TF

from apotfx.errors import ApotfxError
from apotfx.training.augment import Augment, draw, to_device, transform
from apotfx.training.randomness import seed_of
from apotfx.training.recording import Recorded

DATASETS = ("mnist", "fashion-mnist", "cifar10", "folder", "digits")
DOWNLOAD_FOLDER = Path("data")
DOWNLOAD_TIMEOUT = 15.0  # seconds without an answer
MNIST_MEAN, MNIST_STD = (0.131,), (0.308,)  # as published
MAX_FOLDER_IMAGE_SIZE = 224
MAX_ASPECT_RATIO = 100  # images are resized by their shorter side
# Of images, whatever their names say. Pillow hands others to other programs, such as EPS to Ghostscript.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_FILE_BYTES = 2**30  # of MNIST and such
# The held-out images, and those to learn from, must not change with a run's seed, or runs could not be compared.
VALIDATION_SEED = 0
TRAIN_IMAGES_SEED = 0
MAX_VALIDATION_IMAGES = 5000

_IDX_FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
_CIFAR_FILES = (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch", "batches.meta")
_SOURCES = {
    "mnist": (datasets.MNIST, "MNIST/raw", _IDX_FILES),
    "fashion-mnist": (datasets.FashionMNIST, "FashionMNIST/raw", _IDX_FILES),
    "cifar10": (datasets.CIFAR10, "cifar-10-batches-py", _CIFAR_FILES),
}


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, S, S] and their labels int64 [N]."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class Dataset:
    """A classification data set, decoded once.

    Attributes:
        name: What the images are, one of `DATASETS`: results carry it.
        train: Images to train on, without the validation images.
        val: Images held out of the training split, to choose by.
        test: Images to report.
        num_classes: Labels are 0 to num_classes - 1.
        mean: Per channel, of images / 255.
        std: Per channel, of images / 255, > 0.
    """

    name: str
    train: Split
    val: Split
    test: Split
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @property
    def in_channels(self) -> int:
        return self.train.images.shape[1]

    @property
    def image_size(self) -> int:
        """Height and width of the images in pixels."""
        return self.train.images.shape[-1]

    def with_train_images(self, count: int | None) -> "Dataset":
        """The data set with `count` of its training images, always the same ones; None for all.

        Raises:
            ApotfxError: it has fewer.
        """
        if count is None:
            return self
        if count > len(self.train):
            raise ApotfxError(f"--train-images {count}: {self.name} has {len(self.train)}; pass at most that many")
        order = torch.randperm(len(self.train), generator=torch.Generator().manual_seed(TRAIN_IMAGES_SEED))
        return replace(self, train=_subset(self.train, order[:count]))

    @property
    def all_train(self) -> Split:
        """Training and validation images: the published MNIST table is accuracy on all of them."""
        return Split(torch.cat([self.train.images, self.val.images]), torch.cat([self.train.labels, self.val.labels]))


class _NotFoundError(ApotfxError):
    """The data set is neither on disk nor to be had from the network."""


def load_dataset(name: str | None, root: Path | None, *, image_size: int | None = None, workers: int = 0) -> Dataset:
    """Load a data set into memory.

    Validation takes min(5000, n // 10) of the n training images, always the same ones; a folder that has
    `train`, `val` and `test` keeps its own.

    Args:
        name: One of `DATASETS`. None is mnist, or else scikit-learn's digits with a warning where mnist is
            neither on disk nor to be downloaded and no directory was named.
        root: Directory of the data; None is the environment's APOTFX_DATA, or else `data` in the current
            directory, where missing data is downloaded. Nothing is downloaded to a directory that was named.
        image_size: Height and width of the images in pixels; None keeps the data's own, for a folder the
            shorter side of its first image, at most 224.
        workers: Processes that decode a folder's images, 0 for none.

    Raises:
        ApotfxError: The data is unknown, missing, damaged or too large for the memory.
    """
    if name is not None and name not in DATASETS:
        raise ApotfxError(f"unknown data set {name!r}: expected one of {', '.join(DATASETS)}")
    if image_size is not None and image_size < 1:
        raise ApotfxError(f"--image-size {image_size}: expected 1 pixel or more")
    if root is None and os.environ.get("APOTFX_DATA"):
        root = Path(os.environ["APOTFX_DATA"])
    if name == "folder":
        return _load_folder(root, image_size, workers)
    if name == "digits":
        return _load_digits(image_size)
    try:
        return _load_torchvision(name or "mnist", root, image_size)
    except _NotFoundError as error:
        if name is not None or root is not None:
            raise
        _warn_of_digits(error)
        return _load_digits(image_size)


def _warn_of_digits(error: Exception) -> None:
    line = "*" * 100
    print(
        line,
        f"WARNING: {error}",
        "WARNING: using scikit-learn's 8x8 digits (1,797 images) in place of MNIST.",
        "WARNING: the results are marked 'digits' and cannot be compared with results on MNIST.",
        line,
        sep="\n",
        file=sys.stderr,
    )


def _load_torchvision(name: str, root: Path | None, image_size: int | None) -> Dataset:
    directory = _find(name, root)
    train, test = (_read(name, directory, train=train) for train in (True, False))
    size = image_size or train.images.shape[-1]
    return _dataset(name, _resized(train, size), None, _resized(test, size), num_classes=10)


def _find(name: str, root: Path | None) -> Path:
    source, folder, files = _SOURCES[name]
    directory = DOWNLOAD_FOLDER if root is None else Path(root)
    missing = [file for file in files if not (directory / folder / file).is_file()]
    if not missing:
        for path in (directory / folder / file for file in files):
            if path.stat().st_size > MAX_FILE_BYTES:
                raise ApotfxError(f"{path}: has {path.stat().st_size} bytes; put the original file there")
        return directory
    reason = f"found no {directory / folder / missing[0]}"
    if root is None:
        try:
            _download(name, source, directory)
            return directory
        except Exception as error:  # whatever the network, the disk or torchvision has to say
            reason += f" and could not download it ({_one_line(error)})"
    raise _NotFoundError(
        f"{name}: {reason}; put the unpacked files {', '.join(files)} into "
        f"{directory / folder}, name another directory with --data DIR or APOTFX_DATA, "
        "or use --dataset digits"
    )


def _download(name: str, source: type, directory: Path) -> None:
    print(f"Downloading {name} to {directory} ...", file=sys.stderr)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            source(directory, download=True)
    finally:
        socket.setdefaulttimeout(timeout)


def _read(name: str, directory: Path, *, train: bool) -> Split:
    source, folder, _ = _SOURCES[name]
    where = f"{directory / folder}: the {'training' if train else 'test'} split of {name}"
    fix = "delete the folder and put the original files there"
    try:
        data = source(directory, train=train)
    except Exception as error:  # torchvision checks its files with whatever exception comes
        raise ApotfxError(f"{where} is damaged ({_one_line(error)}); {fix}") from None
    images, labels = torch.as_tensor(data.data), torch.as_tensor(data.targets)
    images = images.movedim(-1, 1) if images.ndim == 4 else images[:, None]
    if len(images) != len(labels) or not len(images):
        raise ApotfxError(f"{where} has {len(images)} images and {len(labels)} labels, expected one each; {fix}")
    if images.shape[2] != images.shape[3]:
        raise ApotfxError(f"{where} has images of {tuple(images.shape[2:])} pixels, expected squares; {fix}")
    if labels.min() < 0 or labels.max() > 9:
        raise ApotfxError(f"{where} has labels {labels.min()} to {labels.max()}, expected 0 to 9; {fix}")
    return Split(images.contiguous(), labels)


def _load_digits(image_size: int | None) -> Dataset:
    # scikit-learn takes a second to import.
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = torch.from_numpy(data.images * (255 / 16)).round().to(torch.uint8)[:, None]
    whole = _resized(Split(images, torch.from_numpy(data.target).long()), image_size or 28)
    train, test = train_test_split(range(len(whole)), test_size=0.2, random_state=0, stratify=data.target)
    return _dataset("digits", _subset(whole, train), None, _subset(whole, test), num_classes=10)


def _load_folder(root: Path | None, image_size: int | None, workers: int) -> Dataset:
    layout = "expected DIR/train/CLASS/IMAGE and DIR/test or DIR/val alike"
    if root is None:
        raise ApotfxError(f"folder: no directory was named; give --data DIR or APOTFX_DATA, {layout}")
    paths = {name: Path(root) / name for name in ("train", "val", "test")}
    folders = {name: _open_folder(path) for name, path in paths.items() if path.is_dir()}
    if "train" not in folders or len(folders) < 2:
        found = ", ".join(folders) or "none"
        raise ApotfxError(f"{root}: found {found} of the folders train, val and test; {layout}")
    classes = folders["train"].classes
    for name, folder in folders.items():
        odd = sorted(set(classes) ^ set(folder.classes))
        if odd:
            raise ApotfxError(
                f"{paths[name]} and {paths['train']} differ in the class {odd[0]!r}; "
                "expected the same class folders in both"
            )
    size = image_size or min(*_open_rgb(folders["train"].samples[0][0]).size, MAX_FOLDER_IMAGE_SIZE)
    _check_memory(sum(map(len, folders.values())), 3, size)
    splits = {name: _decode(folder, size, workers) for name, folder in folders.items()}
    test = splits.pop("test" if "test" in splits else "val")
    return _dataset("folder", splits["train"], splits.get("val"), test, num_classes=len(classes))


def _open_folder(path: Path) -> datasets.ImageFolder:
    try:
        return datasets.ImageFolder(path)
    except FileNotFoundError as error:
        raise ApotfxError(f"{path}: {_one_line(error)} Put images into it or delete it") from None


def _open_rgb(path: str) -> Image.Image:
    """The image in a file as 8-bit RGB, upright as its EXIF data say; of several frames the first.

    Transparent pixels show white behind them. Of 16 bits the upper 8 are kept. Floats are taken from 0 to 1. Colour
    profiles are ignored.
    """
    try:
        with _open_file(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow's, of odd files that it reads all the same
            with Image.open(file, formats=FORMATS) as image:
                width, height = image.size
                if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
                    raise ValueError(f"{width}x{height} pixels; expected sides at most {MAX_ASPECT_RATIO}:1")
                return _to_rgb(ImageOps.exif_transpose(image), image.format)
    except Exception as error:  # Pillow's decoders raise anything
        raise ApotfxError(f"{path} cannot be decoded ({_one_line(error)}); replace or delete it") from None


def _open_file(path: str) -> BinaryIO:
    """Raises: OSError, ValueError: it cannot be read, or is a pipe or a device, which would be waited for."""
    file = open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)), "rb")
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a file")
    return file


def _to_rgb(image: Image.Image, format: str | None) -> Image.Image:
    """Raises: ValueError: pixels of which it is unknown how bright they are."""
    if image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM")):  # PNG: of Pillow before 11
        values = np.asarray(image).astype(np.int64)
        grey = np.where(values == image.info.get("transparency"), 255, values >> 8)
        image = Image.fromarray(grey.astype(np.uint8))
    elif image.mode == "I":
        raise ValueError("integers of 32 bits; expected 8 or 16")
    elif image.mode == "F":
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 1):  # also with NaN
            raise ValueError(f"floats from {values.min():g} to {values.max():g}; expected 0 to 1")
        image = Image.fromarray((values * 255).round().astype(np.uint8))
    if {"A", "a"}.intersection(image.getbands()) or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _decode(folder: datasets.ImageFolder, size: int, workers: int) -> Split:
    folder.loader = partial(_load_square, size=size)
    # Its own generator: the loader would draw from the global one.
    generator = torch.Generator()
    loader = DataLoader(folder, batch_size=64, num_workers=workers, collate_fn=_stack, generator=generator)
    images = torch.empty(len(folder), 3, size, size, dtype=torch.uint8)
    for target, batch in zip(images.split(64), loader):
        if isinstance(batch, str):
            raise ApotfxError(batch)
        target.copy_(batch)
    return Split(images, torch.tensor(folder.targets))


def _load_square(path: str, size: int) -> Tensor | str:
    """uint8 [3, size, size], or what is wrong: a worker's exception would arrive as its whole traceback."""
    try:
        image = _open_rgb(path)
    except ApotfxError as error:
        return str(error)
    return TF.pil_to_tensor(TF.center_crop(TF.resize(image, size), size))


def _stack(samples: list[tuple[Tensor | str, int]]) -> Tensor | str:
    images = [image for image, _ in samples]
    errors = [image for image in images if isinstance(image, str)]
    return errors[0] if errors else torch.stack(images)


def _dataset(name: str, train: Split, val: Split | None, test: Split, num_classes: int) -> Dataset:
    if val is None:
        train, val = _hold_out(name, train)
    mean, std = (MNIST_MEAN, MNIST_STD) if name == "mnist" else _channel_statistics(train.images)
    return Dataset(name, train, val, test, num_classes, mean, std)


def _hold_out(name: str, split: Split) -> tuple[Split, Split]:
    num_val = min(MAX_VALIDATION_IMAGES, len(split) // 10)
    if not num_val:
        raise ApotfxError(
            f"{name}: {len(split)} training images, expected at least 10, to hold some out for validation; add images"
        )
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(VALIDATION_SEED))
    return _subset(split, order[num_val:]), _subset(split, order[:num_val])


def _subset(split: Split, indices) -> Split:
    """The images at `indices`, in the order of `split`."""
    indices = torch.as_tensor(indices).sort().values
    return Split(split.images[indices], split.labels[indices])


def _channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of images / 255 per channel, from the histogram of the 256 values."""
    values = torch.arange(256, dtype=torch.float64) / 255
    mean, std = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean.append((share * values).sum().item())
        variance = (share * (values - mean[-1]).square()).sum().item()
        std.append(max(variance**0.5, 1 / 255))  # a channel may be constant
    return tuple(mean), tuple(std)


def _resized(split: Split, size: int) -> Split:
    count, channels, old_size, _ = split.images.shape
    if size == old_size:
        return split
    _check_memory(count, channels, size)
    images = torch.empty(count, channels, size, size, dtype=torch.uint8)
    at_once = max(1, 2**26 // (channels * size * size))  # as floats
    for target, batch in zip(images.split(at_once), split.images.split(at_once)):
        target.copy_(_resize(batch.float(), size).round())
    return Split(images, split.labels)


def _resize(images: Tensor, size: int) -> Tensor:
    if images.shape[-1] == size:
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def _check_memory(count: int, channels: int, size: int) -> None:
    # Memory that is free at this moment would leave out what the page cache gives back.
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    needed = count * channels * size * size
    if needed > memory / 2:
        raise ApotfxError(
            f"{count} images of {channels}x{size}x{size} take {needed / 2**30:.1f} GiB, "
            f"expected at most half the memory, {memory / 2**31:.1f} GiB; lower --image-size"
        )


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, 200)


class TrainBatches:
    """Shuffled, augmented, normalized batches; each is a pure function of the seed, the epoch and the step.

    A resumed run therefore sees the very batches it would have seen, and N ranks see together exactly the
    batch that one process would.

    Args:
        split: Images to draw from, without replacement within an epoch.
        batch_size: Images per step, over all ranks.
        seed: Any integer.
        augment: Ranges of the random transforms.
        mean: Per channel, of images / 255.
        std: Per channel, of images / 255, > 0.
        image_size: Height and width of the batches in pixels.
        device: Where images are kept and batches are made.
        rank: Index of this process, 0 <= rank < world_size.
        world_size: Number of processes.
        record: Replay the making of a batch from a CUDA graph. Images are then overwritten by the next batch's.

    Raises:
        ApotfxError: `batch_size` exceeds the number of images or does not divide among the processes.
    """

    def __init__(
        self,
        split: Split,
        *,
        batch_size: int,
        seed: int,
        augment: Augment,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        image_size: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        record: bool = False,
    ):
        if not 1 <= batch_size <= len(split):
            raise ApotfxError(f"--batch-size {batch_size}: expected 1 to {len(split)}, the number of images")
        if batch_size % world_size:
            raise ApotfxError(f"--batch-size {batch_size}: expected a multiple of the {world_size} processes")
        self.images, self.labels = split.images.to(device), split.labels.to(device)
        self.batch_size, self.seed, self.augment, self.image_size = batch_size, seed, augment, image_size
        self.mean, self.std = _per_channel(mean, device), _per_channel(std, device)
        self.rank, self.world_size = rank, world_size
        self._make_images = Recorded(self._images) if record else self._images

    def __len__(self) -> int:
        """Steps per epoch; the last partial batch is dropped."""
        return len(self.labels) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield this rank's share of each batch from step `start` on.

        Yields:
            images float32 [batch_size / world_size, C, image_size, image_size], normalized, and their labels
            int64 [batch_size / world_size].
        """
        order = torch.randperm(len(self.labels), generator=_generator(self.seed, epoch))
        order = order.to(self.images.device)
        share = self.batch_size // self.world_size
        for step in range(start, len(self)):
            first = step * self.batch_size + self.rank * share
            indices = order[first : first + share]
            generator = _generator(self.seed, epoch, step)
            numbers = draw(self.augment, share, generator, rank=self.rank, world_size=self.world_size)
            images = self._make_images(indices, *(to_device(x, self.images.device) for x in numbers))
            yield images, self.labels[indices]

    def _images(self, indices: Tensor, *numbers: Tensor) -> Tensor:
        images = transform(_to_float(self.images[indices]), self.augment, numbers)
        return _normalize(_resize(images, self.image_size), self.mean, self.std)


def eval_batches(
    split: Split,
    *,
    batch_size: int,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    image_size: int,
    device: torch.device | str,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield a rank's share of `split` in order, every image once; the arguments are those of `TrainBatches`.

    Yields:
        images float32 [B, C, image_size, image_size], normalized, and labels int64 [B], with B = `batch_size`
        on each rank, or less in its last batch.
    """
    mean, std = _per_channel(mean, device), _per_channel(std, device)
    first, last = (len(split) * r // world_size for r in (rank, rank + 1))
    for start in range(first, last, batch_size):
        part = slice(start, min(start + batch_size, last))
        images = _to_float(split.images[part].to(device))
        yield _normalize(_resize(images, image_size), mean, std), split.labels[part].to(device)


def _generator(*key: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed_of(*key))


def _per_channel(values: tuple[float, ...], device: torch.device | str) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)[:, None, None]


def _to_float(images: Tensor) -> Tensor:
    # By a tensor: CUDA divides by a number through its reciprocal, which rounds unlike the CPU.
    return images.float() / torch.full((), 255.0, device=images.device)


def _normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    return (images - mean) / std
