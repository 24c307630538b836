"""The program of a run, from wherever `workload=` says: composed YAML, a file of one's own, or a capture.

`workload=NAME` composes conf/workload/NAME.yaml, which is the description itself. `workload=file workload.path=X.yaml`
reads a description from a file, such as `spepolicy.workload_recorder` writes; `workload=capture workload.path=X.data`
makes one from a perf.data file with SPE in it (`spepolicy.capture_model`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spepolicy.errors import ConfigurationError, nearest
from spepolicy.machine.scenario import Workload
from spepolicy.workload import build_workload

__all__ = ["workload_of"]

_KEYS = {"file": ("kind", "path"), "capture": ("kind", "path", "thread", "cpu_ghz")}


def workload_of(values: Mapping[str, Any], cycle_ps: int) -> Workload:
    """Return the workload that the group `workload` describes.

    :param values: plain containers.
    :param cycle_ps: one CPU cycle, as of `spepolicy.workload.build_workload`.
    :raises ConfigurationError: as `build_workload` does; or for a file that is missing or is no description.
    :raises CaptureError: for a capture that cannot be read or has too little in it.
    """
    if "kind" not in values:
        return build_workload(values, where="workload", cycle_ps=cycle_ps)
    kind = values["kind"]
    if kind not in _KEYS:
        raise ConfigurationError(
            f"workload.kind={kind}: must be one of {', '.join(_KEYS)}.{nearest(str(kind), _KEYS)} Choose "
            "workload=file or workload=capture instead of setting it; a workload described in place has no 'kind'."
        )
    for key in values:
        if key not in _KEYS[kind]:
            known = ", ".join(f"workload.{name}" for name in _KEYS[kind])
            raise ConfigurationError(
                f"workload.{key}={values[key]}: workload={kind} has no such key. Known: {known}."
                f"{nearest(str(key), _KEYS[kind])}"
            )
    path = _path(values.get("path"), kind)
    if kind == "capture":
        from spepolicy.capture_model import describe_capture
        from spepolicy.perfdata import read

        description = describe_capture(read(path), thread=values.get("thread"), cpu_ghz=values.get("cpu_ghz"))
        return build_workload(description, where=f"workload.path={path}", cycle_ps=cycle_ps)
    return build_workload(_description(path), where=str(path), cycle_ps=cycle_ps)


def _path(value: Any, kind: str) -> Path:
    if not isinstance(value, str) or not value:
        example = "mine.yaml" if kind == "file" else "perf.data"
        raise ConfigurationError(
            f"workload.path={'' if value is None else value}: workload={kind} needs the name of a file. "
            f"Set workload.path=./{example}."
        )
    path = Path(value).expanduser()
    if not path.is_file():
        raise ConfigurationError(f"workload.path={value}: there is no such file. Rule: a name from the current folder.")
    return path


def _description(path: Path) -> dict[str, Any]:
    import yaml

    try:
        description = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"workload.path={path}: not YAML: {' '.join(str(error).split())}. Rule: a description as "
            "conf/workload/*.yaml and the workload recorder have it."
        ) from None
    if not isinstance(description, dict):
        raise ConfigurationError(
            f"workload.path={path}: a list or a single value. Rule: a mapping with 'source' and more."
        )
    if "defaults" in description:
        raise ConfigurationError(
            f"workload.path={path}: has a defaults list, which only a file of conf/workload can have. "
            "Remedy: write its 'latencies' out."
        )
    return description
