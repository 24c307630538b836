"""The guides are complete: every hook with its exact signature, everything that a batch offers, every experiment."""

from __future__ import annotations

import inspect
import re
from typing import Any

import pytest

from spepolicy import batch
from spepolicy.hookspecs import ExplorerSpec, ObserverSpec, PolicySpec, ReporterSpec
from spepolicy.lab.about import DOCSTRING_PARTS
from spepolicy.plugins import installed_policies
from spepolicy.testing import CHECKS

from . import policies
from .pages import ROOT

GUIDE = (ROOT / "plugins" / "README.md").read_text(encoding="utf-8")
OFFERED = {
    "Vcpus": (batch.Vcpus,),
    "WalkResult": (batch.WalkResult,),
    "PinResult": (batch.PinResult,),
    "CopyResult": (batch.CopyResult,),
    "Evidence": (batch.Evidence,),
    "Vms": (batch.Vms,),
}


def hooks() -> dict[str, Any]:
    """Return the specification of every hook by name."""
    members = [item for spec in (PolicySpec, ReporterSpec, ExplorerSpec, ObserverSpec) for item in vars(spec).items()]
    return {name: member for name, member in members if hasattr(member, "spepolicy_spec")}


def public(cls: type) -> dict[str, Any]:
    """Return what *cls* itself offers to a policy, by name."""
    return {name: member for name, member in vars(cls).items() if not name.startswith("_")}


@pytest.mark.parametrize("name", hooks())
def test_every_hook_has_a_heading_with_its_signature(name: str) -> None:
    signature = inspect.signature(hooks()[name])
    without_self = signature.replace(parameters=list(signature.parameters.values())[1:])
    heading = f"### `{name}{str(without_self).replace(chr(39), '')}`\n"
    assert heading in GUIDE
    text = GUIDE.partition(heading)[2].partition("\n#")[0]
    assert len(text.split()) > 10, f"nothing is said of {name}"


def test_no_hook_is_described_that_does_not_exist() -> None:
    assert {heading.partition("(")[0] for heading in re.findall(r"^### `(.*)`$", GUIDE, re.MULTILINE)} == set(hooks())


def test_the_order_of_calls_names_every_hook() -> None:
    order = GUIDE.partition("\n## How hooks are called\n")[2].partition("\n## ")[0]
    assert set(hooks()) <= set(re.findall(r"`(\w+)`", order))


def test_the_table_of_policies_is_what_their_docstrings_say() -> None:
    """`python -m tests.docs.policies` writes it again."""
    assert policies.shown() == policies.table()


@pytest.mark.parametrize("name", sorted(installed_policies()))
def test_the_docstring_of_a_policy_says_what_it_must(name: str) -> None:
    """Mechanism, source, what it needs, costs and failures, each with something said."""
    parts = policies.parts_of(installed_policies()[name].cls)
    assert tuple(parts) == DOCSTRING_PARTS
    assert all(len(part) > 3 for part in parts.values())


@pytest.mark.parametrize("name", OFFERED)
def test_everything_that_a_batch_offers_is_in_its_table(name: str) -> None:
    table = GUIDE.partition(f"\n| of `{name}` |")[2].partition("\n\n")[0]
    first_cells = re.findall(r"^\| ([^|]*) \|", table, re.MULTILINE)
    described = {re.match(r"\w+", code)[0] for cell in first_cells for code in re.findall(r"`([^`]+)`", cell)}  # type: ignore[index]
    offered = {member for cls in OFFERED[name] for member in public(cls)}
    assert described == offered


@pytest.mark.parametrize("cls", [batch.WalkedVcpus, batch.PinnedVcpus])
def test_the_tools_of_walked_and_pinned_vcpus_are_described(cls: type) -> None:
    for tool in public(cls):
        assert f"`{tool}()`" in GUIDE


@pytest.mark.parametrize("name", ["walk_stage1", "inject", "pin_all"])
def test_tools_with_options_are_shown_with_their_defaults(name: str) -> None:
    member = getattr(batch.Vcpus, name, None) or getattr(batch.Vms, name)
    parameters = list(inspect.signature(member).parameters.values())[1:]
    shown = ", ".join(it.name if it.default is it.empty else f"{it.name}={it.default}" for it in parameters)
    assert f"`{name}({shown})`" in GUIDE


@pytest.mark.parametrize("folder", ["conf", "plugins", "experiments", "tests"])
def test_every_folder_of_files_for_people_has_a_page(folder: str) -> None:
    assert (ROOT / folder / "README.md").is_file()


def test_the_index_lists_every_experiment_and_each_has_its_parts() -> None:
    index = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in (ROOT / "experiments").iterdir() if path.is_dir() and any(path.iterdir())}
    folders -= {"__pycache__"}
    assert set(re.findall(r"^\| \[(\w+)\]\(\1/README\.md\)", index, re.MULTILINE)) == folders
    for preset in (ROOT / "conf" / "experiment").glob("*.yaml"):
        page = (ROOT / "experiments" / preset.stem / "README.md").read_text(encoding="utf-8")
        titles = re.findall(r"^## (\w+)", page, re.MULTILINE)
        assert titles == ["Question", "Method", "Result", "Threats"], preset.stem
        assert f"python -m spepolicy +experiment={preset.stem}" in page
        assert f"`python -m spepolicy +experiment={preset.stem}`" in index


def test_the_tests_page_names_every_folder_of_tests() -> None:
    page = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("test_*.py"))}
    assert set(re.findall(r"`(\w+)/`", page)) == folders


@pytest.mark.parametrize("check", CHECKS)
def test_every_check_of_the_kit_is_in_its_table(check: str) -> None:
    summary = CHECKS[check].summary.rstrip(".")
    assert f"| `{check}` | {summary[0].lower()}{summary[1:]} |" in GUIDE
