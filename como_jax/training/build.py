"""From a config to the train step: what a run, a benchmark and a compilation for another machine share."""

from __future__ import annotations

from typing import NamedTuple

import jax
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.nn.model_def import ModelDef
from como_jax.training.attention import choose_attention
from como_jax.training.optim import OptimConfig, make_optimizer
from como_jax.training.train_state import TrainState, abstract_state, make_train_step


class Training(NamedTuple):
    """Optimiser, the state's shapes and shardings, and the jitted step, from state and batch to state and metrics."""

    optimizer: optax.GradientTransformation
    abstract: TrainState
    step: jax.stages.Wrapped


def build_training(config: ConfigDict, model: ModelDef, mesh: Mesh) -> Training:
    """The training that a config describes.

    Raises:
      ConfigError: `config.train.attention` does not fit model and devices.
    """
    model = choose_attention(config, model, mesh)
    optim = OptimConfig(**config.optim)
    optimizer = make_optimizer(optim, config.train.num_steps)
    abstract = abstract_state(model, optimizer, mesh, use_ema=optim.ema_decay > 0)
    step = make_train_step(
        model,
        optimizer,
        mesh,
        abstract,
        seed=config.seed,
        accumulation=config.train.accumulation,
        ema_decay=optim.ema_decay,
    )
    return Training(optimizer, abstract, step)
