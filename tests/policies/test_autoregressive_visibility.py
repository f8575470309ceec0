"""Changing what an output of the autoregressive policy must not see changes nothing."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest
from tiny_autoregressive import (
    BATCH,
    INSTANTS,
    LATENT,
    QUERIES,
    init,
    make_batch,
    make_model,
)

from como_jax import types
from como_jax.nn.model_def import Params
from como_jax.policies.autoregressive import KnownLatents

Inputs = tuple[types.Observation, KnownLatents, np.ndarray]


@functools.cache
def outputs_function() -> Callable[..., Any]:
    model = make_model("regression")

    def run(params: Params, observation: types.Observation, motion: KnownLatents, use_latents: jax.Array) -> Any:
        policy = model.bind(params)
        return policy(policy.observation(observation), motion, use_latents)

    return functools.partial(jax.jit(run), init("regression"))


def changed(inputs: Inputs, others: Inputs) -> tuple[np.ndarray, np.ndarray]:
    """Which outputs of latent tokens, bool `[B, T, Q + 1]`, and of action queries, bool `[B, T]`, differ."""
    first, second = outputs_function()(*inputs), outputs_function()(*others)
    latents = np.abs(first.latents - second.latents).max(axis=-1) > 1e-6
    actions = np.abs(first.actions - second.actions).max(axis=-1) > 1e-6
    assert np.array_equal(actions.any(axis=-1), actions.all(axis=-1)), "the queries of an instant see the same"
    return latents, actions.any(axis=-1)


def make_inputs(use_latents: bool = True, known: bool = True) -> Inputs:
    values = np.random.default_rng(2).normal(size=(BATCH, INSTANTS, QUERIES, LATENT)).astype(np.float32)
    return (
        make_batch().observation,
        KnownLatents(values, np.full((BATCH, INSTANTS), known)),
        np.full(BATCH, use_latents),
    )


def with_pixels(inputs: Inputs, sample: int, instant: int, camera: int = 0) -> Inputs:
    observation, *rest = inputs
    images = observation.images.copy()
    images[sample, instant, camera] = 255 - images[sample, instant, camera]
    return dataclasses.replace(observation, images=images), *rest


def with_latent(inputs: Inputs, instant: int, token: int) -> Inputs:
    observation, motion, use_latents = inputs
    values = motion.values.copy()
    values[0, instant, token] += 1.0
    return observation, motion._replace(values=values), use_latents


@pytest.mark.parametrize("instant", range(INSTANTS))
def test_a_image_changes_all_from_its_instant_on_and_nothing_before_it(instant: int) -> None:
    latents, actions = changed(make_inputs(), with_pixels(make_inputs(), 0, instant))
    expected = np.arange(INSTANTS) >= instant
    np.testing.assert_array_equal(actions[0], expected)
    np.testing.assert_array_equal(latents[0], np.repeat(expected[:, None], QUERIES + 1, axis=1))
    assert not latents[1:].any() and not actions[1:].any()


@pytest.mark.parametrize("use_latents", [True, False])
@pytest.mark.parametrize(("instant", "token"), [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_latent_changes_later_latents_and_the_actions_that_read_it(
    instant: int, token: int, use_latents: bool
) -> None:
    inputs = make_inputs(use_latents)
    latents, actions = changed(inputs, with_latent(inputs, instant, token))
    # The start token comes first: latent q stands in slot q + 1, whose output is for the next.
    place = np.arange(INSTANTS * (QUERIES + 1)) >= instant * (QUERIES + 1) + token + 1
    np.testing.assert_array_equal(latents[0], place.reshape(INSTANTS, QUERIES + 1))
    np.testing.assert_array_equal(actions[0], (np.arange(INSTANTS) >= instant) & use_latents)
    assert not latents[1:].any() and not actions[1:].any()


@pytest.mark.parametrize("instant", range(INSTANTS))
def test_an_unknown_latent_changes_no_action(instant: int) -> None:
    inputs = make_inputs(known=False)
    assert not changed(inputs, with_latent(inputs, instant, 0))[1].any()


def test_the_actions_know_the_difference_between_latents_and_none() -> None:
    assert changed(make_inputs(known=True), make_inputs(known=False))[1].all()
    assert not changed(make_inputs(known=True, use_latents=False), make_inputs(known=False, use_latents=False))[1].any()


def test_a_missing_camera_changes_nothing() -> None:
    observation, *rest = make_inputs()
    has_camera = observation.has_camera.copy()
    has_camera[0, 1] = 0
    inputs = (dataclasses.replace(observation, has_camera=has_camera), *rest)
    for instant in range(INSTANTS):
        latents, actions = changed(inputs, with_pixels(inputs, 0, instant, camera=1))
        assert not latents.any() and not actions.any()
