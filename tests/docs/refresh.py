"""Write the outputs and numbers of the project's pages again: `python -m tests.docs.refresh [PAGE ...]`.

Without pages, all pages that have any. Run it after a change of the machine, read the difference, and see whether the
words around the numbers are still true.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from .pages import ROOT, Block, as_shown, blocks, elided, result_rows, run
from .provided import PAGES, provide


def _refreshed(block: Block) -> str:
    """Return the text of a console block with the outputs of today, cut where it was cut."""
    text = ""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        provide(block.word("needs"), folder)
        for command, shown in block.commands():
            text += f"$ {command}\n"
            status, output = run(command, folder)
            if status != block.status:
                raise SystemExit(f"{block.label}: exit status {status}, not {block.status}\n{output}")
            printed = as_shown(output, folder)
            text += elided(shown, printed)
    return text


def refresh(page: str) -> None:
    """Write outputs and numbers of *page* again."""
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines(keepends=True)
    for row in result_rows(page):
        print(row.label, flush=True)
        with tempfile.TemporaryDirectory() as name:
            measured = row.measured(Path(name))
        cells = [measured.get(column, cell) for column, cell in enumerate(row.cells)]
        lines[row.line] = f"| {' | '.join(cells)} |\n"
    for block in reversed(blocks(page)):
        if block.language == "console":
            print(block.label, flush=True)
            lines[block.line : block.line + block.text.count("\n")] = [_refreshed(block)]
    (ROOT / page).write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for argument in sys.argv[1:] or PAGES:
        refresh(argument)
