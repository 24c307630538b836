"""Bytes to records and back: `decode(encode(x)) == x` for every kind of packet, and streams from real processors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from spepolicy.errors import PacketError
from spepolicy.spe.packets import decode, encode
from spepolicy.spe.records import EXTRA, Present, new_records
from tests.spe.streams import one_record, streams

REAL = Path(__file__).resolve().parents[3] / "shared" / "data" / "spe"
needs_captures = pytest.mark.skipif(not REAL.is_dir(), reason="the real captures (shared/data/spe) are not here")


def without_position(records: NDArray[Any]) -> NDArray[Any]:
    records = records.copy()
    records["offset"] = records["size"] = 0
    return records


@settings(max_examples=400, deadline=None)
@given(streams(), st.sampled_from([1, 4, 16, 64, 2048]))
def test_there_and_back(drawn: tuple[NDArray[Any], NDArray[Any]], align: int) -> None:
    records, extra = drawn
    stream = encode(records, extra, align=align)
    decoded, report = decode(stream, align=align)
    assert without_position(decoded).tobytes() == records.tobytes()
    assert report.extra.tobytes() == extra.tobytes()
    # Each record is where it says, followed by nothing but zeros up to the next.
    ends = (decoded["offset"] + decoded["size"]).tolist()
    assert (decoded["offset"] % align == 0).all()
    assert not any(any(stream[a:b]) for a, b in zip(ends, [*decoded["offset"].tolist()[1:], len(stream)], strict=False))
    assert report.rest == len(stream)


@settings(max_examples=200, deadline=None)
@given(streams(further=False))
def test_fixed_places_there_and_back(drawn: tuple[NDArray[Any], NDArray[Any]]) -> None:
    records = drawn[0]
    present = records["present"].astype(np.int64) & ~int(Present.PREVIOUS_TARGET | Present.ALTERNATE_ISSUE)
    records["present"] = np.where(present & int(Present.VA), present & ~int(Present.TARGET), present)
    records["events_bytes"], records["data_source_bytes"] = 2, 1
    records["events"] &= 0xFFFF
    records["data_source"] &= 0xFF
    stream = encode(records, layout="neoverse")
    assert len(stream) == 64 * len(records)
    decoded, report = decode(stream, max_size=64, align=64)
    assert report.clean
    assert (decoded["present"] == records["present"]).all()
    # What is not present is not written: the second time nothing is lost.
    assert decoded.tobytes() == decode(encode(decoded, layout="neoverse"))[0].tobytes()
    for name in ("events", "timestamp", "pc", "va", "va_tag", "pa", "context_el1", "total_latency", "op", "pc_el"):
        bit = {"op": "OPERATION", "total_latency": "TOTAL", "pc_el": "PC", "va_tag": "VA"}.get(name, name.upper())
        there = records["present"] & int(Present[bit]) != 0
        assert (decoded[name][there] == records[name][there]).all()
        assert not decoded[name][~there].any()


@given(one_record(further=False), st.integers(0, 100))
@settings(max_examples=50, deadline=None)
def test_position_in_the_stream_does_not_matter(drawn: tuple[NDArray[Any], Any], zeros: int) -> None:
    """The end of the stream is read byte by byte, the rest in words: every distance to the end gives the same."""
    stream = encode(drawn[0])
    for behind in (0, 1, 7, 8, 9, zeros):
        decoded, _ = decode(bytes(zeros) + stream + bytes(behind))
        assert without_position(decoded).tobytes() == drawn[0].tobytes()
        assert decoded["offset"][0] == zeros


def test_many_records_of_least_size_outgrow_the_first_guess() -> None:
    records = new_records(50_000)
    records["present"], records["events_bytes"] = int(Present.EVENTS), 1
    records["events"] = np.arange(50_000) % 251
    stream = encode(records)
    assert len(stream) == 3 * 50_000  # spe.md 4.6: the least that is legal
    assert without_position(decode(stream)[0]).tobytes() == records.tobytes()


def test_nothing() -> None:
    for stream in (b"", b"\0", bytes(100)):
        records, report = decode(stream)
        assert (len(records), report.padding_bytes, report.rest, report.clean) == (0, len(stream), len(stream), True)
    assert encode(new_records(0)) == b""


def wrong(**fields: Any) -> NDArray[Any]:
    records = new_records(3)
    records["present"], records["events_bytes"] = int(Present.EVENTS), 1
    for name, value in fields.items():
        records[name][1] = value
    return records


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"present": 0}, "Events packet"),
        ({"present": 1 << 13 | 1 << 20}, "means nothing"),
        ({"events": 256}, "'events_bytes'"),
        ({"events_bytes": 3}, "'events_bytes'"),
        ({"present": 1 << 13 | 1 << 9}, "'data_source_bytes'"),
        ({"present": 1 << 13 | 1 << 12, "op_class": 3}, "'op_class'"),
        ({"present": 1 << 13 | 1, "pc": 1 << 55}, "canonical"),
        ({"present": 1 << 13 | 4, "va": 0xAB << 56}, "'va_tag'"),
        ({"present": 1 << 13 | 1, "pc_el": 4}, "exception level"),
        ({"present": 1 << 13 | 8, "pa": 1 << 56}, "'pa'"),
        ({"present": 1 << 13 | 1 << 15}, "'extra'"),
    ],
)
def test_what_no_stream_can_hold_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(PacketError, match=message) as error:
        encode(wrong(**fields))
    assert "record 1 of 3" in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(0, 1, 0xB0, 0)], "header"),
        ([(0, 1, 0x01, 0)], "header"),
        ([(2**16, 1, 0x9B, 0)], "header"),
        ([], "EXTRA bit"),
        ([(0, 1, 0x9B, 0), (0, 0, 0x9B, 0)], "not sorted"),
        ([(0, 1, 0x9B, 0), (0, 3, 0x9B, 0)], "beyond 3 records"),
    ],
)
def test_further_packets_that_are_none(rows: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(PacketError, match=message):
        encode(wrong(present=1 << 13 | 1 << 15), np.array(rows, EXTRA))


def test_blocks_of_the_encoder_do_not_show() -> None:
    """It works on 8,192 records at a time: alignment and further packets go on across the border."""
    records = new_records(20_000)
    records["present"], records["events_bytes"] = int(Present.EVENTS), 1
    records["present"][::3] |= int(Present.EXTRA)
    marked = np.arange(0, 20_000, 3)
    extra = np.zeros(len(marked), EXTRA)
    extra["record_index"], extra["header"], extra["value"] = marked, 0x9B, marked
    for align in (1, 7, 64):
        decoded, report = decode(encode(records, extra, align=align))
        assert without_position(decoded).tobytes() == records.tobytes()
        assert report.extra.tobytes() == extra.tobytes()
        assert (decoded["offset"] % align == 0).all()


def test_a_record_that_has_no_place_for_a_packet() -> None:
    with pytest.raises(PacketError, match="64 bytes"):
        encode(wrong(present=1 << 13 | 1 << 4), layout="neoverse")


@needs_captures
@pytest.mark.parametrize(("name", "issue", "total", "stamp"), [("ts0", 39, 40, 0), ("ts1", 41, 42, 3913207673451)])
def test_captures_from_silicon(name: str, issue: int, total: int, stamp: int) -> None:
    """The values are those that Arm's own parser has in its golden tables (spe_data.md 1)."""
    stream = (REAL / f"spe-b1-{name}.data").read_bytes()
    records, report = decode(stream, max_size=64, align=64)
    assert report.clean
    (record,) = records
    assert (record["pc"], record["target"]) == (0x7FFD_BF21_43E0, 0x7FFD_BF21_4408)
    assert (record["issue_latency"], record["total_latency"], record["timestamp"]) == (issue, total, stamp)
    assert [record[name] for name in ("op_class", "op", "events", "pc_el", "pc_security")] == [2, 1, 2, 0, 1]
    assert bool(record["present"] & int(Present.TIMESTAMP)) == (stamp > 0)
    assert encode(records, layout="neoverse") == stream


def real_snippets() -> dict[str, list[bytes]]:
    snippets: dict[str, list[bytes]] = {}
    name = ""
    for line in (REAL / "real_snippets.hex").read_text().splitlines():
        if line.startswith("["):
            name = line[1 : line.index("]")]
        elif line and not line.startswith("#"):
            snippets.setdefault(name, []).append(bytes.fromhex(line))
    return snippets


@needs_captures
def test_every_real_record_found_in_public() -> None:
    """Counts as perf 6.1 prints them for the same bytes (spe_data.md 1): packets by kind, latencies, addresses."""
    decoded = {name: [decode(stream) for stream in streams] for name, streams in real_snippets().items()}
    records = np.concatenate([records for parts in decoded.values() for records, _ in parts])
    whole = {name: sum(len(records) for records, _ in parts) for name, parts in decoded.items()}
    assert whole == dict.fromkeys(decoded, 1) | {"kvmguest_haibo": 2, "quipper_test": 2, "armparser_unittest": 0}
    damaged = {name for name, parts in decoded.items() if not all(report.clean for _, report in parts)}
    assert damaged == {"armparser_unittest", "windowsperf62"}  # half records in the sources themselves
    assert all(report.count(1) == report.count(2) == 0 for parts in decoded.values() for _, report in parts)

    altra = decoded["altra_issue123"][0][0][0]
    assert (altra["va"], altra["pa"]) == (0xFFFF_403E_F1D7_9E50, 0x403F_71D7_9E50)
    assert (altra["issue_latency"], altra["total_latency"], altra["data_source"]) == (337, 501, 12)
    assert altra["events"] == 0x31E
    stamps = [int(records["timestamp"][0]) for records, _ in decoded["quipper_test"]]
    assert stamps[1] - stamps[0] == 95
    guest = [records[0] for records, _ in decoded["kvmguest_haibo"]]
    assert [(int(r["size"]), int(r["pc_el"]), int(r["pc"])) for r in guest] == [
        (44, 1, 0xFFFF_8000_1029_D3F4),
        (32, 1, 0xFFFF_8000_1029_F97C),
    ]
    assert records["total_latency"].max() == 501
    # Every record of 64 bytes, byte for byte.
    for parts, snippets in zip(decoded.values(), real_snippets().values(), strict=True):
        for (found, _), stream in zip(parts, snippets, strict=True):
            if len(stream) == 64:
                assert encode(found, layout="neoverse") == stream


FORMS = """
import hashlib, numpy as np
from spepolicy.spe.packets import decode, encode
rng = np.random.default_rng(7)
stream = rng.choice(np.array([0, 1, 0x42, 0x52, 0x71, 0xB0, 0xB2, 0xB3, 0x98, 0x21, 0x49, 0x65, 0xFF], np.uint8), 4000)
digest = hashlib.sha256()
for unknown in ("skip", "byte"):
    records, report = decode(stream.tobytes(), unknown=unknown)
    assert len(records) > 10
    for part in (records.tobytes(), report.extra.tobytes(), report.damage.tobytes(), encode(records, report.extra)):
        digest.update(part)
print(digest.hexdigest())
"""


def test_compiled_and_interpreted_give_the_same() -> None:
    digests = set()
    for disabled in ("0", "1"):
        environment = os.environ | {"NUMBA_DISABLE_JIT": disabled}
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", FORMS], capture_output=True, text=True, check=False, env=environment
        )
        assert done.returncode == 0, done.stderr
        digests.add(done.stdout)
    assert len(digests) == 1
