"""plugins/template, built and installed as a stranger would, beside the wheel in a fresh environment."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from .sources import ROOT, checked

TEMPLATE = ROOT / "plugins" / "template"


@pytest.fixture(scope="module")
def installed(python: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the template's wheel and install it; return the interpreter."""
    source = tmp_path_factory.mktemp("template") / "copy"
    shutil.copytree(TEMPLATE, source, ignore=shutil.ignore_patterns("__pycache__", "build", "*.egg-info"))
    out = tmp_path_factory.mktemp("built")
    checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, folder=out)
    (wheel,) = out.glob("*.whl")
    options = ["--no-index", "--no-deps", "--disable-pip-version-check"]
    checked(python, "-m", "pip", "install", *options, wheel, folder=out)
    return python


@pytest.mark.slow
def test_its_policy_runs_from_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    small = ["duration=20ms", "replicates=2", "tracking=none", "guest.buffer_mapped=false"]
    output = checked(
        installed, "-m", "spepolicy", "+policy=window_pin", "policy.window_pages=8", *small, folder=tmp_path
    )
    assert "window_pin" in output
    (errata,) = tmp_path.glob("outputs/*/*/errata.md")
    assert "WINDOW-PIN-1" in errata.read_text(encoding="utf-8")


@pytest.mark.slow
def test_its_own_tests_pass(installed: Path, tmp_path: Path) -> None:
    shutil.copytree(TEMPLATE / "tests", tmp_path / "tests")
    output = checked(installed, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests", folder=tmp_path)
    assert "failed" not in output
    assert "passed" in output


@pytest.mark.slow
def test_it_is_listed_with_its_distribution(installed: Path, tmp_path: Path) -> None:
    output = checked(installed, "-m", "spepolicy", "task=plugins", folder=tmp_path)
    assert "spepolicy-window-pin 0.1.0" in output
    assert "policy    window_pin" in output
    assert "reporter  window_pin" in output
    assert list(tmp_path.iterdir()) == []
