"""Recipes: settings of `TrainConfig`, a file each, which says how to use them and what to expect."""

from apotfx.training.recipes import best, default, published

RECIPES = {"published": published, "default": default, "best": best}


def settings_of(recipe: str) -> dict:
    """What a recipe sets; nothing for an unknown name."""
    return RECIPES[recipe].SETTINGS if recipe in RECIPES else {}
