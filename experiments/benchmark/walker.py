"""Measure how fast the walker is, beside its own source without compilation (see README.md)."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hydra import compose, initialize_config_module
from numpy.typing import NDArray
from table import Row, add_json, deliver, load_average, say

from spepolicy.config import register, to_scenario
from spepolicy.drivers.compiling import compile_machine
from spepolicy.drivers.simulate import simulate
from spepolicy.jit import COMPILED
from spepolicy.mmu import Memory, Region, Tables, at, kvm_vtcr
from spepolicy.mmu.tables import S1_LEAF, S2_LEAF
from spepolicy.mmu.walker import OA_MASK, S2_WRITE, VALID
from spepolicy.plugins import build_policy
from spepolicy.units import parse_duration

MIN_BATCH = 10e6
MIN_ONE = 3e6
MIN_RATIO = 500
# data/mmu README: a cold nested walk of 24 reads in the emulator, and the plain walker that made the golden answers.
EMULATOR = "0.25 to 0.33 M"
REFERENCE = "10,864"

SPACE_BYTES = 1 << 24  # physical memory that each address space has for its tables
READS = 24  # 4 levels of stage 1, each through 4 of stage 2, and 4 for the data

# Stage 1 and stage 2 of 4 levels and 48 bits. Without HA, as every page has its access flag.
VTCR = kvm_vtcr(48) & ~(1 << 21)
TCR = 16 | (1 << 7) | (16 << 16) | (2 << 30) | (5 << 32)


@dataclass(frozen=True)
class Queries:
    """Walks to do: addresses, each in one of the spaces of the registers."""

    memory: Memory
    registers: dict[str, Any]
    va: NDArray[np.uint64]
    space: NDArray[np.int64] | None

    def walk(self, threads: int | None) -> float:
        """Do all walks, as stores by EL1; return the seconds."""
        begin = time.perf_counter()
        par = at("S12E1W", self.va, self.registers, self.memory, space=self.space, threads=threads)
        seconds = time.perf_counter() - begin
        if np.any(par & np.uint64(1)):
            raise AssertionError("a walk faulted")
        return seconds


def build(spaces: int, walks: int, seed: int, buffer_pages: int = 64, layouts: int = 8) -> Queries:
    """Make *spaces* address spaces, each with a buffer of pages scattered in IPA and PA, and *walks* queries that go
    from space to space and through the buffer of each.

    *layouts* different ones are built; the others are copies of these at other physical addresses.
    """
    rng = np.random.default_rng(seed)
    memory = Memory(pages=1)
    roots2, roots1, starts = [], [], []
    for n in range(min(layouts, spaces)):
        roots = _build_space(memory, n, rng, buffer_pages)
        roots2.append(roots[0])
        roots1.append(roots[1])
        starts.append(roots[2])
    _copy_spaces(memory, layouts, spaces)
    layout = np.arange(spaces) % layouts
    registers = {
        "HCR_EL2": (1 << 31) | 1,
        "VTCR_EL2": VTCR,
        "VTTBR_EL2": np.array(roots2, dtype=np.uint64)[layout] + _shift(np.arange(spaces), layouts),
        "TCR_EL1": TCR,
        "TTBR0_EL1": 0,
        "TTBR1_EL1": np.array(roots1, dtype=np.uint64)[layout],
        "MAIR_EL1": 0xFF,
        "SCTLR_EL1": 1,
        "PAN": 0,
    }
    per_space = max(min(buffer_pages, walks // spaces), 1)
    number = np.arange(walks)
    space = number // per_space % spaces
    page = number % per_space
    va = np.array(starts, dtype=np.int64)[layout][space] + page * 4096
    return Queries(memory, registers, va.view(np.uint64), space if spaces > 1 else None)


def _shift(space: NDArray[np.int64], layouts: int) -> NDArray[np.uint64]:
    return (space // layouts * layouts * SPACE_BYTES).astype(np.uint64)


def _build_space(memory: Memory, n: int, rng: np.random.Generator, pages: int) -> tuple[int, int, int]:
    """Build one address space; return its roots at stage 2 and 1, and the first address of its buffer."""
    lo = (1 << 32) + n * SPACE_BYTES
    host = Region(lo, lo + SPACE_BYTES // 2)
    backing = Region(lo + SPACE_BYTES // 2, lo + SPACE_BYTES)
    stage2 = Tables.stage2(memory, VTCR, host.take)
    guest_pages = iter((0x4_0000 + rng.permutation(1 << 16)).tolist())

    def take(size: int) -> int:
        """Give the guest a page for a table, somewhere in its memory, and back it."""
        ipa = next(guest_pages) << 12
        stage2.map(ipa, backing.take(size), size, S2_LEAF | S2_WRITE)
        return int(ipa)

    stage1 = Tables.stage1(memory, TCR, take, upper=True, through=stage2)
    start = -(1 << 47) + int(rng.integers(1 << 20)) * pages * 4096
    for page in range(pages):
        ipa = next(guest_pages) << 12
        # The content of data pages is of no interest: all of a space are backed by one frame.
        stage2.map(ipa, lo, 4096, S2_LEAF | S2_WRITE)
        stage1.map(start + page * 4096, ipa, 4096, S1_LEAF)
    return stage2.root, stage1.root, start


def _copy_spaces(memory: Memory, layouts: int, spaces: int) -> None:
    """Copy the first *layouts* spaces to all others: stage 2 tables are moved, stage 1 tables hold IPA and stay."""
    addresses, content = memory.pages()
    is_stage2 = (addresses % np.uint64(SPACE_BYTES)) < np.uint64(SPACE_BYTES // 2)
    valid = (content & np.uint64(VALID) != 0) & (content & np.uint64(OA_MASK) != 0) & is_stage2[:, None]
    for first in range(layouts, spaces, layouts):
        shift = np.uint64(first * SPACE_BYTES)
        number = (addresses - np.uint64(1 << 32)) // np.uint64(SPACE_BYTES) + np.uint64(first)
        wanted = number < spaces
        memory.add_pages((addresses + shift)[wanted], np.where(valid, content + shift, content)[wanted])


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print one table, and return 0 if every bar is met, 1 if not."""
    options = _options(arguments)
    if options.plain:
        queries = build(1, options.walks, 1)
        print(options.walks / queries.walk(1))
        return 0
    load_before = load_average()
    return deliver([*_walks(options), *_share(options)], load_before, options.json)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--spaces", type=int, default=1000, help="address spaces of the batch (default 1000, as the bar says)")
    add("--walks", type=int, default=4_000_000, help="walks of each run (default 4 million)")
    add("--plain-walks", type=int, default=2000, help="walks of the interpreted form (default 2000)")
    add("--threads", type=int, default=None, help="at most that many (default: one per processor)")
    add("--repeats", type=int, default=5, help="runs of each kind; the median counts (default 5)")
    add("--duration", default="20ms", help="guest time of the engine's run (default 20ms)")
    add_json(parser)
    add("--plain", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("spaces", "walks", "plain_walks", "repeats"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(options, name)}, but must be at least 1")
    return options


def _walks(options: argparse.Namespace) -> list[Row]:
    say("building the address spaces")
    batch = build(options.spaces, options.walks, 1)
    one = build(1, options.walks, 1)
    for queries in (batch, one):
        queries.walk(options.threads)  # compiles or loads the walker, and touches the memory
    batch_rates, one_rates, plain_rates = [], [], []
    for repeat in range(options.repeats):
        say(f"run {repeat + 1} of {options.repeats}")
        batch_rates.append(options.walks / batch.walk(options.threads))
        one_rates.append(options.walks / one.walk(options.threads))
        plain_rates.append(_plain(options.plain_walks))
    many, single, plain = (statistics.median(rates) for rates in (batch_rates, one_rates, plain_rates))
    return [
        _rate(f"{options.spaces:,} address spaces: walks/s", many, plain, ">= 10 M", MIN_BATCH),
        _rate("one address space: walks/s", single, plain, ">= 3 M", MIN_ONE),
        Row("the same source as plain Python, one space: walks/s", f"{plain:,.0f}"),
        _ratio("times plain Python, batch", many / plain),
        _ratio("times plain Python, one space", single / plain),
        Row("the emulator, cold (reference data): walks/s", EMULATOR),
        Row("the reference's plain Python walker (its data): walks/s", REFERENCE),
        Row("descriptors read in a walk", str(READS)),
        Row("table pages of the batch, MiB", f"{batch.memory.used * 4096 / 2**20:.0f}"),
    ]


def _rate(figure: str, walks_per_s: float, plain: float, bar: str, least: float) -> Row:
    peer = f"{walks_per_s / plain:,.0f} times plain Python"
    return Row(figure, f"{walks_per_s / 1e6:.2f} M", bar, walks_per_s >= least, peer)


def _ratio(figure: str, ratio: float) -> Row:
    return Row(figure, f"{ratio:,.0f}", f">= {MIN_RATIO}", ratio >= MIN_RATIO, f"{ratio:,.0f} times plain Python")


def _plain(walks: int) -> float:
    """Return the walks per second of the interpreted form, in a process of its own."""
    command = [sys.executable, __file__, "--plain", "--walks", str(walks)]
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout)


def _share(options: argparse.Namespace) -> list[Row]:
    """Estimate the share of the engine's time that translation takes: its walks, at the price of a read here."""
    register()
    with initialize_config_module("spepolicy_conf", version_base="1.3"):
        main_job = to_scenario(compose("config", overrides=["guest.vcpus=1"]))
    scenario = replace(main_job, duration_ps=parse_duration(options.duration, "--duration"))
    policy = build_policy("eager_pin", {})
    compile_machine(say)
    say("running the engine")
    simulate(scenario, policy, name="eager_pin", replicates=range(2), threads=1)
    begin = time.process_time()
    result = simulate(scenario, policy, name="eager_pin", replicates=range(64), threads=1)
    engine_s = time.process_time() - begin
    one = build(1, min(options.walks, 1_000_000), 1)
    one.walk(1)
    begin = time.process_time()
    one.walk(1)
    read_s = (time.process_time() - begin) / len(one.va) / READS
    walks, reads = int(result.truth["walks"].sum()), int(result.truth["walk_reads"].sum())
    return [
        Row("engine, eager_pin: walks for 1,000 samples", f"{1000 * walks / result.samples:.1f}"),
        Row("engine, eager_pin: share of time in walks", f"{100 * reads * read_s / engine_s:.1f} %"),
    ]


if __name__ == "__main__":
    if not COMPILED and "--plain" not in sys.argv:
        print("INTERPRETED: no bar can be met", file=sys.stderr)
    sys.exit(main())
