"""The wheel, installed by pip into a fresh environment, is the whole program; tests/test_packaging.py looks into it."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from ..docs.pages import ROOT
from .sources import copy_of_the_sources


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, with the build tools that are installed: no network."""
    source = copy_of_the_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, folder=out)
    (path,) = out.glob("*.whl")
    return path


def checked(*command: str | Path, folder: Path) -> str:
    """Run *command* in *folder*, which must succeed; return what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel alone into an environment that finds the dependencies, but not the project, of this one.

    A path in a .pth file comes after the environment's own packages, and .pth files below it are not read: so this
    environment's editable installation of the project is out of reach.
    """
    folder = tmp_path_factory.mktemp("environment")
    checked(sys.executable, "-m", "venv", folder, folder=folder)
    interpreter = folder / "bin" / "python"
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    command = ["-m", "pip", "install", "--no-index", "--no-deps", "--disable-pip-version-check", wheel]
    checked(interpreter, *command, folder=folder)
    return interpreter


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
