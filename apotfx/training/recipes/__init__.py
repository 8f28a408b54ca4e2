"""Recipes: settings of `TrainConfig`, a file each, which say how to use them and what to expect."""

from apotfx.training.recipes import best, default, published

RECIPES = {"published": published.SETTINGS, "default": default.SETTINGS, "best": best.SETTINGS}
