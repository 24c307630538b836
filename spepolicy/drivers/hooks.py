"""Calling the policy: what its set-up hooks say of KVM, and one hook for all lanes that wait for it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.batch import Vcpus, Vms, lent
from spepolicy.drivers.tools import Tools
from spepolicy.errors import HookError, SpePolicyError
from spepolicy.hookspecs import Ownership, PolicySpec, Trap
from spepolicy.machine import answers
from spepolicy.machine.build import Behaviour
from spepolicy.machine.state import Hook, Machine

Ints = NDArray[np.int64]

_HOOK_NAMES = {
    Hook.VM_CREATED: "vm_created",
    Hook.BUFFER_ENABLED: "buffer_enabled",
    Hook.PROFILING_ENABLED: "profiling_enabled",
    Hook.BUFFER_DISABLED: "buffer_disabled",
    Hook.PROFILING_DISABLED: "profiling_disabled",
    Hook.STAGE2_FAULT: "stage2_fault",
    Hook.VM_DESTROYED: "vm_destroyed",
    Hook.USER_PROFILING_ARMED: "user_profiling_armed",
    Hook.ERET: "eret",
    Hook.OWN_BUFFER_FULL: "own_buffer_full",
    Hook.BUFFER_STOPPING: "buffer_stopping",
    Hook.TIMER: "timer",
    Hook.BUFFER_ANNOUNCED: "buffer_announced",
    Hook.MIGRATION_STARTED: "migration_started",
    Hook.MIGRATION_FINISHED: "migration_finished",
}
_VM_HOOKS = (Hook.VM_CREATED, Hook.VM_DESTROYED)
_MIGRATION_HOOKS = (Hook.MIGRATION_STARTED, Hook.MIGRATION_FINISHED)

assert set(_HOOK_NAMES.values()) <= set(dir(PolicySpec))


def _implemented(policy: object) -> int:
    """Return the mask of `Hook` bits that *policy* implements (marked with hookimpl)."""
    mask = 0
    for hook, name in _HOOK_NAMES.items():
        if hasattr(getattr(policy, name, None), "spepolicy_impl"):
            mask |= 1 << hook
    return mask


def behaviour_of(policy: object, manager: Any) -> Behaviour:
    """Ask the policy's set-up hooks how KVM has to be set up for it."""
    owner = manager.hook.ownership()
    traps = manager.hook.traps()
    keep = manager.hook.notifier_filter()
    virtualized = manager.hook.virtualization()
    physical = manager.hook.physical_addressing()
    traps = Trap.NONE if traps is None else traps
    if not isinstance(traps, Trap):
        raise HookError(
            f"policy '{_name(policy)}': traps() returned {traps!r}. Rule: a spepolicy.hookspecs.Trap or None."
        )
    if keep is not None and not isinstance(keep, int):
        raise HookError(
            f"policy '{_name(policy)}': notifier_filter() returned {keep!r}. Rule: a Notifier mask or None."
        )
    if owner is not None and not isinstance(owner, Ownership):
        raise HookError(
            f"policy '{_name(policy)}': ownership() returned {owner!r}. Rule: a spepolicy.hookspecs.Ownership or None."
        )
    hooks = _implemented(policy)
    if owner == Ownership.KVM:
        for hook in (Hook.OWN_BUFFER_FULL, Hook.BUFFER_STOPPING):
            if not (hooks >> hook) & 1:
                raise HookError(
                    f"policy '{_name(policy)}' has no hook {_HOOK_NAMES[hook]}. Rule: with Ownership.KVM the policy "
                    "copies KVM's buffer. Remedy: implement own_buffer_full and buffer_stopping."
                )
    if virtualized not in (None, True, False):
        raise HookError(
            f"policy '{_name(policy)}': virtualization() returned {virtualized!r}. Rule: True, False or None."
        )
    if physical not in (None, True, False):
        raise HookError(
            f"policy '{_name(policy)}': physical_addressing() returned {physical!r}. Rule: True, False or None."
        )
    return Behaviour(
        virtualized=virtualized is not False,
        trap_pmb=bool(traps & Trap.PMB) or owner == Ownership.KVM,
        trap_pms=bool(traps & Trap.PMS),
        notifier_filter=int(keep or 0),
        hidden=owner == Ownership.NOBODY,
        own_buffer=owner == Ownership.KVM,
        physical=physical is True,
        hooks=0 if owner == Ownership.NOBODY else hooks,
    )


def _name(policy: object) -> str:
    return type(policy).__name__


def call_hook(
    manager: Any, policy: str, m: Machine, handle: Any, rows: NDArray[np.void], hook: Hook, lanes: Ints
) -> None:
    """Call *hook* of the policy in *manager* once for *lanes* of *m*, which wait for it, and see that the contract was
    kept. *rows* is the policy's state, [lane, vCPU]; *handle* is `rows.context(m)`.

    Raises HookError if the policy failed, or left a fault without an answer.
    """
    name = _HOOK_NAMES[hook]
    vcpus = m.vm["hook_vcpu"][lanes]
    with lent(Tools(m, handle)) as ticket:
        try:
            caller = getattr(manager.hook, name)
            if hook in _VM_HOOKS:
                caller(vms=Vms(ticket, lanes))
            elif hook in _MIGRATION_HOOKS:
                each = m.vcpu.shape[1]
                every = Vcpus(ticket, np.repeat(lanes, each), np.tile(np.arange(each), len(lanes)), rows)
                caller(vms=Vms(ticket, lanes), vcpus=every)
            else:
                batch = Vcpus(ticket, lanes, vcpus, rows)
                caller(**{"faults" if hook == Hook.STAGE2_FAULT else "vcpus": batch})
        except SpePolicyError as error:
            raise HookError(f"policy '{policy}', hook {name}(): {error}") from error
        except Exception as error:
            raise HookError(
                f"policy '{policy}', hook {name}() raised {type(error).__name__}: {error}. "
                "Remedy: fix the plugin; HYDRA_FULL_ERROR=1 shows where."
            ) from error
    if hook == Hook.BUFFER_STOPPING and (running := m.vcpu["pmblimitr"][lanes, vcpus] & 1).any():
        raise HookError(
            f"policy '{policy}', hook buffer_stopping() left KVM's buffer of {int(running.sum())} of {len(lanes)} "
            "vCPUs running. Rule: the guest has disabled its buffer. Remedy: call copy_out() or defer_copy()."
        )
    if hook == Hook.OWN_BUFFER_FULL and (silent := m.vcpu["answered"][lanes, vcpus] == 0).any():
        raise HookError(
            f"policy '{policy}', hook own_buffer_full() left {int(silent.sum())} of {len(lanes)} vCPUs without an "
            "answer. Rule: the SPU starts again or the guest is told. Remedy: call start_own_buffer() or inject(...)."
        )
    if hook == Hook.STAGE2_FAULT:
        silent = m.vcpu["answered"][lanes, vcpus] == 0
        if silent.any():
            raise HookError(
                f"policy '{policy}', hook stage2_fault() left {int(silent.sum())} of {len(lanes)} faults without "
                "an answer. Rule: every vCPU of the batch is resumed or told. "
                "Remedy: call faults.resume() or faults.inject(...)."
            )
        answers.score_claims(handle, lanes, vcpus)
