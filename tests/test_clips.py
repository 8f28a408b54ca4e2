import pytest
import torch
from helpers import LEVEL_SETS, level_set_id

from apotfx import LevelSet
from apotfx import functional as F
from apotfx.clips import SAMPLES, extremes, fit_clip, minmax_clip, percentile_clip, sample

PER_TENSOR = torch.Size([])
GENERATOR = torch.Generator().manual_seed(0)
DISTRIBUTIONS = {
    "normal": torch.randn(5000, generator=GENERATOR),
    "half-normal": torch.randn(5000, generator=GENERATOR).relu(),
    "uniform": 2 * torch.rand(5000, generator=GENERATOR) - 1,
    "laplace": torch.empty(5000).exponential_(generator=GENERATOR) * torch.randn(5000, generator=GENERATOR).sign(),
    "with-outlier": torch.cat([torch.randn(5000, generator=GENERATOR), torch.tensor([30.0])]),
    "tiny": torch.randn(5000, generator=GENERATOR) * 1e-6,
}


def error(x, clip, levels):
    """Mean squared error per clip of the column `clip`."""
    return (F.fake_quantize(x.expand(len(clip), -1), clip, F.Levels(levels)) - x).square().mean(1)


@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_no_clip_is_much_better_than_the_fitted_one(x, levels):
    """The clips tried are in the end 1/48 octave apart, so one lies within 0.73% of the best clip.

    There the error is flat as long as steps are wider than that; with more bits it has many local minima.
    """
    largest = x.abs().max() if levels.signed else x.max()
    dense = (largest * torch.logspace(-8, 2, 900, base=2)).unsqueeze(1)
    fitted = fit_clip(x, levels, PER_TENSOR).reshape(1, 1)
    assert error(x, fitted, levels) <= (1.01 if levels.bits <= 5 else 1.1) * error(x, dense, levels).min()


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_values_that_are_representable_are_fitted_exactly(levels):
    x = torch.tensor(levels.ints, dtype=torch.float32) * 0.25
    assert fit_clip(x, levels, PER_TENSOR) == 0.25 * levels.max


@pytest.mark.parametrize("levels", [LevelSet("apot", 4), LevelSet("apot", 4, False)], ids=level_set_id)
def test_values_with_nothing_to_represent_give_1(levels):
    assert fit_clip(torch.zeros(10), levels, PER_TENSOR) == 1
    assert fit_clip(torch.zeros(3, 10), levels, torch.Size([3, 1])).tolist() == [[1], [1], [1]]
    if not levels.signed:
        assert fit_clip(-torch.rand(10), levels, PER_TENSOR) == 1


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_a_clip_per_channel_is_that_of_every_channel(signed):
    levels = LevelSet("apot", 4, signed)
    w = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 5).reshape(
        5, 1, 1, 1
    )
    w[2] = 0
    clip = fit_clip(w, levels, torch.Size([5, 1, 1, 1]))
    assert clip.shape == (5, 1, 1, 1)
    assert clip.flatten().tolist() == [fit_clip(row, levels, PER_TENSOR).item() for row in w]


@pytest.mark.parametrize("scale", [2.0**-20, 2.0**20])
def test_the_clip_scales_with_the_values(scale):
    x = DISTRIBUTIONS["normal"]
    expected = scale * fit_clip(x, LevelSet("apot", 4), PER_TENSOR)
    assert fit_clip(x * scale, LevelSet("apot", 4), PER_TENSOR) == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_dtypes_are_fitted_in_float32(dtype):
    x = DISTRIBUTIONS["normal"].to(dtype).requires_grad_()
    clip = fit_clip(x, LevelSet("apot", 4), PER_TENSOR)
    assert clip.dtype == torch.float32 and not clip.requires_grad
    assert torch.equal(clip, fit_clip(x.float(), LevelSet("apot", 4), PER_TENSOR))


@pytest.mark.parametrize("shape",
    [(10,), (SAMPLES,), (SAMPLES + 1,), (128, 16, 32, 32), (128, 3, 32, 32), (2, 3, 224, 224)],
                         ids=str)  # fmt: skip
def test_a_sample_prefers_no_place(shape):
    column = torch.arange(shape[-1]).expand(shape)
    some = sample(column)
    assert min(SAMPLES // 2, column.numel()) <= len(some) <= SAMPLES
    assert len(some) == column.numel() or column.numel() > SAMPLES
    counts = some.bincount(minlength=shape[-1])
    assert counts.max() - counts.min() <= 1


def test_a_sample_is_a_copy():
    x = torch.zeros(4)
    sample(x).add_(1)
    assert not x.any()


@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_minmax_is_the_largest_magnitude_that_the_levels_can_represent(x, signed):
    levels = LevelSet("apot", 4, signed)
    assert minmax_clip(x, levels, PER_TENSOR) == (x.abs().max() if signed else x.max())
    rows = x[-5000:].reshape(4, -1)
    per_channel = minmax_clip(rows, levels, torch.Size([4, 1]))
    assert torch.equal(per_channel, (rows.abs() if signed else rows).amax(1, keepdim=True))


def test_minmax_of_levels_that_reach_it_is_exact():
    levels = LevelSet("uniform", 8)
    x = torch.arange(-127, 128) * 0.5
    assert torch.equal(F.fake_quantize(x, minmax_clip(x, levels, PER_TENSOR), F.Levels(levels)), x)


@pytest.mark.parametrize(
    "percentile, expected", [(100, 10), (90, 9), (89.9, 9), (50, 5), (50.1, 6), (10, 1), (1e-6, 1)]
)
def test_percentile_is_the_nearest_rank(percentile, expected):
    x = torch.tensor([-3.0, 1, 2, -10, 4, 5, -6, 7, 8, 9])
    assert percentile_clip(x, LevelSet("apot", 4), percentile) == expected


def test_percentile_counts_what_an_unsigned_set_cannot_represent_as_0():
    x = torch.tensor([-8.0, -7, 0, 1, 2])
    assert [percentile_clip(x, LevelSet("apot", 4, False), p).item() for p in (61, 81, 60)] == [1, 2, 2]


@pytest.mark.parametrize("fit", [lambda x, s: minmax_clip(x, s, PER_TENSOR), lambda x, s: percentile_clip(x, s, 99)])
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "unsigned"])
def test_minmax_and_percentile_of_nothing_to_represent_give_1(fit, signed):
    assert fit(torch.zeros(10), LevelSet("apot", 4, signed)) == 1
    if not signed:
        assert fit(-torch.rand(10), LevelSet("apot", 4, signed)) == 1


@pytest.mark.parametrize("x", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS)
def test_extremes(x):
    assert extremes(x).tolist() == [x.min().item(), x.max().item()]
    assert extremes(x[:0]).shape == (0,)
