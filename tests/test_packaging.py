"""The wheel has everything under safe names, and the program works from it in an empty folder."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "spepolicy": "spepolicy",
    "plugins": "spepolicy_plugins",
    "conf": "spepolicy_conf",
    "tests/catalogue": "spepolicy_catalogue",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy of the sources, without a network, with the build tools that are installed."""
    source = tmp_path_factory.mktemp("source")
    for name in (*PACKAGES, "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(exist_ok=True)
            subprocess.run(["cp", "-r", str(ROOT / name), str((source / name).parent)], check=True)
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Unpack the wheel as an installer does."""
    target = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def run(site: Path, folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the unpacked program in *folder*; the sources and the editable installation are not looked at."""
    code = (
        "import sys, spepolicy, spepolicy_conf, spepolicy_plugins; from spepolicy.cli import main;"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in (spepolicy, spepolicy_conf, spepolicy_plugins));"
        "sys.exit(main(sys.argv[1:]))"
    )
    environment = {**os.environ, "PYTHONPATH": str(site), **variables}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, check=False)


def test_every_module_and_configuration_file_is_in_the_wheel(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    for folder, package in PACKAGES.items():
        for pattern in ("**/*.py", "**/*.yaml", "**/*.npz"):
            for path in (ROOT / folder).glob(pattern):
                if "template" in path.parts:
                    continue  # a distribution of its own (tests/packaging/test_template.py)
                assert f"{package}/{path.relative_to(ROOT / folder).as_posix()}" in inside
    assert "spepolicy/py.typed" in inside


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {*PACKAGES.values(), next(top for top in tops if top.endswith(".dist-info"))}
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".nbi", ".nbc"))]


def test_the_metadata_says_what_the_project_does(site: Path) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (info,) = site.glob("*.dist-info")
    metadata = (info / "METADATA").read_text()
    assert f"Version: {project['version']}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert list(info.glob("licenses/LICENSE"))
    points = configparser.ConfigParser()
    points.read(info / "entry_points.txt")
    assert points["console_scripts"]["spepolicy"] == "spepolicy.cli:main"
    assert dict(points["spepolicy.policies"]) == project["entry-points"]["spepolicy.policies"]
    assert dict(points["spepolicy.reporters"]) == project["entry-points"]["spepolicy.reporters"]


def test_the_main_job_runs_from_the_wheel_in_an_empty_folder(site: Path, tmp_path: Path) -> None:
    listed = run(site, tmp_path)
    assert listed.returncode == 2
    assert "eager_pin" in listed.stdout
    assert "cannot be used" not in listed.stdout
    small = ["duration=1ms", "replicates=1", "tracking=none"]
    done = run(site, tmp_path, "+policy=eager_pin", *small, NUMBA_DISABLE_JIT="1")  # interpreted: nothing to compile
    assert done.returncode == 0, done.stderr
    assert "bare_metal" in done.stdout
    assert list(tmp_path.glob("outputs/*/*/metrics.json"))
    assert [path.name for path in tmp_path.iterdir()] == ["outputs"]


@pytest.mark.slow
def test_the_first_run_ever_compiles_and_tracks(site: Path, tmp_path: Path) -> None:
    done = run(site, tmp_path, "+policy=eager_pin", "duration=10ms", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert done.returncode == 0, done.stderr
    assert "compiling" in done.stdout + done.stderr
    assert (tmp_path / "mlflow.db").exists()
    again = run(site, tmp_path, "+policy=eager_pin", "duration=10ms", NUMBA_CACHE_DIR=str(tmp_path / "cache"))
    assert again.returncode == 0, again.stderr
    assert "compiling" not in again.stdout + again.stderr


def test_the_constraints_pin_every_dependency_inside_its_bounds() -> None:
    packaging = pytest.importorskip("packaging.requirements")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pins: dict[str, list[tuple[str, object]]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.strip() and not line.startswith("#"):
            pin = packaging.Requirement(line)
            (version,) = pin.specifier
            assert version.operator == "=="
            pins.setdefault(pin.name.lower().replace("_", "-"), []).append((version.version, pin.marker))
    for text in (*project["dependencies"], *project["optional-dependencies"]["dev"]):
        wanted = packaging.Requirement(text)
        assert pins[wanted.name.lower()], f"{wanted.name} is not pinned"
        for version, _ in pins[wanted.name.lower()]:
            assert wanted.specifier.contains(version), f"{wanted} does not allow the pinned {version}"
    for python in ("3.11", "3.12", "3.13"):
        for name, versions in pins.items():
            here = {"python_version": python}
            applying = [version for version, marker in versions if marker is None or marker.evaluate(here)]
            assert len(applying) == 1, f"{name} has {len(applying)} pins for Python {python}"
