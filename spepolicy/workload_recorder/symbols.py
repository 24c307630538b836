"""Where the functions of an ELF file begin, and what they are called.

Names come from .symtab and .dynsym. A stripped program has few of them, but its .eh_frame_hdr still lists where each
function begins (LSB Core, "Exception Frames"): such a function is named by its file and offset.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Functions", "read_functions"]

_EM_AARCH64 = 183
_PT_LOAD, _PT_GNU_EH_FRAME = 1, 0x6474E550
_SHT_SYMTAB, _SHT_DYNSYM = 2, 11
_STT_FUNC = 2
_PCREL_SDATA4, _DATAREL_SDATA4, _UDATA4 = 0x1B, 0x3B, 0x03


@dataclass(frozen=True)
class Functions:
    """Functions of a file, by virtual address in the file."""

    file: str
    starts: list[int]
    names: list[str]
    loads: list[tuple[int, int, int]]  # file offset, size, virtual address

    def at(self, file_offset: int) -> str:
        """Return the name of the function that a byte of the file belongs to."""
        for offset, size, address in self.loads:
            if offset <= file_offset < offset + size:
                index = bisect_right(self.starts, file_offset - offset + address) - 1
                return self.names[index] if index >= 0 else self.file
        return self.file


def read_functions(path: Path) -> Functions:
    """Return the functions of an AArch64 ELF file; of any other file, one function that is the whole file."""
    nothing = Functions(path.name, [], [], [])
    try:
        content = path.read_bytes()
        if content[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", content, 18)[0] != _EM_AARCH64:
            return nothing
        return _parse(path.name, content)
    except (OSError, struct.error, IndexError, UnicodeDecodeError):
        return nothing


def _parse(file: str, content: bytes) -> Functions:
    header_at, sections_at = struct.unpack_from("<QQ", content, 32)
    header_size, headers, section_size, sections = struct.unpack_from("<HHHH", content, 54)
    loads: list[tuple[int, int, int]] = []
    starts: dict[int, str] = {}
    for n in range(headers):
        program = struct.unpack_from("<IIQQQQQ", content, header_at + n * header_size)
        kind, _flags, offset, address, _physical, size, in_memory = program
        if kind == _PT_LOAD:
            loads.append((offset, size or in_memory, address))  # a file of symbols alone has no content
        elif kind == _PT_GNU_EH_FRAME:
            starts |= {start: f"{file}+{start:#x}" for start in _frame_starts(content, offset, address)}
    for n in range(sections):
        at = sections_at + n * section_size
        kind = struct.unpack_from("<I", content, at + 4)[0]
        if kind in (_SHT_SYMTAB, _SHT_DYNSYM):
            offset, size, link = struct.unpack_from("<QQI", content, at + 24)
            names_at = struct.unpack_from("<Q", content, sections_at + link * section_size + 24)[0]
            starts |= _symbols(content, offset, size, names_at)
    ordered = sorted(starts)
    return Functions(file, ordered, [starts[start] for start in ordered], loads)


def _frame_starts(content: bytes, at: int, address: int) -> list[int]:
    """Read the table of .eh_frame_hdr, in the only encoding that linkers write."""
    if content[at : at + 4] != bytes([1, _PCREL_SDATA4, _UDATA4, _DATAREL_SDATA4]):
        return []
    count = struct.unpack_from("<I", content, at + 8)[0]
    table = struct.unpack_from(f"<{2 * count}i", content, at + 12)
    return [address + start for start in table[::2]]


def _symbols(content: bytes, at: int, size: int, names_at: int) -> dict[int, str]:
    found: dict[int, str] = {}
    for entry in range(at, at + size, 24):
        name_at, info, _other, section, value, _size = struct.unpack_from("<IBBHQQ", content, entry)
        if info & 0xF == _STT_FUNC and section != 0 and value:
            begin = names_at + name_at
            name = content[begin : content.index(b"\0", begin)].decode()
            # Several names of one place: the shortest, then the first, has least decoration.
            if value not in found or (len(name), name) < (len(found[value]), found[value]):
                found[value] = name
    return found
