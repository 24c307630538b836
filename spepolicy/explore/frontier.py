"""The states of one level that wait to be unfolded: blocks of encoded states, in memory or on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import OutputError

Ints = NDArray[np.int64]

__all__ = ["Block", "Frontier"]


@dataclass(frozen=True)
class Block:
    """States first, first + 1, ... : state s of the block is in `words` from starts[s] on (`canonical.encode`)."""

    words: Ints
    starts: Ints
    first: int

    def part(self, begin: int, end: int) -> Block:
        """Return states begin..end-1 of the block."""
        if begin == 0 and end >= len(self.starts):
            return self
        low = int(self.starts[begin])
        high = int(self.starts[end]) if end < len(self.starts) else len(self.words)
        return Block(self.words[low:high], self.starts[begin:end] - low, self.first + begin)


def _joined(blocks: list[Block]) -> Block:
    if len(blocks) == 1:
        return blocks[0]
    starts, offset = [], 0
    for block in blocks:
        starts.append(block.starts + offset)
        offset += len(block.words)
    return Block(np.concatenate([block.words for block in blocks]), np.concatenate(starts), blocks[0].first)


class Frontier:
    """Blocks in order. What exceeds *limit* bytes is written to a file in *spill_dir* (the system's folder for
    temporary files by default) and read back when its turn comes.
    """

    def __init__(self, limit: int, spill_dir: str | None) -> None:
        self.limit, self.spill_dir = limit, spill_dir
        self.blocks: list[Block | tuple[int, int, int, int]] = []  # on disk: offset, words, states, first
        self.states = 0
        self.bytes = 0
        self.spilled_bytes = 0
        self._file: tempfile._TemporaryFileWrapper[bytes] | None = None

    def __len__(self) -> int:
        return self.states

    def append(self, block: Block) -> None:
        """Add a block whose states follow those of the block before."""
        self.states += len(block.starts)
        size = block.words.nbytes + block.starts.nbytes
        if self.bytes + size <= self.limit:
            self.bytes += size
            self.blocks.append(block)
            return
        try:
            if self._file is None:
                self._file = tempfile.NamedTemporaryFile(dir=self.spill_dir, prefix="frontier-")  # noqa: SIM115
            offset = self._file.seek(0, 2)
            block.starts.tofile(self._file)
            block.words.tofile(self._file)
        except OSError as error:
            where = Path(self.spill_dir or tempfile.gettempdir())
            raise OutputError(
                f"the states that wait cannot be written to '{where}': {error.strerror or error}. Rule: a folder with "
                "room for the frontier. Remedy: set explore.spill_dir, explore.frontier_memory or a bound."
            ) from error
        self.spilled_bytes += size
        self.blocks.append((offset, len(block.words), len(block.starts), block.first))

    def _load(self, where: tuple[int, int, int, int]) -> Block:
        offset, words, states, first = where
        assert self._file is not None
        self._file.seek(offset)
        starts = np.fromfile(self._file, dtype=np.int64, count=states)
        return Block(np.fromfile(self._file, dtype=np.int64, count=words), starts, first)

    def units(self, most: int, skip: int = 0) -> Iterator[Block]:
        """Yield all states in order but the first *skip*, *most* at a time: what the units are depends on the states
        only.
        """
        pending: list[Block] = []
        held = 0
        for item in self.blocks:
            count = len(item.starts) if isinstance(item, Block) else item[2]
            if skip >= count:
                skip -= count
                continue
            block = item if isinstance(item, Block) else self._load(item)
            begin, skip = skip, 0
            while begin < len(block.starts):
                part = block.part(begin, begin + most - held)
                begin += len(part.starts)
                pending.append(part)
                held += len(part.starts)
                if held == most:
                    yield _joined(pending)
                    pending, held = [], 0
        if pending:
            yield _joined(pending)

    def close(self) -> None:
        """Let go of the blocks and of the file."""
        self.blocks.clear()
        if self._file is not None:
            self._file.close()
            self._file = None
