"""One configuration and seed give one result, everywhere: against the digests kept in tests/data/fingerprint.json."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spepolicy.drivers import simulate as driver

from . import fingerprint as it

SOME = ("copy_buffer, filters", "pin_on_fault, two vCPUs", "post-copy")


@pytest.mark.parametrize("name", it.CONFIGURATIONS)
def test_results_are_those_that_are_kept(name: str) -> None:
    found = it.digests(it.CONFIGURATIONS[name])
    assert found == it.kept().get(name), it.REMEDY


def test_what_is_kept_is_of_these_configurations() -> None:
    assert it.kept().keys() == it.CONFIGURATIONS.keys()


def test_the_changelog_names_the_fingerprint_under_results_changed() -> None:
    digits = it.fingerprint(it.kept())[: it.DIGITS]
    entries = list(it.results_changed(it.CHANGELOG.read_text(encoding="utf-8")))
    assert [entry for entry in entries if digits in entry], f"no entry names {digits}. {it.REMEDY}"


@pytest.mark.parametrize("name", SOME)
def test_a_result_does_not_depend_on_threads_or_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    scenario, policy_name, policy, replicates = it.composed(it.CONFIGURATIONS[name])
    for threads, lanes in ((1, 1), (3, 512), (2, 2)):
        monkeypatch.setattr(driver, "CHUNK_LANES", lanes)
        result = driver.simulate(scenario, policy, name=policy_name, replicates=range(replicates), threads=threads)
        assert it.counters(result) == it.kept()[name]["counters"], (threads, lanes)


def test_another_seed_or_one_more_sample_is_another_result() -> None:
    scenario, policy_name, policy, replicates = it.composed(it.CONFIGURATIONS["pin_vm on a silent host"])
    result = driver.simulate(scenario, policy, name=policy_name, replicates=range(replicates))
    kept = it.counters(result)
    other = driver.simulate(replace(scenario, seed=2), policy, name=policy_name, replicates=range(replicates))
    assert it.counters(other) != kept
    result.truth["selected"][0, 0] += 1
    assert it.counters(result) != kept


def test_a_counter_that_is_zero_changes_no_digest() -> None:
    """A field for something new leaves the fingerprint of all that does not use it alone."""

    def digest(rows: Any) -> str:
        made = it.Digest()
        made.integers("truth", rows)
        return str(made)

    old = np.array([(1, 2), (3, 4)], dtype=[("a", "i8"), ("b", "i4")])
    new = np.zeros(2, dtype=[("c", "i8"), ("b", "u8"), ("a", "i2")])
    new["a"], new["b"] = old["a"], old["b"]
    assert digest(old) == digest(new)
    new["c"][1] = 1
    assert digest(old) != digest(new)


def test_entries_are_those_below_the_heading() -> None:
    text = "# C\n\n## [Unreleased]\n\n### Results changed\n\n- One\n  more.\n- Two\n\n### Added\n\n- Three\n"
    assert list(it.results_changed(text)) == ["One more.", "Two"]


def test_a_refresh_writes_the_table_and_an_entry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "CHANGELOG.md"
    log.write_text("# C\n\n## [Unreleased]\n\n### Results changed\n\n- Before.\n\n### Added\n\n- Three\n")
    monkeypatch.setattr(it, "CHANGELOG", log)
    monkeypatch.setattr(it, "KEPT", tmp_path / "fingerprint.json")
    monkeypatch.setattr(it, "measured", lambda: {"a": {"counters": "1"}})
    it.refresh("Dice are round.")
    assert it.kept() == {"a": {"counters": "1"}}
    digits = it.fingerprint(it.kept())[: it.DIGITS]
    assert list(it.results_changed(log.read_text())) == [f"Dice are round. (fingerprint `{digits}`)", "Before."]
    written = log.read_text()
    it.refresh("Again.")
    assert log.read_text() == written, "nothing has changed"


@pytest.mark.slow
def test_the_interpreted_machine_has_the_same_fingerprint() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.properties.fingerprint", *SOME],
        cwd=it.ROOT, env=os.environ | {"NUMBA_DISABLE_JIT": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
