"""Which policies a composed configuration asks for: the one that the run is about, and its baselines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spepolicy.completion import HIDDEN
from spepolicy.errors import ConfigurationError, UnknownPolicyError, nearest
from spepolicy.plugins import build_policy, installed_policies
from spepolicy.schema import MISSING

__all__ = ["BARE_METAL", "baseline_policy", "chosen_policy"]

BARE_METAL = "bare_metal"  # excess blackout is measured against it, so it always runs


def chosen_policy(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the policy that a composed *config* chooses, and its fields."""
    policy = config.get("policy", MISSING)
    if policy == MISSING or policy is None:
        raise ConfigurationError(
            f"no policy is chosen. Add +policy=NAME; installed: {', '.join(installed_policies())}."
        )
    if not isinstance(policy, Mapping) or HIDDEN not in policy:
        raise ConfigurationError(
            f"policy={policy}: not an installed policy's configuration. Choose one with +policy=NAME; "
            f"installed: {', '.join(installed_policies())}."
        )
    given = {key: value for key, value in policy.items() if key != HIDDEN and value != MISSING}
    return str(policy[HIDDEN]), given


def baseline_policy(name: str) -> object:
    """Return an instance of the policy *name* with its default fields."""
    try:
        return build_policy(name, {})
    except UnknownPolicyError as error:
        raise ConfigurationError(
            f"baselines=[{name}]: policy '{name}' is not installed. Installed: {', '.join(error.known)}."
            f"{nearest(name, error.known)}"
        ) from error
