import errno
import hashlib
import json
import math
import os
import shutil
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import MIXED, Net, check_refused, edit_manifest, policy, trained
from torch import nn

from apotfx import ApotfxError, BitPolicy, calibrate, quantize
from apotfx.integer.format import _describe_tensor, export_integer, inspect_integer, read_integer
from apotfx.integer.load import load_integer
from apotfx.reproducible import folded_batch_norm


def with_clips(*args):
    """Quantized with the paper's clips, as no training is needed."""
    return calibrate(quantize(*args), [], method="paper")


def test_what_is_in_the_directory(tmp_path):
    qmodel, _ = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "new" / "export")
    assert path == tmp_path / "new" / "export"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "weights.safetensors"]
    assert [file.name for file in path.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_size_is_what_the_bits_say(bits, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.Flatten(), nn.Linear(28, 10))
    qmodel = with_clips(model, policy(scheme="uniform", weight_bits=bits, activation_bits=8))
    tensors = safetensors.torch.load_file(export_integer(qmodel, tmp_path / "export") / "weights.safetensors")
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()} == {
        "0.weight_codes": (torch.uint8, -(-7 * 27 * bits // 8)),
        "2.weight_codes": (torch.uint8, -(-280 * bits // 8)),
        "2.bias": (torch.float32, 10),
    }  # fmt: skip


def test_read_integer_gives_the_integers_and_the_float_state(tmp_path):
    qmodel, _ = trained(MIXED)
    manifest, tensors = read_integer(export_integer(qmodel, tmp_path / "export"))
    state = {key: value for key, value in qmodel.state_dict().items() if not key.startswith("bn")}
    for name in ("bn1", "bn2"):
        state |= zip((f"{name}.multiplier", f"{name}.offset"), folded_batch_norm(qmodel.get_submodule(name)))
    assert tensors.keys() == {key for key in state if "_quantizer." not in key}
    quantized = {"conv1.weight": 8, "conv3.weight": 5, "fc.weight": 4}
    for key, tensor in tensors.items():
        if key in quantized:
            n, _ = qmodel.get_submodule(key.removesuffix(".weight")).integer_weight()
            assert not tensor.is_floating_point() and torch.equal(tensor.float(), n)
        else:
            assert torch.equal(tensor, state[key])
    assert [layer["name"] for layer in manifest["layers"]] == ["conv1", "conv3", "pointwise", "fc"]


def test_nothing_is_pickled(tmp_path):
    path = export_integer(trained(MIXED)[0], tmp_path / "export")
    json.loads((path / "manifest.json").read_bytes())
    assert safetensors.torch.load_file(path / "weights.safetensors")


def test_an_existing_path_is_left_alone(tmp_path):
    qmodel, _ = trained(policy())
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "file", "link"):
        with pytest.raises(ApotfxError, match=f"export .*/{name}: exists already; choose another path or remove it"):
            export_integer(qmodel, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "directory").iterdir())


class WithAuxiliaryHead(nn.Module):
    """Has a second head in training, and is kept whole."""

    def __init__(self):
        super().__init__()
        self.fc, self.head, self.auxiliary = nn.Linear(4, 4), nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x):
        x = torch.relu(self.fc(x))
        if x.sum() > 1e9:
            raise ValueError("too large")
        return (self.head(x), self.auxiliary(x)) if self.training else self.head(x)


@pytest.mark.parametrize("around", [nn.Identity, lambda: nn.Linear(4, 4)], ids=["whole", "inside"])
def test_a_head_that_no_data_reached_is_written_in_float(around, tmp_path):
    model, x = nn.Sequential(around(), WithAuxiliaryHead()), torch.randn(6, 4)
    with pytest.warns(UserWarning, match="layers 1.auxiliary: no batch of the calibration reached them"):
        qmodel = calibrate(quantize(model, policy()).eval(), [x])
    with pytest.warns(UserWarning, match="export: layers 1.auxiliary never saw data; they are written in float") as caught:
        path = export_integer(qmodel, tmp_path / "export")
    assert caught[0].filename == __file__
    manifest, tensors = read_integer(path)
    assert not any(layer["name"] == "1.auxiliary" for layer in manifest["layers"])
    assert torch.equal(tensors["1.auxiliary.weight"], model[1].auxiliary.weight)
    imodel = load_integer(path, model)
    assert torch.equal(imodel(x), qmodel(x))
    qmodel.train()(x)
    assert qmodel.get_submodule("1.auxiliary").input_quantizer is not None
    assert len(read_integer(export_integer(qmodel, tmp_path / "trained"))[0]["layers"]) == len(manifest["layers"]) + 1


def with_value(name, value):
    qmodel, _ = trained(policy())
    with torch.no_grad():
        qmodel.state_dict()[name].view(-1)[0] = value
    return qmodel


@pytest.mark.parametrize("make, message", [
    (lambda: Net(), "export: the model has no quantized layer; pass what apotfx.quantize returned"),
    (lambda: quantize(Net(), BitPolicy.default(32)), "export: the model has no quantized layer"),
    (lambda: with_clips(Net(), policy()).conv1, "export: the model has no quantized layer"),
    (lambda: with_clips(Net(), policy()).double(),
     r"export: conv2.bias is torch.float64, expected torch.float32; call model.float\(\) first"),
    (lambda: with_clips(Net(), policy()).bfloat16(), "is torch.bfloat16, expected torch.float32"),
    (lambda: with_value("conv1.weight", float("nan")), "export: conv1.weight is not finite"),
    (lambda: with_value("fc.bias", float("inf")), "export: fc.bias is not finite"),
    (lambda: with_value("conv3.input_quantizer.clip", float("nan")),
     "export: conv3.input_quantizer.clip is not finite"),
    (lambda: with_value("conv3.weight_quantizer.clip", float("inf")),
     "export: conv3.weight_quantizer.clip is not finite"),
    (lambda: quantize(Net(), policy()), r"export: the clips of conv1, .* never saw data; calibrate the network or train"),
], ids=[
    "float", "all-float", "layer", "double", "bfloat16", "weight", "bias", "input-clip", "weight-clip", "no-data",
])  # fmt: skip
def test_what_cannot_be_exported_is_refused(make, message, tmp_path):
    with pytest.raises(ApotfxError, match=message):
        export_integer(make(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("owner, function", [(os, "fsync"), (Path, "rename")], ids=["write", "rename"])
def test_a_failed_export_leaves_nothing_behind(owner, function, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    qmodel, _ = trained(policy())
    with monkeypatch.context() as patch:
        patch.setattr(owner, function, fail)
        with pytest.raises(OSError, match="disk full"):
            export_integer(qmodel, tmp_path / "export")
    assert not list(tmp_path.iterdir())
    export_integer(qmodel, tmp_path / "export")


CHECKSUM = "weights.safetensors: does not fit manifest.json .checksum.; it was altered, truncated or"


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("position", [0, 100, -1], ids=["size", "header", "data"])
def test_an_altered_weights_file_is_refused(position, export, exported):
    flip(export / "weights.safetensors", position)
    check_refused(export, exported[1], CHECKSUM)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_weights_file_is_refused(size, export, exported):
    file = export / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    check_refused(export, exported[1], CHECKSUM)


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_a_missing_file_is_refused(name, export, exported):
    (export / name).unlink()
    message = f"{name}: cannot be read .No such file or directory.; pass a directory that export_integer"
    check_refused(export, exported[1], message)


def test_a_missing_directory_is_refused(tmp_path, exported):
    check_refused(tmp_path / "absent", exported[1], "absent/manifest.json: cannot be read")


@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_files_of_two_exports_are_refused(name, export, exported):
    shutil.copy(exported[2] / name, export / name)
    check_refused(export, exported[1], CHECKSUM)


@pytest.mark.parametrize("name", ["extra", ".hidden", "directory/", "manifest.json.bak"])
def test_an_additional_file_is_refused(name, export, exported):
    (export / name).mkdir() if name.endswith("/") else (export / name).touch()
    message = f"export/{name.rstrip('/')}: is not part of an export, which is manifest.json and weights.safetensors"
    check_refused(export, exported[1], message)


def make_directory(path):
    path.mkdir()


def make_link_to_nowhere(path):
    path.symlink_to("nowhere")


def make_pipe(path):
    os.mkfifo(path)


def make_huge(path):
    with path.open("wb") as file:
        file.truncate(2**32)  # without taking the space


@pytest.mark.parametrize("make, message", [
    (make_directory, "is not a file; expected one to read"), (make_pipe, "is not a file; expected one to read"),
    (make_link_to_nowhere, "cannot be read .No such file or directory."),
    (make_huge, "has 4294967296 bytes, expected at most [0-9]+"),
], ids=["directory", "pipe", "link", "huge"])  # fmt: skip
@pytest.mark.parametrize("name", ["manifest.json", "weights.safetensors"])
def test_something_else_in_the_place_of_a_file_is_refused(name, make, message, export, exported):
    (export / name).unlink()
    make(export / name)
    check_refused(export, exported[1], f"{name}: {message}; pass a directory that export_integer wrote")


@pytest.mark.parametrize("function, message", [
    ("open", "manifest.json: cannot be read .Permission denied.; pass a directory"),
    ("scandir", "export: cannot be listed .Permission denied.; allow it to be read"),
])  # fmt: skip
def test_what_may_not_be_read_is_refused(function, message, export, exported, monkeypatch):
    def deny(path, *flags):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, function, deny)
    check_refused(export, exported[1], message)


def edit_weights(path, change, describe=False):
    """Apply `change` to the header and the data of the weights of the export `path`, which keeps valid checksums.

    `describe` makes the manifest describe what the tensors have become.
    """
    content = (path / "weights.safetensors").read_bytes()
    data_at = 8 + int.from_bytes(content[:8], "little")
    header, data = json.loads(content[8:data_at]), bytearray(content[data_at:])
    change(header, data)
    header = json.dumps(header).encode()
    content = len(header).to_bytes(8, "little") + header + data
    (path / "weights.safetensors").write_bytes(content)

    def sign(manifest):
        manifest["weights_sha256"] = hashlib.sha256(content).hexdigest()
        if describe:
            manifest["tensors"] = {k: _describe_tensor(t) for k, t in safetensors.torch.load(content).items()}

    edit_manifest(path, sign, sign=True)


def lengthen(header, data):
    start, end = header["fc.bias"]["data_offsets"]
    header["fc.bias"]["data_offsets"] = [start, end + 4]


def swap(header, data):
    header["bn1.offset"], header["bn1.multiplier"] = header["bn1.multiplier"], header["bn1.offset"]


@pytest.mark.parametrize("change, message", [
    (lengthen, "fc.bias does not lie where the one before it ends, or has another size; export the model again"),
    (lambda header, data: header["fc.bias"].update(shape=[2**40]), "fc.bias does not lie where the one before it ends, or has another size; .*"),
    (lambda header, data: header["fc.bias"].update(shape=[2**62, 2**62]), "fc.bias is .*'shape': .*; .*"),
    (lambda header, data: header["fc.bias"].update(shape=[-3]), r"fc.bias is .*\[-3\].*; .*"),
    (lambda header, data: header["fc.bias"].update(dtype="F33"), "fc.bias is .*F33.*; .*"),
    (lambda header, data: header["fc.bias"].update(dtype="F8_E8M0", shape=[12]), "fc.bias is .*F8_E8M0.*; .*"),
    (lambda header, data: header["fc.bias"].pop("dtype"), "fc.bias is {.*"),
    (lambda header, data: data.extend(b"0000"), "[0-9]+ bytes of tensors, the header says [0-9]+; .*"),
    (lambda header, data: data.clear(), "0 bytes of tensors, the header says [0-9]+; .*"),
    (lambda header, data: header["fc.bias"].update(dtype="I32"), r"fc.bias is int32 \[3\], manifest.json says float32 \[3\]; .*"),
    (lambda header, data: header["fc.bias"].update(shape=[3, 1]), r"fc.bias is .*\[3, 1\].*, manifest.json says .*\[3\]"),
    (lambda header, data: header.update({"a\nb": header.pop("fc.bias")}),
     r"a\\nb is float32 \[3\], manifest.json says absent; export the model again"),
    (swap, "bn1.multiplier was altered .checksum.; export the model again"),
], ids=[
    "longer", "large", "overflow", "negative", "unknown-type", "rare-type", "no-type", "more-data", "no-data", "type", "shape",
    "name", "swapped",
])  # fmt: skip
def test_a_header_that_lies_is_refused_though_the_checksums_fit(change, message, export, exported):
    edit_weights(export, change)
    check_refused(export, exported[1], f"weights.safetensors: {message}")


@pytest.mark.parametrize("size", [0, 7, 8, 9, 2**40])
def test_a_file_without_a_header_is_refused_though_the_checksums_fit(size, export, exported):
    content = size.to_bytes(8, "little")[:size]
    (export / "weights.safetensors").write_bytes(content)
    edit_manifest(export, lambda m: m.update(weights_sha256=hashlib.sha256(content).hexdigest()), sign=True)
    check_refused(export, exported[1], "weights.safetensors: truncated, or not a safetensors file; export the model again")


def set_unused_bits(header, data):
    data[header["fc.weight_codes"]["data_offsets"][1] - 1] |= 0x80


def set_not_a_number(header, data):
    start, end = header["fc.bias"]["data_offsets"]
    data[start:end] = struct.pack("3f", 0, math.nan, 0)


@pytest.mark.parametrize("change, message", [
    (set_unused_bits, "fc.weight_codes sets unused bits or the sign of a zero; export the model again"),
    (set_not_a_number, "fc.bias is not finite; export the model again"),
], ids=["bits", "nan"])  # fmt: skip
def test_contents_that_no_export_has_are_refused_though_all_checksums_fit(change, message, tmp_path):
    """With 3 times 3 codes of 3 bits, 5 bits of the last byte are unused."""
    model = nn.Sequential()
    model.add_module("relu", nn.ReLU())
    model.add_module("fc", nn.Linear(3, 3))
    path = export_integer(with_clips(model, policy(weight_bits=3, activation_bits=3)), tmp_path / "export")
    load_integer(path, model)
    edit_weights(path, change, describe=True)
    check_refused(path, model, f"weights.safetensors: {message}")


@pytest.fixture
def twins(tmp_path):
    """An export with two layers of the same kind and size, and its float model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return export_integer(with_clips(model, policy()), tmp_path / "export"), model


def test_layers_swapped_in_the_weights_are_named(twins):
    def swap_layers(header, data):
        header["0.weight_codes"], header["2.weight_codes"] = header["2.weight_codes"], header["0.weight_codes"]

    edit_weights(twins[0], swap_layers)
    check_refused(*twins, "weights.safetensors: 0.weight_codes was altered .checksum.; export the model again")
    problems = inspect_integer(twins[0])[2]
    assert [problem.partition("tensors: ")[2].split()[0] for problem in problems] == [
        "0.weight_codes",
        "2.weight_codes",
    ]


def test_layers_swapped_in_the_manifest_are_named(twins):
    def swap_layers(manifest):
        first, second = manifest["layers"]
        first["name"], second["name"] = second["name"], first["name"]

    edit_manifest(twins[0], swap_layers, sign=True)
    with pytest.raises(ApotfxError, match=r"the input of layer 0 is clamped to \[0.0, None\], in the model to None"):
        load_integer(*twins)


def test_an_altered_file_can_be_inspected(export, exported):
    flip(export / "weights.safetensors", -1)
    _, tensors, problems = inspect_integer(export)
    _, original = read_integer(exported[0])
    differing = {name for name, tensor in tensors.items() if not torch.equal(tensor, original[name])}
    assert len(problems) == 2 and CHECKSUM.partition(" .check")[0] in problems[0]
    assert problems[1].endswith("was altered (checksum); export the model again") and len(differing) == 1
    assert tensors.keys() == original.keys() and differing.pop() in problems[1]


def test_metadata_go_into_the_manifest(tmp_path):
    path = export_integer(trained(policy())[0], tmp_path / "export", {"arch": "net", "sizes": (1, 2), 3: None})
    assert read_integer(path)[0]["metadata"] == {"arch": "net", "sizes": [1, 2], "3": None}


@pytest.mark.parametrize("metadata, message", [
    ({"a": math.nan}, "export: the metadata are not JSON .*; pass texts, finite numbers and such"),
    ({"a": torch.zeros(1)}, "export: the metadata are not JSON"),
    ({"a": 10**30}, "export: no reader would take the manifest, not JSON .the number 10{19}.; pass simpler metadata"),
    ({"a": json.loads("[" * 40 + "]" * 40)}, "export: no reader would take the manifest, not JSON .nested more than 32"),
    (["a"], r'export: metadata is \["a"\], expected an object, whatever the exporting program wanted to keep'),
], ids=["nan", "tensor", "long", "deep", "list"])  # fmt: skip
def test_metadata_that_are_no_json_are_refused(metadata, message, tmp_path):
    with pytest.raises(ApotfxError, match=message):
        export_integer(trained(policy())[0], tmp_path / "export", metadata)
    assert not list(tmp_path.iterdir())


def test_an_infinite_setting_of_a_module_is_exported(tmp_path):
    """JSON has no infinity."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Hardtanh(-1, math.inf), nn.Linear(4, 2))
    path = export_integer(with_clips(model, policy()), tmp_path / "export")
    assert "Infinity" not in (path / "manifest.json").read_text()
    load_integer(path, model)
    with pytest.raises(
        ApotfxError, match=r"_1 \(functional.hardtanh\) where the model has _1 \(functional.hardtanh\), or with other settings"
    ):
        load_integer(path, nn.Sequential(model[0], nn.Hardtanh(-1, 6), model[2]))
