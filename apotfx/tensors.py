"""Tensors and a JSON document in one safetensors file, each with a checksum: written, and read from strangers.

The file is a plain safetensors one. Its metadata hold the document as text, with the SHA-256 of every tensor, and the
SHA-256 of that.
"""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import safetensors.torch
import torch
from torch import Tensor

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
MAX_HEADER_BYTES = 2**23  # a thousand times that of a ResNet-50
MAX_VALUES = 2**22  # of JSON, which take many times the memory of their text
MAX_DEPTH = 32
MAX_DIMENSIONS = 16
_LENGTH_BYTES = 8
_MAX_DIGITS = 20


class Damaged(ValueError):
    """What is wrong with a file, in a few printable words."""


def pack(tensors: Mapping[str, Tensor], document: dict, kind: str) -> bytes:
    """A file of the tensors, dense and of `DTYPES`, and of the document.

    Args:
        document: finite JSON without a key "sha256".
        kind: what the file is; `unpack` asks for the same.
    """
    copies = {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}
    document = document | {"sha256": {name: digest(tensor) for name, tensor in copies.items()}}
    text = json.dumps(document, allow_nan=False)
    return safetensors.torch.save(copies, {"kind": kind, "document": text, "sha256": _sha256(text.encode())})


def is_packed(data: bytes) -> bool:
    """Whether it begins like a safetensors file."""
    return data[_LENGTH_BYTES : _LENGTH_BYTES + 1] == b"{"


def unpack(data: bytes, kind: str) -> tuple[dict[str, Tensor], dict]:
    """What was packed: the tensors, which own their memory, and the document.

    Raises:
        Damaged: the file was altered or truncated, was written by something else, or is of another kind.
    """
    header, start = _read_header(data)
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or metadata.get("kind") != kind:
        raise Damaged(f"a safetensors file, but no {kind}")
    text = metadata.get("document")
    if not isinstance(text, str) or metadata.get("sha256") != _sha256(text.encode(errors="replace")):
        raise Damaged("the document was altered (checksum)")
    document = parse_json(text)
    digests = document.pop("sha256", None) if isinstance(document, dict) else None
    if not isinstance(digests, dict) or digests.keys() != header.keys():
        raise Damaged("the document does not list the file's tensors")
    tensors = _read_tensors(header, memoryview(data)[start:])
    for name, tensor in tensors.items():
        if digest(tensor) != digests[name]:
            raise Damaged(f"{printable(name)} was altered (checksum)")
    return tensors, document


def read_tensors(data: bytes) -> dict[str, Tensor]:
    """The tensors of any safetensors file, which own their memory.

    Raises:
        Damaged: it is none, or has tensors of other types than `DTYPES`.
    """
    header, start = _read_header(data)
    header.pop("__metadata__", None)
    return _read_tensors(header, memoryview(data)[start:])


def digest(tensor: Tensor) -> str:
    """The SHA-256 of type, shape and values of a CPU tensor."""
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return _sha256(f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}\n".encode(), content)


def _sha256(*parts: bytes) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part)
    return found.hexdigest()


def parse_json(text: str | bytes) -> object:
    """JSON in which keys are unique and numbers are finite and of a sensible length.

    Raises:
        Damaged: it is not, or larger or deeper than any of this package's.
    """
    try:
        marks = ("[", "{", ",") if isinstance(text, str) else (b"[", b"{", b",")
        if (count := sum(map(text.count, marks))) > MAX_VALUES:
            raise ValueError(f"{count} values, expected at most {MAX_VALUES}")
        value = json.loads(
            text, object_pairs_hook=_unique, parse_int=_parse_int, parse_float=_parse_float, parse_constant=_refuse
        )
        _require_flat(value)
        return value
    except RecursionError:
        problem = f"nested more than {MAX_DEPTH} deep"
    except MemoryError:
        problem = "larger than the memory"
    except ValueError as error:
        problem = printable(error)
    raise Damaged(f"not JSON ({problem})")


def _require_flat(value: object) -> None:
    """Raises: RecursionError: there are more than `MAX_DEPTH` objects or lists in each other."""
    layer = [value]
    for _ in range(MAX_DEPTH):
        layer = [x for values in _containers(layer) for x in (values.values() if isinstance(values, dict) else values)]
    if _containers(layer):
        raise RecursionError


def _containers(values: list) -> list:
    return [x for x in values if isinstance(x, (dict, list))]


def _unique(pairs: list[tuple[str, object]]) -> dict:
    unique = dict(pairs)
    if len(unique) < len(pairs):
        seen = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {json.dumps(twice)} twice")
    return unique


def _parse_int(digits: str) -> int:
    return int(digits) if len(digits) <= _MAX_DIGITS else _refuse(digits)


def _parse_float(digits: str) -> float:
    value = float(digits)
    return value if math.isfinite(value) else _refuse(digits)


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"the number {number[:_MAX_DIGITS]}")


def printable(what: object, most: int = 80) -> str:
    """One short line of what a stranger's file says."""
    text = str(what)
    text = text if len(text) <= most else f"{text[:most]}..."
    return text if text.isprintable() else ascii(text)[1:-1]


def _read_header(data: bytes) -> tuple[dict, int]:
    """(the header, where the tensors begin)."""
    length = int.from_bytes(data[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if not is_packed(data) or start > len(data):
        raise Damaged("truncated, or not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise Damaged(f"a header of {length} bytes, expected at most {MAX_HEADER_BYTES}")
    header = parse_json(data[_LENGTH_BYTES:start])
    if not isinstance(header, dict):
        raise Damaged("a header that is no JSON object")
    return header, start


def _read_tensors(header: dict, data: memoryview) -> dict[str, Tensor]:
    entries = {name: _read_entry(name, entry) for name, entry in header.items()}
    end = 0
    for name, (dtype, shape, begin, after) in sorted(entries.items(), key=lambda item: item[1][2:]):
        if begin != end or after - begin != math.prod(shape) * dtype.itemsize:
            raise Damaged(f"{printable(name)} does not lie where the one before it ends, or has another size")
        end = after
    if end != len(data):
        raise Damaged(f"{len(data)} bytes of tensors, the header says {end}")
    return {name: _tensor(name, dtype, shape, data[begin:end]) for name, (dtype, shape, begin, end) in entries.items()}


def _read_entry(name: str, entry: object) -> tuple[torch.dtype, list[int], int, int]:
    if isinstance(entry, dict) and entry.keys() == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        known = isinstance(dtype, str) and dtype in DTYPES
        if known and _are_sizes(shape) and _are_sizes(offsets) and len(offsets) == 2 and len(shape) <= MAX_DIMENSIONS:
            return DTYPES[dtype], shape, *offsets
    raise Damaged(f"{printable(name)} is {printable(entry)}")


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**48 for value in values)


def _tensor(name: str, dtype: torch.dtype, shape: list[int], content: memoryview) -> Tensor:
    if not content:
        return empty(shape, dtype)
    if dtype == torch.bool and max(content) > 1:
        raise Damaged(f"{printable(name)} has values that are neither true nor false")
    return torch.frombuffer(bytearray(content), dtype=dtype).reshape(shape)


def empty(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor without elements. Raises: Damaged: torch cannot count along its other dimensions."""
    if math.prod(size or 1 for size in shape) >= 2**62:
        raise Damaged(f"a tensor of impossible shape, {printable(list(shape))}")
    return torch.empty(shape, dtype=dtype)
