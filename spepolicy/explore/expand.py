"""Successors of states, in compiled code: take states from the frontier, let every event happen that can, and hash and
store what results.

A successor that needs the policy keeps its lane until the driver has called the hook for all that wait (`finish`); the
others use one lane over and over, whose memory stays in the cache.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.explore.canonical import decode, encode, gather, restore, state_hash
from spepolicy.explore.check import broken, note_fault
from spepolicy.explore.places import target_page
from spepolicy.explore.possible import find_possible
from spepolicy.explore.steps import happen, settle
from spepolicy.explore.visited import look_up
from spepolicy.jit import entry, jit, widen
from spepolicy.machine.rows import params, truth_row, vcpu_row, vm_row
from spepolicy.machine.state import Hook, Machine

Ints = NDArray[np.int64]

# Columns of `out`, a row a transition.
PARENT, EVENT, HASH1, HASH2, KINDS, OP_CLAIM, BLOB, BLOB_END, STUCK = range(9)
OUT_COLUMNS = 9
KNOWN = -1  # in column BLOB: the state was visited before
WAITS = -2  # the policy has not answered yet

# Words of `position`, by which expand() says where it stopped.
NEXT_PARENT, TRANSITIONS, WAITING, BLOB_WORDS = range(4)
POSITION = 4

_NONE = int(Hook.NONE)
_STAGE2_FAULT = int(Hook.STAGE2_FAULT)
_AUX_LAST_OP = 1  # acts.Aux.LAST_OP
AUX = 13  # place of image.Views.aux among its arrays


@jit
def _record(
    m: Machine, views: Any, layout: Any, visited: Any, scratch: Any, i: int, t: int, hook: int, version: int, out: Ints,
    blob: Ints, end: int,
) -> int:  # fmt: skip
    """Check and hash what lane *i* has become, and store it unless it is known. Fill row *t* of *out*; return the new
    end of *blob*.
    """
    at, par_at, pool_at, base, plain, stored, leaf1, leaf2, pairs, sizes = layout
    image, name = scratch
    aux = views[AUX]
    for k in range(params(m, i).vcpus):
        settle(m, i, k)
    kinds = broken(m, i, aux[i], hook, version)
    whole = gather(views, at, par_at, pool_at, i, image, sizes[1])
    if not whole:
        kinds |= 1 << 16  # properties.Kind.PINS_LONG
    h1, h2 = state_hash(m, i, image, base, plain, at, leaf1, leaf2, pairs, sizes[1], name)
    out[t, HASH1] = widen(h1)
    out[t, HASH2] = widen(h2)
    out[t, KINDS] = kinds
    vm = vm_row(m, i)
    v = vcpu_row(m, i, vm.hook_vcpu)
    out[t, OP_CLAIM] = aux[i, _AUX_LAST_OP] | (max(v.claim, 0) << 8)
    tr = truth_row(m, i, vm.hook_vcpu)
    # Steps on which a fault may come round: the fault itself, and that KVM goes on.
    stuck = tr.stage2_faults != 0 or (hook == _STAGE2_FAULT and v.answered == 1)
    out[t, STUCK] = 1 if stuck and tr.written == 0 else 0
    if look_up(visited, widen(h1), widen(h2)) >= 0:
        out[t, BLOB] = KNOWN
        return end
    out[t, BLOB] = end
    end = encode(image, base, stored, sizes[0], blob, end)
    out[t, BLOB_END] = end
    return end


@entry
def expand(
    m: Machine, views: Any, layout: Any, visited: Any, scratch: Any, events: Ints, limits: Ints, rules: Ints,
    frontier: Ints, starts: Ints, stop: int, lanes: int, version: int, out: Ints, blob: Ints, waiting: Ints,
    position: Ints,
) -> None:  # fmt: skip
    """Expand states of a block of the frontier, from position[NEXT_PARENT] to *stop*, as far as there is room.

    *frontier* int64[words] holds the states, state s from starts[s] on. Transition t fills row t of *out*; `waiting`
    int64[lanes, 2] gets (t, lane) of those that wait for a hook (`vm.hook`).
    """
    at, par_at, pool_at, base, _plain, stored, _leaf1, _leaf2, _pairs, sizes = layout
    parent = np.zeros(base.shape[0], dtype=np.int64)
    possible = np.zeros(events.shape[0], dtype=np.bool_)
    aux = views[AUX]
    t, wait, end = position[TRANSITIONS], position[WAITING], position[BLOB_WORDS]
    room = events.shape[0] * (sizes[0] + stored.shape[0])
    s = position[NEXT_PARENT]
    while s < stop:
        if wait + events.shape[0] >= lanes or t + events.shape[0] > out.shape[0] or end + room > blob.shape[0]:
            break
        decode(frontier, starts[s], base, stored, sizes[0], parent)
        restore(views, at, par_at, pool_at, wait, parent, sizes[1])
        fresh = True
        find_possible(m, wait, aux, events, limits, rules, possible)
        for e in range(events.shape[0]):
            if not possible[e]:
                continue
            i = wait
            if not fresh:
                restore(views, at, par_at, pool_at, i, parent, sizes[1])
            fresh = False
            hook = happen(m, i, aux[i], events[e])
            note_fault(m, i, aux[i])
            vm = vm_row(m, i)
            v = vcpu_row(m, i, events[e, 4])
            vm.hook_vcpu = events[e, 4]
            if hook == _NONE and v.hook_next != 0:
                hook = v.hook_next
                v.hook_next = 0
            out[t, PARENT] = s
            out[t, EVENT] = e
            if hook != _NONE:
                vm.hook = hook
                out[t, BLOB] = WAITS
                waiting[wait, 0] = t
                waiting[wait, 1] = i
                wait += 1
            else:
                end = _record(m, views, layout, visited, scratch, i, t, hook, version, out, blob, end)
            t += 1
        s += 1
    position[NEXT_PARENT] = s
    position[TRANSITIONS] = t
    position[WAITING] = wait
    position[BLOB_WORDS] = end


@entry
def chained_hooks(m: Machine, lanes: Ints) -> int:
    """After the hooks of *lanes*: make those wait again whose step reaches a second one. Return how many."""
    again = 0
    for n in range(lanes.shape[0]):
        vm = vm_row(m, lanes[n])
        v = vcpu_row(m, lanes[n], vm.hook_vcpu)
        vm.hook = v.hook_next
        v.hook_next = 0
        if vm.hook != _NONE:
            again += 1
    return again


@entry
def finish(
    m: Machine, views: Any, layout: Any, visited: Any, scratch: Any, waiting: Ints, hooks: Ints, version: int,
    out: Ints, blob: Ints, position: Ints,
) -> None:  # fmt: skip
    """Record the transitions of *waiting* (t, lane), whose hooks *hooks* (int64[n]) have been called."""
    end = position[BLOB_WORDS]
    for n in range(waiting.shape[0]):
        end = _record(
            m, views, layout, visited, scratch, waiting[n, 1], waiting[n, 0], hooks[n], version, out, blob, end
        )
    position[BLOB_WORDS] = end


@entry
def decode_all(blob: Ints, starts: Ints, base: Ints, stored: Ints, map_words: int, images: Ints) -> None:
    """Fill *images* int64[n, words] with the states of a block."""
    for s in range(starts.shape[0]):
        decode(blob, starts[s], base, stored, map_words, images[s])


@entry
def put(views: Any, layout: Any, i: int, image: Ints) -> None:
    """Put lane *i* into the state *image*."""
    at, par_at, pool_at, _base, _plain, _stored, _leaf1, _leaf2, _pairs, sizes = layout
    restore(views, at, par_at, pool_at, i, image, sizes[1])


@entry
def take(m: Machine, views: Any, layout: Any, i: int, image: Ints) -> bool:
    """Settle lane *i* and write its state to *image*. Return False if a list of pins is too long for an image."""
    at, par_at, pool_at, _base, _plain, _stored, _leaf1, _leaf2, _pairs, sizes = layout
    for k in range(params(m, i).vcpus):
        settle(m, i, k)
    return gather(views, at, par_at, pool_at, i, image, sizes[1])


@entry
def hash_of(m: Machine, layout: Any, scratch: Any, i: int, image: Ints) -> tuple[int, int]:
    """Return the hash of *image*, a state of lane *i*."""
    at, _par_at, _pool_at, base, plain, _stored, leaf1, leaf2, pairs, sizes = layout
    h1, h2 = state_hash(m, i, image, base, plain, at, leaf1, leaf2, pairs, sizes[1], scratch[1])
    return widen(h1), widen(h2)


@entry
def possible_events(
    m: Machine, views: Any, i: int, events: Ints, limits: Ints, rules: Ints, possible: NDArray[np.bool_]
) -> None:
    """Fill *possible* bool[events]: what can happen in lane *i*."""
    find_possible(m, i, views[AUX], events, limits, rules, possible)


@entry
def step(m: Machine, views: Any, i: int, event: Ints) -> int:
    """Let one event happen in lane *i*; return the hook that it reaches."""
    hook = happen(m, i, views[AUX][i], event)
    note_fault(m, i, views[AUX][i])
    v = vcpu_row(m, i, event[4])
    if hook == _NONE and v.hook_next != 0:
        hook = v.hook_next
        v.hook_next = 0
    vm_row(m, i).hook_vcpu = event[4]
    vm_row(m, i).hook = hook
    return hook


@entry
def page_hit(m: Machine, i: int, event: Ints) -> int:
    """Return the guest page that a host operation hits in lane *i*, -1 if there is none."""
    return target_page(m, i, event[4], event[2], event[3])


@entry
def check(m: Machine, views: Any, i: int, hook: int, version: int) -> int:
    """Return the kinds of violation in lane *i*, whose step ended with *hook*."""
    for k in range(params(m, i).vcpus):
        settle(m, i, k)
    return broken(m, i, views[AUX][i], hook, version)
