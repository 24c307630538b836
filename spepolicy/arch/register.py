"""A system register as data: its fields, when each exists, and how software sees it.

Values are uint64, alone or as arrays. A field exists if the implementation has all features of one of its `needs`;
where it does not, its bits read as zero and ignore writes (RES0 bits and the RAZ/WI bits of PMSEVFR_EL1 and its like
differ in what software may rely on, not in what it reads).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from spepolicy.arch.versions import NO_FEATURE, Feature
from spepolicy.errors import SpePolicyError, nearest

__all__ = ["Encoding", "Field", "Register", "RegisterError"]

Encoding = tuple[int, int, int, int, int]
"""op0, op1, CRn, CRm, op2."""

_ALL = 0xFFFF_FFFF_FFFF_FFFF


class RegisterError(SpePolicyError):
    """A field that a register does not have, or a value that does not fit its field."""


@dataclass(frozen=True)
class Field:
    """Bits msb..lsb of a register."""

    name: str
    msb: int
    lsb: int
    needs: tuple[Feature, ...] = (Feature.SPE,)  # exists with all features of any of these
    access: str = "RW"  # or RO
    reset: int | None = None  # after a warm reset; None: UNKNOWN
    reset_unless: Feature = NO_FEATURE  # where the PE has any of these, the reset value is UNKNOWN all the same
    doc: str = ""

    @property
    def width(self) -> int:
        return self.msb - self.lsb + 1

    @property
    def mask(self) -> int:
        """The field's bits, in place."""
        return ((1 << self.width) - 1) << self.lsb

    def exists(self, features: Feature) -> bool:
        return any(needed & features == needed for needed in self.needs)


@dataclass(frozen=True)
class Register:
    """A 64-bit system register."""

    name: str
    encoding: Encoding
    fields: tuple[Field, ...]  # from the highest bit down
    needs: Feature = Feature.SPE
    vncr: int | None = None  # offset in the page of VNCR_EL2 (FEAT_NV2), if it is there

    @cached_property
    def _by_name(self) -> dict[str, Field]:
        return {field.name: field for field in self.fields}

    def __iter__(self) -> Iterator[Field]:
        return iter(self.fields)

    def field(self, name: str) -> Field:
        """Return the field *name*. Raises `RegisterError` if there is none."""
        if name not in self._by_name:
            raise RegisterError(
                f"{self.name} has no field {name}.{nearest(name, self._by_name)} It has {', '.join(self._by_name)}."
            )
        return self._by_name[name]

    def mask(self, *names: str) -> int:
        """Return the bits of the fields *names*, in place; of all fields without a name."""
        total = 0
        for name in names or self._by_name:
            total |= self.field(name).mask
        return total

    def existing(self, features: Feature) -> int:
        """Return the bits that an implementation with *features* has; the others are RES0."""
        if self.needs & features != self.needs:
            return 0
        return sum(field.mask for field in self.fields if field.exists(features))

    def pack(self, **values: ArrayLike) -> Any:
        """Return the register with these fields and 0 elsewhere: int for ints, uint64 array for arrays (broadcast).

        Raises `RegisterError` for an unknown field and for a value that does not fit it.
        """
        scalar = all(np.ndim(value) == 0 for value in values.values())
        total: NDArray[np.uint64] = np.zeros((), dtype=np.uint64)
        for name, value in values.items():
            field = self.field(name)
            array = np.asarray(value)
            low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
            if array.dtype.kind not in "iub" or low < 0 or high >> field.width:
                raise RegisterError(
                    f"{self.name}.{name}: value {high if low >= 0 else low} does not fit bits {field.msb}:{field.lsb}. "
                    f"Rule: an integer, 0 to {(1 << field.width) - 1}."
                )
            total = total | (array.astype(np.uint64) << np.uint64(field.lsb))
        return int(total) if scalar else total

    def unpack(self, value: ArrayLike) -> dict[str, Any]:
        """Return the fields of *value*: ints of an int, uint64 arrays of an array; int64 is read as uint64."""
        if isinstance(value, int | np.integer):
            word = int(value) & _ALL
            return {f.name: (word & f.mask) >> f.lsb for f in self.fields}
        words = np.asarray(value)
        words = words.view(np.uint64) if words.dtype == np.int64 else words.astype(np.uint64)
        return {f.name: (words & np.uint64(f.mask)) >> np.uint64(f.lsb) for f in self.fields}

    def write(self, old: int, new: int, features: Feature) -> int:
        """Return what the register holds after software writes *new*: only read-write fields that exist change."""
        open_bits = sum(f.mask for f in self.fields if f.access == "RW") & self.existing(features)
        return (old & ~open_bits & _ALL) | (new & open_bits)

    def read(self, value: int, features: Feature) -> int:
        """Return what software reads where the register holds *value*."""
        return value & self.existing(features)

    def reset(self, value: int, features: Feature) -> int:
        """Return the register after a warm reset that finds *value* in it: fields without a reset value keep theirs, as
        UNKNOWN allows.
        """
        for f in self.fields:
            if f.reset is not None and not f.reset_unless & features:
                value = (value & ~f.mask) | (f.reset << f.lsb)
        return value & self.existing(features)
