"""Values for a network with random weights that make its output depend on all of it, as that of a trained one does.

Fresh networks are degenerate: batch norms know nothing of their inputs, many branches and heads begin at zero, and what
depends on the input shrinks from layer to layer until biases are all that is left. And they are chaotic: with random
weights, 8 bits at the first layer of an EfficientNet move its output by more than another image does. So, in one run of
the network on `inputs` in evaluation:

- a parameter whose values are all the same, or that belongs to a batch norm, becomes random: what multiplies (the weight
  of a norm, a layer scale) lies between 0.5 and 1.5, or that times its value; what is added (a bias) gets a standard
  deviation of 0.1, or, in a batch norm, a mean of 0.5 and a standard deviation of 0.3;
- the weight of a convolution or linear layer becomes the sum of its random weight and of its gradient under random
  gradients of the layer's output, of the same norm: as training does it, it turns the weight towards what sets the
  samples apart at the layer's input;
- it is scaled so that each layer's output has a standard deviation of 1 within channels (layer-sequential unit variance:
  Mishkin and Matas, ICLR 2016, arXiv 1511.06422), and its bias, where it has one, is set to a mean output as above;
- a batch norm gets the mean and the variance of its input as running statistics.
"""

import functools
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

SHIFT, SPREAD = 0.5, 0.3  # of biases: more than half of what a ReLU sees passes
LEAST_VARIANCE = 0.1  # of a batch norm's channel, as a share of the mean over channels: no channel is blown up
MULTIPLIES = re.compile(r"(weight|gamma|scale|gain)\w*$|(^|\.)g$")


def bind(inputs: Tensor | Sequence | Mapping[str, object]) -> tuple[tuple, dict]:
    """Inputs of a network as (positional, keyword) arguments."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    return (tuple(inputs), {}) if isinstance(inputs, (tuple, list)) else ((inputs,), {})


@torch.no_grad()
def initialize_from_data(model: nn.Module, inputs: Tensor | Sequence | Mapping[str, object]) -> None:
    """In place, all but parameters that do not train; the mode is kept."""
    modes = {module: module.training for module in model.modules()}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.requires_grad and parameter.is_floating_point():
                _randomize(name, parameter, module)
    embeddings = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    done: set[nn.Module] = set()
    args, kwargs = bind(inputs)
    with ExitStack() as stack:
        for module in model.modules():
            if getattr(module, "running_var", None) is not None:
                hook = module.register_forward_pre_hook(functools.partial(_take_statistics, done))
            elif _is_layer(module) and module.weight not in embeddings:
                hook = module.register_forward_hook(functools.partial(_learn, done), with_kwargs=True)
            else:
                continue
            stack.callback(hook.remove)
        model.eval()(*args, **kwargs)
    for module, mode in modes.items():
        module.training = mode


def _randomize(name: str, parameter: nn.Parameter, module: nn.Module) -> None:
    """Some packages give the weights of batch norms random values, near zero."""
    is_batch_norm = getattr(module, "running_var", None) is not None
    if not parameter.numel() or (not is_batch_norm and (parameter != parameter.flatten()[0]).any()):
        return
    value = 0.0 if is_batch_norm else parameter.flatten()[0].item()
    is_vector = parameter.numel() == max(parameter.shape, default=1)
    if value or (is_vector and MULTIPLIES.search(name)):
        if parameter.numel() > 1 or not value:
            parameter.copy_((torch.rand_like(parameter) + 0.5) * (value if abs(value) > 0.1 else 1))
    elif is_batch_norm:
        parameter.normal_(SHIFT, SPREAD)
    else:
        parameter.normal_(std=0.1)


def _is_layer(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() > 1 and weight.requires_grad and not isinstance(module, nn.Embedding)


def _learn(done: set, layer: nn.Module, args: tuple, kwargs: dict, output: object) -> Tensor | None:
    if layer in done or not isinstance(output, Tensor) or not output.is_floating_point() or output.numel() < 2:
        return None
    done.add(layer)
    channel = 1 if isinstance(layer, nn.modules.conv._ConvNd) else output.dim() - 1
    weight, bias = layer.weight, getattr(layer, "bias", None)
    with torch.enable_grad():
        output = layer.forward(*(x.detach() if isinstance(x, Tensor) else x for x in args), **kwargs)
    wanted = torch.randn_like(output)
    wanted -= wanted.mean(0) if len(wanted) > 1 else _means(wanted, channel)
    (gradient,) = torch.autograd.grad(output, weight, wanted)
    weight.copy_(weight / _norm(weight) + gradient / _norm(gradient))

    output = layer.forward(*args, **kwargs)
    means = _means(output, channel)
    deviation = (output - means).square().mean().sqrt()
    if not deviation > 1e-6 * output.abs().max():
        return None
    weight.div_(deviation)
    if isinstance(bias, nn.Parameter) and bias.requires_grad and bias.numel() == means.numel():
        bias.sub_(means.flatten()).div_(deviation).add_(torch.randn_like(bias), alpha=SPREAD).add_(SHIFT)
    return layer.forward(*args, **kwargs)


def _means(x: Tensor, channel: int) -> Tensor:
    """Per channel, of the number of dimensions that `x` has."""
    return x.mean([i for i in range(x.dim()) if i != channel], keepdim=True)


def _norm(x: Tensor) -> Tensor:
    return x.norm().clamp(min=torch.finfo(x.dtype).tiny)


def _take_statistics(done: set, norm: nn.Module, args: tuple) -> None:
    x = args[0]
    if norm in done or x.shape[1] != norm.running_var.numel():
        return
    done.add(norm)
    values = x.movedim(1, 0).flatten(1).to(norm.running_var)
    variance = values.var(1, correction=0)
    least = LEAST_VARIANCE * variance.mean()
    norm.running_mean.copy_(values.mean(1))
    norm.running_var.copy_(variance.clamp(min=least) if least > 0 else torch.ones_like(variance))
