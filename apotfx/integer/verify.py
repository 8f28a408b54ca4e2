"""Whether an exported network is the one that was trained: its files first, then both networks, layer by layer."""

import inspect
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from apotfx.errors import ApotfxError
from apotfx.integer.format import export_integer, inspect_integer, read_integer
from apotfx.integer.layers import IntegerLayer
from apotfx.integer.load import BACKENDS, assemble, stand_alone
from apotfx.integer.manifest import MANIFEST, MAX_BYTES, read_file
from apotfx.integer.network import IntegerNetwork
from apotfx.integer.onednn import ByteLayer, ByteNetwork, CannotRun, Unfused, what_onednn_lacks
from apotfx.integer.program import Encode, Product
from apotfx.graph.network import Network
from apotfx.graph.tracing import bind
from apotfx.layers import QuantLayer
from apotfx.operators import accumulator_bits, accumulator_bound
from apotfx.tensors import parse_json

QUANTIZED, REFERENCE, ONEDNN = "quantized", *BACKENDS
ABSENT = "absent"


@dataclass(frozen=True)
class Alteration:
    """What an export holds and the trained network would not have written.

    Attributes:
        name: of a tensor ("layer1.0.conv1.weight": integer levels), or the path to an entry of the manifest
            ("layers.layer1.0.conv1.input.clip.0").
        index: of the first element that differs; () for an entry of the manifest and for a tensor as a whole.
        stored: its value in the export; "absent" if it has none.
        expected: its value in the trained network.
        count: how many elements differ.
    """

    name: str
    index: tuple[int, ...]
    stored: object
    expected: object
    count: int = 1


@dataclass
class Tally:
    """How many elements were compared and how many differ.

    Attributes:
        largest: the largest absolute difference; inf where only one of the two is finite.
        first: (index, expected value, other value) of the first element that differs; the index starts with the number
            of the image. None if all are equal.
    """

    compared: int = 0
    differing: int = 0
    largest: float = 0.0
    first: tuple[tuple[int, ...], float, float] | None = None

    def add(self, expected: Tensor, other: Tensor, first_image: int = 0) -> None:
        """Compare two tensors of the same shape; `first_image` is the number of the first one of the batch."""
        expected = expected.to(other.dtype)
        self.compared += other.numel()
        if torch.equal(expected, other):
            return
        # NaN is equal to NaN here.
        where = ((expected != other) & ~(expected.isnan() & other.isnan())).nonzero()
        if not len(where):
            return
        self.differing += len(where)
        a, b = (x[tuple(where.T)].double() for x in (expected, other))
        self.largest = max(self.largest, (a - b).abs().nan_to_num(nan=torch.inf).max().item())
        if self.first is None:
            image, *rest = where[0].tolist() or [0]
            self.first = ((image + first_image, *rest), a[0].item(), b[0].item())


@dataclass
class NodeComparison:
    """What a node of two networks computed. What one of them does not show is not compared: its tally stays empty.

    Attributes:
        name: of the module, or of the node if it calls none.
        codes: of a layer, the integer levels of its padded input.
        accumulators: of a layer, the sums of products of levels.
        outputs: what the node gives.
    """

    name: str
    codes: Tally = field(default_factory=Tally)
    accumulators: Tally = field(default_factory=Tally)
    outputs: Tally = field(default_factory=Tally)

    PARTS = ("codes", "accumulators", "outputs")

    @property
    def first(self) -> tuple[str, Tally] | None:
        """The first part that differs, in order of computation, by name; None if all are equal."""
        parts = ((part, getattr(self, part)) for part in self.PARTS)
        return next(((part, tally) for part, tally in parts if tally.differing), None)


@dataclass
class NetworkComparison:
    """Two networks on the same images.

    Attributes:
        nodes: in order of execution, without the result.
        logits: the result, if it is one tensor.
        predictions: the index of the largest logit.
    """

    nodes: dict[str, NodeComparison] = field(default_factory=dict)
    logits: Tally = field(default_factory=Tally)
    predictions: Tally = field(default_factory=Tally)

    @property
    def first(self) -> NodeComparison | None:
        """The first node that differs; None if all are equal."""
        result = NodeComparison("output", outputs=self.logits)
        return next((node for node in (*self.nodes.values(), result) if node.first), None)


@dataclass(frozen=True)
class LayerAccumulators:
    """The accumulators of a layer: ranges are (smallest, largest).

    Attributes:
        products: how many an accumulator adds up.
        by_levels: what it may reach with any levels; holds for partial sums in any order, as does the next.
        by_weights: what it may reach with the layer's weights and any input.
        observed: what it was at the end of the sum; None if the layer did not run.
    """

    name: str
    products: int
    by_levels: tuple[int, int]
    by_weights: tuple[int, int]
    observed: tuple[int, int] | None

    @property
    def bits(self) -> tuple[int, int, int | None]:
        """What an accumulator in two's complement needs by levels, by weights, and for what was observed."""
        ranges = (self.by_levels, self.by_weights, self.observed)
        return tuple(None if r is None else accumulator_bits(*r) for r in ranges)


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes:
        problems: of the files, a line each, such as tensors that do not fit their checksums.
        alterations: what differs from the trained network's export; empty without a trained network.
        against: the network that the others are compared to, "quantized" or "reference".
        comparisons: by the other network, "reference" or "onednn".
        accumulators: of every layer on integers.
        left_out: why a network is not among the comparisons, a line each.
    """

    problems: list[str]
    alterations: list[Alteration]
    against: str
    comparisons: dict[str, NetworkComparison]
    accumulators: list[LayerAccumulators]
    left_out: list[str]

    @property
    def equal(self) -> bool:
        """Whether the files are whole and unaltered and all networks gave the same values."""
        compared = self.comparisons and all(c.first is None for c in self.comparisons.values())
        return bool(compared and not self.problems and not self.alterations)


def verify(
    path: str | os.PathLike,
    float_model: nn.Module | None,
    batches: Iterable[Tensor | Sequence | Mapping[str, object]],
    qmodel: nn.Module | None = None,
    backend: str = ONEDNN,
    *,
    concrete_args: dict[str, object] | None = None,
    example_inputs: Tensor | Sequence | Mapping[str, object] | None = None,
) -> Verification:
    """Compare an export on disk with the network that it was made of, or, without that, its backends with each other.

    An altered export that still makes a network is run too, to show what follows from it.

    Args:
        path: a directory that `export_integer` wrote.
        float_model: the float model that was quantized; stays untouched. None for an export that stands alone.
        batches: inputs of the network on the CPU, the first dimension counting images; they run batch by batch. Each is a
            tensor, a sequence of positional arguments or a dict of keyword arguments.
        qmodel: the quantized network in evaluation mode, on the CPU.
        backend: "onednn" to compare it too where it runs; "reference" to leave it out.
        concrete_args, example_inputs: what `quantize` was given.

    Raises:
        ApotfxError: files that cannot be read or make no network, and it does not help to compare them with `qmodel`'s;
            or nothing to compare.
    """
    if backend not in BACKENDS:
        raise ApotfxError(f"backend {backend!r}: unknown; choose one of {', '.join(BACKENDS)}")
    if qmodel is not None and qmodel.training:
        raise ApotfxError("verify: the quantized network is in training mode; call qmodel.eval()")
    path, tensors, problems, refusal = Path(path), {}, [], None
    try:
        manifest, tensors, problems = inspect_integer(path, float_model)
        if float_model is None:
            reference = stand_alone(manifest, tensors, path)
        else:
            reference = assemble(manifest, tensors, float_model, path, concrete_args, example_inputs)
    except ApotfxError as error:
        refusal = error
    alterations = [] if qmodel is None else find_alterations(path, tensors, qmodel)
    if refusal is not None:
        if not alterations:
            raise refusal
        return Verification([*problems, str(refusal)], alterations, QUANTIZED, {}, [], [])
    others, left_out = {}, []
    if qmodel is not None:
        others[REFERENCE] = reference
    else:
        left_out.append("no checkpoint beside the export: what training computed is not compared")
    if backend == ONEDNN:
        lacking = what_onednn_lacks(reference)
        if lacking is None:
            others[ONEDNN] = ByteNetwork(reference)
        else:
            left_out.append(f"backend {ONEDNN}: {lacking}")
    if not others:
        raise ApotfxError(f"export {path}: nothing to compare its reference with ({'; '.join(left_out)})")
    comparisons, observed = compare(reference if qmodel is None else qmodel, others, batches)
    return Verification(
        problems=problems,
        alterations=alterations,
        against=REFERENCE if qmodel is None else QUANTIZED,
        comparisons=comparisons,
        accumulators=[_accumulators(layer, observed.get(layer.name)) for layer in _integer_layers(reference)],
        left_out=left_out,
    )


def find_alterations(path: Path, tensors: dict[str, Tensor], qmodel: fx.GraphModule) -> list[Alteration]:
    """What the export at `path` holds and one of `qmodel` would not; `tensors` as `inspect_integer` gives them.

    The manifest is read whatever its checksum and however it contradicts itself; {} stands for tensors that could not be
    read.
    """
    with tempfile.TemporaryDirectory() as directory:
        expected_manifest, expected = read_integer(export_integer(qmodel, Path(directory) / "export"))
    names = [*expected, *(name for name in tensors if name not in expected)] if tensors else []
    found = [_altered(name, tensors.get(name), expected.get(name)) for name in names]
    try:
        manifest = parse_json(read_file(path / MANIFEST, MAX_BYTES))
    except ValueError:
        manifest = None
    if isinstance(manifest, dict):
        for part in ("layers", "program"):
            found += _altered_entries(part, manifest.get(part, ABSENT), expected_manifest[part])
    return [alteration for alteration in found if alteration is not None]


def _altered(name: str, stored: Tensor | None, expected: Tensor | None) -> Alteration | None:
    shapes = [ABSENT if tensor is None else list(tensor.shape) for tensor in (stored, expected)]
    if shapes[0] != shapes[1]:
        return Alteration(name, (), *shapes)
    tally = Tally()
    tally.add(expected, stored)
    if tally.first is None:
        return None
    index = tally.first[0] if stored.dim() else ()
    return Alteration(name, index, stored[index].item(), expected[index].item(), tally.differing)


def _altered_entries(name: str, stored: object, expected: object) -> Iterator[Alteration]:
    """What differs between two values of a manifest; entries of lists go by their own name where they have one."""
    if isinstance(stored, dict) and isinstance(expected, dict):
        for key in expected | stored:
            yield from _altered_entries(f"{name}.{key}", stored.get(key, ABSENT), expected.get(key, ABSENT))
    elif isinstance(stored, list) and isinstance(expected, list) and len(stored) == len(expected):
        for i, (a, b) in enumerate(zip(stored, expected)):
            key = b.get("name", i) if isinstance(b, dict) else i
            yield from _altered_entries(f"{name}.{key}", a, b)
    elif stored != expected:
        yield Alteration(name, (), stored, expected)


@dataclass(frozen=True)
class _Step:
    """What a node computed; None for what its network does not show."""

    name: str
    codes: Tensor | None
    accumulators: Tensor | None
    outputs: Tensor | None


def compare(
    expected: nn.Module, others: dict[str, nn.Module], batches: Iterable[Tensor | Sequence | Mapping[str, object]]
) -> tuple[dict[str, NetworkComparison], dict[str, tuple[int, int]]]:
    """Run networks side by side, node by node, so that no more is kept than what they need themselves.

    Args:
        expected: the quantized network or the reference.
        others: by name, the reference or a `ByteNetwork`.
        batches: inputs, of which the first dimension counts images.

    Returns:
        (a comparison per other network; the range of the accumulators of each of the expected network's layers).
    """
    comparisons = {label: NetworkComparison() for label in others}
    observed: dict[str, tuple[int, int]] = {}
    first_image = 0
    for images in batches:
        tensors = [x for x in pytree.tree_leaves(images) if isinstance(x, Tensor)]
        if not tensors:
            raise ApotfxError(f"verify: expected batches that hold tensors, got a {type(images).__name__}")
        args, kwargs = bind(images)
        try:
            inspect.signature(expected.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise ApotfxError(f"verify: a batch is no input of the network ({error}); pass inputs without labels") from error
        streams = {label: _steps(network, images) for label, network in others.items()}
        upcoming = {label: next(stream) for label, stream in streams.items()}
        for step in _steps(expected, images):
            _observe(step, observed)
            for label, comparison in comparisons.items():
                other = upcoming[label]
                if other is not None and other.name == step.name:
                    _tally(comparison, step, other, first_image)
                    upcoming[label] = next(streams[label], None)
        assert not any(upcoming.values()), "the networks call their layers in different orders"
        first_image += len(tensors[0])
    if not first_image:
        raise ApotfxError("verify: there are no images to compare the networks on")
    return comparisons, observed


def _steps(network: nn.Module, images: Tensor) -> Iterator[_Step]:
    """What each node of a network computes from `images`, in order.

    Of a `ByteNetwork`, and of a network without a graph, the layers and the result.
    """
    if isinstance(network, IntegerNetwork):
        yield from _of_program(network, images)
        return
    if not isinstance(network, (ByteNetwork, Network)):
        yield from _layers(network, images)
        return
    if not isinstance(network, ByteNetwork):
        yield from _nodes(network, images)
        return
    try:
        for step in _nodes(network.fused, images):
            if step.codes is not None:
                yield step
    except CannotRun:
        pass  # then the network runs as reference
    args, kwargs = bind(images)
    with torch.no_grad():
        yield _Step("output", None, None, network(*args, **kwargs))


@torch.no_grad()
def _of_program(network: IntegerNetwork, images: Tensor) -> Iterator[_Step]:
    """The layers, and the result."""
    args, kwargs = bind(images)
    codes, results = {}, {}
    for step, value in network.run(args, kwargs):
        if step.name in network.program.results:
            results[step.name] = value
        if isinstance(step, Encode):
            codes[step.name] = value
        elif isinstance(step, Product):
            yield _product(step, network, codes.pop(step.inputs[0], None), value)
    yield _Step("output", None, None, _joined(network.result(results)))


def _product(step: Product, network: IntegerNetwork, codes: Tensor | None, value: Tensor) -> _Step:
    """`codes`: None for a layer whose input stays float."""
    layer = network.layer(step.layer)
    if codes is None:
        return _Step(step.layer, None, None, value)
    return _Step(step.layer, layer.geometry.prepare(codes), layer.accumulate(codes), value)


def _joined(result: object) -> Tensor:
    """All tensors of a result as one."""
    parts = [x for x in pytree.tree_leaves(result) if isinstance(x, Tensor)]
    return parts[0] if len(parts) == 1 else torch.cat([x.flatten() for x in parts])


@torch.no_grad()
def _layers(network: nn.Module, images: Tensor) -> list[_Step]:
    steps, (args, kwargs) = [], bind(images)
    handles = [
        layer.register_forward_hook(
            lambda layer, args, kwargs, y, name=name: steps.append(
                _Step(name, *layer.codes_and_accumulators(*args, **kwargs), y)
            ),
            with_kwargs=True,
        )
        for name, layer in network.named_modules() if isinstance(layer, (QuantLayer, IntegerLayer))
    ]  # fmt: skip
    try:
        result = network(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return [*steps, _Step("output", None, None, _joined(result))]


@torch.no_grad()
def _nodes(graph_module: fx.GraphModule, images: Tensor) -> Iterator[_Step]:
    modules = dict(graph_module.named_modules())
    encoded = {m.step.name for m in modules.values() if isinstance(m, Unfused) and isinstance(m.step, Encode)}
    interpreter = fx.Interpreter(graph_module)
    args, kwargs = bind(images)
    placeholders = [node for node in graph_module.graph.nodes if node.op == "placeholder"]
    given = dict(zip((node.target for node in placeholders), args)) | kwargs
    interpreter.args_iter = iter([given.get(node.target, *node.args) for node in placeholders])
    for node in graph_module.graph.nodes:
        value = interpreter.env[node] = interpreter.run_node(node)
        codes = accumulators = None
        outputs = value if isinstance(value, Tensor) else None
        module = modules[node.target] if node.op == "call_module" else None
        if isinstance(module, (QuantLayer, IntegerLayer)):
            args, kwargs = interpreter.fetch_args_kwargs_from_env(node)
            codes, accumulators = module.codes_and_accumulators(*args, **kwargs)
        elif isinstance(module, Unfused) and isinstance(module.step, Product):
            inputs = interpreter.env[node.all_input_nodes[0]] if module.step.inputs[0] in encoded else None
            yield _product(module.step, *module.numbers, inputs, value)
            continue
        elif isinstance(module, ByteLayer):
            levels = interpreter.env[node.all_input_nodes[0]]
            codes, accumulators, outputs = levels.float() - module.zero_point, module.accumulators(levels), None
        yield _Step(node.target if module is not None else node.name, codes, accumulators, outputs)
        for unneeded in interpreter.user_to_last_uses.get(node, ()):
            del interpreter.env[unneeded]


def _observe(step: _Step, observed: dict[str, tuple[int, int]]) -> None:
    if step.accumulators is not None and step.accumulators.numel():
        low, high = (int(x) for x in step.accumulators.aminmax())
        before = observed.get(step.name, (low, high))
        observed[step.name] = (min(low, before[0]), max(high, before[1]))


def _tally(comparison: NetworkComparison, step: _Step, other: _Step, first_image: int) -> None:
    if step.name == "output":
        parts = [(comparison.logits, step.outputs, other.outputs)]
        if isinstance(step.outputs, Tensor) and step.outputs.dim():
            parts.append((comparison.predictions, step.outputs.argmax(-1), other.outputs.argmax(-1)))
    else:
        node = comparison.nodes.setdefault(step.name, NodeComparison(step.name))
        parts = [(getattr(node, part), getattr(step, part), getattr(other, part)) for part in node.PARTS]
    for tally, a, b in parts:
        if a is not None and b is not None:
            tally.add(a, b, first_image)


def _integer_layers(network: fx.GraphModule) -> list[IntegerLayer]:
    return [m for m in network.modules() if isinstance(m, IntegerLayer) and m.is_integer]


def _accumulators(layer: IntegerLayer, observed: tuple[int, int] | None) -> LayerAccumulators:
    bound = accumulator_bound(layer.levels.shape, layer.weight_levels.max, layer.input_levels.max)
    products = layer.levels.shape[1:].numel()
    return LayerAccumulators(layer.name, products, (-bound, bound), layer.accumulator_range, observed)
