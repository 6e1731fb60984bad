"""Gains of packed klt: one 7-bit code for each of four groups of neighbouring channels of a token.

The gains take out what varies from token to token, so that a few quantiser levels fit all tokens.
"""

import numpy as np
from numpy.typing import NDArray

GAIN_BITS = 7
GAINS_PER_OCTAVE = 2
GAIN_OF_ONE = 63
"""Gain code g means 2^((g - 63) / 2): 2^-31.5 to 2^31.5. Code 127 of the first group is never emitted: it marks a hole."""

LARGEST_GAIN = 126

_GROUPS = 4


def group_starts(channels: int) -> NDArray[np.int64]:
    """Return the first channel of every gain group: four of about equal size, or one for fewer than 16 channels."""
    groups = _GROUPS if channels >= 4 * _GROUPS else 1
    return np.arange(groups) * channels // groups


def gain_codes(rms: NDArray[np.float32], loudest: NDArray[np.float32]) -> NDArray[np.int32]:
    """Return the codes of the gains nearest to the root mean squares of groups, or larger ones where a value needs it.

    Args:
        rms: root mean square of each group, in units of the channels' scales.
        loudest: gain below which the group's loudest value would exceed the limit of its channel.
    """
    with np.errstate(divide="ignore"):
        # log2(0) is minus infinity, for a silent group.
        nearest = np.rint(GAINS_PER_OCTAVE * np.log2(rms))
        needed = np.ceil(GAINS_PER_OCTAVE * np.log2(loudest))
    # Clipped before the conversion to integers: the gain of a silent group is minus infinity.
    return np.clip(np.maximum(nearest, needed) + GAIN_OF_ONE, 0, 1000).astype(np.int32)


def gain_values(codes: NDArray[np.int32]) -> NDArray[np.float32]:
    """Return the gains that these codes stand for."""
    return np.exp2((codes - GAIN_OF_ONE).astype(np.float32) / GAINS_PER_OCTAVE)
