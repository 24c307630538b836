"""The corner cases of the discussion, one file a scenario; index.yaml lists them. Run with task=catalogue."""
