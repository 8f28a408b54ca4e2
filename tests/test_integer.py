import json
import re
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from helpers import LEVEL_SETS, level_set_id
from torch import nn

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule, calibrate, quantize
from apotfx.integer.codes import pack_codes, storage_dtype, unpack_codes
from apotfx.integer.format import _manifest_checksum, export_integer, read_integer
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.load import load_integer
from apotfx.layers import QuantLayer

every_level_set = pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)


# Codes.


def all_levels(levels):
    ints = torch.tensor(levels.ints)
    return torch.cat([-ints.flip(0)[:-1], ints]) if levels.signed else ints


@every_level_set
@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (4, 3, 3, 3), (0,)], ids=str)
def test_codes_round_trip(levels, shape):
    choice = torch.randint(len(all_levels(levels)), shape, generator=torch.Generator().manual_seed(0))
    n = all_levels(levels)[choice]
    codes = pack_codes(n.float(), levels)
    assert codes.dtype == torch.uint8 and codes.shape == (-(-n.numel() * levels.bits // 8),)
    back = unpack_codes(codes, levels, torch.Size(shape))
    assert back.dtype == storage_dtype(levels) and torch.equal(back.long(), n)


@every_level_set
def test_every_level_has_its_own_code(levels):
    n = all_levels(levels)
    assert torch.equal(unpack_codes(pack_codes(n, levels), levels, n.shape).long(), n)
    codes = {int.from_bytes(pack_codes(level.reshape(1), levels).numpy().tobytes(), "little") for level in n}
    assert len(codes) == len(n) and max(codes) < 2**levels.bits


def test_the_layout_of_codes():
    """The index in the low bits, the sign above it, the first code in the lowest bits of the first byte."""
    n = torch.tensor([[0, 1, -1], [4, -10, 10]])  # indices 0 1 1 4 7 7 in 0 1 2 3 4 6 8 10
    assert [f"{byte:08b}" for byte in pack_codes(n, LevelSet("apot", 4)).tolist()] == [
        "00010000",
        "01001001",
        "01111111",
    ]
    assert [f"{byte:08b}" for byte in pack_codes(torch.tensor([1, -1, 0, 1, 1]),
        LevelSet("uniform", 2)).tolist()] == [
        "01001101", "00000001",
    ]  # fmt: skip


def test_codes_do_not_depend_on_the_memory_format():
    n = torch.randint(-7, 8, (4, 3, 5, 2), generator=torch.Generator().manual_seed(0)).float()
    levels = LevelSet("uniform", 4)
    assert torch.equal(pack_codes(n.contiguous(memory_format=torch.channels_last), levels), pack_codes(n, levels))


@every_level_set
def test_the_storage_type_is_the_smallest_that_holds_the_levels(levels):
    candidates = [torch.int8, torch.int16] if levels.signed else [torch.uint8, torch.int16]
    large_enough = [dtype for dtype in candidates if torch.iinfo(dtype).max >= levels.max]
    assert storage_dtype(levels) == large_enough[0]


@pytest.mark.parametrize("levels, expected", [
    (LevelSet("apot", 6), torch.int8), (LevelSet("apot", 5, False), torch.uint8),
    (LevelSet("apot", 6, False), torch.int16),
    (LevelSet("uniform", 8), torch.int8), (LevelSet("uniform", 8, False), torch.uint8),
    (LevelSet("pot", 4), torch.int8),
    (LevelSet("pot", 5), torch.int16),
], ids=str)  # fmt: skip
def test_storage_types_that_matter(levels, expected):
    assert storage_dtype(levels) == expected


# Models.


class Net(nn.Module):
    """Convolutions of all kinds of padding, a branch, batch norms, a float layer and a linear layer."""

    def __init__(self, padding_mode="circular", classes=3, bias=True, stride=1, width=6):
        super().__init__()
        self.conv1 = nn.Conv2d(2, width, 3, padding=1, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, 6, 3, padding="same", groups=2)
        self.conv3 = nn.Conv2d(6, 6, 3, padding=1, padding_mode=padding_mode)
        self.pointwise = nn.Conv2d(6, 4, 1, stride=2)
        self.bn2 = nn.BatchNorm2d(4, affine=False)
        self.fc = nn.Linear(4, classes, bias=bias)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        x = torch.relu(self.conv3(self.conv2(x)) + x)
        return self.fc(torch.relu(self.bn2(self.pointwise(x))).mean((2, 3)))


class Conv1dNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv1d(2, 4, 3, padding=1), nn.ReLU(),
            nn.Conv1d(4, 4, 3, padding="same", dilation=2), nn.Flatten(),
                         nn.Linear(32, 3))  # fmt: skip


class Conv3dNet(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Conv3d(2, 4, 3, padding=1), nn.BatchNorm3d(4), nn.ReLU(), nn.Conv3d(4, 3, 3),
            nn.Flatten(),
                         nn.Linear(24, 3))  # fmt: skip


INPUT_SHAPES = {Net: (5, 2, 8, 8), Conv1dNet: (5, 2, 8), Conv3dNet: (5, 2, 4, 4, 4)}
MIXED = BitPolicy((
    Rule(name="conv1", scheme="uniform", weight_bits=8, activation_bits=32),
    Rule(name="conv2", scheme="float"),
    Rule(name="conv3", scheme="pot", weight_bits=5, activation_bits=4, granularity="channel",
        normalization="none"),
    Rule(name="pointwise", scheme="apot", weight_bits=32, activation_bits=6),
    Rule(normalization="standardize"),
))  # fmt: skip


def data(model_type=Net):
    return torch.randn(INPUT_SHAPES[model_type], generator=torch.Generator().manual_seed(1))


def trained(policy, model_type=Net, **options):
    """A quantized network, calibrated and trained for a step, in evaluation mode; and its float model."""
    torch.manual_seed(0)
    model = model_type(**options)
    qmodel = calibrate(quantize(model, policy), [data(model_type)])
    optimizer = torch.optim.SGD(qmodel.parameters(), lr=0.01)
    qmodel(data(model_type)).square().sum().backward()
    optimizer.step()
    return qmodel.eval(), model


def policy(**rule):
    return BitPolicy((Rule(**rule),))


def check_equal(qmodel, imodel, x):
    with torch.no_grad():
        expected, y = qmodel(x), imodel(x)
    assert torch.equal(y, expected) and expected.isfinite().all() and len(expected.unique()) > 1


def export_and_compare(tmp_path, qmodel, model, x):
    path = export_integer(qmodel, tmp_path / "export")
    imodel = load_integer(path, model)
    check_equal(qmodel, imodel, x)
    return imodel


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
@pytest.mark.parametrize("scheme", ["apot", "uniform", "pot"])
def test_the_loaded_network_equals_the_exported_one(scheme, bits, tmp_path):
    widest = {"pot": 4}.get(scheme, 8)  # unsigned inputs of pot have at most 4 bits
    qmodel, model = trained(policy(scheme=scheme, weight_bits=min(bits, widest + 1), activation_bits=min(bits, widest)))
    export_and_compare(tmp_path, qmodel, model, data())


@pytest.mark.parametrize("model_type", INPUT_SHAPES)
@pytest.mark.parametrize("rule", [
    {}, {"granularity": "channel"}, {"normalization": "none", "granularity": "channel"},
    {"normalization": "standardize"},
    {"scheme": "uniform", "weight_bits": 8, "activation_bits": 8},
    {"scheme": "apot", "weight_bits": 8, "activation_bits": 8},
    {"activation_bits": 32}, {"weight_bits": 32}, {"granularity": "channel", "activation_bits": 32},
], ids=lambda rule: "-".join(map(str, rule.values())) or "default")  # fmt: skip
def test_every_kind_of_layer_and_rule(model_type, rule, tmp_path):
    qmodel, model = trained(policy(**rule), model_type)
    export_and_compare(tmp_path, qmodel, model, data(model_type))


def test_a_mixed_policy(tmp_path):
    qmodel, model = trained(MIXED)
    imodel = export_and_compare(tmp_path, qmodel, model, data())
    types = {name: type(module) for name, module in imodel.named_modules()}
    integers = {name for name, kind in types.items() if kind is IntegerLayer}
    assert integers == {"conv1", "conv3", "pointwise", "fc"} and types["conv2"] is nn.Conv2d
    assert [imodel.get_submodule(name).weight.dtype for name in ("conv1", "conv3", "pointwise", "fc")] == [
        torch.int8, torch.int16, torch.float32, torch.int8,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "options", [{"bias": False}, {"padding_mode": "reflect"}, {"stride": 2}], ids=lambda o: next(iter(o))
)
def test_options_of_layers(options, tmp_path):
    qmodel, model = trained(policy(), **options)
    export_and_compare(tmp_path, qmodel, model, data())


def test_other_threads_batches_and_layouts_give_the_same_bits(tmp_path):
    qmodel, model = trained(policy(scheme="uniform", weight_bits=8, activation_bits=8, granularity="channel"))
    imodel = export_and_compare(tmp_path, qmodel, model, data())
    x = data()
    with torch.no_grad():
        before = [layer.clone() for layer in _outputs(imodel, x)]
        assert len(before) == 5
        last = torch.channels_last
        for y in (_outputs(imodel, x.contiguous(memory_format=last)), _outputs(imodel.to(memory_format=last), x)):
            assert torch.equal(y[0], before[0])
    threads = torch.get_num_threads()
    try:
        for torch_threads in (1, 2):
            torch.set_num_threads(torch_threads)
            check_equal(qmodel, imodel, x)
    finally:
        torch.set_num_threads(threads)


def _outputs(model, x):
    """The outputs of all integer layers."""
    outputs, layers = [], [module for module in model.modules() if isinstance(module, IntegerLayer)]
    hooks = [layer.register_forward_hook(lambda *args: outputs.append(args[2])) for layer in layers]
    model(x)
    for hook in hooks:
        hook.remove()
    return outputs


def test_an_export_in_training_mode_is_the_same(tmp_path):
    qmodel, model = trained(MIXED)
    path = export_integer(qmodel.train(), tmp_path / "export")
    assert qmodel.training
    check_equal(qmodel.eval(), load_integer(path, model), data())


def test_dropout_that_depends_on_the_mode_is_off_after_loading(tmp_path):
    class Dropping(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(nn.functional.dropout(self.a(x), training=self.training))

    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    for name, training in (("training", True), ("evaluation", False)):
        model = Dropping().train(training)
        qmodel = calibrate(quantize(model, policy()), [x]).eval()
        check_equal(qmodel, load_integer(export_integer(qmodel, tmp_path / name), model), x)


def test_tied_float_weights_are_exported(tmp_path):
    def make():
        model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
        model[2].weight = model[0].weight
        return model

    x = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    qmodel = calibrate(quantize(make(), policy(name="4")), [x]).eval()
    export_and_compare(tmp_path, qmodel, make(), x)


def test_weights_in_channels_last_are_exported(tmp_path):
    qmodel, model = trained(policy())
    expected = qmodel(data())
    path = export_integer(qmodel.to(memory_format=torch.channels_last), tmp_path / "export")
    assert torch.equal(load_integer(path, model)(data()), expected)


def test_loading_leaves_the_model_and_its_values_alone(tmp_path):
    qmodel, model = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "export")
    torch.manual_seed(9)
    other = Net()
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    imodel = load_integer(path, other)
    check_equal(qmodel, imodel, data())
    assert all(torch.equal(tensor, before[name]) for name, tensor in other.state_dict().items())
    assert other.training and type(other.conv1) is nn.Conv2d
    assert not imodel.training and not any(parameter.requires_grad for parameter in imodel.parameters())
    assert str(load_integer(str(path), other)) == str(imodel)


# Files.


def test_what_is_in_the_directory(tmp_path):
    qmodel, _ = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "new" / "export")
    assert path == tmp_path / "new" / "export"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "weights.safetensors"]
    assert [file.name for file in path.parent.iterdir()] == ["export"]


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_size_is_what_the_bits_say(bits, tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 7, 3, bias=False), nn.Flatten(), nn.Linear(28, 10))
    qmodel = quantize(model, policy(scheme="uniform", weight_bits=bits, activation_bits=8))
    tensors = safetensors.torch.load_file(export_integer(qmodel, tmp_path / "export") / "weights.safetensors")
    assert {name: (tensor.dtype, tensor.numel()) for name, tensor in tensors.items()} == {
        "0.weight_codes": (torch.uint8, -(-7 * 27 * bits // 8)),
        "2.weight_codes": (torch.uint8, -(-280 * bits // 8)),
        "2.bias": (torch.float32, 10),
    }  # fmt: skip


def test_read_integer_gives_the_integers_and_the_float_state(tmp_path):
    qmodel, _ = trained(MIXED)
    manifest, tensors = read_integer(export_integer(qmodel, tmp_path / "export"))
    state = qmodel.state_dict()
    assert tensors.keys() == {key for key in state if "_quantizer." not in key}
    quantized = {"conv1.weight": 8, "conv3.weight": 5, "fc.weight": 4}
    for key, tensor in tensors.items():
        if key in quantized:
            n, _ = qmodel.get_submodule(key.removesuffix(".weight")).integer_weight()
            assert not tensor.is_floating_point() and torch.equal(tensor.float(), n)
        else:
            assert torch.equal(tensor, state[key])
    assert [layer["name"] for layer in manifest["layers"]] == ["conv1", "conv3", "pointwise", "fc"]


def test_the_manifest_describes_a_layer(tmp_path):
    qmodel, _ = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "export")
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("apotfx-integer", 3)
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    conv = layers["conv3"]
    quantizer = qmodel.conv3.weight_quantizer
    assert conv["weight"] == {
        "scheme": "pot", "bits": 5, "signed": True, "dtype": "int16",
        "levels": [0, *(2**e for e in range(15))],
        "shift_add_terms": [[], *([e] for e in range(15))], "clip": quantizer.clip.flatten().tolist(),
        "scale": qmodel.conv3.integer_weight()[1].flatten().tolist(),
    }  # fmt: skip
    assert conv["input"]["signed"] is True
    assert conv["input"]["clip"] == [qmodel.conv3.input_quantizer.clip.item()]
    assert {key: conv[key] for key in ("type", "shape", "bias", "pad", "pad_mode", "accumulator_bound")} == {
        "type": "Conv2d", "shape": [6, 6, 3, 3], "bias": True, "pad": [1, 1, 1, 1], "pad_mode": "circular",
        "accumulator_bound": 54 * 2**14 * 2**6,
    }  # fmt: skip
    assert conv["operator"] == {
        "kind": "Convolution",
        "stride": [1, 1],
        "padding": [0, 0],
        "dilation": [1, 1],
        "groups": 1,
    }
    assert layers["conv1"]["input"] is None and layers["pointwise"]["weight"] is None
    assert layers["fc"]["operator"]["kind"] == "MatrixProduct" and layers["fc"]["input"]["signed"] is False
    assert "accumulator_bound" not in layers["conv1"] and "batch_norm" not in conv


def test_the_manifest_holds_the_batch_norm_behind_a_layer(tmp_path):
    qmodel, _ = trained(policy())
    manifest, _ = read_integer(export_integer(qmodel, tmp_path / "export"))
    layers = {layer["name"]: layer for layer in manifest["layers"]}
    x = torch.randn(5, 6, 3, 3, generator=torch.Generator().manual_seed(0))
    for name, bn_name, channels in (("conv1", "bn1", 6), ("pointwise", "bn2", 4)):
        entry = layers[name]["batch_norm"]
        multiplier, bias = (torch.tensor(entry[key]).reshape(-1, 1, 1) for key in ("multiplier", "bias"))
        expected = qmodel.get_submodule(bn_name)(x[:, :channels])
        assert entry["name"] == bn_name
        torch.testing.assert_close(x[:, :channels] * multiplier + bias, expected, rtol=1e-5, atol=1e-6)
    assert [name for name, layer in layers.items() if "batch_norm" in layer] == ["conv1", "pointwise"]


@pytest.mark.parametrize("second", [True, False], ids=["two-batch-norms", "one-call-without"])
def test_a_shared_layer_has_no_single_batch_norm(second, tmp_path):
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.bn1, self.bn2 = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            x = self.layer(torch.relu(self.bn1(self.layer(x))))
            return self.bn2(x) if second else x

    path = export_integer(quantize(Shared(), policy()), tmp_path / "export")
    assert "batch_norm" not in read_integer(path)[0]["layers"][0]


def test_nothing_is_pickled(tmp_path):
    path = export_integer(trained(MIXED)[0], tmp_path / "export")
    json.loads((path / "manifest.json").read_bytes())
    assert safetensors.torch.load_file(path / "weights.safetensors")


# Refusals of an export.


def test_an_existing_path_is_left_alone(tmp_path):
    qmodel, _ = trained(policy())
    (tmp_path / "directory").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("directory", "file", "link"):
        with pytest.raises(ApotfxError, match=f"export .*/{name}: exists already; choose a new directory or remove it"):
            export_integer(qmodel, tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory", "file", "link"]
    assert (tmp_path / "file").read_text() == "mine" and not list((tmp_path / "directory").iterdir())


def with_value(name, value):
    qmodel, _ = trained(policy())
    with torch.no_grad():
        qmodel.state_dict()[name].view(-1)[0] = value
    return qmodel


@pytest.mark.parametrize("make, message", [
    (lambda: Net(), "export: the model has no quantized layer; pass what apotfx.quantize returned"),
    (lambda: quantize(Net(), BitPolicy.default(32)), "export: the model has no quantized layer"),
    (lambda: quantize(Net(), policy()).conv1, "export: the model has no quantized layer"),
    (lambda: quantize(Net(), policy()).double(),
     r"export: bn1.weight is torch.float64, expected torch.float32; call model.float\(\) first"),
    (lambda: quantize(Net(), policy()).bfloat16(), "is torch.bfloat16, expected torch.float32"),
    (lambda: with_value("conv1.weight", float("nan")), "export: conv1.weight is not finite"),
    (lambda: with_value("fc.bias", float("inf")), "export: fc.bias is not finite"),
    (lambda: with_value("conv3.input_quantizer.clip", float("nan")),
     "export: conv3.input_quantizer.clip is not finite"),
    (lambda: with_value("conv3.weight_quantizer.clip", float("inf")),
     "export: conv3.weight_quantizer.clip is not finite"),
], ids=[
    "float", "all-float", "layer", "double", "bfloat16", "weight", "bias", "input-clip", "weight-clip",
])  # fmt: skip
def test_what_cannot_be_exported_is_refused(make, message, tmp_path):
    with pytest.raises(ApotfxError, match=message):
        export_integer(make(), tmp_path / "export")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["write_bytes", "rename", "chmod"])
def test_a_failed_export_leaves_nothing_behind(method, tmp_path, monkeypatch):
    def fail(*args):
        raise OSError("disk full")

    qmodel, _ = trained(policy())
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, fail)
        with pytest.raises(OSError, match="disk full"):
            export_integer(qmodel, tmp_path / "export")
    assert not list(tmp_path.iterdir())
    export_integer(qmodel, tmp_path / "export")


# Refusals of an export that was tampered with.


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export, the float model and another export; not to be written to."""
    directory = tmp_path_factory.mktemp("exported")
    qmodel, model = trained(MIXED)
    other, _ = trained(MIXED)
    with torch.no_grad():
        other.fc.weight.neg_()
    return export_integer(qmodel, directory / "one"), model, export_integer(other, directory / "two")


@pytest.fixture
def export(exported, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(exported[0], tmp_path / "export"))


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(bytes(content))


def edit_manifest(path, change, sign=False):
    manifest = json.loads((path / "manifest.json").read_text())
    change(manifest)
    if sign:
        manifest["manifest_sha256"] = _manifest_checksum(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest))


def check_refused(path, model, message):
    for read in (lambda: read_integer(path), lambda: load_integer(path, model)):
        with pytest.raises(ApotfxError, match=message) as error:
            read()
        assert str(path) in str(error.value) and "\n" not in str(error.value)


CHECKSUM = "weights.safetensors: does not fit manifest.json .checksum.; it was altered, truncated or"


@pytest.mark.parametrize("position", [0, 100, -1], ids=["size", "header", "data"])
def test_an_altered_weights_file_is_refused(position, export, exported):
    flip(export / "weights.safetensors", position)
    check_refused(export, exported[1], CHECKSUM)


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_a_truncated_weights_file_is_refused(size, export, exported):
    file = export / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    check_refused(export, exported[1], CHECKSUM)


@pytest.mark.parametrize("size", [0, 1, 1000, -1])
def test_a_truncated_manifest_is_refused(size, export, exported):
    file = export / "manifest.json"
    file.write_bytes(file.read_bytes()[:size])
    check_refused(export, exported[1], "manifest.json: not JSON .*; it was altered or truncated")


@pytest.mark.parametrize("change", [
    lambda m: m["layers"][0]["weight"]["scale"].__setitem__(0, 1.0), lambda m: m["layers"].pop(),
    lambda m: m.pop("tensors"),
    lambda m: m["layers"][1].update(pad_mode="reflect"), lambda m: m.update(weights_sha256="0" * 64),
    lambda m: m.pop("manifest_sha256"), lambda m: m.update(extra=1),
], ids=["scale", "layer", "tensors", "pad_mode", "weights_sha256", "manifest_sha256", "extra"])  # fmt: skip
def test_an_altered_manifest_is_refused(change, export, exported):
    edit_manifest(export, change)
    check_refused(export, exported[1], r"manifest.json: was altered \(checksum\); export the model again")


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'"text"', b'{"format": "other", "version": 3}'])
def test_another_json_file_is_refused(content, export, exported):
    (export / "manifest.json").write_bytes(content)
    check_refused(export, exported[1], "manifest.json: not the manifest of an integer export .format apotfx-integer.")


@pytest.mark.parametrize("version", [0, 1, 4, "2", None])
def test_another_version_is_refused(version, export, exported):
    edit_manifest(export, lambda m: m.update(version=version), sign=True)
    check_refused(export, exported[1], f"manifest.json: format version {version}, expected 3; export the model again")


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


@pytest.mark.parametrize("change, message", [
    (lambda m: m["tensors"]["conv1.weight_codes"].update(shape=[9]),
     r"conv1.weight_codes is .*\[108\].*, manifest.json says .*\[9\]"),
    (lambda m: m["tensors"]["fc.bias"].update(dtype="float16"),
     "fc.bias is .*'float32'.*, manifest.json says .*'float16'"),
    (lambda m: m["tensors"].pop("fc.bias"), "fc.bias is .*, manifest.json says absent"),
    (lambda m: m["tensors"].update(extra={"shape": [1]}), r"extra is absent, manifest.json says .*\[1\]"),
], ids=["shape", "dtype", "absent", "surplus"])  # fmt: skip
def test_tensors_that_do_not_fit_a_manifest_with_valid_checksums_are_refused(change, message, export, exported):
    edit_manifest(export, change, sign=True)
    check_refused(export, exported[1], message)


def test_levels_that_do_not_fit_their_scheme_are_refused(export):
    edit_manifest(export, lambda m: m["layers"][0]["weight"]["levels"].__setitem__(-1, 999), sign=True)
    with pytest.raises(
        ApotfxError, match=r"manifest.json: the levels of LevelSet\(scheme='uniform', bits=8, signed=True\) are"
    ):
        read_integer(export)


class Extra(Net):
    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(3))

    def forward(self, x):
        return super().forward(x) + self.shift


class WithoutBatchNorm(Net):
    def __init__(self):
        super().__init__()
        self.bn1 = nn.Identity()


class Subclassed(nn.Linear):
    """Traced through, so that no layer is left."""


def with_layer(name, layer):
    model = Net()
    setattr(model, name, layer)
    return model


@pytest.mark.parametrize("make, message", [
    (lambda: Net(classes=4), r"layer fc has shape \[3, 4\], in the model \[4, 4\]"),
    (lambda: Net(bias=False), "layer fc has bias True, in the model False"),
    (lambda: Net(stride=2),
     r"layer conv1 has operator .*'stride': \[1, 1\].*, in the model .*'stride': \[2, 2\].*"),
    (lambda: Net(padding_mode="reflect"), "layer conv3 has pad_mode circular, in the model reflect"),
    (lambda: Net(padding_mode="zeros"),
     r"layer conv3 has operator .*'padding': \[0, 0\].*, in the model .*'padding': \[1, 1\].*"),
    (lambda: with_layer("fc", nn.Conv1d(4, 3, 1)), "layer fc has type Linear, in the model Conv1d"),
    (lambda: with_layer("pointwise", nn.ConvTranspose2d(6, 4, 1)),
     "layer pointwise has type Conv2d, in the model ConvTranspose2d"),
    (lambda: with_layer("conv2", nn.Conv2d(6, 6, 3, padding="same")),
     r"conv2.weight is \(6, 3, 3, 3\), the model has \(6, 6, 3, 3\)"),
    (lambda: with_layer("conv2", nn.Conv2d(6, 6, 3, padding="same", groups=2, bias=False)),
     r"conv2.bias is \(6,\), the model has absent"),
    (WithoutBatchNorm, r"bn1.bias is \(6,\), the model has absent"),
    (Extra, r"shift is absent, the model has \(3,\)"),
    (lambda: with_layer("fc", Subclassed(4, 3)), "layer fc has type Linear, in the model Module"),
    (lambda: nn.Sequential(nn.Linear(4, 3)), "layer conv1 is not in the model"),
    (lambda: quantize(Net(), MIXED), "layer conv1 has type Conv2d, in the model QuantConv2d"),
], ids=[
    "shape", "bias", "stride", "padding-mode", "padding", "type", "transposed", "float-shape", "float-bias",
    "batch-norm", "extra", "subclass", "other", "quantized",
])  # fmt: skip
def test_another_model_is_refused(make, message, exported):
    with pytest.raises(
        ApotfxError, match=f"export {re.escape(str(exported[0]))}: {message}; pass the .*model that was exported"
    ):
        load_integer(exported[0], make())


def test_what_is_no_model_is_refused(exported):
    with pytest.raises(ApotfxError, match="model: expected a torch.nn.Module, got NoneType"):
        load_integer(exported[0], None)


def test_the_exports_that_the_refusals_start_from_are_fine(exported):
    path, model, other = exported
    assert isinstance(load_integer(path, model).fc, IntegerLayer)
    assert not torch.equal(read_integer(path)[1]["fc.weight"], read_integer(other)[1]["fc.weight"])
    assert not any(isinstance(module, QuantLayer) for module in load_integer(other, model).modules())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (nn.GELU(), r"2 \(GELU\)"),
        (nn.Sequential(nn.ReLU(), nn.ReLU()), r"_2_1 \(ReLU\)|_2_0 \(ReLU\)|2_0 \(ReLU\)"),
        (nn.Hardtanh(0, 6), r"_2 \(Hardtanh\)"),
    ],
    ids=["another activation", "one more", "another type"],
)
def test_a_network_with_the_same_parameters_that_computes_something_else_is_refused(other, message, tmp_path):
    def net(activation):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), activation, nn.Flatten(), nn.Linear(64, 3))

    qmodel = calibrate(quantize(net(nn.ReLU()), BitPolicy.default(4)), [torch.rand(2, 1, 6, 6)])
    export_integer(qmodel, tmp_path / "out")
    load_integer(tmp_path / "out", net(nn.ReLU()))
    with pytest.raises(ApotfxError, match=f"its network has .* where the model has .*({message})"):
        load_integer(tmp_path / "out", net(other))


def test_other_settings_of_a_module_are_refused(tmp_path):
    def net(kernel):
        return nn.Sequential(nn.Conv2d(1, 4, 3), nn.MaxPool2d(kernel, stride=2), nn.Flatten(), nn.Linear(16, 3))

    qmodel = calibrate(quantize(net(2), BitPolicy.default(4)), [torch.rand(2, 1, 6, 6)])
    export_integer(qmodel, tmp_path / "out")
    with pytest.raises(
        ApotfxError, match=r"_1 \(MaxPool2d\) where the model has _1 \(MaxPool2d\), or with other settings"
    ):
        load_integer(tmp_path / "out", net(3))


def test_hooks_of_the_float_model_go_on_working(tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    qmodel = calibrate(quantize(model, BitPolicy.default(4)), [torch.rand(8, 4)]).eval()
    export_integer(qmodel, tmp_path / "out")
    x = torch.rand(3, 4)
    assert torch.equal(load_integer(tmp_path / "out", model)(x), qmodel(x))


@pytest.mark.parametrize("scale", [[float("nan")], [-1.0], [0.0], [1.0, 1.0], []], ids=str)
def test_a_scale_that_cannot_be_is_refused(scale, tmp_path):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    export_integer(calibrate(quantize(model, BitPolicy.default(4)), [torch.rand(8, 4)]), tmp_path / "out")
    path = tmp_path / "out" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["layers"][0]["weight"]["scale"] = scale
    manifest["manifest_sha256"] = _manifest_checksum(manifest)
    path.write_text(json.dumps(manifest))
    with pytest.raises(ApotfxError, match="layer 0 has the weight scale .*, expected 1 or 4 numbers above 0"):
        load_integer(tmp_path / "out", model)
