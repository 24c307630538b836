"""Every preset of conf/experiment runs, at smoke size, to its report."""

from __future__ import annotations

from pathlib import Path

import pytest

from spepolicy.cli import main
from spepolicy.usage import conf_names

PRESETS = sorted(conf_names("experiment"))


def test_the_questions_of_the_thread_are_there() -> None:
    assert {"thread_2022", "per_task_perf", "reporting_v1p3", "live_migration", "memlock_cliff"} <= set(PRESETS)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_runs_at_smoke_size(name: str, tmp_path: Path) -> None:
    words = [f"+experiment={name}", "duration=1ms", "replicates=1", "tracking=none", f"output.dir={tmp_path}"]
    assert main([*words, f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    assert (tmp_path / "sweep" / "report.html").stat().st_size > 10_000
