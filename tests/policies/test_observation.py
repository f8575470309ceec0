"""The reading of observations: what is seen, what is not, and who learns."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx, traverse_util

from como_jax.errors import ConfigError
from como_jax.nn.layers import normalize_frames
from como_jax.nn.model_def import ModelDef
from como_jax.policies.diffusion import DiffusionPolicy
from como_jax.policies.observation import ObservationEncoder, ObservationFeatures, PatchTower
from como_jax.spec.policies import DiffusionConfig, DiffusionPolicyConfig, ObservationConfig
from como_jax.spec.towers import TextConfig, VitConfig
from como_jax.types import Observation, fake_policy_batch

VIT = VitConfig(image_size=32, patch_size=8, width=16, depth=1, num_heads=2)
TEXT = TextConfig(width=8, depth=1, num_heads=2, max_length=8)
BASE = ObservationConfig(VIT, TEXT, cameras=2, instants=3, state_size=2)
WIDTH = 12
TOWERS = ("vit", "siglip", "patch")
Params = dict[str, Any]


def make_observation(**changes: Any) -> Observation:
    batch = fake_policy_batch(4, instants=3, cameras=2, image_size=32)
    return dataclasses.replace(batch.observation, **changes)


def random_params(model: ModelDef) -> Params:
    """Parameters of which none is zero, as training leaves them."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], shape: jax.ShapeDtypeStruct) -> np.ndarray:
        return (rng.normal(size=shape.shape, scale=0.2) + (path[-1].key == "scale")).astype(shape.dtype)

    return jax.tree.map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0)))


@functools.cache
def make_encoder(config: ObservationConfig = BASE) -> tuple[ModelDef, Params]:
    """An encoder and its parameters."""
    model = ModelDef.create(lambda rngs: ObservationEncoder(config, WIDTH, rngs=rngs))
    return model, random_params(model)


@functools.cache
def reader(config: ObservationConfig = BASE) -> Callable[[Observation], ObservationFeatures]:
    model, params = make_encoder(config)
    read = jax.jit(lambda params, observation: model.bind(params)(observation))
    return lambda observation: jax.tree.map(np.asarray, read(params, observation))


def shapes(config: ObservationConfig, observation: Observation) -> ObservationFeatures:
    """Shapes of what is read."""
    model = ModelDef.create(lambda rngs: ObservationEncoder(config, WIDTH, rngs=rngs))
    params = jax.eval_shape(model.init, jax.random.key(0))
    return jax.eval_shape(lambda params: model.bind(params)(observation), params)


def without_cameras(observation: Observation, *pairs: tuple[int, int]) -> Observation:
    """Without some cameras of some rows; their images stay."""
    has_camera = observation.has_camera.copy()
    for pair in pairs:
        has_camera[pair] = 0
    return dataclasses.replace(observation, has_camera=has_camera)


def largest_gradients(config: ObservationConfig, observation: Observation) -> dict[str, float]:
    """Of a sum over all that is there, by parameter."""
    model, params = make_encoder(config)

    def total(params: Params) -> jax.Array:
        tokens, mask = model.bind(params)(observation).context()
        weights = jax.random.normal(jax.random.key(2), tokens.shape)
        return jnp.sum(tokens * weights * mask[..., None])

    gradients = traverse_util.flatten_dict(jax.jit(jax.grad(total))(params))
    return {"/".join(map(str, path)): float(np.abs(value).max()) for path, value in gradients.items()}


@pytest.mark.parametrize(
    ("tower", "pool", "cells"),
    [("vit", 1, 16), ("vit", 2, 4), ("siglip", 1, 16), ("siglip", 2, 4), ("patch", 1, 4), ("patch", 2, 1)],
)
def test_every_instant_has_tokens_of_all_cameras_and_of_the_state(tower: str, pool: int, cells: int) -> None:
    config = dataclasses.replace(BASE, image_tower=tower, pool=pool)
    found = shapes(config, make_observation())
    assert found.tokens.shape == (4, 3, 2 * cells + 1, WIDTH) and found.mask.shape == found.tokens.shape[:3]
    assert found.text.tokens.shape == (4, 8, WIDTH)


def test_the_context_is_all_tokens_in_one_sequence() -> None:
    found = reader()(make_observation())
    assert found.mask.all()
    tokens, mask = found.context()
    np.testing.assert_array_equal(tokens, np.concatenate([*found.tokens.swapaxes(0, 1), found.text.tokens], axis=1))
    np.testing.assert_array_equal(mask, np.concatenate([*found.mask.swapaxes(0, 1), found.text.mask], axis=1))


def test_a_vit_s_tokens_are_its_patches_averaged_in_squares() -> None:
    config, observation = dataclasses.replace(BASE, pool=2), make_observation()
    model, params = make_encoder(config)
    tower = jax.jit(lambda params, x: model.bind(params).images(normalize_frames(x)))
    patches = np.asarray(tower(params, observation.images[1:2, 2, 1]))[0, 1:].reshape(4, 4, 16)
    found = reader(config)(observation).tokens[1, 2, 4:8]
    place = params["camera_embed"][1] + params["instant_embed"][2]
    for row in range(2):
        for column in range(2):
            mean = patches[2 * row : 2 * row + 2, 2 * column : 2 * column + 2].mean(axis=(0, 1))
            projected = mean @ params["image_proj"]["kernel"] + params["image_proj"]["bias"]
            expected = projected + params["image_pos"][2 * row + column] + place
            np.testing.assert_allclose(found[2 * row + column], expected, atol=1e-4)


def test_the_tower_over_patches_has_one_token_for_sixteen_pixels() -> None:
    tower = PatchTower(16, dtype=jnp.float32, rngs=nnx.Rngs(0))
    images = np.random.default_rng(0).normal(size=(1, 64, 48, 3)).astype(np.float32)
    found = np.asarray(jax.jit(lambda x: tower(x))(images)).reshape(4, 3, 16)
    changed = images.copy()
    changed[0, 16:32, 32:48] += 1
    differs = np.abs(np.asarray(jax.jit(lambda x: tower(x))(changed)).reshape(4, 3, 16) - found).max(axis=-1) > 1e-6
    np.testing.assert_array_equal(np.argwhere(differs), [[1, 2]])


def test_tokens_of_the_tower_over_patches_are_joined_in_squares() -> None:
    config, observation = dataclasses.replace(BASE, image_tower="patch", pool=2), make_observation()
    model, params = make_encoder(config)
    tower = jax.jit(lambda params, x: model.bind(params).images(normalize_frames(x)))
    patches = np.asarray(tower(params, observation.images[1:2, 2, 1])).reshape(-1)
    found = reader(config)(observation).tokens[1, 2, 1]
    place = params["image_pos"][0] + params["camera_embed"][1] + params["instant_embed"][2]
    expected = patches @ params["image_proj"]["kernel"] + params["image_proj"]["bias"] + place
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("tower", TOWERS)
def test_a_image_changes_its_own_tokens_alone(tower: str) -> None:
    config, observation = dataclasses.replace(BASE, image_tower=tower, pool=2), make_observation()
    images = observation.images.copy()
    images[1, 2, 0] = 255 - images[1, 2, 0]
    before, after = (reader(config)(dataclasses.replace(observation, images=x)) for x in (observation.images, images))
    changed = np.abs(before.tokens - after.tokens).max(axis=-1) > 1e-6
    cells = (changed.shape[-1] - 1) // 2
    assert changed[1, 2, :cells].all() and changed.sum() == cells


def test_instants_and_cameras_can_be_told_apart() -> None:
    observation = make_observation()
    same = dataclasses.replace(
        observation, images=np.broadcast_to(observation.images[:, :1, :1], observation.images.shape)
    )
    tokens = reader()(same).tokens[0, :, :32].reshape(3, 2, 16, WIDTH)
    assert len(np.unique(tokens[:, :, 3].reshape(6, WIDTH).round(4), axis=0)) == 6


def test_a_missing_camera_is_masked_and_its_state_is_not() -> None:
    found = reader()(without_cameras(make_observation(), (1, 0), (2, 0), (2, 1)))
    expected = np.ones((4, 3, 33), bool)
    expected[1, :, :16] = False
    expected[2, :, :32] = False
    np.testing.assert_array_equal(found.mask, expected)


def hide(observation: Observation) -> tuple[Observation, Observation]:
    """Without camera 0 of row 1, camera 1 of row 2, states of rows 1 and 3; and with other numbers in their place."""
    observation = without_cameras(observation, (1, 0), (2, 1))
    hidden = dataclasses.replace(observation, has_state=np.array([1, 0, 1, 0], np.float32))
    images, state = observation.images.copy(), observation.state.copy()
    images[1, :, 0], images[2, :, 1] = 255 - images[1, :, 0], 0
    state[1::2] = 7
    return hidden, dataclasses.replace(hidden, images=images, state=state)


@pytest.mark.parametrize("tower", TOWERS)
def test_what_is_not_there_changes_no_token_that_is(tower: str) -> None:
    before, after = map(reader(dataclasses.replace(BASE, image_tower=tower)), hide(make_observation()))
    np.testing.assert_array_equal(before.mask, after.mask)
    np.testing.assert_allclose(before.tokens[before.mask], after.tokens[after.mask], atol=1e-6)
    assert np.abs(before.tokens - after.tokens).max() > 1e-3


@pytest.mark.slow
def test_what_is_not_there_changes_no_action() -> None:
    sizes = {"width": 16, "depth": 1, "num_heads": 2, "chunk": 2, "action_size": 3, "latent_size": 0}
    config = DiffusionPolicyConfig(**sizes, diffusion=DiffusionConfig(sample_steps=1))
    policy = ModelDef.create(lambda rngs: DiffusionPolicy(BASE, config, rngs=rngs))
    keys = jax.random.split(jax.random.key(1), 4)
    sample = jax.jit(lambda params, observation: policy.bind(params).sample_actions(observation, keys))
    hidden, other = hide(make_observation())
    shown = dataclasses.replace(other, has_camera=np.ones((4, 2), np.float32), has_state=np.ones(4, np.float32))
    params = random_params(policy)
    base, same, different = (np.asarray(sample(params, each)) for each in (hidden, other, shown))
    np.testing.assert_allclose(same, base, atol=1e-5)
    changed = np.abs(different - base).max(axis=(1, 2))
    assert np.all(changed[1:] > 1e-3) and changed[0] < 1e-5


def test_an_absent_state_has_a_token_of_its_own() -> None:
    observation = make_observation(has_state=np.array([1, 0, 1, 0], np.float32))
    _, params = make_encoder()
    tokens = reader()(observation).tokens[:, :, -1]
    absent = params["no_state"] + params["instant_embed"]
    np.testing.assert_allclose(tokens[1::2], np.broadcast_to(absent, (2, 3, WIDTH)), atol=1e-6)
    assert np.abs(tokens[::2] - absent).max(axis=-1).min() > 1e-3


def test_without_a_state_there_is_no_token_for_it() -> None:
    observation = make_observation(state=None, has_state=None)
    assert shapes(dataclasses.replace(BASE, state_size=0), observation).tokens.shape[2] == 32


@pytest.mark.parametrize(
    ("tower", "frozen"), [("vit", False), ("vit", True), ("siglip", False), ("siglip", True), ("patch", False)]
)
def test_gradients_reach_all_but_a_frozen_tower(tower: str, frozen: bool) -> None:
    config = dataclasses.replace(BASE, image_tower=tower, freeze_images=frozen)
    found = largest_gradients(config, make_observation(has_state=np.array([1, 0, 1, 0], np.float32)))
    unmoved = {name for name, value in found.items() if value == 0}
    images = {name for name in found if name.startswith("images/")}
    assert images
    # Positions of a ViT are fixed.
    fixed = {"images/pos_embed"} if tower == "vit" else set()
    assert unmoved == (images if frozen else fixed)
    model, params = make_encoder(config)
    assert model.bind(params).frozen_paths() == (("images",) if frozen else ())


@pytest.mark.parametrize("pool", [2, 4])
def test_bytes_in_a_row_are_averaged_to_one_token(pool: int) -> None:
    text = np.zeros((4, 8), np.int32)
    for row, length in enumerate((8, 5, 2, 0)):
        text[row, :length] = np.arange(1, length + 1) + row
    observation = make_observation(text=text)
    # Parameters are equal, since pooling has none.
    plain = reader()(observation).text
    pooled = reader(dataclasses.replace(BASE, text=dataclasses.replace(TEXT, pool=pool)))(observation).text
    assert pooled.tokens.shape == (4, 8 // pool, WIDTH)
    np.testing.assert_allclose(pooled.pooled, plain.pooled, atol=1e-6)
    for row in range(4):
        for group in range(8 // pool):
            members = [place for place in range(group * pool, group * pool + pool) if plain.mask[row, place]]
            assert pooled.mask[row, group] == bool(members)
            if members:
                # The projection is affine, so that it may come before or after the mean.
                expected = plain.tokens[row, members].mean(axis=0)
                np.testing.assert_allclose(pooled.tokens[row, group], expected, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_tower": "resnet"}, "encoder.tower 'resnet' must be one of vit, siglip, patch"),
        ({"pool": 3}, "encoder.pool 3 must divide the 4 image tokens"),
        ({"pool": 0}, "encoder.pool 0 must divide the 4 image tokens"),
        ({"image_tower": "patch", "pool": 4}, "encoder.pool 4 must divide the 2 image tokens"),
        ({"image_tower": "patch", "freeze_images": True}, "encoder.frozen needs another encoder.tower"),
        (
            {"image_tower": "patch", "vit": dataclasses.replace(VIT, image_size=40)},
            "encoder.tower=patch needs a data.image_size that 16 divides, not 40",
        ),
    ],
)
def test_impossible_encoders_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(BASE, **changes)


def test_impossible_towers_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"data\.image_size 30 must be a multiple of encoder\.patch_size 8"):
        dataclasses.replace(VIT, image_size=30)
    for pool in (0, 3):
        with pytest.raises(ConfigError, match=rf"text\.pool {pool} must divide text\.max_length 8"):
            dataclasses.replace(TEXT, pool=pool)


def test_an_observation_of_wrong_shapes_is_refused() -> None:
    model, params = make_encoder()
    with pytest.raises(AssertionError):
        model.bind(params)(make_observation(has_camera=np.ones((4, 3), np.float32)))
