"""What a config's batches look like, against batches of data."""

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.data.chunks import to_policy_batch
from como_jax.data.motion_data import open_motion_data, to_frame_pairs
from como_jax.data.pipeline import training_batches
from como_jax.data.policy_data import open_policy_data
from como_jax.motion.models import batch_parts
from como_jax.training import sharding
from como_jax.training.batches import DataSizes, abstract_batch, assumed_sizes
from como_jax.training.models import resolve


def recipe(name: str, mixture: Any, **changes: Any) -> ConfigDict:
    """The smoke recipe on a dataset; keys have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    changes = {"data__mixture": mixture, **changes}
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return config


def shapes(tree: Any) -> dict[str, tuple]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): (leaf.shape, leaf.dtype.name) for path, leaf in leaves}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"data__instants": 3, "model__tcl_weight": 0.0},
        {"model__flow_weight": 1.0, "model__label_weight": 1.0, "data__labelled_fraction": 0.5},
    ],
)
def test_clips_are_those_of_the_data(tabletop_dataset: Path, changes: dict[str, Any]) -> None:
    config = recipe("pretrain_como", str(tabletop_dataset), data__gap_seconds=0.3, **changes)
    mesh, data = sharding.make_mesh(), open_motion_data(config, batch_parts(config))
    batch = to_frame_pairs(next(iter(training_batches(config, data.reader))))
    assert shapes(abstract_batch(resolve(config, data.sizes()), mesh)) == shapes(batch)


@pytest.mark.parametrize(
    ("labels", "changes"),
    [("labelled_videos", {}), ("coded_videos", {"data__instants": 2, "data__proprioception": False}), (None, {})],
)
def test_samples_of_policies_are_those_of_the_data(
    robot_dataset: Path, labels: str | None, changes: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    parts = [str(robot_dataset), *([str(request.getfixturevalue(labels))] if labels else [])]
    config = recipe("policy_diffusion", ",".join(parts), **changes)
    mesh, data = sharding.make_mesh(), open_policy_data(config)
    rows = sharding.batch_rows(mesh, config.data.batch_size)
    batch = to_policy_batch(next(iter(training_batches(config, data.reader, rows))))
    config = resolve(config, data.sizes())
    assert shapes(abstract_batch(config, mesh)) == shapes(batch)
    # What the data has decided stays.
    assert "model.action_size" not in assumed_sizes(config, DataSizes(action_size=99, state_size=99))


def test_sizes_that_are_open_are_assumed(mesh_of: Callable[..., Mesh]) -> None:
    sizes = DataSizes(action_size=5, state_size=6, latent_shape=(2, 3))
    config = recipe("policy_diffusion", "")
    config = resolve(config, assumed_sizes(config, sizes))
    batch = abstract_batch(config, mesh_of(2, 2, 2))
    assert batch.action.shape == (8, 4, 5)
    assert batch.observation.state.shape == (8, 1, 6)
    assert batch.latent.shape == (8, 4, 6)
    assert batch.action.sharding.shard_shape(batch.action.shape) == (2, 4, 5)


def test_embedded_instructions_take_the_place_of_text(mesh_of: Callable[..., Mesh]) -> None:
    config = recipe("policy_diffusion", "", text__tower="embedding")
    config = resolve(config, assumed_sizes(config, DataSizes(embedding_size=33)))
    observation = abstract_batch(config, mesh_of(8, 1, 1)).observation
    assert observation.text is None
    assert observation.text_embedding.shape == (8, 33)
