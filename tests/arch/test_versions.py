"""Versions and features: what implies what, what is refused."""

from __future__ import annotations

from itertools import pairwise

import pytest

from spepolicy.arch.registers import REGISTERS
from spepolicy.arch.versions import EVENT_NAMES, OPTIONAL, VERSIONS, AbortReport, Feature, features_of
from spepolicy.errors import ConfigurationError

F = Feature


def filterable(features: Feature) -> set[int]:
    return {f.lsb for f in REGISTERS["PMSEVFR_EL1"] if f.exists(features)}


def test_each_version_has_all_that_the_one_before_has() -> None:
    versions = [VERSIONS[n].features for n in sorted(VERSIONS)]
    for older, newer in pairwise(versions):
        assert older & newer == older
        assert older != newer


def test_the_newer_features_come_with_their_versions() -> None:
    """spe.md 1.1: FnE with v1p2; CRR, EXC and nVM with v1p5."""
    assert [F.FNE in VERSIONS[n].features for n in VERSIONS] == [False, False, True, True, True, True]
    assert all((F.CRR | F.EXC | F.NVM) & VERSIONS[n].features == F(0) for n in range(1, 6))
    assert (F.CRR | F.EXC | F.NVM) in VERSIONS[6].features
    assert [version.discard_mode for version in VERSIONS.values()] == [False, False, True, True, True, True]


def test_rule_42_an_external_abort_is_reported_to_the_spu_before_v1p3_only() -> None:
    for n, version in VERSIONS.items():
        assert (AbortReport.TO_SPU in version.aborts) == (n < 4)
        assert AbortReport.IGNORED | AbortReport.SERROR | AbortReport.MMU_FAULT in version.aborts
        # PMBIDR_EL1.F=0 is not permitted from Armv8.8 on (spe.md 1.9)
        assert version.access_flag_required == (n >= 4)


@pytest.mark.parametrize("name", OPTIONAL)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_feature_is_there_or_refused(name: str, version: int) -> None:
    option = OPTIONAL[name]
    if version < option.since:
        with pytest.raises(ConfigurationError, match=rf"{name}.*needs {VERSIONS[option.since].name}"):
            features_of(version, [name])
    else:
        needed = [other.name for other in OPTIONAL.values() if other.feature in option.needs]
        assert option.feature in features_of(version, [*needed, name], F.SME)


def test_what_a_feature_needs_must_be_there_too() -> None:
    with pytest.raises(ConfigurationError, match=r"FDS.*LDS"):
        features_of(5, ["FDS"])
    with pytest.raises(ConfigurationError, match="SME"):
        features_of(2, ["SME"])


def test_names_and_versions_that_do_not_exist_are_errors() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'ERnd'"):
        features_of(1, ["ernd"])
    with pytest.raises(ConfigurationError, match="PMSVer 7"):
        features_of(7)


def test_events_that_can_be_filtered_by_version() -> None:
    """As Linux's driver lists the RES0 bits of PMSEVFR_EL1, without events that are IMPLEMENTATION DEFINED."""
    assert filterable(features_of(1)) == {3, 5, 7}
    assert filterable(features_of(2)) == {3, 5, 7, 11}
    assert filterable(features_of(2, pe=F.SVE)) == {3, 5, 7, 11, 17, 18}
    assert filterable(features_of(3)) == {3, 5, 6, 7, 11}
    assert filterable(features_of(5, pe=F.SVE)) == {2, *range(3, 12), 17, 18, *range(19, 24)}
    assert 25 in filterable(features_of(6))
    assert filterable(features_of(1, ["impdef_events"])) - filterable(features_of(1)) == {
        *range(12, 16), *range(24, 32), *range(48, 64),
    }  # fmt: skip
    assert filterable(features_of(5, ["impdef_events"])) & set(range(24, 32)) == set()


def test_every_architected_event_can_be_filtered_by_some_version() -> None:
    everything = filterable(features_of(6, ["speculative", "SME"], F.SVE | F.SME))
    assert set(EVENT_NAMES.values()) == everything
