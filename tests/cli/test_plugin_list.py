"""`task=plugins`: what is installed, from where, what cannot be used; nothing is written."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from spepolicy.plugin_list import plugin_rows, plugin_table
from spepolicy.plugins import installed_policies

Install = Callable[..., Path]


def test_every_shipped_plugin_is_listed_with_its_hooks() -> None:
    rows = {(row.kind, row.name): row for row in plugin_rows()}
    assert {name for kind, name in rows if kind == "policy"} >= set(installed_policies())
    eager = rows["policy", "eager_pin"]
    assert eager.distribution == "spepolicy"
    assert eager.origin == "spepolicy_plugins.eager_pin:EagerPin"
    assert {"traps", "profiling_enabled", "stage2_fault", "vm_destroyed"} <= set(eager.hooks)
    assert rows["reporter", "kernel"].hooks == ("report_errata",)
    assert not any(row.problem for row in rows.values() if row.distribution == "spepolicy")


def test_a_plugin_that_cannot_be_imported_is_listed_with_its_error_beside_the_others(install: Install) -> None:
    install("raise RuntimeError('no luck')", {"sick": "Sick"})
    rows = {row.name: row for row in plugin_rows() if row.kind == "policy"}
    assert "RuntimeError: no luck" in rows["sick"].problem
    assert rows["sick"].hooks == ()
    assert rows["eager_pin"].problem == ""
    assert "problem: RuntimeError: no luck" in plugin_table()
    assert "1 of them cannot be used" in plugin_table()


def test_the_command_needs_no_policy_and_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spepolicy", "task=plugins"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "eager_pin" in done.stdout
    assert list(tmp_path.iterdir()) == []
