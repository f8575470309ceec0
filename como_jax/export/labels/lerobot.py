"""Writes a labelled dataset as LeRobot v3.0: Parquet tables, and videos shared by several episodes.

The format is defined by https://github.com/huggingface/lerobot (src/lerobot/datasets).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from etils import epath

from como_jax.data.parquet import read_parquet
from como_jax.data.schema import LABELS_NAME
from como_jax.errors import DatasetError
from como_jax.export.labels.dataset import INSTRUCTION, LabelledDataset, LabelledEpisode, file_numbers
from como_jax.export.labels.video import VideoWriter
from como_jax.files import write_text

_DATA_PATH = "data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_VIDEO_PATH = "videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4"
_EPISODES_PATH = "meta/episodes/chunk-000/file-000.parquet"
_FILES_PER_CHUNK = 1000
# At the default image size, a video of about this many steps has the 200 MB that LeRobot allows.
_MAX_STEPS_PER_FILE = 16384
# Key and type of the numbers of a step, in the order of the columns, by the name that they have here.
_NUMBERS = {
    "state": ("observation.state", "float32"),
    "action": ("action", "float32"),
    "latent_motion": ("latent_motion", "float32"),
    "latent_valid": ("latent_valid", "bool"),
    "latent_codes": ("latent_codes", "int64"),
}
# Percentiles in stats.json, as shares.
_QUANTILES = (0.01, 0.1, 0.5, 0.9, 0.99)
_BOOKKEEPING = {
    "timestamp": "float32",
    "frame_index": "int64",
    "episode_index": "int64",
    "index": "int64",
    "task_index": "int64",
}


@dataclasses.dataclass(frozen=True)
class _Place:
    """The number of an episode and the place of its steps."""

    episode: int
    file: int
    first_step: int
    first_step_of_file: int

    @property
    def fields(self) -> dict[str, int]:
        """Fields of the path templates."""
        return {"chunk_index": self.file // _FILES_PER_CHUNK, "file_index": self.file % _FILES_PER_CHUNK}


def write_lerobot(
    dataset: LabelledDataset,
    folder: epath.Path,
    on_episode: Callable[[], object] = lambda: None,
    max_steps_per_file: int = _MAX_STEPS_PER_FILE,
) -> None:
    """Writes a LeRobot dataset.

    Args:
      dataset: the dataset to write.
      folder: an empty folder.
      on_episode: is called after every episode.
      max_steps_per_file: maximum length of a file; only a longer episode, in a file of its own, exceeds it.

    Raises:
      DatasetError: the dataset has several control rates, or a camera has images of several sizes.
    """
    _Writer(dataset, folder, max_steps_per_file).write(on_episode)


class _Writer:
    """Writes one dataset in one pass over it."""

    def __init__(self, dataset: LabelledDataset, folder: epath.Path, max_steps_per_file: int):
        self._dataset = dataset
        self._folder = folder
        self._max_steps = max_steps_per_file
        self._rate = _control_rate(dataset)
        self._sizes = _image_sizes(dataset)
        self._features = _features(dataset, self._sizes, self._rate)
        self._schema = _table_schema(self._features)
        instructions = itertools.chain.from_iterable(source.instruction for source in dataset.splits.values())
        self._tasks = {task: index for index, task in enumerate(dict.fromkeys(instructions))}
        self._image_statistics = {camera: _ImageStatistics() for camera in dataset.cameras}

    def write(self, on_episode: Callable[[], object]) -> None:
        """Writes all files."""
        rows = []
        for _, group in itertools.groupby(self._places(), key=lambda item: item[0].file):
            rows += self._write_file(group, on_episode)
        _write_parquet(self._folder / _EPISODES_PATH, pa.Table.from_pylist(rows))
        _write_parquet(self._folder / "meta/tasks.parquet", _task_table(self._tasks))
        _write_json(self._folder / "meta/stats.json", self._statistics())
        _write_json(self._folder / "meta/info.json", self._info())
        labels = self._dataset.directory / LABELS_NAME
        if labels.exists():
            labels.copy(self._folder / "meta" / LABELS_NAME)

    def _places(self) -> Iterator[tuple[_Place, LabelledEpisode]]:
        """Yields all episodes with their places, those of `train` first."""
        lengths = [length for split in self._dataset.splits for length in self._dataset.lengths(split)]
        files = file_numbers(lengths, self._max_steps)
        first_steps = [0, *itertools.accumulate(lengths)]
        first_of_file = {file: step for file, step in reversed(list(zip(files, first_steps, strict=False)))}
        episodes = itertools.chain.from_iterable(map(self._dataset.episodes, self._dataset.splits))
        for index, (episode, file) in enumerate(zip(episodes, files, strict=True)):
            yield _Place(index, file, first_steps[index], first_of_file[file]), episode

    def _write_file(
        self, episodes: Iterator[tuple[_Place, LabelledEpisode]], on_episode: Callable[[], object]
    ) -> list[dict[str, Any]]:
        """Writes the table and the videos of the episodes of one file; returns their rows of the episode table."""
        rows, first = [], next(episodes)
        with contextlib.ExitStack() as stack:
            table = stack.enter_context(self._open_table(first[0]))
            videos = {camera: stack.enter_context(self._open_video(first[0], camera)) for camera in self._sizes}
            for place, episode in itertools.chain([first], episodes):
                # One row group per episode, so that an episode can be read alone.
                table.write_table(self._table(place, episode))
                for camera, video in videos.items():
                    self._add_images(video, camera, episode)
                rows.append(self._episode_row(place, episode))
                on_episode()
        return rows

    def _open_table(self, place: _Place) -> pq.ParquetWriter:
        path = self._folder / _DATA_PATH.format(**place.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        return pq.ParquetWriter(path, self._schema)

    def _open_video(self, place: _Place, camera: str) -> VideoWriter:
        path = self._folder / _VIDEO_PATH.format(video_key=_camera_key(camera), **place.fields)
        path.parent.mkdir(parents=True, exist_ok=True)
        video = VideoWriter(path, self._rate, *self._sizes[camera])
        self._features[_camera_key(camera)]["info"] |= {"video.codec": video.codec, "video.pix_fmt": video.pix_fmt}
        return video

    def _add_images(self, video: VideoWriter, camera: str, episode: LabelledEpisode) -> None:
        for step, jpeg in enumerate(episode.images[camera]):
            try:
                image = simplejpeg.decode_jpeg(jpeg, colorspace="RGB")
            except ValueError as error:
                raise DatasetError(
                    f"episode {episode.episode_id}, step {step}: the image of camera {camera!r} is damaged: {error}"
                ) from error
            if image.shape[:2] != self._sizes[camera]:
                raise DatasetError(
                    f"camera {camera!r} has images of several sizes, which a LeRobot dataset cannot hold: "
                    f"{_size_text(self._sizes[camera])} and, in episode {episode.episode_id}, "
                    f"{_size_text(image.shape[:2])} pixels"
                )
            video.add(image)
            self._image_statistics[camera].add(image)

    def _table(self, place: _Place, episode: LabelledEpisode) -> pa.Table:
        """The rows of an episode."""
        columns = {_NUMBERS[field][0]: getattr(episode, field) for field in _NUMBERS}
        columns |= self._bookkeeping(place, episode)
        # The first text is the task.
        columns |= {key: np.full(len(episode), text, object) for key, text in episode.instructions.items()}
        arrays = [_column(columns[name], self._schema.field(name).type) for name in self._schema.names]
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def _bookkeeping(self, place: _Place, episode: LabelledEpisode) -> dict[str, np.ndarray]:
        frames = np.arange(len(episode))
        return {
            "timestamp": frames / self._rate,
            "frame_index": frames,
            "episode_index": np.full(len(episode), place.episode),
            "index": place.first_step + frames,
            "task_index": np.full(len(episode), self._tasks[episode.instructions[INSTRUCTION]]),
        }

    def _episode_row(self, place: _Place, episode: LabelledEpisode) -> dict[str, Any]:
        row: dict[str, Any] = {
            "episode_index": place.episode,
            "tasks": [episode.instructions[INSTRUCTION]],
            "length": len(episode),
            "dataset_from_index": place.first_step,
            "dataset_to_index": place.first_step + len(episode),
            **{f"data/{name}": number for name, number in place.fields.items()},
            "meta/episodes/chunk_index": 0,
            "meta/episodes/file_index": 0,
            # LeRobot has no columns for these two and ignores them.
            "source_episode_id": episode.episode_id,
            "source_file": episode.source_file,
        }
        begin = place.first_step - place.first_step_of_file
        times = {"from_timestamp": begin / self._rate, "to_timestamp": (begin + len(episode)) / self._rate}
        for camera in self._sizes:
            row |= {f"videos/{_camera_key(camera)}/{name}": value for name, value in (place.fields | times).items()}
        return row

    def _statistics(self) -> dict[str, Any]:
        """Statistics of every feature; those of labels are taken over the steps with valid labels."""
        valid = self._dataset.steps("latent_valid")
        statistics: dict[str, Any] = {
            _camera_key(camera): images.summary() for camera, images in self._image_statistics.items()
        }
        for field, (key, _) in _NUMBERS.items():
            if key not in self._features:
                continue
            values = self._dataset.steps(field)
            values = values[valid] if field in ("latent_motion", "latent_codes") else values
            if len(values):
                statistics[key] = _number_statistics(values.reshape(len(values), -1))
        table = pa.concat_tables(
            read_parquet(path, _BOOKKEEPING) for path in (self._folder / "data").glob("*/*.parquet")
        )
        return statistics | {key: _number_statistics(table[key].to_numpy()[:, None]) for key in _BOOKKEEPING}

    def _info(self) -> dict[str, Any]:
        sources = self._dataset.splits
        bounds = [0, *itertools.accumulate(len(source.length) for source in sources.values())]
        return {
            "codebase_version": "v3.0",
            "robot_type": None,
            "total_episodes": bounds[-1],
            "total_frames": self._dataset.num_steps,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": 100,
            "video_files_size_in_mb": 200,
            "fps": _plain(self._rate),
            "splits": {split: f"{a}:{b}" for split, (a, b) in zip(sources, itertools.pairwise(bounds), strict=True)},
            "data_path": _DATA_PATH,
            "video_path": _VIDEO_PATH,
            "features": self._features,
        }


def _control_rate(dataset: LabelledDataset) -> float:
    """The control rate of all episodes in Hz; raises DatasetError if it differs between them."""
    rates = np.unique(dataset.steps("control_rate"))
    if len(rates) > 1:
        listed = ", ".join(f"{rate:g}" for rate in rates)
        raise DatasetError(
            f"{dataset.directory} has several control rates ({listed} Hz), and a LeRobot dataset has one; "
            "write it as rlds, or label the recordings of each rate as a dataset of their own"
        )
    return float(rates[0])


def _write_parquet(path: epath.Path, table: pa.Table) -> None:
    """Writes a table and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def _features(dataset: LabelledDataset, sizes: Mapping[str, tuple[int, int]], rate: float) -> dict[str, Any]:
    """The section `features` of info.json, without the codecs."""
    features: dict[str, Any] = {}
    for camera, (height, width) in sizes.items():
        features[_camera_key(camera)] = {
            "dtype": "video",
            "shape": [height, width, 3],
            "names": ["height", "width", "channels"],
            "info": {
                "video.height": height,
                "video.width": width,
                "video.is_depth_map": False,
                "video.fps": _plain(rate),
                "video.channels": 3,
                "has_audio": False,
            },
        }
    numbers = dataset.sizes | {"latent_valid": 1}
    for field, (key, dtype) in _NUMBERS.items():
        if field in numbers:
            features[key] = {"dtype": dtype, "shape": [numbers[field]], "names": None}
    for key, dtype in (_BOOKKEEPING | dict.fromkeys(dataset.instruction_keys[1:], "string")).items():
        features[key] = {"dtype": dtype, "shape": [1], "names": None}
    return features


def _table_schema(features: Mapping[str, Any]) -> pa.Schema:
    """The columns of the step tables: as in LeRobot, a feature of one number is a plain number, not a list."""
    fields = []
    for key, feature in features.items():
        if feature["dtype"] == "video":
            continue
        kind = pa.bool_() if feature["dtype"] == "bool" else pa.type_for_alias(feature["dtype"])
        (size,) = feature["shape"]
        fields.append(pa.field(key, kind if size == 1 else pa.list_(kind, size)))
    return pa.schema(fields)


def _column(values: np.ndarray, kind: pa.DataType) -> pa.Array:
    """Values `[T]` or `[T, size]` as a column."""
    if not pa.types.is_fixed_size_list(kind):
        return pa.array(values.reshape(-1)).cast(kind)
    return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)).cast(kind.value_type), kind.list_size)


def _task_table(tasks: Mapping[str, int]) -> pa.Table:
    """The table of instructions, with the metadata by which Pandas, and so LeRobot, takes them as the index."""
    table = pa.table({"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())})
    columns = [
        {"name": name, "field_name": name, "pandas_type": kind, "numpy_type": dtype, "metadata": None}
        for name, kind, dtype in (("task_index", "int64", "int64"), ("task", "unicode", "object"))
    ]
    description = {"index_columns": ["task"], "column_indexes": [], "columns": columns, "pandas_version": "2.0.0"}
    return table.replace_schema_metadata({"pandas": json.dumps(description)})


def _image_sizes(dataset: LabelledDataset) -> dict[str, tuple[int, int]]:
    """Height and width of the first image of every camera."""
    episode = next(dataset.episodes(next(iter(dataset.splits))))
    return {camera: simplejpeg.decode_jpeg_header(jpegs[0])[:2] for camera, jpegs in episode.images.items()}


def _size_text(size: tuple[int, ...]) -> str:
    return f"{size[0]}x{size[1]}"


def _camera_key(camera: str) -> str:
    return f"observation.images.{camera}"


def _plain(rate: float) -> int | float:
    return int(rate) if rate.is_integer() else rate


def _write_json(path: epath.Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(content, indent=4, ensure_ascii=False, allow_nan=False) + "\n")


def _number_statistics(values: np.ndarray) -> dict[str, list[float]]:
    """Statistics of numbers `[N, size]` over N, which is at least 1."""
    values = values.astype(np.float64)
    quantiles = np.quantile(values, _QUANTILES, axis=0)
    return {
        "min": values.min(axis=0).tolist(),
        "max": values.max(axis=0).tolist(),
        "mean": values.mean(axis=0).tolist(),
        "std": values.std(axis=0).tolist(),
        "count": [len(values)],
        **{f"q{round(100 * share):02d}": row.tolist() for share, row in zip(_QUANTILES, quantiles, strict=True)},
    }


class _ImageStatistics:
    """Statistics of each colour channel over many images, with values from 0 to 1."""

    def __init__(self) -> None:
        self._histogram = np.zeros((3, 256), np.int64)
        self._num_images = 0

    def add(self, image: np.ndarray) -> None:
        """Adds an image, uint8 `[H, W, 3]`."""
        for channel in range(3):
            self._histogram[channel] += np.bincount(image[..., channel].ravel(), minlength=256)
        self._num_images += 1

    def summary(self) -> dict[str, list[Any]]:
        """Returns every statistic as `[3, 1, 1]`, and the number of images, which must be at least 1, as `[1]`."""
        levels = np.arange(256) / 255
        share = self._histogram / self._histogram.sum(axis=1, keepdims=True)
        mean = share @ levels
        std = np.sqrt(share @ levels**2 - mean**2)
        present = [np.flatnonzero(row) for row in self._histogram]
        statistics = {
            "min": [levels[row[0]] for row in present],
            "max": [levels[row[-1]] for row in present],
            "mean": mean,
            "std": np.nan_to_num(std),
        }
        # LeRobot keeps images with the channels first.
        shaped = {name: np.reshape(value, (3, 1, 1)).tolist() for name, value in statistics.items()}
        return {**shaped, "count": [self._num_images]}
