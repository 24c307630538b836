"""Policies of the kernel list, shipped as plugins through the same entry points as anybody else's."""
