"""The SPU's PMU events appear as metrics, and agree with each other on a whole lane."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from spepolicy.drivers.simulate import simulate
from spepolicy.judge.metrics import measure
from spepolicy.machine.scenario import Cpu

from ..properties.scenarios import guest, policy, scenario


@pytest.mark.parametrize("discard", [False, True])
def test_pmu_events_of_a_lane_add_up(discard: bool) -> None:
    drawn = scenario(cpu=Cpu(spe_version=3), guest=replace(guest(vcpus=1, min_latency_cycles=20), discard=discard))
    result = simulate(drawn, policy("map_on_fault"), name="map_on_fault", replicates=range(3), threads=1)
    truth = {name: result.truth[name].sum() for name in result.truth.dtype.names}
    feed = truth["selected"] - truth["collided"]
    assert feed >= truth["survived"] > 0
    assert truth["survived"] + truth["filtered"] <= feed
    # one selection in an interval, but for what a stop cut short
    interval = drawn.guest.period_ops + 128
    assert abs(truth["population"] / interval / truth["selected"] - 1) < 0.25
    if discard:
        assert truth["written"] == truth["kept"] == truth["stage2_faults"] == 0
    values = measure(result, None).values
    seconds = result.truth["wanted_ps"].sum(axis=1) / 1e12
    for name, count in (("pop", "population"), ("filtrate", "survived"), ("collision", "collided")):
        expected = float(np.mean(result.truth[count].sum(axis=1) / seconds))
        assert values[f"sample_{name}_per_s"] == pytest.approx(expected)
    by_lane = (result.truth["selected"] - result.truth["collided"]).sum(axis=1) / seconds
    assert values["sample_feed_per_s"] == pytest.approx(float(np.mean(by_lane)))
