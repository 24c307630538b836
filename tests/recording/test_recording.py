"""Recordings: shipped files against the logs they came from, the reader against known operations and damaged input."""

from __future__ import annotations

import contextlib
import gzip
import io
import re
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spepolicy.recording
from spepolicy.errors import OutputError, RecordingError
from spepolicy.machine.hostops import HostOp, Notifier
from spepolicy.recording import DEFAULT, NO_NOTIFIER, Recording, load, open_recording, read_log, save, shipped
from spepolicy.recording.convert import main

ROOT = Path(__file__).resolve().parents[2]
REAL = ROOT.parent / "shared" / "data" / "kvm_real"
DATA = Path(spepolicy.recording.__file__).with_name("data")
ARRAYS = ("time_us", "first_page", "end_page", "op", "notifier", "write", "repointed")
needs_logs = pytest.mark.skipif(not REAL.is_dir(), reason="the recorded logs (shared/data/kvm_real) are not here")

LOGS = {
    "numa": "lin61_numa_4k.report.gz",
    "numa_pinned": "lin61_numa_4kpin.report.gz",
    "ksm": "lin61_ksm_4k.trace.gz",
    "ksm_pinned": "lin61_ksm_4kpin.report.gz",
    "swap": "lin61_swap_4kb.trace.gz",
    "compact": "lin61_compact_4k.report.gz",
    "migrate": "lin61_migrate_4k.report.gz",
    "fork": "lin61_fork_4k.report.gz",
    "dirty": "lin61_dirty_4k.report.gz",
}
# Counted in the logs with zgrep, not with the reader; where a mark ends the scenario before the log, up to that mark.
UNMAPS = {"numa": 8498, "numa_pinned": 2, "ksm": 34864, "ksm_pinned": 13321, "swap": 28417, "compact": 485}
UNMAPS |= {"migrate": 55692, "fork": 1133, "dirty": 0}
MAPS = {"numa": 22540, "numa_pinned": 26236, "ksm": 34864 - 34863, "ksm_pinned": 5804, "swap": 11206, "compact": 120}
MAPS |= {"migrate": 21374, "fork": 10330 - 1131, "dirty": 368}


def same(one: Recording, other: Recording) -> bool:
    """Whether two recordings hold the same, apart from the files they come from."""
    rest = [it.name for it in fields(Recording) if it.name not in (*ARRAYS, "source", "kernel")]
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ARRAYS) and all(
        getattr(one, name) == getattr(other, name) for name in rest
    )


# -- what is shipped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOGS)
def test_shipped_counts_are_those_of_the_logs(name: str) -> None:
    recording = open_recording(name)
    assert int(recording.unmaps.sum()) == UNMAPS[name]
    assert recording.evidence.get("s2_map", 0) == MAPS[name]
    assert sum(recording.evidence.values()) == len(recording)
    assert recording.ram_pages == 65536
    assert recording.source == LOGS[name]
    assert recording.kernel.startswith("Linux 6.1.0-56-arm64")
    assert recording.scenario == name.removesuffix("_pinned")
    assert not any(key.startswith("unmap: scenario") or "default_op" in key for key in recording.evidence)


def test_shipped_names_files_and_size() -> None:
    assert set(shipped()) == set(LOGS) == {path.stem for path in DATA.glob("*.npz")}
    assert DEFAULT in shipped()
    assert all(text and "\n" not in text for text in shipped().values())
    assert sum(path.stat().st_size for path in DATA.glob("*.npz")) < 1_500_000


@pytest.mark.parametrize("name", LOGS)
def test_the_page_on_the_shipped_data_is_right(name: str) -> None:
    row = next(line for line in (DATA / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |"))
    recording = open_recording(name)
    _, source, seconds, counts, repointed, size = [cell.strip() for cell in row.strip("|").split("|")]
    assert source == f"`{recording.source}`"
    assert float(seconds) == pytest.approx(recording.duration_us / 1e6, abs=0.05)
    assert counts == ", ".join(f"{op.name} {count}" for op, count in recording.counts().items())
    assert int(repointed) == int(recording.repointed.sum())
    assert int(size) == (DATA / f"{name}.npz").stat().st_size


def test_a_pin_does_not_keep_numa_scans_away() -> None:
    recording = open_recording("numa_pinned")
    unmaps = recording.unmaps
    ranges = zip(recording.first_page[unmaps].tolist(), recording.end_page[unmaps].tolist(), strict=True)
    assert list(ranges) == [(0, 0xF800), (0xF800, 0x10000)]
    assert set(recording.notifier[unmaps]) == {2}
    assert recording.counts() == {HostOp.CPU_TOUCH: 26236, HostOp.NUMA_SCAN: 2}


def test_numa_migrates_only_what_the_scan_has_unmapped() -> None:
    recording = open_recording("numa")
    mapped = np.ones(recording.ram_pages, bool)
    for first, end, op in zip(recording.first_page, recording.end_page, recording.op, strict=True):
        if op == HostOp.NUMA_MIGRATE:
            assert end - first == 1
            assert not mapped[first]
        mapped[first:end] = op == HostOp.CPU_TOUCH
    assert recording.counts()[HostOp.NUMA_MIGRATE] == 8496


def test_swap_counts_of_the_readme() -> None:
    recording = open_recording("swap")
    counts = recording.counts()
    assert counts[HostOp.RECLAIM] == 28417
    assert counts[HostOp.AGE] == 79832
    assert counts[HostOp.CPU_TOUCH] == 11206 + recording.evidence["s2_relax_perms"]
    assert not recording.write[recording.op != HostOp.CPU_TOUCH].any()


def test_ksm_points_pages_again_itself_unless_they_are_pinned() -> None:
    assert open_recording("ksm").repointed.sum() == 34862
    assert not open_recording("ksm_pinned").repointed.any()
    fork = open_recording("fork")
    assert fork.repointed.sum() == 1131 - 31  # where the level 3 table was gone, change_pte mapped nothing
    assert (fork.op[fork.repointed] == HostOp.FORK).all()


def test_dirty_logging_needs_no_notifier() -> None:
    recording = open_recording("dirty")
    assert not recording.unmaps.any()
    assert (recording.notifier == NO_NOTIFIER).all()
    first = np.flatnonzero(recording.op == HostOp.DIRTY_LOG)[0]
    assert (recording.first_page[first], recording.end_page[first]) == (0, 65536)


def test_arrays_are_read_only() -> None:
    recording = open_recording("compact")
    with pytest.raises(ValueError, match="read-only"):
        recording.op[0] = 3


LARGE = ("ksm", "swap", "migrate")  # half a million lines and more


@needs_logs
@pytest.mark.parametrize("name", [pytest.param(it, marks=pytest.mark.slow if it in LARGE else ()) for it in LOGS])
def test_shipped_is_what_the_reader_makes_of_the_log(name: str) -> None:
    log = REAL / "traces" / LOGS[name]
    recording = read_log(log)
    assert same(recording, open_recording(name))
    with gzip.open(log, "rb") as file:
        lines = sum(1 for _ in file)
    not_lines = sum(count for kind, count in recording.ignored.items() if kind.startswith("("))
    assert len(recording) + sum(recording.ignored.values()) - not_lines == lines  # nothing is skipped in silence


# -- operations that are known, as each was provoked on its own --------------------------------------------------------

KNOWN = {
    "mprotect_READ": HostOp.MPROTECT,
    "mprotect_READ_then_RW": HostOp.MPROTECT,
    "mprotect_NONE": HostOp.MPROTECT,
    "munmap_page": HostOp.MUNMAP,
    "mremap_move": HostOp.MUNMAP,
    "mmap_MAP_FIXED_over": HostOp.MUNMAP,
    "fork_child_exits": HostOp.FORK,
    "fork_child_alive_host_write": HostOp.FORK,
    "fork_then_pin": HostOp.FORK,
    "ksm_identical_pages": HostOp.KSM,
    "ksm_merge_then_pin": HostOp.KSM,
    "move_pages_other_node": HostOp.MOVE,
    "mbind_MOVE_other_node": HostOp.MOVE,
    "madvise_SOFT_OFFLINE": HostOp.MOVE,
    "numa_balancing_scan": HostOp.NUMA_SCAN,
    "clear_refs_4_softdirty": HostOp.SOFT_DIRTY,
    "madvise_COLLAPSE": HostOp.THP,
    "compact_memory": HostOp.COMPACT,
    "memcg_memory_reclaim": HostOp.RECLAIM,
    "madvise_PAGEOUT_region_twice": HostOp.RECLAIM,
    "kvm_dirty_log_write_get": HostOp.DIRTY_LOG,
    "madvise_DONTNEED": None,
    "madvise_FREE": None,
    "madvise_REMOVE": None,
    "fallocate_PUNCH_HOLE": None,
    "ftruncate_0_and_back": None,
    "split_huge_pages_debugfs": None,
    "kvm_memslot_delete_readd": None,
}
# A fork that splits a pinned huge page to copy it: the trace shows a CLEAR that could as well be MADV_DONTNEED.
OPEN = {("fork_child_exits", "P", "H"), ("fork_child_exits", "B", "H")}


@pytest.fixture(scope="module")
def cells() -> dict[tuple[str, str, str], str]:
    """The lines of each experiment's operation, by (operation, mode of pinning, backing)."""
    if not REAL.is_dir():
        pytest.skip("the recorded logs (shared/data/kvm_real) are not here")
    found: dict[tuple[str, str, str], list[str]] = {}
    for name in ("pt61_anon4k", "pt61_thp_shmem"):
        with gzip.open(REAL / "pin_table" / f"{name}.trace.gz", "rt", errors="replace") as log:
            lines: list[str] = []
            for line in log:
                if " tracing_mark_write: " in line:
                    head = re.search(r"CELL op=(\S+) mode=(\w) backing=(\w)", line)
                    if head:
                        cell = (head[1], head[2], head[3])
                    lines = found.setdefault(cell, []) if "PHASE op" in line else []
                lines.append(line)
    return {cell: "".join(lines) for cell, lines in found.items()}


@pytest.mark.parametrize("operation", KNOWN)
def test_operations_are_recognised(operation: str, cells: dict[tuple[str, str, str], str], tmp_path: Path) -> None:
    log, seen = tmp_path / "trace", 0
    for cell, text in cells.items():
        if cell[0] != operation or not re.search(r"gfn: .* start=0x40[01]..\b|addr=0x40[01]..000\b", text):
            continue
        log.write_text(text)
        if KNOWN[operation] is None or cell in OPEN:
            with pytest.raises(RecordingError, match="no known reason"):
                read_log(log, ram_pages=512)
            log.write_text(f" bash-1 [000] 1.000000: print: SCENARIO dontneed start\n{text}")
            if operation != "kvm_memslot_delete_readd":  # no notifier at all: that is nobody's madvise
                named = read_log(log, ram_pages=512)
                assert HostOp.DONTNEED in named.counts()
            wanted: HostOp | None = HostOp.DONTNEED
            recording = read_log(log, ram_pages=512, default_op=HostOp.DONTNEED)
        else:
            wanted = KNOWN[operation]
            recording = read_log(log, ram_pages=512)
        others = {HostOp.AGE, HostOp.CPU_TOUCH, HostOp.FORK} if cell in OPEN else {HostOp.AGE, HostOp.CPU_TOUCH}
        assert set(recording.counts()) - others <= {wanted}, cell
        seen += wanted in recording.counts()
    assert seen


@needs_logs
def test_copy_on_write_is_seen_without_change_pte(tmp_path: Path) -> None:
    """Linux 6.10 dropped change_pte: the same log without it must give the same operations."""
    kept, inside = [], False
    with gzip.open(REAL / "traces" / LOGS["fork"], "rt") as log:
        for line in log:
            if "set_spte" in line or "change_pte" in line:
                inside = inside or "set_spte_gfn" in line
            elif inside and " s2_map:" in line:
                inside = False
            else:
                kept.append(line)
    path = tmp_path / "trace"
    path.write_text("".join(kept))
    recording, shipped_one = read_log(path), open_recording("fork")
    assert np.array_equal(recording.op, shipped_one.op)
    assert recording.evidence["unmap: copy-on-write, write fault"] == 1131
    assert not recording.repointed.any()


# -- hand-made logs ----------------------------------------------------------------------------------------------------

FTRACE = """\
# tracer: function
#
# entries-in-buffer/entries-written: 20/23   #P:2
#           TASK-PID     CPU#  |||||  TIMESTAMP  FUNCTION
            lvmm-252     [001] .....   217.000000: kvm_exit: IRQ: HSR_EC: 0x0000 (UNKNOWN), PC: 0xffffb10e92a3914c
            bash-135     [000] .....   217.100000: tracing_mark_write: SCENARIO ksm start
            ksmd-36      [001] d....   217.100100: mn_inv_start: (f+0x0) start=0xff0000 end=0xff1000 flags=0x1 event=1
            ksmd-36      [001] .....   217.100150: kvm_unmap_hva_range: mmu notifier unmap range: 0x00ffff -- 0x00fffff
            ksmd-36      [001] d....   217.100200: unmap_gfn: (kvm_unmap_gfn_range+0x0/0x50) start=0x40003 end=0x40004
            ksmd-36      [001] .....   217.100210: kvm_unmap_gfn_range <-kvm_mmu_notifier_invalidate_range_start
            ksmd-36      [001] d....   217.100220: s2_unmap: (f+0x0/0x70) addr=0x40003000 size=0x1000
            ksmd-36      [001] d....   217.100300: set_spte_gfn: (f+0x0/0xb0) start=0x40003 end=0x40004 pte=0xe8
            ksmd-36      [001] d....   217.100310: s2_map: (f+0x0/0x1) addr=0x40003000 size=0x1000 phys=0x4b4e prot=0x4
     CPU 0/KVM-252 (  250) [000] d....   217.200000: s2_relax_perms: (f+0x0/0x70) addr=0x40003000 prot=0x6
     CPU 0/KVM-252 (  250) [000] d....   217.300000: s2_map: (f+0x0/0x1) addr=0x40010000 size=0x2000 phys=0x4 prot=0x4
     CPU 0/KVM-252 (  250) [000] d....   217.310000: s2_map: (f+0x0/0x1) addr=0x9000000 size=0x1000 phys=0x9 prot=0xe
         kswapd0-60      [000] d....   217.400000: age_gfn: (kvm_age_gfn+0x0/0x80) start=0x40010 end=0x40011
         kswapd0-60      [000] d....   217.400010: s2_mkold: (kvm_pgtable_stage2_mkold+0x0/0xa0) addr=0x40010000
     CPU 0/KVM-252 (  250) [000] d....   217.410000: s2_mkyoung: (kvm_pgtable_stage2_mkyoung+0x0/0xa0) addr=0x40010000
            lvmm-249     [000] d....   217.500000: s2_wrprotect: (f+0x0/0x1) addr=0x40000000 size=0x10000
            bash-135     [000] .....   217.600000: tracing_mark_write: SCENARIO ksm end
            lvmm-249     [000] d....   217.700000: s2_wrprotect: (f+0x0/0x1) addr=0x40000000 size=0x10000
"""
WANTED = [  # time, first, end, op, notifier, write, repointed
    (200, 3, 4, HostOp.KSM, 1, False, True),
    (100_000, 3, 4, HostOp.CPU_TOUCH, NO_NOTIFIER, True, False),
    (200_000, 16, 18, HostOp.CPU_TOUCH, NO_NOTIFIER, False, False),
    (300_000, 16, 17, HostOp.AGE, NO_NOTIFIER, False, False),
    (310_000, 16, 17, HostOp.CPU_TOUCH, NO_NOTIFIER, False, False),
    (400_000, 0, 16, HostOp.DIRTY_LOG, NO_NOTIFIER, False, False),
]


def as_perf(text: str) -> str:
    """The same lines as `perf script` prints them: the event's group in front, no function tracer, no marks."""
    lines = []
    for line in text.splitlines():
        found = re.match(r"\s*(.+?)-(\d+)\s+(?:\(\s*\d+\)\s+)?(\[\d+\])\s\S+\s+(\d+\.\d+):\s+(\w+): ?(.*)", line)
        if found and found[5] != "tracing_mark_write":
            group = "kvm" if found[5].startswith("kvm_") else "kp"
            lines.append(
                f"{found[1]:>16}  {found[2]:>5} {found[3]} {found[4]:>12}: {group + ':' + found[5]:>28}: {found[6]}"
            )
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("threads", [False, True])
def test_perf_script_says_the_same(tmp_path: Path, threads: bool) -> None:
    """All but the marks; whether perf printed a thread's number alone or behind that of its process."""
    lines = FTRACE.splitlines(keepends=True)
    inside = "".join(
        line for line in lines if 217.1 <= float((re.search(r" (\d+\.\d+):", line) or ["", "0"])[1]) < 217.6
    )
    text = as_perf(inside)
    if threads:
        text = re.sub(r"  +(\d+) \[", r"  99/\1 [", text)
    (tmp_path / "ftrace").write_text(re.sub(r".*tracing_mark_write.*\n", "", inside))
    (tmp_path / "perf").write_text("# captured on: today\n" + text)
    one, other = read_log(tmp_path / "ftrace"), read_log(tmp_path / "perf")
    assert len(one) == len(WANTED)
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
    assert other.ignored.pop("comment") == 1
    one.ignored.pop("function")
    assert one.ignored == other.ignored


def test_lost_and_cut_lines_of_perf_are_told(tmp_path: Path) -> None:
    good = as_perf(FTRACE)
    (tmp_path / "lost").write_text(good + "   perf  5 [001] 217.9: PERF_RECORD_LOST lost 7\n")
    assert read_log(tmp_path / "lost").ignored["(events lost by the trace buffer)"] == 7
    cut = good.replace("addr=0x40010000 size=0x2000", "addr=0x4001", 1)
    line = next(n for n, text in enumerate(cut.splitlines(), 1) if text.endswith("0x4 prot=0x4") and "size" not in text)
    (tmp_path / "cut").write_text(cut)
    with pytest.raises(RecordingError, match=f"cut:{line}: malformed s2_map"):
        read_log(tmp_path / "cut")
    (tmp_path / "stamp").write_text("   ksmd  36  kp:unmap_gfn: (f+0x0) start=0x40003 end=0x40004\n")
    with pytest.raises(RecordingError, match="stamp:1: no time stamp or task"):
        read_log(tmp_path / "stamp")


def as_report(text: str) -> str:
    """The same lines as `trace-cmd report` prints them."""
    text = re.sub(r"\[(\d+)\] [.d]{5}", r"[\1]", re.sub(r"^#.*\n", "", text, flags=re.M))
    text = re.sub(r"(\d: )(\w+) <-(\w+)", r"\1function:              \2 <-- \3", text)
    text = re.sub(r"(\d: )(\w+:) ", r"\1\2             ", text)
    text = text.replace("tracing_mark_write:     ", "print:                tracing_mark_write:")
    return "cpus=2\n" + re.sub(r"tracing_mark_write: +", "tracing_mark_write: ", text)


def rows(recording: Recording) -> list[tuple[Any, ...]]:
    """The events of a recording as tuples, in the order of its arrays."""
    return list(zip(*(getattr(recording, name).tolist() for name in ARRAYS), strict=True))


@pytest.mark.parametrize("form", ["ftrace", "report", "ftrace.gz"])
def test_both_forms_of_text(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"log.{form}"
    text = as_report(FTRACE) if form == "report" else FTRACE
    path.write_bytes(gzip.compress(text.encode()) if form.endswith("gz") else text.encode())
    recording = read_log(path, kernel="Linux x")
    assert rows(recording) == WANTED
    assert (recording.scenario, recording.duration_us, recording.kernel) == ("ksm", 500_000, "Linux x")
    assert recording.ignored["s2_map outside guest RAM"] == 1
    assert recording.ignored["s2_wrprotect after the scenario"] == 1
    assert recording.ignored["function"] == 1
    assert recording.ignored.get("(events lost by the trace buffer)", 0) == (0 if form == "report" else 3)
    assert open_recording(path).counts() == recording.counts()


def test_ram_can_be_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(FTRACE)
    recording = read_log(path, ram_base_gfn=0x40008, ram_pages=9)
    assert rows(recording) == [
        (200_000, 8, 9, HostOp.CPU_TOUCH, NO_NOTIFIER, False, False),  # clipped at the end of RAM
        (300_000, 8, 9, HostOp.AGE, NO_NOTIFIER, False, False),
        (310_000, 8, 9, HostOp.CPU_TOUCH, NO_NOTIFIER, False, False),
        (400_000, 0, 8, HostOp.DIRTY_LOG, NO_NOTIFIER, False, False),
    ]


def line(seconds: float, event: str, task: str = "qemu-7") -> str:
    return f"{task:>20}   [000]   {seconds:.6f}: {event}\n"


UNMAP = line(1.5, "mn_inv_start: (x) start=0x7000 end=0x8000 flags=0x1 event=1") + line(
    1.6, "unmap_gfn: (x) start=0x40001 end=0x40002"
)


def test_an_unmap_without_a_reason_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(UNMAP)
    with pytest.raises(
        RecordingError, match=r"log:2: 1 unmaps .* 'qemu' after notifier event 1, is of page 1\..*default_op"
    ):
        read_log(path)
    assert read_log(path, default_op=HostOp.DONTNEED).counts() == {HostOp.DONTNEED: 1}
    with pytest.raises(RecordingError, match="AGE does not unmap anything"):
        read_log(path, default_op=HostOp.AGE)


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        (
            "",
            line(1.7, "mm_migrate_pages: nr_succeeded=1 mode=MIGRATE_ASYNC reason=numa_misplaced"),
            HostOp.NUMA_MIGRATE,
        ),
        ("", line(1.7, "mm_migrate_pages: nr_succeeded=1 mode=MIGRATE_SYNC reason=demotion"), HostOp.RECLAIM),
        ("", line(1.7, "mm_collapse_huge_page: mm=1, isolated=1, status=succeeded"), HostOp.THP),
        (line(1.1, "mm_vmscan_direct_reclaim_begin: order=0"), "", HostOp.RECLAIM),
        (line(1.1, "age_gfn: (x) start=0x40001 end=0x40002"), "", HostOp.RECLAIM),
        (line(1.1, "print: SCENARIO balloon start") + line(1.2, "print: SCENARIO munmap start"), "", None),
        (line(1.1, "print: SCENARIO dontneed start"), "", HostOp.DONTNEED),
        # another task's migration, and one after the task has been in the guest, say nothing about this unmap
        ("", line(1.7, "mm_migrate_pages: reason=syscall_or_cpuset", "bash-8"), None),
        ("", line(1.7, "kvm_entry: PC: 0x0") + line(1.8, "mm_migrate_pages: reason=numa_misplaced"), None),
        (line(1.1, "mm_compaction_begin: x") + line(1.2, "mm_compaction_end: x"), "", None),
    ],
)
def test_the_reason_is_next_to_the_unmap(before: str, after: str, wanted: HostOp | None, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(before + UNMAP + after)
    if wanted is None:
        with pytest.raises(RecordingError, match="no known reason"):
            read_log(path)
    else:
        recording = read_log(path)
        assert recording.op[recording.unmaps].tolist() == [wanted]
        assert recording.notifier[recording.unmaps].tolist() == [1]


def test_a_numa_scan_of_one_large_range_after_the_other(tmp_path: Path) -> None:
    """A guest larger than a scan's 256 MiB: each piece is one range and goes on where the last one stopped."""
    huge, text = 2 << 20, ""
    for i in range(3):
        start = 0x7F0000000000 + i * 128 * huge
        text += line(i + 1, f"mn_inv_start: (x) start={start:#x} end={start + 128 * huge:#x} flags=0x1 event=2")
        text += line(i + 1.1, f"unmap_gfn: (x) start={0x40000 + i * 0x10000:#x} end={0x50000 + i * 0x10000:#x}")
        text += line(i + 1.2, "kvm_entry: PC: 0x0")
    path = tmp_path / "log"
    path.write_text(text)
    assert read_log(path, ram_pages=1 << 20).counts() == {HostOp.NUMA_SCAN: 3}
    path.write_text("".join(text.splitlines(keepends=True)[:3]))  # one alone could be an mprotect of all RAM
    with pytest.raises(RecordingError, match="no known reason"):
        read_log(path, ram_pages=1 << 20)


EVENTS = st.lists(
    st.tuples(
        st.integers(0, 2**33),
        st.integers(0, 65535),
        st.integers(1, 600),
        st.sampled_from(["s2_map r", "s2_map w", "age", "wrprotect", "unmap"]),
    ),
    max_size=40,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
@given(events=EVENTS, name=st.sampled_from(["swap", "migrate", "ksm", "thp", "mprotect"]), report=st.booleans())
def test_any_log_comes_back(events: list[tuple[int, int, int, str]], name: str, report: bool, tmp_path: Path) -> None:
    """Write events as a log, read it, save it, load it: what comes out is what went in."""
    ops = {"swap": HostOp.RECLAIM, "migrate": HostOp.MOVE, "ksm": HostOp.KSM, "thp": HostOp.THP}
    unmap = ops.get(name, HostOp.MPROTECT)
    text, wanted, now = f" sh-1 [000] ..... 5.000000: tracing_mark_write: SCENARIO {name} start\n", [], 0
    for gap, first, pages, kind in events:
        now += gap
        end = min(first + pages, 65536)
        at = f" vm-{7 + first % 3} [001] d.... {5 + now // 10**6}.{now % 10**6:06}: "
        addr, size = f"addr={(0x40000 + first) << 12:#x}", f"size={(end - first) << 12:#x}"
        frames = f"start={0x40000 + first:#x} end={0x40000 + end:#x}"
        if kind == "age":
            text += f"{at}age_gfn: (x) {frames}\n"
            wanted.append((now, first, end, HostOp.AGE, NO_NOTIFIER, False, False))
        elif kind == "wrprotect":
            text += f"{at}s2_wrprotect: (x) {addr} {size}\n"
            wanted.append((now, first, end, HostOp.DIRTY_LOG, NO_NOTIFIER, False, False))
        elif kind == "unmap":
            text += f"{at}s2_is_young: (x) {addr}\n{at}unmap_gfn: (x) {frames}\n{at}s2_unmap: (x) {addr} {size}\n"
            text += f"{at}kvm_entry: PC: 0x0\n"
            wanted.append((now, first, end, unmap, NO_NOTIFIER, False, False))
        else:
            text += f"{at}s2_map: (x) {addr} {size} phys=0x1000 prot={'0x6' if kind.endswith('w') else '0x5'}\n"
            wanted.append((now, first, end, HostOp.CPU_TOUCH, NO_NOTIFIER, kind.endswith("w"), False))
    aged: set[tuple[int, int, int]] = (
        set()
    )  # an unmap of what the task aged last is reclaim, whatever the scenario is called
    for i, (_, first, end, op, *_rest) in enumerate(wanted):
        task = first % 3
        if op == HostOp.AGE:
            aged = {it for it in aged if it[0] != task} | {(task, first, end)}
        elif op == unmap and (task, first, end) in aged:
            wanted[i] = (*wanted[i][:3], HostOp.RECLAIM, *wanted[i][4:])
    log = tmp_path / "log"
    log.write_text(as_report(text) if report else text)
    recording = read_log(log)
    assert rows(recording) == wanted
    save(recording, tmp_path / "out.npz")
    assert same(load(tmp_path / "out.npz"), recording)


# -- damaged and foreign files -----------------------------------------------------------------------------------------

GOOD = line(1, "s2_map: (x) addr=0x40000000 size=0x1000 phys=0x1000 prot=0x6")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"log: the file is empty"),
        (gzip.compress(b"", mtime=0), r"log: the file is empty"),
        (b"\x17\x08\x44tracing6\0", r"log: not text.*trace-cmd report"),
        (b"PERFILE2" + bytes(100), r"log: not text.*perf\.data"),
        (b"abc\0def", r"log:1: not text: .*NUL"),
        (b"hello\nworld\n", r"log:1: not a kernel trace; it begins 'hello'"),
        (line(1, "sched_switch: prev_comm=a").encode(), r"log: no event of KVM in it, only sched_switch"),
        (
            line(1, "kvm_unmap_hva_range: mmu notifier unmap range: 0x1 -- 0x2").encode(),
            r"log: 1 kvm_unmap_hva_range events",
        ),
        (
            (GOOD + line(2, "unmap_gfn: (x) start=0x4")).encode(),
            r"log:2: malformed unmap_gfn.*start=0x\.\.\. end=0x\.\.\.",
        ),
        (
            (GOOD + line(2, "unmap_gfn: (x) start=0x40009 end=0x4")).encode(),
            r"log:2: malformed unmap_gfn: the range.*empty",
        ),
        ((GOOD + line(2, "age_gfn: (x) start=(fault) end=0x1")).encode(), r"log:2: malformed age_gfn"),
        (line(2, "mn_inv_start: (x) start=0x1 end=0x2 event=99").encode(), r"log:1: malformed mn_inv_start: event=99"),
        (line(2, "kvm_guest_fault: ipa").encode(), r"log:1: malformed kvm_guest_fault"),
        ((line(9, "kvm_exit: x") + GOOD).encode(), r"log:2: time goes back by 8\.0"),
        (b" qemu-7 [000] 123456789: unmap_gfn: (x) start=0x40000 end=0x40001\n", r"log:1: no time stamp"),
        (gzip.compress(GOOD.encode() * 999, mtime=0)[:-30], r"log:\d+: the gzip stream is damaged.*gzip -dc"),
        (gzip.compress(GOOD.encode() * 999, mtime=0)[:40] + b"x" * 60, r"log:1: the gzip stream is damaged"),
        (
            (
                line(1, "unmap_gfn: (x) start=0x4000 end=0x4001")
                + line(2, "s2_unmap: (x) addr=0x40000000 size=0x10000")
            ).encode(),
            r"log:2: unmap_gfn counts pages of 65536 bytes",
        ),
        (
            line(1, "s2_map: (x) addr=0x80000000 size=0x1000 prot=0x6").encode(),
            r"log: no event .* between 0x80000 and 0x80001: give ram_base_gfn",
        ),
    ],
)
def test_damaged_logs(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=f"(?s)^{re.escape(str(tmp_path))}.{message}"):
        read_log(path)


def test_small_steps_back_in_time_are_held(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(line(1.05, "kvm_exit: x") + GOOD)
    recording = read_log(path)
    assert recording.time_us.tolist() == [0]
    assert recording.ignored["(time stamps raised to that of the line before)"] == 1


def test_a_missing_file(tmp_path: Path) -> None:
    for name in ("log", "log.npz", "log.trace.gz"):
        with pytest.raises(RecordingError, match="No such file"):
            open_recording(tmp_path / name)


def test_an_idle_host_is_a_recording(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(line(1, "kvm_exit: x") + line(3, "kvm_entry: x"))
    recording = read_log(path)
    assert (len(recording), recording.duration_us) == (0, 2_000_000)
    save(recording, tmp_path / "idle.npz")
    assert same(load(tmp_path / "idle.npz"), recording)


def contents(**changes: Any) -> dict[str, Any]:
    with np.load(DATA / "compact.npz") as file:
        found = {name: file[name] for name in file.files} | changes
    return {name: array for name, array in found.items() if array is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": None}, "no array op"),
        ({"meta": None}, "no readable 'meta'"),
        ({"meta": np.frombuffer(b"{}", np.uint8)}, "no readable 'meta'"),
        ({"meta": np.frombuffer(b'{"format": "other", "version": 1}', np.uint8)}, "format 'other'"),
        ({"meta": np.frombuffer(b'{"format": "spepolicy host recording", "version": 7}', np.uint8)}, "version 7"),
        (
            {"meta": np.frombuffer(b'{"format": "spepolicy host recording", "version": 1}', np.uint8)},
            "'ram_pages' in meta",
        ),
        ({"op": np.zeros(605, np.uint8)}, "op holds 0.*expected a HostOp"),
        ({"op": np.full(605, 38, np.uint8)}, "op holds 38"),
        ({"op": np.ones(605, np.int64)}, "array op is int64"),
        ({"op": np.ones(604, np.uint8)}, r"array time_step is .*shape \[604\]"),
        ({"notifier": np.full(605, 8, np.uint8)}, "notifier holds 8"),
        ({"flags": np.full(605, 4, np.uint8)}, "flags holds values above 3"),
        ({"flags": np.full(605, 1, np.uint8)}, "write holds True"),
        ({"pages": np.zeros(605, np.uint8)}, "end_page holds"),
        ({"pages": np.full(605, 65535, np.uint16)}, "end_page holds"),
        ({"pages": np.full(605, 0.5)}, "array pages is float64"),
        ({"first_step": np.full(605, -1, np.int8)}, "pages outside"),
        ({"time_step": np.full(605, 2**32 - 1, np.uint32)}, "time_us holds"),
    ],
)
def test_damaged_compact_files(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez_compressed(path, **contents(**changes))
    with pytest.raises(RecordingError, match=f"a.npz: .*{message}"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04 no zip", "half", "npy", "pickle"])
def test_files_that_are_no_compact_recording(content: bytes | str, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    if content == "half":
        path.write_bytes((DATA / "compact.npz").read_bytes()[:2000])
    elif content in ("npy", "pickle"):
        with path.open("wb") as file:
            np.save(file, np.array([None if content == "pickle" else 1]), allow_pickle=True)
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"a\.npz: .*Expected a recording of format version 1"):
        load(path)


def _npy(header: str) -> bytes:
    text = header.encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text


def _archive(member: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("op.npy", member)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        _archive(_npy("{'descr': '<i8', 'fortran_order': False, 'shape': ((")),
        _archive(_npy("{'descr': '<i8', 'fortran_order': False, 'shape': (1 2)}")),
        _archive(_npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({1 << 80},)}}")),
        _archive(_npy(f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({1 << 50},)}}")),
        _archive(b"no array at all"),
        _archive(b"").replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
    ],
    ids=["tokens", "syntax", "overflow", "memory", "bytes", "encrypted"],
)
def test_archives_that_were_made_to_break_the_reader(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    with pytest.raises(RecordingError, match=r"a\.npz: .*Expected a recording of format version 1"):
        load(path)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    good = (DATA / "compact.npz").read_bytes()
    path, right, harmless = tmp_path / "a.npz", open_recording("compact"), 0
    for at in range(100, len(good), 97):
        path.write_bytes(good[:at] + bytes([good[at] ^ 0x10]) + good[at + 1 :])
        with contextlib.suppress(RecordingError):  # or the bit meant nothing, as in a zip entry's time stamp
            assert same(load(path), right)
            harmless += 1
    assert harmless < 5


def test_recordings_check_themselves() -> None:
    good = open_recording("compact")
    wrong: dict[str, Any] = {
        "time_us": good.time_us[::-1].copy(),
        "first_page": good.first_page.astype(np.int64),
        "end_page": good.first_page,
        "op": good.op[:-1],
        "ram_pages": 0,
        "duration_us": 1,
        "repointed": np.ones(len(good), np.bool_),
    }
    for name, value in wrong.items():
        with pytest.raises(RecordingError, match="lin61_compact_4k"):
            replace(good, **{name: value})


# -- opening and converting --------------------------------------------------------------------------------------------


def test_unknown_names_get_the_nearest() -> None:
    with pytest.raises(
        RecordingError, match=r"'numa_pined' is not shipped.*Did you mean 'numa_pinned'.*Shipped: numa, "
    ):
        open_recording("numa_pined")
    with pytest.raises(RecordingError, match="Otherwise give the path") as caught:
        open_recording("zzz")
    assert "Did you mean" not in str(caught.value)


@pytest.fixture
def log(tmp_path: Path) -> Path:
    path = tmp_path / "host.trace"
    path.write_text(FTRACE)
    return path


def test_convert(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = log.with_name("host.npz")
    assert main([str(log), str(out), "--ram-pages", "0x10000", "--kernel", "Linux 6.1"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"scenario 'ksm', 6 events in 0\.5 s", printed)
    assert re.search(r"1 from unmap: task KSM", printed)
    assert rows(open_recording(out)) == WANTED
    assert open_recording(out).kernel == "Linux 6.1"
    again = log.with_name("again.npz")
    assert main([str(log), str(again), "--kernel", "Linux 6.1"]) == 0
    assert again.read_bytes() == out.read_bytes()
    assert sorted(it.name for it in log.parent.iterdir()) == ["again.npz", "host.npz", "host.trace"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["LOG", "out.txt"], "out.txt: a compact recording must end in .npz"),
        (["LOG", "missing/out.npz"], "missing/out.npz: cannot be written: No such file"),
        (["gone", "out.npz"], "gone: cannot be read: No such file"),
        (["LOG", "out.npz", "--ram-pages", "0"], "guest RAM of 0 pages"),
    ],
)
def test_convert_errors(
    arguments: list[str], message: str, log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(log.parent)
    assert main([log.name if it == "LOG" else it for it in arguments]) == 2
    assert message in capsys.readouterr().err
    assert [it.name for it in log.parent.iterdir()] == [log.name]


def test_convert_refuses_what_is_no_operation(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([str(log), "out.npz", "--default-op", "age"])
    assert caught.value.code == 2
    assert "dontneed" in capsys.readouterr().err


def test_save_wants_npz(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"must end in \.npz"):
        save(open_recording("compact"), tmp_path / "a")


def test_numbers_are_fixed() -> None:
    assert ",".join(op.name for op in HostOp) == (
        "NONE,CPU_TOUCH,RECLAIM,AGE,KSM,NUMA_SCAN,NUMA_MIGRATE,MOVE,COMPACT,FORK,DONTNEED,MUNMAP,MPROTECT,THP,"
        "DIRTY_LOG,SOFT_DIRTY,FREE,PAGEOUT,PAGEOUT_PART,COLD,MPROTECT_READ,MPROTECT_NONE,MREMAP,MAP_FIXED,FORK_EXIT,"
        "FORK_EXCLUDED,MBIND,SOFT_OFFLINE,THP_SPLIT,REMOVE,PUNCH_HOLE,TRUNCATE,MEMSLOT_DELETE,MEMSLOT_READ_ONLY,"
        "RECLAIM_LAZY,LRU_GEN,CLEAR_REFS,DIRECT_READ"
    )
    assert [op.value for op in HostOp] == list(range(38))
    assert {it.name: int(it).bit_length() - 1 for it in Notifier} == {
        "UNMAP": 0,
        "CLEAR": 1,
        "PROTECTION_VMA": 2,
        "PROTECTION_PAGE": 3,
        "SOFT_DIRTY": 4,
        "RELEASE": 5,
        "MIGRATE": 6,
        "EXCLUSIVE": 7,
        "ZAP": 8,
        "RMAP": 9,
        "MERGE": 10,
        "SPLIT": 11,
        "COPY": 12,
        "HINT": 13,
    }
