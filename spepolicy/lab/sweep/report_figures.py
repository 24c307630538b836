"""The figures of a sweep's report, as SVG text."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from spepolicy.judge.blackout import CAUSES
from spepolicy.lab.figures import CAUSE_COLOURS
from spepolicy.lab.sweep.collect import Outcome
from spepolicy.lab.sweep.comparison import scenarios

__all__ = ["FIGURES", "Figure"]

MOST_BARS = 40
MOST_LINES = 8
# Okabe and Ito's palette: one colour a policy.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")


@dataclass(frozen=True)
class Figure:
    """A figure with its heading and what it shows."""

    title: str
    text: str
    svg: str


def _canvas(width_in: float, height_in: float) -> Any:
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas

    figure = Canvas(figsize=(width_in, height_in), layout="constrained")
    FigureCanvasSVG(figure)
    return figure


def _svg(figure: Any) -> str:
    """Return the figure as an <svg> element, the same for the same figure."""
    from matplotlib import rc_context

    out = io.StringIO()
    with rc_context({"svg.hashsalt": "spepolicy", "svg.fonttype": "none"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(linewidth=0.4, color="#CCCCCC")
    axes.set_axisbelow(True)


def _colour_of(outcomes: Sequence[Outcome]) -> dict[str, str]:
    names = dict.fromkeys(outcome.configuration.policy.name for outcome in outcomes)
    return {name: _COLOURS[n % len(_COLOURS)] for n, name in enumerate(names)}


def by_cause(outcomes: Sequence[Outcome]) -> Figure | None:
    """Blackout of each configuration, by cause."""
    shown = [o for o in outcomes if o.values.get("blackout_pct", 0.0) > 0][:MOST_BARS]
    if not shown:
        return None
    figure = _canvas(10, 1.2 + 0.3 * len(shown))
    axes = figure.subplots()
    left = np.zeros(len(shown))
    for cause in CAUSES:
        width = np.array([o.values.get(f"blackout_{cause}_ms_per_s", 0.0) for o in shown])
        if width.any():
            axes.barh(range(len(shown)), width, left=left, color=CAUSE_COLOURS[cause], label=cause.replace("_", " "))
            left += width
    axes.set_yticks(range(len(shown)), [outcome.label() for outcome in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("blackout, ms per wanted second")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return Figure("Blackout by cause", "Configurations without any blackout are left out.", _svg(figure))


def trade(outcomes: Sequence[Outcome]) -> Figure | None:
    """Excess blackout against stolen time; the area of a dot is pinned memory."""
    shown = [o for o in outcomes if {"excess_blackout_pct", "stolen_pct", "pinned_peak_MiB"} <= set(o.values)]
    if len(shown) < 2:
        return None
    colours = _colour_of(shown)
    figure = _canvas(8, 5)
    axes = figure.subplots()
    top = max(o.values["pinned_peak_MiB"] for o in shown) or 1.0
    for name, colour in colours.items():
        mine = [o for o in shown if o.configuration.policy.name == name]
        x, y, size = (
            [o.values[metric] for o in mine] for metric in ("stolen_pct", "excess_blackout_pct", "pinned_peak_MiB")
        )
        area = [40 + 400 * value / top for value in size]
        axes.scatter(x, y, area, color=colour, alpha=0.6, linewidth=0)
        axes.scatter([], [], 40, color=colour, alpha=0.6, linewidth=0, label=name)
    axes.set_xlabel("stolen vCPU time, %")
    axes.set_ylabel("excess blackout, %")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return Figure(
        "What it costs, and what it loses",
        f"A dot a configuration; its area is pinned memory, the largest {top:.3g} MiB. Down and left is better.",
        _svg(figure),
    )


def heat_map(outcomes: Sequence[Outcome]) -> Figure | None:
    """Share of samples that a profile lacks: policies by what else varies."""
    groups = scenarios(outcomes)
    policies = list(dict.fromkeys(_row(outcome) for outcome in outcomes))
    if len(groups) < 2 or len(policies) < 2 or len(groups) > MOST_BARS:
        return None
    values = np.full((len(policies), len(groups)), np.nan)
    for column, group in enumerate(groups.values()):
        for outcome in group:
            values[policies.index(_row(outcome)), column] = outcome.values.get("unseen_samples_pct", np.nan)
    figure = _canvas(2.5 + 0.9 * len(groups), 1.8 + 0.35 * len(policies))
    axes = figure.subplots()
    drawn = axes.imshow(np.log10(np.maximum(values, 1e-4)), cmap="cividis", aspect="auto")
    axes.set_xticks(range(len(groups)), list(groups), rotation=30, ha="right", fontsize=8)
    axes.set_yticks(range(len(policies)), policies, fontsize=8)
    middle = np.nanmean(drawn.get_clim())
    for row, column in np.argwhere(~np.isnan(values)):
        dark = np.log10(max(values[row, column], 1e-4)) < middle
        text = f"{values[row, column]:.2g}"
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")
    return Figure(
        "Policies by what else varies",
        "Samples that a profile lacks because of blackout, loss and discard, in %; colour is logarithmic.",
        _svg(figure),
    )


def _row(outcome: Outcome) -> str:
    params = outcome.configuration.params.items()
    fields = [f"{key.rpartition('.')[2]}={value}" for key, value in params if key.startswith("policy.")]
    return " ".join([outcome.configuration.policy.name, *fields])


def over_time(outcomes: Sequence[Outcome]) -> Figure | None:
    """Blackout over guest time, mean over lanes."""
    shown = sorted((o for o in outcomes if o.series.any()), key=lambda o: -float(o.series.mean()))[:MOST_LINES]
    if not shown:
        return None
    figure = _canvas(10, 1.2 + 1.3 * len(shown))
    panels = figure.subplots(len(shown), 1, sharex=True, squeeze=False)[:, 0]
    for axes, outcome in zip(panels, shown, strict=True):
        seconds = outcome.configuration.scenario.duration_ps / 1e12
        edges = np.linspace(0, seconds, len(outcome.series) + 1)
        axes.stairs(outcome.series, edges, fill=True, color="#0072B2", linewidth=0)
        axes.set_title(outcome.label(), loc="left", fontsize=9)
        axes.set_xlim(0, seconds)
        axes.set_ylim(0, 1.08 * float(outcome.series.max()))
        _plain(axes)
    panels[-1].set_xlabel("guest time, s")
    figure.supylabel("blackout, ms/s", fontsize=9)
    return Figure(
        "Blackout over time", f"The {len(shown)} configurations with most blackout, mean over lanes.", _svg(figure)
    )


def profile(outcomes: Sequence[Outcome]) -> Figure | None:
    """The true profile beside what the guest's perf shows, in one lane run again."""
    shown = [o for o in outcomes if o.values.get("unseen_samples_pct", 0.0) > 0]
    if not shown:
        return None
    worst = max(shown, key=lambda o: o.values["unseen_samples_pct"])
    names, true, seen = _profile_of(worst)
    order = np.argsort(-true)[:12]
    figure = _canvas(9, 1.2 + 0.35 * len(order))
    axes = figure.subplots()
    place = np.arange(len(order))
    axes.barh(place - 0.2, 100 * true[order], 0.4, color="#0072B2", label="true")
    axes.barh(place + 0.2, 100 * seen[order], 0.4, color="#E69F00", label="seen")
    axes.set_yticks(place, [names[n] for n in order], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("share of samples, %")
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)
    return Figure(
        "The profile, true and as seen",
        f"{worst.label()}, seed {worst.seed[0]}, replicate {worst.replicate[0]}: the configuration that lacks most "
        "samples, one lane of it run again.",
        _svg(figure),
    )


def _profile_of(outcome: Outcome) -> tuple[tuple[str, ...], Any, Any]:
    """Run the first lane of *outcome* again; return function names and their shares, true and seen."""
    from spepolicy.drivers.simulate import simulate
    from spepolicy.judge.fidelity import seen_profile, true_profile

    scenario = replace(outcome.configuration.scenario, seed=int(outcome.seed[0]))
    policy = outcome.configuration.policy
    result = simulate(scenario, policy.build(), name=policy.name, replicates=[int(outcome.replicate[0])], threads=1)
    true, seen = true_profile(result)[0], seen_profile(result)[0]
    return scenario.workload.function_names, true / max(true.sum(), 1e-300), seen / max(seen.sum(), 1.0)


FIGURES: tuple[Callable[[Sequence[Outcome]], Figure | None], ...] = (by_cause, trade, heat_map, over_time, profile)
"""What the report shows, in this order. One that has nothing to show returns None."""
