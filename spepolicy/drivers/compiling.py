"""Compiling the machine as a whole, in two processes: numba compiles one function at a time in each."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import numpy as np

from spepolicy.jit import COMPILED, cache_dir
from spepolicy.machine import answers, own_buffer, pinning, walking, whole_vm
from spepolicy.machine.build import smallest_machine
from spepolicy.machine.lane import run_lanes, start_lanes
from spepolicy.machine.rows import context

_COMPLETE = "complete"  # file in the cache folder: every entry point is there


def compile_machine(say: Callable[[str], None]) -> None:
    """Compile all of the machine, unless its cache already holds it; *say* is told, for it takes most of a minute.

    Where this is not called, each entry point is compiled when it is first needed.
    """
    if not COMPILED or (cache_dir() / _COMPLETE).exists():
        return
    say(f"compiling the machine for this version of spepolicy into {cache_dir()} (once, about a minute)")
    # A quarter of the work has little in common with the rest. What the other process leaves undone, this one does.
    other = subprocess.Popen(
        [sys.executable, "-m", __name__], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        run_lanes(context(smallest_machine()), np.zeros(0, dtype=np.int64))
        other.wait()
    finally:
        other.kill()
        other.wait()
    compile_tools()
    (cache_dir() / _COMPLETE).touch()


def compile_tools() -> None:
    """Call every entry point but `run_lanes`, with no lane."""
    none = np.zeros(0, dtype=np.int64)
    handle = context(smallest_machine())
    start_lanes(handle, none)
    walking.walk_stage1(handle, none, none, none, none, 0, 0)
    walking.list_physical(handle, none, none, none, none)
    pinning.pin_fresh(handle, none, none, 0)
    for tool in (
        pinning.map_fresh, pinning.unpin_previous, pinning.unpin_current, pinning.keep_previous, pinning.release_idle,
        walking.look, answers.exit_to_vmm,
    ):  # fmt: skip
        tool(handle, none, none)
    answers.set_timer(handle, none, none, none)
    own_buffer.start_own_buffer(handle, none, none, 0)
    own_buffer.copy_out(handle, none, none, 0)
    answers.tell_guest(handle, none, none, 0, 0)
    answers.answer(handle, none, none, 1)
    answers.resume(handle, none, none)
    answers.score_claims(handle, none, none)
    whole_vm.pin_all(handle, none, 0)
    whole_vm.mlock_all(handle, none, 0)
    whole_vm.map_all(handle, none)
    whole_vm.unpin_all(handle, none)
    pinning.release_all(handle, none)


if __name__ == "__main__":
    compile_tools()
