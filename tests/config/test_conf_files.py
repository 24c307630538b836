"""The files of conf/ compose, and every number in them says its unit, range or source."""

from __future__ import annotations

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from spepolicy.config import to_options, to_scenario
from spepolicy.errors import ConfigurationError
from spepolicy.schema import GROUPS, Kind, setting_at
from spepolicy.usage import conf_names

CONF = Path(str(files("spepolicy_conf")))
FILES = sorted(CONF.rglob("*.yaml"))
GROUP_FILES = [(group, name) for group in GROUPS if group not in ("policy", "experiment") for name in conf_names(group)]

NUMBER = re.compile(r":\s+(\d[\w.]*|0x[0-9A-Fa-f]+)\s*(?:#|$|,|\})")
RANGE = re.compile(r"\.\.|power of two|\d or \d|0: (?:none|never|no )|by definition", re.IGNORECASE)
SOURCE = re.compile(
    r"assumption|source|data sheet|\.md|default|linux|kernel|QEMU|same seed|TRM|definition|synthetic",
    re.IGNORECASE,
)


def relative(path: Path) -> str:
    return str(path.relative_to(CONF))


@pytest.mark.parametrize(("group", "name"), GROUP_FILES, ids=[f"{group}={name}" for group, name in GROUP_FILES])
def test_every_file_composes_into_a_scenario(composed: Callable[..., dict[str, Any]], group: str, name: str) -> None:
    config = composed(f"{group}={name}", *(["host=silent"] if group != "host" else []))
    if group == "workload" and name in ("file", "capture"):
        # They need the name of a file, which only their user has: tests/workload/test_workload_source.py.
        with pytest.raises(ConfigurationError, match=rf"workload={name} needs the name of a file"):
            to_scenario(config)
        return
    assert to_scenario(config).duration_ps > 0
    assert to_options(config).replicates > 0


@pytest.mark.parametrize("name", conf_names("experiment"))
def test_every_experiment_composes_and_has_a_readme_with_its_command(
    composed: Callable[..., dict[str, Any]], name: str
) -> None:
    config = composed(f"+experiment={name}", "+policy=eager_pin")
    assert to_scenario(config).duration_ps > 0
    command = f"python -m spepolicy +experiment={name}"
    assert command in (CONF / "experiment" / f"{name}.yaml").read_text()
    readme = Path(__file__).parents[2] / "experiments" / name / "README.md"
    text = readme.read_text()
    assert command in text
    for heading in ("## Question", "## Method", "## Result", "## Threats"):
        assert heading in text


def test_every_group_of_the_help_has_a_folder_and_every_folder_is_in_the_help() -> None:
    folders = {path.name for path in CONF.iterdir() if path.is_dir() and not path.name.startswith("__")}
    assert folders == set(GROUPS) - {"policy"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_every_file_begins_with_what_it_is_for(path: Path) -> None:
    assert path.read_text().startswith("#")


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name not in ("workload", "latencies")], ids=relative
)
def test_every_number_has_a_comment_with_range_and_source(path: Path) -> None:
    lines = path.read_text().splitlines()
    numbers = 0
    for index, line in enumerate(lines):
        code, _, comment = line.partition("#")
        if not NUMBER.search(line) or not code.strip() or code.lstrip().startswith("-"):
            continue
        numbers += 1
        above, before = [], index - 1
        while before >= 0 and lines[before].lstrip().startswith("#"):
            above.insert(0, lines[before])
            before -= 1
        text = comment or " ".join(above)
        ops_range = path.parent.name == "host" and "ranges are" in path.read_text()
        assert RANGE.search(text) or ops_range, f"{relative(path)}:{index + 1}: no range in a comment: {line}"
        assert SOURCE.search(text), f"{relative(path)}:{index + 1}: no source in a comment: {line}"
    if path.parent.name in ("costs", "cpu", "guest", "kvm") and "defaults:" not in path.read_text():
        assert numbers > 2


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name in ("workload", "latencies")], ids=relative
)
def test_every_block_of_a_workload_s_numbers_has_a_comment_with_its_source(path: Path) -> None:
    lines = path.read_text().splitlines()
    block: list[str] = []
    explained = False
    for index, line in enumerate(lines):
        if line.lstrip().startswith("#"):
            block.append(line)
            explained = bool(SOURCE.search(" ".join(block)))
            continue
        if not line.strip():
            block, explained = [], explained and line.startswith(" ")
            continue
        block = []
        if NUMBER.search(line):
            assert explained, f"{relative(path)}:{index + 1}: no comment above the block gives a source: {line}"


def test_the_ranges_in_the_comments_are_those_of_the_schema() -> None:
    wrong = []
    for path in FILES:
        if path.parent.name not in ("guest", "cpu", "kvm", "costs"):
            continue
        group = path.parent.name
        for line in path.read_text().splitlines():
            match = re.match(r"(\s*)(\w+): [^{]*#.*?((?:\d[\w.]*)\.\.(?:\d[\w]*))", line)
            if not match:
                continue
            key = f"{group}.filter.{match[2]}" if match[1] else f"{group}.{match[2]}"
            setting = setting_at(key)
            assert setting is not None, key
            if setting.kind is Kind.COUNT and key.endswith(("period", "min_latency")):
                continue  # written in hexadecimal; or bounded by another setting
            if match[3] != f"{setting.minimum}..{setting.maximum}":
                wrong.append(f"{relative(path)}: {key}: comment {match[3]}, schema {setting.rule()}")
    assert not wrong
