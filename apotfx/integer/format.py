"""The file format of an exported network: written, read back and checked.

`weights.safetensors` holds, per quantized weight, bit-packed codes (`bits` each: the index of the level's
magnitude, and the sign as the highest bit), and as float32 whatever is not quantized: biases, batch norms,
float layers. `manifest.json` says what the codes mean; see manifest.schema.json. Nothing is pickled.
"""

import copy
import hashlib
import json
import math
import os
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from apotfx.errors import ApotfxError
from apotfx.files import require_new, write_directory
from apotfx.integer.codes import pack_codes, unpack_codes
from apotfx.integer.build import build_program
from apotfx.integer.manifest import (
    CODES,
    FLOAT_WEIGHT,
    FORMAT,
    MANIFEST,
    VERSION,
    WEIGHTS,
    checksum,
    describe_levels,
    find_problem,
    level_set_of,
    read_file,
    read_manifest,
)
from apotfx.layers import Geometry, QuantLayer
from apotfx.modules import attribute
from apotfx.operators import accumulator_bound
from apotfx.quantizers import Quantizer
from apotfx.state import uncalibrated
from apotfx.tensors import MAX_HEADER_BYTES, Damaged, parse_json, printable, read_tensors
from apotfx.integer.program import OPERATORS, Affine, Constant, FloatLayer, Program
from apotfx.reproducible import AttachedBatchNorm, folded_batch_norm
from apotfx.graph.functional import asks_for_metadata
from apotfx.graph.network import graph_of, reached_state, record_of
from apotfx.graph.passes import leave_in_float


def export_integer(
    qmodel: nn.Module,
    path: str | os.PathLike,
    metadata: dict | None = None,
    *,
    input_shape: Sequence[int] | None = None,
) -> Path:
    """Write the quantized network to the new directory `path`: written beside it first, then renamed.

    Layers that neither calibration nor training has reached, such as auxiliary heads inside a module that tracing kept
    whole, are written in float, which a warning says.

    Args:
        qmodel: what `quantize` returned, float32, on any device.
        metadata: JSON that goes into the manifest, such as the name of the architecture; the schema reserves some keys, of
            which `mean` and `std`, per channel of images / 255, serve the C program.
        input_shape: of one input, such as (C, H, W), for whoever translates the export; goes into the metadata.

    Raises:
        ApotfxError: `path` exists, `qmodel` is not a float32 model from `quantize`, or has state that is not finite or of
            a type that no export holds.
    """
    path = Path(path)
    require_new(path)
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    if not layers or not record_of(qmodel):
        raise ApotfxError("export: the model has no quantized layer; pass what apotfx.quantize returned")
    if names := uncalibrated(qmodel):
        listed = f"{', '.join(names[:5])}{' ...' * (len(names) > 5)}"
        if len(names) == len(layers) or any(node.target in names for node in graph_of(qmodel).nodes):
            raise ApotfxError(f"export: the clips of {listed} never saw data; calibrate the network or train it first")
        warnings.warn(f"export: layers {listed} never saw data; they are written in float", stacklevel=2)
        qmodel = copy.deepcopy(qmodel)
        leave_in_float(qmodel, dict.fromkeys(names, "no data reached it before the export"))
        layers = {name: layer for name, layer in layers.items() if name not in names}
    program = build_program(qmodel)
    norms = norms_of(program, qmodel)
    _require_finite(layers, norms)
    state = _float_state(qmodel, program, layers) | norms | computed_weights(program, qmodel)
    for name, tensor in state.items():
        if tensor.layout != torch.strided or tensor.is_quantized:
            kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
            raise ApotfxError(f"export: {name} is a {kind} tensor, an export holds dense ones; call to_dense() on it")
    # Copies, as safetensors refuses tensors that share memory, such as tied weights.
    tensors = {k: v.detach().to("cpu", copy=True).contiguous() for k, v in state.items()}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.dtype != torch.float32:
            raise ApotfxError(f"export: {name} is {tensor.dtype}, expected torch.float32; call model.float() first")
    for name, layer in layers.items():
        if layer.weight_quantizer is not None:
            n, _ = layer.integer_weight()
            tensors[f"{name}.{CODES}"] = pack_codes(n.cpu(), layer.weight_quantizer.levels)
    weights = safetensors.torch.save(tensors)
    metadata = metadata or {}
    if input_shape is not None:
        metadata = {**metadata, "input_shape": list(input_shape)}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "metadata": _as_json(metadata),
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "layers": [_describe(name, m) for name, m in layers.items()],
        "program": json.loads(json.dumps(program.to_json())),
        "tensors": {name: _describe_tensor(tensor) for name, tensor in tensors.items()},
    }
    manifest["manifest_sha256"] = checksum(manifest)
    if problem := find_problem(manifest):
        raise ApotfxError(f"export: {problem}")
    content = json.dumps(manifest, indent=1).encode()
    try:
        parse_json(content)
    except Damaged as error:
        raise ApotfxError(f"export: no reader would take the manifest, {error}; pass simpler metadata") from None
    write_directory(path, {WEIGHTS: weights, MANIFEST: content})
    return path


def _read_in_float(qmodel: nn.Module, layers: dict[str, QuantLayer]) -> set[str]:
    """The names of those of `layers` whose float weight something else reads: the graph, or a module kept whole."""
    read = {name for name, layer in layers.items() if layer.weight_is_read}
    for node in graph_of(qmodel).nodes:
        name, _, key = node.target.rpartition(".") if node.op == "get_attr" else ("", "", "")
        if name in layers and key == "weight":
            read |= {name for user in node.users if not asks_for_metadata(user)}
    return read


def _require_finite(layers: dict[str, QuantLayer], norms: dict[str, Tensor]) -> None:
    state = {f"{name}.{key}": tensor for name, layer in layers.items() for key, tensor in layer.state_dict().items()}
    for name, layer in layers.items():
        tensors = (("weight", layer.weight), ("bias", layer.bias))
        state |= {f"{name}.{key}": tensor for key, tensor in tensors if tensor is not None}
    for name, tensor in (state | norms).items():
        if not tensor.isfinite().all():
            raise ApotfxError(f"export: {name} is not finite; the training diverged, export an earlier state")


def _as_json(metadata: dict) -> dict:
    try:
        return json.loads(json.dumps(metadata, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ApotfxError(
            f"export: the metadata are not JSON ({error}); pass texts, finite numbers and such"
        ) from error


def _float_state(qmodel: nn.Module, program: Program, layers: dict[str, QuantLayer]) -> dict[str, Tensor]:
    """The state that stays in float: of a quantized layer the bias, and the weight if that is not quantized."""
    state, read = state_outside(qmodel, program, layers), _read_in_float(qmodel, layers)
    for name, layer in layers.items():
        if layer.is_replaced:
            raise ApotfxError(
                f"export: the code of the module around layer {name}, kept whole, calls it with other weights than its own, "
                "which no export holds; leave the layer in float (scheme: float)"
            )
        if layer.is_walked and layer.additions:
            raise ApotfxError(
                f"export: {name} has {layer.additions[0]}, which no export holds, and the code of the module around it, "
                "kept whole, looks through what it has; remove one or the other"
            )
        if layer.weight_quantizer is None:
            state[f"{name}.weight"] = layer.geometry.operator.from_parameter(layer.weight)
        elif name in read:
            state[f"{name}.{FLOAT_WEIGHT}"] = layer.weight
        if layer.bias is not None:
            state[f"{name}.bias"] = layer.bias
    return state


def norms_of(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """The batch norms of a network's program as the tensors of its export, the multiplication and the addition."""
    tensors: dict[str, Tensor] = {}
    for step in program.steps:
        if isinstance(step, Affine):
            tensors |= zip(step.tensors(), folded_batch_norm(model.get_submodule(step.norm)))
    return tensors


def computed_weights(program: Program, model: nn.Module) -> dict[str, Tensor]:
    """Weights and biases of layers that stay in float which are no state of `model`, but computed from it."""
    state, found = reached_state(model), {}
    for step in program.steps:
        for name in step.tensors() if isinstance(step, FloatLayer) else ():
            if name not in state:
                found[name] = attribute(model, name).detach()
    return found


def state_outside(model: nn.Module, program: Program, layers: Collection[str]) -> dict[str, Tensor]:
    """What `model` computes with, by state-dict name, without what belongs to `layers` or to batch norms that are steps."""
    norms = {step.norm for step in program.steps if isinstance(step, Affine)}
    attached = {name.rpartition(".")[0] for name in norms if isinstance(model.get_submodule(name), AttachedBatchNorm)}
    read = {step.tensor for step in program.steps if isinstance(step, Constant)}
    return {
        key: value.detach()
        for key, value in reached_state(model).items()
        if not _is_inside(key, layers)
        and (key in read or not _is_inside(key, norms) and key.rpartition(".")[0] not in attached)
    }


def _is_inside(key: str, layers: Collection[str]) -> bool:
    parts = key.split(".")
    return any(".".join(parts[:depth]) in layers for depth in range(1, len(parts)))


def _describe(name: str, layer: QuantLayer) -> dict:
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    entry = {
        "name": name,
        **structure_of(layer, layer.kind),
        "weight": None if weights is None else _describe_quantizer(weights, layer.integer_weight()[1]),
        "input": None if inputs is None else _describe_quantizer(inputs, inputs.scale),
        "rectifier": describe_rectifier(layer.rectifier),
    }
    if weights is not None and inputs is not None:
        entry["accumulator_bound"] = accumulator_bound(
            torch.Size(entry["shape"]), weights.levels.max, inputs.levels.max
        )
    return entry


def describe_rectifier(rectifier: tuple[float, float] | None) -> list | None:
    """JSON has no infinity."""
    return None if rectifier is None else [x if math.isfinite(x) else None for x in rectifier]


def rectifier_of(entry: dict) -> tuple[float, float] | None:
    """The inverse of `describe_rectifier`, of an entry of the manifest."""
    if entry["rectifier"] is None:
        return None
    low, high = entry["rectifier"]
    return (-math.inf if low is None else low, math.inf if high is None else high)


def geometry_of(entry: dict) -> Geometry:
    """What an entry of the manifest says in its `operator`, `pad` and `pad_mode`."""
    settings = {k: tuple(v) if isinstance(v, list) else v for k, v in entry["operator"].items() if k != "kind"}
    return Geometry(OPERATORS[entry["operator"]["kind"]](**settings), tuple(entry["pad"]), entry["pad_mode"])


def structure_of(layer: nn.Module, kind: str) -> dict:
    geometry = Geometry.of(layer)
    structure = {
        "type": kind,
        "shape": geometry.operator.from_parameter(layer.weight).shape,
        "bias": layer.bias is not None,
        "operator": {"kind": type(geometry.operator).__name__, **geometry.operator._asdict()},
        "pad": geometry.pad,
        "pad_mode": geometry.pad_mode,
    }
    return json.loads(json.dumps(structure))  # as it will be read: lists for tuples


def _describe_quantizer(quantizer: Quantizer, scale: Tensor) -> dict:
    clip, scale = (values.flatten().tolist() for values in (quantizer.used_clip, scale))
    return describe_levels(quantizer.levels) | {"clip": clip, "scale": scale}


def _describe_tensor(tensor: Tensor) -> dict:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def read_integer(path: str | os.PathLike, float_model: nn.Module | None = None) -> tuple[dict, dict[str, Tensor]]:
    """The manifest and the tensors of an export, both checked; codes are unpacked to integer levels.

    Args:
        float_model: what the export belongs to, if that is known: files far larger than its state are not read.

    Returns:
        (manifest, tensors): tensors has `<layer>.weight` as integer levels for every quantized weight, and every float
        tensor under its state-dict name.

    Raises:
        ApotfxError: not an export, another format version, or altered, truncated, mixed, missing or additional files;
            names what.
    """
    manifest, tensors, problems = inspect_integer(path, float_model)
    if problems:
        raise ApotfxError(problems[0])
    return manifest, tensors


def inspect_integer(
    path: str | os.PathLike, float_model: nn.Module | None = None
) -> tuple[dict, dict[str, Tensor], list[str]]:
    """As `read_integer`, but a weights file with other contents than the manifest states is read too.

    Returns:
        (manifest, tensors, problems): what does not fit, a line each, the tensors with other contents by name.

    Raises:
        ApotfxError: files that cannot be read at all.
    """
    path = Path(path)
    manifest = read_manifest(path / MANIFEST)
    _require_nothing_else(path)
    weights = read_file(path / WEIGHTS, max_bytes=_max_bytes(manifest, path, float_model))
    problems = []
    if hashlib.sha256(weights).hexdigest() != manifest["weights_sha256"]:
        problems.append(
            f"{path / WEIGHTS}: does not fit {MANIFEST} (checksum); it was altered, truncated or is another export's"
        )
    try:
        tensors = read_tensors(weights)
        described = {name: _describe_tensor(tensor) for name, tensor in tensors.items()}
        _require_as_stated(described, manifest["tensors"])
    except Damaged as error:
        problem = problems[0] if problems else f"{path / WEIGHTS}: {error}; export the model again"
        raise ApotfxError(problem) from error
    for name in sorted(tensors):
        if described[name] != manifest["tensors"][name]:
            problems.append(f"{path / WEIGHTS}: {name} was altered (checksum); export the model again")
    for layer in manifest["layers"]:
        problems += [f"{path / WEIGHTS}: {problem}" for problem in _unpack_layer(layer, tensors)]
    program = Program.from_json(manifest["program"])
    for name in sorted({name for step in program.steps if isinstance(step, Affine) for name in step.tensors()}):
        if not tensors[name].isfinite().all():
            problems.append(f"{path / WEIGHTS}: {name} is not finite; export the model again")
    return manifest, tensors, problems


def _require_as_stated(described: dict[str, dict], stated: dict[str, dict]) -> None:
    """Raises: Damaged: the file has not the tensors that the manifest states, or of other shapes or types."""
    for name in sorted(described.keys() | stated.keys()):
        got, expected = (
            "absent" if name not in tensors else f"{tensors[name]['dtype']} {tensors[name]['shape']}"
            for tensors in (described, stated)
        )
        if got != expected:
            raise Damaged(f"{printable(name)} is {got}, {MANIFEST} says {expected}")


def _max_bytes(manifest: dict, path: Path, float_model: nn.Module | None) -> int:
    """Of the file of the weights, before anything is read or made of the sizes that the manifest states."""
    stated = sum(math.prod(t["shape"]) * getattr(torch, t["dtype"]).itemsize for t in manifest["tensors"].values())
    most = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    of = "half of the memory"
    if isinstance(float_model, nn.Module):
        # A weight that is used several times is exported as often, in a byte or less for each of its floats.
        tensors = (x for x in float_model.state_dict().values() if isinstance(x, Tensor) and not is_lazy(x))
        state = sum(4 * tensor.numel() for tensor in tensors)
        most, of = min((most, of), (4 * state + MAX_HEADER_BYTES, "what the model can have"))
    if stated > most:
        raise ApotfxError(f"{path / MANIFEST}: states {stated} bytes of weights, expected at most {most}, {of}")
    return stated + MAX_HEADER_BYTES


def _require_nothing_else(path: Path) -> None:
    try:
        with os.scandir(path) as files:
            surplus = next((file.name for file in files if file.name not in (MANIFEST, WEIGHTS)), None)
    except OSError as error:
        raise ApotfxError(f"{path}: cannot be listed ({error.strerror}); allow it to be read") from error
    if surplus is not None:
        name = surplus if surplus.isprintable() else ascii(surplus)
        raise ApotfxError(f"{path}/{name}: is not part of an export, which is {MANIFEST} and {WEIGHTS}; remove it")


def _unpack_layer(layer: dict, tensors: dict[str, Tensor]) -> list[str]:
    """Put the levels of a layer's weight in place of its codes; returns what is wrong with its tensors, a line each."""
    name, problems = layer["name"], []
    if layer["weight"] is not None:
        codes, levels = tensors.pop(f"{name}.{CODES}"), level_set_of(layer["weight"])
        n = tensors[f"{name}.weight"] = unpack_codes(codes, levels, torch.Size(layer["shape"]))
        if not torch.equal(pack_codes(n, levels), codes):
            problems.append(f"{name}.{CODES} sets unused bits or the sign of a zero; export the model again")
    for key in (f"{name}.weight", f"{name}.bias"):
        if key in tensors and not tensors[key].isfinite().all():
            problems.append(f"{key} is not finite; export the model again")
    return problems
