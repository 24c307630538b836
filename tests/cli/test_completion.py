"""The shell completes policies, their fields, groups and settings, for the script and for the module."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from spepolicy.plugins import installed_policies

Run = Callable[..., Any]


@pytest.fixture
def complete(run: Run, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], set[str]]:
    """Return a function that answers what the shell asks for a line."""

    def ask(line: str) -> set[str]:
        monkeypatch.setenv("COMP_LINE", line)
        answer = run("-sc", "query=bash")
        assert (answer.status, answer.err) == (0, "")
        return set(answer.out.split())

    return ask


def test_policies(complete: Callable[[str], set[str]]) -> None:
    assert complete("spepolicy +policy=") == {f"+policy={name}" for name in installed_policies()}
    assert complete("spepolicy +policy=ea") == {"+policy=eager_pin"}


def test_a_policy_that_is_gone_is_not_offered(complete: Callable[[str], set[str]]) -> None:
    """Another test, or a notebook, had it in this process."""
    ConfigStore.instance().store(group="policy", name="gone", node={"pages": 1}, provider="stranger 1.2")
    assert "+policy=gone" not in complete("spepolicy +policy=")


def test_fields_of_the_chosen_policy(complete: Callable[[str], set[str]]) -> None:
    words = complete("spepolicy +policy=eager_pin policy.")
    assert words == {"policy.pin_stage1_tables=", "policy.keep_mapped=", "policy.el0_only=", "policy.claims="}


def test_groups_settings_and_files(complete: Callable[[str], set[str]]) -> None:
    words = complete("spepolicy ")
    assert {"+policy=", "+experiment=", "guest=", "guest.", "seed="} <= words
    assert not any("schema" in word or word in ("policy=", "experiment=") for word in words)
    assert complete("spepolicy +policy=eager_pin guest.bu") == {"guest.buffer=", "guest.buffer_mapped="}
    assert complete("spepolicy +policy=eager_pin guest=p") == {"guest=per_cpu"}
    assert complete("spepolicy +experiment=f") == {"+experiment=first_look"}


@pytest.mark.parametrize("line", ["spepolicy guest.buffer=[1 x", "spepolicy +policy=nope policy.", "spepolicy --foo "])
def test_what_cannot_be_composed_completes_to_nothing(run: Run, monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    answer = run("-sc", "query=bash")
    assert (answer.status, answer.out.strip(), answer.err) == (0, "", "")


@pytest.mark.parametrize(
    ("typed", "expected"),
    [
        ("python -m spepolicy +policy=eag", ["+policy=eager_pin"]),
        ("python3 -m spepolicy +policy=eager_pin policy.k", ["policy.keep_mapped="]),
        ("spepolicy +policy=map", ["+policy=map_on_fault"]),
        ("python -m pip inst", []),
    ],
)
def test_bash_completes_what_was_typed(tmp_path: Path, typed: str, expected: list[str]) -> None:
    """Load the completion as a user does, and let bash ask it as it would at a TAB."""
    bin_dir = tmp_path / "bin"
    bin_dir.mkdir()
    for name in ("python", "python3"):
        (bin_dir / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        (bin_dir / name).chmod(0o755)
    script = """
    eval "$(python -m spepolicy --completion bash)"
    COMP_LINE=$TYPED COMP_POINT=${#TYPED}
    read -ra COMP_WORDS <<< "$TYPED"
    COMP_CWORD=$(( ${#COMP_WORDS[@]} - 1 ))
    complete -p "${COMP_WORDS[0]}" | grep -q _spepolicy_complete || exit 3
    _spepolicy_complete
    printf '%s\\n' "${COMPREPLY[@]}"
    """
    path = f"{bin_dir}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PATH": path, "TYPED": typed},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == expected


def test_hydra_s_own_installation_is_for_the_script(run: Run) -> None:
    answer = run("-sc", "install=bash")
    assert answer.status == 0
    assert answer.out.rstrip().endswith("hydra_bash_completion spepolicy")
