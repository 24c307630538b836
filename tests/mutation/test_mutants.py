"""The sample of mutants: fixed, each a change, each found again; and the table of what became of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from . import mutants as it
from .table import COLUMNS, OUTCOMES, PAGE, RESULTS, figures, key_of, known, refreshed

# So many of the sample may be of an older source before the table has to be made anew.
STALE = 30
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


def test_a_function_that_moves_to_another_file_of_its_package_keeps_its_mutants(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "p").mkdir()
    body = "def f(x):\n    return x + 1\n"
    (tmp_path / "p/a.py").write_text(body)
    (tmp_path / "p/b.py").write_text("")
    monkeypatch.setattr(it, "ROOT", tmp_path)
    monkeypatch.setattr(it, "PACKAGES", ("p",))
    before = {mutant.key for mutant in it.every_mutant()}
    (tmp_path / "p/a.py").write_text("")
    (tmp_path / "p/b.py").write_text(body)
    assert {mutant.key for mutant in it.every_mutant()} == before
    (tmp_path / "p/a.py").write_text(body)
    keys = [mutant.key for mutant in it.every_mutant()]
    assert len(set(keys)) == len(keys) == 2 * len(before), "two functions of one name are told apart"


ROWS = known(RESULTS)


def test_the_table_of_results_is_of_the_sample() -> None:
    """Nearly all of it: a change of the source takes mutants out of the sample, and the next run tries others."""
    assert all(len(row) == len(COLUMNS) and row[0] in OUTCOMES for row in ROWS.values())
    today = {key_of(mutant) for mutant in it.sample()}
    assert len(ROWS) == it.SAMPLE == len(today)
    gone = [row[:7] for key, row in ROWS.items() if key not in today]
    assert len(gone) <= STALE, gone


def test_nine_of_ten_are_caught() -> None:
    caught = sum(row[0] == "caught" for row in ROWS.values())
    assert caught >= 0.9 * len(ROWS)


def test_the_page_says_what_the_table_says() -> None:
    """The figures, and each mutant that was not caught with its reason: `python -m tests.mutation.table`."""
    page = PAGE.read_text(encoding="utf-8")
    assert page == refreshed(page, list(ROWS.values()))
    assert figures(list(ROWS.values())) in page
    assert all(row[1] for row in ROWS.values()), "a test that caught it, or the reason why none did"
