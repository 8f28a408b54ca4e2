"""Directories made to harm whoever loads them: each is refused in one line, at once and in little memory.

Other than the damages of test_fuzz_export.py these are made on purpose, most of them with valid checksums.
"""

import copy
import hashlib
import json
import os
import shutil
import signal
import socket
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from helpers import policy
from torch import nn

from apotfx import ApotfxError, calibrate, export_integer, load_integer, quantize
from apotfx.integer.format import read_integer
from apotfx.integer.manifest import checksum
from apotfx.training.exported import open_export

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
SECONDS, MEBIBYTES = 30, 1500  # that a refusal may take; 64 MiB of JSON take most of both
LARGEST = 2**31 - 1
METADATA = {
    "arch": "mlp", "dataset": "digits", "in_channels": 1, "num_classes": 10, "dataset_image_size": 8, "image_size": 8,
    "mean": [0.5], "std": [0.5],
}  # fmt: skip
CASES = {}


def case(name, function, *arguments):
    assert name not in CASES, name
    CASES[name] = lambda path: function(path, *arguments)


# What is in the place of a file or of the directory.


def replaced(path, name, make):
    (path / name).unlink()
    make(path / name)


def a_socket(path):
    before = os.getcwd()
    os.chdir(path.parent)  # the name of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    finally:
        os.chdir(before)


def sparse(size):
    def make(path):
        path.touch()
        os.truncate(path, size)

    return make


KINDS = {
    "a pipe": os.mkfifo, "a directory": Path.mkdir, "a socket": a_socket, "empty": Path.touch,
    "a link to zeros": lambda path: path.symlink_to("/dev/zero"),
    "a link to random numbers": lambda path: path.symlink_to("/dev/urandom"),
    "a link to nothing": lambda path: path.symlink_to("/dev/null"),
    "a link to a full disk": lambda path: path.symlink_to("/dev/full"),
    "a link to a terminal": lambda path: path.symlink_to("/dev/tty"),
    "a link to memory": lambda path: path.symlink_to("/proc/self/mem"),
    "a link to a process": lambda path: path.symlink_to("/proc/self/cmdline"),
    "a link to nowhere": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a directory": lambda path: path.symlink_to("."),
    "a tebibyte of nothing": sparse(2**40), "16 MiB of nothing": sparse(2**24),
}  # fmt: skip
for name in (MANIFEST, WEIGHTS):
    for kind, make in KINDS.items():
        case(f"{name} is {kind}", replaced, name, make)


def instead_of_the_directory(path, make):
    shutil.rmtree(path)
    make(path)


for kind in ("a pipe", "empty", "a socket", "a link to zeros", "a link to nowhere", "a link to itself"):
    case(f"the export is {kind}", instead_of_the_directory, KINDS[kind])


def beside(path, name, make):
    make(path / name)


for number, name in enumerate(["a\nb", "\x1b[2J", "x" * 255, "\udcff", "MANIFEST.JSON", ".", "a b", "model.pkl"]):
    if name != ".":
        case(f"another file {number}", beside, name, Path.touch)
case("another pipe", beside, "x", os.mkfifo)
case("another directory", beside, "x", Path.mkdir)
case("many other files", lambda path: [(path / f"{i}").touch() for i in range(2000)])


# The text of the manifest.


def written(path, text):
    (path / MANIFEST).write_bytes(text if isinstance(text, bytes) else text.encode())


def text_of(path, change):
    written(path, change((path / MANIFEST).read_text()))


def with_metadata(text):
    """Has a text in the metadata that no JSON writer would write; without a valid checksum."""
    return lambda old: old.replace('"metadata": {', f'"metadata": {{"x": {text}, ', 1)


for depth in (40, 1000, 10**5, 10**7):
    case(f"{depth} lists in lists", written, "[" * depth + "]" * depth)
    case(f"{depth} objects in objects", written, '{"a":' * depth + "1" + "}" * depth)
    case(f"{depth} lists in the metadata", text_of, with_metadata("[" * depth + "]" * depth))
case("lists without an end", written, "[" * (2**26 - 1))
case("a large list of lists", written, "[" + "[]," * (2**24 - 10) + "[]]")
case("a large list of objects", written, "[" + "{}," * (2**24 - 10) + "{}]")
case("a large list of numbers", text_of, with_metadata("[" + "0," * (2**24) + "0]"))
case("a large text", text_of, with_metadata('"' + "a" * 2**25 + '"'))
case("a large key", text_of, lambda old: old.replace('"metadata": {', '"metadata": {"' + "a" * 2**25 + '": 1, ', 1))
case("a key twice", text_of, lambda old: old.replace('"version": 4', '"version": 3, "version": 4', 1))
case("a large key twice", written, '{"' + "a" * 2**20 + '": 1, "' + "a" * 2**20 + '": 2}')
case("many keys twice", written, "{" + ",".join(f'"{i % 50000}":1' for i in range(10**5)) + "}")
case("more than the largest size", text_of, lambda old: old + " " * 2**26)
case("4000 digits", text_of, with_metadata("9" * 4000))
case("a million digits", text_of, with_metadata("9" * 10**6))
case("a number beyond float64", text_of, with_metadata("1e999"))
case("a number that JSON has not", text_of, with_metadata("NaN"))
case("UTF-16", text_of, lambda old: old.encode("utf-16"))
case("invalid UTF-8", text_of, lambda old: old.encode().replace(b"program", b"pr\xffgram"))
case("a byte order mark", text_of, lambda old: b"\xef\xbb\xbf" + old.encode())
case("a NUL", text_of, lambda old: old + "\0")
case("two documents", text_of, lambda old: old + old)
case("a comment", text_of, lambda old: "/* */" + old)
case("half of a surrogate", text_of, with_metadata('"\\ud800"'))
for kind, text in {"null": "null", "a number": "1", "a list": "[]", "an empty object": "{}", "text": '"x"'}.items():
    case(f"the manifest is {kind}", written, text)


# Values of the manifest, with a valid checksum around them.


def signed(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    manifest["manifest_sha256"] = checksum(manifest)
    written(path, json.dumps(manifest))


def set_value(path, place, value):
    def change(manifest):
        *outer, key = place
        for part in outer:
            manifest = manifest[part]
        manifest[key] = copy.deepcopy(value)

    signed(path, change)


VALUES = {
    ("layers", 0, "shape"): [
        [LARGEST] * 4, [LARGEST] * 16, [0, 1, 3, 3], [0] * 4, [-3, 1, 3, 3], [3, 1, 3, 2**31], [3, 1, 3, 10**30], [3.0, 1, 3, 3],
        [True, 1, 3, 3], [], [[3]], None, [3] * 10**6,
    ],
    ("layers", 0, "operator"): [
        {"kind": "Convolution", "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 0},
        {"kind": "Convolution", "stride": [1, 1], "padding": [0, 0], "dilation": [1, 1], "groups": LARGEST},
        {"kind": "Convolution", "stride": [0, 1], "padding": [0, 0], "dilation": [1, 1], "groups": 1},
        {"kind": "Convolution", "stride": [1, 1], "padding": [LARGEST] * 2, "dilation": [1, 1], "groups": 1},
        {"kind": "Convolution", "stride": [1, 1], "padding": [0, 0], "dilation": [LARGEST] * 2, "groups": 1},
        {"kind": "Convolution", "stride": [1] * 10**6, "padding": [0, 0], "dilation": [1, 1], "groups": 1},
        {"kind": "__import__('os')"},
    ],
    ("layers", 0, "pad"): [[LARGEST] * 4, [-1] * 4, [0] * 10**6],
    ("layers", 0, "name"): [
        "a b", "class", "1; import os", "__import__('os').system('true')", "..", ".", "0.weight", "training", "forward",
        "_parameters", "__class__", "4", "x\ny", "\u202e0", "a" * 1001, "a" * 10**7, "é", "",
    ],
    ("layers", 0, "weight", "bits"): [0, 1, 9, -1, 10**9, 3.0, True, "3"],
    ("layers", 0, "weight", "levels"): [[0, 1, 2, 3, 4], [0, 10**400, 1, 2], list(range(10**6)), [[0]] * 4],
    ("layers", 0, "weight", "scale"): [[1.0] * 10**6, [1e-50], [1e39], [0], [-1.0], []],
    ("layers", 0, "weight", "clip"): [[1e308], [5e-324] * 2, [10**400]],
    ("layers", 0, "input", "clip"): [[1e-46], [True], None],
    ("layers", 0, "rectifier"): [[1, 0], [0, 10**400], [None] * 10**6],
    ("layers", 0, "accumulator_bound"): [2**63, -1, 1e30],
    ("layers",): [[], [None], [{}] * 10**6],
    ("program", "steps"): [[], [{"step": "input", "name": "a", "inputs": []}] * 10**5, [{"name": "a" * 10**6}]],
    ("tensors",): [
        {}, {f"{i}": {"shape": [], "dtype": "bool", "sha256": "0" * 64} for i in range(50000)},
        {"x": {"shape": [LARGEST, 128], "dtype": "float32", "sha256": "0" * 64}},
    ],
    ("tensors", "1.offset", "shape"): [[LARGEST], [-3], [3, 0, LARGEST, LARGEST, LARGEST], [1] * 17, [3, 1]],
    ("tensors", "1.offset", "dtype"): ["float64", "int64", "quint8", "object", "__class__", 1],
    ("weights_sha256",): ["", "0" * 64, 1, "é" * 64],
    ("version",): [4, 5.0, True, 10**400, "5" * 10**6],
}  # fmt: skip
OF_THE_NETWORK = {  # which tools build from the metadata
    "arch": ["vit", "torchvision/vit_h_14", "torchvision/regnet_y_128gf", "resnet152", "__import__('os')", "../mlp", "a" * 1000],
    "in_channels": [65536, 65537, 2**63, 0, -1], "num_classes": [65536, 10**400, None],
    "dataset_image_size": [65536, 1.5, "8"], "image_size": [65536, 0], "mean": [[], [1e308], [0.5] * 10**5],
    "std": [[0.0], [5e-324], [None]], "dataset": ["../../etc", "\x00", 7],
}  # fmt: skip
for key, values in OF_THE_NETWORK.items():
    for number, value in enumerate(values):
        case(f"metadata {key} {number}", set_value, ("metadata", key), value)
for place, values in VALUES.items():
    for number, value in enumerate(values):
        case(f"{'.'.join(map(str, place))} {number}", set_value, place, value)


# The file of the weights, with valid checksums around it.


def weights(path, change):
    """Sets the header and the data of the weights, from (header, data) to bytes, or to (header, data) again."""
    content = (path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    new = change(json.loads(content[8:start]), content[start:])
    if isinstance(new, tuple):
        header, data = new
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        new = len(text).to_bytes(8, "little") + text + data
    (path / WEIGHTS).write_bytes(new)
    signed(path, lambda manifest: manifest.update(weights_sha256=hashlib.sha256(new).hexdigest()))


for size in (0, 1, 2**24 + 1, 2**32, 2**63, 2**64 - 1):
    case(
        f"a header of {size} bytes",
        weights,
        lambda header, data, size=size: size.to_bytes(8, "little") + json.dumps(header).encode() + data,
    )


def of_a_tensor(key, value):
    return weights, lambda header, data: (header | {"1.offset": header["1.offset"] | {key: value}}, data)


for number, offsets in enumerate(
    [[0, 2**63], [-8, 4], [4, 0], [0, 0], [2**64, 2**64 + 12], [1.0, 2.0], "x", None, [0, 12]]
):
    case(f"offsets {number}", *of_a_tensor("data_offsets", offsets))
for number, shape in enumerate(
    [[2**63], [2**32, 2**32], [-1], [0, LARGEST, LARGEST, LARGEST, LARGEST], [1] * 1000, None]
):
    case(f"shape {number}", *of_a_tensor("shape", shape))
for dtype in ("F64", "F8_E4M3", "BOOL", "X", 7, None):
    case(f"dtype {dtype}", *of_a_tensor("dtype", dtype))
case("a deep header", weights, lambda header, data: (b'{"x":' + b"[" * 10**6, data))
case(
    "a large metadata of the weights",
    weights,
    lambda header, data: (header | {"__metadata__": {"a": "b" * 2**25}}, data),
)
case(
    "a header with a tensor twice",
    weights,
    lambda header, data: (json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:], data),
)
case(
    "a header with an odd name",
    weights,
    lambda header, data: (header | {"\n\x1b": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, data),
)
case(
    "a header with many tensors",
    weights,
    lambda header, data: (
        header | {f"{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(10**5)},
        data,
    ),
)
case("more data", weights, lambda header, data: (header, data + bytes(100)))
case("less data", weights, lambda header, data: (header, data[:-1]))
case("no header", weights, lambda header, data: data)


def consistent_and_huge(path):
    """All sizes agree, and the file is there: a tebibyte that takes no space."""
    described = {"shape": [LARGEST, 128], "dtype": "float32", "sha256": "0" * 64}
    signed(path, lambda manifest: manifest["tensors"].update(huge=described))
    content = (path / WEIGHTS).read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header, size = json.loads(content[8:start]), len(content) - start
    header["huge"] = {"dtype": "F32", "shape": [LARGEST, 128], "data_offsets": [size, size + LARGEST * 512]}
    text = json.dumps(header).encode()
    (path / WEIGHTS).write_bytes(len(text).to_bytes(8, "little") + text + content[start:])
    os.truncate(path / WEIGHTS, 8 + len(text) + size + LARGEST * 512)


case("a tebibyte that the manifest states", consistent_and_huge)


# The test.


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """(an export, its float model, an input, the outputs)"""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))
    x = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    qmodel = calibrate(quantize(model, policy(weight_bits=3, activation_bits=3)), [x]).eval()
    path = export_integer(qmodel, tmp_path_factory.mktemp("original") / "export", METADATA)
    return path, model, x, qmodel(x)


@contextmanager
def limited():
    """Fails what takes too long or too much memory."""

    def stop(*_):
        raise TimeoutError(f"more than {SECONDS} s")

    def peak():
        status = Path("/proc/self/status")
        lines = status.read_text().splitlines() if status.exists() else []
        return sum(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024

    # Of processor time; by the clock much more, as other programs may run beside.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, SECONDS), signal.SIGALRM: (signal.ITIMER_REAL, 20 * SECONDS)}
    before = {number: signal.signal(number, stop) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    if os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")
    start = peak()
    try:
        yield
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    assert peak() - start < MEBIBYTES


def check_refused(error):
    text = str(error)
    assert text.isprintable() and len(text) < 2000, text[:3000]


READERS = {
    "load_integer": lambda path, model: load_integer(path, model),
    "alone": lambda path, model: load_integer(path) and None,  # with forged numbers it may be any network
    "read_integer": lambda path, model: read_integer(path),
    "open_export": lambda path, model: open_export(path),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("reader", [
    "load_integer", "alone", pytest.param("read_integer", marks=pytest.mark.nightly),
    pytest.param("open_export", marks=pytest.mark.nightly),
])  # fmt: skip
def test_a_hostile_export_is_refused_at_once(reader, name, original, tmp_path):
    path = Path(shutil.copytree(original[0], tmp_path / "export"))
    CASES[name](path)
    _, model, x, expected = original
    with limited():
        try:
            read = READERS[reader](path, model)
        except ApotfxError as error:
            check_refused(error)
            read = None
    if isinstance(read, nn.Module):
        assert torch.equal(read(x), expected)
    shutil.rmtree(tmp_path)  # some are large
