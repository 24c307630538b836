"""What defines a result: a hash over the scenario, the policy, the seed, and the code that computed it.

A lane is a function of these alone, so two rows of one hash are the same row, wherever and whenever they
were computed, and a row that is there need not be computed again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from spepolicy.machine.scenario import Scenario
from spepolicy.plugins import build_policy, find_policy

__all__ = ["PolicyChoice", "digest", "lane_hash", "provenance", "scenario_hash", "source_hash"]

_PACKAGE = Path(__file__).resolve().parents[2]
# Parts of the package that cannot change a row: they start runs, show them, or move them about.
_NO_INFLUENCE = ("lab", "testing", "cli.py", "launch.py", "usage.py", "completion.py", "messages.py", "__main__.py")
HASH_LENGTH = 32  # hexadecimal digits: 128 bits


@cache
def source_hash() -> str:
    """Return a hash of every module of spepolicy that can change a result.

    The version alone would not do: between two releases a work tree has one version and many states.
    """
    hashed = hashlib.sha256()
    for path in sorted(_PACKAGE.rglob("*.py")):
        part = path.relative_to(_PACKAGE)
        if part.parts[0] not in _NO_INFLUENCE:
            hashed.update(f"{part}\0".encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


@dataclass(frozen=True)
class PolicyChoice:
    """A policy with the values of its fields; compares and pickles as plain data."""

    name: str
    fields: str  # JSON object, every field

    @staticmethod
    def of(name: str, given: Mapping[str, Any]) -> PolicyChoice:
        """Check *given* as `build_policy` does, and add the defaults of the other fields."""
        return PolicyChoice(name, json.dumps(_fields(build_policy(name, given)), sort_keys=True))

    def build(self) -> object:
        """Return a new instance. Raises `UnknownPolicyError` or `PluginError` where the plugin is not installed."""
        return build_policy(self.name, json.loads(self.fields))

    def plugin(self) -> str:
        """Return what provides the policy: distribution, version and a hash of the module's source."""
        return _plugin(self.name)


def _fields(policy: Any) -> dict[str, Any]:
    return {item.name: _plain(getattr(policy, item.name)) for item in dataclasses.fields(policy) if item.init}


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return getattr(value, "name", value)  # an Enum is configured by its name


@cache
def _plugin(name: str) -> str:
    info = find_policy(name)
    file = inspect.getsourcefile(info.cls)
    content = Path(file).read_bytes() if file and Path(file).exists() else b""
    return f"{info.distribution} {info.version} {hashlib.sha256(content).hexdigest()[:12]}"


def digest(value: Any) -> bytes:
    """Return a hash of *value*: dataclasses, arrays, containers and scalars, compared by content.

    Objects that are expensive to hash (workloads, recordings) are hashed once each.
    """
    hashed = hashlib.sha256()
    _feed(hashed, value)
    return hashed.digest()


_large: dict[int, tuple[Any, bytes]] = {}  # by id; holds the object, so that its id stays its own


def _feed(hashed: Any, value: Any) -> None:
    if isinstance(value, np.ndarray):
        hashed.update(f"{value.dtype}{value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        members = {item.name: getattr(value, item.name) for item in dataclasses.fields(value)}
        if any(isinstance(member, np.ndarray) for member in members.values()):
            if id(value) not in _large:
                inner = hashlib.sha256()
                _feed(inner, members)
                _large[id(value)] = (value, inner.digest())
            hashed.update(_large[id(value)][1])
        else:
            hashed.update(type(value).__name__.encode())
            _feed(hashed, members)
    elif isinstance(value, Mapping):
        hashed.update(b"{")
        for key, item in value.items():
            hashed.update(f"{key}=".encode())
            _feed(hashed, item)
        hashed.update(b"}")
    elif isinstance(value, list | tuple):
        hashed.update(b"[")
        for item in value:
            _feed(hashed, item)
        hashed.update(b"]")
    else:
        hashed.update(f"{value!r};".encode())


def scenario_hash(scenario: Scenario) -> str:
    """Return the hash of *scenario* apart from its seed, and of the code that runs it."""
    members = {item.name: getattr(scenario, item.name) for item in dataclasses.fields(scenario) if item.name != "seed"}
    return hashlib.sha256(source_hash().encode() + digest(members)).hexdigest()[:HASH_LENGTH]


def config_hash(scenario: str, policy: PolicyChoice) -> str:
    """Return the hash of a configuration: a scenario (its hash) under a policy of an installed plugin."""
    text = f"{scenario}\0{policy.name}\0{policy.fields}\0{policy.plugin()}"
    return hashlib.sha256(text.encode()).hexdigest()[:HASH_LENGTH]


def lane_hash(config: str, seed: int, replicate: int) -> str:
    """Return the hash of one lane of a configuration (its hash)."""
    return hashlib.sha256(f"{config}\0{seed}\0{replicate}".encode()).hexdigest()[:HASH_LENGTH]


@cache
def provenance() -> dict[str, str]:
    """Return where and with what rows are computed: columns of the store beside the numbers."""
    try:
        ours = version("spepolicy")
    except PackageNotFoundError:
        ours = "not installed"
    commit, dirty = _git()
    tools = {"python": platform.python_version(), **{name: version(name) for name in ("numpy", "numba", "pluggy")}}
    return {
        "spepolicy": ours,
        "source": source_hash(),
        "commit": commit,
        "dirty": dirty,
        "versions": " ".join(f"{name} {number}" for name, number in tools.items()),
        "machine": f"{platform.node()} {platform.machine()} {platform.system()} {platform.release()}, "
        f"{os.cpu_count()} processors",
    }


def _git() -> tuple[str, str]:
    """Return commit and "true" or "false" of the work tree that spepolicy is in; empty texts without one."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", "-C", str(_PACKAGE.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if not os.path.samefile(git("rev-parse", "--show-toplevel"), _PACKAGE.parent):
            return "", ""  # an installed copy inside somebody else's work tree
        return git("rev-parse", "HEAD"), str(bool(git("status", "--porcelain"))).lower()
    except (OSError, subprocess.SubprocessError):
        return "", ""
