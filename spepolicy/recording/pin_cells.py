"""What a real arm64 kernel did to one guest page, operation by operation: the measured cells, in a compact text form.

A *cell* is one operation of the host on one page (or on the 2 MiB around it), for one backing of the guest's memory and
one state of the page. The experiment ran a bare-metal guest of 2 MiB, whose CPU reads and writes the page afterwards. A
line of the file is a cell, columns separated by tabs:

    kernel      6.1 or 6.12
    run         what was special: "" or movablecore (the page in ZONE_MOVABLE), no_hafdbs (a CPU without hardware
                access flag), fresh_boot
    operation   its name in the experiment
    backing     A anonymous 4 KiB, H anonymous THP, S shared memory (memfd)
    state       U unpinned, M mlocked, P pinned long-term, B both
    events      what reached KVM during the operation, in order. NAME[first,end] with pages of the 2 MiB, the page being
                3; NAME alone where the log gives counts only. *n: n times in a row. Names are those of the MMU notifier
                events, and age, test_age, set_spte (change_pte), wrprotect
    page        what backs the page afterwards: same, moved, swapped, none
    read        same, lost (other content) or error: what the guest's CPU then reads
    read_events faults (translation1: translation fault of level 1), notifier events, and maps (block.rw: a block,
                writable) until it had
    write       ok, error, or device (KVM returns to the VMM as for an access to a device)
    write_events
    pin         what a device with a long-term pin then sees: coherent, stale (not the page that the guest sees), or ""

    python -m spepolicy.recording.pin_cells FOLDER OUT.tsv

makes the file from the folder of the experiment's logs (*.trace.gz) and tables (table_*.json).
"""

from __future__ import annotations

import gzip
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

__all__ = ["Cell", "read_cells", "write_cells"]

EVENTS = ("UNMAP", "CLEAR", "PROTECTION_VMA", "PROTECTION_PAGE", "SOFT_DIRTY", "RELEASE", "MIGRATE", "EXCLUSIVE")
_TABLE_NAMES = dict(zip(("UNMAP", "CLEAR", "PROT_VMA", "PROT_PAGE", "SOFT_DIRTY"), EVENTS, strict=False))
_FAULTS = {4: "translation", 8: "access_flag", 12: "permission"}
_PAGE, _PAGES = 0x40003, 512  # the guest frame of the page, and the pages of the region
_RUNS = {
    "6.1": ("table_6.1.json", ""),
    "6.1 no_hafdbs": ("table_6.1_a72_nvhe.json", "no_hafdbs"),
    "6.1 movablecore": ("table_6.1_movablecore.json", "movablecore"),
    "6.1 fresh_boot": ("table_6.1_compact_fresh_boot.json", "fresh_boot"),
    "6.12": ("table_6.12.json", ""),
}
_LOGS = ("pt61_anon4k.trace.gz", "pt61_thp_shmem.trace.gz")


@dataclass(frozen=True)
class Cell:
    """One measured cell; see the module."""

    kernel: str
    run: str
    operation: str
    backing: str
    state: str
    events: str
    page: str
    read: str
    read_events: str
    write: str
    write_events: str
    pin: str

    def counts(self, phase: str) -> dict[str, int]:
        """Return how often each event of *phase* (events, read_events, write_events) came, without ranges and maps."""
        found: dict[str, int] = {}
        for word in getattr(self, phase).split():
            name, _, times = word.partition("*")
            name = name.partition("[")[0]
            if not name.startswith(("block.", "page.")):
                found[name] = found.get(name, 0) + int(times or 1)
        return found


def read_cells(path: Path) -> list[Cell]:
    """Read a file that `write_cells` wrote."""
    lines = path.read_text(encoding="utf-8").splitlines()
    assert lines[0].split("\t") == [it.name for it in fields(Cell)]
    return [Cell(*line.split("\t")) for line in lines[1:]]


def write_cells(cells: list[Cell], path: Path) -> None:
    """Write *cells* as text, with a heading."""
    rows = [[it.name for it in fields(Cell)], *(list(astuple(cell)) for cell in cells)]
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")


def measured(folder: Path) -> list[Cell]:
    """Return all cells of the experiment in *folder*: ranges from the logs where there are any, else counts."""
    phases: dict[tuple[str, str, str], dict[str, str]] = {}
    for name in _LOGS:
        phases.update(_from_log(folder / name))
    cells = []
    for key, (name, run) in _RUNS.items():
        for row in json.loads((folder / name).read_text()):
            kernel = key.split()[0]
            ordered = phases.get((row["op"], row["mode"], row["backing"])) if key == "6.1" else None
            cells.append(_cell(kernel, run, row, ordered or _from_counts(row)))
    return cells


def _cell(kernel: str, run: str, row: dict[str, Any], phases: dict[str, str]) -> Cell:
    before, after = row["pfn0"], row["pfn1"]
    kind = "swapped" if after.startswith("swap") else "none" if after == "none" else "moved"
    read = "error" if row["after_read.err"] != "0" else "same" if row["after_read.val"] != "0" else "lost"
    write = {"0": "ok", "-1001": "device"}.get(row["after_write.err"], "error")
    pin = {True: "coherent", False: "stale", None: ""}[row.get("coherent")]
    return Cell(
        kernel, run, row["op"], row["backing"], row["mode"], phases["op"], "same" if before == after else kind,
        read, phases["after_read"], write, phases["after_write"], pin,
    )  # fmt: skip


def _from_counts(row: dict[str, Any]) -> dict[str, str]:
    """Return the events of each phase from the counts of a table."""
    found = {"op": [(_TABLE_NAMES[name], count) for name, count in row["inv"].items()]}
    found["op"] += [(name, row[f"{name}_gfn"]) for name in ("age", "test_age", "set_spte") if row[f"{name}_gfn"]]
    for phase in ("op", "after_read", "after_write"):
        words = found.setdefault(phase, [])
        for name, count in row["phases"].get(phase, {}).items():
            fault = re.fullmatch(r"fault (\w+) L(\d)", name)
            if fault:
                words.append((fault[1] + fault[2], count))
            elif name.startswith("inv_"):
                words.append((_TABLE_NAMES[name[4:]], count))
            elif phase != "op" and name in ("age_gfn", "test_age_gfn", "set_spte_gfn"):
                words.append((name.removesuffix("_gfn"), count))
            elif name == "s2_wrprotect":
                words.append(("wrprotect", count))
    return {phase: " ".join(f"{name}*{n}" if n > 1 else name for name, n in words) for phase, words in found.items()}


def _from_log(path: Path) -> Iterator[tuple[tuple[str, str, str], dict[str, str]]]:
    """Yield (cell, its events by phase, in order and with their ranges) of a log."""
    key, address, base, phase = ("", "", ""), 0, 0, ""
    words: dict[str, list[str]] = {}
    with gzip.open(path, "rt", errors="replace") as log:
        for line in log:
            head = re.search(r"CELL op=(\S+) mode=(\w) backing=(\w) gfn=\w+ hva=(\w+) region=(\w+)-", line)
            if head:
                if words:
                    yield key, {name: _repeats(events) for name, events in words.items()}
                key, address, base = (head[1], head[2], head[3]), int(head[4], 16), int(head[5], 16)
                words = {"op": [], "after_read": [], "after_write": []}
            mark = re.search(r"PHASE (\w+)", line)
            phase = mark[1] if mark else phase
            word = _word(line, address, base) if phase in words else ""
            if word:
                words[phase].append(word)
    yield key, {name: _repeats(events) for name, events in words.items()}


def _word(line: str, address: int, base: int) -> str:
    """Return what a line says about the page, "" if nothing."""
    found = re.search(r"mn_inv_start: .*start=0x(\w+) end=0x(\w+) flags=0x\w+ event=(\d+)", line)
    if found:
        first, end = int(found[1], 16), int(found[2], 16)
        clipped = max(first - base >> 12, 0), min(end - base >> 12, _PAGES)
        return f"{EVENTS[int(found[3])]}[{clipped[0]},{clipped[1]}]" if first <= address < end else ""
    found = re.search(r" (age|test_age|set_spte)_gfn: .*start=0x(\w+) end=0x(\w+)", line)
    if found:
        first, end = int(found[2], 16), int(found[3], 16)
        return f"{found[1]}[{first & 0xFFF},{end - (first & ~0xFFF)}]" if first <= _PAGE < end else ""
    found = re.search(r" s2_(map|wrprotect): .*addr=0x(\w+) size=0x(\w+)(?: phys=0x\w+ prot=0x(\w+))?", line)
    if found:
        first, count = int(found[2], 16) >> 12, int(found[3], 16) >> 12
        if not first <= _PAGE < first + count:
            return ""
        if found[1] == "wrprotect":
            return f"wrprotect[{first & 0xFFF},{(first & 0xFFF) + count}]"
        return f"{'block' if count > 1 else 'page'}.{'rw' if int(found[4], 16) & 2 else 'ro'}"
    found = re.search(r"kvm_guest_fault: ipa 0x(\w+), hsr 0x(\w+)", line)
    if found and int(found[1], 16) >> 12 == _PAGE:
        status = int(found[2], 16)
        return f"{_FAULTS[status & 0x3C]}{status & 3}"
    return ""


def _repeats(words: list[str]) -> str:
    out: list[tuple[str, int]] = []
    for word in words:
        if out and out[-1][0] == word:
            out[-1] = (word, out[-1][1] + 1)
        else:
            out.append((word, 1))
    return " ".join(f"{word}*{n}" if n > 1 else word for word, n in out)


def main() -> int:
    """Run the command."""
    if len(sys.argv) != 3:
        print("usage: python -m spepolicy.recording.pin_cells FOLDER OUT.tsv", file=sys.stderr)
        return 2
    cells = measured(Path(sys.argv[1]))
    write_cells(cells, Path(sys.argv[2]))
    print(f"{sys.argv[2]}: {len(cells)} cells")
    return 0


if __name__ == "__main__":
    sys.exit(main())
