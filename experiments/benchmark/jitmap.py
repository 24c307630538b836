"""Where the compiled functions of this process lie in memory, so that samples of Linux perf can be told by function.

LLVM keeps functions of the machine apart where they are long, so a share is that of a function and of what was inlined
into it. numba is asked for nothing that it would not do by itself: the object files that it loads are kept, and one
address of each is looked up. The machine must come from the cache; what is compiled in this process is not seen.
"""

from __future__ import annotations

import re
import struct
from typing import Any

_SYMBOL = struct.Struct("<IBBHQQ")  # ELF64: name, info, other, section, value, size
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, address, offset, size, link, info, alignment, entry size
_SYMTAB, _FUNCTION, _GLOBAL = 2, 2, 1


class JitMap:
    """Collects the object files that numba loads from its cache, from its making on."""

    def __init__(self) -> None:
        from numba.core.codegen import CPUCodeLibrary

        self._loaded: list[tuple[Any, bytes]] = []
        loaded, keep = self._loaded, CPUCodeLibrary._set_compiled_object

        def keep_too(library: Any, content: bytes) -> None:
            loaded.append((library, content))
            keep(library, content)

        CPUCodeLibrary._set_compiled_object = keep_too

    def functions(self) -> list[tuple[int, int, str]]:
        """Return (address, size in bytes, "package.module.function") of all functions that were loaded."""
        found = []
        for library, content in self._loaded:
            symbols = functions_of(content)
            for name, value, _, is_global in symbols:
                if is_global:  # the others may be told at the address of another object's copy
                    base = library.get_pointer_to_function(name) - value
                    found += [(base + offset, size, plain_name(each)) for each, offset, size, _ in symbols]
                    break
        return found


def functions_of(content: bytes) -> list[tuple[str, int, int, bool]]:
    """Return (name, offset in its section, size, whether it is global) of each function of an ELF64 object file."""
    table, entry_size, count = struct.unpack_from("<Q", content, 40)[0], *struct.unpack_from("<HH", content, 58)
    sections = [_SECTION.unpack_from(content, table + n * entry_size) for n in range(count)]
    found = []
    for _, kind, _, _, offset, size, link, _, _, _ in sections:
        if kind != _SYMTAB:
            continue
        names = sections[link][4]
        for place in range(offset, offset + size, _SYMBOL.size):
            name, info, _, section, value, length = _SYMBOL.unpack_from(content, place)
            if info & 15 == _FUNCTION and section:
                text = content[names + name : content.index(b"\0", names + name)].decode("ascii")
                found.append((text, value, length, info >> 4 == _GLOBAL))
    return found


def plain_name(symbol: str) -> str:
    """Return "a.b.c" of numba's symbol `_ZN1a1b1cB...`, or the symbol if it has another form."""
    rest = re.match(r"_ZN(.*)", symbol)
    parts = []
    text = rest[1] if rest else ""
    while (length := re.match(r"\d+", text)) is not None:
        begin = length.end()
        end = begin + int(length[0])
        parts.append(text[begin:end])
        text = text[end:]
    return ".".join(parts) or symbol
