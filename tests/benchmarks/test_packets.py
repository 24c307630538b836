"""experiments/benchmark/packets.py: perf sees in its file what the benchmark says that it holds."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spepolicy.spe.operations import is_load, is_store
from spepolicy.spe.packets import encode


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> Any:
    folder = Path(__file__).resolve().parents[2] / "experiments" / "benchmark"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_packets", folder / "packets.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_packets", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(shutil.which("perf") is None, reason="perf is not installed (Debian: linux-perf)")
def test_perf_decodes_the_stream_to_as_many_samples(benchmark: Any, tmp_path: Path) -> None:
    # More than one buffer, the last one short.
    records = benchmark.records_of(benchmark.PIECE // 64 + 1000)
    path = tmp_path / "perf.data"
    path.write_bytes(benchmark.perf_data(encode(records, layout="neoverse")))
    command = ["perf", "script", "--itrace=M", "-i", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.count("\n") == (is_load(records) | is_store(records)).sum()
    assert "Bad packet" not in done.stderr


def test_the_table_judges_by_the_bars(benchmark: Any) -> None:
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
