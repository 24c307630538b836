"""output.perf_data: which lanes, what is written where, and what is wrong with a choice."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from spepolicy.config import to_options
from spepolicy.drivers.simulate import simulate
from spepolicy.errors import ConfigurationError
from spepolicy.lab.chosen_lanes import perf_data_name, timeline_name, write_lanes
from spepolicy.lab.run import Plan, TrackingSettings, execute
from spepolicy.lane_choice import ChosenLanes, check_guest, check_policies, parse_lanes
from spepolicy.machine.scenario import GuestDriver
from spepolicy.perfdata import read
from spepolicy.perfdata.program import KERNEL_FILE, PROGRAM_FILE
from tests.properties.scenarios import policy, scenario

POLICIES = {"eager_pin": policy("eager_pin"), "bare_metal": policy("bare_metal")}


def test_lanes_are_named_by_replicate_or_by_policy_too() -> None:
    assert parse_lanes(["0", "bare_metal:1", "0"], 2) == (("", 0), ("bare_metal", 1))


@pytest.mark.parametrize("value", ["2", "-1", "", "x", "bare_metal", "bare_metal:", "bare_metal:2", "1.0", "²"])
def test_a_lane_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigurationError, match=r"output\.lanes=\[.*REPLICATE.*replicates=2"):
        parse_lanes([value], 2)


def test_a_policy_that_is_not_run_is_refused() -> None:
    check_policies([("", 0), ("bare_metal", 0)], POLICIES)
    with pytest.raises(ConfigurationError, match=r"Did you mean 'eager_pin'.*baselines=\[eagre_pin\]"):
        check_policies([("eagre_pin", 0)], POLICIES)


def config(**output: Any) -> dict[str, Any]:
    settings = {"dir": "outputs", "perf_data": True, "timeline": False, "lanes": ["0"]} | output
    return {"task": "simulate", "replicates": 3, "threads": None, "baselines": [], "output": settings,
            "tracking": {"kind": "none"}, "seed": 1, "duration": "1ms"}  # fmt: skip


def test_the_settings() -> None:
    assert to_options(config()).lanes == ChosenLanes((("", 0),), perf_data=True)
    assert not to_options(config(perf_data=False)).lanes.any()
    assert to_options(config(lanes=["2", "pin_vm:1"])).lanes.lanes == (("", 2), ("pin_vm", 1))
    with pytest.raises(ConfigurationError, match=r"lanes"):
        to_options(config(perf_data=False, lanes=["3"]))  # wrong even if it is not used now
    with pytest.raises(ConfigurationError, match=r"output\.perf_data=1"):
        to_options(config(perf_data=1))


def plan(folder: Path, **changes: Any) -> Plan:
    return Plan(
        chosen="eager_pin",
        policies=POLICIES,
        scenario=scenario(),
        replicates=2,
        threads=1,
        run_dir=folder / "run",
        tracking=TrackingSettings(kind="none"),
        config={},
        **changes,
    )


def test_a_run_writes_the_lanes_and_the_images(tmp_path: Path) -> None:
    said: list[str] = []
    report = execute(plan(tmp_path, lanes=ChosenLanes((("", 1), ("bare_metal", 0)), perf_data=True)), said.append)
    names = {PROGRAM_FILE, KERNEL_FILE, "eager_pin-1.perf.data", "bare_metal-0.perf.data"}
    assert names <= set(report.files)
    assert sum("running its lane again" in line for line in said) == 2
    for name, (lane_policy, replicate) in zip(sorted(names)[:2], (("bare_metal", 0), ("eager_pin", 1)), strict=True):
        assert name == perf_data_name(lane_policy, replicate)
        capture = read(report.files[name])
        assert capture.complete
        result = report.verdicts[lane_policy].result
        assert len(capture.records) == result.truth["written"][replicate].sum()
        assert len(capture.errors) == (result.windows["lane"] == replicate).sum()
        (image,) = {capture.names[n] for n in capture.maps["name"]} & {str(tmp_path / "run" / PROGRAM_FILE)}
        assert Path(image).is_file()


def test_a_run_that_is_not_asked_writes_none(tmp_path: Path) -> None:
    assert not [name for name in execute(plan(tmp_path), lambda _: None).files if "perf" in name or "guest" in name]


def test_lanes_that_an_interruption_left_out_are_left_out(tmp_path: Path) -> None:
    result = simulate(scenario(), POLICIES["eager_pin"], name="eager_pin", replicates=range(2), threads=1)
    cut = replace(result, finished=result.finished & False)
    files = write_lanes(
        ChosenLanes((("", 0), ("pin_vm", 0)), perf_data=True),
        "eager_pin",
        POLICIES,
        {"eager_pin": cut},
        tmp_path,
        lambda _: None,
    )
    assert files == []


def test_a_lane_that_is_not_the_same_again_is_a_bug(tmp_path: Path) -> None:
    result = simulate(scenario(), POLICIES["eager_pin"], name="eager_pin", replicates=range(1), threads=1)
    result.truth["written"] += 1
    with pytest.raises(AssertionError, match="not the same again"):
        write_lanes(
            ChosenLanes((("", 0),), timeline=True),
            "eager_pin",
            POLICIES,
            {"eager_pin": result},
            tmp_path,
            lambda _: None,
        )


def test_a_run_writes_timelines(tmp_path: Path) -> None:
    report = execute(plan(tmp_path, lanes=ChosenLanes((("", 0), ("bare_metal", 1)), timeline=True)), lambda _: None)
    for lane in (("eager_pin", 0), ("bare_metal", 1)):
        assert report.files[timeline_name(*lane)].stat().st_size > 1000
    assert not [name for name in report.files if name.endswith(".perf.data")]


def test_perf_data_of_a_guest_without_perf_is_refused() -> None:
    what = scenario()
    freebsd = replace(what, guest=replace(what.guest, driver=GuestDriver.FREEBSD))
    check_guest(ChosenLanes((("", 0),), timeline=True), freebsd)
    check_guest(ChosenLanes((("", 0),), perf_data=True), what)
    with pytest.raises(ConfigurationError, match=r"guest\.driver=freebsd.*Linux's perf"):
        check_guest(ChosenLanes((("", 0),), perf_data=True), freebsd)
