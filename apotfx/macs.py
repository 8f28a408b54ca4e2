"""Multiply-accumulates of one forward pass: of layers, and of every other product of torch's operators."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .attention import PROJECTIONS, obstacle, split_projections
from .generated_code import GraphModule
from .graph.facts import is_layer
from .graph.operations import torch_name, undecorated


def _matrix(x: Tensor, w: Tensor, **_) -> int:
    return x.numel() * (w.shape[-1] if w.dim() > 1 else 1)


def _attention(q: Tensor, k: Tensor, v: Tensor, **_) -> int:
    return q[..., 0].numel() * k.shape[-2] * (q.shape[-1] + v.shape[-1])


def _convolution(x: Tensor, w: Tensor, *, output: Tensor, transposed: bool) -> int:
    # w[0] is what one output element reads, or, transposed, what one input element adds to.
    return (x if transposed else output).numel() * w[0].numel()


def _recurrent(x: Tensor, *weights, **_) -> int:
    return x[..., 0].numel() * sum(w.numel() for w in tree_leaves(weights) if w.dim() > 1)


def _trilinear(x: Tensor, w: Tensor, y: Tensor, *, output: Tensor, **_) -> int:
    return output.numel() * x.shape[-1] * y.shape[-1]


# Of torch's operators the positions of the factors, and their number from the factors.
FORMULAS: dict[str, tuple[tuple[int, ...], Callable[..., int]]] = {
    **dict.fromkeys(("mm", "bmm", "mv", "dot", "vdot", "_int_mm", "_scaled_mm", "_grouped_mm"), ((0, 1), _matrix)),
    **dict.fromkeys(("addmm", "baddbmm", "addmv", "addbmm"), ((1, 2), _matrix)),
    "addr": ((1, 2), lambda x, y, **_: x.numel() * y.numel()),
    **dict.fromkeys(("convolution", "deform_conv2d"), ((0, 1), _convolution)),
    "conv_tbc": ((0, 1), lambda x, w, output, **_: output.numel() * w[..., 0].numel()),
    "_trilinear": ((0, 1, 2), _trilinear),
    "mkldnn_rnn_layer": ((0, 1, 2), _recurrent),
    "_cudnn_rnn": ((0, 1), _recurrent),
}
ELEMENTWISE = {"mul", "multiply", "outer", "ger", "kron", "linalg_vecdot"}  # functions that multiply by aten's mul


class MacCounter(TorchDispatchMode):
    """Counts while it is active.

    Args:
        owners: per storage of a parameter or buffer the row that it belongs to, "" for none, None where its products
            are counted elsewhere.

    Attributes:
        rows: products with weights, per row.
        others: products with weights of no row.
        activations: products of two activations.
    """

    def __init__(self, owners: Mapping[int, str | None]):
        super().__init__()
        self.rows: Counter[str] = Counter()
        self.others = self.activations = 0
        self._owners = dict(owners)
        self._derived: list[Tensor] = []  # computed from weights alone; alive, so that no other takes their storage
        self._paused, self._row, self._elementwise = 0, "", False

    @property
    def total(self) -> int:
        return self.rows.total() + self.others + self.activations

    def pause(self, *_) -> None:
        self._paused += 1

    def resume(self) -> None:
        self._paused -= 1

    @contextmanager
    def within(self, row: str, elementwise: bool) -> Iterator[None]:
        """All that is counted meanwhile belongs to `row`, also, if `elementwise`, products of elements."""
        self._row, self._elementwise = row, elementwise
        try:
            yield
        finally:
            self._row, self._elementwise = "", False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.partition("::")[2], kwargs or {}
        known = name in FORMULAS or name.startswith("_scaled_dot_product")
        if not known and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode what torch makes of several operators comes as a whole
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        output = func(*args, **kwargs)
        if not self._paused:
            if known or name == "mul" and self._elementwise:
                self._count(name, args, output)
            elif self._row == "":
                self._follow(args, output)
        return output

    def _count(self, name: str, args: tuple, output: Tensor) -> None:
        positions, formula = FORMULAS.get(name, ((0, 1, 2), _attention))
        factors = [args[i] for i in positions if i < len(args)]
        if name == "mul":
            macs = output.numel()
        else:
            transposed = name == "convolution" and args[6]
            macs = formula(*factors, output=output, transposed=transposed)
        owners = [self._owners[key] for key in map(_storage, tree_leaves(factors)) if key in self._owners]
        if self._row:
            self.rows[self._row] += macs
        elif not owners:
            self.activations += macs
        elif None not in owners:
            row = max(owners)  # one that is named, if there is one
            self.rows[row] += macs if row else 0
            self.others += 0 if row else macs

    def _follow(self, args: tuple, output: object) -> None:
        """What is computed from weights alone counts as a weight of the same row."""
        tensors = [t for t in tree_leaves(args) if isinstance(t, Tensor)]
        owners = [self._owners.get(_storage(t), "unknown") for t in tensors]
        if owners and "unknown" not in owners and isinstance(output, Tensor) and _storage(output) not in self._owners:
            self._owners[_storage(output)] = None if None in owners else max(owners)
            self._derived.append(output)


class _Overloaded(TorchFunctionMode):
    """Does nothing, but keeps torch's attention from computing all of itself in one operator."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def _storage(x: object) -> int:
    try:
        return x.untyped_storage()._cdata
    except (AttributeError, NotImplementedError, RuntimeError):  # no tensor, or a sparse one
        return 0


def count_macs(model: nn.Module, args: tuple, kwargs: dict, rows: Iterable[str]) -> MacCounter:
    """What one run of `model` multiplies and accumulates.

    Args:
        rows: names of layers, of other modules with weights, of parameters, and of nodes of the model's graph.
    """
    rows, hooks = set(rows), []
    counter = MacCounter(_owners(model, rows))
    for name, module in model.named_modules():
        if is_layer(module):
            hooks.append(module.register_forward_pre_hook(counter.pause, prepend=True))
            hooks.append(module.register_forward_hook(_counting_layer(counter, name), with_kwargs=True))
        elif is_float_attention(module):
            hooks.append(module.register_forward_hook(_counting_projections(counter, name), with_kwargs=True))
    try:
        with _Overloaded(), counter:
            _with_functions_counted(model, counter, rows)(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return counter


def is_float_attention(module: nn.Module | None) -> bool:
    """Whether it is torch's attention with weights that `split_projections` gives names."""
    return isinstance(module, nn.MultiheadAttention) and obstacle(module) is None


def _owners(model: nn.Module, rows: set[str]) -> dict[int, str | None]:
    owners: dict[int, str | None] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        holders = [name[:i] for i, letter in enumerate(name) if letter == "."]
        owner = next((h for h in (name, *reversed(holders)) if h in rows), "")
        owners[_storage(tensor)] = owner or owners.get(_storage(tensor)) or ""
    for module in filter(is_float_attention, model.modules()):
        owners |= dict.fromkeys(map(_storage, module.parameters()), None)
    return owners


def _counting_layer(counter: MacCounter, name: str) -> Callable:
    def count(layer: nn.Module, args: tuple, kwargs: dict, output: Tensor) -> None:
        x, weight = (*args, kwargs.get("input"))[0], layer.weight
        counter.rows[name] += _convolution(x, weight, output=output, transposed=getattr(layer, "transposed", False))
        counter.resume()

    return count


def _counting_projections(counter: MacCounter, name: str) -> Callable:
    def count(attention: nn.MultiheadAttention, args: tuple, kwargs: dict, output: tuple) -> None:
        given = dict(zip(("query", "key", "value"), args)) | kwargs
        weights = split_projections({key: p for key, p in attention._parameters.items() if p is not None}, "")
        for projection, key in zip(PROJECTIONS, ("query", "key", "value")):
            counter.rows[f"{name}.{projection}"] += given[key].numel() * weights[f"{projection}.weight"].shape[0]
        counter.rows[f"{name}.out_proj"] += output[0].numel() * attention.embed_dim

    return count


def _with_functions_counted(model: nn.Module, counter: MacCounter, rows: set[str]) -> nn.Module:
    """`model` so that the calls of functions that are in `rows` say to `counter` which they are."""
    if not isinstance(model, fx.GraphModule):
        return model
    graph, copies = fx.Graph(), {}
    graph.output(graph.graph_copy(model.graph, copies))
    found = [node for node in copies if node.name in rows and node.op in ("call_function", "call_method")]
    for node in found:
        copies[node].target, copies[node].op = _telling(node, counter), "call_function"
    return GraphModule(model, graph) if found else model


def _telling(node: fx.Node, counter: MacCounter) -> Callable:
    """What `node` calls, as a function that says to `counter` when it runs."""
    name, target, is_method = node.name, node.target, node.op == "call_method"
    elementwise = undecorated(torch_name(node)) in ELEMENTWISE

    def call(*args, **kwargs):
        with counter.within(name, elementwise):
            return getattr(args[0], target)(*args[1:], **kwargs) if is_method else target(*args, **kwargs)

    return call
