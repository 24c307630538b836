"""Memory attributes of a translation, where no golden answer is looked at alone."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tests.machine.interpreted import module


@pytest.mark.parametrize(("cacheable", "attribute", "shareability"), [(0, 0x00, 0b10), (1, 0xFF, 0b00)])
def test_par_el1_with_stage_1_off(cacheable: int, attribute: int, shareability: int) -> None:
    """Device-nGnRnE, which is outer shareable; or with HCR_EL2.DC Normal write-back, not shareable."""
    stage1 = SimpleNamespace(cacheable=cacheable, mair=0x44)
    par = module("mmu.attributes").par_success(stage1, SimpleNamespace(forced_type=0), 0x12_3000, 0, 0)
    assert (par >> 56) & 0xFF == attribute
    assert (par >> 7) & 3 == shareability
    assert par & 0xF_FFFF_F000 == 0x12_3000
    assert par & 1 == 0
