"""Integer export: the trained network as a directory of integer codes, and back.

`weights.safetensors` holds, per quantized weight, bit-packed codes (`bits` each: the index of the level's
magnitude, and the sign as the highest bit), and as float32 whatever is not quantized: biases, batch norms,
float layers. `manifest.json` says what the codes mean. Nothing is pickled.
"""

import copy
import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, fx, nn

from .analysis import BATCH_NORMS, batch_norm_after
from .errors import ApotfxError
from .operators import accumulator_bound
from .layers import QUANT_LAYERS, Geometry, IntegerLayer, QuantLayer
from .levels import LevelSet
from .quantizers import Quantizer
from .rewrite import absorb_rectifiers, swap_layers, trace

FORMAT, VERSION = "apotfx-integer", 2
MANIFEST, WEIGHTS = "manifest.json", "weights.safetensors"
CODES = "weight_codes"


def pack_codes(n: Tensor, levels: LevelSet) -> Tensor:
    """Integer levels (any shape) as codes of `levels.bits` bits, first code in the lowest bits: uint8 [bytes]."""
    magnitudes = torch.tensor(levels.ints)
    index = torch.searchsorted(magnitudes, n.abs().flatten().to(magnitudes.dtype))
    code = index | ((n.flatten() < 0).to(index.dtype) << levels.magnitude_bits)
    bits = (code.unsqueeze(1) >> torch.arange(levels.bits)) & 1
    return torch.from_numpy(np.packbits(bits.to(torch.uint8).numpy().ravel(), bitorder="little"))


def unpack_codes(codes: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The inverse of `pack_codes`: integer levels of `shape` in the smallest integer type that holds them."""
    count = torch.Size(shape).numel()
    bits = np.unpackbits(codes.numpy(), count=count * levels.bits, bitorder="little").reshape(count, levels.bits)
    code = torch.from_numpy(bits).long() @ (2 ** torch.arange(levels.bits))
    magnitude = torch.tensor(levels.ints)[code & (2**levels.magnitude_bits - 1)]
    return (
        torch.where(code >> levels.magnitude_bits == 1, -magnitude, magnitude).reshape(shape).to(storage_dtype(levels))
    )


def storage_dtype(levels: LevelSet) -> torch.dtype:
    """The smallest integer type that holds every level."""
    if not levels.signed:
        return torch.uint8 if levels.max < 2**8 else torch.int16
    return torch.int8 if levels.max < 2**7 else torch.int16


def export_integer(qmodel: fx.GraphModule, path: str | os.PathLike) -> Path:
    """Write the quantized network to the new directory `path`: written beside it first, then renamed.

    Args:
        qmodel: what `quantize` returned, float32, on any device.

    Raises:
        ApotfxError: `path` exists, or `qmodel` is not a float32 model from `quantize`.
    """
    path = Path(path)
    if os.path.lexists(path):
        raise ApotfxError(f"export {path}: exists already; choose a new directory or remove it")
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
        "weights_sha256": hashlib.sha256(weights).hexdigest(),
        "layers": [_describe(name, layer, batch_norms.get(name)) for name, layer in layers.items()],
        "graph": _describe_graph(qmodel),
        "tensors": {k: {"shape": list(v.shape), "dtype": _dtype_name(v)} for k, v in tensors.items()},
    }
    manifest["manifest_sha256"] = _manifest_checksum(manifest)
    _write_directory(path, {WEIGHTS: weights, MANIFEST: json.dumps(manifest, indent=1).encode()})
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


def _describe_graph(graph_module: fx.GraphModule) -> list[dict]:
    """A dict per node: what it calls, with which inputs and constants; a quantized layer counts as the float one."""
    modules = dict(graph_module.named_modules())
    nodes = []
    for node in graph_module.graph.nodes:
        entry = {"name": node.name, "calls": str(getattr(node.target, "__name__", node.target))}
        entry["arguments"] = f"{node.args} {node.kwargs}"
        if node.op == "call_module":
            module = modules[node.target]
            quantized = isinstance(module, QuantLayer)
            batch_norm = isinstance(module, BATCH_NORMS)  # a synchronized one computes the same
            kind = module.float_type if quantized else BATCH_NORMS if batch_norm else type(module)
            entry["type"] = kind.__name__
            entry["settings"] = {} if quantized else _settings(module)
        nodes.append(entry)
    return json.loads(json.dumps(nodes))  # as it will be read: lists for tuples


def _settings(module: nn.Module) -> dict:
    plain = (bool, int, float, str, tuple, type(None))
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and type(v) in plain}


def _require_same_graph(manifest: dict, found: list[dict], path: str | os.PathLike) -> None:
    stored = manifest["graph"]
    exported = {entry["name"] for entry in manifest["layers"]}
    for i in range(max(len(stored), len(found))):
        a, b = (dict(nodes[i]) if i < len(nodes) else {"name": "the end"} for nodes in (stored, found))
        # Settings are compared where both have them: versions of torch may add some.
        settings = [d.pop("settings", {}) for d in (a, b)]
        shared = {} if a.get("calls") in exported else settings[0].keys() & settings[1].keys()
        differs = a != b or any(settings[0][key] != settings[1][key] for key in shared)
        if differs:
            here, there = (f"{d['name']} ({d.get('type', d.get('calls', '-'))})" for d in (a, b))
            raise ApotfxError(
                f"export {path}: its network has {here} where the model has {there}, or with other settings; pass the "
                "float model that was exported"
            )


def _describe(name: str, layer: QuantLayer, batch_norm: tuple[str, nn.Module] | None) -> dict:
    inputs, weights = layer.input_quantizer, layer.weight_quantizer
    entry = {
        "name": name,
        **_structure(layer, layer.float_type),
        "weight": None if weights is None else _describe_quantizer(weights, layer.integer_weight()[1]),
        "input": None if inputs is None else _describe_quantizer(inputs, inputs.scale),
        "rectifier": _describe_rectifier(layer.rectifier),
    }
    if weights is not None and inputs is not None:
        entry["accumulator_bound"] = accumulator_bound(layer.weight.shape, weights.levels.max, inputs.levels.max)
    if batch_norm is not None:
        bn_name, bn = batch_norm
        std = (bn.running_var + bn.eps).sqrt()
        multiplier = (1 if bn.weight is None else bn.weight.detach()) / std
        bias = (0 if bn.bias is None else bn.bias.detach()) - bn.running_mean * multiplier
        entry["batch_norm"] = {"name": bn_name, "multiplier": multiplier.tolist(), "bias": bias.tolist()}
    return entry


def _describe_rectifier(rectifier: tuple[float, float] | None) -> list | None:
    """JSON has no infinity."""
    return None if rectifier is None else [x if math.isfinite(x) else None for x in rectifier]


def _structure(layer: nn.Module, float_type: type[nn.Module]) -> dict:
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


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _manifest_checksum(manifest: dict) -> str:
    content = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _write_directory(path: Path, files: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        for name, content in files.items():
            (temporary / name).write_bytes(content)
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read_integer(path: str | os.PathLike) -> tuple[dict, dict[str, Tensor]]:
    """The manifest and the tensors of an export, both checked; codes are unpacked to integer levels.

    Returns:
        (manifest, tensors): tensors has `<layer>.weight` as integer levels for every quantized weight, and every float
        tensor under its state-dict name.

    Raises:
        ApotfxError: not an export, another format version, or altered, truncated or mixed files; names what.
    """
    path = Path(path)
    manifest = _read_manifest(path / MANIFEST)
    weights = _read_file(path / WEIGHTS)
    if hashlib.sha256(weights).hexdigest() != manifest["weights_sha256"]:
        raise ApotfxError(
            f"{path / WEIGHTS}: does not fit {MANIFEST} (checksum); it was altered, truncated or is another export's"
        )
    try:
        tensors = safetensors.torch.load(weights)
    except SafetensorError as error:
        raise ApotfxError(f"{path / WEIGHTS}: not a safetensors file ({error})") from error
    found = {k: {"shape": list(v.shape), "dtype": _dtype_name(v)} for k, v in tensors.items()}
    for name in sorted(found.keys() | manifest["tensors"].keys()):
        if found.get(name) != manifest["tensors"].get(name):
            raise ApotfxError(
                f"{path / WEIGHTS}: {name} is {found.get(name)}, {MANIFEST} says {manifest['tensors'].get(name)}"
            )
    for layer in manifest["layers"]:
        if layer["weight"] is not None:
            codes = tensors.pop(f"{layer['name']}.{CODES}")
            levels = _level_set(layer["weight"])
            tensors[f"{layer['name']}.weight"] = unpack_codes(codes, levels, torch.Size(layer["shape"]))
    return manifest, tensors


def _read_file(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ApotfxError(
            f"{path}: cannot be read ({error.strerror}); pass a directory that export_integer wrote"
        ) from error


def _read_manifest(path: Path) -> dict:
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


def _level_set(entry: dict) -> LevelSet:
    levels = LevelSet(entry["scheme"], entry["bits"], entry["signed"])
    if list(levels.ints) != entry["levels"]:
        raise ApotfxError(f"{MANIFEST}: the levels of {levels} are {list(levels.ints)}, got {entry['levels']}")
    return levels


def load_integer(path: str | os.PathLike, float_model: nn.Module) -> fx.GraphModule:
    """The exported network as a module that computes on integers, with the structure of `float_model`.

    Its results equal, in every bit, those of the quantized model in evaluation mode.

    Args:
        path: a directory that `export_integer` wrote.
        float_model: the float model that was quantized (its values do not matter); stays untouched.

    Returns:
        A GraphModule in evaluation mode, on the device of `float_model`.

    Raises:
        ApotfxError: as `read_integer`; or the export does not fit the model, with the name of what does not.
    """
    manifest, tensors = read_integer(path)
    imodel = trace(copy.deepcopy(float_model))
    matching = {entry["name"]: _matching_layer(imodel, entry, path) for entry in manifest["layers"]}
    unsigned = {entry["name"] for entry in manifest["layers"] if entry["input"] and not entry["input"]["signed"]}
    rectifiers = absorb_rectifiers(imodel, unsigned)
    layers = {
        entry["name"]: _integer_layer(entry, matching[entry["name"]], tensors, rectifiers.get(entry["name"]))
        for entry in manifest["layers"]
    }
    for entry in manifest["layers"]:
        got = _describe_rectifier(rectifiers.get(entry["name"]))
        if got != entry["rectifier"]:
            raise ApotfxError(
                f"export {path}: the input of layer {entry['name']} is clamped to {entry['rectifier']}, in the model to "
                f"{got}; pass the float model that was exported"
            )
    graph = _describe_graph(imodel)
    swap_layers(imodel, layers)
    state = {k: v for k, v in imodel.state_dict().items() if k.rpartition(".")[0] not in layers}
    stored = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in layers}
    for name in sorted(state.keys() | stored.keys()):
        expected, got = (tuple(d[name].shape) if name in d else "absent" for d in (state, stored))
        if expected != got:
            raise ApotfxError(
                f"export {path}: {name} is {got}, the model has {expected}; pass the model that was exported"
            )
    _require_same_graph(manifest, graph, path)
    imodel.load_state_dict(stored, strict=False)
    return imodel.eval().requires_grad_(False)


def _matching_layer(model: fx.GraphModule, entry: dict, path: str | os.PathLike) -> nn.Module:
    fix = "pass the float model that was exported"
    try:
        layer = model.get_submodule(entry["name"])
    except AttributeError:
        raise ApotfxError(f"export {path}: layer {entry['name']} is not in the model; {fix}") from None
    supported = type(layer) in QUANT_LAYERS
    for key, got in (_structure(layer, type(layer)) if supported else {"type": type(layer).__name__}).items():
        if got != entry[key]:
            raise ApotfxError(f"export {path}: layer {entry['name']} has {key} {entry[key]}, in the model {got}; {fix}")
    return layer


def _integer_layer(
    entry: dict, layer: nn.Module, tensors: dict[str, Tensor], rectifier: tuple[float, float] | None
) -> IntegerLayer:
    name, device = entry["name"], layer.weight.device
    weight, inputs = entry["weight"], entry["input"]
    channels = entry["shape"][0]
    for kind, quantizer in (("weight", weight), ("input", inputs)):
        for key, values in ({} if quantizer is None else {k: quantizer[k] for k in ("clip", "scale")}).items():
            if len(values) not in (1, channels) or not all(0 < value < math.inf for value in values):
                raise ApotfxError(
                    f"{MANIFEST}: layer {name} has the {kind} {key} {values}, expected 1 or {channels} numbers above 0"
                )
    levels = tensors[f"{name}.weight"]
    scale_shape = () if weight is None or len(weight["scale"]) == 1 else (-1,) + (1,) * (len(entry["shape"]) - 1)
    integer_layer = IntegerLayer(
        geometry=Geometry.of(layer),
        weight=torch.empty_like(layer.weight, dtype=levels.dtype).copy_(levels),  # in the model's memory format
        weight_levels=None if weight is None else _level_set(weight),
        weight_scale=torch.tensor([1.0] if weight is None else weight["scale"]).reshape(scale_shape),
        input_levels=None if inputs is None else _level_set(inputs),
        input_clip=None if inputs is None else torch.tensor(inputs["clip"]).reshape(()),
        bias=tensors.get(f"{name}.bias"),
        rectifier=rectifier,
    ).to(device)
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs"):
            vars(integer_layer)[hooks + suffix] = vars(layer)[hooks + suffix].copy()
    return integer_layer
