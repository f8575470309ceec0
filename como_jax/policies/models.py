"""From a config of `experiments/train_policy.py` to the definition of its policy."""

from __future__ import annotations

from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.nn.model_def import ModelDef, compute_options, define
from como_jax.nn.vit import vit_config
from como_jax.policies.autoregressive import AutoregressivePolicy
from como_jax.policies.diffusion import DiffusionPolicy
from como_jax.policies.vla import LatentVla
from como_jax.spec.policies import (
    AutoregressiveConfig,
    DiffusionConfig,
    DiffusionPolicyConfig,
    ObservationConfig,
    VlaConfig,
)
from como_jax.spec.sections import fields_of
from como_jax.spec.towers import DecoderConfig, TextConfig


def build_policy(config: ConfigDict) -> ModelDef:
    """The policy that a config with all sizes describes.

    Raises:
      ConfigError: a name or size in the config makes no model; the message names it.
    """
    if config.family not in POLICY_FAMILIES:
        raise ConfigError(f"config.family {config.family!r} must be one of {', '.join(POLICY_FAMILIES)}.")
    policy, settings = _POLICIES[config.family], MODEL_CONFIGS[config.family](config)
    return define(policy, observation_config(config), settings, **compute_options(config))


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
    fields = fields_of(TextConfig, config.text)
    if config.text.tower == "tokens":
        # What reads the tokens is the model itself.
        fields["width"] = config.model.width
    return TextConfig(**fields)


def diffusion_policy_config(config: ConfigDict) -> DiffusionPolicyConfig:
    """The diffusion policy's part of the config."""
    fields = fields_of(DiffusionPolicyConfig, config.model) | _window(config)
    latent_size = config.model.latent_queries * config.model.latent_dim
    return DiffusionPolicyConfig(
        **{**fields, "diffusion": DiffusionConfig(**config.model.diffusion), "latent_size": latent_size}
    )


def autoregressive_config(config: ConfigDict) -> AutoregressiveConfig:
    """The autoregressive policy's part of the config."""
    return AutoregressiveConfig(**fields_of(AutoregressiveConfig, config.model), **_window(config))


def vla_config(config: ConfigDict) -> VlaConfig:
    """The vision-language-action model's part of the config."""
    fields = fields_of(VlaConfig, config.model) | _window(config)
    return VlaConfig(**{**fields, "decoder": DecoderConfig(**fields_of(DecoderConfig, config.model))})


MODEL_CONFIGS = {
    "diffusion_policy": diffusion_policy_config,
    "autoregressive_policy": autoregressive_config,
    "latent_vla": vla_config,
}
_POLICIES = {
    "diffusion_policy": DiffusionPolicy,
    "autoregressive_policy": AutoregressivePolicy,
    "latent_vla": LatentVla,
}
POLICY_FAMILIES = tuple(MODEL_CONFIGS)


def _window(config: ConfigDict) -> dict[str, int]:
    """Steps of the history and of the future, as the data section has them."""
    return {"chunk": config.data.chunk, "stride": config.data.stride}
