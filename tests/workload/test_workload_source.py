"""workload=file and workload=capture: what a file of one's own gives, and what is said if it gives nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from numpy.typing import NDArray

from spepolicy.capture_model import LEAST_RECORDS, clusters, describe_capture
from spepolicy.errors import CaptureError, ConfigurationError
from spepolicy.machine.data_addresses import KINDS, SHARE_BITS
from spepolicy.machine.scenario import Cpu, OpType, Workload
from spepolicy.perfdata import read
from spepolicy.perfdata.clock import conversion
from spepolicy.perfdata.elf import Symbol, symbol_image
from spepolicy.perfdata.layout import Feature, Mmap2, SpeConfig, Type
from spepolicy.perfdata.writer import Writer, dummy_event, spe_event
from spepolicy.spe.packets import encode
from spepolicy.spe.records import OpClass, Present, new_records
from spepolicy.units import parse_duration
from spepolicy.workload import build_workload, outcome_counts
from spepolicy.workload_source import workload_of

SHIPPED = Path(__file__).resolve().parents[2] / "conf" / "workload"
HOT_DATA, COLD_DATA, KERNEL_DATA = 0x5500_0000_0000, 0x7F00_0000_0000, 0xFFFF_0000_1000_0000
PERIOD = 2048
GHZ = 2.5


def build(**values: Any) -> Workload:
    return workload_of(values, Cpu.cycle_ps)


def test_a_file_gives_what_the_same_file_in_conf_gives(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text((SHIPPED / "lua_list.yaml").read_text())
    mine = build(kind="file", path=str(path))
    shipped = workload_of(yaml.safe_load(path.read_text()), Cpu.cycle_ps)
    assert mine.function_names == shipped.function_names
    assert (mine.alias_outcome == shipped.alias_outcome).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no such file"),
        ("[1, 2]", "a list or a single value"),
        ("a: [", "not YAML"),
        ("defaults: [latencies]\nsource: x", "defaults list"),
        ("source: x", "has no 'latencies'"),
    ],
)
def test_a_file_that_is_no_workload(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigurationError, match=message) as error:
        build(kind="file", path=str(path))
    assert "mine.yaml" in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_kinds_and_keys() -> None:
    with pytest.raises(ConfigurationError, match="Did you mean 'capture'"):
        build(kind="captur", path="x")
    with pytest.raises(ConfigurationError, match="no such key"):
        build(kind="file", path="x", thread=3)
    with pytest.raises(ConfigurationError, match=r"workload\.path=\./perf\.data"):
        build(kind="capture", path=None)


# ---- captures --------------------------------------------------------------------------------------------------------


def program(count: int, seed: int = 3) -> NDArray[Any]:
    """Records of a program that is known: two functions, `hot` in a first half and `cold` in a second, and the kernel.

    hot: 30 % loads from L1 (total 10 to 14), 20 % branches of which a tenth mispredicted, the rest other; 1 cycle an
    operation. cold: 50 % loads, half of them from DRAM (total 300 to 340) with a walk in a quarter, 10 % stores; 4
    cycles. Every tenth record is of the kernel. Data: 1 KiB for each of the three, 128 MiB for what comes from DRAM.
    """
    rng = np.random.default_rng(seed)
    records = new_records(count)
    cold = np.arange(count) >= count // 2
    kernel = np.arange(count) % 10 == 9
    draw = rng.random(count)
    load = np.where(cold, draw < 0.5, draw < 0.3)
    store = cold & (draw > 0.9)
    branch = ~cold & (draw > 0.8)
    far = load & cold & (rng.random(count) < 0.5)
    records["present"] = int(
        Present.PC | Present.OPERATION | Present.EVENTS | Present.TOTAL | Present.TIMESTAMP | Present.CONTEXT_EL1
    )
    records["pc"] = np.where(cold, 0x40_2000, 0x40_1000) + 4 * rng.integers(0, 40, count)
    records["pc"][kernel] = 0xFFFF_8000_0800_0000 + 4 * rng.integers(0, 16, kernel.sum(), np.uint64)
    records["pc_el"], records["pc_security"] = kernel, 1
    records["op_class"] = np.select([load | store, branch], [OpClass.LOAD_STORE, OpClass.BRANCH], OpClass.OTHER)
    records["op"] = store
    records["events_bytes"] = 2
    events = 2 | np.where(load | store, 1 << 2 | 1 << 4, 0) | np.where(far, 1 << 3 | 1 << 8 | 1 << 9, 0)
    events |= np.where(far & (draw < 0.125), 1 << 5, 0)
    events |= np.where(branch & (rng.random(count) < 0.1), 1 << 7, 0)
    records["events"] = events | np.where(branch & (rng.random(count) < 0.25), 1 << 6, 0)
    records["total_latency"] = np.where(far, 300 + rng.integers(0, 41, count), 10 + rng.integers(0, 5, count))
    records["context_el1"] = 1000
    records["present"][load | store] |= int(Present.VA)
    places = np.where(cold, np.uint64(COLD_DATA), np.uint64(HOT_DATA))
    places[kernel] = KERNEL_DATA
    places += 8 * rng.integers(0, np.where(far, 1 << 24, 1 << 7)).astype(np.uint64)
    records["va"] = np.where(load | store, places, 0)
    cycles = PERIOD * np.where(cold, 4, 1)
    records["timestamp"] = 10**6 + np.cumsum(cycles / GHZ).astype(np.int64)  # ns
    return records


def write(
    path: Path, records: NDArray[Any], *, config: SpeConfig = SpeConfig.TS, name: str = "nowhere/program"
) -> Path:
    events = [spe_event(PERIOD, config, [100]), dummy_event([101])]
    made = Writer(events, {Feature.CPUDESC: "a core"})
    made.open(conversion(1_000_000_000))
    made.add(Type.MMAP2, Mmap2(1000, 1000, 0x40_0000, 0x1_0000, 0, bytes(24), 5, 2, name))
    made.add_aux_data(encode(records, layout="neoverse"), offset=0, cpu=0)
    path.write_bytes(made.content())
    return path


@pytest.fixture(scope="module")
def capture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("capture") / "perf.data", program(20_000))


def test_a_capture_becomes_the_program_that_it_shows(capture: Path) -> None:
    description = describe_capture(read(capture), cpu_ghz=GHZ)
    hot, cold = description["behaviours"]["of program+0x1000"], description["behaviours"]["of program+0x2000"]
    assert hot["mix"]["load"] == pytest.approx(0.3, abs=0.02)
    assert hot["mix"]["branch"] == pytest.approx(0.2, abs=0.02)
    assert hot["mispredict"] == pytest.approx(0.1, abs=0.03)
    assert hot["taken"] == pytest.approx(0.75, abs=0.04)
    assert hot["served"] == {"l1": 1}
    assert cold["mix"]["load"] == pytest.approx(0.5, abs=0.02)
    assert cold["mix"]["store"] == pytest.approx(0.1, abs=0.02)
    assert cold["served"]["dram"] == pytest.approx(0.5, abs=0.02)
    assert cold["walk"] == pytest.approx(0.25, abs=0.05)
    assert hot["ipc"] == pytest.approx(1, rel=0.02)
    assert cold["ipc"] == pytest.approx(1 / 4, rel=0.02)
    assert description["latencies"]["l1"]["cycles"] == 10
    assert 300 <= description["latencies"]["dram"]["cycles"] <= 305


def test_addresses_are_those_of_the_records(capture: Path) -> None:
    description = describe_capture(read(capture), cpu_ghz=GHZ)
    workload = build_workload(description, where="capture")
    data = workload.data
    assert data is not None
    for name, begin, kind, size in (
        ("program+0x1000", HOT_DATA, "load", 1 << 10),
        ("program+0x1000", HOT_DATA, "load_miss", 1 << 10),  # it never misses: the extents of its hits stand in
        ("program+0x2000", COLD_DATA, "load", 1 << 10),
        ("program+0x2000", COLD_DATA, "load_miss", 1 << 27),
        ("program+0x2000", COLD_DATA, "store", 1 << 10),
        ("0xffff800008000000", KERNEL_DATA, "load", 1 << 10),
        ("0xffff800008000000", KERNEL_DATA, "load_miss", 1 << 27),
    ):
        number = int(data.list_of[workload.function_names.index(name), KINDS.index(kind)])
        mine = (data.below - 1) >> SHARE_BITS == number
        end = data.begin[mine] + data.places[mine].astype(np.uint64) * data.step[mine]
        assert int(data.begin[mine].min()) >= begin
        assert begin + 0.9 * size < int(end.max()) <= begin + size
        assert (data.step[mine] == 8).all()


def test_phases_and_the_kernel(capture: Path) -> None:
    description = describe_capture(read(capture), cpu_ghz=GHZ)
    phases = list(description["phases"].values())
    assert len(phases) == 2
    workload = build(kind="capture", path=str(capture), cpu_ghz=GHZ)
    # 10,000 records of 2,048 operations of 1 and of 4 cycles at 2.5 GHz.
    ideal = np.array([1, 4]) * 10_000 * PERIOD / GHZ * 1000
    assert workload.phase_ps == pytest.approx(ideal, rel=0.05)
    in_kernel = workload.syscall_ps / (workload.syscall_ps + workload.syscall_gap_ps)
    assert in_kernel == pytest.approx(0.1, abs=0.01)
    for number, offset in enumerate(("0x1000", "0x2000")):
        user = workload.weight[workload.phase_user[number]]
        assert user[workload.function_names.index(f"program+{offset}")] == 1
        kernel = workload.weight[workload.phase_kernel[number]]
        assert kernel[workload.function_names.index("0xffff800008000000")] == 1


def test_mean_latencies_are_those_of_the_records(capture: Path) -> None:
    records = read(capture).records
    workload = build(kind="capture", path=str(capture), cpu_ghz=GHZ)
    mean = workload.outcome_latency_cycles + workload.outcome_spread_cycles
    for function, low, high in (("program+0x1000", 0x40_1000, 0x40_2000), ("program+0x2000", 0x40_2000, 0x40_3000)):
        of_it = workload.outcome_function == workload.function_names.index(function)
        row = outcome_counts(workload)[workload.phase_user].sum(axis=0) * of_it
        inside = (records["pc"] >= low) & (records["pc"] < high)
        for op, chosen in ((OpType.LOAD, records["op_class"] == 1), (OpType.OTHER, records["op_class"] == 0)):
            weight = row * (workload.outcome_type == op)
            measured = records["total_latency"][inside & chosen & (records["op"] == 0)].mean()
            assert (mean * weight).sum() / weight.sum() == pytest.approx(measured, rel=0.05)


def test_what_a_capture_does_not_say_is_said(tmp_path: Path) -> None:
    path = write(tmp_path / "perf.data", program(5000), config=SpeConfig.TS | SpeConfig.LOAD)
    source = describe_capture(read(path))["source"]
    assert "5,000 SPE records of perf.data" in source
    assert "only loads were recorded" in source
    assert "a core" in source


def test_captures_that_make_no_workload(tmp_path: Path, capture: Path) -> None:
    path = write(tmp_path / "short.data", program(LEAST_RECORDS - 1))
    with pytest.raises(CaptureError, match="99 records"):
        build(kind="capture", path=str(path))
    records = program(1000)
    records["present"] &= ~np.uint32(Present.PC)
    with pytest.raises(CaptureError, match="0 records"):
        build(kind="capture", path=str(write(tmp_path / "blind.data", records)))
    with pytest.raises(ConfigurationError, match="Most are of 1000"):
        build(kind="capture", path=str(capture), thread=7)
    with pytest.raises(ConfigurationError, match="GHz"):
        build(kind="capture", path=str(capture), cpu_ghz=50)
    (tmp_path / "not.data").write_bytes(b"nothing of the kind")
    with pytest.raises(CaptureError):
        build(kind="capture", path=str(tmp_path / "not.data"))


def test_without_times_and_period_only_time_is_unknown(tmp_path: Path) -> None:
    records = program(5000)
    records["present"] &= ~np.uint32(Present.TIMESTAMP)
    records["timestamp"] = 0
    description = describe_capture(read(write(tmp_path / "perf.data", records, config=SpeConfig(0))))
    assert description["behaviours"]["of program+0x1000"]["ipc"] == 1
    assert len(description["phases"]) == 2


def test_clusters() -> None:
    pcs = np.array([0x1000, 0x1004, 0x1100, 0x1240, 0x1FC0, 0x2000, 0x9000], np.uint64)
    assert clusters(pcs).tolist() == [0x1000, 0x1000, 0x1000, 0x1240, 0x1FC0, 0x2000, 0x9000]
    assert clusters(pcs[:0]).tolist() == []


def test_symbols_of_a_mapped_file_name_functions(tmp_path: Path) -> None:
    image = symbol_image([Symbol("hot", 0x1000, 0x1000), Symbol("cold", 0x2000, 0x1000)], 0x1_0000)
    (tmp_path / "program").write_bytes(image.content)
    path = write(tmp_path / "perf.data", program(2000), name=str(tmp_path / "program"))
    functions = describe_capture(read(path))["functions"]
    assert {"hot", "cold", "0xffff800008000000"} <= set(functions)


@pytest.mark.slow
def test_a_simulated_capture_gives_back_the_program_that_was_simulated(tmp_path: Path) -> None:
    """From a workload to the machine, to perf.data as perf in the guest would have written it, and back."""
    command = [sys.executable, "-m", "spepolicy", "+policy=bare_metal", "workload=sqlite", "duration=50ms"]
    command += ["replicates=1", "host=silent", "tracking=none", "output.perf_data=true", f"output.dir={tmp_path}/run"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (capture,) = (tmp_path / "run").rglob("bare_metal*.perf.data")
    found = describe_capture(read(capture))
    true = yaml.safe_load((SHIPPED / "sqlite.yaml").read_text())
    # Of some 60,000 records a function with 1 % of the time has 600: its mix is known within 6 points.
    spent: dict[str, float] = {}
    for phase in found["phases"].values():
        for name, share in found["distributions"][phase["user"]].items():
            spent[name] = spent.get(name, 0) + share * parse_duration(phase["length"], "length") / 50e9
    known = set(true["functions"]) - {"(other code)", *true["distributions"]["kernel"], "other_task"}
    compared = {name for name, share in spent.items() if share > 0.01} & known
    for name in compared:
        behaviour = found["behaviours"][f"of {name}"]
        for kind, share in true["behaviours"][f"of {name}"]["mix"].items():
            assert behaviour["mix"].get(kind, 0) == pytest.approx(share, abs=0.06), (name, kind)
    assert len(compared) > 5
    largest = max(found["distributions"].values(), key=lambda shares: shares.get("sqlite3VdbeExec", 0))
    assert largest["sqlite3VdbeExec"] > 0.2
    in_kernel = [name for name in found["functions"] if name in true["distributions"]["kernel"]]
    assert in_kernel
