"""A composed configuration becomes the scenario that it says, or an error that names key, value, rule and remedy."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spepolicy.config import to_options, to_scenario
from spepolicy.errors import ConfigurationError, RecordingError
from spepolicy.host_choice import host_notes
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import Costs, Cpu, ExternalAbort, Guest, HostKind, IrqDelivery, Kvm, OpType, SessionMode
from spepolicy.schema import CostSettings, CpuSettings, FilterSettings, GuestSettings, KvmSettings, settings_of

Composed = Callable[..., dict[str, Any]]


@pytest.fixture
def scenario(composed: Composed) -> Callable[..., Any]:
    return lambda *overrides: to_scenario(composed("host=silent", *overrides))


def test_the_default_is_what_the_files_say(composed: Composed) -> None:
    config = composed()
    built = to_scenario(config)
    assert built.duration_ps == 500 * 10**9
    assert built.guest.buffer_pages * 4096 == 4 * 2**20
    assert built.guest.ram_pages * 4096 == 256 * 2**20
    assert built.guest.ram_base == 2**30
    assert built.guest.session is SessionMode.PER_TASK
    assert built.guest.type_filter == 0
    assert built.kvm.memlock_pages * 4096 == 8 * 2**20
    assert not built.kvm.memlock_unlimited
    assert built.costs.trap_ps == 2_000_000
    assert built.host.kind is HostKind.RECORDED
    assert built.host.time_scale_q16 == 20 * 2**16
    assert built.workload.function_names
    options = to_options(config)
    assert (options.replicates, options.baselines, options.threads) == (8, ("bare_metal", "pin_vm"), None)


@pytest.mark.parametrize(
    ("target", "schemas", "special"),
    [
        (Cpu, [CpuSettings], {"features", "store_slip_q16"}),
        (
            Guest,
            [GuestSettings, FilterSettings],
            {"type_filter", "event_filter", "inverted_event_filter", "type_mask", "data_source_filter", "acts"},
        ),
        (Kvm, [KvmSettings], {"memlock_unlimited", "bug_rate_q16"}),
        (Costs, [CostSettings], set()),
    ],
)
def test_every_field_of_the_machine_s_parameters_has_a_setting(
    target: type, schemas: list[type], special: set[str]
) -> None:
    reached = [setting.to for schema in schemas for setting in settings_of(schema).values() if setting.to]
    assert len(reached) == len(set(reached))
    assert set(reached) | special == {item.name for item in dataclasses.fields(target)}


def convert(config: dict[str, Any]) -> None:
    to_scenario(config)
    to_options(config)


# A value for each setting of a group, different from the default, and what it becomes.
CHANGES = [
    ("cpu.spe_version=2", "cpu", "spe_version", 2),
    ("cpu.cycle=400ps", "cpu", "cycle_ps", 400),
    ("cpu.max_record=128B", "cpu", "max_record_bytes", 128),
    ("cpu.align=1B", "cpu", "align_bytes", 1),
    ("cpu.counter_bits=16", "cpu", "counter_bits", 16),
    ("cpu.hardware_access_flag=false", "cpu", "hardware_access_flag", False),
    ("cpu.data_loss_at_boundary=true", "cpu", "data_loss_at_boundary", True),
    ("cpu.tlb_entries=32", "cpu", "tlb_entries", 32),
    ("cpu.irq_latency=0", "cpu", "irq_latency_ps", 0),
    ("guest.vcpus=4", "guest", "vcpus", 4),
    ("guest.memory=512MiB", "guest", "ram_pages", 131072),
    ("guest.memory_base=2GiB", "guest", "ram_base", 2**31),
    ("guest.buffer=64MiB", "guest", "buffer_pages", 16384),
    ("guest.buffer=16KiB", "guest", "buffer_pages", 4),
    ("guest.buffer_mapped=false", "guest", "buffer_mapped", False),
    ("guest.session=per_cpu", "guest", "session", SessionMode.PER_CPU),
    ("guest.profile_user=false", "guest", "profile_user", False),
    ("guest.profile_kernel=false", "guest", "profile_kernel", False),
    ("guest.period=256", "guest", "period_ops", 256),
    ("guest.period=4294967040", "guest", "period_ops", 0xFFFFFF00),
    ("guest.jitter=false", "guest", "jitter", False),
    ("guest.filter.load=true", "guest", "type_filter", OpType.LOAD),
    ("guest.filter.branch=true", "guest", "type_filter", OpType.BRANCH),
    ("guest.filter.min_latency=100", "guest", "min_latency_cycles", 100),
    ("guest.filter.events=[l1d_refill,mispredicted]", "guest", "event_filter", (1 << 3) | (1 << 7)),
    ("guest.physical_addresses=true", "guest", "physical_addresses", True),
    ("guest.context=true", "guest", "context", True),
    ("guest.task_on=2ms", "guest", "task_on_ps", 2 * 10**9),
    ("guest.task_off=2ms", "guest", "task_off_ps", 2 * 10**9),
    ("guest.start=1us", "guest", "start_ps", 10**6),
    ("guest.stop=1us", "guest", "stop_ps", 10**6),
    ("guest.irq_entry=2us", "guest", "irq_entry_ps", 2 * 10**6),
    ("guest.irq_handler=1us", "guest", "irq_handler_ps", 10**6),
    ("guest.reader_latency=1us", "guest", "reader_latency_ps", 1_000_000),
    ("guest.reader_rate=2000", "guest", "reader_bytes_per_us", 2000),
    ("guest.renew=50ms", "guest", "renew_ps", 50 * 10**9),
    ("cpu.features=[ERnd]", "cpu", "features", ("ERnd",)),
    ("cpu.external_abort=asynchronous", "cpu", "external_abort", ExternalAbort.ASYNCHRONOUS),
    ("cpu.external_abort_every=1000", "cpu", "external_abort_every", 1000),
    ("cpu.pick_granule=2", "cpu", "pick_granule_ops", 2),
    ("cpu.store_slip=0.25", "cpu", "store_slip_q16", 1 << 14),
    ("kvm.exit_interval=0", "kvm", "exit_interval_ps", 0),
    ("kvm.preempt_interval=0", "kvm", "preempt_interval_ps", 0),
    ("kvm.preempt=2ms", "kvm", "preempt_ps", 2 * 10**9),
    ("kvm.memlock=0", "kvm", "memlock_pages", 0),
    ("kvm.memlock=unlimited", "kvm", "memlock_unlimited", True),
    ("kvm.irq_delivery=next_exit", "kvm", "irq_delivery", IrqDelivery.NEXT_EXIT),
    *[(f"costs.{name}=7us", "costs", setting.to, 7 * 10**6) for name, setting in settings_of(CostSettings).items()],
]


@pytest.mark.parametrize(("override", "part", "name", "value"), CHANGES, ids=[change[0] for change in CHANGES])
def test_a_setting_changes_its_field_and_no_other(
    scenario: Callable[..., Any], override: str, part: str, name: str, value: object
) -> None:
    base, changed = scenario(), scenario(override)
    assert getattr(getattr(changed, part), name) == value
    reset = dataclasses.replace(getattr(changed, part), **{name: getattr(getattr(base, part), name)})
    assert reset == getattr(base, part)
    for other in {"cpu", "guest", "kvm", "costs"} - {part}:
        assert getattr(changed, other) == getattr(base, other)


def test_type_filters_add_up(scenario: Callable[..., Any]) -> None:
    built = scenario("guest.filter.load=true", "guest.filter.store=true")
    assert built.guest.type_filter == OpType.LOAD | OpType.STORE


WRONG = [
    ("seed=-1", ["seed=-1", "negative"]),
    ("replicates=0", ["replicates=0", "too small", "1..1000000", "replicates=1."]),
    ("duration=0", ["too small", "duration=1us"]),
    ("duration=2000s", ["too large", "duration=1000s"]),
    ("duration=500", ["the unit is missing"]),
    ("threads=0", ["too small", "threads=1."]),
    ("guest.vcpus=65", ["too large", "1..64", "guest.vcpus=64"]),
    ("guest.buffer=3MiB", ["not a power of two", "16KiB..64MiB", "guest.buffer=4MiB"]),
    ("guest.buffer=8KiB", ["too small", "guest.buffer=16KiB"]),
    ("guest.buffer=128MiB", ["too large", "guest.buffer=64MiB"]),
    ("guest.memory=96MiB", ["not a power of two", "guest.memory=128MiB"]),
    ("guest.memory_base=1MiB", ["not a multiple of 2MiB", "guest.memory_base=2MiB"]),
    ("guest.period=1000", ["not a multiple of 256", "guest.period=1024"]),
    ("guest.period=0", ["too small", "guest.period=256"]),
    ("guest.period=4294967296", ["too large"]),
    ("guest.session=per_thread", ["one of per_task, per_cpu", "Did you mean"]),
    ("guest.filter.events=[retird]", ["any of retired", "Did you mean 'retired'?"]),
    ("guest.filter.events=[not_taken]", ["cpu.spe_version=1 cannot filter", "cpu.spe_version=3"]),
    ("guest.filter.events=[l1d_access]", ["cpu.spe_version=1 cannot filter", "cpu.spe_version=5"]),
    ("guest.filter.not_events=[l1d_refill]", ["needs FnE"]),
    ("guest.filter.exactly=[load]", ["needs EFT"]),
    ("guest.filter.data_sources=[dram]", ["needs FDS"]),
    ("guest.discard=true", ["no discard mode", "cpu.spe_version=3"]),
    ("cpu.features=[FDS]", ["FDS", "needs SPEv1p4", "cpu.spe_version=5"]),
    ("cpu.features=[ERndd]", ["Did you mean 'ERnd'?"]),
    ("cpu.late_fault_samples=1", ["before SPEv1p5", "cpu.spe_version=6"]),
    ("guest.filter.min_latency=5000", ["4095", "cpu.counter_bits=12"]),
    ("guest.task_on=5s", ["too large", "guest.task_on=4s"]),
    ("guest.renew=10us", ["too small", "1ms..4s or 0 (never)"]),
    ("cpu.spe_version=7", ["too large", "1..6"]),
    ("cpu.max_record=4KiB", ["too large", "cpu.max_record=2KiB"]),
    ("cpu.max_record=24B", ["not a power of two", "cpu.max_record=32B"]),
    ("cpu.align=128B", ["larger than cpu.max_record=64B", "cpu.align=64B", "cpu.max_record=128B"]),
    ("cpu.align=0B", ["too small", "cpu.align=1B"]),
    ("cpu.counter_bits=14", ["not a multiple of 4"]),
    ("cpu.tlb_entries=3", ["not a power of two"]),
    ("kvm.memlock=1000B", ["not a multiple of 4KiB", "kvm.memlock=4KiB"]),
    ("kvm.memlock=unlimitd", ["not a size"]),
    ("kvm.irq_delivery=later", ["one of forced_exit, next_exit"]),
    ("costs.trap=1s", ["too large", "costs.trap=100us"]),
]


@pytest.mark.parametrize(("override", "parts"), WRONG, ids=[wrong[0] for wrong in WRONG])
def test_a_wrong_value_names_key_value_rule_and_remedy(composed: Composed, override: str, parts: list[str]) -> None:
    config = composed("host=silent", override)
    with pytest.raises(ConfigurationError) as caught:
        convert(config)
    key = override.partition("=")[0]
    assert key in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["guest.profile_user=false", "guest.profile_kernel=false"], ["nothing is profiled"]),
        (["guest.buffer=64MiB", "guest.memory=128MiB"], ["a quarter of the memory", "guest.memory=256MiB"]),
        (["guest.vcpus=32"], ["guest.vcpus=32", "guest.memory=512MiB"]),
        (["cpu.spe_version=4", "cpu.hardware_access_flag=false"], ["not permitted", "cpu.hardware_access_flag=true"]),
        (["cpu.max_record=16B", "cpu.align=32B"], ["cpu.align=16B"]),
    ],
)
def test_values_that_do_not_fit_each_other(
    scenario: Callable[..., Any], overrides: list[str], parts: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        scenario(*overrides)
    for part in parts:
        assert part in str(caught.value)


def test_the_largest_guest_fits(scenario: Callable[..., Any]) -> None:
    built = scenario("guest.vcpus=64", "guest.buffer=64MiB", "guest.memory=16GiB")
    assert built.guest.vcpus * built.guest.buffer_pages * 4 == built.guest.ram_pages


class TestHost:
    def test_random_rows_are_ordered_by_operation_whatever_the_file_s_order(self, composed: Composed) -> None:
        config = composed("host=random")
        turned = copy.deepcopy(config)
        turned["host"]["ops"] = dict(reversed(turned["host"]["ops"].items()))
        rows = to_scenario(config).host.random_ops
        assert rows == to_scenario(turned).host.random_ops
        assert list(rows) == sorted(rows)

    def test_a_rate_of_0_leaves_the_operation_out(self, composed: Composed) -> None:
        rows = to_scenario(composed("host=random", "host.ops.ksm.every=0", "host.ops.fork.every=1s")).host.random_ops
        operations = {row[0]: row for row in rows}
        assert HostOp.KSM not in operations
        assert operations[HostOp.FORK] == (HostOp.FORK, 10**12, 65536)

    @pytest.mark.parametrize(
        ("override", "parts"),
        [
            ("host.ops.ksm.pages=0", ["host.ops.ksm.pages=0", "too small"]),
            ("host.ops.ksm.pages=65537", ["more than the guest has", "65536"]),
            ("host.ops.ksm.every=1", ["the unit is missing"]),
            ("host.ops.ksm.every=1us", ["too small", "10us"]),
        ],
    )
    def test_wrong_rates(self, composed: Composed, override: str, parts: list[str]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            to_scenario(composed("host=random", override))
        for part in parts:
            assert part in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "entry", "part"),
        [
            ("swap", {"every": "1s", "pages": 1}, "host.ops.swap: there is no such setting"),
            ("ksmd", {"every": "1s", "pages": 1}, "Did you mean 'ksm'?"),
            ("none", {"every": "1s", "pages": 1}, "host.ops.none: there is no such setting"),
            ("ksm", "1s", "host.ops.ksm={every: 10ms, pages: 1}"),
            ("ksm", {"every": "1s"}, "host.ops.ksm.pages is missing"),
            ("ksm", {"every": "1s", "page": 1}, "host.ops.ksm.page: there is no such setting"),
        ],
    )
    def test_wrong_operations(self, composed: Composed, name: str, entry: object, part: str) -> None:
        config = composed("host=random")
        config["host"]["ops"][name] = entry
        with pytest.raises(ConfigurationError) as caught:
            to_scenario(config)
        assert part in str(caught.value)

    def test_every_operation_can_be_given_a_rate(self, composed: Composed) -> None:
        names = set(composed("host=random")["host"]["ops"])
        assert names == {op.name.lower() for op in HostOp if op is not HostOp.NONE}

    def test_memory_is_what_the_host_says(self, composed: Composed) -> None:
        host = to_scenario(composed("host.kernel=6.12", "host.backing=thp", "host.mlock=true")).host
        assert (host.kernel, host.backing, host.locked) == (Kernel.V6_12, Backing.THP, True)
        with pytest.raises(ConfigurationError, match=r"6\.1 has no guest_memfd"):
            to_scenario(composed("host=numa", "host.backing=guest_memfd"))
        with pytest.raises(ConfigurationError, match=r"host\.backing=tph: must be one of"):
            to_scenario(composed("host=silent", "host.backing=tph"))

    def test_a_recording_is_placed(self, composed: Composed) -> None:
        """Into a smaller guest only if the user says how; the same settings give the same object, as batches need."""
        with pytest.raises(ConfigurationError, match=r"host.placement=scale"):
            to_scenario(composed("host.path=compact", "guest.memory=64MiB"))
        small = [
            to_scenario(composed("host.path=compact", "guest.memory=64MiB", f"host.placement={how}")).host.recording
            for how in ("scale", "fold", "fold")
        ]
        assert small[1] is small[2]
        assert all(recording.ram_pages == 16384 for recording in small)
        with pytest.raises(ConfigurationError, match="no event of the recording lies in the guest"):
            to_scenario(composed("host.path=compact", "host.offset=4GiB"))
        with pytest.raises(ConfigurationError, match="Did you mean 'reclaim'"):
            to_scenario(composed("host.unknown_op=reclame"))

    def test_a_trace_s_notes_count_what_became_no_event(self, composed: Composed, tmp_path: Path) -> None:
        trace = tmp_path / "host.trace"
        trace.write_text(
            "   lvmm   256 [001]     1.000000: kvm:kvm_entry: PC: 0x0\n"
            "   lvmm   256 [001]     1.000100: kp:s2_map: (0) addr=0x40000000 size=0x1000 phys=0x1 prot=0x6\n"
        )
        config = composed(f"host.path={trace}")
        notes = host_notes(config["host"], to_scenario(config))
        assert "1 kvm_entry (context)" in notes[-1]

    def test_an_own_trace_is_not_said_to_be_of_an_emulator(self, composed: Composed, tmp_path: Path) -> None:
        """A trace of hardware has its own durations: at any scale but 1 the note says so."""
        trace = tmp_path / "host.trace"
        trace.write_text("   lvmm   256 [001]     1.000100: kp:s2_map: (0) addr=0x40000000 size=0x1000 prot=0x6\n")
        told = {}
        for scale in ("1", "20"):
            config = composed(f"host.path={trace}", f"host.time_scale={scale}")
            told[scale] = host_notes(config["host"], to_scenario(config))[0]
            assert "emulator" not in told[scale]
        assert "play it with host.time_scale=1" in told["20"]
        assert "at its own pace" in told["1"]

    def test_a_recording_is_opened_by_name(self, composed: Composed) -> None:
        host = to_scenario(composed("host.path=ksm")).host
        recording: Any = host.recording
        assert recording.scenario == "ksm"
        assert len(recording) > 0

    def test_a_recording_that_is_not_there(self, composed: Composed) -> None:
        with pytest.raises(RecordingError, match="nmua"):
            to_scenario(composed("host.path=nmua"))

    def test_a_guest_smaller_than_the_recorded_one(self, composed: Composed) -> None:
        with pytest.raises(ConfigurationError, match=r"recorded from a guest of 256MiB.*guest\.memory=256MiB"):
            to_scenario(composed("guest.memory=128MiB"))

    @pytest.mark.parametrize(("scale", "part"), [("0", "too small"), ("nan", "not a finite"), ("1e9", "too large")])
    def test_wrong_time_scales(self, composed: Composed, scale: str, part: str) -> None:
        with pytest.raises(ConfigurationError, match=rf"host\.time_scale.*{part}"):
            to_scenario(composed(f"host.time_scale={scale}"))

    @pytest.mark.parametrize(
        ("overrides", "parts"),
        [
            (["host=silent"], ["silent"]),
            (["host=random"], ["assumptions"]),
            (
                ["host.time_scale=40"],
                ["numa", "Linux 6.1", "40 recording seconds", "durations are those of an emulator"],
            ),
        ],
    )
    def test_the_summary_is_told_what_the_host_assumes(
        self, composed: Composed, overrides: list[str], parts: list[str]
    ) -> None:
        config = composed(*overrides)
        text = " ".join(host_notes(config["host"], to_scenario(config)))
        for part in parts:
            assert part in text


@pytest.mark.parametrize(
    ("path", "value", "parts"),
    [
        (["guest", "bufer"], "4MiB", ["guest.bufer", "Did you mean 'buffer'?"]),
        (["foo"], 1, ["foo: there is no such setting"]),
        (["guest", "jitter"], 1, ["guest.jitter=1: not true or false"]),
        (["guest", "vcpus"], "many", ["guest.vcpus=many: not a count"]),
        (["guest"], 3, ["guest=3: not a group of settings"]),
        (["guest", "filter"], None, ["guest.filter=None: not a group"]),
        (["host", "kind"], "recored", ["host.kind=recored", "Did you mean 'recorded'?"]),
        (["tracking", "kind"], "wandb", ["tracking.kind=wandb", "one of mlflow, none"]),
        (["costs"], {}, ["costs.trap is missing"]),
    ],
)
def test_plain_containers_are_checked_as_hydra_s_are(
    composed: Composed, path: list[str], value: object, parts: list[str]
) -> None:
    config = composed()
    group = config
    for key in path[:-1]:
        group = group[key]
    group[path[-1]] = value
    with pytest.raises(ConfigurationError) as caught:
        convert(config)
    for part in parts:
        assert part in str(caught.value)


def test_the_workload_is_built_for_the_chosen_clock(composed: Composed) -> None:
    slow = to_scenario(composed("host=silent", "cpu.cycle=666ps")).workload.op_ps
    fast = to_scenario(composed("host=silent", "cpu.cycle=333ps")).workload.op_ps
    np.testing.assert_allclose(slow, 2 * fast, rtol=0.01)
