"""The host of a scenario: silent, random operations, or a recording that is opened and placed in the guest's memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from spepolicy.check import checked, group_at, known_keys, value_at
from spepolicy.errors import ConfigurationError, nearest
from spepolicy.machine.hostops import Backing, HostOp, Kernel
from spepolicy.machine.scenario import PAGE_BYTES, Guest, Host, HostKind, Scenario
from spepolicy.schema import HOST_KINDS, HostSettings, RandomOpSettings, RecordedHostSettings, settings_of
from spepolicy.units import format_count, format_size

__all__ = ["host_notes", "host_of"]

RANDOM_OPS = {op.name.lower(): op for op in HostOp if op is not HostOp.NONE}


def host_of(values: Mapping[str, Any], guest: Guest) -> Host:
    """Return the host that the group *values* describes to *guest*.

    Raises `ConfigurationError`, and `RecordingError` for a recording that cannot be read.
    """
    kind = value_at(values, "kind", "host.")
    if kind not in HOST_KINDS:
        raise ConfigurationError(
            f"host.kind={kind}: must be one of {', '.join(HOST_KINDS)}.{nearest(str(kind), HOST_KINDS)} "
            "Choose a file of conf/host/ with host=NAME instead of setting it."
        )
    settings = settings_of(HOST_KINDS[kind])
    memory = _host_memory(values)
    if kind == "random":
        known_keys(values, {**settings, "ops": None}, "host")
        return Host(kind=HostKind.RANDOM, random_ops=_random_ops(group_at(values, "ops"), guest), **memory)
    known_keys(values, settings, "host")
    if kind == "silent":
        return Host(kind=HostKind.SILENT, **memory)
    scale = checked(value_at(values, "time_scale", "host."), settings["time_scale"], "host.time_scale")
    return Host(
        kind=HostKind.RECORDED, recording=_recording(values, guest), time_scale_q16=round(scale * (1 << 16)), **memory
    )


def _host_memory(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return what `HostSettings` says as fields of `Host`; what a file leaves out has the default."""
    settings = settings_of(HostSettings)
    defaults = {item.name: item.default for item in fields(HostSettings)}
    chosen = {name: checked(values.get(name, defaults[name]), settings[name], f"host.{name}") for name in settings}
    kernel = Kernel["V" + str(chosen["kernel"]).replace(".", "_")]
    if chosen["backing"] == "guest_memfd" and kernel is Kernel.V6_1:
        raise ConfigurationError(
            "host.backing=guest_memfd: Linux 6.1 has no guest_memfd (it came with 6.8). Set host.kernel=6.12."
        )
    return {
        "kernel": kernel,
        "backing": Backing[chosen["backing"].upper()],
        "locked": chosen["mlock"],
        "zone_movable": chosen["zone_movable"],
    }


def _random_ops(values: Mapping[str, Any], guest: Guest) -> tuple[tuple[int, int, int], ...]:
    """Return a row an operation, by HostOp number: the order of the draws must not depend on the order in a file."""
    known_keys(values, RANDOM_OPS, "host.ops")
    settings = settings_of(RandomOpSettings)
    rows = []
    for name, entry in values.items():
        where = f"host.ops.{name}"
        if not isinstance(entry, Mapping):
            raise ConfigurationError(
                f"{where}={entry}: needs a rate and a size. Write {where}={{every: 10ms, pages: 1}}."
            )
        known_keys(entry, settings, where)
        every_ps = checked(value_at(entry, "every", f"{where}."), settings["every"], f"{where}.every")
        pages = checked(value_at(entry, "pages", f"{where}."), settings["pages"], f"{where}.pages")
        if pages > guest.ram_pages:
            raise ConfigurationError(
                f"{where}.pages={pages}: more than the guest has, {format_count(guest.ram_pages)}. "
                f"Set {where}.pages={guest.ram_pages} or less, or a larger guest.memory."
            )
        if every_ps:
            rows.append((int(RANDOM_OPS[name]), every_ps, pages))
    return tuple(sorted(rows))


def _recording(values: Mapping[str, Any], guest: Guest) -> Any:
    """Open and place what host.path names; the same settings give the same object."""
    settings = settings_of(RecordedHostSettings)
    defaults = {item.name: item.default for item in fields(RecordedHostSettings)}
    names = ("placement", "offset", "recorded_base", "recorded_memory")
    chosen = {name: checked(values.get(name, defaults[name]), settings[name], f"host.{name}") for name in names}
    for name in ("offset", "recorded_base", "recorded_memory"):
        chosen[name] //= PAGE_BYTES
    unknown = values.get("unknown_op")
    if unknown is not None and unknown not in RANDOM_OPS:
        raise ConfigurationError(
            f"host.unknown_op={unknown}: there is no such operation.{nearest(str(unknown), RANDOM_OPS)} "
            f"Choose one of {', '.join(RANDOM_OPS)}."
        )
    path = checked(value_at(values, "path", "host."), settings["path"], "host.path")
    file = Path(path).expanduser()
    recording = _opened(
        path if "/" not in path else str(file), file.stat().st_mtime_ns if file.exists() else 0,
        chosen["recorded_base"], chosen["recorded_memory"], unknown,
    )  # fmt: skip
    if chosen["placement"] == "same" and recording.ram_pages > guest.ram_pages:
        needed = 1 << (recording.ram_pages - 1).bit_length()
        raise ConfigurationError(
            f"host.path={path}: recorded from a guest of {format_size(recording.ram_pages * PAGE_BYTES)}, larger than "
            f"this one. Set guest.memory={format_size(needed * PAGE_BYTES)} or more, host.placement=scale or "
            "host.placement=fold, or choose another host."
        )
    if chosen["placement"] == "same" and chosen["offset"] == 0:
        return recording
    return _placed(recording, guest.ram_pages, chosen["placement"], chosen["offset"])


@lru_cache(maxsize=16)
def _opened(path: str, changed_ns: int, base_page: int, pages: int, unknown_op: str | None) -> Any:
    from spepolicy.recording import open_recording

    default = RANDOM_OPS[unknown_op] if unknown_op else None
    return open_recording(path, ram_base_gfn=base_page, ram_pages=pages, default_op=default)


@lru_cache(maxsize=16)
def _placed(recording: Any, ram_pages: int, placement: str, offset_pages: int) -> Any:
    from spepolicy.recording.placement import place

    placed = place(recording, ram_pages, placement, offset_pages)
    if len(placed) == 0:
        raise ConfigurationError(
            f"host.offset={format_size(offset_pages * PAGE_BYTES)}: no event of the recording lies in the guest's "
            f"memory, {format_size(ram_pages * PAGE_BYTES)}. Choose a smaller offset, or host.placement=fold."
        )
    return placed


def host_notes(values: Mapping[str, Any], scenario: Scenario) -> tuple[str, ...]:
    """Return the lines that a summary must state about the host of *scenario*: what it is, and what is assumed.

    *values*: the group host of its configuration.
    """
    if scenario.host.kind is HostKind.SILENT:
        return ("Host: silent, it never touches the guest's memory.",)
    if scenario.host.kind is HostKind.RANDOM:
        return ("Host: random operations; rates are assumptions or from recordings (conf/host says which).",)
    recording: Any = scenario.host.recording
    from spepolicy.recording import shipped
    from spepolicy.recording.placement import OUTSIDE

    scale = f"at {values['time_scale']:g} recording seconds per simulated second (host.time_scale, an assumption"
    if values["path"] in shipped():
        pace = f"{scale}: order, counts and addresses are real, durations are those of an emulator)"
    elif values["time_scale"] == 1:
        pace = "at its own pace (host.time_scale=1)"
    else:
        pace = f"{scale}; a trace of real hardware has real durations: play it with host.time_scale=1)"
    notes = (
        f"Host: recording '{recording.scenario or values['path']}' of {recording.kernel or 'an unknown kernel'}, "
        f"{len(recording)} events in {recording.duration_us / 1e6:.1f} s, played {pace}.",
    )

    # What a shipped recording left out is told in its README.
    told = {OUTSIDE} if values["path"] in shipped() else set(recording.ignored)
    return (*notes, *_left_out({kind: n for kind, n in recording.ignored.items() if kind in told}))


def _left_out(ignored: Mapping[str, int]) -> tuple[str, ...]:
    """Say what of a trace did not become an event, by kind, most frequent first."""
    kinds = sorted(ignored.items(), key=lambda item: (-item[1], item[0]))
    if not kinds:
        return ()
    told = ", ".join(f"{count} {kind}" for kind, count in kinds)
    return (f"Host: lines of the trace that became no event, by kind: {told}.",)
