"""What a policy's sample holds, against a slow computation from the recordings themselves."""

from __future__ import annotations

import dataclasses
import io
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import chex
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from PIL import Image
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.data.chunks import ChunkFiller, PolicyPart, to_policy_batch
from como_jax.data.policy_data import PolicyData, open_policy_data
from como_jax.data.reader import BatchReader
from como_jax.data.sampler import Augmentation
from como_jax.data.sources import EpisodeSource
from como_jax.data.transforms import Crop, decode_jpeg
from como_jax.errors import DatasetError
from tests.export.conftest import change_tables
from tests.policies.smoke_policies import smoke

Batch = dict[str, Any]
WINDOWS = [(1, 1, 1), (1, 1, 4), (3, 1, 2), (2, 3, 12)]


def open_data(*datasets: Path | str, family: str = "diffusion", **changes: Any) -> PolicyData:
    """Data of a smoke recipe; changes by their name in the section `data`."""
    named = {f"data.{name}": value for name, value in {"image_size": 16, **changes}.items()}
    return open_policy_data(smoke(family, *datasets, **named))


def read(data: PolicyData, dataset: int = 0, augmentation: Augmentation | None = None) -> Batch:
    """Every sample of one dataset in order."""
    count = len(data.parts[dataset].steps)
    drawn = augmentation or Augmentation()
    numbers = np.arange(count)
    return data.reader.map(data.filler.draw(numbers * 0 + dataset, numbers, np.random.default_rng(0), drawn))


def scaled(directory: Path, field: str, values: np.ndarray) -> np.ndarray:
    """Smallest to largest value to [-1, 1]."""
    statistics = json.loads((directory / "statistics.json").read_text())[field]
    low, high = (np.array(statistics[name]) for name in ("min", "max"))
    return 2 * (values - low) / (high - low) - 1


def episode_of(source: EpisodeSource, record: int) -> tuple[int, range]:
    """The episode of a record, and all its records."""
    for episode, (start, length) in enumerate(zip(source.start, source.length, strict=True)):
        if start <= record < start + length:
            return episode, range(start, start + length)
    raise AssertionError(record)


def moments(part: PolicyPart, instants: int, stride: int, row: int) -> list[int]:
    """Records of the images of a sample."""
    record = int(part.steps[row])
    _, records = episode_of(part.source, record)
    found = [record]
    for _ in range(instants - 1):
        found.insert(0, max(found[0] - stride, records[0]))
    return found


@pytest.mark.parametrize(("instants", "stride", "chunk"), WINDOWS)
def test_actions_and_states_are_those_of_the_recording(arm: Path, instants: int, stride: int, chunk: int) -> None:
    data = open_data(arm, instants=instants, stride=stride, chunk=chunk)
    batch, part = read(data), data.parts[0]
    source = part.source
    action, state = (scaled(arm, field, getattr(source, field)) for field in ("action", "state"))
    history = (instants - 1) * stride
    assert batch["action"].shape == (len(part.steps), history + chunk, 3)
    for row, record in enumerate(part.steps):
        episode, records = episode_of(source, record)
        assert batch["episode"][row] == episode
        for place, step in enumerate(range(record - history, record + chunk)):
            inside = step in records
            np.testing.assert_array_equal(batch["has_action"][row, place], float(inside))
            expected = action[step] if inside else 0
            np.testing.assert_allclose(batch["action"][row, place], np.broadcast_to(expected, 3), atol=1e-5)
        expected = state[moments(part, instants, stride, row)]
        np.testing.assert_allclose(batch["state"][row], expected, atol=1e-5)
    assert np.all(batch["has_state"] == 1)
    # Something to mask at both ends.
    assert (batch["has_action"][:, history:] == 0).any() == (chunk > 1)
    assert (batch["has_action"][:, :history] == 0).any() == (history > 0)


def test_a_chunk_of_actions_is_the_recorded_one_in_the_units_of_the_robot(arm: Path) -> None:
    for kind in ("none", "mean_std", "quantile", "min_max"):
        data = open_data(arm, chunk=4, instants=2, stride=2, normalization=kind)
        part, batch = data.parts[0], read(data)
        chunk = part.action.inverse(batch["action"])[:, 2:]
        whole = batch["has_action"][:, 2:, 0].all(axis=1)
        assert 0 < whole.sum() < len(whole)
        expected = np.stack([part.source.action[step : step + 4] for step in part.steps[whole]])
        np.testing.assert_allclose(chunk[whole], expected, atol=1e-4)


@pytest.mark.parametrize(("instants", "stride", "chunk"), WINDOWS)
def test_latent_motion_is_masked_where_there_is_none(clips: Path, instants: int, stride: int, chunk: int) -> None:
    window = {"instants": instants, "stride": stride, "chunk": chunk}
    data = open_data(clips, latent_only=True, latent_normalization="min_max", **window)
    batch, [part] = read(data), data.parts
    source, history = part.source, (instants - 1) * stride
    latent = scaled(clips, "latent_motion", source.latent_motion)
    for row, record in enumerate(part.steps):
        _, records = episode_of(source, record)
        for place, step in enumerate(range(record - history, record + chunk)):
            valid = step in records and bool(source.latent_valid[step])
            assert batch["has_latent"][row, place] == valid
            expected = latent[step] if valid else np.zeros(6)
            np.testing.assert_allclose(batch["latent"][row, place], expected, atol=1e-5)
    # Now has always a label.
    assert np.all(batch["has_latent"][:, history] == 1)
    assert not batch["has_action"].any() and "codes" not in batch and "state" not in batch


def test_codes_are_those_of_the_labels(coded_clips: Path) -> None:
    data = open_data(coded_clips, latent_only=True, chunk=3)
    batch, [part] = read(data), data.parts
    assert batch["codes"].dtype == np.int32 and batch["codes"].shape[1:] == (3, 2)
    assert not batch["has_latent"].all()
    for row, record in enumerate(part.steps):
        for place, known in enumerate(batch["has_latent"][row]):
            expected = part.source.latent_codes[record + place] if known else 0
            np.testing.assert_array_equal(batch["codes"][row, place], np.broadcast_to(expected, 2))


def test_labels_of_a_robot_are_used_only_if_asked_for(arm: Path) -> None:
    assert "latent" not in read(open_data(arm))
    data = open_data(arm, robot_latents=True, chunk=4)
    batch, [part] = read(data), data.parts
    assert len(part.steps) == 21 and np.all(batch["has_action"][:, 0] == 1)
    np.testing.assert_array_equal(batch["has_latent"][:, 0], part.source.latent_valid)


def test_images_are_those_of_record_camera_and_instant(arm: Path) -> None:
    data = open_data(arm, cameras=("wrist", "front"), instants=2, stride=3, image_size=24)
    batch, [part] = read(data), data.parts
    assert batch["images"].shape == (21, 2, 2, 24, 24, 3) and np.all(batch["has_camera"] == 1)
    for row in range(len(part.steps)):
        for instant, record in enumerate(moments(part, 2, 3, row)):
            features = tf_example_pb2.Example.FromString(part.source._records[record]).features.feature
            for slot, camera in enumerate(("wrist", "front")):
                [jpeg] = features[f"observation/{camera}"].bytes_list.value
                recorded = np.asarray(Image.open(io.BytesIO(jpeg)))[:, 8:32]
                # Two decoders may round differently.
                np.testing.assert_allclose(batch["images"][row, instant, slot].astype(int), recorded, atol=2)


def test_all_images_of_a_sample_are_changed_alike(arm: Path) -> None:
    data = open_data(arm, cameras=("wrist", "front"), instants=2)
    [part], augmentation = data.parts, Augmentation(3, 0.5)
    batch = read(data, augmentation=augmentation)
    crops, shifts = augmentation.draw(np.random.default_rng(0), 21)
    for row in range(21):
        crop = Crop("crop", *crops[row], *shifts[row])
        for instant, record in enumerate(moments(part, 2, 1, row)):
            [jpegs] = part.source.read_cameras([record], ("wrist", "front"))
            for slot, jpeg in enumerate(jpegs):
                np.testing.assert_array_equal(batch["images"][row, instant, slot], decode_jpeg(jpeg, 16, crop))


def test_a_missing_camera_is_black_and_said_to_be_missing(arm: Path, clips: Path) -> None:
    data = open_data(arm, clips, cameras=("front", "wrist"))
    robot, videos = read(data), read(data, 1)
    assert np.all(robot["has_camera"] == 1) and np.all(videos["has_camera"] == [1, 0])
    assert not videos["images"][:, :, 1].any() and videos["images"][:, :, 0].any(axis=(1, 2, 3, 4)).all()


def test_a_mixture_may_name_the_camera_and_the_fit_of_a_dataset(arm: Path, hand: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mixture.toml"
    mixture.write_text(
        f'[[dataset]]\ndirectory = "{arm}"\n[[dataset]]\ndirectory = "{hand}"\ncamera = "top"\nfit = "stretch"\n'
    )
    data = open_data(mixture, cameras=("front", "wrist"))
    batch = read(data, 1)
    assert np.all(batch["has_camera"] == [1, 0])
    for row, [jpeg] in enumerate(data.parts[1].source.read_cameras(range(21), ["top"])):
        np.testing.assert_array_equal(batch["images"][row, 0, 0], decode_jpeg(jpeg, 16, Crop("stretch")))


def test_smaller_actions_and_states_are_filled_up(arm: Path, hand: Path, clips: Path) -> None:
    data = open_data(arm, hand, clips, chunk=1)
    small, large, videos = (read(data, number) for number in range(3))
    assert (data.filler.action_size, data.filler.state_size, data.filler.latent_size) == (5, 2, 6)
    assert np.all(small["has_action"] == [1, 1, 1, 0, 0]) and np.all(large["has_action"] == 1)
    assert not small["action"][..., 3:].any() and not large["state"][..., 1:].any() and large["state"].any()
    assert [batch["has_state"].mean() for batch in (small, large, videos)] == [1, 1, 0]
    assert not videos["state"].any() and not videos["action"].any() and not large["has_latent"].any()
    assert small["images"].any() and [int(batch["dataset"][0]) for batch in (small, large, videos)] == [0, 1, 2]


def test_without_proprioception_there_is_no_state(arm: Path) -> None:
    batch = read(open_data(arm, proprioception=False))
    assert "state" not in batch and to_policy_batch(batch).observation.has_state is None


def test_instructions_are_those_of_the_episode(arm: Path) -> None:
    data = open_data(arm)
    batch, source = read(data), data.parts[0].source
    for text, episode in zip(batch["text"], batch["episode"], strict=True):
        assert bytes((text[text > 0] - 1).tolist()) == source.instruction[episode].encode()
    assert batch["text"].dtype == np.int32


def test_a_batch_of_several_datasets_fits_the_data_contract(arm: Path, hand: Path, coded_clips: Path) -> None:
    datasets = (arm, hand, coded_clips)
    data = open_data(*datasets, cameras=("front", "wrist", "top"), instants=2)
    chosen, steps = np.array([2, 0, 1, 2]), np.array([3, 9, 20, 14])
    mixed = data.reader.map(data.filler.draw(chosen, steps, np.random.default_rng(0)))
    batch = to_policy_batch(mixed)
    batch.check_shapes()
    assert batch.dataset.tolist() == [2, 0, 1, 2] and batch.codes.shape == (4, 5, 2)
    alone = [read(data, number) for number in range(3)]
    for row, (dataset, step) in enumerate(zip(chosen, steps, strict=True)):
        expected = {name: value[step] for name, value in alone[dataset].items()}
        chex.assert_trees_all_equal({name: value[row] for name, value in mixed.items()}, expected)


def test_the_number_of_threads_and_a_trip_to_another_process_change_nothing(arm: Path, clips: Path) -> None:
    alone, together = (open_data(arm, clips, num_threads=threads) for threads in (1, 3))
    expected, found = read(alone), read(together)
    other = pickle.loads(pickle.dumps(together))
    for batch in (found, read(other)):
        chex.assert_trees_all_equal(batch, expected)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_unreadable_image_is_named(arm: Path, tmp_path: Path, threads: int) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(arm, broken)
    [path] = broken.glob("*-train.array_record-*")
    records = ArrayRecordReader(str(path)).read_all()
    example = tf_example_pb2.Example.FromString(records[17])
    example.features.feature["observation/wrist"].bytes_list.value[0] = b"junk"
    records[17] = example.SerializeToString()
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for record in records:
        writer.write(record)
    writer.close()
    # A table that is written by itself knows no sizes of files.
    change_tables(broken, lambda row: row)
    data = open_data(broken, cameras=("front", "wrist"), num_threads=threads)
    with pytest.raises(DatasetError, match=rf"{broken} \(train\): record 17, camera 'wrist', cannot be decoded"):
        read(data)
    assert read(open_data(broken))["images"].any()


def test_what_is_read_follows_the_parts_alone(arm: Path) -> None:
    """A part without normalizers gives neither actions nor states, whatever its dataset holds."""
    data = open_data(arm)
    bare = dataclasses.replace(data.parts[0], action=None, state=None)
    filler = ChunkFiller([bare], data.filler.chunks, action_size=4, state_size=1)
    batch = read(dataclasses.replace(data, parts=(bare,), filler=filler, reader=BatchReader(filler, 16)))
    assert not batch["has_action"].any() and batch["action"].shape[-1] == 4
    assert not batch["has_state"].any() and batch["state"].shape[-1] == 1
