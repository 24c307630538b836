"""The AUX area of one queue: from the pieces in the file to records, cut only where the stream really is.

`perf record` writes what it finds in a CPU's (or thread's) AUX ring as AUXTRACE records with a position in that ring's
stream, padded to 8 bytes. So a piece follows on the one before it if it begins where that one ends, or up to 7 bytes
earlier. Records never cross the end of a session of the Linux driver, for it pads to the record alignment and
starts a new one (spe.md 3.2); only an event with PMBSR_EL1.DL leaves half a record there, and then the AUX record that
closes the session carries PERF_AUX_FLAG_PARTIAL (spe.md 3.4).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from spepolicy.perfdata.container import MAX_PROBLEMS, Problems, Record
from spepolicy.perfdata.layout import AuxFlag, Auxtrace
from spepolicy.spe.packets import decode
from spepolicy.spe.records import EXTRA, RECORD
from spepolicy.spe.report import DamageKind

__all__ = ["NOTHING", "Cuts", "Decoded", "Queue", "decode_queue", "joined"]

_PADDING = 8
_LARGEST = (1 << 64) - 1


class Piece(NamedTuple):
    """The payload of one AUXTRACE record."""

    at: int  # byte in the file
    offset: int  # byte in the stream of the AUX area
    payload: memoryview
    cpu: int
    tid: int


@dataclass
class Queue:
    """The pieces with one queue number, in the order of the file."""

    pieces: list[Piece] = field(default_factory=list)
    size: int = 0

    def add(self, record: Record, body: Auxtrace) -> None:
        """Add the payload of *record*, whose body is *body*."""
        at = record.offset + 8 + len(record.body)
        self.pieces.append(Piece(at, body.offset, record.payload, body.cpu, body.tid))
        self.size += len(record.payload)


class Decoded(NamedTuple):
    """The records of a queue; `offset` of each is its place in the stream of the AUX area."""

    records: NDArray[Any]  # RECORD[n]
    extra: NDArray[Any]  # EXTRA
    cpu: NDArray[np.int32]  # [n] of the piece it begins in, -1: a thread's queue
    tid: NDArray[np.int32]  # [n] of the piece it begins in, -1: a CPU's queue
    skipped_bytes: int


NOTHING = Decoded(np.zeros(0, RECORD), np.zeros(0, EXTRA), np.zeros(0, np.int32), np.zeros(0, np.int32), 0)


class Cuts:
    """Where sessions of the driver ended with half a record, by CPU and, in queues of threads, by thread."""

    def __init__(self, aux: NDArray[Any]) -> None:
        """*aux*: the AUX records of the file."""
        self.snapshot = bool((aux["flags"] & int(AuxFlag.OVERWRITE)).any())
        cut = (aux["flags"] & int(AuxFlag.PARTIAL | AuxFlag.OVERWRITE)) == int(AuxFlag.PARTIAL)
        self._by_cpu = self._sorted(aux[cut], "cpu")
        self._by_tid = self._sorted(aux[cut], "tid")

    @staticmethod
    def _sorted(aux: NDArray[Any], key: str) -> tuple[NDArray[np.int32], NDArray[np.uint64]]:
        with np.errstate(over="ignore"):
            ends = aux["offset"] + aux["size"]
        order = np.lexsort((ends, aux[key]))
        return aux[key][order], ends[order]

    def of(self, run: list[Piece]) -> NDArray[np.int64]:
        """Return the places in the joined bytes of *run*, its end included, at which a session was cut, ascending."""
        keys, ends = self._by_cpu if run[0].cpu >= 0 else self._by_tid
        key = run[0].cpu if run[0].cpu >= 0 else run[0].tid
        ends = ends[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")]
        offsets, starts = _places(run)
        sizes = np.array([len(piece.payload) for piece in run], np.int64)
        first, last = int(offsets[0]), int(offsets[0]) + int(starts[-1] + sizes[-1])
        ends = ends[np.searchsorted(ends, first, "right") : np.searchsorted(ends, min(last, _LARGEST), "right")]
        n = np.searchsorted(offsets, ends, "right") - 1
        places: NDArray[np.int64] = np.unique(starts[n] + np.minimum((ends - offsets[n]).astype(np.int64), sizes[n]))
        return places


def decode_queue(queue: Queue, cuts: Cuts, problems: Problems) -> Decoded:
    """Return the records of *queue*, and note what is wrong with it."""
    parts = [NOTHING]
    count = 0
    for run in _runs(queue.pieces, cuts.snapshot, problems):
        for part in _decode_run(run, cuts.of(run), problems):
            part.extra["record_index"] += np.uint32(count)
            count += len(part.records)
            parts.append(part)
    return joined(parts)


def joined(parts: list[Decoded]) -> Decoded:
    """Return *parts*, of which the first is `NOTHING`, as one; a single one is not copied."""
    if len(parts) <= 2:
        return parts[-1]
    return Decoded(
        np.concatenate([part.records for part in parts]),
        np.concatenate([part.extra for part in parts]),
        np.concatenate([part.cpu for part in parts]),
        np.concatenate([part.tid for part in parts]),
        sum(part.skipped_bytes for part in parts),
    )


def _runs(pieces: list[Piece], snapshot: bool, problems: Problems) -> list[list[Piece]]:
    """Return *pieces* in groups of which each is one stream without a gap."""
    runs: list[list[Piece]] = []
    end = None
    for piece in pieces:
        if not len(piece.payload):
            continue
        follows = end is not None and 0 <= end - piece.offset < _PADDING
        if follows and piece.cpu == runs[-1][-1].cpu and piece.tid == runs[-1][-1].tid:
            runs[-1].append(piece)
        else:
            if end is not None and piece.offset > end and not snapshot:
                problems.add(piece.at, f"{piece.offset - end} bytes of AUX data before this piece are not in the file")
            runs.append([piece])
        end = piece.offset + len(piece.payload)
    return runs


def _places(run: list[Piece]) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    """Return, for each piece, its offset in the AUX area and in the joined bytes of *run*."""
    sizes = [len(piece.payload) for piece in run]
    starts = np.cumsum([0, *sizes[:-1]], dtype=np.int64)
    return np.array([piece.offset for piece in run], np.uint64), starts


def _decode_run(run: list[Piece], cuts: NDArray[np.int64], problems: Problems) -> list[Decoded]:
    offsets, starts = _places(run)
    content = np.concatenate([np.frombuffer(piece.payload, np.uint8) for piece in run])
    files = np.array([piece.at for piece in run], np.int64)
    cpus = np.array([piece.cpu for piece in run], np.int32)
    tids = np.array([piece.tid for piece in run], np.int32)
    bounds = [0, *cuts.tolist()]
    if bounds[-1] != len(content):
        bounds.append(len(content))
    parts = []
    for number, (begin, end) in enumerate(pairwise(bounds)):
        records, report = decode(content[begin:end])
        places = report.damage["offset"].astype(np.int64) + begin
        n = np.searchsorted(starts, places, "right") - 1
        announced = report.rest if number < len(cuts) else -1
        skipped = _note(report.damage, files[n] + places - starts[n], announced, problems)
        n = np.searchsorted(starts, records["offset"].astype(np.int64) + begin, "right") - 1
        with np.errstate(over="ignore"):
            records["offset"] += offsets[n] + np.uint64(begin) - starts[n].astype(np.uint64)
        parts.append(Decoded(records, report.extra, cpus[n], tids[n], skipped))
    return parts


def _note(damage: NDArray[Any], places: NDArray[np.int64], announced: int, problems: Problems) -> int:
    """Note each damaged place, and return the bytes in them.

    *places*: where they are in the file. *announced*: offset of the half record that PERF_AUX_FLAG_PARTIAL tells of,
    which is no damage of the file, or -1.
    """
    inside = damage["kind"] == DamageKind.UNKNOWN_PACKET  # within records: nothing is lost
    skipped = int(damage["length"][~inside].sum())
    rows = np.flatnonzero((damage["kind"] != DamageKind.NO_END) | (damage["offset"].astype(np.int64) != announced))
    room = max(0, MAX_PROBLEMS - len(problems.first))
    for n in rows[:room].tolist():
        kind = DamageKind(int(damage["kind"][n])).name.lower().replace("_", " ")
        problems.add(int(places[n]), f"SPE data: {kind}, {damage['length'][n]} bytes")
    problems.count += len(rows[room:])
    return skipped
