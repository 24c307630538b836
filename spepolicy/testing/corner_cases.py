"""The check that runs a policy through the whole catalogue of corner cases."""

from __future__ import annotations

from spepolicy.plugins import installed_policies
from spepolicy.testing.registry import CheckFailed, check
from spepolicy.testing.subject import Subject

_SHOWN = 3  # disagreements that a message quotes


def _name_for_verdicts(policy: object) -> str:
    """Return the name under which *policy* is installed, if it is, and has the defaults that verdicts are about."""
    from spepolicy.catalogue.verdict import UNKNOWN

    for name, info in installed_policies().items():
        if info.cls is type(policy) and policy == info.cls():
            return name
    return UNKNOWN


@check("hooks_run")
def _catalogue(subject: Subject) -> None:
    """In no case of the catalogue the policy does what the architecture forbids, or not what its verdict says."""
    from spepolicy.catalogue.run import run_one_policy

    outcomes = run_one_policy(_name_for_verdicts(subject.policy), subject.policy)
    wrong = [f"{outcome.case}: {text}" for outcome in outcomes for text in outcome.disagreements]
    if wrong:
        more = f", and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise CheckFailed(
            f"{'; '.join(wrong[:_SHOWN])}{more}. Remedy: `python -m spepolicy task=catalogue +policy=NAME` shows "
            "all of it; repair the policy, or declare it with the reason why its design costs that."
        )
