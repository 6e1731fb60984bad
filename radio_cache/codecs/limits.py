"""Limits of the values that codecs store, and the errors for features and samples beyond them."""

from radio_cache.errors import CodecError

LARGEST_FEATURE = 2.0**60
"""Largest magnitude accepted by int8 and by the calibration of klt: sums of squares of larger values overflow float32."""


def not_finite(magnitude: float) -> CodecError:
    """Return the error for features that are NaN, infinite, or overflow while they are encoded.

    Args:
        magnitude: the largest magnitude among the features; NaN if one of them is.
    """
    return CodecError(
        f"the teacher returned {magnitude:g}, which no codec can store; if that is NaN or inf, run the teacher with "
        "--dtype float32"
    )


def too_few_tokens(count: int, codec: str) -> CodecError:
    """Return the error for a calibration sample of `count` tokens; images much thinner than the grid have hardly any."""
    return CodecError(f"{count} tokens are too few to calibrate the codec {codec} on: add images, or take --codec half")
