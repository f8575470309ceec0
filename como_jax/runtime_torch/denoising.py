"""Sampling of denoising diffusion and of flow matching, and plain regression.

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
      config: settings of sampling.
      network: predicts from samples `[B, ...]` and times `[B]`.
      x: the noise to start from.
      noise: what DDIM adds at every step where `eta` is not 0.
    """
    if config.kind == "regression":
        sample = network(torch.zeros_like(x), x.new_ones(len(x)))
        return sample.clamp(-config.clip, config.clip) if config.clip else sample
    # Noise levels, from pure noise to none. They are tensors, since torch.compile rounds differently than NumPy.
    times = torch.linspace(1.0, 0.0, config.sample_steps + 1, dtype=torch.float64).float()
    if config.kind == "flow":
        for step, given in enumerate(_network_times(times, x)):
            x = _flow_step(config, x, network(x, given), times[step], times[step + 1])
        return x
    levels = (times * config.train_steps).round().long()
    kept = alpha_bars(config.train_steps)[levels]
    for step, given in enumerate(_network_times(levels / config.train_steps, x)):
        x = _ddim_step(config, x, network(x, given), kept[step], kept[step + 1], noise)
    return x


def _network_times(times: Tensor, x: Tensor) -> Tensor:
    """All times but the last, as the network gets them, `[steps, B]`."""
    return times[:-1].to(x.device)[:, None].expand(-1, len(x))


def alpha_bars(num_steps: int) -> Tensor:
    """Shares of the signal's variance `[num_steps + 1]` that the cosine schedule keeps (arXiv 2102.09672, equation 17).

    The first is 1, the data; no step removes more than 0.999 of what is left.
    """
    times = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    curve = torch.cos((times + 0.008) / 1.008 * math.pi / 2) ** 2
    betas = (1 - curve[1:] / curve[:-1]).clamp(max=0.999)
    return F.pad(torch.cumprod(1 - betas, dim=0), (1, 0), value=1.0).float()


def _flow_step(config: DiffusionConfig, x: Tensor, velocity: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """Euler's step along the flow, whose velocity is the noise minus the data."""
    if not config.clip:
        return x + (after - now) * velocity
    sample = (x - now * velocity).clamp(-config.clip, config.clip)
    # The velocity that leads to the clipped sample.
    return x + (after - now) * (x - sample) / now


def _ddim_step(
    config: DiffusionConfig, x: Tensor, predicted: Tensor, kept: Tensor, kept_after: Tensor, noise: Noise
) -> Tensor:
    """One step of DDIM (arXiv 2010.02502, equations 12 and 16); the shares are float32, as in training."""
    signal, spread = kept.sqrt(), (1 - kept).sqrt()
    sample = (x - spread * predicted) / signal if config.prediction == "epsilon" else predicted
    if config.clip:
        sample = sample.clamp(-config.clip, config.clip)
    sigma = config.eta * ((1 - kept_after) / (1 - kept) * (1 - kept / kept_after)).sqrt()
    direction = (1 - kept_after - sigma**2).clamp(min=0.0).sqrt()
    x = kept_after.sqrt() * sample + direction * ((x - signal * sample) / spread)
    return x + sigma * noise.normal(*x.shape).to(x.device) if config.eta else x
