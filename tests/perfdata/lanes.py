"""Lanes that many things happen in, run with their event log on, for the tests of their perf.data."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

from spepolicy.description import Node
from spepolicy.drivers.result import LaneLog
from spepolicy.drivers.simulate import record_lane
from spepolicy.machine.hostops import HostOp
from spepolicy.machine.scenario import Cpu, Scenario, SessionMode
from spepolicy.workload_data import build_data
from tests.properties.scenarios import US, WORKLOAD, busy_host, guest, policy
from tests.properties.scenarios import scenario as usual_scenario

# perf takes names of one letter for types of C++ (from 6.12 on).
NAMED = replace(WORKLOAD, function_names=("parse", "look_up", "chase", "tcp_sendmsg"))
# Where two of them access memory: heap, stack and more.
RECORDED = replace(
    NAMED,
    data=build_data(
        Node(
            {
                "regions": {
                    "[stack]": "0x5500000000+16384", "[heap]": "0x5510000000+1048576", "anon": "0x5520000000+65536"
                },
                "functions": {
                    "parse": {"load": "0x5500000100+256/8 0.5, 0x5510000000+65536/8 0.5"},
                    "look_up": {"load": "0x5510000000+1048576/8 0.8, 0x5520000000+65536/4 0.2"},
                    "chase": {"load": "0x5510000000+1048576/8 0.7, 0x5520000000+65536/4 0.3"},
                },
            },
            "data",
            "test",
        ),
        NAMED.function_names,
    ),
)  # fmt: skip
NEOVERSE, PACKED = Cpu(), Cpu(align_bytes=1)
MOVING = busy_host(HostOp.MOVE, interval_ps=300 * US, pages=200)


def scenario(**changes: Any) -> Scenario:
    """Return the scenario of the property tests, with functions that have names."""
    return usual_scenario(workload=NAMED, **changes)


# Name -> policy and scenario. Between them: faults, full buffers, no space, collisions, new buffers, both sessions, two
# vCPUs, filters, records of fixed and of variable size, a counter of 1 GHz.
LANES: dict[str, tuple[str, dict[str, Any], Scenario]] = {
    "neoverse": ("eager_pin", {}, scenario(cpu=NEOVERSE, host=MOVING)),
    "two_vcpus": (
        "pin_on_fault",
        {},
        scenario(cpu=NEOVERSE, host=MOVING, guest=guest(vcpus=2, session=SessionMode.PER_CPU)),
    ),
    "new_buffers": ("map_on_fault", {}, scenario(cpu=NEOVERSE, host=MOVING, guest=guest(renew_ps=400 * US))),
    "slow_reader": ("bare_metal", {}, scenario(cpu=NEOVERSE, guest=guest(reader_latency_ps=2000 * US, period_ops=256))),
    "filtered": ("bare_metal", {}, scenario(cpu=Cpu(spe_version=3), guest=guest(type_filter=6, min_latency_cycles=20))),
    "el1_only": ("bare_metal", {}, scenario(cpu=NEOVERSE, guest=guest(profile_user=False))),
    "large_records": ("bare_metal", {}, scenario(cpu=Cpu(max_record_bytes=256, align_bytes=256))),
    "recorded": ("bare_metal", {}, replace(scenario(cpu=NEOVERSE), workload=RECORDED)),
    "packed": ("bare_metal", {}, scenario(cpu=PACKED)),
    # KVM's own buffer, copied to the guest's: as long as the guest's, and shorter, so that it is copied several times.
    "own_buffer": ("copy_buffer", {}, scenario(cpu=NEOVERSE, guest=guest(vcpus=2))),
    "own_buffer_packed": (
        "copy_buffer",
        {"buffer_KiB": 8},
        scenario(cpu=PACKED, guest=guest(buffer_pages=16, period_ops=256)),
    ),
}
_LONG = {"buffer_pages": 16, "period_ops": 1024, "task_on_ps": 1000 * US, "task_off_ps": 200 * US}
_SCANNED = busy_host(HostOp.NUMA_SCAN, interval_ps=300 * US, pages=300)
# PMBSR_EL1.DL is set here: records are cut, and what perf makes of the halves is its own.
CUT: dict[str, tuple[str, dict[str, Any], Scenario]] = {
    "cut": ("pin_on_fault", {}, scenario(cpu=PACKED, host=_SCANNED, guest=guest(**_LONG))),
    "cut_two_vcpus": ("pin_on_fault", {}, scenario(cpu=PACKED, host=_SCANNED, guest=guest(vcpus=2, **_LONG))),
}
# A policy that resumes after such a fault: a half stays in the middle of the stream, and nothing announces it.
RESUMED = {"resumed": ("map_on_fault", {}, scenario(cpu=PACKED, host=_SCANNED, guest=guest(**_LONG)))}


@cache
def lane(name: str) -> LaneLog:
    """Return the lane *name* of `LANES`, `CUT` or `RESUMED`."""
    policy_name, fields, what = (LANES | CUT | RESUMED)[name]
    return record_lane(what, policy(policy_name, **fields), name=policy_name, replicate=0)
