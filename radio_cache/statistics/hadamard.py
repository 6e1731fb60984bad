"""Orthonormal Hadamard matrices: rotations whose entries all have the same magnitude, so that they spread variance evenly.

An order n is built as a Sylvester factor (a power of two) times the smallest base that the first of these gives:

- Paley I over a prime field, n = q + 1 with q = 3 mod 4, else Paley II, n = 2 (q + 1) with q = 1 mod 4.
  R. E. A. C. Paley, On orthogonal matrices, J. Math. and Phys. 12 (1933) 311-320.
- The same over fields of prime power order, or four circulants from stored sequences (`radio_cache.statistics.goethals_seidel`).
- A Kronecker product of two of the above, where no power of two completes a base.

**The matrix of an order is a contract.** PHI-S targets, and students trained on them, depend on every sign of it; tests
hold digests. A better construction may be added for orders that have none, never in place of one.
"""

from functools import cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

from radio_cache.errors import HadamardError
from radio_cache.statistics.goethals_seidel import CIRCULANT_QUADRUPLES, goethals_seidel

__all__ = ["hadamard", "has_hadamard"]

Signs = NDArray[np.int8]
"""(n, n), entries +1 and -1, rows orthogonal."""


def hadamard(order: int) -> NDArray[np.float64]:
    """Return the orthonormal Hadamard matrix H of an order n: (n, n), entries exactly +-1/sqrt(n), H @ H.T = I.

    The first entry is positive. Every version returns the same matrix, on every machine. It takes n^2 * 9 bytes, and about a
    second for n = 4096.

    Raises:
        HadamardError: if no such matrix exists or none is known; the message names the nearest orders that have one.
    """
    if not has_hadamard(order):
        raise HadamardError(_no_matrix(order))
    return _signs(order) / np.sqrt(np.float64(order))


@cache
def has_hadamard(order: int) -> bool:
    """Return whether `hadamard(order)` returns a matrix. Quick: nothing is built."""
    return order in (1, 2) or (order > 0 and order % 4 == 0 and _factors(order) is not None)


def _no_matrix(order: int) -> str:
    if order < 1:
        return f"there is no Hadamard matrix of order {order}: an order is at least 1."
    # There is always a nearest one: the powers of two.
    below = next(n for n in range(order - 1, 0, -1) if has_hadamard(n))
    above = next(n for n in range(order + 1, 4 * order + 1) if has_hadamard(n))
    why = (
        "the order is a multiple of 4, but none of the known constructions gives it"
        if order % 4 == 0
        else "none exists, because orders above 2 must be multiples of 4"
    )
    return (
        f"no Hadamard matrix of order {order}: {why}. Nearest orders that work: {below} and {above}; "
        "choose another normalisation for this teacher, or pad its channels with zeros to the larger one."
    )


@cache
def _factors(order: int) -> tuple[int, int] | None:
    """Return the orders of two matrices whose Kronecker product has this order; (1, order) for a direct construction."""
    if order & (order - 1) == 0:
        return (1, order)
    # The smallest base with the largest power of two, prime fields before all others: this order is part of the contract.
    for has_base in (_over_prime_field, _has_base):
        power = order & -order
        while power >= 1:
            if order // power % 4 == 0 and has_base(order // power):
                return (power, order // power)
            power //= 2
    # 12 is the smallest base that is no power of two.
    for factor in range(12, order // 12 + 1, 4):
        if order % factor == 0 and has_hadamard(factor) and has_hadamard(order // factor):
            return (factor, order // factor)
    return None


def _over_prime_field(order: int) -> bool:
    field = _paley_field(order)
    return field is not None and field[1] == 1


def _has_base(order: int) -> bool:
    return _paley_field(order) is not None or order // 4 in CIRCULANT_QUADRUPLES


def _signs(order: int) -> Signs:
    if order & (order - 1) == 0:
        return _sylvester(order)
    factors = _factors(order)
    assert factors is not None  # callers check has_hadamard first
    outer, inner = factors
    if outer > 1:
        return np.kron(_signs(outer), _signs(inner))
    field = _paley_field(order)
    if field is None:
        return goethals_seidel(CIRCULANT_QUADRUPLES[order // 4])
    return _paley_one(*field) if order == field[0] ** field[1] + 1 else _paley_two(*field)


def _sylvester(order: int) -> Signs:
    signs = np.ones((1, 1), np.int8)
    while len(signs) < order:
        signs = np.kron(np.array([[1, 1], [1, -1]], np.int8), signs)
    return signs


def _paley_field(order: int) -> tuple[int, int] | None:
    """Return prime and exponent of the field whose Paley matrix has this order; prime fields first, then Paley I before II."""
    first = _prime_power(order - 1)
    # Paley II needs q = 1 mod 4, which is order / 2 = 2 mod 4.
    second = _prime_power(order // 2 - 1) if order // 2 % 4 == 2 else None
    fields = [field for field in (first, second) if field is not None]
    return min(fields, key=lambda field: field[1] > 1, default=None)


def _prime_power(q: int) -> tuple[int, int] | None:
    """Return (p, k) with p prime and p^k = q; None if q is no prime power."""
    if q < 2:
        return None
    prime = next((p for p in range(2, int(q**0.5) + 1) if q % p == 0), q)
    exponent, quotient = 0, q
    while quotient % prime == 0:
        exponent, quotient = exponent + 1, quotient // prime
    return (prime, exponent) if quotient == 1 else None


def _paley_one(prime: int, exponent: int) -> Signs:
    """Return the Paley I matrix: identity plus a skew core of a first row +1, a first column -1 and a Jacobsthal block."""
    core = _jacobsthal(prime, exponent)
    signs = np.ones((len(core) + 1, len(core) + 1), np.int8)
    signs[1:, 0] = -1
    signs[1:, 1:] = core + np.eye(len(core), dtype=np.int8)
    return signs


def _paley_two(prime: int, exponent: int) -> Signs:
    """Return the Paley II matrix: each entry of a symmetric core becomes a 2 x 2 cell, its zero diagonal another cell."""
    core = np.ones((prime**exponent + 1,) * 2, np.int8)
    core[0, 0] = 0
    core[1:, 1:] = _jacobsthal(prime, exponent)
    on_diagonal = np.kron(np.eye(len(core), dtype=np.int8), np.array([[1, -1], [-1, -1]], np.int8))
    return np.kron(core, np.array([[1, 1], [1, -1]], np.int8)) + on_diagonal


def _jacobsthal(prime: int, exponent: int) -> Signs:
    """Return the Jacobsthal matrix (q, q) of the field of q = p^k elements.

    Entry (i, j) is +1 if element i minus element j is a square, -1 if it is not, and 0 for i = j.

    Element i has the base-p digits of i as coefficients, the lowest digit first.
    """
    q = prime**exponent
    digits = np.arange(q)[:, None] // prime ** np.arange(exponent) % prime  # (q, k)
    squares = _times(digits, digits, _irreducible(prime, exponent), prime) @ prime ** np.arange(exponent)
    # Quadratic character of every element, by its number: squares of all elements mark the +1.
    character = np.full(q, -1, np.int8)
    character[squares] = 1
    character[0] = 0
    difference = np.zeros((q, q), np.int64)
    # (q, q): number of the difference of two elements, digit by digit, since fields of prime powers do not carry.
    for position in range(exponent):
        digit = digits[:, position]
        difference += (digit[:, None] - digit[None, :]) % prime * prime**position
    return character[difference]


def _times(a: NDArray[np.int64], b: NDArray[np.int64], modulus: tuple[int, ...], prime: int) -> NDArray[np.int64]:
    """Return the products (m, k) of elements (m, k) and (m, k) in the field with x^k = -(modulus[0] + modulus[1] x + ...)."""
    k = len(modulus)
    full = np.zeros((len(a), 2 * k - 1), np.int64)
    for i in range(k):
        full[:, i : i + k] += a[:, i : i + 1] * b
    full %= prime
    # Replace the highest power by lower ones, from the top down.
    for top in range(2 * k - 2, k - 1, -1):
        full[:, top - k : top] -= full[:, top : top + 1] * np.array(modulus)
        full %= prime
    return full[:, :k]


def _irreducible(prime: int, degree: int) -> tuple[int, ...]:
    """Return the lower coefficients, constant first, of the first monic irreducible polynomial of a degree.

    First in counting order of the coefficients, which is part of the contract: another polynomial is another matrix.
    """
    monic = [(*low, 1) for d in range(1, degree // 2 + 1) for low in product(range(prime), repeat=d)]
    for high_first in product(range(prime), repeat=degree):
        low = high_first[::-1]
        if not any(_divides(factor, (*low, 1), prime) for factor in monic):
            return low
    raise AssertionError("every finite field has irreducible polynomials of every degree")


def _divides(factor: tuple[int, ...], polynomial: tuple[int, ...], prime: int) -> bool:
    """Return whether a monic polynomial over the integers mod p divides another; coefficients, constant first."""
    # Long division: the factor is monic, so each leading coefficient is a digit of the quotient.
    remainder = list(polynomial)
    while len(remainder) >= len(factor):
        lead = remainder.pop()
        offset = len(remainder) - len(factor) + 1
        for i, coefficient in enumerate(factor[:-1]):
            remainder[offset + i] = (remainder[offset + i] - lead * coefficient) % prime
    return not any(remainder)
