"""A module is about one theme. One that has grown past 500 lines says in its docstring why it has so many lines."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from ..docs.pages import ROOT

LIMIT = 500


def unexplained(folder: Path) -> dict[str, int]:
    """Return the modules below *folder* that have more lines than LIMIT and do not speak of them: their lengths."""
    found = {}
    for path in sorted(folder.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        lines = len(text.splitlines())
        if lines > LIMIT and f"More than {LIMIT} lines: " not in (ast.get_docstring(ast.parse(text)) or ""):
            found[path.relative_to(folder).as_posix()] = lines
    return found


@pytest.mark.parametrize("folder", ["spepolicy", "plugins", "experiments"])
def test_a_long_module_says_why(folder: str) -> None:
    assert any((ROOT / folder).rglob("*.py"))
    assert not unexplained(ROOT / folder), "split by theme, or end the docstring with 'More than 500 lines: WHY'"


def test_a_long_module_without_a_reason_is_found(tmp_path: Path) -> None:
    body = "a = 1\n" * LIMIT
    (tmp_path / "short.py").write_text(body)
    (tmp_path / "mute.py").write_text('"""All of it."""\n' + body)
    (tmp_path / "bare.py").write_text(body + body)
    (tmp_path / "told.py").write_text('"""A table.\n\nMore than 500 lines: it is one table."""\n' + body)
    assert unexplained(tmp_path) == {"bare.py": 2 * LIMIT, "mute.py": LIMIT + 1}
