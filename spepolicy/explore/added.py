"""Properties that plugins add: checked on every new state, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.errors import HookError
from spepolicy.machine.fields import VCPU, VM

Ints = NDArray[np.int64]

__all__ = ["AddedProperty", "States", "added_properties"]


class States:
    """A batch of n states, seen by a judge: everything may be read."""

    def __init__(self, images: Ints, image: Any) -> None:
        """*images*: int64[n, words], laid out as *image* (spepolicy.explore.image.Image) says."""
        self._images, self._image = images, image

    def __len__(self) -> int:
        return len(self._images)

    def vm(self, field: str) -> Ints:
        """Return a field of the VM, int64[n]: see `spepolicy.machine.fields`."""
        return self._column("vm", VM.names or (), field, 0)

    def vcpu(self, field: str, k: int = 0) -> Ints:
        """Return a field of vCPU *k*, int64[n]."""
        return self._column("vcpu", VCPU.names or (), field, k * len(VCPU.names or ()))

    def host_page(self) -> Ints:
        """Return the VMM's page table, int64[n, RAM pages]: words of `spepolicy.machine.hostpage`."""
        first = self._image.offset("host_page")
        return self._images[:, first : first + self._image.lengths["host_page"]].copy()

    def _column(self, section: str, names: tuple[str, ...], field: str, offset: int) -> Ints:
        if field not in names:
            raise HookError(f"states have no field {section} '{field}'. Rule: one of spepolicy.machine.fields.")
        column: Ints = self._images[:, self._image.offset(section) + offset + names.index(field)].copy()
        return column


@dataclass(frozen=True)
class AddedProperty:
    """A property of a plugin's: what must hold in every state that is reached."""

    name: str
    rule: str
    source: str
    broken: Callable[[States], NDArray[np.bool_]]  # of n states: bool[n], True where it does not hold

    def check(self, states: States) -> NDArray[np.bool_]:
        """Return bool[n]; raise HookError if the plugin does not."""
        try:
            found = np.asarray(self.broken(states))
        except HookError:
            raise
        except Exception as error:
            raise HookError(
                f"property '{self.name}' raised {type(error).__name__}: {error}. Fix the plugin."
            ) from error
        if found.shape != (len(states),) or found.dtype != np.bool_:
            raise HookError(
                f"property '{self.name}' returned {found.dtype}{list(found.shape)} for {len(states)} states. "
                f"Rule: bool[{len(states)}]."
            )
        return found


def added_properties(manager: Any) -> tuple[AddedProperty, ...]:
    """Return the properties of all plugins in *manager* (hook `explore_properties`), or raise HookError."""
    found: list[AddedProperty] = []
    for answer in manager.hook.explore_properties():
        items: Sequence[Any] = answer or ()
        for item in items:
            if not isinstance(item, AddedProperty):
                raise HookError(f"explore_properties() returned {item!r}. Rule: spepolicy.explore.added.AddedProperty.")
            found.append(item)
    return tuple(found)
