"""The check that runs a policy through the whole catalogue of corner cases."""

from __future__ import annotations

from spepolicy.plugins import installed_policies
from spepolicy.testing.registry import CheckFailed, check
from spepolicy.testing.subject import Subject

_SHOWN = 3  # disagreements that a message quotes


def _installed_name(policy: object) -> str | None:
    """Return the name under which *policy* is installed, if it is, and has the defaults that verdicts are about."""
    for name, info in installed_policies().items():
        if info.cls is type(policy):
            return name if policy == info.cls() else None
    return None


@check("hooks_run")
def _catalogue(subject: Subject) -> None:
    """In no case of the catalogue the policy does what the architecture forbids, or not what its verdict says."""
    from spepolicy.catalogue.run import run_one_policy

    name = _installed_name(subject.policy)
    outcomes = run_one_policy(name or subject.name, subject.policy, verdicts=name is not None)
    wrong = [f"{outcome.case}: {text}" for outcome in outcomes for text in outcome.disagreements]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckFailed(
            f"{'; '.join(wrong[:_SHOWN])}{more}. Remedy: `python -m spepolicy task=catalogue +policy=NAME` shows "
            "all of it; repair the policy, or declare it with the reason why its design costs that."
        )
