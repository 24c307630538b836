"""Paired differences, Pareto fronts, stopping, and which conclusions survive the ranges of the costs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spepolicy.errors import ConfigurationError
from spepolicy.judge.errata import Findings
from spepolicy.lab.sweep.collect import Outcome
from spepolicy.lab.sweep.identity import PolicyChoice
from spepolicy.lab.sweep.jobs import Configuration
from spepolicy.lab.sweep.sensitivity import cost_names
from spepolicy.lab.sweep.statistics import PARETO, differences, half_widths, pareto_front

from .sweeps import SMALL, Run, folder_of

METRIC = "stolen_pct"


def outcome(name: str, values: Any, *, scenario: str = "s", role: str = "chosen", **more: Any) -> Outcome:
    lanes = {METRIC: np.array(values, dtype=np.float64)} | {k: np.array(v, dtype=np.float64) for k, v in more.items()}
    configuration = Configuration(
        key=f"{scenario} {name}",
        scenario_key=scenario,
        policy=PolicyChoice(name, "{}"),
        scenario=None,  # type: ignore[arg-type]
        role=role,
        params={},
        config={},
    )
    count = len(lanes[METRIC])
    return Outcome(
        configuration=configuration,
        seed=np.ones(count, dtype=np.int64),
        replicate=np.arange(count),
        lanes=lanes,
        values={k: float(np.nanmean(v)) for k, v in lanes.items()},
        ci95={METRIC: 0.5},
        series=np.zeros(3),
        findings=Findings(name, 1, True, count, 1.0, 1.0),
        errata=[],
    )


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(-9, 9), st.floats(-9, 9)), min_size=2, max_size=20))
def test_a_difference_is_that_of_a_paired_t_test(pairs: list[tuple[float, float]]) -> None:
    one, other = np.array(pairs).T
    (found,) = differences([outcome("a", one), outcome("b", other)], [METRIC])
    assert found.lanes == len(pairs)
    assert found.mean == pytest.approx((one - other).mean(), abs=1e-12)
    if np.ptp(one - other) > 1e-6:
        tested = stats.ttest_rel(one, other)
        interval = tested.confidence_interval(0.95)
        assert (found.low, found.high) == pytest.approx((interval.low, interval.high), rel=1e-9, abs=1e-9)
        assert found.p == pytest.approx(tested.pvalue, rel=1e-6, abs=1e-12)
        assert found.sign() == int(interval.low > 0) - int(interval.high < 0)


def test_what_two_policies_share_drops_out() -> None:
    """Lanes that differ a hundred times more than the policies do: the difference is clear all the same."""
    shared = np.random.default_rng(1).normal(0, 100, 8)
    one, other = outcome("a", shared + 1 + np.arange(8) / 100), outcome("b", shared)
    (found,) = differences([one, other], [METRIC])
    assert found.mean == pytest.approx(1.035)
    assert found.high - found.low < 0.1
    assert found.sign() == 1
    assert half_widths([one, other], METRIC)["s a"] == pytest.approx((found.high - found.low) / 2)


def test_a_difference_without_spread_is_exact() -> None:
    (equal,) = differences([outcome("a", [1, 2]), outcome("b", [1, 2])], [METRIC])
    assert (equal.mean, equal.low, equal.high, equal.p, equal.sign()) == (0.0, 0.0, 0.0, 1.0, 0)
    (more,) = differences([outcome("a", [3, 4]), outcome("b", [1, 2])], [METRIC])
    assert (more.mean, more.low, more.high, more.p, more.sign()) == (2.0, 2.0, 2.0, 0.0, 1)


def test_a_spread_whose_square_is_below_the_floats_is_none() -> None:
    (found,) = differences([outcome("a", [0.0, 1e-208]), outcome("b", [1e-208, 0.0])], [METRIC])
    assert (found.mean, found.low, found.high, found.p, found.sign()) == (0.0, 0.0, 0.0, 1.0, 0)


def test_only_equal_lanes_are_compared() -> None:
    longer = outcome("a", [9.0, 1.0, 2.5, 3.0])
    shorter = outcome("b", [1.0, 2.0, np.nan])
    shorter = Outcome(**(vars(shorter) | {"replicate": np.array([1, 2, 3])}))
    (found,) = differences([longer, shorter], [METRIC])
    assert (found.lanes, found.mean) == (2, 0.25)
    assert not differences([outcome("a", [1, 2]), outcome("b", [1, 2], scenario="t")], [METRIC])
    assert not differences([outcome("a", [1]), outcome("b", [2])], [METRIC])
    baselines = [outcome(name, [1, 2], role="baseline") for name in ("x", "y")]
    assert not differences(baselines, [METRIC])
    assert len(differences([outcome("a", [1, 2]), *baselines], [METRIC])) == 2


def test_p_values_are_adjusted_for_the_number_of_comparisons() -> None:
    rng = np.random.default_rng(1)
    found = differences([outcome(f"p{n}", rng.normal(0, 1, 6)) for n in range(8)], [METRIC])
    assert len(found) == 28
    assert all(paired.p_adjusted >= paired.p for paired in found)
    assert min(paired.p for paired in found) < 0.05 < min(paired.p_adjusted for paired in found)


def test_nobody_on_the_front_is_beaten() -> None:
    costs = {"cheap": (9, 1, 1), "middle": (5, 5, 1), "same": (5, 5, 1), "beaten": (5, 6, 1), "dear": (1, 9, 9)}
    found = [outcome(n, [c[1]] * 2, **dict(zip(PARETO, ([v] * 2 for v in c), strict=True))) for n, c in costs.items()]
    assert pareto_front(found) == {"s cheap", "s middle", "s same", "s dear"}
    assert pareto_front([found[3], outcome("b", [0, 0], role="baseline")]) == {"s beaten"}
    lacking = outcome("lacking", [0, 0])
    assert pareto_front([lacking]) == set()


def test_without_a_second_policy_the_mean_itself_must_be_narrow() -> None:
    assert half_widths([outcome("a", [1, 2])], METRIC) == {"s a": 0.5}
    assert half_widths([outcome("a", [1, 2])], "none") == {"s a": math.inf}


def test_a_sweep_goes_on_until_intervals_are_narrow_enough(run: Run) -> None:
    words = ("-m", "+policy=eager_pin,pin_on_fault", *SMALL, "duration=3ms", "stop.metric=stolen_pct")
    status, out, err = run(*words, "stop.precision=2", "stop.maximum=64")
    assert (status, err) == (0, "")
    listed = pandas.read_csv(folder_of(out) / "differences.csv")
    row = listed[
        (listed["metric"] == "stolen_pct") & (listed["one"] == "eager_pin") & (listed["other"] == "pin_on_fault")
    ]
    half = (row["ci95_high"] - row["ci95_low"]).item() / 2
    assert half <= 2
    assert "intervals of stolen_pct wider than +- 2" in out
    lanes = row["lanes"].item()
    assert 2 < lanes <= 64
    table = pandas.read_parquet("outputs/store")
    assert table.groupby("policy", observed=True).size().to_dict() == dict.fromkeys(
        ["bare_metal", "eager_pin", "pin_on_fault"], lanes
    )
    # Never more than the maximum, however wide.
    status, out, _ = run(*words, "stop.precision=0", "stop.maximum=5", "sweep.store=other")
    assert status == 0
    assert pandas.read_parquet("other").groupby("policy", observed=True).size().tolist() == [5, 5, 5]


@pytest.mark.parametrize(
    ("word", "part"),
    [
        ("stop.metric=stolen", "Did you mean 'stolen_pct'?"),
        ("stop.precision=-1", "stop.precision=-1"),
        ("stop.maximum=0", "stop.maximum=0"),
        ("sweep.sensitivity=[trip]", "Did you mean 'trap'?"),
    ],
)
def test_wrong_settings_of_a_sweep(run: Run, word: str, part: str) -> None:
    status, out, err = run("-m", "+policy=eager_pin", *SMALL, word)
    assert (status, out) == (2, "")
    assert part in err


def test_cost_constants_by_name() -> None:
    assert cost_names([]) == []
    assert cost_names(["trap", "trap"]) == ["trap"]
    assert len(cost_names(["all"])) > 10
    with pytest.raises(ConfigurationError, match="not a cost constant"):
        cost_names(["trapp"])


@pytest.mark.slow
def test_where_a_conclusion_flips_it_does(run: Run, tmp_path: Path) -> None:
    """The places that the analysis names are checked by sweeps at just these values."""
    words = ("-m", "+policy=eager_pin,pin_on_fault,synthetic_fault", "host=recorded", "duration=5ms", "replicates=4")
    more = ("seed=2", "baselines=[]", "guest.renew=2ms", "tracking=none")
    status, out, err = run(*words, *more, "sweep.sensitivity=[pin_page,walk_read,trap]")
    assert (status, err) == (0, "")
    table = pandas.read_csv(folder_of(out) / "sensitivity.csv", keep_default_na=False)
    differs = pandas.read_csv(folder_of(out) / "differences.csv")
    assert set(table["cost"]) == {"pin_page", "walk_read", "trap"}
    assert table["survives"].nunique() == 2, "some conclusions survive, and some do not"
    words_of = {1: "more", -1: "less", 0: "no clear difference"}

    def sign(frame: pandas.DataFrame, row: Any) -> str:
        found = frame[(frame["one"].str.split().str[0] == row.one) & (frame["other"].str.split().str[0] == row.other)]
        found = found[found["metric"] == row.metric]
        return words_of[int(found["ci95_low"].item() > 0) - int(found["ci95_high"].item() < 0)]

    for row in table[["one", "other", "metric", "one_has"]].drop_duplicates().itertuples():
        assert sign(differs, row) == row.one_has
    for row in list(table[table["flips_above"] != ""].itertuples())[:2]:
        for value, same in zip(row.flips_above.split(" .. "), (True, False), strict=True):
            status, out, _ = run(*words, *more, f"costs.{row.cost}={value}")
            assert status == 0
            there = pandas.read_csv(folder_of(out) / "differences.csv")
            assert (sign(there, row) == row.one_has) is same, (row, value)
