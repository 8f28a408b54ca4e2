"""The traced network compared with the module that it was traced from, on inputs.

Both call the same modules and functions, so that they give the same bits but where an attention was split or a memory
format differs. What differs by more than float rounding is another network.
"""

import functools
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from apotfx.errors import ApotfxError
from apotfx.graph.network import Network
from apotfx.graph.tracing import HOOKS, contents, put_back, with_fixed
from apotfx.layers import computing_in_float

NOISE = 1e-3  # of a result's root mean square: float rounding stays below, another network does not


def difference(
    network: Network, args: tuple, kwargs: dict, model: nn.Module | None = None
) -> tuple[str, str] | None:
    """Where a network, its quantizers off, is not the module that it was traced from; None if it is.

    Four forward passes without gradients: both in evaluation and in training mode, each from the same random state.
    Nothing is left changed.

    Args:
        args, kwargs: what both are called with.
        model: what to compare with in evaluation; by default the module that was traced.

    Returns:
        (the smallest module whose calls differ, "" for the whole; how).

    Raises:
        ApotfxError: the float model itself refuses the inputs.
    """
    if any(isinstance(x, Tensor) and (x.is_meta or type(x).__name__ == "FakeTensor") for x in _parts((args, kwargs))):
        return None
    with torch.no_grad(), _restored(network, model), computing_in_float(network):
        for training in (False, True):
            network.train(training)
            reference = network.original if model is None or training else model.eval()
            try:
                expected = _run(reference.forward, *with_fixed(reference, args, kwargs, network.fixed))
            except Exception as error:  # the model's own code may raise anything
                if training:
                    continue  # such as for a single image, which a batch norm has no statistics of
                raise ApotfxError(f"model: refuses the inputs ({_line(error)}); pass inputs that it takes") from error
            mode = "training" if training else "evaluation"
            try:
                wrong = _compare(expected, _run(network, args, kwargs))
            except ApotfxError:
                raise
            except Exception as error:
                wrong = f"raises {_line(error)}"
            if wrong is not None:
                return _where(network, reference, args, kwargs), f"{wrong} in {mode}"
    return None


def require_same(network: nn.Module, args: tuple, kwargs: dict) -> None:
    """`difference`, once for a network. Raises: ApotfxError: there is one."""
    if not isinstance(network, Network) or not network.meta.get("unchecked"):
        return
    try:
        network.meta["unchecked"] = False
        found = difference(network, args, kwargs)
    except ApotfxError:  # the inputs are none; the call that follows says why
        network.meta["unchecked"] = True
        return
    if found is not None:
        path, how = found
        raise ApotfxError(
            f"{path or 'the model'}: tracing changed what it computes ({how}); pass such inputs to quantize as "
            "example_inputs, which then keeps it whole"
        )


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _parts(values: object) -> list:
    """What nested outputs or inputs consist of."""
    found = []
    for part in pytree.tree_leaves(values):
        known = isinstance(part, (Tensor, str, bytes, int, float, complex, type(None))) or not hasattr(part, "__dict__")
        found += [part] if known else _parts(list(vars(part).values()))
    return found


def _run(forward: Callable, args: tuple, kwargs: dict) -> object:
    with random_state_kept():
        args, kwargs = pytree.tree_map_only(Tensor, torch.clone, (args, dict(kwargs)))
        return forward(*args, **kwargs)


def _compare(expected: object, got: object) -> str | None:
    """What is wrong with `got`, or None."""
    expected, got = _parts(expected), _parts(got)
    if len(expected) != len(got):
        return f"{len(got)} outputs in place of {len(expected)}"
    for a, b in zip(expected, got):
        if isinstance(a, Tensor) != isinstance(b, Tensor) or isinstance(a, Tensor) and a.shape != b.shape:
            return f"{_describe(b)} in place of {_describe(a)}"
        if isinstance(a, Tensor) and a.numel() and not a.is_nested and a.layout == torch.strided:
            a, b = (x.detach().double() if not x.is_complex() else torch.view_as_real(x).double() for x in (a, b))
            finite = a.isfinite()
            if not torch.equal(finite, b.isfinite()):
                return "other values are infinite or no number"
            error, scale = (a - b)[finite].square().mean().sqrt(), a[finite].square().mean().sqrt()
            if error > NOISE * scale:
                return f"an error of {error:.3g} where the output has {scale:.3g}"
    return None


def _describe(x: object) -> str:
    return f"{str(x.dtype)} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _where(network: Network, reference: nn.Module, args: tuple, kwargs: dict) -> str:
    """The module whose code calls the first leaf module that gets other inputs in the network than in `reference`."""
    leaves = {node.target for node in network.graph.nodes if node.op == "call_module"}
    runs = []
    for model, forward in ((reference, functools.partial(reference.forward, **network.fixed)), (network, network)):
        calls: list[tuple[str, object]] = []
        handles = [
            module.register_forward_pre_hook(
                lambda m, args, name=name: calls.append((name, pytree.tree_map_only(Tensor, torch.clone, args)))
            )
            for name, module in model.named_modules() if name in leaves
        ]  # fmt: skip
        try:
            _run(forward, args, kwargs)
        except Exception:  # the difference that is looked for
            pass
        finally:
            for handle in handles:
                handle.remove()
        runs.append(calls)
    for (name, expected), (other, got) in zip(*runs):
        if name != other or _compare(expected, got) is not None:
            return name.rpartition(".")[0]
    return ""


@contextmanager
def _restored(*models: nn.Module | None) -> Iterator[None]:
    """Without the hooks of `models`; puts back all that their modules hold."""
    modules = [m for model in models if model is not None for m in model.modules()]
    modules += [model.original for model in models if isinstance(model, Network)]
    states = [(vars(m), vars(m).copy(), contents(m)) for m in modules]
    values = [(buffer, buffer.clone()) for m in modules for buffer in m._buffers.values() if buffer is not None]
    try:
        for state, saved, _ in states:
            state.update({key: type(saved[key])() for key in HOOKS if key in saved})
        yield
    finally:
        for state, saved, held in states:
            state.clear()
            state.update(saved)
            put_back(held)
        for buffer, value in values:
            buffer.copy_(value)


@contextmanager
def random_state_kept() -> Iterator[None]:
    """Whatever draws random numbers inside, draws them as if nobody had before, and leaves no trace."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    numpy = sys.modules.get("numpy")
    states = random.getstate(), numpy and numpy.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(states[0])
            if numpy:
                numpy.random.set_state(states[1])
