"""The kit's checks, a test each, and what is special about this policy."""

from __future__ import annotations

from dataclasses import replace

import pytest
from spepolicy_window_pin.policy import WindowPin

from spepolicy.drivers.result import Result
from spepolicy.drivers.simulate import simulate
from spepolicy.plugins import build_policy, installed_policies, installed_reporters
from spepolicy.testing.scenes import SCENES
from spepolicy.testing.suite import PolicyChecks


class TestWindowPin(PolicyChecks):
    policy = WindowPin()


def test_it_is_installed() -> None:
    assert installed_policies()["window_pin"].distribution == "spepolicy-window-pin"
    assert "window_pin" in installed_reporters()
    assert build_policy("window_pin", {"window_pages": 4}) == WindowPin(4)


def run(pages: int) -> Result:
    quiet = SCENES["quiet"]
    scene = replace(quiet, guest=replace(quiet.guest, buffer_pages=64))
    return simulate(scene, WindowPin(pages), name="window_pin", replicates=range(4), threads=1)


@pytest.mark.parametrize("pages", [1, 4])
def test_a_smaller_window_pins_less_and_faults_more(pages: int) -> None:
    small, large = run(pages), run(4 * pages)
    assert (small.vm["pinned_peak_pages"] < large.vm["pinned_peak_pages"]).all()
    assert small.truth["stage2_faults"].sum() > large.truth["stage2_faults"].sum()
