"""What a quantized model holds and computes: per layer, and in total."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass
from typing import NamedTuple

import torch
from tabulate import tabulate
from torch import Tensor, nn

from .attention import split_projections
from .errors import ApotfxError
from .layers import FunctionalLayer, QuantLayer
from .macs import count_macs, is_float_attention
from .policy import FLOAT_BITS, PlannedLayer
from .quantizers import Quantizer
from .graph.network import reached_state, record_of
from .graph.tracing import bind


@dataclass(frozen=True)
class LayerSummary:
    """One layer.

    Attributes:
        name: in the network, as the plan has it.
        type: as the plan has it.
        scheme: of weight and input; "float" if neither is quantized.
        weight_bits: 2 to 8, or 32 for float.
        input_bits: 2 to 8, or 32 for float.
        signed_input: whether its input can be negative.
        weight_clip: None for float and on the meta device; of a clip per channel the mean.
        input_clip: None for float and on the meta device.
        parameters: elements of the weight; of a layer with several, such as an LSTM, of all of them.
        biases: elements of the bias.
        float_bytes: the weight's size at 32 bits.
        quantized_bytes: the weight's size at `weight_bits`.
        macs: multiply-accumulates of its weight in all its calls, without the bias; of a convolution those with padding
            included. None without inputs, and where it is not called.
        decided_by: the rule, or why it stays in float.
    """

    name: str
    type: str
    scheme: str
    weight_bits: int
    input_bits: int
    signed_input: bool
    weight_clip: float | None
    input_clip: float | None
    parameters: int
    biases: int
    float_bytes: int
    quantized_bytes: int
    macs: int | None
    decided_by: str


@dataclass(frozen=True)
class Summary:
    """`layers` and totals as data, `str(summary)` as a table with lines for the totals.

    What several layers share counts once in the totals. Clips and buffers are not counted.

    Attributes:
        layers: a row per layer of the plan.
        layer_parameters: elements of the weights and biases of `layers`.
        parameters: of the whole network.
        float_bytes: size of `parameters` at 32 bits.
        quantized_bytes: the same with quantized weights at their bits, all else at 32; a weight that is also read in
            float, such as an embedding's, stays at 32.
        activation_macs: multiply-accumulates of products of two activations, which stay in float, such as the two of
            attention; None without inputs.
        other_macs: those of products with weights that are in no row, all in float; None without inputs.
    """

    layers: tuple[LayerSummary, ...]
    layer_parameters: int
    parameters: int
    float_bytes: int
    quantized_bytes: int
    activation_macs: int | None = None
    other_macs: int | None = None

    @property
    def macs(self) -> int | None:
        """Multiply-accumulates of the whole network; None without inputs."""
        if self.activation_macs is None:
            return None
        return sum(row.macs or 0 for row in self.layers) + self.activation_macs + self.other_macs

    @property
    def quantized_macs(self) -> int | None:
        """Those of `macs` in layers that have both weight and input quantized."""
        quantized = (row.macs or 0 for row in self.layers if max(row.weight_bits, row.input_bits) < FLOAT_BITS)
        return None if self.macs is None else sum(quantized)

    @property
    def quantized_macs_share(self) -> float | None:
        """`quantized_macs / macs`, 0 to 1; None where there are none."""
        return self.quantized_macs / self.macs if self.macs else None

    def to_dict(self) -> dict:
        """Rows and totals as plain data, for JSON."""
        totals = ("macs", "quantized_macs", "quantized_macs_share")
        return asdict(self) | {"layers": [asdict(row) for row in self.layers]} | {k: getattr(self, k) for k in totals}

    def __str__(self) -> str:
        headers = [
            "layer", "type", "scheme", "w bits", "in bits", "signed in", "w clip", "in clip", "parameters", "biases",
            "bytes", "quantized", "macs", "decided by",
        ]  # fmt: skip
        table = tabulate([astuple(row) for row in self.layers], headers, floatfmt=".4g", missingval="-")
        lines = [
            f"parameters: {self.parameters:,}, of them {self.layer_parameters:,} in these layers",
            f"bytes: {self.float_bytes:,} at 32 bits, {self.quantized_bytes:,} quantized; without clips and buffers",
        ]
        if self.macs is not None:
            share = "" if self.quantized_macs_share is None else f" ({self.quantized_macs_share:.2%})"
            lines.append(
                f"multiply-accumulates: {self.macs:,}, of them {self.quantized_macs:,}{share} with weight and input "
                "quantized"
            )
            parts = [
                f"{macs:,} {where}"
                for macs, where in (
                    (self.activation_macs, "in products of two activations, such as attention's"),
                    (self.other_macs, "with weights that have no row"),
                )
                if macs
            ]
            if self.macs > self.quantized_macs:
                of_them = f", of them {' and '.join(parts)}" if parts else ""
                lines.append(f"the others, in float wholly or in part: {self.macs - self.quantized_macs:,}{of_them}")
        return "\n".join([table, "", *lines])


@torch.no_grad()
def summary(qmodel: nn.Module, inputs: Tensor | Sequence | Mapping[str, object] | None = None) -> Summary:
    """A row per layer of what `quantize` returned, and totals of the network.

    Args:
        qmodel: stays as it is; may have been moved to the meta device, where `inputs` cannot be run.
        inputs: what the network is run on, once and in evaluation, to count multiply-accumulates: a tensor, a sequence
            of positional arguments or a dict of keyword arguments. None leaves them out.

    Raises:
        ApotfxError: `qmodel` does not come from `quantize`; `inputs` is something else.
    """
    plan = record_of(qmodel).get("plan")
    if plan is None:
        raise ApotfxError("summary: the model has no plan; pass what apotfx.quantize returned")
    if not isinstance(inputs, (Tensor, Sequence, Mapping, type(None))) or isinstance(inputs, str):
        raise ApotfxError(
            f"summary: inputs is a {type(inputs).__name__}; pass a tensor, a tuple of positional arguments or a dict "
            "of keyword arguments"
        )
    with _evaluating(qmodel):
        names = [planned.facts.name for planned in plan.layers]
        args, kwargs = bind(() if inputs is None else inputs)
        counted = None if inputs is None else count_macs(qmodel, args, kwargs, names)
        tensors = _layer_tensors(qmodel, names)
    modules = dict(qmodel.named_modules())
    macs = {} if counted is None else counted.rows
    rows = [_row(p, modules.get(p.facts.name), tensors[p.facts.name], macs) for p in plan.layers]
    rest = (None, None) if counted is None else (counted.activations, counted.others)
    return Summary(tuple(rows), **_totals(qmodel, rows, tensors), activation_macs=rest[0], other_macs=rest[1])


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _own_tensors(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    return split_projections({key: p for key, p in attention._parameters.items() if p is not None}, "")


class LayerTensors(NamedTuple):
    """Elements of a layer's weight and bias, and the ids of what each is, or is made of."""

    weight: int
    bias: int
    weight_ids: frozenset[int]
    bias_ids: frozenset[int]

    @classmethod
    def of(cls, weights: Iterable[Tensor | None], biases: Iterable[Tensor | None]) -> "LayerTensors":
        kinds = [[t for t in tensors if t is not None] for tensors in (weights, biases)]
        return cls(*(sum(t.numel() for t in ts) for ts in kinds), *(frozenset(id(t) for t in ts) for ts in kinds))


def _layer_tensors(qmodel: nn.Module, names: list[str]) -> dict[str, LayerTensors]:
    modules, parameters = dict(qmodel.named_modules()), dict(qmodel.named_parameters())
    found = {}
    for name in names:
        layer, (parent, _, key) = modules.get(name), name.rpartition(".")
        if isinstance(layer, FunctionalLayer):
            sources = LayerTensors.of(*([] if made is None else made.tensors for made in (layer._weight, layer._bias)))
            bias = layer.bias
            found[name] = sources._replace(weight=layer.weight.numel(), bias=0 if bias is None else bias.numel())
        elif layer is not None:
            own = [(k, p) for k, p in layer.named_parameters() if "." not in k or k.startswith("parametrizations.")]
            sources = LayerTensors.of(*([p for k, p in own if ("bias" in k) == is_bias] for is_bias in (False, True)))
            weight = getattr(layer, "weight", None)  # of a parametrized layer what its parameters make
            found[name] = sources._replace(weight=weight.numel()) if isinstance(weight, Tensor) else sources
        elif is_float_attention(modules.get(parent)):
            attention, own = modules[parent], _own_tensors(modules[parent])
            packed = attention.in_proj_weight
            sources = LayerTensors.of(
                [getattr(attention, f"{key}_weight") if packed is None else packed], [attention.in_proj_bias]
            )
            bias = own.get(f"{key}.bias")
            found[name] = sources._replace(
                weight=own[f"{key}.weight"].numel(), bias=0 if bias is None else bias.numel()
            )
        else:
            found[name] = LayerTensors.of([parameters.get(name)], [])
    return found


def _row(
    planned: PlannedLayer, layer: nn.Module | None, tensors: LayerTensors, macs: Mapping[str, int]
) -> LayerSummary:
    facts = planned.facts
    weight_bits = planned.weight.bits if planned.weight else FLOAT_BITS
    quantizers = (layer.weight_quantizer, layer.input_quantizer) if isinstance(layer, QuantLayer) else (None, None)
    clips = [None if q is None or q.clip.is_meta else q.used_clip.mean().item() for q in quantizers]
    return LayerSummary(
        name=facts.name,
        type=facts.type,
        scheme=planned.rule.scheme if planned.quantized else "float",
        weight_bits=weight_bits,
        input_bits=planned.input.bits if planned.input else FLOAT_BITS,
        signed_input=facts.signed_input,
        weight_clip=clips[0],
        input_clip=clips[1],
        parameters=tensors.weight,
        biases=tensors.bias,
        float_bytes=4 * tensors.weight,
        quantized_bytes=-(-tensors.weight * weight_bits // 8),
        macs=macs.get(facts.name),
        decided_by=planned.reason,
    )


def _totals(qmodel: nn.Module, rows: list[LayerSummary], tensors: dict[str, LayerTensors]) -> dict[str, int]:
    clips = {id(p) for module in qmodel.modules() if isinstance(module, Quantizer) for p in module.parameters()}
    sizes = {id(p): p.numel() for p in qmodel.parameters() if id(p) not in clips}
    in_layers = set().union(*(t.weight_ids | t.bias_ids for t in tensors.values()))
    quantized = {row.name: row for row in rows if row.weight_bits < FLOAT_BITS}
    in_float = _read_in_float(qmodel, quantized.keys())
    weights = {  # by the parameters that they are made of, so that a shared one counts once
        tensors[name].weight_ids: row.quantized_bytes
        for name, row in quantized.items()
        if tensors[name].weight_ids <= sizes.keys() - in_float
    }
    rest = sizes.keys() - set().union(*weights)
    return {
        "layer_parameters": sum(sizes[p] for p in sizes.keys() & in_layers),
        "parameters": sum(sizes.values()),
        "float_bytes": 4 * sum(sizes.values()),
        "quantized_bytes": 4 * sum(sizes[p] for p in rest) + sum(weights.values()),
    }


def _read_in_float(qmodel: nn.Module, quantized: Iterable[str]) -> set[int]:
    """The ids of the parameters that are more than the weights of the layers `quantized`."""
    read = {
        id(tensor)
        for name, tensor in reached_state(qmodel).items()
        if re.sub(r"\.(parametrizations\..*|[^.]*)$", "", name) not in quantized
    }
    return read & {id(p) for p in qmodel.parameters()}
