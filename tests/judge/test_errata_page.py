"""The errata page as the kernel's documentation wants it, and the table of policy by version by erratum."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spepolicy.drivers.simulate import simulate
from spepolicy.judge.errata import Erratum, Findings, merge_errata
from spepolicy.judge.errata_page import About, errata_as_markdown, errata_as_rst, errata_matrix, matrix_as_markdown
from spepolicy.judge.findings import find
from spepolicy.lab.about import about
from spepolicy.platforms import equipped
from spepolicy.plugins import build_policy, installed_policies, installed_reporters, make_plugin_manager

from ..properties.scenarios import MS, busy_host, guest, scenario

AWKWARD = Erratum(
    id="T-1",
    title="PMS* and arm_spe_ | `x` at {1,0}",
    trigger="- not a list. :not: a field, *not* emphasis, **not** strong, `not` code, |not| a thing, not_ a link. " * 3,
    versions="1. not a list",
    effect_on_guest="..not: a directive",
    effect_on_profile="C:\\path\\ and ~UNMAP",
    severity="low",
    blame="kvm",
    count=3,
    first_trace={"replicate": 0, "va": "0xffff8000"},
    source="A. Nobody, 1 Jan 2022 (kvm.md H8)",
)
FINDINGS = Findings("eager_pin", 4, True, 2, 1.0, 0.5)


def parsed(page: str) -> Any:
    """Parse *page* as reStructuredText; any complaint, however small, is an error."""
    core = pytest.importorskip("docutils.core")
    return core.publish_doctree(
        page, settings_overrides={"report_level": 1, "halt_level": 1, "input_encoding": "unicode"}
    )


def said(page: str) -> str:
    """The text that a reader sees, on one line."""
    return " ".join(str(parsed(page).astext()).split())


def test_the_page_is_in_the_form_of_the_kernel_s_documentation() -> None:
    lines = errata_as_rst(FINDINGS, [AWKWARD]).splitlines()
    assert lines[0] == ".. SPDX-License-Identifier: GPL-2.0"
    assert lines[2] == lines[4] == "=" * len(lines[3])
    assert max(map(len, lines)) <= 80
    assert not any(line.endswith(" ") or "\t" in line for line in lines)
    assert lines[-1] != ""


def test_no_line_is_longer_than_the_kernel_s_and_the_policy_is_code() -> None:
    """Cells of the table are indented by eight; a name in the introduction is literal text, not escaped."""
    words = " ".join(f"word{n}" for n in range(60))
    long = replace(AWKWARD, title=words, versions=words)
    lines = errata_as_rst(FINDINGS, [long, AWKWARD]).splitlines()
    assert max(len(line) for line in lines if not line.endswith(words) and set(line) != {"-"}) <= 80 < len(words)
    assert "``eager_pin``" in " ".join(lines)
    first_cells = [line.strip() for line in lines if line.startswith("    * - ")]
    assert first_cells[1:] == [f"* - {long.id}", f"* - {AWKWARD.id}"], "a row each, below the heads of the columns"
    assert "`eager_pin`" in errata_as_markdown(FINDINGS, [AWKWARD])


def test_every_character_of_an_erratum_reaches_the_reader() -> None:
    page = said(errata_as_rst(FINDINGS, [AWKWARD]))
    for text in (AWKWARD.title, AWKWARD.trigger, AWKWARD.versions, AWKWARD.effect_on_guest, AWKWARD.effect_on_profile):
        assert " ".join(text.split()) in page
    assert "3 times (6 a second of wanted profiling)" in page
    assert "replicate 0, va 0xffff8000" in page


def test_what_the_page_says_of_policy_and_machine() -> None:
    told = About(
        summary="Pin *it*.",
        parts={"Mechanism": "(1) PMB* traps. (2) more", "Needs": "nothing"},
        fields=[("claims", "look", "how KVM explains a fault")],
        controls=[("MDCR_EL2.E2PB", "0b10")],
        configuration=[("vCPUs", "1")],
        version="0.2",
    )
    page = errata_as_rst(FINDINGS, [], told)
    text = said(page)
    for phrase in ("Pin *it*.", "PMB* traps. (2) more", "claims: how KVM explains a fault look", "MDCR_EL2.E2PB 0b10"):
        assert phrase in text
    assert "Nothing was found" in text
    markdown = errata_as_markdown(FINDINGS, [AWKWARD], told)
    for phrase in ("* **Needs.** nothing", "| claims: how KVM explains a fault | look |", "| MDCR_EL2.E2PB | 0b10 |"):
        assert phrase in markdown


FIELDS = {"hide_spe": {}, "copy_buffer": {"copy": "chunked"}, "pin_while_enabled": {"max_buffer_KiB": 4}}


@pytest.mark.parametrize("name", [name for name, info in sorted(installed_policies().items()) if name != "bare_metal"])
def test_the_page_of_a_real_run_can_be_pasted_into_a_patch(name: str, tmp_path: Path) -> None:
    """Every shipped policy on a busy host: the page parses, and says what the policy does and what happened."""
    where = equipped(scenario(host=busy_host(), guest=guest(), duration_ps=2 * MS))
    policy = build_policy(name, FIELDS.get(name, {}))
    manager = make_plugin_manager(policy, list(installed_reporters().values()))
    result = simulate(where, policy, name=name, replicates=range(2), threads=1)
    findings = find(result, virtualized=True, hooks=[caller.name for caller in manager.get_hookcallers(policy) or ()])
    observed = [erratum for answer in manager.hook.report_errata(findings=findings) for erratum in answer]
    documented = [erratum for answer in manager.hook.errata() for erratum in answer]
    errata = merge_errata(documented, observed)
    told = about(policy, manager, where, findings)
    text = said(errata_as_rst(findings, errata, told))
    assert installed_policies()[name].summary in text
    assert " ".join(told.parts["Fails"].split()) in text
    for erratum in errata:
        assert f"{erratum.id}: {erratum.title}" in text
        assert " ".join(erratum.workaround.split()) in text
    assert errata, "on a busy host every policy has something to tell"


def test_the_table_of_a_sweep_has_a_row_a_policy_and_version() -> None:
    two, ten = replace(AWKWARD, id="T-2", count=4), replace(AWKWARD, id="T-10", count=0, documented=True)
    runs = [("a", 1, [two, ten]), ("a", 1, [two]), ("a", 4, [ten]), ("b|c", 1, [])]
    ids, rows = errata_matrix(runs)
    assert ids == ["T-2", "T-10"]
    assert rows == [("a", 1, {"T-2": "8", "T-10": "documented"}), ("a", 4, {"T-10": "documented"}), ("b|c", 1, {})]
    assert matrix_as_markdown(runs).splitlines() == [
        "| policy | SPE | T-2 | T-10 |",
        "|---|---|---:|---:|",
        "| a | SPE | 8 | documented |",
        "| a | SPEv1p3 | - | documented |",
        "| b\\|c | SPE | - | - |",
    ]
    assert "No erratum" in matrix_as_markdown([("a", 1, [])])


def test_an_erratum_that_was_neither_seen_nor_documented_has_no_cell() -> None:
    """A row of "documented" says that the policy declares it: nothing else does."""
    silent = replace(AWKWARD, count=0, documented=False)
    ids, rows = errata_matrix([("p", 4, [silent]), ("q", 4, [replace(silent, documented=True)]), ("r", 4, [AWKWARD])])
    assert ids == [AWKWARD.id]
    assert rows == [("p", 4, {}), ("q", 4, {AWKWARD.id: "documented"}), ("r", 4, {AWKWARD.id: "3"})]
