import math

import pytest
import torch
import torchvision.transforms.functional as TF

from apotfx.errors import ApotfxError
from apotfx.training.augment import ELASTIC_POINTS, Augment, affine_matrix, draw, erase, transform, warp

EVERYTHING = Augment(degrees=30.0, translate=0.2, scale=(0.7, 1.3), shear=15.0, flip=True, elastic=0.05, erase=0.5)


def augment_batch(batch, augment, generator, **ranks):
    return transform(batch, augment, draw(augment, len(batch), generator, **ranks))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def images(count=8, channels=2, size=12):
    return torch.rand(count, channels, size, size, generator=generator(1))


def matrix(angle=0.0, right=0.0, down=0.0, scale=1.0, shear=0.0, mirror=1.0, count=8):
    """One transform for every image; angles in degrees."""
    column = [torch.full((count,), float(value)) for value in (angle, right, down, scale, shear, mirror)]
    return affine_matrix(
        column[0].deg2rad(), torch.stack(column[1:3], dim=1), column[3], column[4].deg2rad(), column[5]
    )


def assert_close(actual, expected, atol=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def test_none_returns_the_images_themselves():
    batch = images()
    assert augment_batch(batch, Augment.none(), generator()) is batch


def test_the_identity_matrix_is_exact():
    assert torch.equal(matrix(count=2), torch.eye(3)[:2].expand(2, 2, 3))
    assert_close(warp(images(), matrix()), images())


@pytest.mark.parametrize("quarter_turns", [1, 2, 3])
def test_rotation_is_clockwise(quarter_turns):
    expected = images().rot90(-quarter_turns, dims=(2, 3))
    assert_close(warp(images(), matrix(angle=90 * quarter_turns)), expected)


@pytest.mark.parametrize("right, down", [(3, 0), (0, 2), (-4, 5)])
def test_translation_by_whole_pixels_brings_in_zeros(right, down):
    expected = images().roll((down, right), dims=(2, 3))
    rows, columns = torch.arange(12) - down, torch.arange(12) - right
    inside = ((rows >= 0) & (rows < 12))[:, None] & ((columns >= 0) & (columns < 12))
    assert_close(warp(images(), matrix(right=right / 12, down=down / 12)), expected * inside)


def test_mirror_is_left_to_right():
    assert_close(warp(images(), matrix(mirror=-1)), images().flip(3))


def test_magnification_by_two_shows_the_middle():
    ramp = torch.arange(12.0).expand(8, 1, 12, 12)
    expected = 5.5 + (torch.arange(12.0) - 5.5) / 2
    assert_close(warp(ramp, matrix(scale=2.0))[:, :, 3:9], expected.expand(8, 1, 6, 12))


@pytest.mark.parametrize("size", [12, 13])
@pytest.mark.parametrize(
    "angle, right, down, scale, shear",
    [
        (20, 0, 0, 1.0, 0),
        (0, 0, 0, 1.0, 12),
        (-35, 2, -1, 1.2, 10),
        (160, -3, 1, 0.8, -25),
    ],
)
def test_equals_torchvision(size, angle, right, down, scale, shear):
    batch = images(size=size)
    expected = TF.affine(batch, angle, [right, down], scale, [shear, 0.0], TF.InterpolationMode.BILINEAR)
    assert_close(warp(batch, matrix(angle, right / size, down / size, scale, shear)), expected, atol=1e-4)


def test_published_mirrors_about_half_of_the_images():
    batch = images(count=1000, channels=1, size=6)
    flipped = augment_batch(batch, Augment.named("flip", "mnist"), generator())
    is_kept = (flipped - batch).abs().amax(dim=(1, 2, 3)) < 1e-5
    is_mirrored = (flipped - batch.flip(3)).abs().amax(dim=(1, 2, 3)) < 1e-5
    assert (is_kept ^ is_mirrored).all()
    assert 450 < is_mirrored.sum() < 550


@pytest.mark.parametrize(
    "augment, bound",
    [
        (Augment(translate=0.25), 0.25),
        (Augment(translate=0.1), 0.1),
    ],
)
def test_translation_fills_its_range(augment, bound):
    # One bright pixel per image: its center of mass moves by the drawn shift.
    batch = torch.zeros(4000, 1, 21, 21)
    batch[:, :, 10, 10] = 1
    moved = augment_batch(batch, augment, generator())[:, 0]
    shift = (moved * (torch.arange(21.0) - 10)).sum(dim=(1, 2)) / 21
    assert bound * 0.99 < shift.max() <= bound + 1e-5 and -bound - 1e-5 <= shift.min() < -bound * 0.99
    assert shift.mean().abs() < 4 * bound / math.sqrt(3 * 4000)


def test_elastic_points_that_move_alike_translate():
    points = torch.tensor([3 / 12, -2 / 12])[None, :, None, None].expand(8, 2, ELASTIC_POINTS, ELASTIC_POINTS)
    expected = warp(images(), matrix(right=-3 / 12, down=2 / 12))
    assert_close(warp(images(), matrix(), points), expected)


def test_elastic_points_move_their_surroundings():
    size = 3 * 7 + 1
    batch = images(size=size)
    points = torch.zeros(8, 2, ELASTIC_POINTS, ELASTIC_POINTS)
    points[:, 0, 1, 2] = 2 / size
    moved = warp(batch, matrix(), points)
    assert_close(moved[:, :, 7, 14], batch[:, :, 7, 16])
    for row, column in [(7, 7), (0, 14), (21, 14), (7, 21), (14, 14)]:  # the points around it
        assert_close(moved[:, :, row, column], batch[:, :, row, column])
    between = (moved - batch)[:, :, 6:9, 12:17].abs()
    assert (between.amax(dim=(0, 1)) > 1e-3).all()


def test_elastic_displacements_have_the_given_standard_deviation():
    # A ramp shows how far each of its pixels was moved; those beside the border see zeros from outside.
    size = 3 * 10 + 1
    ramp = torch.arange(float(size)).expand(2000, 1, size, size)
    moved = augment_batch(ramp, Augment(elastic=0.02), generator())
    shift = (moved - ramp)[:, 0, 10, 10] / size
    assert abs(shift.std().item() / 0.02 - 1) < 4 / math.sqrt(2 * 2000)
    assert shift.mean().abs() < 4 * 0.02 / math.sqrt(2000)


def test_erase_blacks_out_its_rectangle():
    batch = torch.ones(2, 3, 10, 8)
    erased = erase(batch, torch.tensor([[0.5, 0.3], [0.0, 1.0]]), torch.tensor([[0.5, 0.4], [1.0, 1.0]]), 1.0)
    expected = torch.ones(2, 3, 10, 8)
    expected[0, :, 1:5, 2:6] = 0
    expected[1, :, 5:, :4] = 0
    assert torch.equal(erased, expected) and torch.equal(batch, torch.ones(2, 3, 10, 8))


def test_erased_shares_fill_their_range():
    kept = augment_batch(torch.ones(2000, 1, 20, 20), Augment(erase=0.5), generator())[:, 0]
    black = kept < 0.5
    sides = torch.stack([black.any(1).sum(1), black.any(2).sum(1)]) / 20
    assert sides.max() <= 0.5 and sides.max() > 0.45 and (sides.amin(0) == 0).any()
    assert (kept.flatten(1).min(1).values[sides.amin(0) > 0] == 0).all()


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_ranks_see_together_what_one_process_sees(world_size):
    whole = augment_batch(images(), EVERYTHING, generator(5))
    parts = [
        augment_batch(part, EVERYTHING, generator(5), rank=rank, world_size=world_size)
        for rank, part in enumerate(images().chunk(world_size))
    ]
    assert torch.equal(torch.cat(parts), whole)


def test_a_draw_is_a_function_of_the_generator_alone():
    batch, before = images(), torch.get_rng_state()
    first = augment_batch(batch, EVERYTHING, generator(5))
    assert torch.equal(batch, images())
    assert torch.equal(augment_batch(batch, EVERYTHING, generator(5)), first)
    assert not torch.equal(augment_batch(batch, EVERYTHING, generator(6)), first)
    assert torch.equal(torch.get_rng_state(), before)


def test_images_get_transforms_of_their_own_and_stay_in_range():
    batch = images(count=1).expand(8, -1, -1, -1)
    augmented = augment_batch(batch, EVERYTHING, generator())
    assert len({tuple(image.flatten().tolist()) for image in augmented}) == 8
    assert augmented.min() >= 0 and augmented.max() <= 1 and augmented.dtype == torch.float32


@pytest.mark.parametrize("dataset", ["mnist", "digits"])
def test_digits_are_not_mirrored_by_default(dataset):
    assert Augment.named("default", dataset) == Augment(degrees=10, translate=0.1, scale=(0.9, 1.1), shear=5)


@pytest.mark.parametrize("dataset", ["fashion-mnist", "cifar10", "folder"])
def test_other_images_are_mirrored_by_default(dataset):
    assert Augment.named("default", dataset) == Augment(translate=0.125, scale=(0.9, 1.1), flip=True)


@pytest.mark.parametrize("dataset", ["mnist", "digits", "cifar10"])
def test_strong_widens_the_default(dataset):
    default, strong = (Augment.named(name, dataset) for name in ("default", "strong"))
    assert strong.scale[0] < default.scale[0] and strong.scale[1] > default.scale[1]
    assert strong.flip == default.flip
    assert (strong.elastic > 0) == (dataset != "cifar10") and (strong.erase > 0) == (dataset == "cifar10")


@pytest.mark.parametrize(
    "field, value",
    [
        ("degrees", -1),
        ("degrees", 181),
        ("degrees", math.nan),
        ("translate", 1.0),
        ("translate", -0.1),
        ("scale", (1.1, 0.9)),
        ("scale", (0.0, 1.0)),
        ("shear", 90),
        ("elastic", -0.1),
        ("elastic", 1.0),
        ("erase", 1.1),
    ],
)
def test_ranges_are_checked(field, value):
    with pytest.raises(ApotfxError, match=f"^Augment {field}=.*: expected "):
        Augment(**{field: value})
