"""The Python code that torch.fx writes for a traced module: what it cannot write, and what it would never forget."""

import functools
import inspect
import keyword
import linecache
import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from torch import fx, nn
from torch.fx import graph_module

from .errors import ApotfxError

P, T = ParamSpec("P"), TypeVar("T")


def require_writable_names(model: nn.Module) -> None:
    """Raises: ApotfxError: a module's or tensor's name makes no code, or other code than the one to read it."""
    for kind in ("modules", "parameters", "buffers"):
        for name, _ in getattr(model, f"named_{kind}")():
            for part in name.split("."):
                if keyword.iskeyword(part) or not part.isprintable() or '"' in part or "\\" in part:
                    raise ApotfxError(f"{kind[:-1]} {name!r}: torch.fx cannot write {part!r} as code; rename it")


def forgets_sources(make: Callable[P, T]) -> Callable[P, T]:
    """Decorates a function that compiles graphs, and returns a module: torch.fx keeps the source of each for ever.

    What was compiled on the way is forgotten at once, and what the result consists of together with it.
    """

    @functools.wraps(make)
    def make_and_forget(*args: P.args, **kwargs: P.kwargs) -> T:
        before, made = set(_sources()), None
        try:
            made = make(*args, **kwargs)
            return made
        finally:
            modules = made.modules() if isinstance(made, nn.Module) else ()
            graphs = (module for module in modules if isinstance(module, fx.GraphModule))
            forwards = (inspect.unwrap(type(module).forward) for module in graphs)
            living = {forward.__code__.co_filename: forward for forward in forwards}
            for name in _sources().keys() - before:
                if name in living:
                    weakref.finalize(living[name], _forget, name).atexit = False
                else:
                    _forget(name)

    return make_and_forget


def _sources() -> dict[str, str]:
    return graph_module._loader.eval_cache


def _forget(name: str) -> None:
    _sources().pop(name, None)
    linecache.cache.pop(name, None)
