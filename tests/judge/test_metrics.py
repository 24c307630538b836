"""spepolicy.judge.metrics: every metric is documented, and the numbers are those of results made by hand."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from spepolicy.hookspecs import Cause
from spepolicy.judge import attribution
from spepolicy.judge.metrics import METRICS, measure
from spepolicy.judge.tables import Categories, lane_table, window_table
from spepolicy.machine.state import LostCause

from .hand_made_results import MS, empty_result, eventful_result, profiled, with_windows

UNIT_SUFFIXES = {
    "%": "_pct",
    "us": "_us",
    "ms": "_ms",
    "1/s": "_per_s",
    "ms/s": "_ms_per_s",
    "MiB": "_MiB",
    "page s": "_page_s",
    "percentage points": "_pp",
    "pages": "_pages",
    "samples": "_samples",
    "records": "_records",
    "sessions": "_sessions",
}


@pytest.mark.parametrize("metric", METRICS.values(), ids=METRICS)
def test_each_metric_has_a_definition_and_carries_its_unit(metric) -> None:  # type: ignore[no-untyped-def]
    assert len(metric.doc.split()) >= 4
    assert metric.doc.endswith(".")
    assert re.fullmatch(r"[a-z0-9_]+(_MiB)?", metric.name)
    if metric.unit:
        assert metric.name.endswith(UNIT_SUFFIXES[metric.unit])


def test_every_lane_of_every_metric_is_a_number_or_not_defined() -> None:
    result = eventful_result()
    measured = measure(result, eventful_result("bare_metal", blackout_ms=0))
    assert set(measured.lanes) == set(METRICS)
    assert all(lanes.shape == (4,) and lanes.dtype == np.float64 for lanes in measured.lanes.values())
    assert set(measured.ci95) <= set(measured.values) <= set(METRICS)
    assert all(math.isfinite(value) for value in (*measured.values.values(), *measured.ci95.values()))


def test_nothing_happened_means_not_defined_rather_than_zero() -> None:
    values = measure(empty_result(), None).values
    for name in ("blackout_pct", "excess_blackout_pct", "longest_blackout_us", "fidelity_tv"):
        assert name not in values
    assert values["kept_records"] == 0.0


def test_blackout_metrics_by_hand() -> None:
    result = eventful_result(replicates=(0,), blackout_ms=100)
    values = measure(result, None).values
    wanted_s = 0.901
    assert values["blackout_pct"] == pytest.approx(100 * 0.101 / wanted_s)
    assert values["blackout_stage2_host_ms_per_s"] == pytest.approx(100 / wanted_s)
    assert values["blackout_stage2_not_pinned_ms_per_s"] == pytest.approx(1 / wanted_s)
    causes = [value for name, value in values.items() if re.fullmatch(r"blackout_.*_ms_per_s", name)]
    assert len(causes) == len(LostCause)
    assert sum(causes) == pytest.approx(10 * values["blackout_pct"])
    assert values["windows_per_s"] == pytest.approx(2 / wanted_s)
    assert values["longest_blackout_us"] == 100_000.0
    assert values["median_blackout_us"] == pytest.approx(50_500.0)
    assert values["stage2_faults_per_s"] == pytest.approx(2 / wanted_s)


def test_record_shares_add_up_to_what_was_not_kept() -> None:
    result = eventful_result(replicates=(0,))
    result.truth["selected"] += 100
    result.truth["discarded"] = 100
    values = measure(result, None).values
    missed = 101 * MS / 100 / 1000
    assert values["missed_samples"] == pytest.approx(missed)
    due = 500 + 100 + 2 + missed
    assert values["missed_samples_pct"] == pytest.approx(100 * missed / due)
    assert values["lost_samples_pct"] == pytest.approx(100 * 2 / due)
    assert values["discarded_samples_pct"] == pytest.approx(100 * 100 / due)
    parts = ("missed_samples_pct", "lost_samples_pct", "discarded_samples_pct")
    assert sum(values[name] for name in parts) == pytest.approx(values["unseen_samples_pct"])


def test_diverged_samples_are_kept_and_told_apart() -> None:
    """kvm.md H8: the guest reads them through the same stage 2; the VMM and whoever reads through it do not."""
    result = eventful_result(replicates=(0,))
    result.truth["diverged_records"] = 50
    values = measure(result, None).values
    due = 500 + 2 + values["missed_samples"]
    assert values["diverged_samples_pct"] == pytest.approx(100 * 50 / due)
    assert values["unseen_samples_pct"] == measure(eventful_result(replicates=(0,)), None).values["unseen_samples_pct"]


def test_missed_samples_that_a_filter_would_reject_are_not_missed_records() -> None:
    result = empty_result()
    profiled(result, 0, 0, (MS, 0), (25, 0, 0))
    result.truth["selected"] += 75
    result.truth["filtered"] += 75
    result = with_windows(result, [(0, 0, 0, 100 * 1000 * 100, LostCause.BUFFER_FULL)])  # 100 samples
    values = measure(result, None).values
    assert values["missed_samples"] == pytest.approx(100)
    assert values["missed_samples_pct"] == pytest.approx(50.0)
    assert values["filtered_pct"] == 75.0


def test_stolen_time_is_of_the_vcpus_host_time() -> None:
    result = empty_result(vcpus=2)
    result.vcpu["host_ps"] = 1000 * MS
    for part, field in enumerate(("trap_total_ps", "hook_total_ps", "event_total_ps", "switch_total_ps"), 1):
        result.truth[field][0, 0] = part * 10 * MS
    values = measure(result, None).values
    parts = [values[f"stolen_{name}_pct"] for name in ("traps", "policy", "events", "switch")]
    assert parts == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values["stolen_pct"] == pytest.approx(sum(parts))


def test_pinned_memory() -> None:
    result = empty_result()
    result.vm["pinned_peak_pages"] = 512
    result.vm["charged_peak_pages"] = 768
    result.vm["own_pages"] = 16
    result.vm["pinned_page_ps"] = 256 * (1000 * MS // 1000)  # 256 pages for a second, in page x 1000 ps
    values = measure(result, None).values
    assert values["pinned_peak_MiB"] == 2.0
    assert values["pinned_mean_MiB"] == pytest.approx(1.0)
    assert values["pinned_page_s"] == pytest.approx(256.0)
    assert values["memlock_peak_MiB"] == 3.0
    assert values["memlock_peak_pct"] == 37.5  # of 2048 pages
    assert values["own_buffers_MiB"] == 1 / 16


def test_the_interval_of_the_excess_is_that_of_paired_differences() -> None:
    mine, base = eventful_result(blackout_ms=100), eventful_result("bare_metal", blackout_ms=50)
    measured = measure(mine, base)
    difference = measure(mine, None).lanes["blackout_pct"] - measure(base, None).lanes["blackout_pct"]
    np.testing.assert_allclose(measured.lanes["excess_blackout_pct"], difference)
    # Lanes differ much more among themselves than their differences do.
    assert measured.ci95["excess_blackout_pct"] < 0.2 * measured.ci95["blackout_pct"]


def test_attribution_by_hand() -> None:
    result = empty_result(replicates=(0, 1))
    result.claims[0, Cause.HOST, Cause.HOST] = 6
    result.claims[0, Cause.HOST, Cause.NOT_PINNED] = 3
    result.claims[0, Cause.UNKNOWN, Cause.HOST] = 2
    result.claims[0, Cause.UNKNOWN, Cause.GUEST] = 1
    assert attribution.accuracy(result)[0] == 6 / 12
    assert attribution.claimed_share(result)[0] == 9 / 12
    assert attribution.recall(result, Cause.HOST)[0] == 6 / 8
    assert attribution.recall(result, Cause.NOT_PINNED)[0] == 0.0
    assert np.isnan(attribution.accuracy(result)[1])
    assert np.isnan(attribution.recall(result, Cause.MIGRATION)).all()


def test_claiming_unknown_is_never_right() -> None:
    result = empty_result()
    result.claims[0, Cause.UNKNOWN, Cause.UNKNOWN] = 5
    assert attribution.accuracy(result).tolist() == [0.0]


def test_lane_table_has_a_row_a_lane_and_sums_over_vcpus() -> None:
    result = empty_result(replicates=(4, 9), vcpus=3)
    for vcpu in range(3):
        profiled(result, 1, vcpu, (MS, 0), (1, 2, 0))
    result.truth["digest"][0] = [1, 2, 4]
    table = lane_table(result, measure(result, None))
    assert {len(column) for column in table.values()} == {2}
    assert np.asarray(table["replicate"]).tolist() == [4, 9]
    assert np.asarray(table["kept"]).tolist() == [0, 9]
    assert np.asarray(table["wanted_ps"]).tolist() == [0, 3 * MS]
    assert np.asarray(table["digest"]).tolist() == [7, 0]
    assert set(METRICS) <= set(table)


def test_window_table_joins_policies() -> None:
    mine, base = eventful_result("mine", (5, 6)), eventful_result("base", (5, 6), blackout_ms=1)
    table = window_table({"mine": mine, "base": base})
    policy, cause = table["policy"], table["cause"]
    assert isinstance(policy, Categories)
    assert isinstance(cause, Categories)
    assert [policy.names[code] for code in policy.codes] == ["mine"] * 4 + ["base"] * 4
    assert [cause.names[code] for code in cause.codes] == ["stage2_host", "stage2_not_pinned"] * 4
    assert np.asarray(table["replicate"]).tolist() == [5, 5, 6, 6] * 2
    assert np.asarray(table["length_us"])[0] == 100_000.0
    np.testing.assert_allclose(table["missed_samples"], np.asarray(table["missed_ops"]) / 1000)
    assert {len(column) for column in window_table({}).values()} == {0}
