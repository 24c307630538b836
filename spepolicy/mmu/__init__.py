"""Two-stage translation (VMSAv8-64) over descriptors in simulated physical memory."""
