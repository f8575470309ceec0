"""The vision-language-action model: who reads whom, what trains what, and that generation equals the whole sequence."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from como_jax import types
from como_jax.errors import ConfigError, DatasetError
from como_jax.nn.model_def import ModelDef, Params, merge_params
from como_jax.policies.heads import bin_midpoints, to_bins
from como_jax.policies.vla import LatentVla, attention_mask
from como_jax.spec.policies import ObservationConfig, VlaConfig
from como_jax.spec.towers import DecoderConfig, TextConfig, VitConfig
from como_jax.types import fake_policy_batch
from tests.everyday import mostly_slow

BATCH, CHUNK, ACTIONS, QUERIES, LATENT, CODES, TEXT = 6, 2, 3, 4, 5, 8, 12
DECODER = {"width": 24, "depth": 2, "num_heads": 4, "num_kv_heads": 2, "head_size": 8, "mlp_width": 40}
VARIANTS: dict[str, dict[str, Any]] = {
    "codes": {"codebook_size": CODES, "causal_text": True, "text_weight": 0.01, "num_bins": 16},
    "vectors": {"action_head": "regression"},
    "flow": {"action_head": "flow", "latent_head": "flow", "head_width": 8, "head_depth": 1, "flow_steps": 3},
}
KEYS = jax.random.split(jax.random.key(3), BATCH)


def make_model(variant: str, *, lora_rank: int = 0, text: str = "tokens", **changes: Any) -> ModelDef:
    observation = ObservationConfig(
        vit=VitConfig(image_size=16, patch_size=8, width=16, depth=1, num_heads=2),
        text=TextConfig(text, TEXT, DECODER["width"], depth=1, num_heads=2, frozen=False),
        state_size=2,
    )
    sizes = {"action_size": ACTIONS, "chunk": CHUNK, "latent_queries": QUERIES, "latent_dim": LATENT}
    config = VlaConfig(DecoderConfig(**DECODER, lora_rank=lora_rank), **{**sizes, **VARIANTS[variant], **changes})
    return ModelDef.create(lambda rngs: LatentVla(observation, config, rngs=rngs))


def make_batch(variant: str = "codes") -> types.PolicyBatch:
    """Robot steps first and labelled videos after them; only some instructions fill all of their places."""
    codes = CODES if variant == "codes" else None
    sizes = {"chunk": CHUNK, "action_size": ACTIONS, "text_length": TEXT, "latent_shape": (QUERIES, LATENT)}
    return fake_policy_batch(BATCH, **sizes, codebook_size=codes)


@functools.cache
def init(variant: str) -> Params:
    params = jax.jit(make_model(variant).init)(jax.random.key(0))
    # Small parts such as places and heads that start near zero would hide what they should do.
    return jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(1), x.shape), params)


@functools.cache
def gradient_of(variant: str) -> Callable[..., Any]:
    model = make_model(variant)

    def loss(params: Params, batch: types.PolicyBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
        output = model.bind(params).loss(batch, jax.random.key(0))
        return output.total, output.terms

    return jax.jit(jax.value_and_grad(loss, has_aux=True))


@functools.cache
def method_of(variant: str, method: str) -> Callable[..., jax.Array]:
    model = make_model(variant)
    return jax.jit(lambda params, *arguments: getattr(model.bind(params), method)(*arguments))


def loss_of(variant: str, batch: types.PolicyBatch) -> tuple[float, dict[str, float], Params]:
    (total, terms), gradients = gradient_of(variant)(init(variant), batch)
    return float(total), {name: float(value) for name, value in terms.items()}, gradients


def sample(variant: str, method: str, observation: types.Observation, keys: jax.Array = KEYS) -> np.ndarray:
    return np.asarray(method_of(variant, method)(init(variant), observation, keys))


def trained(gradients: Params) -> set[str]:
    return {name for name, tree in gradients.items() if any(np.any(leaf) for leaf in jax.tree.leaves(tree))}


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "codes"))
def test_every_variant_has_finite_losses_and_samples_of_the_right_shape(variant: str) -> None:
    batch = make_batch(variant)
    total, terms, gradients = loss_of(variant, batch)
    assert np.isfinite(total) and terms["action_share"] == terms["latent_share"] == 0.5
    chex.assert_tree_all_finite(gradients)
    assert ({"action_accuracy", "latent_accuracy", "text_loss"} <= set(terms)) == (variant == "codes")
    actions, latents = (sample(variant, name, batch.observation) for name in ("sample_actions", "predict_latents"))
    assert actions.shape == (BATCH, CHUNK, ACTIONS) and actions.dtype == np.float32
    assert latents.shape == ((BATCH, QUERIES) if variant == "codes" else (BATCH, QUERIES * LATENT))


@pytest.mark.parametrize("variant", mostly_slow(["codes", "vectors"], "codes"))
def test_generation_with_a_cache_equals_the_whole_sequence_at_once(variant: str) -> None:
    """What is generated is fed back as a label; then every head's answer at once must be the same again."""
    batch = make_batch(variant)
    for name in ("latent", "action"):
        generated = generate(variant, name, batch.observation)
        again = at_once(variant, name, batch.observation, generated)
        np.testing.assert_allclose(again, generated, rtol=1e-4, atol=1e-5)
        assert np.unique(generated).size > 2


def generate(variant: str, name: str, observation: types.Observation) -> np.ndarray:
    """The values of an output, token after token."""
    model = make_model(variant)

    def run(params: Params) -> jax.Array:
        policy = model.bind(params)
        return policy._generate(getattr(policy, name), observation, KEYS)

    return np.asarray(jax.jit(run)(init(variant)))


def at_once(variant: str, name: str, observation: types.Observation, values: np.ndarray) -> np.ndarray:
    """The values that the heads give at every token of a sequence that holds `values`."""
    model = make_model(variant)

    def run(params: Params) -> jax.Array:
        policy = model.bind(params)
        output = getattr(policy, name)
        features = policy._decode(policy._read(observation), [output.inputs(jnp.asarray(values))])[1]
        tokens = [output.head.sample(features[:, token], KEYS) for token in range(output.length)]
        return jnp.stack(tokens, axis=1)

    return np.asarray(jax.jit(run)(init(variant)))


def test_samples_of_each_kind_train_their_own_output_and_the_trunk() -> None:
    batch = make_batch()
    robot = dataclasses.replace(batch, has_latent=np.zeros_like(batch.has_latent))
    video = dataclasses.replace(batch, has_action=np.zeros_like(batch.has_action))
    assert trained(loss_of("codes", robot)[2]) == {"observation", "decoder", "action"}
    assert trained(loss_of("codes", video)[2]) == {"observation", "decoder", "latent"}


@pytest.mark.parametrize("variant", mostly_slow(["codes", "vectors"], "codes"))
def test_outputs_do_not_see_each_other(variant: str) -> None:
    batch = make_batch(variant)
    batch = dataclasses.replace(
        batch, has_action=np.ones_like(batch.has_action), has_latent=np.ones_like(batch.has_latent)
    )
    other = {"codes": (batch.codes + 1) % CODES} if variant == "codes" else {"latent": -batch.latent}
    before, after = loss_of(variant, batch)[1], loss_of(variant, dataclasses.replace(batch, **other))[1]
    np.testing.assert_allclose(after["action_loss"], before["action_loss"], rtol=1e-6)
    assert abs(after["latent_loss"] - before["latent_loss"]) > 1e-3


@pytest.mark.parametrize("variant", mostly_slow(["codes", "vectors"], "codes"))
def test_padding_of_the_instruction_changes_nothing(variant: str) -> None:
    observation = make_batch(variant).observation
    observation.text[:, -2:] = 0
    longer = dataclasses.replace(observation, text=np.pad(observation.text, ((0, 0), (0, 3))))
    text = observation.text.copy()
    text[:, 0] = text[:, 0] % 200 + 1
    other = dataclasses.replace(observation, text=text)
    zeros = np.zeros((BATCH, QUERIES), np.int32) if variant == "codes" else np.zeros((BATCH, QUERIES, LATENT))
    latents = [at_once(variant, "latent", seen, zeros) for seen in (observation, longer, other)]
    np.testing.assert_allclose(latents[1], latents[0], rtol=1e-4, atol=1e-5)
    assert np.abs(latents[2] - latents[0]).max() > 1e-3


def test_who_reads_whom() -> None:
    """Two tokens of images, the second missing; two of text; outputs of two tokens and of one."""
    present = jnp.array([[True, False, True, True]])
    full = np.asarray(attention_mask(present, 2, [2, 1], causal_text=False))[0].astype(int)
    causal = np.asarray(attention_mask(present, 2, [2, 1], causal_text=True))[0].astype(int)
    outputs = [[1, 0, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0, 1]]
    prefix = [[1, 0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0]]
    left_to_right = [[1, 0, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0], [1, 0, 1, 0, 0, 0, 0], [1, 0, 1, 1, 0, 0, 0]]
    np.testing.assert_array_equal(full, prefix + outputs)
    np.testing.assert_array_equal(causal, left_to_right + outputs)


@pytest.mark.slow
def test_unknown_targets_may_be_anything() -> None:
    batch = make_batch("vectors")
    unknown = dataclasses.replace(
        batch,
        action=np.where(batch.has_action > 0, batch.action, np.nan),
        latent=np.where(batch.has_latent[..., None] > 0, batch.latent, np.nan),
    )
    expected, found = loss_of("vectors", batch), loss_of("vectors", unknown)
    assert found[0] == expected[0]
    chex.assert_trees_all_close(found[2], expected[2])


def test_bins_are_equal_parts_and_their_midpoints_lie_in_them() -> None:
    values = jnp.array([-3.0, -1.0, -0.51, -0.5, 0.0, 0.49, 0.5, 1.0, 2.0])
    bins = to_bins(values, 4)
    np.testing.assert_array_equal(bins, [0, 0, 0, 1, 2, 2, 3, 3, 3])
    np.testing.assert_allclose(bin_midpoints(jnp.arange(4), 4), [-0.75, -0.25, 0.25, 0.75])
    inside = jnp.linspace(-1, 1, 101)
    assert np.abs(bin_midpoints(to_bins(inside, 256), 256) - inside).max() <= 1 / 256 + 1e-6


@pytest.mark.slow
def test_a_gripper_is_open_or_closed() -> None:
    model = make_model("vectors", gripper_dim=1)
    observation = make_batch("vectors").observation
    actions = jax.jit(lambda params: model.bind(params).sample_actions(observation, KEYS))(init("vectors"))
    assert set(np.unique(actions[..., 1])) <= {-1.0, 1.0} and np.unique(actions[..., 0]).size > 2


def test_temperature_draws_by_key_and_sample_alone() -> None:
    observation = make_batch().observation
    model = make_model("codes", temperature=3.0)
    run = jax.jit(lambda params, observation, keys: model.bind(params).predict_latents(observation, keys))
    first, other = (np.asarray(run(init("codes"), observation, keys)) for keys in (KEYS, jnp.flip(KEYS)))
    assert np.any(first != other) and np.any(first != sample("codes", "predict_latents", observation))
    flipped = jax.tree.map(lambda x: np.flip(x, axis=0).copy(), observation)
    np.testing.assert_array_equal(np.flip(run(init("codes"), flipped, jnp.flip(KEYS)), axis=0), first)


@pytest.mark.slow
def test_low_rank_changes_start_at_nothing_and_alone_are_trained() -> None:
    plain, low_rank = make_model("vectors"), make_model("vectors", lora_rank=2)
    params = jax.jit(low_rank.init)(jax.random.key(0))
    trained, frozen = low_rank.partition(params)
    decoder = {path[-1] for path in flatten(trained["decoder"])}
    assert decoder == {"lora_a", "lora_b"} and "observation" in trained and "action" in trained
    batch = make_batch("vectors")

    def loss(model: ModelDef, params: Params) -> jax.Array:
        return model.bind(params).loss(batch, jax.random.key(0)).total

    without = drop_low_rank(params)
    before = jax.jit(functools.partial(loss, low_rank))(params)
    np.testing.assert_allclose(before, jax.jit(functools.partial(loss, plain))(without), rtol=1e-6)
    step = jax.jit(lambda trained: jax.grad(lambda part: loss(low_rank, merge_params(part, frozen)))(trained))
    trained = jax.tree.map(lambda x, g: x - 0.1 * g, trained, step(trained))
    gradients = step(trained)
    assert all(np.any(leaf) for path, leaf in flatten(gradients["decoder"]).items() if path[-1].startswith("lora"))


def flatten(tree: Params) -> dict[tuple[str, ...], jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(key.key) for key in path): leaf for path, leaf in leaves}


def drop_low_rank(tree: Params) -> Params:
    items = {name: value for name, value in tree.items() if not str(name).startswith("lora_")}
    return {name: drop_low_rank(value) if isinstance(value, dict) else value for name, value in items.items()}


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["codes", "vectors"])
def test_it_learns_a_batch_by_heart(variant: str) -> None:
    batch, params = make_batch(variant), init(variant)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def train(params: Params) -> Params:
        def update(carry: tuple[Params, Any], _: None) -> tuple[tuple[Params, Any], None]:
            params, state = carry
            gradients = jax.grad(lambda p: make_model(variant).bind(p).loss(batch, jax.random.key(0)).total)(params)
            updates, state = optimizer.update(gradients, state)
            return (optax.apply_updates(params, updates), state), None

        return jax.lax.scan(update, (params, optimizer.init(params)), length=300)[0][0]

    params = train(params)
    actions = np.asarray(method_of(variant, "sample_actions")(params, batch.observation, KEYS))
    latents = np.asarray(method_of(variant, "predict_latents")(params, batch.observation, KEYS))
    half = BATCH // 2
    if variant == "codes":
        np.testing.assert_array_equal(to_bins(actions[:half], 16), to_bins(batch.action[:half], 16))
        np.testing.assert_array_equal(latents[half:], batch.codes[half:, 0])
    else:
        assert np.abs(actions[:half] - batch.action[:half]).max() < 0.15
        assert np.abs(latents[half:] - batch.latent[half:, 0]).max() < 0.15


def test_what_makes_no_model_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="nothing to learn"):
        make_model("vectors", action_size=0, latent_dim=0)
    with pytest.raises(ConfigError, match="model.action_head 'words'"):
        make_model("vectors", action_head="words")
    with pytest.raises(ConfigError, match="causal_text"):
        make_model("codes", causal_text=False)
    with pytest.raises(ConfigError, match="text.tower=tokens"):
        make_model("codes", text="bytes")
    with pytest.raises(ConfigError, match="multiple of model.num_kv_heads"):
        DecoderConfig(num_heads=3, num_kv_heads=2)
    with pytest.raises(DatasetError, match="not discrete"):
        make_model("codes").bind(init("codes")).loss(make_batch("vectors"), jax.random.key(0))
    with pytest.raises(ConfigError, match="latent motion alone"):
        params = {name: value for name, value in init("vectors").items() if name != "action"}
        make_model("vectors", action_size=0).bind(params).sample_actions(make_batch().observation, KEYS)
