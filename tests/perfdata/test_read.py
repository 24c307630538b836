"""`read`: every field of a whole file, and of damaged ones what is certain, with the damage named."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from spepolicy.errors import CaptureError
from spepolicy.perfdata import read
from spepolicy.perfdata.__main__ import main
from spepolicy.perfdata.capture import Capture, parse
from spepolicy.perfdata.container import open_container
from spepolicy.perfdata.layout import (
    CPU_MAGIC,
    AuxFlag,
    AuxtraceError,
    AuxtraceInfo,
    LostSamples,
    Misc,
    Mmap2,
    Switch,
    Type,
)
from spepolicy.perfdata.writer import Writer
from spepolicy.spe.records import OpClass, Present
from tests.perfdata.streams import NEOVERSE_N1, SPE_ID, add_session, branch, load, two_sessions, who, writer

DATA = Path(__file__).resolve().parents[1] / "data"


def file_of(made: Writer) -> Capture:
    return parse(made.content(), "made")


def texts(capture: Capture) -> str:
    return "\n".join(str(problem) for problem in capture.problems)


# -- whole files -------------------------------------------------------------------------------------------------------


def test_what_the_packets_say_is_in_the_records(tmp_path: Path) -> None:
    (tmp_path / "perf.data").write_bytes(two_sessions())
    capture = read(tmp_path / "perf.data")
    assert capture.complete
    assert capture.skipped_bytes == 0
    assert capture.records["pc"].tolist() == [0x401000, 0x401004, 0x401008, 0x40100C, 0xFFFF_8000_0800_0010, 0x10]
    assert capture.records["pc_el"].tolist() == [0, 0, 0, 0, 1, 1]
    assert capture.records["va"].tolist() == [0, 0x1000, 0x2000, 0x3000, 0, 0]
    assert capture.records["total_latency"].tolist() == [100, 101, 102, 103, 5, 5]
    assert capture.records["op_class"].tolist() == [OpClass.LOAD_STORE] * 4 + [OpClass.BRANCH] * 2
    assert capture.records["data_source"].tolist() == [8] * 4 + [0] * 2
    assert (capture.records["present"] & int(Present.PA) != 0).tolist() == [True] * 4 + [False] * 2
    assert capture.records["target"].tolist()[4:] == [0xFFFF_8000_0800_0100, 0x20]
    # 40 ns a tick at 25 MHz.
    assert capture.where["time_ns"].tolist() == [40_000, 40_400, 40_800, 41_200, 80_000, 82_000]
    assert capture.where["cpu"].tolist() == [0] * 6
    # Branches have no context packet, and nothing else in the file tells their thread.
    assert capture.where["tid"].tolist() == [1000] * 4 + [-1] * 2
    assert capture.records["offset"].tolist() == [0, 64, 128, 192, 256, 320]


def test_what_is_beside_the_packets() -> None:
    made = writer(hostname="guest", cpudesc="Neoverse-N1", cmdline=["perf", "record", "-e", "arm_spe_0//"])
    identity = b"\x14\0\0\0" + bytes(range(20))
    user = Misc.USER | Misc.MMAP_BUILD_ID
    made.add(Type.MMAP2, Mmap2(1000, 1000, 0x400000, 0x3000, 0x1000, identity, 5, 2, "/usr/bin/app"), who(), misc=user)
    made.add(Type.LOST_SAMPLES, LostSamples(77), who())
    made.add(Type.SWITCH_CPU_WIDE, Switch(2000, 2001), who(time=50_000), misc=Misc.SWITCH_OUT)
    made.add(Type.AUXTRACE_ERROR, AuxtraceError(1, 5, 3, 9, 8, 2, 0, 253080, "stage2-fault 12.3us", 4242, 1))
    add_session(made, load(0x400010, 1000), flags=AuxFlag.COLLISION, time=41_000)
    capture = file_of(made)
    assert capture.complete
    assert capture.machine["cmdline"] == "perf record -e arm_spe_0//"
    assert capture.machine["cpudesc"] == "Neoverse-N1"
    assert capture.midr == {-1: int(NEOVERSE_N1, 16)}
    (mapped,) = capture.maps
    assert (mapped["start"], mapped["end"], mapped["page_offset"]) == (0x400000, 0x403000, 0x1000)
    assert capture.names[mapped["name"]] == "/usr/bin/app"
    assert capture.names[mapped["build_id"]] == bytes(range(20)).hex()
    assert capture.lost[["count", "samples"]].tolist() == [(77, 1)]
    assert capture.aux[["offset", "size", "flags", "time_ns", "cpu"]].tolist() == [(0, 64, 8, 41_000, 0)]
    (error,) = capture.errors
    assert (capture.names[error["message"]], error["time_ns"], error["cpu"]) == ("stage2-fault 12.3us", 253080, 3)
    assert capture.names[capture.comms[0]["name"]] == "service"
    (event,) = capture.events
    assert event.ids == (SPE_ID,)
    for part in ("1 records", "1 collision", "77 samples", "Neoverse-N1", "the file is whole"):
        assert part in capture.report()


def test_threads_come_from_switches_where_no_context_packet_tells() -> None:
    made = writer()
    for time, tid in ((10_000, 5), (50_000, 6)):
        made.add(Type.SWITCH_CPU_WIDE, Switch(tid, tid), who(time=time), misc=Misc.SWITCH_OUT)
    made.add(Type.SWITCH_CPU_WIDE, Switch(99, 99), who(time=20_000, cpu=1), misc=Misc.SWITCH_OUT)
    add_session(made, b"".join(branch(4 * n, 0, ticks) for n, ticks in enumerate((100, 300, 1000, 1249, 1250, 2000))))
    assert file_of(made).where["tid"].tolist() == [-1, 5, 5, 5, 6, 6]


def test_switches_of_a_cpu_without_records_tell_nothing() -> None:
    made = writer()
    made.add(Type.SWITCH_CPU_WIDE, Switch(5, 5), who(time=10, cpu=3), misc=Misc.SWITCH_OUT)
    add_session(made, branch(0, 0, 1000))
    assert file_of(made).where["tid"].tolist() == [-1]


def version2(cpus: int, midr: int = 0x410FD4F0) -> AuxtraceInfo:
    each = [word for cpu in range(cpus) for word in (CPU_MAGIC, cpu, 4, midr + cpu, 8, 1024, 0)]
    return AuxtraceInfo(4, 0, (2, 4, 8, cpus, *each))


def with_info(info: AuxtraceInfo) -> Capture:
    made = writer()
    made.add(Type.AUXTRACE_INFO, info)
    add_session(made, load(0x400010, 1000))
    return file_of(made)


def test_auxtrace_info_of_both_versions() -> None:
    capture = with_info(version2(3))
    assert (capture.info_version, capture.complete) == (2, True)
    assert capture.midr == {0: 0x410FD4F0, 1: 0x410FD4F1, 2: 0x410FD4F2}
    assert len(capture.events) == 1
    assert with_info(AuxtraceInfo(4, 0, (8, 0))).info_version == 1


def test_auxtrace_info_of_a_version_to_come_is_read_with_a_warning() -> None:
    capture = with_info(AuxtraceInfo(4, 0, (3, 4, 8, 1, CPU_MAGIC, 0, 1, 0)))
    assert len(capture.records) == 1
    assert "version 3" in texts(capture)


def test_a_file_of_another_writer() -> None:
    """`blackout_demo.data` was made by a program that shares nothing with this one; its figures are in its README."""
    capture = read(DATA / "blackout_demo.data")
    assert capture.complete
    assert len(capture.records) == 500
    assert capture.aux_bytes == 32_000
    messages = [capture.names[n] for n in capture.errors["message"]]
    assert len(messages) == 6
    assert set(messages) == {"stage2-fault 12.3us", "no AUX space", "vcpu descheduled"}
    assert set(capture.where["queue"].tolist()) == {0, 1}


def through_a_pipe(content: bytes) -> bytes:
    """Return what perf writes to a pipe: events and features as records, no sections."""
    data_at, data_size = struct.unpack_from("<QQ", content, 0x28)
    attrs_at, attrs_size = struct.unpack_from("<QQ", content, 0x18)
    out = b"PERFILE2" + struct.pack("<Q", 16)
    for at in range(attrs_at, attrs_at + attrs_size, 144):
        ids_at, ids_size = struct.unpack_from("<QQ", content, at + 128)
        body = content[at : at + 128] + content[ids_at : ids_at + ids_size]
        out += struct.pack("<IHH", Type.HEADER_ATTR, 0, 8 + len(body)) + body
    text = b"guest".ljust(64, b"\0")
    out += struct.pack("<IHHQI", Type.HEADER_FEATURE, 0, 84, 3, 64) + text + bytes(0)
    return out + content[data_at : data_at + data_size]


def test_a_file_that_came_through_a_pipe() -> None:
    whole, piped = parse(two_sessions(), "a"), parse(through_a_pipe(two_sessions()), "b")
    assert piped.complete
    for name in ("records", "where", "aux", "comms"):
        assert np.array_equal(getattr(whole, name), getattr(piped, name)), name
    assert piped.machine == {"hostname": "guest"}
    assert [event.ids for event in piped.events] == [(SPE_ID,)]


def test_a_named_pipe_can_be_read(tmp_path: Path) -> None:
    import threading

    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    sender = threading.Thread(target=fifo.write_bytes, args=(two_sessions(),))
    sender.start()
    assert len(read(fifo).records) == 6
    sender.join()


# -- where the stream is cut -------------------------------------------------------------------------------------------


def test_half_a_record_at_a_reported_loss_is_not_joined_with_the_next() -> None:
    """PMBSR_EL1.DL: the driver hands over half a record with PERF_AUX_FLAG_PARTIAL, pads, and starts a new session.

    perf gives the second record the VA and the latency of the dead load (spe.md 4.7).
    """
    half = load(0x400010, 1000, va=0xBAD000, total=999)[:0x27]
    after = branch(0x400020, 0x400040, 1100)
    made = writer()
    add_session(made, load(0x400000, 900) + half, flags=AuxFlag.TRUNCATED | AuxFlag.PARTIAL)
    add_session(made, bytes(25) + after, 64 + 0x27)
    capture = file_of(made)
    assert capture.records["pc"].tolist() == [0x400000, 0x400020]
    assert capture.records["va"].tolist() == [0x7000, 0]
    assert capture.complete  # the AUX record announces the cut: nothing is wrong with the file
    assert capture.skipped_bytes == len(half)


def test_half_a_record_at_the_end_is_announced_as_well() -> None:
    made = writer()
    raw = load(0x400000, 900) + load(0x400010, 1000)[:0x27]
    add_session(made, raw, flags=AuxFlag.TRUNCATED | AuxFlag.PARTIAL)
    assert file_of(made).complete
    made = writer()
    add_session(made, raw, flags=AuxFlag.TRUNCATED)
    assert not file_of(made).complete


def test_a_record_over_two_pieces_is_one_record() -> None:
    made = writer()
    raw = load(0x400000, 900) + load(0x400010, 1000)
    made.add_aux_data(raw[:88], offset=0, cpu=0)
    made.add_aux_data(raw[88:], offset=88, cpu=0)
    capture = file_of(made)
    assert capture.records["pc"].tolist() == [0x400000, 0x400010]
    assert capture.complete


def test_pieces_padded_to_eight_bytes_follow_on_each_other() -> None:
    made = writer()
    made.add_aux_data(load(0x400000, 900) + bytes(5), offset=0, cpu=0)  # 69 bytes, 72 in the file
    made.add_aux_data(bytes(3) + load(0x400010, 1000), offset=69, cpu=0)
    capture = file_of(made)
    assert capture.complete
    assert capture.records["offset"].tolist() == [0, 72]


def test_missing_aux_data_is_named_and_nothing_is_joined_across_it() -> None:
    made = writer()
    made.add_aux_data(load(0x400000, 900)[:40], offset=0, cpu=0)
    made.add_aux_data(load(0x400010, 1000), offset=4096, cpu=0)
    capture = file_of(made)
    assert capture.records["pc"].tolist() == [0x400010]
    assert capture.records["offset"].tolist() == [4096]
    assert "4056 bytes of AUX data" in texts(capture)


def test_queues_are_kept_apart() -> None:
    made = writer()
    for n in range(3):
        for cpu in (0, 1):
            add_session(made, load(0x400000 + 0x1000 * cpu + 4 * n, 900 + n), 64 * n, cpu=cpu)
    capture = file_of(made)
    assert capture.where["cpu"].tolist() == [0, 0, 0, 1, 1, 1]
    assert capture.records["pc"].tolist() == [0x400000, 0x400004, 0x400008, 0x401000, 0x401004, 0x401008]
    assert capture.records["pc"][capture.in_time_order()][:2].tolist() == [0x400000, 0x401000]


# -- damage ------------------------------------------------------------------------------------------------------------


def changed(content: bytes, at: int, new: bytes) -> bytes:
    return content[:at] + new + content[at + len(new) :]


def stream_of(content: bytes) -> tuple[int, int]:
    at, size = struct.unpack_from("<QQ", content, 0x28)
    return at, size


def test_a_recorder_that_was_killed() -> None:
    """perf writes the sizes and the features when it ends: of a killed one there are only records."""
    content = two_sessions()
    at, size = stream_of(content)
    capture = parse(changed(content[: at + size], 0x30, bytes(8)), "killed")
    assert len(capture.records) == 6
    assert "recorder was killed" in texts(capture)


@pytest.mark.parametrize("left", range(0, 400, 7))
def test_a_file_that_was_cut_gives_the_records_before_the_cut(left: int) -> None:
    content = two_sessions()
    whole = parse(content, "whole")
    start = content.index(b"\xb0" + struct.pack("<Q", 0x401000 | 0x80 << 56))
    capture = parse(content[: start + left], "cut")
    complete = min(left // 64, 4)
    assert np.array_equal(capture.records[:complete], whole.records[:complete])
    # A record whose last packet ends before its padding is whole as well.
    assert len(capture.records) <= complete + 2
    assert not capture.complete
    assert "is cut" in texts(capture)


Damage = Callable[[bytes, int], bytes]
DAMAGES: dict[str, tuple[Damage, str]] = {
    "a size of 0": (lambda raw, at: changed(raw, at + 6, b"\0\0"), "cannot have 0 bytes"),
    "an unknown type": (lambda raw, at: changed(raw, at, b"\xee\xee\0\0"), "no record has type"),
    "a size beyond the end": (lambda raw, at: changed(raw, at + 6, b"\xff\xff"), "is cut after"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_stream_is_taken_up_again_behind_a_broken_record(damage: str) -> None:
    content = two_sessions()
    file = content.index(struct.pack("<IHH", Type.AUX, 0, 64))
    spoil, message = DAMAGES[damage]
    capture = parse(spoil(content, file), "broken")
    assert len(capture.aux) == 1
    assert len(capture.records) == 6
    assert message in texts(capture)
    assert "follow each other again" in texts(capture)
    assert capture.skipped_bytes == 64


def test_bad_packets_are_counted_and_their_neighbours_read() -> None:
    made = writer()
    add_session(made, load(0x400000, 900) + b"\x03" * 16 + load(0x400010, 1000))
    capture = file_of(made)
    assert capture.records["pc"].tolist() == [0x400000, 0x400010]
    assert not capture.complete
    assert not capture.skipped_bytes  # packets that are not known are no loss
    assert "SPE data" in texts(capture)


def test_no_time_without_a_clock() -> None:
    content = two_sessions()
    at = content.index(struct.pack("<IHH", Type.TIME_CONV, 0, 56))
    capture = parse(changed(content, at, struct.pack("<I", Type.STAT)), "no clock")
    assert capture.clock is None
    assert (capture.where["time_ns"] == -1).all()
    assert capture.records["timestamp"].tolist()[:2] == [1000, 1010]


REFUSED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a perf.data file"),
    "another file": (b"\x7fELF" + bytes(200), "not a perf.data file"),
    "big-endian": (b"2ELIFREP" + bytes(200), "big-endian"),
    "a wrong header": (b"PERFILE2" + struct.pack("<Q", 4711) + bytes(200), "4711 bytes"),
    "only a header": (b"PERFILE2" + struct.pack("<Q", 104) + bytes(88), "no SPE data"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_refused_with_the_reason(name: str, tmp_path: Path) -> None:
    content, message = REFUSED[name]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(CaptureError, match=message):
        read(tmp_path / "file")


def test_a_file_without_spe_is_refused() -> None:
    made = writer()
    with pytest.raises(CaptureError, match="no SPE data"):
        parse(made.content().replace(struct.pack("<IHHI", 70, 0, 32, 4), struct.pack("<IHHI", 70, 0, 32, 1)), "intel")


@pytest.mark.parametrize("path", ["missing", ".", "/dev/zero"])
def test_what_is_no_file_is_refused(path: str, tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"perf\.data"):
        read(tmp_path / path)


# -- compressed records ------------------------------------------------------------------------------------------------


def zstd(content: bytes) -> bytes:
    """Compress as perf does: flushed, and without an end of the frame."""
    import pyarrow

    raw = io.BytesIO()
    stream = pyarrow.CompressedOutputStream(pyarrow.PythonFile(raw, "wb"), "zstd")
    stream.write(content)
    stream.flush()
    return raw.getvalue()


def squeezed(content: bytes, version: int = 1, cut: int = 0) -> bytes:
    """Return *content* with the kernel's records compressed, as two records, of which the last lacks *cut* bytes."""
    file = open_container(memoryview(content), "whole")
    kernel, rest = b"", b""
    for record in file.records():
        raw = content[record.offset : record.offset + 8 + len(record.body)] + bytes(record.payload)
        if record.kind < 64:
            kernel += raw
        else:
            rest += raw
    packed = zstd(kernel)
    packed = packed[: len(packed) - cut]
    for piece in (packed[:41], packed[41:]):
        if version == 1:
            rest += struct.pack("<IHH", Type.COMPRESSED, 0, 8 + len(piece)) + piece
        else:
            padded = piece + bytes(-len(piece) % 8)
            rest += struct.pack("<IHHQ", Type.COMPRESSED2, 0, 16 + len(padded), len(piece)) + padded
    at, _ = stream_of(content)
    return content[:0x30] + struct.pack("<Q", len(rest)) + bytes(16) + bytes(32) + content[0x68:at] + rest


@pytest.mark.parametrize("version", [1, 2])
def test_compressed_records_are_read(version: int) -> None:
    plain, packed = parse(two_sessions(), "plain"), parse(squeezed(two_sessions(), version), "packed")
    assert packed.complete, packed.report()
    for name in ("records", "where", "aux", "comms", "maps"):
        assert np.array_equal(getattr(plain, name), getattr(packed, name)), name
    assert packed.record_counts["AUX"] == 2


@pytest.mark.parametrize("cut", [1, 5, 30])
def test_damage_to_compressed_records_is_told_and_costs_no_spe_data(cut: int) -> None:
    capture = parse(squeezed(two_sessions(), cut=cut), "cut")
    assert len(capture.records) == 6
    assert "compressed records" in texts(capture)


def test_compressed_records_cannot_claim_more_than_they_have() -> None:
    made = writer()
    made.add(Type.COMPRESSED2, struct.pack("<Q", 1000) + bytes(16))
    add_session(made, load(0x400000, 900))
    capture = file_of(made)
    assert len(capture.records) == 1
    assert "claims 1000 bytes" in texts(capture)


# -- the command -------------------------------------------------------------------------------------------------------


def test_the_command_reports_and_its_status_tells_damage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, cut, other = tmp_path / "whole", tmp_path / "cut", tmp_path / "other"
    whole.write_bytes(two_sessions())
    cut.write_bytes(two_sessions()[:700])
    other.write_text("text")
    assert main([str(whole)]) == 0
    assert "6 records" in capsys.readouterr().out
    assert main([str(whole), str(cut)]) == 1
    assert "is cut" in capsys.readouterr().out
    assert main([str(other), str(whole)]) == 2
    answer = capsys.readouterr()
    assert "not a perf.data file" in answer.err
    assert "6 records" in answer.out
    assert main([]) == 2
    assert main(["--help"]) == 0
