"""A finished run's export, with what the tools that read it need to know about the network and its images."""

import math
import os
from dataclasses import dataclass
from pathlib import Path

from torch import fx, nn

from apotfx.engine import use_engine
from apotfx.errors import ApotfxError
from apotfx.integer.format import MANIFEST, WEIGHTS, read_manifest
from apotfx.models import build_model
from apotfx.graph.passes import quantize
from apotfx.training.checkpoint import BEST, load_state, read_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset

EXPORT = "integer"
_METADATA = {"arch", "dataset", "in_channels", "num_classes", "dataset_image_size", "image_size", "mean", "std"}


def export_metadata(config: TrainConfig, dataset: Dataset, image_size: int) -> dict:
    """What a manifest keeps of the run, so that an export alone says how to build and feed its network."""
    return {
        "arch": config.arch,
        "dataset": dataset.name,
        "in_channels": dataset.in_channels,
        "num_classes": dataset.num_classes,
        "dataset_image_size": dataset.image_size,
        "image_size": image_size,
        "input_shape": [dataset.in_channels, image_size, image_size],
        "mean": list(dataset.mean),
        "std": list(dataset.std),
    }


@dataclass(frozen=True)
class Exported:
    """An export on disk.

    Attributes:
        path: its directory.
        metadata: what `export_metadata` gave, or whatever its maker wrote.
        float_model: a fresh network of the architecture; None where the metadata do not say which.
        best: the run's checkpoint that was exported; None where only the export is at hand.
    """

    path: Path
    metadata: dict
    float_model: nn.Module | None
    best: Path | None

    @property
    def is_of_a_run(self) -> bool:
        """Whether its metadata say which network it is, and what images it takes."""
        return self.float_model is not None

    def quantized_model(self) -> fx.GraphModule | None:
        """The trained network before its export, in evaluation mode; None without a checkpoint."""
        if self.best is None:
            return None
        checkpoint = read_checkpoint(self.best)
        if checkpoint.config is None:
            raise ApotfxError(f"checkpoint {self.best}: is a published one; pass the run that made the export")
        qmodel = quantize(self.float_model, checkpoint.config.bit_policy())
        load_state(qmodel, checkpoint)
        use_engine(qmodel)
        return qmodel.eval()


def find_export(path: str | os.PathLike) -> tuple[Path, Path | None]:
    """(the directory of the export, the run's checkpoint that it was made of if that is beside it).

    Args:
        path: the run's directory, or its export (`integer/` in it, or a copy of that from elsewhere).

    Raises:
        ApotfxError: neither of them.
    """
    path = Path(path)
    if (path / EXPORT / MANIFEST).is_file():
        path = path / EXPORT
    elif not (path / MANIFEST).is_file():
        raise ApotfxError(
            f"{path}: no run with an export, and no export; expected {MANIFEST} or {EXPORT}/{MANIFEST} there"
        )
    best = path.absolute().parent / BEST
    return path, best if best.is_file() else None


def open_export(path: str | os.PathLike) -> Exported:
    """The export at a path as `find_export` takes it.

    Raises:
        ApotfxError: as `find_export` and `read_manifest`.
    """
    path, best = find_export(path)
    manifest = read_manifest(path / MANIFEST)
    metadata = manifest["metadata"]
    if _METADATA - metadata.keys():
        return Exported(path, metadata, None, best)
    float_model, _ = build_model(
        metadata["arch"],
        in_channels=metadata["in_channels"],
        num_classes=metadata["num_classes"],
        image_size=metadata["dataset_image_size"],
        max_parameters=_num_parameters(manifest, path),
    )
    return Exported(path, metadata, float_model, best)


def _num_parameters(manifest: dict, path: Path) -> int:
    """At most: as many as the manifest states. Raises: ApotfxError: these are more than the file of the weights holds."""
    weights = sum(math.prod(layer["shape"]) for layer in manifest["layers"])
    others = sum(math.prod(tensor["shape"]) for tensor in manifest["tensors"].values())
    size = (path / WEIGHTS).stat().st_size if (path / WEIGHTS).is_file() else 0
    if others > size:
        raise ApotfxError(f"{path / WEIGHTS}: has {size} bytes, {MANIFEST} states more; export the model again")
    return weights + others
