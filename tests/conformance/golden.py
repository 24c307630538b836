"""The random address spaces of tests/data/at_golden.npz, one case at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.mmu import Memory

Words = NDArray[np.uint64]

DATA = Path(__file__).parents[1] / "data"
SHARED = Path(__file__).parents[3] / "shared" / "data"
RAM = (0x4000_0000, 0x6000_0000)  # the emulated machine's; what a case does not name reads as zero


@dataclass(frozen=True)
class Case:
    """One address space: registers, memory, queries, and what the architecture answers."""

    number: int
    registers: dict[str, int]
    pages: Words  # addresses
    content: Words  # [pages, 512]
    operations: list[str]
    va: Words
    par: Words
    abort: Words
    changed: dict[int, int]  # words that differ after the last query

    def memory(self) -> Memory:
        return Memory.from_pages(self.pages, self.content, zero_ranges=[RAM])


@cache
def golden() -> dict[str, NDArray[Any]]:
    with np.load(DATA / "at_golden.npz") as file:
        return {name: file[name] for name in file.files}


def classes() -> list[str]:
    return [str(name) for name in golden()["classes"]]


def cases(name: str) -> Iterator[Case]:
    """Yield the cases of class *name*."""
    data = golden()
    operations = [str(op) for op in data["ops"]]
    registers = [str(register) for register in data["regs"]]
    for i in np.flatnonzero(data["case_class"] == classes().index(name)):
        words = slice(data["mem_ofs"][i], data["mem_ofs"][i + 1])
        queries = slice(data["q_ofs"][i], data["q_ofs"][i + 1])
        changes = slice(data["changed_ofs"][i], data["changed_ofs"][i + 1])
        pages, content = as_pages(data["mem_addr"][words], data["mem_val"][words])
        yield Case(
            number=int(i),
            registers=dict(zip(registers, data["case_regs"][i].tolist(), strict=True)),
            pages=pages,
            content=content,
            operations=[operations[op] for op in data["q_op"][queries]],
            va=data["q_va"][queries],
            par=data["q_par"][queries],
            abort=data["q_abort"][queries].astype(np.uint64),
            changed=dict(
                zip(data["changed_addr"][changes].tolist(), data["changed_val"][changes].tolist(), strict=True)
            ),
        )


def as_pages(addresses: NDArray[Any], words: Words) -> tuple[Words, Words]:
    """Collect single words into pages: their addresses, and their content, [pages, 512]."""
    addresses = addresses.astype(np.uint64)
    pages, which = np.unique(addresses & ~np.uint64(0xFFF), return_inverse=True)
    content = np.zeros((len(pages), 512), dtype=np.uint64)
    content[which, ((addresses & np.uint64(0xFFF)) >> np.uint64(3)).astype(np.int64)] = words
    return pages, content
