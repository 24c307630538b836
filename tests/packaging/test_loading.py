"""Loading a file never executes code from it: no pickle, no unsafe YAML, nothing that is evaluated.

One test reads the source for whatever could; the other feeds each loader files whose content would leave a mark if any
of it ran.
"""

from __future__ import annotations

import ast
import io
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from spepolicy.errors import SpePolicyError

from ..docs.pages import ROOT

SERIALIZERS = {
    "pickle",
    "cPickle",
    "_pickle",
    "cloudpickle",
    "dill",
    "joblib",
    "marshal",
    "shelve",
    "jsonpickle",
    "torch",
}
# What is left, each with its reason.
ALLOWED = {
    ("spepolicy/testing/checks.py", "import pickle"): "a check that the author's own policy can be sent to a worker",
    ("spepolicy/machine/rows.py", "exec"): "accessors, from a table of names in the same module",
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """Yield what in a module could execute what it loads."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {name.name}" for name in node.names if name.name.partition(".")[0] in SERIALIZERS)
        elif isinstance(node, ast.ImportFrom):
            if (node.module or "").partition(".")[0] in SERIALIZERS:
                yield f"import {node.module}"
        elif isinstance(node, ast.Attribute) and node.attr in (
            "read_pickle",
            "unsafe_load",
            "full_load",
            "instantiate",
        ):
            yield node.attr
        elif isinstance(node, ast.Call):
            yield from _of_call(node)


def _of_call(call: ast.Call) -> Iterator[str]:
    function = ast.unparse(call.func)
    keywords = {word.arg: ast.unparse(word.value) for word in call.keywords}
    if function in ("eval", "exec", "__import__"):
        yield function
    if function in ("yaml.load", "yaml.load_all") and "Safe" not in keywords.get("Loader", ""):
        yield function
    if function in ("np.load", "numpy.load", "np.fromregex") and keywords.get("allow_pickle") != "False":
        yield f"{function} without allow_pickle=False"
    if keywords.get("allow_pickle") == "True" or keywords.get("shell") == "True":
        yield f"{function} with {'allow_pickle' if 'allow_pickle' in keywords else 'shell'}=True"


def test_no_module_loads_what_could_execute() -> None:
    found = set()
    for folder in ("spepolicy", "plugins"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = path.relative_to(ROOT).as_posix()
            found |= {(name, danger) for danger in dangers(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == set(ALLOWED)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from pickle import loads", "import cloudpickle.x", "eval('1')", "exec(text)", "np.load(path)",
        "np.load(path, allow_pickle=True)", "yaml.load(text)", "yaml.load(text, Loader=yaml.Loader)",
        "yaml.unsafe_load(text)", "pandas.read_pickle(path)", "hydra.utils.instantiate(cfg)",
        "subprocess.run(text, shell=True)",
    ],
)  # fmt: skip
def test_the_search_knows_what_it_looks_for(source: str) -> None:
    assert list(dangers(ast.parse(source)))
    safe = "np.load(path, allow_pickle=False)\nyaml.safe_load(t)\nyaml.load(t, Loader=yaml.SafeLoader)\nre.compile(x)"
    assert not list(dangers(ast.parse(safe)))


class _Mark:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.mkdir, (str(self.mark),))


def _npz(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    np.savez(file, allow_pickle=True, **content)
    return file.getvalue()


def _attacks(mark: Path) -> dict[str, bytes]:
    """Return files that leave *mark* behind if anything in them is executed."""
    bad = np.array([_Mark(mark)], dtype=object)
    bare = io.BytesIO()
    np.save(bare, bad, allow_pickle=True)
    names = (
        "time_step", "first_step", "pages", "op", "notifier", "flags", "meta", "about", "words", "waiting_words",
        "waiting_starts", "waiting_first", "following_words", "following_starts", "following_first",
    )  # fmt: skip
    tag = f"!!python/object/apply:os.mkdir ['{mark}']"
    return {
        "pickle": pickle.dumps(_Mark(mark)),
        "npy": bare.getvalue(),
        "npz": _npz(dict.fromkeys(names, bad)),
        "npz, meta only": _npz({"meta": bad, "about": bad, "op": np.zeros(1, np.uint8)}),
        "yaml": tag.encode(),
        "yaml value": f"source: {tag}\nname: {tag}\nid: {tag}\ntitle: {tag}\nevents: [{tag}]\n".encode(),
        "parquet": _parquet(mark),
    }


def _parquet(mark: Path) -> bytes:
    """A store whose schema claims types of Python's own, as old versions of pyarrow unpickled them."""
    import pyarrow
    from pyarrow import parquet

    payload = pickle.dumps(_Mark(mark))
    field = pyarrow.field(
        "lane_hash",
        pyarrow.string(),
        metadata={"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": payload},
    )
    schema = pyarrow.schema([field, pyarrow.field("digest", pyarrow.uint64())], metadata={"pandas": payload})
    file = io.BytesIO()
    rows = [pyarrow.array(["a"]), pyarrow.array([1], pyarrow.uint64())]
    parquet.write_table(pyarrow.Table.from_arrays(rows, schema=schema), file)
    return file.getvalue()


def _recording(path: Path) -> None:
    from spepolicy.recording.compact import load

    load(path)


def _trace(path: Path) -> None:
    from spepolicy.recording.reader import read_log

    read_log(path, ram_base_gfn=0, ram_pages=100, kernel="6.1")


def _checkpoint(path: Path) -> None:
    from spepolicy.explore.checkpoint import load

    load(path, "mark")


def _scenario(path: Path) -> None:
    from spepolicy.explore.scenario import read

    read(path)


def _workload(path: Path) -> None:
    from spepolicy.workload_source import _description

    _description(path)


def _case(path: Path) -> None:
    from spepolicy.catalogue.case import read_case

    read_case(path.read_text(encoding="utf-8", errors="replace"), path.name, {})


def _capture(path: Path) -> None:
    from spepolicy.perfdata.capture import read

    read(path)


def _store(path: Path) -> None:
    from spepolicy.lab.sweep.store import Store

    with Store(path.parent) as store:
        list(store.read(["a"]))


def _configuration(path: Path) -> None:
    from omegaconf import OmegaConf
    from yaml import YAMLError

    try:
        OmegaConf.load(path)  # what Hydra loads files of conf/ and of --config-dir with
    except (YAMLError, OSError, ValueError) as error:
        raise SpePolicyError(str(error)) from error


LOADERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "recording": (_recording, "mine.npz"),
    "trace": (_trace, "trace.txt"),
    "checkpoint": (_checkpoint, "search.npz"),
    "scenario of explore": (_scenario, "scene.yaml"),
    "workload": (_workload, "mine.yaml"),
    "case of the catalogue": (_case, "case.yaml"),
    "capture": (_capture, "perf.data"),
    "store of a sweep": (_store, "rows.parquet"),
    "configuration": (_configuration, "config.yaml"),
}


@pytest.mark.parametrize("attack", _attacks(Path("x")))
@pytest.mark.parametrize("loader", LOADERS)
def test_nothing_in_a_file_is_executed(loader: str, attack: str, tmp_path: Path) -> None:
    load, name = LOADERS[loader]
    mark = tmp_path / "mark"
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / name).write_bytes(_attacks(mark)[attack])
    if (loader, attack) == ("store of a sweep", "parquet"):
        load(folder / name)  # the rows are there: what claims to be Python's is not looked at
    else:
        with pytest.raises(SpePolicyError):
            load(folder / name)
    assert not mark.exists()


def test_the_attacks_work_on_loaders_that_are_not_safe(tmp_path: Path) -> None:
    import yaml

    for number, (attack, load) in enumerate(
        (
            ("pickle", pickle.loads),
            ("npy", lambda content: np.load(io.BytesIO(content), allow_pickle=True)),
            ("npz", lambda content: np.load(io.BytesIO(content), allow_pickle=True)["op"]),
            ("yaml", lambda content: yaml.unsafe_load(content)),
        )
    ):
        mark = tmp_path / str(number)
        load(_attacks(mark)[attack])
        assert mark.exists()
