"""`manifest.json`, which says what an export's tensors mean: read, and checked before anything is made of it.

manifest.schema.json documents the keys. A checksum finds accidents; everything else here finds a manifest that was
written by other means, whose checksum may well be right.
"""

import hashlib
import json
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from jsonschema import Draft202012Validator, ValidationError, validators

from apotfx import files
from apotfx.errors import ApotfxError
from apotfx.integer.codes import storage_dtype
from apotfx.integer.program import Encode, Product, Program
from apotfx.levels import LevelSet
from apotfx.operators import accumulator_bound
from apotfx.tensors import Damaged, parse_json

MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
CODES = "weight_codes"
FLOAT_WEIGHT = "float_weight"  # of a quantized layer whose weight is also read in float
SCHEMA = json.loads(Path(__file__).with_name("manifest.schema.json").read_text())
FORMAT, VERSION = (SCHEMA["properties"][key]["const"] for key in ("format", "version"))
MAX_BYTES = 2**26

Place = tuple[str | int, ...]  # keys and indices, from the outermost on


def checksum(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def describe_levels(levels: LevelSet) -> dict:
    return {
        "scheme": levels.scheme,
        "bits": levels.bits,
        "signed": levels.signed,
        "dtype": str(storage_dtype(levels)).removeprefix("torch."),
        "levels": list(levels.ints),
        "shift_add_terms": [list(terms) for terms in levels.shift_add_terms],
    }


def level_set_of(quantizer: dict) -> LevelSet:
    return LevelSet(quantizer["scheme"], quantizer["bits"], quantizer["signed"])


def read_file(path: Path, max_bytes: int) -> bytes:
    """Raises: ApotfxError: not a regular file of at most `max_bytes` that can be read."""
    try:
        return files.read_file(path, max_bytes=max_bytes)
    except ApotfxError as error:
        raise ApotfxError(f"{error}; pass a directory that export_integer wrote") from None


def read_manifest(path: Path) -> dict:
    """The manifest in the file `path`, checked.

    Raises:
        ApotfxError: not a manifest, of another format version, altered, or one that contradicts itself.
    """
    content = read_file(path, MAX_BYTES)
    try:
        manifest = parse_json(content)
        refusal = _refusal(manifest)
    except Damaged as error:
        refusal = f"{error}; it was altered or truncated"
    if refusal:
        raise ApotfxError(f"{path}: {refusal}")
    return manifest


def _refusal(manifest: object) -> str | None:
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        return f"not the manifest of an integer export (format {FORMAT})"
    again = "export the model again"
    if manifest.get("version") != VERSION:
        return f"format version {_as_text(manifest.get('version'))}, expected {VERSION}; {again} (of a run: remove it and resume the run)"
    if manifest.get("manifest_sha256") != checksum(manifest):
        return f"was altered (checksum); {again}"
    problem = find_problem(manifest)
    return problem and f"{problem}; {again}"


def find_problem(manifest: dict) -> str | None:
    """The first thing in a manifest that cannot be, checksums aside; None if there is none."""
    if error := next(_VALIDATOR.iter_errors(manifest), None):
        return _explain(error, manifest)
    place, expected = next(_contradictions(manifest), ((), ""))
    if place:
        return _differs(manifest, place, expected)
    try:
        _require_described(Program.from_json(manifest["program"]), manifest)
    except ValueError as error:
        return str(error)
    return None


# By the schema.


def _is_integer(_, x: object) -> bool:
    return type(x) is int and abs(x) < 2**63


def _is_number(_, x: object) -> bool:
    return _is_integer(_, x) or type(x) is float and math.isfinite(x)


def _items(validator, items: dict, instance: object, schema: dict) -> Iterator[ValidationError]:
    """As jsonschema has it, which takes 15 us for each of the many numbers, but quickly."""
    if not isinstance(instance, list):
        return
    fits = None
    if items.keys() <= {"type", "exclusiveMinimum", "description"} and items.get("type") == "number":
        above = items.get("exclusiveMinimum", -math.inf)
        fits = lambda x: _is_number(None, x) and x > above  # noqa: E731
    for i, x in enumerate(instance):
        if fits is None or not fits(x):
            yield from validator.descend(x, items, path=i)


_VALIDATOR = validators.extend(
    Draft202012Validator,
    validators={"items": _items},
    type_checker=Draft202012Validator.TYPE_CHECKER.redefine_many({
        "integer": _is_integer,
        "number": _is_number,
        "string": lambda _, x: isinstance(x, str) and x.isprintable(),
    }),
)(SCHEMA)  # fmt: skip


def _explain(error: ValidationError, manifest: dict) -> str:
    place = tuple(error.absolute_path)
    if error.validator == "required":
        return _differs(manifest, (*place, next(key for key in error.validator_value if key not in error.instance)))
    if error.validator == "additionalProperties":
        unknown = min(error.instance.keys() - error.schema["properties"].keys())
        return _differs(manifest, (*place, unknown), "no such key")
    return _differs(manifest, place, error.schema["description"])


def _differs(manifest: dict, place: Place, expected: str = "it to be there") -> str:
    got: object = manifest
    for key in place:
        got = got[key] if isinstance(got, list) or key in got else _ABSENT
    text = "".join(
        f"[{key}]" if isinstance(key, int) else f".{key}" if key.isidentifier() else f"[{_as_text(key)}]"
        for key in place
    ).removeprefix(".")
    layer = manifest["layers"][place[1]] if place[0] == "layers" and len(place) > 1 else None
    name = layer.get("name") if isinstance(layer, dict) else None
    suffix = f" (layer {_short(name)})" if isinstance(name, str) and name.isprintable() else ""
    return f"{_short(text, 200)}{suffix} is {_as_text(got)}, expected {expected}"


_ABSENT = object()


def _as_text(value: object) -> str:
    return "absent" if value is _ABSENT else _short(json.dumps(value))


def _short(text: str, length: int = 60) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


# What no schema can say.


def _contradictions(manifest: dict) -> Iterator[tuple[Place, str]]:
    """(where, what was expected there), in an order in which each check relies on those before it."""
    names = set()
    for i, layer in enumerate(manifest["layers"]):
        if layer["name"] in names:
            yield ("layers", i, "name"), "a name that no other layer has"
        names.add(layer["name"])
        yield from _wrong_geometry(("layers", i), layer)
        yield from _wrong_tensors(layer, manifest["tensors"])
        for key in ("weight", "input"):
            if layer[key] is not None:
                yield from _wrong_quantizer(("layers", i, key), layer[key], channels=layer["shape"][0])
        if layer["rectifier"] is not None:
            low, high = layer["rectifier"]
            if low is not None and low > 0 or high is not None and high < 0:  # what is padded after it is 0
                yield ("layers", i, "rectifier"), "a range that holds 0"
        bound = None
        if layer["weight"] and layer["input"]:
            largest = (layer[key]["levels"][-1] for key in ("weight", "input"))
            bound = accumulator_bound(torch.Size(layer["shape"]), *largest)
        if layer.get("accumulator_bound") != bound:
            yield ("layers", i, "accumulator_bound"), "it to be absent" if bound is None else str(bound)


def _require_described(program: Program, manifest: dict) -> None:
    """Raises: ValueError: a step refers to a layer or a tensor that is not in the manifest, or that is another."""
    layers, steps = {layer["name"]: layer for layer in manifest["layers"]}, {}
    for step in program.steps:
        layer, place = layers.get(getattr(step, "layer", None)), f"the step {step.name[:60]} of the program"
        if isinstance(step, (Encode, Product)):
            if layer is None:
                raise ValueError(f"{place} is of layer {step.layer[:60]!r}, expected one of layers")
            encoded = isinstance(step, Product) and isinstance(steps[step.inputs[0]], Encode)
            if len(step.inputs) != 1 or (layer["input"] is not None) != (encoded or isinstance(step, Encode)):
                raise ValueError(f"{place} does not take what layer {step.layer[:60]} says of its input")
            if encoded and steps[step.inputs[0]].layer != step.layer:
                raise ValueError(f"{place} takes the codes of another layer, expected those of {step.layer[:60]}")
        for name, dims in step.tensors().items():
            tensor = manifest["tensors"].get(name)
            if tensor is None or dims is not None and len(tensor["shape"]) != dims:
                raise ValueError(f"{place} needs the tensor {name[:60]!r}" + (f" of {dims} dimensions" if dims else ""))
        steps[step.name] = step


def _wrong_geometry(place: Place, layer: dict) -> Iterator[tuple[Place, str]]:
    if layer["type"] == "Linear":
        return
    dims = int(layer["type"][-2])
    if len(layer["shape"]) != dims + 2:
        yield (*place, "shape"), f"{dims + 2} sizes"
    for key in ("stride", "padding", "output_padding", "dilation"):
        if len(layer["operator"].get(key, range(dims))) != dims:
            yield (*place, "operator", key), f"{dims} integers"
    if layer["shape"][0] % layer["operator"]["groups"]:
        yield (*place, "operator", "groups"), f"a divisor of the {layer['shape'][0]} output channels"
    if len(layer["pad"]) not in (0, 2 * dims):
        yield (*place, "pad"), f"none or {2 * dims} integers"


def _wrong_tensors(layer: dict, tensors: dict) -> Iterator[tuple[Place, str]]:
    """Compares sizes before anything is allocated."""
    name, shape = layer["name"], layer["shape"]
    expected = {f"{name}.bias": ([shape[0]], "float32")} if layer["bias"] else {}
    if layer["weight"] is None:
        expected[f"{name}.weight"] = (shape, "float32")
    else:
        expected[f"{name}.{CODES}"] = ([-(-math.prod(shape) * layer["weight"]["bits"] // 8)], "uint8")
    if (read := tensors.get(f"{name}.{FLOAT_WEIGHT}")) is not None and sorted(read["shape"]) == sorted(shape):
        expected[f"{name}.{FLOAT_WEIGHT}"] = (read["shape"], "float32")
    for key in expected | {key: None for key in tensors if key.rpartition(".")[0] == name}:
        if key not in expected or key not in tensors:
            yield ("tensors", key), "it to be there" if key in expected else "no such tensor of a layer"
        for part, value in zip(("shape", "dtype"), expected[key]):
            if tensors[key][part] != value:
                yield ("tensors", key, part), json.dumps(value)


def _wrong_quantizer(place: Place, quantizer: dict, channels: int) -> Iterator[tuple[Place, str]]:
    try:
        levels = level_set_of(quantizer)
    except ApotfxError as error:
        yield (*place, "bits"), f"levels that exist ({error})"
        return
    yield from _difference(place, quantizer, describe_levels(levels))
    for key in ("clip", "scale"):
        if len(quantizer[key]) not in (1, channels):
            yield (*place, key), f"1 or {channels} numbers"
        yield from _wrong_floats((*place, key), quantizer[key])
    if len(quantizer["clip"]) != len(quantizer["scale"]):
        yield (*place, "clip"), f"as many numbers as scale has, which is {len(quantizer['scale'])}"
    if place[-1] == "input":
        step = (torch.tensor(quantizer["clip"]) / levels.max).tolist()
        yield from _difference((*place, "scale"), quantizer["scale"], step)


def _wrong_floats(place: Place, values: list) -> Iterator[tuple[Place, str]]:
    rounded = torch.tensor(values, dtype=torch.float32).tolist()
    for i in range(len(values)):
        if values[i] != rounded[i]:
            yield (*place, i), "a number that float32 holds"


def _difference(place: Place, got: object, expected: object) -> Iterator[tuple[Place, str]]:
    """Of plain data; an object that was got may have more keys."""
    if isinstance(expected, dict):
        for key in expected:
            yield from _difference((*place, key), got[key], expected[key])
    elif isinstance(expected, list) and isinstance(got, list) and len(got) == len(expected):
        for i in range(len(expected)):
            yield from _difference((*place, i), got[i], expected[i])
    elif repr(got) != repr(expected):  # 1, 1.0 and True are not the same here
        yield place, _as_text(expected)
