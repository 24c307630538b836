"""experiments/benchmark/walker.py: its address spaces are whole and apart from each other."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from spepolicy.mmu import at


def test_every_walk_of_every_space_ends_in_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).resolve().parents[2] / "experiments" / "benchmark"
    monkeypatch.syspath_prepend(str(folder))
    spec = importlib.util.spec_from_file_location("benchmark_walker", folder / "walker.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "benchmark_walker", module)
    spec.loader.exec_module(module)
    queries = module.build(5, 200, 1, buffer_pages=4, layouts=2)
    par = at("S12E1W", queries.va, queries.registers, queries.memory, space=queries.space)
    assert np.all(par & np.uint64(1) == 0)
    pages = (par & np.uint64(0xFFFF_FFFF_F000)) // np.uint64(module.SPACE_BYTES)
    assert len({(int(space), int(page)) for space, page in zip(queries.space, pages, strict=True)}) == 5
    assert len(set(pages.tolist())) == 5
