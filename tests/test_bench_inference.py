"""tools/bench.py inference as a user calls it, on tiny networks."""

import functools
import json
import re
import sys

import onnxruntime
import pytest
import torch
from helpers import needs_bytes, table_rows

import apotfx

import bench
import bench_common
import bench_inference
from bench_inference import MODES, Mode, Sample, Subject

TINY = ["inference", "--network", "stack", "--batch", "2", "--image-size", "8", "--rounds", "3", "--warmup", "1"]
ONNXRUNTIME = [name for name in MODES if name.startswith("ort-")]


@pytest.fixture(autouse=True)
def keep_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(*flags):
    return bench.main([*TINY, "--threads", "1", *map(str, flags)])


def report_of(path):
    return json.loads(path.read_text())["networks"]["stack"]


def tiny_case(batch=2):
    return bench_common.Case("stack", batch, 8, "channels-last", "cpu", threads=1, width=4, depth=2)


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    return Subject(tiny_case(batch=32), apotfx.BitPolicy.default(bits=4), tmp_path_factory.mktemp("subject"))


def scripted(monkeypatch, seconds, float32=("eager",)):
    """Variants that take these seconds, round by round, and give equal logits; returns the order of their calls."""
    calls = []

    class ScriptedSample:
        calls = 1

        def __init__(self, infer, warmup):
            self.infer, self.seconds = infer, iter(seconds[infer.variant])

        def __call__(self):
            calls.append(self.infer.variant)
            return next(self.seconds)

    def make(subject, images, threads, *, name):
        infer = functools.partial(subject.reference, images)
        infer.variant = name
        return infer

    modes = {
        name: Mode(
            functools.partial(make, name=name), float32=name in float32, exact=MODES[name].exact, once=MODES[name].once
        )
        for name in seconds
    }
    monkeypatch.setattr(bench_inference, "MODES", modes)
    monkeypatch.setattr(bench_inference, "Sample", ScriptedSample)
    parts = dict.fromkeys(bench_inference.PARTS, 0.001) | {"all": 0.010}
    monkeypatch.setattr(bench_inference, "split_time", lambda sample, rounds: parts)
    return calls


SECONDS = {
    "eager": [0.040, 0.040, 0.080],
    "ort-float32": [0.020, 0.030, 0.030],
    "ort-int8": [0.010, 0.010, 0.010],
    "onednn": [0.010, 0.012, 0.020],
    "reference": [0.100],
}


def test_rounds_take_turns_and_ratios_are_those_of_each_round(monkeypatch, capsys, tmp_path):
    calls = scripted(monkeypatch, SECONDS, float32=("eager", "ort-float32"))
    path = tmp_path / "report.json"
    assert call("--json", path) == 0
    e, f, i, o, r = SECONDS
    assert calls == [e, f, i, o, r, f, i, o, e, i, o, e, f]  # the reference once
    rows = {row[0]: row[1:] for row in table_rows(capsys.readouterr().out) if row[0] in SECONDS}
    assert rows[o] == ["12.00", "11.00 to 16.00", "0.25", "0.25 to 0.28", "equal"]
    assert rows[f] == ["30.00", "25.00 to 30.00", "0.50", "0.44 to 0.62", ""]
    assert rows[r] == ["100.00", "100.00 to 100.00", "2.50", "2.50 to 2.50", ""]
    (case,) = report_of(path)["cases"]
    assert (case["batch"], case["threads"], case["skipped"]) == (2, 1, {})
    assert {name: v["seconds"] for name, v in case["variants"].items()} == SECONDS
    onednn = case["variants"][o]
    assert {base: q[1] for base, q in onednn["ratio_quartiles"].items()} == pytest.approx({e: 0.25, f: 0.5, i: 1.2})
    assert onednn["fastest_float32"] == f and onednn["logits"] == "equal"


def test_the_summary_has_the_gains_and_the_parts(monkeypatch, capsys):
    scripted(monkeypatch, SECONDS, float32=("eager", "ort-float32"))
    assert call() == 0
    rows = table_rows(capsys.readouterr().out.split("## Time, as multiples of eager")[1])
    head = ["stack", "2", "1"]
    assert rows[1] == [*head, "1.00", "0.50", "0.25", "0.25", "2.50"]
    assert rows[3] == [*head, "onednn", "4.00", "2.00", "ort-float32", "1.20", "equal"]
    assert rows[5] == [*head, "10.00", *["1.00 (10%)"] * 5]


def test_without_onnxruntime_the_gains_are_over_pytorch(monkeypatch, capsys):
    scripted(monkeypatch, {name: SECONDS[name] for name in ("eager", "onednn")})
    assert call() == 0
    rows = table_rows(capsys.readouterr().out)
    assert ["stack", "2", "1", "onednn", "4.00", "4.00", "eager", "-", "equal"] in rows


def test_every_batch_runs_with_every_number_of_threads(monkeypatch, capsys):
    measured = []

    def measure(subject, case, names, rounds, warmup):
        measured.append((case.network, case.batch, case.threads, names))
        return {}, {}

    monkeypatch.setattr(bench_inference, "measure", measure)
    monkeypatch.setattr(bench_inference, "Subject", lambda *args: None)
    flags = ["--network", "resnet18,mnist-resnet18", "--threads", "1,2", "--variants", "onednn,compile"]
    assert bench.main(["inference", *flags]) == 0
    names = ["eager", "compile", "onednn"]
    sizes = {"resnet18": (1, 16), "mnist-resnet18": (1, 256)}
    assert measured == [(n, batch, threads, names) for n in sizes for batch in sizes[n] for threads in (1, 2)]
    assert "## mnist-resnet18: batch 256, 1x28x28, channels-last, 2 threads" in capsys.readouterr().out


def test_a_short_inference_is_repeated_until_it_makes_a_sample(monkeypatch):
    clock = [0.0]
    durations = iter([0.5, 0.004, 0.5, 0.003] + [0.5] + [0.002] * 7)  # before each sample one is not timed

    def infer():
        clock[0] += next(durations)

    monkeypatch.setattr(bench_inference.time, "perf_counter", lambda: clock[0])
    sample = Sample(infer, warmup=2)
    assert sample.calls == 7  # 20 ms at 3 ms each
    assert sample() == pytest.approx(0.002)
    assert next(durations, None) is None


def test_activations_are_alive(subject):
    images, _ = tiny_case(8).batch_on_device()
    with torch.no_grad():
        logits = subject.reference(images)
    assert logits.isfinite().all() and logits.std(0).min() > 0.01


def test_all_variants_compute_the_same_network(subject):
    case = tiny_case(batch=5)
    images, _ = case.batch_on_device()
    with torch.inference_mode():
        logits = {name: torch.as_tensor(MODES[name].make(subject, images, 1)()) for name in ("eager", *ONNXRUNTIME)}
        reference = subject.reference(images)
    assert torch.allclose(logits["ort-float32"], logits["eager"], atol=1e-5)
    assert torch.equal(logits["ort-exact"], reference)
    spread = logits["eager"].std(0).mean()
    assert 0 < (logits["ort-int8"] - logits["eager"]).abs().mean() < 0.2 * spread
    assert 0 < (reference - logits["eager"]).abs().mean() < spread


def test_sessions_have_the_threads_and_do_not_spin(subject, monkeypatch):
    sessions, make = [], onnxruntime.InferenceSession
    monkeypatch.setattr(onnxruntime, "InferenceSession", lambda *a, **k: sessions.append(make(*a, **k)) or sessions[-1])
    MODES["ort-float32"].make(subject, tiny_case().batch_on_device()[0], 2)
    options = sessions[0].get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


@needs_bytes
def test_both_memory_formats_reach_our_network(subject):
    images, _ = tiny_case(batch=5).batch_on_device()
    makers = (MODES[name].make for name in ("onednn", "onednn-contiguous"))
    inputs = [make(subject, images, 1).args[0] for make in makers]
    assert inputs[0].is_contiguous(memory_format=torch.channels_last) and inputs[1].is_contiguous()
    assert torch.equal(*inputs) and not inputs[1].is_contiguous(memory_format=torch.channels_last)


@needs_bytes
def test_the_time_of_onednn_is_split_by_what_its_nodes_are(tmp_path):
    case = bench_common.Case("stack", 2, 8, "channels-last", "cpu", threads=1, width=64, depth=3)
    subject = Subject(case, apotfx.BitPolicy.default(bits=4), tmp_path)
    infer = MODES["onednn"].make(subject, case.batch_on_device()[0], 1)
    with torch.inference_mode():
        expected = infer()
        timer = bench_inference.NodeTimer(infer.func.fused)
        seconds = timer.measure(Sample(infer, 1))
        assert {part for part, value in seconds.items() if value > 0} == set(bench_inference.PARTS) - {"rest"}
        layers = {name: timer.parts[name] for name in ("0.0", "1.0", "2.0", "5")}  # few products: the first, the last
        assert layers == {n: "8-bit layers" if n in ("1.0", "2.0") else "float layers" for n in layers}
        pointwise = {part for name, part in timer.parts.items() if name.endswith("_pointwise")}
        assert pointwise == {"between layers"} and "other float" in timer.parts.values()
        parts = bench_inference.split_time(Sample(infer, 1), rounds=2)
        assert torch.equal(infer(), expected) and "forward" not in vars(infer.func.fused)
    assert set(parts) == {*bench_inference.PARTS, "all"} and all(parts[p] > 0 for p in parts if p != "rest")


def test_a_report_names_versions_levels_and_what_spins(capsys, tmp_path):
    path = tmp_path / "report.json"
    assert call("--variants", "reference", "--bits", 3, "--scheme", "uniform", "--json", path) == 0
    facts = json.loads(path.read_text())["facts"]
    assert facts["levels"] == "3-bit uniform" and facts["threads"] == [1] and facts["torch"] == torch.__version__
    assert "inference --network stack" in facts["command"] and facts["onnxruntime's threads"] == "do not spin"
    assert list(report_of(path)["cases"][0]["variants"]) == ["eager", "reference"]
    assert "- levels: 3-bit uniform\n" in capsys.readouterr().out


def test_logits_that_differ_are_told(monkeypatch, capsys):
    def wrong(subject, images, threads):
        logits = subject.reference(images)
        logits[1, 2] += 0.5
        return lambda: logits

    monkeypatch.setitem(MODES, "onednn-contiguous", Mode(wrong, exact=True))
    assert call("--variants", "onednn-contiguous") == 0
    (row,) = (row for row in table_rows(capsys.readouterr().out) if row[0] == "onednn-contiguous")
    assert row[-1] == "1 of 20 differ by up to 0.5"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime"])
def test_a_missing_package_skips_its_variants(package, monkeypatch, capsys, tmp_path):
    for name in (package, "onnxruntime.quantization"):
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "report.json"
    assert call("--variants", ",".join(ONNXRUNTIME), "--json", path) == 0
    (case,) = report_of(path)["cases"]
    assert list(case["variants"]) == ["eager"] and list(case["skipped"]) == ONNXRUNTIME
    out = capsys.readouterr().out
    assert f"Skipped: ort-exact: {package} cannot be imported" in out and "## Gains" not in out


def test_where_torch_compile_fails_it_is_skipped(monkeypatch, capsys):
    def fail(images):
        raise RuntimeError("No working C++ compiler found\nin many words")

    monkeypatch.setattr(torch, "compile", lambda model, **options: fail)
    assert call("--variants", "compile") == 0
    assert "Skipped: compile: torch.compile failed (No working C++ compiler found)\n" in capsys.readouterr().out


def test_where_the_backend_cannot_run_it_is_skipped_and_not_replaced(monkeypatch, capsys):
    monkeypatch.setattr(bench_inference, "what_onednn_lacks", lambda network: "the CPU has no AVX512-VNNI")
    assert call("--variants", "onednn") == 0
    out = capsys.readouterr().out
    assert "Skipped: onednn: the CPU has no AVX512-VNNI\n" in out and "Where the time" not in out


def test_a_missing_package_skips_its_network(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "timm", None)
    assert bench.main(["inference", "--network", "vit-tiny"]) == 0
    out = capsys.readouterr().out
    assert "Skipped: vit-tiny: timm cannot be imported" in out and not table_rows(out)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--variants", "onednn,ort"], r"--variants: got 'ort', expected one of eager, .*reference"),
        (["--threads", "1,0"], r"--threads: got '0', expected a whole number of at least 1"),
        (["--batch", "1,x"], r"--batch: got 'x', expected a whole number of at least 1"),
        (["--bits", "9"], r"--bits: got '9', expected one of 2, 3, 4, 5, 6, 7, 8"),
        (["--scheme", "log"], r"--scheme: got 'log', expected one of apot, pot, uniform"),
        (["--scheme", "pot", "--bits", "8"], r"use at most"),
        (["--json", "missing/report.json"], r"missing/report.json"),
    ],
    ids=lambda x: x[0][2:] if isinstance(x, list) else "",
)
def test_a_mistake_is_told_in_one_line(flags, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert call(*flags) == 2
    assert re.fullmatch(rf"bench.py: error: .*{message}.*\n", capsys.readouterr().err)
