"""Fixtures that several areas use."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

_numbers = itertools.count()


def pytest_configure(config: pytest.Config) -> None:
    """Compile the machine once before a run of all tests, not in each of xdist's processes at the same time."""
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if everything and not hasattr(config, "workerinput") and not config.option.collectonly:
        from spepolicy.drivers.compiling import compile_machine

        compile_machine(print)


@pytest.fixture
def install(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Return a function that installs a fake distribution of plugins, for this process and for its children.

    `install(source, {"policy": "Class"}, distribution="name", group="spepolicy.policies")` writes a module with
    *source* and the metadata that pip would write, and returns the folder. It is on sys.path and PYTHONPATH until
    the test ends.
    """
    paths: list[str] = []

    def write(
        source: str, points: dict[str, str], *, distribution: str = "stranger", group: str = "spepolicy.policies"
    ) -> Path:
        folder = tmp_path_factory.mktemp("site")
        # Imported modules outlive the test, so each has a name of its own.
        module = f"{distribution.replace('-', '_')}_{next(_numbers)}"
        (folder / f"{module}.py").write_text(source)
        info = folder / f"{distribution}-1.2.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
        lines = [f"{name} = {module}:{attribute}" for name, attribute in points.items()]
        (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *lines, ""]))
        paths.append(str(folder))
        monkeypatch.setattr(sys, "path", [*paths, *(p for p in sys.path if p not in paths)])
        monkeypatch.setenv("PYTHONPATH", ":".join(paths))
        return folder

    return write
