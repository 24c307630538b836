"""Can a bug of KVM be told from a legitimate fault? The answer, from claims made by hand."""

from __future__ import annotations

import numpy as np
import pytest

from spepolicy.drivers.result import Result
from spepolicy.hookspecs import Cause
from spepolicy.judge.attribution import BugVerdict, bug_table, judge_bug, recall

from .hand_made_results import empty_result


def claimed(*rows: tuple[Cause, Cause, int]) -> Result:
    """A result of two lanes with *rows* of (claimed, true, faults) in the second."""
    result = empty_result(replicates=(0, 1))
    for says, is_so, count in rows:
        result.claims[1, says, is_so] = count
    return result


@pytest.mark.parametrize(
    ("right", "missed", "false", "others", "answer"),
    [
        (9, 1, 1, 9, "yes"), (89, 11, 1, 9, "partly"), (9, 1, 11, 89, "partly"), (5, 5, 4, 6, "no"),
        (2, 8, 0, 10, "partly"), (0, 10, 0, 10, "no"), (1, 0, 0, 0, "yes"),
    ],
)  # fmt: skip
def test_nine_of_ten_told_and_one_of_ten_false_is_a_yes(
    right: int, missed: int, false: int, others: int, answer: str
) -> None:
    result = claimed(
        (Cause.KVM_BUG, Cause.KVM_BUG, right), (Cause.UNKNOWN, Cause.KVM_BUG, missed),
        (Cause.KVM_BUG, Cause.HOST, false), (Cause.HOST, Cause.HOST, others),
    )  # fmt: skip
    verdict = judge_bug(result)
    assert (verdict.faults, verdict.by_bug) == (right + missed + false + others, right + missed)
    assert verdict.told == right / (right + missed)
    assert verdict.false_alarms == (false / (false + others) if false + others else None)
    assert verdict.answer == answer


def test_without_a_fault_by_it_the_question_does_not_arise() -> None:
    result = claimed((Cause.HOST, Cause.HOST, 3))
    verdict = judge_bug(result)
    assert (verdict.told, verdict.false_alarms, verdict.answer) == (None, 0.0, "it did not strike")
    result.vm["leaked_pins"][0] = 2
    result.truth["diverged_records"][1] = 3
    assert (judge_bug(result).struck, judge_bug(result).answer) == (5, "it makes no fault")


def test_the_table_has_a_line_a_policy() -> None:
    verdict = judge_bug(claimed((Cause.KVM_BUG, Cause.KVM_BUG, 3), (Cause.UNKNOWN, Cause.KVM_BUG, 1)))
    head, line, none = bug_table({"one": verdict, "none": judge_bug(claimed())})
    assert head.split()[-5:] == ["answer", "faults", "by", "bug", "told", "false"][-5:]
    assert line.split() == ["one", "partly", "4", "4", "75", "%", "-"]
    assert none.split() == ["none", "it", "did", "not", "strike", "0", "0", "-", "-"]
    assert isinstance(verdict, BugVerdict)


def test_recall_is_of_the_true_cause() -> None:
    result = claimed((Cause.HOST, Cause.HOST, 3), (Cause.GUEST, Cause.HOST, 1), (Cause.HOST, Cause.GUEST, 5))
    assert np.array_equal(recall(result, Cause.HOST), [np.nan, 0.75], equal_nan=True)
