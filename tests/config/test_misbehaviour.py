"""`guest.misbehaviour`: from the names in a file to rows of the machine, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from spepolicy.config import to_scenario
from spepolicy.errors import ConfigurationError
from spepolicy.machine.guestacts import GuestAct, Moment

Composed = Callable[..., dict[str, Any]]
MS = 10**9


@pytest.fixture
def acts(composed: Composed) -> Callable[..., Any]:
    return lambda *overrides, guest="linux": (
        to_scenario(composed("host=silent", f"guest={guest}", *overrides)).guest.acts
    )


def test_an_act_alone_has_the_defaults_of_the_schema(acts: Callable[..., Any]) -> None:
    assert acts() == ()
    assert acts("guest.misbehaviour.unmap.every=1ms") == ((int(GuestAct.UNMAP), MS, 0, int(Moment.ANY), 1, 1),)
    once = acts("guest.misbehaviour.remap={at: 3ms, moment: profiling, tlbi: false, pages: 8}")
    assert once == ((int(GuestAct.REMAP), 0, 3 * MS, int(Moment.PROFILING), 0, 8),)


def test_an_act_that_never_comes_is_no_row(acts: Callable[..., Any]) -> None:
    assert acts("guest.misbehaviour.unmap.pages=2") == ()


def test_the_hostile_guest_does_everything(acts: Callable[..., Any]) -> None:
    assert {row[0] for row in acts(guest="hostile")} == {int(act) for act in GuestAct}
    assert [row[0] for row in acts(guest="hostile")] == sorted(row[0] for row in acts(guest="hostile"))


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (("guest.misbehaviour.remapp.every=1ms",), ("guest.misbehaviour.remapp", "no such setting", "'remap'")),
        (("guest.misbehaviour.remap={every: 1ms, at: 2ms}",), ("every=1ms", "at=2ms", "Leave one of them out")),
        (("guest.misbehaviour.remap={every: 1ms, moment: before_eret}",), ("{1,0}", "guest.profile_kernel=false")),
        (("guest.misbehaviour.remap={every: 1ms, pages: 2048}",), ("pages=2048", "1024", "larger guest.buffer")),
        (("guest.misbehaviour.remap={every: 5}",), ("guest.misbehaviour.remap.every", "unit")),
        (("guest.misbehaviour.remap={every: 1ms, moment: never}",), ("moment=never", "before_eret")),
        (("guest.misbehaviour.remap={every: 1ms, pages: 0}",), ("pages=0", "too small")),
    ],
)  # fmt: skip
def test_what_is_lawless_is_refused(composed: Composed, overrides: tuple[str, ...], parts: tuple[str, ...]) -> None:
    config = composed("host=silent")
    name, _, value = overrides[0].removeprefix("guest.misbehaviour.").partition("=")
    act, _, key = name.partition(".")
    import yaml

    config["guest"]["misbehaviour"] = {act: {key: yaml.safe_load(value)} if key else yaml.safe_load(value)}
    with pytest.raises(ConfigurationError) as caught:
        to_scenario(config)
    for part in parts:
        assert part in str(caught.value)
