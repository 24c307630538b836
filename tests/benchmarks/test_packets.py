"""experiments/benchmark/packets.py: perf sees in its file what the benchmark says that it holds."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from spepolicy.spe.operations import is_load, is_store
from spepolicy.spe.packets import encode


@pytest.fixture
def benchmark(load: Callable[[str], ModuleType]) -> ModuleType:
    return load("packets")


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed (Debian: linux-perf)")
def test_perf_decodes_the_stream_to_as_many_samples(benchmark: ModuleType, tmp_path: Path) -> None:
    # More than one buffer, the last one short.
    records = benchmark.records_of(benchmark.PIECE // 64 + 1000)
    path = tmp_path / "perf.data"
    path.write_bytes(benchmark.perf_data(encode(records, layout="neoverse")))
    command = ["perf", "script", "--itrace=M", "-i", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == (is_load(records) | is_store(records)).sum()
    assert "Bad packet" not in done.stderr


def test_the_table_judges_by_the_bars(benchmark: ModuleType) -> None:
    names = [
        "decode, whole stream at once",
        "decode, whole stream again",
        "decode, 4 MiB at a time",
        "decode, variable size",
    ]
    names += ["encode, whole stream at once", "encode, 4 MiB at a time", "encode, variable size"]
    seconds = {name: [0.2] for name in names}
    seconds["perf script --itrace=M"], seconds["perf report -D"] = [0.9], [12.5]
    rows = {row.figure: row for row in benchmark.rows_of(seconds, 200_000_000, 120_000_000, 3_125_000, 1)}
    verdicts = [row.passed for row in rows.values() if row.bar]
    assert verdicts == [False, True, True]
    assert rows["decode, 4 MiB at a time, MB per CPU second"].value.startswith("1000 ")
    assert rows["decode, variable size, MB per CPU second"].value.startswith("600 ")


def test_without_perf_the_rows_say_so(benchmark: ModuleType) -> None:
    seconds = {f"{verb}, {how}": [0.2] for verb in ("decode", "encode") for how in (
        "whole stream at once", "whole stream again", "4 MiB at a time", "variable size"
    )}  # fmt: skip
    rows = [row for row in benchmark.rows_of(seconds, 200_000_000, 120_000_000, 3_125_000, 1) if "perf" in row.figure]
    assert len(rows) == 2
    assert all(row.passed is None and "perf is not installed" in row.value for row in rows)
