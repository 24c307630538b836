"""`python -m spepolicy.perfdata FILE...`: what each file holds, what was lost in it, and what is damaged.

Exit status: 0 if all files are whole, 1 if one is damaged, 2 if one cannot be read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spepolicy.errors import CaptureError
from spepolicy.perfdata.capture import read

USAGE = "usage: python -m spepolicy.perfdata FILE...\n\nReport what perf.data files with Arm SPE hold."


def main(arguments: Sequence[str]) -> int:
    """Report on the files named in *arguments*; return the exit status."""
    if not arguments or {"-h", "--help"} & set(arguments):
        print(USAGE)
        return 0 if arguments else 2
    status = 0
    for name in arguments:
        try:
            capture = read(name)
        except CaptureError as error:
            print(f"error: {error}", file=sys.stderr)
            status = 2
            continue
        print(capture.report())
        status = max(status, int(not capture.complete))
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
