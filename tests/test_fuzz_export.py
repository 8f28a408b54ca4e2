"""Damaged exports, 600 of them or, nightly, 7,500: each is refused with one line, or is still the one that was exported.

That is claimed for every mutation that leaves some checksum wrong, and for every mutation of the manifest, or of the
header of the weights, with valid checksums around it; only another scale of a weight, with a valid checksum, is
legitimately another network. Contents of tensors that were replaced together with all their checksums are another
network too: of those only is claimed that they are refused with one line or compute something.

"Is still the network" means: the same state, and the same outputs for a fixed input, in every bit.
"""

import copy
import hashlib
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from helpers import policy
from torch import nn

from apotfx import ApotfxError, calibrate, export_integer, load_integer, quantize
from apotfx.integer.manifest import checksum

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
COUNTS = [60, pytest.param(750, marks=pytest.mark.nightly)]  # of each of ten kinds; four forge no checksum
Files = dict[str, bytes | None]  # contents by name; None for a directory


def make_model():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


@pytest.fixture(scope="module")
def exports(tmp_path_factory):
    """The files of two exports, the float model, an input, and the first network's state and outputs."""
    x, files = torch.randn(4, 1, 4, 4, generator=torch.Generator().manual_seed(0)), []
    for seed in (1, 0):
        torch.manual_seed(seed)
        model = make_model()
        qmodel = calibrate(quantize(model, policy(weight_bits=3, activation_bits=3)), [x]).eval()
        path = export_integer(qmodel, tmp_path_factory.mktemp("fuzz") / "export", {"arch": "net"})
        files.insert(0, {file.name: file.read_bytes() for file in path.iterdir()})
    imodel = load_integer(path, model)
    assert torch.equal(imodel(x), qmodel(x))
    return *files, model, x, imodel.state_dict(), imodel(x)


# Bytes.


def span(rng: random.Random, data: bytes) -> tuple[int, int]:
    """The two ends of a range of up to 64 bytes."""
    start = rng.randrange(len(data))
    return start, min(len(data), start + rng.randint(1, 64))


def flip_bit(rng, data, other):
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def set_byte(rng, data, other):
    data[rng.randrange(len(data))] = rng.choice([*b'0179.-eE+[]{}",: \n\\tfnN', 0, 255])


def truncate(rng, data, other):
    del data[rng.choice([0, 1, 7, 8, 9, rng.randrange(len(data)), len(data) - 1]) :]


def insert(rng, data, other):
    at = rng.choice([0, 8, len(data), rng.randrange(len(data))])
    data[at:at] = rng.choice([rng.randbytes(rng.randint(1, 16)), b" ", b"\n", b"0", b"-", b"[" * 5000, b"1" * 5000])


def duplicate(rng, data, other):
    start, end = span(rng, data)
    data[end:end] = data[start:end]


def remove(rng, data, other):
    start, end = span(rng, data)
    del data[start:end]


def exchange(rng, data, other):
    (a, b), (c, d) = sorted(span(rng, data) for _ in range(2))
    if b <= c:
        data[a:d] = data[c:d] + data[b:c] + data[a:b]


def take_from_the_other(rng, data, other):
    start, end = span(rng, data)
    data[start:end] = other[start:end]


def mutate_bytes(rng: random.Random, data: bytes, other: bytes) -> bytes:
    data = bytearray(data)
    operations = [flip_bit, set_byte, truncate, insert, duplicate, remove, exchange, take_from_the_other]
    for operation in rng.choices(operations, k=rng.choice([1, 1, 1, 2, 5])):
        if data:
            operation(rng, data, other)
    return bytes(data)


# JSON.

VALUES = [
    None, True, False, 0, 1, -1, 2, 3, 7, 8, 255, 2**31 - 1, 2**31, 2**63, 10**30, 10**400, 0.0, -0.0, 1.0, 0.5, -1.0,
    1e-50, 1e-40, 3e38, 1e300, float("nan"), float("inf"), -float("inf"), "", "a", "a\nb", "\ud800", "é", "..", "0", "1",
    "float32", "int64", "uint8", "Linear", "Conv2d", "uniform", "apot", "pot", "weight", [], [0], [[]], [1, 1], {},
    {"a": 1}, {"0": {}},
]  # fmt: skip


def places(value, place=()):
    """Every place in a JSON value, the outermost left out."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in children:
        yield (*place, key)
        yield from places(child, (*place, key))


def container_of(value, place):
    for key in place[:-1]:
        value = value[key]
    return value


def random_place(rng, value):
    """Each key is as likely, so that the few that matter most are met as often as those of many numbers."""
    by_key = {}
    for place in places(value):
        key = next((key for key in reversed(place) if isinstance(key, str)), "")
        by_key.setdefault(key, []).append(place)
    return rng.choice(by_key[rng.choice(sorted(by_key))])


def mutate_json(rng: random.Random, original):
    """A copy with one to three keys or values deleted, doubled, renamed, replaced, nudged or exchanged."""
    value = copy.deepcopy(original)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        place = random_place(rng, value)
        container, key = container_of(value, place), place[-1]
        kind = rng.choice(["delete", "double", "rename", "replace", "replace", "nudge", "nudge", "exchange"])
        if kind == "delete":
            del container[key]
        elif kind == "double":
            other = random_place(rng, value)
            target = container_of(value, other)
            copied = copy.deepcopy(container[key])
            target.insert(other[-1], copied) if isinstance(target, list) else target.update({f"{key}": copied})
        elif kind == "rename" and isinstance(container, dict):
            container[rng.choice(["", "a", f"{key}2", "name", "weight", "0.weight", "4.bias"])] = container.pop(key)
        elif kind == "nudge" and type(container[key]) in (int, float):
            container[key] = rng.choice([container[key] + 1, container[key] - 1, -container[key], container[key] * 2])
        elif kind == "exchange":
            other = random_place(rng, value)
            target = container_of(value, other)
            if place != other[: len(place)] and other != place[: len(other)]:
                container[key], target[other[-1]] = target[other[-1]], container[key]
        else:
            container[key] = rng.choice(VALUES)
    return value


def change_step(rng: random.Random, layer: dict) -> None:
    """To one that may well be."""
    layer[rng.choice(["weight", "input"])][rng.choice(["scale", "scale", "clip"])][0] *= rng.choice([2, 0.5])


def written(rng: random.Random, manifest: dict, sign: bool) -> bytes:
    if sign and isinstance(manifest, dict):
        manifest["manifest_sha256"] = checksum(manifest)
    return json.dumps(manifest, indent=rng.choice([None, 1, 4]), sort_keys=rng.random() < 0.2).encode()


def split(weights: bytes) -> tuple[dict, bytearray]:
    """The header and the data of a safetensors file."""
    data_at = 8 + int.from_bytes(weights[:8], "little")
    return json.loads(weights[8:data_at]), bytearray(weights[data_at:])


def with_weights(rng: random.Random, files: Files, header: object, data: bytes, describe: bool = False) -> Files:
    """The files with other weights and valid checksums; `describe` includes those of the tensors."""
    text = json.dumps(header).encode()
    weights = len(text).to_bytes(8, "little") + text + data
    manifest = json.loads(files[MANIFEST])
    manifest["weights_sha256"] = hashlib.sha256(weights).hexdigest()
    for name, described in manifest["tensors"].items() if describe else ():
        start, end = header[name]["data_offsets"]
        described["sha256"] = hashlib.sha256(data[start:end]).hexdigest()
    return {MANIFEST: written(rng, manifest, sign=True), WEIGHTS: weights}


# The kinds of mutations: from the files of an export and of another one to the files of a damaged one.


def bytes_of_the_manifest(rng, files, other):
    return files | {MANIFEST: mutate_bytes(rng, files[MANIFEST], other[MANIFEST])}


def bytes_of_the_weights(rng, files, other):
    return files | {WEIGHTS: mutate_bytes(rng, files[WEIGHTS], other[WEIGHTS])}


def bytes_of_the_weights_signed(rng, files, other):
    weights = mutate_bytes(rng, files[WEIGHTS], other[WEIGHTS])
    manifest = json.loads(files[MANIFEST]) | {"weights_sha256": hashlib.sha256(weights).hexdigest()}
    return {MANIFEST: written(rng, manifest, sign=True), WEIGHTS: weights}


def values_of_the_manifest(rng, files, other):
    manifest = json.loads(files[MANIFEST])
    change = rng.choice(["layout", "step", *["any"] * 6])
    if change == "step":
        change_step(rng, rng.choice(manifest["layers"]))
    return files | {MANIFEST: written(rng, mutate_json(rng, manifest) if change == "any" else manifest, sign=False)}


def values_of_the_manifest_signed(rng, files, other):
    return files | {MANIFEST: written(rng, mutate_json(rng, json.loads(files[MANIFEST])), sign=True)}


def values_of_a_layer_signed(rng, files, other):
    manifest = json.loads(files[MANIFEST])
    layer = rng.randrange(len(manifest["layers"]))
    if rng.random() < 0.1:
        change_step(rng, manifest["layers"][layer])
    else:
        manifest["layers"][layer] = mutate_json(rng, manifest["layers"][layer])
    return files | {MANIFEST: written(rng, manifest, sign=True)}


def header_signed(rng, files, other):
    header, data = split(files[WEIGHTS])
    return with_weights(rng, files, mutate_json(rng, header), data)


def header_and_manifest_signed(rng, files, other):
    header, data = split(files[WEIGHTS])
    manifest = json.loads(files[MANIFEST])
    name = rng.choice(sorted(header))
    change = rng.choice(["shape", "drop", "mutate"])
    if change == "shape":
        header[name]["shape"] = manifest["tensors"][name]["shape"] = [*header[name]["shape"], 1]
    elif change == "drop":
        header.pop(name), manifest["tensors"].pop(name)
    else:
        manifest, header = mutate_json(rng, manifest), mutate_json(rng, header)
    return with_weights(rng, files | {MANIFEST: json.dumps(manifest).encode()}, header, data)


def files_and_directories(rng, files, other):
    name = rng.choice([MANIFEST, WEIGHTS])
    return rng.choice([
        {key: content for key, content in files.items() if key != name},
        files | {name: other[name]},
        files | {name: None},
        files | {name: b""},
        files | {name: files[MANIFEST if name == WEIGHTS else WEIGHTS]},
        files | {rng.choice([".", "", "~"]) + rng.choice(["a", "manifest.json.", "weights.bin"]): rng.choice([b"", None])},
        {},
    ])  # fmt: skip


def contents_all_signed(rng, files, other):
    header, data = split(files[WEIGHTS])
    a, b = rng.sample(sorted(header), 2)
    start, end = header[a]["data_offsets"]
    change = rng.choice(["bit", "random", "zero", "ones", "other", "exchange"])
    if change == "bit":
        data[rng.randrange(start, end)] ^= 1 << rng.randrange(8)
    elif change == "exchange":  # of tensors that may differ in size
        header[a]["data_offsets"], header[b]["data_offsets"] = header[b]["data_offsets"], header[a]["data_offsets"]
    else:
        size = end - start
        data[start:end] = {
            "random": rng.randbytes(size), "zero": bytes(size), "ones": b"\xff" * size,
            "other": split(other[WEIGHTS])[1][start:end],
        }[change]  # fmt: skip
    return with_weights(rng, files, header, data, describe=True)


# The test.


def write(directory: Path, files: Files) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir()
    for name, content in files.items():
        (directory / name).mkdir() if content is None else (directory / name).write_bytes(content)


def weight_scales(manifest: bytes) -> list:
    return [layer["weight"]["scale"] for layer in json.loads(manifest)["layers"]]


def may_differ(mutate, files: Files, mutated: Files) -> bool:
    """Whether a mutated export that is not refused may be another network."""
    if mutate in (values_of_the_manifest_signed, values_of_a_layer_signed, header_and_manifest_signed):
        return weight_scales(mutated[MANIFEST]) != weight_scales(files[MANIFEST])
    return mutate is contents_all_signed


@pytest.mark.parametrize("mutate", [
    bytes_of_the_manifest, bytes_of_the_weights, bytes_of_the_weights_signed, values_of_the_manifest,
    values_of_the_manifest_signed, values_of_a_layer_signed, header_signed, header_and_manifest_signed,
    files_and_directories, contents_all_signed,
], ids=lambda mutate: mutate.__name__)  # fmt: skip
@pytest.mark.parametrize("count", COUNTS)
def test_a_mutated_export_is_refused_or_is_the_same_network(count, mutate, exports, tmp_path):
    files, other, model, x, state, expected = exports
    outcomes = {"refused": 0, "equal": 0, "different": 0}
    for seed in range(count):
        rng = random.Random(seed)
        while (mutated := mutate(rng, files, other)) == files:
            pass
        write(tmp_path / "export", mutated)
        try:
            imodel = load_integer(tmp_path / "export", model)
        except ApotfxError as error:
            assert str(error).isprintable(), f"seed {seed}: {error!r}"
            outcomes["refused"] += 1
            continue
        y = imodel(x)
        equal = all(torch.equal(tensor, state[name]) for name, tensor in imodel.state_dict().items())
        equal = equal and torch.equal(y, expected)
        assert equal or may_differ(mutate, files, mutated), f"seed {seed}: another network"
        outcomes["equal" if equal else "different"] += 1
    print(mutate.__name__, outcomes)
    assert outcomes["refused"] > count // 3, outcomes  # the mutations are no trifles
