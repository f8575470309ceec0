"""Training of policies from end to end: what a run leaves, resumes, starts from, learns from and refuses."""

import dataclasses
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import chex
import jax
import numpy as np
import pytest
from flax import traverse_util
from jax.sharding import Mesh
from ml_collections import ConfigDict

from como_jax.data.chunks import to_policy_batch
from como_jax.data.instructions import EMBEDDINGS_NAME, write_embeddings
from como_jax.data.pipeline import training_batches
from como_jax.data.policy_data import open_policy_data
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError, RunError, UsageError
from como_jax.evaluation.rollouts.policy_runner import load_policy
from como_jax.nn.model_def import Params
from como_jax.policies.models import build_policy
from como_jax.spec.interface import History, PolicySpec
from como_jax.training import sharding
from como_jax.training.models import resolve
from como_jax.training.run import Allowed
from como_jax.training.train_state import create_state, evaluation_params
from como_jax.training.train_step import build_training
from como_jax.types import PolicyBatch
from experiments.train_policy import train_policy
from tests.everyday import mostly_slow
from tests.policies.smoke_policies import (
    ACTION_HEADS,
    FAMILIES,
    LATENT_HEADS,
    PolicyRun,
    copy_dataset,
    read_metrics,
    smoke,
    start,
)

EVALUATED = {"train.evaluate_every": 2}


@pytest.fixture(scope="module", params=mostly_slow(FAMILIES, "diffusion"))
def cotrained(
    request: pytest.FixtureRequest,
    policy_run: Callable[..., PolicyRun],
    robot_dataset: Path,
    labelled_videos: Path,
) -> tuple[str, PolicyRun]:
    """Family, and an uninterrupted run on robot data and labelled videos."""
    return request.param, policy_run(request.param, robot_dataset, labelled_videos, **EVALUATED)


def assert_equal(found: Any, expected: Any) -> None:
    chex.assert_trees_all_equal(found, expected)


def test_a_run_leaves_what_is_needed_to_act_and_to_judge_it(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path
) -> None:
    family, run = cotrained
    spec = PolicySpec.load(run.workdir)
    assert set(spec.robots) == {robot_dataset.name} and (spec.action_size, spec.state_size) == (4, 4)
    assert {path.name for path in (run.workdir / "checkpoints").iterdir() if path.is_dir()} == {"2", "4"}
    assert list((run.workdir / "tensorboard").glob("events.out.tfevents.*"))

    metrics = read_metrics(run.workdir)
    assert set(metrics) == {1, 2, 3, 4}
    for step, values in metrics.items():
        assert {"train/loss", "train/grad_norm", "train/action_loss", "train/latent_loss"} <= set(values)
        assert all(np.isfinite(value) for value in values.values())
        judged = {name for name in values if name.startswith("eval_")}
        names = ["action_loss", "action_mse", "mean_action_mse", "latent_loss"]
        # The diffusion policy makes chunks of latents.
        names += ["latent_mse", "mean_latent_mse"] if family == "autoregressive" else []
        expected = {f"eval_{split}/{name}" for split in ("train", "val") for name in names}
        assert judged == (expected if step in (2, 4) else set())


def test_two_steps_and_two_more_equal_four(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path, labelled_videos: Path, tmp_path: Path
) -> None:
    family, whole = cotrained
    # As the run was after two steps: what it wrote later is dropped.
    halves = Path(shutil.copytree(whole.workdir, tmp_path / "run"))
    shutil.rmtree(halves / "checkpoints" / "4")
    state = train_policy(smoke(family, robot_dataset, labelled_videos, **EVALUATED), halves)
    assert read_metrics(halves) == read_metrics(whole.workdir)
    assert state.ema is not None
    assert_equal(state, whole.state)


def test_a_resumed_run_keeps_the_scales_of_its_first_start(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path, labelled_videos: Path, tmp_path: Path
) -> None:
    family, whole = cotrained
    run = Path(shutil.copytree(whole.workdir, tmp_path / "run"))
    # As if the run had begun on another dataset of that name, whose actions had another unit.
    started = json.loads((run / "data.json").read_text())
    started["started"]["datasets"][str(robot_dataset)]["steps of train"] = 7
    scale = started["scales"][robot_dataset.name]["action"]
    scale["scale"] = [100.0 * value for value in scale["scale"]]
    (run / "data.json").write_text(json.dumps(started))
    (run / "policy.json").write_text("{}")
    config = smoke(family, robot_dataset, labelled_videos, **EVALUATED)
    with pytest.raises(RunError, match=rf"{robot_dataset} \(steps of train 7, now \d+\)\. "):
        train_policy(config, run)
    train_policy(config, run, Allowed(other_data=True))
    assert PolicySpec.load(run).robots[robot_dataset.name].action.to_json() == scale
    resumed = json.loads((run / "data.json").read_text())
    assert resumed["scales"] == started["scales"] and [entry["step"] for entry in resumed["resumed"]] == [4]


@pytest.mark.slow
def test_the_robot_only_baseline_starts_from_equal_parameters_and_differs_by_config_alone(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path, labelled_videos: Path, tmp_path: Path
) -> None:
    family, _ = cotrained
    states, configs = [], []
    for name, videos in (("both", ("*",)), ("robot", ())):
        config = smoke(family, robot_dataset, labelled_videos, **{"data.videos": videos})
        states.append(start(config, tmp_path / name))
        written = json.loads((tmp_path / name / "config.json").read_text())
        configs.append(traverse_util.flatten_dict(written, sep="."))
    both, robot = (state.params for state in states)
    assert set(both) - set(robot) == LATENT_HEADS[family] and ACTION_HEADS[family] <= set(robot)
    assert_equal(robot, {name: both[name] for name in robot})
    assert_equal(states[1].frozen, states[0].frozen)
    assert {name for name in configs[0] if configs[0][name] != configs[1][name]} == {
        "data.videos",
        "model.latent_queries",
        "model.latent_dim",
    }


def first_batch(config: ConfigDict) -> tuple[ConfigDict, PolicyBatch]:
    """The config with sizes, and what a run of it is trained on first."""
    data = open_policy_data(config)
    return resolve(config, data.sizes()), to_policy_batch(next(iter(training_batches(config, data.reader))))


def test_videos_never_reach_the_action_head(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path, labelled_videos: Path
) -> None:
    family, run = cotrained
    config, batch = first_batch(smoke(family, robot_dataset, labelled_videos))
    model, params, is_video = build_policy(config), evaluation_params(run.state), batch.dataset == 1
    assert 0 < is_video.sum() < len(is_video)

    @jax.jit
    def gradients(batch: PolicyBatch) -> Params:
        return jax.grad(lambda params: model.bind(params).loss(batch, jax.random.key(1)).total)(params)

    def size(tree: Params, names: set[str]) -> float:
        return max(float(np.abs(leaf).max()) for name in names for leaf in jax.tree.leaves(tree[name]))

    def only(rows: np.ndarray) -> PolicyBatch:
        chosen = np.resize(np.flatnonzero(rows), len(rows))
        return jax.tree.map(lambda x: x[chosen], batch)

    videos, robots = gradients(only(is_video)), gradients(only(~is_video))
    assert size(videos, ACTION_HEADS[family]) == 0 < size(videos, LATENT_HEADS[family])
    assert size(robots, LATENT_HEADS[family]) == 0 < size(robots, ACTION_HEADS[family])
    # Whatever stands where the videos have no action.
    filled = dataclasses.replace(batch, action=np.where(is_video[:, None, None], np.float32(7), batch.action))
    assert_equal(gradients(filled), gradients(batch))


@pytest.mark.slow
def test_a_step_is_the_same_on_one_device_and_on_eight(robot_dataset: Path, labelled_videos: Path) -> None:
    config, batch = first_batch(smoke("diffusion", robot_dataset, labelled_videos))
    model, found = build_policy(config), []
    for count in (1, 8):
        mesh = Mesh(np.array(jax.devices()[:count]).reshape(count, 1, 1), sharding.MESH_AXES)
        training = build_training(config, model, mesh)
        state = create_state(model, training.optimizer, training.abstract, seed=config.seed)
        for _ in range(2):
            state, metrics = training.step(state, sharding.shard_batch(batch, mesh))
            found.append({name: float(value) for name, value in metrics.items()})
    for one, eight in zip(found[:2], found[2:], strict=True):
        assert one.keys() == eight.keys()
        np.testing.assert_allclose(list(eight.values()), list(one.values()), rtol=1e-4)


@pytest.mark.slow
def test_codes_are_learned_as_codes(
    policy_run: Callable[..., PolicyRun], robot_dataset: Path, coded_videos: Path
) -> None:
    run = policy_run("autoregressive", robot_dataset, coded_videos)
    codes = EpisodeSource(coded_videos, "train").latent_codes
    config = json.loads((run.workdir / "config.json").read_text())["model"]
    assert config["codebook_size"] > codes.max() and config["latent_queries"] == codes.shape[1]
    last = read_metrics(run.workdir)[4]
    assert 0 <= last["train/latent_accuracy"] <= 1 and 0 < last["eval_train/latent_loss"] < np.inf
    for name in ("latent_accuracy", "latent_prior_accuracy"):
        assert 0 <= last[f"eval_train/{name}"] <= 1 and 0 <= last[f"eval_val/{name}"] <= 1
    assert "eval_val/latent_mse" not in last


@pytest.mark.slow
def test_labels_first_and_robot_data_after(
    cotrained: tuple[str, PolicyRun],
    policy_run: Callable[..., PolicyRun],
    robot_dataset: Path,
    labelled_videos: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    family, _ = cotrained
    first = policy_run(family, labelled_videos, **{"data.latent_only": True, "train.stop_after": 1})
    assert not ACTION_HEADS[family] & set(first.state.params)
    assert {"train/latent_loss", "train/latent_share"} < set(read_metrics(first.workdir)[1])
    with pytest.raises(RunError, match=r"trained on latent motion alone.* --config.init_from="):
        load_policy(first.workdir, sharding.make_mesh())

    with caplog.at_level(logging.INFO, "como_jax"):
        second = start(smoke(family, robot_dataset, init_from=str(first.workdir)), tmp_path / "second")
    trained = evaluation_params(first.state)
    kept = {name: value for name, value in trained.items() if name not in LATENT_HEADS[family]}
    found = traverse_util.flatten_dict(evaluation_params(second))
    for path, value in traverse_util.flatten_dict(kept).items():
        np.testing.assert_array_equal(found[path], value, err_msg=str(path))
    assert_equal(second.ema, second.params)
    [line] = [record.getMessage() for record in caplog.records if "arrays loaded" in record.getMessage()]
    assert f"{len(traverse_util.flatten_dict(kept))} arrays loaded" in line
    new, dropped = line.split(" new ")[1].split(" dropped ")
    assert all(name in new for name in (*ACTION_HEADS[family], "observation/state_proj"))
    assert all(name in dropped for name in LATENT_HEADS[family])


@pytest.mark.slow
def test_instructions_embedded_beforehand_go_from_the_dataset_to_the_run(robot_dataset: Path, tmp_path: Path) -> None:
    dataset, workdir = copy_dataset(robot_dataset, tmp_path / "embedded"), tmp_path / "run"
    words = {text for split in ("train", "val") for text in EpisodeSource(dataset, split).instruction}
    rng = np.random.default_rng(0)
    embeddings = {text: rng.normal(size=6).astype(np.float32) for text in sorted(words)}
    write_embeddings(dataset, embeddings)
    config = smoke("diffusion", dataset, **{"text.tower": "embedding", "train.stop_after": 1})
    state = train_policy(config, workdir)
    assert state.params["observation"]["text"] and (workdir / EMBEDDINGS_NAME).exists()
    assert json.loads((workdir / "config.json").read_text())["text"]["embedding_size"] == 6

    runner = load_policy(workdir, sharding.make_mesh())
    image, known = np.zeros((64, 64, 3), np.uint8), EpisodeSource(dataset, "train").instruction[0]
    scene = History([{"image": image}], np.zeros((1, 4), np.float32), known)
    assert np.isfinite(runner.sample([scene], [(0,)])).all()
    with pytest.raises(DatasetError, match=f"{EMBEDDINGS_NAME} has no embedding of 'dance'"):
        runner.sample([scene._replace(instruction="dance")], [(0,)])


@pytest.mark.slow
def test_a_robot_dataset_without_held_out_episodes_may_be_the_largest(robot_dataset: Path, tmp_path: Path) -> None:
    large = copy_dataset(robot_dataset, tmp_path / "large", splits=("train",))
    small = copy_dataset(robot_dataset, tmp_path / "small", size=3)
    workdir = tmp_path / "run"
    changes = {"train.num_steps": 2, "train.evaluate_every": 2, "data.normalization": "mean_std"}
    train_policy(smoke("diffusion", large, small, **changes, **{"model.diffusion.clip": 0.0}), workdir)
    last = read_metrics(workdir)[2]
    assert {"eval_train/large/action_mse", "eval_train/small/action_mse", "eval_val/action_mse"} <= set(last)
    means = [last[f"eval_train/{name}/action_mse"] for name in ("large", "small")]
    assert last["eval_train/action_mse"] == pytest.approx(np.mean(means))

    mesh = sharding.make_mesh()
    with pytest.raises(ConfigError, match="several robot datasets; choose one of large, small"):
        load_policy(workdir, mesh)
    with pytest.raises(ConfigError, match="'smal'.* large, small.*did you mean small"):
        load_policy(workdir, mesh, "smal")
    sizes = {name: load_policy(workdir, mesh, name).spec for name in ("large", "small")}
    assert {name: (spec.action_size, spec.state_size) for name, spec in sizes.items()} == {
        "large": (4, 4),
        "small": (3, 3),
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"data.batch_size": 7}, UsageError, "batch size 7 is not divisible by 2 devices"),
        ({"data.cameras": ("wrist",)}, DatasetError, "none of the cameras wrist"),
        ({"data.chunk": 0}, ConfigError, "data.chunk must be at least 1"),
        ({"data.mixture": ""}, DatasetError, "names no dataset"),
        ({"data.normalization": "max"}, ConfigError, "normalization 'max' must be one of"),
        ({"data.state_size": 3}, ConfigError, "data.state_size is 3, but the data's is 4"),
        ({"data.latent_only": True}, DatasetError, "no labels of latent motion for data.latent_only"),
        ({"encoder.tower": "vit", "encoder.init_from": "/nowhere"}, RunError, "/nowhere holds no run"),
        ({"encoder.tower": "mlp"}, ConfigError, "encoder.tower 'mlp' must be one of"),
        ({"encoder.frozen": True}, ConfigError, "encoder.frozen needs another encoder.tower"),
        ({"encoder.init_from": "/nowhere"}, ConfigError, "encoder.init_from needs encoder.tower=vit"),
        ({"init_from": "/nowhere"}, RunError, "/nowhere holds no run"),
        ({"text.max_length": 5}, ConfigError, "raise it to at least"),
        ({"text.tower": "embedding"}, DatasetError, f"has no {EMBEDDINGS_NAME}"),
        ({"train.dtype": "float8"}, ConfigError, "config.train.dtype 'float8'"),
    ],
)
def test_what_does_not_fit_is_refused(
    robot_dataset: Path, tmp_path: Path, changes: dict[str, object], error: type[UsageError], message: str
) -> None:
    with pytest.raises(error, match=message):
        train_policy(smoke("diffusion", robot_dataset, **changes), tmp_path / "run")


def test_data_that_teaches_nothing_to_do_is_refused(robot_dataset: Path, labelled_videos: Path, tmp_path: Path) -> None:
    workdir = tmp_path / "run"
    with pytest.raises(DatasetError, match=r"No dataset of the mixture has actions.* data.latent_only=True"):
        train_policy(smoke("diffusion", labelled_videos), workdir)
    other = copy_dataset(robot_dataset, tmp_path / "more" / robot_dataset.name)
    with pytest.raises(DatasetError, match=f"{robot_dataset} and {other} have the same name"):
        train_policy(smoke("diffusion", robot_dataset, other), workdir)
    assert not workdir.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.env": "tabletop:reech"}, "did you mean reach"),
        ({"evaluation.env": "tabletop:reach", "evaluation.execute": 5}, "`execute` 5 must lie between 0 and 4"),
        ({"evaluation.env": "tabletop:reach", "evaluation.env_settings": ("colour=red",)}, "setting colour"),
    ],
)
def test_an_environment_that_does_not_fit_is_refused_before_training(
    robot_dataset: Path, tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        train_policy(smoke("diffusion", robot_dataset, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_policy_that_cannot_act_in_the_environment_is_refused_before_training(
    robot_dataset: Path, labelled_videos: Path, tmp_path: Path
) -> None:
    small, env = copy_dataset(robot_dataset, tmp_path / "small", size=3), {"evaluation.env": "tabletop:reach"}
    with pytest.raises(ConfigError, match="takes actions of 4 numbers, the policy's have 3"):
        train_policy(smoke("diffusion", small, **env), tmp_path / "run")
    with pytest.raises(ConfigError, match=r"evaluation.env needs a policy with actions"):
        train_policy(smoke("diffusion", labelled_videos, **env, **{"data.latent_only": True}), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_directory_of_another_config_is_refused(
    cotrained: tuple[str, PolicyRun], robot_dataset: Path, labelled_videos: Path
) -> None:
    family, run = cotrained
    changes = {**EVALUATED, "optim.learning_rate": 0.5}
    with pytest.raises(RunError, match=r"config.optim.learning_rate was .* and is 0.5"):
        train_policy(smoke(family, robot_dataset, labelled_videos, **changes), run.workdir)
