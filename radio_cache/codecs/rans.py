"""Entropy coding of rows of small integers with range asymmetric numeral systems (rANS), one frequency table per run.

Source: J. Duda, "Asymmetric numeral systems", arXiv 1311.2540. A row is, all little-endian:

    uint32  number of words w, uint32 number of escaped values e
    uint32  states (lanes)
    uint16  words (w), in the order in which decoding takes them
    int16   escaped values (e)
    zeros up to the row's size

Symbol i of a run changes state i % lanes. Decoding looks up the state's lowest 12 bits (its slot) in the table of the run:
state <- frequency * (state >> 12) + slot - first slot of the symbol; below 2^16 it takes a word: state <- state << 16 | word.
Symbols 0, 1, 2, 3, 4 ... are the values 0, -1, 1, -2, 2 ...; symbol 255 stands for the next escaped value, which is one without
a slot in its table.

`radio_cache.native._ans` does the same in C. NumPy does it where that was not built, all rows side by side.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

PROBABILITY_BITS = 12
SLOTS = 1 << PROBABILITY_BITS
SYMBOLS = 256
ESCAPE = SYMBOLS - 1
LOWEST_STATE = 1 << 16
MAX_LANES = 64
HEADER_BYTES = 8
SPARE_BYTES = 16
"""Zeros at the end of a row: decoding in C looks at up to four words too many before it compares."""

LARGEST_VALUE = 2**15 - 1
"""The largest magnitude that is coded: rows are decoded to int16."""

_VERSION = 1


def _native() -> Any:
    if os.environ.get("RADIO_CACHE_PURE_PYTHON"):
        return None
    try:
        from radio_cache.native import _ans
    except ImportError:
        return None
    # A module that was built before the last update has another interface: NumPy does the work until the next install.
    return _ans if getattr(_ans, "VERSION", None) == _VERSION else None


native: Any = _native()


class RansError(ValueError):
    """A row that no encoder wrote."""


@dataclass(frozen=True, eq=False)
class RansCoder:
    """The code of rows of `order.size` integers.

    Args:
        runs: (runs,) int32, symbols of each run, in coding order.
        order: (symbols,) int32, for each symbol in coding order its index in a row of values.
        frequencies: (runs, 256) uint16, 4096 in a row. A symbol with frequency 0 is escaped. Symbol 255 has at least 1.
        lanes: states that take turns. Each costs 4 bytes a row, and lets decoders work on more symbols at once.
    """

    runs: NDArray[np.int32]
    order: NDArray[np.int32]
    frequencies: NDArray[np.uint16]
    lanes: int

    @cached_property
    def starts(self) -> NDArray[np.uint16]:
        """(runs, 256) first slot of every symbol."""
        ends = np.cumsum(self.frequencies, axis=1, dtype=np.int64)
        return (ends - self.frequencies).astype(np.uint16)

    @cached_property
    def _symbol_of_slot(self) -> NDArray[np.uint8]:
        symbols = np.arange(SYMBOLS, dtype=np.uint8)
        return np.stack([np.repeat(symbols, frequencies) for frequencies in self.frequencies])

    @cached_property
    def _tables(self) -> NDArray[np.uint32]:
        """(runs, 4096) of a slot: its symbol (8 bits), frequency less 1 (12 bits), distance from its first slot (12 bits)."""
        symbols = self._symbol_of_slot.astype(np.int64)
        frequencies = np.take_along_axis(self.frequencies.astype(np.int64), symbols, axis=1)
        distances = np.arange(SLOTS) - np.take_along_axis(self.starts.astype(np.int64), symbols, axis=1)
        return (symbols << 24 | (frequencies - 1) << 12 | distances).astype(np.uint32)

    @property
    def largest_row_bytes(self) -> int:
        """Bytes that every row fits into: at most 12 bits of words and 2 bytes of an escaped value for each symbol."""
        return self.smallest_row_bytes + -(-PROBABILITY_BITS * self.order.size // 16) * 2 + 2 * self.order.size

    @property
    def smallest_row_bytes(self) -> int:
        """Bytes of a row without a word."""
        return self._head_bytes + SPARE_BYTES

    @property
    def _head_bytes(self) -> int:
        return HEADER_BYTES + 4 * self.lanes

    def encode(self, values: NDArray[np.int16], row_bytes: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """Encode rows of values (n, symbols).

        Returns:
            (n, row_bytes) rows, and the bytes that each row takes; 0 for a row that does not fit, whose bytes mean nothing.
        """
        values = np.ascontiguousarray(values, np.int16)
        out = np.empty((len(values), row_bytes), np.uint8)
        lengths = np.zeros(len(values), np.int64)
        if native is not None:
            native.encode(values, self.runs, self.order, self.frequencies, self.starts, self.lanes, out, lengths)
        else:
            self._encode(values, out, lengths)
        return out, lengths

    def decode(self, rows: NDArray[np.uint8]) -> NDArray[np.int16]:
        """Decode rows (n, row_bytes) to values (n, symbols).

        Raises:
            RansError: for a row that no encoder wrote. Nothing outside a row is read, whatever its bytes are.
        """
        rows = np.ascontiguousarray(rows)
        out = np.empty((len(rows), self.order.size), np.int16)
        if native is not None and self.order.size:
            failed = native.decode(rows, self.runs, self.order, self._tables, self.lanes, out)
            if failed >= 0:
                raise RansError(f"row {failed} is no code of this codec")
        else:
            self._decode(rows, out)
        return out

    def _steps(self) -> Iterator[tuple[int, int, int]]:
        """Yield (run, first symbol, end) of the steps in which each lane codes one symbol at most."""
        first = 0
        for run, length in enumerate(self.runs.tolist()):
            for at in range(first, first + length, self.lanes):
                yield run, at, min(at + self.lanes, first + length)
            first += length

    def _encode(self, values: NDArray[np.int16], out: NDArray[np.uint8], lengths: NDArray[np.int64]) -> None:
        ordered = values[:, self.order].astype(np.int64)
        symbols = np.minimum(np.where(ordered < 0, -2 * ordered - 1, 2 * ordered), ESCAPE)
        run_of = np.repeat(np.arange(len(self.runs)), self.runs)
        symbols = np.where(self.frequencies[run_of, symbols] > 0, symbols, ESCAPE)
        states = np.full((len(values), self.lanes), LOWEST_STATE, np.int64)
        words = np.zeros(ordered.shape, np.uint16)
        is_word = np.zeros(ordered.shape, np.bool_)
        for run, first, end in reversed(list(self._steps())):
            step = symbols[:, first:end]
            shares = self.frequencies[run, step].astype(np.int64)
            lanes = states[:, : end - first]
            full = lanes >= shares << (32 - PROBABILITY_BITS)
            words[:, first:end], is_word[:, first:end] = lanes & 0xFFFF, full
            lanes = np.where(full, lanes >> 16, lanes)
            states[:, : end - first] = (lanes // shares << PROBABILITY_BITS) + lanes % shares + self.starts[run, step]
        for row in range(len(values)):
            # Decoding takes the word that a symbol left after that symbol, so words follow in the order of symbols.
            escaped = ordered[row][symbols[row] == ESCAPE].astype("<i2").tobytes()
            taken = words[row][is_word[row]].astype("<u2").tobytes()
            head = np.array([len(taken) // 2, len(escaped) // 2, *states[row]], "<u4").tobytes()
            data = head + taken + escaped
            if len(data) + SPARE_BYTES <= out.shape[1]:
                lengths[row] = len(data)
                out[row] = np.frombuffer(data.ljust(out.shape[1], b"\0"), np.uint8)

    def _decode(self, rows: NDArray[np.uint8], out: NDArray[np.int16]) -> None:
        if rows.shape[1] < self.smallest_row_bytes:
            raise RansError(f"rows of {rows.shape[1]} bytes are too short for this codec")
        head_bytes = self._head_bytes
        header = rows[:, :head_bytes].copy().view("<u4").astype(np.int64)
        num_words, num_escapes, states = header[:, 0], header[:, 1], header[:, 2:].copy()
        ends = head_bytes + 2 * num_words + 2 * num_escapes
        self._refuse(ends + SPARE_BYTES > rows.shape[1])
        words = np.zeros((len(rows), int(num_words.max(initial=0)) + self.lanes), np.int64)
        for row, count in enumerate(num_words.tolist()):
            words[row, :count] = rows[row, head_bytes:][: 2 * count].copy().view("<u2")
        taken = np.zeros(len(rows), np.int64)
        symbols = np.empty(out.shape, np.uint8)
        for run, first, end in self._steps():
            lanes = states[:, : end - first]
            slots = lanes & (SLOTS - 1)
            step = self._symbol_of_slot[run, slots]
            lanes = self.frequencies[run, step] * (lanes >> PROBABILITY_BITS) + slots - self.starts[run, step]
            short = lanes < LOWEST_STATE
            position = np.minimum(taken[:, None] + np.cumsum(short, axis=1) - short, words.shape[1] - 1)
            lanes = np.where(short, lanes << 16 | np.take_along_axis(words, position, axis=1), lanes)
            taken += short.sum(axis=1)
            self._refuse(taken > num_words)
            states[:, : end - first], symbols[:, first:end] = lanes, step
        self._refuse((states != LOWEST_STATE).any(axis=1) | (taken != num_words))
        values = symbols.astype(np.int16)
        values = np.where(values & 1, -((values + 1) >> 1), values >> 1).astype(np.int16)
        self._refuse((symbols == ESCAPE).sum(axis=1) != num_escapes)
        for row in np.flatnonzero(num_escapes):
            first = head_bytes + 2 * num_words[row]
            escaped = rows[row, first : first + 2 * num_escapes[row]].copy().view("<i2")
            values[row, symbols[row] == ESCAPE] = escaped
        out[:, self.order] = values

    def _refuse(self, wrong: NDArray[np.bool_]) -> None:
        if wrong.any():
            raise RansError(f"row {int(np.argmax(wrong))} is no code of this codec")


def frequencies_of(counts: NDArray[np.float64]) -> NDArray[np.uint16]:
    """Round counts of symbols (runs, 256) to frequencies that sum to 4096 in each run.

    Symbols rarer than a third of a slot get none, because escaping them costs less than the slot does. Rounding goes to the
    largest remainders.
    """
    shares = counts + np.where(np.arange(SYMBOLS) == 0, 1e-9, 0)  # a run without symbols: all zeros
    shares = shares / shares.sum(axis=1, keepdims=True)
    rare = shares * SLOTS < 1 / 3
    shares[:, ESCAPE] += np.where(rare, shares, 0)[:, :ESCAPE].sum(axis=1)
    rare[:, ESCAPE] = False
    shares[rare] = 0
    least = ~rare
    ideal = shares * (SLOTS - least.sum(axis=1, keepdims=True))
    frequencies = np.floor(ideal).astype(np.int64) + least
    for row, ideal_row in zip(frequencies, ideal, strict=True):
        missing = SLOTS - int(row.sum())
        largest = np.argsort(np.floor(ideal_row) - ideal_row, kind="stable")[:missing]
        row[largest] += 1
    return frequencies.astype(np.uint16)
