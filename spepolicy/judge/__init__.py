"""Reads what the machine logged, ground truth included, and says what it means. Nothing here runs the machine."""
