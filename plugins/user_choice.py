"""Marc Zyngier: "cheap, fast, reliable. Pick two", and let the user pick."""

from __future__ import annotations

from dataclasses import dataclass, field

from spepolicy.batch import Vcpus, Vms
from spepolicy.hookspecs import Platform, Trap, doc, hookimpl
from spepolicy.machine.hostops import Notifier

from .best_effort_pin import BestEffortPin
from .pin_vm import PinVm
from .pin_while_enabled import PinWhileEnabled


@dataclass
class UserChoice:
    """Let the VMM choose two of cheap, fast and reliable, and run the policy that keeps them.

    Mechanism: one knob of the VMM. 'cheap_fast' pins what it can and lets a fault end the session (best_effort_pin);
    'fast_reliable' pins all of the VM before it runs (pin_vm); 'cheap_reliable' pins buffer and tables at each enable,
    which is slow (pin_while_enabled). Cheap is memory, fast is the cost of a session, reliable is that it is not cut.
    Source: M. Zyngier, 27 Jul 2022 (kvm.md P12); which policy keeps which two is this project's reading.
    Needs: what the chosen one needs.
    Costs: those of the chosen one.
    Fails: as the chosen one.
    """

    want: str = field(
        default="cheap_reliable",
        metadata=doc(
            "which two of three", choices=("cheap_fast", "fast_reliable", "cheap_reliable"), source="kvm.md P12"
        ),
    )

    State = BestEffortPin.State

    @property
    def _chosen(self) -> BestEffortPin | PinVm | PinWhileEnabled:
        return {"cheap_fast": BestEffortPin, "fast_reliable": PinVm, "cheap_reliable": PinWhileEnabled}[self.want]()

    @hookimpl
    def supports(self, platform: Platform) -> str | None:
        return None if isinstance(self._chosen, BestEffortPin) else self._chosen.supports(platform)

    @hookimpl
    def traps(self) -> Trap:
        return self._chosen.traps()

    @hookimpl
    def notifier_filter(self) -> Notifier:
        return Notifier(0) if isinstance(self._chosen, BestEffortPin) else self._chosen.notifier_filter()

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        if isinstance(self._chosen, PinVm):
            self._chosen.vm_created(vms)

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        if isinstance(self._chosen, BestEffortPin):
            self._chosen.profiling_enabled(vcpus)

    @hookimpl
    def buffer_enabled(self, vcpus: Vcpus) -> None:
        if isinstance(self._chosen, PinWhileEnabled):
            self._chosen.buffer_enabled(vcpus)

    @hookimpl
    def buffer_disabled(self, vcpus: Vcpus) -> None:
        if isinstance(self._chosen, PinWhileEnabled):
            self._chosen.buffer_disabled(vcpus)

    @hookimpl
    def migration_finished(self, vms: Vms, vcpus: Vcpus) -> None:
        if isinstance(self._chosen, PinVm):
            self._chosen.migration_finished(vms)
        else:
            self._chosen.migration_finished(vcpus)

    @hookimpl
    def vm_destroyed(self, vms: Vms) -> None:
        self._chosen.vm_destroyed(vms)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        self._chosen.stage2_fault(faults)
