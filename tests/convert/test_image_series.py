"""Folders of numbered images, which are read as videos, and folders that are reached by a link."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds
from etils import epath

from como_jax.convert.folder import list_files
from como_jax.convert.video_folder.builder import UNEVEN_NUMBERS, VideoFolder, VideoFolderSettings, find_series
from como_jax.data.episode_table import read_episode_table
from como_jax.errors import ConversionError


def write_images(folder: Path, numbers: list[int], name: str = "{:05d}.png", size: int = 24) -> None:
    """Writes images whose brightness is ten times their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        cv2.imwrite(str(folder / name.format(number)), np.full((size, size, 3), 10 * number, np.uint8))


def convert(tmp_path: Path, **chosen: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    settings = {"source": str(tmp_path / "clips"), "control_rate": 5.0, "validation_fraction": 0.0} | chosen
    report = VideoFolder(tmp_path / "out", VideoFolderSettings(**settings)).convert()
    return report, read_episode_table(tmp_path / "out", "train").to_pylist()


def brightness(tmp_path: Path) -> list[int]:
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    return [round(record["observation"]["image"].mean() / 10) for record in records]


def test_numbered_images_are_one_clip_in_the_order_of_their_numbers(tmp_path):
    write_images(tmp_path / "clips" / "42326", [8, 9, 10, 11], "frame{}.png")
    (tmp_path / "clips" / "train.csv").write_text("42326;push a cup\n")
    report, (row,) = convert(tmp_path)
    assert (row["episode_id"], row["num_steps"], row["control_rate"]) == ("42326/00000", 4, 5.0)
    assert row["language_instruction"] == "push a cup"
    assert brightness(tmp_path) == [8, 9, 10, 11]
    (warning,) = report["warnings"]
    assert warning["message"] == "1 series of numbered images were read as videos, such as '42326'"


def test_a_damaged_image_costs_itself_and_a_gap_in_the_numbers_ends_a_clip(tmp_path):
    write_images(tmp_path / "clips" / "a", [1, 2, 3, 4, 5, 6, 9, 10, 12])
    (tmp_path / "clips" / "a" / "00003.png").write_bytes(b"\x89PNG")
    report, rows = convert(tmp_path)
    assert [(row["episode_id"], row["num_steps"]) for row in rows] == [("a/00000", 2), ("a/00001", 3), ("a/00002", 2)]
    assert brightness(tmp_path) == [1, 2, 4, 5, 6, 9, 10]
    (entry,) = report["partially_converted"]
    assert entry["reasons"] == [
        "00003.png: an image cannot be decoded",
        "1 image(s) have no neighbour one step before or after, such as 00012.png",
    ]
    assert UNEVEN_NUMBERS in [warning["message"] for warning in report["warnings"]]


def test_stride_and_clip_length_are_those_of_videos(tmp_path):
    write_images(tmp_path / "clips" / "a", list(range(1, 13)))
    _, rows = convert(tmp_path, frame_stride=2, clip_seconds=1.6)
    assert [(row["num_steps"], row["control_rate"]) for row in rows] == [(4, 2.5), (2, 2.5)]
    assert brightness(tmp_path) == [1, 3, 5, 7, 9, 11]


@pytest.mark.parametrize(
    ("rate", "image", "message"),
    [
        (None, np.zeros((8, 8, 3), np.uint8), "set `control_rate`"),
        (5.0, np.zeros((8, 8), np.uint16), "type uint16"),
    ],
)
def test_series_that_cannot_be_used(tmp_path, rate, image, message):
    write_images(tmp_path / "clips" / "a", [])
    for number in range(3):
        cv2.imwrite(str(tmp_path / "clips" / "a" / f"{number}.png"), image)
    with pytest.raises(ConversionError, match=message):
        convert(tmp_path, control_rate=rate)


def test_series_are_told_apart():
    files = ["1.png", "2.png", "a/left_1.jpg", "a/left_2.jpg", "a/right_1.jpg", "a/right_2.jpg", "a/x.png", "b/7.png"]
    files += ["d/1_rgb.png", "d/02_rgb.png", "d/v2_1_rgb.png", "e/v2_1.png", "e/v2_02.png"]
    assert find_series([*files, "c/1.mp4", "c/2.mp4"], "root") == {
        "root": ["1.png", "2.png"],
        "a/left_*.jpg": ["a/left_1.jpg", "a/left_2.jpg"],
        "a/right_*.jpg": ["a/right_1.jpg", "a/right_2.jpg"],
        "d": ["d/1_rgb.png", "d/02_rgb.png"],
        "e": ["e/v2_1.png", "e/v2_02.png"],
    }


def test_links_are_followed_once_and_never_in_circles(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    for folder in (root / "real", outside / "deep"):
        folder.mkdir(parents=True)
        (folder / "file.mp4").touch()
    (root / "a_link").symlink_to(root / "real")
    (root / "disk").symlink_to(outside)
    (root / "same_disk").symlink_to(outside)
    (outside / "deep" / "back").symlink_to(root)
    (outside / "up").symlink_to(tmp_path)
    (root / ".hidden").symlink_to(outside)
    (root / "real" / "self").symlink_to("self")
    listing = list_files(epath.Path(root))
    assert [name for name in listing.files if name.endswith(".mp4")] == ["disk/deep/file.mp4", "real/file.mp4"]
    (warning,) = listing.warnings
    assert warning == "4 links lead to folders that are read already or hold this one, such as 'a_link'"
