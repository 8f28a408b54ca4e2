"""Initial clips from data."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from . import functional as F
from .errors import ApotfxError
from .layers import QuantLayer
from .levels import LevelSet

METHODS = ("mse", "paper")
SAMPLES = 2**16  # elements of a tensor that a clip is fitted to, and of an activation kept per batch
# Clips tried, as fractions of the largest magnitude, in steps of 1/12 octave; 1 is one of them. Beyond it as the levels
# of apot are sparse near the clip: from 5 magnitude bits on up to three times the largest magnitude fits best.
CANDIDATES = torch.logspace(-5, 1.75, 82, base=2)
REFINEMENT = torch.logspace(-1 / 12, 1 / 12, 9, base=2)  # between the neighbours of the best of them


@torch.no_grad()
def fit_clip(x: Tensor, levels: LevelSet, shape: torch.Size) -> Tensor:
    """The clip that minimizes the mean squared quantization error of x.

    Args:
        x: any shape; [C, ...] with a clip per channel.
        levels: the level set.
        shape: of the clip: [] or [C, 1, ...].

    Returns:
        A float tensor of `shape`. Where x has nothing to represent (all zero, or nothing positive for an
        unsigned set) the clip is 1.
    """
    rows = x.detach().float().reshape(shape[0], -1) if shape else _sample(x).float().unsqueeze(0)
    largest = rows.abs().amax(1, keepdim=True) if levels.signed else rows.amax(1, keepdim=True)
    something = largest > 0
    largest = torch.where(something, largest, 1.0)
    encoding = F.Levels.of(levels, x.device)
    best, best_error = largest, torch.full_like(largest, torch.inf)
    for fractions in (CANDIDATES, REFINEMENT):
        start = best
        for fraction in fractions.tolist():
            clip = start * fraction
            error = (F.fake_quantize(rows, clip, encoding) - rows).square().mean(1, keepdim=True)
            best = torch.where(error < best_error, clip, best)
            best_error = torch.minimum(error, best_error)
    return torch.where(something, best, 1.0).reshape(shape)


def _sample(x: Tensor) -> Tensor:
    """At most SAMPLES elements of x, evenly spread, as a copy of shape [n].

    The distance between them has no factor in common with their number, so that no column of an image is preferred.
    """
    distance = max(1, -(-x.numel() // SAMPLES))
    while distance > 1 and math.gcd(distance, x.numel()) > 1:
        distance += 1
    return x.detach().flatten()[::distance].clone()


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
        ApotfxError: nothing in `qmodel` is quantized, no batch was given, an unknown method, or a layer saw
            values that are not finite.
    """
    if method not in METHODS:
        raise ApotfxError(f"calibration method {method!r}: unknown; choose one of {', '.join(METHODS)}")
    layers = {name: m for name, m in qmodel.named_modules() if isinstance(m, QuantLayer)}
    if not layers:
        raise ApotfxError("calibrate: the model has no quantized layer; pass what apotfx.quantize returned")
    if method == "paper":
        for quantizer in (q for layer in layers.values() for q in (layer.weight_quantizer, layer.input_quantizer) if q):
            quantizer.set_clip(quantizer.clip)
        return qmodel

    for layer in layers.values():
        if layer.weight_quantizer is not None:
            weight, _ = layer.normalized_weight()
            layer.weight_quantizer.set_clip(fit_clip(weight, layer.weight_quantizer.levels, layer.weight_quantizer.clip.shape))
    for name, samples in _observe_inputs(qmodel, layers, batches).items():
        quantizer = layers[name].input_quantizer
        if not samples:
            raise ApotfxError(f"layer {name}: calibration never reached it; pass at least one batch that does")
        x = torch.cat(samples)
        if not x.isfinite().all():
            raise ApotfxError(f"layer {name}: its input during calibration is not finite; check the batches and weights")
        quantizer.set_clip(fit_clip(x, quantizer.levels, quantizer.clip.shape))
    return qmodel


def _observe_inputs(qmodel: nn.Module, layers: dict[str, QuantLayer], batches: Iterable) -> dict[str, list[Tensor]]:
    """Samples of the float input of every layer with an input quantizer; batch-norm statistics are put back."""
    samples = {name: [] for name, layer in layers.items() if layer.input_quantizer is not None}
    quantizers = {name: layers[name].input_quantizer for name in samples}
    buffers = {name: buffer.clone() for name, buffer in qmodel.named_buffers()}
    hooks = [
        layers[name].register_forward_pre_hook(lambda _, args, kept=kept: kept.append(_sample(args[0])))
        for name, kept in samples.items()
    ]
    try:
        for name in samples:
            layers[name].input_quantizer = None
        for batch in batches:
            qmodel(*batch) if isinstance(batch, (tuple, list)) else qmodel(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for name, quantizer in quantizers.items():
            layers[name].input_quantizer = quantizer
        for name, buffer in qmodel.named_buffers():
            buffer.copy_(buffers[name])
    return samples
