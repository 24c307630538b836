"""What the registers of the EL1&0 regime say, decoded once for all walks: `STAGES`.

A regime is three rows of `STAGE`: stage 1 from TTBR0_EL1 (`LOWER`), stage 1 from TTBR1_EL1 (`UPPER`), and stage 2
(`SECOND`). The features are those of an Armv8.2 core without 52-bit addresses: 48-bit PA, granules of 4, 16 and 64 KiB
at both stages, TxSZ 16 to 39, hardware management of access flag and dirty state, hierarchical permission disables.
What the registers could ask for beyond that is refused by `spepolicy.mmu.refused`.

Rules: spe.md 6.1 and mmu.md (VMSAv8-64), Arm ARM DDI 0487 D8.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spepolicy.jit import lean

LOWER, UPPER, SECOND = range(3)
FLAT = 3  # where an agent may bypass stage 1 (FEAT_SPE_nVM): a row of stage 1 that is off, all zero
PA_BITS = 48  # PARange: the physical address size that is implemented

_STAGE = """
on              the stage translates; else its output is its input
closed          every input takes a translation fault of level 0: TxSZ or SL0 does not fit, or EPD is set
reserved        1: a walk with this granule field is not modelled
input_bits      size of the input address
start           level of the first lookup
start_shift     lowest input address bit that indexes a table of that level
stride          input address bits that a level resolves
index_mask      2**stride - 1
base            address of the first table, or of the first of concatenated tables
output_mask     bits of a descriptor that are an address
output_bits     size of the output address: beyond it is an address size fault
oversize        bits of a descriptor that are an address beyond that size
blocks          bit L: level L may hold blocks
hardware_af     AF=0 makes hardware set it and is no fault (HA)
hardware_dirty  DBM=1 makes an entry writable (HA and HD)
big_endian      descriptors are big-endian (stage 1, SCTLR_EL1.EE)
inherit         table descriptors restrict permissions below them (stage 1, not HPD)
ignore_top      the top byte of the address is ignored (stage 1, TBI)
no_user         EL0 takes a translation fault of level 0 (stage 1, E0PD)
enhanced_pan    PAN also counts what EL0 may execute (stage 1, SCTLR_EL1.EPAN)
cacheable       stage 1 that is off gives Normal Write-back memory (HCR_EL2.DC)
mair            MAIR_EL1
no_device_walk  a stage 1 table in Device memory is a permission fault (stage 2, HCR_EL2.PTW)
forced_type     MemAttr has the encoding of HCR_EL2.FWB (stage 2)
linear_frame    not a register: the software that owns the tables reaches frame f in slot f - this; 0: by the hash
"""

STAGE = np.dtype([(line.split()[0], np.int64) for line in _STAGE.strip().splitlines()])

# HCR_EL2
HCR_VM, HCR_PTW, HCR_DC, HCR_FWB = 1 << 0, 1 << 2, 1 << 12, 1 << 46
# SCTLR_EL1
SCTLR_M, SCTLR_EE, SCTLR_EPAN = 1 << 0, 1 << 25, 1 << 57

ADDRESS_48 = (1 << 48) - 1


@lean
def address_bits(field: int) -> int:
    """Return the address size that TCR_EL1.IPS or VTCR_EL2.PS stands for, at most PA_BITS."""
    if field >= 5:
        return PA_BITS
    if field == 4:
        return 44
    if field == 3:
        return 42
    if field == 2:
        return 40
    return 36 if field == 1 else 32


@lean
def _set_granule(s: Any, granule: int) -> None:
    """Set what follows from the granule, as the number of its address bits (0: a reserved encoding)."""
    s.reserved = 1 if granule == 0 else 0
    if granule == 0:
        granule = 12
    s.stride = granule - 3
    s.index_mask = (1 << s.stride) - 1
    s.output_mask = ADDRESS_48 & ~((1 << granule) - 1)
    # 1 GiB and 2 MiB, 32 MiB, 512 MiB. Larger ones need 52-bit addresses.
    s.blocks = 0b110 if granule == 12 else 0b100


@lean
def _set_start(s: Any, input_bits: int, level: int, ttbr: int) -> None:
    """Set the first lookup. The table, or the concatenated tables, are aligned to their size: low bits are ignored."""
    s.input_bits = input_bits
    s.start = level
    s.start_shift = s.stride + 3 + s.stride * (3 - level)
    size_bits = max(input_bits - s.start_shift + 3, 3)
    s.base = ttbr & ADDRESS_48 & ~1 & ~((1 << size_bits) - 1)


@lean
def set_stage1(s: Any, upper: int, ttbr: int, tcr: int, mair: int, sctlr: int, hcr: int, updates: int) -> None:
    """Decode one half of stage 1 into the zeroed row *s*: TTBR0_EL1's, or with *upper* TTBR1_EL1's.

    *updates* is 0 for an agent that cannot update descriptors: it takes HA and HD as 0.
    """
    s.on = 1 if sctlr & SCTLR_M != 0 and hcr & HCR_DC == 0 else 0
    s.cacheable = 1 if hcr & HCR_DC != 0 else 0
    size = (tcr >> (16 * upper)) & 63
    field = (tcr >> (14 + 16 * upper)) & 3
    if upper == 0:
        granule = 12 if field == 0 else 16 if field == 1 else 14 if field == 2 else 0
    else:
        granule = 14 if field == 1 else 12 if field == 2 else 16 if field == 3 else 0
    _set_granule(s, granule)
    s.closed = (tcr >> (7 + 16 * upper)) & 1
    if size < 16 or size > 39:
        s.closed = 1
        size = 16
    input_bits = 64 - size
    _set_start(s, input_bits, 3 - (input_bits - 1 - (s.stride + 3)) // s.stride, ttbr)
    _set_output(s, (tcr >> 32) & 7)
    s.ignore_top = (tcr >> (37 + upper)) & 1
    s.hardware_af = (tcr >> 39) & updates
    s.hardware_dirty = (tcr >> 40) & s.hardware_af
    s.inherit = 1 - ((tcr >> (41 + upper)) & 1)
    s.no_user = (tcr >> (55 + upper)) & 1
    s.big_endian = 1 if sctlr & SCTLR_EE != 0 else 0
    s.enhanced_pan = 1 if sctlr & SCTLR_EPAN != 0 else 0
    s.mair = mair


@lean
def _set_output(s: Any, field: int) -> None:
    s.output_bits = address_bits(field)
    s.oversize = s.output_mask & ~((1 << s.output_bits) - 1)


@lean
def _stage2_start(granule: int, field: int) -> int:
    """Return the level that VTCR_EL2.SL0 stands for, or -1 where it is reserved."""
    if field == 3:
        return -1  # level 3 of a 4 KiB granule needs FEAT_TTST, level 0 of a 16 KiB one 52-bit addresses
    return 2 - field if granule == 12 else 3 - field


@lean
def set_stage2(s: Any, vttbr: int, vtcr: int, hcr: int, updates: int) -> None:
    """Decode stage 2 into the zeroed row *s*. *updates* as for `set_stage1`."""
    s.on = 1 if hcr & (HCR_VM | HCR_DC) != 0 else 0
    field = (vtcr >> 14) & 3
    granule = 12 if field == 0 else 16 if field == 1 else 14 if field == 2 else 0
    _set_granule(s, granule)
    size = vtcr & 63
    input_bits = 64 - size
    level = _stage2_start(s.stride + 3, (vtcr >> 6) & 3)
    # The first lookup resolves one bit at least, and at most a whole level plus four bits of concatenated tables.
    lowest = (3 - level) * s.stride + s.stride + 3 + 1
    if level < 0 or size < 64 - PA_BITS or size > 39 or input_bits < lowest or input_bits > lowest + s.stride + 3:
        s.closed = 1
        level, input_bits = 3, s.stride + 4
    _set_start(s, input_bits, level, vttbr)
    _set_output(s, (vtcr >> 16) & 7)
    s.hardware_af = (vtcr >> 21) & updates
    s.hardware_dirty = (vtcr >> 22) & s.hardware_af
    s.no_device_walk = 1 if hcr & HCR_PTW != 0 else 0
    s.forced_type = 1 if hcr & HCR_FWB != 0 else 0
