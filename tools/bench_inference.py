"""How fast the exported network runs, against float32 and against onnxruntime's 8-bit quantization in the same run."""

import argparse
import contextlib
import copy
import functools
import itertools
import logging
import math
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import bench_common
import torch
from bench_common import (
    NETWORKS,
    SEED,
    Case,
    Report,
    Skip,
    describe_machine,
    import_or_skip,
    markdown,
    print_skipped,
    quartiles,
    ratio_quartiles,
    spread,
    time_in_turns,
)
from torch import Tensor, fx, nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode

import apotfx
from apotfx.errors import ApotfxError
from apotfx.integer.program import Product
from apotfx.integer.onednn import ByteLayer, Pointwise, Unfused, what_onednn_lacks

BATCHES = {"mnist-resnet18": [1, 256]}
USUAL_BATCHES = [1, 16]
CALIBRATION_BATCHES, CALIBRATION_IMAGES = 4, 8
SAMPLE = 0.02  # seconds; a shorter inference is repeated in one sample
BASE, OTHER_INT8, OURS = "eager", "ort-int8", ("onednn", "ort-exact")


class Subject:
    """A network with random weights in all forms that are measured, made when first asked for.

    Attributes:
        float_model: in evaluation mode, its batch norms with the statistics of random images.
        batches: these images, which the quantizers are calibrated on.
    """

    def __init__(self, case: Case, policy: apotfx.BitPolicy, directory: Path):
        self.policy, self.directory = policy, directory
        torch.manual_seed(SEED)
        images, _ = case.batch_on_device()
        self.batches = images.chunk(CALIBRATION_BATCHES)
        self.float_model = case.to_device(NETWORKS[case.network].build(case))
        update_bn(self.batches, self.float_model)  # without statistics the activations of a deep network vanish
        self.float_model.eval()

    @functools.cached_property
    def export(self) -> Path:
        """Of the quantized network."""
        qmodel = apotfx.quantize(self.float_model, self.policy)
        apotfx.calibrate(qmodel, self.batches)
        return apotfx.export_integer(qmodel.eval(), self.directory / "export")

    @functools.cached_property
    def reference(self) -> fx.GraphModule:
        return apotfx.load_integer(self.export, self.float_model)

    @functools.cached_property
    def onnx_float32(self) -> Path:
        import_or_skip("onnx")
        path, model = self.directory / "float32.onnx", copy.deepcopy(self.float_model)
        model, image = model.to(memory_format=torch.contiguous_format), self.batches[0][:1].contiguous()
        names = {"input_names": ["images"], "output_names": ["logits"]}
        dynamic = {"images": {0: "batch"}, "logits": {0: "batch"}}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that this exporter is the old one; the new one needs more packages
            torch.onnx.export(model, (image,), path, dynamo=False, dynamic_axes=dynamic, **names)
        return path

    @functools.cached_property
    def onnx_int8(self) -> Path:
        """By onnxruntime's static quantization."""
        quantization = import_or_skip("onnxruntime.quantization")
        path = self.directory / "int8.onnx"
        with silenced():
            quantization.quantize_static(
                self.onnx_float32,
                path,
                CalibrationReader(self.batches),
                quant_format=quantization.QuantFormat.QDQ,
                activation_type=quantization.QuantType.QUInt8,
                weight_type=quantization.QuantType.QInt8,
                per_channel=True,
            )
        return path

    @functools.cached_property
    def onnx_exact(self) -> Path:
        import_or_skip("onnx")
        from apotfx.integer.onnx import export_onnx

        shape = tuple(self.batches[0].shape[1:])
        return export_onnx(self.reference, self.directory / "exact.onnx", input_shape=shape, flavour="exact")


class CalibrationReader:
    """Batches as onnxruntime's quantization reads them."""

    def __init__(self, batches: tuple[Tensor, ...]):
        self.batches = iter(batches)

    def get_next(self) -> dict | None:
        batch = next(self.batches, None)
        return None if batch is None else {"images": batch.contiguous().numpy()}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Without what the root logger gets, such as advice to optimize a model first that is optimized."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


Inference = Callable[[], object]


def eager(subject: Subject, images: Tensor, threads: int) -> Inference:
    return functools.partial(subject.float_model, images)


def compiled(subject: Subject, images: Tensor, threads: int) -> Inference:
    torch.compiler.reset()  # what was compiled for other threads
    model = torch.compile(subject.float_model, dynamic=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(images)
    except Exception as error:  # there are many kinds, that there is no C++ compiler among them
        raise Skip(f"torch.compile failed ({str(error).strip().splitlines()[0]})") from error
    return functools.partial(model, images)


def onednn(subject: Subject, images: Tensor, threads: int) -> Inference:
    if lacking := what_onednn_lacks(subject.reference):
        raise Skip(lacking)
    network = apotfx.load_integer(subject.export, subject.float_model, backend="onednn")
    return functools.partial(network, images)


def onednn_contiguous(subject: Subject, images: Tensor, threads: int) -> Inference:
    return onednn(subject, images.contiguous(), threads)


def reference(subject: Subject, images: Tensor, threads: int) -> Inference:
    return functools.partial(subject.reference, images)


def onnxruntime(subject: Subject, images: Tensor, threads: int, *, form: str) -> Inference:
    """The file `subject.<form>` in a session of its own."""
    ort = import_or_skip("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 3  # errors
    # Threads that wait for their next run would take the cores from the other variants.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    session = ort.InferenceSession(getattr(subject, form), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: images.contiguous().numpy()}
    return lambda: session.run(None, feed)[0]


@dataclass(frozen=True)
class Mode:
    """A way to run a network.

    Attributes:
        make: called with the subject, the images and the number of threads; raises Skip where it cannot.
        float32: whether it computes the float model, unquantized.
        exact: whether its logits should equal the reference's.
        once: whether one sample is enough.
    """

    make: Callable[[Subject, Tensor, int], Inference]
    float32: bool = False
    exact: bool = False
    once: bool = False


MODES = {
    "eager": Mode(eager, float32=True),
    "compile": Mode(compiled, float32=True),
    "ort-float32": Mode(functools.partial(onnxruntime, form="onnx_float32"), float32=True),
    "ort-int8": Mode(functools.partial(onnxruntime, form="onnx_int8")),
    "onednn": Mode(onednn, exact=True),
    "onednn-contiguous": Mode(onednn_contiguous, exact=True),
    "ort-exact": Mode(functools.partial(onnxruntime, form="onnx_exact"), exact=True),
    "reference": Mode(reference, once=True),
}


class Sample:
    """Calling it runs an inference as often as makes a sample, and returns the seconds of one."""

    def __init__(self, infer: Inference, warmup: int):
        self.infer, self.calls = infer, 1
        fastest = min(self() for _ in range(warmup))
        self.calls = math.ceil(SAMPLE / fastest)

    def __call__(self) -> float:
        self.infer()  # untimed: whatever ran before has its threads and its data in the caches
        start = time.perf_counter()
        for _ in range(self.calls):
            self.infer()
        return (time.perf_counter() - start) / self.calls


@torch.inference_mode()
def measure(subject: Subject, case: Case, names: list[str], rounds: int, warmup: int) -> tuple[dict, dict]:
    """(per variant its figures; reasons of skips).

    The figures are its seconds by round, their quartiles, those of the ratios to `BASE`, to the fastest float32 and to
    `OTHER_INT8` in the same rounds, and how its logits compare to the reference's.
    """
    torch.set_num_threads(case.threads)
    images, _ = case.batch_on_device()
    expected = subject.reference(images)
    samples, skipped, logits = {}, {}, {}
    for name in names:
        try:
            infer = MODES[name].make(subject, images, case.threads)
        except (Skip, ApotfxError) as error:
            skipped[name] = str(error)
            continue
        if MODES[name].exact:
            logits[name] = compare(expected, torch.as_tensor(infer()))
        samples[name] = Sample(infer, 1 if MODES[name].once else warmup)
    seconds = time_in_turns(samples, rounds, once=[name for name in samples if MODES[name].once])
    medians = {name: quartiles(values)[1] for name, values in seconds.items()}
    fastest = min((name for name in samples if MODES[name].float32), key=medians.get)
    bases = [name for name in dict.fromkeys((BASE, fastest, OTHER_INT8)) if name in seconds]
    results = {
        name: {
            "calls": samples[name].calls,
            "seconds": values,
            "seconds_quartiles": quartiles(values),
            "ratio_quartiles": {base: ratio_quartiles(values, seconds[base]) for base in bases},
            "fastest_float32": fastest,
            "logits": logits.get(name),
        }
        for name, values in seconds.items()
    }
    if "onednn" in samples:
        results["onednn"]["parts"] = split_time(samples["onednn"], rounds)
    return results, skipped


def compare(expected: Tensor, logits: Tensor) -> str:
    if torch.equal(expected, logits):
        return "equal"
    differing = expected != logits
    return f"{int(differing.sum())} of {logits.numel()} differ by up to {(expected - logits).abs().max():.2g}"


# What the time of a network on 8-bit arithmetic goes to; the last is what passes between the nodes of its graph.
PARTS = ("8-bit layers", "float layers", "between layers", "other float", "rest")


class NodeTimer(fx.Interpreter):
    """Runs the fused graph of a `ByteNetwork` in its place and adds up the seconds of the nodes by part."""

    def __init__(self, fused: fx.GraphModule):
        super().__init__(fused)
        self.seconds, self.parts = Counter(), {}

    def measure(self, sample: Sample) -> dict[str, float]:
        """Seconds by part of one inference, the mean of a sample."""
        self.module.forward = self.run
        try:
            sample.infer()
            self.seconds.clear()
            for _ in range(sample.calls):
                sample.infer()
        finally:
            del self.module.forward
        return {part: self.seconds[part] / sample.calls for part in PARTS}

    def call_module(self, target: str, args: tuple, kwargs: dict) -> object:
        module = self.fetch_attr(target)
        if target not in self.parts:
            with CalledOperators() as called:
                module(*args, **kwargs)
            self.parts[target] = part_of(module, called.namespaces)
        return self._timed(self.parts[target], module, args, kwargs)

    def call_function(self, target: Callable, args: tuple, kwargs: dict) -> object:
        return self._timed("other float", target, args, kwargs)

    def _timed(self, part: str, call: Callable, args: tuple, kwargs: dict) -> object:
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[part] += time.perf_counter() - start
        return result


def part_of(module: nn.Module, namespaces: set[str]) -> str:
    if isinstance(module, ByteLayer) or isinstance(module, Unfused) and isinstance(module.step, Product):
        return "8-bit layers" if "onednn" in namespaces else "float layers"
    return "between layers" if isinstance(module, Pointwise) else "other float"


class CalledOperators(TorchDispatchMode):
    """While active, notes the namespaces of the operators that are called."""

    def __init__(self):
        super().__init__()
        self.namespaces: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.namespaces.add(function.namespace)
        return function(*args, **(kwargs or {}))


def split_time(sample: Sample, rounds: int) -> dict[str, float]:
    """Median seconds of each of `PARTS` in an inference by a `ByteNetwork`, and of the whole as "all"."""
    timer, seconds = NodeTimer(sample.infer.func.fused), {part: [] for part in ("all", *PARTS)}
    for _ in range(rounds):
        found = timer.measure(sample) | {"all": sample()}
        for part, values in seconds.items():
            values.append(found[part])
    split = {part: quartiles(values)[1] for part, values in seconds.items()}
    return split | {"rest": max(0.0, split["all"] - sum(split[part] for part in PARTS))}


ratio = "{:.2f}".format
milliseconds = functools.partial(bench_common.milliseconds, decimals=2)


def print_case(results: dict[str, dict]) -> None:
    rows = [
        [
            name,
            *spread(result["seconds_quartiles"], milliseconds),
            *spread(result["ratio_quartiles"][BASE], ratio),
            result["logits"] or "",
        ]
        for name, result in results.items()
    ]
    print(markdown(["variant", "ms", "quartiles", "x eager", "quartiles", "logits, to reference"], rows))


def print_summary(cases: list[dict]) -> None:
    """All cases side by side: every variant, what ours gain, and where the time of onednn goes."""
    names = [name for name in MODES if any(name in case["variants"] for case in cases)]
    times, gains, parts = [], [], []
    for case in cases:
        head = [case["network"], str(case["batch"]), str(case["threads"])]
        results = case["variants"]
        times.append(head + [ratio(results[n]["ratio_quartiles"][BASE][1]) if n in results else "-" for n in names])
        for name in OURS:
            if name in results:
                gains.append([*head, name, *gain_cells(results[name])])
        if "onednn" in results:
            parts.append(head + part_cells(results["onednn"]["parts"]))
    head = ["network", "batch", "threads"]
    print(f"## Time, as multiples of {BASE}\n\n{markdown([*head, *names], times)}")
    if gains:
        columns = ["variant", f"times faster than {BASE}", "than the fastest float32", "which is", f"x {OTHER_INT8}"]
        print(f"## Gains\n\n{markdown([*head, *columns, 'logits, to reference'], gains)}")
    if parts:
        print(f"## Where the time of onednn goes, ms\n\n{markdown([*head, 'all', *PARTS], parts)}")


def gain_cells(result: dict) -> list[str]:
    medians = {base: median for base, (_, median, _) in result["ratio_quartiles"].items()}
    fastest = result["fastest_float32"]
    to_int8 = ratio(medians[OTHER_INT8]) if OTHER_INT8 in medians else "-"
    return [ratio(1 / medians[BASE]), ratio(1 / medians[fastest]), fastest, to_int8, result["logits"]]


def part_cells(parts: dict[str, float]) -> list[str]:
    shares = [f"{milliseconds(parts[part])} ({parts[part] / parts['all']:.0%})" for part in PARTS]
    return [milliseconds(parts["all"]), *shares]


def bench_network(name: str, names: list[str], args: argparse.Namespace) -> dict:
    """Measure and print all cases of one network; its part of the JSON file."""
    image_size = args.image_size or NETWORKS[name].image_size
    case = functools.partial(Case, name, image_size=image_size, memory_format="channels-last", device="cpu")
    policy = apotfx.BitPolicy.default(bits=args.bits, scheme=args.scheme)
    cases = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            subject = Subject(case(batch=CALIBRATION_BATCHES * CALIBRATION_IMAGES, threads=1), policy, Path(directory))
        except Skip as skip:
            skipped = {name: str(skip)}
            print_skipped(skipped)
            return {"cases": [], "skipped": skipped}
        for batch, threads in itertools.product(args.batch or BATCHES.get(name, USUAL_BATCHES), args.threads):
            here = case(batch=batch, threads=threads)
            print(f"## {here}, {threads} thread{'s' * (threads > 1)}\n")
            results, skipped = measure(subject, here, names, args.rounds, args.warmup)
            print_case(results)
            print_skipped(skipped)
            cases.append(asdict(here) | {"variants": results, "skipped": skipped})
    return {"cases": cases, "skipped": {}}


def run_inference(args: argparse.Namespace) -> None:
    names = [BASE, *(name for name in MODES if name in (args.variants or MODES) and name != BASE)]
    facts = {
        "rounds": f"{args.rounds} after {args.warmup} inferences of warm-up; median and quartiles",
        "levels": f"{args.bits}-bit {args.scheme}",
        "onnxruntime's threads": "do not spin",
        **describe_machine("cpu", args.threads),
    }
    report = Report(args, facts, networks={})
    networks = report.parts["networks"]
    for name in args.network:
        networks[name] = bench_network(name, names, args)
        report.save()
    cases = [case for network in networks.values() for case in network["cases"]]
    if cases:
        print_summary(cases)
