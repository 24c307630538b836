"""Memory type and shareability of a translation, and PAR_EL1 (mmu.md, Arm ARM DDI 0487 D8.6).

An attribute is a byte as in MAIR_EL1: outer in bits 7:4, inner in bits 3:0 for Normal memory, 0b0000dd00 for Device
memory of type dd (0 nGnRnE, 1 nGnRE, 2 nGRE, 3 GRE).
"""

from __future__ import annotations

from typing import Any

from spepolicy.jit import lean
from spepolicy.mmu.regime import ADDRESS_48
from spepolicy.mmu.walker import FSC_MASK, STAGE2, WALK

WRITE_BACK = 0xFF  # Normal, Write-back, allocating on reads and writes
NON_CACHEABLE = 0x44
_NIBBLE_NC = 4

NON_SHAREABLE, RESERVED_SHAREABILITY, OUTER_SHAREABLE, INNER_SHAREABLE = range(4)

PAR_FAULT = 1 << 0
PAR_PTW = 1 << 8
PAR_S = 1 << 9  # of a fault
PAR_NS = 1 << 9  # of a success; unknown outside Secure state, 1 here
PAR_RES1 = 1 << 11
PAR_PA = ADDRESS_48 & ~0xFFF

# What `par_value` answers instead, negative: what the result would need is not modelled.
MAIR_RESERVED = -1
STAGE2_TYPE_RESERVED = -2
SHAREABILITY_RESERVED = -3


@lean
def _is_device(attribute: int) -> bool:
    return attribute & 0xF0 == 0


@lean
def _reserved(attribute: int) -> bool:
    """Tell whether a byte of MAIR_EL1 has no meaning without FEAT_XS and FEAT_MTE2."""
    if attribute & 0xF0 == 0:
        return attribute & 3 != 0
    return attribute & 0xF == 0


@lean
def effective_shareability(attribute: int, field: int) -> int:
    """Return SH as it counts: Device memory and Normal memory without any cache is Outer Shareable."""
    if _is_device(attribute) or attribute == NON_CACHEABLE:
        return OUTER_SHAREABLE
    return field


@lean
def _combined_nibble(first: int, second: int) -> int:
    """Combine inner or outer cacheability: a stage 1 MAIR nibble with stage 2's NC (1), Write-through (2) or Write-back
    (3). Hints come from stage 1.
    """
    if first == _NIBBLE_NC or second == 1:
        return _NIBBLE_NC
    if second == 3:
        return first
    # Write-through: 0b10RW, transient 0b00RW; bit 2 tells Write-back from it, in both forms.
    return first & 0b1011


@lean
def _combined(first: int, memattr: int) -> int:
    """Combine a stage 1 attribute with MemAttr of stage 2, or return STAGE2_TYPE_RESERVED."""
    if memattr & 0xC == 0:
        device = memattr << 2
        return min(first, device) if _is_device(first) else device
    if memattr & 3 == 0:
        return STAGE2_TYPE_RESERVED
    if _is_device(first):
        return first
    outer = _combined_nibble((first >> 4) & 0xF, memattr >> 2)
    return (outer << 4) | _combined_nibble(first & 0xF, memattr & 3)


@lean
def _forced_nibble(first: int, device: bool) -> int:
    # Write-back with the hints of stage 1, or all hints where it has none. Bit 2 makes Write-back of Write-through.
    return 0xF if device or first == _NIBBLE_NC else first | 4


@lean
def _combined_forced(first: int, memattr: int) -> int:
    """Do what `_combined` does for the encoding of HCR_EL2.FWB: stage 2 overrides Normal types of stage 1."""
    if memattr & 8 != 0 or memattr == 4:
        return STAGE2_TYPE_RESERVED
    if memattr < 4:
        device = memattr << 2
        return min(first, device) if _is_device(first) else device
    if memattr == 7:
        return first
    if memattr == 5:
        return first if _is_device(first) else NON_CACHEABLE
    device_first = _is_device(first)
    return (_forced_nibble((first >> 4) & 0xF, device_first) << 4) | _forced_nibble(first & 0xF, device_first)


@lean
def _combined_shareability(first: int, second: int) -> int:
    """Return the wider of two shareabilities."""
    if first == OUTER_SHAREABLE or second == OUTER_SHAREABLE:
        return OUTER_SHAREABLE
    return max(first, second)


@lean
def par_success(s: Any, second: Any, pa: int, leaf: int, leaf2: int) -> int:
    """Return PAR_EL1 of a translation that succeeded with these leaves (0: that stage is off), or one of the negative
    codes of this module.
    """
    if leaf == 0:
        attribute = WRITE_BACK if s.cacheable != 0 else 0
        field = NON_SHAREABLE
    else:
        attribute = (s.mair >> (8 * ((leaf >> 2) & 7))) & 0xFF
        field = (leaf >> 8) & 3
        if _reserved(attribute):
            return MAIR_RESERVED
    if field == RESERVED_SHAREABILITY:
        return SHAREABILITY_RESERVED
    if leaf2 != 0:
        field = effective_shareability(attribute, field)
        memattr = (leaf2 >> 2) & 0xF
        attribute = _combined_forced(attribute, memattr) if second.forced_type != 0 else _combined(attribute, memattr)
        if attribute < 0:
            return attribute
        if (leaf2 >> 8) & 3 == RESERVED_SHAREABILITY:
            return SHAREABILITY_RESERVED
        field = _combined_shareability(field, (leaf2 >> 8) & 3)
    field = effective_shareability(attribute, field)
    signed = (attribute ^ 0x80) - 0x80  # registers are int64 here
    return (signed << 56) | (pa & PAR_PA) | PAR_RES1 | PAR_NS | (field << 7)


@lean
def par_fault(status: int) -> int:
    """Return PAR_EL1 of a fault with the walk's *status*."""
    par = PAR_FAULT | PAR_RES1 | ((status & FSC_MASK) << 1)
    if status & STAGE2 != 0:
        par |= PAR_S
    if status & WALK != 0:
        par |= PAR_PTW
    return par
