"""Several cameras, and images of odd or different sizes."""

import json

import av
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import EpisodeBuilder, StepLayout
from como_jax.convert.lerobot.builder import LeRobot, LeRobotSettings
from como_jax.convert.rlds.builder import Rlds, RldsSettings
from como_jax.convert.settings import Settings
from como_jax.convert.sources import Source
from como_jax.data.schema import Episode, Step
from como_jax.errors import DatasetError
from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.lerobot import write_lerobot
from como_jax.export.labels.rlds import write_rlds

CAMERAS = ("top", "wrist")
# Grey values tell the cameras apart.
BRIGHTNESS = {"top": 60, "wrist": 180}


class TwoCameras(EpisodeBuilder):
    """Grey images of an odd size, whose later episodes the tests may give another."""

    heights = {"a": 33, "b": 33}

    @property
    def layout(self):
        return StepLayout(cameras=CAMERAS)

    def sources(self):
        return [Source(name, "train") for name in self.heights]

    def episodes(self, source):
        jpegs = {
            camera: images.encode_jpeg(np.full((self.heights[source.path], 47, 3), grey, np.uint8))
            for camera, grey in BRIGHTNESS.items()
        }
        yield Episode(source.path, f"{source.path}.mp4", 5.0, [Step(jpegs)] * 4, np.zeros(4, np.float32), "wave")


def label(row):
    return {**row, "latent_motion": [[1.0, 2.0]] * 4, "latent_valid": [True, True, True, False]}


@pytest.fixture
def two_cameras(tmp_path, with_changed_rows):
    TwoCameras(tmp_path / "two", Settings(image_size=64)).convert()
    return with_changed_rows(tmp_path / "two", label)


def grey_values(directory):
    records = tfds.builder_from_directory(directory).as_data_source("train")
    return {camera: [record["observation"][camera].mean() for record in records] for camera in CAMERAS}


def check_cameras(directory):
    for camera, values in grey_values(directory).items():
        np.testing.assert_allclose(values, BRIGHTNESS[camera], atol=3)


def test_lerobot_has_a_video_for_each(two_cameras, tmp_path):
    out = epath.Path(tmp_path / "out")
    write_lerobot(LabelledDataset(two_cameras), out)
    info = json.loads((out / "meta/info.json").read_text())
    for camera in CAMERAS:
        with av.open(str(out / f"videos/observation.images.{camera}/chunk-000/file-000.mp4")) as container:
            assert len(list(container.decode(video=0))) == 8
        assert info["features"][f"observation.images.{camera}"]["shape"] == [33, 47, 3]
    LeRobot(tmp_path / "back", LeRobotSettings(source=str(out), validation_fraction=0.0)).convert()
    check_cameras(tmp_path / "back")


def test_rlds_has_an_observation_for_each(two_cameras, tmp_path):
    out = epath.Path(tmp_path / "out")
    out.mkdir()
    write_rlds(LabelledDataset(two_cameras), out)
    settings = RldsSettings(source=str(out), control_rate=5.0, camera=CAMERAS, validation_fraction=0.0)
    Rlds(tmp_path / "back", settings).convert()
    check_cameras(tmp_path / "back")


def test_lerobot_refuses_images_of_several_sizes(tmp_path, with_changed_rows, monkeypatch):
    monkeypatch.setattr(TwoCameras, "heights", {"a": 33, "b": 40})
    TwoCameras(tmp_path / "two", Settings(image_size=64)).convert()
    source = LabelledDataset(with_changed_rows(tmp_path / "two", label))
    (tmp_path / "rlds").mkdir()
    write_rlds(source, epath.Path(tmp_path / "rlds"))
    assert tfds.builder_from_directory(tmp_path / "rlds").info.splits["train"].num_examples == 2
    with pytest.raises(DatasetError, match=r"'top' has images of several sizes.*33x47 and, in episode b, 40x47"):
        write_lerobot(source, epath.Path(tmp_path / "out"))
