"""Saving, restoring and comparing states: compiled code over the image of a lane (`spepolicy.explore.image`).

Two states are equal if they differ only in names that nothing can tell apart:

* host frames, unless there are huge pages. A page of the VMM is "the frame that backs guest page p"; a stage 2 entry or
  a TLB entry has that frame, the merged one of KSM, the one of the stage 2 entry, or one that backs nothing any more;
* the two guest pages that take turns behind a page of the buffer (`places.twin`): the one that stage 1 maps now goes by
  the name of the first;
* the order of a list of pins.

The hash is 128 bits: two sums, over the words that differ from the initial state, of a mixing function of (place,
word). A sum does not depend on the order of its terms, which is what a set of pins needs.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.jit import inline, jit
from spepolicy.machine.fields import VCPU
from spepolicy.machine.hostpage import FRAME, KSM_FRAME, PRESENT, ZERO_FRAME
from spepolicy.machine.rows import params
from spepolicy.machine.state import STRAY, Machine
from spepolicy.mmu.tables import S2_LEAF
from spepolicy.mmu.walker import OA_MASK, S2_WRITE, VALID

Ints = NDArray[np.int64]

# Places of fields in a vCPU's row.
_FIELDS = VCPU.names or ()
_WIDTH = len(_FIELDS)
_PIN_COUNT, _PIN_LIST = _FIELDS.index("pin_count"), _FIELDS.index("pin_list")
_GENERATION, _BUFFER_VA = _FIELDS.index("buffer_generation"), _FIELDS.index("buffer_va")

# Order of `image.SECTIONS`.
_PAR, _VM, _VCPU, _TLB, _PINS, _HOST_PAGE, _DIRTY, _POOL, _REFS, _FRAMES, _POLICY, _AUX, _END = range(13)

_A1, _A2 = np.uint64(0x9E37_79B9_7F4A_7C15), np.uint64(0xC2B2_AE3D_27D4_EB4F)
_M1, _M2 = np.uint64(0xBF58_476D_1CE4_E5B9), np.uint64(0x94D0_49BB_1331_11EB)
_M3, _M4 = np.uint64(0xFF51_AFD7_ED55_8CCD), np.uint64(0xC4CE_B9FE_1A85_EC53)
_S29, _S32, _S33, _S31 = np.uint64(29), np.uint64(32), np.uint64(33), np.uint64(31)

# Places above those of an image, for what is hashed by its meaning.
_PLACE_LEAF1, _PLACE_PAGE, _PLACE_LEAF2, _PLACE_TLB, _PLACE_PIN = 1 << 20, 1 << 21, 1 << 22, 1 << 23, 1 << 24
_PLACE_FRAME = 1 << 25


@inline
def _mix1(place: int, word: int) -> Any:
    x = (np.uint64(np.int64(word)) + np.uint64(np.int64(place)) * _A1) * _M1
    x = (x ^ (x >> _S29)) * _M2
    return x ^ (x >> _S32)


@inline
def _mix2(place: int, word: int) -> Any:
    x = (np.uint64(np.int64(word)) ^ (np.uint64(np.int64(place)) * _A2 + _A1)) * _M3
    x = (x ^ (x >> _S33)) * _M4
    return x ^ (x >> _S31)


@inline
def restore(views: Any, at: Ints, par_at: Ints, pool_at: Ints, i: int, image: Ints, pages: int) -> None:
    """Put lane *i* into the state *image*, with nothing counted yet. *at*: where sections begin; *pages*: of a list of
    pins.
    """
    par, vm, vcpu, truth, lost, tlb, pins, host_page, dirty, pool, refs, frames, policy, aux = views
    for n in range(par_at.shape[0]):
        par[i, par_at[n]] = image[n]
    first = at[_VM]
    for n in range(vm.shape[1]):
        vm[i, n] = image[first + n]
    first = at[_VCPU]
    for n in range(vcpu.shape[1]):
        vcpu[i, n] = image[first + n]
    first = at[_TLB]
    for n in range(tlb.shape[1]):
        tlb[i, n] = image[first + n]
    first = at[_PINS]
    for k in range(pins.shape[1]):
        which = image[at[_VCPU] + k * _WIDTH + _PIN_LIST]
        for n in range(pages):
            pins[i, k, which, n] = image[first + k * pages + n]
    first = at[_HOST_PAGE]
    for n in range(host_page.shape[1]):
        host_page[i, n] = image[first + n]
    first = at[_DIRTY]
    for n in range(dirty.shape[1]):
        dirty[i, n] = image[first + n]
    first = at[_POOL]
    for n in range(pool_at.shape[0]):
        pool[i, pool_at[n]] = image[first + n]
    first = at[_REFS]
    for n in range(refs.shape[1]):
        refs[i, n] = image[first + n]
    first = at[_FRAMES]
    for n in range(frames.shape[1]):
        frames[i, n] = image[first + n]
    first = at[_POLICY]
    for n in range(policy.shape[1]):
        policy[i, n] = image[first + n]
    first = at[_AUX]
    for n in range(aux.shape[1]):
        aux[i, n] = image[first + n]
    for n in range(truth.shape[1]):
        truth[i, n] = 0
    for n in range(lost.shape[1]):
        lost[i, n] = 0


@inline
def gather(views: Any, at: Ints, par_at: Ints, pool_at: Ints, i: int, image: Ints, pages: int) -> bool:
    """Take the image of lane *i*. Return False if a list of pins is longer than an image can hold."""
    par, vm, vcpu, _truth, _lost, tlb, pins, host_page, dirty, pool, refs, frames, policy, aux = views
    for n in range(par_at.shape[0]):
        image[n] = par[i, par_at[n]]
    first = at[_VM]
    for n in range(vm.shape[1]):
        image[first + n] = vm[i, n]
    first = at[_VCPU]
    for n in range(vcpu.shape[1]):
        image[first + n] = vcpu[i, n]
    first = at[_TLB]
    for n in range(tlb.shape[1]):
        image[first + n] = tlb[i, n]
    whole = True
    first = at[_PINS]
    for k in range(pins.shape[1]):
        row = k * _WIDTH
        which, count = vcpu[i, row + _PIN_LIST], vcpu[i, row + _PIN_COUNT]
        if count > pages:
            whole = False
        for n in range(pages):
            image[first + k * pages + n] = pins[i, k, which, n] if n < count else 0
    first = at[_HOST_PAGE]
    for n in range(host_page.shape[1]):
        image[first + n] = host_page[i, n]
    first = at[_DIRTY]
    for n in range(dirty.shape[1]):
        image[first + n] = dirty[i, n]
    first = at[_POOL]
    for n in range(pool_at.shape[0]):
        image[first + n] = pool[i, pool_at[n]]
    first = at[_REFS]
    for n in range(refs.shape[1]):
        image[first + n] = refs[i, n]
    first = at[_FRAMES]
    for n in range(frames.shape[1]):
        image[first + n] = frames[i, n]
    first = at[_POLICY]
    for n in range(policy.shape[1]):
        image[first + n] = policy[i, n]
    first = at[_AUX]
    for n in range(aux.shape[1]):
        image[first + n] = aux[i, n]
    return whole


@inline
def encode(image: Ints, base: Ints, stored: Ints, map_words: int, out: Ints, start: int) -> int:
    """Write what of *image* differs from *base* to *out* from *start* on: a bitmap over *stored*, then the words.
    Return the end.
    """
    for n in range(map_words):
        out[start + n] = 0
    end = start + map_words
    for n in range(stored.shape[0]):
        word = image[stored[n]]
        if word != base[stored[n]]:
            out[start + (n >> 6)] |= np.int64(1) << (n & 63)
            out[end] = word
            end += 1
    return end


@inline
def decode(blob: Ints, start: int, base: Ints, stored: Ints, map_words: int, image: Ints) -> None:
    """Undo `encode`; words that are not stored get their value in *base*."""
    for n in range(base.shape[0]):
        image[n] = base[n]
    at = start + map_words
    for n in range(stored.shape[0]):
        if (blob[start + (n >> 6)] >> (n & 63)) & 1 != 0:
            image[stored[n]] = blob[at]
            at += 1


@jit
def _page_names(m: Machine, i: int, image: Ints, at: Ints, leaf1: Ints, pairs: Ints, name: Ints) -> tuple[Any, Any]:
    """Name the guest pages: *name*[page] is what the page is called in the canonical form. Return the hash of what
    stage 1 says about them.
    """
    par = params(m, i)
    for page in range(name.shape[0]):
        name[page] = page
    h1, h2 = np.uint64(0), np.uint64(0)
    for k in range(leaf1.shape[0]):
        generation = image[at[_VCPU] + k * _WIDTH + _GENERATION]
        for n in range(leaf1.shape[1]):
            first, second = pairs[k, n, 0], pairs[k, n, 1]
            own = first if generation == 0 else second
            leaf = image[leaf1[k, n]]
            page = ((leaf & OA_MASK) >> 12) - par.ram_page0 if leaf & VALID != 0 else own
            word = leaf
            if page in (first, second):
                name[page] = first
                name[first + second - page] = second
                word = (leaf & ~OA_MASK) | (4096 if page == own else 0)
            h1 += _mix1(_PLACE_LEAF1 + leaf1[k, n], word)
            h2 += _mix2(_PLACE_LEAF1 + leaf1[k, n], word)
    return h1, h2


@inline
def _relation(word: int, leaf: int) -> int:
    """Return how a stage 2 entry relates to the frame in a word of the VMM's page table, without names of frames."""
    frame = word & FRAME
    relation = 8 if frame == KSM_FRAME else (16 if frame == ZERO_FRAME else 0)
    if leaf & VALID != 0:
        mapped = (leaf & OA_MASK) >> 12
        relation |= 1 if mapped == frame else 2
        if mapped in (KSM_FRAME, ZERO_FRAME):
            relation |= 4
    return relation


@jit
def state_hash(
    m: Machine, i: int, image: Ints, base: Ints, plain: Ints, at: Ints, leaf1: Ints, leaf2: Ints, pairs: Ints,
    pages: int, name: Ints,
) -> tuple[Any, Any]:  # fmt: skip
    """Return the hash of the canonical form of *image*, whose parameters are those of lane *i*. *name* is room for one
    word a guest page.
    """
    h1, h2 = _page_names(m, i, image, at, leaf1, pairs, name)
    for n in range(plain.shape[0]):
        place = plain[n]
        if image[place] != base[place]:
            h1 += _mix1(place, image[place])
            h2 += _mix2(place, image[place])
    first = at[_HOST_PAGE]
    logged = at[_POOL] - at[_DIRTY] == name.shape[0]
    for page in range(name.shape[0]):
        leaf = image[leaf2[page]] if leaf2[page] >= 0 else 0
        word = (image[first + page] & ~FRAME) | _relation(image[first + page], leaf)
        if leaf2[page] < 0:
            word = image[first + page]  # whoever maps it is hashed as it is, and so are frames
        if logged:
            word ^= image[at[_DIRTY] + page] << 8  # in the place of the frame's name, as is the relation
        if word != PRESENT | 1:  # what most pages are
            h1 += _mix1(_PLACE_PAGE + name[page], word)
            h2 += _mix2(_PLACE_PAGE + name[page], word)
        rest = leaf & ~OA_MASK if leaf & VALID != 0 else leaf
        if rest != S2_LEAF | S2_WRITE:
            h1 += _mix1(_PLACE_LEAF2 + name[page], rest)
            h2 += _mix2(_PLACE_LEAF2 + name[page], rest)
    par = params(m, i)
    entries = (at[_PINS] - at[_TLB]) >> 2
    for e in range(entries):
        place = at[_TLB] + 4 * e
        if image[place] == -1:
            continue
        page = image[place + 2] - par.ram_page0
        word = image[place + 2] | (1 << 62)
        if 0 <= page < name.shape[0]:
            frame = image[place + 1]
            relation = 0
            if leaf2[page] < 0:
                h1 += _mix1(_PLACE_FRAME + e, frame)
                h2 += _mix2(_PLACE_FRAME + e, frame)
            elif frame != image[first + page] & FRAME:
                relation = 2
                if (image[leaf2[page]] & OA_MASK) >> 12 == frame:
                    relation = 1
            word = (name[page] << 4) | relation | ((image[place + 3] & STRAY) << 1)
        word ^= (image[place] - (image[at[_VCPU] + _BUFFER_VA] >> 12)) << 32
        h1 += _mix1(_PLACE_TLB + e, word)
        h2 += _mix2(_PLACE_TLB + e, word)
    for k in range(leaf1.shape[0]):
        count = image[at[_VCPU] + k * _WIDTH + _PIN_COUNT]
        for n in range(min(count, pages)):
            page = image[at[_PINS] + k * pages + n]
            h1 += _mix1(_PLACE_PIN + k, name[page])
            h2 += _mix2(_PLACE_PIN + k, name[page])
    return h1, h2
