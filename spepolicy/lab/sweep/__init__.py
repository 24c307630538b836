"""A sweep: compose its jobs, run their lanes, store rows, compare policies, track."""
