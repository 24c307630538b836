"""The register table against an independent one, and pack, unpack, read and write by their laws."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spepolicy.arch.register import Register, RegisterError
from spepolicy.arch.registers import REGISTERS, buffer_bytes, max_buffer_size
from spepolicy.arch.versions import OPTIONAL, VERSIONS, Feature, features_of

TABLE: dict[str, dict[str, Any]] = json.loads(
    (Path(__file__).resolve().parents[1] / "data" / "spe_registers.json").read_text()
)
WORD = st.integers(0, 2**64 - 1)
F = Feature
# How the independent table names features, and what has to be there.
NAMES: dict[str, tuple[Feature, ...]] = {
    "-": (F(0),), "FEAT_SPE": (F.SPE,), "FEAT_SPE_EXC": (F.EXC,), "FEAT_SPE_EXC & EL3": (F.EXC | F.EL3,),
    "FEAT_SPE_nVM": (F.NVM,), "FEAT_SPE_nVM & FEAT_NV": (F.NVM | F.NV,), "FEAT_SPE_ERnd": (F.ERND,),
    "FEAT_SPE_EFT": (F.EFT,), "FEAT_SPE_FDS": (F.FDS,), "FEAT_SPE_FDS (SPEv1p4)": (F.FDS,),
    "FEAT_SPE_FnE": (F.FNE,), "FEAT_SPE_FnE (SPEv1p2)": (F.FNE,), "FEAT_SPEv1p1": (F.V1P1,),
    "FEAT_SPEv1p2": (F.V1P2,), "FEAT_SPEv1p4": (F.V1P4,), "FEAT_SPEv1p5": (F.V1P5,), "FEAT_SPE_SME": (F.SPE_SME,),
    "FEAT_SPE_ALTCLK": (F.ALTCLK,), "FEAT_SPE_FPF": (F.FPF,), "FEAT_SPE_CRR (SPEv1p4)": (F.CRR,),
    "FEAT_SPE_PBT (SPEv1p2)": (F.PBT,), "FEAT_SPE_LDS": (F.LDS,), "FEAT_SPE_ArchInst": (F.ARCH_INST,),
    "FEAT_SPE_DPFZS": (F.DPFZS,), "FEAT_RME": (F.RME,), "FEAT_FGT": (F.FGT,), "FEAT_FGT2": (F.FGT2,),
    "if speculative ops sampled": (F.SPECULATIVE,), "FEAT_SPEv1p4 or optional": (F.V1P4, F.EARLY_EVENTS),
    "IMPDEF": (F.IMPDEF_EVENTS,), "IMPDEF (<v1p4)": (F.IMPDEF_EVENTS | F.BEFORE_V1P4,),
    "FEAT_SPEv1p1 & (SVE|SME)": (F.V1P1 | F.SVE, F.V1P1 | F.SME),
    "FEAT_SPE_SME (else IMPDEF before v1p4)": (F.SPE_SME, F.IMPDEF_EVENTS | F.BEFORE_V1P4),
    "FEAT_SPE_SME/SPEv1p5 (else IMPDEF before v1p4)": (F.SPE_SME, F.V1P5, F.IMPDEF_EVENTS | F.BEFORE_V1P4),
}  # fmt: skip
# The independent table has FEAT_FGT alone; the trap exists with the register that it traps (Arm ARM, HDFGRTR_EL2).
NARROWED = {("HDFGRTR_EL2", "nPMSNEVFR_EL1"): (F.FGT | F.FNE,), ("HDFGWTR_EL2", "nPMSNEVFR_EL1"): (F.FGT | F.FNE,)}
# Event 16 was FEAT_TME's, which is withdrawn: it reads as 0 (spe.md 4.3).
WITHDRAWN = {("PMSEVFR_EL1", "E16"), ("PMSNEVFR_EL1", "E16")}

every_register = pytest.mark.parametrize("name", REGISTERS)
registers = st.sampled_from(list(REGISTERS.values()))


def implementations() -> list[Feature]:
    """Every version, with nothing optional and with all that it may have."""
    found = []
    for version in VERSIONS:
        names = [name for name, option in OPTIONAL.items() if option.since <= version]
        found += [features_of(version), features_of(version, names, F.SVE | F.SME | F.RME | F.NV | F.FGT | F.FGT2)]
    return found


def test_the_table_has_the_registers_of_the_independent_one() -> None:
    assert REGISTERS.keys() == TABLE.keys()


@every_register
def test_fields_are_those_of_the_independent_table(name: str) -> None:
    ours, theirs = REGISTERS[name], TABLE[name]
    assert list(ours.encoding) == theirs["encoding"]
    assert ours.vncr == theirs["vncr"]
    expected = {
        field: (msb, lsb, access)
        for field, (msb, lsb, _, access, _) in theirs["fields"].items()
        if (name, field) not in WITHDRAWN
    }
    assert {f.name: (f.msb, f.lsb, f.access) for f in ours} == expected


@every_register
@pytest.mark.parametrize("features", implementations(), ids=lambda f: str(len(f)))
def test_a_field_exists_exactly_where_the_independent_table_says_so(name: str, features: Feature) -> None:
    theirs = TABLE[name]
    whole = any(needed & features == needed for needed in NAMES[theirs["feature"]])
    for field, (msb, lsb, feature, _, _) in theirs["fields"].items():
        if (name, field) in WITHDRAWN:
            continue
        needs = NARROWED.get((name, field), NAMES[feature])
        exists = whole and any(needed & features == needed for needed in needs)
        mask = (1 << msb + 1) - (1 << lsb)
        assert bool(REGISTERS[name].existing(features) & mask) == exists, field


@every_register
def test_reset_values_are_those_of_the_independent_table(name: str) -> None:
    """Only PMBLIMITR_EL1.E has one in a PE with EL2 and EL3, and MDCR_EL3.PMSEE."""
    for f in REGISTERS[name]:
        reset = TABLE[name]["fields"][f.name][4]
        assert (f.reset is not None) == reset.startswith("0"), f.name


@every_register
def test_fields_do_not_overlap(name: str) -> None:
    masks = [f.mask for f in REGISTERS[name]]
    assert sum(masks) == REGISTERS[name].mask()
    assert all(0 <= f.lsb <= f.msb <= 63 for f in REGISTERS[name])


@given(register=registers, data=st.data())
def test_unpack_undoes_pack(register: Register, data: st.DataObject) -> None:
    values = {f.name: data.draw(st.integers(0, (1 << f.width) - 1)) for f in register}
    word = register.pack(**values)
    assert register.unpack(word) == values
    assert register.unpack(np.uint64(word).astype(np.int64)) == values  # as the machine holds it


@given(register=registers, words=st.lists(WORD, min_size=1, max_size=5))
def test_pack_undoes_unpack_but_for_res0(register: Register, words: list[int]) -> None:
    fields = register.unpack(np.array(words, dtype=np.uint64))
    packed = register.pack(**fields)
    assert packed.dtype == np.uint64
    assert packed.tolist() == [word & register.mask() for word in words]
    signed = np.array(words, dtype=np.uint64).view(np.int64)
    assert all(np.array_equal(fields[name], values) for name, values in register.unpack(signed).items())


@given(register=registers, old=WORD, new=WORD, features=st.sampled_from(implementations()))
def test_software_writes_what_exists_and_is_writable(register: Register, old: int, new: int, features: Feature) -> None:
    held = register.read(old, features)
    after = register.write(held, new, features)
    assert register.read(after, features) == after
    before, written, now = (register.unpack(word) for word in (held, new, after))
    for f in register:
        gone = not f.exists(features) or register.needs & features != register.needs
        expected = 0 if gone else written[f.name] if f.access == "RW" else before[f.name]
        assert now[f.name] == expected


@given(register=registers, word=WORD, features=st.sampled_from(implementations()))
def test_reset_touches_fields_with_a_reset_value_only(register: Register, word: int, features: Feature) -> None:
    after = register.unpack(register.reset(word, features))
    before = register.unpack(register.read(word, features))
    for f in register:
        known = f.reset is not None and not f.reset_unless & features and f.exists(features)
        assert after[f.name] == (f.reset if known else before[f.name])


def test_only_the_enable_of_the_buffer_is_reset() -> None:
    ones = 2**64 - 1
    features = features_of(6)
    cleared = {
        (name, f.name)
        for name, register in REGISTERS.items()
        for f in register
        if register.existing(features) & f.mask and register.unpack(register.reset(ones, features))[f.name] == 0
    }
    assert cleared == {("PMBLIMITR_EL1", "E"), ("MDCR_EL3", "PMSEE")}


@given(register=registers, data=st.data())
def test_a_value_that_does_not_fit_its_field_is_an_error(register: Register, data: st.DataObject) -> None:
    f = data.draw(st.sampled_from(register.fields))
    for wrong in (-1, 1 << f.width):
        with pytest.raises(RegisterError, match=rf"{f.name}.*does not fit"):
            register.pack(**{f.name: wrong})


def test_an_unknown_field_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(RegisterError, match="E1SPE"):
        REGISTERS["PMSCR_EL1"].pack(EL1SPE=1)


@given(limit=st.integers(4096, 1 << 52))
def test_max_buff_size_is_the_largest_promise_that_holds(limit: int) -> None:
    code = max_buffer_size(limit)
    assert buffer_bytes(code) <= limit
    assert limit < buffer_bytes(code) * 2 or limit < 8192


def test_max_buff_size_is_as_the_architecture_gives_it() -> None:
    assert buffer_bytes(0x0001) == 4 << 10
    assert buffer_bytes(0x3FFF) == 4092 << 40
    sizes = [buffer_bytes(code) for code in range(1, 1 << 14)]
    assert sizes == sorted(set(sizes))
