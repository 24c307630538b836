"""A small sweep that several tests run, and the program in an empty folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

SMALL = ("host=silent", "duration=1ms", "replicates=2", "tracking=none", "guest.memory=64MiB", "baselines=[]")
SWEEP = ("-m", "+policy=eager_pin,pin_on_fault", "guest.buffer=64KiB,128KiB", "seed=1,2", *SMALL)
TRACKED = tuple(argument for argument in SWEEP if argument != "tracking=none")

Run = Callable[..., "tuple[int, str, str]"]


def folder_of(out: str) -> Path:
    """The sweep's folder, as its summary says it."""
    return Path(next(line for line in out.splitlines() if line.startswith("files: ")).removeprefix("files: "))
