"""How much of a network's function is left in 8 bits, and how much 8 bits leave of it that nobody traced."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from zoo_init import bind

EQUAL = 200.0  # dB, of what is equal: float32 resolves 150
SAMPLE = 50_000
SHARES = tuple(i / 20 for i in range(6, 21))  # of the largest magnitude, that are tried as clip
ATEN = torch.ops.aten
OPERANDS = {
    ATEN.convolution.default: (0, 1),
    ATEN.addmm.default: (1, 2),
    ATEN.mm.default: (0, 1),
    ATEN.bmm.default: (0, 1),
}


def signal_to_noise(expected: Sequence[Tensor], got: Sequence[Tensor]) -> float | None:
    """In dB, of the worst of several outputs; None if none of them is floating-point and depends on the input.

    The signal is what differs between the samples of the batch (dimension 0): an output that is the same for every
    input says nothing about the network. Noise is all of the difference.
    """
    ratios = [_ratio(x.double(), y.double()) for x, y in zip(expected, got, strict=True) if x.is_floating_point()]
    return min((ratio for ratio in ratios if ratio is not None), default=None)


def _ratio(x: Tensor, y: Tensor) -> float | None:
    finite = x.isfinite()  # masks of attention are -inf
    x, y = x.where(finite, 0), y.where(finite, 0)
    varies = (x - x.mean(0)) if x.dim() and len(x) > 1 else x
    signal, noise = varies.square().sum().item(), (x - y).square().sum().item()
    if not signal > 1e-12 * x.square().sum().item():
        return None
    return min(EQUAL, 10 * math.log10(signal / noise)) if noise else EQUAL


def in_8_bits(model: nn.Module, inputs: Tensor | Sequence | Mapping[str, object]) -> tuple[object, list[dict]]:
    """(the outputs of the float network with both operands of every product with a parameter in 8 bits, the products).

    It works below the modules, on the operations that run, and shares nothing with the library that is tested. A layer
    that runs several times has one clip for all of its inputs, as in the library. Of each product it keeps the layer, its
    signal-to-noise ratio on the input that it has here, and the peak of that input in standard deviations; the worst
    comes first.
    """
    args, kwargs = bind(inputs)
    with _names(model) as running, torch.no_grad():
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        with _Observed(parameters, running) as observed:
            model(*args, **kwargs)
        with _EightBits(parameters, running, {key: fit(inputs) for key, inputs in observed.found.items()}) as products:
            outputs = model(*args, **kwargs)
    return outputs, sorted(products.found, key=lambda product: product["snr"])


class _Products(TorchDispatchMode):
    """Sees the products of an activation with what comes from parameters alone."""

    def __init__(self, parameters: set[int], running: list[str]):
        super().__init__()
        self.parameters, self.running = parameters, running

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        operands = [args[i] for i in OPERANDS.get(function, ())]
        if [self._is_weight(x) for x in operands].count(True) == 1:
            x, weight = sorted(operands, key=self._is_weight)
            layer = self.running[-1] if self.running else ""
            return self.product(function, args, kwargs, x, (layer, weight.shape))
        output = function(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if tensors and all(map(self._is_weight, tensors)):
            for x in tree_leaves(output):
                x.is_weight = True
        return output

    def _is_weight(self, x: Tensor) -> bool:
        """Whether it is a parameter or comes from parameters alone."""
        return x.untyped_storage().data_ptr() in self.parameters or getattr(x, "is_weight", False)


class _Observed(_Products):
    """Keeps the inputs of each layer, or a sample of them."""

    def __init__(self, parameters: set[int], running: list[str]):
        super().__init__(parameters, running)
        self.found: dict[tuple, list[Tensor]] = {}

    def product(self, function: Callable, args: tuple, kwargs: dict, x: Tensor, layer: tuple) -> Tensor:
        self.found.setdefault(layer, []).append(sample(x).clone())
        return function(*args, **kwargs)


class _EightBits(_Products):
    """Rounds both operands, the activation as `fits` says."""

    def __init__(self, parameters: set[int], running: list[str], fits: Mapping[tuple, tuple]):
        super().__init__(parameters, running)
        self.fits, self.found = fits, []

    def product(self, function: Callable, args: tuple, kwargs: dict, x: Tensor, layer: tuple) -> Tensor:
        rounded = list(args)
        for i in OPERANDS[function]:
            rounded[i] = fake_quantized(args[i], self.fits[layer] if args[i] is x else fit([args[i]]))
        exact, output = function(*args, **kwargs), function(*rounded, **kwargs)
        noise = (output - exact).square().mean().item()
        snr = 10 * math.log10(max(exact.var().item(), 1e-30) / noise) if noise else EQUAL
        peak = (x.abs().max() / x.std().clamp(min=1e-30)).item()
        self.found.append({"layer": layer[0], "snr": snr, "peak": peak})
        return output


def sample(x: Tensor) -> Tensor:
    """Some of the elements of x, the least and the largest among them: all where it is small, each once."""
    x = x.flatten()
    if x.numel() <= SAMPLE:
        return x
    return torch.cat([x[:: x.numel() // SAMPLE], x.amin()[None], x.amax()[None]])


def fit(parts: Sequence[Tensor]) -> tuple[Tensor, int, int]:
    """(step, least level, largest level) of least error for all of `parts`, 255 levels around zero, or 256 from zero."""
    x = torch.cat([sample(part) for part in parts])
    if not x.any():
        return x.new_ones(()), 0, 0
    low, high = (-127, 127) if (x < 0).any() else (0, 255)
    steps = [share * x.abs().max() / high for share in SHARES]
    return min(steps, key=lambda step: ((x / step).round().clamp(low, high) * step - x).square().sum()), low, high


def fake_quantized(x: Tensor, fitted: tuple[Tensor, int, int]) -> Tensor:
    """`x` rounded to the levels that `fit` gave."""
    step, low, high = fitted
    return (x / step).round().clamp(low, high) * step


@contextmanager
def _names(model: nn.Module) -> Iterator[list[str]]:
    """The qualified names of the modules that are running, the innermost last."""
    running: list[str] = []

    def enter(name: str, module: nn.Module, args: tuple) -> None:
        running.append(name)

    def leave(module: nn.Module, args: tuple, output: object) -> None:
        running.pop()

    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_pre_hook(functools.partial(enter, name)).remove)
            stack.callback(module.register_forward_hook(leave, always_call=True).remove)
        yield running
