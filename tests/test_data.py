import io
import itertools
import os
import pickle
import socket
import struct
import subprocess
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image

from apotfx.errors import ApotfxError
from apotfx.training import data
from apotfx.training.augment import Augment
from apotfx.training.data import Split, TrainBatches, eval_batches, load_dataset

MNIST_FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
EVERYTHING = Augment(degrees=10.0, translate=0.1, scale=(0.9, 1.1), shear=5.0, flip=True)
COMMON = {"batch_size": 8, "mean": (0.131,), "std": (0.308,), "image_size": 8, "device": "cpu"}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    """No test reads or writes the user's data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("APOTFX_DATA", raising=False)


@pytest.fixture
def offline(monkeypatch):
    """Every download fails; the list tells the socket timeout of each attempt."""
    timeouts = []

    def download(self):
        print("chatter")
        timeouts.append(socket.getdefaulttimeout())
        raise URLError("no route\nto host")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    return timeouts


def write_idx(root, folder="MNIST", num_train=20, num_test=10):
    """Random images and labels 0, 1, 2, ... in the four files of MNIST; returns their folder."""
    raw = root / folder / "raw"
    raw.mkdir(parents=True)
    pixels = np.random.default_rng(0)
    for prefix, count in (("train", num_train), ("t10k", num_test)):
        images = pixels.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        (raw / f"{prefix}-images-idx3-ubyte").write_bytes(struct.pack(">4i", 0x803, *images.shape) + images.tobytes())
        (raw / f"{prefix}-labels-idx1-ubyte").write_bytes(
            struct.pack(">2i", 0x801, count) + bytes(i % 10 for i in range(count))
        )
    return raw


def write_images(root, splits=("train", "val", "test"), classes=("cat", "dog"), size=(40, 30), count=6):
    """Images whose every pixel is (10 * index, 255 * class, 7)."""
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", size, (10 * i, 255 * label, 7)).save(root / split / name / f"{i}.png")
    return root


def random_split(count=50, channels=1, size=8):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, size, size), generator=generator, dtype=torch.uint8)
    return Split(images, torch.arange(count))


def batches(split=None, **options):
    return TrainBatches(split or random_split(), **COMMON | {"seed": 3, "augment": EVERYTHING} | options)


def evaluated(split, **options):
    return list(eval_batches(split, **COMMON | options))


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for (images, labels), (other_images, other_labels) in zip(first, second):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)


def describe(dataset):
    return dataset.name, len(dataset.train), len(dataset.val), len(dataset.test), dataset.num_classes


# Data sets


def test_mnist(mnist_root):
    mnist = load_dataset("mnist", mnist_root)
    assert describe(mnist) == ("mnist", 55_000, 5_000, 10_000, 10)
    assert (mnist.mean, mnist.std, mnist.in_channels, mnist.image_size) == ((0.131,), (0.308,), 1, 28)
    assert len(mnist.all_train) == 60_000
    counts = torch.bincount(mnist.all_train.labels)
    assert counts.tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    mean, std = data._channel_statistics(mnist.all_train.images)
    assert (*mean, *std) == pytest.approx((0.1307, 0.3081), abs=5e-5)


@pytest.mark.parametrize(
    "name, folder",
    [
        ("mnist", "MNIST"),
        (None, "MNIST"),
        ("fashion-mnist", "FashionMNIST"),
    ],
)
def test_idx_files_are_read_exactly(tmp_path, name, folder):
    raw = write_idx(tmp_path, folder)
    dataset = load_dataset(name, tmp_path)
    assert describe(dataset) == (name or "mnist", 18, 2, 10, 10)
    content = (raw / "t10k-images-idx3-ubyte").read_bytes()
    pixels = torch.tensor(list(content[16:]), dtype=torch.uint8)
    assert torch.equal(dataset.test.images, pixels.view(10, 1, 28, 28))
    assert torch.equal(dataset.test.labels, torch.arange(10))
    assert dataset.test.images.dtype == torch.uint8 and dataset.test.labels.dtype == torch.int64


def test_environment_names_the_directory(tmp_path, monkeypatch):
    write_idx(tmp_path / "elsewhere")
    monkeypatch.setenv("APOTFX_DATA", str(tmp_path / "elsewhere"))
    assert load_dataset("mnist", None).name == "mnist"
    with pytest.raises(ApotfxError, match="found no other/MNIST/raw"):
        load_dataset("mnist", data.Path("other"))


def test_data_of_the_current_directory_is_not_downloaded_again(tmp_path, offline):
    write_idx(tmp_path / "data")
    assert load_dataset(None, None).name == "mnist"
    assert not offline


def test_a_download_is_used(monkeypatch):
    def download(self):
        if not self._check_exists():
            write_idx(data.Path(self.root))

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", download)
    assert describe(load_dataset("mnist", None)) == ("mnist", 18, 2, 10, 10)


def test_cifar10(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    rows = np.random.default_rng(0).integers(0, 256, (60, 3072), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for i, name in enumerate(names):
        batch = {"data": rows[10 * i : 10 * i + 10], "labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": list("0123456789")}))
    cifar = load_dataset("cifar10", tmp_path)
    assert describe(cifar) == ("cifar10", 45, 5, 10, 10)
    assert torch.equal(cifar.test.images, torch.from_numpy(rows[50:].reshape(10, 3, 32, 32)))
    assert (cifar.in_channels, cifar.image_size) == (3, 32)
    pixels = cifar.train.images.double() / 255
    assert cifar.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), rel=1e-9)
    assert cifar.std == pytest.approx(pixels.std(dim=(0, 2, 3), correction=0).tolist(), rel=1e-9)


def test_digits():
    digits = load_dataset("digits", None)
    assert describe(digits) == ("digits", 1294, 143, 360, 10)
    assert digits.image_size == 28 and digits.test.images.max() == 255 and digits.test.images.min() == 0
    counts = torch.bincount(digits.test.labels)
    assert counts.min() >= 34 and counts.max() <= 37  # stratified
    again = load_dataset("digits", None)
    assert torch.equal(again.train.images, digits.train.images)
    assert torch.equal(again.val.labels, digits.val.labels)


def test_validation_images_are_fixed_disjoint_and_in_order(tmp_path, monkeypatch):
    write_idx(tmp_path, num_train=200)
    torch.manual_seed(1)
    first = load_dataset("mnist", tmp_path)
    torch.manual_seed(2)
    second = load_dataset("mnist", tmp_path)
    assert len(first.val) == 20
    assert torch.equal(first.val.images, second.val.images)
    original = torchvision.datasets.MNIST(tmp_path).data[:, None]
    positions = [
        [(original == image).flatten(1).all(1).nonzero().item() for image in split.images]
        for split in (first.train, first.val)
    ]
    assert all(part == sorted(part) for part in positions)
    assert sorted(positions[0] + positions[1]) == list(range(200))
    assert torch.equal(first.all_train.images, torch.cat([first.train.images, first.val.images]))
    monkeypatch.setattr(data, "MAX_VALIDATION_IMAGES", 7)
    assert len(load_dataset("mnist", tmp_path).val) == 7


def test_fewer_training_images_are_always_the_same_ones_in_order(tmp_path):
    write_idx(tmp_path, num_train=200)
    whole = load_dataset("mnist", tmp_path)
    assert whole.with_train_images(None) is whole
    torch.manual_seed(3)
    first, again = whole.with_train_images(50), load_dataset("mnist", tmp_path).with_train_images(50)
    assert torch.equal(first.train.images, again.train.images) and torch.equal(first.train.labels, again.train.labels)
    positions = [(whole.train.images == image).flatten(1).all(1).nonzero().item() for image in first.train.images]
    assert positions == sorted(set(positions)) and len(positions) == 50 and max(positions) > 50
    assert torch.equal(whole.train.labels[positions], first.train.labels)
    assert first.val is whole.val and first.test is whole.test
    with pytest.raises(ApotfxError, match="--train-images 181: mnist has 180; pass at most that many"):
        whole.with_train_images(181)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    write_images(tmp_path)
    before = torch.get_rng_state()
    load_dataset("folder", tmp_path)
    load_dataset("digits", None)
    assert torch.equal(torch.get_rng_state(), before)


def test_image_size_resizes(tmp_path):
    write_idx(tmp_path)
    large, small = load_dataset("mnist", tmp_path, image_size=56), load_dataset("mnist", tmp_path)
    expected = F.interpolate(small.test.images.float(), (56, 56), mode="bilinear").round().to(torch.uint8)
    assert large.image_size == 56 and torch.equal(large.test.images, expected)


# Missing and damaged data


def test_fallback_to_digits_is_loud_and_marked(offline, capsys):
    assert load_dataset(None, None).name == "digits"
    captured = capsys.readouterr()
    assert captured.out == "" and "chatter" not in captured.err
    assert captured.err.count("WARNING") == 3
    for part in ("no route to host", "data/MNIST/raw", "--data DIR", "APOTFX_DATA", "marked 'digits'"):
        assert part in captured.err
    assert offline == [data.DOWNLOAD_TIMEOUT] and socket.getdefaulttimeout() is None


def test_explicit_mnist_does_not_fall_back(offline):
    with pytest.raises(
        ApotfxError,
        match="^mnist: found no data/MNIST/raw/train-images-idx3-ubyte and could "
        "not download it .*--data DIR or APOTFX_DATA.*--dataset digits$",
    ):
        load_dataset("mnist", None)


@pytest.mark.parametrize("name", ["mnist", None])
@pytest.mark.parametrize("missing", MNIST_FILES)
def test_a_named_directory_without_the_data_is_an_error(tmp_path, offline, name, missing):
    (write_idx(tmp_path) / missing).unlink()
    with pytest.raises(ApotfxError, match=f"mnist: found no {tmp_path}/MNIST/raw/{missing}; put the"):
        load_dataset(name, tmp_path)
    assert not offline


def damage(raw, how):
    images, labels = raw / "train-images-idx3-ubyte", raw / "train-labels-idx1-ubyte"
    content = labels.read_bytes()
    if how == "truncated images":
        images.write_bytes(images.read_bytes()[:-1])
    elif how == "empty images":
        images.write_bytes(b"")
    elif how == "header alone":
        images.write_bytes(images.read_bytes()[:16])
    elif how == "wrong magic":
        images.write_bytes(b"\x1f\x8b\x08\x00" + images.read_bytes()[4:])
    elif how == "labels as images":
        images.write_bytes(content)
    elif how == "label out of range":
        labels.write_bytes(content[:-1] + b"\x0a")
    elif how == "one label less":
        labels.write_bytes(struct.pack(">2i", 0x801, 19) + content[8:-1])
    elif how == "not square":
        images.write_bytes(struct.pack(">4i", 0x803, 20, 14, 56) + images.read_bytes()[16:])


@pytest.mark.parametrize(
    "how, message",
    [
        ("truncated images", "is damaged"),
        ("empty images", "is damaged"),
        ("header alone", "is damaged"),
        ("wrong magic", "is damaged"),
        ("labels as images", "is damaged"),
        ("label out of range", "has labels 0 to 10, expected 0 to 9"),
        ("one label less", "has 20 images and 19 labels"),
        ("not square", r"has images of \(14, 56\) pixels, expected squares"),
    ],
)
def test_damaged_files(tmp_path, how, message):
    raw = write_idx(tmp_path)
    damage(raw, how)
    with pytest.raises(ApotfxError, match=f"^{raw}: the training split of mnist {message}.*; del") as caught:
        load_dataset(None, tmp_path)
    assert "\n" not in str(caught.value)


def test_damage_does_not_fall_back_to_digits(tmp_path, offline):
    damage(write_idx(tmp_path / "data"), "truncated images")
    with pytest.raises(ApotfxError, match="is damaged"):
        load_dataset(None, None)


def test_too_few_images_for_validation(tmp_path):
    write_idx(tmp_path, num_train=9)
    with pytest.raises(ApotfxError, match="mnist: 9 training images, expected at least 10"):
        load_dataset("mnist", tmp_path)


def test_unknown_name():
    with pytest.raises(ApotfxError, match="unknown data set 'MNIST': expected one of mnist, fashion-mnist"):
        load_dataset("MNIST", None)


def test_image_size_below_one():
    with pytest.raises(ApotfxError, match="--image-size 0: expected 1 pixel or more"):
        load_dataset("digits", None, image_size=0)


def test_images_that_do_not_fit_the_memory(tmp_path, monkeypatch):
    write_images(tmp_path)
    monkeypatch.setattr(data.os, "sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4096}.get)
    with pytest.raises(ApotfxError, match="36 images of 3x30x30 take .* half the memory.*--image-size"):
        load_dataset("folder", tmp_path)
    assert load_dataset("folder", tmp_path, image_size=8).image_size == 8


# Folders of images


@pytest.mark.parametrize("workers", [0, 2])
def test_folder_with_three_splits(tmp_path, workers):
    dataset = load_dataset("folder", write_images(tmp_path), workers=workers)
    assert describe(dataset) == ("folder", 12, 12, 12, 2)
    assert dataset.train.images.shape == (12, 3, 30, 30)
    assert dataset.train.labels.tolist() == [0] * 6 + [1] * 6
    assert dataset.val.images[7, :, 3, 4].tolist() == [10, 255, 7]
    assert dataset.std[2] == 1 / 255  # a constant channel


@pytest.mark.parametrize("other", ["val", "test"])
def test_a_folder_with_two_splits_holds_validation_out_of_train(tmp_path, other):
    dataset = load_dataset("folder", write_images(tmp_path, ("train", other)), image_size=16)
    assert describe(dataset) == ("folder", 11, 1, 12, 2)
    assert dataset.image_size == 16


def test_images_are_resized_by_the_shorter_side_and_cropped_to_the_center(tmp_path):
    write_images(tmp_path, ("train", "test"), size=(300, 250))
    wide = Image.new("RGB", (80, 20), (255, 0, 0))
    wide.paste((0, 0, 255), (30, 0, 50, 20))
    wide.save(tmp_path / "test" / "cat" / "0.png")
    assert load_dataset("folder", tmp_path).image_size == 224
    image = load_dataset("folder", tmp_path, image_size=20).test.images[0]
    assert torch.equal(image, torch.tensor([0, 0, 255], dtype=torch.uint8)[:, None, None].expand(3, 20, 20))


def test_grayscale_files_become_rgb(tmp_path):
    write_images(tmp_path, ("train", "test"))
    Image.new("L", (30, 30), 99).save(tmp_path / "test" / "cat" / "0.png")
    assert load_dataset("folder", tmp_path).test.images[0].unique().tolist() == [99]


def pixels_of(image, tmp_path, name="0.png", **options):
    """What becomes of an image of 30x30 pixels or of a file's content: uint8 [3, 30, 30]."""
    write_images(tmp_path, ("train", "test"), count=10)
    (tmp_path / "test" / "cat" / "0.png").unlink()
    path = tmp_path / "test" / "cat" / name
    path.write_bytes(image) if isinstance(image, bytes) else image.save(path, **options)
    return load_dataset("folder", tmp_path).test.images[0]


def gray(values, tmp_path, name):
    """The gray values, [30, 30], of an image with these."""
    pixels = pixels_of(Image.fromarray(values), tmp_path, name)
    assert torch.equal(pixels[0], pixels[1]) and torch.equal(pixels[0], pixels[2])
    return pixels[0]


RAMP = np.linspace(0, 1, 900).reshape(30, 30)


@pytest.mark.parametrize("name", ["0.png", "0.tiff"])
def test_of_16_bits_the_upper_8_are_kept(tmp_path, name):
    values = (RAMP * 65535).round().astype(np.uint16)
    assert torch.equal(gray(values, tmp_path, name), torch.from_numpy(values // 256).to(torch.uint8))


@pytest.mark.parametrize("most", [65535, 4095, 256])
def test_of_a_pgm_with_more_than_8_bits_the_upper_8_are_kept(tmp_path, most):
    values = (RAMP * most).round().astype(np.uint16)
    content = b"P5 30 30 %d\n" % most + values.astype(">u2").tobytes()
    expected = (values.astype(np.float64) / most * 65535).round().astype(np.int64) // 256
    assert torch.equal(pixels_of(content, tmp_path, "0.pgm")[0], torch.from_numpy(expected).to(torch.uint8))


def test_a_transparent_value_of_16_bits_is_white(tmp_path):
    values = np.full((30, 30), 777, np.uint16)
    values[:10] = 778
    pixels = pixels_of(Image.fromarray(values), tmp_path, transparency=777)
    assert (pixels[:, :10] == 3).all() and (pixels[:, 10:] == 255).all()


def test_a_photograph_with_a_second_picture_is_read(tmp_path):
    first, second = (Image.new("RGB", (30, 30), (value,) * 3) for value in (200, 0))
    assert (pixels_of(first, tmp_path, "0.jpg", format="MPO", save_all=True, append_images=[second]) == 200).all()


@pytest.mark.parametrize("format", ["EPS", "TGA", "ICO", "PCX"])
def test_what_other_programs_or_rare_decoders_would_read_is_refused(tmp_path, format, monkeypatch):
    buffer = io.BytesIO()
    Image.new("RGB", (30, 30)).save(buffer, format)
    monkeypatch.setattr(subprocess, "check_call", None)  # which would start Ghostscript
    with pytest.raises(ApotfxError, match=r"test/cat/0.png cannot be decoded \(cannot identify image file"):
        pixels_of(buffer.getvalue(), tmp_path)


def test_floats_from_0_to_1_are_scaled(tmp_path):
    got = gray(RAMP.astype(np.float32), tmp_path, "0.tiff")
    assert torch.equal(got, torch.from_numpy((RAMP.astype(np.float32) * 255).round()).to(torch.uint8))


@pytest.mark.parametrize("values, reason", [
    (RAMP.astype(np.float32) * 255, "floats from 0 to 255; expected 0 to 1"),
    (RAMP.astype(np.float32) - 0.5, "floats from -0.5 to 0.5; expected 0 to 1"),
    (np.where(RAMP == 1, np.nan, RAMP).astype(np.float32), "floats from nan to nan; expected 0 to 1"),
    ((RAMP * 255).astype(np.int32), "integers of 32 bits; expected 8 or 16"),
], ids=["to 255", "negative", "NaN", "integers"])  # fmt: skip
def test_pixels_of_unknown_brightness_are_refused(tmp_path, values, reason):
    with pytest.raises(ApotfxError, match=rf"test/cat/0.tiff cannot be decoded \({reason}\); replace or delete it"):
        gray(values, tmp_path, "0.tiff")


def test_a_palette_is_looked_up(tmp_path):
    image = Image.new("P", (30, 30), 1)
    image.putpalette([0, 0, 0, 10, 200, 30])
    assert pixels_of(image, tmp_path).flatten(1).unique(dim=1).tolist() == [[10], [200], [30]]


@pytest.mark.parametrize("mode, color, options, expected", [
    ("RGBA", (200, 100, 0, 0), {}, [255, 255, 255]), ("RGBA", (200, 100, 0, 255), {}, [200, 100, 0]),
    ("RGBA", (0, 0, 0, 51), {}, [204, 204, 204]), ("LA", (100, 0), {}, [255] * 3), ("LA", (100, 255), {}, [100] * 3),
    ("P", 0, {"transparency": 0}, [255] * 3), ("RGB", (1, 2, 3), {"transparency": (1, 2, 3)}, [255] * 3),
    ("L", 7, {"transparency": 7}, [255] * 3), ("L", 7, {"transparency": 8}, [7] * 3),
], ids=itertools.count())  # fmt: skip
def test_behind_transparent_pixels_is_white(tmp_path, mode, color, options, expected):
    image = Image.new(mode, (30, 30), color)
    if mode == "P":
        image.putpalette([9, 9, 9])
    assert pixels_of(image, tmp_path, **options).flatten(1).unique(dim=1).flatten().tolist() == expected


def test_cmyk_becomes_rgb(tmp_path):
    image = Image.new("CMYK", (30, 30), (0, 255, 255, 0))
    red, green, blue = pixels_of(image, tmp_path, "0.tiff").flatten(1).float().mean(1).tolist()
    assert red > 200 and green < 50 and blue < 50


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "I;16"])
def test_images_are_turned_as_exif_says(tmp_path, mode):
    image = Image.new(mode, (30, 30))
    image.paste(65535 if mode == "I;16" else (255,) * len(mode), (0, 0, 30, 10))  # above
    exif = Image.Exif()
    exif[274] = 6  # to be turned clockwise by 90 degrees: what was above is at the right
    pixels = pixels_of(image, tmp_path, exif=exif)
    assert (pixels[:, :, 20:] == 255).all() and (pixels[0, :, :20] == (255 if mode == "RGBA" else 0)).all()


@pytest.mark.parametrize("name", ["0.webp", "0.tiff"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path, name):
    first, second = Image.new("RGB", (30, 30), (0, 0, 0)), Image.new("RGB", (30, 30), (255, 255, 255))
    options = {"lossless": True} if name == "0.webp" else {}
    assert not pixels_of(first, tmp_path, name, save_all=True, append_images=[second], **options).any()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "TIFF", "WEBP", "BMP"])
def test_a_truncated_image_is_named(tmp_path, format):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (30, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format)
    content = buffer.getvalue()
    with pytest.raises(ApotfxError, match=r"test/cat/0.png cannot be decoded \(.+\); replace or delete it"):
        pixels_of(content[: len(content) * 2 // 3], tmp_path)


def test_an_image_that_is_a_line_is_refused(tmp_path):
    with pytest.raises(
        ApotfxError, match=r"test/cat/0.png cannot be decoded \(4000x30 pixels; expected sides at most 100:1"
    ):
        pixels_of(Image.new("L", (4000, 30)), tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", ["pipe", "device", "absent"])
def test_what_is_no_file_is_refused_at_once(tmp_path, what, workers):
    path = write_images(tmp_path) / "train" / "dog" / "5.png"
    path.unlink()
    os.mkfifo(path) if what == "pipe" else path.symlink_to("/dev/zero" if what == "device" else "nowhere")
    reason = "No such file or directory" if what == "absent" else "not a file"
    with pytest.raises(ApotfxError, match=rf"^{path} cannot be decoded \(.*{reason}.*\); replace or delete it$"):
        load_dataset("folder", tmp_path, workers=workers)


def test_a_file_of_mnist_that_is_too_large_is_not_read(tmp_path):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte"
    os.truncate(path, 2**40)
    with pytest.raises(ApotfxError, match=f"^{path}: has 1099511627776 bytes; put the original file there"):
        load_dataset("mnist", tmp_path)


def test_folder_needs_a_directory():
    with pytest.raises(ApotfxError, match="folder: no directory was named; give --data DIR"):
        load_dataset("folder", None)


@pytest.mark.parametrize(
    "splits, found",
    [
        ((), "none"),
        (("train",), "train"),
        (("val", "test"), "val, test"),
    ],
)
def test_folder_without_its_splits(tmp_path, splits, found):
    write_images(tmp_path, splits)
    with pytest.raises(ApotfxError, match=f"{tmp_path}: found {found} of the folders.*DIR/train/CLASS/IMAGE"):
        load_dataset("folder", tmp_path)


def test_folders_with_different_classes(tmp_path):
    write_images(tmp_path, ("train",))
    write_images(tmp_path, ("test",), classes=("cat", "cow"))
    with pytest.raises(ApotfxError, match=f"{tmp_path}/test and {tmp_path}/train differ in the class 'cow'"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_empty_folders(tmp_path, classes):
    write_images(tmp_path, ("train",))
    (tmp_path / "test").mkdir()
    for name in classes:
        (tmp_path / "test" / name).mkdir()
    with pytest.raises(ApotfxError, match=f"{tmp_path}/test: .*[Pp]ut images into it or delete it"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named(tmp_path, workers):
    bad = write_images(tmp_path) / "val" / "dog" / "3.png"
    bad.write_bytes(bad.read_bytes()[:50])
    with pytest.raises(ApotfxError, match=rf"^{bad} cannot be decoded \(.*\); replace or delete it$"):
        load_dataset("folder", tmp_path, workers=workers)


# Batches


def test_an_epoch_visits_images_once_and_drops_the_rest():
    loader = batches(augment=Augment.none())
    seen = list(loader.epoch(0))
    assert len(loader) == len(seen) == 6
    labels = torch.cat([labels for _, labels in seen])
    assert len(labels) == 48 and len(labels.unique()) == 48
    images = torch.cat([images for images, _ in seen])
    assert torch.equal(images, (random_split().images[labels] / 255 - 0.131) / 0.308)
    assert images.dtype == torch.float32 and labels.dtype == torch.int64


def test_batches_are_a_function_of_seed_epoch_and_step():
    first = list(batches().epoch(1))
    torch.manual_seed(99)
    assert_equal(list(batches().epoch(1)), first)
    assert_equal(list(batches().epoch(1, start=4)), first[4:])
    assert list(batches().epoch(1, start=6)) == []
    loader = batches()
    next(loader.epoch(0))
    assert_equal(list(loader.epoch(1)), first)
    for other in (batches().epoch(2), batches(seed=4).epoch(1), batches(seed=-3).epoch(1)):
        assert not torch.equal(next(other)[1], first[0][1])


def test_every_step_of_every_epoch_augments_anew():
    alike = Split(random_split().images[:1].expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.int64))
    seen = [images for epoch in (0, 1) for images, _ in batches(alike).epoch(epoch)]
    assert len({tuple(images.flatten().tolist()) for images in seen}) == 4


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_ranks_see_together_the_batch_of_one_process(world_size):
    ranks = [list(batches(rank=rank, world_size=world_size, image_size=12).epoch(2)) for rank in range(world_size)]
    together = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*ranks)
    ]
    assert_equal(together, list(batches(image_size=12).epoch(2)))


def test_batches_of_another_size_are_resized_before_normalization():
    images, labels = next(batches(augment=Augment.none(), image_size=4).epoch(0))
    resized = F.interpolate(random_split().images[labels] / 255, (4, 4), mode="bilinear", antialias=True)
    assert torch.equal(images, (resized - 0.131) / 0.308)


def test_channels_are_normalized_by_their_own_statistics():
    split = random_split(channels=3)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    (images, _), *_ = evaluated(split, mean=mean, std=std)
    for channel in range(3):
        expected = (split.images[:8, channel] / 255 - mean[channel]) / std[channel]
        assert torch.equal(images[:, channel], expected)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 51}, "--batch-size 51: expected 1 to 50"),
        ({"batch_size": 0}, "--batch-size 0: expected 1 to 50"),
        ({"batch_size": 8, "world_size": 3}, "--batch-size 8: expected a multiple of the 3 processes"),
    ],
)
def test_batch_size_is_checked(options, message):
    with pytest.raises(ApotfxError, match=message):
        batches(**options)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
def test_evaluation_sees_every_image_once_and_in_order(world_size):
    split = random_split()
    shares = [evaluated(split, rank=rank, world_size=world_size) for rank in range(world_size)]
    images, labels = (torch.cat(parts) for parts in zip(*(batch for share in shares for batch in share)))
    assert torch.equal(labels, split.labels)
    assert torch.equal(images, (split.images / 255 - 0.131) / 0.308)
    assert all(len(labels) <= 8 for share in shares for _, labels in share)
