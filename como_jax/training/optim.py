"""The optimiser: AdamW with linear warm-up and cosine decay, and gradients clipped by their global norm."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import optax

from como_jax.training.sharding import path_name


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """The `optim` section of a recipe: AdamW and its schedule.

    Attributes:
      learning_rate: the peak, which is reached after `warmup_steps`.
      final_learning_rate: the end of the cosine, at the last step.
      warmup_steps: steps in which the learning rate rises linearly from 0.
      weight_decay: of matrices only, not of biases, norms, tokens or positions.
      beta1, beta2: decay rates of Adam's averages of gradients and of their squares.
      clip_norm: largest global gradient norm; 0 turns clipping off.
      ema_decay: decay rate of a moving average of the parameters, which evaluation uses; 0 turns it off.
    """

    learning_rate: float = 1e-4
    final_learning_rate: float = 5e-5
    warmup_steps: int = 1000
    weight_decay: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.99
    clip_norm: float = 1.0
    ema_decay: float = 0.0


def make_schedule(config: OptimConfig, num_steps: int) -> optax.Schedule:
    """Learning rate by step."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0,
        peak_value=config.learning_rate,
        warmup_steps=min(config.warmup_steps, max(1, num_steps - 1)),
        decay_steps=max(2, num_steps),  # One more than the warm-up at least.
        end_value=config.final_learning_rate,
    )


def make_optimizer(config: OptimConfig, num_steps: int) -> optax.GradientTransformation:
    """Clipping, then AdamW."""
    adamw = optax.adamw(
        make_schedule(config, num_steps),
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path).endswith("kernel"), params)
