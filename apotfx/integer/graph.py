"""What a traced network computes, as plain data, so that an export is loaded into no other network."""

import json
import math
import os
from collections.abc import Iterator

from torch import fx, nn

from apotfx.graph.facts import BATCH_NORMS
from apotfx.errors import ApotfxError
from apotfx.integer.layers import IntegerLayer
from apotfx.layers import FunctionalLayer, QuantLayer, float_type_of, kind_of
from apotfx.reproducible import Average
from apotfx.graph.network import Network, graph_of


def describe_graph(model: nn.Module) -> list[dict]:
    """A dict per node: what it calls, with which inputs and constants; a quantized layer counts as the float one.

    A model that could not be traced is a single node.
    """
    modules = dict(model.named_modules())
    nodes = []
    for node in graph_of(model).nodes:
        entry = {"name": node.name, "calls": str(getattr(node.target, "__name__", node.target))}
        entry["arguments"] = f"{node.args} {node.kwargs}"
        if node.op == "call_module":
            entry["type"], entry["settings"] = _describe_module(modules[node.target])
        nodes.append(entry)
    if not isinstance(model, Network):
        name, settings = _describe_module(model)
        nodes.append({"name": "model", "calls": "forward", "arguments": "()", "type": name, "settings": settings})
    return json.loads(json.dumps(nodes, default=str))  # as it will be read: lists for tuples


def _describe_module(module: nn.Module) -> tuple[str, dict]:
    """Its type and its settings; of one that tracing kept whole, the types of the modules inside too."""
    if isinstance(module, Average):
        return module.function.__name__, {}
    if isinstance(module, (QuantLayer, IntegerLayer)):
        return layer_type(module), {}
    plain = (bool, int, float, str, tuple, type(None))
    settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and type(v) in plain}
    # JSON has no infinity.
    settings = {k: str(v) if v in (math.inf, -math.inf) else v for k, v in settings.items()}
    if float_type_of(module) is not None:
        return layer_type(module), settings
    inside = dict(_inner_types(module, ""))
    return _type_name(module), settings | ({"modules": inside} if inside else {})


def _inner_types(module: nn.Module, path: str) -> Iterator[tuple[str, str]]:
    for name, child in module.named_children():
        is_layer = isinstance(child, (QuantLayer, IntegerLayer)) or float_type_of(child) is not None
        yield f"{path}{name}", layer_type(child) if is_layer else _type_name(child)
        if not is_layer:
            yield from _inner_types(child, f"{path}{name}.")


def layer_type(layer: nn.Module) -> str:
    """What a layer is called as a float one."""
    kind = layer.kind if isinstance(layer, (QuantLayer, IntegerLayer)) else kind_of(layer)
    return f"F.{layer.function}" if isinstance(layer, FunctionalLayer) else kind


def _type_name(module: nn.Module) -> str:
    return (BATCH_NORMS if isinstance(module, BATCH_NORMS) else type(module)).__name__  # synchronized ones compute the same


def require_same_graph(manifest: dict, found: list[dict], path: str | os.PathLike) -> None:
    stored = manifest["graph"]
    exported = {entry["name"] for entry in manifest["layers"]}
    for i in range(max(len(stored), len(found))):
        a, b = (dict(nodes[i]) if i < len(nodes) else {"name": "the end"} for nodes in (stored, found))
        # Settings are compared where both have them: versions of torch may add some.
        settings = [d.pop("settings", {}) for d in (a, b)]
        shared = {} if a.get("calls") in exported else settings[0].keys() & settings[1].keys()
        differs = a != b or any(settings[0][key] != settings[1][key] for key in shared)
        if differs:
            here, there = (f"{d['name']} ({d.get('type', d.get('calls', '-'))})" for d in (a, b))
            raise ApotfxError(
                f"export {path}: its network has {here} where the model has {there}, or with other settings; pass the "
                "float model that was exported"
            )
