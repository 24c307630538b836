"""Whatever the user can correct gets one message with key, value, rule and remedy, exit status 2, and no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from spepolicy.errors import OutputError

Run = Callable[..., Any]

CASES: list[tuple[list[str], list[str]]] = [
    # keys
    (["guest.bufer=4MiB"], ["guest.bufer", "Did you mean 'guest.buffer'?"]),
    (["gest.buffer=4MiB"], ["gest.buffer", "Did you mean 'guest.buffer'?"]),
    (["+guest.bufer=4MiB"], ["guest.bufer", "Did you mean 'buffer'?"]),
    (["guest={bufer: 4MiB}"], ["guest.bufer", "Did you mean 'guest.buffer'?"]),
    (["+foo=3"], ["foo: there is no such setting"]),
    (["foo=3"], ["foo: there is no such setting"]),
    (["policy.keep=true"], ["policy 'eager_pin' has no such field", "Did you mean 'policy.keep_mapped'?"]),
    (["+policy.keep=true"], ["no field of that name", "Did you mean 'keep_mapped'?"]),
    (["host.ops.ksm.every=1s", "host=silent"], ["host.ops", "host=random"]),
    (["host.path=ksm", "host=silent"], ["host.path", "host=recorded"]),
    (["hydra.run.dirr=x"], ["hydra.run.dirr", "--hydra-help"]),
    (["~guest.buffer"], ["~guest.buffer: a setting cannot be deleted"]),
    (["~foo"], ["~foo: there is no such setting"]),
    (["~guest"], ["guest", "missing"]),
    # files of groups
    (["+experiment=first_loo"], ["group 'experiment' has no 'first_loo'", "Did you mean 'first_look'?"]),
    (["experiment=first_look"], ["Use +experiment=first_look"]),
    (["+guest=linux"], ["Write guest=NAME without +"]),
    (["guest@place=linux"], ["a group's place cannot be changed"]),
    (["task=explode"], ["group 'task' has no 'explode'", "Did you mean 'explore'"]),
    (["hydra/launcher=lames"], ["hydra/launcher", "has no 'lames'", "basic"]),
    # types
    (["seed=abc"], ["seed=abc: not a whole number"]),
    (["seed=null"], ["seed=null: it must have a value"]),
    (["guest.vcpus=1.5"], ["guest.vcpus=1.5: not a whole number", "1..64"]),
    (["guest.jitter=maybe"], ["guest.jitter=maybe: not true or false"]),
    (["guest.jitter=2"], ["guest.jitter=2: not true or false"]),
    (["guest.buffer=[1,2]"], ["guest.buffer", "not a single value", "16KiB..64MiB"]),
    (["guest.filter=3"], ["guest.filter is a group of settings", "guest.filter.NAME=VALUE"]),
    (["baselines=pin_vm"], ["baselines: not a list", "baselines=[pin_vm]"]),
    (["host=recorded", "host.time_scale=fast"], ["host.time_scale=fast: not a number"]),
    (["policy.keep_mapped=maybe"], ["policy.keep_mapped=maybe: not true or false"]),
    (["policy.keep_mapped=3"], ["policy.keep_mapped=3: not true or false"]),
    # units and ranges
    (["guest.buffer=4MB"], ["unknown unit 'MB'", "Did you mean 4MiB?"]),
    (["guest.buffer=4194304"], ["the unit is missing"]),
    (["duration=-1s"], ["negative"]),
    (["guest.vcpus=0"], ["too small", "guest.vcpus=1"]),
    (["guest.period=1000"], ["not a multiple of 256", "guest.period=1024"]),
    (["policy.el0_only=first"], ["one of error, documentation, first_fault", "Did you mean 'first_fault'?"]),
    (["host=recorded", "host.time_scale=nan"], ["not a finite number"]),
    # values that do not fit each other
    (["guest.vcpus=64"], ["guest.buffer=4MiB", "guest.memory=1GiB"]),
    # missing files
    (["host=recorded", "host.path=nmua"], ["nmua", "Did you mean 'numa'?"]),
    (["host=recorded", "host.path=no/such/file.npz"], ["no/such/file.npz"]),
    (["baselines=[pin_v]"], ["policy 'pin_v' is not installed", "Did you mean 'pin_vm'?"]),
    (["--config-dir", "no/such/folder"], ["no/such/folder"]),
    # how it is written
    (["seed=1,2"], ["seed=1,2: several values", "Add -m"]),
    (["seed=range(1,3)"], ["seed=range(1,3)", "Add -m"]),
    (["+policy=pin_vm"], ["chosen more than once", "-m +policy=A,B"]),
    (["+seed=3"], ["Change it without the +: seed=3"]),
    (["guest.buffer=[1"], ["guest.buffer=[1: cannot be parsed as KEY=VALUE"]),
    (["a b=3"], ["a b=3: cannot be parsed as KEY=VALUE"]),
    (["output.dir=${no.such}"], ["${no.such}", "does not exist"]),
    (["--foo"], ["unrecognized arguments: --foo"]),
    (["--cfg", "jobs"], ["invalid choice: 'jobs'"]),
    (["--resolve"], ["--resolve"]),
    (["--cfg", "job", "--info", "all"], ["Only one of"]),
]


@pytest.mark.parametrize(("arguments", "parts"), CASES, ids=[" ".join(case[0]) for case in CASES])
def test_one_message_and_status_2(run: Run, laboratory: Any, arguments: list[str], parts: list[str]) -> None:
    answer = run("+policy=eager_pin", *(["host=silent"] if "host=" not in str(arguments) else []), *arguments)
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert "Traceback" not in answer.err
    assert answer.err.count("\n") == 1
    for part in parts:
        assert part in answer.err
    assert not laboratory.plans


@pytest.mark.parametrize("arguments", [["+policy=[eager_pin,pin_vm]"], ["+policy=glob(e*)"], ["+policy="]])
def test_one_run_has_one_policy(run: Run, laboratory: Any, arguments: list[str]) -> None:
    answer = run(*arguments)
    assert answer.status == 2
    assert answer.err.startswith("error: ")
    assert answer.err.count("\n") == 1
    assert not laboratory.plans


def test_a_message_says_which_file_of_the_user_s_is_wrong(run: Run, laboratory: Any, tmp_path: Path) -> None:
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "odd.yaml").write_text("# @package _global_\nguest:\n  bufer: 4MiB\n")
    (folder / "torn.yaml").write_text("# @package _global_\nguest: [\n")
    (folder / "typed.yaml").write_text("# @package _global_\nguest:\n  vcpus: many\n")
    for name, parts in {
        "odd": ["guest.bufer", "Did you mean 'guest.buffer'?", "experiment/odd.yaml"],
        "torn": ["torn.yaml"],
        "typed": ["guest.vcpus=many", "not a whole number", "experiment/typed.yaml"],
    }.items():
        answer = run("--config-dir", "mine", "+policy=eager_pin", f"+experiment={name}")
        assert answer.status == 2
        assert "Traceback" not in answer.err
        for part in parts:
            assert part in answer.err


def test_a_folder_that_cannot_be_written(run: Run, laboratory: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    for arguments in (["output.dir=file/below"], ["-m", "output.dir=file/below"]):
        answer = run("+policy=eager_pin", "host=silent", *arguments)
        assert answer.status == 2
        assert answer.err.startswith("error: the run's folder")
        assert "file/below" in answer.err
        assert "output.dir=FOLDER" in answer.err
        assert answer.err.count("\n") == 1
    assert not laboratory.plans


def test_a_configuration_file_that_cannot_be_read(
    run: Run, laboratory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = OmegaConf.load

    def refuse(file: Any) -> Any:
        if "odd.yaml" in str(getattr(file, "name", "")):  # root may read everything, so no real permission is tested
            raise PermissionError(13, "Permission denied", file.name)
        return load(file)

    monkeypatch.setattr(OmegaConf, "load", refuse)
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    (folder / "odd.yaml").write_text("# @package _global_\n")
    answer = run("--config-dir", "mine", "+policy=eager_pin", "+experiment=odd")
    assert answer.status == 2
    assert "odd.yaml' cannot be read: Permission denied" in answer.err


def test_what_the_laboratory_cannot_write_is_told(run: Run, laboratory: Any) -> None:
    laboratory.answer = OutputError("metrics.json cannot be written: no space left. Free some.")
    answer = run("+policy=eager_pin", "host=silent")
    assert (answer.status, answer.err) == (2, "error: metrics.json cannot be written: no space left. Free some.\n")


@pytest.mark.parametrize("arguments", [["guest.vcpus=0"], ["guest.bufer=1MiB"], ["guest=linx"]])
def test_hydra_full_error_shows_a_traceback_too(
    run: Run, laboratory: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> None:
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    answer = run("+policy=eager_pin", "host=silent", *arguments)
    assert answer.status == 2
    assert "Traceback (most recent call last)" in answer.err
    assert answer.err.splitlines()[-1].startswith("error: ")


def test_a_bug_keeps_its_traceback(run: Run, laboratory: Any) -> None:
    laboratory.answer = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        run("+policy=eager_pin", "host=silent")
    laboratory.answer = OSError("a bug that looks like a full disk")
    with pytest.raises(OSError, match="a bug that looks like"):
        run("+policy=eager_pin", "host=silent")


@pytest.mark.parametrize("arguments", [["guest.vcpus=0"], ["guest.bufer=1MiB"], []])
def test_the_process_is_left_as_it_was(run: Run, laboratory: Any, arguments: list[str]) -> None:
    before = (list(sys.argv), dict(os.environ), Path.cwd())
    run("+policy=eager_pin", "host=silent", *arguments)
    assert (list(sys.argv), dict(os.environ), Path.cwd()) == before
