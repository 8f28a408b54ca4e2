"""Which layer gets what: rules, and their resolution into a plan before any graph is touched."""

import dataclasses
import fnmatch
import functools
import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml
from tabulate import tabulate

from .graph.facts import LayerFacts
from .errors import ApotfxError
from .files import read_file, write_atomic
from .levels import MAX_BITS, MIN_BITS, SCHEMES, LevelSet
from .quantizers import NORMALIZATIONS

FLOAT_BITS = 32
POSITIONS = ("first", "last")
GRANULARITIES = ("tensor", "channel")
MAX_RULES = 5000
MAX_YAML_BYTES, MAX_YAML_DEPTH, MAX_YAML_VALUES, MAX_TEXT, MAX_DIGITS = 2**20, 32, 100_000, 2**16, 64
PER_NAME = ("bits", "weight_bits", "activation_bits", "scheme")  # a value each, where a rule lists names


@dataclass(frozen=True)
class Rule:
    """What the layers that match get. The first rule that matches a layer decides.

    A rule matches the layers that fit all of `name`, `regex`, `type`, `depthwise`, `kernel_size`, `position` and
    `index`; by default every layer fits. Lists are kept as tuples.

    Attributes:
        name: glob on the layer's whole qualified name, such as "layer1.*.conv?", case-sensitive; or a list of globs,
            one of which must fit, and each of which must fit a layer.
        regex: regular expression that fits the layer's whole qualified name; None for any.
        type: what the plan calls the layer, such as "F.conv2d" or the name of a class of your own, or what it computes:
            "Conv1d" to "Conv3d", "ConvTranspose1d" to "ConvTranspose3d", "Linear"; None for any.
        depthwise: True for a convolution that reads a single input channel for every output channel, False for every
            other layer; None for any.
        kernel_size: of a convolution: one number for all dimensions, or a list with one per dimension; None for any.
        position: "first" (no other layer before it), "last" (no other layer after it); None for any.
        index: the layer's row in the plan from 0, or from the end by -1, -2, ...; or a list of rows; None for any.
        scheme: "apot", "pot", "uniform", or "float", which leaves the layer as it is.
        weight_bits: 2 to 8, the sign included; 32 for float.
        activation_bits: of the layer's input, 2 to 8, the sign included where it has one; 32 for float.
        granularity: of the weight's clip: one per "tensor" or one per output "channel".
        normalization: "none", "standardize" (the paper's) or "rescale"; see `WeightQuantizer`.
        clip_grad_factor: multiplies the gradients of both clips.
        max_accumulator_bits: 2 to 64, of the two's complement accumulator that the layer must fit whatever its weights
            and its input, see `operators.accumulator_bound`; a layer that does not is an error. None for any.
    """

    name: str | tuple[str, ...] = "*"
    regex: str | None = field(default=None, kw_only=True)
    type: str | None = None
    depthwise: bool | None = field(default=None, kw_only=True)
    kernel_size: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    position: str | None = None
    index: int | tuple[int, ...] | None = field(default=None, kw_only=True)
    scheme: str = "apot"
    weight_bits: int = 4
    activation_bits: int = 4
    granularity: str = "tensor"
    normalization: str = "rescale"
    clip_grad_factor: float = 1.0
    max_accumulator_bits: int | None = None

    def __post_init__(self):
        for key in ("name", "kernel_size", "index"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        self._check_names()
        if self.depthwise is not None and not isinstance(self.depthwise, bool):
            raise ApotfxError(f"{self}: depthwise {self.depthwise!r} is unknown; choose one of true, false")
        _require_whole_numbers(self, "kernel_size", "whole number of at least 1", 1)
        _require_whole_numbers(self, "index", "whole number")
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

    def _check_names(self) -> None:
        if self.name == ():
            raise ApotfxError("rule: name [] is empty; list a glob or more, or leave it out")
        for name in _as_tuple(self.name):
            _require_str("name", name)
        for key in ("regex", "type"):
            if getattr(self, key) is not None:
                _require_str(key, getattr(self, key))
        try:
            re.compile(self.regex or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ApotfxError(
                f"{self}: regex {_abbreviated(self.regex)} is not a regular expression ({error}); write it as Python's "
                "re.fullmatch takes it"
            ) from None

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
        keys = ("name", "regex", "type", "depthwise", "kernel_size", "position", "index")
        given = {key: getattr(self, key) for key in keys if getattr(self, key) not in (None, "*")}
        return "rule " + (" ".join(f"{key}={_listed(value)}" for key, value in given.items()) or "*")

    def matching(self, layers: Sequence[LayerFacts]) -> list[int]:
        """The positions in `layers`, which are in the order of the plan, of those that the rule matches."""
        fits = [i for i, layer in enumerate(layers) if self._describes(layer)]
        if self.index is None:
            return fits
        index = _as_tuple(self.index)
        return [i for i in fits if i in index or i - len(layers) in index]

    def _describes(self, layer: LayerFacts) -> bool:
        size = self.kernel_size
        return (
            any(fnmatch.fnmatchcase(layer.name, glob) for glob in _as_tuple(self.name))
            and (self.regex is None or re.fullmatch(self.regex, layer.name) is not None)
            and self.type in (None, layer.type, layer.kind or None)
            and self.depthwise in (None, layer.depthwise)
            and (size is None or layer.kernel_size == size or set(layer.kernel_size) == {size})
            and (self.position is None or getattr(layer, f"is_{self.position}"))
        )


def _as_tuple(value: object) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _plain(value: object) -> object:
    """`value` as YAML and JSON know it."""
    return list(value) if isinstance(value, tuple) else value


def _listed(value: object) -> str:
    values = [_short(str(v), 100) for v in _as_tuple(value)]
    return ",".join(values if len(values) <= 3 else [*values[:2], "...", values[-1]])


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _require_str(key: str, value: object) -> None:
    if not isinstance(value, str):
        raise ApotfxError(f"rule: {key} {value!r} is not a str; quote it")


def _require_whole_numbers(rule: Rule, key: str, what: str, least: float = -math.inf) -> None:
    value = getattr(rule, key)
    numbers = _as_tuple(value)
    if value is not None and not (numbers and all(_is_whole(n) and n >= least for n in numbers)):
        raise ApotfxError(f"{rule}: {key} {_plain(value)!r} is neither a {what} nor a list of such")


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
        """The policy that `to_dict` gave.

        `bits` in a rule is short for both kinds of bits. Where `name` is a list, `bits`, `weight_bits`,
        `activation_bits` and `scheme` may be lists of the same length: the rule then stands for one rule per name.

        Raises:
            ApotfxError: anything but `{"rules": [{...}, ...]}` with known keys and values; names `source`.
        """
        rules = content["rules"] if isinstance(content, dict) and set(content) == {"rules"} else None
        if not isinstance(rules, list) or not rules:
            raise ApotfxError(f"{source}: expected one key `rules` with a list of rules, got {_abbreviated(content)}")
        expanded = (_rules_from_dict(rule, f"{source}: rule {i}") for i, rule in enumerate(rules, 1))
        expanded = list(itertools.islice(itertools.chain.from_iterable(expanded), MAX_RULES + 1))
        if len(expanded) > MAX_RULES:
            raise ApotfxError(f"{source}: more than {MAX_RULES} rules; let a glob or a list of names stand for several")
        return cls(expanded)

    def to_dict(self) -> dict:
        """Plain data, with every key of every rule."""
        return {"rules": [{k: _plain(v) for k, v in dataclasses.asdict(rule).items()} for rule in self.rules]}

    @classmethod
    def from_yaml(cls, path: str | Path) -> "BitPolicy":
        """Raises: ApotfxError: no such file, not YAML, or not a policy; names the file and what is wrong."""
        try:
            content = parse_yaml(read_file(path, max_bytes=MAX_YAML_BYTES))
        except ApotfxError as error:
            raise ApotfxError(f"policy file {error}; check the path") from None
        except ValueError as error:
            raise ApotfxError(f"policy file {path}: not YAML ({error})") from error
        return cls.from_dict(content, f"policy file {path}")

    def to_yaml(self, path: str | Path) -> None:
        write_atomic(path, yaml.safe_dump(self.to_dict(), sort_keys=False).encode())


class _Loader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML's last one would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {_abbreviated(key.value)} twice", key.start_mark
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def parse_yaml(content: bytes) -> object:
    """Raises: ValueError: not YAML, in one line, a key twice, or larger or deeper than any file of this package's."""
    try:
        if sum(map(content.count, (b",", b"\n", b":", b"[", b"{"))) > MAX_YAML_VALUES:
            raise ValueError(f"more than {MAX_YAML_VALUES} values")
        loader = _Loader(content.decode())
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _require_bounded(node)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except RecursionError:
        problem = "nested too deeply"
    except (yaml.YAMLError, ValueError, OverflowError) as error:  # ValueError: a date or UTF-8 that is none
        problem = " ".join(str(error).split())
    raise ValueError(_short(problem, 300))


def _require_bounded(root: yaml.Node) -> None:
    """Raises: ValueError: what an alias stands for counts as often as it is written out."""
    sizes: dict[yaml.Node, float] = {}

    def size_of(node: yaml.Node, depth: int) -> float:
        if depth > MAX_YAML_DEPTH:
            raise ValueError(f"nested more than {MAX_YAML_DEPTH} deep, or in itself")
        if isinstance(node, yaml.ScalarNode):
            is_number = node.tag.endswith((":int", ":float"))
            if len(node.value) > (MAX_DIGITS if is_number else MAX_TEXT):
                raise ValueError(f"{'a number' if is_number else 'a text'} of {len(node.value)} characters")
            return 1
        if node not in sizes:
            children = node.value if isinstance(node, yaml.SequenceNode) else itertools.chain.from_iterable(node.value)
            sizes[node] = 1 + sum(size_of(child, depth + 1) for child in children)
        return sizes[node]

    if size_of(root, 0) > MAX_YAML_VALUES:
        raise ValueError(f"more than {MAX_YAML_VALUES} values")


def _rules_from_dict(content: object, source: str) -> list[Rule]:
    if not isinstance(content, dict):
        raise ApotfxError(f"{source}: expected keys and values, got {_abbreviated(content)}")
    lists = {key: content[key] for key in PER_NAME if isinstance(content.get(key), list)}
    if not lists:
        return [_rule_from_dict(content, source)]
    names = content.get("name")
    for key, values in lists.items():
        if not isinstance(names, list) or len(names) != len(values):
            count = f"{len(names)} names" if isinstance(names, list) else "no list of names"
            raise ApotfxError(
                f"{source}: {key} {_abbreviated(values)} has {len(values)} values for {count}; list one value per "
                "name, or give one for all"
            )
    return [
        _rule_from_dict(content | {"name": name} | {key: values[i] for key, values in lists.items()}, source)
        for i, name in enumerate(names)
    ]


def _rule_from_dict(content: dict, source: str) -> Rule:
    content = dict(content)
    if "bits" in content:
        bits = content.pop("bits")
        content = {"weight_bits": bits, "activation_bits": bits} | content
    known = [field.name for field in dataclasses.fields(Rule)]
    for key in content:
        if key not in known:
            raise ApotfxError(f"{source}: unknown key {_abbreviated(key)}; the keys are bits, {', '.join(known)}")
    try:
        return Rule(**content)
    except ApotfxError as error:
        raise ApotfxError(f"{source}: {_short(str(error), 500)}") from None


def _abbreviated(value: object) -> str:
    return _short(repr(value), 60)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 3] + "..."


@dataclass(frozen=True)
class PlannedLayer:
    """One row of a plan: what a layer gets, and why.

    Attributes:
        facts: what the graph says of the layer.
        rule: the rule that decided; None for a layer left in float because no rule matched or it cannot be quantized.
        weight: level set of the weight; None for float.
        input: level set of the input; None for float.
        reason: the rule, or why the layer stays in float.
        observed_range: (least, largest) value of its input in the data of calibration; None before one.
    """

    facts: LayerFacts
    rule: Rule | None
    weight: LevelSet | None
    input: LevelSet | None
    reason: str
    observed_range: tuple[float, float] | None = None

    @property
    def quantized(self) -> bool:
        return self.weight is not None or self.input is not None

    @property
    def sign(self) -> str:
        """ "signed" or "unsigned", and what the data says to the contrary."""
        sign, other = ("signed", "never negative") if self.facts.signed_input else ("unsigned", "negative")
        contrary = self.observed_range is not None and (self.observed_range[0] >= 0) == self.facts.signed_input
        return f"{sign}, {other} in the data" if contrary else sign

    def explain(self) -> str:
        """What the layer gets in a line, then a line for each decision and its reason."""
        facts = self.facts
        gets = "float"
        if self.quantized:
            how = f" per {self.rule.granularity}, {self.rule.normalization}" if self.weight is not None else ""
            gets = f"weight {_levels_text(self.weight)}{how}; input {_levels_text(self.input)}"
        position = " and ".join(p for p in POSITIONS if getattr(facts, f"is_{p}")) or "neither first nor last"
        lines = [
            f"{facts.name} ({facts.type}): {gets}",
            f"stays {self.reason}" if self.rule is None else f"decided by: {self.reason}",
            _because(f"input {self.sign}", facts.sign_reason),
            _because(position, facts.position_reason),
            f"a batch norm {'is' if facts.feeds_batch_norm else 'is not'} its only reader",
        ]
        if self.observed_range is not None:
            lines.insert(3, "input in the data from {:.4g} to {:.4g}".format(*self.observed_range))
        return "\n    ".join(lines)


def _because(decision: str, reason: str) -> str:
    return f"{decision}: {reason}" if reason else decision


def _levels_text(levels: LevelSet | None) -> str:
    return "float" if levels is None else f"{levels.bits}-bit {levels.scheme}"


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
        how = (layer.rule.granularity, layer.rule.normalization) if layer.weight is not None else ("-", "-")
        levels = (_levels_text(layer.weight), _levels_text(layer.input))
        return (layer.facts.name, layer.facts.type, *levels, layer.sign, *how, layer.reason)

    def __str__(self) -> str:
        return tabulate(self.rows(), self.HEADERS)

    def left_in_float(self, reasons: Mapping[str, str]) -> "Plan":
        """The same plan with some layers in float after all, and why, by name."""
        return Plan(
            tuple(
                dataclasses.replace(
                    layer, rule=None, weight=None, input=None, reason=f"float: {reasons[layer.facts.name]}",
                    facts=dataclasses.replace(layer.facts, obstacle=reasons[layer.facts.name]),
                ) if layer.facts.name in reasons else layer
                for layer in self.layers
            )
        )  # fmt: skip

    def with_observed(self, ranges: Mapping[str, tuple[float, float]]) -> "Plan":
        """The same plan with what the data says of the inputs of some layers, (least, largest) value by name.

        Raises:
            ApotfxError: a name that is in no row, or a range whose ends are no numbers in ascending order.
        """
        names = {layer.facts.name for layer in self.layers}
        for name, (low, high) in ranges.items():
            if name not in names:
                raise ApotfxError(f"plan: has no layer {name!r}; the layers are {_abbreviated(sorted(names))}")
            if not low <= high:
                raise ApotfxError(f"plan: range ({low}, {high}) of layer {name} is empty; give (least, largest) value")
        observed = {name: (float(low), float(high)) for name, (low, high) in ranges.items()}
        return Plan(
            tuple(
                dataclasses.replace(layer, observed_range=observed.get(layer.facts.name, layer.observed_range))
                for layer in self.layers
            )
        )

    def explain(self) -> str:
        """Per layer what it gets, and each decision with its reason, as text of a few lines."""
        return "\n".join(layer.explain() for layer in self.layers)


def resolve(policy: BitPolicy, layers: Sequence[LayerFacts]) -> Plan:
    """The plan that `policy` makes for `layers`.

    Raises:
        ApotfxError: a rule that matches no layer, a name in a rule's list that matches none, an index beyond the
            layers, or levels that do not exist; names the rule or the layer.
    """
    matching = [_matching(i, rule, layers) for i, rule in enumerate(policy.rules, 1)]
    return Plan(
        tuple(
            _resolve_layer(next((r for r, found in zip(policy.rules, matching) if i in found), None), layer)
            for i, layer in enumerate(layers)
        )
    )


def _matching(number: int, rule: Rule, layers: Sequence[LayerFacts]) -> set[int]:
    """The positions of the layers that `rule` matches, after a check that all of the rule has some effect."""
    source, count = f"policy: rule {number} ({rule})", len(layers)
    for i in _as_tuple(rule.index):
        if i is not None and not -count <= i < count:
            raise ApotfxError(
                f"{source}: index {i} is out of range; the {count} layers are 0 to {count - 1}, or -{count} to -1"
            )
    matching = rule.matching(layers)
    for glob in _as_tuple(rule.name):
        if not any(fnmatch.fnmatchcase(layers[i].name, glob) for i in matching):
            what = f": {glob!r} in its list of names" if isinstance(rule.name, tuple) else ""
            names = ", ".join(layer.name for layer in layers[:4])
            raise ApotfxError(f"{source}{what} matches no layer; the layers are {names}, ...")
    return set(matching)


def _resolve_layer(rule: Rule | None, layer: LayerFacts) -> PlannedLayer:
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


@functools.cache  # a level set lists its levels once
def _level_set(scheme: str, bits: int, *, signed: bool) -> LevelSet | None:
    return None if scheme == "float" or bits == FLOAT_BITS else LevelSet(scheme, bits, signed)
