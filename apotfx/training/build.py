"""From a configuration to networks: the float one, the quantized one, the teacher."""

from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import fx, nn

from apotfx.calibrate import calibrate
from apotfx.engine import Choice, use_engine
from apotfx.errors import ApotfxError
from apotfx.layers import QuantLayer
from apotfx.models import build_model
from apotfx.policy import FLOAT_BITS, BitPolicy
from apotfx.graph.passes import quantize
from apotfx.training.augment import Augment
from apotfx.training.checkpoint import Checkpoint, load_state, read_checkpoint
from apotfx.training.config import TrainConfig
from apotfx.training.data import Dataset, TrainBatches

CALIBRATION_BATCHES = 8


@dataclass(frozen=True)
class Network:
    """A float model, what quantization made of it (on its device), and how they are used.

    Attributes:
        image_size: of the input of both, in pixels.
        engine: what computes the quantized layers, and why.
    """

    float_model: nn.Module
    qmodel: fx.GraphModule
    image_size: int
    engine: Choice


def with_published_policy(config: TrainConfig, pretrained: Checkpoint | None) -> TrainConfig:
    """`config`, with the policy of the published networks if that is what the weights come from."""
    if pretrained is None or not pretrained.is_published or config.policy is not None or config.bit == FLOAT_BITS:
        return config
    return replace(config, policy=BitPolicy.published(config.bit, config.scheme).to_dict())


def build_network(
    config: TrainConfig, dataset: Dataset, device: torch.device, pretrained: Checkpoint | None
) -> Network:
    """The network to train: fresh or from `pretrained`, quantized, its clips initialised.

    From a checkpoint at other bits, or a float one, the weights carry over, and the clips where both have them.
    """
    float_model, image_size = build_float(config, dataset)
    if pretrained is not None:
        load_state(float_model, pretrained, carry_over=True)
    qmodel = quantize(float_model, config.bit_policy()).to(device)
    engine = use_engine(qmodel, config.engine)
    if is_quantized(qmodel):
        batches = TrainBatches(
            dataset.train, batch_size=min(config.batch_size, len(dataset.train)), seed=config.seed, augment=Augment.none(),
            mean=dataset.mean, std=dataset.std, image_size=image_size, device=device,
        )  # fmt: skip
        inputs = (images for images, _ in islice(batches.epoch(0), CALIBRATION_BATCHES))
        calibrate(qmodel, inputs, method=config.clip_init)
    if pretrained is not None:
        load_state(qmodel, pretrained, carry_over=True)
    return Network(float_model, qmodel, image_size, engine)


def restore_network(config: TrainConfig, dataset: Dataset, device: torch.device, checkpoint: Checkpoint) -> Network:
    """The network that `checkpoint` holds, exactly."""
    float_model, image_size = build_float(config, dataset)
    qmodel = quantize(float_model, config.bit_policy())
    load_state(qmodel, checkpoint)
    return Network(float_model, qmodel.to(device), image_size, use_engine(qmodel, config.engine))


def build_teachers(config: TrainConfig, dataset: Dataset, device: torch.device, image_size: int) -> list[nn.Module]:
    """The float networks in the checkpoints `config.teacher`, frozen.

    Raises:
        ApotfxError: one is quantized or published, or was trained on other images than the student takes.
    """
    return [_build_teacher(path, config, dataset, device, image_size) for path in config.teacher]


def _build_teacher(
    path: str, config: TrainConfig, dataset: Dataset, device: torch.device, image_size: int
) -> nn.Module:
    checkpoint = read_checkpoint(path)
    if checkpoint.config is None or not checkpoint.is_float:
        raise ApotfxError(f"--teacher {path}: is not a float network; train one with --bit {FLOAT_BITS}")
    for key in ("dataset", "image_size"):
        got, expected = getattr(checkpoint.config, key), getattr(config, key)
        if got != expected:
            flag = key.replace("_", "-")
            raise ApotfxError(
                f"--teacher {path}: was trained with --{flag} {got}, the student with --{flag} {expected}"
            )
    teacher, teacher_size = build_float(checkpoint.config, dataset)
    if teacher_size != image_size:
        raise ApotfxError(f"--teacher {path}: takes {teacher_size} pixels, the student {image_size}; set --image-size")
    load_state(teacher, checkpoint)
    return teacher.to(device).eval().requires_grad_(False)


def is_quantized(model: nn.Module) -> bool:
    return any(isinstance(module, QuantLayer) for module in model.modules())


def build_float(config: TrainConfig, dataset: Dataset) -> tuple[nn.Module, int]:
    """The fresh float network for `dataset`, and the image size that it takes."""
    torch.manual_seed(config.seed)
    model, image_size = build_model(
        config.arch, in_channels=dataset.in_channels, num_classes=dataset.num_classes, image_size=dataset.image_size
    )
    return model.to(memory_format=torch.channels_last), image_size  # convolutions hand the format on
