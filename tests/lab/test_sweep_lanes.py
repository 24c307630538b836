"""output.perf_data and output.timeline of a sweep: which lanes, where their files are, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas
import pytest

from spepolicy.lab.sweep import lane_files
from spepolicy.perfdata import read
from spepolicy.perfdata.program import KERNEL_FILE, PROGRAM_FILE

from .sweeps import SMALL, Run, folder_of
from .test_sweep_tracking import read_back

LANES = ("output.perf_data=true", "output.timeline=true", "output.lanes=[1,bare_metal:0]")
SWEEP = ("-m", "+policy=eager_pin", "guest.buffer=64KiB,128KiB", "seed=3,4", *SMALL, *LANES)
TRACKED = tuple(argument for argument in SWEEP if argument != "tracking=none")
FILES = {PROGRAM_FILE, KERNEL_FILE}


def of(folder: Path) -> dict[str, set[str]]:
    """The names of files by the configuration, whose folder has its label and a part of its hash."""
    return {each.name.rpartition("-")[0]: {file.name for file in each.iterdir()} for each in folder.iterdir()}


def test_each_configuration_has_the_files_of_its_lanes_and_so_has_its_run(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*TRACKED)
    assert (status, err) == (0, "")
    assert out.count("running its lane again") == 4
    folder = folder_of(out) / "lanes"
    files = of(folder)
    eager, bare = ({*FILES, f"{lane}.perf.data", f"{lane}.pftrace"} for lane in ("eager_pin-1", "bare_metal-0"))
    sizes = ("64KiB", "128KiB")
    assert files == {f"eager_pin_buffer={size}": eager for size in sizes} | {
        f"bare_metal_buffer={size}": bare for size in sizes
    }
    rows = pandas.read_parquet("outputs/store").query("policy == 'eager_pin' and seed == 3 and replicate == 1")
    captures = [read(path) for path in folder.rglob("eager_pin-1.perf.data")]
    assert sorted(len(capture.records) for capture in captures) == sorted(rows["written"].tolist())
    assert all(capture.complete for capture in captures)
    for each in read_back(tmp_path):
        if each["tags"]["kind"] == "configuration":
            artifacts = {Path(name).name for name in each["files"]}
            assert (eager if each["tags"]["policy"] == "eager_pin" else bare) <= artifacts


def test_lanes_that_were_in_the_store_have_files_too(run: Run) -> None:
    without = [argument for argument in SWEEP if argument not in LANES]
    assert run(*without)[0] == 0
    status, out, err = run(*SWEEP, "sweep.resume=true", "output.lanes=[0]", "output.perf_data=false")
    assert (status, err) == (0, "")
    assert {"eager_pin_buffer=64KiB": {"eager_pin-0.pftrace"}}.items() <= of(folder_of(out) / "lanes").items()


def test_a_row_that_the_lane_does_not_give_again_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = lane_files.judged

    def one_more(result: object) -> dict[str, object]:
        columns = judged(result)  # type: ignore[arg-type]
        return {n: c + 1 if np.issubdtype(c.dtype, np.integer) else c for n, c in columns.items()}

    monkeypatch.setattr(lane_files, "judged", one_more)
    with pytest.raises(AssertionError, match=r"replicate 0 of eager_pin.* was not the same again in .*guest_ps"):
        run("-m", "+policy=eager_pin", "guest.buffer=64KiB,128KiB", *SMALL, "output.timeline=true")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("output.lanes=[2]",), "output.lanes=[2]"),
        (("output.lanes=[eagre_pin:0]",), "Did you mean 'eager_pin'"),
        (("output.lanes=[0]", "guest.driver=freebsd"), "guest.driver=freebsd"),
    ],
)
def test_lanes_that_cannot_be_had(run: Run, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run("-m", "+policy=eager_pin", "seed=1,2", *SMALL, "output.perf_data=true", *arguments)
    assert status == 2
    assert message in out + err
