"""One run from plan to report: simulate, judge, write files, record in MLflow, summarize."""
