"""Every rule of the sheet is implemented and has a test that bears its number, or is out of scope with a reason."""

from __future__ import annotations

import re
from pathlib import Path

from spepolicy.arch.rules import LAST_RULE, OUT_OF_SCOPE, RULES

TESTS = Path(__file__).resolve().parents[1]


def test_every_rule_is_in_exactly_one_table() -> None:
    assert sorted([*RULES, *OUT_OF_SCOPE]) == list(range(1, LAST_RULE + 1))


def test_every_rule_that_is_implemented_has_a_test_of_its_number() -> None:
    sources = [path.read_text() for folder in ("arch", "machine") for path in (TESTS / folder).glob("test_*.py")]
    tested = {int(n) for source in sources for n in re.findall(r"^def test_rule_(\d+)_", source, re.MULTILINE)}
    assert set(RULES) <= tested
    assert tested.isdisjoint(OUT_OF_SCOPE)


def test_what_is_left_out_has_a_reason() -> None:
    assert all(len(reason.split()) > 3 for reason in OUT_OF_SCOPE.values())
