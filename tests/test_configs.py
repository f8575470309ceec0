"""Every recipe and variant makes a model, and recipes differ from CoMo's where they say."""

import importlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.motion.models import build_model
from como_jax.nn.model_def import merge_params
from como_jax.policies.models import build_policy
from como_jax.types import fake_frame_pairs, fake_policy_batch
from configs import ablation
from tests.conftest import REPOSITORY
from tests.everyday import mostly_slow

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("pretrain_*.py"))
POLICY_RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("policy_*.py"))


def load(recipe: str, variant: str = "") -> ConfigDict:
    return importlib.import_module(f"configs.{recipe}").get_config(variant)


def trace(config: ConfigDict) -> None:
    """The loss of a batch, without computing anything."""
    if config.model.get("label_weight"):
        config.model.label_size = 4
    model = build_model(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = fake_frame_pairs(2, 2, config.data.image_size, flow=True, label_size=config.model.get("label_size") or None)
    output = jax.eval_shape(lambda params, batch: model.bind(params).loss(batch, jax.random.key(0)), params, batch)
    assert output.total.shape == ()


@pytest.mark.parametrize("variant", mostly_slow(["", "base", "tiny", "smoke"], "tiny"))
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_model(recipe: str, variant: str) -> None:
    trace(load(recipe, variant))


@pytest.mark.parametrize("row", mostly_slow(["encoder", *ablation.VARIANTS], "encoder"))
def test_every_row_of_the_ablation_makes_a_model(row: str) -> None:
    trace(ablation.get_config(row))


def test_an_unknown_row_is_refused() -> None:
    with pytest.raises(ValueError, match="Unknown row 'cmo'; choose one of encoder, future_features"):
        ablation.get_config("cmo")


# What every ablation of the paper (arXiv 2505.17006) changes of CoMo.
CHANGES: dict[str, dict[str, Any]] = {
    "continuous": {"model.motion_input": "future", "model.tcl_weight": 0.0},
    "continuous_td": {"model.tcl_weight": 0.0},
    "continuous_tcl": {"model.motion_input": "future"},
    "future_features": {"model.motion_input": "future_only", "model.tcl_weight": 0.0},
    "rgb_difference": {"model.motion_input": "rgb_difference", "model.tcl_weight": 0.0},
}


@pytest.mark.parametrize("recipe", CHANGES)
def test_an_ablation_changes_what_it_names_and_nothing_else(recipe: str) -> None:
    como, other = (traverse_util.flatten_dict(load(f"pretrain_{name}").to_dict(), sep=".") for name in ("como", recipe))
    assert {name: value for name, value in other.items() if value != como[name]} == CHANGES[recipe]


def test_the_sizes_of_the_config_are_those_of_the_paper() -> None:
    model = load("pretrain_como").model
    assert (model.num_queries, model.latent_dim, model.idm_depth, model.fdm_depth) == (8, 16, 4, 12)
    assert (model.mse_weight, model.perceptual_weight, model.tcl_weight) == (1.0, 1.0, 0.004)


def test_labels_without_a_size_are_refused() -> None:
    config = load("pretrain_como", "smoke")
    config.model.label_weight = 1.0
    with pytest.raises(ConfigError, match="model.label_weight needs labels"):
        build_model(config)


def test_every_recipe_is_in_the_readme() -> None:
    text = Path(REPOSITORY / "README.md").read_text()
    assert [recipe for recipe in (*RECIPES, *POLICY_RECIPES) if f"configs/{recipe}.py" not in text] == []


def trace_policy(config: ConfigDict, *, latents: bool = True, **sizes: Any) -> None:
    """The loss and the samples of a policy on made-up data, without computing anything."""
    data, shape = config.data, (2, 3) if latents else None
    found = {"action_size": 4, "latent_queries": 2, "latent_dim": 3} if latents else {"action_size": 4}
    config.model.update({**found, **sizes})
    data.state_size = 5
    batch = fake_policy_batch(
        2,
        instants=data.instants,
        stride=data.stride,
        image_size=data.image_size,
        chunk=data.chunk,
        action_size=config.model.action_size,
        state_size=data.state_size,
        text_length=config.text.max_length,
        latent_shape=shape,
        codebook_size=config.model.codebook_size or None,
    )
    batch.check_shapes()
    model = build_policy(config)
    params = jax.eval_shape(model.init, jax.random.key(0))
    output = jax.eval_shape(lambda params, batch: model.bind(params).loss(batch, jax.random.key(0)), params, batch)
    assert output.total.shape == ()
    trained, frozen = model.partition(params)
    assert bool(frozen) == config.encoder.frozen and merge_params(trained, frozen) == params
    expected = {"action_loss", "latent_loss"} if latents else {"action_loss"}
    expected |= {"text_loss"} if config.model.get("text_weight") else set()
    assert {name for name in output.terms if name.endswith("_loss")} == expected
    keys = jax.random.split(jax.random.key(0), 2)
    chunks = jax.eval_shape(
        lambda params, seen: model.bind(params).sample_actions(seen, keys), params, batch.observation
    )
    assert (chunks.shape, chunks.dtype) == ((2, data.chunk, 4), jnp.float32)


@pytest.mark.parametrize(
    ("variant", "latents"),
    mostly_slow(
        [("", True), ("small", True), ("tiny", True), ("smoke", True), ("smoke", False)],
        ("smoke", True),
        ("smoke", False),
    ),
)
@pytest.mark.parametrize("recipe", POLICY_RECIPES)
def test_every_policy_recipe_makes_a_policy_with_and_without_latents(recipe: str, variant: str, latents: bool) -> None:
    trace_policy(load(recipe, variant), latents=latents)


@pytest.mark.parametrize(
    "variant",
    mostly_slow(["latent", "finetune", "paligemma", "paligemma,lora", "finetune,tiny"], "latent", "paligemma,lora"),
)
def test_variants_of_the_vision_language_action_model_make_a_policy(variant: str) -> None:
    trace_policy(load("policy_vla", variant))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        ("policy_diffusion", {"model.diffusion.kind": "flow"}),
        ("policy_diffusion", {"model.diffusion.prediction": "sample"}),
        ("policy_diffusion", {"model.instruction_dropout": 0.1, "model.guidance": 2.0}),
        ("policy_diffusion", {"encoder.tower": "vit", "encoder.frozen": True}),
        ("policy_diffusion", {"data.instants": 2, "data.stride": 3}),
        ("policy_autoregressive", {"model.latent_head": "diffusion", "encoder.tower": "vit", "encoder.frozen": True}),
        ("policy_autoregressive", {"model.codebook_size": 7}),
        ("policy_autoregressive", {"model.codebook_size": 7, "model.generate_latents": True, "model.temperature": 1.0}),
        ("policy_autoregressive", {"model.generate_latents": True}),
        ("policy_autoregressive", {"encoder.tower": "vit", "train.remat": "full", "train.dtype": "bfloat16"}),
        ("policy_vla", {"model.codebook_size": 7, "model.temperature": 1.0, "data.instants": 2, "data.stride": 3}),
        ("policy_vla", {"model.action_head": "flow", "model.latent_head": "flow", "model.color_jitter": 1.0}),
        ("policy_vla", {"text.tower": "tokens", "model.causal_text": True, "model.text_weight": 0.01}),
        ("policy_vla", {"encoder.tower": "vit", "train.remat": "full", "train.dtype": "bfloat16"}),
    ],
)
def test_switches_of_a_policy_make_a_policy(recipe: str, changes: dict[str, Any]) -> None:
    config = load(recipe, "smoke")
    config.data.image_size, config.encoder.pool = 64, 2
    config.update_from_flattened_dict(changes)
    trace_policy(config)


def test_an_unknown_variant_of_a_policy_and_an_unknown_family_are_refused() -> None:
    with pytest.raises(ValueError, match="Unknown variant 'smok'; choose one of small, tiny, smoke"):
        load("policy_diffusion", "smok")
    config = load("policy_diffusion", "smoke")
    config.family = "policy"
    with pytest.raises(ConfigError, match="config.family 'policy' must be one of diffusion_policy, autoregressive_p"):
        build_policy(config)


def test_both_policies_are_trained_on_the_same_data_but_for_their_windows() -> None:
    diffusion, autoregressive = (
        traverse_util.flatten_dict(load(recipe).to_dict(), sep=".")
        for recipe in ("policy_diffusion", "policy_autoregressive")
    )
    differing = {
        name
        for name in diffusion.keys() & autoregressive.keys()
        if not name.startswith("model.") and diffusion[name] != autoregressive[name]
    }
    window = {"data.instants", "data.stride", "data.chunk"}
    assert differing == {"family", "data.robot_latents", *window}
