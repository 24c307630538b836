"""A run has a plugin manager of its own, and a plugin that breaks the contract is refused with the rule it breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from spepolicy.errors import HookError, PluginError
from spepolicy.hookspecs import hookimpl
from spepolicy.plugins import build_policy, installed_policies, installed_reporters, make_plugin_manager


@dataclass
class Good:
    """Resume every fault."""

    State = np.dtype([("count", "i8")])

    @hookimpl
    def stage2_fault(self, faults: Any) -> None:
        pass


class Watcher:
    def __init__(self) -> None:
        self.seen: list[Any] = []

    @hookimpl
    def run_finished(self, report: Any) -> None:
        self.seen.append(report)


@pytest.mark.parametrize("name", sorted(installed_policies()))
def test_every_installed_policy_keeps_the_contract(name: str) -> None:
    manager = make_plugin_manager(build_policy(name, {}), list(installed_reporters().values()))
    assert manager.get_plugin("policy") is not None
    assert manager.hook.report_errata.get_hookimpls()


def test_managers_do_not_share_plugins() -> None:
    first, second = Watcher(), Watcher()
    one, two = make_plugin_manager(Good(), [first]), make_plugin_manager(Good(), [second])
    one.hook.run_finished(report="one")
    assert (first.seen, second.seen) == (["one"], [])
    two.hook.run_finished(report="two")
    assert (first.seen, second.seen) == (["one"], ["two"])


def test_a_reporter_may_be_given_as_a_class() -> None:
    manager = make_plugin_manager(Good(), [Watcher])
    assert any(isinstance(plugin, Watcher) for _, plugin in manager.list_name_plugin())


def make(**members: Any) -> Any:
    """Return an instance of a policy dataclass that is `Good` but for *members*; None removes one."""
    body = {"__doc__": "Doc.", "stage2_fault": Good.stage2_fault} | members
    return dataclass(type("Odd", (), {k: v for k, v in body.items() if v is not None}))()


@pytest.mark.parametrize(
    ("policy", "parts"),
    [
        (make(stage2_falt=hookimpl(lambda self, faults: None)), ["there is no hook 'stage2_falt'", "'stage2_fault'?"]),
        (make(stage2_fault=hookimpl(lambda self, fault: None)), ["no argument 'fault'", "Did you mean 'faults'?"]),
        (make(traps=hookimpl(lambda self, vcpus: None)), ["hook traps has no argument 'vcpus'", "offers no arguments"]),
        (make(traps=lambda self: None), ["traps is named like a hook but not marked", "@hookimpl"]),
        (make(stage2_fault=None), ["has no hook stage2_fault", "resume() or inject(Event)"]),
        (make(State=np.dtype("i8")), ["State is dtype('int64'), not a structured dtype"]),
        (make(State={"count": "i8"}), ["not a structured dtype"]),
        (Good, ["is a class", "Good()"]),
        (Watcher(), ["Watcher is not a dataclass"]),
        (dataclass(type("Bare", (), {}))(), ["Bare has no docstring"]),
    ],
)
def test_a_policy_that_breaks_the_contract_is_refused(policy: Any, parts: list[str]) -> None:
    with pytest.raises(PluginError) as caught:
        make_plugin_manager(policy, [])
    for part in parts:
        assert part in str(caught.value)


def test_only_what_is_not_virtualized_may_leave_faults_unanswered() -> None:
    assert make_plugin_manager(make(stage2_fault=None, virtualization=hookimpl(lambda self: False)), [])
    with pytest.raises(PluginError, match="has no hook stage2_fault"):
        make_plugin_manager(make(stage2_fault=None, virtualization=hookimpl(lambda self: True)), [])


def test_a_hook_that_raises_during_set_up_is_named() -> None:
    def virtualization(self: Any) -> bool:
        raise ZeroDivisionError("oops")

    with pytest.raises(HookError, match="hook virtualization raised ZeroDivisionError: oops"):
        make_plugin_manager(make(stage2_fault=None, virtualization=hookimpl(virtualization)), [])


def test_a_misspelt_hook_of_a_reporter_is_refused() -> None:
    class Reporter:
        @hookimpl
        def report_erratas(self, findings: Any) -> None:
            pass

    with pytest.raises(PluginError, match=r"Reporter.*no hook 'report_erratas'.*Did you mean 'report_errata'\?"):
        make_plugin_manager(Good(), [Reporter()])


def test_the_same_reporter_twice_is_refused() -> None:
    with pytest.raises(PluginError, match=r"Watcher.*cannot be registered"):
        make_plugin_manager(Good(), [Watcher(), Watcher()])
