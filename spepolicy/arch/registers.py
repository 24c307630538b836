"""Every SPE register, and the SPE fields of the registers that control it, as data; and the masks that compiled code
uses, taken from them.

Source: Arm ARM DDI 0487 M.a.a as restated in spe.md 1, field by field; a test compares the table with another one.
Registers of the PE that do more than SPE (HDFGRTR_EL2, MDCR_EL3, ID_AA64DFR0_EL1...) list their SPE fields only.
"""

from __future__ import annotations

import numpy as np

from spepolicy.arch.register import Encoding, Field, Register
from spepolicy.arch.versions import Feature

__all__ = ["BSC_FULL", "EC_STAGE1", "EC_STAGE2", "REGISTERS", "buffer_bytes", "max_buffer_size"]

F = Feature
_SPE = (F.SPE,)
_EXC = (F.EXC,)
_EFT = (F.EFT,)
_OPTIONAL_EVENT = (F.V1P4, F.EARLY_EVENTS)
_PREDICATE = (F.V1P1 | F.SVE, F.V1P1 | F.SME)
_OLD_IMPDEF = (F.IMPDEF_EVENTS | F.BEFORE_V1P4,)


def _fields(text: str, needs: tuple[Feature, ...] = _SPE, access: str = "RW") -> tuple[Field, ...]:
    """Read "NAME msb:lsb" or "NAME bit" entries, separated by commas."""
    fields = []
    for entry in text.split(","):
        name, bits = entry.split()
        msb, _, lsb = bits.partition(":")
        fields.append(Field(name, int(msb), int(lsb or msb), needs, access))
    return tuple(fields)


def _event_fields() -> tuple[Field, ...]:
    """The bits of PMSEVFR_EL1 and PMSNEVFR_EL1, from 63 down: which events an implementation can filter by."""
    needs: dict[int, tuple[Feature, ...]] = {
        1: (F.SPECULATIVE,), 6: (F.FNE,), 11: (F.V1P1,), 17: _PREDICATE, 18: _PREDICATE,
        24: (F.SPE_SME, *_OLD_IMPDEF), 25: (F.SPE_SME, F.V1P5, *_OLD_IMPDEF),
    }  # fmt: skip
    needs |= dict.fromkeys((3, 5, 7), _SPE) | dict.fromkeys((2, 4, 8, 9, 10), _OPTIONAL_EVENT)
    needs |= dict.fromkeys(range(19, 24), (F.V1P4,))
    needs |= dict.fromkeys((*range(12, 16), *range(48, 64)), (F.IMPDEF_EVENTS,))
    needs |= dict.fromkeys(range(26, 32), _OLD_IMPDEF)
    return tuple(Field(f"E{n}", n, n, needs[n]) for n in sorted(needs, reverse=True))


def _el1(crm: int, op2: int) -> Encoding:
    return (3, 0, 9, crm, op2)


# Fields of PMSCR_EL1 and PMSCR_EL2 that differ in their bits' names only. EE is 0b00 after reset at the highest EL.
_PMSCR = (
    Field("KE", 10, 10, _EXC),
    Field("PCT", 7, 6),
    Field("TS", 5, 5),
    Field("PA", 4, 4),
    Field("CX", 3, 3),
)
_PMBSR = _fields("MSS2 55:32, EC 31:26, DL 19, EA 18, S 17, COLL 16, MSS 15:0")
_FGT = (F.FGT,)
_WRITES = (
    "PMSLATFR_EL1 32, PMSIRR_EL1 31, PMSICR_EL1 29, PMSFCR_EL1 28, PMSEVFR_EL1 27, PMSCR_EL1 26, PMBSR_EL1 25, "
    "PMBPTR_EL1 24, PMBLIMITR_EL1 23"
)
_FGT2 = (*_fields("nPMBMAR_EL1 24", (F.NVM,)), *_fields("nPMSDSFR_EL1 19", (F.FDS,)))

_TABLE = (
    Register(
        "PMSCR_EL1", _el1(9, 0),
        (Field("EnVM", 11, 11, (F.NVM | F.NV,)), _PMSCR[0],
         Field("EE", 9, 8, _EXC, reset=0, reset_unless=F.EL2 | F.EL3), *_PMSCR[1:], *_fields("E1SPE 1, E0SPE 0")),
        vncr=0x828,
    ),
    Register(
        "PMSCR_EL2", (3, 4, 9, 9, 0),
        (Field("EnVM", 11, 11, (F.NVM,)), _PMSCR[0], Field("EE", 9, 8, _EXC, reset=0, reset_unless=F.EL3),
         *_PMSCR[1:], *_fields("E2SPE 1, E0HSPE 0")),
    ),
    Register("PMSICR_EL1", _el1(9, 2), (Field("ECOUNT", 63, 56, (F.ERND,)), Field("COUNT", 31, 0)), vncr=0x838),
    Register("PMSIRR_EL1", _el1(9, 3), _fields("INTERVAL 31:8, RND 0"), vncr=0x840),
    Register(
        "PMSFCR_EL1", _el1(9, 4),
        (*_fields("SIMDm 52, FPm 51, STm 50, LDm 49, Bm 48, SIMD 20, FP 19", _EFT), *_fields("ST 18, LD 17, B 16"),
         Field("FDS", 4, 4, (F.FDS,)), Field("FnE", 3, 3, (F.FNE,)), *_fields("FL 2, FT 1, FE 0")),
    ),
    Register("PMSEVFR_EL1", _el1(9, 5), _event_fields(), vncr=0x830),
    Register("PMSNEVFR_EL1", _el1(9, 1), _event_fields(), F.FNE, vncr=0x850),
    Register("PMSLATFR_EL1", _el1(9, 6), _fields("MINLAT 15:0"), vncr=0x848),
    Register("PMSDSFR_EL1", _el1(10, 4), _fields("S 63:0", (F.FDS,)), F.FDS, vncr=0x858),
    Register(
        "PMSIDR_EL1", _el1(9, 7),
        (*_fields("SME 32", (F.SPE_SME,), "RO"), *_fields("ALTCLK 31:28", (F.ALTCLK,), "RO"),
         *_fields("FPF 27", (F.FPF,), "RO"), *_fields("EFT 26", _EFT, "RO"), *_fields("CRR 25", (F.CRR,), "RO"),
         *_fields("PBT 24", (F.PBT,), "RO"),
         *_fields("Format 23:20, CountSize 19:16, MaxSize 15:12, Interval 11:8", access="RO"),
         *_fields("FDS 7", (F.FDS,), "RO"), *_fields("FnE 6", (F.FNE,), "RO"), *_fields("ERnd 5", (F.ERND,), "RO"),
         *_fields("LDS 4", (F.LDS,), "RO"), *_fields("ArchInst 3", (F.ARCH_INST,), "RO"),
         *_fields("FL 2, FT 1, FE 0", access="RO")),
    ),
    Register(
        "PMBLIMITR_EL1", _el1(10, 0),
        (Field("LIMIT", 63, 12), Field("nVM", 7, 7, (F.NVM,)), Field("PMFZ", 5, 5, (F.V1P2,)), Field("FM", 2, 1),
         Field("E", 0, 0, reset=0)),
        vncr=0x800,
    ),
    Register("PMBPTR_EL1", _el1(10, 1), _fields("PTR 63:0"), vncr=0x810),
    Register("PMBSR_EL1", _el1(10, 3), _PMBSR, vncr=0x820),
    Register("PMBSR_EL2", (3, 4, 9, 10, 3), _PMBSR, F.EXC),
    Register("PMBSR_EL3", (3, 6, 9, 10, 3), _PMBSR, F.EXC | F.EL3),
    Register("PMBMAR_EL1", _el1(10, 5), _fields("SH 9:8, Attr 7:0", (F.NVM,)), F.NVM),
    Register(
        "PMBIDR_EL1", _el1(10, 7),
        (*_fields("MaxBuffSize 47:32, EA 11:8", access="RO"), *_fields("AddrMode 7:6", (F.NVM,), "RO"),
         *_fields("F 5, P 4, Align 3:0", access="RO")),
    ),
    Register("MDCR_EL2", (3, 4, 1, 1, 1), (Field("HPMFZS", 36, 36, (F.V1P2,)), *_fields("TPMS 14, E2PB 13:12"))),
    Register(
        "MDCR_EL3", (3, 6, 1, 3, 1),
        (*_fields("EnPMS4 55", (F.NVM,)), Field("PMSEE", 52, 51, _EXC, reset=0), *_fields("EnPMS3 42", (F.FDS,)),
         *_fields("EnPMSN 36", (F.FNE,)), *_fields("NSPB 13:12"), *_fields("NSPBE 11", (F.RME,))),
        F.EL3,
    ),
    Register("ID_AA64DFR0_EL1", (3, 0, 0, 5, 0), _fields("PMSVer 35:32", access="RO")),
    Register("ID_AA64DFR1_EL1", (3, 0, 0, 5, 1), _fields("DPFZS 55:52", (F.DPFZS,), "RO")),
    Register("ID_AA64DFR2_EL1", (3, 0, 0, 5, 2),
             (*_fields("SPE_nVM 23:20", (F.NVM,), "RO"), *_fields("SPE_EXC 19:16", _EXC, "RO"))),
    Register("HDFGRTR_EL2", (3, 4, 3, 1, 4),
             (*_fields("PMBIDR_EL1 63", _FGT), *_fields("nPMSNEVFR_EL1 62", (F.FGT | F.FNE,)),
              *_fields(_WRITES.replace("PMSICR_EL1 29", "PMSIDR_EL1 30, PMSICR_EL1 29"), _FGT)), F.FGT),
    Register("HDFGWTR_EL2", (3, 4, 3, 1, 5),
             (*_fields("nPMSNEVFR_EL1 62", (F.FGT | F.FNE,)), *_fields(_WRITES, _FGT)), F.FGT),
    Register("HDFGRTR2_EL2", (3, 4, 3, 1, 0), _FGT2, F.FGT2),
    Register("HDFGWTR2_EL2", (3, 4, 3, 1, 1), _FGT2, F.FGT2),
    Register("HFGITR_EL2", (3, 4, 1, 1, 6), _fields("PSBCSYNC 63", (F.V1P5,)), F.FGT),
)  # fmt: skip

REGISTERS: dict[str, Register] = {register.name: register for register in _TABLE}


def buffer_bytes(max_buffer_size: int) -> int:
    """Return the bytes that PMBIDR_EL1.MaxBuffSize stands for; 0, which hardware has, is no limit (spe.md 1.9)."""
    exponent, mantissa = max_buffer_size >> 9, max_buffer_size & 0x1FF
    return mantissa << 12 if exponent == 0 else (0x200 + mantissa) << (exponent + 11)


def max_buffer_size(limit_bytes: int) -> int:
    """Return the largest PMBIDR_EL1.MaxBuffSize that promises no more than *limit_bytes*, 4 KiB at least."""
    fitting = [code for code in range(1, 1 << 14) if buffer_bytes(code) <= limit_bytes]
    if not fitting:
        raise ValueError(f"no MaxBuffSize is as small as {limit_bytes} bytes; the smallest is 4096")
    return max(fitting, key=buffer_bytes)


def _bit(register: str, name: str) -> int:
    return REGISTERS[register].mask(name)


def _shift(register: str, name: str) -> int:
    return REGISTERS[register].field(name).lsb


def _signed(mask: int) -> int:
    """The machine's registers are int64."""
    return int(np.uint64(mask).astype(np.int64))


# ---- for compiled code: int64 masks and shifts -----------------------------------------------------------------------

PMSCR_E0SPE = _bit("PMSCR_EL1", "E0SPE")
PMSCR_E1SPE = _bit("PMSCR_EL1", "E1SPE")

PMSFCR_FE = _bit("PMSFCR_EL1", "FE")
PMSFCR_FT = _bit("PMSFCR_EL1", "FT")
PMSFCR_FL = _bit("PMSFCR_EL1", "FL")
PMSFCR_FNE = _bit("PMSFCR_EL1", "FnE")
PMSFCR_FDS = _bit("PMSFCR_EL1", "FDS")
PMSFCR_TYPE_SHIFT = _shift("PMSFCR_EL1", "B")  # B, LD, ST, FP, SIMD: the order of machine.scenario.OpType
PMSFCR_MASK_SHIFT = _shift("PMSFCR_EL1", "Bm")  # the same

PMSIRR_RND = _bit("PMSIRR_EL1", "RND")
PMSIRR_INTERVAL = _bit("PMSIRR_EL1", "INTERVAL")  # without its low byte: the interval in operations

PMBLIMITR_E = _bit("PMBLIMITR_EL1", "E")
PMBLIMITR_FM = _bit("PMBLIMITR_EL1", "FM")
PMBLIMITR_NVM = _bit("PMBLIMITR_EL1", "nVM")
PMBLIMITR_DISCARD = REGISTERS["PMBLIMITR_EL1"].pack(FM=2)
PMBLIMITR_LIMIT = _signed(_bit("PMBLIMITR_EL1", "LIMIT"))

PMBSR_S = _bit("PMBSR_EL1", "S")
PMBSR_COLL = _bit("PMBSR_EL1", "COLL")
PMBSR_EA = _bit("PMBSR_EL1", "EA")
PMBSR_DL = _bit("PMBSR_EL1", "DL")
PMBSR_EC_SHIFT = _shift("PMBSR_EL1", "EC")
PMBSR_EC_MASK = _bit("PMBSR_EL1", "EC")
PMBSR_MSS = _bit("PMBSR_EL1", "MSS")

# PMBSR_EL1.EC (spe.md 1.8)
EC_OTHER = 0x00
EC_IMPDEF = 0x1F
EC_STAGE1 = 0x24
EC_STAGE2 = 0x25
# BSC, for EC_OTHER
BSC_NOT_ALLOWED = 0x00
BSC_FULL = 0x01
BSC_TOO_LARGE = 0x04

# Fault status codes, FSC (spe.md 1.8): kind in the upper bits, level in the low two
FSC_ADDRESS_SIZE = 0x00
FSC_TRANSLATION = 0x04
FSC_ACCESS_FLAG = 0x08
FSC_PERMISSION = 0x0C
FSC_EXTERNAL_ABORT = 0x10
FSC_EXTERNAL_ABORT_ASYNC = 0x11
FSC_EXTERNAL_ABORT_WALK = 0x14
