"""Files of tensors and JSON: written, read back, and forged."""

import hashlib
import json
import math
import re

import pytest
import safetensors.torch
import torch

from apotfx.tensors import DTYPES, MAX_HEADER_BYTES, MAX_VALUES, Damaged, digest, is_packed, pack, parse_json, printable, read_tensors, unpack

torch.manual_seed(0)
TENSORS = {
    **{str(dtype): (torch.rand(2, 3) * 5).to(dtype) for dtype in DTYPES.values()},
    "none": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
    "channels last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "é/\n": torch.arange(3),
}
DOCUMENT = {"a": [1, 2.5, None, "é\ud800"], "b": {"c": True}}


def header_of(data):
    length = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def file(header, data):
    """A file with this header; a string stands as it is."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + data


def signed(header, **document):
    """`header` with the document and its checksum."""
    text = json.dumps(document)
    checksum = hashlib.sha256(text.encode()).hexdigest()
    return header | {"__metadata__": {"kind": "test", "document": text, "sha256": checksum}}


def check_refused(data, message):
    with pytest.raises(Damaged, match=re.escape(message)) as error:
        unpack(data, "test")
    assert str(error.value).isprintable() and len(str(error.value)) < 400


def test_round_trip():
    data = pack(TENSORS, DOCUMENT, "test")
    tensors, document = unpack(data, "test")
    assert is_packed(data) and document == DOCUMENT and tensors.keys() == TENSORS.keys()
    for name, tensor in tensors.items():
        assert tensor.dtype == TENSORS[name].dtype and torch.equal(tensor, TENSORS[name])
        tensor.zero_()  # it owns its memory
    assert safetensors.torch.load(data).keys() == TENSORS.keys()


def test_a_digest_is_of_type_shape_and_values():
    x = torch.arange(6.0)
    others = [x.double(), x.view(torch.int32), x.reshape(2, 3), x.reshape(1, 6), x + 1, -x, x[:5]]
    assert len({digest(y) for y in (x, *others)}) == 1 + len(others)
    assert digest(x) == digest(torch.stack([x, x], 1)[:, 0])
    assert digest(x) == hashlib.sha256(b"float32 [6]\n" + x.numpy().tobytes()).hexdigest()


def test_every_changed_bit_of_the_values_is_found():
    data = pack({"x": torch.rand(5), "y": torch.ones(3, dtype=torch.bool)}, {}, "test")
    start = 8 + int.from_bytes(data[:8], "little")
    for i in range(8 * start, 8 * len(data)):
        changed = bytearray(data)
        changed[i // 8] ^= 1 << i % 8
        with pytest.raises(Damaged, match="was altered|neither true nor false"):
            unpack(bytes(changed), "test")


@pytest.mark.parametrize("share", [0, 0.01, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(share):
    data = pack(TENSORS, DOCUMENT, "test")
    with pytest.raises(Damaged):
        unpack(data[: int(share * len(data))], "test")


def test_another_kind_is_refused():
    check_refused(pack({}, {}, "other"), "a safetensors file, but no test")
    check_refused(safetensors.torch.save({"x": torch.rand(3)}), "a safetensors file, but no test")


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"x": entry(shape=(2**40,))}, "x does not lie where the one before it ends, or has another size"),
        ({"x": entry(shape=(2**47, 2**47))}, "x does not lie where"),
        ({"x": entry(offsets=(0, 4), shape=(1,))}, "8 bytes of tensors, the header says 4"),
        ({"x": entry(), "y": entry()}, "y does not lie where"),
        ({"x": entry(offsets=(8, 0))}, "x does not lie where"),
        ({"x": entry(dtype="F8_E4M3", shape=(8,))}, "x is {'dtype': 'F8_E4M3'"),
        ({"x": entry(dtype=["F32"])}, "x is {'dtype': ['F32']"),
        ({"x": entry(shape=(2.0,))}, "x is {"),
        ({"x": entry(shape=(-2,))}, "x is {"),
        ({"x": entry(shape=(True, 2))}, "x is {"),
        ({"x": entry(shape=[1] * 65 + [2])}, "x is {"),
        ({"x": entry(offsets=(0, 8, 8))}, "x is {"),
        ({"x": entry() | {"more": 1}}, "x is {"),
        ({"x": 3}, "x is 3"),
        ({"x\n" * 1000: 3}, r"x\nx\nx\n"),
        ({"x": entry(), "y": entry(shape=(0, 2**40, 2**40), offsets=(8, 8))}, "a tensor of impossible shape"),
        ({"x": entry(dtype="BOOL", shape=(8,))}, "x has values that are neither true nor false"),
        ({"x": entry()}, "x was altered (checksum)"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value))[:5],
)
def test_a_forged_header_is_refused(entries, message):
    check_refused(file(signed(entries, sha256=dict.fromkeys(entries)), b"\2" * 8), message)


def test_a_forged_document_is_refused():
    header, data = header_of(pack({}, DOCUMENT, "test"))
    header["__metadata__"]["document"] += " "
    check_refused(file(header, data), "the document was altered (checksum)")
    for document in ({}, {"sha256": []}, {"sha256": {"x": ""}}):
        check_refused(file(signed({}, **document), b""), "the document does not list the file's tensors")
    for metadata in (None, [], {"kind": ["test"]}, {"kind": "test"}, {"kind": "test", "document": 3}):
        with pytest.raises(Damaged):
            unpack(file({"__metadata__": metadata}, b""), "test")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 10**6, "not JSON (nested more than 32 deep)"),
        ("[" * 33 + "]" * 33, "not JSON (nested more than 32 deep)"),
        ('{"a": ' * 32 + "[]" + "}" * 32, "not JSON (nested more than 32 deep)"),
        ("[" + "1," * MAX_VALUES + "1]", f"not JSON ({MAX_VALUES + 1} values, expected at most {MAX_VALUES})"),
        ('{"a": 1, "a": 2}', 'the key "a" twice'),
        ('{"a": NaN}', "the number NaN"),
        ('{"a": -Infinity}', "the number -Infinity"),
        ('{"a": 1e999}', "the number 1e999"),
        ('{"a": ' + "9" * 5000 + "}", "the number 99999999999999999999"),
        ('{"a": }', "not JSON (Expecting value"),
    ],
    ids=lambda text: text[:12],
)
def test_json_that_is_none_or_out_of_bounds_is_refused(text, message):
    with pytest.raises(Damaged, match=re.escape(message)):
        parse_json(text)
    if text.startswith("{"):
        check_refused(file(text, b""), message)


def test_json_within_the_bounds_is_read():
    assert parse_json('{"a": [' * 16 + "1" + "]}" * 16) and parse_json(b'"\xc3\xa9"') == "é"
    assert parse_json("[18446744073709551615, 1e308]") == [2**64 - 1, 1e308]


def test_the_tensors_of_any_safetensors_file_are_read():
    tensors = {name: tensor.contiguous() for name, tensor in TENSORS.items()}
    found = read_tensors(safetensors.torch.save(tensors, {"what": "ever"}))
    assert found.keys() == tensors.keys() and all(torch.equal(found[name], tensors[name]) for name in tensors)
    with pytest.raises(Damaged, match="x is {'dtype': 'F8_E5M2'"):
        read_tensors(safetensors.torch.save({"x": torch.zeros(3, dtype=torch.float8_e5m2)}))


def test_a_header_longer_than_any_network_needs_is_not_parsed():
    check_refused(file("{}" + " " * MAX_HEADER_BYTES, b""), f"expected at most {MAX_HEADER_BYTES}")
    check_refused((2**63).to_bytes(8, "little") + b"{}", "truncated")
    check_refused(file("[1]", b""), "truncated, or not a safetensors file")


def test_numbers_that_no_json_has_are_not_written():
    with pytest.raises(ValueError, match="not JSON compliant"):
        pack({}, {"x": math.nan}, "test")


def test_what_strangers_write_is_shown_short_and_printable():
    assert printable("é" * 100, 5) == "ééééé..." and printable("a\nb\x1b\udcff") == r"a\nb\x1b\udcff"
