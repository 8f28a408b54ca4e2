"""tools/zoo.py, on the smallest of its networks and on networks made for it."""

import functools
import importlib.metadata
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import table_rows
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import zoo
import zoo_init
import zoo_networks
import zoo_noise
import zoo_report

from apotfx import ApotfxError

NAME = "squeezenet1_1"


def call(output, *flags):
    return zoo.main(["--list", "classification", "--only", NAME, "--output", str(output), *flags])


def rows_of(output):
    content = json.loads((output / "zoo.json").read_text())
    return {row["name"]: row for row in content["rows"]}


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    """What the tool wrote of one network."""
    path = tmp_path_factory.mktemp("zoo") / "new" / "zoo"
    assert call(path) == 0
    return path


@pytest.fixture
def no_process(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a network was run")

    monkeypatch.setattr(zoo, "in_own_process", refuse)


@pytest.fixture
def examined(monkeypatch):
    """The rows that are sent of a network that `build` makes."""

    def examine(build, name="net"):
        monkeypatch.setitem(zoo.LISTS, "own", zoo_networks.NetworkList(lambda: [name], build))
        rows = []
        zoo.examine("own", name, 8, "uniform", lambda row: rows.append(json.loads(json.dumps(row))))
        return rows

    return examine


@pytest.fixture
def fake(monkeypatch):
    """Networks go through without being run, in a second each; those in `failing` fail."""
    clock, failing, ran = [0.0], set(), []

    def run(function, list_name, name, bits, scheme, timeout, memory):
        clock[0] += 1
        ran.append(name)
        return passed(list_name, name) | {"problems": {"train": "why"} if name in failing else {}}, None

    monkeypatch.setattr(zoo, "commit", lambda: "abc")
    monkeypatch.setattr(zoo, "in_own_process", run)
    monkeypatch.setattr(zoo.time, "monotonic", lambda: clock[0])
    run.failing, run.ran = failing, ran
    return run


def passed(list_name="classification", name=NAME):
    return {"list": list_name, "name": name, "problems": {}, "package": "p 1", "seconds": 1.0, "commit": "abc"}


class Flows(nn.Module):
    """One layer runs in plain sight, one in a module whose path `condition` of the input decides."""

    def __init__(self, condition):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3)
        self.second = Choosing(condition)
        self.third = nn.Conv2d(8, 4, 3)

    def forward(self, x):
        return {"maps": (self.third(self.second(self.first(x))),)}


class Choosing(nn.Module):
    def __init__(self, condition):
        super().__init__()
        self.conv, self.condition = nn.Conv2d(8, 8, 1), condition

    def forward(self, x):
        return self.conv(x) if self.condition(x) else x


def image(pixels=8):
    return torch.randn(2, 3, pixels, pixels)


def subject(model, inputs=None):
    inputs = image() if inputs is None else inputs
    return zoo_networks.Subject(model, inputs, zoo_networks.count_macs(model, inputs))


def test_a_network_goes_through(output):
    row = rows_of(output)[NAME]
    model = torchvision.models.get_model(NAME)
    assert row["problems"] == {} and row["equal_after_reload"] is True and row["step"] == "end"
    assert row["exact"] == row["exact_training"] == zoo_noise.EQUAL
    assert row["snr"] > 30 and abs(row["snr"] - row["snr_of_8_bits"]) < 10
    assert row["input_shape"] == [2, 3, 64, 64]
    assert row["layers"] == row["layers_quantized"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["share_of_macs_quantized"] == 1 and row["macs"] == sum(row["macs_by_operator"].values()) > 1e7
    assert row["leaves"] == row["unquantized"] == {} and row["without_gradient"] == row["warnings"] == []
    assert 0 < row["seconds_quantize"] <= row["seconds_of"]["quantize"] < row["seconds"]
    facts = json.loads((output / "zoo.json").read_text())["facts"]
    assert facts == {"bits": 8, "scheme": "uniform", "torch": torch.__version__}


def test_the_table(output):
    text = (output / "zoo.md").read_text()
    header, row = table_rows(text)
    shown = dict(zip(header, row, strict=True))
    assert shown.pop("MACs, M") and shown.pop("quantize, s") and shown.pop("total, s")
    assert float(shown.pop("dB")) > 30 and float(shown.pop("by torch")) > 30
    assert shown == {
        "network": NAME, "input": "2x3x64x64", "verdict": "ok", "off, dB": "=", "layers": "26 of 26", "leaves": "0",
        "quantized": "100.00%", "equal": "yes",
    }  # fmt: skip
    assert f"torchvision {importlib.metadata.version('torchvision')}: 1 of 80 networks were run, 1 are ok." in text
    assert f"1 have convolutions and multiply no two activations: at least 100.00% of MACs quantized ({NAME})." in text


def test_what_is_there_of_this_commit_can_be_kept(output, no_process, capsys, monkeypatch):
    before = (output / "zoo.json").read_bytes()
    monkeypatch.setattr(zoo, "commit", lambda: rows_of(output)[NAME]["commit"].removesuffix("-dirty"))
    row = rows_of(output)[NAME] | {"commit": zoo.commit()}
    (output / "zoo.json").write_text(json.dumps(json.loads(before) | {"rows": [row]}))
    assert call(output, "--resume") == call(output, "--resume", "--retry-failed") == 0
    assert f"1 of 1 ok; {output / 'zoo.md'}" in capsys.readouterr().out
    for flags, made_by in (([], "abc"), (["--resume"], "another"), (["--resume"], "abc-dirty")):
        monkeypatch.setattr(zoo, "commit", lambda made_by=made_by: made_by)
        (output / "zoo.json").write_text(json.dumps(json.loads(before) | {"rows": [row | {"commit": "abc"}]}))
        with pytest.raises(AssertionError, match="a network was run"):
            call(output, *flags)
    (output / "zoo.json").write_bytes(before)


def test_the_commit_is_that_of_the_library(monkeypatch, tmp_path):
    assert re.fullmatch(r"[0-9a-f]{7,}(-dirty)?|unknown", zoo.commit())
    monkeypatch.setattr(zoo.apotfx, "__file__", str(tmp_path / "apotfx" / "__init__.py"))
    assert zoo.commit() == "unknown"


def never_end(list_name, name, bits, scheme, send):
    signal.pause()


def test_a_network_that_takes_too_long_is_a_row_that_can_be_run_again(tmp_path, capsys, no_process, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(zoo, "examine", never_end)
    monkeypatch.setattr(zoo, "commit", lambda: "abc")
    monkeypatch.setattr(zoo, "PATIENCE", 1)
    assert call(tmp_path, "--timeout", "2") == 1
    row = rows_of(tmp_path)[NAME]
    assert row["problems"] == {"start": "was not done after 2 s"} and row["list"] == "classification"
    assert "fails: start: was not done after 2 s" in (tmp_path / "zoo.md").read_text()
    monkeypatch.setattr(zoo, "in_own_process", lambda *args, timeout, memory: (passed(), None))
    assert call(tmp_path, "--resume") == 1 and rows_of(tmp_path)[NAME] == row
    assert call(tmp_path, "--resume", "--retry-failed") == 0 and rows_of(tmp_path)[NAME]["problems"] == {}
    assert "Traceback" not in "".join(capsys.readouterr())


def kill_itself(send):
    send({"step": "export"})
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code, send):
    send({"step": "export"})
    os._exit(code)


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (kill_itself, "its process was ended by SIGKILL"),
        (functools.partial(leave, 3), "its process was ended with exit code 3"),
        (functools.partial(leave, 0), None),
    ],
    ids=["killed", "crashed", "left"],
)
def test_a_process_that_ends_says_how_far_it_came(function, how):
    start = time.monotonic()
    assert zoo.in_own_process(function, timeout=300) == ({"step": "export"}, how)
    assert time.monotonic() - start < 200


def take_memory(send):
    try:
        torch.ones(2**31)
    except RuntimeError as error:
        send({"step": str(error)})


def test_memory_has_a_limit():
    row, how = zoo.in_own_process(take_memory, timeout=300, memory=2**32)
    assert "can't allocate memory" in row["step"] and how is None


def never_rest(send):
    send({"step": "export"})
    while True:
        pass


def test_the_time_that_counts_is_that_of_the_processor():
    assert zoo.in_own_process(never_rest, timeout=5) == ({"step": "export"}, "its process was ended by SIGXCPU")


def test_what_goes_wrong_is_one_line(examined):
    def build(name):
        raise ValueError("first line\n  second line")

    row = examined(build)[-1]
    assert re.fullmatch(r"tests/test_zoo.py:\d+ ValueError: first line second line", row["problems"]["build"])
    assert "seconds" in row and zoo_report.verdict(row).startswith("fails: build: tests/test_zoo.py:")


def test_each_step_is_sent_before_it_is_taken(examined):
    rows = examined(lambda name: subject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))))
    assert [row["step"] for row in rows] == ["build", *zoo.Passage.STEPS, "end"]
    assert "layers" not in rows[1] and rows[2]["layers"] == 2 and rows[-1]["problems"] == {}
    assert set(rows[-1]["seconds_of"]) == {"build", *zoo.Passage.STEPS}


def test_a_network_that_has_nothing_to_quantize_is_refused(examined):
    row = examined(lambda name: zoo_networks.Subject(nn.Sequential(nn.ReLU()), image(), {"aten.mm": 1}))[-1]
    expected = "refused: quantize: model Sequential: has no layer that can be quantized"
    assert zoo_report.verdict(row).startswith(expected) and zoo_report.is_ok(row)
    assert zoo_report.cells(row)[2] == "refused" and expected in zoo_report.report({}, [row], {})


def test_an_error_in_place_of_a_refusal_is_a_failure(examined, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    network = functools.partial(subject, nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))
    for step, error, verdict in (
        ("load_integer", ApotfxError("why"), "fails: reload: "),
        ("export_integer", ApotfxError("why"), "refused: export: why"),
        ("export_integer", KeyError("why"), "fails: export: "),
        ("calibrate", ApotfxError("why"), "refused: calibrate: why"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(zoo.apotfx, step, fail)
            assert zoo_report.verdict(examined(lambda name: network())[-1]).startswith(verdict)
    error = ApotfxError("layer 0: refuses its input")
    error.__cause__ = RuntimeError("shape")
    monkeypatch.setattr(zoo.apotfx, "calibrate", fail)
    assert zoo_report.verdict(examined(lambda name: network())[-1]).startswith("fails: calibrate: ")


def test_a_step_aside_that_fails_does_not_end_the_row(examined, monkeypatch):
    def fail(*args):
        raise KeyError("why")

    monkeypatch.setattr(zoo.apotfx, "summary", fail)
    row = examined(lambda name: subject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))))[-1]
    assert list(row["problems"]) == ["summary"] and row["equal_after_reload"]
    assert zoo_report.verdict(row).startswith("fails: summary: ") and not zoo_report.is_ok(row)


def test_example_inputs_are_used_where_they_help(examined):
    row = examined(lambda name: subject(Flows(lambda x: x.shape[-1] > 2)))[-1]
    assert row["problems"] == {} and row["example_inputs"] and row["leaves"] == {}
    assert zoo_report.cells(row)[8] == "0, with example"


def test_leaves_are_told_with_their_reason(examined):
    row = examined(lambda name: subject(Flows(lambda x: x.sum() > 1e9 or True)))[-1]
    assert row["problems"] == {} and row["example_inputs"]
    assert list(row["leaves"]) == ["second"] and "which depends on the values of tensors" in row["leaves"]["second"]
    assert zoo_report.cells(row)[8] == "1, with example"
    assert "Leaves, by reason:\n\n- test_zoo.py:" in zoo_report.report({}, [row], {})


def test_layers_in_float_are_told_with_their_reason(examined):
    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.main = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3))
            self.auxiliary = nn.ModuleList([nn.Linear(4, 2), nn.Linear(4, 2)])

        def forward(self, x):
            return self.main(x)

    row = examined(lambda name: subject(Heads()))[-1]
    assert row["unquantized"] == {"float: never called by the model's forward": ["auxiliary.0", "auxiliary.1"]}
    expected = "Layers in float, by reason:\n\n- float: never called by the model's forward: net (2)"
    assert expected in zoo_report.report({}, [row], {})


def test_reasons_that_differ_in_numbers_of_blocks_are_one():
    found = [("a", "inside layers.0.1 (X:3)", 2), ("a", "inside layers.12.0 (X:3)", 1), ("b", "other", 1)]
    assert zoo_report.reasons(found) == "- inside layers.*.* (X:3): a (3)\n- other: b"


def test_warnings_are_kept(examined):
    def build(name):
        zoo.warnings.warn("be\ncareful", stacklevel=1)
        return subject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))

    assert examined(build)[-1]["warnings"] == ["be careful"]


def examine_another(examined, monkeypatch, change):
    """The row of a network whose quantized copies `change` edits."""
    quantize = zoo.apotfx.quantize

    def quantize_another(*args, **kwargs):
        qmodel = quantize(*args, **kwargs)
        change(qmodel)
        return qmodel

    monkeypatch.setattr(zoo.apotfx, "quantize", quantize_another)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5), nn.ReLU(), nn.Conv2d(8, 4, 3))
    return examined(lambda name: zoo_networks.fitted(network, zoo_networks.images([8])))[-1]


def test_a_network_that_is_handed_over_passes(examined, monkeypatch):
    row = examine_another(examined, monkeypatch, lambda qmodel: None)
    assert zoo_report.verdict(row) == "ok" and row["exact"] == row["exact_training"] == zoo_noise.EQUAL


def test_another_network_is_wrong(examined, monkeypatch):
    row = examine_another(examined, monkeypatch, lambda qmodel: nn.init.zeros_(getattr(qmodel, "1").bias))
    assert zoo_report.verdict(row).startswith("wrong: ") and "without quantizers in evaluation" in zoo_report.verdict(
        row
    )


def test_another_network_in_training_alone_is_wrong(examined, monkeypatch):
    row = examine_another(examined, monkeypatch, lambda qmodel: setattr(getattr(qmodel, "2"), "p", 0.25))
    assert row["exact"] == zoo_noise.EQUAL and row["snr"] > 20
    assert row["problems"] == {} and row["equal_after_reload"]
    assert re.fullmatch(r"wrong: -?\d+\.\d dB without quantizers in training", zoo_report.verdict(row))


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        ({"snr": 30.0, "exact": 200.0, "exact_training": 90.0}, "ok"),
        (
            {"snr": 19.9, "snr_of_8_bits": 20.0},
            "noisy: 8 bits alone 20.0 dB; worst product conv: 12 dB, its input reaches",
        ),
        ({"snr": 15.0, "snr_of_8_bits": 40.0}, "wrong: 15.0 dB where 8 bits alone leave 40.0"),
        ({"snr": None}, "wrong: its output does not depend on its input"),
        ({"snr": 30.0, "exact": 59.0}, "wrong: 59.0 dB without quantizers in evaluation"),
        ({"snr": 10.0, "problems": {"equal": "differs"}}, "fails: equal: differs"),
        ({"exact": 3.0, "problems": {"export": "refused: why"}}, "wrong: 3.0 dB without quantizers in evaluation"),
        ({"exact": 99.0, "problems": {"export": "refused: why"}}, "refused: export: why"),
    ],
)
def test_the_gravest_fault_is_the_verdict(facts, expected):
    row = passed() | {"worst_products": [{"layer": "conv", "snr": 12.3, "peak": 40.0}]} | facts
    assert zoo_report.verdict(row).startswith(expected)
    assert zoo_report.is_ok(row) == expected.startswith(("ok", "refused"))


def test_signal_is_what_differs_between_samples():
    x = torch.tensor([[100.0, 101.0], [100.0, 103.0]])
    noise = torch.tensor([[0.1, 0.0], [0.0, 0.1]])
    assert zoo_noise.signal_to_noise([x], [x + noise]) == pytest.approx(10 * math.log10(2 / 0.02), abs=1e-3)
    assert zoo_noise.signal_to_noise([x, x], [x, x + noise]) == zoo_noise.signal_to_noise([x], [x + noise])
    assert zoo_noise.signal_to_noise([x], [x]) == zoo_noise.EQUAL
    assert zoo_noise.signal_to_noise([torch.ones(2, 3)], [torch.zeros(2, 3)]) is None
    assert zoo_noise.signal_to_noise([torch.ones(2, 3, dtype=torch.long)], [torch.zeros(2, 3)]) is None


def test_8_bits_by_torch_are_those_of_both_operands():
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Conv1d(1, 3, 2), nn.Flatten(), nn.Linear(12, 2)).eval()
    model[0].forward = lambda x: F.linear(x, model[0].weight * 2, model[0].bias)[:, None]
    x = torch.randn(4, 6)
    round_ = in_its_own_8_bits
    fits = [zoo_noise.fit([exact]) for exact in (x, model[:2](x), model[:4](x))]  # to what the float network has there
    expected = F.linear(zoo_noise.fake_quantized(x, fits[0]), round_(model[0].weight * 2), model[0].bias)[:, None].relu()
    expected = F.conv1d(zoo_noise.fake_quantized(expected, fits[1]), round_(model[2].weight), model[2].bias).flatten(1)
    expected = F.linear(zoo_noise.fake_quantized(expected, fits[2]), round_(model[4].weight), model[4].bias)
    got, products = zoo_noise.in_8_bits(model, x)
    assert torch.equal(got, expected) and not torch.equal(got, model(x))
    assert sorted(product["layer"] for product in products) == ["0", "2", "4"]
    assert all(30 < product["snr"] < 60 and product["peak"] > 1 for product in products)
    assert products == sorted(products, key=lambda product: product["snr"])


def in_its_own_8_bits(x):
    return zoo_noise.fake_quantized(x, zoo_noise.fit([x]))


def test_a_layer_that_runs_twice_has_one_clip():
    layer, x = nn.Linear(4, 4, bias=False), torch.randn(2, 4)
    got, products = zoo_noise.in_8_bits(nn.Sequential(Scaled(0.001), layer, Scaled(1e5), layer), x)
    first = x * 0.001
    clip = zoo_noise.fit([first, layer(first) * 1e5])
    hidden = F.linear(zoo_noise.fake_quantized(first, clip), in_its_own_8_bits(layer.weight))
    assert torch.equal(hidden, torch.zeros(2, 4)) and not got.any() and len(products) == 2


class Scaled(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_products_of_activations_stay_in_float():
    x = torch.randn(2, 3, 4)
    attention, products = zoo_noise.in_8_bits(Product(), x)
    assert torch.equal(attention, x @ x.mT) and products == []


class Product(nn.Module):
    def forward(self, x):
        return x @ x.mT


@pytest.mark.parametrize(("low", "levels"), [(-1.0, 255), (0.0, 256)])
def test_fake_quantized_has_as_many_levels_as_8_bits(low, levels):
    x = torch.linspace(low, 1, 100_001)
    got = in_its_own_8_bits(x)
    assert len(got.unique()) == levels and (got - x).abs().max() <= 1.001 * (1 - low) / (levels - 1) / 2
    assert torch.equal(in_its_own_8_bits(torch.zeros(3)), torch.zeros(3))


class Degenerate(nn.Module):
    """A residual branch, a norm and a head that begin at zero, a batch norm that knows nothing, a shared layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.branch, self.gamma = nn.Conv2d(8, 8, 3, padding=1), nn.Parameter(1e-6 * torch.ones(8, 1, 1))
        self.last, self.head = nn.LayerNorm(8), nn.Linear(8, 4)
        self.fixed = nn.Conv2d(8, 8, 1).requires_grad_(False)
        for zero in (self.norm.weight, self.last.weight, self.head.weight, self.head.bias):
            nn.init.zeros_(zero)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)))
        x = self.fixed(x + self.gamma * self.branch(self.branch(x)))
        return self.head(self.last(x.mean((2, 3))))


def test_initialization_makes_a_degenerate_network_depend_on_all_of_it():
    torch.manual_seed(0)
    model, x = Degenerate().train(), zoo_networks.image_like(2, 3, 16, 16)
    fixed = model.fixed.weight.clone()
    assert torch.equal(*model(x))
    zoo_init.initialize_from_data(model, x)
    assert all(module.training for module in model.modules()) and torch.equal(model.fixed.weight, fixed)
    output, conv = model.eval()(x), model.conv(x)
    assert (output[0] - output[1]).abs().mean() > 0.5
    assert torch.allclose(model.norm.running_mean, conv.mean((0, 2, 3)), atol=1e-5)
    assert conv.sub(conv.mean((0, 2, 3), keepdim=True)).square().mean().sqrt().item() == pytest.approx(1, abs=1e-4)
    output.square().sum().backward()
    gradients = {name: p.grad.abs().max().item() for name, p in model.named_parameters() if p.requires_grad}
    assert min(gradients.values()) > 1e-4, gradients


def test_a_trained_layer_is_turned_towards_what_sets_the_samples_apart():
    torch.manual_seed(0)
    layer, x = nn.Linear(64, 32), torch.randn(1, 64) + torch.randn(2, 1) * torch.randn(1, 64)
    apart = (x[1] - x[0]) / (x[1] - x[0]).norm()
    before = ((layer.weight @ apart).norm() / layer.weight.norm()).item()
    zoo_init.initialize_from_data(layer, x)
    assert ((layer.weight @ apart).norm() / layer.weight.norm()).item() > 0.6
    assert before < 0.3


@pytest.mark.parametrize(
    ("expected", "got", "message"),
    [
        ([], [], "0 outputs, after reload 0"),
        ([[1.0]], [[1.0], [2.0]], "1 outputs, after reload 2"),
        ([[1.0], [float("nan")]], [[1.0], [float("nan")]], "output 1 is not a number"),
        ([[1.0, 2.0]], [[1.0]], r"output 0 has shape \[2\], after reload \[1\]"),
        ([[1.0, 2.0, 3.0]], [[1.0, 2.5, 3.25]], "output 0: 2 of 3 values differ after reload, by up to 0.5"),
    ],
)
def test_outputs_that_are_not_equal(expected, got, message):
    with pytest.raises(zoo.Unequal, match=message):
        zoo.require_equal(*([torch.tensor(x) for x in outputs] for outputs in (expected, got)))


def test_a_loss_and_gradients_must_be_finite(examined):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

        def forward(self, x):
            return self.conv(x) * self.factor

    assert examined(lambda name: subject(Scaled(1e30)))[-1]["problems"] == {"train": "the loss is inf"}


def test_macs_of_attention_are_counted():
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    batch, length, width, hidden = 2, 5, 16, 32
    products = 2 * batch * length * length * width
    weights = batch * length * (4 * width * width + 2 * width * hidden)
    macs = zoo_networks.count_macs(attention.eval(), torch.randn(batch, length, width))
    assert sum(macs.values()) == products + weights and macs["aten.bmm"] == products


def test_macs_of_convolutions_are_counted():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2), nn.Flatten(), nn.Linear(8 * 4 * 4, 10))
    macs = zoo_networks.count_macs(model, torch.randn(2, 4, 8, 8))
    assert macs == {"aten.convolution": 2 * 8 * 4 * 4 * 2 * 9, "aten.addmm": 2 * 128 * 10}


def test_the_smallest_input_that_a_network_takes_is_chosen():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(80), nn.Flatten(), nn.Linear(4, 2))
    found = zoo_networks.fitted(model, zoo_networks.images())
    assert found.inputs.shape == (2, 3, 96, 96) and found.model.training
    with pytest.raises(RuntimeError, match="too small"):
        zoo_networks.fitted(model, zoo_networks.images((64,)))


def test_the_lists():
    names = {key: each.names() for key, each in zoo_networks.LISTS.items()}
    assert len(names["classification"]) >= 80 and names["classification"] == torchvision.models.list_models(
        module=torchvision.models
    )
    assert len(set(names["timm"])) == len(names["timm"]) >= 100 and len(names["transformers"]) >= 40
    assert set(zoo_networks.TIMM_OPTIONS) < set(names["timm"])
    assert all(names.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--list", "classification,audio"],
            "argument --list: got 'audio', expected one of classification, segmentation",
        ),
        (["--list", "video", "--only", "resnet5?"], "--only resnet5?: matches no network of video"),
        (["--bits", "9"], "argument --bits: got '9'"),
        (["--scheme", "log"], "argument --scheme: got 'log'"),
        (["--limit-seconds", "0"], "argument --limit-seconds: got '0'"),
        (["--fast"], "unrecognized arguments: --fast"),
    ],
)
def test_a_mistake_is_one_line(flags, message, tmp_path, no_process, capsys):
    assert zoo.main([*flags, "--output", str(tmp_path / "zoo")]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"zoo.py: error: {message}") and error.count("\n") == 1
    assert not (tmp_path / "zoo").exists()


def test_results_of_other_settings_are_not_mixed(output, no_process, capsys):
    assert call(output, "--bits", "3") == 2
    assert "holds rows with bits 8, not 3; choose another --output" in capsys.readouterr().err


def test_what_is_no_result_is_refused(tmp_path, no_process, capsys):
    (tmp_path / "zoo.json").write_text("[1")
    assert call(tmp_path) == 2
    assert "cannot be read" in capsys.readouterr().err and (tmp_path / "zoo.json").read_text() == "[1"


def test_a_missing_package_leaves_its_list_out(tmp_path, fake, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "missing", {"timm": "timm cannot be imported (why)", "classification": None}.get)
    flags = ["--only", "mobilenet*", "--output", str(tmp_path)]
    assert zoo.main(["--list", "timm,classification", *flags]) == 0
    captured = capsys.readouterr()
    assert captured.err == "zoo.py: timm is left out: timm cannot be imported (why); pip install 'apotfx[zoo]'\n"
    assert list(rows_of(tmp_path)) == ["mobilenet_v2", "mobilenet_v3_large", "mobilenet_v3_small"]
    assert zoo.main(["--list", "timm", *flags]) == 2


def test_missing_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert zoo_networks.missing("timm").startswith("timm cannot be imported")
    assert zoo_networks.missing("classification") is None


def test_the_list_can_be_run_in_pieces(tmp_path, fake, capsys):
    fake.failing.add("vgg13")
    flags = [
        "--list",
        "classification",
        "--only",
        "vgg*",
        "--output",
        str(tmp_path),
        "--limit-seconds",
        "3",
        "--resume",
    ]
    assert zoo.main(flags) == 1
    assert "stopped after 3 s; --resume goes on\n2 of 8 ok" in capsys.readouterr().out
    assert fake.ran == ["vgg11", "vgg11_bn", "vgg13"]
    assert zoo.main(flags) == zoo.main(flags) == 1
    assert fake.ran == list(rows_of(tmp_path)) == [n for n in torchvision.models.list_models() if n.startswith("vgg")]
    fake.failing.clear()
    assert zoo.main([*flags, "--retry-failed"]) == 0
    assert fake.ran[8:] == ["vgg13"]


def test_two_runs_keep_the_rows_of_each_other(tmp_path):
    facts = {"bits": 4}
    one, two = zoo.Results(tmp_path, facts), zoo.Results(tmp_path, facts)
    one.add(passed(name="vgg13"))
    two.add(passed(name="vgg11"))
    assert list(rows_of(tmp_path)) == ["vgg11", "vgg13"]


def test_stopped_by_ctrl_c(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "in_own_process", stop)
    assert call(tmp_path) == 130
    assert capsys.readouterr().err == "stopped; --resume goes on\n"
