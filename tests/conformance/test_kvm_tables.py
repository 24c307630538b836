"""Translation tables of a real Linux guest under a real KVM: the walker against the emulator that they ran in."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not
from golden import DATA, SHARED

from spepolicy.errors import ConfigurationError
from spepolicy.mmu import Memory, at

TABLES = SHARED / "kvm_real" / "tables"
COPIES = {path.stem.removeprefix("kvm_tables_"): path for path in sorted(DATA.glob("kvm_tables_*.npz"))}
ORIGINALS = {path.stem.removeprefix("s2_4k_"): path for path in sorted(TABLES.glob("s2_4k_*_EL[01].npz"))}

PAGE = np.uint64(0x0000_FFFF_FFFF_F000)
OFFSET = np.uint64(0xFFF)

needs_tables = pytest.mark.skipif(not TABLES.is_dir(), reason="the snapshots (shared/data/kvm_real) are not here")


def snapshot(path: Path) -> tuple[dict[str, int], Memory, dict[str, NDArray[Any]]]:
    """Return all registers, the memory, and the arrays of a snapshot."""
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    registers = dict(zip(arrays["reg_names"].tolist(), arrays["reg_values"].tolist(), strict=True))
    return registers, Memory.from_pages(arrays["page_addrs"], arrays["page_data"]), arrays


def guest_registers(registers: dict[str, int]) -> dict[str, int]:
    """Return the registers of the EL1&0 regime."""
    names = ("HCR_EL2", "VTCR_EL2", "VTTBR_EL2", "TCR_EL1", "TTBR0_EL1", "TTBR1_EL1", "MAIR_EL1")
    return {name: registers[name] for name in names} | {
        "SCTLR_EL1": registers["SCTLR"],
        "PAN": (registers["cpsr"] >> 22) & 1,
    }


def load(registers: dict[str, int], regs: dict[str, int], memory: Memory, va: Any) -> tuple[Any, Any]:
    """Translate as a load does at the exception level of the snapshot. Return (succeeds, PAR_EL1)."""
    if registers["EL"] == 0:
        par = at("S12E0R", va, regs, memory)
        return par & np.uint64(1) == 0, par
    # There is no AT that does both stages and honours PAN: stage 1 with it, then both without.
    with_pan = at("S1E1RP", va, regs, memory)
    par = at("S12E1R", va, regs, memory)
    return (with_pan | par) & np.uint64(1) == 0, par


def check(path: Path) -> None:
    registers, memory, arrays = snapshot(path)
    assert len(arrays["va"]) > 1000
    assert 0 < np.count_nonzero(arrays["expected_ok"]) < len(arrays["va"])
    succeeds, par = load(registers, guest_registers(registers), memory, arrays["va"])
    np.testing.assert_array_equal(succeeds, arrays["expected_ok"])
    np.testing.assert_array_equal((par & PAGE | arrays["va"] & OFFSET)[succeeds], arrays["expected_pa"][succeeds])


@pytest.mark.parametrize("name", COPIES)
def test_every_sampled_address_of_a_copy_translates_as_recorded(name: str) -> None:
    check(COPIES[name])


@needs_tables
@pytest.mark.parametrize("name", ORIGINALS)
def test_every_sampled_address_translates_as_recorded(name: str) -> None:
    check(ORIGINALS[name])


def test_copies_exist() -> None:
    assert COPIES


@needs_tables
def test_the_host_translates_as_recorded() -> None:
    """The VHE host's EL2&0 regime has the format of EL1&0 without stage 2: its registers in the place of EL1's."""
    registers, memory, arrays = snapshot(TABLES / "s2_4k_base_EL2.npz")
    regs = {f"{name}_EL1": registers[f"{name}_EL2"] for name in ("TCR", "TTBR0", "TTBR1", "MAIR", "SCTLR")}
    regs |= {"HCR_EL2": 1 << 31, "VTCR_EL2": 0, "VTTBR_EL2": 0, "PAN": (registers["cpsr"] >> 22) & 1}
    par = at("S1E1RP", arrays["va"], regs, memory)
    succeeds = par & np.uint64(1) == 0
    np.testing.assert_array_equal(succeeds, arrays["expected_ok"])
    np.testing.assert_array_equal((par & PAGE | arrays["va"] & OFFSET)[succeeds], arrays["expected_pa"][succeeds])


@needs_tables
def test_the_regime_of_the_host_itself_is_refused() -> None:
    registers, memory, arrays = snapshot(TABLES / "s2_4k_base_EL2.npz")
    with pytest.raises(ConfigurationError, match=r"HCR_EL2\.TGE"):
        at("S1E1R", arrays["va"], guest_registers(registers), memory)


def test_swapped_pages_fault_at_stage_2_where_the_guest_maps_them() -> None:
    """A page that the host took away is a stage 2 translation fault for EL1, whatever stage 1 says of EL0."""
    registers, memory, arrays = snapshot(COPIES["swapped_EL0"])
    regs = guest_registers(registers)
    par = at("S12E1R", arrays["va"], regs, memory)
    stage2 = (par & np.uint64(0x201) == 0x201) & ~arrays["expected_ok"]
    assert np.count_nonzero(stage2) > 50
    assert set(((par[stage2] >> np.uint64(1)) & np.uint64(0x3C)).tolist()) == {0x04}
