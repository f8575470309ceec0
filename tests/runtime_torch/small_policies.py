"""Small policies with random numbers everywhere, also where training would start from zeros and ones."""

from __future__ import annotations

import importlib
from typing import Any

import jax
import numpy as np
from etils import epath

from como_jax.policies.models import build_policy
from como_jax.spec.interface import NormStats, PolicySpec
from como_jax.spec.normalization import AffineNormalizer, UniformNormalizer
from como_jax.training import sharding
from como_jax.training.run import Run

STATE_SIZE, ACTION_SIZE = 4, 3


def make_policy(family: str, changes: dict[str, Any] | None = None) -> tuple[Run, PolicySpec]:
    """The run of a recipe's smoke variant, with changes by full name, of which nothing is on disk, and its robots."""
    config = importlib.import_module(f"configs.policy_{family}").get_config("smoke")
    sizes = {"data.state_size": STATE_SIZE, "model.action_size": ACTION_SIZE, "data.image_size": 32}
    # Two layers, so that their order matters.
    depths = {"model.depth": 2, "text.depth": 2, "text.width": 24}
    with config.unlocked():
        config.update_from_flattened_dict({**sizes, **depths, **(changes or {})})
    model = build_policy(config)
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = jax.tree.map(lambda x: rng.normal(scale=0.2, size=x.shape).astype(np.float32), shapes)
    host = sharding.make_mesh(devices=jax.devices("cpu")[:1])
    params = jax.device_put(params, sharding.replicated(host))
    return Run(epath.Path("run"), config, model, params, 7), _spec(config, rng)


def _spec(config: Any, rng: np.random.Generator) -> PolicySpec:
    values = rng.normal(size=(300, STATE_SIZE + ACTION_SIZE)).round(1)
    # One number that never changes.
    values[:, 1] = 0.25
    affine = {"min": values.min(axis=0), "max": values.max(axis=0), "mean": values.mean(axis=0)}
    action = AffineNormalizer.fit("min_max", {name: value[:ACTION_SIZE] for name, value in affine.items()})
    state = UniformNormalizer.fit(values[:, ACTION_SIZE:]) if config.data.state_size else None
    smaller = UniformNormalizer.fit(values[:, : ACTION_SIZE - 1])
    data = config.data
    return PolicySpec(
        cameras=tuple(data.cameras) or ("top",),
        image_size=data.image_size,
        fit=data.fit,
        instants=data.instants,
        stride=data.stride,
        chunk=data.chunk,
        action_size=ACTION_SIZE,
        state_size=data.state_size,
        control_rate=10.0,
        uses_text=True,
        robots={"arm": NormStats(action, state), "other": NormStats(smaller, None)},
    )
