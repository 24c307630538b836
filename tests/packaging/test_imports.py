"""Which way imports point: the contracts of [tool.importlinter] in pyproject.toml."""

from __future__ import annotations

from pathlib import Path

import pytest
from importlinter.cli import EXIT_STATUS_ERROR, EXIT_STATUS_SUCCESS, lint_imports

from ..docs.pages import ROOT

RULES = ROOT / "pyproject.toml"


def test_imports_keep_the_contracts(capsys: pytest.CaptureFixture[str]) -> None:
    assert lint_imports(str(RULES), no_cache=True) == EXIT_STATUS_SUCCESS, capsys.readouterr().out


@pytest.mark.parametrize(
    ("layer", "told"),
    [("mmu", "spepolicy.machine is not allowed to import spepolicy.mmu"), ("judge", "every child of every container")],
    ids=["wrong way", "no layer"],
)
def test_a_broken_contract_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str], layer: str, told: str) -> None:
    """With a layer above the one that imports it, or with none."""
    text = RULES.read_text(encoding="utf-8")
    line = f'    "{layer}",\n'
    assert line in text
    moved = text.replace(line, "").replace("layers = [\n", "layers = [\n" + (line if layer == "mmu" else ""))
    (tmp_path / "pyproject.toml").write_text(moved, encoding="utf-8")
    assert lint_imports(str(tmp_path / "pyproject.toml"), no_cache=True) == EXIT_STATUS_ERROR
    assert told in " ".join(capsys.readouterr().out.split())
