"""Small sources to convert, and a look into what came out."""

import contextlib
import functools
import json
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import google_crc32c
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader

from como_jax.data.episode_table import read_episode_table

COLOURS = ((200, 30, 40), (30, 180, 60), (20, 40, 220), (120, 60, 30))


@pytest.fixture
def colours() -> tuple[tuple[int, int, int], ...]:
    """The colours of the frames that `make_video` writes, in turn."""
    return COLOURS


@contextlib.contextmanager
def _same_scheduling() -> Iterator[None]:
    """For a root user libsvtav1 makes this a real-time thread, which starves all other processes from then on."""
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    yield
    if policy is not None:
        os.sched_setscheduler(0, policy, os.sched_param(0))


@pytest.fixture
def make_video() -> Callable[..., Path]:
    """Writes a video whose frame `t` has the colour `COLOURS[t % 4]`, with a white top left corner."""

    def make(
        path: Path,
        num_frames: int = 12,
        rate: int = 10,
        codec: str = "libx264",
        size: tuple[int, int] = (48, 64),
        rotation: int = 0,
        movflags: str | None = None,
    ) -> Path:
        if codec not in av.codecs_available:
            pytest.skip(f"this build of PyAV has no encoder {codec}")
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {} if movflags is None else {"movflags": movflags}
        with _same_scheduling(), av.open(str(path), "w", options=options) as container:
            stream = container.add_stream(codec, rate=Fraction(rate))
            stream.height, stream.width = size
            stream.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            if codec == "libx264":
                # An image group a frame lets a damaged file be decoded up to the damage.
                stream.options = {"crf": "4", "g": "1"}
            if rotation:
                stream.set_display_rotation(rotation)
            for index in range(num_frames):
                image = np.full((*size, 3), COLOURS[index % len(COLOURS)], np.uint8)
                image[: size[0] // 4, : size[1] // 4] = 255
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path

    return make


class TinyRlds(tfds.core.ShardBasedBuilder, skip_registration=True):
    """An RLDS dataset with two cameras, two kinds of action, and one file a list of episodes."""

    VERSION = tfds.core.Version("1.0.0")
    name = "tiny"

    def __init__(self, files: dict[str, list[list[dict]]], **kwargs: Any):
        self._files = files
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        f = tfds.features
        step = {
            "observation": {
                "main": f.Image(shape=(None, None, 3), encoding_format="png"),
                "wrist": f.Image(shape=(None, None, 3), encoding_format="jpeg"),
                "depth": f.Tensor(shape=(4, 4, 1), dtype=np.float32),
                "state": f.Tensor(shape=(3,), dtype=np.float32),
                "natural_language_instruction": f.Text(),
            },
            "action": {
                "move": f.Tensor(shape=(2,), dtype=np.float32),
                "grip": f.Tensor(shape=(), dtype=np.float32),
            },
            "is_last": np.bool_,
        }
        features = f.FeaturesDict({"steps": f.Dataset(step)})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {
            split: [functools.partial(self._episodes, shard) for shard in shards]
            for split, shards in self._files.items()
        }

    def _episodes(self, shard: Sequence[list[dict]]) -> Iterator[tuple[int, dict]]:
        for index, steps in enumerate(shard):
            yield index, {"steps": [_with_encoded_images(step) for step in steps]}


def _with_encoded_images(step: dict) -> dict:
    # TFDS needs TensorFlow to encode them by itself.
    observation = step["observation"]
    png = cv2.imencode(".png", observation["main"][..., ::-1])[1].tobytes()
    jpeg = simplejpeg.encode_jpeg(observation["wrist"])
    return {**step, "observation": {**observation, "main": png, "wrist": jpeg}}


def _random_steps(num_steps: int, seed: int, height: int = 40, width: int = 60) -> list[dict]:
    """Random steps of one `TinyRlds` episode."""
    rng = np.random.default_rng(seed)
    return [
        {
            "observation": {
                "main": rng.integers(0, 255, (height, width, 3), dtype=np.uint8),
                "wrist": np.zeros((8, 8, 3), np.uint8),
                "depth": np.zeros((4, 4, 1), np.float32),
                "state": rng.normal(size=3).astype(np.float32),
                "natural_language_instruction": f"do task {seed}",
            },
            "action": {"move": rng.normal(size=2).astype(np.float32), "grip": np.float32(index)},
            # Wrong, as in real data: the bounds of an episode must not depend on it.
            "is_last": index == 0,
        }
        for index in range(num_steps)
    ]


@pytest.fixture
def rlds_steps() -> Callable[..., list[dict]]:
    """Makes the steps of one `TinyRlds` episode from their number and a seed."""
    return _random_steps


@pytest.fixture
def make_rlds(tmp_path: Path) -> Callable[..., Path]:
    """Writes a `TinyRlds` and returns its directory, as TFRecord files if asked."""

    def make(files: dict[str, list[list[list[dict]]]], tfrecord: bool = False) -> Path:
        builder = TinyRlds(files, data_dir=tmp_path / "rlds")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=tmp_path / "downloads", download_config=config)
        directory = Path(builder.data_dir)
        if tfrecord:
            for path in directory.glob("*array_record*"):
                reader = ArrayRecordReader(str(path))
                records = reader.read(list(range(reader.num_records()))) if reader.num_records() else []
                path.with_name(path.name.replace("array_record", "tfrecord")).write_bytes(_tfrecord(records))
                path.unlink()
            info = directory / "dataset_info.json"
            info.write_text(info.read_text().replace('"array_record"', '"tfrecord"'))
        return directory

    return make


@pytest.fixture
def encode_tfrecord() -> Callable[[Sequence[bytes]], bytes]:
    """Makes the content of a TFRecord file."""
    return _tfrecord


def _tfrecord(records: Sequence[bytes]) -> bytes:
    lengths = [struct.pack("<Q", len(record)) for record in records]
    return b"".join(
        length + _masked_crc(length) + record + _masked_crc(record)
        for length, record in zip(lengths, records, strict=True)
    )


def _masked_crc(data: bytes) -> bytes:
    crc = google_crc32c.value(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


@pytest.fixture
def read_json() -> Callable[[Path], Any]:
    """Reads a file of strict JSON."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not strict JSON")

    return lambda path: json.loads(Path(path).read_text(), parse_constant=refuse)


@pytest.fixture
def check_dataset(read_json: Callable) -> Callable[[Path], dict[str, Any]]:
    """Opens a dataset, checks that records, tables and report agree, and returns its tables as row lists."""

    def check(directory: Path) -> dict[str, Any]:
        report = read_json(directory / "conversion_report.json")
        sources = report["sources"]
        parts = ("converted", "partially_converted", "left_out")
        assert sources["found"] == sum(sources[part] for part in parts)
        assert len(report["left_out"]) == sources["left_out"]
        builder = tfds.builder_from_directory(directory)
        tables = {}
        for split in builder.info.splits:
            rows = read_episode_table(directory, split).to_pylist()
            _check_records(builder.as_data_source(split), rows)
            assert report["episodes"][split] == len(rows)
            assert report["steps"][split] == sum(row["num_steps"] for row in rows)
            tables[split] = rows
        ids = [row["episode_id"] for rows in tables.values() for row in rows]
        assert len(ids) == len(set(ids))
        return tables

    return check


def _check_records(records: Sequence[Any], rows: Sequence[dict[str, Any]]) -> None:
    assert len(records) == sum(row["num_steps"] for row in rows)
    position = 0
    for row in rows:
        assert len(row["motion"]) == row["num_steps"]
        assert row["motion"][0] == 0
        for index in range(row["num_steps"]):
            record = records[position]
            position += 1
            assert record["episode_id"].decode() == row["episode_id"]
            assert record["language_instruction"].decode() == row["language_instruction"]
            assert record["step_index"] == index
            assert record["is_first"] == (index == 0)
            assert record["is_last"] == (index == row["num_steps"] - 1)
            np.testing.assert_allclose(record["control_rate"], row["control_rate"], rtol=1e-6)
            if row["action"] is not None:
                np.testing.assert_array_equal(record["action"], np.float32(row["action"][index]))
            if row["state"] is not None:
                np.testing.assert_array_equal(record["observation"]["state"], np.float32(row["state"][index]))
