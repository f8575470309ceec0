"""The random numbers of sampling in JAX, so that PyTorch can be given the same.

A policy draws them from one key for each sample; here they are drawn again, in the order in which
`como_jax.runtime_torch` asks for them. Axes: B samples, H steps of a chunk, A action.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from como_jax.runtime_torch.policy_config import (
    AutoregressiveConfig,
    DiffusionConfig,
    DiffusionPolicyConfig,
    ModelConfig,
    VlaConfig,
)


def draw_noise(config: ModelConfig, keys: jax.Array) -> Iterator[np.ndarray]:
    """All numbers that sampling one chunk for every key `[B]` needs, each array with a leading B.

    Args:
      config: of the exported policy.
      keys: what `sample_actions` is given.
    """
    if isinstance(config, DiffusionPolicyConfig):
        yield from _denoising_noise(config.diffusion, keys, keys, (config.chunk, config.action_size))
    elif isinstance(config, AutoregressiveConfig):
        if config.generate_latents:
            yield from _written_noise(config, keys, config.latent_queries, config.latent_dim, config.codebook_size)
    elif config.action_head == "bins":
        yield from _written_noise(config, keys, config.chunk * config.action_size, 0, config.num_bins)
    else:
        yield from _written_noise(config, keys, config.chunk, config.action_size, 0)


def _written_noise(
    config: AutoregressiveConfig | VlaConfig, keys: jax.Array, length: int, size: int, codes: int
) -> Iterator[np.ndarray]:
    """What the heads of `como_jax.policies.latent_heads` draw for tokens of codes, or of vectors of some size."""
    for token in range(length):
        token_keys = _fold(keys, token)
        if codes and config.temperature:
            # As `jax.random.categorical` does.
            yield _each(token_keys, lambda key: jax.random.gumbel(key, (codes,)))
        elif not codes and _head(config) != "regression":
            start, later = jnp.moveaxis(jax.vmap(jax.random.split)(token_keys), 1, 0)
            yield from _denoising_noise(_head_diffusion(config), start, later, (size,))


def _head(config: AutoregressiveConfig | VlaConfig) -> str:
    return config.latent_head if isinstance(config, AutoregressiveConfig) else config.action_head


def _head_diffusion(config: AutoregressiveConfig | VlaConfig) -> DiffusionConfig:
    """How a head makes a token from noise, as far as noise is concerned."""
    if isinstance(config, AutoregressiveConfig):
        return DiffusionConfig("ddpm", config.diffusion_steps, config.diffusion_steps, "epsilon", eta=1.0, clip=0.0)
    return DiffusionConfig("flow", 0, config.flow_steps, "sample", eta=0.0, clip=0.0)


def _denoising_noise(
    config: DiffusionConfig, start: jax.Array, later: jax.Array, shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    """Where `como_jax.policies.diffusion.denoise` starts, and what it adds, from keys for either."""
    yield _normal(start, shape)
    if config.kind == "ddpm" and config.eta:
        for step in range(config.sample_steps):
            yield _normal(_fold(later, step), shape)


def _fold(keys: jax.Array, number: int) -> jax.Array:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> np.ndarray:
    return _each(keys, lambda key: jax.random.normal(key, shape))


def _each(keys: jax.Array, draw: Callable[[jax.Array], Any]) -> np.ndarray:
    return np.asarray(jax.vmap(draw)(keys))
