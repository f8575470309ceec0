"""How the autoregressive policy predicts a latent token from the output before it: by regression, diffusion or a code.

A head is a module with `loss(features, target, mask, key)`, features `[..., D]` and mask float32 `[...]`, for vectors
also `[..., L]`, which gives the mean where the mask is 1 and scalars for a dashboard; and `sample(features, keys)`,
features `[B, D]`.
Axes: B batch, D width, L latent size of one token, K codes.
"""

from __future__ import annotations

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from como_jax.nn.layers import LayerNorm, Linear
from como_jax.policies.diffusion import add_noise, denoise
from como_jax.spec.policies import DiffusionConfig

Terms = dict[str, jax.Array]

# Noise levels drawn for each token and step, as in MAR (arXiv 2406.11838): the head is cheap beside the transformer.
DRAWS = 4


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` where `mask`, of the same shape, is 1; 0 where it is nowhere 1."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def _masked_error(error: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of errors `[..., L]` by a mask `[..., L]` or `[...]`."""
    mask = mask if mask.ndim == error.ndim else mask[..., None]
    return masked_mean(error, jnp.broadcast_to(mask, error.shape))


class CodeEmbedding(nnx.Module):
    """A learned vector for every code."""

    def __init__(self, codebook_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = nnx.Param(0.02 * jax.random.normal(rngs.params(), (codebook_size, width)))

    def __call__(self, codes: jax.Array) -> jax.Array:
        """int32 `[...]` to `[..., D]`."""
        return self.table[...][codes]


class RegressionHead(nnx.Module):
    """A linear layer, trained by the mean squared error."""

    def __init__(self, width: int, latent_dim: int, *, rngs: nnx.Rngs):
        self.out = Linear(width, latent_dim, dtype=jnp.float32, rngs=rngs)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Against `target` `[..., L]`; draws nothing."""
        return _masked_error(jnp.square(self.out(features) - target), mask), {}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """The prediction `[B, L]`; draws nothing."""
        return self.out(features)


class CodeHead(nnx.Module):
    """A linear layer to logits of codes, trained by cross entropy."""

    def __init__(self, width: int, codebook_size: int, temperature: float, *, rngs: nnx.Rngs):
        self.temperature = temperature
        self.out = Linear(width, codebook_size, dtype=jnp.float32, rngs=rngs)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Against `target`, int32 `[...]`; draws nothing."""
        logits = self.out(features)
        error = optax.losses.softmax_cross_entropy_with_integer_labels(logits, target)
        correct = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
        return masked_mean(error, mask), {"accuracy": masked_mean(correct, mask)}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """Codes, int32 `[B]`: the likeliest at temperature 0."""
        logits = self.out(features)
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, logits / self.temperature).astype(jnp.int32)


class DiffusionHead(nnx.Module):
    """A small network that makes one token from noise, as in MAR (arXiv 2406.11838, section 3.2)."""

    def __init__(
        self, width: int, latent_dim: int, diffusion: DiffusionConfig, *, hidden: int, depth: int, rngs: nnx.Rngs
    ):
        linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.latent_dim, self.hidden, self.diffusion = latent_dim, hidden, diffusion
        self.noisy_in = linear(latent_dim, hidden)
        self.condition_in = linear(width, hidden)
        self.time_in = linear(hidden, hidden)
        self.blocks = nnx.List([ModulatedMlp(hidden, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(hidden, dtype=jnp.float32, rngs=rngs)
        self.out = linear(hidden, latent_dim)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Mean squared error of what the network says of noisy versions of `target` `[..., L]`."""
        clean = jnp.repeat(target.reshape(-1, self.latent_dim), DRAWS, axis=0)
        noised = add_noise(self.diffusion, clean, key)
        condition = jnp.repeat(self.condition_in(features).reshape(-1, self.hidden), DRAWS, axis=0)
        error = jnp.square(self.estimate(noised.x, noised.time, condition) - noised.target)
        draws = error.reshape(*target.shape[:-1], DRAWS, self.latent_dim)
        return _masked_error(jnp.mean(draws, axis=-2), mask), {}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """A draw `[B, L]`, denoised step by step."""
        condition = self.condition_in(features)
        start, later = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.latent_dim,)))(start)
        return denoise(self.diffusion, lambda x, time: self.estimate(x, time, condition), noise, later)

    def estimate(self, noisy: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """What `diffusion` wants to know of a noisy token.

        Args:
          noisy: `[B, L]`.
          time: `[B]`, in [0, 1].
          condition: the projected features, `[B, hidden]`.
        """
        condition = jax.nn.silu(condition + self.time_in(_sinusoids(time, self.hidden)))
        x = self.noisy_in(noisy)
        for block in self.blocks:
            x = block(x, condition)
        return self.out(self.norm(x))


class ModulatedMlp(nnx.Module):
    """A residual pair of layers whose input is scaled and shifted by a condition."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.norm = LayerNorm(width, dtype=jnp.float32, rngs=rngs)
        self.modulation = linear(width, 2 * width)
        self.fc1, self.fc2 = linear(width, width), linear(width, width)

    def __call__(self, x: jax.Array, condition: jax.Array) -> jax.Array:
        """Both of one shape `[..., width]`, which is kept."""
        scale, shift = jnp.split(self.modulation(condition), 2, axis=-1)
        return x + self.fc2(jax.nn.silu(self.fc1(self.norm(x) * (1.0 + scale) + shift)))


def _sinusoids(time: jax.Array, width: int) -> jax.Array:
    """Sines and cosines `[B, width]` of times `[B]` in [0, 1]."""
    angles = time[:, None] * np.geomspace(1.0, 1000.0, width // 2, dtype=np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)
