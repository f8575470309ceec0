"""Policies as `como_jax.runtime_torch` has them: one table for each, used to write them and to read them again.

`describe_policy` and `policy_table` are for the export of a run, `read_policy` reads what it wrote.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from como_jax.errors import ConversionError, RunError
from como_jax.policies.build import diffusion_policy_config, observation_config, text_config, vla_config
from como_jax.policies.spec import PolicySpec
from como_jax.spec.policies import AutoregressiveConfig, DiffusionConfig, DiffusionPolicyConfig, VlaConfig
from como_jax.spec.towers import DecoderConfig
from como_jax.weights.exported import read_exported
from como_jax.weights.observation_tables import observation_table
from como_jax.weights.policy_tables import autoregressive_policy_table, diffusion_policy_table, latent_vla_table
from como_jax.weights.tables import DeepTable

_ENCODER_FIELDS = ("patch_size", "width", "depth", "num_heads", "mlp_width")
_AUTOREGRESSIVE_FIELDS = (
    "width",
    "depth",
    "num_heads",
    "chunk",
    "action_size",
    "generate_latents",
    "latent_queries",
    "latent_dim",
    "codebook_size",
    "latent_head",
    "head_width",
    "head_depth",
    "diffusion_steps",
    "temperature",
)
_VLA_FIELDS = (
    "chunk",
    "action_size",
    "action_head",
    "num_bins",
    "head_width",
    "head_depth",
    "flow_steps",
    "causal_text",
    "temperature",
)
_TEXT_FIELDS = ("tower", "max_length", "width", "depth", "num_heads", "pool", "vocabulary_size", "embedding_size")
_PUBLIC_TEXT_FIELDS = {
    "clip": ("mlp_width", "activation", "norm_epsilon", "positions"),
    "t5": ("mlp_width", "activation", "norm_epsilon", "head_size", "relative_buckets", "relative_distance"),
}


def describe_policy(config: ConfigDict, spec: PolicySpec) -> dict[str, Any]:
    """What config.json says of the policy of a run: kind, family, sizes, what it sees, and the scales of its robots.

    Args:
      config: of the run.
      spec: of the same, from its policy.json.

    Raises:
      ConversionError: a family that the runtime does not have.
      RunError: the policy was trained on latent motion alone.
    """
    if config.family not in _DESCRIBERS:
        raise ConversionError(
            f"Policies of family {config.family!r} cannot be exported yet; those that can: {', '.join(_DESCRIBERS)}."
        )
    if not spec.scales:
        raise RunError(
            "The policy was trained on latent motion alone, so it cannot act; finetune it on robot data first."
        )
    return {
        "kind": "policy",
        "family": config.family,
        "observation": _describe_observation(config),
        "model": _DESCRIBERS[config.family](config),
        "interface": {
            "cameras": list(spec.cameras),
            "fit": spec.fit,
            "stride": spec.stride,
            "control_rate": float(spec.control_rate),
            "uses_text": spec.uses_text,
        },
        "robots": {
            name: {"action": scales.action.to_json(), "state": scales.state and scales.state.to_json()}
            for name, scales in spec.scales.items()
        },
    }


def policy_table(described: Mapping[str, Any]) -> DeepTable:
    """Where the parameters of a policy lie, from what `describe_policy` says of it."""
    return _TABLES[described["family"]](described)


def not_exported(described: Mapping[str, Any]) -> dict[str, str]:
    """Parameters that acting does not need, by prefixes of their paths, and what they are."""
    if described["family"] != "autoregressive_policy":
        return {"latent": "output of latent motion, which acting does not need"}
    if described["model"]["generate_latents"]:
        return {}
    return dict.fromkeys(
        ("latent_start", "latent_pos", "latent_in", "latent_head"), "of latent motion, which no action reads"
    )


def read_policy(directory: epath.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """What config.json says of an exported policy, and its parameters, nested by module name, without `not_exported`.

    Raises:
      RunError: a file is missing or damaged, or they do not fit each other.
    """
    return read_exported(directory, policy_table, "policy")


def _describe_observation(config: ConfigDict) -> dict[str, Any]:
    observation = observation_config(config)
    return {
        "image_tower": observation.image_tower,
        "image_size": observation.vit.image_size,
        "encoder": _fields(observation.vit, _ENCODER_FIELDS),
        "pool": observation.pool,
        "cameras": observation.cameras,
        "instants": observation.instants,
        "state_size": observation.state_size,
        "text": _describe_text(config),
    }


def _describe_text(config: ConfigDict) -> dict[str, Any]:
    text = text_config(config)
    described = _fields(text, (*_TEXT_FIELDS, *_PUBLIC_TEXT_FIELDS.get(text.tower, ())))
    # What 0 stands for is said.
    if text.tower == "clip":
        described["positions"] = text.positions or text.max_length
    if text.tower == "t5":
        described["head_size"] = text.head_size or text.width // text.num_heads
    tokenizer_file = config.text.tokenizer_file
    return described | {
        # Runs of before there were prompts have none in their config.
        "prompt": config.text.get("prompt", "{}"),
        "tokenizer_file": epath.Path(tokenizer_file).name if tokenizer_file else "",
    }


def _describe_diffusion(config: ConfigDict) -> dict[str, Any]:
    policy = diffusion_policy_config(config)
    sizes = _fields(policy, ("width", "depth", "num_heads", "chunk", "action_size"))
    return sizes | {"diffusion": dataclasses.asdict(policy.diffusion), "guidance": float(policy.guidance)}


def _diffusion_table(described: Mapping[str, Any]) -> DeepTable:
    model = dict(described["model"])
    # Guidance is a setting of sampling alone; as a part of this config it needs one of training, which is not kept.
    config = DiffusionPolicyConfig(**model | {"diffusion": DiffusionConfig(**model["diffusion"]), "guidance": 1.0})
    return {**observation_table(described["observation"], config.width), **diffusion_policy_table(config)}


def _describe_autoregressive(config: ConfigDict) -> dict[str, Any]:
    names = {field.name for field in dataclasses.fields(AutoregressiveConfig)}
    fields = {name: value for name, value in config.model.items() if name in names}
    policy = AutoregressiveConfig(**fields, chunk=config.data.chunk, stride=config.data.stride)
    if not (policy.generate_latents and policy.latent_dim):
        # No action reads its latents, which are left out.
        nothing: dict[str, Any] = {
            "latent_queries": 0,
            "latent_dim": 0,
            "codebook_size": 0,
            "latent_head": "regression",
        }
        policy = dataclasses.replace(policy, generate_latents=False, **nothing)
    return _fields(policy, _AUTOREGRESSIVE_FIELDS) | _gripper(policy.gripper_dim)


def _autoregressive_table(described: Mapping[str, Any]) -> DeepTable:
    config = AutoregressiveConfig(**_without_gripper(described["model"]))
    observation = described["observation"]
    rest = autoregressive_policy_table(config, observation["instants"])
    return {**observation_table(observation, config.width), **rest}


def _describe_vla(config: ConfigDict) -> dict[str, Any]:
    policy = vla_config(config)
    decoder = dataclasses.asdict(policy.decoder)
    return _fields(policy, _VLA_FIELDS) | _gripper(policy.gripper_dim) | {"decoder": decoder}


def _vla_table(described: Mapping[str, Any]) -> DeepTable:
    model = _without_gripper(described["model"])
    config = VlaConfig(**model | {"decoder": DecoderConfig(**model["decoder"])})
    return {**observation_table(described["observation"], config.decoder.width), **latent_vla_table(config)}


_DESCRIBERS = {
    "diffusion_policy": _describe_diffusion,
    "autoregressive_policy": _describe_autoregressive,
    "latent_vla": _describe_vla,
}
_TABLES = {
    "diffusion_policy": _diffusion_table,
    "autoregressive_policy": _autoregressive_table,
    "latent_vla": _vla_table,
}


def _gripper(dim: int) -> dict[str, list[int]]:
    """The dimension of a gripper, of which there is one or none."""
    return {"gripper_dims": [dim] if dim >= 0 else []}


def _without_gripper(model: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in model.items() if name != "gripper_dims"}


def _fields(config: Any, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}
