"""An export and the float model it came from, put together to a network that computes on integers."""

import os
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from apotfx.engine import say_once
from apotfx.errors import ApotfxError
from apotfx.generated_code import require_writable_names
from apotfx.integer.format import (
    describe_batch_norms,
    describe_rectifier,
    read_integer,
    state_outside,
    structure_of,
)
from apotfx.integer.graph import describe_graph, layer_type, require_same_graph
from apotfx.integer.layers import Affine, IntegerLayer
from apotfx.integer.manifest import FLOAT_WEIGHT, WEIGHTS, level_set_of
from apotfx.integer.onednn import ByteNetwork, what_onednn_lacks
from apotfx.layers import Geometry, float_type_of, kind_of
from apotfx.modules import has_hooks
from apotfx.reproducible import ReproducibleBatchNorm, folded_batch_norm
from apotfx.graph.passes import Prepared
from apotfx.graph.network import load_reached_state, require_traceable

BACKENDS = ("reference", "onednn")


def load_integer(
    path: str | os.PathLike,
    float_model: nn.Module,
    backend: str = "reference",
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
) -> nn.Module:
    """The exported network as a module that computes on integers, with the structure of `float_model`.

    Its results equal, in every bit, those of the quantized model in evaluation mode.

    Args:
        path: a directory that `export_integer` wrote.
        float_model: the float model that was quantized (its values do not matter); stays untouched.
        backend: "reference" runs on any device, on integers in float32 or float64, whichever is exact; "onednn" on
            8-bit integers on an x86 CPU, with what lies between the layers fused. Where oneDNN cannot, a warning
            says so once and the network is the reference.
        concrete_args, example_inputs: what `quantize` was given.

    Returns:
        A GraphModule (or, as from `quantize`, a copy of `float_model`) in evaluation mode, on the device of `float_model`; or, with "onednn", a `ByteNetwork`, which
        stays on the CPU and refuses NaN.

    Raises:
        ApotfxError: as `read_integer`; or the export does not fit the model, with the name of what does not.
    """
    if backend not in BACKENDS:
        raise ApotfxError(f"backend {backend!r}: unknown; choose one of {', '.join(BACKENDS)}")
    manifest, tensors = read_integer(path, float_model)
    imodel = assemble(manifest, tensors, float_model, path, concrete_args, example_inputs)
    if backend == "onednn":
        lacking = what_onednn_lacks(imodel)
        if lacking is None:
            return ByteNetwork(imodel)
        say_once(f"backend onednn: {lacking}; the integer network runs as reference, which is slower")
    return imodel


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
        entry["name"]: _integer_layer(entry, matching[entry["name"]], prepared.weight(entry["name"]), tensors)
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
    state = state_outside(imodel, layers)
    stored = {k: v for k, v in tensors.items() if k.rpartition(".")[0] not in layers}
    for name in sorted(state.keys() | stored.keys()):
        expected, got = (_shape_and_dtype(d.get(name)) for d in (state, stored))
        if expected != got:
            raise ApotfxError(
                f"export {path}: {name} is {got}, the model has {expected}; pass the float model that was exported"
            )
    require_same_graph(manifest, describe_graph(imodel), path)
    load_reached_state(imodel, stored)
    batch_norms = describe_batch_norms(imodel)
    for entry in manifest["layers"]:
        if entry.get("batch_norm") != batch_norms.get(entry["name"]):
            raise ApotfxError(
                f"export {path}: the batch norm behind layer {entry['name']} is not what {WEIGHTS} and the model make "
                "it; export the model again"
            )
    _freeze_batch_norms(imodel.eval().requires_grad_(False))
    return imodel


def _shape_and_dtype(tensor: Tensor | None) -> str:
    return "absent" if tensor is None else f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"


def _freeze_batch_norms(imodel: nn.Module) -> None:
    """Replace each batch norm, in place, by the multiplication and the addition that it has become."""
    for name, module in list(imodel.named_modules()):
        if isinstance(module, ReproducibleBatchNorm) and module.running_var is not None and not has_hooks(module):
            imodel.set_submodule(name, Affine(*folded_batch_norm(module)).eval())


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


def _integer_layer(
    entry: dict,
    layer: nn.Module,
    float_weight: Tensor,
    tensors: dict[str, Tensor],
) -> IntegerLayer:
    name = entry["name"]
    weight, inputs = entry["weight"], entry["input"]
    levels = tensors[f"{name}.weight"]
    scale_shape = () if weight is None or len(weight["scale"]) == 1 else (-1,) + (1,) * (len(entry["shape"]) - 1)
    integer_layer = IntegerLayer(
        name=name,
        geometry=Geometry.of(layer),
        levels=torch.empty_like(float_weight, dtype=levels.dtype).copy_(levels),  # in the model's memory format
        weight_levels=None if weight is None else level_set_of(weight),
        weight_scale=torch.tensor([1.0] if weight is None else weight["scale"]).reshape(scale_shape),
        input_levels=None if inputs is None else level_set_of(inputs),
        input_clip=None if inputs is None else torch.tensor(inputs["clip"]).reshape(()),
        bias=tensors.get(f"{name}.bias"),
        kind=layer_type(layer),
    ).to(float_weight.device)
    integer_layer.stand_in_for(layer, tensors.get(f"{name}.{FLOAT_WEIGHT}"))
    for hooks in ("_forward_hooks", "_forward_pre_hooks"):
        for suffix in ("", "_with_kwargs"):
            vars(integer_layer)[hooks + suffix] = vars(layer)[hooks + suffix].copy()
    return integer_layer
