"""What the decoder found beside good records: each damaged place, with its offset, length and kind."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["DAMAGE", "DamageKind", "DecodeReport"]


class DamageKind(IntEnum):
    """What is wrong at a place of the stream."""

    BAD_BYTES = 1
    """Bytes that are no packet's header, skipped one by one. Neighbours are one place, `count` bytes."""
    UNKNOWN_PACKET = 2
    """A packet that the architecture does not define, skipped by the size in its header. Neighbours are one place,
    `count` packets."""
    NO_END = 3
    """A record without its end: another begins, the stream ends, or it got longer than a record can be."""
    NO_EVENTS = 4
    """A record without Events packet, which each has (Arm ARM D17.6.10): the rear part of a record. An End or Timestamp
    packet alone is one as well; neighbouring End packets are one place."""


DAMAGE = np.dtype([("offset", "u8"), ("length", "u8"), ("count", "u4"), ("kind", "u4")])
"""A damaged place: bytes from the start of the stream, bytes, how many packets or bytes, `DamageKind`."""


@dataclass(frozen=True)
class DecodeReport:
    """What `spepolicy.spe.packets.decode` found beside good records.

    `stream_bytes` = bytes of good records and of padding, inside of them or between, + bytes of damaged places. The
    places of `UNKNOWN_PACKET` alone lie within records, good or damaged; all others exclude each other.
    """

    stream_bytes: int
    padding_bytes: int
    """Padding between records; that within a record counts as part of it."""
    damage: NDArray[Any]
    """DAMAGE[places], by offset."""
    extra: NDArray[Any]
    """`spepolicy.spe.records.EXTRA`[packets]: what the records have beside the fields of RECORD."""
    rest: int
    """Offset of a record that the end of the stream cut; `stream_bytes` if there is none. Where a stream comes in
    pieces, decode from here again when the next piece is there."""

    def count(self, kind: DamageKind) -> int:
        """Return how many bytes, packets or records have this damage."""
        return int(self.damage["count"][self.damage["kind"] == kind].sum())

    @property
    def clean(self) -> bool:
        """Whether nothing was damaged or unknown."""
        return len(self.damage) == 0

    def __str__(self) -> str:
        if self.clean:
            return f"{self.stream_bytes:,} bytes, no damage"
        parts = [
            f"{self.count(kind):,} {kind.name.lower().replace('_', ' ')} (first at byte {first:,})"
            for kind in DamageKind
            if len(places := self.damage["offset"][self.damage["kind"] == kind])
            for first in [int(places[0])]
        ]
        return f"{self.stream_bytes:,} bytes: {', '.join(parts)}"
