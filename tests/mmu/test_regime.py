"""What the translation registers say, field by field (mmu.md 1 and 2; Arm ARM, TCR_EL1, VTCR_EL2, HCR_EL2)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from ..machine.interpreted import module

GRANULES = {0: {0: 12, 1: 16, 2: 14, 3: 0}, 1: {0: 0, 1: 14, 2: 12, 3: 16}}  # TG0 and TG1 by half: address bits, 0 none
HALVES = (0, 1)
M, EE, EPAN = 1 << 0, 1 << 25, 1 << 57  # SCTLR_EL1
VM, PTW, DC, FWB = 1 << 0, 1 << 2, 1 << 12, 1 << 46  # HCR_EL2


def row() -> Any:
    return module("jit").row(np.zeros(1, dtype=module("mmu.regime").STAGE), 0)


def stage1(half: int, tcr: int, *, ttbr: int = 0, sctlr: int = M, hcr: int = 0, updates: int = 1) -> Any:
    s = row()
    module("mmu.regime").set_stage1(s, half, ttbr, tcr, 0xFF, sctlr, hcr, updates)
    return s


def stage2(vtcr: int, *, vttbr: int = 0, hcr: int = VM, updates: int = 1) -> Any:
    s = row()
    module("mmu.regime").set_stage2(s, vttbr, vtcr, hcr, updates)
    return s


def tcr_of(half: int, size: int = 16, granule: int = 12, **fields: int) -> int:
    """TCR_EL1 whose other half says something else, so that a field of the wrong half shows."""
    other = 1 - half
    code = next(field for field, bits in GRANULES[half].items() if bits == granule)
    wrong = next(field for field, bits in GRANULES[other].items() if bits not in (granule, 0))
    word = size << 16 * half | 33 << 16 * other | code << 14 + 16 * half | wrong << 14 + 16 * other
    for name, value in fields.items():
        base = {"epd": 7, "tbi": 37, "hpd": 41, "e0pd": 55}[name]
        step = 16 if name == "epd" else 1
        word |= value << base + step * half | (1 - value) << base + step * other
    return word


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("granule", [12, 14, 16])
@pytest.mark.parametrize("size", [15, 16, 17, 25, 31, 39, 40, 63])
def test_the_input_size_and_the_first_lookup_of_stage_1(half: int, granule: int, size: int) -> None:
    """TxSZ of 16 to 39; anything else closes the half. The first level is the lowest that resolves all bits."""
    s = stage1(half, tcr_of(half, size, granule))
    allowed = 16 <= size <= 39
    assert int(s.closed) == int(not allowed)
    bits = 64 - size if allowed else 48
    stride = granule - 3
    levels = -(-(bits - granule) // stride)
    assert (int(s.input_bits), int(s.start), int(s.stride)) == (bits, 4 - levels, stride)
    assert int(s.start_shift) == granule + stride * (levels - 1)
    assert int(s.index_mask) == (1 << stride) - 1
    assert int(s.output_mask) == (1 << 48) - (1 << granule)
    assert int(s.blocks) == (0b110 if granule == 12 else 0b100), "1 GiB and 2 MiB, or 32 MiB, or 512 MiB"
    assert int(s.reserved) == 0
    table = 8 << max(bits - int(s.start_shift), 0)
    full = stage1(half, tcr_of(half, size, granule), ttbr=(1 << 48) - 1)
    assert int(full.base) == (1 << 48) - table, "aligned to its size: lower bits are ignored"


@pytest.mark.parametrize("half", HALVES)
def test_a_reserved_granule_is_not_modelled(half: int) -> None:
    code = 3 if half == 0 else 0
    assert int(stage1(half, 16 << 16 * half | code << 14 + 16 * half).reserved) == 1
    assert int(stage2(25 | 3 << 14).reserved) == 1


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["epd", "tbi", "hpd", "e0pd"])
@pytest.mark.parametrize("value", [0, 1])
def test_each_bit_counts_for_its_half(half: int, name: str, value: int) -> None:
    """EPD0/1 [7, 23], TBI0/1 [37, 38], HPD0/1 [41, 42], E0PD0/1 [55, 56]."""
    s = stage1(half, tcr_of(half, **{name: value}))
    field = {"epd": "closed", "tbi": "ignore_top", "hpd": "inherit", "e0pd": "no_user"}[name]
    assert int(getattr(s, field)) == (1 - value if name == "hpd" else value)


@pytest.mark.parametrize("updates", [0, 1])
@pytest.mark.parametrize("bits", range(4))
def test_hardware_updates_need_ha_and_hd_and_an_agent_that_makes_them(bits: int, updates: int) -> None:
    """TCR_EL1.HA [39], HD [40]; VTCR_EL2.HA [21], HD [22]. HD counts with HA only."""
    ha, hd = bits & 1, bits >> 1
    first = stage1(1, tcr_of(1) | ha << 39 | hd << 40, updates=updates)
    second = stage2(25 | 1 << 6 | ha << 21 | hd << 22, updates=updates)
    for s in (first, second):
        assert (int(s.hardware_af), int(s.hardware_dirty)) == (ha & updates, ha & hd & updates)


@pytest.mark.parametrize("field", range(8))
def test_the_output_size_is_at_most_what_is_implemented(field: int) -> None:
    """IPS [34:32] and PS [18:16]: 32, 36, 40, 42, 44, 48 bits; more is taken as 48."""
    bits = (32, 36, 40, 42, 44, 48, 48, 48)[field]
    for s in (stage1(1, tcr_of(1) | field << 32), stage2(25 | 1 << 6 | field << 16)):
        assert int(s.output_bits) == bits
        assert int(s.oversize) == int(s.output_mask) & ~((1 << bits) - 1)


@pytest.mark.parametrize("hcr", [0, VM, DC, VM | DC, VM | PTW, VM | FWB])
@pytest.mark.parametrize("sctlr", [0, M, M | EE, M | EPAN])
def test_which_stages_translate(hcr: int, sctlr: int) -> None:
    """HCR_EL2.DC makes stage 1 off and cacheable, and stage 2 on, as VM does."""
    first, second = stage1(1, tcr_of(1), sctlr=sctlr, hcr=hcr), stage2(25 | 1 << 6, hcr=hcr)
    assert int(first.on) == int(bool(sctlr & M) and not hcr & DC)
    assert int(first.cacheable) == int(bool(hcr & DC))
    assert (int(first.big_endian), int(first.enhanced_pan)) == (int(bool(sctlr & EE)), int(bool(sctlr & EPAN)))
    assert int(second.on) == int(bool(hcr & (VM | DC)))
    assert (int(second.no_device_walk), int(second.forced_type)) == (int(bool(hcr & PTW)), int(bool(hcr & FWB)))


@pytest.mark.parametrize(("code", "granule"), [(0, 12), (1, 16), (2, 14)])
@pytest.mark.parametrize("sl0", range(4))
def test_stage_2_is_closed_unless_its_start_level_fits_its_size(code: int, granule: int, sl0: int) -> None:
    """The first lookup resolves a bit at least, and at most a level and four bits of concatenated tables."""
    level = -1 if sl0 == 3 else 2 - sl0 if granule == 12 else 3 - sl0
    stride = granule - 3
    covered = granule + (3 - level) * stride  # bits below the first index
    for size in range(14, 42):
        s, bits = stage2(size | sl0 << 6 | code << 14), 64 - size
        fits = level >= 0 and 16 <= size <= 39 and covered < bits <= covered + stride + 4
        assert int(s.closed) == int(not fits), size
        if fits:
            assert (int(s.start), int(s.input_bits), int(s.start_shift)) == (level, bits, covered), size
