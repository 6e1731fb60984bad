"""Quantiser tables and the distribution of bits over channels, for codecs of a fixed number of bits per channel."""

import heapq

import numpy as np
from numpy.typing import NDArray


def lloyd(values: NDArray[np.float32], width: int, rounds: int = 60) -> NDArray[np.float64]:
    """Return 2^width quantiser levels of least mean squared error for these values, ascending and distinct.

    Args:
        values: sample of the distribution, (n,).
        width: bits of a level number.
        rounds: iterations.

    Source: Lloyd, "Least squares quantization in PCM", 1982, method I.
    """
    count = 1 << width
    ordered = np.sort(values.astype(np.float64))
    # Start from the optimum for many levels: as dense as the cube root of the values' density (Panter and Dite, 1951).
    density, edges = np.histogram(ordered, 512)
    share = np.cumsum(np.cbrt(density + 1e-2))
    levels = np.interp((np.arange(count) + 0.5) / count * share[-1], share, edges[1:])
    # Running sums give the mean of any cell in constant time: values are sorted, so a cell is an interval.
    sums = np.concatenate([np.zeros(1), np.cumsum(ordered)])
    for _ in range(rounds):
        ends = np.concatenate([[0], np.searchsorted(ordered, (levels[1:] + levels[:-1]) / 2), [len(ordered)]])
        members = np.diff(ends)
        # Each level moves to the mean of the values nearest to it. Empty cells keep theirs.
        levels = np.where(members > 0, np.diff(sums[ends]) / np.maximum(members, 1), levels)
        levels = np.sort(levels)
    # Levels of empty cells may coincide: move them apart, so that each code decodes to a value of its own.
    smallest = 1e-6 * max(float(np.abs(levels).max()), 1e-6)
    return np.maximum.accumulate(levels + smallest * np.arange(count))


def bit_order(
    normalised: NDArray[np.float32], importance: NDArray[np.float32], tables: list[NDArray[np.float64]]
) -> NDArray[np.int64]:
    """Return channels in the order in which they get their bits: each next bit lowers the measured error most.

    Args:
        normalised: (n, c) coordinates divided by their gains and scales.
        importance: (n, c) weight of a squared error of each normalised coordinate.
        tables: quantiser levels of 1, 2, ... bits.
    """
    # (widths, c): mean weighted error of every channel without bits, with one bit, with two ...
    errors = [(importance * np.square(normalised)).mean(axis=0)]
    for table in tables:
        nearest = table[np.searchsorted((table[1:] + table[:-1]) / 2, normalised)]
        errors.append((importance * np.square(normalised - nearest)).mean(axis=0))
    savings = _savings(np.stack(errors))
    # A heap has its smallest entry first, hence the sign.
    queue = [(-float(savings[0, channel]), channel) for channel in range(savings.shape[1])]
    heapq.heapify(queue)
    widths = np.zeros(savings.shape[1], np.int64)
    order: list[int] = []
    while queue:
        _, channel = heapq.heappop(queue)
        order.append(channel)
        widths[channel] += 1
        if widths[channel] < len(tables):
            heapq.heappush(queue, (-float(savings[widths[channel], channel]), channel))
    return np.array(order)


def _savings(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the error saved by each further bit, (widths - 1, c), for errors (widths, c); never more than by the one before.

    A first bit may save nothing where a second one saves almost all (zero nearly everywhere, far out elsewhere): each then
    counts as half of both. So these are the slopes of the errors' convex minorant, by the min-max formula of isotonic
    regression.

    Source: Shoham and Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988.
    """
    bits = len(errors) - 1
    slopes = np.full((bits, bits, errors.shape[1]), -np.inf)  # [a, b]: mean saving of the bits a to b
    for a in range(bits):
        for b in range(a, bits):
            slopes[a, b] = (errors[a] - errors[b + 1]) / (b - a + 1)
    savings = np.stack([slopes[: bit + 1, bit:].max(axis=1).min(axis=0) for bit in range(bits)])
    # One more bit may raise the error measured on a sample; it is then worth nothing.
    return np.maximum(savings, 0.0)
