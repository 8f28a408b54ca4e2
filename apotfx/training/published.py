"""The checkpoints that the authors of the published MNIST experiments released, read as our own state."""

from torch import Tensor

from apotfx.tensors import Damaged, printable

PREFIX = "module."
CLIPS = {"act_alpha": "input_quantizer.clip", "weight_alpha": "weight_quantizer.clip"}


def is_published(state: dict[str, Tensor]) -> bool:
    return all(key.startswith(PREFIX) for key in state) and any(key.endswith(".act_alpha") for key in state)


def convert_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Published keys and values as those of a model quantized with `BitPolicy.published`.

    A learned alpha may be negative there; dividing and multiplying by it, the published code computes the same as
    with its magnitude. The 8-bit layers, first and last, have no alpha: their weights are divided by `max(w)`,
    which overflows 8 bits where `max(|w|)` is larger, so the latter is their clip here.

    Raises:
        Damaged: it lacks weights or alphas.
    """
    converted = {}
    for key, value in state.items():
        layer, _, leaf = key.removeprefix(PREFIX).rpartition(".")
        if leaf in CLIPS:
            _require_numbers(key, value)
            converted[f"{layer}.{CLIPS[leaf]}"] = value.abs()
        else:
            converted[f"{layer}.{leaf}"] = value
    for layer in ("conv1", "fc"):
        _require_numbers(f"{layer}.weight", converted.get(f"{layer}.weight"))
        converted[f"{layer}.weight_quantizer.clip"] = converted[f"{layer}.weight"].abs().max()
    return converted


def _require_numbers(name: str, tensor: Tensor | None) -> None:
    if tensor is None or not tensor.is_floating_point() or not tensor.numel():
        raise Damaged(f"{printable(name)} holds no numbers")
