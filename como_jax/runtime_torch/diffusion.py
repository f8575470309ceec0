"""Sampling of denoising diffusion and of flow matching.

Time runs from 0, the data, to 1, pure noise; a network is given a noisy sample and its time. Axes: B batch, `...` the
axes of a sample.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from como_jax.runtime_torch.noise import Noise
from como_jax.runtime_torch.policy_config import DiffusionConfig

Network = Callable[[Tensor, Tensor], Tensor]


def denoise(config: DiffusionConfig, network: Network, x: Tensor, noise: Noise) -> Tensor:
    """Samples `[B, ...]` from normal noise `x` of the same shape.

    Args:
      config: how.
      network: of samples `[B, ...]` and times `[B]`.
      x: where to start.
      noise: that `eta` adds at every step, if it is not 0.
    """
    # Levels of the noise, from all of it down to none.
    times = np.linspace(1.0, 0.0, config.sample_steps + 1, dtype=np.float32)
    if config.kind == "flow":
        for now, after in zip(times[:-1], times[1:], strict=True):
            x = _flow_step(config, x, network(x, _times(x, now)), float(now), float(after))
        return x
    levels = np.rint(times * config.train_steps).astype(int)
    kept = alpha_bars(config.train_steps)[levels]
    for step in range(config.sample_steps):
        said = network(x, _times(x, levels[step] / config.train_steps))
        x = _ddim_step(config, x, said, kept[step], kept[step + 1], noise)
    return x


def alpha_bars(num_steps: int) -> np.ndarray:
    """Shares of the signal's variance `[num_steps + 1]` that the cosine schedule keeps (arXiv 2102.09672, equation 17).

    The first is 1, the data; no step loses more than 0.999 of what is left.
    """
    angle = (np.arange(num_steps + 1) / num_steps + 0.008) / 1.008 * np.pi / 2
    curve = np.cos(angle) ** 2
    betas = np.minimum(1 - curve[1:] / curve[:-1], 0.999)
    return np.concatenate([[1.0], np.cumprod(1 - betas)]).astype(np.float32)


def _times(x: Tensor, time: float) -> Tensor:
    return torch.full((len(x),), float(time), device=x.device)


def _flow_step(config: DiffusionConfig, x: Tensor, velocity: Tensor, now: float, after: float) -> Tensor:
    """Euler's step along the flow, whose velocity is noise less data."""
    if not config.clip:
        return x + (after - now) * velocity
    sample = (x - now * velocity).clamp(-config.clip, config.clip)
    # The velocity that leads to the clipped sample.
    return x + (after - now) * (x - sample) / now


def _ddim_step(
    config: DiffusionConfig, x: Tensor, said: Tensor, kept: np.float32, kept_after: np.float32, noise: Noise
) -> Tensor:
    """One step of DDIM (arXiv 2010.02502, equations 12 and 16); the shares are float32, as in training."""
    signal, spread = float(np.sqrt(kept)), float(np.sqrt(1 - kept))
    sample = (x - spread * said) / signal if config.prediction == "epsilon" else said
    if config.clip:
        sample = sample.clamp(-config.clip, config.clip)
    sigma = config.eta * np.sqrt((1 - kept_after) / (1 - kept) * (1 - kept / kept_after))
    direction = float(np.sqrt(np.maximum(1 - kept_after - sigma**2, 0.0)))
    x = float(np.sqrt(kept_after)) * sample + direction * ((x - signal * sample) / spread)
    return x + float(sigma) * noise.normal(*x.shape).to(x.device) if config.eta else x
