"""What torch lacks for modules."""

import functools
import inspect
import sys
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
    """Whether anything but `look_at_as_float` runs when it is called."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(hook not in (_enter, _leave) for kind in kinds for hook in getattr(module, kind).values())


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
    """While active, in this thread, disguised layers look like the float layers that they stand for."""
    _watched.depth += 1
    try:
        yield
    finally:
        _watched.depth -= 1


class StandIn(nn.Module):
    """A layer in the place of a float one; see `disguise`.

    It has `float_view(kind)`, what the float layer holds as `kind` ("_parameters", "_buffers" or "_modules"), and
    `float_parameter(name)`, the float layer's "weight" or "bias".

    Attributes:
        float_class: the type of the float layer.
        float_state: the attributes of the float layer.
        own_names: the attributes that the float layer does not have.
    """

    float_class: type[nn.Module]
    float_state: dict[str, object]
    own_names: frozenset[str] = frozenset()


class _Disguised:
    """A stand-in that looks like the float layer to code that is looking; what is said to whom, `__getattribute__` knows."""

    def __getattribute__(self, name: str):
        if is_looked_at_as_float() and name != "forward" and name not in _COPYING:
            caller = sys._getframe(1).f_globals.get("__name__", "")
            if caller.partition(".")[0] != __name__.partition(".")[0]:
                return _float_attribute(self, name)
        try:
            return object.__getattribute__(self, name)
        except AttributeError:
            state = object.__getattribute__(self, "__dict__")
            found = next((state[kind] for kind in _HELD if name in state.get(kind, ())), None)
            return super().__getattr__(name) if found is None else found[name]

    def __reduce_ex__(self, protocol: int) -> tuple:
        if is_in_kept_module():
            self.float_view("_parameters")  # which the copy has
        return _disguised_again, (type(self).__mro__[2],), object.__getattribute__(self, "__dict__")

    def __setstate__(self, state: dict) -> None:
        object.__getattribute__(self, "__dict__").update(state)


_COPYING = ("__reduce_ex__", "__setstate__", "__deepcopy__", "__copy__")
_HELD = ("_parameters", "_buffers", "_modules")
_ABSENT = object()
# What hooks on quantized layers ask for, and no code of a float network does.
_FOR_HOOKS = ("weight_quantizer", "input_quantizer", "codes_and_accumulators", "integer_weight", "geometry")


def _float_attribute(layer: StandIn, name: str) -> object:
    state = object.__getattribute__(layer, "__dict__")
    cls, own, taken = state["float_class"], layer.own_names, state["float_state"]
    if name == "__class__":
        return cls
    if name in _HELD:
        return layer.float_view(name)
    if name == "__dict__":
        known = {key: value for key, value in state.items() if key not in own}
        return taken | known | {kind: layer.float_view(kind) for kind in _HELD}
    if name in ("weight", "bias"):
        return layer.float_parameter(name)
    found = inspect.getattr_static(cls, name, _ABSENT)
    if hasattr(type(found), "__set__"):
        return found.__get__(layer, cls)
    for held in (state, taken):
        if name in held and not (held is state and name in own):
            return held[name]
    if found is _ABSENT:
        for kind in _HELD:
            if name in state[kind] and name in (held := layer.float_view(kind)):
                return held[name]
        if name in _FOR_HOOKS:
            return state["_modules"][name] if name in state["_modules"] else object.__getattribute__(layer, name)
        raise AttributeError(f"{cls.__name__!r} object has no attribute {name!r}")
    return found.__get__(layer, cls) if hasattr(found, "__get__") else found


@functools.cache
def _disguised_type(cls: type[StandIn]) -> type[StandIn]:
    return type(cls.__name__, (_Disguised, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _disguised_again(cls: type[StandIn]) -> StandIn:
    made = _disguised_type(cls)
    return made.__new__(made)


def float_attributes(layer: nn.Module) -> dict[str, object]:
    """What `StandIn.float_state` is for the float layer `layer`."""
    return {key: value for key, value in vars(layer).items() if key not in _HELD}


def disguise(layer: StandIn) -> None:
    """From now on `layer` looks like the float layer to the code of a module kept whole, while that runs.

    In type, methods, attributes, parameters, buffers and modules inside; called, it computes what it does.
    """
    layer.__class__ = _disguised_type(type(layer))


def look_at_as_float(module: nn.Module) -> None:
    """Have the code of `module`, which is the user's, see disguised layers as float layers whenever it is called."""
    module.register_forward_pre_hook(_enter)
    module.register_forward_hook(_leave, always_call=True)


def _enter(module: nn.Module, args: tuple) -> None:
    if not torch.compiler.is_compiling():
        _watched.depth, _watched.kept = _watched.depth + 1, _watched.kept + 1


def _leave(module: nn.Module, args: tuple, output: object) -> None:
    if not torch.compiler.is_compiling():
        _watched.depth, _watched.kept = max(_watched.depth - 1, 0), max(_watched.kept - 1, 0)


def become(module: nn.Module, other: nn.Module) -> None:
    """Make `module` what `other` is, wherever it is referred to; `other` is not to be used any more."""
    module.__dict__ = vars(other)
    module.__class__ = type(other)
