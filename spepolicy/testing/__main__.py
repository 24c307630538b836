"""`python -m spepolicy.testing NAME...`: run the checks on installed policies, with the defaults of their fields."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from spepolicy.errors import SpePolicyError
from spepolicy.plugins import build_policy
from spepolicy.testing import CHECKS, check_policy


def main(arguments: Sequence[str] | None = None) -> int:
    """Run it. Return 0 if every check passed, 1 if one failed, 2 if the command is wrong."""
    parser = argparse.ArgumentParser(prog="python -m spepolicy.testing", description="Check installed policies.")
    parser.add_argument("policy", nargs="*", help="names of installed policies")
    parser.add_argument("--list", action="store_true", help="say what is checked")
    options = parser.parse_args(arguments)
    if options.list:
        for check in CHECKS.values():
            print(f"{check.id:26} {check.summary}")
        return 0
    if not options.policy:
        parser.error("name a policy, or --list")
    failed = False
    for name in options.policy:
        try:
            policy = build_policy(name, {})
        except SpePolicyError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        print(f"{name}:")
        for outcome in check_policy(policy):
            print(f"  {outcome}")
            failed = failed or not outcome.ok
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
