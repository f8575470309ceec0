"""Policies as `como_jax.runtime_torch` has them: what is exported of a run, and where its parameters lie."""

from __future__ import annotations

import dataclasses
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from como_jax.errors import ConversionError, RunError
from como_jax.policies.build import MODEL_CONFIGS, observation_config
from como_jax.spec.exported import POLICY_FAMILIES, ExportedPolicy, PolicyModel
from como_jax.spec.interface import PolicySpec
from como_jax.spec.policies import AutoregressiveConfig, DiffusionPolicyConfig
from como_jax.weights.observation_tables import observation_table
from como_jax.weights.policy_tables import autoregressive_policy_table, diffusion_policy_table, latent_vla_table
from como_jax.weights.tables import DeepTable


def describe_policy(config: ConfigDict, spec: PolicySpec) -> ExportedPolicy:
    """The policy of a run, without what acting does not need.

    Args:
      config: of the run.
      spec: of the same, from its policy.json.

    Raises:
      ConversionError: a family that the runtime does not have.
      RunError: the policy was trained on latent motion alone.
    """
    if config.family not in POLICY_FAMILIES:
        raise ConversionError(
            f"Policies of family {config.family!r} cannot be exported yet; those that can: "
            f"{', '.join(POLICY_FAMILIES)}."
        )
    if not spec.robots:
        raise RunError(
            "The policy was trained on latent motion alone, so it cannot act; finetune it on robot data first."
        )
    observation = observation_config(config)
    text = observation.text
    # The folder holds the tokenizer's file itself.
    text = dataclasses.replace(text, tokenizer_file=epath.Path(text.tokenizer_file).name if text.tokenizer_file else "")
    model = _acting(MODEL_CONFIGS[config.family](config))
    return ExportedPolicy(config.family, dataclasses.replace(observation, text=text), model, spec)


def policy_table(described: ExportedPolicy) -> DeepTable:
    """Where the parameters of an exported policy lie."""
    observation, model = described.observation, described.model
    if isinstance(model, DiffusionPolicyConfig):
        return {**observation_table(observation, model.width), **diffusion_policy_table(model)}
    if isinstance(model, AutoregressiveConfig):
        table = autoregressive_policy_table(model, observation.instants)
        return {**observation_table(observation, model.width), **table}
    return {**observation_table(observation, model.decoder.width), **latent_vla_table(model)}


def not_exported(described: ExportedPolicy) -> dict[str, str]:
    """Parameters that acting does not need, by prefixes of their paths, and what they are."""
    if not isinstance(described.model, AutoregressiveConfig):
        return {"latent": "output of latent motion, which acting does not need"}
    if described.model.generate_latents:
        return {}
    return dict.fromkeys(
        ("latent_start", "latent_pos", "latent_in", "latent_head"), "of latent motion, which no action reads"
    )


def _acting(model: PolicyModel) -> PolicyModel:
    """The settings without latents, which only an autoregressive policy that generates them needs to act."""
    if isinstance(model, DiffusionPolicyConfig):
        return dataclasses.replace(model, latent_size=0)
    if isinstance(model, AutoregressiveConfig) and model.generate_latents and model.latent_dim:
        return model
    without: dict[str, Any] = {"latent_dim": 0, "codebook_size": 0, "latent_head": "regression"}
    if isinstance(model, AutoregressiveConfig):
        without["generate_latents"] = False
    return dataclasses.replace(model, **without)
