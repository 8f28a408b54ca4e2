"""Float operations that, in evaluation, round the same way on every machine: batch norm and average pooling.

Between exact integer layers they are the only ones whose result depends on the kernel that computes them: torch's batch
norm multiplies and adds with or without an intermediate rounding, and the order in which an average is summed
depends on the memory format. In evaluation ours are a fixed sequence of correctly rounded operations, or a sum in
float64, so that the quantized network, the integer network and any other program can be compared for equality.
"""

from collections.abc import Callable

from torch import Tensor, nn


def folded_batch_norm(bn: nn.modules.batchnorm._BatchNorm) -> tuple[Tensor, Tensor]:
    """(multiplier, offset), each [C]: what a batch norm with running statistics does to a channel in evaluation."""
    dtype = bn.running_var.dtype
    # In float64, as torch's square root of float32 is not correctly rounded, and another one on other machines.
    multiplier = (bn.running_var.double() + bn.eps).rsqrt()
    if bn.weight is not None:
        multiplier = multiplier * bn.weight
    offset = -bn.running_mean * multiplier
    return multiplier.to(dtype), (offset if bn.bias is None else offset + bn.bias).to(dtype)


def affine(x: Tensor, multiplier: Tensor, offset: Tensor) -> Tensor:
    """`x * multiplier + offset` per channel, both rounded, in x's dtype; x is [N, C, ...], the others [C]."""
    shape = (-1,) + (1,) * (x.dim() - 2)
    return (x * multiplier.view(shape) + offset.view(shape)).to(x.dtype)


def evaluate_batch_norm(bn: nn.modules.batchnorm._BatchNorm, x: Tensor) -> Tensor:
    """`bn(x)` from its running statistics, which it must have."""
    return affine(x, *folded_batch_norm(bn))


class ReproducibleBatchNorm:
    """Mixed into torch's batch norms."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training or self.running_var is None or x.dim() < 2:
            return super().forward(x)
        self._check_input_dim(x)
        return evaluate_batch_norm(self, x)


class BatchNorm1d(ReproducibleBatchNorm, nn.BatchNorm1d):
    pass


class BatchNorm2d(ReproducibleBatchNorm, nn.BatchNorm2d):
    pass


class BatchNorm3d(ReproducibleBatchNorm, nn.BatchNorm3d):
    pass


class SyncBatchNorm(ReproducibleBatchNorm, nn.SyncBatchNorm):
    pass


class AttachedBatchNorm(ReproducibleBatchNorm):
    """A batch norm that computes with the state and settings of another, whose own forward does something else besides.

    Attributes:
        frozen: evaluates in training too.
        counts: whether the batches are counted.
    """

    @classmethod
    def to(cls, norm: nn.modules.batchnorm._BatchNorm, *, frozen: bool, counts: bool) -> "AttachedBatchNorm":
        """Attached to `norm`, which it takes parameters, buffers and settings from when it computes."""
        attached = next(c for c in _ATTACHED if issubclass(c, next(t for t in BATCH_NORMS if isinstance(norm, t))))
        attached = attached.__new__(attached)
        nn.Module.__init__(attached)
        attached.__dict__ |= {"norm": (norm,), "frozen": frozen, "counts": counts, "training": norm.training}
        return attached

    @property
    def num_batches_tracked(self) -> Tensor | None:
        norm = self.norm[0]  # in a tuple: it is no submodule
        return norm.num_batches_tracked if self.counts or norm.momentum is None else None

    def __getattr__(self, name: str):
        if name.startswith("__") or "norm" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["norm"][0], name)

    def _check_input_dim(self, x: Tensor) -> None:
        pass  # the other norm's forward may take more than its type does

    def forward(self, x: Tensor) -> Tensor:
        return evaluate_batch_norm(self, x) if self.frozen else super().forward(x)

    def extra_repr(self) -> str:
        return f"{self.norm[0].extra_repr()}, frozen={self.frozen}"


class AttachedBatchNorm1d(AttachedBatchNorm, nn.BatchNorm1d):
    pass


class AttachedBatchNorm2d(AttachedBatchNorm, nn.BatchNorm2d):
    pass


class AttachedBatchNorm3d(AttachedBatchNorm, nn.BatchNorm3d):
    pass


class AttachedSyncBatchNorm(AttachedBatchNorm, nn.SyncBatchNorm):
    pass


_ATTACHED = (AttachedBatchNorm1d, AttachedBatchNorm2d, AttachedBatchNorm3d, AttachedSyncBatchNorm)


class _ReproducibleAverage:
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if self.training else in_float64(super().forward, x)


def in_float64(average: Callable, x: Tensor, *args, **kwargs) -> Tensor:
    """`average(x, ...)` summed in float64, in x's dtype.

    Float32 values add up in float64 without rounding as long as they span less than 2^29 / their count, so that
    their order does not matter.
    """
    return average(x.double(), *args, **kwargs).to(x.dtype) if x.is_floating_point() else average(x, *args, **kwargs)


class Average(nn.Module):
    """A call of one of torch's functions that average; in evaluation `in_float64`."""

    def __init__(self, function: Callable):
        super().__init__()
        self.function = function

    def forward(self, input: Tensor, *args, **kwargs) -> Tensor:
        if self.training:
            return self.function(input, *args, **kwargs)
        return in_float64(self.function, input, *args, **kwargs)

    def extra_repr(self) -> str:
        return self.function.__name__


class AvgPool1d(_ReproducibleAverage, nn.AvgPool1d):
    pass


class AvgPool2d(_ReproducibleAverage, nn.AvgPool2d):
    pass


class AvgPool3d(_ReproducibleAverage, nn.AvgPool3d):
    pass


class AdaptiveAvgPool1d(_ReproducibleAverage, nn.AdaptiveAvgPool1d):
    pass


class AdaptiveAvgPool2d(_ReproducibleAverage, nn.AdaptiveAvgPool2d):
    pass


class AdaptiveAvgPool3d(_ReproducibleAverage, nn.AdaptiveAvgPool3d):
    pass


BATCH_NORMS = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: SyncBatchNorm,
}
AVERAGE_POOLS = {
    nn.AvgPool1d: AvgPool1d,
    nn.AvgPool2d: AvgPool2d,
    nn.AvgPool3d: AvgPool3d,
    nn.AdaptiveAvgPool1d: AdaptiveAvgPool1d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
    nn.AdaptiveAvgPool3d: AdaptiveAvgPool3d,
}
REPRODUCIBLE = BATCH_NORMS | AVERAGE_POOLS
AVERAGE_FUNCTIONS = {
    "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d",
    "mean",
}  # fmt: skip
