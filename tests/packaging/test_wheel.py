"""The wheel, installed by pip into a fresh environment, is the whole program; tests/test_packaging.py looks into it."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from ..docs.pages import ROOT
from .sources import checked


@pytest.mark.slow
def test_the_wheel_carries_pages_and_recordings(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    wanted = {"spepolicy_plugins/README.md", "spepolicy_conf/README.md", "spepolicy/recording/data/README.md"}
    data = ROOT / "spepolicy" / "recording" / "data"
    wanted |= {f"spepolicy/recording/data/{path.name}" for path in data.glob("*.npz")}
    assert wanted <= inside
    (metadata,) = [name for name in inside if name.endswith(".dist-info/METADATA")]
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.strip() in zipfile.ZipFile(wheel).read(metadata).decode("utf-8")


@pytest.mark.slow
def test_the_program_is_that_of_the_wheel(python: Path, tmp_path: Path) -> None:
    code = "import spepolicy, spepolicy_conf, spepolicy_plugins as p; print(spepolicy.__file__, p.__file__)"
    files = checked(python, "-c", code, folder=tmp_path).split()
    assert all(Path(name).is_relative_to(python.parents[1]) for name in files), files


@pytest.mark.slow
@pytest.mark.parametrize("program", [("python", "-m", "spepolicy"), ("spepolicy",)])
def test_the_main_job_runs_from_an_empty_folder(python: Path, tmp_path: Path, program: tuple[str, ...]) -> None:
    small = ["duration=20ms", "replicates=2", "tracking=none"]
    output = checked(python.parent / program[0], *program[1:], "+policy=eager_pin", *small, folder=tmp_path)
    assert "blackout, % of wanted time" in output
    assert {"metrics.json", "errata.md", "blackout.png"} <= {path.name for path in tmp_path.glob("outputs/*/*/*")}
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]
