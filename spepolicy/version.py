"""The version of the installed distribution."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

__all__ = ["program_version"]


def program_version() -> str:
    """Return the installed version."""
    try:
        return version("spepolicy")
    except PackageNotFoundError:
        return "(not installed)"
