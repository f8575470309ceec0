"""Small datasets with faults, and what the doctor finds in them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
import simplejpeg
import tensorflow_datasets as tfds

from como_jax.doctor.checks import run_checks
from como_jax.doctor.diagnosis import Diagnosis, examine
from como_jax.doctor.findings import Finding
from como_jax.doctor.sources import open_view
from como_jax.doctor.survey import PROBES, Recording, Survey, Thresholds

# The writers of small LeRobot datasets lie with the tests of the builders.
sys.path.append(str(Path(__file__).resolve().parents[1] / "convert"))


def moving_images(seed: int, count: int, size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """A bright square that moves over a fixed, smooth background of its own."""
    rng = np.random.default_rng(seed)
    height, width = size
    background = cv2.resize(rng.integers(0, 200, (6, 8, 3), dtype=np.uint8), (width, height))
    images = []
    for index in range(count):
        image = background.copy()
        left = round(index / max(1, count - 1) * (width - width // 4))
        image[height // 3 : height // 2, left : left + width // 4] = 255
        images.append(image)
    return images


@pytest.fixture
def make_recording() -> Callable[..., Recording]:
    """Makes a healthy recording from a seed; keyword arguments are fields of `Recording`."""

    def make(seed: int, num_steps: int = 40, **changes: Any) -> Recording:
        rng = np.random.default_rng(seed)
        motion = rng.uniform(0.005, 0.02, num_steps).astype(np.float32)
        motion[0] = 0
        images = changes.pop("frames", {"main": moving_images(seed, PROBES)})
        return Recording(
            **{
                "episode_id": f"episode {seed}",
                "control_rate": 10.0,
                "motion": motion,
                "frames": images,
                "resolution": {camera: shots[0].shape[:2] for camera, shots in images.items()},
                "action": rng.normal(size=(num_steps, 3)).astype(np.float32),
                "state": rng.normal(size=(num_steps, 2)).astype(np.float32),
                "instruction": f"do task {seed % 3}",
                "split": "train",
                **changes,
            }
        )

    return make


@pytest.fixture
def check_all() -> Callable[..., dict[str, Finding]]:
    """Findings of all checks on some recordings, by name; no name comes twice."""

    def check(recordings: Sequence[Recording], thresholds: Thresholds | None = None) -> dict[str, Finding]:
        survey = Survey(thresholds or Thresholds())
        for recording in recordings:
            survey.add(recording)
        findings = run_checks(survey)
        by_name = {finding.name: finding for finding in findings}
        assert len(by_name) == len(findings)
        return by_name

    return check


@pytest.fixture
def diagnose() -> Callable[..., Diagnosis]:
    """What the doctor says of a folder."""

    def run(directory: Path, limit: int = 0, control_rate: float | None = None) -> Diagnosis:
        return examine(open_view(directory, control_rate), limit, Thresholds())

    return run


@pytest.fixture
def write_clip() -> Callable[..., Path]:
    """Writes a video of `moving_images`."""

    def write(
        path: Path,
        seed: int = 0,
        num_frames: int = 60,
        rate: int = 10,
        codec: str = "libx264",
        size: tuple[int, int] = (48, 64),
    ) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=Fraction(rate))
            stream.height, stream.width = size
            stream.pix_fmt = "yuv420p"
            for image in moving_images(seed, num_frames, size):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
            container.mux(stream.encode())
        return path

    return write


class FlaggedRlds(tfds.core.ShardBasedBuilder, skip_registration=True):
    """An RLDS dataset with flags, rewards, a second camera that is black, and a choice of descriptions."""

    VERSION = tfds.core.Version("1.0.0")
    name = "flagged"

    def __init__(self, num_episodes: int, faulty: bool, **kwargs: Any):
        self._num_episodes, self._faulty = num_episodes, faulty
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        f = tfds.features
        action_doc = "Robot action, consists of [7x joints, 1x gripper]." if self._faulty else "Velocity [3x m/s]."
        features: dict[str, Any] = {
            "observation": {
                camera: f.Image(shape=(None, None, 3), encoding_format="jpeg", doc="RGB." if self._faulty else camera)
                for camera in ("front", "wrist")
            },
            "action": f.Tensor(shape=(3,), dtype=np.float32, doc=action_doc),
            "language_instruction": f.Text(),
            "is_first": np.bool_,
            "is_last": np.bool_,
            "reward": np.float32,
        }
        metadata = {"has_front": np.bool_, "has_wrist": np.bool_, "has_language": np.bool_}
        return tfds.core.DatasetInfo(
            builder=self,
            description="TODO(example): Markdown description of your dataset." if self._faulty else "Pushing.",
            features=f.FeaturesDict({"steps": f.Dataset(features), "episode_metadata": metadata}),
        )

    def _shard_iterators_per_split(self, dl_manager: Any) -> dict[str, list[Callable]]:
        return {"train": [functools.partial(self._episodes)]}

    def _episodes(self) -> Iterator[tuple[int, dict]]:
        for index in range(self._num_episodes):
            has = {name: not self._faulty for name in ("has_front", "has_wrist", "has_language")}
            yield index, {"steps": self._steps(index), "episode_metadata": has}

    def _steps(self, seed: int) -> list[dict[str, Any]]:
        count, faulty = 8, self._faulty
        front, wrist = moving_images(seed, count), moving_images(1000 + seed, count)
        actions = np.random.default_rng(seed).normal(size=(count, 3)).astype(np.float32)
        if faulty:
            wrist = [np.zeros_like(image) for image in wrist]
            actions[0] = 0
        return [
            {
                "observation": {
                    "front": simplejpeg.encode_jpeg(front[step]),
                    "wrist": simplejpeg.encode_jpeg(wrist[step]),
                },
                "action": actions[step],
                "language_instruction": f"do task {seed}",
                "is_first": step == 0,
                "is_last": step == count - 1 and not faulty,
                "reward": float(step == count - 1 and not faulty),
            }
            for step in range(count)
        ]


@pytest.fixture
def write_rlds(tmp_path: Path) -> Callable[..., Path]:
    """Writes a `FlaggedRlds` and returns its directory."""

    def write(num_episodes: int = 5, faulty: bool = False) -> Path:
        builder = FlaggedRlds(num_episodes, faulty, data_dir=tmp_path / "rlds")
        config = tfds.download.DownloadConfig(try_download_gcs=False)
        builder.download_and_prepare(download_dir=tmp_path / "downloads", download_config=config)
        return Path(builder.data_dir)

    return write
