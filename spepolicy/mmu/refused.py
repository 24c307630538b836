"""What the walker does not model: register bits and encodings that it refuses, by name."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import ConfigurationError

Words = NDArray[np.uint64]

# Register -> (lowest bit, number of bits, name, what it would mean).
_REFUSED: dict[str, tuple[tuple[int, int, str, str], ...]] = {
    "HCR_EL2": (
        (27, 1, "TGE", "EL0 in the EL2&0 regime"),
        (32, 1, "CD", "stage 2 without caches"),
        (43, 1, "NV1", "nested virtualization, another meaning of AP and UXN"),
    ),
    "VTCR_EL2": (
        (32, 1, "DS", "FEAT_LPA2, 52-bit addresses"),
        (33, 1, "SL2", "FEAT_LPA2, start level -1"),
        (34, 1, "AssuredOnly", "FEAT_THE"),
        (35, 1, "TL1", "FEAT_THE"),
        (36, 1, "S2PIE", "FEAT_S2PIE, indirect permissions"),
        (37, 1, "S2POE", "FEAT_S2POE, permission overlays"),
        (38, 1, "D128", "FEAT_D128, 128-bit descriptors"),
        (39, 25, "bits 63:39", "features after Armv9.4"),
    ),
    "TCR_EL1": (
        (59, 1, "DS", "FEAT_LPA2, 52-bit addresses"),
        (60, 1, "MTX0", "FEAT_MTE_NO_ADDRESS_TAGS"),
        (61, 1, "MTX1", "FEAT_MTE_NO_ADDRESS_TAGS"),
        (62, 2, "bits 63:62", "no feature known"),
    ),
    "SCTLR_EL1": (),
    "VTTBR_EL2": (),
    "TTBR0_EL1": (),
    "TTBR1_EL1": (),
    "MAIR_EL1": (),
    "PAN": ((1, 63, "bits 63:1", "PAN is 0 or 1"),),
}

REGISTERS = tuple(_REFUSED)

_ENCODINGS = {
    "granule1": "TCR_EL1.TG0 or TG1 has a reserved encoding. Rule: TG0 is 0 (4 KiB), 1 (64 KiB) or 2 (16 KiB), "
    "TG1 is 1 (16 KiB), 2 (4 KiB) or 3 (64 KiB). Remedy: set one of these, or close that half with EPD",
    "granule2": "VTCR_EL2.TG0 has the reserved encoding 3. Rule: 0 (4 KiB), 1 (64 KiB) or 2 (16 KiB)",
    "mair": "the byte of MAIR_EL1 that the descriptor's AttrIndx selects is reserved, or needs FEAT_XS or FEAT_MTE2. "
    "Rule: 0b0000dd00 for Device, else both halves are not 0",
    "memattr": "MemAttr of the stage 2 leaf is reserved. Rule: MemAttr[1:0] is not 0 for Normal memory; with "
    "HCR_EL2.FWB, MemAttr is below 8 and not 4",
    "shareability": "SH of a leaf is 1, which is reserved. Rule: 0 (non-), 2 (outer) or 3 (inner shareable)",
}


def check_registers(registers: Mapping[str, Words]) -> None:
    """Refuse bits of *registers* (name -> uint64[s]) that the walker does not model, and AArch32.

    Raise ConfigurationError that names the bit.
    """
    for name, fields in _REFUSED.items():
        values = registers[name]
        for low, count, bit, meaning in fields:
            mask = np.uint64(((1 << count) - 1) << low)
            _refuse(name, bit if count > 1 else f"{bit} (bit {low})", values[(values & mask) != 0], meaning)
    hcr = registers["HCR_EL2"]
    bad = hcr[(hcr >> np.uint64(31)) & np.uint64(1) == 0]
    if len(bad):
        raise ConfigurationError(
            f"HCR_EL2.RW (bit 31) is 0 in {int(bad[0]):#x}: EL1 would be AArch32, whose translation is not modelled. "
            "Remedy: set bit 31."
        )


def _refuse(register: str, bit: str, values: Words, meaning: str) -> None:
    if len(values):
        raise ConfigurationError(
            f"{register}.{bit} is set in {int(values[0]):#x}: {meaning} is not modelled. Rule: the walker has the "
            "features of an Armv8.2 core with 48-bit addresses. Remedy: clear it."
        )


def encoding_error(kind: str, index: int, va: int) -> ConfigurationError:
    """Return the error for query *index* at *va* that needs an encoding which is not modelled."""
    return ConfigurationError(f"query {index}, VA {va:#x}: {_ENCODINGS[kind]}.")
