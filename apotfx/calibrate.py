"""Initial clips of a whole network, from its weights and from batches."""

import functools
import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .clips import fit_clip, sample
from .errors import ApotfxError
from .layers import QuantLayer

METHODS = ("mse", "paper")


@contextmanager
def observed_inputs(layers: dict[str, QuantLayer]) -> Iterator[dict[str, list[Tensor]]]:
    """While active, keeps a `sample` of the input at each call of each of `layers`, by name, in order of execution."""
    samples: dict[str, list[Tensor]] = {}

    def keep(name: str, module: nn.Module, args: tuple, kwargs: dict) -> None:
        samples.setdefault(name, []).append(module.rectify(sample(args[0] if args else kwargs["input"])))

    hooks = [
        layer.register_forward_pre_hook(functools.partial(keep, name), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        yield samples
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def calibrate(qmodel: nn.Module, batches: Iterable[Tensor], *, method: str = "mse") -> nn.Module:
    """Set every clip of `qmodel` from its weights and from `batches`, in place; nothing else changes.

    The inputs of all layers are observed with their quantizers switched off, in the mode (train or eval) that the
    model is in. A network that is fresh should be in training mode, so that its batch norms use the batches.

    Args:
        qmodel: what `quantize` returned.
        batches: inputs of the model. A tuple or list is passed as its positional arguments.
        method: "mse": least mean squared error. "paper": 3 standard deviations for weights, 8 for inputs;
            then `batches` is not read.

    Returns:
        qmodel.

    Raises:
        ApotfxError: nothing in `qmodel` is quantized, no batch was given, a batch with more parts than the model has
            inputs, an unknown method, or a layer saw values that are not finite.
    """
    if method not in METHODS:
        raise ApotfxError(f"calibration method {method!r}: unknown; choose one of {', '.join(METHODS)}")
    if isinstance(batches, Tensor):
        raise ApotfxError("calibrate: batches is one tensor, expected an iterable of inputs; pass [x]")
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        raise ApotfxError("calibrate: the model has no quantized layer; pass what apotfx.quantize returned")
    if method == "paper":
        for quantizer in (q for layer in layers.values() for q in (layer.weight_quantizer, layer.input_quantizer) if q):
            quantizer.set_clip(quantizer.clip)
        return qmodel

    for layer in layers.values():
        if layer.weight_quantizer is not None:
            quantizer = layer.weight_quantizer
            quantizer.set_clip(fit_clip(quantizer.in_clip_units(layer.weight), quantizer.levels, quantizer.clip.shape))
    quantized_inputs = {name: layer for name, layer in layers.items() if layer.input_quantizer is not None}
    samples = _observe_float(qmodel, quantized_inputs, batches)
    for name, layer in quantized_inputs.items():
        quantizer = layer.input_quantizer
        if name not in samples:
            raise ApotfxError(f"layer {name}: calibration never reached it; pass at least one batch that does")
        x = torch.cat(samples[name])
        if not x.numel():
            raise ApotfxError(f"layer {name}: its input during calibration is empty; pass at least one image")
        if not x.isfinite().all():
            raise ApotfxError(
                f"layer {name}: its input during calibration is not finite; check the batches and weights"
            )
        quantizer.set_clip(fit_clip(x, quantizer.levels, quantizer.clip.shape))
    return qmodel


def _observe_float(qmodel: nn.Module, layers: dict[str, QuantLayer], batches: Iterable) -> dict[str, list[Tensor]]:
    """Samples of the inputs of `layers` with no input quantized; batch-norm statistics are put back."""
    quantizers = {name: layer.input_quantizer for name, layer in layers.items()}
    buffers = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    try:
        for layer in layers.values():
            layer.input_quantizer = None
        with observed_inputs(layers) as samples:
            for batch in batches:
                inputs = batch if isinstance(batch, (tuple, list)) else (batch,)
                _require_inputs(qmodel, inputs)
                qmodel(*inputs)
    finally:
        for name, quantizer in quantizers.items():
            layers[name].input_quantizer = quantizer
        for name, buffer in qmodel.named_buffers():
            buffer.copy_(buffers[name])
    return samples


def _require_inputs(qmodel: nn.Module, inputs: tuple | list) -> None:
    count = len(inputs)
    if not all(isinstance(x, Tensor) for x in inputs):
        found = ", ".join(type(x).__name__ for x in inputs)
        raise ApotfxError(f"calibrate: a batch holds {found}; expected tensors, one per input of the model")
    accepted = len(inspect.signature(qmodel.forward).parameters)
    if count > accepted:
        raise ApotfxError(
            f"calibrate: a batch has {count} parts, the model takes {accepted}; pass inputs only, such as "
            "(images for images, labels in loader)"
        )
