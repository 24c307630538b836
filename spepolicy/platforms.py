"""Whether a policy can run on the machine that a scenario describes: hook `supports`, asked before anything runs."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from spepolicy.arch.versions import Feature, features_of
from spepolicy.errors import HookError, SpePolicyError
from spepolicy.hookspecs import Platform
from spepolicy.machine.hostops import HostOp

if TYPE_CHECKING:
    from spepolicy.machine.scenario import Scenario

__all__ = ["equipped", "platform_of", "reason_not_to_run", "why_unsupported"]


def platform_of(scenario: Scenario) -> Platform:
    """Return what KVM and the VMM know of the machine of *scenario* before a VM is created."""
    cpu, guest, kvm, host = scenario.cpu, scenario.guest, scenario.kvm, scenario.host
    ops = {op for op, _, _ in host.random_ops}
    if host.recording is not None:
        ops |= _recorded_ops(host.recording)
    return Platform(
        spe_version=cpu.spe_version,
        fine_grained_traps=cpu.fine_grained_traps,
        max_record_bytes=cpu.max_record_bytes,
        fixed_size_records=cpu.max_record_bytes == cpu.align_bytes,
        vcpus=guest.vcpus,
        memory_pages=guest.ram_pages,
        memlock_pages=None if kvm.memlock_unlimited else kvm.memlock_pages,
        guest_memfd=kvm.guest_memfd,
        paravirtual_guest=guest.paravirtual,
        physical_addressing=Feature.NVM in features_of(cpu.spe_version, cpu.features),
        numa_balancing=bool(ops & {HostOp.NUMA_SCAN, HostOp.NUMA_MIGRATE}),
        ksm=HostOp.KSM in ops,
    )


@lru_cache(maxsize=16)
def _recorded_ops(recording: Any) -> frozenset[int]:
    return frozenset(recording.op.tolist())


def reason_not_to_run(policy: object, name: str, scenario: Scenario) -> str | None:
    """Return why the *policy* called *name* cannot run on the machine of *scenario*, or None if it can."""
    from spepolicy.plugins import make_plugin_manager

    return why_unsupported(make_plugin_manager(policy, ()), scenario, name)


def why_unsupported(manager: Any, scenario: Scenario, name: str) -> str | None:
    """Ask the policy that is registered in *manager* whether it can run; return its reason if it cannot."""
    try:
        reason = manager.hook.supports(platform=platform_of(scenario))
    except SpePolicyError:
        raise
    except Exception as error:
        raise HookError(f"policy '{name}', hook supports() raised {type(error).__name__}: {error}.") from error
    if reason is not None and not (isinstance(reason, str) and reason.strip()):
        raise HookError(
            f"policy '{name}': supports() returned {reason!r}. Rule: None, or a text that says why it cannot run."
        )
    return reason


def _with_physical_addressing(features: tuple[str, ...]) -> tuple[str, ...]:
    return features if "nVM" in features else (*features, "nVM")


def equipped(scenario: Scenario) -> Scenario:
    """Return *scenario* on a machine with every optional feature that a policy may ask for in `supports`."""
    return replace(
        scenario,
        cpu=replace(scenario.cpu, fine_grained_traps=True, features=_with_physical_addressing(scenario.cpu.features)),
        guest=replace(scenario.guest, paravirtual=True, physical_buffer=True),
        kvm=replace(scenario.kvm, guest_memfd=True),
    )
