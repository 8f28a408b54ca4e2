"""The state of a quantized network: which clips come from data, one state on all processes, a float network's weights."""

from collections.abc import Mapping

import torch
import torch.distributed
from torch import Tensor, nn

from .attention import MultiheadAttention, split_projections
from .errors import ApotfxError
from .graph.network import Network
from .layers import QuantLayer
from .quantizers import Origin, Quantizer, is_distributed


def uncalibrated(qmodel: nn.Module) -> list[str]:
    """The names of the quantized layers of which a clip is still the placeholder, in the network's order."""
    return [
        name for name, layer in qmodel.named_modules()
        if isinstance(layer, QuantLayer)
        and any(
            q is not None and (q.has_placeholder() or q.needs_data())
            for q in (layer.weight_quantizer, layer.input_quantizer)
        )
    ]  # fmt: skip


def synchronize_clips(qmodel: nn.Module) -> None:
    """See to it that processes that train together start from the same clips.

    Each process takes clips from its own first batch, for the layers that this reaches. After each forward pass of
    `qmodel` in training, until all clips come from data, the processes take over the mean.
    """
    if isinstance(qmodel, Network):
        vars(qmodel)["_after"] = _ClipSynchronizer()
    else:
        qmodel.register_forward_hook(_ClipSynchronizer())


class _ClipSynchronizer:
    """The hook of `synchronize_clips`."""

    def __init__(self):
        self.quantizers: list[Quantizer] | None = None  # the network's, once their clips were looked at

    def __reduce__(self) -> tuple:
        """A copy of the hook is one for a copy of the network."""
        return type(self), ()

    def __call__(self, module: nn.Module, args: tuple, output: object) -> None:
        if module.training and torch.is_grad_enabled() and is_distributed():
            self._synchronize(module)

    @torch.compiler.disable
    @torch.no_grad()
    def _synchronize(self, module: nn.Module) -> None:
        # What a process knows may differ from what the others know; the clips are the same everywhere, but for local ones.
        if self.quantizers is None:
            self.quantizers = [q for q in module.modules() if isinstance(q, Quantizer)]
            for quantizer in self.quantizers:
                if quantizer.origin is not Origin.LOCAL:
                    quantizer.origin = Origin.UNKNOWN
        waiting = [q for q in self.quantizers if q.needs_data() or q.origin is Origin.LOCAL]
        for device in dict.fromkeys(quantizer.clip.device for quantizer in waiting):
            _agree([quantizer for quantizer in waiting if quantizer.clip.device == device])


def _agree(quantizers: list[Quantizer]) -> None:
    """Give the clips, all on one device, the mean over the processes that took theirs from data."""
    found = [quantizer.origin is Origin.LOCAL for quantizer in quantizers]
    clips = torch.cat([q.clip.double().flatten() * is_found for q, is_found in zip(quantizers, found, strict=True)])
    total = torch.cat([clips, clips.new_tensor(found)])
    torch.distributed.all_reduce(total)
    *sums, counts = total.split([*(quantizer.clip.numel() for quantizer in quantizers), len(quantizers)])
    for quantizer, clip, count in zip(quantizers, sums, counts.tolist(), strict=True):
        if count:
            quantizer.agree_on((clip / count).reshape(quantizer.clip.shape))


def load_float_state(qmodel: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Load the state dict of the float network that `qmodel` was made from, in place; clips stay as they are.

    Clips that were fitted to other weights should be fitted again; see `calibrate`.

    Raises:
        ApotfxError: a parameter or buffer is missing, unknown or of another shape; names it. Then nothing was loaded.
    """
    state, expected = dict(state), qmodel.state_dict()
    for name, module in qmodel.named_modules():
        if isinstance(module, MultiheadAttention):
            state = split_projections(state, f"{name}." if name else "")
    clips = {
        f"{name}.clip" for name, module in qmodel.named_modules(remove_duplicate=False) if isinstance(module, Quantizer)
    }
    for key in (*expected, *(key for key in state if key not in expected)):
        wanted, got = (list(d[key].shape) if key in d else "absent" for d in (expected, state))
        if wanted != got and (key not in clips or key in state):
            raise ApotfxError(
                f"load_float_state: {key} is {got}, the quantized network has {wanted}; pass the state of the float "
                "network that it was made from"
            )
    qmodel.load_state_dict(state | {key: expected[key] for key in clips - state.keys()})
