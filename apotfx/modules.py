"""What torch lacks for modules."""

from collections.abc import Mapping

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
