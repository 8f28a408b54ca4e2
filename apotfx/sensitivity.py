"""How much each layer's quantization costs, before anything is trained: the FIT metric.

Zandonati, Pol, Pierini, Sirkin, Kopetz, "FIT: A Metric for Model Sensitivity", ICLR 2023, arXiv 2210.08502. To second
order, and with the empirical Fisher information in the Hessian's place, noise on a weight or an activation raises the
loss by half the trace of its Fisher information times the mean squared noise. The noise is the library's own: what
`functional.fake_quantize` makes of the trained weights and of observed inputs, with the clips that `fit_clip` finds.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from . import functional as F
from .clips import fit_clip, sample
from .errors import ApotfxError
from .layers import FunctionalLayer, QuantLayer
from .levels import MAX_BITS, MIN_BITS, LevelSet
from .policy import BitPolicy, Rule
from .graph.passes import plan_of, quantize

SAMPLED_BATCHES = 8  # whose inputs are kept, to quantize them


@dataclass(frozen=True)
class Sensitivity:
    """What is known of one layer, or of several that share a weight and so must share its bits.

    Attributes:
        names: qualified names of the layers, as in the plan.
        is_end: whether one of them is the network's first or last.
        parameters: elements of the weight.
        macs: multiply-accumulates per example.
        weight_trace: of the weight's empirical Fisher information: the mean over examples of the squared norm of the
            gradient of an example's loss for the weight.
        input_trace: the same for the layers' inputs.
        weight_loss: by (scheme, bits), the predicted increase of the loss from quantizing the weight.
        input_loss: the same for the layers' inputs. Only what exists: powers of two end at 4 or 5 bits.
    """

    names: tuple[str, ...]
    is_end: bool
    parameters: int
    macs: int
    weight_trace: float
    input_trace: float
    weight_loss: dict[tuple[str, int], float]
    input_loss: dict[tuple[str, int], float]

    @property
    def name(self) -> str:
        return ", ".join(self.names)


@dataclass
class _Weight:
    """A weight, and the sum of the squared norms of its gradients; shared by the layers that share it."""

    value: Tensor | None = None  # a leaf, which the layers compute with
    squares: float = 0.0


@dataclass
class _Layer:
    """A layer, and what is gathered of it over all batches."""

    name: str
    module: QuantLayer
    is_end: bool
    signed_input: bool
    rectifier: tuple[float, float] | None  # see `QuantLayer`
    weight: _Weight
    macs: int = 0
    squares: float = 0.0  # of the gradients for its inputs
    samples: list[Tensor] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)  # of the present batch

    def before(self, module: QuantLayer, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Forward pre-hook: keeps the input."""
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        x = call.arguments["input"] if self.rectifier is None else call.arguments["input"].clamp(*self.rectifier)
        x = x.clone()  # so that it has a gradient of its own, whoever else reads the same tensor
        self.inputs.append(x if x.requires_grad else x.requires_grad_())
        call.arguments["input"] = self.inputs[-1]
        return call.args, call.kwargs

    def after(self, module: QuantLayer, args: tuple, output: Tensor) -> None:
        """Forward hook: counts."""
        # Each element of the output (of a transposed convolution's input) meets one weight per channel and tap.
        positions = self.inputs[-1] if getattr(module, "transposed", False) else output
        self.macs += positions.numel() * self.weight.value[0].numel()


def _leaf(weight: Tensor) -> Tensor:
    return weight.detach().clone().requires_grad_()


@torch.enable_grad()
def measure(
    model: nn.Module,
    batches: Iterable[tuple[Tensor | tuple[Tensor, ...], Tensor]],
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    schemes: Sequence[str] = ("apot", "uniform"),
    bits: Sequence[int] = range(MIN_BITS, MAX_BITS + 1),
    seed: int = 0,
) -> list[Sensitivity]:
    """The sensitivity of every layer of `model` that can be quantized, in order of execution.

    Each batch takes one forward and one backward pass in evaluation mode. The traces are exact for the inputs, and for
    the weights where a batch is a single example. In a larger one the losses of the examples are added up with random
    signs, and the squared norm of that sum's gradient is an unbiased estimate of the sum of the squared norms.

    Args:
        model: a trained float network that `quantize` takes; it is untouched.
        batches: (input or tuple of inputs, targets), as the network was trained on; the first dimension of the targets
            counts the examples.
        loss: (output, targets [B, ...]) -> [B], the loss of each example, such as
            `functools.partial(torch.nn.functional.cross_entropy, reduction="none")`.
        schemes: to measure.
        bits: to measure, each from 2 to 8; of weights with the sign, of inputs with the sign where they have one.
        seed: of the signs.

    Raises:
        ApotfxError: `quantize` cannot take the model, no batch was given, a loss that is not one number per example, a
            layer that no batch reaches, a value that is not finite, an unknown scheme or bits out of range.
    """
    options = _options(schemes, bits)
    qmodel, layers = _float_network(model)
    generator = torch.Generator().manual_seed(seed)
    count = 0
    for i, (inputs, targets) in enumerate(batches):
        signs = torch.randint(0, 2, (len(targets),), generator=generator) * 2 - 1
        losses = loss(qmodel(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,))), targets)
        if losses.shape != signs.shape:
            raise ApotfxError(
                f"sensitivity: the loss of a batch has shape {list(losses.shape)}, expected [{len(targets)}], one number "
                'per example; pass reduction="none" to it'
            )
        _gather((losses * signs.to(losses)).sum(), layers, keep_samples=i < SAMPLED_BATCHES)
        count += len(targets)
    if not count:
        raise ApotfxError("sensitivity: no batch was given; pass at least one")
    return [_sensitivity(tied, options, count) for tied in _by_weight(layers)]


def _options(schemes: Sequence[str], bits: Sequence[int]) -> list[tuple[str, int]]:
    for scheme in schemes:
        LevelSet(scheme, MIN_BITS)  # raises if there is no such scheme
    for number in bits:
        LevelSet("uniform", number)
    return list(itertools.product(schemes, bits))


def _float_network(model: nn.Module) -> tuple[nn.Module, list[_Layer]]:
    """A copy of `model` with the layers of its plan, all in float and observed."""
    qmodel = quantize(model, BitPolicy((Rule(scheme="uniform", weight_bits=8, activation_bits=8),))).eval()
    qmodel.requires_grad_(False)
    weights: dict[nn.Module, _Weight] = {}
    layers = []
    for planned in plan_of(qmodel).layers:
        if planned.quantized:
            module, facts = qmodel.get_submodule(planned.facts.name), planned.facts
            weight = weights.setdefault(module.weight_quantizer, _Weight())
            is_end = facts.is_first or facts.is_last
            layers.append(_Layer(facts.name, module, is_end, facts.signed_input, module.rectifier, weight))
            module.rectifier = None  # its gradient is 0 where the quantized input is 0, the loss's is not
    for layer in layers:
        module = layer.module
        if layer.weight.value is None:
            layer.weight.value = _leaf(module.weight)
        if isinstance(module, FunctionalLayer):
            module._weight = functools.partial(getattr, layer.weight, "value")
        else:
            module._modules.pop("parametrizations", None)
            module._parameters["weight"] = layer.weight.value
        module.weight_quantizer = module.input_quantizer = None
        module.train()  # computes in the network's own precision; evaluation would take float64
        module.register_forward_pre_hook(layer.before, with_kwargs=True)
        module.register_forward_hook(layer.after)
    return qmodel, layers


def _by_weight(layers: list[_Layer]) -> list[list[_Layer]]:
    groups: dict[int, list[_Layer]] = {}
    for layer in layers:
        groups.setdefault(id(layer.weight), []).append(layer)
    return list(groups.values())


def _gather(total: Tensor, layers: list[_Layer], *, keep_samples: bool) -> None:
    """Add the squared gradients of `total` to what is gathered, and forget the batch."""
    weights = [tied[0].weight for tied in _by_weight(layers) if tied[0].weight.value is not None]
    owners = weights + [layer for layer in layers for _ in layer.inputs]
    tensors = [weight.value for weight in weights] + [x for layer in layers for x in layer.inputs]
    for owner, grad in zip(owners, torch.autograd.grad(total, tensors, allow_unused=True), strict=True):
        owner.squares += 0.0 if grad is None else grad.square().sum().item()
    for layer in layers:
        if keep_samples:
            layer.samples += [sample(x) for x in layer.inputs]
        layer.inputs.clear()


def _sensitivity(tied: list[_Layer], options: list[tuple[str, int]], count: int) -> Sensitivity:
    weight = tied[0].weight
    input_loss = dict.fromkeys(options, 0.0)
    for layer in tied:
        if not layer.samples:
            raise ApotfxError(f"layer {layer.name}: no batch reaches it; pass at least one that does")
        x = torch.cat(layer.samples)
        if not (x.isfinite().all() and math.isfinite(layer.squares + weight.squares)):
            raise ApotfxError(
                f"layer {layer.name}: its input or a gradient is not finite; check the batches and weights"
            )
        added = _predicted(layer.squares / count, x, options, layer.signed_input)
        input_loss = {key: input_loss[key] + value for key, value in added.items() if key in input_loss}
    return Sensitivity(
        names=tuple(layer.name for layer in tied),
        is_end=any(layer.is_end for layer in tied),
        parameters=weight.value.numel(),
        macs=sum(layer.macs for layer in tied) // count,
        weight_trace=weight.squares / count,
        input_trace=sum(layer.squares for layer in tied) / count,
        weight_loss=_predicted(weight.squares / count, weight.value.detach(), options, True),
        input_loss=input_loss,
    )


def _predicted(trace: float, x: Tensor, options: list[tuple[str, int]], signed: bool) -> dict[tuple[str, int], float]:
    """By option, half of trace times the mean squared error of quantizing x."""
    predicted = {}
    for scheme, bits in options:
        try:
            levels = LevelSet(scheme, bits, signed)
        except ApotfxError:  # powers of two beyond what 16 bits hold
            continue
        error = F.fake_quantize(x, fit_clip(x, levels, torch.Size()), F.Levels(levels)) - x
        predicted[scheme, bits] = trace * error.square().mean().item() / 2
    return predicted
