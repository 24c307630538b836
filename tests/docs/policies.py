"""The table of the shipped policies in plugins/README.md, made from their docstrings.

`python -m tests.docs.policies` writes it again.
"""

from __future__ import annotations

import re

from spepolicy.lab.about import docstring_parts
from spepolicy.plugins import installed_policies
from spepolicy.policy_fields import fields_of

from .pages import ROOT

PAGE = ROOT / "plugins" / "README.md"
BEGIN, END = "<!-- policies: made by `python -m tests.docs.policies` -->\n", "<!-- end of policies -->\n"


def parts_of(cls: type) -> dict[str, str]:
    """Return what the docstring of a policy says under each of `spepolicy.lab.about.DOCSTRING_PARTS`."""
    return docstring_parts(cls)[1]


def table() -> str:
    """Return the table: a row a policy, in the order of kvm.md's catalogue."""
    lines = ["| policy | fields | what it does | kvm.md | needs | fails |", "|---|---|---|---|---|---|"]
    rows = []
    for name, info in installed_policies().items():
        if info.distribution != "spepolicy":
            continue
        parts = parts_of(info.cls)
        fields = ", ".join(f"`{item.name}`" for item in fields_of(info.cls, name)) or "none"
        row = re.search(r"\bP(\d+)\w*", parts["Source"])
        order = int(row[1]) if row else -1
        catalogue = row[0] if row else "baseline"
        cells = (f"`{name}`", fields, info.summary, catalogue, parts["Needs"], parts["Fails"])
        rows.append((order, name, "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"))
    return "\n".join([*lines, *(row for _, _, row in sorted(rows))]) + "\n"


def shown() -> str:
    """Return the table that the page shows."""
    return PAGE.read_text(encoding="utf-8").partition(BEGIN)[2].partition(END)[0]


if __name__ == "__main__":
    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(page.replace(BEGIN + shown() + END, BEGIN + table() + END), encoding="utf-8")
