"""What must hold for a network and what `quantize` makes of it; see `check`."""

import collections
import contextlib
import copy
import dataclasses
import math
import random
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from network_statements import SAME
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import apotfx
from apotfx.layers import QuantLayer

if TYPE_CHECKING:
    from random_networks import Program

BatchNorm = nn.modules.batchnorm._BatchNorm
BACKENDS = ("reference", "onednn", "native")
CLOSE = 20.0  # dB; a network at 8 bits
CLOSE_IN_TRAINING = 15.0
SLACK = 8.0  # dB by which a quantized network may be worse than the float one that rounds to 8 bits itself


class EightBits(TorchFunctionMode):
    """Rounds what every product reads to 8 bits: what it costs a network that is computed as it is written."""

    products = {
        torch.conv2d, torch.conv_transpose2d, nn.functional.linear, torch.matmul, torch.bmm, torch.addmm,
        Tensor.matmul, Tensor.__matmul__,
    }  # fmt: skip

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.products:  # the first two tensors that are no biases
            first = func is torch.addmm
            args = (*args[:first], *map(self.rounded, args[first : first + 2]), *args[first + 2 :])
        return func(*args, **(kwargs or {}))

    @staticmethod
    def rounded(x: Tensor) -> Tensor:
        step = x.detach().abs().amax() / 127
        return torch.where(step > 0, (x / step).round() * step, x)


def bind(inputs: object) -> tuple[tuple, dict]:
    if isinstance(inputs, dict):
        return (), inputs
    return (inputs, {}) if isinstance(inputs, tuple) else ((inputs,), {})


def mapped(function: Callable, value: object) -> object:
    """`value` with every tensor in it replaced."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return type(value)((key, mapped(function, item)) for key, item in value.items())
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(mapped(function, item) for item in value))
    if type(value) in (tuple, list):
        return type(value)(mapped(function, item) for item in value)
    if dataclasses.is_dataclass(value):
        changed = {f.name: mapped(function, getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed)
    return value


def leaves(value: object, path: str = "result") -> Iterator[tuple[str, object]]:
    """(path, leaf) of everything that is no container."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from leaves(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}[{key!r}]")
    elif isinstance(value, (tuple, list)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{path}[{i}]")
    else:
        yield path, value


def structure(value: object) -> object:
    """What a caller relies on: the containers, their keys, and shape and type of every leaf."""
    if dataclasses.is_dataclass(value):
        return type(value).__name__, [structure(getattr(value, f.name)) for f in dataclasses.fields(value)]
    if isinstance(value, dict):
        return "ordered" if isinstance(value, collections.OrderedDict) else "dict", [
            (key, structure(item)) for key, item in value.items()
        ]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value).__name__, [*map(structure, value)]
    if isinstance(value, (tuple, list)):
        return "tuple" if isinstance(value, tuple) else "list", [*map(structure, value)]
    return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else value


def decibels(expected: Tensor, got: Tensor) -> float:
    """The ratio of signal to noise."""
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return -math.inf
    if torch.equal(expected, got):
        return math.inf
    if not expected.is_floating_point():
        return -math.inf
    expected, got = expected.detach().double(), got.detach().double()
    signal, noise = expected.square().sum().item(), (expected - got).square().sum().item()
    return 10 * math.log10(signal / noise) if signal > 0 and 0 < noise < math.inf else -math.inf


def is_rounding(expected: Tensor, got: Tensor) -> bool:
    """Whether they differ by what float32 leaves of numbers around 1, such as the mean behind a batch norm."""
    return expected.is_floating_point() and torch.allclose(expected, got, rtol=0, atol=1e-6)


def ratios(expected: object, got: object) -> list[tuple[str, float]]:
    pairs = zip(leaves(expected), leaves(got), strict=True)
    return [(path, decibels(e, g)) for (path, e), (_, g) in pairs if isinstance(e, Tensor) and e.is_floating_point()]


def equal(expected: object, got: object) -> bool:
    """Whether all tensors in two values of one structure are the same bits."""
    pairs = zip(leaves(expected), leaves(got), strict=True)
    return all(torch.equal(e, g) for (_, e), (_, g) in pairs if isinstance(e, Tensor))


def set_seeds(seed: int) -> None:
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def freeze_batch_norms(model: nn.Module) -> nn.Module:
    """As people do: by their type."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
    return model


def with_other_values(model: nn.Module) -> nn.Module:
    """A copy that holds other numbers; an export has those that count."""
    model = copy.deepcopy(model)
    for tensor in model.state_dict().values():
        tensor.copy_(tensor + 1)
    return model


class Run:
    """What a call of a network gave, and left in its inputs."""

    def __init__(self, model: nn.Module, inputs: object, seed: int, gradients: str = ""):
        """`gradients`: "" for none, "parameters", or "inputs" for those as well."""
        inputs = mapped(lambda t: t.clone().requires_grad_(gradients == "inputs"), inputs)
        given = [t for _, t in leaves(bind(inputs)) if isinstance(t, Tensor)]
        args, kwargs = bind(inputs)
        set_seeds(seed)
        with torch.set_grad_enabled(bool(gradients)):
            results = model(*args, **kwargs)
            self.results = mapped(lambda t: t.detach().clone(), results)
            self.inputs = [t.detach().clone() for t in given]
            self.gradients: dict[str, Tensor | None] = {}
            if gradients:
                self._differentiate(model, results, given if gradients == "inputs" else [])
        self.state = copy.deepcopy(model.state_dict())
        # Random numbers drawn: what comes after the call depends on them.
        self.next_random = (torch.rand(()).item(), random.random(), float(np.random.rand()))

    def _differentiate(self, model: nn.Module, results: object, inputs: list[Tensor]) -> None:
        self.differentiable = [
            (path, leaf.requires_grad)
            for path, leaf in leaves(results) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]  # fmt: skip
        model.zero_grad(set_to_none=True)
        loss = sum(
            (leaf * torch.linspace(-1, 1, leaf.numel()).view(leaf.shape)).sum()
            for _, leaf in leaves(results) if isinstance(leaf, Tensor) and leaf.requires_grad
        )  # fmt: skip
        if isinstance(loss, Tensor):
            loss.backward()
        named = [*model.named_parameters(), *((f"input {i}", t) for i, t in enumerate(inputs))]
        self.gradients = {name: t.grad for name, t in named}


@dataclasses.dataclass(frozen=True)
class Library:
    """What is tried: apotfx, or for a test of the test itself copies of the float network."""

    quantize: Callable
    calibrate: Callable
    without_quantizers: Callable
    export: Callable
    load: Callable


@contextlib.contextmanager
def without_quantizers(qmodel: nn.Module) -> Iterator[None]:
    """While active, the layers compute in float."""
    before = [(m, m.weight_quantizer, m.input_quantizer) for m in qmodel.modules() if isinstance(m, QuantLayer)]
    for layer, _, _ in before:
        layer.weight_quantizer = layer.input_quantizer = None
    try:
        yield
    finally:
        for layer, layer.weight_quantizer, layer.input_quantizer in before:
            pass


POLICY = apotfx.BitPolicy((apotfx.Rule(scheme="uniform", weight_bits=8, activation_bits=8),))
APOTFX = Library(
    lambda model, **options: apotfx.quantize(model, POLICY, **options),
    lambda qmodel, inputs: apotfx.calibrate(qmodel, [inputs], method="minmax"),  # the fastest
    without_quantizers,
    apotfx.export_integer,
    apotfx.load_integer,
)
_exported: dict[Path, dict[str, Tensor]] = {}


def _load_copy(path: Path, model: nn.Module, backend: str, **options) -> nn.Module:
    model = copy.deepcopy(model)
    model.load_state_dict(_exported[path])
    return model.requires_grad_(False)


COPIES = Library(
    lambda model, **options: copy.deepcopy(model),
    lambda qmodel, inputs: qmodel,
    contextlib.nullcontext,
    lambda qmodel, path: _exported.__setitem__(path, copy.deepcopy(qmodel.state_dict())),
    _load_copy,
)


class Wrong(Exception):
    """(what was being done, what is wrong)."""


class Unsuited(Exception):
    """The float network itself raises, or is so sensitive that 8 bits say nothing."""


@dataclasses.dataclass
class Verdict:
    """What became of a program: "ok", "refused", "wrong" or "unsuited"."""

    what: str
    stage: str = ""
    reason: str = ""
    refusals: list[str] = dataclasses.field(default_factory=list)  # of parts, such as another batch size


def check(program: "Program", library: Library = APOTFX) -> Verdict:
    examination = _Examination(program, library)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            examination.run()
        except Unsuited as error:
            return Verdict("unsuited", *error.args)
        except Wrong as error:
            return Verdict("wrong", *error.args, examination.refusals)
        except apotfx.ApotfxError as error:
            return Verdict("refused", examination.stage, str(error))
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            mine = [f for f in frames if f.filename != __file__] or frames
            where = f"{Path(mine[-1].filename).name}:{mine[-1].lineno}"
            reason = f"{type(error).__name__} in {where}: {' '.join(str(error).split())[:300]}"
            return Verdict("wrong", examination.stage, reason, examination.refusals)
    return Verdict("ok", refusals=examination.refusals)


class _Examination:
    """Each of its steps raises Wrong; an error of the library is one of its own."""

    def __init__(self, program: "Program", library: Library):
        self.program, self.library = program, library
        self.stage = "float"
        self.refusals: list[str] = []

    def run(self) -> None:
        program, library = self.program, self.library
        try:
            self.model = program.build()
        except Exception as error:
            raise Unsuited("build", f"{type(error).__name__}: {error}") from error
        self.x, self.other = program.inputs(4), program.inputs(3, channels_last=True)
        before = copy.deepcopy(self.model.state_dict())
        self.expect()
        options = {"example_inputs": self.x} if program.with_example else {}

        self.stage = "quantize"
        qmodel = library.quantize(copy.deepcopy(self.model), **options)
        self.stage = "calibrate"
        set_seeds(5)  # as the calls that follow, whose noise may reach further than another
        qmodel = library.calibrate(qmodel, mapped(torch.clone, self.x))
        self.check_state("calibrate", qmodel, before)
        if any(module.training for module in qmodel.modules()):
            raise Wrong(self.stage, "the quantized network is in training mode")
        saved = copy.deepcopy(qmodel.state_dict())

        with library.without_quantizers(qmodel):
            for inputs, expected in ((self.x, self.expected), (self.other, self.expected_other)):
                self.stage = "quantizers off, other batch" if inputs is self.other else "quantizers off"
                qmodel.load_state_dict(saved)
                with self.refusable(inputs is self.other):
                    self.compare(expected, Run(qmodel, inputs, 5), program.same)
                    self.check_state(self.stage, qmodel, expected.state)
        self.stage = "8 bits"
        qmodel.load_state_dict(saved)
        self.compare(self.expected, Run(qmodel, self.x, 5), self.needed)
        qmodel.load_state_dict(saved)
        if self.trained is not None:
            self.check_training(qmodel, saved)
        qmodel.load_state_dict(saved)
        qmodel.eval()
        self.check_reload(qmodel, saved, options)
        if any(not torch.equal(t, before[key]) for key, t in self.model.state_dict().items()):
            raise Wrong("model", "the float model was changed")

    def expect(self) -> None:
        """What the float network gives; rejects those on which 8 bits say nothing."""
        try:
            self.expected = Run(copy.deepcopy(self.model), self.x, 5)
            try:
                self.expected_other = Run(copy.deepcopy(self.model), self.other, 5)
            except RuntimeError:  # a view that this memory format does not have
                self.other = self.program.inputs(3)
                self.expected_other = Run(copy.deepcopy(self.model), self.other, 5)
            with EightBits():
                rounded = Run(copy.deepcopy(self.model), self.x, 5)
        except Exception as error:
            raise Unsuited("float", f"{type(error).__name__}: {error}") from error
        floats = [t for _, t in leaves(self.expected.results) if isinstance(t, Tensor) and t.is_floating_point()]
        if not all(t.isfinite().all() for t in floats):
            raise Unsuited("float", "not finite")
        by_itself = dict(ratios(self.expected.results, rounded.results))
        if min(by_itself.values()) < CLOSE:
            raise Unsuited("float", f"{min(by_itself.values()):.1f} dB when it rounds to 8 bits itself")
        self.needed = {path: min(CLOSE, ratio - SLACK) for path, ratio in by_itself.items()}
        self.trained = None
        for self.gradients in ("inputs", "parameters"):
            model = copy.deepcopy(self.model).train()
            try:
                self.trained = Run(model, self.x, 6, self.gradients)
                with EightBits():
                    rounded = Run(copy.deepcopy(self.model).train(), self.x, 6)
                found = ratios(self.trained.results, rounded.results)
                self.needed_training = {path: min(CLOSE_IN_TRAINING, ratio - SLACK) for path, ratio in found}
                self.frozen = Run(freeze_batch_norms(copy.deepcopy(self.model).train()), self.x, 6)
                break
            except RuntimeError:  # torch cannot differentiate what it writes in place
                self.trained = None

    def compare(self, expected: Run, got: Run, least: float | dict[str, float]) -> None:
        for kind, e, g in (("input", expected.inputs, got.inputs), ("result", expected.results, got.results)):
            if structure(e) != structure(g):
                raise Wrong(self.stage, f"the {kind} has another structure: {structure(g)}, expected {structure(e)}")
        for (path, e), (_, g) in zip(leaves(expected.inputs), leaves(got.inputs), strict=True):
            if decibels(e, g) < SAME:
                raise Wrong(self.stage, f"input: {decibels(e, g):.1f} dB from what the float network leaves in it")
        for path, ratio in ratios(expected.results, got.results):
            if not ratio >= (needed := least[path] if isinstance(least, dict) else least):
                raise Wrong(self.stage, f"{path}: {ratio:.1f} dB from the float network, needed {needed:.1f}")
        # How many numbers some functions draw depends on signs, which 8 bits may change.
        if not isinstance(least, dict) and expected.next_random != got.next_random:
            raise Wrong(self.stage, "draws other random numbers than the float network")

    def check_state(self, stage: str, qmodel: nn.Module, expected: dict[str, Tensor]) -> None:
        """Parameters and buffers are those of the float network; attention is split, what nothing uses may be gone."""
        state = qmodel.state_dict()
        for key, tensor in expected.items():
            if key not in state:
                if "attend" not in key and self.uses(key):
                    raise Wrong(stage, f"state: {key}, which the results depend on, is missing")
            elif decibels(tensor, state[key]) < min(SAME, self.program.same) and not is_rounding(tensor, state[key]):
                ratio = decibels(tensor, state[key])
                raise Wrong(stage, f"state: {key} is {ratio:.1f} dB from that of the float network")

    def uses(self, key: str) -> bool:
        """Whether the results of the float network depend on that parameter or buffer."""
        changed = copy.deepcopy(self.model)
        with torch.no_grad():
            changed.state_dict()[key].add_(1)
        runs = [(self.expected, Run(copy.deepcopy(changed), self.x, 5))]
        if self.trained is not None:
            runs.append((self.trained, Run(changed.train(), self.x, 6, self.gradients)))
        return any(not equal(expected.results, got.results) for expected, got in runs)

    def check_training(self, qmodel: nn.Module, saved: dict[str, Tensor]) -> None:
        qmodel.train()
        with self.library.without_quantizers(qmodel):
            self.stage = "training, quantizers off"
            run = Run(qmodel, self.x, 6, self.gradients)
            self.compare(self.trained, run, self.program.same)
            self.check_state(self.stage, qmodel, self.trained.state)
            if run.differentiable != (expected := self.trained.differentiable):
                raise Wrong(self.stage, f"requires_grad is {run.differentiable}, expected {expected}")
            largest = max((g.norm().item() for g in self.trained.gradients.values() if g is not None), default=0.0)
            for name, expected in self.trained.gradients.items():
                if "attend" in name:
                    continue
                got = run.gradients.get(name)
                e, g = (torch.zeros(()) if t is None else t for t in (expected, got))
                if max(e.norm().item(), g.norm().item()) > 1e-4 * largest and decibels(e, g) < self.program.same - 10:
                    raise Wrong(self.stage, f"gradient of {name}: {decibels(e, g):.1f} dB from the float network")
        if any(isinstance(module, BatchNorm) for module in self.model.modules()):
            self.stage = "training with frozen batch norms, quantizers off"
            qmodel.load_state_dict(saved)
            with self.library.without_quantizers(qmodel):
                self.compare(self.frozen, Run(freeze_batch_norms(qmodel), self.x, 6), self.program.same)
                self.check_state(self.stage, qmodel, self.frozen.state)
            qmodel.train()
        self.stage = "training, 8 bits"
        qmodel.load_state_dict(saved)
        set_seeds(6)
        self.library.calibrate(qmodel, mapped(torch.clone, self.x))
        run = Run(qmodel, self.x, 6, self.gradients)
        self.compare(self.trained, run, self.needed_training)
        for name, gradient in run.gradients.items():
            if gradient is not None and not gradient.isfinite().all():
                raise Wrong(self.stage, f"gradient of {name} is not finite")

    def check_reload(self, qmodel: nn.Module, saved: dict[str, Tensor], options: dict) -> None:
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "export"
            self.stage = "export"
            self.library.export(qmodel, path)
            expected = {}
            qmodel.requires_grad_(False)  # on which torch's own products depend in the last bit
            for inputs in (self.x, self.other):
                qmodel.load_state_dict(saved)
                self.stage = "8 bits, other batch" if inputs is self.other else "8 bits"
                with self.refusable(inputs is self.other):
                    expected[id(inputs)] = Run(qmodel, inputs, 7)
            model = with_other_values(self.model)
            for backend in BACKENDS:
                self.stage = f"load {backend}"
                try:
                    imodel = self.library.load(path, model, backend=backend, **options)
                except apotfx.ApotfxError as error:
                    if backend == "reference":
                        raise
                    if not ("unknown" in str(error) and "backend" in str(error)):
                        self.refusals.append(f"{self.stage}: {error}")
                    continue
                state = copy.deepcopy(imodel.state_dict())
                for inputs in (self.x, self.other):
                    if id(inputs) not in expected:
                        continue
                    self.stage = f"{backend}, other batch" if inputs is self.other else backend
                    imodel.load_state_dict(state)
                    with self.refusable(inputs is self.other):
                        self.check_equal(expected[id(inputs)], Run(imodel, inputs, 7))

    def check_equal(self, expected: Run, got: Run) -> None:
        if structure(expected.results) != structure(got.results):
            found = f"{structure(got.results)}, of the quantized network {structure(expected.results)}"
            raise Wrong(self.stage, f"the structure of the result is {found}")
        if not equal(expected.results, got.results):
            ratio = min(ratio for _, ratio in ratios(expected.results, got.results))
            raise Wrong(self.stage, f"{ratio:.1f} dB from the quantized network instead of equal")
        if not equal(expected.inputs, got.inputs):
            raise Wrong(self.stage, "leaves something else in its input than the quantized network")

    @contextlib.contextmanager
    def refusable(self, allowed: bool) -> Iterator[None]:
        """While active, if `allowed`, an error of the library is noted and the rest goes on."""
        try:
            yield
        except apotfx.ApotfxError as error:
            if not allowed:
                raise
            self.refusals.append(f"{self.stage}: {error}")
