"""Take the processor time of KVM's tools, which the hooks of policies call."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spepolicy.drivers.tools import Tools


@contextmanager
def timed_tools() -> Iterator[list[float]]:
    """Yield a list to which every call of a tool adds the CPU time of its thread, in s, while the context lasts."""
    spent: list[float] = []
    tools = {name: tool for name, tool in vars(Tools).items() if not name.startswith("_")}
    for name, tool in tools.items():
        setattr(Tools, name, _timed(tool, spent))
    try:
        yield spent
    finally:
        for name, tool in tools.items():
            setattr(Tools, name, tool)


def _timed(tool: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    @functools.wraps(tool)
    def timed(*arguments: Any) -> Any:
        begin = time.thread_time()
        try:
            return tool(*arguments)
        finally:
            spent.append(time.thread_time() - begin)

    return timed
