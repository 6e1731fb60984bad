"""Recipes: what a training run is made of, presets, overrides and their help."""
