"""Command line: turn a host's kernel trace into a compact recording.

python -m spepolicy.recording.convert LOG OUT.npz [--ram-pages N] [--ram-base-gfn N] [--default-op NAME] [--kernel TEXT]

Exit status 0 when OUT.npz is written, 2 when the arguments, LOG or OUT.npz are at fault.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from spepolicy.errors import SpePolicyError
from spepolicy.machine.hostops import HostOp
from spepolicy.recording.classify import UNMAPPING
from spepolicy.recording.compact import save
from spepolicy.recording.reader import RAM_BASE_GFN, RAM_PAGES, read_log

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with *argv* (default: the process's arguments) and return its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        recording = read_log(
            arguments.log,
            ram_base_gfn=arguments.ram_base_gfn,
            ram_pages=arguments.ram_pages,
            default_op=HostOp[arguments.default_op.upper()] if arguments.default_op else None,
            kernel=arguments.kernel,
        )
        save(recording, arguments.out)
    except SpePolicyError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds, size = recording.duration_us / 1e6, arguments.out.stat().st_size
    scenario = f"scenario '{recording.scenario}'" if recording.scenario else "no scenario"
    lines = [f"{arguments.out}: {scenario}, {len(recording)} events in {seconds:.1f} s, {size} bytes"]
    lines += [f"  {count:8} {op.name}" for op, count in recording.counts().items()]
    lines += [f"  {count:8} from {kind}" for kind, count in recording.evidence.items()]
    lines += [f"  {count:8} no event: {kind}" for kind, count in recording.ignored.items()]
    print("\n".join(lines) + "\n", end="")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m spepolicy.recording.convert",
        description="Turn the kernel trace of a KVM/arm64 host (ftrace, `trace-cmd report` or `perf script` text, "
        "plain or .gz) into a compact recording that replays.",
    )
    parser.add_argument("log", metavar="LOG", type=Path, help="the trace")
    parser.add_argument("out", metavar="OUT.npz", type=Path, help="the recording to write (replaced if it exists)")
    parser.add_argument(
        "--ram-pages", type=_integer, default=RAM_PAGES, metavar="N", help="guest RAM in 4 KiB pages (%(default)s)"
    )
    parser.add_argument(
        "--ram-base-gfn",
        type=_integer,
        default=RAM_BASE_GFN,
        metavar="N",
        help=f"guest frame number of the first page of RAM ({RAM_BASE_GFN:#x})",
    )
    names = [op.name.lower() for op in UNMAPPING]
    parser.add_argument(
        "--default-op",
        type=str.lower,
        choices=names,
        metavar="NAME",
        help=f"operation of unmaps whose reason the trace does not show: {', '.join(names)} (such unmaps are an error)",
    )
    parser.add_argument("--kernel", default="", metavar="TEXT", help="host kernel, noted in the recording")
    return parser


def _integer(text: str) -> int:
    return int(text, 0)


if __name__ == "__main__":
    sys.exit(main())
