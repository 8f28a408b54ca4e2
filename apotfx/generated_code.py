"""The Python code that torch.fx writes for a traced module: what it cannot write, and what it would never forget."""

import keyword
import linecache
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from torch import fx, nn
from torch.fx import graph_module

from .errors import ApotfxError


def require_writable_names(model: nn.Module) -> None:
    """Raises: ApotfxError: a module's or tensor's name makes no code, or other code than the one to read it."""
    for kind in ("modules", "parameters", "buffers"):
        for name, _ in getattr(model, f"named_{kind}")():
            for part in name.split("."):
                if keyword.iskeyword(part) or not part.isprintable() or '"' in part or "\\" in part:
                    raise ApotfxError(f"{kind[:-1]} {name!r}: torch.fx cannot write {part!r} as code; rename it")


class GraphModule(fx.GraphModule):
    """torch.fx's, which keeps the source of what it compiles for ever; here it goes together with the code."""

    def recompile(self) -> fx.graph.PythonCode:
        code, forward = super().recompile(), type(self).forward
        weakref.finalize(forward, _forget, forward.__code__.co_filename).atexit = False
        return code


@contextmanager
def forgetting() -> Iterator[None]:
    """Forget the sources of what torch.fx compiles meanwhile."""
    before = set(_sources())
    try:
        yield
    finally:
        for name in _sources().keys() - before:
            _forget(name)


def _sources() -> dict[str, str]:
    return graph_module._loader.eval_cache


def _forget(name: str) -> None:
    _sources().pop(name, None)
    linecache.cache.pop(name, None)
