"""The picture of README.md: a sweep in MLflow's interface. `python -m tests.docs.picture` takes it again.

It needs Chromium and playwright, as `tests/lab/test_sweep_ui.py` does.
"""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tests.lab.test_sweep_ui import CHROMIUM, free_port, link_of, started

from .pages import ROOT, run

if TYPE_CHECKING:
    from playwright.sync_api import FloatRect, ViewportSize

PICTURE = ROOT / "experiments" / "worked_examples" / "mlflow.png"
SWEEP = "python -m spepolicy -m +policy=eager_pin,pin_on_fault,map_on_fault guest.buffer=1MiB,4MiB replicates=4"
SIZE: ViewportSize = {"width": 1900, "height": 800}
RUNS: FloatRect = {"x": 198, "y": 0, "width": 1210, "height": 770}  # between MLflow's menu and its assistant


def take(picture: Path) -> None:
    """Run the sweep, open the link that it prints in a browser, and save what is seen there as *picture*."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        status, output = run(f"{SWEEP} duration=100ms", folder)
        assert status == 0, output
        port = free_port()
        server = [sys.executable, *shlex.split(f"-m mlflow ui --port {port} --workers 1")]
        with started(server, folder, f"http://127.0.0.1:{port}"), sync_playwright() as player:
            browser = player.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport=SIZE)
            page.set_default_timeout(180_000)
            page.goto(link_of(output).replace(":5000/", f":{port}/"))
            page.get_by_text("10 matching runs").wait_for()
            page.get_by_text("blackout_by_cause/buffer_full_ms_per_s").first.wait_for()
            page.wait_for_timeout(3000)  # charts are drawn some time after their headings
            page.screenshot(path=picture, clip=RUNS)
            browser.close()


if __name__ == "__main__":
    take(PICTURE)
