"""Two-stage translation (VMSAv8-64) over descriptors in simulated physical memory."""

from spepolicy.mmu.address_translate import OPERATIONS, at
from spepolicy.mmu.memory import Memory

__all__ = ["OPERATIONS", "Memory", "at"]
