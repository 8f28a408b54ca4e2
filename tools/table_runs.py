"""The runs of a table: what each is, what it is trained with, and how several run at once."""

import argparse
import fcntl
import math
import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import train
import yaml
from arguments import usable_cores

from apotfx.errors import ApotfxError
from apotfx.files import read_file, write_atomic
from apotfx.policy import FLOAT_BITS, MAX_YAML_BYTES, BitPolicy, parse_yaml
from apotfx.tensors import parse_json
from apotfx.training.config import TrainConfig
from apotfx.training.recipes import RECIPES, best
from apotfx.training.run import run_path

FLOAT = "float"
SPLITS = ("test", "train", "val")
TOOL = Path(train.__file__).resolve()


@dataclass(frozen=True)
class Ablation:
    """The best recipe without one of its parts.

    Attributes:
        flags: of `tools/train.py`, which take the part out.
        policy: makes the policy from the recipe's; None to keep that.
        without: "teachers" or "lowering", if one of these is the part. Without lowering a run has as many epochs as
            the runs of lowering have in all.
    """

    flags: tuple[str, ...] = ()
    policy: Callable[[BitPolicy], BitPolicy] | None = None
    without: str = ""


def _everywhere(**settings: object) -> Callable[[BitPolicy], BitPolicy]:
    return lambda policy: BitPolicy(tuple(replace(rule, **settings) for rule in policy.rules))


ABLATIONS = {
    "best-no-distillation": Ablation(without="teachers"),
    "best-no-lowering": Ablation(without="lowering"),
    "best-no-normalization": Ablation(policy=_everywhere(normalization="none")),
    "best-fixed-clips": Ablation(flags=("--clip-lr", "0")),
    "best-no-ema": Ablation(flags=("--ema", "0")),
    "best-same-bits": Ablation(policy=lambda policy: BitPolicy(policy.rules[-1:])),
    "best-per-channel": Ablation(policy=_everywhere(granularity="channel")),
}


@dataclass(frozen=True)
class Run:
    """One training. A row of the table is what the runs that differ in their seed alone reach.

    Attributes:
        arch: as `tools/train.py` takes it.
        scheme: "apot", "pot" or "uniform"; "float" at 32 bits.
        bits: 2 to 8, or 32.
        recipe: a key of `RECIPES` or of `ABLATIONS`.
        seed: of the training.
    """

    arch: str
    scheme: str
    bits: int
    recipe: str
    seed: int

    @property
    def name(self) -> str:
        """Of its directory in the table's."""
        precision = self.scheme if self.bits == FLOAT_BITS else f"{self.scheme}{self.bits}"
        return f"{self.recipe}/{self.arch.replace('/', '-')}-{precision}-s{self.seed}"

    @property
    def ablation(self) -> Ablation:
        return ABLATIONS.get(self.recipe, Ablation())

    @property
    def policy(self) -> BitPolicy | None:
        """Of an ablation that changes it; None for the recipe's."""
        change = self.ablation.policy
        return None if change is None or self.bits == FLOAT_BITS else change(BitPolicy.default(self.bits, self.scheme))

    @property
    def pretrained(self) -> "Run | None":
        """The run whose weights this one starts from, if any: with the best recipe the next higher bits, or float."""
        if self.recipe in RECIPES and self.recipe != "best":
            return None
        if not self.higher_bits or self.ablation.without == "lowering":
            return Run(self.arch, FLOAT, FLOAT_BITS, best.START, self.seed)
        return replace(self, bits=min(self.higher_bits))

    @property
    def higher_bits(self) -> list[int]:
        """That the best recipe lowers from."""
        return [bits for bits in best.LOWERING if bits > self.bits]

    @property
    def teachers(self) -> tuple["Run", ...]:
        """The float runs whose outputs this one learns, if any."""
        if self.pretrained is None or self.ablation.without == "teachers":
            return ()
        return tuple(Run(arch, FLOAT, FLOAT_BITS, best.START, seed) for arch, seed in best.TEACHERS)

    @property
    def needs(self) -> tuple["Run", ...]:
        """The runs that must be finished before this one."""
        return (*([self.pretrained] if self.pretrained else []), *self.teachers)


def with_needed(runs: Iterable[Run]) -> list[Run]:
    """`runs` and all that they need, in an order in which they can run."""
    ordered: dict[Run, None] = {}

    def add(run: Run) -> None:
        if run not in ordered:
            for needed in run.needs:
                add(needed)
            ordered[run] = None

    for run in runs:
        add(run)
    return list(ordered)


def parse_flags(flags: list[str]) -> argparse.Namespace:
    """What `flags` of `tools/train.py` say. Raises: ApotfxError: they are not such flags."""
    parser = train.make_parser()

    def fail(message: str):
        raise ApotfxError(f"-- {shlex.join(flags)}: {message}; see python tools/train.py --help")

    parser.error = fail
    return parser.parse_args(flags)


def read_config(run_dir: Path) -> dict:
    """What `config.yaml` says. Raises: ApotfxError: it is missing or damaged."""

    def parse(text: bytes) -> dict:
        content = parse_yaml(text)
        arguments = TrainConfig.from_dict(content["arguments"], "arguments")
        return content | {"arguments": asdict(arguments), "policy": content["policy"]}

    return _read(run_dir / "config.yaml", parse)


def settings_of(config: dict) -> dict:
    """The arguments and the policy that `read_config` found."""
    return config["arguments"] | {"policy": config["policy"]}


def differing(a: dict, b: dict) -> list[str]:
    """The settings in which two runs differ. A data set that is not named yet differs from none."""
    return [key for key in a if a[key] != b[key] and not (key == "dataset" and None in (a[key], b[key]))]


def read_result(run_dir: Path) -> dict:
    """What `result.json` says. Raises: ApotfxError: it is damaged."""

    def parse(text: bytes) -> dict:
        content = parse_json(text)
        for key in (f"{weights}{split}_acc" for weights in ("", "last_") for split in SPLITS):
            if not math.isfinite(content[key]):
                raise ValueError(f"{key} is {content[key]}")
        if type(content["seed"]) is not int:
            raise ValueError(f"seed is {content['seed']}")
        return content | {key: content[key] for key in ("best_epoch", "integer_test_acc", "seconds")}

    return _read(run_dir / "result.json", parse)


def _read(path: Path, parse: Callable[[bytes], dict]) -> dict:
    fix = f"put it back, or delete {path.parent} to train it again"
    try:
        content = read_file(path, max_bytes=MAX_YAML_BYTES)
    except ApotfxError as error:
        raise ApotfxError(f"{error}; {fix}") from None
    try:
        return parse(content)
    except KeyError as error:
        problem = f"has no {error.args[0]}"
    except (ValueError, TypeError, OverflowError) as error:
        problem = str(error).splitlines()[0]
    raise ApotfxError(f"{path}: cannot be read ({problem}); {fix}")


class TableDirectory:
    """The directory `runs/<name>` with a directory per run, which says by what it holds how far the run has come.

    Args:
        name: of the directory.
        flags: of `tools/train.py`, for all runs.
    """

    def __init__(self, name: str, flags: Sequence[str] = ()):
        self.name, self.flags = name, list(flags)
        self.path = run_path(name)

    def run_dir(self, run: Run) -> Path:
        return self.path / run.name

    def log(self, run: Run) -> Path:
        """What the run printed."""
        return self.path / "logs" / f"{run.name.replace('/', '-')}.log"

    def is_finished(self, run: Run) -> bool:
        return (self.run_dir(run) / "result.json").is_file()

    def is_started(self, run: Run) -> bool:
        """Whether there is something to continue."""
        return (self.run_dir(run) / "checkpoint.pt").is_file()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Raises: ApotfxError: another process works on this table."""
        (self.path / "logs").mkdir(parents=True, exist_ok=True)
        with open(self.path / "logs" / "lock", "w") as file:
            # Runs inherit the lock: they may go on when the table is killed.
            os.set_inheritable(file.fileno(), True)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise ApotfxError(f"{self.path}: another table.py works on it; wait, or pass another --name") from None
            yield

    def policy_path(self, run: Run) -> Path:
        """Of the policy of an ablation."""
        return self.path / run.recipe / f"{run.scheme}{run.bits}.yaml"

    def new_flags(self, run: Run) -> list[str]:
        """The flags of `tools/train.py` for a fresh start of `run`."""
        recipe = "best" if run.recipe in ABLATIONS else run.recipe
        flags = ["--arch", run.arch, "--bit", str(run.bits), "--recipe", recipe]
        if run.scheme != FLOAT:
            flags += ["--scheme", run.scheme]
        # The last weights, not best.pt: by validation the best epoch may be an early one, by chance.
        if run.pretrained is not None:
            flags += ["--pretrained", str(self.run_dir(run.pretrained) / "checkpoint.pt")]
        for teacher in run.teachers:
            flags += ["--teacher", str(self.run_dir(teacher) / "checkpoint.pt")]
        if run.policy is not None:
            flags += ["--policy", str(self.policy_path(run))]
        flags += [*self.flags, *run.ablation.flags]
        if run.ablation.without == "lowering":
            epochs = train.make_config(train.explicit_settings(parse_flags(flags))).epochs
            flags += ["--epochs", str(epochs * (1 + len(run.higher_bits)))]
        return [*flags, "--seed", str(run.seed), "--name", f"{self.name}/{run.name}"]

    def flags_now(self, run: Run) -> list[str]:
        """The flags of `tools/train.py` that start `run`, or continue it where it was stopped."""
        if self.is_started(run):
            return ["--resume", str(self.run_dir(run)), *self.flags, *run.ablation.flags]
        return self.new_flags(run)

    def prepare(self, run: Run) -> None:
        """Lay ready what `flags_now` names.

        Raises:
            ApotfxError: the weights of a run that this one needs are missing.
        """
        if self.is_started(run):
            return
        self.require_weights(run)
        if run.policy is not None:
            path = self.policy_path(run)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, yaml.safe_dump(run.policy.to_dict(), sort_keys=False).encode())

    def require_weights(self, run: Run) -> None:
        """Raises: ApotfxError: the weights of a finished run that `run` needs are missing."""
        for needed in run.needs:
            path = self.run_dir(needed) / "checkpoint.pt"
            if self.is_finished(needed) and not path.is_file():
                raise ApotfxError(
                    f"{run.name}: needs {path}, which is missing although that run is finished; put the file back, or "
                    f"delete {path.parent} to train it again"
                )

    def settings(self, run: Run) -> dict:
        """What `run` is to be trained with, as `settings_of` gives it of one that was; the data set may be None."""
        args = parse_flags(self.new_flags(run))
        vars(args).pop("policy", None)
        config = train.make_config(train.explicit_settings(args))
        return asdict(config) | {"policy": (run.policy or config.bit_policy()).to_dict()}

    def require_same(self, run: Run) -> None:
        """Raises: ApotfxError: `run`, which was finished or stopped, had other settings than these."""
        had, wanted = settings_of(read_config(self.run_dir(run))), self.settings(run)
        for key in differing(had, wanted):
            what = f"--{key.replace('_', '-')} {had[key]}, this table asks for {wanted[key]}"
            raise ApotfxError(
                f"{self.run_dir(run)}: was trained with {'another policy' if key == 'policy' else what}; "
                f"pass another --name, or delete {self.run_dir(run)} to train it again"
            )


class Executor(Protocol):
    """Runs commands, `at_once` of them; the future of one holds its exit code."""

    at_once: float

    def submit(self, command: list[str], log: Path) -> "Future[int]": ...

    def stop(self) -> None:
        """End the commands that run."""


def start_command(command: list[str], log: str, directory: str, environment: dict[str, str]) -> subprocess.Popen:
    """`command`, started in `directory` with its output appended to `log`."""
    with open(Path(directory, log), "a") as file:
        return subprocess.Popen(
            command, cwd=directory, stdout=file, stderr=subprocess.STDOUT, env=os.environ | environment,
            start_new_session=True, close_fds=False,
        )  # fmt: skip


class LocalExecutor:
    """On this machine: `jobs` at once, or `jobs` on each of its GPUs; the cores are divided among them."""

    def __init__(self, jobs: int | None):
        cores = usable_cores()
        gpus = list(map(str, range(torch.cuda.device_count())))
        if gpus and os.environ.get("CUDA_VISIBLE_DEVICES"):  # of which the first unknown one ends the list
            gpus = os.environ["CUDA_VISIBLE_DEVICES"].split(",")[: len(gpus)]
        jobs = jobs or (1 if gpus else cores)
        places = [{"CUDA_VISIBLE_DEVICES": gpu} for _ in range(jobs) for gpu in gpus] or [{}] * jobs
        threads = {"OMP_NUM_THREADS": str(max(1, cores // len(places)))}
        self.places: queue.SimpleQueue[dict[str, str]] = queue.SimpleQueue()
        for place in places:
            self.places.put(place | threads)
        self.at_once = len(places)
        self.pool = ThreadPoolExecutor(self.at_once)
        self.processes: list[subprocess.Popen] = []
        self.starting = threading.Lock()
        self.stopping = False

    def submit(self, command: list[str], log: Path) -> "Future[int]":
        return self.pool.submit(self._run, command, log)

    def _run(self, command: list[str], log: Path) -> int:
        place = self.places.get()
        try:
            with self.starting:
                if self.stopping:
                    return -signal.SIGINT
                process = start_command(command, str(log), os.getcwd(), place)
                self.processes.append(process)
            return process.wait()
        finally:
            self.places.put(place)

    def stop(self) -> None:
        """End the trainings, which write their checkpoints first."""
        self.pool.shutdown(wait=False, cancel_futures=True)
        with self.starting:
            self.stopping = True
        for process in self.processes:
            process.send_signal(signal.SIGINT)
        self.pool.shutdown(wait=True)


class RayExecutor:
    """On a Ray cluster whose machines share this directory and have this environment: `jobs` on each machine or GPU.

    Args:
        address: of the cluster, as `ray.init` takes it; "local" starts one on this machine.
        jobs: how many share a GPU, or the cores of a machine as large as this one.
    """

    at_once = math.inf  # the cluster decides

    def __init__(self, address: str, jobs: int | None):
        try:
            import ray
        except ImportError:
            raise ApotfxError("--address: needs Ray; pip install 'apotfx[ray]', or leave the flag out") from None
        self.ray = ray
        _require_reachable(address)
        cores = usable_cores()
        try:
            ray.init(address=address, num_cpus=cores if address == "local" else None, log_to_driver=False,
                     include_dashboard=False if address == "local" else None)  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise ApotfxError(f"--address {address}: cannot be reached ({str(error).splitlines()[0]})") from None
        if ray.cluster_resources().get("GPU"):
            share, threads = {"num_gpus": 1 / (jobs or 1)}, 1
        else:
            threads = max(1, cores // (jobs or cores))
            share = {"num_cpus": threads}
        self.environment = {"OMP_NUM_THREADS": str(threads)}
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])

        def run_command(command: list[str], *args) -> int:
            return start_command(command, *args).wait()

        self.task = ray.remote(max_retries=0, **share)(run_command)

    def submit(self, command: list[str], log: Path) -> "Future[int]":
        return self.task.remote(command, str(log), os.getcwd(), self.environment).future()

    def stop(self) -> None:
        """End the trainings at once; each goes on from its last epoch when it is continued."""
        self.ray.shutdown()


def _require_reachable(address: str, seconds: float = 10) -> None:
    """Raises: ApotfxError: nothing answers at HOST:PORT, for which Ray would wait for a quarter of an hour."""
    found = re.fullmatch(r"(?:\w+://)?\[?([^/]+?)\]?:(\d+)", address)
    if found:
        try:
            socket.create_connection((found[1], int(found[2])), timeout=seconds).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise ApotfxError(f"--address {address}: cannot be reached ({error}); is the cluster up?") from None


def execute(runs: Iterable[Run], table: TableDirectory, executor: Executor) -> Iterator[tuple[Run, str | None]]:
    """Train `runs`, which are in an order in which they can run; yields each as it ends, with what went wrong or None.

    Of the runs that can start, the first is started. A run whose needed ones failed fails too. What is stopped by an
    exception here goes on from its checkpoint when it is trained again.
    """
    waiting = list(runs)
    unfinished, failed = set(waiting), set()
    futures: dict[Future[int], Run] = {}
    try:
        while waiting or futures:
            for run in list(waiting):
                broken = [needed for needed in run.needs if needed in failed]
                if broken:
                    waiting.remove(run)
                    failed.add(run)
                    yield run, f"{broken[0].name} failed"
                elif len(futures) < executor.at_once and not unfinished.intersection(run.needs):
                    waiting.remove(run)
                    table.prepare(run)
                    command = [sys.executable, os.path.relpath(TOOL), *table.flags_now(run)]
                    futures[executor.submit(command, table.log(run))] = run
            for future in wait(futures, return_when=FIRST_COMPLETED).done if futures else ():
                run = futures.pop(future)
                failure = _failure(future, table.log(run))
                if not failure and not table.is_finished(run):
                    failure = f"ended without {table.run_dir(run) / 'result.json'}"
                (failed.add if failure else unfinished.discard)(run)
                yield run, failure
    except BaseException:
        executor.stop()
        raise


def _failure(future: "Future[int]", log: Path) -> str | None:
    try:
        code = future.result()
    except Exception as error:  # whatever a cluster has to say of a machine that it lost
        lines = [line for line in str(error).splitlines() if line.strip()]
        return lines[-1].strip() if lines else type(error).__name__  # Ray's begins with the worker's traceback
    if code == 0:
        return None
    lines = log.read_text(errors="replace").split("\n") if log.is_file() else []
    last = next((line for line in reversed(lines) if line.strip()), "it printed nothing")
    return f"exit code {code}: {last} ({log})"
