"""Plugins are found by entry point, one that cannot be used is reported, and none takes the others down."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from spepolicy.errors import ConfigurationError, PluginError, UnknownPolicyError
from spepolicy.plugins import broken_plugins, build_policy, find_policy, installed_policies, installed_reporters

Install = Callable[..., Path]
SHIPPED = {"bare_metal", "pin_vm", "map_on_fault", "eager_pin", "pin_on_fault", "synthetic_fault"}

GOOD = '''
from dataclasses import dataclass, field
from enum import Enum
from spepolicy.hookspecs import doc, hookimpl

class Mood(Enum):
    CALM = 1
    BUSY = 2

@dataclass(frozen=True)
class Stranger:
    """Do as a stranger does.

    More text.
    """
    wait_us: float = field(default=2.0, metadata=doc("how long it waits", unit="us", minimum=0, maximum=10))
    pages: int = field(default=4, metadata=doc("pages", minimum=1))
    mode: str = field(default="slow", metadata=doc("how", choices=("slow", "fast")))
    mood: Mood = Mood.CALM
    limit: int | None = None
    names: list[str] = field(default_factory=list)
    eager: bool = False

    @hookimpl
    def stage2_fault(self, faults):
        faults.resume()
'''


def policy(body: str, head: str = "@dataclass", name: str = "Odd") -> str:
    return (
        "from dataclasses import dataclass, field\nimport numpy as np\n"
        "from spepolicy.hookspecs import doc, hookimpl\n"
        f"{head}\nclass {name}:\n{body}\n"
    )


def test_the_shipped_policies_come_through_the_public_door() -> None:
    installed = installed_policies()
    assert set(installed) >= SHIPPED
    for name in SHIPPED:
        assert installed[name].distribution == "spepolicy"
        assert installed[name].cls.__module__.startswith("spepolicy_plugins.")
        assert installed[name].summary.endswith(".")
    assert "kernel" in installed_reporters()


def test_a_strangers_policy_is_found_with_its_origin_and_summary(install: Install) -> None:
    install(GOOD, {"stranger": "Stranger"}, distribution="strange-things")
    info = installed_policies()["stranger"]
    assert (info.name, info.summary) == ("stranger", "Do as a stranger does.")
    assert (info.distribution, info.version) == ("strange-things", "1.2")
    assert set(installed_policies()) >= SHIPPED


def test_an_uninstalled_plugin_is_gone(install: Install) -> None:
    install(GOOD, {"stranger": "Stranger"})
    assert "stranger" in installed_policies()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.path", [p for p in __import__("sys").path if "site" not in Path(p).name])
        assert "stranger" not in installed_policies()


@pytest.mark.parametrize(
    ("source", "attribute", "reason"),
    [
        ("import nothing_of_that_name", "X", "ModuleNotFoundError"),
        ("raise RuntimeError('on import')", "X", "RuntimeError: on import"),
        ("raise SystemExit(3)", "X", "SystemExit"),
        ("", "Missing", "AttributeError"),
        ("def Function(): pass", "Function", "a function is not a dataclass"),
        (policy('    """Doc."""', head="# no decorator"), "Odd", "Odd is not a dataclass"),
        (policy("    x: int = 1"), "Odd", "Odd has no docstring"),
        (policy('    """Doc."""\n    x: np.ndarray = None'), "Odd", "field x has type ndarray"),
        (policy('    """Doc."""\n    x: "Unknown" = None'), "Odd", "cannot be resolved"),
        (policy('    """Doc."""\n    x: int = 0.5'), "Odd", "the default policy.x=0.5: not an int"),
        (policy('    """Doc."""\n    x: int = field(default=0, metadata=doc("x", minimum=1))'), "Odd", "too small"),
    ],
)
def test_a_broken_plugin_is_reported_and_harms_nobody(
    install: Install, source: str, attribute: str, reason: str
) -> None:
    install(source, {"odd": attribute}, distribution="oddities")
    assert set(installed_policies()) >= SHIPPED
    assert "odd" not in installed_policies()
    text = broken_plugins()["spepolicy.policies: odd"]
    assert reason in text
    assert "oddities 1.2" in text
    with pytest.raises(PluginError, match="policy 'odd' cannot be used") as caught:
        build_policy("odd", {})
    assert reason in str(caught.value)


def test_two_plugins_of_one_name_are_refused_by_naming_both(install: Install) -> None:
    install(GOOD, {"stranger": "Stranger"}, distribution="first")
    install(GOOD, {"stranger": "Stranger"}, distribution="second")
    with pytest.raises(PluginError) as caught:
        find_policy("stranger")
    assert "first 1.2" in str(caught.value)
    assert "second 1.2" in str(caught.value)
    assert set(installed_policies()) >= SHIPPED


def test_a_clash_with_a_shipped_policy_takes_that_name_only(install: Install) -> None:
    install(GOOD, {"eager_pin": "Stranger"}, distribution="impostor")
    with pytest.raises(PluginError, match=r"impostor 1\.2 and spepolicy|spepolicy .* and impostor 1\.2"):
        build_policy("eager_pin", {})
    assert set(installed_policies()) >= SHIPPED - {"eager_pin"}


def test_an_unknown_policy_gets_the_nearest_name() -> None:
    with pytest.raises(UnknownPolicyError, match=r"Did you mean 'eager_pin'\?") as caught:
        build_policy("eager_pn", {})
    assert caught.value.name == "eager_pn"
    assert set(caught.value.known) >= SHIPPED


def test_a_broken_reporter_is_reported(install: Install) -> None:
    source = "class Bad:\n    def __init__(self): raise ValueError('no paper')\nclass Good: pass"
    install(source, {"bad": "Bad", "good": "Good"}, group="spepolicy.reporters")
    assert "no paper" in broken_plugins()["spepolicy.reporters: bad"]
    assert type(installed_reporters()["good"]).__name__ == "Good"
    assert "kernel" in installed_reporters()


class TestFields:
    @pytest.fixture(autouse=True)
    def _stranger(self, install: Install) -> None:
        install(GOOD, {"stranger": "Stranger"})

    def test_defaults_are_the_dataclass_s(self) -> None:
        built = build_policy("stranger", {})
        assert built == find_policy("stranger").cls()

    def test_values_arrive_with_their_types(self) -> None:
        given = {"wait_us": 3, "pages": 1, "mode": "fast", "mood": "BUSY", "limit": 7, "names": ("a",), "eager": True}
        built = build_policy("stranger", given)
        assert (built.wait_us, type(built.wait_us)) == (3.0, float)  # type: ignore[attr-defined]
        assert built.mood.name == "BUSY"  # type: ignore[attr-defined]
        assert built.names == ["a"]  # type: ignore[attr-defined]
        assert build_policy("stranger", {"limit": None}).limit is None  # type: ignore[attr-defined]

    @pytest.mark.parametrize(
        ("field", "value", "parts"),
        [
            ("wiat_us", 3, ["no field of that name", "Did you mean 'wait_us'?"]),
            ("wait_us", 11.0, ["too large", "0..10 us", "policy.wait_us=10"]),
            ("wait_us", -1, ["too small", "policy.wait_us=0"]),
            ("wait_us", float("nan"), ["not finite"]),
            ("wait_us", "3us", ["not a float"]),
            ("wait_us", True, ["not a float"]),
            ("wait_us", None, ["not a float"]),
            ("pages", 0, ["too small", "1 or more"]),
            ("pages", 1.5, ["not an int"]),
            ("pages", True, ["not an int"]),
            ("mode", "fats", ["one of slow, fast", "Did you mean 'fast'?"]),
            ("mode", 3, ["not a str"]),
            ("mood", "CLAM", ["one of CALM, BUSY", "Did you mean 'CALM'?"]),
            ("limit", "many", ["not an int"]),
            ("names", "a", ["not a list"]),
            ("names", [1], ["not a str"]),
            ("eager", 1, ["not a bool", "true or false"]),
        ],
    )
    def test_a_wrong_value_names_key_value_rule_and_remedy(self, field: str, value: object, parts: list[str]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            build_policy("stranger", {field: value})
        message = str(caught.value)
        assert message.startswith(f"policy.{field}=")
        for part in parts:
            assert part in message


def test_a_required_field_must_be_given(install: Install) -> None:
    install(policy('    """Doc."""\n    pages: int'), {"odd": "Odd"})
    with pytest.raises(ConfigurationError, match=r"policy\.pages is missing.*Set policy\.pages=VALUE"):
        build_policy("odd", {})
    assert build_policy("odd", {"pages": 2}).pages == 2  # type: ignore[attr-defined]


def test_what_a_constructor_refuses_is_told_as_the_plugin_s(install: Install) -> None:
    check = "    def __post_init__(self):\n        if self.x > 1: raise ValueError('big')"
    install(policy(f'    """Doc."""\n    x: int = 1\n{check}'), {"odd": "Odd"})
    with pytest.raises(PluginError, match=r"policy 'odd' does not accept its fields .*ValueError: big"):
        build_policy("odd", {"x": 2})
