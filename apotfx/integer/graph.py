"""What a traced network computes, as plain data, so that an export is loaded into no other network."""

import json
import math
import os

from torch import fx, nn

from apotfx.analysis import BATCH_NORMS
from apotfx.errors import ApotfxError
from apotfx.layers import QuantLayer
from apotfx.reproducible import Average


def describe_graph(graph_module: fx.GraphModule) -> list[dict]:
    """A dict per node: what it calls, with which inputs and constants; a quantized layer counts as the float one."""
    modules = dict(graph_module.named_modules())
    nodes = []
    for node in graph_module.graph.nodes:
        entry = {"name": node.name, "calls": str(getattr(node.target, "__name__", node.target))}
        entry["arguments"] = f"{node.args} {node.kwargs}"
        if node.op == "call_module":
            entry["type"], entry["settings"] = _describe_module(modules[node.target])
        nodes.append(entry)
    return json.loads(json.dumps(nodes, default=str))  # as it will be read: lists for tuples


def _describe_module(module: nn.Module) -> tuple[str, dict]:
    """Its type and its settings."""
    if isinstance(module, Average):
        return module.function.__name__, {}
    if isinstance(module, QuantLayer):
        return module.float_type.__name__, {}
    kind = BATCH_NORMS if isinstance(module, BATCH_NORMS) else type(module)  # a synchronized one computes the same
    plain = (bool, int, float, str, tuple, type(None))
    settings = {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training" and type(v) in plain}
    # JSON has no infinity.
    return kind.__name__, {k: str(v) if v in (math.inf, -math.inf) else v for k, v in settings.items()}


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
