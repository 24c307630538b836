"""Random draws without floating point: a counter-based hash and an exponential table.

A draw is a pure function of (key, counter). Keys are hashes of (seed, replicate, stream), so nothing that happens in
one lane, stream or batch can move the draws of another. Logarithms of floating point differ between processors in the
last bit; the exponential table is therefore made with decimal arithmetic, which is exact by definition, and read with
integers.
"""

from __future__ import annotations

from decimal import Decimal, localcontext
from functools import cache

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import jit, widen

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MIX1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX2 = np.uint64(0x94D049BB133111EB)
_S30 = np.uint64(30)
_S27 = np.uint64(27)
_S31 = np.uint64(31)
_S1 = np.uint64(1)

EXPONENTIAL_BITS = 10
EXPONENTIAL_SHIFT = 20  # the table holds -ln(u) times 2**20


@jit
def draw(key: int, counter: int) -> int:
    """Return 63 random bits for (key, counter): SplitMix64 (Steele, Lea, Flood 2014) at position *counter* of stream
    *key*.
    """
    x = np.uint64(key) + np.uint64(counter) * _GAMMA
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    x = x ^ (x >> _S31)
    return widen(x >> _S1)


def draws(key: NDArray[np.uint64], counter: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return what `draw` returns for each of n keys and counters, outside of the machine."""
    x = key + counter.astype(np.uint64) * _GAMMA
    x = (x ^ (x >> _S30)) * _MIX1
    x = (x ^ (x >> _S27)) * _MIX2
    x ^= x >> _S31
    return np.asarray(x >> _S1)


@jit
def scaled_exponential(table: NDArray[np.int64], bits: int, mean: int) -> int:
    """Return an exponential draw with the given mean (>= 0, below 2**42) from 63 random bits.

    The low 10 bits choose a slice of the distribution, which the table replaces by its conditional mean; the last slice
    is the tail, which by the lack of memory is ln(1024) plus a fresh draw from the next 10 bits.
    """
    total = 0
    for _ in range(5):
        index = bits & 1023
        if index != 0:
            total += table[index]
            break
        total += table[0]
        bits >>= 10
    # Two steps, so that mean * total stays below 2**63 for means up to an hour.
    high = mean >> 20
    low = mean & 0xFFFFF
    return high * total + ((low * total) >> 20)


@cache
def exponential_table() -> NDArray[np.int64]:
    """Return int64[1024]: entry i > 0 is the mean of -ln(u) for u in [i, i+1)/1024, entry 0 ln(1024); times 2**20."""
    with localcontext() as context:
        context.prec = 30
        n = Decimal(1 << EXPONENTIAL_BITS)
        scale = Decimal(1 << EXPONENTIAL_SHIFT)

        def antiderivative(u: Decimal) -> Decimal:
            return u - u * u.ln()

        values = [n.ln() * scale]
        for i in range(1, 1 << EXPONENTIAL_BITS):
            a, b = Decimal(i) / n, Decimal(i + 1) / n
            values.append((antiderivative(b) - antiderivative(a)) * n * scale)
        return np.array([int(value.to_integral_value()) for value in values], dtype=np.int64)


def stream_key(seed: int, replicate: int, stream: int, vcpu: int) -> int:
    """Return the int64 key of one stream of random draws."""
    mask = (1 << 64) - 1
    key = 0
    for part in (seed, replicate, stream, vcpu):
        key = (key + (part & mask) + 0x9E3779B97F4A7C15) & mask
        key = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & mask
        key = ((key ^ (key >> 27)) * 0x94D049BB133111EB) & mask
        key ^= key >> 31
    return key - (1 << 64) if key >> 63 else key
