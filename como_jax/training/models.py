"""From a config to the model of any family: the sizes that it leaves open, the model, and what its rates count."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from etils import epath
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.motion.models import FAMILIES, build_model, pairs_of_clip
from como_jax.nn.model_def import ModelDef
from como_jax.policies.models import build_policy, text_config
from como_jax.spec.tokenizers import make_tokenizer
from como_jax.spec.towers import PUBLIC_TOWERS
from como_jax.weights.paligemma import paligemma_sizes
from como_jax.weights.text import text_config_of


class Unit(NamedTuple):
    """What rates are counted in: its name, and how many of them one element of a batch holds."""

    name: str
    per_element: int


def resolve(config: ConfigDict, sizes: Mapping[str, int]) -> ConfigDict:
    """The config with all sizes: those that follow from data, and those of the public weights that it names.

    Args:
      config: of a recipe, in which a size of 0 means that it follows from the data.
      sizes: of the data, by the field's full name, such as "model.action_size": `sizes()` of the opened data, or
        `assumed_sizes` where there is none.

    Raises:
      ConfigError: the config gives a size that is not the data's, or lacks a file that its towers need.
      RunError: weights are missing, unreadable or of no known kind.
    """
    config = config.copy_and_resolve_references()
    for name, size in sizes.items():
        section, _, field = name.partition(".")
        given = config[section][field]
        if given not in (0, size):
            raise ConfigError(f"{name} is {given}, but the data's is {size}; set it to 0.")
        config[section][field] = size
    if "text" in config:
        _fill_public_sizes(config)
    return config


def make_model(config: ConfigDict) -> ModelDef:
    """The model of any family.

    Args:
      config: after `resolve`.

    Raises:
      ConfigError: a name or size in the config makes no model; the message names it.
    """
    return build_model(config) if config.family in FAMILIES else build_policy(config)


def unit_of(config: ConfigDict) -> Unit:
    """Frame pairs of clips, or samples of a policy."""
    return Unit("pairs", pairs_of_clip(config)) if config.family in FAMILIES else Unit("samples", 1)


def _fill_public_sizes(config: ConfigDict) -> None:
    """Puts the sizes of the public weights and of the tokenizer that a policy's config names into it."""
    text, weights = config.text, config.model.get("weights")
    if weights:
        if not text.tokenizer_file:
            raise ConfigError("model.weights needs text.tokenizer_file, the tokenizer.model that comes with them.")
        for section, fields in paligemma_sizes(weights).items():
            config[section].update(fields)
    if text.tower in PUBLIC_TOWERS:
        text.update(dataclasses.asdict(text_config_of(text.weights, text_config(config))))
    if text.tower == "tokens":
        tokenizer = make_tokenizer(
            "tokens", text.max_length, epath.Path(text.tokenizer_file) if text.tokenizer_file else ""
        )
        text.vocabulary_size = max(text.vocabulary_size, tokenizer.vocabulary_size)
