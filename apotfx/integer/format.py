"""The file format of an exported network: written, read back and checked.

`weights.safetensors` holds, per quantized weight, bit-packed codes (`bits` each: the index of the level's
magnitude, and the sign as the highest bit), and as float32 whatever is not quantized: biases, batch norms,
float layers. `manifest.json` says what the codes mean. Nothing is pickled.
"""

import hashlib
import json
import math
import os
from pathlib import Path

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from apotfx.analysis import batch_norm_after
from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_directory
from apotfx.integer.codes import pack_codes, storage_dtype, unpack_codes
from apotfx.integer.graph import describe_graph
from apotfx.layers import Geometry, QuantLayer
from apotfx.levels import LevelSet
from apotfx.operators import accumulator_bound
from apotfx.quantizers import Quantizer
from apotfx.reproducible import folded_batch_norm

FORMAT, VERSION = "apotfx-integer", 3
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
CODES = "weight_codes"


def export_integer(qmodel: fx.GraphModule, path: str | os.PathLike, metadata: dict | None = None) -> Path:
    """Write the quantized network to the new directory `path`: written beside it first, then renamed.

    Args:
        qmodel: what `quantize` returned, float32, on any device.
        metadata: JSON that goes into the manifest as it is, such as the name of the architecture.

    Raises:
        ApotfxError: `path` exists, or `qmodel` is not a float32 model from `quantize`.
    """
    path = Path(path)
    require_new(path)
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    if not layers or not isinstance(qmodel, fx.GraphModule):
        raise ApotfxError("export: the model has no quantized layer; pass what apotfx.quantize returned")
    _require_finite(layers)
    # Copies, as safetensors refuses tensors that share memory, such as tied weights.
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in _float_state(qmodel, layers).items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ApotfxError(f"export: {name} is {tensor.dtype}, expected torch.float32; call model.float() first")
    for name, layer in layers.items():
        if layer.weight_quantizer is not None:
            n, _ = layer.integer_weight()
            tensors[f"{name}.{CODES}"] = pack_codes(n.cpu(), layer.weight_quantizer.levels)
    weights = safetensors.torch.save(tensors)
    batch_norms = _batch_norms(qmodel)
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": metadata or {},
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "layers": [_describe(name, layer, batch_norms.get(name)) for name, layer in layers.items()],
        "graph": describe_graph(qmodel),
        "tensors": {name: _describe_tensor(tensor) for name, tensor in tensors.items()},
    }
    manifest["manifest_sha256"] = _manifest_checksum(manifest)
    write_directory(path, {WEIGHTS: weights, MANIFEST: json.dumps(manifest, indent=1).encode()})
    return path


def _require_finite(layers: dict[str, QuantLayer]) -> None:
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            if not tensor.isfinite().all():
                raise ApotfxError(f"export: {name}.{key} is not finite; the training diverged, export an earlier state")


def _float_state(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, Tensor]:
    """The state that stays in float: all but the quantized weights and the quantizers."""
    replaced = set()
    for name, layer in layers.items():
        quantized = [] if getattr(layer, "weight_quantizer", None) is None else ["weight"]
        quantized += [key for key in layer.state_dict() if key.startswith(("weight_quantizer.", "input_quantizer."))]
        replaced |= {f"{name}.{key}" for key in quantized}
    return {key: value for key, value in model.state_dict().items() if key not in replaced}


def _describe(name: str, layer: QuantLayer, batch_norm: tuple[str, nn.Module] | None) -> dict:
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    entry = {
        "name": name,
        **structure_of(layer, layer.float_type),
        "weight": None if weights is None else _describe_quantizer(weights, layer.integer_weight()[1]),
        "input": None if inputs is None else _describe_quantizer(inputs, inputs.scale),
        "rectifier": describe_rectifier(layer.rectifier),
    }
    if weights is not None and inputs is not None:
        entry["accumulator_bound"] = accumulator_bound(layer.weight.shape, weights.levels.max, inputs.levels.max)
    if batch_norm is not None:
        bn_name, bn = batch_norm
        multiplier, offset = folded_batch_norm(bn)
        entry["batch_norm"] = {"name": bn_name, "multiplier": multiplier.tolist(), "bias": offset.tolist()}
    return entry


def describe_rectifier(rectifier: tuple[float, float] | None) -> list | None:
    """JSON has no infinity."""
    return None if rectifier is None else [x if math.isfinite(x) else None for x in rectifier]


def structure_of(layer: nn.Module, float_type: type[nn.Module]) -> dict:
    geometry = Geometry.of(layer)
    structure = {
        "type": float_type.__name__,
        "shape": layer.weight.shape,
        "bias": layer.bias is not None,
        "operator": {"kind": type(geometry.operator).__name__, **geometry.operator._asdict()},
        "pad": geometry.pad,
        "pad_mode": geometry.pad_mode,
    }
    return json.loads(json.dumps(structure))  # as it will be read: lists for tuples


def _describe_quantizer(quantizer: Quantizer, scale: Tensor) -> dict:
    levels = quantizer.levels
    return {
        "scheme": levels.scheme,
        "bits": levels.bits,
        "signed": levels.signed,
        "dtype": str(storage_dtype(levels)).removeprefix("torch."),
        "levels": list(levels.ints),
        "shift_add_terms": [list(terms) for terms in levels.shift_add_terms],
        "clip": quantizer.used_clip.flatten().tolist(),
        "scale": scale.flatten().tolist(),
    }


def _batch_norms(qmodel: fx.GraphModule) -> dict[str, tuple[str, nn.Module]]:
    """Per layer the batch norm that is its only consumer, by name."""
    modules = dict(qmodel.named_modules())
    found: dict[str, set[str | None]] = {}
    for node in qmodel.graph.nodes:
        if node.op == "call_module":
            found.setdefault(node.target, set()).add(batch_norm_after(node, modules))
    # A layer that is called several times may have several, or one after some of the calls only.
    single = {layer: names.pop() for layer, names in found.items() if len(names) == 1}
    return {
        layer: (name, modules[name])
        for layer, name in single.items()
        if name is not None and modules[name].running_var is not None
    }


def _describe_tensor(tensor: Tensor) -> dict:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _manifest_checksum(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_integer(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """The manifest and the tensors of an export, both checked; codes are unpacked to integer levels.

    Returns:
        (manifest, tensors): tensors has `<layer>.weight` as integer levels for every quantized weight, and every float
        tensor under its state-dict name.

    Raises:
        ApotfxError: not an export, another format version, or altered, truncated, mixed, missing or additional files;
            names what.
    """
    manifest, tensors, problems = inspect_integer(path)
    if problems:
        raise ApotfxError(problems[0])
    return manifest, tensors


def inspect_integer(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor], list[str]]:
    """As `read_integer`, but a weights file with other contents than the manifest states is read too.

    Returns:
        (manifest, tensors, problems): what does not fit, a line each, the tensors with other contents by name.

    Raises:
        ApotfxError: files that cannot be read at all.
    """
    path = Path(path)
    manifest = read_manifest(path / MANIFEST)
    weights = _read_file(path / WEIGHTS)
    if surplus := sorted({file.name for file in path.iterdir()} - {MANIFEST, WEIGHTS}):
        raise ApotfxError(
            f"{path / surplus[0]}: is not part of an export, which is {MANIFEST} and {WEIGHTS}; remove it"
        )
    problems = []
    if hashlib.sha256(weights).hexdigest() != manifest["weights_sha256"]:
        problems.append(
            f"{path / WEIGHTS}: does not fit {MANIFEST} (checksum); it was altered, truncated or is another export's"
        )
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ApotfxError(problems[0] if problems else f"{path / WEIGHTS}: not a safetensors file ({error})") from error
    found = {name: _describe_tensor(tensor) for name, tensor in tensors.items()}
    for name in sorted(found.keys() | manifest["tensors"].keys()):
        got, expected = (dict(described.get(name) or {}) for described in (found, manifest["tensors"]))
        altered = got.pop("sha256", None) != expected.pop("sha256", None)
        if got != expected:
            raise ApotfxError(
                problems[0] if problems else
                f"{path / WEIGHTS}: {name} is {got or 'absent'}, {MANIFEST} says {expected or 'absent'}"
            )  # fmt: skip
        if altered:
            problems.append(f"{path / WEIGHTS}: {name} was altered (checksum); export the model again")
    for layer in manifest["layers"]:
        if layer["weight"] is not None:
            codes = tensors.pop(f"{layer['name']}.{CODES}")
            levels = level_set_of(layer["weight"])
            tensors[f"{layer['name']}.weight"] = unpack_codes(codes, levels, torch.Size(layer["shape"]))
    return manifest, tensors, problems


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ApotfxError(
            f"{path}: cannot be read ({error.strerror}); pass a directory that export_integer wrote"
        ) from error


def read_manifest(path: Path) -> dict:
    """The manifest in the file `path`, its checksum checked. Raises as `read_integer`."""
    content = _read_file(path)
    try:
        manifest = json.loads(content)
    except ValueError as error:
        raise ApotfxError(f"{path}: not JSON ({error}); it was altered or truncated") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ApotfxError(f"{path}: not the manifest of an integer export (format {FORMAT})")
    if manifest.get("version") != VERSION:
        raise ApotfxError(
            f"{path}: format version {manifest.get('version')}, expected {VERSION}; export the model again"
        )
    if manifest.get("manifest_sha256") != _manifest_checksum(manifest):
        raise ApotfxError(f"{path}: was altered (checksum); export the model again")
    return manifest


def level_set_of(entry: dict) -> LevelSet:
    levels = LevelSet(entry["scheme"], entry["bits"], entry["signed"])
    if list(levels.ints) != entry["levels"]:
        raise ApotfxError(f"{MANIFEST}: the levels of {levels} are {list(levels.ints)}, got {entry['levels']}")
    return levels
