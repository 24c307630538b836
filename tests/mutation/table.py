"""What became of the sample: results.tsv, a line a mutant, and what README.md quotes of it.

python -m tests.mutation.table        # writes the figures and the list of survivors into README.md
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .mutants import Mutant

RESULTS = Path(__file__).with_name("results.tsv")
COLUMNS = ("outcome", "test", "file", "line", "function", "was", "now", "key")
OUTCOMES = ("caught", "survived", "undecided", "not run")
EQUIVALENT = "equivalent: "
PAGE = Path(__file__).with_name("README.md")
_BEGIN, _END = "<!-- {} -->", "<!-- end -->"


def known(path: Path) -> dict[str, list[str]]:
    """Return the lines of a table of results, by the mutants' keys; of two for one key the later."""
    if not path.exists():
        return {}
    rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()[1:]]
    return {row[-1]: row for row in rows}


def key_of(mutant: Mutant) -> str:
    """Return the mutant's key in one line."""
    return " | ".join(" ".join(part.split()) for part in mutant.key.split("\t"))


def row_of(mutant: Mutant, outcome: str, test: str) -> list[str]:
    """Return a line of the table."""
    texts = [" ".join(text.split())[:100] for text in (mutant.was, mutant.now)]
    return [outcome, test, mutant.path, str(mutant.line), mutant.function, *texts, key_of(mutant)]


def write(path: Path, done: dict[str, list[str]], mutants: Sequence[Mutant]) -> None:
    """Write the table: a line for each mutant of the sample that has been tried, in the order of the sample, its place
    as of today.
    """
    rows = [row_of(it, *done[key_of(it)][:2]) for it in mutants if key_of(it) in done]
    path.write_text("".join("\t".join(row) + "\n" for row in [list(COLUMNS), *rows]), encoding="utf-8")


def figures(rows: Sequence[Sequence[str]]) -> str:
    """Say how many were tried and caught: plainly, and without those that are equivalent."""
    count = Counter(row[0] for row in rows)
    same = sum(row[1].startswith(EQUIVALENT) for row in rows)
    caught = count["caught"]
    share = f"{100 * caught / max(1, len(rows)):.1f} %"
    without = f"{100 * caught / max(1, len(rows) - same):.1f} %"
    parts = ", ".join(f"{count[it]} {it}" for it in OUTCOMES)
    return f"{len(rows)} tried: {parts}. Caught: {share}; of those that are not equivalent ({same}): {without}"


def survivors(rows: Sequence[Sequence[str]]) -> str:
    """Return the table of the page: what was not caught, and why."""
    lines = ["| where | change | outcome | reason |", "|---|---|---|---|"]
    for outcome, why, file, _, function, was, now, _ in sorted(
        (row for row in rows if row[0] != "caught"), key=lambda row: (row[2], row[4], row[5], row[6])
    ):
        texts = [f"`{text.replace('|', chr(92) + '|')}`" for text in (was, now)]
        lines.append(
            f"| `{file.removeprefix('spepolicy/')}` {function} | {texts[0]} → {texts[1]} | {outcome} | {why} |"
        )
    return "\n".join(lines) + "\n"


def refreshed(page: str, rows: Sequence[Sequence[str]]) -> str:
    """Return the text of README.md with what *rows* say between its marks."""
    for mark, text in (("figures", figures(rows)), ("survivors", survivors(rows).strip())):
        head, _, rest = page.partition(_BEGIN.format(mark))
        _, _, tail = rest.partition(_END)
        page = f"{head}{_BEGIN.format(mark)}\n{text}\n{_END}{tail}"
    return page


if __name__ == "__main__":
    PAGE.write_text(refreshed(PAGE.read_text(encoding="utf-8"), list(known(RESULTS).values())), encoding="utf-8")
