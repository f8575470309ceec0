"""The diffusion policy: who learns from what, what may see what, and that it learns a distribution, not its mean."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util
from scipy import stats

from como_jax.errors import ConfigError
from como_jax.nn.model_def import ModelDef
from como_jax.policies.diffusion import DiffusionPolicy
from como_jax.spec.policies import DiffusionConfig, DiffusionPolicyConfig, ObservationConfig
from como_jax.spec.towers import TextConfig, VitConfig
from como_jax.types import PolicyBatch, fake_policy_batch

Params = dict[str, Any]
VIT = VitConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2)
TEXT = TextConfig(width=16, depth=1, num_heads=2, max_length=8)


@functools.cache
def make_policy(**changes: Any) -> ModelDef:
    sizes = {"width": 16, "depth": 2, "num_heads": 2, "chunk": 4, "action_size": 3, "latent_size": 6}
    config = DiffusionPolicyConfig(**{**sizes, **changes})
    observation = ObservationConfig(VIT, TEXT, state_size=2)
    return ModelDef.create(lambda rngs: DiffusionPolicy(observation, config, rngs=rngs))


@functools.cache
def perturbed(model: ModelDef, scale: float = 0.1) -> Params:
    """Parameters of which none is zero, as training leaves them."""
    params, rng = jax.jit(model.init)(jax.random.key(0)), np.random.default_rng(1)
    return jax.tree.map(lambda leaf: leaf + scale * rng.standard_normal(leaf.shape, np.float32), params)


def make_gradient(model: ModelDef) -> Callable[[Params, PolicyBatch], dict[str, float]]:
    """The largest gradient of every parameter."""
    gradient = jax.jit(jax.grad(lambda params, batch: model.bind(params).loss(batch, jax.random.key(2)).total))

    def largest(params: Params, batch: PolicyBatch) -> dict[str, float]:
        flat = traverse_util.flatten_dict(gradient(params, batch))
        return {"/".join(path): float(np.abs(leaf).max()) for path, leaf in flat.items()}

    return largest


def rows(batch: PolicyBatch, chosen: slice) -> PolicyBatch:
    return jax.tree.map(lambda x: x[chosen], batch)


def test_a_sample_trains_the_trunk_and_the_head_of_its_own_kind_alone() -> None:
    model, batch = make_policy(), fake_policy_batch(4)
    params, gradient = perturbed(model), make_gradient(model)
    of_robots, of_videos = (gradient(params, rows(batch, part)) for part in (slice(0, 2), slice(2, 4)))
    for found, own, other in ((of_robots, "action", "latent"), (of_videos, "latent", "action")):
        assert all(value == 0 for name, value in found.items() if name.startswith(f"{other}/"))
        unmoved = [name for name, value in found.items() if value == 0 and not name.startswith(f"{other}/")]
        # Keys have no use for a bias; what nobody hides is never replaced; positions of a ViT are fixed; videos have
        # no state.
        allowed = ("no_instruction", "images/pos_embed", "no_state" if own == "action" else "state_proj")
        assert all(any(part in name for part in allowed) for name in unmoved), unmoved


@pytest.mark.slow
def test_a_sample_of_both_kinds_is_trained_on_one_of_them_as_often_as_it_is_told() -> None:
    batch = fake_policy_batch(200)
    batch = dataclasses.replace(
        batch, has_action=np.ones_like(batch.has_action), has_latent=np.ones_like(batch.has_latent)
    )
    for share in (0.0, 0.25, 1.0):
        model = make_policy(latent_share=share, depth=1)
        loss = jax.jit(lambda params, model=model: model.bind(params).loss(batch, jax.random.key(0)))
        terms = loss(jax.jit(model.init)(jax.random.key(0))).terms
        assert float(terms["latent_share"]) == pytest.approx(share, abs=0.1)
        assert float(terms["latent_share"] + terms["action_share"]) == pytest.approx(1)


def test_steps_after_the_end_of_an_episode_change_nothing() -> None:
    model, batch = make_policy(), fake_policy_batch(4)
    has_action, has_latent = batch.has_action.copy(), batch.has_latent.copy()
    has_action[:, 2:], has_latent[:, 2:] = 0, 0
    params = perturbed(model)
    loss = jax.jit(lambda batch: model.bind(params).loss(batch, jax.random.key(0)).total)
    short = dataclasses.replace(batch, has_action=has_action, has_latent=has_latent)
    action, latent = batch.action.copy(), batch.latent.copy()
    action[:, 2:], latent[:, 2:] = 9.0, 9.0
    other = dataclasses.replace(short, action=action, latent=latent)
    assert float(loss(short)) == pytest.approx(float(loss(other)), rel=1e-6)
    assert float(loss(short)) != pytest.approx(float(loss(batch)), rel=1e-6)


@pytest.mark.slow
def test_a_policy_for_robots_alone_starts_from_the_same_trunk() -> None:
    both, alone = (jax.jit(make_policy(latent_size=size).init)(jax.random.key(0)) for size in (6, 0))
    flat_both, flat_alone = traverse_util.flatten_dict(both), traverse_util.flatten_dict(alone)
    assert {path for path in flat_both if path not in flat_alone} == {p for p in flat_both if p[0] == "latent"}
    for path, value in flat_alone.items():
        np.testing.assert_array_equal(value, flat_both[path])


@pytest.mark.slow
def test_noisy_versions_of_a_chunk_share_the_reading_of_its_observation() -> None:
    batch = fake_policy_batch(3, latent_shape=None)
    once, thrice = make_policy(latent_size=0), make_policy(latent_size=0, draws=3)
    params = perturbed(once)

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def network(model: ModelDef, repeats: int) -> jax.Array:
        policy = model.bind(params)
        context = policy._context(batch.observation)
        tokens = jnp.repeat(jnp.linspace(-1, 1, 3 * 4 * 16).reshape(3, 4, 16), repeats, axis=0)
        return policy._trunk(tokens, jnp.full(3 * repeats, 0.3), context, jnp.ones((3 * repeats, 4), bool))

    np.testing.assert_allclose(network(thrice, 3), jnp.repeat(network(once, 1), 3, axis=0), rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def sampler() -> Callable[..., np.ndarray]:
    model = make_policy(diffusion=DiffusionConfig(sample_steps=4))
    params = perturbed(model)
    sample = jax.jit(lambda observation, keys: model.bind(params).sample_actions(observation, keys))
    return lambda observation, keys: np.asarray(sample(observation, keys))


def test_a_sample_does_not_depend_on_its_neighbours(sampler: Callable[..., np.ndarray]) -> None:
    observation, keys = fake_policy_batch(4).observation, jax.random.split(jax.random.key(5), 4)
    whole = sampler(observation, keys)
    assert whole.shape == (4, 4, 3)
    swapped = sampler(jax.tree.map(lambda x: x[::-1], observation), keys[::-1])
    np.testing.assert_allclose(swapped[::-1], whole, rtol=1e-4, atol=1e-5)
    assert np.abs(sampler(observation, jax.random.split(jax.random.key(6), 4)) - whole).max() > 1e-3


def test_a_sample_follows_image_state_and_instruction(sampler: Callable[..., np.ndarray]) -> None:
    observation, keys = fake_policy_batch(2).observation, jax.random.split(jax.random.key(5), 2)
    base = sampler(observation, keys)
    text = observation.text.copy()
    text[:, 0] = 7
    changes = {"images": 255 - observation.images, "state": observation.state + 1, "text": text}
    for name, value in changes.items():
        other = sampler(dataclasses.replace(observation, **{name: value}), keys)
        assert np.abs(other[0] - base[0]).max() > 1e-4, name


@pytest.mark.slow
def test_guidance_of_one_is_none_and_more_goes_further_from_what_is_not_told() -> None:
    model = make_policy(instruction_dropout=0.1, diffusion=DiffusionConfig(sample_steps=1, prediction="sample"))
    params, observation = perturbed(model), fake_policy_batch(2).observation
    keys = jax.random.split(jax.random.key(0), 2)

    def sample(guidance: float) -> np.ndarray:
        changed = make_policy(
            instruction_dropout=0.1, guidance=guidance, diffusion=DiffusionConfig(sample_steps=1, prediction="sample")
        )
        return np.asarray(jax.jit(lambda: changed.bind(params).sample_actions(observation, keys))())

    blind, told, doubled = sample(0.0), sample(1.0), sample(2.0)
    assert np.abs(told - blind).max() > 1e-4
    np.testing.assert_allclose(doubled - blind, 2 * (told - blind), rtol=1e-2, atol=1e-4)
    with pytest.raises(ConfigError, match="instruction_dropout"):
        make_policy(guidance=2.0)


def test_latents_can_be_sampled_too_where_there_are_any() -> None:
    observation, keys = fake_policy_batch(2).observation, jax.random.split(jax.random.key(0), 2)
    model = make_policy(diffusion=DiffusionConfig(sample_steps=2))
    params = perturbed(model)
    assert jax.jit(lambda: model.bind(params).sample_latents(observation, keys))().shape == (2, 4, 6)
    alone = make_policy(latent_size=0)
    with pytest.raises(ConfigError, match="latent"):
        alone.bind(jax.eval_shape(alone.init, jax.random.key(0))).sample_latents(observation, keys)
    unfinished = make_policy(action_size=0)
    with pytest.raises(ConfigError, match="finetune"):
        unfinished.bind(jax.eval_shape(unfinished.init, jax.random.key(0))).sample_actions(observation, keys)


@pytest.mark.slow
def test_a_trained_policy_matches_both_modes_of_endless_data() -> None:
    share, modes = 0.3, (0.6, -0.4)
    diffusion = DiffusionConfig("ddpm", sample_steps=20)
    model = make_policy(chunk=1, action_size=1, latent_size=0, draws=16, depth=1, diffusion=diffusion)
    base = fake_policy_batch(32, chunk=1, action_size=1, latent_shape=None)
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, 600))
    params = jax.jit(model.init)(jax.random.key(0))

    def update(carry: tuple[Params, Any], number: jax.Array) -> tuple[tuple[Params, Any], None]:
        params, state = carry
        data_key, key = jax.random.split(jax.random.fold_in(jax.random.key(1), number))
        first = jax.random.bernoulli(data_key, share, (32, 1, 1))
        # The same scene for all, so that nothing but chance tells the modes apart.
        observation = jax.tree.map(lambda x: jnp.broadcast_to(x[:1], x.shape), base.observation)
        batch = dataclasses.replace(
            base,
            observation=observation,
            action=jnp.where(first, *modes).astype(jnp.float32),
            has_action=jnp.ones((32, 1, 1)),
        )
        grads = jax.grad(lambda params: model.bind(params).loss(batch, key).total)(params)
        updates, state = optimizer.update(grads, state)
        return (optax.apply_updates(params, updates), state), None

    train = jax.jit(lambda params: jax.lax.scan(update, (params, optimizer.init(params)), jnp.arange(600))[0][0])
    params, count = train(params), 400
    observation = jax.tree.map(lambda x: np.repeat(x[:1], count, axis=0), base.observation)
    keys = jax.random.split(jax.random.key(2), count)
    samples = np.asarray(jax.jit(lambda p: model.bind(p).sample_actions(observation, keys))(params)).ravel()
    upper = samples > 0.1
    assert stats.binomtest(int(upper.sum()), count, share).pvalue > 1e-3
    for mode, chosen in zip(modes, (upper, ~upper), strict=True):
        assert np.median(np.abs(samples[chosen] - mode)) < 0.1
