"""Is the student any good? Evaluations that put teachers, the student and an untrained student side by side."""

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages
