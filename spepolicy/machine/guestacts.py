"""What a guest can do to its own profiling buffer, and when: the acts of `guest.misbehaviour`.

Both enums are numbered for good: logs and traces hold the numbers.
"""

from __future__ import annotations

from enum import IntEnum

__all__ = ["GuestAct", "Moment"]


class GuestAct(IntEnum):
    """One act of a vCPU, on pages of its AUX ring from the one that the SPU writes to next, or on its registers.

    Acts on translations edit the guest's own stage 1 tables, by a TLBI after it or without one (spe.md rule 32).
    """

    REMAP = 0  # another page, which no CPU has touched since it was freed, goes behind the VA (kvm.md 4.1 G2, G3)
    UNMAP = 1  # the descriptor becomes invalid (G6)
    WRITE_PROTECT = 2  # the descriptor becomes read-only
    MIGRATE = 3  # the guest's kernel copies the page elsewhere by CPU, as its compaction does
    RESTORE = 4  # all of the buffer is mapped again as the driver mapped it
    FREE_TABLE = 5  # the level 3 table goes: the level 2 descriptor becomes invalid (G4)
    REUSE_TABLE = 6  # the level 3 table is freed and filled with other data while it is still linked (G4)
    BALLOON_TABLE = 7  # the level 3 table is given to the balloon while it is still linked (G4)
    READ_ONLY_SLOT = 8  # the VA goes to a page of a read-only memslot (G12)
    DEVICE = 9  # the VA goes to an assigned device's memory (G12)
    NOWHERE = 10  # the VA goes to an IPA without a memslot (G12)
    FORGE = 11  # PMBSR_EL1 is written with S=1 and a syndrome of the guest's choice (G8)
    BEYOND_LIMIT = 12  # PMBPTR_EL1 is written with PMBLIMITR_EL1.LIMIT (spe.md rule 34, kvm.md 4.2 A11)
    CYCLE = 13  # the session ends and another one begins on other pages (G7)


class Moment(IntEnum):
    """What an act that is due waits for."""

    ANY = 0  # nothing; acts on registers wait for the end of the driver's code
    DISABLED = 1  # PMBLIMITR_EL1.E=0, where the guest may change translations as it likes
    BEFORE_ERET = 2  # between the write to PMSCR_EL1 and the ERET to EL0 that enables profiling ({E0SPE,E1SPE}={1,0})
    PROFILING = 3  # profiling is on, where the architecture does not allow it
