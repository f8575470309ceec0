"""Sampling of denoising diffusion and of flow matching.

Time runs from 0, the data, to 1, pure noise; a network is given a noisy sample and its time. Axes: B batch, `...` the
axes of a sample.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from como_jax.runtime_torch.noise import Noise
from como_jax.spec.policies import DiffusionConfig

Network = Callable[[Tensor, Tensor], Tensor]


def denoise(config: DiffusionConfig, network: Network, x: Tensor, noise: Noise) -> Tensor:
    """Samples `[B, ...]` from normal noise `x` of the same shape.

    Args:
      config: how.
      network: of samples `[B, ...]` and times `[B]`.
      x: where to start.
      noise: that `eta` adds at every step, if it is not 0.
    """
    # Levels of the noise, from all of it down to none. As tensors: torch.compile computes otherwise than NumPy does.
    times = torch.linspace(1.0, 0.0, config.sample_steps + 1, dtype=torch.float64).float()
    if config.kind == "flow":
        for step, told in enumerate(_told(times, x)):
            x = _flow_step(config, x, network(x, told), times[step], times[step + 1])
        return x
    levels = (times * config.train_steps).round().long()
    kept = alpha_bars(config.train_steps)[levels]
    for step, told in enumerate(_told(levels / config.train_steps, x)):
        x = _ddim_step(config, x, network(x, told), kept[step], kept[step + 1], noise)
    return x


def _told(times: Tensor, x: Tensor) -> Tensor:
    """All times but the last, as a network is told them, `[steps, B]`."""
    return times[:-1].to(x.device)[:, None].expand(-1, len(x))


def alpha_bars(num_steps: int) -> Tensor:
    """Shares of the signal's variance `[num_steps + 1]` that the cosine schedule keeps (arXiv 2102.09672, equation 17).

    The first is 1, the data; no step loses more than 0.999 of what is left.
    """
    times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return F.pad(torch.cumprod(1 - betas, dim=0), (1, 0), value=1.0).float()


def _flow_step(config: DiffusionConfig, x: Tensor, velocity: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Euler's step along the flow, whose velocity is noise less data."""
    if not config.clip:
        return x + (after - now) * velocity
    sample = (x - now * velocity).clamp(-config.clip, config.clip)
    # The velocity that leads to the clipped sample.
    return x + (after - now) * (x - sample) / now


def _ddim_step(
    config: DiffusionConfig, x: Tensor, said: Tensor, kept: Tensor, kept_after: Tensor, noise: Noise
) -> Tensor:
    """One step of DDIM (arXiv 2010.02502, equations 12 and 16); the shares are float32, as in training."""
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    sample = (x - spread * said) / signal if config.prediction == "epsilon" else said
    if config.clip:
        sample = sample.clamp(-config.clip, config.clip)
    sigma = config.eta * ((1 - kept_after) / (1 - kept) * (1 - kept / kept_after)).sqrt()
    direction = (1 - kept_after - sigma**2).clamp(min=0.0).sqrt()
    x = kept_after.sqrt() * sample + direction * ((x - signal * sample) / spread)
    return x + sigma * noise.normal(*x.shape).to(x.device) if config.eta else x
