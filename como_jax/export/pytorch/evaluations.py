"""One evaluation of a policy's network, in JAX and in PyTorch, whose results must be the same.

Axes: B samples, H steps of a chunk, A action.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from ml_collections import ConfigDict
from torch import nn

from como_jax.export.pytorch.policy_noise import draw_noise
from como_jax.nn.model_def import Params
from como_jax.policies import autoregressive as jax_policy
from como_jax.policies.build import build_policy
from como_jax.policies.vla import attention_mask
from como_jax.runtime_torch import autoregressive_policy as torch_policy
from como_jax.runtime_torch.autoregressive_policy import AutoregressivePolicy
from como_jax.runtime_torch.diffusion_policy import DiffusionPolicy
from como_jax.runtime_torch.latent_vla import LatentVla
from como_jax.runtime_torch.noise import GivenNoise
from como_jax.runtime_torch.observation import Observation as TorchObservation
from como_jax.runtime_torch.policy_config import DiffusionConfig
from como_jax.types import Observation

Results = dict[str, np.ndarray]


def evaluate_jax(config: ConfigDict, params: Params, observation: Observation, keys: jax.Array) -> Results:
    """What the network makes of two observations, float32, by name.

    Args:
      config: of a policy, in float32.
      params: its parameters.
      observation: of the two.
      keys: `[B]`, of noise.
    """
    found = jax.jit(_EVALUATE_JAX[config.family](config))(params, observation, keys)
    return jax.tree.map(np.asarray, found)


def evaluate_torch(module: nn.Module, observation: Observation, keys: jax.Array) -> Results:
    """The same of an exported policy."""
    with torch.inference_mode():
        found = _EVALUATE_TORCH[type(module)](module, to_observation(observation), keys)
    return {name: value.numpy() for name, value in found.items()}


NETWORK = "network, one evaluation"
"""What all policies have in their results."""
_LATENTS = "network, one evaluation, latents"


def to_observation(observation: Observation) -> TorchObservation:
    """The same in PyTorch."""
    instruction = observation.text if observation.text_embedding is None else observation.text_embedding
    parts = (observation.images, observation.has_camera, instruction, observation.state, observation.has_state)
    return TorchObservation(*(None if part is None else torch.from_numpy(np.array(part)) for part in parts))


# What the network says of pure noise is the sample of one step of DDPM, if it were to say the sample, whatever it does.
_ONE_STEP: dict[str, Any] = {"kind": "ddpm", "prediction": "sample", "sample_steps": 1, "clip": 0.0, "eta": 0.0}


def _diffusion_jax(config: ConfigDict) -> Any:
    config = config.copy_and_resolve_references()
    config.model.diffusion.update(_ONE_STEP)
    model = build_policy(config)

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        return {NETWORK: model.bind(params).sample_actions(observation, keys)}

    return evaluate


def one_step(config: DiffusionConfig) -> DiffusionConfig:
    """How one evaluation of a network is sampled."""
    return dataclasses.replace(config, **_ONE_STEP)


def _diffusion_torch(module: DiffusionPolicy, observation: TorchObservation, keys: jax.Array) -> dict[str, Any]:
    config = module.config
    module.config = dataclasses.replace(config, diffusion=one_step(config.diffusion))
    try:
        found = module.sample_actions(observation, GivenNoise(draw_noise(module.config, keys)))
    finally:
        module.config = config
    return {NETWORK: found}


def _autoregressive_jax(config: ConfigDict) -> Any:
    model, policy = build_policy(config), config.model

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        module, (batch, instants) = model.bind(params), observation.images.shape[:2]
        known = jnp.full((batch, instants), policy.generate_latents and policy.latent_dim > 0)
        values = _latents(keys, instants, policy.latent_queries, policy.latent_dim, policy.codebook_size)
        outputs = module(module.observation(observation), jax_policy.Motion(values, known), jnp.ones(batch, bool))
        found = {NETWORK: module.action_head(outputs.actions)}
        return found | ({_LATENTS: outputs.latents} if policy.generate_latents and policy.latent_dim else {})

    return evaluate


def _autoregressive_torch(module: AutoregressivePolicy, observation: TorchObservation, keys: jax.Array) -> dict:
    config, motion = module.config, None
    if config.generate_latents:
        values = _latents(keys, module.instants, config.latent_queries, config.latent_dim, config.codebook_size)
        known = torch.ones((len(keys), module.instants), dtype=torch.bool)
        motion = torch_policy.Motion(_to_torch(values), known)
    outputs = module(module.observation(observation), motion)
    return {NETWORK: module.action_head(outputs.actions)} | ({_LATENTS: outputs.latents} if motion else {})


def _latents(keys: jax.Array, instants: int, queries: int, size: int, codes: int) -> jax.Array:
    """Any latents of a history: `[B, T, Q, L]`, or codes `[B, T, Q]`."""
    shape = (len(keys), instants, queries)
    if codes:
        return jax.random.randint(keys[0], shape, 0, codes)
    return jax.random.normal(keys[0], (*shape, size))


def _vla_jax(config: ConfigDict) -> Any:
    model, policy = build_policy(config), config.model

    def evaluate(params: Params, observation: Observation, keys: jax.Array) -> dict[str, jax.Array]:
        module = model.bind(params)
        features = module.observation(observation)
        tokens, present = features.context()
        seen, length = tokens.shape[1] - features.text.tokens.shape[1], module.action.length
        values = _chunk(keys, policy.action_head, length, policy.action_size, policy.num_bins)
        mask = attention_mask(present, seen, [length], causal_text=policy.causal_text)
        read = jnp.maximum(jnp.cumsum(present, axis=1) - 1, 0)
        positions = jnp.concatenate([read, present.sum(axis=1)[:, None] + jnp.arange(length)], axis=1)
        out, _ = module.decoder(jnp.concatenate([tokens, module.action.inputs(values)], axis=1), positions, mask)
        return {NETWORK: _say(module.action.head, out[:, -length:], values)}

    return evaluate


def _vla_torch(module: LatentVla, observation: TorchObservation, keys: jax.Array) -> dict[str, torch.Tensor]:
    config, outputs = module.config, []
    values = _to_torch(_chunk(keys, config.action_head, module.action.length, config.action_size, config.num_bins))

    def choose(token: int, features: torch.Tensor) -> torch.Tensor:
        outputs.append(features)
        return values[:, token]

    module.write(observation, choose)
    return {NETWORK: _say(module.action.head, torch.stack(outputs, dim=1), values)}


def _chunk(keys: jax.Array, head: str, length: int, size: int, codes: int) -> jax.Array:
    """Any values of an action's tokens: `[B, S, L]`, or codes `[B, S]`."""
    if head == "bins":
        return jax.random.randint(keys[0], (len(keys), length), 0, codes)
    return jax.random.normal(keys[0], (len(keys), length, size))


def _say(head: Any, features: Any, values: Any) -> Any:
    """What a head, of either library, makes of features; one that denoises is asked about the values at time 1/2."""
    if not hasattr(head, "estimate"):
        return head.out(features)
    flat = features.reshape(-1, features.shape[-1])
    noisy = values.reshape(len(flat), -1)
    return head.estimate(noisy, 0 * noisy[:, 0] + 0.5, head.condition_in(flat))


def _to_torch(values: jax.Array) -> torch.Tensor:
    """Codes as PyTorch's own whole numbers."""
    found = torch.from_numpy(np.array(values))
    return found if found.is_floating_point() else found.long()


_EVALUATE_JAX = {
    "diffusion_policy": _diffusion_jax,
    "autoregressive_policy": _autoregressive_jax,
    "latent_vla": _vla_jax,
}
_EVALUATE_TORCH: dict[type, Any] = {
    DiffusionPolicy: _diffusion_torch,
    AutoregressivePolicy: _autoregressive_torch,
    LatentVla: _vla_torch,
}
