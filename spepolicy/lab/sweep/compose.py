"""Compose the configurations of a sweep's jobs, thousands a second where Hydra composes a dozen.

Hydra reads and merges every file again for each job. Here jobs that choose the same files share one composition, made
by Hydra itself; what is left of a job are its values, and each distinct value is checked by OmegaConf once. A test
compares the outcome with Hydra's own, job by job.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

from spepolicy.check import check_flags_given
from spepolicy.config import plain
from spepolicy.errors import ConfigurationError
from spepolicy.schema import MISSING

__all__ = ["Composer"]

_UNSET = object()


@dataclass
class _Base:
    """One composition, or a part of one, and what the values of jobs made of it."""

    cfg: Any  # DictConfig in struct mode, without the node `hydra`
    plain: Mapping[str, Any]
    interpolated: bool  # some value refers to another: then every job is resolved on its own
    tried: dict[str, Any] = field(default_factory=dict)  # override -> plain value, or the error that it gives


class Composer:
    """Composes jobs; keeps what they share."""

    def __init__(self, loader: Any, master: Any) -> None:
        """*loader*: Hydra's ConfigLoaderImpl. *master*: the configuration that the sweep itself was composed to."""
        from hydra.core.override_parser.overrides_parser import OverridesParser

        self._loader, self._master = loader, master
        self._parser = OverridesParser.create(config_loader=loader)
        self._parsed: dict[str, Any] = {}
        self._chooses: dict[str, bool] = {}  # override -> it chooses a file of a group
        self._bases: dict[tuple[str, ...], _Base | ConfigurationError] = {}

    def compose(self, overrides: Sequence[str]) -> Mapping[str, Any]:
        """Return the configuration of the job with *overrides* as plain containers, interpolations resolved.

        Containers may be shared between jobs: read-only. Raises `ConfigurationError` with Hydra's reason in our words.
        """
        choices: list[str] = []
        values: list[str] = []
        for text in overrides:
            (choices if self._is_choice(text) else values).append(text)
        policy = next((text for text in choices if self._is_installed_policy(text)), None)
        rest = tuple(text for text in choices if text is not policy)
        config = chosen = None
        if policy is not None and self._base(rest).plain.get("policy") == MISSING:
            mine = [text for text in values if self._parse(text).key_or_group.startswith("policy.")]
            chosen = self._part(self._policy(policy), (f"only {policy}",), mine)
            config = self._part(self._base(rest), rest, [text for text in values if text not in mine])
        elif (base := self._base(tuple(choices))) and (config := self._part(base, tuple(choices), values)):
            return config
        if config is None or chosen is None:
            return self._resolved(self._base(tuple(choices)), values)
        return {**config, **chosen}

    def _part(self, base: _Base, name: tuple[str, ...], values: Sequence[str]) -> Mapping[str, Any] | None:
        """Return *base* with *values*; None if they have to be resolved together."""
        special = tuple(text for text in values if not self._is_plain(base, text))
        if base.interpolated or self._interfere(values, special):
            return None
        if special:
            base = self._changed(base, name, special)
        config: Mapping[str, Any] = base.plain
        for text in values:
            if text not in special:
                config = _patched(config, self._parse(text).key_or_group.split("."), self._value(base, text))
        return config

    # ---- choices -----------------------------------------------------------------------------------------------------

    def _is_choice(self, text: str) -> bool:
        """Whether an override chooses a file, as Hydra's defaults list decides it."""
        if text not in self._chooses:
            override = self._parse(text)
            group = self._loader.repository.group_exists(override.key_or_group)
            self._chooses[text] = override.is_hydra_override() or (group and not isinstance(override.value(), dict))
        return self._chooses[text]

    def _parse(self, text: str) -> Any:
        from hydra.errors import HydraException

        from spepolicy.messages import explain

        if text not in self._parsed:
            try:
                self._parsed[text] = self._parser.parse_override(text)
            except HydraException as error:
                raise ConfigurationError(explain(error)) from error
        return self._parsed[text]

    def _base(self, choices: tuple[str, ...]) -> _Base:
        if choices not in self._bases:
            try:
                self._bases[choices] = self._compose_base(choices)
            except ConfigurationError as error:
                self._bases[choices] = error
        base = self._bases[choices]
        if isinstance(base, ConfigurationError):
            raise base
        return base

    def _compose_base(self, choices: tuple[str, ...]) -> _Base:
        return self._as_base(self._load(choices))

    def _as_base(self, cfg: Any) -> _Base:
        from omegaconf import OmegaConf

        return _Base(cfg, plain(cfg), _refers(OmegaConf.to_container(cfg, resolve=False)))

    def _policy(self, text: str) -> _Base:
        """Return the part of a composition that +policy=NAME adds: one node at a place of its own."""
        from omegaconf import OmegaConf

        key = (f"only {text}",)
        if key not in self._bases:
            cfg = OmegaConf.create({"policy": deepcopy(self._policy_node(self._parse(text).value()))})
            OmegaConf.set_struct(cfg, True)
            self._bases[key] = self._as_base(cfg)
        return self._base(key)

    def _load(self, choices: tuple[str, ...]) -> Any:
        from hydra.errors import HydraException
        from omegaconf import open_dict, read_write
        from omegaconf.errors import OmegaConfBaseException
        from yaml import YAMLError

        from spepolicy.messages import explain

        try:
            cfg = self._loader.load_sweep_config(self._master, list(choices))
        except (HydraException, OmegaConfBaseException, YAMLError) as error:
            raise ConfigurationError(explain(error)) from error
        except ValueError as error:  # Hydra's word for a choice that is no name
            raise ConfigurationError(f"{error}. See --hydra-help.") from error
        with open_dict(cfg), read_write(cfg):
            del cfg["hydra"]
        return cfg

    def _is_installed_policy(self, text: str) -> bool:
        """Whether an override is +policy=NAME of a policy that only its plugin defines, no file of the user's."""
        override = self._parse(text)
        name = override.value()
        if override.key_or_group != "policy" or not override.is_add() or override.package is not None:
            return False
        if not isinstance(name, str) or self._policy_node(name) is None:
            return False
        sources = self._loader.repository.get_sources()
        return not any(source.scheme() != "structured" and source.is_config(f"policy/{name}") for source in sources)

    def _policy_node(self, name: str) -> Any:
        from hydra.core.config_store import ConfigStore

        stored = ConfigStore.instance().repo.get("policy", {}).get(f"{name}.yaml")
        return getattr(stored, "node", None)

    # ---- values ------------------------------------------------------------------------------------------------------

    def _is_plain(self, base: _Base, text: str) -> bool:
        """Whether an override replaces one value that exists by another, whatever the other overrides are."""
        override = self._parse(text)
        value = override.value()
        ordinary = not (override.is_add() or override.is_force_add() or override.is_delete())
        if not ordinary or isinstance(value, dict | list) or "${" in text:
            return False
        return not isinstance(_at(base.plain, override.key_or_group), Mapping | list)

    def _value(self, base: _Base, text: str) -> Any:
        """Return the plain value that an override sets, tried once a base. Raises what OmegaConf says of it."""
        if text not in base.tried:
            try:
                base.tried[text] = self._try(base, text)
            except ConfigurationError as error:
                base.tried[text] = error
        value = base.tried[text]
        if isinstance(value, ConfigurationError):
            raise value
        return value

    def _try(self, base: _Base, text: str) -> Any:
        from omegaconf import DictConfig, OmegaConf

        head, _, key = self._parse(text).key_or_group.rpartition(".")
        parent = OmegaConf.select(base.cfg, head) if head else base.cfg
        node = parent._get_node(key, validate_access=False) if isinstance(parent, DictConfig) else None
        before = deepcopy(node)
        try:
            self._apply(base.cfg, [text])
            held = OmegaConf.to_container(OmegaConf.masked_copy(parent, [key]), enum_to_str=True)
        finally:
            if before is not None:
                parent._set_item_impl(key, before)
        assert isinstance(held, dict)
        return held[key]

    def _interfere(self, values: Sequence[str], special: Sequence[str]) -> bool:
        """Whether a special override refers to other values, or concerns the same place as any other override."""
        for text in special:
            mine = self._parse(text).key_or_group
            others = [self._parse(other).key_or_group for other in values if other is not text]
            if "${" in text or any(f"{mine}.".startswith(f"{o}.") or f"{o}.".startswith(f"{mine}.") for o in others):
                return True
        return False

    def _changed(self, base: _Base, choices: tuple[str, ...], special: tuple[str, ...]) -> _Base:
        """Return *base* with overrides that add, delete or merge; jobs that have the same ones share it."""
        key = (*choices, *special)
        if key not in self._bases:
            cfg = deepcopy(base.cfg)
            try:
                self._apply(cfg, special)
                self._bases[key] = self._as_base(cfg)
            except ConfigurationError as error:
                self._bases[key] = error
        changed = self._bases[key]
        if isinstance(changed, ConfigurationError):
            raise changed
        return changed

    def _resolved(self, base: _Base, values: Sequence[str]) -> Mapping[str, Any]:
        """Compose one job on a copy of its own: for overrides that concern or refer to each other."""
        from omegaconf.errors import OmegaConfBaseException

        from spepolicy.messages import explain

        cfg = deepcopy(base.cfg)
        self._apply(cfg, values)
        try:
            return plain(cfg)
        except OmegaConfBaseException as error:
            raise ConfigurationError(explain(error)) from error

    def _apply(self, cfg: Any, values: Sequence[str]) -> None:
        from hydra._internal.config_loader_impl import ConfigLoaderImpl
        from hydra.errors import HydraException
        from omegaconf.errors import OmegaConfBaseException

        from spepolicy.messages import explain

        parsed = [self._parse(text) for text in values]
        try:
            ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
        except (HydraException, OmegaConfBaseException) as error:
            raise ConfigurationError(explain(error)) from error
        check_flags_given(cfg, parsed)


def _at(config: Mapping[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return _UNSET
        value = value[part]
    return value


def _patched(config: Mapping[str, Any], path: Sequence[str], value: Any) -> Mapping[str, Any]:
    """Return *config* with *value* at *path*; what lies beside the path is shared."""
    if len(path) == 1:
        return {**config, path[0]: value}
    return {**config, path[0]: _patched(config[path[0]], path[1:], value)}


def _refers(raw: Any) -> bool:
    """Whether an unresolved container holds an interpolation."""
    if isinstance(raw, Mapping):
        return any(_refers(value) for value in raw.values())
    if isinstance(raw, list):
        return any(_refers(value) for value in raw)
    return isinstance(raw, str) and "${" in raw
