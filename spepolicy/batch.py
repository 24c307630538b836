"""What a policy holds in its hands: batches of vCPUs and VMs, with what KVM can read and the tools that KVM has.

A batch is arrays. Reading a register gives a fresh array of one element a vCPU; a tool acts on every vCPU of the batch,
charges its cost to it, and returns what KVM would learn. `where(mask)` narrows a batch. Nothing here leads to what only
the judge knows: a batch has no reference to the machine, only a ticket for the tools that is void when the hook
returns. More than 500 lines: batches and the outcomes of their tools are made of each other, and the author of a policy
finds all that a hook can do in one place.
"""

from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spepolicy.errors import HookError
from spepolicy.hookspecs import Cause, Event, Failure

__all__ = ["PinResult", "State", "Vcpus", "Vms", "WalkResult"]

Ints = NDArray[np.int64]
Addresses = NDArray[np.uint64]

_NOTHING = np.zeros(0, dtype=np.int64)

_live: dict[int, Any] = {}
_tickets = count(1)


class lent:
    """Lend *tools* (`spepolicy.drivers.tools.Tools`) to batches that carry the ticket, while a hook runs."""

    __slots__ = ("_ticket",)

    def __init__(self, tools: Any) -> None:
        self._ticket = next(_tickets)
        _live[self._ticket] = tools

    def __enter__(self) -> int:
        return self._ticket

    def __exit__(self, *_raised: object) -> None:
        del _live[self._ticket]


def _tools(ticket: int) -> Any:
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
        return _tools(self._ticket).register(name, self._lanes, self._vcpus)  # type: ignore[no-any-return]

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
    def physical(self) -> NDArray[np.bool_]:
        """PMBLIMITR_EL1.nVM, bool[n]: PMBPTR_EL1 and LIMIT are intermediate physical addresses, and stage 1 is off for
        the SPU (spe.md rule 50). True only where the policy's `physical_addressing` allowed it.
        """
        bypassed: NDArray[np.bool_] = (self.pmblimitr & np.uint64(1 << 7)) != 0
        return bypassed

    @property
    def announced_lo(self) -> Addresses:
        """First page of the AUX ring that a paravirtual guest announced, uint64[n] (hook `buffer_announced`)."""
        return self._register("buffer_base")

    @property
    def announced_hi(self) -> Addresses:
        """End of the AUX ring that a paravirtual guest announced, uint64[n]."""
        size: Addresses = (_tools(self._ticket).parameter("buffer_pages", self._lanes) << 12).astype(np.uint64)
        return self.announced_lo + size

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
    def pinned_lo(self) -> Addresses:
        """First virtual address of the range that the current set was pinned for, uint64[n]."""
        return self._register("pin_lo")

    @property
    def pinned_hi(self) -> Addresses:
        """End of the range that the current set was pinned for, uint64[n]."""
        return self._register("pin_hi")

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

    def walk_stage1(
        self, lo: ArrayLike, hi: ArrayLike, *, pin_tables: bool = False, one_range: bool = False
    ) -> WalkResult:
        """Walk the guest's stage 1 tables in software for the pages of [lo, hi), uint64[n] virtual addresses.

        Costs a descriptor read a page and three more a table. With *pin_tables* the tables on the way join the pages.
        With *one_range* the list ends where IPAs stop being contiguous.
        """
        low = _per_vcpu(lo, len(self), "walk_stage1(lo)", "integer").astype(np.uint64).view(np.int64)
        high = _per_vcpu(hi, len(self), "walk_stage1(hi)", "integer").astype(np.uint64).view(np.int64)
        if not len(self):
            return WalkResult(self, _NOTHING)
        tools = _tools(self._ticket)
        return WalkResult(self, tools.walk_stage1(self._lanes, self._vcpus, low, high, pin_tables, one_range))

    def list_physical(self, lo: ArrayLike, hi: ArrayLike) -> WalkResult:
        """List the pages of the intermediate physical ranges [lo, hi), uint64[n], as a walk would. Costs nothing: there
        is nothing to walk. `failed` are the vCPUs whose range is not all in the VM's memory.
        """
        low = _per_vcpu(lo, len(self), "list_physical(lo)", "integer").astype(np.uint64).view(np.int64)
        high = _per_vcpu(hi, len(self), "list_physical(hi)", "integer").astype(np.uint64).view(np.int64)
        if not len(self):
            return WalkResult(self, _NOTHING)
        return WalkResult(self, _tools(self._ticket).list_physical(self._lanes, self._vcpus, low, high))

    def look(self) -> Evidence:
        """Find out what KVM can know of the page behind a fault: one software walk of the faulting address, checked
        against stage 2, the list of pinned pages and the notes of KVM's notifier handler.
        """
        if not len(self):
            return Evidence(_NOTHING)
        return Evidence(_tools(self._ticket).look(self._lanes, self._vcpus))

    def unpin(self) -> None:
        """Unpin the pages that are pinned for these vCPUs. Their stage 2 entries stay until somebody removes them."""
        if len(self):
            _tools(self._ticket).unpin_current(self._lanes, self._vcpus)

    def release_idle_pins(self) -> Ints:
        """Unpin the sets of the same VM's other vCPUs whose buffer is disabled. Return int64[n], pages released.

        Those vCPUs find `pinned_pages` 0 when their buffer is enabled next.
        """
        if not len(self):
            return _NOTHING
        return _tools(self._ticket).release_idle(self._lanes, self._vcpus)  # type: ignore[no-any-return]

    def trap_eret(self, armed: bool) -> None:
        """Arm or disarm HFGITR_EL2.ERET: every return of these vCPUs to EL0 then calls `eret`. Needs FEAT_FGT."""
        tools = _tools(self._ticket)
        if armed and not tools.parameter("fine_grained_traps", self._lanes).all():
            raise HookError(
                "trap_eret(True) on a machine without FEAT_FGT. Rule: HFGITR_EL2 is part of FEAT_FGT. Remedy: say so "
                "in supports(), or set cpu.fine_grained_traps=true."
            )
        if len(self):
            tools.trap_eret(self._lanes, self._vcpus, bool(armed))

    def set_timer(self, delay_ns: ArrayLike | None) -> None:
        """Let `timer` be called once, *delay_ns* (int64[n] or integer, 0..2**41) of host time from now. None: never."""
        delay = _per_vcpu(-1 if delay_ns is None else delay_ns, len(self), "set_timer(delay_ns)", "integer")
        if not len(self):
            return
        delay = delay.astype(np.int64)
        if delay_ns is not None and (delay.min() < 0 or delay.max() > 1 << 41):
            raise HookError(f"set_timer() was given {delay.min()}..{delay.max()}. Rule: 0..2**41 ns, or None.")
        _tools(self._ticket).set_timer(self._lanes, self._vcpus, delay * (1 if delay_ns is None else 1000))

    def exit_to_vmm(self) -> None:
        """Return to the VMM, which does something about it and runs the vCPU again; costs `costs.vmm_exit`."""
        if len(self):
            _tools(self._ticket).exit_to_vmm(self._lanes, self._vcpus)

    def start_own_buffer(self, pages: int) -> None:
        """Let the SPU write to a buffer of KVM's, of 1..65536 pages a vCPU, as far as the guest's has room.

        `Ownership.KVM` only.
        """
        tools = _owned(self, "start_own_buffer()")
        if isinstance(pages, bool) or not isinstance(pages, int) or not 1 <= pages <= 65536:
            raise HookError(f"start_own_buffer() was given {pages!r}. Rule: 1..65536 pages of 4 KiB.")
        if len(self):
            tools.start_own_buffer(self._lanes, self._vcpus, pages)

    def copy_out(self) -> CopyResult:
        """Stop KVM's buffer and copy its records to the guest's, through the guest's stage 1; PMBPTR_EL1 as the guest
        reads it moves along. Costs `costs.walk_read` and `costs.copy_out_page` a page. `Ownership.KVM` only.
        """
        tools = _owned(self, "copy_out()")
        return CopyResult(self, tools.copy_out(self._lanes, self._vcpus, False) if len(self) else _NOTHING)

    def defer_copy(self) -> CopyResult:
        """As `copy_out`, but take the guest's pages away at stage 2 and copy each when the guest's CPU reads it.

        Costs `costs.map_page` a page now; later `costs.cpu_fault` and `costs.copy_out_page` for a page that is read.
        """
        tools = _owned(self, "defer_copy()")
        return CopyResult(self, tools.copy_out(self._lanes, self._vcpus, True) if len(self) else _NOTHING)

    def report_collision(self) -> None:
        """Set PMBSR_EL1.COLL as the guest will read it: samples were dropped."""
        if len(self):
            _tools(self._ticket).report_collision(self._lanes, self._vcpus)

    def inject(self, event: Event, *, data_loss: bool = False) -> None:
        """Stop the SPU if it is not stopped, show *event* in PMBSR_EL1, with DL if *data_loss*, and raise PMBIRQ."""
        if not isinstance(event, Event):
            raise HookError(f"inject() was given {event!r}. Rule: a member of spepolicy.hookspecs.Event.")
        if len(self):
            _tools(self._ticket).inject(self._lanes, self._vcpus, int(event), bool(data_loss))

    def fail(self, failure: Failure) -> None:
        """Answer with *failure* instead of an event: the guest is told otherwise, or not at all, or is no more."""
        if not isinstance(failure, Failure):
            raise HookError(f"fail() was given {failure!r}. Rule: a member of spepolicy.hookspecs.Failure.")
        if len(self):
            _tools(self._ticket).fail(self._lanes, self._vcpus, int(failure))

    def resume(self) -> None:
        """Clear PMBSR_EL1.S and let the SPU go on at the same PMBPTR_EL1."""
        if len(self):
            _tools(self._ticket).resume(self._lanes, self._vcpus)

    def claim(self, cause: Cause | ArrayLike) -> None:
        """Say what KVM believes to be the reason of the fault: a `Cause`, or integers [n] of it. For the judge only."""
        if isinstance(cause, Cause):
            if len(self):
                _tools(self._ticket).claim(self._lanes, self._vcpus, int(cause))
            return
        causes = _per_vcpu(cause, len(self), "claim(cause)", "integer")
        if not len(self):
            return
        if causes.min() < 0 or causes.max() >= len(Cause):
            raise HookError(
                f"claim() was given {causes.min()}..{causes.max()}. "
                f"Rule: spepolicy.hookspecs.Cause, 0..{len(Cause) - 1}."
            )
        _tools(self._ticket).claim(self._lanes, self._vcpus, causes.astype(np.int64))


def _with_status(batch: Vcpus, mixed: bool, status: Ints, wanted: int, kind: type[Vcpus]) -> Any:
    """Return the vCPUs of *batch* whose *status* is *wanted*, as a batch of *kind*. Mostly that is all of them, or
    none: not *mixed*, all have status 0.
    """
    if mixed:
        chosen = status == wanted
        return kind(batch._ticket, batch._lanes[chosen], batch._vcpus[chosen], batch._rows)
    if wanted == 0:
        return kind(batch._ticket, batch._lanes, batch._vcpus, batch._rows)
    return kind(batch._ticket, _NOTHING, _NOTHING, batch._rows)


def _owned(batch: Vcpus, tool: str) -> Any:
    tools = _tools(batch._ticket)
    if not tools.parameter("own_buffer", batch._lanes).all():
        raise HookError(
            f"{tool} while the guest owns the buffer. Rule: it is for policies whose hook ownership() returns "
            "Ownership.KVM. Remedy: return that."
        )
    return tools


class Evidence:
    """What KVM can know of the page behind a fault: bool[n] each."""

    __slots__ = ("in_range", "listed", "missing", "notified", "table")

    def __init__(self, bits: Ints) -> None:
        self.missing = (bits & 1) != 0  # stage 2 does not map some page of the walk; False: it is mapped again by now
        self.table = (bits & 2) != 0  # that page is a stage 1 table
        self.listed = (bits & 4) != 0  # KVM has it in its list of pinned pages
        self.notified = (bits & 8) != 0  # KVM's notifier handler unmapped it
        self.in_range = (bits & 16) != 0  # the faulting address is in the range that KVM pinned


class CopyResult:
    """Outcome of copying KVM's buffer to the guest's: four batches."""

    __slots__ = ("_batch", "_mixed", "status")

    def __init__(self, batch: Vcpus, status: Ints) -> None:
        self._batch, self.status = batch, status
        self._mixed = bool(status.any())

    @property
    def room(self) -> Vcpus:
        """The vCPUs whose guest's buffer has room for more records."""
        return _with_status(self._batch, self._mixed, self.status, 0, Vcpus)  # type: ignore[no-any-return]

    @property
    def full(self) -> Vcpus:
        """The vCPUs whose guest's buffer is full now: real hardware would have raised a buffer full event."""
        return _with_status(self._batch, self._mixed, self.status, 1, Vcpus)  # type: ignore[no-any-return]

    @property
    def unmapped(self) -> Vcpus:
        """The vCPUs whose guest has not mapped all of what was to be written; the records are lost."""
        return _with_status(self._batch, self._mixed, self.status, 2, Vcpus)  # type: ignore[no-any-return]

    @property
    def no_page(self) -> Vcpus:
        """The vCPUs whose VMM has no memory behind a page of the buffer; the records are lost."""
        return _with_status(self._batch, self._mixed, self.status, 3, Vcpus)  # type: ignore[no-any-return]


class WalkResult:
    """Outcome of a walk: `ok` and `failed` are batches; `status` is int64[n], 0 or the stage 1 fault status of the
    first bad page.
    """

    __slots__ = ("_batch", "_mixed", "status")

    def __init__(self, batch: Vcpus, status: Ints) -> None:
        self._batch, self.status = batch, status
        self._mixed = bool(status.any())

    @property
    def failed(self) -> Vcpus:
        """The vCPUs whose guest has not mapped all of the range."""
        return _with_status(self._batch, self._mixed, (self.status != 0).astype(np.int64), 1, Vcpus)  # type: ignore[no-any-return]

    @property
    def ok(self) -> WalkedVcpus:
        """The vCPUs whose pages were all found: they can be pinned or mapped."""
        return _with_status(self._batch, self._mixed, self.status, 0, WalkedVcpus)  # type: ignore[no-any-return]


class WalkedVcpus(Vcpus):
    """vCPUs whose last walk listed their pages."""

    __slots__ = ()

    def pin(self, *, ignore_limit: bool = False) -> PinResult:
        """Pin these pages (FOLL_WRITE | FOLL_LONGTERM) and map them at stage 2. Costs per page; may hit the memlock
        limit, unless *ignore_limit* says that the VMM has raised it for this.
        """
        if not len(self):
            return PinResult(self, _NOTHING)
        return PinResult(self, _tools(self._ticket).pin_fresh(self._lanes, self._vcpus, bool(ignore_limit)))

    def map(self) -> NDArray[np.bool_]:
        """Map these pages at stage 2 as an ordinary fault does, without a pin. Return bool[n]: it worked."""
        failed: Ints = _tools(self._ticket).map_fresh(self._lanes, self._vcpus)
        worked: NDArray[np.bool_] = failed == 0
        return worked


class PinResult:
    """Outcome of pinning: `ok`, `over_limit` (RLIMIT_MEMLOCK) and `no_page` (the VMM has nothing there) are batches."""

    __slots__ = ("_batch", "_mixed", "status")

    def __init__(self, batch: Vcpus, status: Ints) -> None:
        self._batch, self.status = batch, status
        self._mixed = bool(status.any())

    @property
    def ok(self) -> PinnedVcpus:
        """The vCPUs whose pages are pinned and mapped now."""
        return _with_status(self._batch, self._mixed, self.status, 0, PinnedVcpus)  # type: ignore[no-any-return]

    @property
    def over_limit(self) -> Vcpus:
        """The vCPUs whose VM would exceed its memlock limit; nothing was pinned for them."""
        return _with_status(self._batch, self._mixed, self.status, 1, Vcpus)  # type: ignore[no-any-return]

    @property
    def no_page(self) -> Vcpus:
        """The vCPUs for which the VMM has no memory behind a page; nothing was pinned for them."""
        return _with_status(self._batch, self._mixed, self.status, 2, Vcpus)  # type: ignore[no-any-return]


class PinnedVcpus(Vcpus):
    """vCPUs with a freshly pinned set of pages beside the one before."""

    __slots__ = ()

    def unpin_previous(self) -> None:
        """Unpin the set before; the fresh one becomes the current one."""
        if len(self):
            _tools(self._ticket).unpin_previous(self._lanes, self._vcpus)

    def keep_previous(self) -> None:
        """Add the fresh pages to the current set instead: a cache grows. A set that cannot hold them is dropped."""
        if len(self):
            _tools(self._ticket).keep_previous(self._lanes, self._vcpus)


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
        return _tools(self._ticket).pin_all(self._lanes, bool(ignore_limit))  # type: ignore[no-any-return]

    def mlock_all(self, *, ignore_limit: bool = False) -> Ints:
        """The VMM mlock()s all memory of each VM. Return int64[n] as `pin_all`. Nothing is mapped at stage 2."""
        return _tools(self._ticket).mlock_all(self._lanes, bool(ignore_limit))  # type: ignore[no-any-return]

    def map_all(self) -> Ints:
        """Map all memory of each VM at stage 2, without a pin. Return int64[n]: 0 done, 2 a page is missing."""
        return _tools(self._ticket).map_all(self._lanes)  # type: ignore[no-any-return]

    def use_guest_memfd(self) -> None:
        """The VMM backs each VM by a guest_memfd: its pages neither move nor go, KVM follows no notifier for them."""
        _tools(self._ticket).use_guest_memfd(self._lanes)

    def unpin_all(self) -> None:
        """Drop every pin that KVM holds on each VM's memory, as it must before the VM's memory is gone."""
        _tools(self._ticket).unpin_all(self._lanes)
