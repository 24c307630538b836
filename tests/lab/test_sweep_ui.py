"""A sweep in MLflow's interface as a user sees it: in a browser, on the embedded store and on PostgreSQL."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from .sweeps import TRACKED, Run, folder_of

pytestmark = pytest.mark.slow
CHROMIUM = shutil.which("chromium")
QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], folder: Path, address: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a server in *folder* until it answers at *address*; end it, and what it started, afterwards."""
    with (folder / "server.out").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=folder, stdout=log, stderr=log, env=os.environ | QUIET, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 180
            while process.poll() is None and time.monotonic() < deadline:
                try:
                    with urllib.request.urlopen(f"{address}/health", timeout=2):
                        break
                except OSError:
                    time.sleep(0.3)
            assert process.poll() is None, (folder / "server.out").read_text()[-2000:]
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=60)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of Debian's Chromium."""
    if CHROMIUM is None:
        pytest.skip("needs the browser chromium")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as player:
        browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        opened = browser.new_page(viewport={"width": 1600, "height": 1000})
        opened.set_default_timeout(90_000)
        yield opened
        browser.close()


def link_of(out: str) -> str:
    return next(line.strip() for line in out.splitlines() if "/#/experiments/" in line)


def look_around(page: Any, link: str, sweep: str) -> None:
    """Open the link; see the charts; filter; choose two runs and compare them; open the report of the sweep."""
    base, experiment = re.match(r"(http://[^/]+)/#/experiments/(\d+)/", link).groups()  # type: ignore[union-attr]
    page.goto(link)
    page.get_by_text("6 matching runs").wait_for()  # four configurations and two baselines, not the summary
    page.get_by_text("blackout_by_cause/buffer_full_ms_per_s").first.wait_for()  # a chart, with all of them in it
    for name in ("eager_pin buffer=64KiB", "pin_on_fault buffer=128KiB", "bare_metal buffer=64KiB"):
        assert page.get_by_text(name).count() > 1, "in the list, and in charts"

    page.goto(link.replace("compareRunsMode=CHART", "compareRunsMode=TABLE"))
    page.get_by_text("6 matching runs").wait_for()
    search = page.get_by_placeholder("metrics.rmse < 1")
    search.fill(f"tags.sweep = '{sweep}' and params.policy = 'eager_pin' and metrics.stolen_pct > 0")
    search.press("Enter")
    page.get_by_text("2 matching runs").wait_for()
    for _ in range(2):
        page.get_by_label("Press Space to toggle row selection (unchecked)").first.click()
    page.get_by_role("button", name="Compare", exact=True).first.click()
    page.get_by_text("Comparing 2 Runs from 1 Experiment").wait_for()
    shown = page.inner_text("body")
    assert re.search(r"guest.buffer\t(128KiB\t64KiB|64KiB\t128KiB)", shown), "the parameter that differs"
    for part in ("policy\teager_pin\teager_pin", "excess_blackout_pct", "ci95/stolen_pct", "blackout_pct"):
        assert part in shown, part

    page.goto(f"{base}/#/experiments/{experiment}/runs?searchFilter=tags.kind%20%3D%20'summary'")
    page.get_by_role("link", name=re.compile("summary of")).first.click()
    page.get_by_text("lanes_computed").wait_for()
    assert "4 configurations, 24 lanes" in page.inner_text("body"), "the note"
    page.get_by_role("tab", name="Artifacts").click()
    page.get_by_text("report.html").first.click()
    deadline = time.monotonic() + 60
    text = ""
    while "In words" not in text and time.monotonic() < deadline:
        page.wait_for_timeout(500)
        text = "".join(frame.inner_text("body") for frame in page.frames[1:])
    assert f"Sweep {sweep}" in text
    assert "eager_pin" in text


def test_the_embedded_store_in_a_browser(run: Run, tmp_path: Path, page: Any) -> None:
    status, out, _ = run(*TRACKED)
    assert status == 0
    port = free_port()
    command = [sys.executable, "-m", "mlflow", "ui", "--port", str(port), "--workers", "1"]
    with started(command, tmp_path, f"http://127.0.0.1:{port}"):
        look_around(page, link_of(out).replace(":5000/", f":{port}/"), "/".join(folder_of(out).parts[-2:]))


def test_a_server_on_postgresql_in_a_browser(run: Run, tmp_path: Path, page: Any) -> None:
    """The script that ships starts it; a sweep writes to it; started again, it still has all of it."""
    pytest.importorskip("psycopg2")
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and shutil.which("initdb") is None:
        pytest.skip("needs PostgreSQL's programs")
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:
        if parent.owner() == tmp_path.owner() and parent.name.startswith(("pytest", "popen")):
            parent.chmod(0o755)  # PostgreSQL runs as another user if this is root
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "spepolicy.lab.tracking_server", "kept", "--port", str(port)]
    with started(command, tmp_path, address) as server:
        status, out, err = run(*TRACKED, f"tracking.uri={address}")
        assert (status, err) == (0, "")
        assert link_of(out).startswith(f"{address}/#/experiments/")
        sweep = "/".join(folder_of(out).parts[-2:])
        look_around(page, link_of(out), sweep)
    assert server.returncode == 0
    assert (tmp_path / "server.out").read_text() == f"tracking.uri={address}\n"
    with started(command, tmp_path, address):
        page.goto(link_of(out))
        page.get_by_text("6 matching runs").wait_for()
