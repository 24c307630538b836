"""Turn what only the judge may know into garbage while a hook runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np

from spepolicy.drivers import simulate as driver
from spepolicy.machine.state import Hook

__all__ = ["with_garbage_for_truth"]

# Tools only add to these, so that garbage can be added before a hook and subtracted after it.
_COUNTED = ("seen", "lost")
_COUNTERS = ("selected", "written", "stage2_faults", "wanted_ps", "diverged_records", "data_loss", "sessions")


@contextmanager
def with_garbage_for_truth() -> Iterator[None]:
    """While this is open, hooks run on a machine whose ground truth is wrong. Results are as without it, unless a
    policy looks at it.
    """
    call = driver._Chunk.call

    def garbled(self: Any, hook: Hook, lanes: Any) -> None:
        m = self.m
        noise = {name: np.random.default_rng(1).integers(1, 1 << 40, getattr(m, name).shape) for name in _COUNTED}
        for name, values in noise.items():
            getattr(m, name)[...] += values
        for n, field in enumerate(_COUNTERS):
            m.truth[field] += 12345 * (n + 1)
        try:
            call(self, hook, lanes)
        finally:
            for name, values in noise.items():
                getattr(m, name)[...] -= values
            for n, field in enumerate(_COUNTERS):
                m.truth[field] -= 12345 * (n + 1)

    with patch.object(driver._Chunk, "call", garbled):
        yield
