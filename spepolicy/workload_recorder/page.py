"""Write the description of a recorded workload as YAML that says of every number where it comes from."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import Any

__all__ = ["page"]

_HEAD = """\
# {title}: a real program, recorded.
#
{story}
# Format and units: spepolicy/workload.py. What is counted and what is modelled: spepolicy/workload_recorder/reduce.py.
"""

_SECTIONS = {
    "latencies": "Cycles of a Neoverse-like core. source: conf/workload/latencies/neoverse.yaml, with a range for each",
    "behaviours": "mix, taken: counted. served, walk, mispredict: the recorder's model of caches, TLB and "
    "predictors. ipc, wait_cycles: modelled from these. source: recording. range: ipc and wait_cycles by a factor of "
    "2; 'kernel code' is an assumption altogether",
    "functions": "source: symbols of the program, or where its unwind tables say that a function begins",
    "distributions": "Share of the operations of each function. source: recording; 'kernel' and 'other "
    "task': assumption",
    "phases": "In the order of the run. length, syscall_gap: operations counted, times the modelled time of each. "
    "source: recording; syscall: assumption, range 0.2us..20us. A gap of ten lengths: none was seen",
    "other": "source: assumption",
    "data": "Where loads and stores of a function go, in the L1 or beyond: BEGIN+BYTES/STEP and the share of accesses. "
    "source: recording, one access in 128; order, strides and streams are not kept (spepolicy/workload_data.py)",
}


def page(title: str, story: str, description: Mapping[str, Any]) -> str:
    """Return the YAML of a workload: *title*, the paragraphs of *story* as comments, and the description."""
    paragraphs = ["\n".join(textwrap.wrap(part, 118)) for part in story.split("\n\n")]
    text = "\n#\n".join("\n".join(f"# {line}" for line in part.splitlines()) for part in paragraphs)
    parts = [_HEAD.format(title=title, story=text), f"source: {_scalar(description['source'])}\n"]
    for section, comment in _SECTIONS.items():
        if section not in description:
            continue
        lines = [f"# {line}" for line in textwrap.wrap(comment + ".", 118)]
        value = description[section]
        if section == "other":
            lines.append(f"other: {_flow(value)}")
        elif section == "data":
            lines.append("data:")
            for part, entries in value.items():
                lines.append(f"  {part}:")
                lines += [f"    {_scalar(name)}: {_flow(entry)}" for name, entry in entries.items()]
        else:
            lines.append(f"{section}:")
            lines += [f"  {_scalar(name)}: {_flow(entry)}" for name, entry in value.items()]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _flow(value: Any) -> str:
    """Return a value in YAML's flow style."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_scalar(name)}: {_flow(entry)}" for name, entry in value.items()) + "}"
    return _scalar(value)


def _scalar(value: Any) -> str:
    if isinstance(value, str) and not (value.replace("_", "a").replace(" ", "a").isalnum() and value[0].isalpha()):
        return "'" + value.replace("'", "''") + "'"
    return str(value)
