"""Access to the arrays of a batch from compiled and interpreted code.

The machine's functions take `m`, a lane `i`, and often a vCPU `k`, and ask here for a row or an array of that lane.
Compiled, `m` is one record of addresses and shapes (`CONTEXT`), so a call passes a pointer, not some forty array
descriptors: that makes both calls and compilation several times faster. Interpreted, `m` is the `Machine` itself and
the same functions index its arrays.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from spepolicy.jit import COMPILED, numba
from spepolicy.machine.fields import PARAMS, TRUTH, VCPU, VM, WINDOW
from spepolicy.machine.state import Machine
from spepolicy.mmu.regime import STAGE
from spepolicy.mmu.walker import STATE

# Array of Machine, its dtype, its number of dimensions.
_ARRAYS: tuple[tuple[str, Any, int], ...] = (
    ("par", PARAMS, 1),
    ("vm", VM, 1),
    ("regime", STAGE, 2),
    ("walk", STATE, 1),
    ("vcpu", VCPU, 2),
    ("truth", TRUTH, 2),
    ("window", WINDOW, 2),
    ("log", np.int64, 3),
    ("lost", np.int64, 3),
    ("blackout_ps", np.int64, 3),
    ("claims", np.int64, 3),
    ("host_ops", np.int64, 2),
    ("host_calls", np.int64, 2),
    ("exposure_ps", np.int64, 3),
    ("seen", np.int64, 3),
    ("unseen", np.int64, 3),
    ("tlb", np.int64, 4),
    ("pins", np.int32, 4),
    ("pool", np.int64, 3),
    ("pool_refs", np.int32, 2),
    ("frames", np.int64, 2),
    ("dirty", np.uint8, 2),
    ("host_page", np.int64, 2),
    ("op_ps", np.int64, 1),
    ("alias_threshold", np.int64, 2),
    ("alias_outcome", np.int64, 3),
    ("outcome_function", np.int64, 1),
    ("outcome_type", np.int64, 1),
    ("outcome_events", np.int64, 1),
    ("outcome_latency", np.int64, 1),
    ("outcome_spread", np.int64, 1),
    ("loop_first", np.int64, 1),
    ("loop_length", np.int64, 1),
    ("loop_outcome", np.int64, 1),
    ("phase", np.int64, 2),
    ("roles", np.int64, 1),
    ("rec_ps", np.int64, 1),
    ("rec_first", np.int32, 1),
    ("rec_end", np.int32, 1),
    ("rec_op", np.uint8, 1),
    ("random_op", np.int64, 2),
    ("act", np.int64, 2),
    ("effect_table", np.int64, 4),
    ("exponential", np.int64, 1),
)

_RECORDS = {
    "PARAMS": PARAMS,
    "VM": VM,
    "VCPU": VCPU,
    "TRUTH": TRUTH,
    "WINDOW": WINDOW,
    "STAGE": STAGE,
    "STATE": STATE,
}

CONTEXT = np.dtype(
    [
        (field, np.int64)
        for name, _, dimensions in _ARRAYS
        for field in (name, *(f"{name}_{d}" for d in range(dimensions)))
    ]
)


def context(m: Machine) -> Any:
    """Return what the entry points of the machine take for `m`. The caller keeps *m* alive while it is in use."""
    if not COMPILED:
        return m
    record = np.zeros(1, dtype=CONTEXT)
    for name, dtype, dimensions in _ARRAYS:
        array = getattr(m, name)
        if array.dtype != np.dtype(dtype) or array.ndim != dimensions or not array.flags.c_contiguous:
            raise AssertionError(f"Machine.{name} must be a C-contiguous {dimensions}-d array of {np.dtype(dtype)}")
        record[name] = array.ctypes.data
        for d in range(dimensions):
            record[f"{name}_{d}"] = array.shape[d]
    return record[0]


if COMPILED:
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic

    @intrinsic
    def _pointer(typingctx: Any, address: Any) -> Any:
        """Turn an address into a pointer, which numba has no spelling for."""
        return types.voidptr(types.int64), lambda context, builder, sig, args: builder.inttoptr(
            args[0], cgutils.voidptr_t
        )

    _inline = numba.njit(nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)

    def _accessor(name: str, source: str) -> Any:
        scope: dict[str, Any] = {
            "__name__": __name__,
            "carray": numba.carray,
            "pointer": _pointer,
            **_RECORDS,
            "int64": np.int64,
            "int32": np.int32,
            "uint8": np.uint8,
        }
        exec(source, scope)
        return _inline(scope[name])

    def _make(name: str, indices: str) -> Any:
        """Compile `get_NAME(m, ...)`: the array *name* of the context, indexed by *indices*."""
        dtype, dimensions = next((d, n) for array, d, n in _ARRAYS if array == name)
        label = next((record for record, its in _RECORDS.items() if its is dtype), np.dtype(dtype).name)
        shape = "".join(f"m.{name}_{d}, " for d in range(dimensions))
        arguments = "".join(f", {index}" for index in indices)
        tail = f"[{', '.join(indices)}]" if indices else ""
        return _accessor(
            f"get_{name}",
            f"def get_{name}(m{arguments}):\n    return carray(pointer(m.{name}), ({shape}), {label}){tail}\n",
        )
else:
    from spepolicy.jit import plain_row

    def _make(name: str, indices: str) -> Any:
        dtype, dimensions = next((d, n) for array, d, n in _ARRAYS if array == name)
        structured = np.dtype(dtype).names is not None and dimensions == len(indices)
        if structured and len(indices) == 1:
            return lambda m, i: plain_row(getattr(m, name), getattr(m, name)[i])
        if structured:
            return lambda m, i, k: plain_row(getattr(m, name), getattr(m, name)[i, k])
        if not indices:
            return lambda m: getattr(m, name)
        if len(indices) == 1:
            return lambda m, i: getattr(m, name)[i]
        return lambda m, i, k: getattr(m, name)[i, k]


params = _make("par", "i")
vm_row = _make("vm", "i")
stages = _make("regime", "i")
regime_row = _make("regime", "ik")
walk_row = _make("walk", "i")
vcpu_row = _make("vcpu", "ik")
truth_row = _make("truth", "ik")
window_row = _make("window", "ik")
log_rows = _make("log", "i")
lost = _make("lost", "ik")
blackout_ps = _make("blackout_ps", "ik")
claims = _make("claims", "i")
host_ops = _make("host_ops", "i")
host_calls = _make("host_calls", "i")
exposure_ps = _make("exposure_ps", "ik")
seen = _make("seen", "ik")
unseen = _make("unseen", "ik")
tlb = _make("tlb", "ik")
pins = _make("pins", "ik")
pool = _make("pool", "i")
pool_refs = _make("pool_refs", "i")
frames = _make("frames", "i")
dirty = _make("dirty", "i")
host_page = _make("host_page", "i")
op_ps = _make("op_ps", "")
alias_threshold = _make("alias_threshold", "")
alias_outcome = _make("alias_outcome", "")
outcome_function = _make("outcome_function", "")
outcome_type = _make("outcome_type", "")
outcome_events = _make("outcome_events", "")
outcome_latency = _make("outcome_latency", "")
outcome_spread = _make("outcome_spread", "")
loop_first = _make("loop_first", "")
loop_length = _make("loop_length", "")
loop_outcome = _make("loop_outcome", "")
phase = _make("phase", "")
roles = _make("roles", "")
rec_ps = _make("rec_ps", "")
rec_first = _make("rec_first", "")
rec_end = _make("rec_end", "")
rec_op = _make("rec_op", "")
random_op = _make("random_op", "")
act = _make("act", "")
effect_table = _make("effect_table", "")
exponential = _make("exponential", "")
