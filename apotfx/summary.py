"""What a quantized model holds, a row per layer."""

from dataclasses import asdict, dataclass

from tabulate import tabulate
from torch import fx

from .errors import ApotfxError
from .layers import QuantLayer
from .policy import FLOAT_BITS


@dataclass(frozen=True)
class LayerSummary:
    """One layer. Clips are None for float; a clip per channel is given by its mean.

    `float_bytes` and `quantized_bytes` are the weight's size at 32 bits and at `weight_bits`.
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
    float_bytes: int
    quantized_bytes: int
    decided_by: str


@dataclass(frozen=True)
class Summary:
    """`layers` as data, `str(summary)` as a table."""

    layers: tuple[LayerSummary, ...]

    def __str__(self) -> str:
        headers = [
            "layer", "type", "scheme", "w bits", "in bits", "signed in", "w clip", "in clip", "parameters", "bytes",
            "quantized", "decided by",
        ]  # fmt: skip
        rows = [list(asdict(layer).values()) for layer in self.layers]
        totals = [
            sum(getattr(layer, key) for layer in self.layers)
            for key in ("parameters", "float_bytes", "quantized_bytes")
        ]
        return tabulate([*rows, ["total", *[None] * 7, *totals, None]], headers, floatfmt=".4g", missingval="-")


def summary(qmodel: fx.GraphModule) -> Summary:
    """A row per conv and linear layer of what `quantize` returned.

    Raises:
        ApotfxError: `qmodel` does not come from `quantize`.
    """
    plan = getattr(qmodel, "meta", {}).get("plan")
    if plan is None:
        raise ApotfxError("summary: the model has no plan; pass what apotfx.quantize returned")
    rows = []
    for planned in plan.layers:
        facts = planned.facts
        # A functional call has no module, and one that is never called is not in the graph.
        layer = None if facts.type.startswith("F.") else dict(qmodel.named_modules()).get(facts.name)
        weight = getattr(layer, "weight", None)
        parameters = 0 if weight is None else weight.numel()
        weight_bits = planned.weight.bits if planned.weight else FLOAT_BITS
        quantizers = (layer.weight_quantizer, layer.input_quantizer) if isinstance(layer, QuantLayer) else (None, None)
        clips = [None if q is None else q.used_clip.mean().item() for q in quantizers]
        rows.append(
            LayerSummary(
                name=facts.name,
                type=facts.type,
                scheme=planned.rule.scheme if planned.quantized else "float",
                weight_bits=weight_bits,
                input_bits=planned.input.bits if planned.input else FLOAT_BITS,
                signed_input=facts.signed_input,
                weight_clip=clips[0],
                input_clip=clips[1],
                parameters=parameters,
                float_bytes=4 * parameters,
                quantized_bytes=-(-parameters * weight_bits // 8),
                decided_by=planned.reason,
            )
        )
    return Summary(tuple(rows))
