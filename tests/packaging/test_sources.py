"""The repository's files: what belongs into it, what must not be named in it, what the wheel takes from it."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from ..docs.pages import ROOT
from .sources import source_files

SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]

# Written in parts, so that this file does not name them.
HOSTS = [
    f"{name}.{domain}"
    for name, domain in (
        ("pypi", "org"),
        ("pypi.python", "org"),
        ("pythonhosted", "org"),
        ("npmjs", "org"),
        ("npmjs", "com"),
        ("deb.debian", "org"),
        ("security.debian", "org"),
        ("proxy.golang", "org"),
        ("crates", "io"),
        ("conda.anaconda", "org"),
    )
]
MACHINE_PATHS = [f"/{name}/" for name in ("work", "opt", "root", "tmp")]


def text_of(path: Path) -> str:
    """Return the file as text; binary files give what little of them is text."""
    return (ROOT / path).read_bytes().decode("utf-8", errors="ignore")


def test_the_walk_sees_the_repository() -> None:
    files = set(source_files())
    assert {Path("README.md"), Path(".ci/run"), Path("spepolicy/cli.py"), Path("conf/config.yaml")} <= files
    assert not [path for path in files if "__pycache__" in path.parts or path.suffix in (".pyc", ".nbi")]


def test_the_root_has_only_what_the_layout_allows() -> None:
    allowed = {"pyproject.toml", "spepolicy", "plugins", "conf", "experiments", "tests"}
    allowed |= {"README.md", "LICENSE", "CHANGELOG.md", "constraints.txt"}
    tops = {path.parts[0] for path in source_files()}
    assert {name for name in tops if not name.startswith(".")} == allowed


def test_no_file_names_a_package_registry() -> None:
    assert not [(str(path), host) for path in source_files() for host in HOSTS if host in text_of(path)]


def test_no_file_names_a_place_on_one_machine() -> None:
    place = re.compile("|".join(rf"(?<![\w.~:}}]){path}" for path in MACHINE_PATHS))
    assert not [(str(path), found[0]) for path in source_files() for found in place.finditer(text_of(path))]


@pytest.mark.parametrize("package", SETUPTOOLS["packages"])
def test_the_wheel_takes_every_file_of_a_package(package: str) -> None:
    """Modules of the listed packages come in by themselves, all else as data: a new folder needs a pattern."""
    folder = SETUPTOOLS["package-dir"][package]
    patterns = SETUPTOOLS["package-data"][package]
    taken = {path for pattern in ("*.py", *patterns) for path in (ROOT / folder).glob(pattern)}
    files = {ROOT / path for path in source_files() if path.is_relative_to(folder)}
    assert files
    # plugins/template is a distribution of its own (test_template.py).
    files = {path for path in files if "template" not in path.parts}
    assert not sorted(str(path.relative_to(ROOT)) for path in files - taken)


def test_every_folder_with_code_of_the_program_belongs_to_a_package() -> None:
    folders = set(SETUPTOOLS["package-dir"].values())
    code = {path.parts[0] for path in source_files() if path.suffix == ".py"}
    assert code - {"tests", "experiments"} == {folder for folder in folders if "/" not in folder}
    assert folders - code == {"tests/catalogue"}


def test_subpackages_can_be_imported_as_such() -> None:
    """Without an __init__.py an installed folder would be a namespace that other distributions could add to."""
    folders = {path.parent for path in source_files() if path.parts[0] == "spepolicy" and path.suffix == ".py"}
    assert not [str(folder) for folder in folders if not (ROOT / folder / "__init__.py").is_file()]
