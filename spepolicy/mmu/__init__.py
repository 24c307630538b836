"""Two-stage translation (VMSAv8-64) over descriptors in simulated physical memory."""

from spepolicy.mmu.address_translate import OPERATIONS, at
from spepolicy.mmu.builder import Region, Tables
from spepolicy.mmu.memory import Memory
from spepolicy.mmu.tables import kvm_vtcr

__all__ = ["OPERATIONS", "Memory", "Region", "Tables", "at", "kvm_vtcr"]
