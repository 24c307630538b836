"""experiments/silicon: the page shows what the script prints, and the model is nearer to silicon than even sampling."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "silicon"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the script as it imports itself: from its own folder."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import run as script

    return script


def test_the_model_is_nearer_than_uniform_sampling(run: ModuleType) -> None:
    rows = run.compare(60, aligned=False)
    totals = [row for row in rows if row.figure.endswith("a run")]
    assert len(totals) == 4
    for row in totals:
        assert row.distance(1) < row.distance(0), (row.loop, row.figure)
        assert row.distance(0) > 1, "uniform sampling is refuted"


def test_parity_hides_loads_of_the_even_loop_only(run: ModuleType) -> None:
    cpus = [run.cpu_of(preset) for _, preset in run.MODELS]
    for loop in run.ALIGNED:
        uniform, model = (count for count, _ in run.compare_aligned(loop, cpus).models)
        assert uniform == 0
        assert (model > 0) == (len(loop.body) % 2 == 0)


def test_the_ideal_processor_samples_every_operation_alike(run: ModuleType) -> None:
    loop = run.MEASURED[0]
    ideal = run.cpu_of("neoverse_n1")
    counts = run.samples_of(loop, ideal, runs=200, iterations=10**6, period=run.PERIOD, aligned=False).sum(axis=0)
    share = counts / counts.sum()
    # 26,000 samples over 17 operations: the standard deviation of a share is 0.15 % of the whole
    assert np.abs(share - 1 / len(loop.body)).max() < 0.006


@pytest.mark.slow
def test_the_page_shows_what_the_script_prints() -> None:
    out = subprocess.run([sys.executable, "run.py"], cwd=FOLDER, check=True, capture_output=True, text=True).stdout
    block = re.search(r"```text\n(.*?)```", (FOLDER / "README.md").read_text(), re.DOTALL)
    assert block is not None
    assert block[1] == out
