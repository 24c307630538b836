"""AT instructions in random address spaces: the walker against the architecture, every query of every class."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode does not
from golden import DATA, SHARED, Case, cases, classes, golden

from spepolicy.mmu import OPERATIONS, at

# NS of a success is UNKNOWN outside Secure state (mmu.md, PAR_EL1).
NS = np.uint64(1 << 9)


def differences(case: Case) -> list[str]:
    """Describe what the walker answers otherwise than the architecture."""
    memory = case.memory()
    par, abort = at(case.operations, case.va, case.registers, memory, with_aborts=True)
    unknown = np.where(case.par & np.uint64(1) == 0, NS, np.uint64(0))
    wrong = ((par ^ case.par) & ~unknown != 0) | (abort != case.abort)
    lines = [
        f"case {case.number}, AT {case.operations[n]} {case.va[n]:#x}: PAR {par[n]:#x}, abort {abort[n]:#x}; "
        f"right are {case.par[n]:#x}, {case.abort[n]:#x}"
        for n in np.flatnonzero(wrong)
    ]
    pages, after = memory.pages()
    changed = {int(pages[p]) + 8 * int(w): int(after[p, w]) for p, w in np.argwhere(after != case.content)}
    if changed != case.changed:
        lines.append(f"case {case.number}: wrote {changed}, right is {case.changed}")
    return lines


@pytest.mark.parametrize("name", classes())
def test_every_query_of_a_class_agrees(name: str) -> None:
    wrong = [line for case in cases(name) for line in differences(case)]
    assert not wrong, "\n".join(wrong[:20])


def test_the_queries_are_those_of_the_reference() -> None:
    """What the classes must have exercised: a copy that lost them would prove nothing."""
    data = golden()
    assert len(classes()) == 26
    assert {str(op) for op in data["ops"]} == set(OPERATIONS)
    assert len(data["q_va"]) == data["q_ofs"][-1] == 84_330
    assert set(data["case_class"].tolist()) == set(range(26))
    assert np.count_nonzero(data["q_par"] & np.uint64(1)) > 40_000
    assert np.count_nonzero(data["q_abort"]) > 200
    assert data["changed_ofs"][-1] > 100


@pytest.mark.skipif(not (SHARED / "mmu").is_dir(), reason="the reference data (shared/data/mmu) is not here")
def test_the_copy_is_the_reference() -> None:
    with np.load(SHARED / "mmu" / "at_golden.npz") as reference:
        data = golden()
        same = ("classes", "ops", "regs", "case_class", "case_regs", "mem_ofs", "mem_addr", "mem_val")
        for name in (*same, "q_ofs", "q_va", "q_op"):
            np.testing.assert_array_equal(data[name], reference[name])
        np.testing.assert_array_equal(data["q_par"], reference["par_qemu"] ^ reference["par_xor"])
        np.testing.assert_array_equal(data["q_abort"], reference["esr_qemu"] ^ reference["esr_xor"])
        for name in ("ofs", "addr", "val"):
            np.testing.assert_array_equal(data[f"changed_{name}"], reference[f"chg_arm_{name}"])


def test_one_operation_at_a_time_answers_the_same() -> None:
    for case in cases("mixed_4k"):
        memory = case.memory()
        together = at(case.operations, case.va, case.registers, memory)
        for op in set(case.operations):
            mine = np.array([other == op for other in case.operations])
            np.testing.assert_array_equal(at(op, case.va[mine], case.registers, memory), together[mine])


def test_address_spaces_can_share_a_call() -> None:
    """Cases with the same memory layout get one call with the registers of both."""
    for case in cases("va_range"):
        memory = case.memory()
        other = case.registers | {"TCR_EL1": case.registers["TCR_EL1"] | 1 << 7}  # EPD0
        alone = [at(case.operations, case.va, registers, memory) for registers in (case.registers, other)]
        space = np.arange(len(case.va)) % 2
        both = {name: np.array([case.registers[name], other[name]], dtype=np.uint64) for name in other}
        mixed = at(case.operations, case.va, both, memory, space=space)
        np.testing.assert_array_equal(mixed, np.where(space == 0, alone[0], alone[1]))


def test_threads_answer_the_same() -> None:
    case = next(case for case in cases("basic_4k") if len(case.va) > 4)
    va = np.tile(case.va, 20_000 // len(case.va) + 1)
    memory = case.memory()
    one = at("S12E1R", va, case.registers, memory, threads=1)
    np.testing.assert_array_equal(at("S12E1R", va, case.registers, memory, threads=3), one)


@pytest.mark.slow
def test_the_interpreted_walker_answers_the_same() -> None:
    """The same source without compilation, in a process of its own, over all cases."""
    script = (
        "import test_at_golden as t, spepolicy.jit as j\n"
        "assert not j.COMPILED\n"
        "wrong = [line for name in t.classes() for case in t.cases(name) for line in t.differences(case)]\n"
        "assert not wrong, wrong[:5]\n"
    )
    environment = os.environ | {"NUMBA_DISABLE_JIT": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=DATA, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
