"""Stage 1: run teachers over images and write their features to a cache."""

__distribution__ = "radio-cache"  # by which `radio_cache.start` knows our packages
