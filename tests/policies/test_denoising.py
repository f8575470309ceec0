"""Noising and sampling against what is known exactly: mixtures of Gaussians, whose best network has a formula."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from como_jax.errors import ConfigError
from como_jax.policies.denoising import Noised, add_noise, alpha_bars, denoise
from como_jax.spec.policies import DiffusionConfig

MODES, WEIGHTS, SPREAD = np.array([-0.7, 0.5]), np.array([0.3, 0.7]), 0.05


def signal_and_noise(config: DiffusionConfig, time: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How much of the data and of the noise is in a sample at a time."""
    if config.kind == "flow":
        return 1 - time, time
    kept = jnp.asarray(alpha_bars(config.train_steps))[jnp.rint(time * config.train_steps).astype(int)]
    return jnp.sqrt(kept), jnp.sqrt(1 - kept)


def best_network(config: DiffusionConfig, x: jax.Array, time: jax.Array) -> jax.Array:
    """What a perfect network says of the mixture: the mean of its target given the noisy sample, by Bayes' rule."""
    signal, noise = (part[:, None, None] for part in signal_and_noise(config, time))
    variance = (signal * SPREAD) ** 2 + noise**2
    logits = jnp.log(WEIGHTS) - 0.5 * (x - signal * MODES) ** 2 / variance
    shares = jax.nn.softmax(logits, axis=-1)
    means = MODES + signal * SPREAD**2 / variance * (x - signal * MODES)
    sample = (shares * means).sum(axis=-1, keepdims=True)
    epsilon = (x - signal * sample) / jnp.maximum(noise, 1e-6)
    if config.kind == "flow":
        return epsilon - sample
    return epsilon if config.prediction == "epsilon" else sample


def draw(config: DiffusionConfig, count: int = 2000) -> np.ndarray:
    keys = jax.random.split(jax.random.key(3), count)
    noise = jax.random.normal(jax.random.key(4), (count, 1, 1))

    def sample(noise: jax.Array, keys: jax.Array) -> jax.Array:
        return denoise(config, lambda x, time: best_network(config, x, time), noise, keys)

    return np.asarray(jax.jit(sample)(noise, keys)).ravel()


@pytest.mark.parametrize(
    "config",
    [
        DiffusionConfig("ddpm", 100, 100, "epsilon", eta=1.0),
        DiffusionConfig("ddpm", 100, 50, "sample"),
        DiffusionConfig("ddpm", 100, 50, "epsilon", clip=1.0),
        DiffusionConfig("flow", sample_steps=100),
    ],
    ids=["ddpm", "ddim", "clipped", "flow"],
)
def test_samples_of_a_perfect_network_are_of_both_modes(config: DiffusionConfig) -> None:
    samples = draw(config)
    upper = samples > 0
    # The share of the upper mode as a binomial, and each mode's place; a quarter of the modes' distance is far off.
    assert stats.binomtest(int(upper.sum()), len(samples), WEIGHTS[1]).pvalue > 1e-3
    for mode, chosen in zip(MODES, (~upper, upper), strict=True):
        assert abs(samples[chosen].mean() - mode) < 0.02
        assert SPREAD / 2 < samples[chosen].std() < 2 * SPREAD


def test_all_steps_of_ddim_follow_the_mean_path_of_ddpm() -> None:
    # DDPM (arXiv 2006.11239, equation 7): the mean of x_{t-1} given x_t and what the network takes for x_0.
    steps = 20
    config = DiffusionConfig("ddpm", steps, steps, "sample", eta=1.0)
    bars = alpha_bars(steps).astype(np.float64)

    def network(x: jax.Array, time: jax.Array) -> jax.Array:
        return jnp.tanh(2 * x) * 0.5 + time[:, None, None] * 0.1

    start = np.random.default_rng(0).normal(size=(5, 2, 3))
    wanted = start
    for step in range(steps, 0, -1):
        said = np.tanh(2 * wanted) * 0.5 + step / steps * 0.1
        alpha = bars[step] / bars[step - 1]
        of_sample = np.sqrt(bars[step - 1]) * (1 - alpha) / (1 - bars[step])
        of_noisy = np.sqrt(alpha) * (1 - bars[step - 1]) / (1 - bars[step])
        wanted = of_sample * said + of_noisy * wanted

    with pytest.MonkeyPatch.context() as patch:
        # The mean path is the one on which all noise is 0.
        patch.setattr(jax.random, "normal", lambda key, shape: jnp.zeros(shape))
        keys = jax.random.split(jax.random.key(0), len(start))
        found = denoise(config, network, jnp.asarray(start, jnp.float32), keys)
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=2e-4)


def test_noise_and_data_have_the_variances_of_the_schedule() -> None:
    config, sample = DiffusionConfig("ddpm", 10), jnp.full((20_000, 1, 1), 2.0)
    noised = add_noise(config, sample, jax.random.key(0))
    bars = alpha_bars(10)
    for level in (1, 5, 10):
        chosen = np.asarray(noised.x).ravel()[np.isclose(noised.time, level / 10)]
        assert chosen.mean() == pytest.approx(2 * np.sqrt(bars[level]), abs=0.1)
        assert chosen.var() == pytest.approx(1 - bars[level], rel=0.15, abs=1e-3)
    assert bars[0] == 1 and bars[-1] < 1e-3
    assert (np.diff(bars) < 0).all()


def test_what_is_added_can_be_taken_away_again() -> None:
    sample = jax.random.normal(jax.random.key(1), (6, 4, 2))
    for config in (DiffusionConfig("ddpm", prediction="epsilon"), DiffusionConfig("flow")):
        noised = add_noise(config, sample, jax.random.key(2))
        signal, noise = (part[:, None, None] for part in signal_and_noise(config, noised.time))
        epsilon = noised.target + (sample if config.kind == "flow" else 0)
        np.testing.assert_allclose(signal * sample + noise * epsilon, noised.x, rtol=1e-5, atol=1e-5)


def test_regression_is_told_nothing_of_the_target_and_asks_once() -> None:
    config, sample = DiffusionConfig("regression", clip=0.5), jax.random.normal(jax.random.key(1), (6, 4, 2))
    noised = add_noise(config, sample, jax.random.key(2))
    chex.assert_trees_all_equal(noised, Noised(jnp.zeros((6, 4, 2)), jnp.ones(6), sample))
    found = denoise(config, lambda x, time: x + time[:, None, None] * sample, sample)
    chex.assert_trees_all_equal(found, jnp.clip(sample, -0.5, 0.5))


def test_clipped_samples_stay_within_the_limits() -> None:
    for kind in ("ddpm", "flow"):
        config = DiffusionConfig(kind, clip=0.4, sample_steps=10)
        assert np.abs(draw(config, 100)).max() <= 0.4 + 1e-5


@pytest.mark.parametrize("fields", [{"kind": "edm"}, {"prediction": "x0"}, {"sample_steps": 101}, {"sample_steps": 0}])
def test_what_there_is_not_is_refused_by_name(fields: dict[str, object]) -> None:
    (name,) = fields
    with pytest.raises(ConfigError, match=f"model.diffusion.{name}"):
        DiffusionConfig(**fields)
