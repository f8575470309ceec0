"""From a config to a policy's definition."""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.models.autoregressive_policy import AutoregressiveConfig, AutoregressivePolicy
from como_jax.models.build import DTYPES, vit_config
from como_jax.models.diffusion import DiffusionConfig
from como_jax.models.diffusion_policy import DiffusionPolicy, DiffusionPolicyConfig
from como_jax.models.observation import ObservationConfig
from como_jax.models.text import TextConfig
from como_jax.training.train_state import ModelDef
from como_jax.weights.text import text_config_of

POLICY_FAMILIES = ("diffusion_policy", "autoregressive_policy")


def build_policy(config: ConfigDict) -> ModelDef:
    """The policy that a config describes, once `with_sizes` has filled in what follows from the data.

    Raises:
      ConfigError: a name or size in the config makes no model; the message names it.
    """
    if config.train.dtype not in DTYPES:
        raise ConfigError(f"config.train.dtype {config.train.dtype!r} must be one of {', '.join(DTYPES)}.")
    observation = observation_config(config)
    options = {"dtype": DTYPES[config.train.dtype], "remat": config.train.remat}
    if config.family == "diffusion_policy":
        diffusion = diffusion_policy_config(config)
        return ModelDef.create(lambda rngs: DiffusionPolicy(observation, diffusion, **options, rngs=rngs))
    if config.family == "autoregressive_policy":
        autoregressive = AutoregressiveConfig(**_model_fields(config, AutoregressiveConfig))
        return ModelDef.create(lambda rngs: AutoregressivePolicy(observation, autoregressive, **options, rngs=rngs))
    raise ConfigError(f"config.family {config.family!r} must be one of {', '.join(POLICY_FAMILIES)}.")


def observation_config(config: ConfigDict) -> ObservationConfig:
    """What the policy reads."""
    return ObservationConfig(
        vit=vit_config(config),
        text=text_config(config),
        image_tower=config.encoder.tower,
        freeze_images=config.encoder.frozen,
        pool=config.encoder.pool,
        cameras=max(1, len(config.data.cameras)),
        instants=config.data.instants,
        state_size=config.data.state_size,
    )


def text_config(config: ConfigDict) -> TextConfig:
    """The instruction's tower."""
    names = {field.name for field in dataclasses.fields(TextConfig)}
    return TextConfig(**{name: value for name, value in config.text.items() if name in names})


def with_text_sizes(config: ConfigDict) -> ConfigDict:
    """The config with the sizes of a public text tower, which are those of its weights."""
    if config.text.tower not in ("clip", "t5"):
        return config
    config = config.copy_and_resolve_references()
    config.text.update(dataclasses.asdict(text_config_of(config.text.weights, text_config(config))))
    return config


def diffusion_policy_config(config: ConfigDict) -> DiffusionPolicyConfig:
    """The diffusion policy's part of the config."""
    fields = _model_fields(config, DiffusionPolicyConfig)
    latent_size = config.model.latent_queries * config.model.latent_dim
    return DiffusionPolicyConfig(
        **{**fields, "diffusion": DiffusionConfig(**config.model.diffusion), "latent_size": latent_size}
    )


def _model_fields(config: ConfigDict, of: type) -> dict[str, Any]:
    """The fields of a dataclass that the config's model section has, and the window that its data section has."""
    names = {field.name for field in dataclasses.fields(of)}
    found = {name: value for name, value in config.model.items() if name in names}
    return found | {"chunk": config.data.chunk, "stride": config.data.stride}
