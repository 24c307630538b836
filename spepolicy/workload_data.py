"""The addresses of a program's data, reduced to a few extents a function, and as text in a workload's description.

*What is kept*: for each function, and each of its loads and stores in the L1 cache or beyond (`KINDS`), the share of
accesses that fall into each of at most `MOST_EXTENTS` runs of memory, within which all addresses of a step are alike.
So regions, hot places and the size of what is touched survive, and of a hot structure the fields; which pages are
reused follows, as finely as the extents tell pages apart.

*What is lost*: the order of accesses. Two records are independent draws, so there are no strides and no streams: SPE
takes one operation of thousands, between two of which no stride is visible; but that a scan moves on from record to
record is not kept either. Holes within an extent are filled.

*As text*: section `data` of a description (`spepolicy.workload`) has `regions`, name -> `BEGIN+BYTES`, and `functions`,
function -> kind -> extents with commas between them, each `BEGIN+BYTES/STEP SHARE`: `0x5500021040+4096/8 0.25`. Numbers
are hexadecimal for BEGIN, else decimal; shares sum to 1 within 1e-3 and are scaled to do so.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from spepolicy.description import Node
from spepolicy.machine.data_addresses import KINDS, SHARE_BITS, DataAddresses, Region

__all__ = ["LEAST_ACCESSES", "MOST_EXTENTS", "Extent", "build_data", "describe_data", "extents_of"]

MOST_EXTENTS = 6
LEAST_ACCESSES = 30  # fewer say too little of where the others are
_LONGEST = 1 << 34  # addresses in an extent (spepolicy.machine.data_addresses)
_ALIGNED = 0.9  # of an extent's accesses, that its step must hold for
_RARE = 0.005  # of the accesses, that a region is left out below
_STEPS = (8, 4, 2, 1)
_TEXT = re.compile(r"0x([0-9a-f]{1,16})\+(\d{1,15})/([1248]) (0\.\d+|1(?:\.0+)?|0)")
_REGION = re.compile(r"0x([0-9a-f]{1,16})\+(\d{1,15})")


class Extent(NamedTuple):
    """A run of addresses that are alike: begin, begin + step, ... below begin + size."""

    begin: int
    size: int  # bytes, a multiple of step
    step: int
    share: float


def extents_of(addresses: NDArray[np.uint64], cuts: Sequence[int] = (), most: int = MOST_EXTENTS) -> list[Extent]:
    """Return the extents that tell best where *addresses* lie, at most *most*, and none across one of *cuts*.

    What lies between two cuts and has hardly any of the accesses is dropped. The run from the first to the last of the
    others is split where that raises the likelihood of the addresses most, again and
    again, and what lies between the last address of a part and the first of the next is left out. A split must be
    worth the three numbers that it adds (Bayesian information criterion: log(n) / 2 each).
    """
    places = np.sort(addresses)
    least_gain = 1.5 * np.log(len(places))
    bounds = np.unique(np.searchsorted(places, np.array([0, *sorted(cuts), (1 << 64) - 1], np.uint64))).tolist()
    parts = [(begin, end) for begin, end in pairwise(bounds) if end - begin >= _RARE * len(places)]
    parts = sorted(sorted(parts, key=lambda it: it[0] - it[1])[:most])
    splits = [_best_split(places[begin:end]) for begin, end in parts]
    while len(parts) < most:
        n = int(np.argmax([gain for gain, _ in splits]))
        gain, middle = splits[n]
        begin, end = parts[n]
        if gain < least_gain and int(places[end - 1] - places[begin]) < _LONGEST:
            break
        halves = [(begin, begin + middle), (begin + middle, end)]
        parts[n : n + 1] = halves
        splits[n : n + 1] = [_best_split(places[first:last]) for first, last in halves]
    total = sum(end - begin for begin, end in parts)
    return [_extent(places[begin:end], total) for begin, end in parts]


def _extent(places: NDArray[np.uint64], total: int) -> Extent:
    step = next(s for s in _STEPS if s == 1 or (places % np.uint64(s) == 0).mean() >= _ALIGNED)
    begin, last = int(places[0]) // step, int(places[-1]) // step
    return Extent(begin * step, (last + 1 - begin) * step, step, len(places) / total)


def _best_split(places: NDArray[np.uint64]) -> tuple[float, int]:
    """Return the gain in log likelihood of the best split of *places*, sorted, and the index where it is."""
    new = np.flatnonzero(np.diff(places)) + 1  # the first of each run of equal ones, but for the first
    if not len(new):
        return 0.0, 0
    n = float(len(places))
    left, right = new.astype(float), n - new
    left_length = (places[new - 1] - places[0]).astype(float) + 1
    right_length = (places[-1] - places[new]).astype(float) + 1
    together = n * np.log(n / (float(places[-1] - places[0]) + 1))
    gain = left * np.log(left / left_length) + right * np.log(right / right_length) - together
    best = int(np.argmax(gain))
    return float(gain[best]), int(new[best])


def describe_data(
    names: Sequence[str],
    function: NDArray[np.int64],
    kind: NDArray[np.int64],
    addresses: NDArray[np.uint64],
    cuts: Sequence[int] = (),
) -> dict[str, dict[str, str]]:
    """Return `functions` of the section `data`.

    :param names: of functions.
    :param function: index in *names* of each access.
    :param kind: index in `KINDS` of each access.
    :param addresses: VA of each access.
    :param cuts: VAs at which a region begins or ends.
    """
    found: dict[str, dict[str, str]] = {}
    key = function * len(KINDS) + kind
    order = np.argsort(key, kind="stable")
    bounds = np.flatnonzero(np.diff(key[order], prepend=-1, append=-1))
    for begin, end in pairwise(bounds.tolist()):
        if end - begin >= LEAST_ACCESSES:
            which, what = divmod(int(key[order[begin]]), len(KINDS))
            found.setdefault(names[which], {})[KINDS[what]] = _text(extents_of(addresses[order[begin:end]], cuts))
    return found


def _text(extents: Sequence[Extent]) -> str:
    shares = [f"{extent.share:.4f}".rstrip("0").rstrip(".") for extent in extents]
    return ", ".join(
        f"{e.begin:#x}+{e.size}/{e.step} {share}" for e, share in zip(extents, shares, strict=True) if share != "0"
    )


def build_data(node: Node, functions: Sequence[str]) -> DataAddresses:
    """Return the arrays of a section `data`; *functions*: those of the workload, in their order.

    :raises ConfigurationError: as `spepolicy.workload.build_workload` does.
    """
    part = node.fields(("functions",), ("regions",))
    list_of = np.full((len(functions), len(KINDS)), -1, np.int64)
    rows: list[tuple[int, int, int, int]] = []
    lists = 0
    index = {name: n for n, name in enumerate(functions)}
    for name, entry in part["functions"].entries().items():
        if name not in index:
            Node(name, entry.key, entry.where).one_of(functions, "function")
        kinds: Mapping[str, Node] = entry.fields((), KINDS)
        for kind, text in kinds.items():
            rows += [(begin, places, step, (lists << SHARE_BITS) + below) for begin, places, step, below in _list(text)]
            list_of[index[name], KINDS.index(kind)] = lists
            lists += 1
        _borrow(list_of[index[name]])
    table = np.array(rows, np.uint64).reshape(-1, 4)
    regions = part["regions"].entries() if "regions" in part else {}
    return DataAddresses(
        list_of=list_of,
        below=table[:, 3].astype(np.int64),
        begin=table[:, 0].copy(),
        places=table[:, 1].astype(np.int64),
        step=table[:, 2].copy(),
        regions=tuple(_region(name, entry) for name, entry in regions.items()),
    )


def _borrow(lists: NDArray[np.int64]) -> None:
    """Give a kind of access that was too rare to have extents those of its like: hit for miss, else load for store."""
    for kind, others in ((0, (1, 2, 3)), (1, (0, 3, 2)), (2, (3, 0, 1)), (3, (2, 1, 0))):
        if lists[kind] < 0:
            lists[kind] = next((lists[other] for other in others if lists[other] >= 0), -1)


def _list(node: Node) -> list[tuple[int, int, int, int]]:
    """Return begin, places, step and share up to and with it of each extent."""
    found = []
    for text in node.text().split(","):
        match = _TEXT.fullmatch(text.strip())
        if match is None:
            rule = f"{text.strip()[:60]!r} in it is no extent"
            raise node.wrong(rule, "Write BEGIN+BYTES/STEP SHARE, such as 0x5500021040+4096/8 0.25.")
        begin, size, step = int(match[1], 16), int(match[2]), int(match[3])
        if not 0 < size <= _LONGEST or size % step or begin + size > 1 << 64:
            rule = f"{text.strip()!r} in it has a size that is not a multiple of its step from 1 to {_LONGEST:,} bytes"
            raise node.wrong(rule, "Check the size.")
        found.append((begin, size // step, step, Fraction(match[4])))
    total = sum((share for *_, share in found), Fraction(0))
    if abs(total - 1) > Fraction(1, 1000):
        raise node.wrong(f"its shares sum to {float(total):.6g} and must sum to 1 within 0.001", "Change one of them.")
    below, rows = Fraction(0), []
    for begin, places, step, share in found:
        below += share / total
        rows.append((begin, places, step, int(below * (1 << SHARE_BITS))))
    return rows


def _region(name: str, node: Node) -> Region:
    match = _REGION.fullmatch(node.text())
    if match is None or not int(match[2]):
        raise node.wrong("it is no region", "Write BEGIN+BYTES, such as 0x5500021000+139264.")
    return Region(name, int(match[1], 16), int(match[2]))
