"""Which data a sampled load or store accesses, where the workload knows: a virtual address for readers of the log.

No rule of the machine depends on it, so nothing here is compiled and nothing of it is in the machine's tables. The
machine logs a made-up address, which says no more than the level that served the access (`spepolicy.machine.trace`). A
workload that was recorded or captured knows the addresses of each of its functions as *extents*, runs of memory with a
share of the accesses each (`spepolicy.workload_data`). Readers of the log draw one of them: by a hash of what the log
has of the sample, so that a lane gives the same address whenever it is read.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["KINDS", "SHARE_BITS", "DataAddresses", "Region", "data_addresses"]

KINDS = ("load", "load_miss", "store", "store_miss")
"""Accesses that are told apart: loads (and atomics) and stores, each in the L1 cache or beyond."""

SHARE_BITS = 24  # of the random bits choose the extent
_PLACE_BITS = 29  # of them, the place in it: places are below 2**34, and the product below 2**63
_L1D_REFILL = 1 << 3
_STORE_ONLY = 4  # OpType of a store that is no atomic


class Region(NamedTuple):
    """A part of the program's memory that has a name: [heap], [stack], a file."""

    name: str
    begin: int  # VA
    size: int  # bytes


class DataAddresses(NamedTuple):
    """The extents of a workload's functions, as lists one after the other."""

    list_of: NDArray[np.int64]  # [F, KINDS] number of the list of a function's accesses of a kind; -1 for none
    below: NDArray[
        np.int64
    ]  # [E] number of its list << SHARE_BITS, plus the shares up to and with it in 2**-SHARE_BITS
    begin: NDArray[np.uint64]  # [E] VA
    places: NDArray[np.int64]  # [E] how many addresses there are in it, below 2**34
    step: NDArray[np.uint64]  # [E] bytes from one to the next
    regions: tuple[Region, ...]


def data_addresses(
    logged: NDArray[np.uint64],
    at_ps: NDArray[np.int64],
    kind: NDArray[np.integer],
    events: NDArray[np.uint64],
    function: NDArray[np.integer],
    known: DataAddresses,
) -> NDArray[np.uint64]:
    """Return the VA of each of n loads and stores: *logged* for those of which nothing is known.

    :param logged: the address that the machine drew.
    :param at_ps: guest time of the selection.
    :param kind: machine.scenario.OpType.
    :param events: Events packet.
    :param function: index of Workload.function_names.
    """
    addresses = logged.copy()
    refill = events & np.uint64(_L1D_REFILL) != 0
    lists = known.list_of[function, 2 * (kind == _STORE_ONLY) + refill]
    chosen = lists >= 0
    from spepolicy.machine.draw import draws  # compiled code: a configuration is read without it

    bits = draws(logged[chosen], at_ps[chosen])
    share = (bits & np.uint64((1 << SHARE_BITS) - 1)).astype(np.int64)
    extent = np.searchsorted(known.below, (lists[chosen] << SHARE_BITS) + share, side="right")
    fraction = bits >> np.uint64(SHARE_BITS) & np.uint64((1 << _PLACE_BITS) - 1)
    place = fraction * known.places[extent].astype(np.uint64) >> np.uint64(_PLACE_BITS)
    addresses[chosen] = known.begin[extent] + place * known.step[extent]
    return addresses
