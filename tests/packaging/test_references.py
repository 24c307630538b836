"""Names that comments, docstrings and pages mention exist: modules and what is in them, and files of the checkout."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

from ..docs.pages import ROOT

FOLDERS = ("spepolicy", "plugins", "experiments", "conf", "README.md", "pyproject.toml")
GROUPS = ("spepolicy.policies", "spepolicy.reporters")  # of entry points
NAME = re.compile(r"(?<![\w/.@-])spepolicy(?:_plugins)?(?:\.[A-Za-z_]\w*)+(?!\w*[/\\])")
FILE = re.compile(r"(?<![\w./-])(?:spepolicy|tests|conf)/[\w./-]*\w")
PLACEHOLDER = re.compile(r"\b[A-Z]{4,}\b|example\.yaml")
OWN_TESTS = "plugins/template/"  # speaks of a checkout of its own


def exists(path: list[str]) -> bool:
    """Tell whether the dotted *path* is a module, or something in one: an attribute, or a field of a class."""
    for depth in range(len(path), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(path[:depth]))
        except ModuleNotFoundError:
            continue
        for name in path[depth:]:
            if name in getattr(found, "__annotations__", {}):
                return True
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@cache
def known(name: str) -> bool:
    if name.startswith(GROUPS) or name.endswith((".py", ".egg")):
        return True
    return exists(name.split("."))


def stale(text: str) -> Iterator[str]:
    """Yield the names in *text* that lead nowhere."""
    for name in NAME.findall(text):
        if not known(name):
            yield name
    for name in FILE.findall(text):
        if not PLACEHOLDER.search(name) and not (ROOT / name).exists():
            yield name


def sources() -> Iterator[Path]:
    for top in FOLDERS:
        path = ROOT / top
        found = [path] if path.is_file() else path.rglob("*")
        yield from (p for p in found if p.suffix in (".py", ".md", ".yaml", ".toml") and "__pycache__" not in p.parts)


def test_what_is_mentioned_exists() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in sources()}
    assert len(texts) > 300
    missing = {name: list(stale(text)) for name, text in texts.items() if not name.startswith(OWN_TESTS)}
    assert not {name: what for name, what in missing.items() if what}


def test_a_name_that_leads_nowhere_is_found() -> None:
    good = "`spepolicy.machine.state.Machine.par`, spepolicy.jit, spepolicy.policies, spepolicy/batch.py, conf/GROUP/"
    assert not list(stale(good))
    bad = "`spepolicy.machine.toolbox.charge`, spepolicy.jit.nothing, spepolicy/machine/toolbox.py"
    assert len(list(stale(bad))) == 3
