"""The optimiser's schedule, clipping and weight decay."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from como_jax.training.optim import OptimConfig, make_optimizer, make_schedule
from como_jax.training.sharding import path_name


def test_the_schedule_warms_up_to_the_peak_and_falls_as_a_cosine_to_the_end() -> None:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, final_learning_rate=0.2, warmup_steps=10), 110)
    found = [float(schedule(step)) for step in (0, 5, 10, 60, 110)]
    np.testing.assert_allclose(found, [0.0, 0.5, 1.0, 0.6, 0.2], atol=1e-6)


def test_a_run_shorter_than_the_warm_up_still_reaches_the_peak() -> None:
    schedule = make_schedule(OptimConfig(learning_rate=1.0, warmup_steps=1000), 4)
    assert float(schedule(3)) == pytest.approx(1.0)
    assert float(make_schedule(OptimConfig(), 1)(0)) == 0


def first_moments(config: OptimConfig, gradient: np.ndarray) -> np.ndarray:
    optimizer, params = make_optimizer(config, 10), {"kernel": jnp.zeros(gradient.shape)}
    _, state = optimizer.update({"kernel": jnp.asarray(gradient)}, optimizer.init(params), params)
    [mu] = [x for path, x in jax.tree_util.tree_leaves_with_path(state) if "/mu/" in path_name(path)]
    return np.asarray(mu)


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (10.0, 5.0), (0.0, 5.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm: float, norm: float) -> None:
    mu = first_moments(OptimConfig(beta1=0.9, clip_norm=clip_norm), np.array([3.0, 4.0]))
    np.testing.assert_allclose(mu, 0.1 * norm * np.array([0.6, 0.8]), rtol=1e-5)


def test_weight_decay_touches_kernels_alone(como_params: dict[str, Any]) -> None:
    optimizer = make_optimizer(OptimConfig(learning_rate=1.0, warmup_steps=0, weight_decay=0.5), 10)

    @jax.jit
    def update_without_gradient(params: Any) -> Any:
        ones = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), ones)
        return optax.apply_updates(ones, updates)

    for path, value in jax.tree_util.tree_leaves_with_path(update_without_gradient(como_params)):
        name = path_name(path)
        np.testing.assert_allclose(value, 0.5 if name.endswith("kernel") else 1.0, err_msg=name)
