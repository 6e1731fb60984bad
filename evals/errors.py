"""Errors of the evaluations.

EvalError(RadioCacheError)   an evaluation cannot be done with these data, runs or settings
"""

from radio_cache.errors import RadioCacheError


class EvalError(RadioCacheError):
    """An evaluation cannot be done: no labels, no common classes, nothing to compare."""
