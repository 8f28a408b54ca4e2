"""Checkpoints: written so that a crash never costs the last one, read as if a stranger had written them."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apotfx.attention import MultiheadAttention, split_projections
from apotfx.errors import ApotfxError
from apotfx.files import read_file, write_atomic
from apotfx.tensors import DTYPES, Damaged, is_packed, pack, printable, unpack
from apotfx.training.config import TrainConfig
from apotfx.training.published import convert_published, is_published
from apotfx.training.torch_files import PickledCode, is_torch_file, read_torch_file

FORMAT, VERSION = "apotfx-checkpoint", 2
LAST, BEST = "checkpoint.pt", "best.pt"
SECTIONS = ("model", "ema", "momentum")  # of tensors, by name
GENERATORS = "random"  # a section of earlier versions'; now each step seeds its own
RUNNING = ("loss", "correct", "images")
MAX_BYTES = 2**34
MAX_STEPS = 2**53
CALIBRATED = "_quantizer.calibrated"  # a flag in the state of earlier versions' networks


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a network.

    Attributes:
        path: where it was read.
        state: of the network that is evaluated: the moving average where there is one.
        config: of the run that wrote it; None for a published checkpoint, which does not say.
        best: "val_acc" and "epoch" of the best epoch so far, which is the one whose weights are in `best.pt`.
        made_with: what the bits depend on besides the configuration, by name; see `run.environment`.
        resume: what `Trainer.load_state_dict` takes; None in `best.pt` and in a published checkpoint.
        published: "epoch" and "train_acc" (percent, on the training images) that a published checkpoint states.
    """

    path: Path
    state: dict[str, Tensor]
    config: TrainConfig | None
    best: dict | None = None
    made_with: dict[str, str] | None = None
    resume: dict | None = None
    published: dict | None = None

    @property
    def is_published(self) -> bool:
        return self.config is None

    @property
    def is_float(self) -> bool:
        return not any(key.endswith("_quantizer.clip") for key in self.state)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write `content` so that `path` holds either the old or the new whole.

    Args:
        content: dicts of tensors under `SECTIONS`, JSON under other keys.

    Raises:
        OSError: the disk is full or not writable; the previous file is as it was.
    """
    tensors = {f"{section}/{name}": t for section in SECTIONS for name, t in (content.get(section) or {}).items()}
    document = {key: value for key, value in content.items() if key not in SECTIONS}
    write_atomic(path, pack(tensors, {"version": VERSION, **document}, FORMAT))


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one of our checkpoints (`checkpoint.pt`, `best.pt`, or a run's directory) or a published one.

    Nothing in the file is executed, and every part of it is checked before anything is made of it.

    Raises:
        ApotfxError: missing, altered, truncated, holding pickled code, or not a checkpoint; names the file.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = path / LAST
    if not os.path.exists(path):
        raise ApotfxError(f"checkpoint {printable(path, 1000)}: no such file; check the path")
    try:
        data = read_file(path, max_bytes=MAX_BYTES)
    except ApotfxError as error:
        raise ApotfxError(f"checkpoint {error}") from None
    try:
        return _interpret(path, _read(data))
    except PickledCode as error:
        raise ApotfxError(
            f"checkpoint {path}: holds pickled code or is damaged, and was not run ({error}); expected a file of "
            "tensors, numbers and strings that this tool or the published script wrote"
        ) from None
    except Damaged as error:
        raise ApotfxError(f"checkpoint {path}: damaged or made by hand ({error}); use another copy") from None
    except MemoryError:
        raise ApotfxError(f"checkpoint {path}: larger than the memory; use another machine") from None
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        what = f"{type(error).__name__}: {printable(error)}"
        raise ApotfxError(f"checkpoint {path}: damaged or made by hand ({what}); use another copy") from error


def _read(data: bytes) -> dict:
    """The content of a file of any sort, as `save_checkpoint` takes it or as the published script saved it."""
    if is_packed(data):
        tensors, document = unpack(data, FORMAT)
        _number(document.get("version"), "version", int, VERSION, VERSION)
        content = {key: value for key, value in document.items() if key not in SECTIONS}
        for name, tensor in tensors.items():
            section, _, name = name.partition("/")
            if section not in (*SECTIONS, GENERATORS):
                raise Damaged(f"a section {printable(section)}")
            content.setdefault(section, {})[name] = tensor
        return content
    if is_torch_file(data):
        content = read_torch_file(data)
        if isinstance(content, dict):
            return _from_version_1(content) if content.get("format") == FORMAT else content
        return {}
    if data[:1] == b"\x80":
        raise PickledCode("a bare pickle")
    raise Damaged("truncated, or another sort of file")


def _from_version_1(content: dict) -> dict:
    """The content of a file that an earlier version saved with `torch.save`."""
    _number(content.get("version"), "version", int, 1, 1)
    content = {key: value for key, value in content.items() if value is not None}
    if "optimizer" not in content:
        return content | {"best": {key: content[key] for key in ("val_acc", "epoch") if key in content}}
    states = _dict(content["optimizer"], "optimizer").get("state")
    # By position among the optimizer's parameters, as only the network knows their names.
    momentum = {
        index: buffer
        for index, state in _dict(states, "optimizer").items()
        if (buffer := _dict(state, "optimizer").get("momentum_buffer")) is not None
    }
    return {key: value for key, value in content.items() if key != "optimizer"} | {"momentum": momentum}


def _interpret(path: Path, content: dict) -> Checkpoint:
    if "config" in content:
        return _interpret_ours(path, content)
    state = content.get("state_dict")
    if isinstance(state, dict) and state and all(isinstance(key, str) for key in state) and is_published(state):
        _check_weights(path, state)
        accuracy = content.get("best_acc1")
        if isinstance(accuracy, Tensor) and accuracy.numel() == 1:
            accuracy = accuracy.item()
        stated = {
            "epoch": _number(content.get("epoch"), "epoch", int, 0, MAX_STEPS),
            "train_acc": _number(accuracy, "best_acc1", float, 0, 100),
        }
        return Checkpoint(path, convert_published(state), None, published=stated)
    raise ApotfxError(
        f"checkpoint {path}: not one of this tool's nor a published one; expected {LAST} or {BEST} of a run"
    )


def _interpret_ours(path: Path, content: dict) -> Checkpoint:
    config = TrainConfig.from_dict(_dict(content["config"], "config"), f"checkpoint {path}")
    for section in ("model", "ema"):
        if section == "model" or section in content:
            _check_weights(path, _dict(content.get(section), section))
    state = content.get("ema", content["model"])
    best = _check_best(content.get("best", {}), config)
    made_with = _dict(content.get("made_with", {}), "made_with")
    if not all(isinstance(text, str) and text.isprintable() for text in (*made_with, *made_with.values())):
        raise Damaged("made_with is not made of texts")
    resume = _check_training(path, content, config, best) if "step" in content else None
    return Checkpoint(path, state, config, best, made_with, resume)


def _check_training(path: Path, content: dict, config: TrainConfig, best: dict | None) -> dict:
    """What `Trainer.load_state_dict` takes, of which every part is there and of its type and range."""
    if best is None:
        raise Damaged("best is absent")
    if bool(config.ema) != ("ema" in content):
        raise Damaged(f"ema is {'there' if 'ema' in content else 'absent'}, with --ema {config.ema}")
    momentum = _dict(content.get("momentum", {}), "momentum")
    _check_weights(path, momentum, str | int)
    running = _dict(content.get("running"), "running")
    clock = _dict(content.get("clock", {}), "clock")
    if not all(isinstance(part, str) and part.isprintable() for part in clock):
        raise Damaged("clock has parts without a name")
    return {
        "model": content["model"],
        "ema": content.get("ema"),
        "ema_count": _number(content.get("ema_count"), "ema_count", int, 0, MAX_STEPS),
        "momentum": momentum,
        "step": _number(content.get("step"), "step", int, 0, MAX_STEPS),
        "seconds": _number(content.get("seconds"), "seconds", float, 0, math.inf),
        "clock": {part: _number(seconds, "clock", float, 0, math.inf) for part, seconds in clock.items()},
        "best": best,
        "running": {name: _number(running.get(name), f"running/{name}", float, 0, math.inf) for name in RUNNING},
    }


def _check_best(best: object, config: TrainConfig) -> dict | None:
    if not _dict(best, "best"):
        return None
    return {
        "val_acc": _number(best.get("val_acc"), "best/val_acc", float, -1, 100),
        "epoch": _number(best.get("epoch"), "best/epoch", int, 0, config.epochs),
    }


def _number(value: object, what: str, kind: type, least: float, most: float) -> int | float:
    fits = type(value) is int or kind is float and type(value) is float and math.isfinite(value)
    if not fits or not least <= value <= most:
        expected = "a whole number" if kind is int else "a number"
        raise Damaged(f"{what} is {printable(value)}, expected {expected} from {least:g} to {most:g}")
    return kind(value)


def _dict(value: object, what: str) -> dict:
    if not isinstance(value, dict):
        raise Damaged(f"{what} is a {type(value).__name__}")
    return value


def _check_weights(path: Path, state: dict, names: type = str) -> None:
    if not all(isinstance(name, names) for name in state):
        raise Damaged("its weights have no names")
    if not all(isinstance(tensor, Tensor) and tensor.dtype in DTYPES.values() for tensor in state.values()):
        raise Damaged("its weights are not all tensors")
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ApotfxError(
                f"checkpoint {path}: {printable(name)} is not finite; its training diverged, use an earlier one"
            )


def load_state(model: nn.Module, checkpoint: Checkpoint, *, carry_over: bool = False) -> None:
    """Load the checkpoint's weights into `model`.

    Args:
        carry_over: the two may be quantized differently, or one of them not at all: what belongs to quantizers is
            loaded where both have it in the same shape, and left alone elsewhere.

    Raises:
        ApotfxError: a name, shape or type that does not fit; names it and what either side has.
    """
    state = checkpoint.state
    if carry_over:
        expected = model.state_dict()
        fits = {k for k in expected if k in state and state[k].shape == expected[k].shape}
        left_alone = {k for k in (*expected, *state) if "_quantizer." in k and k not in fits}
        state = {k: v for k, v in state.items() if k not in left_alone}
        state |= {k: v for k, v in expected.items() if k in left_alone}
    arch = "" if checkpoint.config is None else f" (written by --arch {checkpoint.config.arch})"
    load_tensors(model, state, f"checkpoint {checkpoint.path}{arch}")


def load_tensors(model: nn.Module, state: dict[str, Tensor], source: str) -> None:
    """Load a state that fits `model`, whatever version of the library it is from.

    Raises:
        ApotfxError: a name, shape or type that does not fit; names it and what either side has, and `source`.
    """
    expected = model.state_dict()
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            state = split_projections(state, f"{name}.")
    quantizers = {key.removesuffix("clip") for key in expected if key.endswith("_quantizer.clip")}
    state = {k: v for k, v in state.items() if not k.endswith(CALIBRATED) or k.removesuffix("calibrated") in quantizers}
    for name in [*expected, *(key for key in state if key not in expected and not key.endswith(CALIBRATED))]:
        wanted, got = (_describe(d.get(name)) for d in (expected, state))
        if wanted != got:
            raise ApotfxError(
                f"{source}: {printable(name)} is {got}, the network has {wanted}; pass the --arch, --dataset and "
                "policy that it was written with"
            )
    model.load_state_dict(state)


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "absent"
    dtype = "" if tensor.dtype == torch.float32 else f" {str(tensor.dtype).removeprefix('torch.')}"
    return f"{tuple(tensor.shape)}{dtype}"
