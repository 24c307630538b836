"""The files of the repository, without what installing, running and testing leave in a checkout."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

from ..docs.pages import ROOT


def _ignored() -> list[str]:
    """Return the patterns of .gitignore, which are all of names, not of paths."""
    lines = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    return [line.rstrip("/") for line in lines if line and not line.startswith("#")]


def source_files() -> Iterator[Path]:
    """Return the paths of the repository's files, below its root."""
    patterns = [*_ignored(), ".git"]
    folders = [ROOT]
    while folders:
        for path in sorted(folders.pop().iterdir()):
            if any(fnmatch(path.name, pattern) for pattern in patterns):
                continue
            if path.is_dir():
                folders.append(path)
            else:
                yield path.relative_to(ROOT)


def copy_of_the_sources(folder: Path) -> Path:
    """Copy the repository's files into *folder*, which is returned."""
    for path in source_files():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)
    return folder


def checked(*command: str | Path, folder: Path) -> str:
    """Run *command* in *folder*, which must succeed; return what it printed."""
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
