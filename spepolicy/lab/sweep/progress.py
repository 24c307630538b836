"""Progress of a sweep on the terminal: lanes a second, time left, failures so far. Silent where nobody watches."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

__all__ = ["Progress"]


class Progress:
    """A bar on standard error if that is a terminal, else nothing at all. Use it as a context manager."""

    def __init__(self, lanes: int, watched: bool | None = None) -> None:
        """*lanes* are to be computed. *watched*: whether to draw; by default, whether standard error is a terminal."""
        self._bar: Any = None
        self._task: Any = None
        if sys.stderr.isatty() if watched is None else watched:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            self._bar = Bar(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("lanes, {task.fields[rate]} a second,"),
                TimeRemainingColumn(),
                TextColumn("left{task.fields[failed]}"),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=sys.stdout.isatty(),  # else lines for a file or a pipe would go to the terminal
            )
            self._task = self._bar.add_task("simulating", total=lanes, rate="-", failed="")

    def __enter__(self) -> Progress:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def more(self, lanes: int) -> None:
        """Note that *lanes* more are to be computed."""
        if self._bar is not None:
            self._bar.update(self._task, total=self._bar.tasks[0].total + lanes)

    def advance(self, lanes: int, failed: int) -> None:
        """Note that *lanes* more are done, and *failed* lanes have failed so far."""
        if self._bar is None:
            return
        self._bar.update(self._task, advance=lanes, failed=f", {failed:,} lanes failed" if failed else "")
        speed = self._bar.tasks[0].finished_speed or self._bar.tasks[0].speed
        if speed:
            self._bar.update(self._task, rate=f"{speed:,.0f}")
