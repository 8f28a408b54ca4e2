"""tools/zoo.py, on the smallest of its networks and on networks made for it."""

import functools
import importlib.metadata
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from helpers import table_rows
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))

import zoo
import zoo_networks

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
        zoo.examine("own", name, 4, "apot", lambda row: rows.append(json.loads(json.dumps(row))))
        return rows

    return examine


@pytest.fixture
def fake(monkeypatch):
    """Networks go through without being run, in a second each; those in `failing` fail."""
    clock, failing, ran = [0.0], set(), []

    def run(function, list_name, name, bits, scheme, timeout):
        clock[0] += 1
        ran.append(name)
        row = {"list": list_name, "name": name, "status": "train: why" if name in failing else "ok", "package": "p 1"}
        return row | {"seconds": 1.0}, None

    monkeypatch.setattr(zoo, "in_own_process", run)
    monkeypatch.setattr(zoo.time, "monotonic", lambda: clock[0])
    run.failing, run.ran = failing, ran
    return run


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
    assert row["status"] == "ok" and row["equal_after_reload"] is True and row["traced"] == "yes"
    assert row["input_shape"] == [2, 3, 64, 64]
    assert row["layers"] == row["layers_quantized"] == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    assert row["parameters"] == sum(p.numel() for p in model.parameters())
    assert row["share_of_macs_quantized"] == 1 and row["macs"] == sum(row["macs_by_operator"].values()) > 1e7
    assert row["leaves"] == row["unquantized"] == {} and row["without_gradient"] == row["warnings"] == []
    assert 0 < row["seconds_quantize"] < row["seconds"]
    facts = json.loads((output / "zoo.json").read_text())["facts"]
    assert facts == {"bits": 4, "scheme": "apot", "torch": torch.__version__}


def test_the_table(output):
    text = (output / "zoo.md").read_text()
    header, row = table_rows(text)
    shown = dict(zip(header, row, strict=True))
    assert shown.pop("MACs, M") and shown.pop("quantize, s") and shown.pop("total, s")
    assert shown == {
        "network": NAME, "input": "2x3x64x64", "result": "ok", "traced": "yes", "layers quantized": "26 of 26",
        "quantized": "100.00%", "equal": "yes",
    }  # fmt: skip
    assert f"torchvision {importlib.metadata.version('torchvision')}: 1 of 80 networks were run, 1 are ok." in text
    assert f"1 have convolutions and multiply no two activations: at least 100.00% of MACs quantized ({NAME})." in text


def test_what_is_there_is_not_run_again(output, no_process, capsys):
    before = (output / "zoo.json").read_bytes()
    assert call(output) == call(output, "--retry-failed") == 0
    assert (output / "zoo.json").read_bytes() == before
    assert f"1 of 1 ok; {output / 'zoo.md'}" in capsys.readouterr().out


def never_end(list_name, name, bits, scheme, send):
    signal.pause()


def test_a_network_that_takes_too_long_is_a_row_that_can_be_run_again(tmp_path, capsys, no_process, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(zoo, "examine", never_end)
    assert call(tmp_path, "--timeout", "1") == 1
    row = rows_of(tmp_path)[NAME]
    assert row["status"].endswith(": took longer than 1 s") and row["list"] == "classification"
    assert row["status"] in (tmp_path / "zoo.md").read_text()
    monkeypatch.setattr(zoo, "in_own_process", lambda *args, timeout: ({"status": "ok", "seconds": 2.0}, None))
    assert call(tmp_path) == 1 and rows_of(tmp_path)[NAME] == row
    assert call(tmp_path, "--retry-failed") == 0 and rows_of(tmp_path)[NAME]["status"] == "ok"
    assert "Traceback" not in "".join(capsys.readouterr())


def kill_itself(send):
    send({"status": "export"})
    os.kill(os.getpid(), signal.SIGKILL)


def leave(code, send):
    send({"status": "export"})
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
    assert zoo.in_own_process(function, timeout=300) == ({"status": "export"}, how)
    assert time.monotonic() - start < 200


def test_what_goes_wrong_is_one_line(examined):
    def build(name):
        raise ValueError("first line\n  second line")

    row = examined(build)[-1]
    assert row["status"].startswith("build: test_zoo.py:") and row["status"].endswith(
        "ValueError: first line second line"
    )
    assert "\n" not in row["status"] and "seconds" in row


def test_each_step_is_sent_before_it_is_taken(examined):
    rows = examined(lambda name: subject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))))
    steps = ["build", "quantize", "summary", "train", "evaluate", "export", "reload", "compare", "ok"]
    assert [row["status"] for row in rows] == steps
    assert "layers" not in rows[1] and rows[2]["layers"] == 2


def test_a_network_that_has_nothing_to_quantize_fails_by_name(examined):
    row = examined(lambda name: zoo_networks.Subject(nn.Sequential(nn.ReLU()), image(), {"aten.mm": 1}))[-1]
    assert row["status"].startswith("quantize: model Sequential: has no layer that can be quantized")


def test_example_inputs_are_used_where_they_help(examined):
    row = examined(lambda name: subject(Flows(lambda x: x.shape[-1] > 2)))[-1]
    assert row["status"] == "ok" and row["example_inputs"] and row["traced"] == "yes" and row["leaves"] == {}
    assert zoo.cells(row)[3] == "yes with example inputs"


def test_leaves_are_told_with_their_reason(examined):
    row = examined(lambda name: subject(Flows(lambda x: x.sum() > 1e9 or True)))[-1]
    assert row["status"] == "ok" and not row["example_inputs"] and row["traced"] == "with leaves"
    assert list(row["leaves"]) == ["second"] and "control flow" in row["leaves"]["second"]
    text = zoo.report({}, [row])
    assert "Leaves, by reason:\n\n- test_zoo.py:" in text


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
    assert "Layers in float, by reason:\n\n- float: never called by the model's forward: net (2)" in zoo.report(
        {}, [row]
    )


def test_reasons_that_differ_in_numbers_of_blocks_are_one():
    found = [("a", "inside layers.0.1 (X:3)", 2), ("a", "inside layers.12.0 (X:3)", 1), ("b", "other", 4)]
    assert zoo.reasons(found) == "- inside layers.*.* (X:3): a (3)\n- other: b (4)"


def test_warnings_are_kept(examined):
    def build(name):
        zoo.warnings.warn("be\ncareful", stacklevel=1)
        return subject(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)))

    assert examined(build)[-1]["warnings"] == ["be careful"]


@pytest.mark.parametrize(
    ("expected", "got", "message"),
    [
        ([], [], "0 outputs, after reload 0"),
        ([[1.0]], [[1.0], [2.0]], "1 outputs, after reload 2"),
        ([[1.0], [float("nan")]], [[1.0], [float("nan")]], "output 1 is not finite"),
        ([[1.0, 2.0]], [[1.0]], r"output 0 has shape \[2\], after reload \[1\]"),
        ([[1.0, 2.0, 3.0]], [[1.0, 2.5, 3.25]], "output 0: 2 of 3 values differ after reload, by up to 0.5"),
    ],
)
def test_outputs_that_are_not_equal(expected, got, message):
    with pytest.raises(ApotfxError, match=message):
        zoo.require_equal(*([torch.tensor(x) for x in outputs] for outputs in (expected, got)))


def test_a_loss_and_gradients_must_be_finite(examined):
    class Scaled(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.conv, self.factor = nn.Conv2d(3, 4, 3), factor

        def forward(self, x):
            return self.conv(x) * self.factor

    assert examined(lambda name: subject(Scaled(1e30)))[-1]["status"] == "train: the loss is inf"


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
    assert len(set(names["timm"])) == 30 and len(names["transformers"]) == 2
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
    assert "holds rows with bits 4, not 3; choose another --output" in capsys.readouterr().err


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
    flags = ["--list", "classification", "--only", "vgg*", "--output", str(tmp_path), "--limit-seconds", "3"]
    assert zoo.main(flags) == 1
    assert "stopped after 3 s; the same command goes on\n2 of 8 ok" in capsys.readouterr().out
    assert fake.ran == ["vgg11", "vgg11_bn", "vgg13"]
    assert zoo.main(flags) == zoo.main(flags) == 1
    assert fake.ran == list(rows_of(tmp_path)) == [n for n in torchvision.models.list_models() if n.startswith("vgg")]
    fake.failing.clear()
    assert zoo.main([*flags, "--retry-failed"]) == 0
    assert fake.ran[8:] == ["vgg13"]


def test_two_runs_keep_the_rows_of_each_other(tmp_path):
    facts = {"bits": 4}
    one, two = zoo.Results(tmp_path, facts), zoo.Results(tmp_path, facts)
    row = {"status": "ok", "package": "p 1", "list": "classification"}
    one.add(row | {"name": "vgg13"})
    two.add(row | {"name": "vgg11"})
    assert list(rows_of(tmp_path)) == ["vgg11", "vgg13"]


def test_stopped_by_ctrl_c(tmp_path, monkeypatch, capsys):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(zoo, "in_own_process", stop)
    assert call(tmp_path) == 130
    assert capsys.readouterr().err == "stopped; the same command goes on\n"
