"""The diffusion head's arithmetic, on distributions whose best denoiser is known, and codes at a temperature."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from scipy import stats

from como_jax.policies import heads
from como_jax.policies.denoising import alpha_bars
from como_jax.policies.heads import CodeHead, DiffusionHead
from como_jax.spec.policies import DiffusionConfig
from tests.everyday import mostly_slow

MEAN, DEVIATION = np.array([1.0, -0.5]), 0.3


class GaussianDenoiser(DiffusionHead):
    """Knows the best estimate of the noise in data that are normal with `MEAN` and `DEVIATION`."""

    def estimate(self, noisy: jax.Array, time: jax.Array, condition: jax.Array) -> jax.Array:
        steps = self.diffusion.train_steps
        signal = jnp.asarray(alpha_bars(steps))[jnp.rint(time * steps).astype(int)][:, None]
        spread = signal * DEVIATION**2 + 1.0 - signal
        return jnp.sqrt(1.0 - signal) * (noisy - jnp.sqrt(signal) * MEAN) / spread


def make_gaussian(steps: int) -> DiffusionHead:
    return GaussianDenoiser(3, 2, noise_prediction(steps), hidden=8, depth=1, rngs=nnx.Rngs(0))


def noise_prediction(steps: int) -> DiffusionConfig:
    return DiffusionConfig("ddpm", steps, steps, "epsilon", eta=1.0, clip=5.0)


def test_samples_of_the_best_denoiser_follow_the_distribution_of_the_data() -> None:
    keys = jax.random.split(jax.random.key(0), 2000)
    head = make_gaussian(200)
    samples = np.asarray(jax.jit(head.sample)(jnp.zeros((2000, 3)), keys))
    for values, mean in zip(samples.T, MEAN, strict=True):
        assert stats.kstest((values - mean) / DEVIATION, "norm").pvalue > 0.01


def test_the_best_denoiser_has_the_least_loss() -> None:
    """The least error of the noise is what a normal posterior leaves, averaged over the levels."""
    target = MEAN + DEVIATION * jax.random.normal(jax.random.key(1), (4000, 2))
    loss, _ = jax.jit(make_gaussian(20).loss)(jnp.zeros((4000, 3)), target, jnp.ones(4000), jax.random.key(2))
    signal = alpha_bars(20)[1:]
    expected = np.mean(signal * DEVIATION**2 / (signal * DEVIATION**2 + 1 - signal))
    np.testing.assert_allclose(loss, expected, rtol=0.05)


@pytest.mark.parametrize("kind", mostly_slow(["ddpm", "flow"], "flow"))
def test_a_trained_head_draws_what_belongs_to_the_features(kind: str) -> None:
    diffusion = noise_prediction(20) if kind == "ddpm" else DiffusionConfig("flow", sample_steps=20)
    features = jnp.array([[1.0, 0.0], [0.0, 1.0]])
    target = jnp.array([[1.0, -0.5, 0.3], [-0.8, 0.4, 1.2]])
    graphdef, params = nnx.split(DiffusionHead(2, 3, diffusion, hidden=64, depth=2, rngs=nnx.Rngs(0)))
    optimizer = optax.adam(optax.cosine_decay_schedule(5e-3, 400))

    @jax.jit
    def train(params: nnx.State) -> nnx.State:
        def update(carry: tuple[nnx.State, Any], key: jax.Array) -> tuple[tuple[nnx.State, Any], None]:
            params, state = carry
            repeated = [jnp.repeat(x, 32, axis=0) for x in (features, target)]
            gradients = jax.grad(lambda p: nnx.merge(graphdef, p).loss(*repeated, jnp.ones(64), key)[0])(params)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), None

        keys = jax.random.split(jax.random.key(0), 400)
        return jax.lax.scan(update, (params, optimizer.init(params)), keys)[0][0]

    head = nnx.merge(graphdef, train(params))
    samples = jax.jit(head.sample)(jnp.repeat(features, 8, axis=0), jax.random.split(jax.random.key(1), 16))
    np.testing.assert_allclose(samples, np.repeat(target, 8, axis=0), atol=0.05)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_codes_are_drawn_in_proportion_to_their_tempered_probability(temperature: float) -> None:
    head = CodeHead(2, 4, temperature, rngs=nnx.Rngs(0))
    features = jnp.broadcast_to(jnp.array([1.0, -2.0]), (4000, 2))
    codes = np.asarray(jax.jit(head.sample)(features, jax.random.split(jax.random.key(0), 4000)))
    expected = np.asarray(jax.nn.softmax(head.out(features[0]) / temperature))
    assert stats.chisquare(np.bincount(codes, minlength=4), 4000 * expected, sum_check=False).pvalue > 0.01


def test_a_mean_over_nothing_is_zero() -> None:
    assert heads.masked_mean(jnp.ones(3), jnp.zeros(3)) == 0.0
    assert heads.masked_mean(jnp.array([1.0, 3.0, 9.0]), jnp.array([1.0, 1.0, 0.0])) == 2.0
