"""What compiling this package does to other users of numba in the process: nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import numba
from numba.core import config, event
from spepolicy.jit import COMPILED, widen

assert COMPILED

class Seen(event.Listener):
    vectorizers = {}

    def on_start(self, compiling):
        name = compiling.data["dispatcher"].py_func.__name__
        self.vectorizers[name] = (config.LOOP_VECTORIZE, config.SLP_VECTORIZE)

    def on_end(self, compiling):
        pass

before = (config.LOOP_VECTORIZE, config.SLP_VECTORIZE)
event.register("numba:compile", Seen())
bare = {}
exec("def stranger(a):\\n    return a + 1", bare)
bare.pop("__builtins__")
assert numba.njit(bare["stranger"])(1) == 2

@numba.njit
def user(value):
    return widen(value) + widen(4)

assert user(3) == 7
assert Seen.vectorizers["stranger"] == before
assert Seen.vectorizers["user"] == before
assert Seen.vectorizers["widen"] == (0, 0)
assert (config.LOOP_VECTORIZE, config.SLP_VECTORIZE) == before
assert len(widen.signatures) == 1
"""


def test_other_functions_keep_llvm_s_vectorizers(tmp_path: Path) -> None:
    """Those of this package go without, and are compiled once for constants and variables; a function that belongs to
    no module is nobody's here.
    """
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path), "NUMBA_DISABLE_JIT": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
