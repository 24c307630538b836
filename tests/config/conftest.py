"""Compose configurations from the shipped files."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf

from spepolicy.config import register
from spepolicy.launch import register_policies
from spepolicy.schema import GROUPS


@pytest.fixture
def composed() -> Callable[..., dict[str, Any]]:
    """Return a function that composes the shipped configuration with overrides, as plain containers.

    Each choice of files is composed once; single values are then set as Hydra sets them, which is much faster.
    """

    def build(*overrides: str) -> dict[str, Any]:
        files = tuple(word for word in overrides if word[0] == "+" or word.partition("=")[0] in GROUPS)
        cfg = copy.deepcopy(_compose(files))
        for override in OverridesParser.create().parse_overrides([word for word in overrides if word not in files]):
            OmegaConf.update(cfg, override.key_or_group, override.value(), merge=True)
        container = OmegaConf.to_container(cfg, resolve=True)
        assert isinstance(container, dict)
        return {str(key): value for key, value in container.items()}

    return build


@cache
def _compose(files: tuple[str, ...]) -> DictConfig:
    register()
    register_policies()
    with initialize_config_module("spepolicy_conf", version_base="1.3"):
        return compose("config", overrides=list(files))
