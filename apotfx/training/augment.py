"""Random affine transforms and flips of whole image batches."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from apotfx.errors import ApotfxError


@dataclass(frozen=True)
class Augment:
    """Ranges that each image's own transform is drawn from, uniformly; the default leaves images as they are.

    Attributes:
        degrees: Rotation about the center within [-degrees, degrees], 0 to 180.
        translate: Shift along each axis within [-translate, translate] of the size, 0 <= translate < 1.
        scale: Range (low, high) of the magnification, 0 < low <= high.
        shear: Horizontal shear within [-shear, shear] degrees, 0 <= shear < 90.
        flip: Mirror left to right with probability 1/2.

    Raises:
        ApotfxError: A range is not as above.
    """

    degrees: float = 0.0
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    shear: float = 0.0
    flip: bool = False

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

    @classmethod
    def none(cls) -> "Augment":
        """Images as they are."""
        return cls()

    @classmethod
    def published(cls) -> "Augment":
        """The published MNIST recipe: flips alone, which mirror digits."""
        return cls(flip=True)

    @classmethod
    def default_for(cls, dataset: str) -> "Augment":
        """The recommended ranges for a data set's name; handwritten digits are never mirrored."""
        if dataset in ("mnist", "digits"):
            return cls(degrees=10.0, translate=0.1, scale=(0.9, 1.1), shear=5.0)
        return cls(translate=0.125, scale=(0.9, 1.1), flip=True)


def augment_batch(
    images: Tensor, augment: Augment, generator: torch.Generator, *, rank: int = 0, world_size: int = 1
) -> Tensor:
    """Transform every image by its own draw, bilinearly, with zeros from outside; `images` do not change.

    The parameters are drawn for all ranks' images and each rank takes its own, so that together the ranks see
    what one process would.

    Args:
        images: float [B, C, S, S] in [0, 1]: this rank's share of a global batch of `B * world_size` images.
        augment: Ranges to draw from.
        generator: A CPU generator to draw with.
        rank: Index of this process, 0 <= rank < world_size.
        world_size: Number of processes.

    Returns:
        float [B, C, S, S]; `images` itself if `augment` is `Augment.none()`.
    """
    if augment == Augment.none():
        return images
    uniform = torch.rand(len(images) * world_size, 6, generator=generator)
    uniform = uniform[rank * len(images) : (rank + 1) * len(images)]
    return warp(images, _draw(augment, uniform))


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


def warp(images: Tensor, matrix: Tensor) -> Tensor:
    """Sample `images` [B, C, H, W] at `matrix` [B, 2, 3] times the output positions; zeros outside."""
    height, width = images.shape[2:]
    x = _pixel_centers(width, images.device)[:, None]
    y = _pixel_centers(height, images.device)[:, None, None]
    matrix = matrix.to(images.device)[:, None, None]
    # F.affine_grid is a matrix product: TF32 or autocast would round its positions.
    grid = matrix[..., 0] * x + matrix[..., 1] * y + matrix[..., 2]
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _pixel_centers(size: int, device: torch.device) -> Tensor:
    return (2 * torch.arange(size, device=device) + 1) / size - 1


def _draw(augment: Augment, uniform: Tensor) -> Tensor:
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
