"""Language of RLDS datasets wherever they keep it, and features that look like cameras and are not."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.proto import tf_example_pb2

from como_jax.convert.report import summarize
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.rlds.episodes import EpisodeReader
from como_jax.convert.rlds.language import CHANGES
from como_jax.convert.selection import Selection
from como_jax.data.episode_table import read_episode_table
from como_jax.errors import ConversionError

F = tfds.features
IMAGE = cv2.imencode(".png", np.full((16, 16, 3), 90, np.uint8))[1].tobytes()


class Talking(tfds.core.ShardBasedBuilder, skip_registration=True):
    """Two episodes of three steps, whose features beside image and action are given."""

    VERSION = tfds.core.Version("1.0.0")
    name = "talking"

    def __init__(self, step: dict, episode: dict, values: Callable[[int], tuple[dict, dict]], **kwargs: Any):
        self._step, self._episode, self._values = step, episode, values
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        observation = {"image": F.Image(shape=(16, 16, 3), encoding_format="png")}
        step = {"observation": observation, "action": F.Tensor(shape=(2,), dtype=np.float32)} | self._step
        return tfds.core.DatasetInfo(builder=self, features=F.FeaturesDict({"steps": F.Dataset(step)} | self._episode))

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {"train": [functools.partial(self._episodes)]}

    def _episodes(self) -> Iterator[tuple[int, dict]]:
        for index in range(2):
            step, episode = self._values(index)
            steps = [
                {"observation": {"image": IMAGE}, "action": np.float32([number, 0])}
                | {key: value[number] if isinstance(value, dict) else value for key, value in step.items()}
                for number in range(3)
            ]
            yield index, {"steps": steps} | episode


@pytest.fixture
def convert(tmp_path: Path) -> Callable[..., tuple[dict[str, Any], list[list[str]]]]:
    """Converts a `Talking`; returns the report, and all texts of every episode."""

    def run(step: dict, episode: dict, values: Callable, **settings: Any) -> tuple[dict[str, Any], list[list[str]]]:
        builder = Talking(step, episode, values, data_dir=tmp_path / "rlds")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=tmp_path / "downloads", download_config=config)
        chosen = {"control_rate": 5.0, "validation_fraction": 0.0} | settings
        report = Rlds(tmp_path / "out", RldsSettings(source=str(builder.data_dir), **chosen)).convert()
        rows = read_episode_table(tmp_path / "out", "train").to_pylist()
        return report, [[row["language_instruction"], *row["other_instructions"]] for row in rows]

    return run


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


IN_METADATA = ({}, {"episode_metadata": F.FeaturesDict({"language_instruction": F.Text(), "file_path": F.Text()})})


def in_metadata(index: int) -> tuple[dict, dict]:
    return {}, {"episode_metadata": {"language_instruction": f"pick {index}", "file_path": "/data"}}


@pytest.mark.parametrize("language", [None, "episode_metadata/language_instruction"])
def test_language_of_the_episode_is_found_and_reached_by_its_key(convert, language):
    report, texts = convert(*IN_METADATA, in_metadata, language=language)
    assert texts == [["pick 0"], ["pick 1"]]
    assert messages(report) == ["no state was converted"]


def test_language_that_was_not_taken_is_named_last(convert):
    beside = {"episode_metadata": F.FeaturesDict({"goal": F.Text()})}
    report, texts = convert({}, beside, lambda index: ({}, {"episode_metadata": {"goal": "pick"}}))
    assert texts == [[""], [""]]
    last = summarize(report, "OUT")[-1]
    assert last == "NO EPISODE HAS AN INSTRUCTION, although this looks like labels: episode_metadata/goal"


def test_several_texts_of_a_step_are_kept(convert):
    texts = ["pick the cup", "grab the cup", "pick the cup"]
    feature = F.Tensor(shape=(3,), dtype=np.str_)
    _, found = convert({"language_instruction": feature}, {}, lambda index: ({"language_instruction": texts}, {}))
    assert found == [["pick the cup", "grab the cup"]] * 2


def test_a_sequence_of_texts_is_read():
    # TFDS writes sequences of another length in every step with TensorFlow alone.
    record = tf_example_pb2.Example()
    stored = record.features.feature
    stored["steps/observation/image"].bytes_list.value.extend([IMAGE] * 2)
    stored["steps/texts/ragged_flat_values"].bytes_list.value.extend([b"pick", b"grab", b"pick"])
    stored["steps/texts/ragged_row_lengths_0"].int64_list.value.extend([2, 1])
    image = F.FeaturesDict({"image": F.Image(shape=(16, 16, 3), encoding_format="png")})
    chosen = Selection({"image": "observation/image"}, language="texts")
    reader = EpisodeReader({"observation": image, "texts": F.Sequence(F.Text())}, chosen, 5.0, 64)
    episode, notes = reader.read(record.SerializeToString(), "file", 0)
    assert (episode.language_instruction, episode.other_instructions) == ("pick", ("grab",))
    assert notes == [CHANGES]


@pytest.mark.parametrize(
    ("language", "expected"),
    [
        (None, ["a", "b"]),
        ("language_instruction_2,language_instruction", ["b", "a"]),
        ("language_instruction_2", ["b"]),
    ],
)
def test_numbered_keys_hold_further_texts_and_the_language_chooses(convert, language, expected):
    keys = {"language_instruction": F.Text(), "language_instruction_2": F.Text(), "language_instruction_3": F.Text()}
    values = {"language_instruction": "a", "language_instruction_2": "b", "language_instruction_3": ""}
    assert convert(keys, {}, lambda index: (values, {}), language=language)[1] == [expected] * 2


def test_language_that_changes_within_an_episode_is_said(convert):
    values = {"language_instruction": {0: "", 1: "pick", 2: "place"}}
    report, texts = convert({"language_instruction": F.Text()}, {}, lambda index: (values, {}))
    assert texts == [["pick"], ["pick"]]
    assert CHANGES in messages(report)


def test_stacked_images_are_named_with_their_shape(convert):
    stacked = {"observation": F.FeaturesDict({"image": F.Tensor(shape=(2, 8, 8, 3), dtype=np.uint8)})}
    values = {"observation": {"image": np.zeros((2, 8, 8, 3), np.uint8)}}
    values = {"observation": dict.fromkeys(range(3), values["observation"])}
    with pytest.raises(ConversionError, match=r"none \(observation/image has shape \(2, 8, 8, 3\), and images are"):
        convert(stacked, {}, lambda index: (values, {}))
