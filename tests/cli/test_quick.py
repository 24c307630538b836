"""What needs no configuration is answered without one, and without anything heavy."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spepolicy.plugins import installed_policies
from spepolicy.schema import GROUPS
from spepolicy.usage import conf_names

Run = Callable[..., Any]
STRANGER = '''
from dataclasses import dataclass, field
from spepolicy.hookspecs import doc, hookimpl

@dataclass
class Stranger:
    """Do as a stranger does."""
    wait_us: float = field(default=2.0, metadata=doc("its wait", unit="us", minimum=0, maximum=10, source="made up"))

    @hookimpl
    def stage2_fault(self, faults):
        faults.resume()
'''


def test_the_bare_program_lists_the_policies_with_a_line_each_and_how_to_choose_one(run: Run) -> None:
    answer = run()
    assert answer.status == 2
    assert answer.err == ""
    lines = answer.out.splitlines()
    for name, info in installed_policies().items():
        (line,) = [line for line in lines if line.split()[:1] == [name]]
        assert info.summary in line
    assert "+policy=eager_pin" in answer.out


@pytest.mark.parametrize("arguments", [("seed=3",), ("-m",), ("-m", "seed=1,2"), ("guest=per_cpu", "host=silent")])
def test_without_a_policy_nothing_runs(run: Run, arguments: tuple[str, ...]) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert "+policy=NAME" in answer.out
    assert not list(Path().iterdir())


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_policies_groups_settings_examples_and_flags(run: Run, flag: str) -> None:
    answer = run(flag)
    assert (answer.status, answer.err) == (0, "")
    for name in installed_policies():
        assert name in answer.out
    for group in GROUPS:
        assert group in answer.out
        for file in conf_names(group):
            assert file in answer.out
    for part in ("linux*", "neoverse_n1*", "seed=1", "duration=500ms", "--multirun", "--cfg job", "--completion bash"):
        assert part in answer.out


@pytest.mark.parametrize("group", GROUPS)
def test_help_of_a_group_shows_its_files_and_settings(run: Run, group: str) -> None:
    answer = run("--help", group)
    assert answer.status == 0
    for file in conf_names(group):
        assert file in answer.out
    if group == "guest":
        assert "guest.buffer" in answer.out
        assert "16KiB..64MiB" in answer.out
        assert "guest.filter.min_latency" in answer.out
    if group == "host":
        assert "host.time_scale" in answer.out


def test_help_of_an_unknown_group_names_the_nearest(run: Run) -> None:
    answer = run("--help", "gest")
    assert answer.status == 2
    assert "Did you mean 'guest'?" in answer.err


def test_help_of_a_policy_shows_its_docstring_and_fields(run: Run, install: Callable[..., Path]) -> None:
    install(STRANGER, {"stranger": "Stranger"}, distribution="strange")
    answer = run("+policy=stranger", "--help")
    assert answer.status == 0
    for part in (
        "Do as a stranger does.",
        "strange 1.2",
        "policy.wait_us=2.0",
        "float",
        "0..10 us",
        "its wait",
        "made up",
    ):
        assert part in answer.out


@pytest.mark.parametrize("name", sorted(installed_policies()))
def test_help_of_every_installed_policy(run: Run, name: str) -> None:
    answer = run(f"+policy={name}", "--help")
    assert answer.status == 0
    assert installed_policies()[name].summary in answer.out


def test_a_broken_plugin_is_listed_with_its_reason(run: Run, install: Callable[..., Path]) -> None:
    install("import no_such_module", {"odd": "Odd"}, distribution="oddities")
    for arguments in ((), ("--help",)):
        answer = run(*arguments)
        assert "No module named 'no_such_module'" in answer.out
        assert "eager_pin" in answer.out


def test_hydra_s_own_help(run: Run) -> None:
    answer = run("--hydra-help")
    assert answer.status == 0
    assert "--multirun" in answer.out


def test_the_version(run: Run) -> None:
    answer = run("--version")
    assert answer.status == 0
    assert answer.out.startswith("spepolicy ")


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("+policy=eager_pn",), ["policy 'eager_pn' is not installed", "Did you mean 'eager_pin'?", "pin_vm"]),
        (("-m", "+policy=eager_pin,eager_pn"), ["policy 'eager_pn' is not installed"]),
        (("--cfg", "job", "+policy=eager_pn"), ["policy 'eager_pn' is not installed"]),
        (("+policy=eager_pn", "--help"), ["Did you mean 'eager_pin'?"]),
        (("policy=eager_pin",), ["Use +policy=eager_pin"]),
        (("eager_pin",), ["not of the form KEY=VALUE", "Did you mean +policy=eager_pin?"]),
        (("+policy=eager_pin", "=3"), ["=3: not of the form KEY=VALUE"]),
        (("+policy=eager_pin", "guest=linx"), ["group 'guest' has no 'linx'", "per_cpu", "Did you mean 'linux'?"]),
        (("+policy=eager_pin", "guest=3"), ["group 'guest' has no '3'"]),
        (("--completion", "powershell"), ["must be bash"]),
        (("--completion",), ["must be bash"]),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_composed(
    run: Run, arguments: tuple[str, ...], parts: list[str]
) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err
    assert not list(Path().iterdir())


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["--help", "guest"], ["+policy=eager_pin", "--help"], ["+policy=x"]]
)
def test_quick_answers_import_nothing_heavy(arguments: list[str]) -> None:
    code = (
        "import sys; from spepolicy.cli import main; status = main(sys.argv[1:]);"
        "heavy = {'hydra', 'omegaconf', 'numba', 'mlflow', 'matplotlib', 'pandas', 'pyarrow'} & set(sys.modules);"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_module_and_the_script_are_one_program(tmp_path: Path) -> None:
    module = subprocess.run(
        [sys.executable, "-m", "spepolicy"], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    script = subprocess.run(
        [str(Path(sys.executable).with_name("spepolicy"))], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert (module.returncode, module.stdout, module.stderr) == (script.returncode, script.stdout, script.stderr)
    assert module.returncode == 2


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    command = f"{sys.executable} -m spepolicy --help | head -1; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stderr == ""
    assert done.stdout.startswith("spepolicy")
