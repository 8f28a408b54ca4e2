import copy
import pickle
from contextlib import nullcontext

import pytest
import torch
from helpers import LEVEL_SETS, level_set_id
from torch import nn

from apotfx import ApotfxError, LevelSet
from apotfx import functional as F
from apotfx.functional import Operand
from apotfx.quantizers import NORMALIZATIONS, PLACEHOLDER, InputQuantizer, Quantizer, WeightQuantizer

LEVELS = LevelSet("apot", 4)


def weight(*shape):
    return 0.2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.05


def weight_quantizer(w, normalization="rescale", per_channel=False):
    return WeightQuantizer(LEVELS, w, per_channel=per_channel, normalization=normalization)


def test_a_fresh_input_quantizer_has_the_placeholder():
    quantizer = InputQuantizer(LEVELS)
    assert quantizer.clip.shape == () and quantizer.clip == PLACEHOLDER
    assert quantizer.needs_data() and quantizer.has_placeholder()


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 2, 2), (1, 2, 1, 1, 3)], ids=str)
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("per_channel", [False, True], ids=["tensor", "channel"])
def test_a_fresh_weight_quantizer_has_the_placeholder(shape, normalization, per_channel):
    quantizer = weight_quantizer(weight(*shape), normalization, per_channel)
    assert quantizer.clip.shape == ((shape[0], *(1 for _ in shape[1:])) if per_channel else ())
    assert (quantizer.clip == PLACEHOLDER).all() and quantizer.needs_data()


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_the_clip_of_the_paper_is_3_standard_deviations(normalization):
    w = weight(4, 3)
    clip = weight_quantizer(w, normalization).paper_clip(w)
    assert torch.equal(clip, 3 * w.std() if normalization == "none" else torch.tensor(3.0))


@pytest.mark.parametrize("dtype, expected", [
    (torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32),
    (torch.float64, torch.float64),
], ids=str)  # fmt: skip
def test_clips_have_the_precision_of_the_weight_but_at_least_float32(dtype, expected):
    assert weight_quantizer(weight(4, 3).to(dtype)).clip.dtype == expected
    assert InputQuantizer(LEVELS, expected).clip.dtype == expected


@pytest.mark.parametrize("default", [torch.float64, torch.bfloat16], ids=str)
def test_clips_do_not_depend_on_the_default_dtype(default, default_dtype):
    default_dtype(default)
    assert InputQuantizer(LEVELS).clip.dtype == torch.float32
    assert weight_quantizer(weight(4, 3).float()).clip.dtype == torch.float32


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
    assert not quantizer.needs_data() and not quantizer.has_placeholder()
    assert isinstance(quantizer.clip, torch.nn.Parameter) and quantizer.clip.requires_grad


@pytest.mark.parametrize("levels", LEVEL_SETS, ids=level_set_id)
def test_encode_and_scale_are_those_of_the_level_set(levels):
    quantizer = Quantizer(levels, torch.tensor(1.5))
    n = quantizer.encode(torch.tensor([9.0, -9.0, 0.0]))
    assert n.tolist() == [levels.max, -levels.max if levels.signed else 0, 0]
    assert torch.equal(quantizer.scale, torch.tensor(1.5) / levels.max)
    assert quantizer.encoding.max == levels.max and quantizer.encoding.min == -levels.max * levels.signed
    assert quantizer.encoding.set is levels and quantizer.encoding.rectifier is None


def test_a_clip_that_is_not_positive_is_used_as_a_small_one():
    quantizer = Quantizer(LEVELS, torch.tensor([[-1.0], [0.0], [2.0]]))
    assert torch.equal(quantizer.used_clip, torch.tensor([[F.MIN_CLIP], [F.MIN_CLIP], [2.0]]))
    assert not quantizer.used_clip.requires_grad
    assert quantizer.encode(torch.tensor([[0.0], [1.0], [1.0]])).tolist() == [[0], [10], [6]]  # 5 is a tie


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_data_that_ask_for_the_placeholder_give_the_clip_beside_it(dtype):
    quantizer = InputQuantizer(LEVELS).to(dtype)
    quantizer.set_clip(PLACEHOLDER)
    assert not quantizer.has_placeholder() and not quantizer.needs_data()
    assert 0 < quantizer.clip.item() - PLACEHOLDER <= PLACEHOLDER * torch.finfo(dtype).eps
    per_channel = weight_quantizer(weight(2, 3), per_channel=True)
    per_channel.set_clip(torch.tensor([[PLACEHOLDER], [1.0]]))
    assert per_channel.clip.tolist() == [[PLACEHOLDER], [1.0]]  # which no fresh one is


def test_the_state_is_the_clip():
    for quantizer in (InputQuantizer(LEVELS), weight_quantizer(weight(4, 3))):
        assert list(quantizer.state_dict()) == ["clip"] and not list(quantizer.buffers())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_whether_the_clip_came_from_data_survives_another_dtype(dtype):
    fresh, fitted = InputQuantizer(LEVELS), InputQuantizer(LEVELS)
    fitted.set_clip(3.99)
    for quantizer in (fresh, fitted):
        quantizer.to(dtype).float()
    assert fresh.needs_data() and not fitted.needs_data()


def test_loading_tells_whether_the_clip_came_from_data():
    source, target = InputQuantizer(LEVELS), InputQuantizer(LEVELS)
    fresh = copy.deepcopy(source.state_dict())
    source.set_clip(torch.tensor(0.3))
    target.load_state_dict(source.state_dict())
    assert target.clip == torch.tensor(0.3) and not target.needs_data()
    target.load_state_dict(fresh)
    assert target.clip == PLACEHOLDER and target.needs_data()


@pytest.mark.parametrize("parent", [False, True], ids=["alone", "inside"])
@pytest.mark.parametrize("calibrated", [False, True], ids=["fresh", "calibrated"])
def test_the_flag_in_states_of_earlier_versions_is_read(parent, calibrated):
    quantizer = InputQuantizer(LEVELS)
    module, prefix = (nn.Sequential(quantizer), "0.") if parent else (quantizer, "")
    state = {f"{prefix}clip": torch.tensor(8.0), f"{prefix}calibrated": torch.tensor(calibrated)}
    given = dict(state)
    assert module.load_state_dict(state, strict=True) == ([], []) and state == given
    assert quantizer.needs_data() is not calibrated and quantizer.clip == (8 if calibrated else PLACEHOLDER)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda q: pickle.loads(pickle.dumps(q))], ids=["deepcopy", "pickle"])
def test_a_copy_is_independent(how):
    source = InputQuantizer(LEVELS)
    source.set_clip(torch.tensor(0.3))
    copied = how(source)
    assert copied.clip == source.clip and not copied.needs_data()
    copied.set_clip(torch.tensor(0.4))
    assert source.clip == torch.tensor(0.3) and copied.levels == source.levels
    assert how(InputQuantizer(LEVELS)).needs_data()


@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99, 0.999, 0.9998, 0.9999, 0.99999])
def test_no_moving_average_moves_the_placeholder(decay):
    """By the formulas of torch and of timm."""
    clip = InputQuantizer(LEVELS).clip.detach()
    averages = [clip.clone() for _ in range(4)]
    for n in range(100):
        averages[0].lerp_(clip, 1 - decay)
        averages[1] = decay * averages[1] + (1 - decay) * clip
        averages[2].mul_(decay).add_(clip, alpha=1 - decay)
        averages[3] += (clip - averages[3]) / (n + 1)
    assert all(average == PLACEHOLDER for average in averages)


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
    assert quantizer.needs_data()


@pytest.mark.parametrize("x", [torch.empty(0, 3), torch.zeros(4)], ids=["empty", "zeros"])
def test_a_first_batch_that_holds_nothing_leaves_the_clip_for_the_next(x):
    quantizer = InputQuantizer(LevelSet("apot", 4))
    quantizer.fit_first_batch(x, "the input of layer fc")
    assert quantizer.needs_data()
    quantizer.fit_first_batch(torch.tensor([0.0, 1.0]), "the input of layer fc")
    assert not quantizer.needs_data() and quantizer.clip != PLACEHOLDER


@pytest.mark.parametrize("low, signed, refused", [(-1e-9, False, True), (0.0, False, False), (-3.0, True, False)])
def test_unsigned_levels_require_inputs_that_are_not_negative(low, signed, refused):
    quantizer = InputQuantizer(LevelSet("apot", 4, signed))
    expected = pytest.raises(ApotfxError, match=r"layer fc: now, its input reaches -1e-09, expected at least 0 .*\(it is a square\)")
    with expected if refused else nullcontext():
        quantizer.require_sign(low, "fc", "now", "it is a square")


def test_a_clip_that_is_not_settled_is_computed_with_as_a_copy():
    """So that it may be set before the backward pass; and the placeholder learns nothing."""
    quantizer = InputQuantizer(LEVELS)
    assert quantizer.operand_clip is not quantizer.clip and quantizer.operand_clip.requires_grad  # not looked at yet
    assert quantizer.needs_data() and not quantizer.operand_clip.requires_grad
    assert quantizer.eval().operand_clip.requires_grad
    quantizer.train().set_clip(2.0)
    assert quantizer.operand_clip is quantizer.clip
