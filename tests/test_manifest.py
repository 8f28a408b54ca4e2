import json
import math
import re

import pytest
import torch
from helpers import LEVEL_SETS, MIXED, check_refused, edit_manifest, level_set_id, policy, trained
from jsonschema import Draft202012Validator
from torch import nn

from apotfx import calibrate, quantize
from apotfx.integer.format import export_integer
from apotfx.integer.manifest import SCHEMA, describe_levels, level_set_of, read_manifest


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


@pytest.mark.parametrize("content", [b"{}", b"[]", b"null", b'"text"', b'{"format": "other", "version": 4}'])
def test_another_json_file_is_refused(content, export, exported):
    (export / "manifest.json").write_bytes(content)
    check_refused(export, exported[1], "manifest.json: not the manifest of an integer export .format apotfx-integer.")


@pytest.mark.parametrize("version", [0, 1, 4, 6, "5", None])
def test_another_version_is_refused(version, export, exported):
    edit_manifest(export, lambda m: m.update(version=version), sign=True)
    message = f"manifest.json: format version {json.dumps(version)}, expected 5; export the model again"
    check_refused(export, exported[1], message)


@pytest.mark.parametrize("content, message", [
    (b"[" * 100000, "not JSON .nested more than 32 deep.; it was altered"),
    (b'{"a": 1, "a": 1}', "not JSON .the key \"a\" twice.; it was altered or truncated"),
    (b"\xff\xfe", "not JSON .*; it was altered or truncated"),
    (b'{"a": 1' + b"0" * 10000 + b"}", "not JSON .the number 10{19}.; it was altered or truncated"),
], ids=["nested", "twice", "not-text", "long-number"])  # fmt: skip
def test_what_no_manifest_is_written_like_is_refused(content, message, export, exported):
    (export / "manifest.json").write_bytes(content)
    check_refused(export, exported[1], f"manifest.json: {message}")


def at(*place):
    """A function that sets a value in a manifest, or takes it out."""

    def change(manifest, value):
        container = manifest
        for key in place[:-1]:
            container = container[key]
        if value is ABSENT:
            del container[place[-1]]
        else:
            container[place[-1]] = value

    return change


ABSENT = object()
STEPS = ("program", "steps")
CONV3, FC = ("layers", 1), ("layers", 3)  # a convolution with scales per channel, and a linear layer with one


@pytest.mark.parametrize("number, shown", [(math.nan, "NaN"), (-math.inf, "-Infinity"), (10**400, "1" + "0" * 19)])
def test_numbers_that_no_json_has_are_refused_though_the_checksums_fit(number, shown, export, exported):
    edit_manifest(export, lambda m: at(*CONV3, "weight", "scale", 0)(m, number), sign=True)
    check_refused(export, exported[1], rf"manifest.json: not JSON \(the number {shown}\); it was altered or truncated")


@pytest.mark.parametrize("place, value, message", [
    # Keys, types and ranges.
    (("program",), ABSENT, "program is absent, expected it to be there"),
    (("more",), 1, "more is 1, expected no such key"),
    (("version",), 5.0, "version is 5.0, expected 5"),
    (("metadata", "arch"), 3, "metadata.arch is 3, expected printable text"),
    (("metadata", "in_channels"), -1, "metadata.in_channels is -1, expected an integer from 1 to 65536"),
    (("metadata", "image_size"), 2**50, "metadata.image_size is 1125899906842624, expected an integer from 1 to 65536"),
    (("metadata", "std"), [0.0], "metadata.std[0] is 0.0, expected a number above 0"),
    (("metadata",), None, "metadata is null, expected an object, whatever the exporting program wanted to keep"),
    (("weights_sha256",), "0" * 63, 'weights_sha256 is "0{56}..., expected 64 hexadecimal digits'),
    (("layers",), [], "layers is [], expected the quantized layers, 1 to 5000"),
    (("layers", 0), None, "layers[0] is null, expected an object that describes a layer"),
    ((*STEPS, 2), [], "program.steps[2] is [], expected an object that describes a step"),
    ((*STEPS, 2, "name"), "", 'program.steps[2].name is "", expected printable text'),
    ((*STEPS, 2, "inputs"), 3, "program.steps[2].inputs is 3, expected a list of names of values"),
    ((*STEPS, 2, "step"), "run", "program.steps[2].step is 'run', expected one of input, constant, encode"),
    ((*STEPS, 2, "more"), 1, "program.steps[2].more is unknown, expected of affine: name, inputs, norm"),
    ((*STEPS, 2, "norm"), ABSENT, "program.steps[2].norm is absent, expected of affine: name, inputs, norm"),
    ((*STEPS, 2, "norm"), "other", "the step bn1 of the program needs the tensor 'other.multiplier' of 1 dimensions"),
    ((*STEPS, 2, "norm"), 3, "program.steps[2].norm is '3', expected printable text"),
    ((*STEPS, 2, "inputs", 0), "later", "program.steps[2].inputs: 'later' is no value of an earlier step"),
    ((*STEPS, 2, "name"), "conv1", "program.steps[2].name is 'conv1', expected a name that no other step has"),
    ((*STEPS, 1, "layer"), "conv7", "the step conv1 of the program is of layer 'conv7', expected one of layers"),
    ((*STEPS, 1, "layer"), "fc", "the step conv1 of the program does not take what layer fc says of its input"),
    (("program", "results"), ["none"], "program.results: 'none' is no value of an earlier step"),
    (("program", "outputs"), {"value": 7}, "program.outputs: expected numbers, texts, lists and what stands for"),
    (("program", "outputs"), {"eval": "1"}, "program.outputs: expected numbers, texts, lists and what stands for"),
    ((*CONV3, "name"), "a\nb", r'layers[1].name is "a\nb", expected printable text'),
    ((*CONV3, "scheme"), "apot", 'layers[1].scheme (layer conv3) is "apot", expected no such key'),
    ((*CONV3, "type"), "Conv4d", 'layers[1].type (layer conv3) is "Conv4d", expected Conv1d, Conv2d, Conv3d, ConvTra'),
    ((*CONV3, "shape", 1), 6.0, "layers[1].shape[1] (layer conv3) is 6.0, expected an integer from 0"),
    ((*CONV3, "shape", 1), -6, "layers[1].shape[1] (layer conv3) is -6, expected an integer from 0"),
    ((*CONV3, "bias"), 1, "layers[1].bias (layer conv3) is 1, expected true or false"),
    ((*CONV3, "operator", "kind"), "MatrixProduct",
     'layers[1].operator.kind (layer conv3) is "MatrixProduct", expected Convolution for a convolution layer'),
    ((*CONV3, "operator", "stride"), ABSENT, "layers[1].operator.stride (layer conv3) is absent, expected it to be"),
    ((*CONV3, "operator", "stride", 0), 0, "layers[1].operator.stride[0] (layer conv3) is 0, expected an integer above"),
    ((*CONV3, "operator", "groups"), True, "layers[1].operator.groups (layer conv3) is true, expected an integer above"),
    ((*CONV3, "operator", "transposed"), False, "layers[1].operator.transposed (layer conv3) is false, expected no such"),
    ((*CONV3, "pad_mode"), "zeros", 'layers[1].pad_mode (layer conv3) is "zeros", expected constant, reflect'),
    ((*CONV3, "weight", "bits"), 9, "layers[1].weight.bits (layer conv3) is 9, expected an integer from 2 to 8"),
    ((*CONV3, "weight", "signed"), False, "layers[1].weight.signed (layer conv3) is false, expected true"),
    ((*CONV3, "weight", "scheme"), "log", 'layers[1].weight.scheme (layer conv3) is "log", expected apot, pot or uni'),
    ((*CONV3, "weight", "scale"), [], "layers[1].weight.scale (layer conv3) is [], expected a list of numbers above 0"),
    ((*CONV3, "weight", "scale", 0), 0.0, "layers[1].weight.scale[0] (layer conv3) is 0.0, expected a number above 0"),
    ((*CONV3, "weight", "scale", 0), -1.0, "layers[1].weight.scale[0] (layer conv3) is -1.0, expected a number above 0"),
    ((*CONV3, "weight", "scale", 0), "1", 'layers[1].weight.scale[0] (layer conv3) is "1", expected a number above 0'),
    ((*CONV3, "input", "clip"), [1.0, 1.0], "layers[1].input.clip (layer conv3) is [1.0, 1.0], expected one number"),
    ((*CONV3, "rectifier"), [0], "layers[1].rectifier (layer conv3) is [0], expected what the input is clamped to"),
    ((*CONV3, "accumulator_bound"), 1e6, "layers[1].accumulator_bound (layer conv3) is 1000000.0, expected the integer"),
    ((*FC, "shape"), [3], "layers[3].shape (layer fc) is [3], expected [C_out, C_in]"),
    ((*FC, "pad"), [1, 1], "layers[3].pad (layer fc) is [1, 1], expected nothing to pad"),
    ((*FC, "operator", "channel_shape"), [1], "layers[3].operator.channel_shape (layer fc) is [1], expected [-1]"),
    (("tensors", "fc.bias", "dtype"), "float16", 'tensors["fc.bias"].dtype is "float16", expected float32, int64'),
    (("tensors", "fc.bias", "shape"), 3, 'tensors["fc.bias"].shape is 3, expected a list of sizes'),
    (("tensors", "extra"), {"shape": [1]}, 'tensors.extra.dtype is absent, expected it to be there'),
    # What no schema can say.
    ((*CONV3, "name"), "conv1", "layers[1].name (layer conv1) is \"conv1\", expected a name that no other layer has"),
    ((*CONV3, "type"), "Conv1d", "layers[1].shape (layer conv3) is [6, 6, 3, 3], expected 3 sizes"),
    ((*CONV3, "operator", "padding"), [0], "layers[1].operator.padding (layer conv3) is [0], expected 2 integers"),
    ((*CONV3, "operator", "groups"), 4,
     "layers[1].operator.groups (layer conv3) is 4, expected a divisor of the 6 output channels"),
    ((*CONV3, "pad"), [1, 1], "layers[1].pad (layer conv3) is [1, 1], expected none or 4 integers"),
    ((*CONV3, "shape"), [6, 6, 3, 4], 'tensors["conv3.weight_codes"].shape is [203], expected [270]'),
    ((*CONV3, "shape"), [6, 2**31 - 1, 2**31 - 1, 2**31 - 1],
     'tensors["conv3.weight_codes"].shape is [203], expected [37138201'),
    ((*CONV3, "bias"), False, 'tensors["conv3.bias"] is {"shape": [6], "dtype": '),
    (("tensors", "conv3.weight_codes"), ABSENT, 'tensors["conv3.weight_codes"] is absent, expected it to be there'),
    (("tensors", "conv3.bias", "dtype"), "int32", 'tensors["conv3.bias"].dtype is "int32", expected "float32"'),
    ((*CONV3, "weight"), None, 'tensors["conv3.weight"] is absent, expected it to be there'),
    ((*CONV3, "weight", "bits"), 6, 'tensors["conv3.weight_codes"].shape is [203], expected [243]'),
    ((*CONV3, "weight", "scheme"), "apot", "layers[1].weight.dtype (layer conv3) is \"int16\", expected \"int8\""),
    ((*CONV3, "weight", "levels", 15), 999, "layers[1].weight.levels[15] (layer conv3) is 999, expected 16384"),
    ((*CONV3, "weight", "levels", 1), 1.0, "layers[1].weight.levels[1] (layer conv3) is 1.0, expected 1"),
    ((*CONV3, "weight", "levels"), [0, 1], "layers[1].weight.levels (layer conv3) is [0, 1], expected [0, 1, 2, 4"),
    ((*CONV3, "weight", "shift_add_terms", 2), [2], "layers[1].weight.shift_add_terms[2][0] (layer conv3) is 2, expected 1"),
    ((*CONV3, "weight", "dtype"), "int8", 'layers[1].weight.dtype (layer conv3) is "int8", expected "int16"'),
    ((*CONV3, "input", "bits"), 8, "layers[1].input.bits (layer conv3) is 8, expected levels that exist (pot at 8 bits"),
    ((*CONV3, "weight", "scale"), [1.0, 1.0], "layers[1].weight.scale (layer conv3) is [1.0, 1.0], expected 1 or 6 num"),
    ((*CONV3, "weight", "clip"), [1.0], "layers[1].weight.clip (layer conv3) is [1.0], expected as many numbers as scale"),
    ((*CONV3, "weight", "scale", 0), 0.1, "layers[1].weight.scale[0] (layer conv3) is 0.1, expected a number that float32"),
    ((*CONV3, "weight", "scale", 0), 1e-50, "layers[1].weight.scale[0] (layer conv3) is 1e-50, expected a number that"),
    ((*CONV3, "weight", "scale", 0), 1e300, "layers[1].weight.scale[0] (layer conv3) is 1e+300, expected a number that"),
    ((*CONV3, "input", "clip", 0), 2.0, "layers[1].input.scale[0] (layer conv3) is "),
    ((*CONV3, "rectifier"), [1, 0], "layers[1].rectifier (layer conv3) is [1, 0], expected a range that holds 0"),
    ((*CONV3, "accumulator_bound"), 7, "layers[1].accumulator_bound (layer conv3) is 7, expected 56623104"),
    ((*CONV3, "accumulator_bound"), ABSENT, "layers[1].accumulator_bound (layer conv3) is absent, expected 56623104"),
    (("layers", 0, "accumulator_bound"), 7, "layers[0].accumulator_bound (layer conv1) is 7, expected it to be absent"),
], ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else "")  # fmt: skip
def test_a_manifest_that_cannot_be_is_refused_though_its_checksum_fits(place, value, message, export, exported):
    edit_manifest(export, lambda manifest: at(*place)(manifest, value), sign=True)
    pattern = re.escape(message).replace(r"0\{56\}", "0{56}")
    check_refused(export, exported[1], f"manifest.json: {pattern}.*; export the model again")


def test_the_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


def test_every_constraint_of_the_schema_says_what_it_expects():
    def check(schema):
        if schema.keys() & {"type", "const", "enum", "pattern", "minimum", "exclusiveMinimum", "maxItems"}:
            assert schema["description"]
        for key, value in schema.items():
            for child in value.values() if key in ("properties", "$defs") else [value]:
                if isinstance(child, dict) and key != "if":
                    check(child)

    check(SCHEMA)


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_levels_are_described_and_found_again(levels):
    described = describe_levels(levels)
    assert level_set_of(described) == levels and json.loads(json.dumps(described)) == described
    assert [sum(2**e for e in terms) for terms in described["shift_add_terms"]] == described["levels"]


def test_the_manifest_describes_a_layer(tmp_path):
    qmodel, _ = trained(MIXED)
    path = export_integer(qmodel, tmp_path / "export")
    manifest = json.loads((path / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("apotfx-integer", 5)
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
    assert "accumulator_bound" not in layers["conv1"]


@pytest.fixture
def transposed(tmp_path):
    """An export with a transposed convolution of two groups, and its float model."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2)
    model = nn.Sequential(nn.Conv2d(2, 4, 3), up, nn.ReLU(), nn.Conv2d(6, 2, 1))
    qmodel = calibrate(quantize(model, policy(granularity="channel")), [torch.randn(2, 2, 5, 5)])
    return export_integer(qmodel, tmp_path / "transposed"), model


def test_the_manifest_describes_a_transposed_layer(transposed):
    layer = read_manifest(transposed[0] / "manifest.json")["layers"][1]
    assert (layer["type"], layer["shape"], layer["pad"]) == ("ConvTranspose2d", [6, 2, 3, 3], [])
    assert layer["operator"] == {
        "kind": "TransposedConvolution", "stride": [2, 2], "padding": [0, 0], "output_padding": [1, 1],
        "dilation": [1, 1], "groups": 2,
    }  # fmt: skip
    assert len(layer["weight"]["scale"]) == 6 and layer["accumulator_bound"] == 18 * 10 * 10


@pytest.mark.parametrize("place, value, message", [
    (("operator", "kind"), "Convolution", 'kind (layer 1) is "Convolution", expected TransposedConvolution for a trans'),
    (("operator", "output_padding"), ABSENT, "output_padding (layer 1) is absent, expected it to be there"),
    (("operator", "output_padding"), [1], "output_padding (layer 1) is [1], expected 2 integers"),
    (("operator", "output_padding", 0), -1, "output_padding[0] (layer 1) is -1, expected an integer from 0"),
    (("operator", "stride", 0), 0, "stride[0] (layer 1) is 0, expected an integer above 0"),
    (("operator", "groups"), 4, "groups (layer 1) is 4, expected a divisor of the 6 output channels"),
    (("operator", "transposed"), True, "transposed (layer 1) is true, expected no such key"),
    (("type",), "Conv2d", 'operator.output_padding (layer 1) is [1, 1], expected no such key'),
    (("type",), "ConvTranspose1d", "shape (layer 1) is [6, 2, 3, 3], expected 3 sizes"),
    (("type",), "ConvTranspose4d", 'type (layer 1) is "ConvTranspose4d", expected Conv1d'),
], ids=["kind", "absent", "one-number", "negative", "stride", "groups", "more", "conv", "dimensions", "unknown"])  # fmt: skip
def test_a_transposed_layer_that_cannot_be_is_refused(place, value, message, transposed):
    path, model = transposed
    edit_manifest(path, lambda manifest: at("layers", 1, *place)(manifest, value), sign=True)
    check_refused(path, model, re.escape(message))
