"""Evaluations of features that need no labels: rank, likeness, nearest images, other input sizes."""
