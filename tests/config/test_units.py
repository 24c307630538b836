"""Quantities are exact, need their unit, and say what is wrong with them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spepolicy.errors import ConfigurationError
from spepolicy.units import (
    DURATION_UNITS,
    SIZE_UNITS,
    format_count,
    format_duration,
    format_size,
    parse_count,
    parse_duration,
    parse_size,
)


@given(st.integers(0, 2**62))
def test_a_printed_duration_parses_back(ps: int) -> None:
    assert parse_duration(format_duration(ps), "k") == ps


@given(st.integers(0, 2**62))
def test_a_printed_size_parses_back(size: int) -> None:
    assert parse_size(format_size(size), "k") == size


@given(st.integers(0, 10**9), st.sampled_from(sorted(DURATION_UNITS)))
def test_a_duration_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_duration(f"{number}{unit}", "k") == number * DURATION_UNITS[unit]


@given(st.integers(0, 10**6), st.sampled_from(sorted(SIZE_UNITS)))
def test_a_size_is_its_number_times_its_unit(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}", "k") == number * SIZE_UNITS[unit]


@pytest.mark.parametrize(
    ("text", "ps"),
    [
        ("500ms", 500 * 10**9),
        ("1.5us", 1_500_000),
        ("2s", 2 * 10**12),
        ("1min", 60 * 10**12),
        ("0.001ns", 1),
        ("0ms", 0),
        ("0", 0),
        (0, 0),
    ],
)
def test_durations(text: object, ps: int) -> None:
    assert parse_duration(text, "k") == ps


@pytest.mark.parametrize(
    ("text", "size"), [("4MiB", 2**22), ("128KiB", 2**17), ("64B", 64), ("0", 0), ("1.5KiB", 1536)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text, "k") == size


def test_a_decimal_is_exact_where_a_float_is_not() -> None:
    assert parse_duration("0.3s", "k") == 300 * 10**9
    assert parse_duration("1.1us", "k") * 10 == parse_duration("11us", "k")


@pytest.mark.parametrize(
    ("value", "parts"),
    [
        ("5", ["the unit is missing", "costs.trap=1.5us"]),
        (5, ["the unit is missing"]),
        ("-3ms", ["negative", "costs.trap=3ms"]),
        ("nan", ["not finite"]),
        ("infs", ["not finite"]),
        (float("inf"), ["not finite"]),
        ("4MiB", ["unknown unit 'MiB'"]),
        ("3 us", ["unknown unit ' us'", "Did you mean 3us?"]),
        ("3US", ["Did you mean 3us?"]),
        ("3µs", ["Did you mean 3us?"]),
        ("3m", ["Did you mean 3ms?"]),
        ("0.0001ns", ["finer than 1 ps", "costs.trap=1ps"]),
        ("us", ["not a duration"]),
        ("1e3us", ["unknown unit"]),
        ("", ["not a duration"]),
        (True, ["not a duration"]),
        (None, ["not a duration"]),
        ([1], ["not a duration"]),
    ],
)
def test_a_wrong_duration_names_key_value_rule_and_remedy(value: object, parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        parse_duration(value, "costs.trap")
    assert str(caught.value).startswith(f"costs.trap={value}: ")
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("value", "meant"), [("4MB", "4MiB"), ("4mib", "4MiB"), ("4k", "4KiB"), ("4M", "4MiB"), ("2bytes", "2B")]
)
def test_a_size_in_the_wrong_unit_gets_the_power_of_two(value: str, meant: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Did you mean {meant}\?"):
        parse_size(value, "guest.buffer")


@pytest.mark.parametrize(("value", "count"), [(16, 16), ("16", 16), ("1_000", 1000), (0, 0)])
def test_counts(value: object, count: int) -> None:
    assert parse_count(value, "k") == count


@pytest.mark.parametrize("value", [1.5, "1.5", "4KiB", -1, "-1", True, None, ""])
def test_wrong_counts(value: object) -> None:
    with pytest.raises(ConfigurationError, match=r"guest\.vcpus="):
        parse_count(value, "guest.vcpus")


def test_counts_are_printed_with_thousands() -> None:
    assert format_count(1234567) == "1,234,567"
