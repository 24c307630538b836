"""The compiled and the interpreted form of the machine give the same arrays, to the bit."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent

SCRIPT = """
import random, sys
import numpy as np
sys.path.insert(0, sys.argv[1])
from properties.scenarios import ARRAYS, MS, POLICIES, busy_host, guest, policy, random_scenario, scenario
from spepolicy.drivers.simulate import simulate
from spepolicy.jit import COMPILED

assert COMPILED is (sys.argv[3] == "compiled")
arrays = {}
for seed in map(int, sys.argv[4].split(",")):
    name, fields, drawn = random_scenario(random.Random(seed))
    result = simulate(drawn, policy(name, **fields), name=name, replicates=range(2), threads=1)
    arrays |= {f"{seed} {name} {array}": getattr(result, array) for array in ARRAYS}
np.savez(sys.argv[2], **arrays)
"""


def _run(tmp_path: Path, form: str, seeds: str) -> dict[str, np.ndarray]:
    env = os.environ | {"NUMBA_DISABLE_JIT": "1" if form == "interpreted" else "0"}
    out = tmp_path / f"{form}.npz"
    subprocess.run([sys.executable, "-c", SCRIPT, str(HERE.parent), str(out), form, seeds], check=True, env=env)
    with np.load(out) as arrays:
        return dict(arrays)


def _compare(tmp_path: Path, seeds: str) -> None:
    compiled, interpreted = (_run(tmp_path, form, seeds) for form in ("compiled", "interpreted"))
    assert compiled.keys() == interpreted.keys()
    for name, array in compiled.items():
        assert array.tobytes() == interpreted[name].tobytes(), name


def test_compiled_equals_interpreted(tmp_path: Path) -> None:
    _compare(tmp_path, "1,2,3,4,5,6")


@pytest.mark.slow
def test_compiled_equals_interpreted_in_many_scenarios(tmp_path: Path) -> None:
    _compare(tmp_path, ",".join(str(seed) for seed in random.Random(7).sample(range(10, 1000), 40)))
