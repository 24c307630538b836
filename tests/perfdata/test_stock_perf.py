"""What stock perf makes of the files: samples, names, latencies, warnings and errors are what the judge counted."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from spepolicy.drivers.result import LaneLog
from spepolicy.machine.scenario import OpType
from spepolicy.machine.state import LostCause
from spepolicy.machine.trace import LogKind, samples
from spepolicy.perfdata import read
from spepolicy.perfdata.aux_area import AuxArea
from spepolicy.perfdata.lane import PROGRAM, lane_file, window_name
from spepolicy.perfdata.layout import AuxFlag
from spepolicy.perfdata.program import KERNEL_BASE, KERNEL_FILE, PROGRAM_FILE, USER_BASE, images
from spepolicy.spe.records import Present
from tests.perfdata.lanes import CUT, LANES, lane
from tests.perfdata.streams import two_sessions


def _why_not() -> str:
    perf = shutil.which("perf")
    if perf is None:
        return "perf is not installed (Debian: apt-get install linux-perf)"
    said = subprocess.run([perf, "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"perf version (\d+)\.(\d+)", said)
    if version is None or (int(version[1]), int(version[2])) < (6, 1):
        return f"perf 6.1 or later is needed, and this one says {said!r}"
    return ""


pytestmark = pytest.mark.skipif(bool(_why_not()), reason=_why_not() or "perf is there")


def perf(folder: Path, *arguments: str) -> tuple[str, str]:
    """Run perf in *folder*, without the settings of its user; return what it prints and what it warns of."""
    environment = {**os.environ, "PERF_CONFIG": os.devnull, "HOME": str(folder), "LC_ALL": "C", "DEBUGINFOD_URLS": ""}
    done = subprocess.run(
        ["perf", *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout, done.stderr


def written(name: str, folder: Path) -> tuple[LaneLog, tuple[AuxArea, ...]]:
    """Write the perf.data of a lane and its images to *folder*."""
    log = lane(name)
    parts = images(log.result.scenario.workload)
    (folder / PROGRAM_FILE).write_bytes(parts.program.content)
    (folder / KERNEL_FILE).write_bytes(parts.kernel.content)
    made = lane_file(log, folder)
    (folder / "perf.data").write_bytes(made.content)
    return log, made.areas


USER_TEXT, KERNEL_TEXT = USER_BASE + 0x1000, KERNEL_BASE + 0x1000
LINE = re.compile(
    r"\s*(?P<comm>\S+)\s+(?P<tid>-?\d+) \[(?P<cpu>\d+)\]\s+(?P<s>\d+)\.(?P<ns>\d{9}):\s+instructions:\s+"
    r"(?P<addr>[0-9a-f]+)\s+(?P<weight>\d+)\s+(?P<ip>[0-9a-f]+) (?P<sym>\S+?)\+(?P<off>0x[0-9a-f]+)\s*$"
)
ERROR = re.compile(
    r" instruction trace error type 1 time (?P<s>\d+)\.(?P<ns>\d{9}) cpu (?P<cpu>\d+) pid (?P<pid>\d+) "
    r"tid (?P<tid>\d+) ip 0 code (?P<code>\d+): (?P<message>.*)$"
)
Sample = tuple[int, int, int, int, int, str, int]
SCRIPT = ("script", "--ns", "--itrace=i1i", "-F", "comm,tid,cpu,time,event,ip,sym,symoff,addr,weight")


def expected_samples(log: LaneLog, areas: tuple[AuxArea, ...]) -> list[Sample]:
    """(cpu, ns, va, latency, pc, function, offset in it) of each record."""
    names = log.result.scenario.workload.function_names
    tick_ns = 40 if log.result.scenario.cpu.spe_version < 3 else 1
    out = []
    for k, area in enumerate(areas):
        for r in area.records:
            function = names[int(r["pc"]) - (KERNEL_TEXT if r["pc_el"] else USER_TEXT) >> 10]
            va = int(r["va"]) if r["present"] & int(Present.VA) else 0
            offset = int(r["pc"]) & 1023
            out.append((k, int(r["timestamp"]) * tick_ns, va, int(r["total_latency"]), int(r["pc"]), function, offset))
    return sorted(out)


def time_of(match: re.Match[str]) -> int:
    return int(match["s"]) * 10**9 + int(match["ns"])


def parsed(text: str) -> tuple[list[Sample], list[re.Match[str]], list[int]]:
    """Return the samples, the errors, and the times of all lines in their order."""
    samples, errors, times = [], [], []
    for line in text.splitlines():
        if match := ERROR.match(line):
            errors.append(match)
        else:
            match = LINE.match(line)
            assert match, line
            samples.append(
                (int(match["cpu"]), time_of(match), int(match["addr"], 16), int(match["weight"]), int(match["ip"], 16),
                 match["sym"], int(match["off"], 16))
            )  # fmt: skip
        times.append(time_of(match))
    return sorted(samples), errors, times


@pytest.mark.parametrize("name", LANES)
def test_perf_script_prints_each_record_and_each_window(name: str, tmp_path: Path) -> None:
    log, areas = written(name, tmp_path)
    printed, errors, times = parsed(perf(tmp_path, *SCRIPT, "-i", "perf.data")[0])
    assert printed == expected_samples(log, areas)
    assert times == sorted(times)
    check_errors(log, errors)


def test_perf_names_the_memory_that_a_recorded_program_accesses(tmp_path: Path) -> None:
    """Shares of the latency of loads and stores by the region that their addresses lie in, and of the kernel's, which
    perf looks for among the kernel's mappings.
    """
    log, _ = written("recorded", tmp_path)
    report = perf(tmp_path, "report", "--stdio", "--mem-mode", "--itrace=M", "-s", "dso_daddr", "-i", "perf.data")[0]
    lines = [line.split()[:2] for line in report.splitlines() if re.match(r" +\d", line)]
    printed = {name: float(share.rstrip("%")) for share, name in lines}
    workload = log.result.scenario.workload
    accesses = samples(log.rows, workload)
    accesses = accesses[(accesses["fate"] == LogKind.WRITTEN) & (accesses["type"] & (OpType.LOAD | OpType.STORE) != 0)]
    weight = accesses["total"] / accesses["total"].sum() * 100 * (accesses["level"] == 0)
    assert workload.data is not None
    expected = {
        r.name: weight[(accesses["address"] >= r.begin) & (accesses["address"] < r.begin + r.size)].sum()
        for r in workload.data.regions
    }
    expected["[unknown]"] = 100 - sum(expected.values())
    assert all(share > 1 for share in expected.values())
    assert printed == pytest.approx(expected, abs=0.05)


def check_errors(log: LaneLog, errors: list[re.Match[str]]) -> None:
    """The errors are the judge's windows: when, where, why and how long."""
    tick_ps = 40_000 if log.result.scenario.cpu.spe_version < 3 else 1000
    told = sorted((time_of(e), int(e["cpu"]), int(e["code"]), e["message"]) for e in errors)
    expected = []
    for w in log.result.windows:
        message = f"{w['length_ps'] / 1e6:.1f}us".join(window_name(LostCause(w["cause"])))
        start_ns = int(w["start_host_ps"]) // tick_ps * tick_ps // 1000
        expected.append((start_ns, int(w["vcpu"]), int(w["cause"]), message))
    assert told == sorted(expected)


@pytest.mark.parametrize("name", CUT)
def test_half_a_record_costs_perf_the_next_one_at_most(name: str, tmp_path: Path) -> None:
    """perf joins a half with what follows, or makes samples of its bytes (spe.md 4.7); all other records it prints."""
    log, areas = written(name, tmp_path)
    capture = read(tmp_path / "perf.data")
    cuts = int((capture.aux["flags"] & int(AuxFlag.PARTIAL) != 0).sum())
    text = perf(tmp_path, *SCRIPT, "-i", "perf.data")[0]
    missing = Counter(sample[:2] + sample[4:5] for sample in expected_samples(log, areas))
    missing.subtract(Counter(parsed_samples(text)))
    assert sum(count for count in missing.values() if count > 0) <= cuts
    assert -sum(count for count in missing.values() if count < 0) <= capture.skipped_bytes
    check_errors(log, [match for line in text.splitlines() if (match := ERROR.match(line))])


def parsed_samples(text: str) -> list[tuple[int, int, int]]:
    found = []
    for line in text.splitlines():
        if match := re.search(r"\[(\d+)\]\s+(\d+)\.(\d{9}): .*instructions:\s+[0-9a-f]+\s+\d+\s+([0-9a-f]+)", line):
            found.append((int(match[1]), int(match[2]) * 10**9 + int(match[3]), int(match[4], 16)))
    return found


@pytest.mark.parametrize("name", [*LANES, *CUT])
def test_perf_warns_of_what_the_driver_told(name: str, tmp_path: Path) -> None:
    log, _ = written(name, tmp_path)
    flags = read(tmp_path / "perf.data").aux["flags"]
    warnings = perf(tmp_path, *SCRIPT, "-i", "perf.data")[1]
    for flag, text in (
        (AuxFlag.TRUNCATED, "AUX data lost {} times out of {}!"),
        (AuxFlag.PARTIAL, "AUX data had gaps in it {} times out of {}!"),
        (AuxFlag.COLLISION, "AUX data detected collision  {} times out of {}!"),
    ):
        count = int((flags & int(flag) != 0).sum())
        assert (text.format(count, len(flags)) in warnings) == (count > 0), text
        assert (text.split("{}")[0] in warnings) == (count > 0)
    windows = len(log.result.windows)
    assert (f"{windows} instruction trace errors" in warnings) == (windows > 0)
    assert ("Are you running a KVM guest in the background?" in warnings) == bool((flags & int(AuxFlag.PARTIAL)).any())
    assert "out of order" not in warnings


@pytest.mark.parametrize("name", ["neoverse", "two_vcpus", "packed"])
def test_perf_report_has_the_profile_of_the_judge(name: str, tmp_path: Path) -> None:
    log, _ = written(name, tmp_path)
    report, warnings = perf(tmp_path, "report", "--stdio", "--itrace=i1i", "-F", "sample,sym", "-i", "perf.data")
    assert "kptr_restrict" not in warnings  # nothing is asked of the kernel that perf runs on
    counted: Counter[str] = Counter()
    for count, mode, function in re.findall(r"^\s+(\d+)\s+\[(.)\] (\S+)", report, re.MULTILINE):
        assert mode in ".k"
        counted[function] += int(count)
    truth = log.result.truth[0]
    assert not truth["discarded"].any()
    profile = log.result.seen[0].sum(axis=0)
    names = log.result.scenario.workload.function_names
    assert dict(counted) == {name: int(n) for name, n in zip(names, profile, strict=True) if n}
    assert sum(counted.values()) == truth["kept"].sum()


def test_perf_decodes_every_packet(tmp_path: Path) -> None:
    log, _ = written("neoverse", tmp_path)
    dump = perf(tmp_path, "report", "-D", "-i", "perf.data")[0]
    assert "Bad packet" not in dump
    packets = Counter(
        re.findall(r"^\.  [0-9a-f]{8}:  (?:[0-9a-f]{2} )+\s+(PC|TS|EV|VA|PAD|LAT \d+ TOT)", dump, re.MULTILINE)
    )
    assert packets["PC"] == packets["TS"] == packets["EV"] == log.result.truth[0]["written"].sum()


def test_perf_names_tasks_and_data_sources(tmp_path: Path) -> None:
    written("neoverse", tmp_path)
    text = perf(tmp_path, "script", "--itrace=i1i", "-F", "comm,tid,addr,data_src", "-i", "perf.data")[0]
    assert {line.split()[0] for line in text.splitlines() if "trace error" not in line} == {PROGRAM}
    assert re.search("LVL L2( or L2)? hit", text)  # data source 8 with the MIDR_EL1 of a Neoverse N1


def test_names_are_found_by_build_id_elsewhere(tmp_path: Path) -> None:
    """perf buildid-cache keeps the images: then perf.data can be taken to another place without them."""
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    second.mkdir()
    log, areas = written("neoverse", first)
    shutil.move(first / "perf.data", second / "perf.data")
    for image in (PROGRAM_FILE, KERNEL_FILE):
        perf(second, "buildid-cache", "--add", str(first / image))
        (first / image).unlink()
    samples, _, _ = parsed(perf(second, *SCRIPT, "-i", "perf.data")[0])
    assert samples == expected_samples(log, areas)


def test_what_perf_inject_writes_is_read(tmp_path: Path) -> None:
    """A file and a pipe written by perf itself."""
    (tmp_path / "perf.data").write_bytes(two_sessions())
    perf(tmp_path, "inject", "-i", "perf.data", "-o", "again.data")
    with (tmp_path / "piped.data").open("wb") as out:
        subprocess.run(["perf", "inject", "-i", "perf.data", "-o", "-"], cwd=tmp_path, stdout=out, check=True)
    one = read(tmp_path / "perf.data")
    for name in ("again.data", "piped.data"):
        other = read(tmp_path / name)
        assert other.complete
        assert np.array_equal(one.records, other.records)
        assert np.array_equal(one.where, other.where)
        assert np.array_equal(one.aux, other.aux)
