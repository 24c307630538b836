"""A search that a bound ended, as one file, from which it goes on as if it had never stopped."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spepolicy.archive import read_arrays
from spepolicy.errors import ConfigurationError, OutputError
from spepolicy.explore.acts import event_name
from spepolicy.explore.bench import Model
from spepolicy.explore.frontier import Block, Frontier

Ints = NDArray[np.int64]

__all__ = ["fingerprint", "load", "save"]


def fingerprint(model: Model, base: Ints) -> str:
    """Return what tells two models apart: events, bounds of events, the policy with its fields, the initial image."""
    text = json.dumps(
        [
            [event_name(event) for event in model.events],
            list(model.limits),
            [model.bare, model.edits, model.scenario.cpu.spe_version, model.scenario.cpu.align_bytes],
            [model.scenario.kvm.memlock_pages, int(model.scenario.kvm.irq_delivery), int(model.scenario.kvm.bug)],
            model.name,
            repr(model.policy),
        ]
    )
    return hashlib.sha256(text.encode() + base.tobytes()).hexdigest()


def _blocks(frontier: Frontier, skip: int) -> dict[str, Ints]:
    blocks = list(frontier.units(1 << 20, skip))
    first = blocks[0].first if blocks else 0
    starts, words, offset = [], [], 0
    for block in blocks:
        starts.append(block.starts + offset)
        words.append(block.words)
        offset += len(block.words)
    none = np.zeros(0, dtype=np.int64)
    return {
        "words": np.concatenate(words) if words else none,
        "starts": np.concatenate(starts) if starts else none,
        "first": np.array([first], dtype=np.int64),
    }


def save(path: Path, mark: str, arrays: dict[str, Ints], waiting: Frontier, done: int, following: Frontier,
         about: dict[str, Any]) -> None:  # fmt: skip
    """Write a checkpoint to *path*, whole or not at all. *arrays*: hashes, links, edges. *about*: for JSON."""
    content = dict(arrays)
    content |= {f"waiting_{name}": array for name, array in _blocks(waiting, done).items()}
    content |= {f"following_{name}": array for name, array in _blocks(following, 0).items()}
    about = about | {"mark": mark}
    content["about"] = np.frombuffer(json.dumps(about).encode(), dtype=np.uint8)
    partial = path.with_suffix(".part")
    try:
        with partial.open("wb") as file:
            np.savez(file, **content)  # type: ignore[arg-type]
        os.replace(partial, path)
    except OSError as error:
        raise OutputError(
            f"the search cannot be saved to '{path}': {error.strerror or error}. Rule: a folder with room for it. "
            "Remedy: set output.dir."
        ) from error


def load(path: Path, mark: str) -> tuple[dict[str, Ints], Block | None, Block | None, dict[str, Any]]:
    """Return (arrays, waiting, following, about) of a checkpoint of the model that *mark* stands for."""
    try:
        content = read_arrays(path)
        about = json.loads(content.pop("about").tobytes())
    except (OSError, ValueError, KeyError) as error:
        raise ConfigurationError(
            f"explore.resume: '{path}' cannot be read: {error}. Rule: the folder of an exploration that a bound ended."
        ) from error
    if not isinstance(about, dict) or about.get("mark") != mark:
        raise ConfigurationError(
            f"explore.resume: '{path}' is of another policy, configuration or version. Rule: only bounds (max_states, "
            "max_depth, max_time, frontier_memory) may differ. Remedy: give the same settings."
        )

    def block(name: str) -> Block | None:
        starts = content[f"{name}_starts"]
        return Block(content[f"{name}_words"], starts, int(content[f"{name}_first"][0])) if len(starts) else None

    return content, block("waiting"), block("following"), about
