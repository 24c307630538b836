"""experiments/benchmark/walker.py: its address spaces are whole and apart from each other."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import numpy as np

from spepolicy.mmu import at


def test_every_walk_of_every_space_ends_in_memory_of_its_own(load: Callable[[str], ModuleType]) -> None:
    module = load("walker")
    queries = module.build(5, 200, 1, buffer_pages=4, layouts=2)
    par = at("S12E1W", queries.va, queries.registers, queries.memory, space=queries.space)
    assert np.all(par & np.uint64(1) == 0)
    pages = (par & np.uint64(0xFFFF_FFFF_F000)) // np.uint64(module.SPACE_BYTES)
    assert len({(int(space), int(page)) for space, page in zip(queries.space, pages, strict=True)}) == 5
    assert len(set(pages.tolist())) == 5
