"""Addresses of a program's data: what the extents keep of a sample, as text and back, and what is drawn from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spepolicy.description import Node
from spepolicy.errors import ConfigurationError
from spepolicy.machine.data_addresses import KINDS, DataAddresses, data_addresses
from spepolicy.machine.scenario import OpType
from spepolicy.workload import Events, build_workload
from spepolicy.workload_data import MOST_EXTENTS, build_data, describe_data, extents_of

HEAP, STACK = 0x55_0000_0000, 0x7F_FFFF_0000
SHIPPED = Path(__file__).resolve().parents[2] / "conf" / "workload"


LOGGED = 0xAAAB_0000_0000  # the lane's own draw, of which there are few


def drawn(known: DataAddresses, kind: OpType, events: int, count: int = 50_000) -> Any:
    """Addresses of *count* accesses of function 0, of which the log has one every 1,234 ps."""
    same = np.ones(count, np.uint64)
    logged = LOGGED + 8 * np.random.default_rng(1).integers(0, 1 << 13, count, np.uint64)
    at_ps = 1234 * np.arange(count)
    where = data_addresses(logged, at_ps, same * int(kind), same * np.uint64(events), same * 0, known)
    return where.astype(np.int64)


def built(**kinds: str) -> DataAddresses:
    return build_data(Node({"functions": {"f": kinds}}, "data", "test"), ("f",))


def test_what_is_far_apart_is_told_apart_and_holes_stay_empty() -> None:
    rng = np.random.default_rng(2)
    array, table = HEAP + 8 * rng.integers(0, 512, 3000), HEAP + (1 << 30) + 64 * rng.integers(0, 100_000, 1000)
    addresses = np.concatenate([array, table, np.full(2000, STACK + 16)]).astype(np.uint64)
    extents = extents_of(addresses)
    assert len(extents) <= MOST_EXTENTS
    assert sum(extent.share for extent in extents) == pytest.approx(1)
    for begin, size, share in ((HEAP, 4096, 0.5), (HEAP + (1 << 30), 6_400_000, 1 / 6), (STACK + 16, 8, 1 / 3)):
        mine = [e for e in extents if begin <= e.begin and e.begin + e.size <= begin + size]
        assert sum(e.share for e in mine) == pytest.approx(share)


def test_an_even_spread_is_one_extent_and_a_cut_divides_it() -> None:
    addresses = (HEAP + 8 * np.random.default_rng(3).integers(0, 1 << 16, 5000)).astype(np.uint64)
    (whole,) = extents_of(addresses)
    assert whole.size == pytest.approx(8 << 16, rel=0.01)
    middle = HEAP + (4 << 16)
    left, right = extents_of(addresses, cuts=[middle])
    assert left.begin + left.size <= middle <= right.begin


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 1 << 55), st.integers(1, 1 << 20), st.integers(1, 60)), min_size=1, max_size=9),
    st.sampled_from([1, 4, 8]),
)
def test_extents_cover_what_they_were_made_of(places: list[tuple[int, int, int]], step: int) -> None:
    """Every address lies in an extent, which has its share of them (and by up to seven bytes of rounding those of its
    neighbour); and what is drawn lies in the extents.
    """
    rng = np.random.default_rng(4)
    parts = [(begin // 8 * 8 + step * rng.integers(0, size, 20 * n)) for begin, size, n in places]
    addresses = np.concatenate(parts).astype(np.uint64)
    extents = extents_of(addresses)
    covered = np.zeros(len(addresses), bool)
    for e in extents:
        mine = (addresses >= e.begin) & (addresses < e.begin + e.size)
        inner = (addresses >= e.begin + 8) & (addresses + np.uint64(16) < e.begin + e.size)
        assert inner.sum() <= round(e.share * len(addresses)) <= mine.sum()
        covered |= mine
    assert covered.all()
    zero = np.zeros(len(addresses), np.int64)
    text = describe_data(["f"], zero, zero, addresses).get("f")
    if text is not None:
        where = drawn(built(**text), OpType.LOAD, Events.L1D_ACCESS, 2000).astype(np.uint64)
        inside = np.zeros(len(where), bool)
        for e in extents:
            inside |= (where >= e.begin) & (where < e.begin + e.size) & ((where - np.uint64(e.begin)) % e.step == 0)
        assert inside.all()


def test_shares_and_places_are_as_written() -> None:
    known = built(load=f"{HEAP:#x}+4096/8 0.25, {STACK:#x}+64/4 0.75", store=f"{STACK + 64:#x}+8/8 1")
    where = drawn(known, OpType.LOAD, Events.L1D_ACCESS)
    on_stack = where >= STACK
    assert on_stack.mean() == pytest.approx(0.75, abs=0.01)
    assert set(where[on_stack] - STACK) == set(range(0, 64, 4))
    counts = np.bincount((where[~on_stack] - HEAP) // 8, minlength=512)
    assert len(counts) == 512
    assert counts.min() > 0
    assert set(drawn(known, OpType.STORE, Events.L1D_ACCESS)) == {STACK + 64}
    # An atomic is a load. What has no extents of its own has those of its like.
    assert set(drawn(known, OpType.LOAD | OpType.STORE, Events.L1D_REFILL)) == set(where)
    assert set(drawn(known, OpType.STORE, Events.L1D_REFILL)) == {STACK + 64}


def test_a_function_of_which_nothing_is_known_keeps_the_address_of_the_log() -> None:
    known = build_data(Node({"functions": {"g": {"load": "0x5500+64/8 1"}}}, "data", "test"), ("f", "g"))
    where = drawn(known, OpType.LOAD, Events.L1D_ACCESS)
    assert ((where >= LOGGED) & (where < LOGGED + (1 << 16))).all()


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("somewhere", "no extent"),
        ("0x5500+64/3 1", "no extent"),
        ("0x5500+60/8 1", "multiple of its step"),
        ("0x5500+0/8 1", "multiple of its step"),
        ("0xfffffffffffffff8+16/8 1", "multiple of its step"),
        ("0x5500+64/8 0.5, 0x6600+64/8 0.4", "sum to 0.9"),
    ],
)
def test_extents_that_are_none(text: str, rule: str) -> None:
    with pytest.raises(ConfigurationError, match=rule) as error:
        built(load=text)
    assert "data.functions.f.load" in str(error.value)


def test_unknown_functions_kinds_and_regions() -> None:
    with pytest.raises(ConfigurationError, match="no function of that name"):
        build_data(Node({"functions": {"g": {"load": "0x0+8/8 1"}}}, "data", "test"), ("f",))
    with pytest.raises(ConfigurationError, match="Known: load, load_miss"):
        built(fetch="0x0+8/8 1")
    wrong = {"functions": {"f": {"load": "0x0+8/8 1"}}, "regions": {"[heap]": "here"}}
    with pytest.raises(ConfigurationError, match="no region"):
        build_data(Node(wrong, "data", "test"), ("f",))


def test_the_machine_runs_a_workload_alike_with_and_without_addresses() -> None:
    """All of its arrays are the same but for `data`, of which the machine's tables have nothing."""
    description = yaml.safe_load((SHIPPED / "tsort.yaml").read_text())
    with_data = build_workload(description, where="tsort")
    del description["data"]
    without = build_workload(description, where="tsort")
    assert with_data.data is not None
    stripped = replace(with_data, data=None)
    for name, value in vars(stripped).items():
        assert np.array_equal(value, getattr(without, name)), name


def test_extents_keep_what_pages_are_accessed() -> None:
    """A sample drawn from the extents of a sample has the same distribution over parts of memory of 64 KiB, but for
    what chance and the few extents blur: Zipf's law over 4 MiB, and a stack. One extent alone would be 0.7 off.
    """
    rng = np.random.default_rng(5)
    rank = np.minimum(rng.zipf(1.3, 40_000), 1 << 16)
    addresses = np.concatenate([HEAP + 64 * rank, np.full(10_000, STACK)]).astype(np.uint64)
    zero = np.zeros(len(addresses), np.int64)
    known = built(**describe_data(["f"], zero, zero, addresses)["f"])
    where = drawn(known, OpType.LOAD, Events.L1D_ACCESS)
    edges = np.r_[HEAP + (np.arange(66) << 16), STACK, STACK + 8]
    true, seen = (np.histogram(of, edges)[0] / len(of) for of in (addresses.astype(np.int64), where))
    assert np.abs(true - seen).sum() / 2 < 0.1
    assert KINDS[0] == "load"
