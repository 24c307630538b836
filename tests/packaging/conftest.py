"""The wheel, built once, and a fresh environment that it is installed into."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest

from .sources import checked, copy_of_the_sources


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, with the build tools that are installed: no network."""
    source = copy_of_the_sources(tmp_path_factory.mktemp("source"))
    out = tmp_path_factory.mktemp("wheel")
    checked(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, source, folder=out)
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="session")
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
