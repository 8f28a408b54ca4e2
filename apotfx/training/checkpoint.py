"""Checkpoints: written so that a crash never costs the last one, read without running what they hold."""

import io
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from apotfx.attention import MultiheadAttention, split_projections
from apotfx.errors import ApotfxError
from apotfx.files import write_atomic
from apotfx.training.config import TrainConfig
from apotfx.training.published import convert_published, is_published

FORMAT, VERSION = "apotfx-checkpoint", 1
CALIBRATED = "_quantizer.calibrated"  # a flag of earlier versions, which quantizers still read


@dataclass(frozen=True)
class Checkpoint:
    """The weights of a network.

    Attributes:
        path: where it was read.
        state: of the network that is evaluated: the moving average where there is one.
        config: of the run that wrote it; None for a published checkpoint, which does not say.
        published: "epoch" and "train_acc" (percent, on the training images) that a published checkpoint states.
        resume: what `--resume` needs beside that; None in `best.pt` and in a published checkpoint.
    """

    path: Path
    state: dict[str, Tensor]
    config: TrainConfig | None
    resume: dict | None
    published: dict | None = None

    @property
    def is_published(self) -> bool:
        return self.config is None

    @property
    def is_float(self) -> bool:
        return not any(key.endswith("_quantizer.clip") for key in self.state)


def save_checkpoint(path: Path, content: dict) -> None:
    """Write `content` (tensors, numbers, strings, dicts, lists) so that `path` holds either the old or the new whole.

    Raises:
        OSError: the disk is full or not writable; the previous file is as it was.
    """
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, "version": VERSION, **content}, buffer)
    write_atomic(path, buffer.getbuffer())


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read one of our checkpoints (`checkpoint.pt`, `best.pt`, or a run's directory) or a published one.

    Nothing in the file is executed.

    Raises:
        ApotfxError: missing, truncated, holding pickled code, or not a checkpoint; names the file.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "checkpoint.pt"
    if not path.is_file():
        raise ApotfxError(f"checkpoint {path}: no such file; check the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ApotfxError(f"checkpoint {path}: cannot be read ({error.strerror})") from None
    if zipfile.is_zipfile(io.BytesIO(data)) and zipfile.ZipFile(io.BytesIO(data)).testzip() is not None:
        raise ApotfxError(f"checkpoint {path}: damaged (checksum); use another copy")  # torch does not check it
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise ApotfxError(
            f"checkpoint {path}: holds pickled code or is damaged, and was not run; expected a file of tensors, "
            "numbers and strings that this tool or the published script wrote"
        ) from None
    except Exception as error:  # torch raises whatever its zip and storage readers meet
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ApotfxError(f"checkpoint {path}: damaged or truncated ({reason})") from None
    try:
        return _interpret(path, content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ApotfxError(f"checkpoint {path}: damaged or made by hand ({type(error).__name__}: {error})") from None


def _interpret(path: Path, content: object) -> Checkpoint:
    if isinstance(content, dict) and content.get("format") == FORMAT:
        if content["version"] != VERSION:
            raise ApotfxError(f"checkpoint {path}: format version {content['version']}, expected {VERSION}")
        state = content["ema"] if content.get("ema") is not None else content["model"]
        config = TrainConfig.from_dict(content["config"], f"checkpoint {path}")
        _require_finite(path, state)
        return Checkpoint(path, state, config, content if "optimizer" in content else None)
    state = content.get("state_dict") if isinstance(content, dict) else None
    if isinstance(state, dict) and is_published(state):
        _require_finite(path, state)
        stated = {"epoch": int(content["epoch"]), "train_acc": float(content["best_acc1"])}
        return Checkpoint(path, convert_published(state), None, None, stated)
    raise ApotfxError(
        f"checkpoint {path}: not one of this tool's nor a published one; expected checkpoint.pt or best.pt of a run"
    )


def _require_finite(path: Path, state: dict[str, Tensor]) -> None:
    for name, tensor in state.items():
        if not tensor.isfinite().all():
            raise ApotfxError(f"checkpoint {path}: {name} is not finite; its training diverged, use an earlier one")


def load_state(model: nn.Module, checkpoint: Checkpoint, *, carry_over: bool = False) -> None:
    """Load the checkpoint's weights into `model`.

    Args:
        carry_over: the two may be quantized differently, or one of them not at all: what belongs to quantizers is
            loaded where both have it in the same shape, and left alone elsewhere.

    Raises:
        ApotfxError: a name or shape that does not fit; names it and what either side has.
    """
    expected, state = model.state_dict(), checkpoint.state
    for name, module in model.named_modules():
        if isinstance(module, MultiheadAttention):
            state = split_projections(state, f"{name}.")
    if carry_over:
        fits = {k for k in expected if k in state and state[k].shape == expected[k].shape}
        expected, state = (
            {k: v for k, v in d.items() if k in fits or "_quantizer." not in k} for d in (expected, state)
        )
    for name in [*expected, *(key for key in state if key not in expected and not key.endswith(CALIBRATED))]:
        wanted, got = (tuple(d[name].shape) if name in d else "absent" for d in (expected, state))
        if wanted != got:
            arch = "" if checkpoint.config is None else f" (written by --arch {checkpoint.config.arch})"
            raise ApotfxError(
                f"checkpoint {checkpoint.path}{arch}: {name} is {got}, the network has {wanted}; pass the --arch, "
                "--dataset and policy that it was written with"
            )
    model.load_state_dict(state, strict=not carry_over)
