"""What CoMo's inverse dynamics model is given, and how the parts make the loss."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from como_jax import types
from como_jax.errors import ConfigError
from como_jax.motion.como import Como
from como_jax.motion.dynamics import InverseDynamics
from como_jax.nn.layers import normalize_frames
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.motion import BottleneckConfig, MotionConfig
from tests.everyday import mostly_slow

MakeComo = Callable[..., ModelDef]


def clips(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (*shape, 16, 16, 3), dtype=np.uint8)


def inputs_of_idm(model: ModelDef, params: Params, call: Callable[[Como], Any]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The `(condition, motion)` of every call of the inverse dynamics model."""

    @jax.jit
    def run(params: Params) -> list[tuple[jax.Array, jax.Array]]:
        seen = []

        def record(self: InverseDynamics, condition: jax.Array, motion: jax.Array) -> jax.Array:
            seen.append((condition, motion))
            return jnp.ones((len(condition), 2, 3))

        with mock.patch.object(InverseDynamics, "__call__", record):
            call(model.bind(params))
        return seen

    return jax.tree.map(np.asarray, run(params))


@pytest.fixture(scope="module")
def como(make_como: MakeComo) -> ModelDef:
    return make_como()


def features(model: ModelDef, params: Params, frames: np.ndarray) -> np.ndarray:
    """The encoder's features of uint8 frames `[B, H, W, 3]`."""
    return np.asarray(jax.jit(lambda params: model.bind(params).encoder(normalize_frames(frames)))(params))


def test_a_still_clip_has_no_motion_at_all(como: ModelDef, como_params: Params) -> None:
    frames = clips(3, 2)
    frames[1, 1] = frames[1, 0]
    [(_, motion)] = inputs_of_idm(como, como_params, lambda model: model.encode(frames))
    np.testing.assert_array_equal(motion[1], 0.0)
    assert np.abs(motion[[0, 2]]).max() > 0.1


def test_the_idm_sees_the_future_only_as_a_difference(como: ModelDef, como_params: Params) -> None:
    frames = clips(2, 2)
    now, future = features(como, como_params, frames[:, 0]), features(como, como_params, frames[:, 1])
    [(condition, motion)] = inputs_of_idm(como, como_params, lambda model: model.encode(frames))
    np.testing.assert_allclose(condition, now, atol=1e-5)
    np.testing.assert_allclose(motion, future - now, atol=1e-5)


def test_without_the_difference_the_idm_sees_the_future_itself(make_como: MakeComo, como_params: Params) -> None:
    model, frames = make_como(motion_input="future"), clips(2, 2)
    [(condition, motion)] = inputs_of_idm(model, como_params, lambda model: model.encode(frames))
    np.testing.assert_allclose(condition, features(model, como_params, frames[:, 0]), atol=1e-5)
    np.testing.assert_allclose(motion, features(model, como_params, frames[:, 1]), atol=1e-5)


def test_the_reversed_pair_starts_from_the_future_and_negates_the_difference(
    como: ModelDef, como_params: Params
) -> None:
    batch = types.fake_frame_pairs(batch=2)
    now, future = (features(como, como_params, batch.frames[:, k]) for k in (0, 1))
    (_, forward), (condition, motion) = inputs_of_idm(
        como, como_params, lambda model: model.loss(batch, jax.random.key(0))
    )
    np.testing.assert_allclose(condition[1::2], future, atol=1e-5)
    np.testing.assert_array_equal(motion[1::2], -forward)
    offset = features(como, como_params, batch.offset_frames[:, 0])
    np.testing.assert_allclose(condition[::2], now, atol=1e-5)
    np.testing.assert_allclose(motion[::2], offset - now, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    mostly_slow(
        [
            {},
            {"motion_input": "future"},
            {"motion_input": "future_only"},
            {"motion_input": "rgb_difference"},
            {"bottleneck": BottleneckConfig("vq", 8)},
        ],
        {},
    ),
    ids=str,
)
def test_labels_of_embedded_frames_are_the_latents_of_their_pairs(make_como: MakeComo, changes: Any) -> None:
    model, frames = make_como(**changes), clips(3, 3)

    @jax.jit
    def run(params: Params) -> Any:
        motion = model.bind(params)
        embedded = [motion.encode_frame(frames[:, k]) for k in range(3)]
        codes = motion.codes(frames) if motion.bottleneck.is_discrete else None
        return motion.encode(frames), codes, [motion.encode_pair(embedded[k], embedded[k + 1]) for k in range(2)]

    latents, codes, labels = jax.tree.map(np.asarray, run(jax.jit(model.init)(jax.random.key(0))))
    for k, label in enumerate(labels):
        np.testing.assert_allclose(label.latent, latents[:, k], atol=1e-5)
        assert label.codes is None if codes is None else np.array_equal(label.codes, codes[:, k])


def test_every_frame_of_a_batch_is_encoded_once(como: ModelDef, como_params: Params) -> None:
    batch, counts = types.fake_frame_pairs(batch=2, instants=3), []

    def count(model: Como) -> None:
        encoder = type(model.encoder)
        forward = encoder.__call__
        with mock.patch.object(encoder, "__call__", lambda self, x: counts.append(len(x)) or forward(self, x)):
            model.loss(batch, jax.random.key(0))

    inputs_of_idm(como, como_params, count)
    assert counts == [2 * (3 + 2)]


@pytest.fixture(scope="module")
def two_pairs(make_como: MakeComo, como_params: Params) -> dict[str, Any]:
    """Loss terms of clips of three instants, and the latents and predictions that they are made of."""
    batch, model = types.fake_frame_pairs(batch=3, instants=3), make_como(tcl_weight=0.5, mse_weight=2.0)

    def pairs(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        return np.stack([first, second], axis=2).reshape(6, 2, 16, 16, 3)

    now, future = batch.frames[:, :2], batch.frames[:, 1:]

    @jax.jit
    def run(params: Params) -> dict[str, Any]:
        como = model.bind(params)
        loss, terms, _ = como.loss(batch, jax.random.key(0))
        forward = como.encode(pairs(now, future))[:, 0]
        return {
            "loss": loss,
            "terms": terms,
            "encoded": como.encode(batch.frames),
            "forward": forward,
            "offset": como.encode(pairs(now, batch.offset_frames))[:, 0],
            "reverse": como.encode(pairs(future, now))[:, 0],
            "prediction": como.fdm(normalize_frames(now.reshape(6, 16, 16, 3)), forward),
            "target": normalize_frames(future.reshape(6, 16, 16, 3)),
        }

    return jax.tree.map(np.asarray, run(como_params))


def test_instants_are_encoded_as_consecutive_pairs(two_pairs: dict[str, Any]) -> None:
    np.testing.assert_allclose(two_pairs["encoded"].reshape(6, 2, 3), two_pairs["forward"], atol=1e-5)


@pytest.mark.slow
def test_pairs_that_share_frames_train_as_pairs_of_their_own(make_como: MakeComo) -> None:
    options = {"tcl_weight": 0.5, "gap_weight": 1.0}
    batch = types.fake_frame_pairs(batch=2, instants=4)
    pairs = [(0, 2), (1, 3), (0, 3)]
    alone = types.FramePairs(
        frames=np.concatenate([batch.frames[:, [first, second]] for first, second in pairs]),
        offset_frames=np.concatenate([batch.offset_frames[:, [second - 1]] for _, second in pairs]),
        gap=np.concatenate([batch.gap * (second - first) for first, second in pairs]),
        dataset=np.tile(batch.dataset, len(pairs)),
        episode=np.tile(batch.episode, len(pairs)),
    )
    params = jax.jit(make_como(**options).init)(jax.random.key(0))
    shared, expected = (
        jax.jit(lambda params: model.bind(params).loss(batch, jax.random.key(0)))(params)  # noqa: B023
        for model, batch in ((make_como(pair_spans=(2, 3), **options), batch), (make_como(**options), alone))
    )
    assert shared.terms.keys() == {"mse", "tcl", "gap"}
    chex.assert_trees_all_close((shared.total, shared.terms), (expected.total, expected.terms), rtol=1e-5)


def test_mse_compares_predicted_with_future_frames(two_pairs: dict[str, Any]) -> None:
    expected = np.mean((two_pairs["prediction"] - two_pairs["target"]) ** 2)
    np.testing.assert_allclose(two_pairs["terms"]["mse"], expected, rtol=1e-5)


def test_tcl_contrasts_the_latents_of_offset_and_reversed_pairs(two_pairs: dict[str, Any]) -> None:
    forward, offset, reverse = (two_pairs[name].reshape(6, -1) for name in ("forward", "offset", "reverse"))

    def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.sum(a * b, 1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)

    logits = np.stack([cosine(offset, forward), cosine(offset, reverse), cosine(forward, reverse)], axis=1) / 0.1
    expected = np.mean(logsumexp(logits, axis=1) - logits[:, 0])
    np.testing.assert_allclose(two_pairs["terms"]["tcl"], expected, rtol=1e-3)


def test_the_loss_is_the_weighted_sum_of_its_terms(two_pairs: dict[str, Any]) -> None:
    terms = two_pairs["terms"]
    np.testing.assert_allclose(two_pairs["loss"], 2.0 * terms["mse"] + 0.5 * terms["tcl"], rtol=1e-6)


def test_a_residual_model_starts_by_copying_the_current_frame(make_como: MakeComo) -> None:
    model, frame = make_como(residual=True), clips(2)
    latent = jax.random.normal(jax.random.key(1), (2, 2, 3))
    predicted = jax.jit(lambda key: model.bind(model.init(key)).predict(frame, latent))(jax.random.key(0))
    np.testing.assert_allclose(predicted, frame / 255.0, atol=1e-6)


def test_the_prediction_depends_on_the_latent_and_lies_in_the_range_of_images(
    como: ModelDef, como_params: Params
) -> None:
    frame = clips(1).repeat(2, axis=0)
    latent = jnp.stack([jnp.zeros((2, 3)), jnp.ones((2, 3))])
    predicted = np.asarray(jax.jit(lambda params: como.bind(params).predict(frame, latent))(como_params))
    assert predicted.shape == (2, 16, 16, 3)
    assert np.abs(predicted[0] - predicted[1]).max() > 1e-3
    assert predicted.min() >= 0.0 and predicted.max() <= 1.0


def test_tcl_without_offset_frames_is_refused(como: ModelDef, como_params: Params) -> None:
    batch = types.fake_frame_pairs(offset=False)
    with pytest.raises(ConfigError, match="model.tcl_weight needs offset frames.*set data.offset_frames"):
        jax.eval_shape(lambda params: como.bind(params).loss(batch, jax.random.key(0)), como_params)


def test_an_unknown_motion_input_is_refused_with_the_choices() -> None:
    with pytest.raises(ConfigError, match="motion_input 'flow' is unknown; choose one of difference, future"):
        MotionConfig(motion_input="flow")


def test_the_future_alone_gives_one_latent_whatever_came_before(make_como: MakeComo) -> None:
    model = make_como(motion_input="future_only")
    frames = clips(2, 2)
    frames[1, 1] = frames[0, 1]
    latent = jax.jit(lambda key: model.bind(model.init(key)).encode(frames))(jax.random.key(0))
    np.testing.assert_allclose(latent[0], latent[1], atol=1e-6)


@pytest.mark.slow
def test_the_pixel_difference_is_encoded_and_the_reversed_pair_negates_it(
    make_como: MakeComo, como_params: Params
) -> None:
    model, batch = make_como(motion_input="rgb_difference"), types.fake_frame_pairs(batch=2)
    (_, forward), (condition, motion) = inputs_of_idm(
        model, como_params, lambda model: model.loss(batch, jax.random.key(0))
    )
    now, future, offset = (
        np.asarray(normalize_frames(frames))
        for frames in (batch.frames[:, 0], batch.frames[:, 1], batch.offset_frames[:, 0])
    )
    encode = jax.jit(lambda params, images: model.bind(params).encoder(images))
    np.testing.assert_allclose(forward, encode(como_params, future - now), atol=1e-4)
    np.testing.assert_allclose(motion[1::2], encode(como_params, now - future), atol=1e-4)
    np.testing.assert_allclose(motion[::2], encode(como_params, offset - now), atol=1e-4)
    np.testing.assert_allclose(condition[1::2], features(model, como_params, batch.frames[:, 1]), atol=1e-5)


def test_a_discrete_latent_is_made_of_codes(make_como: MakeComo) -> None:
    model, frames = make_como(bottleneck=BottleneckConfig("vq", 8), tcl_weight=0.0), clips(3, 3)

    @jax.jit
    def run(key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        como = model.bind(model.init(key))
        return como.encode(frames), como.codes(frames), como.bottleneck.codebook[...]

    latent, codes, codebook = jax.tree.map(np.asarray, run(jax.random.key(0)))
    assert codes.shape == (3, 2, 2) and latent.shape == (3, 2, 2, 3)
    np.testing.assert_allclose(latent, codebook[codes], atol=1e-6)


def test_a_continuous_latent_has_no_codes(make_como: MakeComo, como_params: Params) -> None:
    with pytest.raises(ConfigError, match="none"):
        make_como().bind(como_params).codes(clips(1, 2))


def objective(make_como: MakeComo, name: str, **options: Any) -> tuple[dict[str, np.ndarray], Params, ModelDef]:
    """The terms of a model with one objective, its parameters and itself."""
    model = make_como(tcl_weight=0.0, **{f"{name}_weight": 1.0}, **options)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = types.fake_frame_pairs(batch=3, instants=3, flow=True, label_size=4)
    terms = jax.jit(lambda params: model.bind(params).loss(batch, jax.random.key(0)).terms)(params)
    return jax.tree.map(np.asarray, terms), params, model


def latent_of(model: ModelDef, params: Params) -> np.ndarray:
    batch = types.fake_frame_pairs(batch=3, instants=3)
    latent = jax.jit(lambda params: model.bind(params).encode(batch.frames))(params)
    return np.asarray(latent).reshape(3, 2, -1)


@pytest.mark.parametrize("target", mostly_slow(["future", "difference"], "difference"))
def test_the_feature_target_is_what_the_encoder_sees_of_the_next_frame(make_como: MakeComo, target: str) -> None:
    terms, params, model = objective(make_como, "feature", feature_target=target)
    params["feature_head"] = jax.tree.map(jnp.zeros_like, params["feature_head"])
    batch = types.fake_frame_pairs(batch=3, instants=3, flow=True, label_size=4)
    terms = jax.jit(lambda params: model.bind(params).loss(batch, jax.random.key(0)).terms)(params)
    seen = np.stack([features(model, params, batch.frames[:, k])[:, 1:] for k in range(3)], axis=1)
    expected = seen[:, 1:] if target == "future" else seen[:, 1:] - seen[:, :-1]
    np.testing.assert_allclose(terms["feature"], np.mean(expected**2), rtol=1e-4)


def test_the_gap_is_predicted_in_octaves(make_como: MakeComo) -> None:
    terms, params, model = objective(make_como, "gap")
    head = params["gap_head"]
    predicted = (latent_of(model, params) @ head["kernel"] + head["bias"])[..., 0]
    gap = types.fake_frame_pairs(batch=3, instants=3).gap
    np.testing.assert_allclose(terms["gap"], np.mean((predicted - np.log2(gap)[:, None]) ** 2), rtol=1e-4)


@pytest.mark.slow
def test_labels_are_read_by_a_linear_layer(make_como: MakeComo) -> None:
    terms, params, model = objective(make_como, "label", label_size=4)
    head = params["label_head"]
    predicted = latent_of(model, params) @ head["kernel"] + head["bias"]
    labels = types.fake_frame_pairs(batch=3, instants=3, flow=True, label_size=4).supervision
    np.testing.assert_allclose(terms["label"], np.mean((predicted - labels) ** 2), rtol=1e-4)


@pytest.mark.slow
def test_what_is_not_labelled_does_not_count(make_como: MakeComo) -> None:
    model = make_como(tcl_weight=0.0, mse_weight=0.0, label_weight=1.0, label_size=4)
    params = jax.jit(model.init)(jax.random.key(0))
    batch = types.fake_frame_pairs(label_size=4)
    batch.has_supervision[1:] = 0.0
    batch.supervision[1:] = np.nan

    def loss(params: Params, batch: types.FramePairs) -> jax.Array:
        return model.bind(params).loss(batch, jax.random.key(0)).total

    some, gradient = jax.jit(jax.value_and_grad(loss))(params, batch)
    first = jax.tree.map(lambda x: x[:1], batch)
    np.testing.assert_allclose(some, jax.jit(loss)(params, first), rtol=1e-5)
    chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"feature_weight": 1.0, "freeze_encoder": False}, "model.feature_weight needs encoder.frozen=True"),
        ({"feature_weight": 1.0, "fdm_patch_size": 4}, "model.feature_weight needs equal patches"),
        ({"feature_weight": 1.0, "feature_target": "past"}, "model.feature_target 'past' is unknown"),
        ({"flow_weight": 1.0, "fdm_patch_size": 2}, "model.fdm_patch_size to be a multiple of 4, not 2"),
        ({"label_weight": 1.0}, "model.label_weight needs labels: set data.labels"),
        ({"perceptual_weight": 1.0, "perceptual_space": "resnet"}, "model.perceptual_space 'resnet' is unknown"),
    ],
)
def test_objectives_that_cannot_be_are_refused(make_como: MakeComo, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_como(**options)


@pytest.mark.parametrize("name", ["flow", "label"])
def test_a_batch_without_what_a_term_needs_is_refused(make_como: MakeComo, name: str) -> None:
    model = make_como(**{f"{name}_weight": 1.0}, label_size=4)
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match=f"model.{name}_weight.*set it to 0"):
        jax.eval_shape(lambda params: model.bind(params).loss(types.fake_frame_pairs(), jax.random.key(0)), params)
