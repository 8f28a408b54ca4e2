import copy
import dataclasses
import itertools
import json
import os
import re
from pathlib import Path

import pytest
import yaml

from apotfx import ApotfxError, BitPolicy, LevelSet, Rule
from apotfx.graph.facts import LayerFacts
from apotfx.policy import resolve


def layer(name="conv", type="Conv2d", signed_input=False, is_first=False, is_last=False, obstacle=None, **more):
    return LayerFacts(name, type, signed_input, is_first, is_last, False, obstacle, **more)


LAYERS = [
    layer("conv1", is_first=True, signed_input=True), layer("layer1.0.conv1"), layer("layer1.0.conv2"),
    layer("layer2.0.conv1", signed_input=True), layer("fc", "Linear", is_last=True),
]  # fmt: skip

SHAPES = [
    layer("stem", kind="Conv2d", kernel_size=(7, 7)),
    layer("dw", kind="Conv2d", kernel_size=(3, 3), depthwise=True),
    layer("pw", "MyConv", kind="Conv2d", kernel_size=(1, 1)),
    layer("conv2d", "F.conv2d", kind="Conv2d", kernel_size=(1, 7)),
    layer("conv1d", "Conv1d", kind="Conv1d", kernel_size=(7,)),
    layer("up", "ConvTranspose2d", kind="ConvTranspose2d", kernel_size=(3, 3)),
    layer("fc", "Linear", kind="Linear"),
    layer("rnn", "LSTM", obstacle="LSTM has no quantized version"),
]  # fmt: skip


def decided(policy, layers=LAYERS):
    """The rule of every layer by its number, 0 for none."""
    return [policy.rules.index(row.rule) + 1 if row.rule else 0 for row in resolve(policy, layers).layers]


# Rules.


WRONG_RULES = [
    ({"name": 5}, "rule: name 5 is not a str; quote it"),
    ({"name": None}, "rule: name None is not a str"),
    ({"name": []}, r"rule: name \[\] is empty; list a glob or more, or leave it out"),
    ({"name": ["fc", 5]}, "rule: name 5 is not a str; quote it"),
    ({"regex": 5}, "rule: regex 5 is not a str; quote it"),
    (
        {"regex": "conv("},
        r"rule regex=conv\(: regex 'conv\(' is not a regular expression \(missing \), .*; write it as Python's re.fullmatch",
    ),
    ({"type": 5}, "rule: type 5 is not a str; quote it"),
    ({"depthwise": "yes"}, "rule depthwise=yes: depthwise 'yes' is unknown; choose one of true, false"),
    ({"depthwise": 1}, "depthwise 1 is unknown; choose one of true, false"),
    *(
        (
            {"kernel_size": size},
            rf"kernel_size {re.escape(repr(size))} is neither a whole number of at least 1 nor a list of such",
        )
        for size in (0, 3.0, "3", True, [], [3, 0], ["3"])
    ),
    *(
        ({"index": i}, rf"index {re.escape(repr(i))} is neither a whole number nor a list of such")
        for i in (1.0, "0", False, [], [0, None])
    ),
    ({"position": "middle"}, "rule position=middle: position 'middle' is unknown; choose one of first, last"),
    ({"position": 1}, "position 1 is unknown"),
    ({"position": ["first"]}, r"position \['first'\] is unknown"),
    ({"scheme": "apod"}, "scheme 'apod' is unknown; choose one of apot, pot, uniform, float"),
    ({"scheme": None}, "scheme None is unknown"),
    ({"name": "fc", "weight_bits": 1}, "rule name=fc: weight_bits 1 is out of range; use 2 to 8, or 32 for float"),
    ({"type": "Linear", "activation_bits": 9}, "rule type=Linear: activation_bits 9 is out of range"),
    ({"weight_bits": 16}, "weight_bits 16 is out of range"),
    ({"weight_bits": 4.0}, "weight_bits 4.0 is out of range"),
    ({"weight_bits": "4"}, "weight_bits '4' is out of range"),
    ({"activation_bits": True}, "activation_bits True is out of range"),
    ({"activation_bits": None}, "activation_bits None is out of range"),
    ({"granularity": "row"}, "granularity 'row' is unknown; choose one of tensor, channel"),
    ({"normalization": "norm"}, "normalization 'norm' is unknown; choose one of none, standardize, rescale"),
    ({"clip_grad_factor": -0.1}, "clip_grad_factor -0.1 is not a number of at least 0"),
    ({"clip_grad_factor": "1e-2"}, "clip_grad_factor '1e-2' is not a number"),
    ({"clip_grad_factor": float("nan")}, "clip_grad_factor nan is not a number"),
    ({"clip_grad_factor": float("inf")}, "clip_grad_factor inf is not a number"),
    ({"clip_grad_factor": True}, "clip_grad_factor True is not a number"),
    *(
        ({"max_accumulator_bits": bits}, f"max_accumulator_bits {bits!r} is out of range; use 2 to 64, or leave it out")
        for bits in (1, 65, 16.0, "16", True)
    ),
    ({"max_accumulator_bits": 16, "scheme": "float"}, "max_accumulator_bits 16 needs a layer on integers; quantize"),
    ({"max_accumulator_bits": 16, "weight_bits": 32}, "max_accumulator_bits 16 needs a layer on integers"),
    ({"max_accumulator_bits": 16, "activation_bits": 32}, "max_accumulator_bits 16 needs a layer on integers"),
]
WRONG_IDS = ["-".join(f"{key}={value}" for key, value in rule.items()) for rule, _ in WRONG_RULES]


@pytest.mark.parametrize("rule, message", WRONG_RULES, ids=WRONG_IDS)
def test_a_wrong_value_is_refused(rule, message):
    with pytest.raises(ApotfxError, match=message):
        Rule(**rule)
    with pytest.raises(ApotfxError, match=f"policy: rule 2: .*{message}"):
        BitPolicy.from_dict({"rules": [{}, rule]})


@pytest.mark.parametrize("bits", [2, 8, 32])
def test_bits_at_their_limits(bits):
    assert Rule(weight_bits=bits, activation_bits=bits).weight_bits == bits


@pytest.mark.parametrize("bits", [2, 64, None])
def test_accumulator_bits_at_their_limits(bits):
    assert Rule(max_accumulator_bits=bits).max_accumulator_bits == bits


@pytest.mark.parametrize("rule, names", [
    (Rule(), "conv1 layer1.0.conv1 layer1.0.conv2 layer2.0.conv1 fc"), (Rule(name="conv1"), "conv1"),
    (Rule(name="conv"), ""),
    (Rule(name="*conv1"), "conv1 layer1.0.conv1 layer2.0.conv1"),
    (Rule(name="layer?.0.conv1"), "layer1.0.conv1 layer2.0.conv1"),
    (Rule(name="layer[!1].*"), "layer2.0.conv1"), (Rule(name="Layer*"), ""), (Rule(type="Linear"), "fc"),
    (Rule(type="linear"), ""),
    (Rule(position="first"), "conv1"), (Rule(position="last"), "fc"),
    (Rule(type="Conv2d", position="last"), ""),
    (Rule(name="layer1*", type="Conv2d"), "layer1.0.conv1 layer1.0.conv2"),
], ids=str)  # fmt: skip
def test_what_a_rule_matches(rule, names):
    assert [LAYERS[i].name for i in rule.matching(LAYERS)] == names.split()


@pytest.mark.parametrize("rule, names", [
    (Rule(name=["conv?d", "fc"]), "conv2d conv1d fc"), (Rule(name=("fc", "stem")), "stem fc"), (Rule(name=["up"]), "up"),
    (Rule(regex="(d|p)w"), "dw pw"), (Rule(regex="w"), ""), (Rule(regex="conv."), ""), (Rule(regex=r"conv\dd"), "conv2d conv1d"),
    (Rule(name="*w", regex="d.*"), "dw"),
    (Rule(type="Conv2d"), "stem dw pw conv2d"), (Rule(type="MyConv"), "pw"), (Rule(type="F.conv2d"), "conv2d"),
    (Rule(type="ConvTranspose2d"), "up"), (Rule(type="LSTM"), "rnn"), (Rule(type=""), ""),
    (Rule(depthwise=True), "dw"), (Rule(depthwise=False), "stem pw conv2d conv1d up fc rnn"),
    (Rule(kernel_size=7), "stem conv1d"), (Rule(kernel_size=[7]), "conv1d"), (Rule(kernel_size=(7, 7)), "stem"),
    (Rule(kernel_size=[1, 7]), "conv2d"), (Rule(kernel_size=[7, 1]), ""), (Rule(kernel_size=1), "pw"),
    (Rule(kernel_size=3), "dw up"), (Rule(kernel_size=3, depthwise=False), "up"), (Rule(type="Linear", kernel_size=1), ""),
    (Rule(index=0), "stem"), (Rule(index=-1), "rnn"), (Rule(index=[-8, 2, 6]), "stem pw fc"), (Rule(index=8), ""),
    (Rule(index=[1, 2], kernel_size=3), "dw"), (Rule(index=-9), ""),
], ids=str)  # fmt: skip
def test_what_a_rule_matches_by_shape_and_place(rule, names):
    assert [SHAPES[i].name for i in rule.matching(SHAPES)] == names.split()


def test_a_list_is_kept_as_a_tuple():
    rule = Rule(name=["a", "b"], kernel_size=[3, 1], index=[0, -1])
    assert (rule.name, rule.kernel_size, rule.index) == (("a", "b"), (3, 1), (0, -1))
    assert rule == Rule(name=("a", "b"), kernel_size=(3, 1), index=(0, -1)) and hash(rule)


@pytest.mark.parametrize("rule, text", [
    (Rule(), "rule *"), (Rule(name="fc"), "rule name=fc"),
    (Rule(type="Linear", position="last"), "rule type=Linear position=last"),
    (Rule(name=["a", "b.*"], regex=".*", depthwise=False), "rule name=a,b.* regex=.* depthwise=False"),
    (Rule(name=["a", "b", "c", "d", "e"], kernel_size=[3, 1], index=[0, -1]),
     "rule name=a,b,...,e kernel_size=3,1 index=0,-1"),
    (Rule(kernel_size=3, index=0), "rule kernel_size=3 index=0"),
])  # fmt: skip
def test_a_rule_is_named_by_what_it_matches(rule, text):
    assert str(rule) == text


# Resolution.


def test_the_first_match_wins():
    rules = Rule(name="layer1.*"), Rule(type="Conv2d"), Rule()
    assert decided(BitPolicy(rules)) == [2, 1, 1, 2, 3]
    assert decided(BitPolicy(rules[::-1])) == [1, 1, 1, 1, 1]


def test_a_layer_that_no_rule_matches_stays_float():
    plan = resolve(BitPolicy((Rule(type="Linear"),)), LAYERS)
    assert [row.quantized for row in plan.layers] == [False] * 4 + [True]
    assert plan.layers[0].reason == "float: no rule matches"


@pytest.mark.parametrize("bits, expected", [
    ((4, 4), ("apot 4", "apot 4")), ((32, 4), (None, "apot 4")), ((4, 32), ("apot 4", None)),
    ((32, 32), (None, None)),
])  # fmt: skip
def test_32_bits_are_float(bits, expected):
    plan = resolve(BitPolicy((Rule(weight_bits=bits[0], activation_bits=bits[1]),)), LAYERS)
    for row in plan.layers:
        assert tuple(q and f"{q.scheme} {q.bits}" for q in (row.weight, row.input)) == expected
        assert row.quantized is any(expected)


def test_scheme_float_is_float():
    plan = resolve(BitPolicy((Rule(scheme="float"),)), LAYERS)
    assert not any(row.quantized for row in plan.layers) and plan.layers[0].reason == "rule *"


def test_weights_are_signed_and_inputs_as_the_graph_says():
    plan = resolve(BitPolicy((Rule(weight_bits=3, activation_bits=5),)), LAYERS)
    assert {row.weight for row in plan.layers} == {LevelSet("apot", 3)}
    assert [row.input for row in plan.layers] == [
        LevelSet("apot", 5, signed) for signed in (True, False, False, True, False)
    ]


def test_an_obstacle_wins_over_every_rule():
    plan = resolve(BitPolicy((Rule(),)), [layer("a", obstacle="too odd"), layer("b")])
    odd = plan.layers[0]
    assert odd.reason == "float: too odd" and odd.rule is None and not odd.quantized
    assert plan.layers[1].quantized


@pytest.mark.parametrize("rule, message", [
    (Rule(name="layer9.*"),
     r"policy: rule 2 \(rule name=layer9.\*\) matches no layer; the layers are conv1, layer1.0.conv1"),
    (Rule(type="Conv3d"), r"policy: rule 2 \(rule type=Conv3d\) matches no layer"),
    (Rule(name="conv1", position="last"), r"rule 2 \(rule name=conv1 position=last\) matches no layer"),
], ids=str)  # fmt: skip
def test_a_rule_that_matches_nothing_is_an_error(rule, message):
    with pytest.raises(ApotfxError, match=message):
        resolve(BitPolicy((Rule(name="conv1"), rule)), LAYERS)


@pytest.mark.parametrize("rule, message", [
    (Rule(name=["fc", "up*", "conv9"]),
     r"policy: rule 2 \(rule name=fc,up\*,conv9\): 'conv9' in its list of names matches no layer; the layers are stem, dw"),
    (Rule(name=["fc", "up"], type="Linear"), r"rule 2 \(rule name=fc,up type=Linear\): 'up' in its list of names matches"),
    (Rule(regex="s"), r"rule 2 \(rule regex=s\) matches no layer"),
    (Rule(kernel_size=1, depthwise=True), r"rule 2 \(rule depthwise=True kernel_size=1\) matches no layer"),
    (Rule(index=8), r"policy: rule 2 \(rule index=8\): index 8 is out of range; the 8 layers are 0 to 7, or -8 to -1"),
    (Rule(index=[0, -9]), r"rule 2 \(rule index=0,-9\): index -9 is out of range"),
], ids=str)  # fmt: skip
def test_a_part_of_a_rule_that_matches_nothing_is_an_error(rule, message):
    with pytest.raises(ApotfxError, match=message):
        resolve(BitPolicy((Rule(), rule)), SHAPES)


def test_different_rules_in_one_network():
    policy = BitPolicy((
        Rule(index=[0, 6], scheme="uniform", weight_bits=8, activation_bits=8),
        Rule(depthwise=True, scheme="float"), Rule(type="MyConv", scheme="pot", weight_bits=3, activation_bits=32),
        Rule(kernel_size=[1, 7], weight_bits=32), Rule(regex="conv.*", weight_bits=2, activation_bits=5), Rule(name="rnn"),
    ))  # fmt: skip
    plan = resolve(policy, SHAPES)
    got = [tuple(q and f"{q.scheme} {q.bits}" for q in (row.weight, row.input)) for row in plan.layers]
    eight = ("uniform 8", "uniform 8")
    assert got == [
        eight, (None, None), ("pot 3", None), (None, "apot 4"), ("apot 2", "apot 5"), (None, None), eight, (None, None)
    ]  # fmt: skip
    assert [row.reason for row in plan.layers] == [
        "rule index=0,6", "rule depthwise=True", "rule type=MyConv", "rule kernel_size=1,7", "rule regex=conv.*",
        "float: no rule matches", "rule index=0,6", "float: LSTM has no quantized version",
    ]  # fmt: skip


def test_a_rule_that_others_outdo_is_no_error():
    assert decided(BitPolicy((Rule(), Rule(name="fc")))) == [1] * 5


@pytest.mark.parametrize("rule, message", [
    (Rule(scheme="pot", weight_bits=6),
     r"layer conv1 \(rule \*\): pot at 6 bits signed: its largest level 2\^30"),
    (Rule(scheme="pot", activation_bits=5), r"layer layer1.0.conv1 \(rule \*\): pot at 5 bits unsigned"),
], ids=["weight", "input"])  # fmt: skip
def test_pot_that_is_too_wide_names_the_layer(rule, message):
    with pytest.raises(ApotfxError, match=message):
        resolve(BitPolicy((rule,)), LAYERS)


# Policies.


@pytest.mark.parametrize("rules, got", [
    ((), r"\(\)"), ([], r"\[\]"), (Rule(), "Rule"), (({"name": "fc"},), ".*'name': 'fc'"), ("apot", "'apot'"),
    (None, "None"),
], ids=["empty-tuple", "empty-list", "one-rule", "dicts", "string", "none"])  # fmt: skip
def test_a_policy_is_a_sequence_of_rules(rules, got):
    with pytest.raises(ApotfxError, match=f"policy: expected one Rule or more in a sequence, got {got}"):
        BitPolicy(rules)


def test_rules_are_kept_as_a_tuple():
    assert BitPolicy(Rule() for _ in range(2)) == BitPolicy((Rule(), Rule()))
    assert BitPolicy([Rule()]) == BitPolicy((Rule(),)) and hash(BitPolicy([Rule()]))


@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("scheme", ["apot", "uniform"])
def test_the_default_policy(bits, scheme):
    end = {"scheme": "uniform", "weight_bits": 8, "activation_bits": 8}
    assert BitPolicy.default(bits, scheme).rules == (
        Rule(position="first", **end), Rule(position="last", **end),
        Rule(scheme=scheme, weight_bits=bits, activation_bits=bits),
    )  # fmt: skip
    assert BitPolicy.default() == BitPolicy.default(4, "apot")
    assert {rule.normalization for rule in BitPolicy.default().rules} == {"rescale"}


def test_the_default_policy_at_32_bits_is_float():
    assert BitPolicy.default(32).rules == (Rule(scheme="float"),)


def test_the_published_policy():
    end = {"scheme": "uniform", "weight_bits": 8, "activation_bits": 32, "normalization": "none"}
    assert BitPolicy.published(3, "pot").rules == (
        Rule(position="first", **end), Rule(position="last", **end),
        Rule(scheme="pot", weight_bits=3, activation_bits=3, normalization="standardize"),
    )  # fmt: skip


@pytest.mark.parametrize("make", [BitPolicy.default, BitPolicy.published])
def test_the_ready_made_policies_refuse_what_a_rule_refuses(make):
    with pytest.raises(ApotfxError, match="weight_bits 9 is out of range"):
        make(9)
    with pytest.raises(ApotfxError, match="scheme 'apod' is unknown"):
        make(4, "apod")


POLICIES = {
    "default": BitPolicy.default(3), "published": BitPolicy.published(), "float": BitPolicy.default(32),
    "every-key": BitPolicy((
        Rule("layer1.*", "Conv2d", "first", "pot", 3, 4, "channel", "none", 0.01, 24),
        Rule(name="ü[!x]*: #", clip_grad_factor=2),
        Rule(name=["a", "b*"], regex=r"\w+", depthwise=False, kernel_size=(3, 1), index=[0, -1]),
        Rule(kernel_size=3, index=2, depthwise=True),
    )),
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_round_trips(policy, tmp_path):
    assert BitPolicy.from_dict(policy.to_dict()) == policy
    policy.to_yaml(tmp_path / "policy.yaml")
    assert BitPolicy.from_yaml(tmp_path / "policy.yaml") == policy
    assert BitPolicy.from_yaml(str(tmp_path / "policy.yaml")) == policy
    assert [path.name for path in tmp_path.iterdir()] == ["policy.yaml"]


def test_to_dict_names_every_field():
    names = {field.name for field in dataclasses.fields(Rule)}
    assert all(set(rule) == names for rule in BitPolicy.default().to_dict()["rules"])


def test_to_dict_is_plain_data():
    policy = BitPolicy((Rule(name=["a", "b"], kernel_size=(3, 1), index=(0,)),))
    (rule,) = policy.to_dict()["rules"]
    assert (rule["name"], rule["kernel_size"], rule["index"]) == (["a", "b"], [3, 1], [0])
    assert json.loads(json.dumps(policy.to_dict())) == policy.to_dict()


@pytest.mark.parametrize("content, expected", [
    ({"name": ["a", "b*"], "bits": [3, 5]}, [
        Rule(name="a", weight_bits=3, activation_bits=3), Rule(name="b*", weight_bits=5, activation_bits=5)]),
    ({"name": ["a", "b"], "bits": [3, 5], "activation_bits": 8, "scheme": ["pot", "apot"], "granularity": "channel"}, [
        Rule(name="a", scheme="pot", weight_bits=3, activation_bits=8, granularity="channel"),
        Rule(name="b", weight_bits=5, activation_bits=8, granularity="channel")]),
    ({"name": ["a", "b"], "bits": 6, "weight_bits": [2, 4]}, [
        Rule(name="a", weight_bits=2, activation_bits=6), Rule(name="b", weight_bits=4, activation_bits=6)]),
    ({"name": ["a"], "activation_bits": [2]}, [Rule(name="a", activation_bits=2)]),
    ({"name": ["a", "b"], "bits": 6}, [Rule(name=("a", "b"), weight_bits=6, activation_bits=6)]),
], ids=str)  # fmt: skip
def test_a_list_of_names_with_a_value_each(content, expected):
    before = copy.deepcopy(content)
    assert BitPolicy.from_dict({"rules": [content, {}]}).rules == (*expected, Rule())
    assert content == before


@pytest.mark.parametrize("content, expected", [
    ({"bits": 3}, Rule(weight_bits=3, activation_bits=3)),
    ({"bits": 3, "activation_bits": 8}, Rule(weight_bits=3, activation_bits=8)),
    ({"weight_bits": 2, "bits": 5, "name": "fc"}, Rule(name="fc", weight_bits=2, activation_bits=5)),
    ({}, Rule()),
], ids=str)  # fmt: skip
def test_bits_is_short_for_both(content, expected):
    before = dict(content)
    assert BitPolicy.from_dict({"rules": [content]}).rules == (expected,)
    assert content == before


WRONG = {
    "not-a-dict": ([], "expected one key `rules` with a list of rules, got \\[\\]"),
    "nothing": (None, "expected one key `rules` with a list of rules, got None"),
    "other-key": ({"rules": [{}], "version": 1}, "expected one key `rules`"),
    "no-list": ({"rules": {"name": "fc"}}, "expected one key `rules` with a list"),
    "no-rules": ({"rules": []}, "expected one key `rules` with a list of rules, got {'rules': \\[\\]}"),
    "rule-not-a-dict": ({"rules": [{}, "fc"]}, "rule 2: expected keys and values, got 'fc'"),
    "unknown-key": (
        {"rules": [{}, {"nam": "fc"}]},
        "rule 2: unknown key 'nam'; the keys are bits, name, regex, type, depthwise, kernel_size, position, index, scheme",
    ),
    "too-few-values": (
        {"rules": [{}, {"name": ["a", "b"], "bits": [2]}]},
        r"rule 2: bits \[2\] has 1 values for 2 names; list one value per name, or give one for all",
    ),
    "values-for-no-list": (
        {"rules": [{"name": "a", "scheme": ["pot", "apot"]}]},
        r"rule 1: scheme \['pot', 'apot'\] has 2 values for no list of names; list one value per name",
    ),
    "bad-value-in-a-list": (
        {"rules": [{"name": ["a", "b"], "weight_bits": [2, 1]}]},
        "rule 1: rule name=b: weight_bits 1 is out of range",
    ),
    "list-for-another-key": (
        {"rules": [{"name": ["a", "b"], "granularity": ["tensor", "channel"]}]},
        r"rule 1: rule name=a,b: granularity \['tensor', 'channel'\] is unknown",
    ),
    "key-not-a-string": ({"rules": [{4: 4}]}, "rule 1: unknown key 4"),
    "bad-value": ({"rules": [{"bits": 1}]}, "rule 1: rule \\*: weight_bits 1 is out of range"),
}


@pytest.mark.parametrize("content, message", WRONG.values(), ids=WRONG)
def test_wrong_content_is_refused(content, message, tmp_path):
    with pytest.raises(ApotfxError, match=f"policy: {message}"):
        BitPolicy.from_dict(content)
    path = tmp_path / "policy.yaml"
    path.write_text(yaml.safe_dump(content))
    with pytest.raises(ApotfxError, match=f"policy file {re.escape(str(path))}: {message}"):
        BitPolicy.from_yaml(path)


@pytest.mark.parametrize("data, message", [
    (b"rules: [", "not YAML"), (b"rules: *x", "not YAML"), (b"\xff\xfe\x00", "not YAML"),
    (b"!!python/object:os.system {}", "not YAML"),
    (b"", "expected one key `rules`"),
], ids=["syntax", "alias", "encoding", "object", "empty"])  # fmt: skip
def test_a_file_that_is_no_policy_is_refused(data, message, tmp_path):
    path = tmp_path / "policy.yaml"
    path.write_bytes(data)
    with pytest.raises(ApotfxError, match=f"policy file {re.escape(str(path))}: {message}") as error:
        BitPolicy.from_yaml(path)
    assert "\n" not in str(error.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    with pytest.raises(ApotfxError, match=r"absent.yaml: cannot be read \(No such file or directory\); check the path"):
        BitPolicy.from_yaml(tmp_path / "absent.yaml")
    with pytest.raises(ApotfxError, match="is not a file; expected one to read; check the path"):
        BitPolicy.from_yaml(tmp_path)


# Plans.


def test_the_text_of_a_plan():
    policy = BitPolicy((
        Rule(position="first", scheme="uniform", weight_bits=8, activation_bits=32, normalization="none"),
        Rule(name="layer1.*", scheme="pot", weight_bits=3, activation_bits=4, granularity="channel"),
        Rule(type="Linear", weight_bits=32),
    ))  # fmt: skip
    plan = resolve(policy, [*LAYERS, layer("up", "ConvTranspose2d", obstacle="too odd")])
    on_layer1 = ("Conv2d", "3-bit pot", "4-bit pot", "unsigned", "channel", "rescale", "rule name=layer1.*")
    rows = [
        ("conv1", "Conv2d", "8-bit uniform", "float", "signed", "tensor", "none", "rule position=first"),
        ("layer1.0.conv1", *on_layer1),
        ("layer1.0.conv2", *on_layer1),
        ("layer2.0.conv1", "Conv2d", "float", "float", "signed", "-", "-", "float: no rule matches"),
        ("fc", "Linear", "float", "4-bit apot", "unsigned", "-", "-", "rule type=Linear"),
        ("up", "ConvTranspose2d", "float", "float", "unsigned", "-", "-", "float: too odd"),
    ]
    assert plan.rows() == rows
    lines = str(plan).splitlines()
    assert [tuple(re.split(r"\s{2,}", line.strip())) for line in [lines[0], *lines[2:]]] == [plan.HEADERS, *rows]


def test_a_plan_explains_each_decision():
    layers = [
        layer("conv1", signed_input=True, is_first=True, sign_reason="the network's input x can be negative",
              position_reason="no layer before it"),
        dataclasses.replace(layer("conv2", sign_reason="relu (ReLU) is never negative"), feeds_batch_norm=True),
        layer("conv3", position_reason="after conv2, before up"),
        layer("up", "ConvTranspose2d", obstacle="too odd"),
        layer("fc", "Linear", is_first=True, is_last=True),
        layer("head", "Linear"),
    ]  # fmt: skip
    policy = BitPolicy((
        Rule(position="first", scheme="uniform", weight_bits=8, activation_bits=32), Rule(name="conv2", weight_bits=32),
        Rule(name="conv3", scheme="float"), Rule(name="up"),
    ))  # fmt: skip
    assert (
        resolve(policy, layers).explain()
        == """\
conv1 (Conv2d): weight 8-bit uniform per tensor, rescale; input float
    decided by: rule position=first
    input signed: the network's input x can be negative
    first: no layer before it
    a batch norm is not its only reader
conv2 (Conv2d): weight float; input 4-bit apot
    decided by: rule name=conv2
    input unsigned: relu (ReLU) is never negative
    neither first nor last
    a batch norm is its only reader
conv3 (Conv2d): float
    decided by: rule name=conv3
    input unsigned
    neither first nor last: after conv2, before up
    a batch norm is not its only reader
up (ConvTranspose2d): float
    stays float: too odd
    input unsigned
    neither first nor last
    a batch norm is not its only reader
fc (Linear): weight 8-bit uniform per tensor, rescale; input float
    decided by: rule position=first
    input unsigned
    first and last
    a batch norm is not its only reader
head (Linear): float
    stays float: no rule matches
    input unsigned
    neither first nor last
    a batch norm is not its only reader"""
    )


def test_plans_and_policies_are_values():
    policy = BitPolicy.default()
    assert resolve(policy, LAYERS) == resolve(BitPolicy.default(), LAYERS)
    with pytest.raises(dataclasses.FrozenInstanceError):
        policy.rules = ()


def test_what_the_data_says_stands_beside_what_the_graph_says():
    plan = resolve(BitPolicy.default(4), LAYERS)
    seen = plan.with_observed({"conv1": (-1, 2), "layer1.0.conv1": (0, 5.5), "layer2.0.conv1": (0.0, 3), "fc": (-1e-9, 1)})
    signs = [row[4] for row in seen.rows()]
    assert signs == ["signed", "unsigned", "unsigned", "signed, never negative in the data", "unsigned, negative in the data"]
    assert [row[4] for row in plan.rows()] == ["signed", "unsigned", "unsigned", "signed", "unsigned"]
    assert "signed, never negative in the data" in str(seen)
    lines = seen.layers[3].explain().splitlines()
    assert [line.strip() for line in lines[2:4]] == ["input signed, never negative in the data", "input in the data from 0 to 3"]
    assert seen.layers[1].observed_range == (0.0, 5.5) and seen.layers[2].observed_range is None
    again = seen.with_observed({"layer2.0.conv1": (-2, 3)})  # a later calibration
    assert again.layers[3].sign == "signed" and again.layers[1] == seen.layers[1]
    assert dataclasses.replace(seen.layers[3], observed_range=None) == plan.layers[3]


@pytest.mark.parametrize("ranges, message", [
    ({"conv9": (0, 1)}, "plan: has no layer 'conv9'; the layers are"),
    ({"conv1": (1, 0)}, r"plan: range \(1, 0\) of layer conv1 is empty"),
    ({"conv1": (float("nan"), 0)}, r"plan: range \(nan, 0\) of layer conv1 is empty"),
])  # fmt: skip
def test_what_the_data_cannot_say(ranges, message):
    with pytest.raises(ApotfxError, match=message):
        resolve(BitPolicy.default(4), LAYERS).with_observed(ranges)


LAUGHS = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in itertools.pairwise("abcdefghij")
)


@pytest.mark.parametrize("content, message", [
    ("rules:\n- {bits: 4, bits: 3}", "the key 'bits' twice"),
    ("rules:\n- {bits: 4}\nrules:\n- {bits: 3}", "the key 'rules' twice"),
    (LAUGHS + "rules: *j", "more than 100000 values"), ("rules: &a [*a]", "nested more than 32 deep, or in itself"),
    ("rules: " + "[" * 33 + "]" * 33, "nested more than 32 deep"), ("- " * 500_000, "nested too deeply"),
    ("[" * 500_000, "more than 100000 values"), ("rules:\n" + "- {}\n" * 60_000, "more than 100000 values"),
    ("rules:\n- {bits: " + "9" * 65 + "}", "a number of 65 characters"),
    ("rules:\n- {bits: 1" + ":01" * 30_000 + "}", "a number of 90001 characters"),
    ("rules:\n- {name: " + "a" * 100_000 + "}", "a text of 100000 characters"),
    ("rules:\n- {bits: 2001-99-99}", "month must be in 1..12"), ("rules: *" + "a" * 100_000, "found undefined alias 'aaa"),
    ("rules: !!python/object/apply:os.mkdir [pwned]", "could not determine a constructor"),
    ("rules: \0", "unacceptable character #x0000"), (b"\xff\xfer", "'utf-8' codec can't decode byte 0xff"),
    ("a\n---\nb", "expected a single document in the stream"),
], ids=itertools.count())  # fmt: skip
def test_hostile_yaml_is_refused_at_once_and_in_one_short_line(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ApotfxError, match=rf"^policy file p.yaml: not YAML \({re.escape(message)}") as error:
        BitPolicy.from_yaml("p.yaml")
    assert str(error.value).isprintable() and len(str(error.value)) < 400 and os.listdir() == ["p.yaml"]


@pytest.mark.parametrize("rules, message", [
    ("- {scheme: " + "x" * 60_000 + "}", "scheme 'xxx"), ("- {" + "x" * 900 + ": 1}", "unknown key 'xxx"),
    ("- {kernel_size: [" + "1, " * 5000 + "a]}", "kernel_size"), ("- {regex: '" + "(" * 5000 + "'}", "is not a regular"),
    ("- {regex: '" + "(" * 9000 + ")" * 9000 + "'}", "is not a regular"), ("- {regex: 'a{99999999999}'}", "is not a regular"),
    ("- {name: [" + ", ".join(f"a{i}" for i in range(6000)) + "], bits: [" + "4, " * 6000 + "]}", "more than 5000 rules"),
    ("- " + "x" * 60_000, "expected keys and values"),
], ids=itertools.count())  # fmt: skip
def test_no_error_prints_an_unbounded_value(rules, message, tmp_path):
    (tmp_path / "p.yaml").write_text(f"rules:\n{rules}\n")
    with pytest.raises(ApotfxError, match=message) as error:
        BitPolicy.from_yaml(tmp_path / "p.yaml")
    assert str(error.value).isprintable() and len(str(error.value)) < 800


def test_aliases_and_merged_keys_may_be_used(tmp_path):
    (tmp_path / "p.yaml").write_text("rules:\n- &first {bits: 3, scheme: uniform}\n- {<<: *first, bits: 5}\n")
    first, second = BitPolicy.from_yaml(tmp_path / "p.yaml").rules
    assert (first.weight_bits, second.weight_bits, second.scheme) == (3, 5, "uniform")


def test_a_policy_of_many_layers_is_read(tmp_path):
    policy = BitPolicy(tuple(Rule(name=f"layer{i}.conv", weight_bits=2 + i % 7) for i in range(300)))
    policy.to_yaml(tmp_path / "p.yaml")
    assert BitPolicy.from_yaml(tmp_path / "p.yaml") == policy


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_what_is_no_file_is_not_waited_for(make, tmp_path):
    make(tmp_path / "p.yaml")
    with pytest.raises(ApotfxError, match="policy file .*p.yaml: is not a file"):
        BitPolicy.from_yaml(tmp_path / "p.yaml")
