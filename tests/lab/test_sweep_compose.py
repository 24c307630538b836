"""Jobs are composed fast, to what Hydra composes them to, with its errors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from spepolicy.errors import ConfigurationError, SpePolicyError
from spepolicy.lab.sweep.compose import Composer
from spepolicy.lab.sweep.jobs import configurations_of, make_jobs, one_for_all


@pytest.fixture
def loader() -> Iterator[tuple[Any, Any]]:
    """Hydra's loader of conf/, and the configuration that a sweep without overrides is composed to."""
    from hydra import initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    from spepolicy.config import register
    from spepolicy.launch import register_policies

    register()
    register_policies()
    with initialize_config_module("spepolicy_conf", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        yield loader, loader.load_configuration("config", [], run_mode=RunMode.MULTIRUN)


def by_hydra(loader: tuple[Any, Any], overrides: list[str]) -> Any:
    from omegaconf import OmegaConf, open_dict

    cfg = loader[0].load_sweep_config(loader[1], overrides)
    with open_dict(cfg):
        del cfg["hydra"]
    return OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)


AXES = [
    ["+policy=eager_pin", "+policy=pin_on_fault"],
    ["host=silent", "host=random", "host=recorded"],
    ["guest.buffer=1MiB", "guest.buffer=4MiB"],
    ["guest.filter.load=true", "guest.filter.events=[retired]"],
    ["seed=1", "seed=7"],
]
ODD = [
    ["+policy=eager_pin", "policy.keep_mapped=true", "policy.pin_stage1_tables=false"],
    ["+policy=eager_pin", "host=random", "+host.ops.reclaim={every: 1ms, pages: 3}", "host.ops.numa_scan.pages=5"],
    ["+policy=eager_pin", "host=random", "~host.ops.numa_scan"],
    ["+policy=eager_pin", "tracking.experiment=${seed}", "seed=5"],
    ["+policy=eager_pin", "tracking.experiment=seed ${seed}", "baselines=[]"],
    ["+policy=eager_pin", "workload=compressor", "workload.source=mine", "cpu=neoverse_n2", "threads=null"],
    ["+policy=eager_pin", "baselines=[]", "baselines=[pin_on_fault]"],
    ["+policy=eager_pin", "+experiment=el0_only", "replicates=3"],
    ["+policy=eager_pin", "host=random", "host.ops.numa_scan={pages: 3}", "host.ops.numa_scan.pages=9"],
    ["seed=3"],
]


@pytest.mark.parametrize("overrides", ODD, ids=" ".join)
def test_odd_overrides_give_what_hydra_gives(loader: tuple[Any, Any], overrides: list[str]) -> None:
    composer = Composer(*loader)
    for _ in range(2):  # the second time from what is kept
        assert composer.compose(overrides) == by_hydra(loader, overrides)


def test_combinations_give_what_hydra_gives(loader: tuple[Any, Any]) -> None:
    """All of them from one composer, so that no job leaves a trace in another."""
    composer = Composer(*loader)
    jobs = [list(job) for job in itertools.product(*AXES)]
    composed = [composer.compose(job) for job in jobs]
    for job, config in list(zip(jobs, composed, strict=True))[::7]:
        assert config == by_hydra(loader, job), job
    assert len({repr(config) for config in composed}) == len(jobs)


@pytest.mark.parametrize(
    ("override", "part"),
    [
        ("host=nope", "group 'host' has no 'nope'"),
        ("guest.bufer=1MiB", "guest.buffer"),
        ("guest.profile_user=3", "not true or false"),
        ("seed=abc", "seed"),
        ("policy.dely=3", "policy 'eager_pin' has no such field"),
        ("+policy=pin_vm", "more than once"),
        ("guest=1", "must be a string"),
    ],
)
def test_a_wrong_override_is_explained_and_harms_no_other_job(
    loader: tuple[Any, Any], override: str, part: str
) -> None:
    composer = Composer(*loader)
    good = ["+policy=eager_pin", "seed=3"]
    before = composer.compose(good)
    for _ in range(2):
        with pytest.raises(ConfigurationError) as caught:
            composer.compose([*good, override])
        assert part in str(caught.value)
        assert composer.compose(good) == before == by_hydra(loader, good)


def test_jobs_are_checked_one_by_one(loader: tuple[Any, Any]) -> None:
    buffers = ["1MiB", "1MB", "2MiB", "1GiB"]
    overrides = [["+policy=eager_pin", "host=silent", f"guest.buffer={size}"] for size in buffers]
    jobs, failures = make_jobs(Composer(*loader), [*overrides, ["host=silent"]], 10)
    assert [job.number for job in jobs] == [10, 12]
    assert [failure.number for failure in failures] == [11, 13, 14]
    assert "job 11 (+policy=eager_pin host=silent guest.buffer=1MB): guest.buffer=1MB" in failures[0].message()
    assert "no policy is chosen" in failures[2].message()


def test_seeds_are_lanes_of_one_configuration_and_baselines_are_shared(loader: tuple[Any, Any]) -> None:
    policies, buffers, seeds = ["eager_pin", "pin_on_fault", "bare_metal"], ["1MiB", "1024KiB", "2MiB"], [1, 2, 5]
    overrides = [
        [f"+policy={policy}", f"guest.buffer={size}", f"seed={seed}", "host=silent", "replicates=3"]
        for policy in policies
        for size in buffers
        for seed in seeds
    ]
    jobs, failures = make_jobs(Composer(*loader), overrides, 0)
    assert not failures
    configurations = configurations_of(jobs)
    assert {key: c.key for key, c in configurations.items()} == {key: key for key in configurations}
    found = [(c.policy.name, c.params.get("guest.buffer"), c.role) for c in configurations.values()]
    # 1MiB and 1024KiB are one size, so one configuration.
    assert sorted(found) == [
        ("bare_metal", "1MiB", "chosen"), ("bare_metal", "2MiB", "chosen"),
        ("eager_pin", "1MiB", "chosen"), ("eager_pin", "2MiB", "chosen"),
        ("pin_on_fault", "1MiB", "chosen"), ("pin_on_fault", "2MiB", "chosen"),
        ("pin_vm", "1MiB", "baseline"), ("pin_vm", "2MiB", "baseline"),
    ]  # fmt: skip
    assert all(c.lanes == {1: 3, 2: 3, 5: 3} for c in configurations.values())
    assert len({c.scenario_key for c in configurations.values()}) == 2
    assert len({id(c.scenario.workload) for c in configurations.values()}) == 1


def test_what_belongs_to_the_sweep_cannot_be_swept(loader: tuple[Any, Any]) -> None:
    overrides = [["+policy=eager_pin", "host=silent", f"threads={n}"] for n in (1, 2)]
    jobs, _ = make_jobs(Composer(*loader), overrides, 0)
    with pytest.raises(SpePolicyError, match="threads: job 0 has 1, job 1 has 2"):
        one_for_all(jobs)
