"""Bottlenecks: values against NumPy, what gradients train, and the upkeep of codebooks."""

from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from como_jax.errors import ConfigError
from como_jax.motion.bottlenecks import Bottlenecked, make_bottleneck, replacement_due
from como_jax.nn.model_def import ModelDef, Params
from como_jax.spec.motion import BottleneckConfig
from como_jax.training import sharding

SIZE, CODES = 3, 6
KEY = jax.random.key(7)
DISCRETE = ("vq", "vq_ema", "nsvq")


def define(kind: str, **changes: Any) -> ModelDef:
    config = BottleneckConfig(kind, **{"codebook_size": CODES, "fsq_levels": (5, 4, 3), **changes})
    return ModelDef.create(lambda rngs: make_bottleneck(config, SIZE, rngs=rngs))


def latents(*shape: int, size: int = SIZE) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(*shape, size)).astype(np.float32)


def nearest(z: np.ndarray, codebook: np.ndarray) -> np.ndarray:
    return np.argmin(((z[..., None, :] - codebook) ** 2).sum(-1), axis=-1)


def run(model: ModelDef, params: Params, z: np.ndarray, key: jax.Array | None = None) -> Bottlenecked:
    return jax.tree.map(np.asarray, jax.jit(lambda params, z: model.bind(params)(z, key))(params, z))


@pytest.mark.parametrize("kind", DISCRETE)
def test_without_a_key_a_latent_is_its_nearest_code(kind: str) -> None:
    model, z = define(kind), latents(4, 2)
    params = model.init(jax.random.key(0))
    codebook = np.asarray(params["codebook"])
    codes = nearest(z, codebook)
    np.testing.assert_array_equal(jax.jit(lambda z: model.bind(params).codes(z))(z), codes)
    passed = run(model, params, z)
    np.testing.assert_allclose(passed.latent, codebook[codes], atol=1e-6)
    np.testing.assert_allclose(passed.statistics["frequency"], np.bincount(codes.ravel(), minlength=CODES) / codes.size)


# Kind, what the latent's own value trains in z and in the codebook, and what the loss beside it trains.
TABLE = [
    ("none", True, False, False, False),
    ("vq", True, False, True, True),
    ("vq_ema", True, False, True, False),
    ("nsvq", True, True, False, False),
    ("fsq", True, False, False, False),
]


@pytest.mark.parametrize(("kind", "latent_to_z", "latent_to_codes", "loss_to_z", "loss_to_codes"), TABLE)
def test_gradients_go_where_they_should(
    kind: str, latent_to_z: bool, latent_to_codes: bool, loss_to_z: bool, loss_to_codes: bool
) -> None:
    model, z = define(kind), latents(8)
    params = model.init(jax.random.key(0))

    @jax.jit
    def gradients(params: Params, z: jax.Array) -> Any:
        def value(name: str) -> Callable[..., jax.Array]:
            return lambda params, z: jnp.sum(jnp.square(getattr(model.bind(params)(z, KEY), name)))

        return [jax.grad(value(name), argnums=(0, 1))(params, z) for name in ("latent", "loss")]

    (latent_codes, latent_z), (loss_codes, loss_z) = jax.tree.map(np.asarray, gradients(params, z))
    assert (bool(np.any(latent_z)), bool(np.any(loss_z))) == (latent_to_z, loss_to_z)
    for found, expected in ((latent_codes, latent_to_codes), (loss_codes, loss_to_codes)):
        assert bool(np.any(found.get("codebook", 0.0))) == expected
        assert not any(np.any(value) for name, value in found.items() if name != "codebook")


def test_the_straight_through_gradient_is_that_of_the_identity() -> None:
    model, z, weights = define("vq"), latents(5), latents(5) + 1.0
    params = model.init(jax.random.key(0))
    found = jax.jit(jax.grad(lambda z: jnp.sum(weights * model.bind(params)(z, KEY).latent)))(z)
    np.testing.assert_allclose(found, weights, rtol=1e-6)


def test_vq_pays_for_the_distance_twice() -> None:
    model, z = define("vq", commitment=0.5), latents(9)
    params = model.init(jax.random.key(0))
    codebook = np.asarray(params["codebook"])
    error = np.mean((z - codebook[nearest(z, codebook)]) ** 2)
    passed = run(model, params, z, KEY)
    np.testing.assert_allclose(passed.loss, 1.5 * error, rtol=1e-5)
    np.testing.assert_allclose(passed.terms["commitment"], error, rtol=1e-5)


def test_nsvq_replaces_the_error_by_noise_of_its_size() -> None:
    model, z = define("nsvq"), latents(9)
    params = model.init(jax.random.key(0))
    codebook = np.asarray(params["codebook"])
    error = np.linalg.norm(z - codebook[nearest(z, codebook)], axis=-1)
    first, second = (run(model, params, z, key).latent - z for key in jax.random.split(KEY))
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), error, rtol=1e-4)
    assert np.abs(first - second).max() > 0.1


def test_nsvq_has_a_finite_gradient_at_a_code() -> None:
    model = define("nsvq")
    params = model.init(jax.random.key(0))
    gradient = jax.jit(jax.grad(lambda z: jnp.sum(model.bind(params)(z, KEY).latent)))(params["codebook"][:2])
    assert np.all(np.isfinite(gradient))


def test_ema_codes_are_moving_averages_of_their_latents() -> None:
    model, decay = define("vq_ema", ema_decay=0.8), 0.8
    params = model.init(jax.random.key(0))

    @jax.jit
    def update(params: Params, z: jax.Array) -> Params:
        module = model.bind(params)
        return {**params, **module.update_codebook(module(z, KEY).statistics, jnp.int32(1), KEY)[0]}

    codebook = np.asarray(params["codebook"], np.float64)
    count, total = np.full(CODES, 1 / CODES), codebook / CODES
    for seed in range(4):
        z = np.random.default_rng(seed).normal(size=(20, SIZE)).astype(np.float32)
        codes = nearest(z, codebook)
        for code in range(CODES):
            mine = z[codes == code]
            count[code] = decay * count[code] + (1 - decay) * len(mine) / 20
            total[code] = decay * total[code] + (1 - decay) * mine.sum(axis=0) / 20
        codebook = total / count[:, None]
        params = update(params, z)
    np.testing.assert_allclose(params["codebook"], codebook, rtol=1e-2, atol=1e-3)


def test_statistics_of_eight_devices_are_those_of_one() -> None:
    mesh = sharding.make_mesh(8, devices=jax.devices())
    z = latents(16, 2)
    for kind in DISCRETE:
        model = define(kind, replace_below=0.1)
        params = model.init(jax.random.key(0))
        alone = run(model, params, z, KEY)
        spread = run(model, params, sharding.shard_batch(z, mesh), KEY)
        chex.assert_trees_all_close(alone.statistics, spread.statistics, rtol=1e-7, atol=1e-6)


def test_codes_are_replaced_often_at_first_and_then_seldom() -> None:
    due = [step for step in range(1, 7001) if bool(replacement_due(np.int32(step)))]
    assert due == [*range(10, 101, 10), *range(200, 1001, 100), *range(1500, 5001, 500)]


@pytest.mark.parametrize("kind", DISCRETE)
def test_rare_codes_become_latents_of_the_batch_and_others_stay(kind: str) -> None:
    model, z = define(kind, replace_below=0.5), latents(40)
    params = model.init(jax.random.key(0))
    params["codebook"] = params["codebook"].at[3:].add(100.0)
    if kind == "vq_ema":
        params["code_sum"] = params["codebook"] * params["code_count"][:, None]

    @jax.jit
    def upkeep(params: Params, step: int) -> Params:
        module = model.bind(params)
        return {**params, **module.update_codebook(module(z, KEY).statistics, step, KEY)[0]}

    waiting, replaced = upkeep(params, 11), upkeep(params, 20)
    usage = np.asarray(waiting["usage"])
    rare = usage < 0.5 * usage.mean()
    assert rare[3:].all() and not rare.all()
    np.testing.assert_array_equal(replaced["codebook"][~rare], waiting["codebook"][~rare])
    distance = np.abs(np.asarray(replaced["codebook"])[rare][:, None] - z).max(-1).min(-1)
    np.testing.assert_allclose(distance, 0.0, atol=1e-5)
    np.testing.assert_array_equal(replaced["usage"], 0.0)


def test_perplexity_and_dead_codes_tell_a_used_codebook_from_a_collapsed_one() -> None:
    model = define("vq")
    params = model.init(jax.random.key(0))

    @jax.jit
    def settle(frequency: jax.Array) -> dict[str, jax.Array]:
        def step(params: Params, _: None) -> tuple[Params, Any]:
            new, metrics = model.bind(params).update_codebook({"frequency": frequency}, jnp.int32(1), KEY)
            return {**params, **new}, metrics

        return jax.tree.map(lambda x: x[-1], jax.lax.scan(step, params, None, length=600)[1])

    even, collapsed = settle(jnp.full(CODES, 1 / CODES)), settle(jnp.eye(CODES)[2])
    assert float(even["perplexity"]) == pytest.approx(CODES) and int(even["dead_codes"]) == 0
    assert float(collapsed["perplexity"]) == pytest.approx(1.0) and int(collapsed["dead_codes"]) == CODES - 1
    assert float(collapsed["perplexity_share"]) == pytest.approx(1 / CODES)


def test_fsq_rounds_to_a_grid_whose_points_are_its_codes() -> None:
    model, levels = define("fsq"), np.array([5, 4, 3])
    z = 3 * latents(4000)
    passed = run(model, {}, z)
    codes = np.asarray(jax.jit(lambda z: nnx.merge(model.graphdef, nnx.State({})).codes(z))(z))
    points = {tuple(point) for point in np.round(passed.latent * (levels // 2)).astype(int)}
    assert len(points) == levels.prod() == len(np.unique(codes)) and codes.min() == 0 and codes.max() == 59
    assert np.abs(passed.latent).max() <= 1.0
    assert len({(*point, code) for point, code in zip(map(tuple, passed.latent), codes, strict=True)}) == 60
    np.testing.assert_allclose(passed.statistics["frequency"].sum(), 1.0, rtol=1e-5)


def test_kl_is_the_divergence_from_the_unit_gaussian() -> None:
    model, z = define("kl", kl_weight=2.0), latents(5, size=2 * SIZE)
    mean, log_variance = np.split(z, 2, axis=-1)
    expected = np.mean(np.sum(0.5 * (mean**2 + np.exp(log_variance) - 1 - log_variance), axis=-1))
    passed = run(model, {}, z, KEY)
    np.testing.assert_allclose(passed.terms["kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(passed.loss, 2 * expected, rtol=1e-5)
    np.testing.assert_array_equal(run(model, {}, z).latent, mean)


def test_kl_draws_with_the_variance_it_was_given() -> None:
    z = np.tile(np.array([1.0, -2.0, 0.0, np.log(4.0), 0.0, -50.0], np.float32), (4000, 1))
    drawn = run(define("kl"), {}, z, KEY).latent
    np.testing.assert_allclose(drawn.mean(axis=0), [1.0, -2.0, 0.0], atol=0.1)
    np.testing.assert_allclose(drawn.std(axis=0), [2.0, 1.0, np.exp(-5.0)], rtol=0.1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "pq"}, "model.bottleneck.kind 'pq' must be one of none, vq, vq_ema, nsvq, fsq, kl"),
        ({"kind": "vq", "codebook_size": 1}, "model.bottleneck.codebook_size 1 must be at least 2"),
        ({"kind": "vq", "replace_below": 1.5}, "model.bottleneck.replace_below 1.5 must lie in"),
        ({"kind": "fsq", "fsq_levels": [8, 1]}, r"model.bottleneck.fsq_levels \(8, 1\) must all be at least 2"),
        (
            {"kind": "fsq", "fsq_levels": [8, 5]},
            r"model.bottleneck.fsq_levels \(8, 5\) must have as many levels as model.latent_dim, 3",
        ),
    ],
)
def test_what_makes_no_bottleneck_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_bottleneck(BottleneckConfig(**changes), SIZE, rngs=nnx.Rngs(0))
