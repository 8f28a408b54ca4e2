"""What torch lacks for modules."""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


def attribute(model: nn.Module, path: str) -> object:
    """The attribute of `model` at a dotted path. Raises: AttributeError: there is none."""
    parent, _, name = path.rpartition(".")
    return getattr(model.get_submodule(parent), name)


def has_hooks(module: nn.Module) -> bool:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def replace_modules(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in the place of some inside `model`, under every name that they have, in place."""
    for module in list(model.modules()):
        for key, child in module._modules.items():
            if child in replacements:
                module._modules[key] = replacements[child]


class _Watched(threading.local):
    depth = 0  # how often code of the user's that runs in this thread was entered
    kept = 0  # how many modules kept whole are among it


_watched = _Watched()


def is_looked_at_as_float() -> bool:
    return not torch.compiler.is_compiling() and _watched.depth > 0


def is_in_kept_module() -> bool:
    """Whether what looks at stand-ins is the code of a module kept whole, which does so after a reload too."""
    return not torch.compiler.is_compiling() and _watched.kept > 0


@contextmanager
def looked_at_as_float() -> Iterator[None]:
    """While active, in this thread, stand-ins look like the layers that they stand for."""
    _watched.depth += 1
    try:
        yield
    finally:
        _watched.depth -= 1


def _as_seen(kind: str) -> property:
    def get(layer: "StandIn") -> dict:
        return layer.float_view(kind) if is_looked_at_as_float() else vars(layer)[kind]

    return property(get, lambda layer, value: vars(layer).__setitem__(kind, value))


class StandIn(nn.Module):
    """A layer in the place of a float one, as which the code of a module kept whole sees it.

    Attributes:
        float_class: the type of the float layer, whose methods and properties it has too.
    """

    float_class: type[nn.Module] = nn.Module
    _parameters, _buffers, _modules = _as_seen("_parameters"), _as_seen("_buffers"), _as_seen("_modules")
    __class__ = property(
        lambda layer: layer.float_class if is_looked_at_as_float() else type(layer),
        lambda layer, value: object.__dict__["__class__"].__set__(layer, value),
    )

    def float_view(self, kind: str) -> dict:
        """What the float layer holds as `kind`: "_parameters", "_buffers" or "_modules"."""
        raise NotImplementedError

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            found = inspect.getattr_static(self.float_class, name, None)
            if found is None:
                raise
            return found.__get__(self, self.float_class) if hasattr(found, "__get__") else found


def look_at_as_float(module: nn.Module) -> None:
    """Have the code of `module`, which is the user's, see the layers inside as float layers whenever it is called."""
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


def _enter(module: nn.Module, args: tuple) -> None:
    if not torch.compiler.is_compiling():
        _watched.depth, _watched.kept = _watched.depth + 1, _watched.kept + 1


def _leave(module: nn.Module, args: tuple, output: object) -> None:
    if not torch.compiler.is_compiling():
        _watched.depth, _watched.kept = _watched.depth - 1, _watched.kept - 1


def become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, wherever it is referred to; `other` is not to be used any more."""
    module.__dict__ = vars(other)
    module.__class__ = type(other)
