"""Where the functions of a workload lie in memory, and the two images that give perf their names.

A program of the machine has functions but no code. Each gets its place in one of two images by its number in the
workload, so that an address means the same function in every lane, policy and run of it: the guest's program at a usual
place of a position-independent executable, and the guest's kernel at the base of arm64 kernels since Linux 6.6
(KIMAGE_VADDR). perf reads the kernel's image as that of a module, because it takes symbols of the kernel itself from
the machine that it runs on.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spepolicy.machine.scenario import Workload
from spepolicy.machine.trace import FUNCTION_BYTES
from spepolicy.perfdata.elf import Image, Symbol, symbol_image

__all__ = ["KERNEL_BASE", "KERNEL_FILE", "PROGRAM_FILE", "USER_BASE", "Images", "function_addresses", "images"]

USER_BASE = 0x0000_AAAA_AAAA_0000
KERNEL_BASE = 0xFFFF_8000_8000_0000
PROGRAM_FILE = "guest_program"
KERNEL_FILE = "guest_kernel.ko"  # perf knows a kernel module by its suffix
_TEXT = 0x1000
_PAGE = 0x1000


class Images(NamedTuple):
    """The ELF files of a workload, and the bytes of address space that each takes."""

    program: Image
    kernel: Image
    size: int


def function_addresses(functions: NDArray[np.int64], levels: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the VA of each function, as it executes at exception level 0 or 1."""
    base = np.where(levels == 0, np.uint64(USER_BASE), np.uint64(KERNEL_BASE))
    offset = _TEXT + functions.astype(np.uint64) * np.uint64(FUNCTION_BYTES)
    addresses: NDArray[np.uint64] = base + offset
    return addresses


def images(workload: Workload) -> Images:
    """Return the images: functions that execute at EL0 are in the program, those at EL1 in the kernel."""
    user = {*workload.phase_user.tolist(), workload.other_user}
    kernel = {*workload.phase_kernel.tolist(), workload.other_kernel, workload.driver}
    size = _TEXT + len(workload.function_names) * FUNCTION_BYTES
    size += -size % _PAGE
    program, module = (symbol_image(_symbols(workload, rows), size) for rows in (user, kernel))
    return Images(program, module, size)


def _symbols(workload: Workload, distributions: set[int]) -> list[Symbol]:
    used = workload.weight[sorted(distributions)].max(axis=0) > 0
    return [
        Symbol(name, _TEXT + n * FUNCTION_BYTES, FUNCTION_BYTES)
        for n, name in enumerate(workload.function_names)
        if used[n]
    ]
