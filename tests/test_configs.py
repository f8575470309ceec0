"""Every recipe and variant makes a model, and recipes differ from CoMo's where they say."""

import importlib
from pathlib import Path
from typing import Any

import jax
import pytest
from flax import traverse_util
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.models.build import build_model
from como_jax.types import fake_frame_pairs
from configs import ablation
from tests.conftest import REPOSITORY

RECIPES = sorted(path.stem for path in (REPOSITORY / "configs").glob("pretrain_*.py"))


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


@pytest.mark.parametrize("variant", ["", "base", "tiny", "smoke"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_makes_a_model(recipe: str, variant: str) -> None:
    trace(load(recipe, variant))


@pytest.mark.parametrize("row", ["encoder", *ablation.VARIANTS])
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
    assert [recipe for recipe in RECIPES if f"configs/{recipe}.py" not in text] == []
