"""Which layer gets what: rules, and their resolution into a plan before any graph is touched."""

import dataclasses
import fnmatch
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from tabulate import tabulate

from .analysis import LayerFacts
from .errors import ApotfxError
from .files import write_atomic
from .levels import MAX_BITS, MIN_BITS, SCHEMES, LevelSet
from .quantizers import NORMALIZATIONS

FLOAT_BITS = 32
POSITIONS = ("first", "last")
GRANULARITIES = ("tensor", "channel")


@dataclass(frozen=True)
class Rule:
    """What the layers that match get. The first rule that matches a layer decides.

    A rule that leaves `name`, `type` and `position` at their defaults matches every layer.

    Attributes:
        name: glob on the layer's whole qualified name, such as "layer1.*.conv?"; case-sensitive.
        type: the layer's type, "Conv2d" or "Linear"; None for any.
        position: "first" (no other layer before it), "last" (no other layer after it); None for any.
        scheme: "apot", "pot", "uniform", or "float", which leaves the layer as it is.
        weight_bits: 2 to 8, the sign included; 32 for float.
        activation_bits: of the layer's input, 2 to 8, the sign included where it has one; 32 for float.
        granularity: of the weight's clip: one per "tensor" or one per output "channel".
        normalization: "none", "standardize" (the paper's) or "rescale"; see `WeightQuantizer`.
        clip_grad_factor: multiplies the gradients of both clips.
        max_accumulator_bits: 2 to 64, of the two's complement accumulator that the layer must fit whatever its weights
            and its input, see `operators.accumulator_bound`; a layer that does not is an error. None for any.
    """

    name: str = "*"
    type: str | None = None
    position: str | None = None
    scheme: str = "apot"
    weight_bits: int = 4
    activation_bits: int = 4
    granularity: str = "tensor"
    normalization: str = "rescale"
    clip_grad_factor: float = 1.0
    max_accumulator_bits: int | None = None

    def __post_init__(self):
        _require_type(self, "name", str)
        if self.type is not None:
            _require_type(self, "type", str)
        _require_choice(self, "position", (None, *POSITIONS))
        _require_choice(self, "scheme", (*SCHEMES, "float"))
        _require_choice(self, "granularity", GRANULARITIES)
        _require_choice(self, "normalization", NORMALIZATIONS)
        for key in ("weight_bits", "activation_bits"):
            bits = getattr(self, key)
            if not _is_whole(bits) or not (MIN_BITS <= bits <= MAX_BITS or bits == FLOAT_BITS):
                raise ApotfxError(
                    f"{self}: {key} {bits!r} is out of range; use {MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float"
                )
        factor = self.clip_grad_factor
        if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < float("inf"):
            raise ApotfxError(f"{self}: clip_grad_factor {factor!r} is not a number of at least 0")
        self._check_max_accumulator_bits()

    def _check_max_accumulator_bits(self) -> None:
        bits = self.max_accumulator_bits
        if bits is None:
            return
        if not _is_whole(bits) or not 2 <= bits <= 64:
            raise ApotfxError(f"{self}: max_accumulator_bits {bits!r} is out of range; use 2 to 64, or leave it out")
        if self.scheme == "float" or FLOAT_BITS in (self.weight_bits, self.activation_bits):
            raise ApotfxError(
                f"{self}: max_accumulator_bits {bits} needs a layer on integers; quantize weights and activations, or "
                "leave it out"
            )

    def __str__(self) -> str:
        what = [f"name={self.name}"] if self.name != "*" else []
        what += [f"{key}={getattr(self, key)}" for key in ("type", "position") if getattr(self, key) is not None]
        return "rule " + (" ".join(what) or "*")

    def matches(self, layer: LayerFacts) -> bool:
        return (
            fnmatch.fnmatchcase(layer.name, self.name)
            and self.type in (None, layer.type)
            and (self.position is None or getattr(layer, f"is_{self.position}"))
        )


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_type(rule: Rule, key: str, expected: type) -> None:
    value = getattr(rule, key)
    if not isinstance(value, expected):
        raise ApotfxError(f"rule: {key} {value!r} is not a {expected.__name__}; quote it")


def _require_choice(rule: Rule, key: str, choices: Sequence) -> None:
    value = getattr(rule, key)
    if value not in choices:
        allowed = ", ".join(str(choice) for choice in choices if choice is not None)
        raise ApotfxError(f"{rule}: {key} {value!r} is unknown; choose one of {allowed}")


@dataclass(frozen=True)
class BitPolicy:
    """A list of rules; the first one that matches a layer decides, a layer that none matches stays in float.

    >>> policy = BitPolicy.default(bits=3, scheme="uniform")
    >>> BitPolicy.from_dict(policy.to_dict()) == policy
    True
    """

    rules: tuple[Rule, ...]

    def __post_init__(self):
        rules = tuple(self.rules) if isinstance(self.rules, Iterable) else ()
        if not rules or not all(isinstance(rule, Rule) for rule in rules):
            raise ApotfxError(f"policy: expected one Rule or more in a sequence, got {_abbreviated(self.rules)}")
        object.__setattr__(self, "rules", rules)

    @classmethod
    def default(cls, bits: int = 4, scheme: str = "apot") -> "BitPolicy":
        """Every layer at `bits` bits, the first and the last at 8-bit uniform; `bits=32` is all float."""
        if bits == FLOAT_BITS:
            return cls((Rule(scheme="float"),))
        ends = (Rule(position=p, scheme="uniform", weight_bits=8, activation_bits=8) for p in POSITIONS)
        return cls((*ends, Rule(scheme=scheme, weight_bits=bits, activation_bits=bits)))

    @classmethod
    def published(cls, bits: int = 4, scheme: str = "apot") -> "BitPolicy":
        """The published MNIST networks: standardized weights; 8-bit weights and float inputs first and last."""
        end = {"scheme": "uniform", "weight_bits": 8, "activation_bits": FLOAT_BITS, "normalization": "none"}
        inner = Rule(scheme=scheme, weight_bits=bits, activation_bits=bits, normalization="standardize")
        return cls((*(Rule(position=p, **end) for p in POSITIONS), inner))

    @classmethod
    def from_dict(cls, content: object, source: str = "policy") -> "BitPolicy":
        """The policy that `to_dict` gave. `bits` in a rule is short for both kinds of bits.

        Raises:
            ApotfxError: anything but `{"rules": [{...}, ...]}` with known keys and values; names `source`.
        """
        rules = content["rules"] if isinstance(content, dict) and set(content) == {"rules"} else None
        if not isinstance(rules, list) or not rules:
            raise ApotfxError(f"{source}: expected one key `rules` with a list of rules, got {_abbreviated(content)}")
        return cls(tuple(_rule_from_dict(rule, f"{source}: rule {i}") for i, rule in enumerate(rules, 1)))

    def to_dict(self) -> dict:
        return {"rules": [dataclasses.asdict(rule) for rule in self.rules]}

    @classmethod
    def from_yaml(cls, path: str | Path) -> "BitPolicy":
        """Raises: ApotfxError: no such file, not YAML, or not a policy; names the file and what is wrong."""
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ApotfxError(f"policy file {path}: cannot be read ({error.strerror}); check the path") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ApotfxError(f"policy file {path}: not YAML ({' '.join(str(error).split())})") from error
        return cls.from_dict(content, f"policy file {path}")

    def to_yaml(self, path: str | Path) -> None:
        write_atomic(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())


def _rule_from_dict(content: object, source: str) -> Rule:
    if not isinstance(content, dict):
        raise ApotfxError(f"{source}: expected keys and values, got {_abbreviated(content)}")
    content = dict(content)
    if "bits" in content:
        bits = content.pop("bits")
        content = {"weight_bits": bits, "activation_bits": bits} | content
    known = [field.name for field in dataclasses.fields(Rule)]
    for key in content:
        if key not in known:
            raise ApotfxError(f"{source}: unknown key {key!r}; the keys are bits, {', '.join(known)}")
    try:
        return Rule(**content)
    except ApotfxError as error:
        raise ApotfxError(f"{source}: {error}") from None


def _abbreviated(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a plan: what a layer gets, and why.

    Attributes:
        facts: what the graph says of the layer.
        rule: the rule that decided; None for a layer left in float because no rule matched or it cannot be quantized.
        weight: level set of the weight; None for float.
        input: level set of the input; None for float.
        reason: the rule, or why the layer stays in float.
    """

    facts: LayerFacts
    rule: Rule | None
    weight: LevelSet | None
    input: LevelSet | None
    reason: str

    @property
    def quantized(self) -> bool:
        return self.weight is not None or self.input is not None


@dataclass(frozen=True)
class Plan:
    """What every conv and linear layer of a model gets; `str(plan)` is a table."""

    layers: tuple[PlannedLayer, ...]

    HEADERS = ("layer", "type", "weight", "input", "sign of input", "granularity", "normalization", "decided by")

    def rows(self) -> list[tuple[str, ...]]:
        """A row of strings per layer, under `HEADERS`."""
        return [self._row(layer) for layer in self.layers]

    @staticmethod
    def _row(layer: PlannedLayer) -> tuple[str, ...]:
        def levels(level_set: LevelSet | None) -> str:
            return "float" if level_set is None else f"{level_set.bits}-bit {level_set.scheme}"

        sign = "signed" if layer.facts.signed_input else "unsigned"
        how = (layer.rule.granularity, layer.rule.normalization) if layer.weight is not None else ("-", "-")
        return (layer.facts.name, layer.facts.type, levels(layer.weight), levels(layer.input), sign, *how, layer.reason)

    def __str__(self) -> str:
        return tabulate(self.rows(), self.HEADERS)


def resolve(policy: BitPolicy, layers: Sequence[LayerFacts]) -> Plan:
    """The plan that `policy` makes for `layers`.

    Raises:
        ApotfxError: a rule that matches no layer, or levels that do not exist; names the rule or the layer.
    """
    for i, rule in enumerate(policy.rules, 1):
        if not any(rule.matches(layer) for layer in layers):
            names = ", ".join(layer.name for layer in layers[:4])
            raise ApotfxError(f"policy: rule {i} ({rule}) matches no layer; the layers are {names}, ...")
    return Plan(tuple(_resolve_layer(policy, layer) for layer in layers))


def _resolve_layer(policy: BitPolicy, layer: LayerFacts) -> PlannedLayer:
    rule = next((rule for rule in policy.rules if rule.matches(layer)), None)
    if layer.obstacle is not None:
        return PlannedLayer(layer, None, None, None, f"float: {layer.obstacle}")
    if rule is None:
        return PlannedLayer(layer, None, None, None, "float: no rule matches")
    try:
        return PlannedLayer(
            layer,
            rule,
            _level_set(rule.scheme, rule.weight_bits, signed=True),
            _level_set(rule.scheme, rule.activation_bits, signed=layer.signed_input),
            str(rule),
        )
    except ApotfxError as error:
        raise ApotfxError(f"layer {layer.name} ({rule}): {error}") from None


def _level_set(scheme: str, bits: int, *, signed: bool) -> LevelSet | None:
    return None if scheme == "float" or bits == FLOAT_BITS else LevelSet(scheme, bits, signed)
