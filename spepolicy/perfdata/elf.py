"""The least ELF that perf resolves names with: an AArch64 image of nothing but a symbol table and a build id.

perf wants a file at the path that MMAP2 names, of which it takes .symtab, .strtab and the note .note.gnu.build-id
(tools/perf/util/symbol-elf.c). The code itself is never read, so the section .text has no bytes (SHT_NOBITS,
as in a file of separate debug information). The image is ET_DYN with addresses from 0, so that an address minus the
start of its mapping is that of the symbol.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from typing import NamedTuple

__all__ = ["Image", "Symbol", "symbol_image"]

BUILD_ID_BYTES = 20
_EHDR = struct.Struct("<16sHHIQQQIHHHHHH")
_PHDR = struct.Struct("<IIQQQQQQ")
_SHDR = struct.Struct("<IIQQQQIIQQ")
_SYM = struct.Struct("<IBBHQQ")
_ET_DYN, _EM_AARCH64 = 3, 183
_PROGBITS, _SYMTAB, _STRTAB, _NOTE, _NOBITS = 1, 2, 3, 7, 8
_ALLOC, _EXECUTE = 2, 4
_GLOBAL_FUNCTION = (1 << 4) | 2


class Symbol(NamedTuple):
    """A function: its place in the image and its size, in bytes."""

    name: str
    address: int
    size: int


class Image(NamedTuple):
    """The file, and the build id in it."""

    content: bytes
    build_id: bytes


def symbol_image(symbols: Sequence[Symbol], text_bytes: int) -> Image:
    """Return an ELF file whose functions are *symbols*, in a text section of *text_bytes* from address 0.

    The build id is a hash of the symbols: files with the same symbols have the same one, others another.
    """
    names, table = b"\0", _SYM.pack(0, 0, 0, 0, 0, 0)
    for symbol in symbols:
        table += _SYM.pack(len(names), _GLOBAL_FUNCTION, 0, 1, symbol.address, symbol.size)
        names += symbol.name.encode() + b"\0"
    build_id = hashlib.sha1(table + names, usedforsecurity=False).digest()
    note = struct.pack("<III4s", 4, BUILD_ID_BYTES, 3, b"GNU\0") + build_id
    section_names = b"\0.text\0.note.gnu.build-id\0.symtab\0.strtab\0.shstrtab\0"

    def named(name: str) -> int:
        return section_names.index(b"\0" + name.encode() + b"\0") + 1

    bodies = [note, table, names, section_names]
    at = _EHDR.size + 2 * _PHDR.size
    places = []
    for body in bodies:
        at += -at % 8
        places.append(at)
        at += len(body)
    sections_at = at + -at % 8
    headers = [
        _SHDR.pack(0, 0, 0, 0, 0, 0, 0, 0, 0, 0),
        _SHDR.pack(named(".text"), _NOBITS, _ALLOC | _EXECUTE, 0, 0, text_bytes, 0, 0, 4, 0),
        _SHDR.pack(named(".note.gnu.build-id"), _NOTE, 0, 0, places[0], len(note), 0, 0, 4, 0),
        _SHDR.pack(named(".symtab"), _SYMTAB, 0, 0, places[1], len(table), 4, 1, 8, _SYM.size),
        _SHDR.pack(named(".strtab"), _STRTAB, 0, 0, places[2], len(names), 0, 0, 1, 0),
        _SHDR.pack(named(".shstrtab"), _STRTAB, 0, 0, places[3], len(section_names), 0, 0, 1, 0),
    ]
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    content = _EHDR.pack(ident, _ET_DYN, _EM_AARCH64, 1, 0, _EHDR.size, sections_at, 0, _EHDR.size, _PHDR.size, 2,
                         _SHDR.size, len(headers), len(headers) - 1)  # fmt: skip
    content += _PHDR.pack(1, 5, 0, 0, 0, 0, text_bytes, 0x1000)  # PT_LOAD, readable and executable
    content += _PHDR.pack(4, 4, places[0], 0, 0, len(note), len(note), 4)  # PT_NOTE
    for place, body in zip(places, bodies, strict=True):
        content += bytes(place - len(content)) + body
    content += bytes(sections_at - len(content)) + b"".join(headers)
    return Image(content, build_id)
