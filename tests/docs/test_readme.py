"""What the pages show is what happens: commands, outputs, numbers, the example policy, tables, links."""

from __future__ import annotations

import re
import subprocess
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from socket import socket
from typing import Any

import pytest

from spepolicy.plugins import installed_policies
from spepolicy.recording import DEFAULT, shipped
from spepolicy.usage import conf_names

from . import performance, picture
from .pages import ROOT, Block, Row, as_shown, blocks, elided, environment, matches, result_rows, run
from .provided import PAGES, provide

README = (ROOT / "README.md").read_text(encoding="utf-8")


def of_language(*languages: str) -> list[Any]:
    """Return the blocks of all pages in *languages* as parameters, the slow ones marked."""
    found = [block for page in PAGES for block in blocks(page) if block.language in languages]
    return [pytest.param(it, id=it.label, marks=pytest.mark.slow if it.slow else ()) for it in found]


def named(*names: str) -> list[str]:
    """Return the texts of the blocks of plugins/README.md that are files of these names."""
    texts = {block.words[0]: block.text for block in blocks("plugins/README.md") if block.words}
    return [texts[name] for name in names]


# ---- commands --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", of_language("console"))
def test_a_command_prints_what_the_page_shows(block: Block, tmp_path: Path) -> None:
    provide(block.word("needs"), tmp_path)
    for command, shown in block.commands():
        status, output = run(command, tmp_path)
        assert status == block.status, output
        printed = as_shown(output, tmp_path)
        assert matches(shown, printed), f"\n{command}\nprinted\n{printed}\nthe page shows\n{shown}"


def test_an_output_is_cut_again_where_it_was_cut() -> None:
    """With the new numbers, and so that it matches; lines between two cuts are found though there are more before."""
    shown = "begin 1\n...\nmean of a 2\nmean of b 3\n...\nend 4\n"
    output = "begin 10\nx 1\ny 2\nz 3\nmean of a 20\nmean of b 30\nw 5\nend 40\n"
    cut = elided(shown, output)
    assert cut == "begin 10\n...\nmean of a 20\nmean of b 30\n...\nend 40\n"
    assert matches(cut, output)
    assert elided("begin 1\n...\n", output) == "begin 10\n...\n"
    assert elided("...\nend 4\n", output) == "...\nend 40\n"
    assert elided("begin ...\n", output) == output


@pytest.mark.parametrize("block", of_language("bash"))
def test_a_command_works(block: Block, tmp_path: Path) -> None:
    provide(block.word("needs"), tmp_path)
    if "server" in block.words:
        assert serves(block.text.strip(), tmp_path)
        return
    status, output = run(block.text, tmp_path)
    assert status == block.status, output


def serves(command: str, folder: Path) -> bool:
    """Start the server of *command* on a free port; tell whether it answers with a page, and stop it."""
    with socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        ["bash", "-c", f"exec {command} --port {port}"],
        cwd=folder,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(1000):
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=60) as answer:
                    return b"<html" in answer.read().lower()
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None:
                    return False
                time.sleep(0.2)
        return False
    finally:
        server.terminate()
        server.wait()


def rows() -> list[Any]:
    """Return the rows of all tables of results as parameters."""
    return [pytest.param(row, id=row.label) for page in PAGES for row in result_rows(page)]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows())
def test_a_row_of_results_is_what_its_command_gives(row: Row, tmp_path: Path) -> None:
    measured = row.measured(tmp_path)
    assert measured == {column: row.cells[column] for column in measured}


def test_the_page_begins_with_the_main_job_and_has_results() -> None:
    (first, *_) = [block for block in blocks("README.md") if block.language == "console"]
    assert first.commands()[0][0] == "python -m spepolicy +policy=eager_pin"
    assert "blackout, % of wanted time" in first.commands()[0][1]
    assert {row.arguments.split()[0].partition("=")[2] for row in result_rows("README.md")} <= set(installed_policies())


# ---- set-up ----------------------------------------------------------------------------------------------------------


def test_ci_runs_the_two_commands_of_the_set_up() -> None:
    """They need a network, so that only .ci/run runs them."""
    main_job, tests = [block.text.strip() for block in blocks("README.md") if block.language == "sh"]
    assert "\n" not in main_job + tests
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert f"\nMAIN_JOB='{main_job}'\n" in script
    assert f"\nTESTS='{tests}'\n" in script
    for name in ("MAIN_JOB", "TESTS"):
        assert f' bash -c "${name}"\n' in script


def test_ci_is_a_valid_script() -> None:
    done = subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the example policy ----------------------------------------------------------------------------------------------


def test_the_example_policy_is_complete(install: Callable[..., Path], tmp_path: Path) -> None:
    source, project = named("keep_pin.py", "pyproject.toml")
    metadata = tomllib.loads(project)
    points = metadata["project"]["entry-points"]["spepolicy.policies"]
    assert points == {"keep_pin": "keep_pin:KeepPin"}
    assert metadata["tool"]["setuptools"]["py-modules"] == ["keep_pin"]
    install(source, {"keep_pin": "KeepPin"}, distribution=metadata["project"]["name"])
    command = "python -m spepolicy +policy=keep_pin"
    status, output = run(f"{command} --help", tmp_path)
    assert status == 0, output
    assert output.startswith("keep_pin, from keep-pin")
    assert "policy.pin_stage1_tables=true" in output
    status, output = run(f"{command} policy.pin_stage1_tables=false duration=5ms replicates=2 tracking=none", tmp_path)
    assert status == 0, output
    assert "keep_pin" in output
    assert len(list(tmp_path.glob("outputs/*/*/metrics.json"))) == 1


def test_what_the_page_shows_of_it_is_part_of_it() -> None:
    (source,) = named("keep_pin.py")
    (excerpt,) = [block.text for block in blocks("README.md") if "excerpt" in block.words]
    shown = [line.strip() for line in excerpt.splitlines() if line.strip()]
    lines = [line.strip() for line in source.splitlines() if line.strip()]
    assert len(shown) > 5
    assert any(lines[n : n + len(shown)] == shown for n in range(len(lines)))


@pytest.mark.slow
def test_the_example_policy_does_what_the_page_says(install: Callable[..., Path], tmp_path: Path) -> None:
    """It pins less often than eager_pin does, and never goes black for long."""
    (source,) = named("keep_pin.py")
    install(source, {"keep_pin": "KeepPin"}, distribution="keep-pin")
    command = "python -m spepolicy +policy=keep_pin 'baselines=[eager_pin]' replicates=2 tracking=none"
    status, output = run(f"{command} | tee summary", tmp_path)
    assert status == 0, output
    stolen = re.search(r"vCPU time stolen, %\s+([\d.]+)(?: \+- [\d.]+)?\s+0\s+([\d.]+)", output)
    assert stolen is not None, output
    assert float(stolen[1]) < 0.7 * float(stolen[2])


# ---- performance -----------------------------------------------------------------------------------------------------


def test_the_table_of_performance_is_what_the_benchmarks_wrote() -> None:
    assert performance.shown() == performance.table(), "run `python -m tests.docs.performance`"


# ---- the picture -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_picture_can_be_taken_again(tmp_path: Path) -> None:
    """Of the same part of the page, and much the same: MLflow gives runs other colours and another order."""
    from matplotlib.image import imread

    pytest.importorskip("playwright.sync_api")
    if picture.CHROMIUM is None:
        pytest.skip("needs the browser chromium")
    assert f"]({picture.PICTURE.relative_to(ROOT)})" in README
    picture.take(tmp_path / "again.png")
    shown, again = imread(picture.PICTURE), imread(tmp_path / "again.png")
    assert again.shape == shown.shape
    assert (abs(again - shown).max(axis=2) > 0.1).mean() < 0.15


# ---- tables and links ------------------------------------------------------------------------------------------------


def test_the_table_has_the_policies_that_are_shipped() -> None:
    table = README.partition("\n## Policies\n")[2].partition("\n## ")[0]
    shipped_here = {name for name, info in installed_policies().items() if info.distribution == "spepolicy"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == shipped_here


def test_the_number_of_scenarios_is_that_of_the_catalogue() -> None:
    from spepolicy.catalogue.case import read_catalogue

    cases, _ = read_catalogue()
    assert f" {len(cases)} scenarios " in README


def test_every_group_has_a_row_with_its_files() -> None:
    from spepolicy.schema import GROUPS

    table = (ROOT / "conf" / "README.md").read_text(encoding="utf-8").partition("\n## ")[0]
    found = dict(re.findall(r"^\| `(\w+)` \|.*\| (.*) \|$", table, re.MULTILINE))
    assert set(found) == set(GROUPS)
    for group, files in found.items():
        assert set(re.findall(r"`(\w+)`", files)) == set(conf_names(group)), group


def test_every_recording_is_named() -> None:
    section = README.partition("\n## Your own host, your own capture\n")[2].partition("\n## ")[0]
    assert f"`host.path={DEFAULT}` (the default)" in section
    assert all(f"`{name}`" in section or f"`host.path={name}`" in section for name in shipped())
    assert "Nine recordings" in section
    assert len(shipped()) == 9


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if target.startswith(("http://", "https://")):
            continue
        linked = (ROOT / page).parent / path if path else ROOT / page
        assert linked.exists(), f"{page}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    folders = "spepolicy|plugins|conf|experiments|tests"
    for name in re.findall(rf"`((?:{folders})/[\w./-]+)`", text):
        if not re.search(r"/[A-Z]+(?!\w*\.md)", name):  # a place for a name, as GROUP
            assert (ROOT / name).exists(), f"{page}: {name}"
