"""Random draws in integers: distribution, independence of streams, and no overflow."""

from __future__ import annotations

import itertools
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.machine.draw import EXPONENTIAL_BITS, EXPONENTIAL_SHIFT, draws, exponential_table, stream_key

from .interpreted import module

ONE = 1 << EXPONENTIAL_SHIFT
TABLE = exponential_table()
keys = st.integers(-(1 << 63), (1 << 63) - 1).map(np.int64)


def exponential(bits: int, mean: int) -> int:
    return int(module("machine.draw").scaled_exponential(TABLE, bits, mean))


def draw(key: int, counter: int) -> int:
    with np.errstate(over="ignore"):
        return int(module("machine.draw").draw(np.int64(key), counter))


def test_the_table_has_the_mean_of_an_exponential_distribution() -> None:
    """Slices and tail together, exactly: E = mean(slices) + tail (ln 1024 + E) / 1024, so E is 1 up to rounding."""
    slices = TABLE[1:].sum() / 1024
    mean = (slices + TABLE[0] / 1024) / (1 - 1 / 1024)
    assert abs(mean / ONE - 1) < 1e-6


def test_the_table_is_the_conditional_mean_of_each_slice() -> None:
    """Entry i stands for -ln(u), u in [i, i + 1) / 1024: between its ends, falling; the tail begins at ln 1024."""
    for i in range(1, 1 << EXPONENTIAL_BITS):
        assert -math.log((i + 1) / 1024) * ONE - 1 <= TABLE[i] <= -math.log(i / 1024) * ONE + 1
    assert np.all(np.diff(TABLE[1:]) < 0)
    assert abs(TABLE[0] - math.log(1024) * ONE) <= 1


def test_draws_have_the_mean_variance_and_tail_of_an_exponential_distribution() -> None:
    n, mean = 20_000, 10**6
    key = stream_key(1, 2, 3, 4)
    values = np.array([exponential(draw(key, counter), mean) for counter in range(n)])
    assert abs(values.mean() / mean - 1) < 4 / n**0.5
    # Slices replace values by their mean, which takes less than 0.1 % of the variance away.
    assert abs(values.std() / mean - 1) < 0.03
    for times in (1, 3, 5):
        expected = math.exp(-times)
        assert abs((values > times * mean).mean() - expected) < 4 * (expected / n) ** 0.5 + 1e-3
    assert values.max() > math.log(1024) * mean, "the tail beyond the last slice is drawn too"


@given(bits=st.integers(0, (1 << 63) - 1), mean=st.integers(0, (1 << 42) - 1))
@settings(deadline=None)
def test_a_draw_scales_with_its_mean_and_never_overflows(bits: int, mean: int) -> None:
    unit = exponential(bits, ONE)
    value = exponential(bits, mean)
    assert 0 <= value < 1 << 63
    assert abs(value - mean * unit / ONE) <= 1 + mean * 1e-15 * unit


@given(bits=st.integers(0, (1 << 52) - 1))
@settings(deadline=None)
def test_the_tail_is_a_fresh_draw_behind_the_last_slice(bits: int) -> None:
    """Memoryless: slice 0 is ln 1024 plus what the next ten bits say."""
    assert exponential(bits << 10, ONE) == TABLE[0] + exponential(bits, ONE) or bits & ((1 << 40) - 1) == 0


@given(key=keys, counter=st.integers(0, 1 << 40))
@settings(deadline=None)
def test_a_draw_is_63_bits_and_depends_on_key_and_counter_only(key: int, counter: int) -> None:
    value = draw(key, counter)
    assert 0 <= value < 1 << 63
    assert value == draw(key, counter)
    assert value != draw(key, counter + 1)
    assert value != draw(key ^ 1, counter)


def test_every_bit_of_a_draw_is_fair() -> None:
    n = 4000
    values = np.array([draw(12345, counter) for counter in range(n)], dtype=np.int64)
    for bit in range(63):
        assert abs(((values >> bit) & 1).mean() - 0.5) < 5 * 0.5 / n**0.5


def test_streams_have_keys_of_their_own() -> None:
    """Seeds, replicates, streams and vCPUs that differ anywhere differ in their key, neighbours and large seeds too."""
    seeds = (0, 1, 2, 2**63 - 1)
    keys = [stream_key(*parts) for parts in itertools.product(seeds, range(40), range(5), range(8))]
    assert len(set(keys)) == len(keys)
    assert all(-(1 << 63) <= key < 1 << 63 for key in keys)


def test_neighbouring_streams_are_not_correlated() -> None:
    """The same counter in the streams of neighbouring replicates: independent to a chi-square."""
    a = np.array([draw(stream_key(1, r, 0, 0), 7) & 15 for r in range(4000)])
    b = np.array([draw(stream_key(1, r + 1, 0, 0), 7) & 15 for r in range(4000)])
    table = np.histogram2d(a, b, bins=(16, 16))[0]
    expected = 4000 / 256
    chi_square = ((table - expected) ** 2 / expected).sum()
    assert chi_square < 255 + 5 * (2 * 255) ** 0.5


@given(st.lists(st.tuples(keys, st.integers(0, (1 << 63) - 1)), min_size=1, max_size=20))
def test_many_draws_outside_of_the_machine_are_those_of_the_machine(pairs: list[tuple[np.int64, int]]) -> None:
    key = np.array([pair[0] for pair in pairs], np.int64).astype(np.uint64)
    counter = np.array([pair[1] for pair in pairs], np.int64)
    assert draws(key, counter).tolist() == [draw(*pair) for pair in pairs]
