"""A composed configuration becomes a plan; sweeps, presets and interruptions do what they say."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from spepolicy.errors import OutputError
from spepolicy.machine.scenario import HostKind, Scenario

Run = Callable[..., Any]
ONE_BY_ONE = ("-m", "hydra/launcher=basic")  # a run a job, each of its own, as Hydra does it
STRANGER = '''
from dataclasses import dataclass, field
from enum import Enum
from spepolicy.hookspecs import doc, hookimpl

class Mood(Enum):
    CALM = 1
    BUSY = 2

@dataclass(frozen=True)
class Stranger:
    """Do as a stranger does."""
    wait_us: float = field(default=2.0, metadata=doc("how long it waits", unit="us", minimum=0, maximum=10))
    mood: Mood = Mood.CALM
    limit: int | None = None
    names: list[str] = field(default_factory=lambda: ["a"])

    @hookimpl
    def stage2_fault(self, faults):
        faults.resume()
'''


def test_the_main_job_becomes_a_plan(run: Run, laboratory: Any, tmp_path: Path) -> None:
    answer = run("+policy=eager_pin")
    assert (answer.status, answer.err) == (0, "")
    assert answer.out == "working\nthe summary\n"
    (plan,) = laboratory.plans
    assert plan.chosen == "eager_pin"
    assert list(plan.policies) == ["eager_pin", "bare_metal", "pin_vm"]
    assert isinstance(plan.scenario, Scenario)
    assert plan.scenario.host.kind is HostKind.RECORDED
    assert (plan.replicates, plan.threads) == (8, None)
    assert plan.run_dir.is_dir()
    assert plan.run_dir.is_relative_to(tmp_path / "outputs")
    assert (plan.tracking.kind, plan.tracking.uri, plan.tracking.experiment) == ("mlflow", None, "spepolicy")
    assert plan.config["guest"]["buffer"] == "4MiB"
    assert plan.config["policy"]["_name_"] == "eager_pin"
    assert any("20 recording seconds per simulated second" in note for note in plan.notes)


def test_settings_and_fields_arrive(run: Run, laboratory: Any) -> None:
    arguments = ["policy.keep_mapped=true", "seed=7", "replicates=3", "threads=2", "duration=2ms", "guest.buffer=1MiB"]
    answer = run("+policy=eager_pin", *arguments, "tracking=none", "host=silent", "output.dir=here")
    assert answer.status == 0
    (plan,) = laboratory.plans
    assert plan.policies["eager_pin"].keep_mapped is True
    assert (plan.scenario.seed, plan.replicates, plan.threads) == (7, 3, 2)
    assert plan.scenario.duration_ps == 2 * 10**9
    assert plan.scenario.guest.buffer_pages == 256
    assert plan.tracking.kind == "none"
    assert plan.run_dir.parent.parent.name == "here"


@pytest.mark.parametrize(
    ("arguments", "policies"),
    [
        (["+policy=eager_pin", "baselines=[]"], ["eager_pin", "bare_metal"]),
        (["+policy=bare_metal"], ["bare_metal", "pin_vm"]),
        (["+policy=pin_vm"], ["pin_vm", "bare_metal"]),
        (["+policy=pin_vm", "baselines=[pin_on_fault,pin_on_fault]"], ["pin_vm", "bare_metal", "pin_on_fault"]),
    ],
)
def test_bare_metal_is_always_a_baseline_and_nothing_runs_twice(
    run: Run, laboratory: Any, arguments: list[str], policies: list[str]
) -> None:
    assert run(*arguments, "host=silent").status == 0
    assert list(laboratory.plans[0].policies) == policies


def test_a_stranger_s_policy_needs_no_file(run: Run, laboratory: Any, install: Callable[..., Path]) -> None:
    install(STRANGER, {"stranger": "Stranger"})
    arguments = ["policy.wait_us=3", "policy.mood=BUSY", "policy.limit=4", "policy.names=[b,c]"]
    answer = run("+policy=stranger", "host=silent", *arguments)
    assert (answer.status, answer.err) == (0, "")
    policy = laboratory.plans[0].policies["stranger"]
    assert (policy.wait_us, policy.mood.name, policy.limit, policy.names) == (3.0, "BUSY", 4, ["b", "c"])
    assert laboratory.plans[0].config["policy"]["mood"] == "BUSY"
    for wrong, part in {
        "policy.wait_us=30": "too large",
        "policy.mood=ANGRY": "mood",
        "policy.wiat_us=3": "wait_us",
    }.items():
        answer = run("+policy=stranger", "host=silent", wrong)
        assert answer.status == 2
        assert part in answer.err
        assert answer.err.count("\n") == 1


def test_two_runs_in_one_second_do_not_share_a_folder(run: Run, laboratory: Any) -> None:
    for _ in range(4):
        assert run("+policy=eager_pin", "host=silent").status == 0
    assert len({plan.run_dir for plan in laboratory.plans}) == 4


def test_a_sweep_runs_every_combination_in_folders_of_their_own(run: Run, laboratory: Any) -> None:
    answer = run(*ONE_BY_ONE, "+policy=eager_pin,pin_on_fault", "seed=1,2", "host=silent")
    assert answer.status == 0
    points = [(plan.chosen, plan.scenario.seed) for plan in laboratory.plans]
    assert points == [("eager_pin", 1), ("eager_pin", 2), ("pin_on_fault", 1), ("pin_on_fault", 2)]
    assert len({plan.run_dir for plan in laboratory.plans}) == 4
    assert len({plan.run_dir.parent for plan in laboratory.plans}) == 1


def test_policies_can_be_swept_by_pattern(run: Run, laboratory: Any) -> None:
    assert run(*ONE_BY_ONE, "+policy=glob(pin_*)", "host=silent").status == 0
    assert [plan.chosen for plan in laboratory.plans] == ["pin_cache", "pin_on_fault", "pin_vm", "pin_while_enabled"]


def test_a_wrong_point_of_a_sweep_is_told_and_the_others_run(run: Run, laboratory: Any) -> None:
    answer = run(*ONE_BY_ONE, "+policy=eager_pin", "guest.buffer=1MiB,1MB,2MiB,2MB", "host=silent")
    assert answer.status == 2
    assert [plan.config["guest"]["buffer"] for plan in laboratory.plans] == ["1MiB", "2MiB"]
    errors = answer.err.splitlines()
    assert [error.partition("(")[0] for error in errors] == ["error: job 1 ", "error: job 3 "]
    assert "guest.buffer=1MB" in errors[0]
    assert "Traceback" not in answer.err


def test_a_failing_run_does_not_end_a_sweep(run: Run, laboratory: Any) -> None:
    laboratory.answer = OutputError("no space left. Free some.")
    answer = run(*ONE_BY_ONE, "+policy=eager_pin", "seed=1,2", "host=silent")
    assert answer.status == 2
    assert len(laboratory.plans) == 2
    assert answer.err.count("no space left") == 2


def test_the_first_look_sweeps_over_the_policies_of_2022(run: Run, laboratory: Any) -> None:
    assert run("+experiment=first_look", "host=silent", ONE_BY_ONE[1]).status == 0
    chosen = [plan.chosen for plan in laboratory.plans]
    assert chosen == ["map_on_fault", "eager_pin", "pin_on_fault", "synthetic_fault"]
    assert {plan.replicates for plan in laboratory.plans} == {16}
    assert {plan.tracking.experiment for plan in laboratory.plans} == {"spepolicy first look"}


def test_the_command_line_narrows_a_preset(run: Run, laboratory: Any) -> None:
    assert run("+experiment=el0_only", "+policy=pin_on_fault", "host=silent", "replicates=2", ONE_BY_ONE[1]).status == 0
    (plan,) = laboratory.plans
    assert (plan.chosen, plan.replicates) == ("pin_on_fault", 2)
    assert (plan.scenario.guest.profile_user, plan.scenario.guest.profile_kernel) == (True, False)


def test_a_preset_of_the_user_s_without_a_policy_is_told(run: Run, laboratory: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "plain.yaml").write_text("# @package _global_\nseed: 4\n")
    answer = run("--config-dir", "mine", "+experiment=plain")
    assert answer.status == 2
    assert "no policy is chosen" in answer.err
    assert run("--config-dir", "mine", "+experiment=plain", "+policy=eager_pin", "host=silent").status == 0
    assert laboratory.plans[0].scenario.seed == 4


def test_a_variant_of_a_policy_in_the_user_s_folder(run: Run, laboratory: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "policy"
    folder.mkdir(parents=True)
    (folder / "kept.yaml").write_text("defaults:\n  - eager_pin\n  - _self_\nkeep_mapped: true\n")
    assert run("--config-dir", "mine", "+policy=kept", "host=silent").status == 0
    (plan,) = laboratory.plans
    assert plan.chosen == "eager_pin"
    assert plan.policies["eager_pin"].keep_mapped is True


@pytest.mark.parametrize("arguments", [["--cfg", "job"], ["--cfg", "job", "--resolve"], ["--info", "defaults-tree"]])
def test_the_configuration_can_be_looked_at(run: Run, laboratory: Any, arguments: list[str]) -> None:
    answer = run("+policy=eager_pin", *arguments)
    assert answer.status == 0
    assert "eager_pin" in answer.out
    assert not laboratory.plans
    assert not list(Path().iterdir())


def test_the_configuration_can_be_looked_at_without_a_policy(run: Run) -> None:
    answer = run("--cfg", "job")
    assert answer.status == 0
    assert "policy: ???" in answer.out


def test_an_interrupted_run_prints_what_finished_and_ends_with_130(run: Run, laboratory: Any) -> None:
    laboratory.answer.interrupted = True
    answer = run("+policy=eager_pin", "host=silent")
    assert answer.status == 130
    assert "the summary" in answer.out
    assert answer.err == "interrupted\n"


def test_an_interruption_ends_a_sweep(run: Run, laboratory: Any) -> None:
    laboratory.answer = KeyboardInterrupt()
    answer = run(*ONE_BY_ONE, "+policy=eager_pin", "seed=1,2,3", "host=silent")
    assert answer.status == 130
    assert len(laboratory.plans) == 1


def test_the_whole_program_without_tracking_never_imports_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys; from spepolicy.cli import main; status = main(sys.argv[1:]);"
        "sys.exit('mlflow was imported' if 'mlflow' in sys.modules else status)"
    )
    arguments = ["+policy=eager_pin", "tracking=none", "duration=2ms", "replicates=2", "host=silent"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    (metrics,) = tmp_path.glob("outputs/*/*/metrics.json")
    assert metrics.stat().st_size > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outputs"]
