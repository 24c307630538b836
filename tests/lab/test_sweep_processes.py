"""The pool of processes of a sweep: a worker that dies costs nothing, one that dies each time is told."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from spepolicy.errors import WorkerError
from spepolicy.lab.sweep import engines
from spepolicy.lab.sweep.identity import PolicyChoice
from spepolicy.lab.sweep.work import Rows, Task


def dies_once(task: Task) -> Rows:
    """Kill the process at the first task of number 1, and give rows afterwards. Its `source` is a file's name."""
    mark = Path(task.source)
    if task.number == 1 and not mark.exists():
        mark.touch()
        os._exit(9)
    return Rows(task, 0.0, where=str(os.getpid()))


def always_dies(task: Task) -> Rows:
    """Kill the process."""
    os._exit(9)


def tasks(mark: Path) -> list[Task]:
    return [Task(number, PolicyChoice.of("bare_metal", {}), (), str(mark), "") for number in range(4)]


def test_tasks_of_a_worker_that_died_are_done_by_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "run_in_process", dies_once)
    engine = engines.Processes(2)
    try:
        rows = [each for each in engine.run(tasks(tmp_path / "mark")) if each is not None]
    finally:
        engine.close()
    assert sorted(each.task.number for each in rows) == [0, 1, 2, 3]  # each once
    assert (tmp_path / "mark").exists()
    assert str(os.getpid()) not in {each.where for each in rows}


def test_a_task_whose_workers_always_die_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "run_in_process", always_dies)
    engine = engines.Processes(1)
    try:
        with pytest.raises(WorkerError, match=r"died \d+ times.*bare_metal.*sweep\.resume=true"):
            list(engine.run(tasks(tmp_path / "mark")))
    finally:
        engine.close()
