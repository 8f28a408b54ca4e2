"""Functions replayed from a CUDA graph: a thousand small kernels start at once, without Python between them."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from apotfx.engine import say_once

CALLS_BEFORE = 3  # in which libraries choose their kernels, and clips are found


class Recorded:
    """`function`, which takes tensors on one GPU and returns one, recorded at its fourth call, replayed from then on.

    What the function decides in Python, such as a layer to leave out, it decides once for all replays. The result is
    overwritten by the next one, as is whatever else the function leaves in memory, such as gradients. A function that
    cannot be recorded, because it waits for the GPU, is called as it is. `timed()` is entered around each replay.

    Raises (the calls after the recording):
        ValueError: an input has another shape than at the recording.
    """

    def __init__(self, function: Callable[..., Tensor], timed: Callable[[], AbstractContextManager] = nullcontext):
        self.function, self.timed, self.calls, self.can_record = function, timed, 0, True
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.output: Tensor | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        if self.graph is None and self.calls == CALLS_BEFORE and self.can_record:
            self._record(inputs)
        self.calls += 1
        if self.graph is None:
            return self.function(*inputs)
        for given, recorded in zip(inputs, self.inputs, strict=True):
            if given.shape != recorded.shape:
                raise ValueError(f"recorded with an input of {list(recorded.shape)}, got {list(given.shape)}")
        with self.timed():
            torch._foreach_copy_(self.inputs, inputs)
            self.graph.replay()
        return self.output

    def _record(self, inputs: tuple[Tensor, ...]) -> None:
        graph, self.inputs, device = torch.cuda.CUDAGraph(), [x.clone() for x in inputs], inputs[0].device
        generator = torch.cuda.default_generators[device.index]
        before = generator.clone_state()
        try:
            with torch.cuda.device(device), torch.cuda.graph(graph, stream=torch.cuda.Stream(device)):
                self.output = self.function(*self.inputs)
        except RuntimeError as error:
            self.can_record = False
            generator.graphsafe_set_state(before)  # which would wait for the end of the recording
            say_once(f"training runs slower than it could: it cannot be recorded ({str(error).splitlines()[0]})")
        else:
            self.graph = graph
