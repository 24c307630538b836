"""AT instructions: many queries at once, and what PAR_EL1 says of each."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spepolicy.arch.registers import FSC_EXTERNAL_ABORT_WALK
from spepolicy.errors import ConfigurationError, nearest
from spepolicy.jit import entry, inline, lean, row, word
from spepolicy.mmu.attributes import (
    MAIR_RESERVED,
    SHAREABILITY_RESERVED,
    STAGE2_TYPE_RESERVED,
    par_fault,
    par_success,
)
from spepolicy.mmu.memory import Memory
from spepolicy.mmu.refused import REGISTERS, check_registers, encoding_error
from spepolicy.mmu.regime import LOWER, SECOND, STAGE, UPPER, set_stage1, set_stage2
from spepolicy.mmu.walker import (
    DONE,
    FSC_MASK,
    IN_STAGE1,
    IN_STAGE2,
    INTERMEDIATE,
    NOT_MODELLED,
    PAN,
    STAGE1,
    STATE,
    USER,
    WALK,
    WRITE,
    advance1,
    advance2,
    begin,
)

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

# What each operation asks for. Only the *P operations honour PSTATE.PAN.
_ACCESS = {
    "S12E1R": 0,
    "S12E1W": WRITE,
    "S12E0R": USER,
    "S12E0W": USER | WRITE,
    "S1E1R": INTERMEDIATE,
    "S1E1W": INTERMEDIATE | WRITE,
    "S1E0R": INTERMEDIATE | USER,
    "S1E0W": INTERMEDIATE | USER | WRITE,
    "S1E1RP": INTERMEDIATE | PAN,
    "S1E1WP": INTERMEDIATE | PAN | WRITE,
}
OPERATIONS = tuple(_ACCESS)

# The syndrome of an external abort: like an ESR, with bit 31 to tell it from none.
ABORT = 1 << 31
ABORT_S1PTW = 1 << 7

_GRANULE1, _GRANULE2 = -11, -12
_UNMODELLED = {
    MAIR_RESERVED: "mair",
    STAGE2_TYPE_RESERVED: "memattr",
    SHAREABILITY_RESERVED: "shareability",
    _GRANULE1: "granule1",
    _GRANULE2: "granule2",
}
ABREAST = 32
_THREADED_QUERIES = 1 << 13  # below this, starting threads costs more than it saves


@lean
def _answer(s: Any, second: Any, w: Any) -> tuple[int, int]:
    """Return (PAR_EL1, 0), (0, syndrome of an external abort), or (0, a negative code of `_UNMODELLED`)."""
    status = w.status
    if status == 0:
        par = par_success(s, second, w.pa, w.leaf, w.leaf2)
        # PAR_EL1 is negative as int64 too where ATTR has its top bit, but never so close to 0.
        return (0, par) if SHAREABILITY_RESERVED <= par <= MAIR_RESERVED else (par, 0)
    if status & NOT_MODELLED != 0:
        return 0, _GRANULE1 if status & STAGE1 != 0 else _GRANULE2
    if status & FSC_MASK & ~3 == FSC_EXTERNAL_ABORT_WALK:
        return 0, ABORT | (ABORT_S1PTW if status & WALK != 0 else 0) | (status & FSC_MASK)
    return par_fault(status), 0


@entry
def _decode(registers: Ints, regimes: Any, pan: Ints) -> None:
    """Decode *registers* (int64[s, 9] in the order of REGISTERS) into *regimes* (STAGE[3 s]) and *pan* (int64[s])."""
    for n in range(registers.shape[0]):
        hcr, vtcr, tcr, sctlr = registers[n, 0], registers[n, 1], registers[n, 2], registers[n, 3]
        vttbr, ttbr0, ttbr1, mair = registers[n, 4], registers[n, 5], registers[n, 6], registers[n, 7]
        set_stage1(row(regimes, 3 * n + LOWER), 0, ttbr0, tcr, mair, sctlr, hcr, 1)
        set_stage1(row(regimes, 3 * n + UPPER), 1, ttbr1, tcr, mair, sctlr, hcr, 1)
        set_stage2(row(regimes, 3 * n + SECOND), vttbr, vtcr, hcr, 1)
        pan[n] = registers[n, 8]


@inline
def _through_stage2(frames: Ints, pool: Ints, zero: Ints, regimes: Any, walks: Any, which: Ints, count: int) -> None:
    """Take the first *count* walks, of the regimes *which*, on while they are in stage 2."""
    left = count
    while left != 0:
        left = 0
        for j in range(count):
            w = row(walks, j)
            if w.turn == IN_STAGE2:
                advance2(frames, pool, zero, row(regimes, word(which, j) + SECOND), w)
                left += 1


@lean
def _walk_all(
    frames: Ints,
    pool: Ints,
    zero: Ints,
    regimes: Any,
    pan: Ints,
    walks: Any,
    which: Ints,
    abreast: int,
    access: Ints,
    va: Ints,
    space: Ints,
    par: Ints,
    syndrome: Ints,
) -> int:
    """Answer the queries *va* (int64[n]) in the regimes *space* (int64[n], or [1] for all), with *access* likewise.

    Fill *par* and *syndrome* (int64[n]). Return the number of descriptors read.
    """
    reads = 0
    step = 1 if space.shape[0] > 1 else 0
    access_step = 1 if access.shape[0] > 1 else 0
    for first in range(0, va.shape[0], abreast):
        count = min(abreast, va.shape[0] - first)
        for j in range(count):
            n = first + j
            base = 3 * space[n * step]
            which[j] = base
            wanted = access[n * access_step]
            if pan[space[n * step]] == 0:
                wanted &= ~PAN
            s = row(regimes, base + ((va[n] >> 55) & 1))
            begin(frames, pool, s, row(regimes, base + SECOND), row(walks, j), va[n], wanted)
        under_way = True
        while under_way:
            _through_stage2(frames, pool, zero, regimes, walks, which, count)
            under_way = False
            for j in range(count):
                w = row(walks, j)
                if w.turn == IN_STAGE1:
                    base = which[j]
                    s = row(regimes, base + ((w.va >> 55) & 1))
                    advance1(frames, pool, zero, s, row(regimes, base + SECOND), w)
                    under_way = under_way or w.turn != DONE
        for j in range(count):
            w = row(walks, j)
            reads += w.reads
            base = which[j]
            s = row(regimes, base + ((w.va >> 55) & 1))
            par[first + j], syndrome[first + j] = _answer(s, row(regimes, base + SECOND), w)
    return reads


@entry
def _translate_all(
    frames: Ints,
    pool: Ints,
    zero: Ints,
    regimes: Any,
    pan: Ints,
    access: Ints,
    va: Ints,
    space: Ints,
    par: Ints,
    syndrome: Ints,
    in_order: int,
) -> int:
    """Do `_walk_all`: in the order of the queries, or several at a time."""
    walks = np.zeros(ABREAST, dtype=STATE)
    which = np.zeros(ABREAST, dtype=np.int64)
    # A walk is a chain of dependent loads. Several, taken in turns, let the processor overlap them; where a walk may
    # change what the next one reads, they go one by one.
    abreast = ABREAST if in_order == 0 else 1
    return _walk_all(frames, pool, zero, regimes, pan, walks, which, abreast, access, va, space, par, syndrome)


@overload
def at(
    op: str | Sequence[str],
    va: ArrayLike,
    regs: Mapping[str, ArrayLike],
    memory: Memory,
    with_aborts: Literal[False] = ...,
    *,
    space: ArrayLike | None = ...,
    threads: int | None = ...,
) -> Words: ...


@overload
def at(
    op: str | Sequence[str],
    va: ArrayLike,
    regs: Mapping[str, ArrayLike],
    memory: Memory,
    with_aborts: Literal[True],
    *,
    space: ArrayLike | None = ...,
    threads: int | None = ...,
) -> tuple[Words, Words]: ...


def at(
    op: str | Sequence[str],
    va: ArrayLike,
    regs: Mapping[str, ArrayLike],
    memory: Memory,
    with_aborts: bool = False,
    *,
    space: ArrayLike | None = None,
    threads: int | None = None,
) -> Words | tuple[Words, Words]:
    """Do an AT instruction of EL2 for each address and return PAR_EL1, uint64[n].

    *op* is one of OPERATIONS, or one for each query. *va* is uint64[n]. *regs* maps each of REGISTERS to its value; to
    walk in several address spaces at once, to uint64[s], and *space*, int[n], says which of them each query is in.
    *memory* holds the tables of all of them; where TCR_EL1.HA or VTCR_EL2.HA is set, access flags are written to it, in
    the order of the queries. An AT does not write the dirty state.

    PAR_EL1 is 0 where the walk took an external abort. With *with_aborts*, a second uint64[n] says so: 0, or bit 31,
    S1PTW in bit 7 and the fault status code in bits 5:0.

    *threads*: at most that many, by default one per processor; descriptor updates are made by one.

    Raise ConfigurationError, with the name of the bit, for what is not modelled (`spepolicy.mmu.refused`), for
    registers that are missing or unknown, and for shapes that do not fit.
    """
    addresses = np.atleast_1d(np.asarray(va, dtype=np.uint64)).view(np.int64)
    registers = _registers(regs)
    spaces = _spaces(space, len(registers), len(addresses))
    access = _access(op, len(addresses))
    regimes = np.zeros(3 * len(registers), dtype=STAGE)
    pan = np.zeros(len(registers), dtype=np.int64)
    _decode(registers, regimes, pan)
    par = np.zeros(len(addresses), dtype=np.int64)
    syndrome = np.zeros(len(addresses), dtype=np.int64)

    in_order = int(regimes["hardware_af"].any())

    def part(lo: int, hi: int) -> None:
        _translate_all(
            memory.frames,
            memory.pool,
            memory.zero,
            regimes,
            pan,
            access[lo:hi] if len(access) > 1 else access,
            addresses[lo:hi],
            spaces[lo:hi] if len(spaces) > 1 else spaces,
            par[lo:hi],
            syndrome[lo:hi],
            in_order,
        )

    workers = threads or len(os.sched_getaffinity(0))
    if workers == 1 or len(addresses) < _THREADED_QUERIES or in_order:
        part(0, len(addresses))
    else:
        bounds = np.linspace(0, len(addresses), workers + 1).astype(int)
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(part, bounds[:-1], bounds[1:]))
    unmodelled = np.flatnonzero(syndrome < 0)
    if len(unmodelled):
        n = int(unmodelled[0])
        raise encoding_error(_UNMODELLED[int(syndrome[n])], n, int(addresses.view(np.uint64)[n]))
    return (par.view(np.uint64), syndrome.view(np.uint64)) if with_aborts else par.view(np.uint64)


def _registers(regs: Mapping[str, ArrayLike]) -> Ints:
    """Return *regs* as int64[s, 9] in the order that `_decode` takes."""
    for name in regs:
        if name not in REGISTERS:
            raise ConfigurationError(
                f"regs has '{name}', which the walker does not know. Rule: exactly {', '.join(REGISTERS)}."
                f"{nearest(name, REGISTERS)}"
            )
    missing = [name for name in REGISTERS if name not in regs]
    if missing:
        raise ConfigurationError(f"regs lacks {', '.join(missing)}. Rule: exactly {', '.join(REGISTERS)}.")
    values = {name: np.atleast_1d(np.asarray(regs[name], dtype=np.uint64)) for name in REGISTERS}
    check_registers(values)
    try:
        columns = np.broadcast_arrays(*values.values())
    except ValueError:
        shapes = ", ".join(f"{name} {value.shape}" for name, value in values.items())
        raise ConfigurationError(f"regs have different shapes: {shapes}. Rule: a number, or one a space.") from None
    return np.stack(columns, axis=1).view(np.int64)


def _spaces(space: ArrayLike | None, registers: int, queries: int) -> Ints:
    if space is None:
        if registers != 1:
            raise ConfigurationError(f"regs are of {registers} address spaces. Remedy: give space, one for each query.")
        return np.zeros(1, dtype=np.int64)
    spaces = np.ascontiguousarray(space, dtype=np.int64)
    if spaces.shape != (queries,) or (queries and (spaces.min() < 0 or spaces.max() >= registers)):
        raise ConfigurationError(
            f"space has the shape {spaces.shape}. Rule: {queries} numbers, one for each query, in 0..{registers - 1}."
        )
    return spaces


def _access(op: str | Sequence[str], queries: int) -> Ints:
    names = [op] if isinstance(op, str) else list(op)
    for name in names:
        if name not in _ACCESS:
            raise ConfigurationError(
                f"op '{name}' is not an AT operation. Rule: one of {', '.join(OPERATIONS)}.{nearest(name, OPERATIONS)}"
            )
    if len(names) != queries and not isinstance(op, str):
        raise ConfigurationError(f"op has {len(names)} names for {queries} addresses. Rule: one, or one for each.")
    return np.array([_ACCESS[name] for name in names], dtype=np.int64)
