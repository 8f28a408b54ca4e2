"""An export and the float model it came from, put together to a network that computes on integers."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from apotfx.engine import say_once
from apotfx.errors import ApotfxError
from apotfx.generated_code import require_writable_names
from apotfx.integer.build import build_program, layer_type, require_same_program
from apotfx.integer.format import (
    computed_weights,
    describe_rectifier,
    geometry_of,
    norms_of,
    read_integer,
    rectifier_of,
    state_outside,
    structure_of,
)
from apotfx.integer.layers import Affine as AffineModule
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.manifest import FLOAT_WEIGHT, level_set_of
from apotfx.integer.network import IntegerNetwork, as_program
from apotfx.integer.onednn import ByteNetwork, what_onednn_lacks
from apotfx.integer.program import Affine, Program
from apotfx.layers import float_type_of, kind_of
from apotfx.graph.passes import Prepared
from apotfx.graph.network import load_reached_state, require_traceable

BACKENDS = ("reference", "onednn")


def load_integer(
    path: str | os.PathLike,
    float_model: nn.Module | None = None,
    backend: str = "reference",
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
) -> nn.Module:
    """The exported network as a module that computes on integers.

    Its results equal, in every bit, those of the quantized model in evaluation mode.

    Args:
        path: a directory that `export_integer` wrote.
        float_model: the float model that was quantized (its values do not matter), which the export is compared with;
            stays untouched. Not needed where the program says all of the network.
        backend: "reference" runs on any device, on integers in float32 or float64, whichever is exact; "onednn" on
            8-bit integers on an x86 CPU, with what lies between the layers fused. Where oneDNN cannot, a warning
            says so once and the network is the reference.
        concrete_args, example_inputs: what `quantize` was given.

    Returns:
        Without `float_model` an `IntegerNetwork` on the CPU. With it a GraphModule (or, as from `quantize`, a copy of
        `float_model`) in evaluation mode, on the device of `float_model`, with its structure. With "onednn" a
        `ByteNetwork`, which stays on the CPU and refuses NaN.

    Raises:
        ApotfxError: as `read_integer`; or the export does not fit the model, with the name of what does not; or it has
            steps that need the model's code.
    """
    if backend not in BACKENDS:
        raise ApotfxError(f"backend {backend!r}: unknown; choose one of {', '.join(BACKENDS)}")
    manifest, tensors = read_integer(path, float_model)
    if float_model is None:
        imodel = stand_alone(manifest, tensors, path)
    else:
        imodel = assemble(manifest, tensors, float_model, path, concrete_args, example_inputs)
    if backend == "onednn":
        lacking = what_onednn_lacks(imodel)
        if lacking is None:
            return ByteNetwork(imodel)
        say_once(f"backend onednn: {lacking}; the integer network runs as reference, which is slower")
    return imodel


def stand_alone(manifest: dict, tensors: dict[str, Tensor], path: str | os.PathLike) -> IntegerNetwork:
    """The program of an export that was read, with its numbers; see `load_integer`. `path` is for messages."""
    layers = {entry["name"]: integer_layer(entry, tensors) for entry in manifest["layers"]}
    program = Program.from_json(manifest["program"])
    named = dict.fromkeys(name for step in program.steps for name in step.tensors())
    network = IntegerNetwork(program, layers, {name: tensors[name] for name in named}).eval()
    if (reason := network.what_lacks()) is not None:
        raise ApotfxError(f"export {path}: {reason}; pass it: load_integer(path, float_model)")
    return network


def opened(
    source: nn.Module | str | os.PathLike, input_shape: Sequence[int] | None
) -> tuple[IntegerNetwork, tuple[int, ...], dict]:
    """What a target translates: (the network, the shape of one input, the metadata of its export).

    Args:
        source: an export that stands alone, or what `load_integer` returned with backend "reference".
        input_shape: None for what the export says.

    Raises:
        ApotfxError: as `load_integer`; or nothing says the shape.
    """
    if isinstance(source, nn.Module):
        network, metadata = as_program(source), {}
    else:
        manifest, tensors = read_integer(source)
        network, metadata = stand_alone(manifest, tensors, source), manifest["metadata"]
    shape = metadata.get("input_shape") if input_shape is None else input_shape
    if shape is None:
        raise ApotfxError(f"input_shape: {source} does not say it; pass that of one input, such as (3, 224, 224)")
    return network, tuple(shape) if isinstance(shape, list) else shape, metadata


def assemble(
    manifest: dict,
    tensors: dict[str, Tensor],
    float_model: nn.Module,
    path: str | os.PathLike,
    concrete_args: dict[str, object] | None = None,
    example_inputs: object | None = None,
) -> nn.Module:
    """The reference network of an export that was read; see `load_integer`. `path` is for messages."""
    require_traceable(float_model)
    require_writable_names(float_model)
    prepared = Prepared(float_model, concrete_args, example_inputs)
    for name, parameter in prepared.model.named_parameters():
        if parameter.is_meta:
            raise ApotfxError(f"export {path}: {name} of the model is on the meta device; pass a model with values")
    imodel = prepared.model
    matching = {entry["name"]: _matching_layer(prepared, entry, path) for entry in manifest["layers"]}
    unsigned = {entry["name"] for entry in manifest["layers"] if entry["input"] and not entry["input"]["signed"]}
    layers = {
        entry["name"]: _in_place_of(matching[entry["name"]], entry, prepared.weight(entry["name"]), tensors)
        for entry in manifest["layers"]
    }
    rectifiers = prepared.finish(layers, unsigned)
    for entry in manifest["layers"]:
        got = describe_rectifier(rectifiers.get(entry["name"]))
        if got != entry["rectifier"]:
            raise ApotfxError(
                f"export {path}: the input of layer {entry['name']} is clamped to {entry['rectifier']}, in the model to "
                f"{got}; pass the float model that was exported"
            )
    program = build_program(imodel)
    norms = norms_of(program, imodel)
    computed = computed_weights(program, imodel)
    state = state_outside(imodel, program, layers) | norms | computed
    stored = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in layers}
    for name in sorted(state.keys() | stored.keys()):
        expected, got = (_shape_and_dtype(d.get(name)) for d in (state, stored))
        if expected != got:
            raise ApotfxError(
                f"export {path}: {name} is {got}, the model has {expected}; pass the float model that was exported"
            )
    require_same_program(manifest["program"], program.to_json(), path)
    load_reached_state(imodel, {k: v for k, v in stored.items() if k not in norms | computed})
    for name in dict.fromkeys(step.norm for step in program.steps if isinstance(step, Affine)):
        frozen, norm = AffineModule(stored[f"{name}.multiplier"], stored[f"{name}.offset"]), imodel.get_submodule(name)
        for key in state.keys() & {f"{name}.{key}" for key in norm.state_dict()}:  # what forward reads besides
            frozen.register_buffer(key.rpartition(".")[2], state[key])
        imodel.set_submodule(name, frozen.to(norm.running_var.device))
    return imodel.eval().requires_grad_(False)


def _shape_and_dtype(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _matching_layer(prepared: Prepared, entry: dict, path: str | os.PathLike) -> nn.Module:
    fix = "pass the float model that was exported"
    try:
        layer = prepared.model.get_submodule(entry["name"])
    except AttributeError:
        raise ApotfxError(f"export {path}: layer {entry['name']} is not in the model; {fix}") from None
    structure = {"type": type(layer).__name__}
    if float_type_of(layer) is not None:
        structure = structure_of(layer, kind_of(layer))
    for key, got in structure.items():
        if got != entry[key]:
            raise ApotfxError(f"export {path}: layer {entry['name']} has {key} {entry[key]}, in the model {got}; {fix}")
    return layer


def integer_layer(entry: dict, tensors: dict[str, Tensor]) -> IntegerLayer:
    """A layer as its entry of the manifest and its tensors say."""
    name, weight, inputs = entry["name"], entry["weight"], entry["input"]
    scale_shape = () if weight is None or len(weight["scale"]) == 1 else (-1,) + (1,) * (len(entry["shape"]) - 1)
    return IntegerLayer(
        name=name,
        geometry=geometry_of(entry),
        levels=tensors[f"{name}.weight"],
        weight_levels=None if weight is None else level_set_of(weight),
        weight_scale=torch.tensor([1.0] if weight is None else weight["scale"]).reshape(scale_shape),
        input_levels=None if inputs is None else level_set_of(inputs),
        input_clip=None if inputs is None else torch.tensor(inputs["clip"]).reshape(()),
        bias=tensors.get(f"{name}.bias"),
        rectifier=rectifier_of(entry),
        kind=entry["type"],
    )


def _in_place_of(layer: nn.Module, entry: dict, float_weight: Tensor, tensors: dict[str, Tensor]) -> IntegerLayer:
    """The integer layer that stands in for a layer of the float model, in its memory format and on its device."""
    found = integer_layer(entry, tensors).to(float_weight.device)
    found.levels = torch.empty_like(float_weight, dtype=found.levels.dtype).copy_(found.levels)
    found.kind = layer_type(layer)
    found.stand_in_for(layer, tensors.get(f"{entry['name']}.{FLOAT_WEIGHT}"))
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs"):
            vars(found)[hooks + suffix] = vars(layer)[hooks + suffix].copy()
    return found
