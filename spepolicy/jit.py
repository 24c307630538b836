"""One switch between the compiled and the interpreted form of the machine.

`@jit` compiles a function with numba (no GIL, cached on disk); with NUMBA_DISABLE_JIT=1 it leaves it alone, so that the
same source runs as ordinary Python that a debugger and a coverage tool understand. `@entry` is for the few functions
that Python calls, `@lean` for functions that make no array, and `@inline` for those of them that must never cost a
call: they take many arrays and are called in one place of a hot loop.

numba's own cache notices a change in the file of the compiled function only, not in the functions that it calls. The
cache folder is therefore named after the content of everything that can end up in the compiled code.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np

from spepolicy.errors import OutputError

F = TypeVar("F", bound=Callable[..., Any])

_PACKAGE = Path(__file__).resolve().parent
_MACHINE = ("jit.py", "arch", "mmu", "machine")
# What calls the machine has a folder of its own, so that a change of it does not compile the machine again; and so has
# what has nothing to do with it.
_COMPILED_PARTS = {"machine": _MACHINE, "explore": (*_MACHINE, "explore"), "spe": ("jit.py", "spe")}


def _source_hash(name: str) -> str:
    # numba files its entries by the path of the source, too.
    versions = f"{_PACKAGE} {sys.version_info[:2]} {np.__version__} {version('numba')}"
    digest = hashlib.sha256(versions.encode())
    for part in _COMPILED_PARTS[name]:
        path = _PACKAGE / part
        for file in [path] if path.is_file() else sorted(path.glob("*.py")):
            digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


@cache
def cache_dir(part: str = "machine") -> Path:
    """Return the folder that holds the compiled *part* ("machine", "explore", "spe") of exactly this source; it exists
    and can be written.

    NUMBA_CACHE_DIR names its parent; else it is below XDG_CACHE_HOME or ~/.cache, or, where that cannot be written,
    below the folder for temporary files.
    """
    name = f"{part}-{_source_hash(part)}"
    base = os.environ.get("NUMBA_CACHE_DIR")
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "spepolicy"
    for root in [Path(base)] if base else [home, Path(tempfile.gettempdir()) / f"spepolicy-{os.getuid()}"]:
        with suppress(OSError):
            (root / name).mkdir(parents=True, exist_ok=True)
            if os.access(root / name, os.W_OK):
                return root / name
    raise OutputError(
        f"the compiled machine cannot be stored below {base or home}. Rule: a folder that this user may write to. "
        "Remedy: set NUMBA_CACHE_DIR to one."
    )


import numba as _numba  # noqa: E402

numba: Any = _numba  # its stubs lack the configuration and the wrapper options
COMPILED: bool = not numba.config.DISABLE_JIT

if COMPILED:
    from numba.core import event

    events: Any = event  # its functions lack types

    class _WithoutVectorizers(event.Listener):
        """Leave LLVM's vectorizers out while code of this package is compiled: the machine chases single words, and
        their attempts took a sixth of the time of a first run. Other users of numba in the process keep theirs.
        """

        def __init__(self) -> None:
            self._before: list[tuple[Any, Any]] = []

        def on_start(self, compiling: Any) -> None:
            self._before.append((numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE))
            owner = compiling.data["dispatcher"].py_func.__module__ or ""  # none: made by exec() in a bare namespace
            if owner.startswith("spepolicy."):
                numba.config.LOOP_VECTORIZE = numba.config.SLP_VECTORIZE = 0

        def on_end(self, compiling: Any) -> None:
            numba.config.LOOP_VECTORIZE, numba.config.SLP_VECTORIZE = self._before.pop()

    events.register("numba:compile", _WithoutVectorizers())

    def _compile(function: F, **options: bool) -> F:
        """Return *function* compiled at its first call, and filed with its part of the package."""
        owner = function.__module__.removeprefix("spepolicy.").partition(".")[0]
        part = owner if owner in _COMPILED_PARTS else "machine"
        numba.config.CACHE_DIR = str(cache_dir(part))  # numba looks at it when a function is decorated
        compiled = numba.njit(cache=True, nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)(function)
        _take_constants_as_variables(compiled)
        return cast(F, compiled)

    def _take_constants_as_variables(compiled: Any) -> None:
        """Let compiled code call *compiled* with a constant as with a variable. numba would compile it, and what it
        calls, for each literal again, a fifth of all; LLVM sees the constant anyway where it inlines the call.
        """
        resolve = compiled.get_call_template

        def get_call_template(args: Any, kws: Any) -> Any:
            plain = numba.types.unliteral
            return resolve(tuple(map(plain, args)), {name: plain(kind) for name, kind in kws.items()})

        compiled.get_call_template = get_call_template

    def jit(function: F) -> F:
        """Compile *function* for calls from compiled code: without a wrapper for Python, which costs more to compile
        than the rest.
        """
        return _compile(function, no_cpython_wrapper=True)

    def lean(function: F) -> F:
        """Compile *function*, which makes no array, for calls from compiled code: without counting references to the
        arrays that it borrows, which takes longer than a short function.
        """
        return _compile(function, no_cpython_wrapper=True, _nrt=False)

    def inline(function: F) -> F:
        """Compile *function*, which makes no array, into its callers."""
        return _compile(function, no_cpython_wrapper=True, _nrt=False, forceinline=True)

    def entry(function: F) -> F:
        """Compile *function* for calls from Python."""
        return _compile(function)
else:

    def jit(function: F) -> F:
        """Leave *function* interpreted."""
        return function

    entry = inline = lean = jit

    _row_classes: dict[np.dtype[Any], type] = {}

    def _row_class(dtype: np.dtype[Any]) -> type:
        """Make a class whose attributes are the fields of *dtype*; np.record does the same ten times slower."""

        def accessor(name: str) -> property:
            return property(lambda self: self.record[name], lambda self, value: self.record.__setitem__(name, value))

        members: dict[str, Any] = {name: accessor(name) for name in dtype.names or ()}
        return type("Row", (), {"__slots__": ("record",), "__init__": _init_row, **members})

    def _init_row(self: Any, record: Any) -> None:
        self.record = record

    def plain_row(array: Any, record: Any) -> Any:
        """Give *record*, an element of *array*, its fields as attributes, as compiled code has them."""
        cls = _row_classes.get(array.dtype)
        if cls is None:
            cls = _row_classes.setdefault(array.dtype, _row_class(array.dtype))
        return cls(record)


if COMPILED:
    from llvmlite import ir
    from numba.core import cgutils, types
    from numba.extending import intrinsic

    _arrays: Any = cgutils  # its functions lack types

    def _emit_prefetch(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        array = context.make_array(signature.args[0])(context, builder, values[0])
        place = _arrays.get_item_pointer(context, builder, signature.args[0], array, values[1:])
        byte = builder.bitcast(place, ir.IntType(8).as_pointer())
        word = ir.IntType(32)
        hint = builder.module.declare_intrinsic(
            "llvm.prefetch", [byte.type], ir.FunctionType(ir.VoidType(), [byte.type, word, word, word])
        )
        builder.call(hint, [byte, word(0), word(3), word(1)])  # for reading, to keep, data
        return context.get_dummy_value()

    def _prefetch(_typing: Any, array: Any, index: Any, entry: Any) -> Any:
        """Ask the processor for `array[index, entry]` ahead of its use."""
        return types.void(array, types.uint64, types.uint64), _emit_prefetch

    def _prefetch_word(_typing: Any, array: Any, index: Any) -> Any:
        """Ask the processor for `array[index]` ahead of its use."""
        return types.void(array, types.uint64), _emit_prefetch

    prefetch: Any = intrinsic(_prefetch)
    prefetch_word: Any = intrinsic(_prefetch_word)
else:

    def prefetch(_array: Any, _index: int, _entry: int) -> None:
        """Do nothing: it is a hint."""

    def prefetch_word(_array: Any, _index: int) -> None:
        """Do nothing: it is a hint."""


if COMPILED:
    # An index that numba knows not to be negative needs no test for counting from the end.
    @inline
    def row(array: Any, index: int) -> Any:
        """Return an element of a structured array, its fields as attributes."""
        return array[np.uint64(index)]

    @inline
    def word(array: Any, index: int) -> Any:
        """Return an element of an array; *index* is not negative."""
        return array[np.uint64(index)]

    @inline
    def cell(array: Any, index: int, entry: int) -> Any:
        """Return an element of a two-dimensional array; neither index is negative."""
        return array[np.uint64(index), np.uint64(entry)]
else:

    def word(array: Any, index: int) -> Any:
        """Return an element of an array; *index* is not negative."""
        return array[index]

    def cell(array: Any, index: int, entry: int) -> Any:
        """Return an element of a two-dimensional array; neither index is negative."""
        return array[index, entry]

    def row(array: Any, index: int) -> Any:
        """Return an element of a structured array, its fields as attributes."""
        return plain_row(array, array[index])


@jit
def widen(value: Any) -> int:
    """Turn an element of a narrower array into the machine's int64: no function is compiled twice, and nothing
    becomes a float (numba makes one of an unsigned and a signed value).
    """
    wide: Any = np.int64(value)
    return wide  # type: ignore[no-any-return]
