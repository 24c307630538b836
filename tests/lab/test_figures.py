"""spepolicy.lab.figures: a PNG whose ink is where the blackout is."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from spepolicy.judge.blackout import CAUSES, BlackoutSeries, blackout_series
from spepolicy.lab.figures import CAUSE_COLOURS, draw_blackout
from spepolicy.machine.state import LostCause

from ..judge.hand_made_results import SECOND, empty_result, with_windows


def pixels(path: Path, colour: str) -> np.ndarray:
    """Return the columns (0..1 of the width) of the pixels that have *colour*."""
    from matplotlib.image import imread

    image = np.round(imread(path)[:, :, :3] * 255).astype(int)
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return np.flatnonzero((image == wanted).all(axis=2).any(axis=0)) / image.shape[1]


def test_each_cause_has_a_colour_of_its_own() -> None:
    assert tuple(CAUSE_COLOURS) == CAUSES
    assert len(set(CAUSE_COLOURS.values())) == len(CAUSES)


def test_blackout_is_drawn_when_it_happens_in_its_causes_colour(tmp_path: Path) -> None:
    late = with_windows(empty_result(), [(0, 0, SECOND // 2, SECOND // 2, LostCause.STAGE2_HOST)])
    draw_blackout(tmp_path / "f.png", {"late": blackout_series(late)}, "title")
    columns = pixels(tmp_path / "f.png", CAUSE_COLOURS["stage2_host"])
    # The axes reach from 0.08 to 0.98 of the width; the legend's patch is in the middle.
    area = columns[columns > 0.6]
    assert area.max() == pytest.approx(0.98, abs=0.005)
    assert len(pixels(tmp_path / "f.png", CAUSE_COLOURS["ring_full"])) == 0
    assert columns.min() > 0.4


def test_no_blackout_and_many_policies_can_be_drawn(tmp_path: Path) -> None:
    nothing = BlackoutSeries(np.linspace(0, 1, 11), np.zeros((10, len(CAUSES))))
    everything = BlackoutSeries(np.linspace(0, 1, 11), np.full((10, len(CAUSES)), 100.0))
    draw_blackout(tmp_path / "none.png", {"a": nothing}, "title")
    draw_blackout(tmp_path / "all.png", {"a": nothing, "b": everything, "c": everything}, "title")
    for colour in CAUSE_COLOURS.values():
        assert len(pixels(tmp_path / "all.png", colour)) > 0
    assert (tmp_path / "none.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_series_gives_the_same_bytes(tmp_path: Path) -> None:
    series = {"a": BlackoutSeries(np.linspace(0, 1, 11), np.full((10, len(CAUSES)), 1.0))}
    draw_blackout(tmp_path / "1.png", series, "title")
    draw_blackout(tmp_path / "2.png", series, "title")
    assert (tmp_path / "1.png").read_bytes() == (tmp_path / "2.png").read_bytes()
