"""The training loop: epochs over batches, validation, checkpoints, and a clean stop."""

import functools
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from apotfx.errors import ApotfxError
from apotfx.layers import QuantLayer
from apotfx.training.augment import Augment, to_device
from apotfx.training.checkpoint import (
    BEST,
    LAST,
    RUNNING,
    load_tensors,
    read_checkpoint,
    save_checkpoint,
)
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, Split, TrainBatches, eval_batches
from apotfx.training.distributed import Processes, synchronize_batch_norms
from apotfx.training.monitor import Monitor, profiler
from apotfx.training.optimization import MovingAverage, lr_factor, parameter_groups
from apotfx.training.randomness import seed_generators
from apotfx.training.recording import Recorded

EVAL_BATCH_SIZE = 1000
MONITORED_IMAGES = 256
STEPS_PER_BAR = 10
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopwatch:
    """Seconds by part of the work. On a GPU, which works on its own, the part that waits for it is charged."""

    def __init__(self, seconds: dict[str, float] | None = None):
        self.seconds = dict(seconds or {})

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - began

    def iterate(self, part: str, items: Iterable) -> Iterator:
        """`items`, with the time that they take to come charged to `part`."""
        items = iter(items)
        while True:
            with self(part):
                item = next(items, None)
            if item is None:
                return
            yield item


class Interrupted(Exception):
    """The user or the system asked the run to stop; the checkpoint in `run_dir` was written."""

    def __init__(self, step: int, run_dir: Path):
        super().__init__(f"step {step}")
        self.run_dir = run_dir


@torch.no_grad()
def evaluate(
    model: nn.Module, split: Split, dataset: Dataset, image_size: int, device: torch.device, processes: Processes
) -> float:
    """Accuracy of `model` in evaluation mode on `split`, in percent."""
    was_training = model.training
    model.eval()
    correct = 0
    for images, labels in eval_batches(
        split, batch_size=EVAL_BATCH_SIZE, mean=dataset.mean, std=dataset.std, image_size=image_size, device=device,
        rank=processes.rank, world_size=processes.world_size,
    ):  # fmt: skip
        correct += (model(images).argmax(1) == labels).sum()
    model.train(was_training)
    return 100 * processes.sum(float(correct), device) / len(split)


class Trainer:
    """Trains `model` in place; everything that a resumed run needs is in `state_dict`.

    Args:
        config: the run's configuration.
        model: the network, on `device`.
        dataset: training images are learned from, validation images choose the best epoch.
        image_size: height and width of the network's input.
        teachers: float networks to distil from, each in its turn of the steps, on `device`.
        device: where to train.
        processes: this process and the others.
        environment: what the bits depend on besides the configuration; goes into the checkpoints.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        dataset: Dataset,
        image_size: int,
        teachers: Sequence[nn.Module],
        device: torch.device,
        processes: Processes,
        environment: Mapping[str, str] | None = None,
    ):
        self.environment = dict(environment or {})
        self.config, self.dataset, self.image_size = config, dataset, image_size
        self.device, self.processes, self.teachers = device, processes, teachers
        self.model = synchronize_batch_norms(model, device) if processes.world_size > 1 else model
        torch.backends.cudnn.deterministic = True  # a resumed run must reach the same bits
        self.recorded = device.type == "cuda" and processes.world_size == 1 and not config.compile
        self.batches = TrainBatches(
            dataset.train, batch_size=config.batch_size, seed=config.seed,
            augment=Augment.named(config.augment, dataset.name), mean=dataset.mean, std=dataset.std,
            image_size=image_size, device=device, rank=processes.rank, world_size=processes.world_size,
            record=self.recorded,
        )  # fmt: skip
        self.optimizer = torch.optim.SGD(
            parameter_groups(self.model, config),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov and config.momentum > 0,
            fused=device.type in ("cpu", "cuda"),
        )
        self.average = MovingAverage(self.model, config.ema) if config.ema else None
        self.network = self.model
        if processes.world_size > 1:
            self.network = DistributedDataParallel(self.network, [device] if device.type == "cuda" else None)
        if config.compile:
            self.network = torch.compile(self.network)
        self.step = 0
        self.seconds = 0.0
        self.clock = Stopwatch()
        self.best = {"val_acc": -1.0, "epoch": 0}
        # Summed on the device, so that a GPU need not be waited for: loss times images, correct answers, images.
        self.running = torch.zeros(len(RUNNING), dtype=torch.float64, device=device)
        # Steps with a loss or a gradient that was not finite, and all steps after them: they change no weight.
        self.held = torch.zeros((), dtype=torch.float32, device=device)
        self.optimizer.found_inf = torch.zeros_like(self.held)
        self.recordings: dict[str, Recorded] = {}

    @property
    def evaluated(self) -> nn.Module:
        """The network that validation, the test and the export use: the moving average where there is one."""
        return self.average.module if self.average else self.model

    @property
    def total_steps(self) -> int:
        return self.config.epochs * len(self.batches)

    def fit(self, run_dir: Path, monitor: Monitor, *, print_freq: int, profile: bool = False) -> None:
        """Train to the end; leaves `checkpoint.pt` (last) and `best.pt` in `run_dir`.

        Raises:
            Interrupted: after SIGINT, SIGTERM or SIGHUP; `checkpoint.pt` holds the step that was reached.
            ApotfxError: the loss or the gradient became NaN or infinite; the last checkpoint stays.
        """
        steps = len(self.batches)
        tracing = profiler(run_dir) if profile and self.processes.is_main else nullcontext()
        with _stop_requests() as stop_requested, tracing as trace:
            while self.step < self.total_steps:
                epoch, start = divmod(self.step, steps)
                began = time.perf_counter()
                progress = _progress(epoch, self.config.epochs, start, steps, print_freq, self.processes.is_main)
                self.network.train()
                for images, labels in self.clock.iterate("data", self.batches.epoch(epoch, start)):
                    self._train_step(images, labels)
                    if trace is not None:
                        trace.step()
                    progress(self.step - epoch * steps, self._running_metrics)
                    if self._agree(stop_requested()):
                        self._require_finite()
                        self.seconds += time.perf_counter() - began
                        self.save(run_dir)
                        raise Interrupted(self.step, run_dir)
                self._require_finite()
                self._end_epoch(epoch, run_dir, monitor, began)

    def _train_step(self, images: Tensor, labels: Tensor) -> None:
        rates = self._rates()
        if self.device.type == "cuda":
            rates = to_device(torch.tensor(rates, dtype=torch.float32), self.device)
        targets = self._targets(images)
        self._seed("student")
        self._replayed("update", self._update)(images, labels, rates, *targets)
        self.step += 1
        if self.device.type == "cpu":
            self._require_finite()

    def _replayed(self, name: str, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """`function`, whose parts a replay runs as one, from its recording, where there is one of that name."""
        if not self.recorded:
            return function
        if name not in self.recordings:
            self.recordings[name] = Recorded(function, functools.partial(self.clock, "training step"))
        return self.recordings[name]

    def _targets(self, images: Tensor) -> list[Tensor]:
        """What the teacher whose turn it is says of the images, [B, classes]; nothing without teachers."""
        if not self.teachers:
            return []
        self._seed("teacher")
        turn = self.step % len(self.teachers)
        teach = functools.partial(self._soft_labels, self.teachers[turn])
        return [self._replayed(f"teacher {turn}", teach)(images)]

    def _seed(self, network: str) -> None:
        """Let what `network` draws next, such as a dropout's mask, depend on the run's seed, the step and this process."""
        seed_generators(self.device, network, self.config.seed, self.step, self.processes.rank)

    def _rates(self) -> list[float]:
        """The learning rates of the optimizer's groups in this step and, where there is one, the average's weight."""
        factor = self.config.lr * lr_factor(self.config.schedule, self.step / self.total_steps)
        rates = [factor * group["lr_factor"] for group in self.optimizer.param_groups]
        return [*rates, self.average.next_weight()] if self.average else rates

    def _update(
        self, images: Tensor, labels: Tensor, rates: Sequence[float] | Tensor, target: Tensor | None = None
    ) -> Tensor:
        """A step on a batch, by `_rates`; returns the loss. Waits for nothing on the device, to be recorded."""
        logits, loss = self._compute_gradients(images, labels, target)
        with self.clock("optimizer"):
            finite = torch.isfinite(loss + _norm_of_gradients(self.model))
            self.held += torch.logical_or(self.held, ~finite)
            torch.clamp(self.held, max=1, out=self.optimizer.found_inf)  # by which it leaves the weights alone
            *lrs, weight = rates if self.average else [*rates, None]
            for group, lr in zip(self.optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr
            self.optimizer.step()
            if self.average:
                self.average.average_in(weight)
            correct = (logits.argmax(1) == labels).sum()
            counts = loss.double() * len(labels), correct.double(), torch.full_like(loss, len(labels)).double()
            self.running += torch.stack(counts)
        return loss

    def _compute_gradients(self, images: Tensor, labels: Tensor, target: Tensor | None) -> tuple[Tensor, Tensor]:
        """(the logits, the loss), both detached."""
        with self.clock("forward"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            logits = self.network(images).float()
            loss = self._loss(logits, labels, target)
        with self.clock("backward"):
            self.optimizer.zero_grad()
            loss.backward()
        return logits.detach(), loss.detach()

    @torch.no_grad()
    def _soft_labels(self, teacher: nn.Module, images: Tensor) -> Tensor:
        """The logarithms of a teacher's probabilities, at the temperature."""
        with self.clock("teacher"), torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.amp):
            return F.log_softmax(teacher(images).float() / self.config.temperature, 1)

    def _loss(self, logits: Tensor, labels: Tensor, target: Tensor | None) -> Tensor:
        """Cross-entropy and, with a teacher's `_soft_labels`, distillation."""
        loss = F.cross_entropy(logits, labels, label_smoothing=self.config.label_smoothing)
        if target is None:
            return loss
        # Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015, arXiv 1503.02531, section 2.
        # The gradient is linear in the teacher's probabilities: in turn, teachers teach the mean of theirs.
        t = self.config.temperature
        distillation = F.kl_div(F.log_softmax(logits / t, 1), target, reduction="batchmean", log_target=True) * t * t
        return torch.lerp(loss, distillation, self.config.teacher_weight)

    def _require_finite(self) -> None:
        """Raises: ApotfxError: the training has diverged, which a GPU is not asked after each step."""
        held = int(self.held)
        if not held:
            return
        self.step -= held  # whose batch a GPU has left behind, but not its weights
        images, labels = next(self.batches.epoch(*divmod(self.step, len(self.batches))))
        if self.device.type == "cuda":
            targets = self._targets(images) or [None]
            self._seed("student")
            self._compute_gradients(images, labels, *targets)
        self._seed("student")
        where = first_non_finite(self.model, images)
        raise ApotfxError(
            f"training diverged at step {self.step}: the first value that is not finite is {where}; "
            f"the last good checkpoint was kept; lower --lr (now {self.config.lr}) or change --seed"
        )

    def _end_epoch(self, epoch: int, run_dir: Path, monitor: Monitor, began: float) -> None:
        train = self._running_metrics()
        self.running.zero_()
        if self.average:
            self.average.copy_others()
        with self.clock("evaluation"):
            val_acc = evaluate(
                self.evaluated, self.dataset.val, self.dataset, self.image_size, self.device, self.processes
            )
        if val_acc >= self.best["val_acc"]:  # of equals the later one, which has trained longer
            self.best = {"val_acc": val_acc, "epoch": epoch + 1}
        with self.clock("logging"):
            monitor.layers(self.evaluated, self._monitored_images(), self.step)
        lr = float(self.optimizer.param_groups[0]["lr"])
        seconds = time.perf_counter() - began
        self.seconds += seconds
        monitor.scalars(
            self.step,
            {
                "train/loss": train["loss"],
                "train/accuracy": train["accuracy"],
                "train/lr": lr,
                "val/accuracy": val_acc,
                "time/seconds_per_epoch": seconds,
            },
        )
        self.save(run_dir)
        self.save_best(run_dir)
        if self.processes.is_main:
            tqdm.write(
                f"epoch {epoch + 1:>{len(str(self.config.epochs))}}/{self.config.epochs}  loss {train['loss']:.4f}  "
                f"train {train['accuracy']:.2f}%  val {val_acc:.2f}%  lr {lr:.4f}  {seconds:.1f} s",
                file=sys.stdout,
            )
            sys.stdout.flush()

    def _monitored_images(self) -> Tensor:
        some = Split(self.dataset.val.images[:MONITORED_IMAGES], self.dataset.val.labels[:MONITORED_IMAGES])
        batches = eval_batches(
            some, batch_size=MONITORED_IMAGES, mean=self.dataset.mean, std=self.dataset.std, image_size=self.image_size,
            device=self.device,
        )  # fmt: skip
        return next(batches)[0]

    def _running_metrics(self) -> dict[str, float]:
        loss, correct, images = self.running.tolist()
        return {"loss": loss / max(images, 1), "accuracy": 100 * correct / max(images, 1)}

    def _agree(self, stop: bool) -> bool:
        """Whether any process was asked to stop: all must leave at the same step."""
        return self.processes.sum(float(stop), self.device) > 0

    def _identity(self) -> dict:
        return {
            "config": asdict(self.config),
            "policy": self.config.bit_policy().to_dict(),
            "dataset": {"name": self.dataset.name, "num_classes": self.dataset.num_classes},
            "made_with": self.environment,
            "best": self.best,
        }

    def save(self, run_dir: Path) -> None:
        """Write `checkpoint.pt`, on the main process."""
        if self.processes.is_main:
            with self.clock("saving"):
                save_checkpoint(run_dir / LAST, self._identity() | self.state_dict())

    def save_best(self, run_dir: Path) -> None:
        """Write `best.pt`, on the main process, if the epoch that has just ended is the best.

        After the checkpoint, which then holds the same weights, so that a kill between the two costs nothing.
        """
        if self.processes.is_main and self._has_just_ended(self.best["epoch"]):
            with self.clock("saving"):
                save_checkpoint(run_dir / BEST, self._identity() | {"model": self.evaluated.state_dict()})

    def _has_just_ended(self, epoch: int) -> bool:
        return epoch > 0 and self.step == epoch * len(self.batches)

    def require_best(self, run_dir: Path) -> None:
        """See to it that `best.pt` is of the epoch that this training, continued from its checkpoint, says.

        Raises:
            ApotfxError: it is missing, or of another epoch or training.
        """
        if not self.best["epoch"] or not self.processes.is_main:
            return
        path = run_dir / BEST
        found = read_checkpoint(path) if path.exists() else None
        others = None if found is None or found.config is None else replace(found.config, engine=self.config.engine)
        if found is None or found.best != self.best or others != self.config:
            if not self._has_just_ended(self.best["epoch"]):
                what = "is missing" if found is None else "is of another epoch or training"
                raise ApotfxError(f"{path}: {what}, {LAST} beside it says epoch {self.best['epoch']}; put it back")
            self.save_best(run_dir)

    def state_dict(self) -> dict:
        """What goes on with this training: dicts of tensors, and JSON."""
        if self.average:
            self.average.copy_others()
        return {
            "model": self.model.state_dict(),
            "ema": self.average.module.state_dict() if self.average else None,
            "ema_count": int(self.average.n_averaged) if self.average else 0,
            "momentum": {
                name: self.optimizer.state[parameter]["momentum_buffer"]
                for name, parameter in self._parameters().items()
                if self.optimizer.state.get(parameter, {}).get("momentum_buffer") is not None
            },
            "step": self.step,
            "seconds": self.seconds,
            "clock": self.clock.seconds,
            "best": self.best,
            "running": dict(zip(RUNNING, self.running.tolist(), strict=True)),
        }

    def _parameters(self) -> dict[str, nn.Parameter]:
        """Those that are trained, by name, in the optimizer's order."""
        names = {parameter: name for name, parameter in self.model.named_parameters()}
        return {names[parameter]: parameter for group in self.optimizer.param_groups for parameter in group["params"]}

    def load_state_dict(self, state: dict, source: str = "state") -> None:
        """The inverse of `state_dict`.

        Args:
            state: what `read_checkpoint` found.

        Raises:
            ApotfxError: it is of another network or another training; names `source`.
        """
        self.recordings.clear()  # which hold the optimizer's tensors
        if state["step"] > self.total_steps:
            raise ApotfxError(f"{source}: is at step {state['step']} of {self.total_steps}; it is of another training")
        load_tensors(self.model, state["model"], source)
        if self.average:
            load_tensors(self.average.module, state["ema"], source)
            self.average.n_averaged.fill_(state["ema_count"])
        self._load_momentum(state["momentum"], source)
        self.clock.seconds = dict(state["clock"])
        self.step, self.seconds, self.best = state["step"], state["seconds"], dict(state["best"])
        self.running.copy_(torch.tensor([state["running"][name] for name in RUNNING], dtype=torch.float64))

    def _load_momentum(self, buffers: dict[str | int, Tensor], source: str) -> None:
        parameters = self._parameters()
        names = list(parameters)
        # Checkpoints of version 1 count.
        buffers = {names[k] if isinstance(k, int) and 0 <= k < len(names) else k: v for k, v in buffers.items()}
        for name, buffer in buffers.items():
            parameter = parameters.get(name)
            if parameter is None or buffer.shape != parameter.shape or buffer.dtype != parameter.dtype:
                raise ApotfxError(f"{source}: the momentum of {name} does not fit; it is of another network")
        self.optimizer.state.clear()
        for name, buffer in buffers.items():
            # In the parameter's memory format, as the fused optimizer makes it.
            momentum = torch.empty_like(parameters[name], requires_grad=False).copy_(buffer)
            self.optimizer.state[parameters[name]]["momentum_buffer"] = momentum


@torch.no_grad()
def first_non_finite(model: nn.Module, images: Tensor) -> str:
    """What is first NaN or infinite in a forward pass of `model`: an image, a parameter, an output, a gradient."""
    if not images.isfinite().all():
        return "in the input images"
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            return f"parameter {name}"
    found: list[str] = []

    def check(name: str, module: nn.Module, args: tuple, output: object) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"the output of {name}")

    hooks = [
        module.register_forward_hook(functools.partial(check, name))
        for name, module in model.named_modules()
        if isinstance(module, QuantLayer) or not list(module.children())
    ]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    for name, parameter in reversed(list(model.named_parameters())):
        if not found and parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name}")
    if not found and not _norm_of_gradients(model).isfinite():
        return "the norm of the gradients, each of which is finite"
    return found[0] if found else "the loss"


def _norm_of_gradients(model: nn.Module) -> Tensor:
    return torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """While active, `STOP_SIGNALS` only set a flag; yields what reads it. A second one acts at once."""
    received = []

    def handle(number: int, frame: object) -> None:
        received.append(number)
        signal.signal(number, previous[number])

    previous = {number: signal.getsignal(number) or signal.SIG_DFL for number in STOP_SIGNALS}
    heeded = [number for number, handler in previous.items() if handler != signal.SIG_IGN]  # nohup ignores SIGHUP
    for number in heeded:
        signal.signal(number, handle)
    try:
        yield lambda: bool(received)
    finally:
        for number in heeded:
            signal.signal(number, previous[number])


def _progress(
    epoch: int, epochs: int, start: int, steps: int, print_freq: int, enabled: bool
) -> Callable[[int, Callable[[], dict[str, float]]], None]:
    """A function to call after each step: a bar on a terminal, a line every `print_freq` steps elsewhere.

    It calls its second argument for the metrics, which a GPU must finish its work for, only when it shows them.
    """
    if not enabled:
        return lambda step, metrics: None
    if sys.stdout.isatty():
        bar = tqdm(total=steps, initial=start, desc=f"epoch {epoch + 1}/{epochs}", leave=False, file=sys.stdout)

        def advance(step: int, metrics: Callable[[], dict[str, float]]) -> None:
            if step % STEPS_PER_BAR == 0 or step == steps:
                now = metrics()
                bar.set_postfix(loss=f"{now['loss']:.4f}", acc=f"{now['accuracy']:.2f}%", refresh=False)
            bar.update()
            if step == steps:
                bar.close()

        return advance

    def line(step: int, metrics: Callable[[], dict[str, float]]) -> None:
        if step % print_freq == 0 and step < steps:
            now = metrics()
            print(
                f"epoch {epoch + 1} step {step}/{steps}  loss {now['loss']:.4f}  train {now['accuracy']:.2f}%",
                flush=True,
            )

    return line
