"""What `at` refuses, by name, and what it makes of attributes that the golden cases do not have."""

from __future__ import annotations

import numpy as np
import pytest

from spepolicy.errors import ConfigurationError
from spepolicy.mmu import Memory, Region, Tables, at, kvm_vtcr
from spepolicy.mmu.tables import S1_LEAF, S2_LEAF

TCR = 16 | (1 << 7) | (16 << 16) | (2 << 30) | (5 << 32)
VA = -(1 << 30)
FWB = 1 << 46


def space(s1_leaf: int = S1_LEAF, s2_leaf: int = S2_LEAF, **registers: int) -> tuple[Memory, dict[str, int]]:
    """Return one page at VA, and registers that reach it."""
    memory = Memory()
    stage2 = Tables.stage2(memory, kvm_vtcr(40), Region(1 << 32, 1 << 33).take)
    stage2.map(0, 1 << 36, 1 << 30, S2_LEAF)
    stage1 = Tables.stage1(memory, TCR, Region(0x1000, 1 << 30).take, upper=True, through=stage2)
    stage1.map(VA, 1 << 30, 4096, s1_leaf)
    stage2.map(1 << 30, 1 << 35, 4096, s2_leaf)
    names = {
        "HCR_EL2": (1 << 31) | 1,
        "VTCR_EL2": kvm_vtcr(40),
        "VTTBR_EL2": stage2.root,
        "TCR_EL1": TCR,
        "TTBR0_EL1": 0,
        "TTBR1_EL1": stage1.root,
        "MAIR_EL1": 0x44_BB_04_FF,
        "SCTLR_EL1": 1,
        "PAN": 0,
    }
    return memory, names | registers


def par(memory: Memory, registers: dict[str, int], op: str = "S12E1R", va: int = VA) -> int:
    return int(at(op, np.array([va & (1 << 64) - 1], dtype=np.uint64), registers, memory)[0])


def test_the_page_is_there() -> None:
    assert par(*space()) & 0xFF00_FFFF_FFFF_F181 == 0xFF00_0008_0000_0180


@pytest.mark.parametrize(
    ("register", "bit", "name"),
    [
        ("HCR_EL2", 27, "TGE"),
        ("HCR_EL2", 32, "CD"),
        ("HCR_EL2", 43, "NV1"),
        ("VTCR_EL2", 32, "DS"),
        ("VTCR_EL2", 33, "SL2"),
        ("VTCR_EL2", 36, "S2PIE"),
        ("VTCR_EL2", 38, "D128"),
        ("TCR_EL1", 59, "DS"),
        ("TCR_EL1", 60, "MTX0"),
        ("PAN", 1, "bits 63:1"),
    ],
)
def test_a_bit_that_is_not_modelled_is_refused_by_name(register: str, bit: int, name: str) -> None:
    memory, registers = space()
    registers[register] |= 1 << bit
    with pytest.raises(ConfigurationError, match=rf"{register}\.{name}.*{registers[register]:#x}"):
        par(memory, registers)


def test_aarch32_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"HCR_EL2\.RW"):
        par(*space(HCR_EL2=1))


def test_a_reserved_granule_is_refused_only_where_a_walk_needs_it() -> None:
    memory, registers = space(TCR_EL1=TCR | 3 << 14)
    assert par(memory, registers) & 1 == 0  # TG0 is of the half that EPD0 closes
    assert par(memory, registers, va=0x1000) & 0x7F == 0x09
    registers["TCR_EL1"] = TCR & ~(3 << 30)
    with pytest.raises(ConfigurationError, match=r"TCR_EL1\.TG0 or TG1"):
        par(memory, registers)
    registers |= {"TCR_EL1": TCR, "VTCR_EL2": kvm_vtcr(40) | 3 << 14}
    with pytest.raises(ConfigurationError, match=r"VTCR_EL2\.TG0"):
        par(memory, registers)


@pytest.mark.parametrize(
    ("s1_leaf", "s2_leaf", "registers", "words"),
    [
        (S1_LEAF | 7 << 2, S2_LEAF, {"MAIR_EL1": 0xF0 << 56}, "MAIR_EL1"),
        (S1_LEAF & ~(3 << 8) | 1 << 8, S2_LEAF, {}, "SH of a leaf"),
        (S1_LEAF, S2_LEAF & ~(3 << 8) | 1 << 8, {}, "SH of a leaf"),
        (S1_LEAF, S2_LEAF & ~(3 << 2), {}, "MemAttr"),
        (S1_LEAF, S2_LEAF, {"HCR_EL2": 1 << 31 | 1 | FWB}, "MemAttr"),
    ],
)
def test_a_reserved_attribute_is_refused_only_where_a_leaf_has_it(
    s1_leaf: int, s2_leaf: int, registers: dict[str, int], words: str
) -> None:
    memory, names = space(s1_leaf, s2_leaf, **registers)
    with pytest.raises(ConfigurationError, match=words):
        par(memory, names)
    assert par(memory, names, va=VA + 4096) & 1 == 1


# FEAT_S2FWB: stage 1 attribute index (0 WB, 1 Device nGnRE, 2 WT, 3 NC), MemAttr, result.
@pytest.mark.parametrize(
    ("index", "memattr", "attribute"),
    [
        (0, 6, 0xFF),
        (1, 6, 0xFF),
        (2, 6, 0xFF),
        (3, 6, 0xFF),
        (0, 7, 0xFF),
        (1, 7, 0x04),
        (2, 7, 0xBB),
        (0, 5, 0x44),
        (1, 5, 0x04),
        (0, 1, 0x04),
        (1, 0, 0x00),
        (1, 3, 0x04),
    ],
)
def test_forced_write_back_overrides_stage_1(index: int, memattr: int, attribute: int) -> None:
    s2_leaf = S2_LEAF & ~(0xF << 2) | memattr << 2
    memory, registers = space(S1_LEAF | index << 2, s2_leaf, HCR_EL2=1 << 31 | 1 | FWB)
    # The guest's tables are behind S2_LEAF, whose MemAttr is only looked at for a result.
    assert par(memory, registers) >> 56 == attribute


def test_registers_and_operations_that_do_not_exist() -> None:
    memory, registers = space()
    with pytest.raises(ConfigurationError, match=r"'VTCR'.*Did you mean 'VTCR_EL2'"):
        par(memory, registers | {"VTCR": 0})
    del registers["PAN"]
    with pytest.raises(ConfigurationError, match="regs lacks PAN"):
        par(memory, registers)
    memory, registers = space()
    with pytest.raises(ConfigurationError, match="op 'S12E2R'"):
        par(memory, registers, op="S12E2R")


def test_enhanced_pan_counts_what_user_code_may_execute() -> None:
    executable = S1_LEAF & ~(1 << 54)
    memory, registers = space(executable, PAN=1, SCTLR_EL1=1 | 1 << 57)
    assert par(memory, registers, "S1E1RP") & 0x7F == 0x1F
    assert par(memory, registers, "S1E1R") & 1 == 0
    memory, registers = space(S1_LEAF, PAN=1, SCTLR_EL1=1 | 1 << 57)
    assert par(memory, registers, "S1E1RP") & 1 == 0


def test_e0pd_closes_a_half_to_user_code() -> None:
    memory, registers = space(S1_LEAF | 1 << 6, TCR_EL1=TCR | 1 << 56)
    assert par(memory, registers, "S1E0R") & 0x7F == 0x09
    assert par(memory, registers, "S1E1R") & 1 == 0


def test_pages_are_added_zeroed_and_once() -> None:
    memory = Memory()
    words = np.arange(512, dtype=np.uint64) * np.uint64(8)
    memory.add_pages(np.array([0x1000, 0x8000], dtype=np.uint64))
    for page in (0x1000, 0x8000):
        assert memory.has(page + 8)
        assert not memory.read(words + np.uint64(page)).any()
    assert not memory.has(0x2000)
    for addresses in ([0x2000, 0x1000], [0x2000, 0x3000], [0x1000, 0x2000, 0x3000]):
        with pytest.raises(ConfigurationError, match="0x2000 is in no page"):
            memory.read(np.array(addresses, dtype=np.uint64))
    with pytest.raises(ConfigurationError, match="0x2008 is in no page"):
        memory.write(np.array([0x1000, 0x2008, 0x3000], dtype=np.uint64), np.ones(3, dtype=np.uint64))
    for first in (0x1000, 0x8000):
        with pytest.raises(ConfigurationError, match=f"{first:#x} twice"):
            memory.add_pages(np.array([first], dtype=np.uint64))
    for wrong in (0x2800, 1 << 48, (1 << 48) + 0x1000):
        with pytest.raises(ConfigurationError, match="multiples of 4096"):
            memory.add_pages(np.array([wrong], dtype=np.uint64))
    assert memory.used == 2


def test_memory_refuses_pages_that_are_none() -> None:
    page = np.zeros((1, 512), dtype=np.uint64)
    for addresses, content, words in (
        ([0x800], page, "multiples of 4096"),
        ([1 << 48], page, "multiples of 4096"),
        ([0x1000, 0x1000], np.repeat(page, 2, axis=0), "twice"),
        ([0x1000, 0x2000], page, "shape"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            Memory.from_pages(np.array(addresses, dtype=np.uint64), content)
    with pytest.raises(ConfigurationError, match="zero_ranges"):
        Memory.from_pages(np.array([0x1000], dtype=np.uint64), page, [(8, 8)])
