"""Evaluations of features without labels: rank, similarity, nearest images, other input sizes."""
