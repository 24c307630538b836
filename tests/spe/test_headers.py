"""Headers, names and payloads against the reference's tables and what perf 6.1 prints for each packet."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from spepolicy.spe.headers import HEADERS, KIND_OF, SIZE_OF, Kind
from spepolicy.spe.operations import NEOVERSE_DATA_SOURCES, event_names, is_atomic, is_branch, is_load, is_store
from spepolicy.spe.operations import operation_name as name
from spepolicy.spe.packets import decode
from spepolicy.spe.records import OpClass, Present

TABLE = Path(__file__).resolve().parents[3] / "shared" / "data" / "spe_packets.json"
needs_table = pytest.mark.skipif(not TABLE.is_file(), reason="the table of packets (shared/data) is not here")


def table() -> Any:
    return json.loads(TABLE.read_text())


def test_sizes_follow_from_bits_5_and_4() -> None:
    for header in HEADERS:
        if header.kind != Kind.EXTENDED:
            assert header.payload == (0 if header.value < 0x20 else 1 << (header.value >> 4 & 3))
    assert len({header.value for header in HEADERS}) == len(HEADERS)
    assert (KIND_OF == Kind.UNKNOWN).sum() == 256 - len(HEADERS)


@needs_table
def test_every_header_of_the_reference() -> None:
    packets = table()["packets"]
    for name_, kinds in {
        "events": {Kind.EVENTS},
        "data_source": {Kind.DATA_SOURCE},
        "context": {Kind.CONTEXT_EL1, Kind.CONTEXT_EL2},
        "op_type": {Kind.OPERATION},
    }.items():
        headers = {int(text, 16) for text in packets[name_]["headers"]}
        assert headers == {header.value for header in HEADERS if header.kind in kinds}
    for name_, first in (("address", 0xB0), ("counter", 0x98)):
        assert int(packets[name_]["value"], 16) == first
        assert {int(SIZE_OF[first + index]) for index in range(8)} == {packets[name_]["payload"]}


@needs_table
def test_every_payload_of_an_operation_has_words_of_its_own() -> None:
    """Each pattern of the reference, all its variable bits tried, and nothing else."""
    words: dict[tuple[int, int], str] = {}
    for entry in table()["op_type_payloads"].values():
        for op in range(256):
            wide = re.sub(r"[A-Z]+\[(\d+):(\d+)\]", lambda m: "x" * (int(m[1]) - int(m[2]) + 1), entry["pattern"])
            bits = re.sub(r"[A-Z]+(\[0\])?", "x", wide).replace(" ", "")
            assert len(bits) == 8, entry
            if all(bit in ("x", value) for bit, value in zip(bits, f"{op:08b}", strict=True)):
                words[entry["class"], op] = name(entry["class"], op)
    assert len(set(words.values())) == len(words)
    for op_class in range(3):
        for op in range(256):
            assert (name(op_class, op)[-4:-2] == "0x") == ((op_class, op) not in words)


@needs_table
def test_event_names() -> None:
    for bit, entry in table()["events"].items():
        named = not event_names(1 << int(bit))[0].startswith("event ")
        assert named == (not entry["name"].startswith(("impdef", "reserved")))
    assert {int(key, 16) for key in table()["data_source"]["common_neoverse_cortex"]["values"]} == set(
        NEOVERSE_DATA_SOURCES
    )


# perf's words for a bit of the Events packet; it has none for 16 and from 19 on.
PERF_EVENTS = [
    *("EXCEPTION-GEN", "RETIRED", "L1D-ACCESS", "L1D-REFILL", "TLB-ACCESS", "TLB-REFILL", "NOT-TAKEN", "MISPRED"),
    *("LLC-ACCESS", "LLC-REFILL", "REMOTE-ACCESS", "ALIGNMENT", "-", "-", "-", "-"),
    *("-", "SVE-PARTIAL-PRED", "SVE-EMPTY-PRED"),
]


def perf_lines(stream: bytes) -> list[str]:
    """What perf 6.1 prints for the packets of a stream that is one packet, from what was decoded."""
    closed = stream if stream[:1] in (b"\x01", b"\x71") else stream + b"\x01"
    events = b"" if (stream[0] & 0xCF) == 0x42 else b"\x42\x00"
    records, report = decode(events + closed)
    (record,) = records
    lines = []
    present = Present(int(record["present"]))
    for bit, label, el in ((Present.PC, "PC", "pc"), (Present.TARGET, "TGT", "target")):
        if bit in present:
            low = int(record[el]) & (1 << 56) - 1
            lines.append(f"{label} {low:#x} el{record[el + '_el']} ns={record[el + '_security'] & 1}")
    if Present.VA in present:
        lines.append(f"VA {int(record['va']) & (1 << 56) - 1 | int(record['va_tag']) << 56:#x}")
    if Present.PA in present:
        ns, ch, pat = record["pa_security"] & 1, record["pa_checked"], record["pa_tag"]
        lines.append(f"PA {record['pa']:#x} ns={ns} ch={ch} pat={pat:x}")
    if Present.PREVIOUS_TARGET in present:
        top = record["previous_security"] & 1
        lines.append(f"ADDR {int(record['previous']) & (1 << 56) - 1 | int(top) << 63:#x} (4)")
    for bit, field, label in (
        (Present.TOTAL, "total_latency", " TOT"),
        (Present.ISSUE, "issue_latency", " ISSUE"),
        (Present.TRANSLATION, "translation_latency", " XLAT"),
        (Present.ALTERNATE_ISSUE, "alternate_latency", ""),
    ):
        if bit in present:
            lines.append(f"LAT {record[field]}{label}")
    for bit, field, label in ((Present.CONTEXT_EL1, "context_el1", "el1"), (Present.CONTEXT_EL2, "context_el2", "el2")):
        if bit in present:
            lines.append(f"CONTEXT {int(record[field]):#x} {label}")
    if Present.DATA_SOURCE in present:
        lines.append(f"DATA-SOURCE {record['data_source']}")
    if Present.TIMESTAMP in present:
        lines.append(f"TS {record['timestamp']}")
    if not events:
        set_bits = [PERF_EVENTS[i] for i in range(len(PERF_EVENTS)) if int(record["events"]) >> i & 1]
        lines.append(" ".join(["EV", *(word for word in set_bits if word != "-")]))
    for extra in report.extra:
        header, value = int(extra["header"]), int(extra["value"])
        last = header >> 8 or header & 0xFF
        index = (header & 3) << 3 | last & 7 if header > 0xFF else last & 7
        if last & 0xF8 == 0xB0:
            lines.append(f"ADDR {value:#x} ({index})")
        elif last & 0xF8 == 0x98:
            lines.append(f"LAT {value}")
    return lines


@needs_table
def test_packets_decode_to_what_perf_prints() -> None:
    """Every dump of the reference that perf 6.1 printed for one packet. Operations are compared further down."""
    compared = 0
    for dump in table()["verified_perf_6_1_dumps"]:
        stream = bytes.fromhex(dump["hex"])
        text = dump["lines"][0][2]
        if dump["name"].startswith(("bad_", "ext_bad", "align_ext", "op_class3")):
            assert not decode(stream + b"\x42\x00\x01")[1].clean, dump["name"]
        elif stream[0] & 0xFC != 0x48 and text not in ("END", "PAD"):
            assert perf_lines(stream) == [text], dump["name"]
            compared += 1
    assert compared > 25


@needs_table
def test_operations_agree_with_perf() -> None:
    """perf's words for loads, stores and branches, where it has them; it lacks those of MTE, MOPS and GCS, and takes a
    branch with CR bits for a direct one."""
    perf_words = {"atomic": "AT", "exclusive": "EXCL", "acquire or release": "AR", "predicated": "PRED"}
    perf_words |= {"gather or scatter": "SG", "system register in memory": "NV-SYSREG", "SIMD and FP": "SIMD-FP"}
    perf_words |= {"conditional": "COND", "load": "LD", "store": "ST", "branch": "B", "other": "OTHER"}
    perf_words |= {"general-purpose": "GP-REG", "indirect": "IND"}
    compared = 0
    for dump in table()["verified_perf_6_1_dumps"]:
        stream = bytes.fromhex(dump["hex"])
        if len(stream) != 2 or stream[0] not in (0x49, 0x4A) or (stream[0] == 0x4A and stream[1] > 3):
            continue
        ours = name(stream[0] & 3, stream[1]).split(", ")
        theirs = dump["lines"][0][2].split()
        if "EVLEN" in theirs:
            assert f"{theirs[theirs.index('EVLEN') + 1]} bits" in ours, dump
        words = [perf_words[word] for word in ours if word in perf_words]
        said = [word for word in theirs if word in perf_words.values()]
        if len(said) > 1 or stream[0] == 0x4A:
            assert sorted(words) == sorted(said), dump
        compared += 1
        records, _ = decode(stream + b"\x42\x00\x01")
        assert (is_load(records)[0], is_store(records)[0]) == (theirs[0] == "LD", theirs[0] == "ST")
        assert is_branch(records)[0] == (theirs[0] == "B")
        assert is_atomic(records)[0] == ("AT" in theirs)
    assert compared > 20


def test_a_record_without_operation_is_none_of_them() -> None:
    records, _ = decode(b"\x42\x00\x01")
    assert not (is_load(records) | is_store(records) | is_branch(records) | is_atomic(records)).any()
    assert name(OpClass.LOAD_STORE, 0) == "load, general-purpose"
    assert name(3, 0) == "class 3, 0x00"
