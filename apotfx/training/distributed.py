"""Training on several processes, as torchrun starts them."""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_functional
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from apotfx.errors import ApotfxError
from apotfx.reproducible import SyncBatchNorm, evaluate_batch_norm

Value = TypeVar("Value")
_TRANSPORT = re.compile(r"gloo|nccl|connection|socket|peer|timed out|timeout", re.IGNORECASE)


class Processes:
    """The processes of a run: one, unless torchrun started more.

    Attributes:
        rank: index of this one; only rank 0 writes.
        world_size: how many there are.
        local_rank: index on this machine, and of this one's GPU.
    """

    def __init__(self, device_type: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if self.world_size > 1:
            with self.together():
                dist.init_process_group("nccl" if device_type == "cuda" else "gloo")

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, value: float, device: torch.device) -> float:
        """The sum of every process's value."""
        if self.world_size == 1:
            return value
        total = torch.tensor(value, dtype=torch.float64, device=device)
        dist.all_reduce(total)
        return total.item()

    def broadcast(self, value: object) -> object:
        """Rank 0's value, on every process."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_main(self, function: Callable[[], Value]) -> Value:
        """What `function` returns on rank 0, or the user's mistake that it raises there, on every process."""
        outcome = None
        if self.is_main:
            try:
                outcome = function(), None
            except (ApotfxError, OSError) as error:
                outcome = None, error
        value, error = self.broadcast(outcome)
        if error is not None:
            raise error
        return value

    @contextmanager
    def together(self) -> Iterator[None]:
        """Around what all processes do.

        Raises:
            ApotfxError: another process has ended, so that this one waits in vain.
        """
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not (isinstance(error, dist.DistError) or _TRANSPORT.search(str(error))):
                raise
            raise ApotfxError(
                f"process {self.rank} of {self.world_size}: another one has ended; continue the run with --resume"
            ) from error

    def wait(self) -> None:
        """Until every process has come here."""
        if self.world_size > 1:
            dist.barrier()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Rank 0 runs the block before all others."""
        if not self.is_main:
            self.wait()
        yield
        if self.is_main:
            self.wait()

    def close(self) -> None:
        # gloo's own end may wait for ever for a process that has left (seen with torch 2.6); it has nothing to free.
        if self.world_size > 1 and dist.get_backend() == "nccl":
            dist.destroy_process_group()


def leave(exit_code: int) -> NoReturn:
    """End this process; one of several without the end of Python.

    During that, a thread of gloo's that gives back the tensors of the last collective aborts the process: it asks for
    the lock of an interpreter that is gone (torch 2.14).
    """
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)


class CpuSyncBatchNorm(_BatchNorm):
    """Batch norm over the batches of all processes, on the CPU, where torch's SyncBatchNorm does not run."""

    def _check_input_dim(self, x: Tensor) -> None:
        """Any number of dimensions will do."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return evaluate_batch_norm(self, x) if self.track_running_stats else super().forward(x)
        dims = [d for d in range(x.dim()) if d != 1]
        shape = (1, -1) + (1,) * (x.dim() - 2)
        total = x.numel() // x.shape[1] * dist.get_world_size()  # every process has an equal share of the batch
        mean = dist_functional.all_reduce(x.sum(dims)) / total
        x = x - mean.view(shape)
        var = dist_functional.all_reduce(x.square().sum(dims)) / total
        if self.track_running_stats:
            with torch.no_grad():
                self.num_batches_tracked += 1
                rate = self.momentum if self.momentum is not None else 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, rate)
                self.running_var.lerp_(var * (total / (total - 1)), rate)
        x = x * (var + self.eps).rsqrt().view(shape)
        return x if not self.affine else x * self.weight.view(shape) + self.bias.view(shape)


def synchronize_batch_norms(model: nn.Module, device: torch.device) -> nn.Module:
    """`model` with batch norms that use the statistics of all processes' batches; it is changed in place."""
    if device.type != "cpu":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if isinstance(module, nn.SyncBatchNorm):
            module.__class__ = SyncBatchNorm
        elif isinstance(module, _BatchNorm):
            module.__class__ = CpuSyncBatchNorm
    return model


def pick_device(name: str | None, gpu: int | None) -> torch.device:
    """The device that `--device` or `--gpu` names; without either, a GPU where there is one.

    Raises:
        ApotfxError: no such device on this machine, or both flags.
    """
    if name is not None and gpu is not None:
        raise ApotfxError(f"--gpu {gpu} and --device {name}: give one of them")
    name = name if gpu is None else f"cuda:{gpu}"
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ApotfxError(f"--device {name}: unknown; expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise ApotfxError(f"--device {name}: not supported; expected cpu, cuda or cuda:N")
    # Negative: torch keeps the index in a byte.
    if device.type == "cuda" and not 0 <= (device.index or 0) < torch.cuda.device_count():
        raise ApotfxError(f"--device {name}: this machine has {torch.cuda.device_count()} GPUs; use --device cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device
