"""The figure of a run: blackout by cause over guest time, the chosen policy beside its baselines."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from spepolicy.judge.blackout import CAUSES, BlackoutSeries

__all__ = ["CAUSE_COLOURS", "draw_blackout"]

# Okabe and Ito's palette, which the common forms of colour blindness can tell apart, then three of Tol's; one colour a
# cause, in every figure.
CAUSE_COLOURS: dict[str, str] = dict(
    zip(
        CAUSES,
        (
            *("#56B4E9", "#F0E442", "#D55E00", "#CC79A7", "#0072B2", "#000000", "#009E73", "#E69F00"),
            *("#882255", "#999999", "#DDCC77", "#44AA99"),
        ),
        strict=True,
    )
)


def draw_blackout(path: Path, series: Mapping[str, BlackoutSeries], title: str) -> None:
    """Draw one panel a policy of *series*, the first on top, all with the same axes, and save it to *path* as PNG.

    pyplot is not used: it costs a third of a second at import and holds global state.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    logging.getLogger("matplotlib.font_manager").setLevel(
        logging.WARNING
    )  # its first run on a computer says that it is
    height_in = 1.5 + 2.0 * len(series)
    figure = Figure(figsize=(10, height_in))
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(series), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    top = max([float(s.ms_per_s.sum(axis=1).max(initial=0.0)) for s in series.values()], default=0.0)
    shown: set[str] = set()
    for axes, (policy, s) in zip(panels, series.items(), strict=True):
        base = np.zeros(len(s.edges_s) - 1)
        for cause, name in enumerate(CAUSES):
            if s.ms_per_s[:, cause].any():
                above = base + s.ms_per_s[:, cause]
                axes.stairs(above, s.edges_s, baseline=base, fill=True, color=CAUSE_COLOURS[name], linewidth=0)
                base = above
                shown.add(name)
        axes.set_title(f"{policy}: mean {s.ms_per_s.sum(axis=1).mean():.3g} ms/s", loc="left", fontsize=10)
        axes.set_xlim(0, float(s.edges_s[-1]))
        axes.set_ylim(0, 1.08 * top or 1.0)
        axes.grid(axis="y", linewidth=0.4, color="#BBBBBB")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("guest time, s")
    figure.supylabel("blackout, ms per second of guest time and vCPU", fontsize=10)
    figure.suptitle(title, x=0.02, ha="left", fontsize=11)
    handles = [Patch(color=CAUSE_COLOURS[name], label=name.replace("_", " ")) for name in CAUSES if name in shown]
    if handles:
        figure.legend(handles=handles, loc="lower center", ncols=min(4, len(handles)), frameon=False, fontsize=9)
    below_in = 0.95 if len(handles) > 4 else 0.77
    figure.subplots_adjust(left=0.08, right=0.98, top=1 - 0.85 / height_in, bottom=below_in / height_in, hspace=0.35)
    figure.savefig(path, dpi=110, format="png", metadata={"Software": None})
