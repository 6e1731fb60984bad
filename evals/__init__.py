"""Evaluations that compare a student with its teachers and with the same network untrained."""

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages
