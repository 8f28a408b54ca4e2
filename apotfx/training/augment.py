"""Random affine and elastic transforms, flips and erasing of whole image batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apotfx.errors import ApotfxError

ELASTIC_POINTS = 4  # along each axis


@dataclass(frozen=True)
class Augment:
    """Ranges that each image's own transform is drawn from, uniformly; the default leaves images as they are.

    Attributes:
        degrees: Rotation about the center within [-degrees, degrees], 0 to 180.
        translate: Shift along each axis within [-translate, translate] of the size, 0 <= translate < 1.
        scale: Range (low, high) of the magnification, 0 < low <= high.
        shear: Horizontal shear within [-shear, shear] degrees, 0 <= shear < 90.
        flip: Mirror left to right with probability 1/2.
        elastic: Standard deviation, as a fraction of the size, of the normal displacements of 4x4 points spread over
            the image, between which bicubic interpolation moves all others (Ronneberger, Fischer, Brox, "U-Net",
            2015, https://arxiv.org/abs/1505.04597, section 3.1), 0 <= elastic < 1.
        erase: A rectangle with sides within [0, erase] of the size and its center anywhere turns black (after Zhong et
            al., "Random Erasing Data Augmentation", 2017, https://arxiv.org/abs/1708.04896), 0 to 1.

    Raises:
        ApotfxError: A range is not as above.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    flip: bool = False
    elastic: float = 0.0
    erase: float = 0.0

    def __post_init__(self):
        _require(0 <= self.degrees <= 180, "degrees", self.degrees, "0 to 180")
        _require(0 <= self.translate < 1, "translate", self.translate, "a fraction of the size, 0 <= translate < 1")
        _require(
            len(self.scale) == 2 and 0 < self.scale[0] <= self.scale[1],
            "scale",
            self.scale,
            "(low, high) with 0 < low <= high",
        )
        _require(0 <= self.shear < 90, "shear", self.shear, "degrees, 0 <= shear < 90")
        _require(0 <= self.elastic < 1, "elastic", self.elastic, "a fraction of the size, 0 <= elastic < 1")
        _require(0 <= self.erase <= 1, "erase", self.erase, "a fraction of the size, 0 to 1")

    @classmethod
    def none(cls) -> "Augment":
        """Images as they are."""
        return cls()

    @classmethod
    def named(cls, name: str, dataset: str) -> "Augment":
        """The ranges called `name` for a data set's name; handwritten digits are never mirrored, but for "flip".

        Args:
            name: "default"; "strong" for more, and for long training; "flip" for the published recipe's mirrored images
                alone; "none".
        """
        digits = dataset in ("mnist", "digits")
        if name == "default":
            if digits:
                return cls(degrees=10.0, translate=0.1, scale=(0.9, 1.1), shear=5.0)
            return cls(translate=0.125, scale=(0.9, 1.1), flip=True)
        if name == "strong":
            if digits:
                return cls(degrees=12.0, translate=0.1, scale=(0.85, 1.15), shear=10.0, elastic=0.03)
            return cls(translate=0.125, scale=(0.85, 1.15), flip=True, erase=0.5)
        return {"flip": cls(flip=True), "none": cls.none()}[name]


def draw(
    augment: Augment, count: int, generator: torch.Generator, *, rank: int = 0, world_size: int = 1
) -> list[Tensor]:
    """The random numbers for this rank's `count` images, for `transform`.

    They are drawn for all ranks' images and each rank takes its own, so that together the ranks see what one process
    would.

    Args:
        augment: Ranges of the transforms.
        count: Images in this rank's share of a global batch of `count * world_size`.
        generator: A CPU generator to draw with.
        rank: Index of this process, 0 <= rank < world_size.
        world_size: Number of processes.

    Returns:
        Tensors on the CPU, the first dimension of each is `count`; none for `Augment.none()`.
    """
    if augment == Augment.none():
        return []

    def draw_for_all(distribution: Callable[..., Tensor], *shape: int) -> Tensor:
        everyone = distribution(count * world_size, *shape, generator=generator)
        return everyone[rank * count : (rank + 1) * count]

    numbers = [draw_for_all(torch.rand, 6)]
    if augment.elastic:
        numbers.append(draw_for_all(torch.randn, 2, ELASTIC_POINTS, ELASTIC_POINTS))
    if augment.erase:
        numbers.append(draw_for_all(torch.rand, 4))
    return numbers


def transform(images: Tensor, augment: Augment, numbers: Sequence[Tensor]) -> Tensor:
    """Transform every image by its own numbers, bilinearly, with zeros from outside; `images` do not change.

    Args:
        images: float [B, C, S, S] in [0, 1].
        augment: Ranges of the transforms.
        numbers: What `draw` gave for them, on their device.

    Returns:
        float [B, C, S, S]; `images` itself if `augment` is `Augment.none()`.
    """
    if augment == Augment.none():
        return images
    uniform, *rest = numbers
    images = warp(images, _random_affine(augment, uniform), rest.pop(0) * augment.elastic if augment.elastic else None)
    return erase(images, *rest.pop(0).split(2, dim=1), augment.erase) if augment.erase else images


def affine_matrix(angle: Tensor, shift: Tensor, scale: Tensor, shear: Tensor, mirror: Tensor) -> Tensor:
    """The map from output to input positions of: mirror, then magnify, shear, rotate, shift.

    Args:
        angle: [B] radians, clockwise.
        shift: [B, 2] to the right and down, in fractions of the image's size.
        scale: [B] magnification, > 0.
        shear: [B] radians, in (-pi/2, pi/2).
        mirror: [B] -1 mirrors left to right, 1 does not.

    Returns:
        [B, 2, 3] acting on (x, y, 1), x and y from -1 to 1 across the image, as `F.affine_grid` takes it.
    """
    sin, cos, tan = angle.sin(), angle.cos(), shear.tan()
    unsheared_x = torch.stack([cos - tan * sin, sin + tan * cos], dim=1) * mirror[:, None]
    unsheared_y = torch.stack([-sin, cos], dim=1)
    inverse = torch.stack([unsheared_x, unsheared_y], dim=1) / scale[:, None, None]
    # The image is 2 wide in these coordinates.
    return torch.cat([inverse, -2 * (inverse * shift[:, None]).sum(dim=2, keepdim=True)], dim=2)


def warp(images: Tensor, matrix: Tensor, points: Tensor | None = None) -> Tensor:
    """Sample `images` [B, C, H, W] at `matrix` [B, 2, 3] times the output positions; zeros outside.

    Args:
        points: [B, 2, P, P] where the sampled positions move besides, to the right and down, in fractions of the size,
            at P x P points from corner to corner; None for nowhere.
    """
    height, width = images.shape[2:]
    x = _pixel_centers(width, images.device)[:, None]
    y = _pixel_centers(height, images.device)[:, None, None]
    matrix = matrix[:, None, None]
    # F.affine_grid is a matrix product: TF32 or autocast would round its positions.
    grid = matrix[..., 0] * x + matrix[..., 1] * y + matrix[..., 2]
    if points is not None:
        # The image is 2 wide in these coordinates.
        moves = F.interpolate(2 * points, (height, width), mode="bicubic", align_corners=True)
        grid = grid + moves.permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def erase(images: Tensor, center: Tensor, sides: Tensor, largest: float) -> Tensor:
    """`images` [B, C, H, W] with zeros in a rectangle each.

    Args:
        center: [B, 2] of the rectangle, as fractions of the image's width and height.
        sides: [B, 2] its width and height, as fractions of `largest` times the image's.
    """
    height, width = images.shape[2:]
    inside = []
    for axis, size in enumerate((width, height)):
        position = (torch.arange(size, device=images.device) + 0.5) / size
        inside.append((position - center[:, axis, None]).abs() < sides[:, axis, None] * largest / 2)
    rectangle = (inside[1][:, :, None] & inside[0][:, None, :])[:, None]
    return images.masked_fill(rectangle, 0.0)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, without waiting for what a GPU has to do before."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def _pixel_centers(size: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(size, device=device) + 1) / size - 1


def _random_affine(augment: Augment, uniform: Tensor) -> Tensor:
    """Turn [B, 6] numbers in [0, 1) into [B, 2, 3] matrices."""
    signed = 2 * uniform - 1
    low, high = augment.scale
    return affine_matrix(
        angle=torch.deg2rad(signed[:, 0] * augment.degrees),
        shift=signed[:, 1:3] * augment.translate,
        scale=low + (high - low) * uniform[:, 3],
        shear=torch.deg2rad(signed[:, 4] * augment.shear),
        mirror=torch.where((uniform[:, 5] < 0.5) & augment.flip, -1.0, 1.0),
    )


def _require(condition: bool, name: str, value: object, expected: str) -> None:
    if not condition:
        raise ApotfxError(f"Augment {name}={value!r}: expected {expected}")
