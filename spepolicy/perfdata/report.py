"""A capture in words: what was read, what was lost when it was recorded, and what is wrong with the file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spepolicy.perfdata.layout import AuxFlag

if TYPE_CHECKING:
    from spepolicy.perfdata.capture import Capture

_SHOWN = 10


def report(capture: Capture) -> str:
    """Return a few lines on *capture*."""
    queues = len(set(capture.where["queue"].tolist()))
    lines = [
        f"{capture.source}: {len(capture.records):,} records, {queues} queues, {capture.aux_bytes:,} bytes of SPE data "
        f"(AUXTRACE_INFO version {capture.info_version or 'unknown'})"
    ]
    if capture.machine:
        lines.append("  recorded: " + ", ".join(f"{key} {value}" for key, value in capture.machine.items()))
    flags = capture.aux["flags"]
    told = [f"{int(((flags & int(flag)) != 0).sum()):,} {flag.name.lower()}" for flag in AuxFlag if flag.name]
    lines.append(f"  AUX records: {len(flags):,}, of these {', '.join(told)}")
    samples = capture.lost["samples"] != 0
    if len(samples):
        lines.append(
            f"  lost by the kernel: {int(capture.lost['count'][~samples].sum()):,} records, "
            f"{int(capture.lost['count'][samples].sum()):,} samples"
        )
    if len(capture.errors):
        lines.append(f"  instruction trace errors: {len(capture.errors):,}")
    if capture.complete:
        lines.append("  the file is whole")
        return "\n".join(lines)
    lines.append(f"  problems: {capture.problem_count:,}; {capture.skipped_bytes:,} bytes belong to no record")
    lines += [f"    {problem}" for problem in capture.problems[:_SHOWN]]
    if capture.problem_count > _SHOWN:
        lines.append(f"    ... and {capture.problem_count - _SHOWN:,} more")
    return "\n".join(lines)
