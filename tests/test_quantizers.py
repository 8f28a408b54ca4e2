import copy

import pytest
import torch
from helpers import LEVEL_SETS, level_set_id

from apotfx import ApotfxError, LevelSet
from apotfx import functional as F
from apotfx.functional import Operand
from apotfx.quantizers import NORMALIZATIONS, InputQuantizer, Quantizer, WeightQuantizer

LEVELS = LevelSet("apot", 4)


def weight(*shape):
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.05


def weight_quantizer(w, normalization="rescale", per_channel=False):
    return WeightQuantizer(LEVELS, w, per_channel=per_channel, normalization=normalization)


def test_a_fresh_input_quantizer_has_the_clip_of_the_paper():
    quantizer = InputQuantizer(LEVELS)
    assert quantizer.clip.shape == () and quantizer.clip == 8
    assert quantizer.needs_clip and not quantizer.calibrated


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2), (1, 2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_a_fresh_weight_quantizer_clips_at_3_standard_deviations(shape, normalization, per_channel):
    w = weight(*shape)
    quantizer = weight_quantizer(w, normalization, per_channel)
    assert quantizer.clip.shape == ((shape[0], *(1 for _ in shape[1:])) if per_channel else ())
    expected = 3 * w.std() if normalization == "none" else torch.tensor(3.0)
    assert torch.equal(quantizer.clip.detach(), expected.expand_as(quantizer.clip))


def test_normalization_none():
    w = weight(4, 3)
    normalized, unit = weight_quantizer(w, "none").normalize(w)
    assert normalized is w and unit is None


def test_normalization_rescale():
    w = weight(4, 3)
    normalized, unit = weight_quantizer(w, "rescale").normalize(w)
    std = ((w - w.mean()) ** 2).sum().div(11).sqrt()  # unbiased
    torch.testing.assert_close(unit, std, rtol=1e-6, atol=0)
    assert normalized is w and unit.shape == ()
    _, given = weight_quantizer(w, "rescale").normalize(w, lambda tensor: tensor.sum())
    assert torch.equal(given, w.sum())


def test_normalization_standardize():
    w = weight(4, 3)
    normalized, unit = weight_quantizer(w, "standardize").normalize(w)
    assert torch.equal(normalized, (w - w.mean()) / w.std()) and unit is None
    assert abs(normalized.mean()) < 1e-6 and abs(normalized.std() - 1) < 1e-6


@pytest.mark.parametrize("normalization, divided", [("none", False), ("rescale", False), ("standardize", True)])
def test_mean_and_standard_deviation_are_constants_in_the_backward_pass(normalization, divided):
    w = weight(4, 3).requires_grad_()
    normalized, unit = weight_quantizer(w, normalization).normalize(w)
    grad = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))
    normalized.backward(grad)
    assert unit is None or not unit.requires_grad
    assert torch.equal(w.grad, grad / w.detach().std() if divided else grad)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("w", [torch.full((3, 2), 0.5), torch.zeros(3, 2), torch.tensor([[0.7]])],
                         ids=["constant", "zero", "single"])  # fmt: skip
def test_weights_without_deviation_stay_finite(normalization, w):
    quantizer = weight_quantizer(w, normalization)
    normalized, unit = quantizer.normalize(w)
    assert normalized.isfinite().all() and quantizer.clip > 0 and (unit is None or unit > 0)
    operand = Operand(normalized, quantizer.clip, unit, quantizer.encoding)
    assert operand.scale > 0 and F.encode(normalized, operand.used_clip, operand.levels).isfinite().all()


def test_an_unknown_normalization_is_refused():
    with pytest.raises(ApotfxError, match="normalization 'batch': unknown; choose one of none, standardize, rescale"):
        weight_quantizer(weight(2, 2), "batch")


def test_setting_the_clip():
    quantizer = weight_quantizer(weight(4, 3), per_channel=True)
    quantizer.set_clip(torch.tensor(2.0))
    assert torch.equal(quantizer.clip.detach(), torch.full((4, 1), 2.0))
    assert quantizer.calibrated and not quantizer.needs_clip
    assert isinstance(quantizer.clip, torch.nn.Parameter) and quantizer.clip.requires_grad


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_encode_and_scale_are_those_of_the_level_set(levels):
    quantizer = Quantizer(levels, torch.tensor(1.5))
    n = quantizer.encode(torch.tensor([9.0, -9.0, 0.0]))
    assert n.tolist() == [levels.max, -levels.max if levels.signed else 0, 0]
    assert torch.equal(quantizer.scale, torch.tensor(1.5) / levels.max)
    assert quantizer.encoding.max == levels.max and quantizer.encoding.min == -levels.max * levels.signed
    assert quantizer.encoding.set is levels and quantizer.encoding.rectifier is None
    assert quantizer.encoding.table.tolist() == list(levels.encoding_table)


def test_a_clip_that_is_not_positive_is_used_as_a_small_one():
    quantizer = Quantizer(LEVELS, torch.tensor([[-1.0], [0.0], [2.0]]))
    assert torch.equal(quantizer.used_clip, torch.tensor([[F.MIN_CLIP], [F.MIN_CLIP], [2.0]]))
    assert not quantizer.used_clip.requires_grad
    assert quantizer.encode(torch.tensor([[0.0], [1.0], [1.0]])).tolist() == [[0], [10], [6]]  # 5 is a tie


def test_the_state_is_the_clip_and_whether_it_came_from_data():
    assert sorted(InputQuantizer(LEVELS).state_dict()) == ["calibrated", "clip"]


def test_loading_remembers_whether_the_clip_came_from_data():
    source, target = InputQuantizer(LEVELS), InputQuantizer(LEVELS)
    fresh = copy.deepcopy(source.state_dict())
    source.set_clip(torch.tensor(0.3))
    target.load_state_dict(source.state_dict())
    assert target.clip == torch.tensor(0.3) and target.calibrated and not target.needs_clip
    target.load_state_dict(fresh)
    assert target.clip == 8 and not target.calibrated and target.needs_clip


def test_a_copy_is_independent():
    source = InputQuantizer(LEVELS)
    source.set_clip(torch.tensor(0.3))
    copied = copy.deepcopy(source)
    assert copied.clip == source.clip and copied.calibrated and not copied.needs_clip
    copied.set_clip(torch.tensor(0.4))
    assert source.clip == torch.tensor(0.3) and copied.levels == source.levels


def test_conversion_keeps_the_table_of_integers():
    quantizer = InputQuantizer(LEVELS).double()
    assert quantizer.clip.dtype == torch.float64 and not quantizer.table.is_floating_point()


def test_repr_tells_the_levels():
    assert repr(InputQuantizer(LevelSet("pot", 3, False))) == "InputQuantizer(pot, bits=3, unsigned)"
    assert repr(weight_quantizer(weight(2, 2), "none", True)) == (
        "WeightQuantizer(apot, bits=4, signed, per channel, normalization=none)"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_first_batch_that_is_not_finite_is_refused(value):
    quantizer = InputQuantizer(LevelSet("apot", 4))
    message = "first training batch: the input of layer fc is not finite; check the data and the weights"
    with pytest.raises(ApotfxError, match=message):
        quantizer.fit_first_batch(torch.tensor([1.0, value]), "the input of layer fc")
    assert quantizer.needs_clip and not quantizer.calibrated


def test_an_empty_first_batch_leaves_the_clip_for_the_next():
    quantizer = InputQuantizer(LevelSet("apot", 4))
    quantizer.fit_first_batch(torch.empty(0, 3), "the input of layer fc")
    assert quantizer.needs_clip
