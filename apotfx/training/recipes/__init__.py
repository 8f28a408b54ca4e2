"""Recipes: settings of `TrainConfig`, a file each, which says how to use them and what to expect."""

from apotfx.training.recipes import best, default, published

RECIPES = {"published": published, "default": default, "best": best}


def settings_of(recipe: str, *, is_float: bool) -> dict:
    """What a recipe sets, for a float network or a quantized one; nothing for an unknown name."""
    module = RECIPES.get(recipe)
    float_settings = getattr(module, "FLOAT_SETTINGS", {}) if is_float else {}
    return getattr(module, "SETTINGS", {}) | float_settings
