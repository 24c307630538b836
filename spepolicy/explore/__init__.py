"""Explore: every order of events of a small machine, and the shortest trace of each kind of violation."""
