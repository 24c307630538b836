"""The corner cases of the discussion as scenarios with verdicts: `python -m spepolicy task=catalogue`."""
