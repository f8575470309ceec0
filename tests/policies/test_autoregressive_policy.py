"""The autoregressive policy: what trains what, what it samples, and that it learns."""

import dataclasses
import json
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny_autoregressive import (
    ACTION_PARAMS,
    ACTIONS,
    BATCH,
    CHUNK,
    KEYS,
    LATENT,
    LATENT_PARAMS,
    QUERIES,
    STRIDE,
    VARIANTS,
    WITH_LATENTS,
    init,
    loss_function,
    loss_of,
    make_batch,
    make_labelled_robot_batch,
    make_model,
    relative_error,
    robot_half,
    sample,
    trained_modules,
    video_half,
)

from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.model_def import Params
from como_jax.spec.policies import with_new_names
from como_jax.training import sharding
from tests.everyday import mostly_slow


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "codes"))
def test_every_variant_gives_a_loss_of_actions_and_of_its_latents(variant: str) -> None:
    total, terms, gradients = loss_of(variant, make_batch())
    expected = {"action_loss", "action_share"}
    expected |= {"latent_loss", "latent_share"} if variant != "robot" else set()
    assert set(terms) == expected | ({"latent_accuracy"} if variant == "codes" else set())
    assert np.isfinite(total) and terms["action_share"] == 0.5 and terms.get("latent_share", 0.5) == 0.5
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("variant", mostly_slow(WITH_LATENTS, "codes"))
def test_samples_have_the_shapes_of_targets(variant: str) -> None:
    observation = make_batch().observation
    actions = sample(variant, observation, generate_latents=True)
    assert actions.shape == (BATCH, CHUNK, ACTIONS) and actions.dtype == np.float32
    latents = sample(variant, observation, "predict_latents")
    if variant == "codes":
        assert latents.shape == (BATCH, QUERIES) and latents.dtype == np.int32
    else:
        assert latents.shape == (BATCH, QUERIES * LATENT) and latents.dtype == np.float32


@pytest.mark.slow
def test_padding_of_the_instruction_changes_nothing() -> None:
    observation = make_batch().observation
    observation.text[:, -1] = 0  # The end of a text is read; what follows it is padding.
    longer = dataclasses.replace(observation, text=np.pad(observation.text, ((0, 0), (0, 4))))
    text = observation.text.copy()
    text[:, 0] = text[:, 0] % 200 + 1
    other = dataclasses.replace(observation, text=text)
    actions, padded, reworded = (sample("robot", seen) for seen in (observation, longer, other))
    np.testing.assert_allclose(padded, actions, rtol=1e-4, atol=1e-5)
    assert np.abs(reworded - actions).max() > 1e-3


@pytest.mark.parametrize("variant", mostly_slow(WITH_LATENTS, "codes"))
def test_a_policy_without_latents_has_the_other_parameters_of_one_with_latents(variant: str) -> None:
    robot, both = init("robot"), init(variant)
    assert set(both) - set(robot) == LATENT_PARAMS
    chex.assert_trees_all_equal(robot, {name: both[name] for name in robot})


def test_a_policy_that_knows_of_no_latents_acts_like_one_without_them() -> None:
    observation = make_batch().observation
    robot, both = (sample(variant, observation) for variant in ("robot", "codes"))
    np.testing.assert_allclose(both, robot, rtol=1e-4, atol=1e-5)
    assert np.abs(sample("codes", observation, generate_latents=True) - robot).max() > 1e-4


@pytest.mark.parametrize("variant", mostly_slow(WITH_LATENTS, "codes"))
def test_samples_train_the_parts_that_their_labels_concern(variant: str) -> None:
    everything = set(init(variant))
    assert trained_modules(loss_of(variant, robot_half(make_batch()))[2]) == everything - LATENT_PARAMS
    assert trained_modules(loss_of(variant, video_half(make_batch()))[2]) == everything - ACTION_PARAMS


@pytest.mark.slow
def test_each_kind_of_sample_gets_its_own_mean_in_a_mixed_batch() -> None:
    batch = make_batch()
    mixed, robot, video = (loss_of("regression", part) for part in (batch, robot_half(batch), video_half(batch)))
    np.testing.assert_allclose(mixed[0], robot[0] + video[0], rtol=1e-5)
    both = jax.tree.map(lambda a, b: a + b, robot[2], video[2])
    chex.assert_trees_all_close(mixed[2], both, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_actions_depend_on_latents_in_training_unless_these_are_dropped() -> None:
    batch = make_labelled_robot_batch()
    other = dataclasses.replace(batch, latent=-batch.latent)
    for changes, differ in (({}, True), ({"latent_dropout": 1.0}, False)):
        first, second = (float(loss_of("regression", x, **changes)[1]["action_loss"]) for x in (batch, other))
        assert (abs(first - second) > 1e-4) == differ


@pytest.mark.slow
def test_a_batch_without_labels_trains_actions_alone() -> None:
    total, terms, gradients = loss_of("regression", make_batch(latent=None, has_latent=None, codes=None))
    assert terms["latent_loss"] == 0 and total == terms["action_loss"] > 0
    assert not trained_modules(gradients) & LATENT_PARAMS


@pytest.mark.parametrize("variant", mostly_slow(["regression", "diffusion"], "regression"))
def test_unknown_labels_may_be_anything(variant: str) -> None:
    batch = make_batch()
    latent = np.where(batch.has_latent[..., None] > 0, batch.latent, np.nan)
    action = np.where(batch.has_action > 0, batch.action, np.nan)
    total, _, gradients = loss_of(variant, dataclasses.replace(batch, latent=latent, action=action))
    np.testing.assert_allclose(total, loss_of(variant, batch)[0], rtol=1e-6)
    chex.assert_tree_all_finite(gradients)


def test_the_action_loss_is_that_of_sampled_actions() -> None:
    batch = make_labelled_robot_batch()
    # Two steps that belong to the last instant's chunk alone, and not in all dimensions.
    batch.has_action[:, : STRIDE + 1] = 0
    batch.has_action[:3, STRIDE + 2 :] = 0
    batch.has_action[4, :, 1] = 0
    known = batch.has_action[:, STRIDE:] > 0
    error = np.abs(sample("robot", batch.observation) - batch.action[:, STRIDE:])[known]
    expected = np.where(error < 1, 0.5 * error**2, error - 0.5).mean()
    np.testing.assert_allclose(loss_of("robot", batch)[1]["action_loss"], expected, rtol=1e-4)


def test_the_latent_loss_is_that_of_predicted_latents_given_those_before_them() -> None:
    batch = make_batch()
    batch.has_latent[:] = 0
    batch.has_latent[2:, STRIDE] = 1
    predicted = sample("regression", batch.observation, "predict_latents")
    # The first token is as predicted, so that what is predicted after it is the same.
    batch.latent[:, STRIDE, :LATENT] = predicted[:, :LATENT]
    expected = np.square(predicted - batch.latent[:, STRIDE])[2:].mean()
    np.testing.assert_allclose(loss_of("regression", batch)[1]["latent_loss"], expected, rtol=1e-4)


def test_latents_are_those_of_the_first_step_of_an_instant() -> None:
    batch = make_labelled_robot_batch()
    expected = loss_of("regression", batch)[0]
    for step in range(batch.latent.shape[1]):
        latent = batch.latent.copy()
        latent[:, step] += 1.0
        total = loss_of("regression", dataclasses.replace(batch, latent=latent))[0]
        assert (abs(total - expected) > 1e-3) == (step in (0, STRIDE)), step


@pytest.mark.slow
def test_the_gripper_is_learned_by_its_sign_and_predicted_as_one_of_two_values() -> None:
    batch, changes = make_labelled_robot_batch(), {"gripper_dim": 2, "gripper_weight": 0.5, "action_weight": 3.0}
    total, terms, _ = loss_of("robot", batch, **changes)
    np.testing.assert_allclose(total, 3.0 * (terms["action_loss"] + 0.5 * terms["gripper_loss"]), rtol=1e-5)
    larger = dataclasses.replace(batch, action=batch.action * np.float32([1, 1, 7]))
    assert loss_of("robot", larger, **changes)[0] == total
    opposite = dataclasses.replace(batch, action=batch.action * np.float32([1, 1, -1]))
    assert loss_of("robot", opposite, **changes)[1]["gripper_loss"] != terms["gripper_loss"]
    actions, plain = sample("robot", batch.observation, gripper_dim=2), sample("robot", batch.observation)
    np.testing.assert_array_equal(actions[..., 2], np.where(plain[..., 2] > 0, 1.0, -1.0))
    np.testing.assert_allclose(actions[..., :2], plain[..., :2], rtol=1e-5)


@pytest.mark.parametrize("variant", mostly_slow(WITH_LATENTS, "codes"))
def test_a_sample_does_not_depend_on_what_else_is_in_the_batch(variant: str) -> None:
    observation, changes = make_batch().observation, {"temperature": 5.0} if variant == "codes" else {}
    others = np.where(np.arange(BATCH) == 2, 2, 0)
    changed = jax.tree.map(lambda x: x[others], observation)
    first = sample(variant, observation, "predict_latents", **changes)
    second = sample(variant, changed, "predict_latents", KEYS[others], **changes)
    np.testing.assert_allclose(second[2], first[2], rtol=1e-4, atol=1e-5)


def test_codes_at_a_temperature_depend_on_the_key_and_the_likeliest_do_not() -> None:
    observation = make_batch().observation
    for changes, differ in (({}, False), ({"temperature": 5.0}, True)):
        first, second = (
            sample("codes", observation, "predict_latents", keys, **changes) for keys in (KEYS, KEYS[::-1])
        )
        assert np.any(first != second) == differ


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["regression", "codes"])
def test_it_learns_a_batch_by_heart_and_generates_it(variant: str) -> None:
    batch, steps = make_labelled_robot_batch(), 200
    # As in use, latents are known at the last instant alone.
    batch.has_latent[:, :STRIDE] = 0
    optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, steps))

    @jax.jit
    def update(params: Params, state: Any, gradients: Params) -> tuple[Params, Any]:
        updates, state = optimizer.update(gradients, state)
        return optax.apply_updates(params, updates), state

    params = init(variant)
    state, losses = optimizer.init(params), []
    for step in range(steps):
        (total, terms), gradients = loss_function(variant)(params, batch, jax.random.key(step))
        params, state = update(params, state, gradients)
        losses.append(float(total))
    assert losses[-1] < 0.03 * losses[0]
    actions = sample(variant, batch.observation, params=params, generate_latents=True)
    assert relative_error(actions, batch.action[:, STRIDE:]) < 0.1
    latents = sample(variant, batch.observation, "predict_latents", params=params)
    if variant == "codes":
        assert terms["latent_accuracy"] == 1.0
        np.testing.assert_array_equal(latents, batch.codes[:, STRIDE])
    else:
        assert relative_error(latents, batch.latent[:, STRIDE]) < 0.1


@pytest.mark.slow
def test_the_loss_of_a_batch_on_eight_devices_is_that_on_one() -> None:
    batch = make_batch()
    expected, terms, gradients = loss_of("diffusion", batch)
    total, sharded_terms, sharded_gradients = loss_of(
        "diffusion", sharding.shard_batch(batch, sharding.make_mesh(8, devices=jax.devices()))
    )
    np.testing.assert_allclose(total, expected, rtol=1e-5)
    chex.assert_trees_all_close(sharded_terms, terms, rtol=1e-3, atol=1e-5)
    chex.assert_trees_all_close(sharded_gradients, gradients, rtol=1e-3, atol=1e-5)


def test_a_frozen_image_tower_is_left_alone() -> None:
    assert make_model("robot").frozen == ()
    assert make_model("robot", freeze_images=True).frozen == ("observation/images",)


def test_bfloat16_gives_float32_actions_like_those_of_float32() -> None:
    observation = make_batch().observation
    actions, coarse = (
        sample("regression", observation, generate_latents=True, **changes) for changes in ({}, {"dtype": jnp.bfloat16})
    )
    assert coarse.dtype == np.float32
    np.testing.assert_allclose(coarse, actions, atol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latent_head": "flow"}, "model.latent_head 'flow' is unknown; choose one of regression, diffusion"),
        ({"gripper_dim": 3}, "model.gripper_dim 3 is no dimension of actions of 3 numbers"),
        ({"action_size": 0}, "model.action_size and model.latent_dim are both 0"),
        ({"codebook_size": 4, "latent_head": "diffusion"}, "set model.codebook_size=0"),
    ],
)
def test_a_config_that_describes_nothing_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_model("robot", **changes)


def test_labels_without_codes_are_refused_by_a_policy_of_codes() -> None:
    policy = make_model("codes").bind(init("codes"))
    with pytest.raises(DatasetError, match="the labels of the data are not discrete"):
        policy.loss(make_batch(codes=None), jax.random.key(0))


def test_a_policy_of_latents_alone_learns_them_and_has_no_actions() -> None:
    model, batch = make_model("codes", action_size=0), make_batch()
    policy = model.bind({name: part for name, part in init("codes").items() if name not in ACTION_PARAMS})
    empty = np.zeros((*batch.has_latent.shape, 0), np.float32)
    total, terms, _ = jax.jit(policy.loss)(make_batch(action=empty, has_action=empty), jax.random.key(3))
    np.testing.assert_allclose(total, loss_of("codes", video_half(batch))[0], rtol=1e-5)
    assert set(terms) == {"latent_loss", "latent_share", "latent_accuracy"}
    with pytest.raises(ConfigError, match="trained on latent motion alone"):
        policy.sample_actions(batch.observation, KEYS)


def test_a_policy_without_latents_predicts_none() -> None:
    policy = make_model("robot").bind(init("robot"))
    with pytest.raises(ConfigError, match="trained without latent motion"):
        policy.predict_latents(make_batch().observation, KEYS)


def test_configs_of_earlier_versions_are_read_under_the_present_names() -> None:
    before = '{"family": "autoregressive_policy", "model": {"think": true, "width": 8}}'
    expected = {"family": "autoregressive_policy", "model": {"generate_latents": True, "width": 8}}
    assert json.loads(before, object_hook=with_new_names) == expected
