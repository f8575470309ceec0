"""The data of a policy's config: what takes part, what is refused, and that streams repeat."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from ml_collections import ConfigDict

from como_jax.convert.report import rare_motion
from como_jax.convert.statistics import dataset_statistics
from como_jax.data.episode_table import EpisodeTable
from como_jax.data.instructions import write_embeddings
from como_jax.data.pipeline import evaluation_batches, training_batches
from como_jax.data.policy_data import PolicyData, make_spec, open_policy_data
from como_jax.data.schema import LabelInfo
from como_jax.data.sources import EpisodeSource
from como_jax.errors import ConfigError, DatasetError
from como_jax.files import write_json
from como_jax.spec.interface import POLICY_FILE, PolicySpec
from como_jax.spec.normalization import AffineNormalizer, UniformNormalizer
from como_jax.training.models import resolve
from tests.data.robots import add_labels, make_robot
from tests.export.conftest import change_tables
from tests.policies.smoke_policies import smoke

Batch = dict[str, Any]


def make_config(*datasets: Path | str, **changes: Any) -> ConfigDict:
    """A smoke recipe; changes by their name in the section `data`."""
    named = {f"data.{name}": value for name, value in {"image_size": 8, **changes}.items()}
    return smoke("diffusion", *datasets, **named)


def open_data(*datasets: Path | str, split: str = "train", **changes: Any) -> PolicyData:
    return open_policy_data(make_config(*datasets, **changes), split)


def names(data: PolicyData) -> list[str]:
    return [part.source.directory.name for part in data.parts]


def stream(config: ConfigDict, rows: slice = slice(None)) -> Iterator[Batch]:
    return iter(training_batches(config, open_policy_data(config).reader, rows))


def take(batches: Iterator[Batch], count: int) -> list[Batch]:
    return list(itertools.islice(batches, count))


@pytest.fixture
def rarely(tmp_path: Path) -> Path:
    """A robot that turns by 0.3 in one of 150 steps."""
    steps = itertools.count()

    def turn(row: dict[str, Any]) -> dict[str, Any]:
        turned = [[x, 0.3 if next(steps) == 70 else 0.0, z] for x, _, z in row["action"]]
        return {**row, "action": turned}

    directory = make_robot(tmp_path / "rarely", lengths=(150, 5))
    change_tables(directory, turn)
    write_json(directory / "statistics.json", dataset_statistics({"train": EpisodeTable(directory, "train")}))
    return directory


def test_a_rare_motion_that_a_scale_takes_away_is_said(rarely: Path) -> None:
    said = open_data(rarely, normalization="quantile").describe()[1:]
    [line] = [line for line in said if "action" in line]
    assert line.startswith("warning: rarely: action dimension 1 goes from 0 to 0.3, but in so few steps")
    assert not any("warning" in line for line in open_data(rarely, normalization="min_max").describe())
    [warning] = rare_motion(json.loads((rarely / "statistics.json").read_text()))
    assert warning.startswith("action: 1 of 3 dimensions move in fewer than 2 % of the steps: 1 (0 to 0.3)")


def test_the_split_to_train_on_is_chosen(arm: Path, hand: Path) -> None:
    data = open_data(f"{arm}:val", hand)
    assert [part.source.split for part in data.parts] == ["val", "train"]
    assert names(open_data(f"{arm}:val", hand, split="val")) == ["hand"]
    scaled = data.parts[0].action(data.parts[0].source.action)
    np.testing.assert_allclose([scaled.min(0), scaled.max(0)], [[-1] * 3, [1] * 3], atol=1e-5)


def test_scales_of_the_first_start_stay(arm: Path, hand: Path) -> None:
    first = open_data(arm, normalization="mean_std").scales()
    config = make_config(arm, hand)
    found = open_policy_data(config, scales=first).scales()
    assert found["arm"] == first["arm"] and found["hand"]["action"] is not None
    with pytest.raises(DatasetError, match="hand: action has 5 numbers, and the run was started with 3"):
        open_policy_data(config, scales={"hand": first["arm"]})


def test_robots_and_videos_learn_what_they_have(arm: Path, hand: Path, clips: Path) -> None:
    data = open_data(arm, hand, clips)
    assert [(part.action is not None, part.latent is not None) for part in data.parts] == [
        (True, False),
        (True, False),
        (False, True),
    ]
    assert names(dataclasses.replace(data, parts=tuple(data.robots))) == ["arm", "hand"]
    assert data.labels == LabelInfo("model", (2, 3), 0) and not data.left_out


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (("*",), ["arm", "clips", "more"]),
        ((), ["arm"]),
        (("cl*",), ["arm", "clips"]),
        (("a*", "more"), ["arm", "more"]),
    ],
)
def test_videos_take_part_by_name_and_robots_always(
    arm: Path, clips: Path, plain_clips: Path, tmp_path: Path, patterns: tuple[str, ...], expected: list[str]
) -> None:
    more = add_labels(plain_clips, tmp_path / "more")
    data = open_data(arm, clips, more, videos=patterns)
    assert names(data) == expected
    left_out = [str(directory) for directory in (clips, more) if directory.name not in expected]
    assert list(data.left_out) == left_out
    assert data.describe()[len(expected) :] == [f"{directory}: left out by data.videos" for directory in left_out]
    assert "50%" in data.describe()[0] or len(expected) != 2


def test_without_videos_there_are_no_labels_either(arm: Path, clips: Path) -> None:
    config = make_config(arm, clips, videos=())
    data = open_policy_data(config)
    assert data.labels is None and "latent" not in take(stream(config), 1)[0]


def test_latent_only_leaves_out_the_actions(arm: Path, clips: Path) -> None:
    config = make_config(arm, clips, latent_only=True)
    data = open_policy_data(config)
    assert names(data) == ["arm", "clips"] and not data.robots
    [batch] = take(stream(config), 1)
    assert batch["action"].shape[-1] == 0 and np.all(batch["has_latent"][:, 0] == 1)
    # What the robot's state is, is no secret.
    assert batch["has_state"].tolist() == (batch["dataset"] == 0).tolist()
    assert not make_spec(data, config).robots
    assert names(open_data(arm, clips, latent_only=True, videos=("clips",))) == ["clips"]


def test_labels_of_robots_may_be_used(arm: Path, hand: Path) -> None:
    data = open_data(arm, hand, robot_latents=True)
    assert [part.latent is not None for part in data.parts] == [True, False] and data.labels is not None


@pytest.mark.parametrize(
    ("datasets", "changes", "message"),
    [
        (["clips"], {}, r"No dataset of the mixture has actions.* data\.latent_only=True"),
        (["clips"], {"videos": (), "latent_only": True}, "data.videos leaves out every dataset"),
        (["arm", "plain_clips"], {}, "/plain_clips has neither actions nor labels of latent motion; label it with"),
        (["hand"], {"latent_only": True}, "/hand has actions, but no labels of latent motion for data.latent_only"),
        (["arm", "clips", "coded_clips"], {}, "/coded_clips and .*/clips hold labels of different models"),
        (["arm", "arm"], {}, "/arm and .*/arm have the same name; rename one"),
        (["arm", "hand"], {"cameras": ("front",)}, "/hand has none of the cameras front; it has top"),
        (["arm"], {"cameras": ("front", "writs")}, "no dataset has a camera 'writs'; .*did you mean wrist?"),
        (["arm"], {"instants": 0}, r"data\.instants must be at least 1"),
        (["arm"], {"fit": "crob"}, r"data\.fit 'crob' must be one of crop, stretch; did you mean crop?"),
        (["arm"], {"normalization": "minmax"}, "normalization 'minmax' must be one of"),
        (["arm"], {"missing_instructions": "guess"}, "missing_instructions 'guess' must be one of refuse, empty"),
    ],
)
def test_what_makes_no_sense_is_refused(
    request: pytest.FixtureRequest, datasets: list[str], changes: dict[str, Any], message: str
) -> None:
    with pytest.raises((DatasetError, ConfigError), match=message):
        open_data(*(request.getfixturevalue(name) for name in datasets), **changes)


def test_an_unknown_camera_of_a_mixture_entry_is_refused(arm: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(f'[[dataset]]\ndirectory = "{arm}"\ncamera = "top"\n')
    with pytest.raises(DatasetError, match="arm has no camera 'top'; it has: "):
        open_data(mixture, cameras=("front",))


def test_videos_without_a_single_label_are_refused_and_held_out_ones_left_out(
    arm: Path, plain_clips: Path, tmp_path: Path
) -> None:
    some, none = (add_labels(plain_clips, tmp_path / name, gap=gap) for name, gap in (("some", 6), ("none", 9)))
    assert EpisodeSource(some, "train").latent_valid.sum() == 4 and not EpisodeSource(some, "val").latent_valid.any()
    with pytest.raises(DatasetError, match=r"none \(train\): no step has a label, since all episodes are too short"):
        open_data(arm, none)
    assert names(open_data(arm, some)) == ["arm", "some"] and names(open_data(arm, some, split="val")) == ["arm"]


def test_held_out_episodes_are_those_of_datasets_that_have_some(arm: Path, clips: Path, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    shutil.copytree(arm, whole)
    (whole / "episodes-val.parquet").unlink()
    data = open_data(arm, whole, clips, split="val")
    assert names(data) == ["arm", "clips"] and {part.source.split for part in data.parts} == {"val"}


def test_embeddings_of_two_sizes_are_refused(arm: Path, hand: Path, tmp_path: Path) -> None:
    rng, copies = np.random.default_rng(0), []
    for dataset, size in ((arm, 4), (hand, 6)):
        copies.append(tmp_path / dataset.name)
        shutil.copytree(dataset, copies[-1])
        words = [word for split in ("train", "val") for word in EpisodeSource(dataset, split).instruction]
        write_embeddings(copies[-1], {word: rng.normal(size=size).astype(np.float32) for word in words})
    config = make_config(*copies)
    config.text.tower = "embedding"
    with pytest.raises(DatasetError, match="hand has embeddings of 6 numbers, .*arm of 4"):
        open_policy_data(config)
    config.data.mixture = str(copies[0])
    data = open_policy_data(config)
    [batch], found = take(stream(config), 1), data.embeddings()
    assert resolve(config, data.sizes()).text.embedding_size == 4
    # "wave" is what a held-out episode asks for.
    assert set(found) == {"push", "pull it", "lift", "wave"}
    for row, episode in zip(batch["text_embedding"], batch["episode"], strict=True):
        np.testing.assert_array_equal(row, found[data.parts[0].source.instruction[episode]])


def test_sizes_follow_from_the_data(arm: Path, hand: Path, coded_clips: Path) -> None:
    config = make_config(arm, hand, coded_clips)
    found = resolve(config, open_policy_data(config).sizes())
    model = found.model
    assert (model.action_size, model.latent_queries, model.latent_dim, model.codebook_size) == (5, 2, 3, 16)
    assert found.data.state_size == 2 and config.model.action_size == 0
    again = resolve(found, open_policy_data(found).sizes())
    assert again.to_dict() == found.to_dict()
    # Held-out episodes have the sizes of the run.
    found.data.mixture = str(arm)
    assert open_policy_data(found, "val").filler.action_size == 5


def test_a_larger_size_may_be_asked_for_and_a_smaller_one_not(arm: Path) -> None:
    config = make_config(arm, state_size=4)
    config.model.action_size = 6
    [batch] = take(stream(config), 1)
    assert batch["action"].shape[-1] == 6 and batch["state"].shape[-1] == 4
    assert (
        not batch["has_action"][..., 3:].any()
        and resolve(config, open_policy_data(config).sizes()).model.action_size == 6
    )
    config.model.action_size = 2
    with pytest.raises(ConfigError, match=r"model\.action_size is 2, but the data's is 3; set it to 0"):
        resolve(config, open_policy_data(config).sizes())


def test_the_spec_says_how_to_act(arm: Path, hand: Path, clips: Path) -> None:
    config = make_config(arm, hand, clips, instants=2, stride=3, chunk=5, fit="stretch")
    data = open_policy_data(config)
    spec = make_spec(data, config)
    assert (spec.cameras, spec.image_size, spec.fit) == (("front",), 8, "stretch")
    assert (spec.instants, spec.stride, spec.chunk, spec.control_rate) == (2, 3, 5, 5.0)
    assert (spec.action_size, spec.state_size, list(spec.robots)) == (5, 2, ["arm", "hand"])
    action = data.parts[1].source.action
    np.testing.assert_array_equal(spec.robots["hand"].action(action), data.parts[1].action(action))
    config = make_config(arm, hand, cameras=("wrist", "top"))
    assert make_spec(open_policy_data(config), config).cameras == ("wrist", "top")
    config.data.proprioception = False
    blind = make_spec(open_policy_data(config), config)
    assert blind.state_size == 0 and blind.robots["arm"].state is None


def test_a_stream_mixes_by_weight(arm: Path, clips: Path) -> None:
    batches = take(stream(make_config(f"{arm}=1", f"{clips}=4", batch_size=50)), 4)
    assert np.mean([batch["dataset"] == 1 for batch in batches]) == pytest.approx(0.8, abs=0.02)


def test_hosts_read_the_stream_of_one(arm: Path, clips: Path) -> None:
    config = make_config(arm, clips, min_crop_fraction=0.7)
    together, half = take(stream(config), 3), config.data.batch_size // 2
    hosts = [take(stream(config, rows), 3) for rows in (slice(half), slice(half, None))]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)]
    chex.assert_trees_all_equal(joined, together)


def test_a_stream_resumes_where_its_checkpoint_was_taken(arm: Path, clips: Path) -> None:
    config = make_config(arm, clips)
    batches = stream(config)
    take(batches, 2)
    state, expected = batches.get_state(), take(batches, 3)
    resumed = stream(config)
    resumed.set_state(state)
    chex.assert_trees_all_equal(take(resumed, 3), expected)


# Processes that read are tried every day on clips, and the trip of a reader to another process in test_chunk_filler.py.
@pytest.mark.parametrize(
    "changes", [{"num_threads": 3}, pytest.param({"num_workers": 2, "num_threads": 2}, marks=pytest.mark.slow)]
)
def test_worker_processes_and_threads_read_the_same_batches(arm: Path, clips: Path, changes: dict[str, int]) -> None:
    expected = take(stream(make_config(arm, clips, batch_size=40, num_threads=1)), 2)
    chex.assert_trees_all_equal(take(stream(make_config(arm, clips, batch_size=40, **changes)), 2), expected)


def test_a_stream_depends_on_its_seed(arm: Path) -> None:
    config = make_config(arm)
    first, second = take(stream(config), 1)[0], take(stream(config), 1)[0]
    config.seed = 1
    chex.assert_trees_all_equal([first], [second])
    assert np.any(first["action"] != take(stream(config), 1)[0]["action"])


def test_evaluation_covers_a_dataset_evenly_whoever_shares_it(arm: Path, clips: Path) -> None:
    data = open_data(arm, clips)

    def batches(rows: slice = slice(None)) -> list[tuple[Batch, int]]:
        return list(evaluation_batches(data.reader, 1, num_samples=10, batch_size=4, rows=rows))

    found = batches()
    assert [count for _, count in found] == [4, 4, 2]
    part = data.parts[1]
    chosen = part.steps[np.linspace(0, len(part.steps) - 1, 10).astype(int)]
    expected = part.latent(part.source.latent_motion[[*chosen, chosen[-1], chosen[-1]]])
    np.testing.assert_array_equal(np.concatenate([batch["latent"][:, 0] for batch, _ in found]), expected)
    assert all(np.all(batch["dataset"] == 1) for batch, _ in found)
    hosts = [[batch for batch, _ in batches(rows)] for rows in (slice(2), slice(2, 4))]
    joined = [{name: np.concatenate([a[name], b[name]]) for name in a} for a, b in zip(*hosts, strict=True)]
    chex.assert_trees_all_equal(joined, [batch for batch, _ in found])


def test_all_steps_are_evaluated_where_they_are_few(arm: Path) -> None:
    data = open_data(arm, split="val")
    counts = [count for _, count in evaluation_batches(data.reader, num_samples=100, batch_size=4)]
    assert counts == [4, 2]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", '{"parameters": "a"}', json.dumps({"parameters": "a", "latent_shape": [1], "codebook_size": 0})],
)
def test_damaged_labels_are_named(arm: Path, clips: Path, tmp_path: Path, text: str) -> None:
    broken = tmp_path / "clips"
    shutil.copytree(clips, broken)
    (broken / "labels.json").write_text(text)
    with pytest.raises(DatasetError, match=f"{broken}/labels.json cannot be read.*label the dataset again"):
        open_data(arm, broken)
    (broken / "labels.json").unlink()
    with pytest.raises(DatasetError, match="labels.json cannot be read"):
        open_data(arm, broken)


def test_a_chunk_may_be_longer_than_all_episodes(tmp_path: Path) -> None:
    alone = make_robot(tmp_path / "alone", lengths=(4, 4), instructions=("a", "b"))
    data = open_data(alone, chunk=6)
    [batch] = take(stream(make_config(alone, chunk=6)), 1)
    assert len(data.parts[0].steps) == 4 and not batch["has_action"][:, 4:].any()


def test_the_scale_of_held_out_episodes_is_that_of_training(arm: Path, hand: Path, tmp_path: Path) -> None:
    train, held_out = (open_data(arm, split=split, normalization="uniform").parts[0] for split in ("train", "val"))
    assert train.action.to_json() == held_out.action.to_json() and train.state.to_json() == held_out.state.to_json()
    scaled = train.action(train.source.action)
    assert scaled.min() == -1 and scaled.max() == 1
    np.testing.assert_allclose(train.action.inverse(scaled), train.source.action, rtol=1e-5, atol=1e-5)
    mixture = tmp_path / "mixture.toml"
    sections = f'[[dataset]]\ndirectory = "{arm}"\nnormalization = "uniform"\n[[dataset]]\ndirectory = "{hand}"\n'
    mixture.write_text(sections)
    config = make_config(mixture)
    data = open_policy_data(config)
    assert [type(part.action) for part in data.parts] == [UniformNormalizer, AffineNormalizer]
    write_json(tmp_path / POLICY_FILE, make_spec(data, config).to_json())
    spec = PolicySpec.load(tmp_path)
    for part in data.parts:
        found = spec.robots[part.source.directory.name].action
        np.testing.assert_array_equal(found(part.source.action), part.action(part.source.action))


def test_samples_that_fill_up_a_batch_have_no_targets(arm: Path, clips: Path) -> None:
    data = open_data(arm, clips, robot_latents=True)

    def last(dataset: int, rows: slice = slice(None)) -> Batch:
        return list(evaluation_batches(data.reader, dataset, num_samples=5, batch_size=4, rows=rows))[-1][0]

    assert last(0)["has_action"].any(axis=(1, 2)).tolist() == [True, False, False, False]
    assert last(1)["has_latent"].any(axis=1).tolist() == [True, False, False, False]
    second = slice(2, 4)
    assert not last(0, second)["has_action"].any() and not last(1, second)["has_latent"].any()
