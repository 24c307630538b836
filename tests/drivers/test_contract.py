"""What a policy may not do: each breach is one error that names policy, hook, value and rule, and nothing hangs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest

from spepolicy.batch import Vcpus, Vms
from spepolicy.drivers.simulate import simulate
from spepolicy.errors import ConfigurationError, HookError, PluginError, SpePolicyError
from spepolicy.hookspecs import Cause, Event, Trap, hookimpl

from ..properties.scenarios import MS, guest, scenario

LANES = 3
small = scenario(duration_ps=MS, guest=guest(buffer_mapped=False))


@dataclass
class Breaks:
    """A policy that does one thing to each batch that it is given."""

    enabled: Callable[[Vcpus], Any] = field(default=lambda vcpus: None)
    fault: Callable[[Vcpus], Any] = field(default=lambda faults: faults.inject(Event.IMPDEF))
    created: Callable[[Vms], Any] = field(default=lambda vms: None)
    trapped: Any = Trap.PMB | Trap.PMS
    keep: Any = None
    vm: Any = None

    State: ClassVar[np.dtype[Any]] = np.dtype([("number", "i8"), ("address", "u8")])

    @hookimpl
    def traps(self) -> Any:
        return self.trapped

    @hookimpl
    def notifier_filter(self) -> Any:
        return self.keep

    @hookimpl
    def virtualization(self) -> Any:
        return self.vm

    @hookimpl
    def vm_created(self, vms: Vms) -> None:
        self.created(vms)

    @hookimpl
    def profiling_enabled(self, vcpus: Vcpus) -> None:
        self.enabled(vcpus)

    @hookimpl
    def stage2_fault(self, faults: Vcpus) -> None:
        self.fault(faults)


def breach(threads: int = 1, **parts: Any) -> str:
    """Run a policy that breaks the contract; return the message."""
    with pytest.raises(HookError) as caught:
        simulate(small, Breaks(**parts), name="breaks", replicates=range(LANES), threads=threads)
    assert isinstance(caught.value, PluginError)
    assert isinstance(caught.value, SpePolicyError)
    message = str(caught.value)
    assert "\n" not in message
    assert "breaks" in message.lower()
    return message


# ---- hooks that fail -------------------------------------------------------------------------------------------------


def test_a_hook_that_raises_is_named_with_its_error() -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError("by the policy")

    for hook, part in (("profiling_enabled", "enabled"), ("stage2_fault", "fault"), ("vm_created", "created")):
        message = breach(**{part: fail})
        assert f"hook {hook}()" in message
        assert "ZeroDivisionError: by the policy" in message


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_hook_that_raises_on_a_worker_thread_ends_the_run(threads: int) -> None:
    def fail(vcpus: Vcpus) -> None:
        if 2 in vcpus._lanes or len(vcpus) < LANES:
            raise ValueError("in one chunk of several")

    assert "ValueError: in one chunk of several" in breach(threads=threads, enabled=fail)


def test_a_fault_that_is_not_answered_is_an_error_even_if_the_others_are() -> None:
    message = breach(fault=lambda faults: faults.where(np.arange(len(faults)) > 0).resume())
    assert "hook stage2_fault()" in message
    assert f"left 1 of {LANES} faults without an answer" in message
    assert "resume()" in message
    assert "inject(" in message


def test_an_answer_in_another_hook_does_not_count() -> None:
    """The answer of an earlier fault is not the answer of this one."""
    calls = []

    def once(faults: Vcpus) -> None:
        calls.append(len(faults))
        if len(calls) == 1:
            faults.resume()

    assert "without an answer" in breach(fault=once)
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("part", "value", "parts"),
    [
        ("trapped", 3, ["traps()", "3", "Trap"]),
        ("trapped", "PMB", ["traps()", "'PMB'", "Trap"]),
        ("keep", "CLEAR", ["notifier_filter()", "'CLEAR'", "Notifier"]),
        ("keep", 1.5, ["notifier_filter()", "1.5", "Notifier"]),
        ("vm", "yes", ["virtualization()", "'yes'", "True, False or None"]),
    ],
)
def test_a_set_up_hook_must_return_its_type(part: str, value: Any, parts: list[str]) -> None:
    message = breach(**{part: value})
    assert all(wanted in message for wanted in parts)


# ---- arguments of tools ----------------------------------------------------------------------------------------------

WRONG: dict[str, tuple[Callable[[Vcpus], Any], list[str]]] = {
    "mask of other length": (lambda b: b.where(np.ones(len(b) + 1, bool)), ["where()", "shape (4,)", "shape (3,)"]),
    "mask with two dimensions": (lambda b: b.where(np.ones((len(b), 1), bool)), ["where()", "shape (3, 1)"]),
    "mask of integers": (lambda b: b.where(np.ones(len(b), int)), ["where()", "int64", "boolean"]),
    "mask of one number": (lambda b: b.where(1), ["where()", "int64", "boolean"]),
    "lo of floats": (lambda b: b.walk_stage1(b.buffer_lo.astype(float), b.buffer_hi), ["walk_stage1(lo)", "float64"]),
    "hi too short": (lambda b: b.walk_stage1(b.buffer_lo, b.buffer_hi[:1]), ["walk_stage1(hi)", "shape (1,)"]),
    "hi of text": (lambda b: b.walk_stage1(b.buffer_lo, np.array(["a"] * len(b))), ["walk_stage1(hi)", "integer"]),
    "event as a number": (lambda b: b.inject(4), ["inject()", "4", "Event"]),
    "event as text": (lambda b: b.inject("IMPDEF"), ["inject()", "'IMPDEF'", "Event"]),
    "claim out of range": (lambda b: b.claim(np.full(len(b), 6)), ["claim()", "6", "Cause"]),
    "claim negative": (lambda b: b.claim(np.full(len(b), -1)), ["claim()", "-1", "Cause"]),
    "claim of floats": (lambda b: b.claim(np.zeros(len(b))), ["claim(cause)", "float64", "integer"]),
    "claim too long": (lambda b: b.claim(np.zeros(len(b) + 2, int)), ["claim(cause)", "shape (5,)"]),
    "state field unknown": (lambda b: b.state["nummer"], ["'nummer'", "number, address"]),
    "state field unknown in a write": (lambda b: b.state.__setitem__("pages", 1), ["'pages'", "number, address"]),
    "state of other shape": (lambda b: b.state.__setitem__("number", np.zeros(len(b) + 1, int)), ["shape"]),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("part", ["enabled", "fault"])
def test_a_wrong_argument_is_refused(what: str, part: str) -> None:
    call, parts = WRONG[what]
    message = breach(**{part: call})
    hook = {"enabled": "profiling_enabled", "fault": "stage2_fault"}[part]
    assert f"hook {hook}()" in message
    assert all(wanted in message for wanted in parts), message


def test_tools_take_nothing_for_an_answer() -> None:
    """Batches may be empty, scalars stand for the whole batch, and what was read is the policy's own to change."""
    seen = []

    def use(vcpus: Vcpus) -> None:
        none = vcpus.where(np.zeros(len(vcpus), bool))
        assert len(none) == 0
        assert none.pmbptr.shape == none.fault_status.shape == none.data_loss.shape == (0,)
        none.resume()
        none.inject(Event.IMPDEF)
        none.unpin()
        none.claim(Cause.HOST)
        walk = none.walk_stage1(none.buffer_lo, none.buffer_hi)
        assert walk.status.shape == (0,)
        walk.ok.pin().ok.unpin_previous()
        assert walk.ok.map().shape == (0,)
        everything = vcpus.where(True)
        assert len(everything) == len(vcpus)
        pointer = vcpus.pmbptr
        pointer[:] = 0
        assert (vcpus.pmbptr != 0).all(), "a register that was read is a copy"
        vcpus.state["address"] = np.uint64(2**64 - 1)
        read = vcpus.state["address"]
        read[:] = 0
        assert (vcpus.state["address"] == np.uint64(2**64 - 1)).all()
        one = vcpus.walk_stage1(int(vcpus.buffer_lo[0]), int(vcpus.buffer_hi[0]))
        assert (one.status == 0).all(), "the same addresses for every VM: each has its own tables behind them"
        seen.append(len(vcpus))

    simulate(small, Breaks(enabled=use), name="uses", replicates=range(LANES), threads=1)
    assert seen


def test_a_walk_says_why_it_failed() -> None:
    """Status of the first bad page, as PMBSR_EL1 would show it for stage 1; nothing is pinned."""
    seen = []

    def use(vcpus: Vcpus) -> None:
        third = vcpus.buffer_lo + np.uint64(3 * 4096)  # of four pages: the range reaches beyond the buffer
        beyond = vcpus.walk_stage1(third, third + np.uint64(2 * 4096))
        assert len(beyond.ok) == 0
        assert len(beyond.failed) == len(vcpus)
        assert (beyond.status & 0x3C == 0x04).all()
        low = vcpus.walk_stage1(0x1000, 0x2000)
        assert (low.status != 0).all()
        seen.append(vcpus.pinned_pages.sum())

    simulate(small, Breaks(enabled=use), name="walks", replicates=range(LANES), threads=1)
    assert set(seen) == {0}


def test_no_replicates_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="replicates"):
        simulate(small, Breaks(), name="breaks", replicates=[])
