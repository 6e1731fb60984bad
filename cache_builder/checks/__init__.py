"""Checks of a finished cache against its teachers: recomputed features, and what crops of cached maps cost."""
