"""Measure how fast SPE packets are decoded and encoded, beside stock perf on the same stream (see README.md)."""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from table import Row, add_json, deliver, load_average, say

from spepolicy.jit import COMPILED
from spepolicy.spe.operations import is_load, is_store
from spepolicy.spe.packets import decode, encode
from spepolicy.spe.records import OpClass, Present, new_records

SCRIPT_RATIO = 5
DUMP_RATIO = 60
NO_PERF = "perf is not installed (Debian: linux-perf)"
PIECE = 4 << 20  # bytes of an AUX buffer that perf record writes at once: its default size
PMU = 8

_ALWAYS = Present.PC | Present.TOTAL | Present.ISSUE | Present.OPERATION | Present.EVENTS | Present.TIMESTAMP
_LOAD = Present.VA | Present.PA | Present.TRANSLATION | Present.DATA_SOURCE


def records_of(count: int, seed: int = 1) -> NDArray[Any]:
    """Return *count* records as a Neoverse N1 writes them: 45 % loads and stores, 15 % branches, the rest other."""
    rng = np.random.default_rng(seed)
    records = new_records(count)
    kind = rng.choice(3, count, p=[0.45, 0.15, 0.4])
    memory, branch = kind == 0, kind == 1
    records["present"] = int(_ALWAYS | Present.CONTEXT_EL2)
    records["present"][memory] |= int(_LOAD)
    records["present"][branch] |= int(Present.TARGET)
    records["pc"] = 0x40_0000 + 4 * rng.integers(0, 1 << 18, count)
    records["target"][branch] = 0x40_0000 + 4 * rng.integers(0, 1 << 18, branch.sum())
    records["target_security"] = branch
    records["va"][memory] = 0x7F00_0000_0000 + 8 * rng.integers(0, 1 << 24, memory.sum())
    records["pa"][memory] = 0x8000_0000 + 8 * rng.integers(0, 1 << 24, memory.sum())
    records["pa_security"] = memory
    records["pc_security"] = 1
    records["op_class"] = np.select([memory, branch], [OpClass.LOAD_STORE, OpClass.BRANCH], OpClass.OTHER)
    records["op"][memory] = rng.integers(0, 2, memory.sum())
    records["events"] = np.select([memory, branch], [0x16, 0x02], 0x02)
    records["events_bytes"], records["data_source_bytes"] = 2, memory
    records["context_el2"] = 1000
    records["issue_latency"] = rng.integers(1, 60, count)
    records["total_latency"] = records["issue_latency"] + rng.integers(1, 400, count)
    records["translation_latency"][memory] = 1
    records["timestamp"] = 10**9 + np.cumsum(rng.integers(50, 150, count))
    records["data_source_bytes"][~memory] = 0
    return records


def perf_data(stream: bytes) -> bytes:
    """Wrap a stream in the smallest perf.data file that perf reads (perfdata.md 1), in pieces of `PIECE` bytes."""
    pieces = [stream[begin : begin + PIECE] for begin in range(0, len(stream), PIECE)]
    body = struct.pack("<IHHQQQ", 79, 0, 32, 0, 40, 0)  # PERF_RECORD_TIME_CONV: shift, mult, zero
    body += struct.pack("<IHHIIQQ", 70, 0, 32, 4, 0, PMU, 1)  # PERF_RECORD_AUXTRACE_INFO of Arm SPE, version 1
    auxtrace = [
        struct.pack("<IHHQQQIiII", 71, 0, 48, len(piece), n * PIECE, n + 1, 0, -1, 0, 0)
        for n, piece in enumerate(pieces)
    ]
    size = len(body) + sum(len(head) + len(piece) for head, piece in zip(auxtrace, pieces, strict=True))
    attribute = struct.pack("<IIQQQQQIIQ", PMU, 64, 0x10005, 4096, 0x9C08F, 4, 0x140063, 0, 0, 0)
    header = struct.pack("<8sQQQQQQQQ", b"PERFILE2", 72, 80, 80, 80, 160, size, 0, 0)
    ids = struct.pack("<Q", 100)
    head = header + ids + attribute + struct.pack("<QQ", 72, 8)
    return b"".join([head, body, *(part for pair in zip(auxtrace, pieces, strict=True) for part in pair)])


def cpu_seconds(work: Callable[[], Any]) -> float:
    """Return the processor time, of user and system, that *work* takes in this process."""
    begin = time.process_time()
    work()
    return time.process_time() - begin


def perf_seconds(arguments: Sequence[str], path: Path) -> float:
    """Return the processor time that a perf command takes for the file, its output thrown away."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(["perf", *arguments, "-i", str(path)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode != 0:
        raise SystemExit(f"perf {' '.join(arguments)} failed: {done.stderr.decode(errors='replace')}")
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


def decode_pieces(stream: bytes) -> None:
    """Decode the stream as perf does: buffer by buffer, keeping nothing."""
    view = memoryview(stream)
    for begin in range(0, len(view), PIECE):
        decode(view[begin : begin + PIECE])


def encode_pieces(records: NDArray[Any]) -> None:
    """Encode what fills such a buffer at a time, keeping nothing."""
    for begin in range(0, len(records), PIECE // 64):
        encode(records[begin : begin + PIECE // 64], layout="neoverse")


def measure(megabytes: int, repeats: int, folder: Path) -> list[Row]:
    """Time all commands on one stream, turn by turn, and return the rows of the table."""
    records = records_of(megabytes * 10**6 // 64)
    stream = encode(records, layout="neoverse")
    tight = encode(records)
    path = folder / "perf.data"
    path.write_bytes(perf_data(stream))
    found, report = decode(stream)
    if not (report.clean and len(found) == len(records)):
        raise AssertionError("the stream does not decode to what it was made of")
    found["offset"] = found["size"] = 0
    if found.tobytes() != records.tobytes():
        raise AssertionError("the stream decodes to other records")
    memory_samples = int((is_load(found) | is_store(found)).sum())
    del found
    work: dict[str, Callable[[], float]] = {
        "decode, whole stream at once": lambda: cpu_seconds(lambda: decode(stream)),
        "decode, whole stream again": lambda: cpu_seconds(lambda: decode(stream)),
        "decode, 4 MiB at a time": lambda: cpu_seconds(lambda: decode_pieces(stream)),
        "decode, variable size": lambda: cpu_seconds(lambda: decode(tight)),
        "encode, whole stream at once": lambda: cpu_seconds(lambda: encode(records, layout="neoverse")),
        "encode, 4 MiB at a time": lambda: cpu_seconds(lambda: encode_pieces(records)),
        "encode, variable size": lambda: cpu_seconds(lambda: encode(records)),
    }
    has_perf = shutil.which("perf") is not None
    if has_perf:
        work["perf script --itrace=M"] = lambda: perf_seconds(["script", "--itrace=M"], path)
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(repeats):
        for name, timed in work.items():
            say(f"{name}, {turn + 1} of {repeats}")
            seconds[name].append(timed())
    if has_perf:
        say("perf report -D, once")
        seconds["perf report -D"] = [perf_seconds(["report", "-D"], path)]
    return rows_of(seconds, len(stream), len(tight), len(records), memory_samples)


def rows_of(seconds: dict[str, list[float]], size: int, tight: int, records: int, memory_samples: int) -> list[Row]:
    """Turn processor times into the table: medians, bytes per second of processor time, ratios against the bars."""
    median = {name: statistics.median(times) for name, times in seconds.items()}
    rows = [Row("stream", f"{size / 1e6:.0f} MB, {records:,} records, {memory_samples:,} loads and stores")]
    for name, time_ in median.items():
        speed = (tight if "variable" in name else size) / time_ / 1e6
        rows.append(Row(f"{name}, MB per CPU second", f"{speed:.0f} ({records / time_ / 1e6:.2f} M records)"))
    decoding, whole = median["decode, 4 MiB at a time"], median["decode, whole stream at once"]
    again = median["decode, whole stream again"]
    for command, bar in (("perf script --itrace=M", SCRIPT_RATIO), ("perf report -D", DUMP_RATIO)):
        if command not in median:
            rows.append(Row(f"decode, 4 MiB at a time, times {command}", NO_PERF, f">= {bar}"))
            continue
        ratio = median[command] / decoding
        figure, peer = f"decode, 4 MiB at a time, times {command}", f"{ratio:.1f} times {command}"
        rows.append(Row(figure, f"{ratio:.1f}", f">= {bar}", ratio >= bar, peer))
        rows.append(Row(f"decode, whole stream at once, times {command}", f"{median[command] / whole:.1f}"))
        rows.append(Row(f"decode, whole stream again, times {command}", f"{median[command] / again:.1f}"))
    ratio = decoding / median["encode, 4 MiB at a time"]
    rows.append(Row("encode, times decode, 4 MiB at a time", f"{ratio:.2f}", ">= 1", ratio >= 1))
    rows.append(Row("encode, times decode, whole stream", f"{whole / median['encode, whole stream at once']:.2f}"))
    return rows


def main() -> int:
    """Measure, print the table; 0 if every bar is met, 1 if one is not, 2 if nothing can be measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the stream (default 200)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of everything but perf report -D (default 5)")
    add_json(parser)
    arguments = parser.parse_args()
    if not COMPILED:
        print("error: NUMBA_DISABLE_JIT is set, so nothing is compiled. Remedy: unset it.", file=sys.stderr)
        return 2
    # Threads of numpy or perf on a second core would not count as one core each.
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    load = load_average()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(arguments.megabytes, arguments.repeats, Path(folder))
    print("One processor each.\n")
    return deliver(rows, load, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
