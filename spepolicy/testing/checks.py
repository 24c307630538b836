"""Checks of the contract, of reproducibility, and of behaviour in the scenes of the kit. Each takes a `Subject`, and
raises CheckFailed with the cause and the likely fix.
"""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import fields, is_dataclass, replace

import numpy as np

from spepolicy.errors import HookError, PluginError
from spepolicy.judge.errata import Erratum
from spepolicy.testing.hidden import with_garbage_for_truth
from spepolicy.testing.registry import CheckFailed, check
from spepolicy.testing.subject import LANES, Subject, differences

EXTERNAL_ABORT_ENDS = 4  # PMSVer of SPEv1p3, from which on a buffer write reports no external abort (spe.md 2.6)
DOCSTRING_PARTS = ("Mechanism", "Source", "Needs", "Costs", "Fails")


# ---- the contract ----------------------------------------------------------------------------------------------------


@check()
def _contract(subject: Subject) -> None:
    """Hooks exist and take their arguments; the class is a dataclass with a docstring; State is a structured dtype."""
    try:
        subject.require_a_plugin()
    except (PluginError, HookError) as error:
        raise CheckFailed(str(error)) from None


@check("contract")
def _docstring(subject: Subject) -> None:
    """The docstring says mechanism, source, needs, costs and failures."""
    text = type(subject.policy).__doc__ or ""
    missing = [part for part in DOCSTRING_PARTS if not re.search(rf"^\s*{part}:", text, re.MULTILINE)]
    if missing:
        raise CheckFailed(
            f"the docstring of {subject.name} lacks {', '.join(missing)}. Rule: a paragraph each that begins with "
            f"{', '.join(part + ':' for part in DOCSTRING_PARTS)} Remedy: add them; a reader decides by them."
        )


@check("contract")
def _fields(subject: Subject) -> None:
    """Every field says what it does, numbers with a unit or a range."""
    assert is_dataclass(subject.policy)
    for item in fields(subject.policy):
        if not str(item.metadata.get("doc", "")).strip():
            raise CheckFailed(
                f"field {item.name} says nothing about itself. Rule: metadata=doc('what it does', unit=..., "
                "minimum=...). Remedy: describe it; --help shows that."
            )
        value = getattr(subject.policy, item.name)
        if isinstance(value, int | float) and not isinstance(value, bool):
            described = item.metadata.get("unit") or item.metadata.get("minimum") is not None
            if not described:
                raise CheckFailed(
                    f"field {item.name} is a number without unit and range. Remedy: doc(..., unit='pages', minimum=0)."
                )


@check("contract")
def _state(subject: Subject) -> None:
    """What the policy remembers is plain numbers, so that a lane can be copied, moved and compared."""
    state: np.dtype[np.void] = getattr(subject.policy, "State", None) or np.dtype([])
    for name in state.names or ():
        if state[name].base.kind not in "iub":
            raise CheckFailed(
                f"State field {name} has dtype {state[name]}. Rule: integers and booleans, for states are copied, "
                "hashed and compared. Remedy: use an integer, or a fixed-point number."
            )
    try:
        same = pickle.loads(pickle.dumps(subject.policy)) == subject.policy
    except Exception as error:
        raise CheckFailed(
            f"the policy cannot be pickled: {error}. Rule: it is sent to worker processes. Remedy: keep only its "
            "fields in it, at module level."
        ) from None
    if not same:
        raise CheckFailed("the policy is another after pickling. Remedy: keep nothing in it but its dataclass fields.")


@check("contract")
def _hooks_run(subject: Subject) -> None:
    """Every hook runs in every scene, passes arrays of the right shape and dtype, and answers every fault."""
    if not subject.scenes:
        reason = subject.refusal()
        raise CheckFailed(f"supports() refuses every scene of the kit: {reason}. Remedy: refuse only what it must.")
    for name in subject.scenes:
        try:
            subject.result(name)
        except HookError as error:
            raise CheckFailed(f"in the scene '{name}': {error}") from None


@check("contract")
def _errata_hook(subject: Subject) -> None:
    """The errata hook, if there is one, returns complete Erratum records with ids of their own."""
    hook = getattr(subject.policy, "errata", None)
    if hook is None:
        return
    try:
        records = list(hook() or ())
    except Exception as error:
        raise CheckFailed(
            f"errata() raised {type(error).__name__}: {error}. Remedy: return a list of Erratum."
        ) from None
    for record in records:
        if not isinstance(record, Erratum):
            raise CheckFailed(f"errata() returned {record!r}. Rule: spepolicy.judge.errata.Erratum. Remedy: build one.")
        if not record.source.strip():
            raise CheckFailed(f"erratum '{record.id}' has no source. Remedy: say where it was found or discussed.")
    names = [record.id for record in records]
    if len(set(names)) != len(names):
        raise CheckFailed(f"errata() returned an id twice: {', '.join(names)}. Remedy: give each its own.")


# ---- reproducible ----------------------------------------------------------------------------------------------------


@check("hooks_run")
def _determinism(subject: Subject) -> None:
    """Two runs are equal to the bit, with the same instance and with a fresh one."""
    before = copy.deepcopy(vars(subject.policy))
    for name in subject.some("busy", "two vCPUs"):
        first = subject.result(name)
        again = differences(first, subject.run(subject.scenes[name]))
        if again:
            raise CheckFailed(
                f"in the scene '{name}', a second run differs in {', '.join(again)}. Cause: random numbers, the clock, "
                "or memory outside vcpus.state. Remedy: decide by the batch and vcpus.state only."
            )
        fresh = differences(first, subject.run(subject.scenes[name], policy=replace(subject.policy)))  # type: ignore[type-var]
        if fresh:
            raise CheckFailed(
                f"in the scene '{name}', a fresh instance differs in {', '.join(fresh)}. Cause: the instance remembers "
                "earlier calls. Remedy: declare State and use vcpus.state."
            )
    if vars(subject.policy) != before:
        raise CheckFailed("hooks changed the instance's attributes. Remedy: declare State and use vcpus.state.")


@check("hooks_run")
def _batch_independence(subject: Subject) -> None:
    """A lane's result does not depend on the lanes beside it, nor on their order."""
    for name in subject.some("busy", "scans"):
        whole = subject.result(name)
        orders = [[n] for n in range(LANES)] + [list(reversed(range(LANES)))]
        for order in orders:
            differ = differences(whole, subject.run(subject.scenes[name], replicates=order), np.array(order))
            if differ:
                raise CheckFailed(
                    f"in the scene '{name}', lanes {order} run by themselves differ from the same lanes among "
                    f"{LANES} in {', '.join(differ)}. Cause: a decision for the batch as a whole, such as any(), "
                    "all(), a mean, or element 0. Remedy: decide each vCPU by itself, with where(mask)."
                )


@check("hooks_run")
def _no_ground_truth(subject: Subject) -> None:
    """Decisions stay the same when what only the judge knows is turned into garbage while hooks run."""
    for name in subject.some("busy", "scans", "cut records"):
        with with_garbage_for_truth():
            garbled = subject.run(subject.scenes[name])
        differ = differences(subject.result(name), garbled)
        if differ:
            raise CheckFailed(
                f"in the scene '{name}', decisions change with the judge's own arrays ({', '.join(differ)} differ). "
                "Rule: a policy sees what KVM would see. Remedy: use the batch's properties and tools only."
            )


# ---- behaviour -------------------------------------------------------------------------------------------------------


@check("hooks_run")
def _conservation(subject: Subject) -> None:
    """Every selected sample ends in exactly one way, in every lane."""
    for name in subject.scenes:
        result = subject.result(name)
        t = result.truth
        ends = t["collided"] + t["filtered"] + t["kept"] + t["discarded"] + t["in_flight"] + result.lost.sum(axis=2)
        if not np.array_equal(t["selected"], ends):
            raise CheckFailed(
                f"in the scene '{name}', {int((t['selected'] - ends).sum())} samples are unaccounted for. "
                "This is a defect of the machine that the policy has found. Remedy: report it."
            )


@check("hooks_run")
def _pins_end_with_the_vm(subject: Subject) -> None:
    """No page is pinned when the VM is gone."""
    for name in subject.scenes:
        left = subject.result(name).vm["pinned_pages"]
        if left.any():
            raise CheckFailed(
                f"in the scene '{name}', {int(left.max())} pages are still pinned after vm_destroyed. "
                "Remedy: call vms.unpin_all() in the hook vm_destroyed."
            )


@check("hooks_run")
def _pins_end_with_the_session(subject: Subject) -> None:
    """What is pinned does not grow with the number of sessions."""
    if "new buffers" not in subject.scenes:
        return
    scene = subject.scenes["new buffers"]
    short = subject.run(scene, duration_ps=4 * scene.duration_ps)
    long = subject.run(scene, duration_ps=16 * scene.duration_ps)
    before, after = (int(result.vm["pinned_peak_pages"].max()) for result in (short, long))
    if after > before:
        raise CheckFailed(
            f"the peak of pinned pages grows from {before} to {after} when sessions go on four times as long, "
            "each with a buffer of its own. Cause: pages of earlier buffers stay pinned. Remedy: call unpin_previous() "
            "on the result of pin(), or unpin() when the buffer is disabled."
        )


@check("hooks_run")
def _memlock(subject: Subject) -> None:
    """Pinned and locked memory stays within RLIMIT_MEMLOCK."""
    for name in subject.scenes:
        result = subject.result(name)
        limit = result.scenario.kvm
        peak = int(result.vm["charged_peak_pages"].max())
        if not limit.memlock_unlimited and peak > limit.memlock_pages:
            raise CheckFailed(
                f"in the scene '{name}', {peak} pages were pinned or locked under a limit of {limit.memlock_pages}. "
                "Cause: pin_all() or mlock_all() with ignore_limit=True. Remedy: respect the limit and handle "
                "over_limit; or declare it, if the VMM has CAP_IPC_LOCK."
            )


@check("hooks_run")
def _allowed_events(subject: Subject) -> None:
    """The guest is told nothing that its SPE version does not allow."""
    name = next(iter(subject.some("scans", "quiet")))
    for version in range(1, 7):
        scene = subject.scenes[name]
        result = subject.run(scene, cpu=replace(scene.cpu, spe_version=version))
        aborts = int(result.truth["injected_external"].sum())
        if version >= EXTERNAL_ABORT_ENDS and aborts:
            raise CheckFailed(
                f"{aborts} external aborts were injected with PMSVer={version}. Rule: from SPEv1p3 on (PMSVer 4) "
                "a write to the buffer does not report an external abort in PMBSR_EL1 (spe.md 2.6). "
                "Remedy: inject(Event.IMPDEF) there."
            )


@check("hooks_run")
def _no_silent_cut(subject: Subject) -> None:
    """A fault that cut a record is not hidden from the guest."""
    for name in subject.scenes:
        hidden = int(subject.result(name).truth["resumed_cut"].sum())
        if hidden:
            raise CheckFailed(
                f"in the scene '{name}', {hidden} faults with PMBSR_EL1.DL=1 were resumed: the guest parses a stream "
                "with cut records and is not told. Remedy: where faults.data_loss, inject(..., data_loss=True)."
            )


@check("hooks_run")
def _progress(subject: Subject) -> None:
    """Faults are repaired, not repeated: on a quiet host their number is bounded by the pages that there are."""
    for name in subject.some("quiet", "EL0 only"):
        result = subject.result(name)
        guest = result.scenario.guest
        # The pages of the ring, those of its tables, and the ring again for each session.
        bound = (guest.buffer_pages + 8) * (result.truth["sessions"] + 1)
        worst = int((result.truth["stage2_faults"] - bound).max())
        if worst > 0:
            faults = int(result.truth["stage2_faults"].max())
            raise CheckFailed(
                f"in the scene '{name}', where nothing disturbs, {faults} stage 2 faults happened on one vCPU whose "
                f"buffer has {guest.buffer_pages} pages. Cause: resume() without a mapping for the faulting page, or "
                "for the stage 1 table that leads to it. Remedy: walk_stage1(..., pin_tables=True) from "
                "faults.pmbptr on, map or pin, and inject where that fails."
            )
