"""LAQ: what its latent actions are made of, what trains it, and that it learns."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from como_jax import types
from como_jax.errors import ConfigError
from como_jax.motion.laq import Laq
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.motion import LaqConfig

SIZES = {"patch_size": 4, "width": 16, "num_heads": 2, "head_size": 8, "latent_dim": 6, "codebook_size": 5}
DEPTHS = {"spatial_depth": 1, "temporal_depth": 1, "decoder_depth": 1}


def make_laq(image_size: int = 16, **changes: Any) -> ModelDef:
    config = LaqConfig(**{**SIZES, **DEPTHS, **changes})
    return ModelDef.create(lambda rngs: Laq(image_size, config, rngs=rngs))


@pytest.fixture(scope="module")
def laq() -> ModelDef:
    return make_laq()


@pytest.fixture(scope="module")
def params(laq: ModelDef) -> Params:
    return jax.jit(laq.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def batch() -> types.FramePairs:
    return types.fake_frame_pairs(batch=4, instants=3, offset=False)


def test_eight_by_eight_patches_give_four_latent_actions() -> None:
    model = make_laq(image_size=64, patch_size=8)
    params = jax.eval_shape(model.init, jax.random.key(0))
    frames = jax.ShapeDtypeStruct((2, 3, 64, 64, 3), jnp.uint8)
    latent = jax.eval_shape(lambda params, frames: model.bind(params).encode(frames), params, frames)
    assert latent.shape == (2, 2, 4, 6)


def test_latent_actions_are_codes_of_consecutive_pairs(laq: ModelDef, params: Params, batch: types.FramePairs) -> None:
    @jax.jit
    def run(params: Params) -> tuple[jax.Array, jax.Array, jax.Array]:
        model = laq.bind(params)
        second = model.codes(batch.frames[:, 1:])
        return model.encode(batch.frames), model.codes(batch.frames), second

    latent, codes, second = jax.tree.map(np.asarray, run(params))
    np.testing.assert_allclose(latent, np.asarray(params["bottleneck"]["codebook"])[codes], atol=1e-6)
    np.testing.assert_array_equal(codes[:, 1], second[:, 0])


def test_labels_of_embedded_frames_are_those_of_their_pairs(
    laq: ModelDef, params: Params, batch: types.FramePairs
) -> None:
    @jax.jit
    def run(params: Params) -> Any:
        model = laq.bind(params)
        source, target = (model.encode_frame(batch.frames[:, k]) for k in (1, 2))
        return model.encode(batch.frames)[:, 1], model.codes(batch.frames)[:, 1], model.encode_pair(source, target)

    latent, codes, label = jax.tree.map(np.asarray, run(params))
    np.testing.assert_allclose(label.latent, latent, atol=1e-6)
    np.testing.assert_array_equal(label.codes, codes)


def test_the_prediction_depends_on_the_latent_action(laq: ModelDef, params: Params, batch: types.FramePairs) -> None:
    predict = jax.jit(lambda params, latent: laq.bind(params).predict(batch.frames[:, 0], latent))
    still, moved = (np.asarray(predict(params, jnp.full((4, 1, 6), value))) for value in (0.0, 1.0))
    assert still.shape == (4, 16, 16, 3) and still.min() >= 0 and still.max() <= 1
    assert np.abs(still - moved).max() > 1e-3


def gradients_of(model: ModelDef, params: Params, batch: types.FramePairs) -> dict[str, np.ndarray]:
    def loss(params: Params) -> jax.Array:
        return model.bind(params).loss(batch, jax.random.key(1)).total

    return traverse_util.flatten_dict(jax.tree.map(np.asarray, jax.jit(jax.grad(loss))(params)), sep="/")


def test_gradients_reach_everything_but_the_usage_of_codes(
    laq: ModelDef, params: Params, batch: types.FramePairs
) -> None:
    without = {name for name, value in gradients_of(laq, params, batch).items() if not np.any(value)}
    # A constant that is added to both frames cancels in their difference.
    assert without - {"pool2/bias"} == {"bottleneck/usage", "bottleneck/share"} == set(laq.frozen)


def test_the_decoder_does_not_train_the_patch_embedding(laq: ModelDef, params: Params, batch: types.FramePairs) -> None:
    flat = traverse_util.flatten_dict(params, sep="/")
    # Without a way from the frames to the latent, only the decoder could.
    blocked = {name: 0 * value if name.startswith("latent_out") else value for name, value in flat.items()}
    found = gradients_of(laq, traverse_util.unflatten_dict(blocked, sep="/"), batch)
    assert not np.any(found["patch_embed/kernel"]) and np.any(found["decoder/layers/mlp/fc1/kernel"])


def test_a_frame_that_is_repeated_is_not_told_from_one_that_moves_by_its_latent_alone(
    laq: ModelDef, params: Params
) -> None:
    # Unlike CoMo's difference, LAQ's is not zero on a still clip: its second frame is encoded with the first before it.
    frames = np.repeat(types.fake_frame_pairs(batch=2).frames[:, :1], 2, axis=1)
    inferred = jax.jit(lambda params: laq.bind(params)._infer(frames))(params)
    assert np.abs(inferred).max() > 1e-4


def test_rarely_used_codes_are_replaced(laq: ModelDef, params: Params, batch: types.FramePairs) -> None:
    @jax.jit
    def upkeep(params: Params, step: int) -> tuple[Params, dict[str, jax.Array]]:
        model = laq.bind(params)
        return model.update_codebook(model.loss(batch, jax.random.key(0)).statistics, step, jax.random.key(1))

    before = np.asarray(params["bottleneck"]["codebook"])
    waiting, metrics = upkeep(params, 9)
    np.testing.assert_array_equal(waiting["bottleneck"]["codebook"], before)
    frequency = np.asarray(waiting["bottleneck"]["usage"])
    np.testing.assert_allclose(frequency.sum(), 1.0, rtol=1e-5)
    replaced, _ = upkeep(params, 10)
    changed = np.any(np.asarray(replaced["bottleneck"]["codebook"]) != before, axis=1)
    np.testing.assert_array_equal(changed, frequency < 0.1 * frequency.mean())
    used = frequency[frequency > 0]
    np.testing.assert_allclose(metrics["perplexity"], np.exp(-np.sum(used * np.log(used))), rtol=1e-4)


@pytest.mark.slow
def test_it_learns(laq: ModelDef, params: Params) -> None:
    batch = types.fake_frame_pairs(batch=4, offset=False)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(params: Params) -> jax.Array:
        def step(carry: Any, key: jax.Array) -> tuple[Any, jax.Array]:
            params, state = carry
            loss, gradients = jax.value_and_grad(lambda p: laq.bind(p).loss(batch, key).total)(params)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), loss

        keys = jax.random.split(jax.random.key(0), 30)
        return jax.lax.scan(step, (params, optimizer.init(params)), keys)[1]

    history = np.asarray(train(params))
    assert history[-1] < 0.5 * history[0]


@pytest.mark.parametrize("size", [24, 20])
def test_a_grid_that_cannot_be_pooled_is_refused(size: int) -> None:
    with pytest.raises(ConfigError, match=f"data.image_size {size} must be a multiple of 4 patches"):
        make_laq(image_size=size)
