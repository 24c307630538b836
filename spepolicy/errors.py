"""Errors that a user can cause.

Each message says what is wrong, which value, where, the rule, and the remedy. They all share one base class, so the
command line can print them without a traceback and exit with status 2; everything else is a bug and keeps its
traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "CaptureError",
    "ConfigurationError",
    "HookError",
    "OutputError",
    "PacketError",
    "PluginError",
    "RecordingError",
    "SpePolicyError",
    "StoreError",
    "UnknownPolicyError",
    "WorkerError",
    "nearest",
]


class SpePolicyError(Exception):
    """Base class of every error that has a message for the user."""


class ConfigurationError(SpePolicyError, ValueError):
    """A configuration value has the wrong type, unit or range, or does not fit another value."""


class UnknownPolicyError(SpePolicyError, LookupError):
    """No installed plugin provides a policy of that name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        self.name = name
        self.known = sorted(known)
        super().__init__(
            f"policy '{name}' is not installed (from +policy={name}). Installed: {', '.join(self.known) or 'none'}."
            f"{nearest(name, self.known)}"
        )


class UnsupportedPolicyError(SpePolicyError):
    """A policy says that it cannot run on the machine that is configured."""

    def __init__(self, name: str, reason: str) -> None:
        self.name, self.reason = name, reason
        super().__init__(
            f"policy '{name}' cannot run on this machine: {reason}. Change the setting that it names, or choose "
            "another policy."
        )


class PluginError(SpePolicyError):
    """A plugin cannot be loaded, breaks the contract of `spepolicy.hookspecs`, or clashes with another plugin."""


class HookError(PluginError):
    """A hook implementation raised, or returned or passed something that the contract does not allow."""


class RecordingError(SpePolicyError, ValueError):
    """A host recording cannot be read, or is not what it claims to be."""


class PacketError(SpePolicyError, ValueError):
    """An SPE record cannot be written as packets."""


class CaptureError(SpePolicyError, ValueError):
    """A perf.data file cannot be read at all, or holds no SPE data."""


class OutputError(SpePolicyError, OSError):
    """A result cannot be written where the configuration says."""


class WorkerError(SpePolicyError, RuntimeError):
    """A worker of a sweep died, or is not fit for it."""


class StoreError(OutputError):
    """A sweep's store is in use, damaged, or not a store of this version."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the known name closest to *name*, or an empty string."""
    match = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean '{match[0]}'?" if match else ""
