"""AArch64 programs by hand: a static ELF file with a few instructions, so that every count is known."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

BASE = 0x400000
BSS = 0x800000  # where `x1` of a program may point to: 64 MiB of zeros
_BSS_BYTES = 64 << 20
_CODE_AT = 0x1000

EXIT = (0xD2800BA8, 0xD2800000, 0xD4000001)  # mov x8, #93; mov x0, #0; svc #0
BSS_TO_X1 = 0xD2A01001  # mov x1, #0x800000


def mov_x0(value: int) -> int:
    """`mov x0, #value`"""
    return 0xD2800000 | value << 5


def b_ne(instructions: int) -> int:
    """`b.ne` so many instructions back."""
    return 0x54000001 | (-instructions & 0x7FFFF) << 5


def write_program(path: Path, code: Sequence[int]) -> Path:
    """Write an executable of *code* to *path*."""
    text = b"".join(struct.pack("<I", word) for word in code)
    headers = [
        struct.pack("<IIQQQQQQ", 1, 5, _CODE_AT, BASE, BASE, len(text), len(text), 0x1000),
        struct.pack("<IIQQQQQQ", 1, 6, 0, BSS, BSS, 0, _BSS_BYTES, 0x1000),
    ]
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 2, 183, 1, BASE, 64, 0, 0, 64, 56, len(headers), 64, 0, 0)
    path.write_bytes((head + b"".join(headers)).ljust(_CODE_AT, b"\0") + text)
    path.chmod(0o755)
    return path
