"""The sample of mutants: fixed, each a change, each found again; and the table of what became of them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from . import mutants as it

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
