"""Random and mutated files: `read` never fails but by `CaptureError`, never hangs, and its memory is in proportion.

The budget is fixed: the same files each time. To try others: SPEPOLICY_FUZZ_SEED=7 SPEPOLICY_FUZZ_FILES=20000.
"""

from __future__ import annotations

import contextlib
import os
import struct
import tracemalloc
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spepolicy.errors import CaptureError
from spepolicy.perfdata.capture import Capture, parse
from spepolicy.perfdata.container import MAX_PROBLEMS
from spepolicy.perfdata.layout import Type
from tests.perfdata.streams import add_session, load, two_sessions, writer
from tests.perfdata.test_read import squeezed, through_a_pipe, zstd

SEED = int(os.environ.get("SPEPOLICY_FUZZ_SEED", "1"))
FILES = int(os.environ.get("SPEPOLICY_FUZZ_FILES", "600"))
DEMO = Path(__file__).resolve().parents[1] / "data" / "blackout_demo.data"
# The shortest records have 3 bytes and make 124 bytes of two arrays, which are joined where there are several queues.
TIMES, FIXED = 100, 4 << 20


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Let numba compile the decoder, and modules be loaded, before memory is measured."""
    for content in seeds():
        with contextlib.suppress(CaptureError):
            parse(content, "whole")


def measured(content: bytes) -> tuple[Capture | None, int]:
    """Return the capture in *content*, or None if it is refused, and the most memory that it took, in bytes."""
    tracemalloc.start()
    try:
        with contextlib.suppress(CaptureError):
            return parse(content, "fuzzed"), tracemalloc.get_traced_memory()[1]
        return None, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def bounded(content: bytes) -> Capture | None:
    """Return the capture in *content*, or None if it is refused; check what `read` promises of any content."""
    limit = TIMES * len(content) + FIXED
    capture, peak = measured(content)
    if peak >= limit:  # the first use of a module, or a thread that another test left, may have taken it: not again
        capture, peak = measured(content)
    assert peak < limit
    if capture is None:
        return None
    assert len(capture.records) == len(capture.where)
    assert (capture.extra["record_index"] < max(len(capture.records), 1)).all()
    # A record takes at least the three bytes of an Events and an End packet: none can come from nothing.
    assert 3 * len(capture.records) + capture.skipped_bytes <= capture.aux_bytes + len(content)
    assert len(capture.problems) == min(capture.problem_count, MAX_PROBLEMS)
    assert all(-1 <= problem.offset <= len(content) for problem in capture.problems)
    for name, column in (("comms", "name"), ("maps", "name"), ("errors", "message")):
        assert (getattr(capture, name)[column] < len(capture.names)).all()
    assert capture.report()
    return capture


def seeds() -> list[bytes]:
    demo = DEMO.read_bytes()
    return [two_sessions(), through_a_pipe(two_sessions()), demo[:6000], demo, squeezed(demo, version=2)]


def mutations(rng: np.random.Generator) -> Iterator[bytes]:
    """Files with bytes and words changed, parts removed, doubled and put elsewhere, ends cut."""
    originals = seeds()
    for n in range(FILES):
        content = bytearray(originals[n % len(originals)])
        for _ in range(int(rng.integers(1, 8))):
            at, length = int(rng.integers(len(content))), int(rng.integers(1, 64))
            match int(rng.integers(6)):
                case 0:
                    content[at] = int(rng.integers(256))
                case 1:
                    edge = [0, 1, 7, 8, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 63, (1 << 64) - 1, len(content)]
                    content[at : at + 8] = struct.pack("<Q", edge[int(rng.integers(len(edge)))])
                case 2:
                    del content[at : at + length]
                case 3:
                    content[at:at] = content[at : at + length]
                case 4:
                    content[at : at + length] = rng.bytes(length)
                case 5:
                    del content[max(at, 16) :]
            content = content or bytearray(b"P")
        yield bytes(content)


def test_mutated_files() -> None:
    read = [bounded(content) for content in mutations(np.random.default_rng(SEED))]
    whole = [capture for capture in read if capture is not None]
    # The mutations are worth their time only if most files get as far as their records.
    assert len(whole) > FILES // 2
    assert sum(len(capture.records) > 0 for capture in whole) > FILES // 3
    assert any(not capture.complete for capture in whole)


def test_random_bytes_behind_a_good_header() -> None:
    rng = np.random.default_rng(SEED)
    for n in range(FILES // 10):
        bounded(b"PERFILE2" + struct.pack("<Q", 16) + rng.bytes(int(rng.integers(4000))))
        start = two_sessions()[: int(rng.integers(16, 600))]
        bounded(start + rng.bytes(n * 10))


def test_random_spe_data() -> None:
    rng = np.random.default_rng(SEED)
    for _ in range(FILES // 10):
        made = writer()
        add_session(made, rng.bytes(int(rng.integers(1, 20_000))))
        capture = bounded(made.content())
        assert capture is not None


HOSTILE = {
    "shortest records": lambda: session(b"\x42\x02\x01" * 100_000),
    "one bad byte after the other": lambda: session(b"\x03\xff" * 150_000),
    "padding": lambda: session(bytes(300_000)),
    "records of 8 bytes": lambda: stream(struct.pack("<IHH", Type.FINISHED_ROUND, 0, 8) * 40_000),
    "broken records": lambda: stream(struct.pack("<IHH", 0xEE, 0, 8) * 40_000),
    "headers that only look right": lambda: stream(struct.pack("<IHHQ", Type.AUX, 0, 0xFFF8, 0) * 20_000),
    "empty queues": lambda: stream(b"".join(aux_data(n) for n in range(10_000))),
    "AUX data that is not there": lambda: stream(aux_data(0, size=1 << 62) * 1000),
    "records that unpack to a thousand times their size": lambda: stream(packed(comm(7) * 100_000)),
    "names": lambda: stream(b"".join(comm(n) for n in range(10_000))),
}


def session(payload: bytes) -> bytes:
    made = writer()
    add_session(made, payload)
    return made.content()


def stream(records: bytes) -> bytes:
    content = session(load(0x400000, 100))
    at, size = struct.unpack_from("<QQ", content, 0x28)
    return content[: at + size] + records + bytes(4)


def aux_data(queue: int, size: int = 0) -> bytes:
    return struct.pack("<IHHQQQIiiI", Type.AUXTRACE, 0, 48, size, 0, 0, queue, -1, 0, 0)


def packed(records: bytes) -> bytes:
    body = zstd(records)
    return struct.pack("<IHH", Type.COMPRESSED, 0, 8 + len(body)) + body


def comm(n: int) -> bytes:
    return struct.pack("<IHHii", Type.COMM, 0, 56, n, n) + b"%08d" % n + struct.pack("<iiQQQ", n, n, 0, 0, 101)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files(name: str) -> None:
    """Files that cost a careless reader time or memory quadratic in their size, or as large as they claim to be."""
    content = HOSTILE[name]()
    content = content[:0x30] + bytes(8) + content[0x38:]  # to the end of the file
    capture = bounded(content)
    assert capture is not None
    assert len(capture.records) > 0 or name in ("one bad byte after the other", "padding")


def test_a_file_of_the_shortest_records_gives_each() -> None:
    capture = bounded(session(b"\x42\x02\x01" * 1000))
    assert capture is not None
    assert len(capture.records) == 1000
