"""Build the plugin and run a program under user-mode emulation with it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from spepolicy.errors import RecordingError
from spepolicy.workload_recorder.raw import Raw, read_raw

__all__ = ["EMULATOR", "record", "why_not"]

EMULATOR = "qemu-aarch64"
_PLUGIN = Path(__file__).with_name("plugin") / "recorder.c"


def why_not() -> str | None:
    """Return why nothing can be recorded on this computer, or None."""
    for tool, package in ((EMULATOR, "qemu-user"), ("gcc", "gcc")):
        if shutil.which(tool) is None:
            return f"{tool} is not installed (Debian: {package})"
    shown = subprocess.run([EMULATOR, "--help"], capture_output=True, text=True, check=False).stdout
    return None if "-plugin" in shown else f"{EMULATOR} was built without plugins (Debian's qemu-user has them)"


def record(
    command: Sequence[str],
    *,
    root: Path | None = None,
    interval: int = 2_000_000,
    skip: int = 0,
    limit: int | None = None,
    stdin: Path | None = None,
    stdout: Path | None = None,
) -> Raw:
    """Run *command*, an AArch64 program with its arguments, and return its counts.

    :param root: folder with the program's loader and libraries, for example unpacked Debian packages. Without it they
        are looked for in /.
    :param interval: instructions; the finest that phases can be told apart.
    :param skip: do not count the first instructions: a program that only reads its input yet.
    :param limit: end the program after so many instructions.
    :param stdin: file to read from; nothing by default.
    :param stdout: file to write to; thrown away by default.
    :raises RecordingError: if the emulator or the compiler is missing, or the program fails.
    """
    reason = why_not()
    if reason:
        raise RecordingError(f"cannot record: {reason}. Remedy: apt-get install qemu-user gcc.")
    with tempfile.TemporaryDirectory() as folder:
        plugin, raw = Path(folder, "recorder.so"), Path(folder, "raw")
        build = ["gcc", "-O2", "-shared", "-fPIC", "-fvisibility=hidden", "-o", str(plugin), str(_PLUGIN)]
        built = subprocess.run(build, capture_output=True, text=True, check=False)
        if built.returncode:
            raise RecordingError(f"the plugin does not compile: {built.stderr.strip()}. Command: {' '.join(build)}")
        options = [f"out={raw}", f"interval={interval}", f"skip={skip}", *([f"limit={limit}"] if limit else [])]
        emulator = [EMULATOR, *(["-L", str(root)] if root else []), "-plugin", ",".join([str(plugin), *options])]
        with (stdin or Path("/dev/null")).open("rb") as source, (stdout or Path("/dev/null")).open("wb") as sink:
            done = subprocess.run(
                [*emulator, *command], stdin=source, stdout=sink, stderr=subprocess.PIPE, text=True, check=False
            )
        if done.returncode >= 0 and raw.is_file() and (counted := read_raw(raw)) is not None:
            return counted
    raise RecordingError(
        f"{command[0]} did not run: exit status {done.returncode}. {' '.join(done.stderr.split())[-500:]} Rule: an "
        "AArch64 program for Linux. Remedy: try it with the emulator alone; --root names the folder of its libraries."
    )
