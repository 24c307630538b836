"""The workload recorder: programs whose counts are known to the instruction, and what becomes of counts."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from spepolicy.errors import RecordingError
from spepolicy.workload import build_workload
from spepolicy.workload_recorder.raw import ACCESS, COLUMNS, Raw, read_raw
from spepolicy.workload_recorder.reduce import describe_run, regions_of
from spepolicy.workload_recorder.run import record, why_not
from spepolicy.workload_recorder.shipped import SHIPPED
from tests.workload.aarch64_program import BSS, BSS_TO_X1, EXIT, b_ne, mov_x0, write_program

LATENCIES = yaml.safe_load(
    (Path(__file__).resolve().parents[2] / "conf" / "workload" / "latencies" / "neoverse.yaml").read_text()
)
_REASON = why_not()
needs_emulator = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))


def sums(raw: Raw) -> dict[str, int]:
    return dict(zip(COLUMNS, raw.count.sum(axis=0).tolist(), strict=True))


@needs_emulator
def test_every_instruction_of_a_loop_is_counted_as_what_it_is(tmp_path: Path) -> None:
    loop = [0xF94003E2, 0x91000442, 0xF90003E2, 0xF1000400, b_ne(4)]  # ldr; add; str; subs; b.ne
    atomic = 0xF82203E3  # ldadd x2, x3, [sp]
    program = write_program(tmp_path / "loop", [mov_x0(1000), *loop, atomic, *EXIT])
    raw = record([str(program)])
    count = sums(raw)
    assert count["instructions"] == raw.instructions.sum() == 1 + 5 * 1000 + 1 + 3
    assert [count[name] for name in ("load", "store", "atomic", "branch")] == [1000, 1000, 1, 1000]
    assert count["taken"] == 999
    assert count["mispredict"] <= 3  # until it is learnt, and at the end
    assert count["l2"] + count["llc"] + count["dram"] + count["store_miss"] <= 1
    assert raw.syscalls.sum() == 1


@needs_emulator
def test_levels_walks_and_waits(tmp_path: Path) -> None:
    """A page a load: each is a miss of TLB and caches. What comes from memory is zero, so adding it to the address
    keeps the address and makes each load wait for the one before.
    """
    step = 0x91400421  # add x1, x1, #4096
    independent = [0xF9400022, step, 0xF1000400, b_ne(3)]  # ldr x2, [x1]; add; subs; b.ne
    dependent = [0xF9400022, 0x8B020021, step, 0xF1000400, b_ne(4)]  # ldr x2, [x1]; add x1, x1, x2; ...
    counts = {}
    for name, loop in (("independent", independent), ("dependent", dependent)):
        program = write_program(tmp_path / name, [mov_x0(3000), BSS_TO_X1, *loop, *EXIT])
        counts[name] = sums(record([str(program)]))
        assert counts[name]["dram"] == pytest.approx(3000, abs=5)
        assert counts[name]["walk"] == pytest.approx(3000, abs=5)
    assert counts["dependent"]["waits_dram"] == pytest.approx(3000, abs=5)
    assert counts["independent"]["waits_dram"] == 0
    # 4 instructions a miss, 128 under way: one in 32 finds none under way.
    assert counts["independent"]["leads_dram"] == pytest.approx(3000 / 32, rel=0.1)


@needs_emulator
def test_a_stream_is_prefetched(tmp_path: Path) -> None:
    loop = [0xF8408422, 0xF1000400, b_ne(2)]  # ldr x2, [x1], #8; subs; b.ne
    program = write_program(tmp_path / "stream", [mov_x0(65535), BSS_TO_X1, *loop, *EXIT])
    count = sums(record([str(program)]))
    lines = 65535 // 8
    assert count["dram"] < lines / 10
    assert count["load"] == 65535


@needs_emulator
def test_addresses_are_those_of_the_program(tmp_path: Path) -> None:
    """A loop loads every eighth word of a part of its memory, and stores to one place of its stack."""
    loop = [0xF8440422, 0xF90003E2, 0xF1000400, b_ne(3)]  # ldr x2, [x1], #64; str x2, [sp]; subs; b.ne
    program = write_program(tmp_path / "loop", [mov_x0(60000), BSS_TO_X1, *loop, *EXIT])
    raw = record([str(program)])
    loads, stores = (raw.accesses[raw.accesses["load"] == kind] for kind in (True, False))
    assert len(loads) == pytest.approx(60000 / 128, rel=0.25)
    assert len(stores) == pytest.approx(60000 / 128, rel=0.25)
    assert ((loads["address"] >= BSS) & (loads["address"] < BSS + 60000 * 64)).all()
    assert (loads["address"] % 64 == 0).all()
    assert loads["address"].mean() - BSS == pytest.approx(60000 * 64 / 2, rel=0.1)
    assert len(np.unique(stores["address"])) == 1
    assert stores["by_stack_pointer"].all()
    assert not loads["by_stack_pointer"].any()
    begin, size = regions_of(raw)["[stack]"]
    assert begin <= stores["address"][0] < begin + size
    data = describe_run(raw, LATENCIES, "test")["data"]
    assert "[stack]" in data["regions"]
    (kinds,) = data["functions"].values()
    assert kinds["store"] == f"{int(stores['address'][0]):#x}+8/8 1"
    assert all(text.startswith("0x8") for text in kinds["load"].split(", "))


@needs_emulator
def test_intervals_skip_and_limit(tmp_path: Path) -> None:
    loop = [0xF94003E2, 0xF1000400, b_ne(2)]
    program = write_program(tmp_path / "loop", [mov_x0(60000), *loop, *EXIT])
    raw = record([str(program)], interval=10_000, skip=50_000, limit=120_000)
    assert (raw.instructions[:-1] >= 10_000).all()
    assert (raw.instructions < 10_010).all()
    assert 6 <= len(raw.instructions) <= 8  # whole intervals


@needs_emulator
def test_the_command_writes_a_workload_that_runs(tmp_path: Path) -> None:
    loop = [0xF94003E2, 0xF90003E2, 0xF1000400, b_ne(3)]
    program = write_program(tmp_path / "loop", [mov_x0(60000), *loop, *EXIT])
    out = tmp_path / "mine.yaml"
    command = [sys.executable, "-m", "spepolicy.workload_recorder", "--output", str(out), "--", str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    workload = build_workload(yaml.safe_load(out.read_text()), where="mine")
    assert workload.distribution_names[-1] == "spe_driver"
    assert "loop" in " ".join(workload.function_names)
    assert str(tmp_path) not in out.read_text()


@needs_emulator
def test_what_is_no_program_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(RecordingError, match="AArch64"):
        record([sys.executable])
    command = [sys.executable, "-m", "spepolicy.workload_recorder", "--output", "x.yaml", "--", "/does/not/exist"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def raw_of(counts: list[dict[str, int]], syscalls: int = 10) -> Raw:
    """A run of intervals, each in a function of its own: 64 bytes of code of no file are one function, so lines
    differ.
    """
    table = np.array([[row.get(name, 0) for name in COLUMNS] for row in counts], np.int64)
    return Raw(
        instructions=table[:, 0],
        syscalls=np.full(len(counts), syscalls),
        interval=np.arange(len(counts)),
        line=np.arange(len(counts), dtype=np.uint64),
        count=table,
        mappings=(),
        accesses=np.zeros(0, ACCESS),
    )


def test_time_follows_from_what_an_operation_waits_for() -> None:
    plain = {"instructions": 1_000_000, "load": 250_000, "branch": 100_000, "taken": 50_000}
    ipc = {}
    for name, more in {
        "plain": {},
        "chases": {"dram": 20_000, "waits_dram": 20_000},
        "overlaps": {"dram": 20_000, "leads_dram": 1_000},
        "mispredicts": {"mispredict": 20_000},
    }.items():
        description = describe_run(raw_of([plain | more]), LATENCIES, "test")
        (behaviour,) = (b for key, b in description["behaviours"].items() if key.startswith("of "))
        ipc[name] = behaviour["ipc"]
        assert behaviour["mix"] == {"load": 0.25, "branch": 0.1, "other": 0.65}
    assert ipc["plain"] == pytest.approx(3, rel=0.01)
    assert ipc["chases"] == pytest.approx(1 / (1 / 3 + 0.02 * 340), rel=0.01)
    assert ipc["chases"] < ipc["overlaps"] / 5
    assert ipc["mispredicts"] == pytest.approx(1 / (1 / 3 + 0.02 * 20), rel=0.01)


def test_raw_files_that_are_not_whole(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    head = struct.pack("<QIIII", 5, 1, 0, 1, 0)
    row = struct.pack("<Q17I4x", 7, *([1] * 17)) + struct.pack("<QQ????I", 7, 0x5500, True, False, True, True, 0)
    for content, message in (
        (b"something else", "not a file"),
        (b"SPEREC2\n" + head, "ends in the middle"),
        (b"SPEREC2\n" + head + row[:20], "ends in the middle"),
        (b"SPEREC2\n" + head + row, "ends in the middle"),
    ):
        path.write_bytes(content)
        with pytest.raises(RecordingError, match=message):
            read_raw(path)
    path.write_bytes(b"SPEREC2\n" + bytes(48))
    assert read_raw(path) is None
    maps = b"5000-6000 rw-p 00000000 00:00 0 \n6000-7000 r--p 00001000 08:01 3    /lib/x\n"
    end = bytes(24) + struct.pack("<QQQ", 0x4000, 0x4800, len(maps)) + maps
    path.write_bytes(b"SPEREC2\n" + head + row + end)
    raw = read_raw(path)
    assert raw is not None
    assert raw.line.tolist() == [7]
    assert raw.accesses["address"].tolist() == [0x5500]
    assert raw.heap == (0x4000, 0x4800)
    assert [(m.begin, m.path) for m in (*raw.anonymous, *raw.mappings)] == [(0x5000, ""), (0x6000, "/lib/x")]
    assert regions_of(raw) == {"[stack]": (0x5000, 0x1000)}


def test_the_page_names_the_programs_and_packages_of_what_is_shipped() -> None:
    folder = Path(__file__).resolve().parents[2]
    page = (folder / "spepolicy" / "workload_recorder" / "README.md").read_text()
    for it in SHIPPED:
        assert f"`{it.name}`" in page
        assert f"{it.package.split()[0]}:arm64" in page
        text = (folder / "conf" / "workload" / f"{it.name}.yaml").read_text()
        assert it.package in " ".join(text.replace("\n#", "").split())
