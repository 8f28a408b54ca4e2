import dataclasses
import re

import pytest

from apotfx.errors import ApotfxError
from apotfx.policy import BitPolicy
from apotfx.training.config import TrainConfig
from apotfx.training.recipes import RECIPES, settings_of


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"recipe": "x"}, "--recipe x: expected one of published, default, best"),
        ({"scheme": "x"}, "--scheme x: expected one of apot, pot, uniform"),
        ({"bit": 9}, "--bit 9: expected 2 to 8, or 32"),
        ({"bit": 1}, "--bit 1: expected 2 to 8, or 32"),
        ({"train_images": 0}, "--train-images 0: expected at least 2"),
        ({"epochs": 0}, "--epochs 0: expected 1 to 1000000"),
        ({"image_size": 10**9}, "--image-size 1000000000: expected 1 to 4096"),
        ({"batch_size": 1}, "--batch-size 1: expected at least 2"),
        ({"lr": 0.0}, "--lr 0.0: expected more than 0"),
        ({"lr": float("nan")}, "--lr nan: expected more than 0"),
        ({"momentum": 1.0}, "--momentum 1.0: expected at least 0 and less than 1"),
        ({"ema": -0.1}, "--ema -0.1: expected at least 0 and less than 1"),
        ({"weight_decay": float("inf")}, "--weight-decay inf: expected at least 0"),
        ({"teacher_weight": 1.5}, "--teacher-weight 1.5: expected 0 to 1"),
        ({"schedule": "x"}, "--schedule x: expected one of"),
        ({"augment": "x"}, "--augment x: expected one of"),
        ({"clip_init": "x"}, "--clip-init x: expected one of"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ApotfxError, match="^" + re.escape(message)):
        TrainConfig(**settings)


def test_round_trip():
    config = TrainConfig(bit=3, scheme="uniform", policy=BitPolicy.default(3).to_dict())
    assert TrainConfig.from_dict(dataclasses.asdict(config), "test") == config


def test_an_unknown_key_is_named():
    with pytest.raises(ApotfxError, match="here: unknown key 'learning_rate'; another version wrote it"):
        TrainConfig.from_dict({"learning_rate": 1.0}, "here")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epochs", 2.0), ("epochs", True), ("lr", "0.1"), ("lr", float("nan")), ("ema", None), ("amp", 1), ("arch", 3),
        ("arch", "a\nb"), ("teacher", "x"), ("teacher", [1]), ("policy", []), ("image_size", "8"), ("pretrained", 1),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_named(key, value):
    with pytest.raises(ApotfxError, match=f"^here: {key} is a {type(value).__name__}, which it cannot be"):
        TrainConfig.from_dict({key: value}, "here")


def test_a_policy_that_is_none_is_named():
    with pytest.raises(ApotfxError, match="^here: policy: expected one key `rules`"):
        TrainConfig.from_dict({"policy": {"rules": []}}, "here")


def test_the_published_recipe_is_the_published_one():
    config = TrainConfig(**settings_of("published"))
    assert (config.batch_size, config.lr, config.momentum, config.weight_decay) == (128, 0.01, 0.9, 1e-4)
    assert (config.schedule, config.epochs, config.augment, config.ema) == ("constant", 25, "flip", 0.0)


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_documented_and_valid(recipe):
    assert f"python tools/train.py --recipe {recipe} " in RECIPES[recipe].__doc__ or recipe == "default"
    TrainConfig(recipe=recipe, **settings_of(recipe))


@pytest.mark.parametrize(
    ("config", "policy"),
    [
        (TrainConfig(bit=3), BitPolicy.default(3)),
        (TrainConfig(bit=32), BitPolicy.default(32)),
        (TrainConfig(bit=32, recipe="published"), BitPolicy.default(32)),
        (TrainConfig(bit=5, scheme="uniform", recipe="published"), BitPolicy.published(5, "uniform")),
        (TrainConfig(bit=5, policy=BitPolicy.default(2).to_dict()), BitPolicy.default(2)),
    ],
    ids=["default", "float", "float published", "published", "own policy"],
)
def test_which_policy(config, policy):
    assert config.bit_policy() == policy
