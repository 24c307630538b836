"""Fields of the SPE registers that the machine uses, as int64 masks and shifts (Arm ARM DDI 0487 M.a.a, spe.md section
1).
"""

from __future__ import annotations

# PMSCR_EL1 (spe.md 1.2)
PMSCR_E0SPE = 1 << 0
PMSCR_E1SPE = 1 << 1

# PMSFCR_EL1 (spe.md 1.4)
PMSFCR_FE = 1 << 0
PMSFCR_FT = 1 << 1
PMSFCR_FL = 1 << 2
PMSFCR_TYPE_SHIFT = 16  # B 16, LD 17, ST 18: the order of machine.scenario.OpType

# PMSIRR_EL1 (spe.md 1.4): INTERVAL in bits 31:8, so the register without its low byte is the interval in operations
PMSIRR_RND = 1 << 0
PMSIRR_INTERVAL = 0xFFFF_FF00

# PMBLIMITR_EL1 (spe.md 1.6)
PMBLIMITR_E = 1 << 0
PMBLIMITR_LIMIT = ~0xFFF

# PMBSR_EL1 (spe.md 1.8)
PMBSR_S = 1 << 17
PMBSR_COLL = 1 << 16
PMBSR_EA = 1 << 18
PMBSR_DL = 1 << 19
PMBSR_EC_SHIFT = 26
PMBSR_EC_MASK = 0x3F << PMBSR_EC_SHIFT
PMBSR_MSS = 0xFFFF
EC_OTHER = 0x00
EC_IMPDEF = 0x1F
EC_STAGE1 = 0x24
EC_STAGE2 = 0x25
BSC_FULL = 0x01

# Fault status codes, FSC (spe.md 1.8): kind in the upper bits, level in the low two
FSC_ADDRESS_SIZE = 0x00
FSC_TRANSLATION = 0x04
FSC_ACCESS_FLAG = 0x08
FSC_PERMISSION = 0x0C
FSC_EXTERNAL_ABORT = 0x10
FSC_EXTERNAL_ABORT_WALK = 0x14
