"""From a graph that writes to tensors to one in which every value stays what it is.

A write may stay, as the way in which a value is computed, where nothing reads the memory that it goes to any more: then
whoever reads the written tensor later reads the result. Where another tensor that may lie in the same memory is read
later, the write goes to a copy, and each such tensor is followed by what it has become. Whether two tensors do share
memory is asked of them when the graph runs, as only then it is known of `reshape`, `.to` or a dropout.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, fx, nn

from apotfx.errors import ApotfxError
from apotfx.graph.facts import FUNCTIONAL_LAYERS, PRODUCTS
from apotfx.graph.operations import returns_fresh, torch_name, writes
from apotfx.graph.tracing import owner

METADATA = {"shape", "dtype", "device", "ndim", "layout", "size", "dim", "numel", "is_floating_point", "requires_grad"}
NO_TENSORS = {bool, int, float, torch.Size, torch.dtype, torch.device, torch.layout}
RESHAPING = {"unsqueeze_", "squeeze_", "transpose_", "t_", "swapaxes_", "swapdims_"}
LAYERS = FUNCTIONAL_LAYERS | PRODUCTS
COMPLEX_VIEWS = {"real", "imag", "view_as_real", "view_as_complex"}


def functionalize(
    graph: fx.Graph, modules: Mapping[str, nn.Module], constants: Mapping[str, Tensor]
) -> dict[str, str]:
    """Let later readers see what is written in place, in every tensor that shares its memory; edits `graph`.

    Args:
        constants: by name, the tensors that are the graph's own.

    Returns:
        By name, the modules that must be kept whole for a write that cannot be resolved, and why.
    """
    memory: dict[fx.Node, set[fx.Node]] = {}  # what a value may share memory with goes back to one of the same nodes
    position: dict[fx.Node, float] = {node: i for i, node in enumerate(graph.nodes)}
    saved: set[fx.Node] = set()  # what lies in the same memory as they is kept for the backward pass

    def readers(value: fx.Node, write: fx.Node) -> list[fx.Node]:
        return [u for u in value.users if position[u] > position[write] and not asks_for_metadata(u)]

    for node in list(graph.nodes):
        memory[node] = _memory(node, memory, modules)
        if _is_layer(node, modules):
            saved.update(*(memory[x] for x in node.all_input_nodes))
        written = writes(node, modules)
        if not written:
            continue
        if len(written) > 1:
            return {owner(node): f"its forward writes to several tensors at once ({node.name})"}
        (target,) = written
        if node.op == "call_method" and node.target in RESHAPING:  # the same memory, and no value is written
            node.target = node.target.removesuffix("_")
            memory[node] = memory[node] | memory[target]
            for user in readers(target, node):
                user.replace_input_with(target, node)
            continue
        sharing = [n for n in memory if n not in (node, target) and memory[n] & memory[target] and readers(n, node)]
        sources = {n for n in memory[target] if n.op in ("get_attr", "placeholder")}
        states = [n.target for n in sources if n.op == "get_attr" and n.target not in constants]
        if states:
            return {owner(node): f"its forward changes its buffer {states[0].rpartition('.')[2]}, which tracing would do once"}
        if any(_name(n) in COMPLEX_VIEWS for value in (*sharing, target) for n in memory[value]):
            return {owner(node): f"its forward writes to a part of a complex tensor ({node.name})"}
        if any(_name(n) == "data" for n in memory[target]):  # what is saved for the backward pass changes too
            return {owner(node): f"its forward writes through the data of a tensor ({node.name}), unseen by autograd"}
        inputs = [n.name for n in sources if n.op == "placeholder"]
        if sharing and inputs:
            return {owner(node): f"its forward writes to the input {min(inputs)}, which it also reads"}
        later = {value: readers(value, node) for value in (*sharing, target, node)}
        # An input is the caller's, who sees what is written to it.
        if sharing or sources and not inputs or not (inputs or saved.isdisjoint(memory[target])):
            with graph.inserting_before(node):
                copied = graph.call_method("clone", (target,))
            node.replace_input_with(target, copied)
            position[copied], memory[copied], memory[node] = position[node] - 0.5, {copied}, {node}
        if not sharing:
            for user in later[target]:
                user.replace_input_with(target, node)
            continue
        with graph.inserting_after(node):
            stored = graph.call_function(store, (target, node))
        position[stored], memory[stored] = position[node] + 0.25, {stored}
        for value, users in later.items():
            with graph.inserting_after(stored):
                like = target if value is node else value
                seen = graph.call_function(see, (like, target, stored))
            position[seen] = position[node] + 0.5
            memory[seen] = memory[like] | {stored}
            for user in users:
                user.replace_input_with(value, seen)
            if not users:
                graph.erase_node(seen)
                del memory[seen]
    return {}


def written_after(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, list[fx.Node]]:
    """Per node, those behind it that write to memory which its value may lie in."""
    memory: dict[fx.Node, set[fx.Node]] = {}
    found: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        memory[node], found[node] = _memory(node, memory, modules), []
        for target in writes(node, modules):
            for value in memory:
                found[value] += [node] * (value is not node and not memory[value].isdisjoint(memory[target]))
    return found


def _is_layer(node: fx.Node, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a node calls what is quantized: as such it keeps its input, whatever the float layer does."""
    if node.op == "call_module":
        return next(modules[node.target].parameters(), None) is not None
    return torch_name(node) in LAYERS


def _memory(
    node: fx.Node, memory: Mapping[fx.Node, set[fx.Node]], modules: Mapping[str, nn.Module]
) -> set[fx.Node]:
    """The nodes that what a node's value may share memory with goes back to, itself among them."""
    if returns_fresh(node, modules) or node.meta.get("type") in NO_TENSORS:
        return {node}
    return {node}.union(*(memory[x] for x in node.all_input_nodes))


def store(written: Tensor, value: Tensor) -> Tensor:
    """The memory that `written` lies in, after `value` was written there: a vector of all its elements."""
    length = written.untyped_storage().nbytes() // written.element_size()
    whole = _root(written).as_strided((length,), (1,), 0).clone()
    whole.as_strided(written.size(), written.stride(), written.storage_offset()).copy_(value)
    return whole


def see(x: object, written: Tensor, stored: Tensor) -> object:
    """x, or, where it shares memory with `written`, what it is in the memory `stored`; x may hold tensors."""
    if isinstance(x, (tuple, list)):
        return type(x)(see(part, written, stored) for part in x)
    if not isinstance(x, Tensor) or not torch._C._is_alias_of(x, written):
        return x
    if x.dtype != written.dtype:
        raise ApotfxError(
            f"a {written.dtype} tensor is written in place and read as {x.dtype}; use a copy of it in the model's forward"
        )
    seen = stored.as_strided(x.size(), x.stride(), x.storage_offset())
    return seen if _root(x) is _root(written) else _Unnoticed.apply(x, [seen])


def _root(x: Tensor) -> Tensor:
    """The tensor that autograd knows x to be a view of, which all of the memory belongs to; else x."""
    return x if x._base is None else x._base


class _Unnoticed(torch.autograd.Function):
    """x after a write that autograd does not know of, through `detach`: differentiated as if there was none."""

    @staticmethod
    def forward(ctx, x: Tensor, seen: list[Tensor]) -> Tensor:
        return seen[0].detach()

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def asks_for_metadata(node: fx.Node) -> bool:
    return _name(node) in METADATA


def _name(node: fx.Node) -> str | None:
    """Of the attribute that a node reads, or what `torch_name` says."""
    return node.args[1] if node.target is getattr else torch_name(node)
