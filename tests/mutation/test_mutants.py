"""The sample of mutants: fixed, each a change, each found again; and the table of what became of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from . import mutants as it
from .run import COLUMNS, RESULTS, known, row_of

FILES = ("spepolicy/machine/pick.py", "spepolicy/mmu/refused.py", "spepolicy/judge/records.py")


@pytest.mark.parametrize("path", FILES)
def test_each_mutant_is_another_program(path: str) -> None:
    found = it.mutants_of(path)
    assert len({mutant.key for mutant in found}) == len(found) > 10
    original = ast.unparse(ast.parse((it.ROOT / path).read_text(encoding="utf-8"))) + "\n"
    sources = {it.source_of(mutant) for mutant in found}
    assert original not in sources
    for source in sources:
        compile(source, path, "exec")


def test_a_mutant_does_not_depend_on_what_stands_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines move, other functions come and go: the keys stay, so the sample does."""
    path = FILES[0]
    before = {mutant.key for mutant in it.mutants_of(path)}
    moved = tmp_path / path
    moved.parent.mkdir(parents=True)
    text = (it.ROOT / path).read_text(encoding="utf-8")
    moved.write_text(text + "\n\ndef another(x: int) -> int:\n    return x + 1\n", encoding="utf-8")
    monkeypatch.setattr(it, "ROOT", tmp_path)
    after = {mutant.key for mutant in it.mutants_of(path)}
    assert before < after
    assert {key.split("\t")[1] for key in after - before} == {"another"}


@pytest.mark.parametrize(
    ("source", "changes"),
    [
        ("if a < b:\n        c()", {"a <= b", "not a < b", "pass"}),
        ("x[0] = y & 3", {"x[1] = y & 3", "x[0] = y | 3", "x[0] = y & 4", "pass"}),
        ("x.n += 1", {"x.n -= 1", "x.n += 2", "pass"}),
        ("return a and not b", {"return a or not b", "return a and b"}),
        ("raise ValueError(f'{a + 1}')", set()),
    ],
)
def test_the_changes_are_these(source: str, changes: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "m.py").write_text(f"LIMIT = 1 + 2\n\ndef f(a, b, c, x, y):\n    {source}\n", encoding="utf-8")
    monkeypatch.setattr(it, "ROOT", tmp_path)
    programs = [it.source_of(mutant) for mutant in it.mutants_of("m.py")]
    assert len(programs) == len(changes)
    for change in changes:
        assert any(change in program for program in programs), change


def test_the_table_of_results_is_of_mutants_of_the_sample() -> None:
    rows = known(RESULTS)
    assert all(
        len(row) == len(COLUMNS) and row[0] in ("caught", "survived", "undecided", "not run") for row in rows.values()
    )
    mutant = it.mutants_of(FILES[0])[0]
    assert row_of(mutant, "caught", "t")[-1].startswith(f"{FILES[0]} | {mutant.function} | ")
