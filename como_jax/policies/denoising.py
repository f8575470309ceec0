"""DDPM, flow matching and plain regression behind one interface: `add_noise` in training, `denoise` in sampling.

Time t runs from 0, the data, to 1, pure noise. A network is given a noisy sample x_t and its time. With data x_0 and
noise e:

    flow   x_t = (1 - t) x_0 + t e;              the network predicts the velocity e - x_0
    ddpm   x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e;  the network predicts e ("epsilon") or x_0 ("sample")
    regression   x_t = 0 at time 1;              the network predicts x_0, in one step

where a_t is the share of the signal's variance that the noise schedule keeps, `alpha_bars`.

Axes: B batch, `...` the axes of a sample.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from como_jax.spec.policies import DiffusionConfig

Network = Callable[[jax.Array, jax.Array], jax.Array]


class Noised(NamedTuple):
    """Noisy samples `[B, ...]`, their times `[B]`, and what the network should predict, `[B, ...]`."""

    x: jax.Array
    time: jax.Array
    target: jax.Array


def add_noise(config: DiffusionConfig, sample: jax.Array, key: jax.Array) -> Noised:
    """Draws a time for every sample `[B, ...]` and adds the noise of that time."""
    if config.kind == "regression":
        return Noised(jnp.zeros_like(sample), jnp.ones(len(sample)), sample)
    time_key, noise_key = jax.random.split(key)
    noise = jax.random.normal(noise_key, sample.shape)
    if config.kind == "flow":
        time = jax.random.uniform(time_key, (len(sample),))
        share = _expand(time, sample)
        return Noised((1 - share) * sample + share * noise, time, noise - sample)
    level = jax.random.randint(time_key, (len(sample),), 1, config.train_steps + 1)
    kept = _expand(jnp.asarray(alpha_bars(config.train_steps))[level], sample)
    target = noise if config.prediction == "epsilon" else sample
    return Noised(jnp.sqrt(kept) * sample + jnp.sqrt(1 - kept) * noise, level / config.train_steps, target)


def denoise(config: DiffusionConfig, network: Network, noise: jax.Array, keys: jax.Array | None = None) -> jax.Array:
    """Samples `[B, ...]` from normal noise of the same shape, by DDIM (arXiv 2010.02502) or Euler's method.

    Args:
      config: that of training, of which `sample_steps`, `eta` and `clip` may differ.
      network: a function of noisy samples `[B, ...]` and times `[B]`.
      noise: `[B, ...]`.
      keys: `[B]`, for the noise that `eta` adds; None is allowed only for an `eta` of 0.
    """
    if config.kind == "regression":
        sample = network(jnp.zeros_like(noise), jnp.ones(len(noise)))
        return jnp.clip(sample, -config.clip, config.clip) if config.clip else sample
    step = _flow_step if config.kind == "flow" else _ddim_step
    # From pure noise down to none.
    times = np.linspace(1.0, 0.0, config.sample_steps + 1, dtype=np.float32)
    if config.kind == "ddpm":
        times = np.rint(times * config.train_steps) / config.train_steps

    def body(x: jax.Array, inputs: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        number, now, after = inputs
        prediction = network(x, jnp.full(len(x), now))
        fresh = jnp.zeros_like(x)
        if config.kind == "ddpm" and config.eta:
            draw = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, number), x.shape[1:]))
            fresh = draw(keys)
        return step(config, x, prediction, now, after, fresh), None

    inputs = (jnp.arange(config.sample_steps), jnp.asarray(times[:-1]), jnp.asarray(times[1:]))
    return jax.lax.scan(body, noise, inputs)[0]


def alpha_bars(num_steps: int) -> np.ndarray:
    """The shares of the signal's variance that the cosine schedule keeps (arXiv 2102.09672, eq. 17), `[num_steps + 1]`.

    The first is 1, for the data. No step loses more than 0.999 of the share that is left.
    """
    angle = (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2
    curve = np.cos(angle) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)]).astype(np.float32)


def time_features(time: jax.Array, width: int) -> jax.Array:
    """Sines and cosines `[B, width]` of times `[B]` in [0, 1]; `width` is even."""
    angles = time[:, None] * np.geomspace(1.0, 1000.0, width // 2, dtype=np.float32)
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=-1)


def _flow_step(
    config: DiffusionConfig, x: jax.Array, velocity: jax.Array, now: jax.Array, after: jax.Array, fresh: jax.Array
) -> jax.Array:
    """One step of Euler's method along the flow, whose velocity is the noise minus the data."""
    del fresh
    if not config.clip:
        return x + (after - now) * velocity
    sample = jnp.clip(x - now * velocity, -config.clip, config.clip)
    # With the velocity that leads to the clipped sample.
    return x + (after - now) * (x - sample) / now


def _ddim_step(
    config: DiffusionConfig, x: jax.Array, prediction: jax.Array, now: jax.Array, after: jax.Array, fresh: jax.Array
) -> jax.Array:
    """One step of DDIM (arXiv 2010.02502, equations 12 and 16)."""
    schedule = jnp.asarray(alpha_bars(config.train_steps))
    levels = jnp.rint(jnp.stack([now, after]) * config.train_steps).astype(jnp.int32)
    kept, kept_after = schedule[levels[0]], schedule[levels[1]]
    is_noise = config.prediction == "epsilon"
    sample = (x - jnp.sqrt(1 - kept) * prediction) / jnp.sqrt(kept) if is_noise else prediction
    if config.clip:
        sample = jnp.clip(sample, -config.clip, config.clip)
    noise = (x - jnp.sqrt(kept) * sample) / jnp.sqrt(1 - kept)
    sigma = config.eta * jnp.sqrt((1 - kept_after) / (1 - kept) * (1 - kept / kept_after))
    direction = jnp.sqrt(jnp.maximum(1 - kept_after - sigma**2, 0.0))
    return jnp.sqrt(kept_after) * sample + direction * noise + sigma * fresh


def _expand(values: jax.Array, like: jax.Array) -> jax.Array:
    """`[B]` to `[B, 1, ...]`."""
    return values.reshape(-1, *[1] * (like.ndim - 1))
