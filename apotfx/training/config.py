"""The configuration of a run, and the recipes that fill it in."""

import math
import typing
from dataclasses import dataclass
from types import NoneType, UnionType

from apotfx.calibrate import METHODS as CLIP_INITS
from apotfx.engine import ENGINES
from apotfx.errors import ApotfxError
from apotfx.levels import MAX_BITS, MIN_BITS, SCHEMES
from apotfx.policy import FLOAT_BITS, BitPolicy
from apotfx.tensors import printable
from apotfx.training.recipes import RECIPES

SCHEDULES = ("constant", "cosine", "onecycle", "step")
AUGMENTATIONS = ("default", "strong", "flip", "none")
MAX_IMAGE_SIZE, MAX_EPOCHS = 4096, 10**6


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Everything that decides what a run computes, and a little that does not.

    Attributes:
        recipe: a file in `apotfx/training/recipes`; "published" comes with the published networks' policy.
        arch: see `apotfx.models.list_models`.
        bit: 2 to 8 for the default policy, 32 for float.
        scheme: "apot", "pot" or "uniform".
        policy: the policy as `BitPolicy.to_dict` gives it; None for the recipe's.
        dataset: name of the data set; None for mnist with scikit-learn's digits to fall back on.
        image_size: height and width that images are resized to, 1 to 4096; None for the data's own.
        train_images: how many of the training images to use; None for all.
        epochs: passes over the training images.
        batch_size: images per step, over all processes.
        lr: peak learning rate.
        momentum: of SGD.
        nesterov: whether momentum looks ahead; without momentum there is nothing to look ahead with.
        weight_decay: of weights; of biases, batch norms and clips only with `decay_all`.
        decay_all: whether weight decay applies to every parameter.
        schedule: of the learning rate. "constant"; "cosine": 1/20 of the run up, then a cosine to 0; "onecycle":
            3/10 up, then a cosine to 0; "step": a tenth from half of the run on, a hundredth from 3/4 on.
        ema: decay of the exponential moving average of the weights that is evaluated and exported; 0 for none.
        augment: "default" or "strong" for the data set's own, "flip" for mirrored images alone, "none".
        label_smoothing: of the cross-entropy, 0 to 1.
        clip_init: how clips are found, from the first batches: a method of `apotfx.calibrate`.
        clip_lr: factor on the learning rate of the clips.
        teacher: checkpoints of float networks to distil from, one in each step, in turn.
        teacher_weight: share of the distillation term in the loss, 0 to 1.
        temperature: of the distillation's softmax.
        pretrained: checkpoint that the weights start from; None for fresh ones.
        seed: of the initial weights, the data order and the augmentation.
        amp: compute in bfloat16 where it is safe.
        compile: run the network through torch.compile.
        engine: what computes the quantized layers; see `apotfx.use_engine`.
    """

    recipe: str = "default"
    arch: str = "resnet18"
    bit: int = 4
    scheme: str = "apot"
    policy: dict | None = None
    dataset: str | None = None
    image_size: int | None = None
    train_images: int | None = None
    epochs: int = 25
    batch_size: int = 128
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    decay_all: bool = False
    schedule: str = "onecycle"
    ema: float = 0.998
    augment: str = "default"
    label_smoothing: float = 0.0
    clip_init: str = "mse"
    clip_lr: float = 1.0
    teacher: tuple[str, ...] = ()
    teacher_weight: float = 0.7
    temperature: float = 4.0
    pretrained: str | None = None
    seed: int = 0
    amp: bool = False
    compile: bool = False
    engine: str = "auto"

    def __post_init__(self):
        object.__setattr__(self, "teacher", tuple(self.teacher or ()))
        _require(self.recipe in RECIPES, "recipe", self.recipe, f"one of {', '.join(RECIPES)}")
        _require(self.scheme in SCHEMES, "scheme", self.scheme, f"one of {', '.join(SCHEMES)}")
        _require(
            MIN_BITS <= self.bit <= MAX_BITS or self.bit == FLOAT_BITS, "bit", self.bit,
            f"{MIN_BITS} to {MAX_BITS}, or {FLOAT_BITS} for float",
        )  # fmt: skip
        _require(self.schedule in SCHEDULES, "schedule", self.schedule, f"one of {', '.join(SCHEDULES)}")
        _require(self.augment in AUGMENTATIONS, "augment", self.augment, f"one of {', '.join(AUGMENTATIONS)}")
        _require(self.clip_init in CLIP_INITS, "clip-init", self.clip_init, f"one of {', '.join(CLIP_INITS)}")
        _require(self.engine in ("auto", *ENGINES), "engine", self.engine, f"one of auto, {', '.join(ENGINES)}")
        _require(self.train_images is None or self.train_images >= 2, "train-images", self.train_images, "at least 2")
        size = self.image_size
        _require(size is None or 1 <= size <= MAX_IMAGE_SIZE, "image-size", size, f"1 to {MAX_IMAGE_SIZE}")
        _require(1 <= self.epochs <= MAX_EPOCHS, "epochs", self.epochs, f"1 to {MAX_EPOCHS}")
        _require(self.batch_size >= 2, "batch-size", self.batch_size, "at least 2 (batch norm needs two images)")
        _require(0 < self.lr < float("inf"), "lr", self.lr, "more than 0")
        _require(0 <= self.seed < 2**63, "seed", self.seed, "0 to 2^63 - 1")
        for key in ("momentum", "ema"):
            _require(0 <= getattr(self, key) < 1, key, getattr(self, key), "at least 0 and less than 1")
        for key in ("weight_decay", "clip_lr"):
            value = getattr(self, key)
            _require(0 <= value < float("inf"), key.replace("_", "-"), value, "at least 0")
        for key in ("label_smoothing", "teacher_weight"):
            value = getattr(self, key)
            _require(0 <= value <= 1, key.replace("_", "-"), value, "0 to 1")
        _require(0 < self.temperature < float("inf"), "temperature", self.temperature, "more than 0")

    @classmethod
    def from_dict(cls, content: dict, source: str) -> "TrainConfig":
        """The inverse of `dataclasses.asdict`.

        Raises:
            ApotfxError: an unknown key, or a value of another type or range; names it and `source`.
        """
        known = typing.get_type_hints(cls)
        if not isinstance(content, dict):
            raise ApotfxError(f"{source}: is a {type(content).__name__}, expected settings by name; use another copy")
        for key, value in content.items():
            if key not in known:
                raise ApotfxError(f"{source}: unknown key {printable(key)!r}; another version wrote it")
            if not _is(value, known[key]):
                raise ApotfxError(f"{source}: {key} is a {type(value).__name__}, which it cannot be; use another copy")
        try:
            config = cls(**content)
            config.bit_policy()
        except ApotfxError as error:
            raise ApotfxError(f"{source}: {error}") from None
        return config

    def bit_policy(self) -> BitPolicy:
        """The policy given, or the one of the recipe, the bits and the scheme."""
        if self.policy is not None:
            return BitPolicy.from_dict(self.policy)
        if self.recipe == "published" and self.bit != FLOAT_BITS:
            return BitPolicy.published(self.bit, self.scheme)
        return BitPolicy.default(self.bit, self.scheme)


def _is(value: object, hint: object) -> bool:
    """Whether `value`, which JSON could hold, is of the type."""
    arguments = typing.get_args(hint)
    if isinstance(hint, UnionType):
        return any(_is(value, argument) for argument in arguments)
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (list, tuple)) and all(_is(item, arguments[0]) for item in value)
    if hint is float:
        return type(value) in (int, float) and math.isfinite(value)
    if hint is str:
        return isinstance(value, str) and value.isprintable()
    return type(value) is hint or hint in (None, NoneType) and value is None


def _require(condition: bool, flag: str, value: object, expected: str) -> None:
    if not condition:
        raise ApotfxError(f"--{flag} {value}: expected {expected}")
