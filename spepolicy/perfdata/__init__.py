"""perf.data with Arm SPE in it: read any, write one that stock perf decodes.

    from spepolicy.perfdata import read

    capture = read("perf.data")
    print(capture.report())  # as `python -m spepolicy.perfdata perf.data` does
    loads = capture.records[capture.records["op_class"] == OpClass.LOAD_STORE]  # spepolicy.spe.records.RECORD

`read` is in `capture`, which takes the AUX area apart with `stream` and the file with `container`. `writer` writes a
file, `elf` the symbols that perf resolves names with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spepolicy.perfdata.capture import Capture, read

__all__ = ["Capture", "read"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from spepolicy.perfdata import capture

        return getattr(capture, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
