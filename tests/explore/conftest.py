"""Small explorations, each done once a test run."""

from __future__ import annotations

from functools import cache
from typing import Any

from spepolicy.explore.bench import Model
from spepolicy.explore.model import Settings, make_model
from spepolicy.explore.search import Bounds, Outcome, search
from spepolicy.plugins import build_policy

# Less of everything than the standard configuration: thousands of states, not millions.
TINY: dict[str, Any] = {
    "buffer_pages": 2, "max_switches": 1, "max_renewals": 1, "max_syscalls": 1, "max_exits": 1, "in_flight": False,
    "edits": "never",
}  # fmt: skip


def model_of(policy: str | object, fields: dict[str, Any] | None = None, **settings: Any) -> Model:
    """Return a model of the tiny configuration with *settings*; *policy* is a name, or an instance."""
    if isinstance(policy, str):
        return make_model(Settings(**(TINY | settings)), build_policy(policy, fields or {}), policy)
    return make_model(Settings(**(TINY | settings)), policy, type(policy).__name__)


@cache
def _explored(
    policy: str, fields: tuple[tuple[str, Any], ...], depth: int, settings: tuple[tuple[str, Any], ...]
) -> Outcome:
    model = model_of(policy, dict(fields), **dict(settings))
    return search(model, Bounds(max_depth=depth, max_states=1_000_000))


def explored(policy: str, depth: int, fields: dict[str, Any] | None = None, **settings: Any) -> Outcome:
    """Explore a shipped policy to *depth* events."""
    return _explored(policy, tuple(sorted((fields or {}).items())), depth, tuple(sorted(settings.items())))
