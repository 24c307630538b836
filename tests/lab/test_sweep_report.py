"""The report of a sweep: one page that needs nothing else, and sentences that the rows bear out."""

from __future__ import annotations

import csv
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas
import pytest

from spepolicy.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of two policies on two hosts, of which the recorded one disturbs; return its working folder."""
    place = tmp_path_factory.mktemp("sweep")
    words = ["-m", "+policy=pin_on_fault,map_on_fault", "host=silent,recorded", "guest.buffer_mapped=false"]
    words += ["duration=20ms", "replicates=4", "seed=1,2", "tracking=none", f"output.dir={place / 'outputs'}"]
    words += [f"hydra.sweep.dir={place / 'sweep'}"]
    assert main(words) == 0
    return place


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    (path,) = folder.rglob("report.html")
    return path.read_text(encoding="utf-8")


class Outside(HTMLParser):
    """Collects tags that are left open, and what the page would fetch."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "br", "path", "use", "rect", "image"):
            self.open.append(tag)
        values = dict(attrs)
        for name in ("src", "href", "xlink:href"):
            value = values.get(name) or ""
            if tag in ("img", "link", "script", "a") and value:
                self.fetched.append(value)
            if tag == "use" and not value.startswith("#") and value:
                self.fetched.append(value)

    def handle_endtag(self, tag: str) -> None:
        if tag in self.open:
            while self.open.pop() != tag:
                pass

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_it_is_one_page_that_fetches_nothing(page: str) -> None:
    reader = Outside()
    reader.feed(page)
    assert reader.open == []
    assert reader.fetched == []
    assert "@import" not in page
    assert "url(http" not in page


def test_it_has_a_row_a_configuration_and_its_figures(page: str, folder: Path) -> None:
    (listed,) = folder.rglob("configurations.csv")
    with listed.open(newline="") as file:
        labels = [row["configuration"] for row in csv.DictReader(file)]
    assert len(labels) == 8
    for label in labels:
        assert f"<td>{label}</td>" in page
    for heading in (
        "Blackout by cause",
        "What it costs",
        "Policies by what else varies",
        "Blackout over time",
        "The profile",
    ):
        assert f"<h2>{heading}" in page, heading
    assert page.count("<svg") == 5
    assert not re.search(r"\bnan\b", page)


def sentences(page: str) -> list[str]:
    block = page[page.index("In words") : page.index("Configurations</h2>")]
    return [re.sub(r"<[^>]*>", "", line).strip() for line in re.findall(r"<li>(.*?)</li>", block, re.DOTALL)]


def test_the_sentences_say_what_the_rows_say(page: str, folder: Path) -> None:
    """The paired difference and its interval, from the rows by a formula of the test's own."""
    (sentence,) = (line for line in sentences(page) if "host=silent" in line)
    found = re.search(r"(\w+) loses ([\d.]+) % \+- ([\d.]+) more samples than (\w+)", sentence)
    assert found is not None, sentence
    worse, mean, half, better = found.groups()
    assert (worse, better) == ("map_on_fault", "pin_on_fault")
    table = pandas.read_parquet(next(folder.rglob("store")))
    silent = table[table["config"].astype(str).str.contains('"kind": "silent"')]
    pivot = silent.pivot_table(
        index=["seed", "replicate"], columns="policy", values="unseen_samples_pct", observed=True
    )
    difference = (pivot["map_on_fault"] - pivot["pin_on_fault"]).to_numpy()
    assert len(difference) == 8
    assert float(mean) == pytest.approx(difference.mean(), rel=1e-2)
    student = 2.3646  # 97.5 % quantile of Student's distribution with 7 degrees of freedom, from tables
    assert float(half) == pytest.approx(student * difference.std(ddof=1) / np.sqrt(8), rel=0.1)


@pytest.fixture(scope="module")
def mail(folder: Path) -> str:
    (path,) = folder.rglob("mail.txt")
    return path.read_text(encoding="utf-8")


def test_a_mail_is_plain_and_narrow(mail: str) -> None:
    assert mail.isascii()
    assert [line for line in mail.splitlines() if len(line) > 75 or line != line.rstrip()] == []


def test_the_table_of_a_mail_is_that_of_the_configurations(mail: str, folder: Path) -> None:
    """Every number, to the digits shown, under the number of its configuration."""
    (path,) = folder.rglob("configurations.csv")
    table = pandas.read_csv(path).set_index("configuration")
    legend = dict(re.findall(r"^  \[(\d)\] (.*)$", mail, re.MULTILINE))
    assert sorted(legend.values()) == sorted(table.index)
    names = {"unseen %": "unseen_samples_pct", "stolen %": "stolen_pct", "profile distance": "fidelity_tv_excess"}
    found = 0
    for block in mail.split("\n\n"):
        head = re.match(r" +((?:\[\d\] *)+)$", block.splitlines()[0])
        for line in block.splitlines()[1:] if head else []:
            metric = next((metric for name, metric in names.items() if line.startswith(name)), "")
            means = re.findall(r"(-?[\d.,]+)(?: \+- [\d.,]+)?(?:  |$)", line.removeprefix(line[:17]))
            columns = re.findall(r"\d", head[1]) if head else []
            for number, mean in zip(columns, means, strict=True) if metric else ():
                value = table.loc[legend[number], metric]
                assert float(mean.replace(",", "")) == pytest.approx(value, rel=6e-3), (line, number)
                found += 1
    assert found == 3 * len(table)


def test_a_mail_says_what_the_report_concludes(mail: str, page: str) -> None:
    words = " ".join(mail.split())
    for sentence in sentences(page):
        assert " ".join(unescape(sentence).split()) in words


def test_the_commands_of_a_mail_are_those_of_the_jobs(mail: str) -> None:
    """Without what has no influence on a result."""
    commands = re.findall(r"python -m spepolicy ((?:.*\\\n)*.*)", mail)
    assert len(commands) == 8
    for command in commands:
        words = command.replace("\\\n", " ").split()
        assert {word.partition("=")[0] for word in words} == {
            "+policy",
            "host",
            "seed",
            "guest.buffer_mapped",
            "duration",
            "replicates",
        }


def test_refused_sessions_are_told_below_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "+policy=eager_pin", "kvm.memlock=64KiB,64MiB", "host=silent", "duration=5ms", "replicates=2"]
    assert main([*words, "tracking=none", f"output.dir={tmp_path}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    (line,) = re.findall(r"^kvm\.memlock refused sessions.*$", capsys.readouterr().out, re.MULTILINE)
    table = pandas.read_csv(tmp_path / "sweep" / "configurations.csv").set_index("configuration")["refused_sessions"]
    refused = table[table > 0]
    assert list(refused.index) == re.findall(r"\w+ memlock=\w+", line)
    assert list(refused.index) == ["eager_pin memlock=64KiB"]


def test_a_sweep_of_one_policy_has_nothing_to_compare(tmp_path: Path) -> None:
    words = ["-m", "+policy=pin_vm", "guest.buffer=128KiB,256KiB", "host=silent", "duration=1ms", "replicates=1"]
    assert main([*words, "tracking=none", f"output.dir={tmp_path}", f"hydra.sweep.dir={tmp_path / 'sweep'}"]) == 0
    page = (tmp_path / "sweep" / "report.html").read_text(encoding="utf-8")
    assert "nothing to compare" in page
