import io
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch import fx, nn

import apotfx
from apotfx.graph.network import record_of
from apotfx.layers import QuantLayer
from apotfx.policy import BitPolicy, Rule
from apotfx.training import monitor as module
from apotfx.training.monitor import Monitor, profiler


class Block(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3)
        self.layer1 = nn.Sequential(Block(6), Block(6))
        self.dropout = nn.Dropout(0.5)
        self.fc = nn.Linear(6 * 6 * 6, 5)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.fc(self.dropout(self.layer1(x).flatten(1)))


POLICY = BitPolicy((
    Rule(position="first", scheme="uniform", weight_bits=8, activation_bits=32, normalization="none"),
    Rule(position="last", scheme="uniform", weight_bits=5, activation_bits=5, granularity="channel"),
    Rule(name="layer1.0.conv1", weight_bits=3, activation_bits=3, normalization="standardize"),
    Rule(name="layer1.1.conv1", scheme="float"),
    Rule(name="layer1.1.conv2", weight_bits=32, activation_bits=4),
    Rule(scheme="pot", weight_bits=4, activation_bits=3, granularity="channel"),
))  # fmt: skip
LAYERS = ["stem", "layer1.0.conv1", "layer1.0.conv2", "layer1.1.conv2", "fc"]
QUANTIZED = [
    ("stem", "weight"), ("layer1.0.conv1", "weight"), ("layer1.0.conv2", "weight"), ("fc", "weight"),
    ("layer1.0.conv1", "input"), ("layer1.0.conv2", "input"), ("layer1.1.conv2", "input"), ("fc", "input"),
]  # fmt: skip


def images(n=8):
    return torch.randn(n, 2, 8, 8, generator=torch.Generator().manual_seed(1))


def quantized_net(policy=POLICY):
    """Calibrated, then the clips lowered layer by layer, so that every quantizer clips something."""
    torch.manual_seed(0)
    qmodel = apotfx.quantize(Net(), policy).eval()
    apotfx.calibrate(qmodel, [images()])
    for name, layer in [(name, qmodel.get_submodule(name)) for name in LAYERS]:
        if layer.input_quantizer is not None:
            layer.input_quantizer.set_clip(0.6 * Inputs.of(qmodel, images())[name].max())
        if layer.weight_quantizer is not None:
            layer.weight_quantizer.set_clip(0.7 * layer.weight_quantizer.clip)
    return qmodel


def read(log_dir):
    events = EventAccumulator(str(log_dir), size_guidance={"histograms": 0, "scalars": 0, "images": 0})
    return events.Reload()


def picture(events, tag, index=-1):
    return np.asarray(Image.open(io.BytesIO(events.Images(tag)[index].encoded_image_string)))[..., 0]


class Inputs(fx.Interpreter):
    """What every quantized layer of a GraphModule quantizes, without a hook."""

    def call_module(self, target, args, kwargs):
        if isinstance(self.submodules[target], QuantLayer):
            self.seen[target] = args[0].clamp(*(self.submodules[target].rectifier or (None, math.inf)))
        return super().call_module(target, args, kwargs)

    @classmethod
    @torch.no_grad()
    def of(cls, qmodel, x):
        interpreter = cls(qmodel.eval())
        interpreter.seen = {}
        interpreter.run(x)
        return interpreter.seen


def all_levels(levels):
    return np.array(sorted({-i for i in levels.ints if levels.signed} | set(levels.ints)))


def reference(qmodel, name, kind):
    """(values in the unit of the clip, clip, levels, index of each value's nearest level), by search."""
    layer = qmodel.get_submodule(name)
    quantizer = getattr(layer, f"{kind}_quantizer")
    if kind == "weight":
        w = layer.weight.detach().double()
        offset = w.mean() if quantizer.normalization == "standardize" else 0
        x = w if quantizer.normalization == "none" else (w - offset) / w.std()
    else:
        x = Inputs.of(qmodel, images())[name].double()
    clip, levels = quantizer.clip.detach().double(), all_levels(quantizer.levels)
    nearest = (x.unsqueeze(-1) - clip.unsqueeze(-1) * torch.tensor(levels / levels.max())).abs().argmin(-1)
    return x.numpy(), clip.numpy(), levels, nearest.numpy()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(a quantized net, the events that `layers` wrote of it)."""
    log_dir, qmodel = tmp_path_factory.mktemp("run"), quantized_net()
    with Monitor(log_dir) as monitor:
        monitor.layers(qmodel, images(), 7)
    return qmodel, read(log_dir)


def test_scalars_have_their_tags_steps_and_values(tmp_path):
    with Monitor(tmp_path) as monitor:
        for step in range(3):
            monitor.scalars(step, {"train/loss": 2.0 - step, "val/accuracy": step / 4})
    events = read(tmp_path)
    assert events.Tags()["scalars"] == ["train/loss", "val/accuracy"]
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(0, 2.0), (1, 1.0), (2, 0.0)]
    assert [e.value for e in events.Scalars("val/accuracy")] == [0.0, 0.25, 0.5]


def test_purge_step_hides_what_a_crashed_run_wrote(tmp_path):
    with Monitor(tmp_path) as monitor:
        for step in range(6):
            monitor.scalars(step, {"train/loss": 1.0})
    with Monitor(tmp_path, purge_step=3) as monitor:
        monitor.scalars(3, {"train/loss": 2.0})
    assert [(e.step, e.value) for e in read(tmp_path).Scalars("train/loss")] == [
        (0, 1.0), (1, 1.0), (2, 1.0), (3, 2.0)]  # fmt: skip


def test_a_disabled_monitor_writes_nothing_and_runs_nothing(tmp_path):
    with Monitor(tmp_path / "run", enabled=False) as monitor:
        monitor.scalars(0, {"train/loss": 1.0})
        monitor.plan(None)
        monitor.graph(None)
        monitor.layers(None, None, 0)
        monitor.hparams({}, {})
        monitor.close()
    assert list(tmp_path.iterdir()) == []


def test_closing_twice(tmp_path):
    with Monitor(tmp_path) as monitor:
        monitor.close()
    assert len(list(tmp_path.iterdir())) == 1


def test_plan_is_a_markdown_table(tmp_path):
    plan = record_of(quantized_net())["plan"]
    with Monitor(tmp_path) as monitor:
        monitor.plan(plan)
    (event,) = read(tmp_path).Tensors("plan/text_summary")
    lines = event.tensor_proto.string_val[0].decode().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(plan.HEADERS)
    assert set("".join(cells[1])) == {"-"}
    assert [tuple(cell.replace("\\", "") for cell in row) for row in cells[2:]] == plan.rows()
    assert cells[4][0] == "layer1.0.conv2" and cells[4][-1] == r"rule \*"


def test_plan_keeps_names_that_look_like_numbers(tmp_path):
    net = nn.Sequential(nn.Sequential(*(nn.Linear(2, 2) for _ in range(11))))
    with Monitor(tmp_path) as monitor:
        monitor.plan(apotfx.plan(net, BitPolicy.default()))
    text = read(tmp_path).Tensors("plan/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "| 0.10 " in text and "| 0.1 " in text


def graph_of(model, log_dir):
    with Monitor(log_dir) as monitor:
        monitor.graph(model)
    return {node.name: node for node in read(log_dir).Graph().node}


def test_graph_has_a_node_per_fx_node_nested_by_module_path(tmp_path):
    qmodel = quantized_net()
    nodes = graph_of(qmodel, tmp_path)
    assert {name: (node.op, list(node.input)) for name, node in list(nodes.items())[:11]} == {
        "x": ("placeholder", []),
        "stem": ("QuantConv2d", ["x"]),
        "relu": ("relu", ["stem"]),
        "layer1/0/conv1": ("QuantConv2d", ["relu"]),
        "layer1/0/bn1": ("BatchNorm2d", ["layer1/0/conv1"]),
        "layer1/0/conv2": ("QuantConv2d", ["layer1/0/bn1"]),
        "layer1/0/add": ("add", ["layer1/0/conv2", "relu"]),
        "layer1/0/relu": ("ReLU", ["layer1/0/add"]),
        "layer1/1/conv1": ("Conv2d", ["layer1/0/relu"]),
        "layer1/1/bn1": ("BatchNorm2d", ["layer1/1/conv1"]),
        "layer1/1/conv2": ("QuantConv2d", ["layer1/1/bn1"]),
    }
    assert len(nodes) == len(qmodel.graph.nodes)
    assert nodes["flatten"].op == "flatten" and list(nodes["output"].input) == ["fc"]
    edges = sum(len(node.all_input_nodes) for node in qmodel.graph.nodes)
    assert sum(len(node.input) for node in nodes.values()) == edges
    assert all(source in nodes for node in nodes.values() for source in node.input)


def test_graph_attributes_say_what_each_quantizer_does(tmp_path):
    qmodel = quantized_net()
    nodes = graph_of(qmodel, tmp_path)
    conv = nodes["layer1/0/conv2"].attr
    assert set(conv) == {
        "weight_shape", "weight_bits", "weight_scheme", "weight_signed", "weight_clip",
        "input_bits", "input_scheme", "input_signed", "input_clip"}  # fmt: skip
    assert [dim.size for dim in conv["weight_shape"].shape.dim] == [6, 6, 3, 3]
    assert (conv["weight_bits"].i, conv["weight_scheme"].s, conv["weight_signed"].b) == (4, b"pot", True)
    assert (conv["input_bits"].i, conv["input_scheme"].s, conv["input_signed"].b) == (3, b"pot", False)
    layer = qmodel.get_submodule("layer1.0.conv2")
    assert conv["weight_clip"].f == layer.weight_quantizer.clip.mean().item()
    assert conv["input_clip"].f == layer.input_quantizer.clip.item()
    assert set(nodes["layer1/1/conv1"].attr) == {"weight_shape"}
    assert not any(key.startswith("input") for key in nodes["stem"].attr)
    assert not nodes["layer1/0/add"].attr and not nodes["layer1/0/relu"].attr


def test_graph_of_a_float_model_with_parameters_and_methods(tmp_path):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(3))
            self.mul = nn.Identity()

        def forward(self, x):
            return (self.mul(x) * self.scale * x).sigmoid()

    nodes = graph_of(fx.symbolic_trace(Scaled()), tmp_path)
    assert {name: (node.op, list(node.input)) for name, node in nodes.items()} == {
        "x": ("placeholder", []),
        "mul": ("Identity", ["x"]),
        "scale": ("get_attr", []),
        "mul_1": ("mul", ["mul", "scale"]),
        "mul_2": ("mul", ["mul_1", "x"]),
        "sigmoid": ("sigmoid", ["mul_2"]),
        "output": ("output", ["sigmoid"]),
    }


def test_layers_writes_every_quantizer_in_order_of_execution(run):
    events = run[1]
    order = [(name, kind) for name in LAYERS for kind in ("weight", "input") if (name, kind) in QUANTIZED]
    expected = [f"{what}/{name}/{kind}" for name, kind in order for what in ("clip", "clipped", "sqnr_db")]
    assert events.Tags()["scalars"] == expected
    weights = [name for name, kind in order if kind == "weight"]
    expected = [f"weight/{name}/{which}" for name in weights for which in ("float", "quantized")]
    assert events.Tags()["histograms"] == expected
    assert events.Tags()["images"] == ["level_usage/weight", "level_usage/input"]
    assert {e.step for tag in events.Tags()["scalars"] for e in events.Scalars(tag)} == {7}


@pytest.mark.parametrize("name, kind", QUANTIZED)
def test_clip_clipped_share_and_sqnr(run, name, kind):
    qmodel, events = run
    x, clip, levels, nearest = reference(qmodel, name, kind)
    quantized = clip * (levels / levels.max())[nearest]
    outside = np.abs(x) > clip if levels.min() < 0 else x > clip
    sqnr = 10 * np.log10((x**2).sum() / ((x - quantized) ** 2).sum())
    assert outside.any() and not outside.all()
    (value,) = events.Scalars(f"clip/{name}/{kind}")
    assert value.value == pytest.approx(clip.mean(), rel=1e-6)
    (value,) = events.Scalars(f"clipped/{name}/{kind}")
    assert value.value == np.float32(outside.mean())
    (value,) = events.Scalars(f"sqnr_db/{name}/{kind}")
    assert value.value == pytest.approx(sqnr, rel=1e-5)


@pytest.mark.parametrize("kind", ["weight", "input"])
def test_level_usage_picture_counts_the_values_at_every_level(run, kind):
    qmodel, events = run
    pixels = picture(events, f"level_usage/{kind}")
    names = [name for name, k in QUANTIZED if k == kind]
    height, width = module.ROW_HEIGHT, module.PICTURE_WIDTH
    assert pixels.shape == (height * len(names), width)
    for i, name in enumerate(names):
        _, _, levels, nearest = reference(qmodel, name, kind)
        counts = np.bincount(nearest.ravel(), minlength=len(levels))
        expected = np.floor(255 * np.sqrt(counts / counts.max()))
        row = pixels[i * height : (i + 1) * height]
        assert (row[0] == int(255 * module.SEPARATOR)).all()
        assert (row[1:] == row[1]).all()
        centers = ((np.arange(len(levels)) + 0.5) * width / len(levels)).astype(int)
        assert np.abs(row[1, centers] - expected).max() <= 1
        assert np.array_equal(row[1, centers] == 0, counts == 0)


@pytest.mark.parametrize("name", [name for name, kind in QUANTIZED if kind == "weight"])
def test_histograms_hold_the_weight_in_its_own_unit(run, name):
    qmodel, events = run
    layer = qmodel.get_submodule(name)
    levels, scale = layer.integer_weight()
    standardized = layer.weight_quantizer.normalization == "standardize"
    weight = layer.weight.detach()
    before = (weight - weight.mean()) / weight.std() if standardized else weight
    for which, values in (("float", before), ("quantized", levels * scale.detach())):
        (event,) = events.Histograms(f"weight/{name}/{which}")
        histogram, values = event.histogram_value, values.double().numpy().ravel()
        assert histogram.num == sum(histogram.bucket) == values.size
        assert (histogram.min, histogram.max) == pytest.approx((values.min(), values.max()), rel=1e-5)
        assert histogram.sum == pytest.approx(values.sum(), abs=1e-4)
        assert histogram.sum_squares == pytest.approx((values**2).sum(), rel=1e-5)
        counts, limits = np.histogram(values, bins=module.HISTOGRAM_BINS)
        assert histogram.bucket_limit == pytest.approx(limits, rel=1e-5, abs=1e-6)
        if which == "float":  # levels may lie on the limits, where rounding decides
            assert histogram.bucket == [0, *counts]


def test_layers_changes_nothing(tmp_path):
    qmodel = quantized_net().train()
    qmodel.get_submodule("layer1.0.bn1").eval()
    modes = {name: m.training for name, m in qmodel.named_modules()}
    state = {key: value.clone() for key, value in qmodel.state_dict().items()}
    x, rng = images(), torch.get_rng_state()
    with Monitor(tmp_path) as monitor:
        monitor.layers(qmodel, x, 0)
    assert {name: m.training for name, m in qmodel.named_modules()} == modes
    assert list(qmodel.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in qmodel.state_dict().items())
    assert all(parameter.grad is None for parameter in qmodel.parameters())
    assert not any(m._forward_pre_hooks for m in qmodel.modules())
    assert torch.equal(x, images()) and torch.equal(torch.get_rng_state(), rng)


def test_layers_puts_modes_and_hooks_back_after_an_error(tmp_path):
    qmodel = quantized_net().train()
    with Monitor(tmp_path) as monitor, pytest.raises(RuntimeError):
        monitor.layers(qmodel, torch.zeros(1, 3, 8, 8), 0)
    assert all(m.training for m in qmodel.modules())
    assert not any(m._forward_pre_hooks for m in qmodel.modules())


def test_layers_of_a_float_model_writes_nothing(tmp_path):
    with Monitor(tmp_path) as monitor:
        monitor.layers(apotfx.quantize(Net(), BitPolicy.default(bits=32)), images(), 0)
    tags = read(tmp_path).Tags()
    assert not tags["scalars"] and not tags["images"] and not tags["histograms"]


def test_a_layer_called_twice_is_measured_over_both_inputs(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            return self.fc(self.fc(x))

    torch.manual_seed(0)
    qmodel, x = apotfx.quantize(Twice(), BitPolicy((Rule(),))).eval(), torch.randn(16, 4)
    qmodel.fc.input_quantizer.set_clip(torch.tensor(0.5))
    with torch.no_grad():
        inputs = torch.cat([x, qmodel.fc(x)])
    with Monitor(tmp_path) as monitor:
        monitor.layers(qmodel, x, 0)
    (value,) = read(tmp_path).Scalars("clipped/fc/input")
    assert value.value == (inputs.abs() > 0.5).double().mean().item()


def test_an_input_that_is_overwritten_later(tmp_path):
    class Overwrites(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            x = x * 1
            return self.fc(x) + x.add_(100)

    qmodel = apotfx.quantize(Overwrites(), BitPolicy((Rule(),)))
    qmodel.fc.input_quantizer.set_clip(torch.tensor(10.0))
    with Monitor(tmp_path) as monitor:
        monitor.layers(qmodel, torch.zeros(16, 4), 0)
    assert read(tmp_path).Scalars("clipped/fc/input")[0].value == 0


@pytest.mark.parametrize("signed, clipped, usage", [
    (False, 0.4, [0.6, 0, 0, 0.4]), (True, 0.8, [0.4, 0.2, 0.4]),
])  # fmt: skip
def test_only_what_lies_above_an_unsigned_clip_is_clipped(signed, clipped, usage):
    quantizer = apotfx.quantizers.InputQuantizer(apotfx.LevelSet("uniform", 2, signed))
    quantizer.set_clip(torch.tensor(1.0))
    x = torch.tensor([-5.0, -1.5, 0.1, 2.0, 1.25])
    measured = module._measure(quantizer, x, quantizer.used_clip)
    assert measured.clipped.item() == pytest.approx(clipped)
    assert measured.usage.tolist() == pytest.approx(usage)


def events_with_a_last_layer_of(weight, log_dir):
    qmodel = quantized_net()
    qmodel.fc.weight.data.fill_(weight)
    with Monitor(log_dir) as monitor:
        monitor.layers(qmodel, images(), 0)
    return read(log_dir)


def test_a_weight_of_zeros_has_no_sqnr_and_uses_level_zero_only(tmp_path):
    events = events_with_a_last_layer_of(0.0, tmp_path)
    assert "sqnr_db/fc/weight" not in events.Tags()["scalars"]
    assert "sqnr_db/fc/input" in events.Tags()["scalars"]
    assert events.Scalars("clipped/fc/weight")[0].value == 0
    lit = np.flatnonzero(picture(events, "level_usage/weight")[-1])
    assert len(lit) == pytest.approx(module.PICTURE_WIDTH / 31, abs=1)
    assert lit.mean() == pytest.approx(module.PICTURE_WIDTH / 2, abs=1)
    assert events.Histograms("weight/fc/quantized")[0].histogram_value.num == 6 * 6 * 6 * 5


def test_a_weight_of_nan_has_no_sqnr_no_histogram_and_no_level(tmp_path):
    events = events_with_a_last_layer_of(float("nan"), tmp_path)
    assert "sqnr_db/fc/weight" not in events.Tags()["scalars"]
    assert "weight/fc/float" not in events.Tags()["histograms"]
    assert not picture(events, "level_usage/weight")[-1].any()


def test_no_sqnr_where_every_value_is_a_level(tmp_path):
    qmodel = quantized_net(BitPolicy((Rule(normalization="none", scheme="uniform"),)))
    quantizer = qmodel.fc.weight_quantizer
    quantizer.set_clip(torch.tensor(7.0))
    qmodel.fc.weight.data = torch.randint(-7, 8, qmodel.fc.weight.shape).float()
    with Monitor(tmp_path) as monitor:
        monitor.layers(qmodel, images(), 0)
    assert "sqnr_db/fc/weight" not in read(tmp_path).Tags()["scalars"]


def test_large_tensors_are_sampled(tmp_path):
    torch.manual_seed(0)
    qmodel = apotfx.quantize(nn.Sequential(nn.Linear(512, 512)), BitPolicy((Rule(granularity="channel"),)))
    x = torch.randn(1024, 512)
    apotfx.calibrate(qmodel, [x])
    layer = qmodel.get_submodule("0")
    with Monitor(tmp_path) as monitor:
        monitor.layers(qmodel, x, 0)
    events = read(tmp_path)
    levels, scale = layer.integer_weight()
    error = levels * scale - layer.weight
    expected = 10 * (layer.weight.square().sum() / error.square().sum()).log10().item()
    assert events.Scalars("sqnr_db/0/weight")[0].value == pytest.approx(expected, abs=0.1)
    assert 2**15 < events.Histograms("weight/0/float")[0].histogram_value.num <= 2**16


def test_hparams_are_in_the_run_itself(tmp_path):
    config = {"lr": 0.5, "epochs": 3, "amp": True, "arch": "resnet18", "policy": None, "lrs": (1, 2)}
    config["clip"] = float("inf")
    with Monitor(tmp_path) as monitor:
        monitor.scalars(0, {"train/loss": 1.0})
        monitor.hparams(config, {"hparam/accuracy": 0.75})
        monitor.scalars(1, {"train/loss": 2.0})
    assert len(list(tmp_path.iterdir())) == 1
    events = read(tmp_path)
    written = events.PluginTagToContent("hparams")
    content = {tag: HParamsPluginData.FromString(data) for tag, data in written.items()}
    start = content["_hparams_/session_start_info"].session_start_info
    assert {key: getattr(value, value.WhichOneof("kind")) for key, value in start.hparams.items()} == {
        "lr": 0.5, "epochs": 3.0, "amp": 1.0, "arch": "resnet18", "policy": "none", "lrs": "(1, 2)",
        "clip": "inf"}  # fmt: skip
    experiment = content["_hparams_/experiment"].experiment
    assert [info.name for info in experiment.hparam_infos] == list(config)
    assert [info.name.tag for info in experiment.metric_infos] == ["hparam/accuracy"]
    assert content["_hparams_/session_end_info"].HasField("session_end_info")
    assert [(e.step, e.value) for e in events.Scalars("hparam/accuracy")] == [(0, 0.75)]
    assert [e.value for e in events.Scalars("train/loss")] == [1.0, 2.0]


@pytest.mark.parametrize("num_steps, recorded", [(9, [2, 3, 4]), (3, [2, 3])], ids=["all", "cut short"])
def test_profiler_writes_one_trace_of_its_steps(tmp_path, num_steps, recorded):
    with profiler(tmp_path, steps=3) as profile:
        for _ in range(num_steps):
            torch.ones(4, 4) @ torch.ones(4, 4)
            profile.step()
    (path,) = tmp_path.glob("*.pt.trace.json")
    events = json.loads(path.read_text())["traceEvents"]
    steps = {event["name"] for event in events if event.get("name", "").startswith("ProfilerStep#")}
    assert steps == {f"ProfilerStep#{i}" for i in recorded}
    (shapes, *_) = [event["args"]["Input Dims"] for event in events if event.get("name") == "aten::mm"]
    assert shapes == [[4, 4], [4, 4]]
