"""The vision-language-action model from labels to actions, by the commands that users run."""

import json
import logging
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.data.chunks import to_policy_batch
from como_jax.data.instructions import InstructionReader
from como_jax.data.pipeline import training_batches
from como_jax.data.policy_data import open_policy_data
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts.policy_runner import load_policy
from como_jax.policies.models import build_policy
from como_jax.spec.interface import History
from como_jax.training import sharding
from como_jax.training.models import resolve
from como_jax.training.train_state import TrainState, create_state, evaluation_params
from como_jax.training.train_step import build_training
from configs import policy_vla
from experiments.train_policy import train_policy
from tests.policies.smoke_policies import read_metrics, start


def recipe(stage: str, dataset: Path, **changes: object) -> ConfigDict:
    config = policy_vla.get_config(f"{stage},smoke")
    changes = {"data.mixture": str(dataset), "data.batch_size": 8, "train.stop_after": 1, **changes}
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope="module")
def latent_run(coded_videos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainState]:
    """Stage 2: its directory and last state."""
    workdir = tmp_path_factory.mktemp("vla") / "latent"
    return workdir, train_policy(recipe("latent", coded_videos, **{"train.stop_after": 0}), workdir)


@pytest.mark.slow
def test_latent_pretraining_reports_how_well_codes_are_predicted(latent_run: tuple[Path, TrainState]) -> None:
    workdir, state = latent_run
    last = read_metrics(workdir)[4]
    assert 0 <= last["train/latent_accuracy"] <= 1
    for name in ("latent_accuracy", "latent_prior_accuracy"):
        assert 0 <= last[f"eval_train/{name}"] <= 1
    assert "action" not in state.params


@pytest.mark.slow
def test_finetuning_keeps_the_trunk_and_says_what_is_new(
    latent_run: tuple[Path, TrainState], robot_dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    workdir, first = latent_run
    with caplog.at_level(logging.INFO, "como_jax"):
        second = start(recipe("finetune", robot_dataset, init_from=str(workdir)), tmp_path / "second")
    found = traverse_util.flatten_dict(second.params)
    kept = {path: x for path, x in traverse_util.flatten_dict(evaluation_params(first)).items() if path[0] != "latent"}
    for path, value in kept.items():
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))
    [line] = [record.getMessage() for record in caplog.records if "arrays loaded" in record.getMessage()]
    assert f"{len(kept)} arrays loaded" in line
    new, dropped = line.split(" new ")[1].split(" dropped ")
    assert "action" in new and "observation/state_proj" in new and "latent" in dropped


@pytest.mark.slow
def test_a_finetuned_model_acts_within_the_range_of_its_demonstrations(robot_dataset: Path, tmp_path: Path) -> None:
    train_policy(recipe("finetune", robot_dataset), tmp_path)
    runner = load_policy(tmp_path, sharding.make_mesh())
    image = np.zeros((64, 64, 3), np.uint8)
    states = np.zeros((1, runner.spec.state_size), np.float32)
    scenes = [History([{camera: image for camera in runner.spec.cameras}], states, text) for text in ("push", "reach")]
    chunks = runner.sample(scenes, [[0], [1]])
    actions = EpisodeSource(robot_dataset, "train").action
    assert chunks.shape == (2, runner.spec.chunk, actions.shape[1])
    assert np.all(chunks >= actions.min(axis=0) - 1e-5) and np.all(chunks <= actions.max(axis=0) + 1e-5)


@pytest.mark.slow
def test_latent_pretraining_is_the_same_on_one_device_and_on_eight(coded_videos: Path) -> None:
    config = recipe("latent", coded_videos)
    data = open_policy_data(config)
    config = resolve(config, data.sizes())
    batch = to_policy_batch(next(iter(training_batches(config, data.reader))))
    model, found = build_policy(config), []
    for shape in ((1, 1, 1), (8, 1, 1), (2, 2, 2)):
        mesh = Mesh(np.array(jax.devices()[: np.prod(shape)]).reshape(shape), sharding.MESH_AXES)
        training = build_training(config, model, mesh)
        state = create_state(model, training.optimizer, training.abstract, seed=config.seed)
        if shape == (2, 2, 2):
            assert "tensor" in str(state.params["decoder"]["blocks"]["layers"]["mlp"]["gate"]["kernel"].sharding.spec)
        for _ in range(2):
            state, metrics = training.step(state, sharding.shard_batch(batch, mesh))
            found.append({name: float(value) for name, value in metrics.items()})
    for one, several in ((0, 2), (1, 3), (0, 4), (1, 5)):
        assert found[one].keys() == found[several].keys()
        np.testing.assert_allclose(list(found[several].values()), list(found[one].values()), rtol=1e-4, atol=1e-6)


def test_an_instruction_over_the_limit_is_refused_with_its_length() -> None:
    text = policy_vla.get_config("").text
    with pytest.raises(ConfigError, match=r"has 137 bytes, more than the 128 of text.max_length"):
        InstructionReader.make(text, "")(["x" * 100])


def test_variants_combine_in_any_order() -> None:
    one, other = (policy_vla.get_config(name) for name in ("tiny,finetune", "finetune,tiny"))
    assert json.loads(one.to_json()) == json.loads(other.to_json()) and one.data.videos == () and one.model.width == 96
