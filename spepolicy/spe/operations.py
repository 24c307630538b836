"""What the payloads of Operation Type, Events and Data Source packets mean (Arm ARM D18.2, as restated in spe.md
4.3-4.5).

Masks over `RECORD` arrays for work with many records, and words for one payload.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.spe.records import OpClass, Present

__all__ = [
    "EVENT_NAMES",
    "NEOVERSE_DATA_SOURCES",
    "event_names",
    "is_atomic",
    "is_branch",
    "is_load",
    "is_store",
    "operation_name",
]

EVENT_NAMES: dict[int, str] = {
    0: "exception generated",
    1: "retired",
    2: "L1D access",
    3: "L1D miss",
    4: "TLB access",
    5: "TLB walk",
    6: "not taken",
    7: "mispredicted",
    8: "LLC access",
    9: "LLC miss",
    10: "remote access",
    11: "misaligned",
    16: "transactional",
    17: "partial or empty predicate",
    18: "empty predicate",
    19: "L2D access",
    20: "L2D miss",
    21: "modified data",
    22: "recently fetched",
    23: "snooped",
    24: "streaming SVE",
    25: "external coprocessor",
}
"""Bit of the Events packet -> name. 12 to 15, 26 to 31 and 48 to 63 are IMPLEMENTATION DEFINED, 32 to 47 are zero."""

NEOVERSE_DATA_SOURCES: dict[int, str] = {
    0x0: "L1D",
    0x8: "L2",
    0x9: "peer core",
    0xA: "local cluster",
    0xB: "system cache",
    0xC: "peer cluster",
    0xD: "remote",
    0xE: "DRAM",
}
"""Data source of a load -> name, on Neoverse N1, N2, V1 and V2, as the decoder of perf 6.18 has it."""


def _of_class(records: NDArray[Any], op_class: OpClass) -> NDArray[np.bool_]:
    of_class: NDArray[np.bool_] = records["op_class"] == op_class
    return of_class & (records["present"] & int(Present.OPERATION) != 0)


def is_load(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which records are of operations that return data from memory, atomics with a result included."""
    return _of_class(records, OpClass.LOAD_STORE) & (records["op"] & 1 == 0)


def is_store(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which records are of stores, and of atomics without a result."""
    return _of_class(records, OpClass.LOAD_STORE) & (records["op"] & 1 == 1)


def is_atomic(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which records are of atomic operations: extended loads and stores with the AT bit."""
    return _of_class(records, OpClass.LOAD_STORE) & (records["op"] & 0b1110_0110 == 0b0000_0110)


def is_branch(records: NDArray[Any]) -> NDArray[np.bool_]:
    """Return which records are of branches and exception returns."""
    return _of_class(records, OpClass.BRANCH)


def event_names(events: int) -> list[str]:
    """Return the names of the bits that are set; a bit without a name is `event N`."""
    return [EVENT_NAMES.get(bit, f"event {bit}") for bit in range(64) if events >> bit & 1]


def operation_name(op_class: int, op: int) -> str:
    """Return words for the payload of an Operation Type packet, such as `load, atomic, acquire`.

    A payload that the architecture does not define gets its number in hexadecimal as its last word.
    """
    if op_class == OpClass.LOAD_STORE:
        return ", ".join(["store" if op & 1 else "load", *_load_store_words(op)])
    if op_class == OpClass.BRANCH:
        words = ["branch", *_bits(op, {0: "conditional", 1: "indirect", 2: "GCS"})]
        words += {1: ["with link"], 2: ["return"], 3: ["neither call nor return"]}.get(op >> 3 & 3, [])
        return ", ".join(words + ([f"{op:#04x}"] if op >> 5 else []))
    if op_class == OpClass.OTHER:
        return ", ".join(["other", *_other_words(op)])
    return f"class {op_class}, {op:#04x}"


def _bits(value: int, names: dict[int, str]) -> list[str]:
    return [name for bit, name in names.items() if value >> bit & 1]


def _vector_length(op: int) -> str:
    """The effective vector length in bits 6:4, EVL."""
    length = op >> 4 & 7
    return "over 2048 bits" if length == 7 else f"{32 << length} bits"


def _load_store_words(op: int) -> list[str]:
    kind = op >> 1 & 0x7F
    if op & 0b1110_0010 == 0b0000_0010:
        return _bits(op, {2: "atomic", 3: "exclusive", 4: "acquire or release"})
    if op & 0b0000_1010 == 0b0000_1000:
        return ["SVE or SME", _vector_length(op), *_bits(op, {2: "predicated", 7: "gather or scatter"})]
    if op & 0b1111_1010 == 0b0100_0000:
        return ["GCS", *_bits(op, {2: "common"})]
    named = {
        0b0000000: "general-purpose",
        0b0000010: "SIMD and FP",
        0b0001000: "unspecified",
        0b0001010: "allocation tag",
        0b0011000: "system register in memory",
        0b0010000: "memory copy",
    }
    if op == 0b0010_0101:
        return ["memory set"]
    return [named.get(kind, f"{op:#04x}")]


def _other_words(op: int) -> list[str]:
    if op & 0b1111_1000 == 0:
        return _bits(op, {0: "conditional", 1: "FP", 2: "SIMD"})
    if op & 0b1000_1001 == 0b0000_1000:
        return ["SVE", _vector_length(op), *_bits(op, {1: "FP", 2: "predicated"})]
    if op & 0b1000_1001 == 0b1000_1000:
        size = op >> 3 & 0b1110 | op >> 2 & 1  # ETS[3:1] in bits 6:4, ETS[0] in bit 2
        words = "whole ZA" if size == 15 else f"{128 << size} bits" if size <= 11 else f"tile size {size}"
        return ["SME", words, *_bits(op, {1: "FP"})]
    return [f"{op:#04x}"]
