"""What a policy holds in its hands: batches of vCPUs and VMs, with what KVM can read and the tools that KVM has.

A batch is arrays. Reading a register gives a fresh array of one element a vCPU; a tool acts on every vCPU of the batch,
charges its cost to it, and returns what KVM would learn. `where(mask)` narrows a batch. Nothing here leads to what only
the judge knows: a batch has no reference to the machine, only a ticket for the tools that is void when the hook
returns.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spepolicy.errors import HookError
from spepolicy.hookspecs import Cause, Event

__all__ = ["PinResult", "State", "Vcpus", "Vms", "WalkResult"]

Ints = NDArray[np.int64]
Addresses = NDArray[np.uint64]

_NOTHING = np.zeros(0, dtype=np.int64)

_live: dict[int, Any] = {}
_tickets = count(1)


@contextmanager
def tools(kit: Any) -> Iterator[int]:
    """Make the tools in *kit* available to batches that carry the ticket, while a hook runs."""
    ticket = next(_tickets)
    _live[ticket] = kit
    try:
        yield ticket
    finally:
        del _live[ticket]


def _kit(ticket: int) -> Any:
    try:
        return _live[ticket]
    except KeyError:
        raise HookError(
            "a batch was used after its hook had returned. Rule: policies keep nothing but vcpus.state between hooks. "
            "Remedy: copy what you need into vcpus.state."
        ) from None


def _per_vcpu(values: ArrayLike, size: int, what: str, kind: str) -> NDArray[Any]:
    """Check an array that a policy passes to a tool: one element a vCPU (or a scalar), integers or booleans."""
    array = np.asarray(values)
    if array.ndim == 0:
        array = np.full(size, array)
    if array.shape != (size,):
        raise HookError(
            f"{what} has shape {array.shape}. Rule: one element a vCPU, shape ({size},). "
            "Remedy: use arrays of this batch, such as vcpus.buffer_lo."
        )
    wanted = "iu" if kind == "integer" else "b"
    if array.dtype.kind not in wanted:
        raise HookError(f"{what} has dtype {array.dtype}. Rule: {kind} per vCPU. Remedy: convert it before the call.")
    return array


class State:
    """A policy's own memory for the vCPUs of one batch: `state["field"]` reads a copy, `state["field"] = array` writes.

    The fields are those of the policy's `State` dtype; everything is zero at the start.
    """

    __slots__ = ("_lanes", "_rows", "_vcpus")

    def __init__(self, rows: NDArray[np.void], lanes: Ints, vcpus: Ints) -> None:
        self._rows, self._lanes, self._vcpus = rows, lanes, vcpus

    def _check(self, name: str) -> None:
        if name not in (self._rows.dtype.names or ()):
            declared = ", ".join(self._rows.dtype.names or ()) or "nothing"
            raise HookError(f"state field '{name}' does not exist. Declared in State: {declared}.")

    def __getitem__(self, name: str) -> NDArray[Any]:
        self._check(name)
        return self._rows[name][self._lanes, self._vcpus]

    def __setitem__(self, name: str, values: ArrayLike) -> None:
        self._check(name)
        self._rows[name][self._lanes, self._vcpus] = values


class Vcpus:
    """A batch of n vCPUs at the same point. All properties are arrays of shape (n,)."""

    __slots__ = ("_lanes", "_rows", "_ticket", "_vcpus")

    def __init__(self, ticket: int, lanes: Ints, vcpus: Ints, rows: NDArray[np.void]) -> None:
        self._ticket, self._lanes, self._vcpus, self._rows = ticket, lanes, vcpus, rows

    def __len__(self) -> int:
        return len(self._lanes)

    # ---- what KVM can read ------------------------------------------------------------------------------------------

    def _register(self, name: str) -> Addresses:
        return _kit(self._ticket).register(name, self._lanes, self._vcpus)  # type: ignore[no-any-return]

    @property
    def pmbptr(self) -> Addresses:
        """PMBPTR_EL1, uint64[n]: after a fault, the faulting VA."""
        return self._register("pmbptr")

    @property
    def pmblimitr(self) -> Addresses:
        """PMBLIMITR_EL1, uint64[n]."""
        return self._register("pmblimitr")

    @property
    def pmbsr(self) -> Addresses:
        """PMBSR_EL1 of the hardware, uint64[n]."""
        return self._register("pmbsr")

    @property
    def pmscr(self) -> Addresses:
        """PMSCR_EL1, uint64[n]."""
        return self._register("pmscr")

    @property
    def buffer_lo(self) -> Addresses:
        """First page that the SPU may write to, uint64[n]: PMBPTR_EL1 rounded down to a page."""
        return self.pmbptr & ~np.uint64(0xFFF)

    @property
    def buffer_hi(self) -> Addresses:
        """End of the buffer, uint64[n]: PMBLIMITR_EL1.LIMIT."""
        return self.pmblimitr & ~np.uint64(0xFFF)

    @property
    def fault_status(self) -> Ints:
        """PMBSR_EL1.FSC, int64[n]: kind and level of the fault (spe.md 1.8)."""
        return (self.pmbsr & np.uint64(0x3F)).astype(np.int64)

    @property
    def data_loss(self) -> NDArray[np.bool_]:
        """PMBSR_EL1.DL, bool[n]: a record was cut."""
        lost: NDArray[np.bool_] = (self.pmbsr & np.uint64(1 << 19)) != 0
        return lost

    @property
    def pinned_pages(self) -> Ints:
        """Pages in the set that KVM holds pinned for each vCPU, int64[n]."""
        return self._register("pin_count").astype(np.int64)

    @property
    def state(self) -> State:
        """The policy's own memory (see `State`)."""
        return State(self._rows, self._lanes, self._vcpus)

    # ---- narrowing --------------------------------------------------------------------------------------------------

    def where(self, mask: ArrayLike) -> Vcpus:
        """Return the vCPUs for which bool[n] *mask* is true."""
        chosen = _per_vcpu(mask, len(self), "the mask of where()", "boolean")
        return Vcpus(self._ticket, self._lanes[chosen], self._vcpus[chosen], self._rows)

    # ---- tools ------------------------------------------------------------------------------------------------------

    def walk_stage1(self, lo: ArrayLike, hi: ArrayLike, *, pin_tables: bool = False) -> WalkResult:
        """Walk the guest's stage 1 tables in software for the pages of [lo, hi), uint64[n] virtual addresses.

        Costs a descriptor read a page and three more a table. With *pin_tables* the tables on the way join the pages.
        """
        low = _per_vcpu(lo, len(self), "walk_stage1(lo)", "integer").astype(np.uint64).view(np.int64)
        high = _per_vcpu(hi, len(self), "walk_stage1(hi)", "integer").astype(np.uint64).view(np.int64)
        if not len(self):
            return WalkResult(self, _NOTHING)
        return WalkResult(self, _kit(self._ticket).walk_stage1(self._lanes, self._vcpus, low, high, pin_tables))

    def unpin(self) -> None:
        """Unpin the pages that are pinned for these vCPUs. Their stage 2 entries stay until somebody removes them."""
        if len(self):
            _kit(self._ticket).unpin_current(self._lanes, self._vcpus)

    def inject(self, event: Event, *, data_loss: bool = False) -> None:
        """Stop the SPU if it is not stopped, show *event* in PMBSR_EL1, with DL if *data_loss*, and raise PMBIRQ."""
        if not isinstance(event, Event):
            raise HookError(f"inject() was given {event!r}. Rule: a member of spepolicy.hookspecs.Event.")
        if len(self):
            _kit(self._ticket).inject(self._lanes, self._vcpus, int(event), bool(data_loss))

    def resume(self) -> None:
        """Clear PMBSR_EL1.S and let the SPU go on at the same PMBPTR_EL1."""
        if len(self):
            _kit(self._ticket).resume(self._lanes, self._vcpus)

    def claim(self, cause: Cause | ArrayLike) -> None:
        """Say what KVM believes to be the reason of the fault: a `Cause`, or integers [n] of it. For the judge only."""
        causes = _per_vcpu(int(cause) if isinstance(cause, Cause) else cause, len(self), "claim(cause)", "integer")
        if not len(self):
            return
        if causes.min() < 0 or causes.max() >= len(Cause):
            raise HookError(
                f"claim() was given {causes.min()}..{causes.max()}. "
                f"Rule: spepolicy.hookspecs.Cause, 0..{len(Cause) - 1}."
            )
        _kit(self._ticket).claim(self._lanes, self._vcpus, causes.astype(np.int64))


def _with_status(batch: Vcpus, status: Ints, wanted: int, kind: type[Vcpus]) -> Any:
    """Return the vCPUs of *batch* whose *status* is *wanted*, as a batch of *kind*. Mostly that is all of them, or
    none.
    """
    if not status.any():
        chosen: Any = slice(None) if wanted == 0 else slice(0)
    else:
        chosen = status == wanted
    return kind(batch._ticket, batch._lanes[chosen], batch._vcpus[chosen], batch._rows)


class WalkResult:
    """Outcome of a walk: `ok` and `failed` are batches; `status` is int64[n], 0 or the stage 1 fault status of the
    first bad page.
    """

    __slots__ = ("_batch", "status")

    def __init__(self, batch: Vcpus, status: Ints) -> None:
        self._batch, self.status = batch, status

    @property
    def failed(self) -> Vcpus:
        """The vCPUs whose guest has not mapped all of the range."""
        return _with_status(self._batch, (self.status != 0).astype(np.int64), 1, Vcpus)  # type: ignore[no-any-return]

    @property
    def ok(self) -> WalkedVcpus:
        """The vCPUs whose pages were all found: they can be pinned or mapped."""
        return _with_status(self._batch, self.status, 0, WalkedVcpus)  # type: ignore[no-any-return]


class WalkedVcpus(Vcpus):
    """vCPUs whose last walk listed their pages."""

    __slots__ = ()

    def pin(self) -> PinResult:
        """Pin these pages (FOLL_WRITE | FOLL_LONGTERM) and map them at stage 2. Costs per page; may hit the memlock
        limit.
        """
        if not len(self):
            return PinResult(self, _NOTHING)
        return PinResult(self, _kit(self._ticket).pin_fresh(self._lanes, self._vcpus))

    def map(self) -> NDArray[np.bool_]:
        """Map these pages at stage 2 as an ordinary fault does, without a pin. Return bool[n]: it worked."""
        failed: Ints = _kit(self._ticket).map_fresh(self._lanes, self._vcpus)
        worked: NDArray[np.bool_] = failed == 0
        return worked


class PinResult:
    """Outcome of pinning: `ok`, `over_limit` (RLIMIT_MEMLOCK) and `no_page` (the VMM has nothing there) are batches."""

    __slots__ = ("_batch", "status")

    def __init__(self, batch: Vcpus, status: Ints) -> None:
        self._batch, self.status = batch, status

    @property
    def ok(self) -> PinnedVcpus:
        """The vCPUs whose pages are pinned and mapped now."""
        return _with_status(self._batch, self.status, 0, PinnedVcpus)  # type: ignore[no-any-return]

    @property
    def over_limit(self) -> Vcpus:
        """The vCPUs whose VM would exceed its memlock limit; nothing was pinned for them."""
        return _with_status(self._batch, self.status, 1, Vcpus)  # type: ignore[no-any-return]

    @property
    def no_page(self) -> Vcpus:
        """The vCPUs for which the VMM has no memory behind a page; nothing was pinned for them."""
        return _with_status(self._batch, self.status, 2, Vcpus)  # type: ignore[no-any-return]


class PinnedVcpus(Vcpus):
    """vCPUs with a freshly pinned set of pages beside the one before."""

    __slots__ = ()

    def unpin_previous(self) -> None:
        """Unpin the set before; the fresh one becomes the current one."""
        if len(self):
            _kit(self._ticket).unpin_previous(self._lanes, self._vcpus)


class Vms:
    """A batch of n VMs."""

    __slots__ = ("_lanes", "_ticket")

    def __init__(self, ticket: int, lanes: Ints) -> None:
        self._ticket, self._lanes = ticket, lanes

    def __len__(self) -> int:
        return len(self._lanes)

    def pin_all(self, *, ignore_limit: bool = False) -> Ints:
        """Pin all memory of each VM and map it. Return int64[n]: 0 done, 1 over the memlock limit, 2 a page is missing.

        *ignore_limit* stands for a VMM with CAP_IPC_LOCK, or one whose limit was raised to the size of the VM.
        """
        return _kit(self._ticket).pin_all(self._lanes, bool(ignore_limit))  # type: ignore[no-any-return]

    def unpin_all(self) -> None:
        """Drop every pin that KVM holds on each VM's memory, as it must before the VM's memory is gone."""
        _kit(self._ticket).unpin_all(self._lanes)
