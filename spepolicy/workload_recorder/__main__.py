"""`python -m spepolicy.workload_recorder`: record a workload from a real program."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from spepolicy.errors import SpePolicyError


def main(arguments: Sequence[str] | None = None) -> int:
    """Record as the arguments say; return the exit status: 0, or 2 with one line on stderr."""
    parser = argparse.ArgumentParser(
        prog="python -m spepolicy.workload_recorder",
        description="Run an AArch64 program under qemu-aarch64 and write a workload for spepolicy. See README.md.",
    )
    parser.add_argument("--output", type=Path, required=True, help="YAML file to write; its name is the workload's")
    parser.add_argument("--title", help="what the program is, in a few words; default: its name")
    parser.add_argument("--story", default="", help="what it did, where program and input come from")
    parser.add_argument("--root", type=Path, help="folder with the program's loader and libraries")
    parser.add_argument("--interval", type=int, default=2_000_000, help="instructions, default 2,000,000")
    parser.add_argument("--skip", type=int, default=0, help="do not count the first instructions")
    parser.add_argument("--limit", type=int, help="stop after so many instructions")
    parser.add_argument("--phases", type=int, default=6, help="at most so many phases, default 6")
    parser.add_argument("--stdin", type=Path, help="file that the program reads")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- program arguments...")
    chosen = parser.parse_args(arguments)
    command = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    if not command:
        parser.error("a program is needed: -- program arguments...")
    if min(chosen.interval, chosen.phases, chosen.limit or 1, chosen.skip + 1) < 1:
        parser.error("--interval, --limit and --phases are at least 1, --skip is not negative")
    try:
        text = recorded(chosen, command)
        chosen.output.write_text(text)
    except (SpePolicyError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    command = f"python -m spepolicy +policy=eager_pin workload=file workload.path={chosen.output}"
    print(f"{chosen.output}: try it with '{command}'")
    return 0


def recorded(chosen: argparse.Namespace, command: Sequence[str]) -> str:
    """Run *command* and return the YAML of its workload, which is known to be valid."""
    from spepolicy.workload import build_workload
    from spepolicy.workload_model import usual_latencies
    from spepolicy.workload_recorder.page import page
    from spepolicy.workload_recorder.reduce import describe_run
    from spepolicy.workload_recorder.run import record

    raw = record(
        command,
        root=chosen.root,
        interval=chosen.interval,
        skip=chosen.skip,
        limit=chosen.limit,
        stdin=chosen.stdin,
    )
    name = Path(command[0]).name
    # Folders of the computer that records are nobody's business.
    shown = shlex.join([name, *(Path(part).name if "/" in part else part for part in command[1:])])
    counted = f"{int(raw.instructions.sum()) / 1e6:.0f} million instructions, {int(raw.syscalls.sum()):,} system calls"
    counted += f", after the first {chosen.skip / 1e6:.0f} million" if chosen.skip else ""
    source = f"recorded under qemu-aarch64 from '{shown}': {counted}; memory, branches and time modelled"
    description = describe_run(raw, usual_latencies(), source, chosen.phases)
    build_workload(description, where=str(chosen.output))
    story = f"RECORDED: `{shown}`, {counted}, under qemu-aarch64 with spepolicy.workload_recorder."
    return page(chosen.title or name, "\n\n".join(part for part in (chosen.story, story) if part), description)


if __name__ == "__main__":
    sys.exit(main())
