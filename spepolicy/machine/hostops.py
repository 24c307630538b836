"""What a host's memory management does to guest memory: the operations, and the MMU notifier events that announce them.

Both are numbered for good: shipped recordings, logs and hook arguments hold the numbers.
"""

from __future__ import annotations

from enum import IntEnum, IntFlag

__all__ = ["Backing", "HostOp", "Kernel", "Notifier"]


class HostOp(IntEnum):
    """One operation on a range of whole 4 KiB pages of guest RAM.

    The functions in brackets are those of Linux 6.1, where the shipped recordings show each operation except DONTNEED,
    MUNMAP, MPROTECT, THP and SOFT_DIRTY (spepolicy/recording/data/README.md).
    """

    NONE = 0  # nothing: padding, never in a recording
    CPU_TOUCH = 1  # the guest's CPU faulted pages in at stage 2 (kvm_pgtable_stage2_map, _relax_perms, _mkyoung)
    RECLAIM = 2  # unmapped to be swapped out or dropped (shrink_folio_list, try_to_unmap)
    AGE = 3  # accessed flag cleared, the mapping stays (kvm_age_gfn, kvm_pgtable_stage2_mkold)
    KSM = 4  # write-protected or merged with an equal page (ksmd), or a merged page copied for its writer
    NUMA_SCAN = 5  # unmapped to see who touches it next (task_numa_work, change_prot_numa)
    NUMA_MIGRATE = 6  # moved to the toucher's node by the fault that the scan provoked (reason numa_misplaced)
    MOVE = 7  # moved on request (migratepages, move_pages, mbind, soft offline, long-term pin out of ZONE_MOVABLE)
    COMPACT = 8  # moved to make room for huge allocations (compact_zone)
    FORK = 9  # shared copy-on-write with a child (copy_page_range), or copied because of that
    DONTNEED = 10  # the page goes and a new one comes (MADV_DONTNEED, MADV_FREE, balloon, hole punch, truncate)
    MUNMAP = 11  # the virtual range goes or moves (munmap, mremap, mmap MAP_FIXED)
    MPROTECT = 12  # protection changed by the VMM (mprotect, userfaultfd write protection)
    THP = 13  # collapsed into or split from a huge page (collapse_huge_page, __split_huge_pmd)
    DIRTY_LOG = 14  # write-protected by KVM itself, without a notifier (kvm_pgtable_stage2_wrprotect)
    SOFT_DIRTY = 15  # write-protected to find later writes (/proc/PID/clear_refs 4)
    # Since the whole table of measured operations is played; no recording holds these.
    FREE = 16  # MADV_FREE: may be dropped instead of swapped out, unless it is written again
    PAGEOUT = 17  # MADV_PAGEOUT of whole huge pages, or of a range of small ones
    PAGEOUT_PART = 18  # MADV_PAGEOUT of a part of a huge page
    COLD = 19  # MADV_COLD
    MPROTECT_READ = 20  # mprotect(PROT_READ), and it stays so
    MPROTECT_NONE = 21
    MREMAP = 22  # the pages move to another virtual address of the VMM
    MAP_FIXED = 23  # mmap(MAP_FIXED) of new anonymous memory over the range
    FORK_EXIT = 24  # fork, and the child has gone
    FORK_EXCLUDED = 25  # fork with MADV_DONTFORK or MADV_WIPEONFORK
    MBIND = 26  # mbind(MPOL_MF_MOVE)
    SOFT_OFFLINE = 27  # the page is given up because its memory had corrected errors
    THP_SPLIT = 28  # split_huge_pages of debugfs; MOVE and RECLAIM of a part split as well
    REMOVE = 29  # MADV_REMOVE: a hole in the file behind the memory
    PUNCH_HOLE = 30  # fallocate(FALLOC_FL_PUNCH_HOLE) on that file
    TRUNCATE = 31  # ftruncate to 0 and back
    MEMSLOT_DELETE = 32  # KVM_SET_USER_MEMORY_REGION: slot deleted and added again
    MEMSLOT_READ_ONLY = 33  # slot deleted and added with KVM_MEM_READONLY
    RECLAIM_LAZY = 34  # reclaim of a page after MADV_FREE
    LRU_GEN = 35  # one turn of the multi-generation LRU's ageing (debugfs lru_gen)
    CLEAR_REFS = 36  # /proc/PID/clear_refs 1
    DIRECT_READ = 37  # the VMM reads from a disk into the page with O_DIRECT, a short-term pin


class Backing(IntEnum):
    """What backs the guest's memory in the VMM."""

    ANONYMOUS = 0  # private anonymous memory in 4 KiB pages (MADV_NOHUGEPAGE)
    THP = 1  # private anonymous memory in transparent huge pages of 2 MiB
    SHMEM = 2  # shared memory in 4 KiB pages (memfd, /dev/shm)
    HUGETLB = 3  # a shared hugetlbfs file in pages of 2 MiB
    GUEST_MEMFD = 4  # guest_memfd, which the host's memory management leaves alone


class Kernel(IntEnum):
    """Which host kernel's memory management: those that were measured."""

    V6_1 = 0
    V6_12 = 1


class Notifier(IntFlag):
    """MMU notifier events as a mask: bit n is value n of enum mmu_notifier_event (linux/mmu_notifier.h, Linux 6.1).

    From bit 8 on: finer classes, which no kernel tells KVM apart today. CLEAR comes from callers that replace a page
    and from callers that leave a pinned one alone, and PROTECTION_VMA from mprotect and from NUMA balancing (kvm.md
    H8). An event is ignored if its bit or that of its class is set.
    """

    UNMAP = 1 << 0  # the virtual range goes: munmap, mremap
    CLEAR = 1 << 1  # page table entries cleared for any other reason: reclaim, migration, zap, copy-on-write, KSM
    PROTECTION_VMA = 1 << 2  # protection of a range in a VMA changes: mprotect, NUMA balancing scan
    PROTECTION_PAGE = 1 << 3  # protection of pages changes: fork, cleaning of file pages
    SOFT_DIRTY = 1 << 4  # soft-dirty tracking: the range stays mapped, write-protected
    RELEASE = 1 << 5  # the address space goes
    MIGRATE = 1 << 6  # pages move to device memory (migrate_vma)
    EXCLUSIVE = 1 << 7  # a device takes the page for itself (make_device_exclusive_range)
    ZAP = 1 << 8  # CLEAR by zap_page_range: MADV_DONTNEED, balloon, hole punch, truncation. The page goes
    RMAP = 1 << 9  # CLEAR by try_to_unmap and try_to_migrate, MADV_FREE: a pinned page stays
    MERGE = 1 << 10  # CLEAR by KSM's write_protect_page: a pinned page is not merged
    SPLIT = 1 << 11  # CLEAR by a split or collapse of a huge page: the pages stay where they are, or it is not done
    COPY = 1 << 12  # CLEAR by copy-on-write
    HINT = 1 << 13  # PROTECTION_VMA by NUMA balancing: the page stays
    # What leaves a pinned page behind the VMM's address (spepolicy/machine/effects: every row of state P).
    HARMLESS = RMAP | MERGE | SPLIT | HINT | PROTECTION_PAGE | SOFT_DIRTY
