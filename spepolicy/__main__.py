"""`python -m spepolicy`: the same program as the console script `spepolicy`."""

import sys

from spepolicy.cli import main

if __name__ == "__main__":
    sys.exit(main())
