"""tools/bench.py as a user calls it, on tiny networks."""

import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import table_rows

ROOT = Path(__file__).parents[1]
TINY = ["train", "--network", "stack", "--batch", "2", "--image-size", "8", "--rounds", "1", "--warmup", "1"]

import bench
import bench_common
import bench_train

from apotfx.engine import choose
from apotfx.quantizers import Quantizer


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield
    torch.set_num_threads(before)


def call(*flags):
    return bench.main([*TINY, "--threads", "1", *map(str, flags)])


def tiny_case(**changes):
    settings = {"network": "stack", "batch": 2, "image_size": 8, "memory_format": "channels-last", "device": "cpu"}
    return bench_common.Case(**settings | {"threads": 1, "width": 4, "depth": 2} | changes)


@pytest.fixture(scope="module")
def mnist_report(tmp_path_factory):
    """The JSON file of three rounds on the MNIST network."""
    path = tmp_path_factory.mktemp("bench") / "report.json"
    flags = [
        "--network",
        "mnist-resnet18",
        "--batch",
        "4",
        "--rounds",
        "3",
        "--warmup",
        "1",
        "--variants",
        "float,eager",
    ]
    before = torch.get_num_threads()
    assert bench.main(["train", *flags, "--threads", "1", "--json", str(path)]) == 0
    torch.set_num_threads(before)
    return json.loads(path.read_text())


def test_the_report_says_what_was_measured_and_where(mnist_report):
    facts = mnist_report["facts"]
    assert facts["torch"] == torch.__version__
    assert facts["threads"] == 1
    assert facts["processor"] and facts["system"] and facts["Python"] and facts["cores"] >= 1
    assert re.match(r"(int8|compiled|eager) \(.+\)$", facts["fastest engine"])
    assert "--network mnist-resnet18 --batch 4" in facts["command"]
    network = mnist_report["networks"]["mnist-resnet18"]
    assert (network["batch"], network["image_size"], network["memory_format"]) == (4, 28, "channels-last")
    assert [(v["mode"], v["bits"], v["scheme"], v["engine"]) for v in network["variants"]] == [
        ("float", None, None, None),
        ("eager", 4, "apot", "eager"),
    ]
    floating, eager = network["variants"]
    assert eager["parameters"] == floating["parameters"] + 2 * 21  # two clips for each of the layers
    assert network["skipped"] == {} and mnist_report["growth"] == {}


def test_ratios_are_those_of_the_times_of_each_round(mnist_report):
    floating, eager = mnist_report["networks"]["mnist-resnet18"]["variants"]
    assert len(floating["seconds"]) == len(eager["seconds"]) == 3
    assert min(floating["seconds"] + eager["seconds"]) > 0
    ratios = [mine / base for mine, base in zip(eager["seconds"], floating["seconds"], strict=True)]
    for values, found in ((eager["seconds"], eager["seconds_quartiles"]), (ratios, eager["ratio_quartiles"])):
        low, middle, high = sorted(values)
        assert found == pytest.approx([(low + middle) / 2, middle, (middle + high) / 2])  # quartiles of three
    assert floating["ratio_quartiles"] == [1, 1, 1]


def test_rounds_take_turns_and_the_table_has_the_median_ratio(monkeypatch, capsys):
    calls, seconds = [], {"float": [0.010, 0.020, 0.040], "eager 4-bit apot": [0.030, 0.040, 0.040]}

    class Scripted:
        loss, engine, num_parameters, least_warmup = torch.zeros(()), None, 1, 0

        def __init__(self, case, variant):
            self.name, self.times = str(variant), iter([9.0, *seconds[str(variant)]])

        def __call__(self):
            calls.append(self.name)
            return next(self.times)

    monkeypatch.setattr(bench_train, "Step", Scripted)
    assert call("--variants", "eager", "--rounds", 3) == 0
    f, e = seconds
    assert calls == [f, e, f, e, e, f, f, e]  # one step each to warm up, then each round begins with another one
    rows = table_rows(capsys.readouterr().out)
    assert rows[1] == ["float", "-", "20.0", "15.0 to 30.0", "1.00", "1.00 to 1.00"]
    assert rows[2] == ["eager", "4-bit apot", "40.0", "35.0 to 40.0", "2.00", "1.50 to 2.50"]


def test_a_step_trains_and_repeats():
    first, second = (bench_train.Step(tiny_case(), bench_train.Variant("eager", 4, "apot")) for _ in range(2))
    start = {name: p.detach().clone() for name, p in first.model.named_parameters()}
    losses = [(first() and first.loss.item(), second() and second.loss.item()) for _ in range(5)]
    assert all(a == b for a, b in losses)
    assert losses[-1][0] < losses[0][0]
    kept = {name for name, p in first.model.named_parameters() if torch.equal(p, start[name])}
    assert kept <= {"0.0.input_quantizer.clip", "0.0.weight_quantizer.clip"}  # not learned; hardly, at 8 bits


def test_clips_are_calibrated_before_the_first_step():
    step = bench_train.Step(tiny_case(), bench_train.Variant("eager", 4, "apot"))
    assert [m.needs_data() for m in step.model.modules() if isinstance(m, Quantizer)] == [False] * 6


def test_the_memory_format_reaches_images_and_weights():
    for name, memory_format in bench_common.MEMORY_FORMATS.items():
        step = bench_train.Step(tiny_case(memory_format=name), bench_train.FLOAT)
        assert step.batch[0].is_contiguous(memory_format=memory_format)
        assert step.model[1][0].weight.is_contiguous(memory_format=memory_format)


def test_every_combination_of_levels_runs_beside_float_but_the_impossible_ones(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert call("--variants", "eager", "--bits", "2,8", "--scheme", "pot,uniform", "--json", path) == 0
    network = json.loads(path.read_text())["networks"]["stack"]
    found = [(v["mode"], v["bits"], v["scheme"]) for v in network["variants"]]
    assert found == [("float", None, None), ("eager", 2, "pot"), ("eager", 2, "uniform"), ("eager", 8, "uniform")]
    assert list(network["skipped"]) == ["eager 8-bit pot"]
    assert "use at most" in network["skipped"]["eager 8-bit pot"]
    assert "Skipped: eager 8-bit pot: layer" in capsys.readouterr().out


def variants_of(*flags):
    args = bench.make_parser().parse_args(["train", *flags])
    return list(map(str, bench_train.chosen_variants(args)))


def test_defaults_leave_out_whole_model_compilation_and_sweep_on_the_fastest_engine():
    names = [name.split()[0] for name in variants_of()]
    assert names == ["float", "float-amp", "eager", "compiled", "int8", "amp", "brevitas", "torch.ao"]
    fastest = choose().engine.name
    assert variants_of("--bits", "3,5") == ["float", f"{fastest} 3-bit apot", f"{fastest} 5-bit apot"]


def test_other_packages_are_uniform_whatever_the_scheme():
    found = variants_of("--variants", "brevitas,float", "--scheme", "apot,pot", "--bits", "3")
    assert found == ["float", "brevitas 3-bit uniform"]


@pytest.mark.parametrize("variant, package", [("brevitas", "brevitas.nn"), ("torch.ao", "torch.ao.quantization")])
def test_a_missing_package_skips_its_variant(variant, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    assert call("--variants", variant) == 0
    out = capsys.readouterr().out
    assert f"Skipped: {variant} 4-bit uniform: {package} cannot be imported" in out
    assert [row[0] for row in table_rows(out)] == ["variant", "float"]


def test_a_missing_package_skips_its_network(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "timm", None)
    path = tmp_path / "report.json"
    assert call("--network", "vit-tiny", "--memory", "--first-step", "--json", path) == 0
    network = json.loads(path.read_text())["networks"]["vit-tiny"]
    assert network["variants"] == [] and "timm" in network["skipped"]["vit-tiny"]
    assert "Skipped: vit-tiny: timm cannot be imported" in capsys.readouterr().out


def test_an_engine_that_does_not_work_here_is_skipped_and_not_replaced(monkeypatch):
    slower = bench_common.choose("eager")._replace(reason="no compiled kernels: none")
    monkeypatch.setattr(bench_train, "use_engine", lambda model, name: slower)
    with pytest.raises(bench_train.Skip, match=r"only eager \(no compiled kernels: none\) works here"):
        bench_train.Step(tiny_case(), bench_train.Variant("int8", 4, "apot"))


def step_or_skip(case, variant):
    try:
        return bench_train.Step(case, variant)
    except bench_train.Skip as skip:
        pytest.skip(str(skip))


def test_torch_ao_quantizes_weights_and_inputs_at_the_same_bits():
    step = step_or_skip(tiny_case(depth=3), bench_train.Variant("torch.ao", 3, "uniform"))
    weights = {
        name: (m.weight_fake_quant.quant_min, m.weight_fake_quant.quant_max)
        for name, m in step.model.named_modules()
        if hasattr(m, "weight_fake_quant")
    }
    assert weights == {"0.0": (-128, 127), "1.0": (-4, 3), "2.0": (-4, 3), "5": (-128, 127)}
    assert step() > 0 and step.loss.isfinite()


@pytest.mark.filterwarnings("ignore")  # brevitas has some
def test_brevitas_learns_scales_at_the_same_bits():
    step = step_or_skip(tiny_case(depth=3), bench_train.Variant("brevitas", 3, "uniform"))
    layers = {name: m for name, m in step.model.named_modules() if hasattr(m, "weight_quant")}
    bits = {name: (int(m.weight_quant.bit_width()), int(m.input_quant.bit_width())) for name, m in layers.items()}
    assert bits == {"0.0": (8, 8), "1.0": (3, 3), "2.0": (3, 3), "5": (8, 8)}
    assert {name: m.input_quant.is_signed for name, m in layers.items()} == {n: n == "0.0" for n in layers}
    assert step() > 0
    scales = [p for name, p in step.model.named_parameters() if "scaling_impl" in name]
    assert len(scales) == 2 * len(layers) and all(p.grad is not None for p in scales)


def test_memory_is_measured_in_a_fresh_process(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench_train, "MEMORY_PROCESSES", 1)
    ballast = torch.ones(2**27)  # 512 MiB, which a fresh process must not inherit
    path = tmp_path / "report.json"
    assert call("--variants", "eager", "--image-size", 16, "--batch", 16, "--memory", "--json", path) == 0
    floating, eager = json.loads(path.read_text())["networks"]["stack"]["variants"]
    for memory in (floating["memory"], eager["memory"]):
        assert 0 < memory["before"] < memory["peak"] < bench_train.process_memory()[0] - 2**28
        assert memory["increase"] == memory["peak"] - memory["before"]
        # At least the outputs of eight convolutions, which the backward pass needs.
        assert memory["increase"] > 8 * 16 * 64 * 16 * 16 * 4
    assert ballast[-1] == 1  # kept alive until here
    row = table_rows(capsys.readouterr().out)[-1]
    assert row[:3] == ["eager", "4-bit apot", f"{eager['parameters']:,}"]
    assert row[7] == f"{eager['memory']['increase'] / floating['memory']['increase']:.2f}"


def test_memory_is_the_median_of_several_processes(monkeypatch, capsys):
    def fresh(what, case, variant):
        increase = next(increases)
        return {"before": 10 * 2**20, "peak": 10 * 2**20 + increase, "increase": increase}

    increases = iter(size * 2**20 for size in (4, 3, 8, 6, 9, 1))  # of float, then of eager
    monkeypatch.setattr(bench_train, "in_fresh_process", fresh)
    assert call("--variants", "eager", "--memory") == 0
    floating, eager = table_rows(capsys.readouterr().out)[-2:]
    assert floating[3:] == ["14.0", "1.00", "4.0", "3.0 to 8.0", "1.00"]
    assert eager[3:] == ["16.0", "1.14", "6.0", "1.0 to 9.0", "1.50"]


def test_the_first_step_is_measured_with_an_empty_and_with_a_filled_cache(monkeypatch, capsys, tmp_path):
    seen, path = [], tmp_path / "report.json"

    def fresh(what, case, variant, **environment):
        folder = Path(environment["APOTFX_CACHE"])
        seen.append((what, str(variant), environment["APOTFX_CACHE"], list(folder.iterdir())))
        (folder / "kernels.so").touch()
        return {"prepare": 2.0 / len(seen), "step": 0.5}

    monkeypatch.setattr(bench_train, "in_fresh_process", fresh)
    assert call("--variants", "eager", "--first-step", "--json", path) == 0
    floating, _ = json.loads(path.read_text())["networks"]["stack"]["variants"]
    assert floating["first_step"]["empty_cache"] == {"prepare": 2.0, "step": 0.5}
    assert floating["first_step"]["filled_cache"] == {"prepare": 1.0, "step": 0.5}
    caches = [cache for _, _, cache, _ in seen]
    assert caches[0] == caches[1] != caches[2] == caches[3]
    assert [len(files) for *_, files in seen] == [0, 1, 0, 1]
    assert table_rows(capsys.readouterr().out)[-1] == ["eager", "4-bit apot", "0.67", "0.50", "0.50", "0.50"]


def test_a_fresh_process_measures_the_first_step():
    found = bench_train.in_fresh_process("first_step", tiny_case(), bench_train.FLOAT)
    assert set(found) == {"prepare", "step"} and min(found.values()) > 0


def test_a_fresh_process_that_fails_is_told(monkeypatch):
    def run(command, **kwargs):
        return subprocess.CompletedProcess(command, 1, "", "Traceback\nMemoryError: too much\n")

    monkeypatch.setattr(bench_train.subprocess, "run", run)
    with pytest.raises(
        bench_train.ApotfxError, match=r"stack float: its process for memory failed \(MemoryError: too much\)"
    ):
        bench_train.in_fresh_process("memory", tiny_case(), bench_train.FLOAT)


@pytest.mark.parametrize("axis", ["batch", "width", "depth", "bits"])
def test_growth_changes_one_thing_at_a_time(axis, monkeypatch, capsys):
    measured = []

    def fresh(what, case, variant):
        measured.append((case, variant))
        return {"before": 0, "peak": len(measured) * 2**20, "increase": len(measured) * 2**20}

    monkeypatch.setattr(bench_train, "in_fresh_process", fresh)
    monkeypatch.setattr(bench_train, "MEMORY_PROCESSES", 1)
    monkeypatch.setitem(bench_train.GROWTH, axis, (3, 5))
    args = bench.make_parser().parse_args([*TINY])
    rows = bench_train.bench_growth(axis, tiny_case(), bench_train.Variant("eager", 4, "apot"), args)
    assert [row[axis] for row in rows] == [3, 5]
    for i, value in enumerate((3, 5)):
        (float_case, floating), (case, variant) = measured[2 * i : 2 * i + 2]
        assert float_case == case == (tiny_case() if axis == "bits" else tiny_case(**{axis: value}))
        assert floating == bench_train.FLOAT
        assert variant == bench_train.Variant("eager", value if axis == "bits" else 4, "apot")
    header, *table = table_rows(capsys.readouterr().out)
    assert header[0] == axis
    assert [(row[0], row[4:]) for row in table] == [("3", ["1.0", "2.0", "2.00"]), ("5", ["3.0", "4.0", "1.33"])]


def test_the_stack_has_the_width_and_depth_that_were_asked_for():
    model = bench_common.build_stack(tiny_case(width=6, depth=3))
    shapes = [tuple(m.weight.shape) for m in model.modules() if isinstance(m, torch.nn.Conv2d)]
    assert shapes == [(6, 3, 3, 3), (6, 6, 3, 3), (6, 6, 3, 3)]


def test_a_loss_that_is_not_finite_is_told(monkeypatch, capsys):
    monkeypatch.setattr(bench_train.nn.functional, "cross_entropy", lambda y, labels: y.sum() * float("nan"))
    assert call("--variants", "float") == 2
    assert "stack float: the loss became nan" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--variants", "float,flaot"], r"--variants: got 'flaot', expected one of float, .*torch.ao"),
        (["--network", "resnet19"], r"--network: got 'resnet19', expected one of resnet18, .*stack"),
        (["--scheme", "log"], r"--scheme: got 'log', expected one of apot, pot, uniform"),
        (["--bits", "4,9"], r"--bits: got '9', expected one of 2, 3, 4, 5, 6, 7, 8"),
        (["--rounds", "0"], r"--rounds: got '0', expected a whole number of at least 1"),
        (["--warmup", "x"], r"--warmup: got 'x', expected a whole number of at least 1"),
        (["--batch", "-4"], r"--batch: got '-4', expected a whole number of at least 1"),
        (["--image-size", "2.5"], r"--image-size: got '2.5', expected a whole number of at least 1"),
        (["--threads", ""], r"--threads: got '', expected a whole number of at least 1"),
        (["--memory-format", "nchw"], r"--memory-format: got 'nchw', expected one of channels-last, contiguous"),
        (["--device", "tpu"], r"--device tpu: unknown; expected cpu, cuda or cuda:N"),
        (["--fast"], r"unrecognized arguments: --fast"),
        (["--json", "missing/report.json"], r"missing/report.json"),
    ],
    ids=lambda x: x[0][2:] if isinstance(x, list) else "",
)
def test_a_mistake_is_told_in_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(*flags) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(rf"bench.py: error: .*{message}.*\n", captured.err)
    assert captured.out == ""


def test_without_a_command_the_error_names_it(capsys):
    assert bench.main([]) == 2
    assert capsys.readouterr().err.startswith(
        "bench.py: error: the following arguments are required: {train,inference,quantize}"
    )


def test_help_says_what_the_default_leaves_out(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["train", "--help"])
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "default all but float-compile and compile, which compile for minutes" in text


def test_quartiles():
    values = [5.0, 1.0, 4.0, 2.0, 3.0, 9.0]
    assert bench_common.quartiles(values) == pytest.approx(statistics.quantiles(values, n=4, method="inclusive"))
    assert bench_common.quartiles([7.0]) == (7, 7, 7)
