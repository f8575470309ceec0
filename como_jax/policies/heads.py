"""What a sequence model predicts from the output of a token: a vector, by regression or diffusion, or a code.

A head is a module with two methods:

- `loss(features, target, mask, key)` gives the mean error where the mask is 1, and scalars for a dashboard. Features
  are `[..., D]`, the mask float32 `[...]` or, for vectors, also `[..., L]`.
- `sample(features, keys)` gives a prediction from features `[B, D]`.

`OutputTokens` joins a head with an embedding of what it predicts, for a decoder that writes one token after another.

Axes: B batch, S tokens of an output, D width, L numbers of a vector, K codes, A action.
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
from como_jax.nn.primitives import embedding
from como_jax.policies.denoising import add_noise, denoise, time_features
from como_jax.spec.policies import DiffusionConfig

Terms = dict[str, jax.Array]

# Noise levels drawn for each token and step, as in MAR (arXiv 2406.11838): the head is cheap beside the transformer.
DRAWS = 4


def masked_mean(x: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of `x` where `mask`, of the same shape, is 1; 0 where it is 1 nowhere."""
    chex.assert_equal_shape([x, mask])
    return jnp.sum(x * mask) / jnp.maximum(jnp.sum(mask), 1.0)


def _masked_error(error: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of errors `[..., L]` under a mask `[..., L]` or `[...]`."""
    mask = mask if mask.ndim == error.ndim else mask[..., None]
    return masked_mean(error, jnp.broadcast_to(mask, error.shape))


class CodeEmbedding(nnx.Module):
    """A learned vector for every code."""

    def __init__(self, codebook_size: int, width: int, *, rngs: nnx.Rngs):
        self.table = embedding(codebook_size, width, rngs=rngs)

    def __call__(self, codes: jax.Array) -> jax.Array:
        """int32 `[...]` to `[..., D]`."""
        return self.table[...][codes]


class RegressionHead(nnx.Module):
    """Predicts a vector by a linear layer, trained by the mean squared error."""

    def __init__(self, width: int, size: int, *, rngs: nnx.Rngs):
        self.out = Linear(width, size, dtype=jnp.float32, rngs=rngs)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Mean squared error from `target` `[..., L]`; the key is not used."""
        return _masked_error(jnp.square(self.out(features) - target), mask), {}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """The predicted vectors `[B, L]`; the keys are not used."""
        return self.out(features)


class CodeHead(nnx.Module):
    """Predicts the logits of codes by a linear layer, trained by cross entropy."""

    def __init__(self, width: int, codebook_size: int, temperature: float, *, rngs: nnx.Rngs):
        self.temperature = temperature
        self.out = Linear(width, codebook_size, dtype=jnp.float32, rngs=rngs)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Cross entropy of `target`, int32 `[...]`, and the accuracy of the likeliest code; the key is not used."""
        logits = self.out(features)
        error = optax.losses.softmax_cross_entropy_with_integer_labels(logits, target)
        correct = (jnp.argmax(logits, axis=-1) == target).astype(jnp.float32)
        return masked_mean(error, mask), {"accuracy": masked_mean(correct, mask)}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """Codes, int32 `[B]`, drawn at the temperature; at temperature 0 the likeliest."""
        logits = self.out(features)
        if not self.temperature:
            return jnp.argmax(logits, axis=-1).astype(jnp.int32)
        return jax.vmap(jax.random.categorical)(keys, logits / self.temperature).astype(jnp.int32)


class DiffusionHead(nnx.Module):
    """Makes a vector from noise by a small network, as in MAR (arXiv 2406.11838, section 3.2)."""

    def __init__(self, width: int, size: int, diffusion: DiffusionConfig, *, hidden: int, depth: int, rngs: nnx.Rngs):
        linear = functools.partial(Linear, dtype=jnp.float32, rngs=rngs)
        self.size, self.hidden, self.diffusion = size, hidden, diffusion
        self.noisy_in = linear(size, hidden)
        self.condition_in = linear(width, hidden)
        self.time_in = linear(hidden, hidden)
        self.blocks = nnx.List([ModulatedMlp(hidden, rngs=rngs) for _ in range(depth)])
        self.norm = LayerNorm(hidden, dtype=jnp.float32, rngs=rngs)
        self.out = linear(hidden, size)

    def loss(self, features: jax.Array, target: jax.Array, mask: jax.Array, key: jax.Array) -> tuple[jax.Array, Terms]:
        """Mean squared error of the network's estimates from noisy versions of `target` `[..., L]`."""
        clean = jnp.repeat(target.reshape(-1, self.size), DRAWS, axis=0)
        noised = add_noise(self.diffusion, clean, key)
        condition = jnp.repeat(self.condition_in(features).reshape(-1, self.hidden), DRAWS, axis=0)
        error = jnp.square(self.estimate(noised.x, noised.time, condition) - noised.target)
        draws = error.reshape(*target.shape[:-1], DRAWS, self.size)
        return _masked_error(jnp.mean(draws, axis=-2), mask), {}

    def sample(self, features: jax.Array, keys: jax.Array) -> jax.Array:
        """Vectors `[B, L]`, each drawn with its own key and denoised step by step."""
        condition = self.condition_in(features)
        start, later = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
        noise = jax.vmap(lambda key: jax.random.normal(key, (self.size,)))(start)
        return denoise(self.diffusion, lambda x, time: self.estimate(x, time, condition), noise, later)

    def estimate(self, noisy: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        """The network's estimate of `Noised.target`.

        Args:
          noisy: `[B, L]`.
          time: `[B]`, in [0, 1].
          condition: the projected features, `[B, hidden]`.
        """
        chex.assert_shape(noisy, (len(time), self.size))
        chex.assert_shape(condition, (len(time), self.hidden))
        condition = jax.nn.silu(condition + self.time_in(time_features(time, self.hidden)))
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
        """`[..., width]` to the same shape, under a condition of that shape."""
        scale, shift = jnp.split(self.modulation(condition), 2, axis=-1)
        return x + self.fc2(jax.nn.silu(self.fc1(self.norm(x) * (1.0 + scale) + shift)))


class OutputTokens(nnx.Module):
    """An output of `length` tokens, each a code, int32 `[B, S]`, or a vector, float32 `[B, S, L]`.

    Attributes:
      embed: makes inputs of the decoder from codes or vectors.
      head: predicts codes or vectors from outputs of the decoder.
      length: S.
      vector_size: L, or 0 for codes.
    """

    def __init__(
        self, embed: nnx.Module, head: nnx.Module, width: int, length: int, vector_size: int, *, rngs: nnx.Rngs
    ):
        self.start = embedding(width, rngs=rngs)
        self.places = embedding(length, width, rngs=rngs)
        self.embed, self.head, self.length, self.vector_size = embed, head, length, vector_size

    def inputs(self, values: jax.Array) -> jax.Array:
        """Inputs `[B, S, D]`: a start token and all values but the last, so that each output predicts its value."""
        chex.assert_axis_dimension(values, 1, self.length)
        embedded = self.embed(values[:, :-1])
        start = jnp.broadcast_to(self.start[...], (len(values), 1, self.start.shape[0]))
        return jnp.concatenate([start.astype(embedded.dtype), embedded], axis=1) + self.places[...]

    def input_at(self, values: jax.Array, token: jax.Array) -> jax.Array:
        """The input `[B, D]` at one token, from `values` of which those before it are known."""
        before = self.embed(jnp.take(values, jnp.maximum(token - 1, 0), axis=1))
        return jnp.where(token == 0, self.start[...], before) + self.places[...][token]

    def empty(self, batch: int) -> jax.Array:
        """Values before anything is known: zeros."""
        if self.vector_size:
            return jnp.zeros((batch, self.length, self.vector_size))
        return jnp.zeros((batch, self.length), jnp.int32)


def code_tokens(width: int, length: int, codes: int, *, temperature: float, rngs: nnx.Rngs) -> OutputTokens:
    """An output of `length` codes out of `codes`; temperature 0 takes the likeliest."""
    embed, head = CodeEmbedding(codes, width, rngs=rngs), CodeHead(width, codes, temperature, rngs=rngs)
    return OutputTokens(embed, head, width, length, 0, rngs=rngs)


def vector_tokens(
    width: int,
    length: int,
    size: int,
    *,
    head: str,
    hidden: int,
    depth: int,
    steps: int,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
) -> OutputTokens:
    """An output of vectors.

    Args:
      width: of the decoder.
      length: number of vectors.
      size: numbers in a vector.
      head: one of `VECTOR_HEADS` of `como_jax.spec.policies`.
      hidden, depth: of the network that matches flows.
      steps: of its sampling.
      dtype: of the embedding's activations.
      rngs: of the parameters.
    """
    embed = Linear(size, width, dtype=dtype, rngs=rngs)
    if head == "regression":
        made = RegressionHead(width, size, rngs=rngs)
    else:
        flow = DiffusionConfig("flow", sample_steps=steps)
        made = DiffusionHead(width, size, flow, hidden=hidden, depth=depth, rngs=rngs)
    return OutputTokens(embed, made, width, length, size, rngs=rngs)


def to_bins(values: jax.Array, num_bins: int) -> jax.Array:
    """Numbers as bins, int32 of the same shape.

    `num_bins` bins of equal width cover [-1, 1]; numbers outside fall into the outermost bins.
    """
    return jnp.clip(jnp.floor((values + 1) / 2 * num_bins), 0, num_bins - 1).astype(jnp.int32)


def bin_midpoints(bins: jax.Array, num_bins: int) -> jax.Array:
    """The midpoint of each bin of `to_bins`, float32."""
    return (bins.astype(jnp.float32) + 0.5) * np.float32(2 / num_bins) - 1


def round_gripper(actions: jax.Array, gripper_dim: int) -> jax.Array:
    """Actions `[..., A]` whose gripper is 1 where it was positive and -1 elsewhere; -1 stands for no gripper."""
    if gripper_dim < 0:
        return actions
    gripper = jnp.where(actions[..., gripper_dim] > 0, 1.0, -1.0)
    return actions.at[..., gripper_dim].set(gripper)
