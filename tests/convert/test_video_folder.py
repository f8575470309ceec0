"""Folders of videos: decoding, rates, clips, language, and damaged files."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow_datasets as tfds

from como_jax.convert.folder import SPLIT_FOLDERS
from como_jax.convert.video import VIDEO_ERRORS, VideoReader
from como_jax.convert.video_folder.builder import GUESSED_RATE, VideoFolder, VideoFolderSettings, split_clips
from como_jax.errors import ConversionError


def convert(source: Path, out: Path, **settings: Any) -> dict[str, Any]:
    return VideoFolder(out, VideoFolderSettings(source=str(source), **settings)).convert()


def frames(path: Path) -> list[np.ndarray]:
    with VideoReader(path) as reader:
        return list(reader.frames())


def damage(path: Path, start: float, stop: float) -> None:
    """Overwrites a share of a file with zeros."""
    content = bytearray(path.read_bytes())
    first, last = (round(share * len(content)) for share in (start, stop))
    content[first:last] = bytes(last - first)
    path.write_bytes(content)


def truncate(path: Path, share: float) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: round(share * len(content))])


@pytest.mark.parametrize(
    ("codec", "suffix", "tolerance"),
    [("libx264", "mp4", 8), ("gif", "gif", 60), ("libsvtav1", "mp4", 8), ("libsvtav1", "webm", 8)],
)
def test_frames_come_in_order_with_the_right_colours(tmp_path, make_video, colours, codec, suffix, tolerance):
    path = make_video(tmp_path / f"clip.{suffix}", codec=codec)
    with VideoReader(path) as reader:
        assert reader.frame_rate == 10
        decoded = list(reader.frames())
    assert len(decoded) == 12
    for index, image in enumerate(decoded):
        assert image.shape == (48, 64, 3)
        error = np.abs(image[36, 48].astype(int) - colours[index % len(colours)])
        assert error.max() <= tolerance, (index, image[36, 48])


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        (
            ["train/a", "train/x/b", "test/c", "validation/d", "e"],
            {"train/a", "train/x/b", "e"},
            {"test/c", "validation/d"},
        ),
        (["set/Training_01/a", "set/dev/b"], {"set/Training_01/a"}, {"set/dev/b"}),
        (["train/test/a", "eval-2/b"], {"train/test/a"}, {"eval-2/b"}),
        # Words of tasks, and one kind alone, are no splits.
        (["train_station/a", "test_tube/b"], None, None),
        (["test/a", "clips/b"], None, None),
        (["train/a", "clips/b"], None, None),
        (["train.mp4/a", "test.mp4/b"], None, None),
    ],
)
def test_folders_called_as_splits_are_splits(tmp_path, files, train, val):
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(b"")
    builder = VideoFolder(tmp_path / "out", VideoFolderSettings(source=str(tmp_path)))
    splits = {source.path: source.split for source in builder.sources()}
    expected = dict.fromkeys(files) if train is None else dict.fromkeys(train, "train") | dict.fromkeys(val, "val")
    assert splits == expected
    assert (SPLIT_FOLDERS in builder.warnings()) == (train is not None)


def test_a_series_of_images_is_in_the_split_of_its_folder(tmp_path):
    for name in ("train/a/1.png", "train/a/2.png", "test/b/1.png", "test/b/2.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    builder = VideoFolder(tmp_path / "out", VideoFolderSettings(source=str(tmp_path), control_rate=3.0))
    assert {source.path: source.split for source in builder.sources()} == {"train/a": "train", "test/b": "val"}


@pytest.mark.parametrize(("rotation", "corner"), [(0, (0, 0)), (90, (-1, 0)), (-90, (0, -1)), (180, (-1, -1))])
def test_frames_are_turned_upright(tmp_path, make_video, rotation, corner):
    image = frames(make_video(tmp_path / "clip.mp4", rotation=rotation))[0]
    assert image.shape == ((64, 48, 3) if rotation in (90, -90) else (48, 64, 3))
    assert image[corner].min() > 230
    opposite = tuple(-1 - index for index in corner)
    assert image[opposite].min() < 100


def test_conversion_of_a_folder(tmp_path, make_video, check_dataset, colours):
    source = tmp_path / "clips"
    for name in ("a.mp4", "deep/er/b.gif", "c.webm"):
        codec = {"mp4": "libx264", "gif": "gif", "webm": "libsvtav1"}[name.rpartition(".")[2]]
        make_video(source / name, codec=codec)
    make_video(source / ".hidden" / "d.mp4")
    (source / "notes.txt").write_text("not a video")
    report = convert(source, tmp_path / "out", control_rate=3.0)
    tables = check_dataset(tmp_path / "out")
    rows = sorted(tables["train"] + tables["val"], key=lambda row: row["source_file"])
    assert [row["source_file"] for row in rows] == ["a.mp4", "c.webm", "deep/er/b.gif"]
    assert {(row["num_steps"], row["control_rate"]) for row in rows} == {(12, 3.0)}
    assert report["warnings"] == []
    image = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")[1]["observation"]["image"]
    np.testing.assert_allclose(image[40, 50], colours[1], atol=25)


def test_motion_is_the_difference_of_the_images(tmp_path, make_video, check_dataset, colours):
    make_video(tmp_path / "clips" / "a.mp4", num_frames=4)
    convert(tmp_path / "clips", tmp_path / "out", control_rate=3.0)
    (row,) = check_dataset(tmp_path / "out")["train"]
    # A sixteenth of the image is the white corner, which stays.
    differences = np.abs(np.diff(np.array(colours), axis=0)).mean(1) / 255 * 15 / 16
    np.testing.assert_allclose(row["motion"], [0, *differences], atol=0.01)


def test_control_rate_of_the_container_with_a_warning(tmp_path, make_video, check_dataset):
    make_video(tmp_path / "clips" / "a.mp4", rate=10)
    make_video(tmp_path / "clips" / "b.mp4", rate=20)
    report = convert(tmp_path / "clips", tmp_path / "out", validation_fraction=0.0)
    assert [row["control_rate"] for row in check_dataset(tmp_path / "out")["train"]] == [10, 20]
    assert report["warnings"] == [{"message": GUESSED_RATE, "count": 2, "examples": ["a.mp4", "b.mp4"]}]


def test_frame_stride_divides_the_control_rate(tmp_path, make_video, check_dataset, colours):
    make_video(tmp_path / "clips" / "a.mp4", num_frames=13, rate=30)
    convert(tmp_path / "clips", tmp_path / "out", frame_stride=4)
    (row,) = check_dataset(tmp_path / "out")["train"]
    assert (row["num_steps"], row["control_rate"]) == (4, 7.5)
    assert max(row["motion"]) < 0.01


def test_images_are_scaled_down_but_not_up(tmp_path, make_video):
    make_video(tmp_path / "clips" / "a.mp4", size=(96, 160))
    make_video(tmp_path / "clips" / "b.mp4", size=(32, 48))
    convert(tmp_path / "clips", tmp_path / "out", control_rate=3.0, image_size=48, validation_fraction=0.0)
    records = tfds.builder_from_directory(tmp_path / "out").as_data_source("train")
    assert records[0]["observation"]["image"].shape == (48, 80, 3)
    assert records[12]["observation"]["image"].shape == (32, 48, 3)


def test_long_videos_are_cut_and_stay_on_one_side_of_the_split(tmp_path, make_video, check_dataset):
    for name in "abcdef":
        make_video(tmp_path / "clips" / f"{name}.mp4", num_frames=25)
    convert(tmp_path / "clips", tmp_path / "out", control_rate=5.0, clip_seconds=2.0, validation_fraction=0.4)
    tables = check_dataset(tmp_path / "out")
    files = {split: {row["source_file"] for row in rows} for split, rows in tables.items()}
    assert (len(files["train"]), len(files["val"])) == (4, 2)
    assert not files["train"] & files["val"]
    assert [row["num_steps"] for row in tables["val"]] == [10, 10, 5] * 2
    assert tables["val"][2]["episode_id"].endswith(".mp4/00002")


@pytest.mark.parametrize(
    ("count", "lengths"), [(0, []), (1, [1]), (10, [10]), (11, [11]), (12, [10, 2]), (21, [10, 11]), (22, [10, 10, 2])]
)
def test_no_frame_is_left_alone(count, lengths):
    clips = list(split_clips(iter(range(count)), 10))
    assert [len(clip) for clip in clips] == lengths
    assert [frame for clip in clips for frame in clip] == list(range(count))


def test_damaged_files_are_reported_and_finished_clips_kept(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    make_video(source / "good.mp4", num_frames=25)
    damage(make_video(source / "damaged.mp4", num_frames=60), 0.6, 0.7)
    truncate(make_video(source / "long.mp4", num_frames=60, movflags="+faststart"), 0.7)
    truncate(make_video(source / "short.webm", codec="libsvtav1", num_frames=20), 0.7)
    truncate(make_video(source / "short.gif", codec="gif"), 0.5)
    truncate(make_video(source / "headless.mp4"), 0.5)
    make_video(source / "still.mp4", num_frames=1)
    (source / "text.mp4").write_text("this is no video")
    (source / "empty.mp4").write_bytes(b"")
    report = convert(source, tmp_path / "out", control_rate=5.0, clip_seconds=2.0, validation_fraction=0.0)
    check_dataset(tmp_path / "out")
    reasons = {entry["source"]: entry["reasons"][0] for entry in report["left_out"]}
    assert set(reasons) == {"short.webm", "short.gif", "headless.mp4", "still.mp4", "text.mp4", "empty.mp4"}
    assert "has 1 step(s)" in reasons["still.mp4"]
    assert "ends in the middle" in reasons["short.gif"]
    assert "although 2.0 s were announced" in reasons["short.webm"]
    assert all("\n" not in reason for reason in reasons.values())
    partial = {entry["source"]: entry for entry in report["partially_converted"]}
    assert set(partial) == {"damaged.mp4", "long.mp4"}
    assert all(2 <= entry["episodes"] <= 4 for entry in partial.values())
    assert partial["damaged.mp4"]["reasons"][0].endswith("is damaged")
    assert partial["long.mp4"]["reasons"][0].endswith("although 60 frames were announced")


def test_playlists_cannot_open_other_files(tmp_path, make_video):
    make_video(tmp_path / "a.ts")
    playlist = tmp_path / "list.m3u8"
    playlist.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:1.2,\na.ts\n#EXT-X-ENDLIST\n")
    with pytest.raises(VIDEO_ERRORS):
        frames(playlist)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("language.json", json.dumps({"a.mp4": "push", "b": "pull", "deep/c.mp4": "lift"})),
        ("language.csv", "file,instruction\na.mp4,push\nb.mp4,pull\nc,lift\n"),
        ("language.csv", "\ufeffid,Language_Instruction,File_Name\n0,push,a\n1,pull,b\n2,lift,deep/c\n"),
    ],
)
def test_instructions_from_a_sidecar(tmp_path, make_video, check_dataset, name, content):
    source = tmp_path / "clips"
    for video in ("a.mp4", "b.mp4", "deep/c.mp4", "d.mp4"):
        make_video(source / video, num_frames=3)
    (source / name).write_text(content, encoding="utf-8")
    report = convert(source, tmp_path / "out", control_rate=3.0, validation_fraction=0.0)
    rows = check_dataset(tmp_path / "out")["train"]
    assert [row["language_instruction"] for row in rows] == ["push", "pull", "", "lift"]
    (warning,) = report["warnings"]
    assert warning["message"] == "1 of 4 videos have no instruction, such as 'd.mp4'"


def test_sidecars_that_do_not_fit_are_reported(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    make_video(source / "deep" / "a.mp4", num_frames=3)
    (source / "1.json").write_text(json.dumps({"a.mp4": "from above", "gone.mp4": "vanished"}))
    (source / "2.json").write_text(json.dumps({"fps": 3}))
    (source / "3.json").write_text("{")
    (source / "4.csv").write_text("name,words\na.mp4,push\n")
    (source / "deep" / "near.json").write_text(json.dumps({"a": "from beside"}))
    report = convert(source, tmp_path / "out", control_rate=3.0)
    (row,) = check_dataset(tmp_path / "out")["train"]
    assert row["language_instruction"] == "from beside"
    messages = [warning["message"] for warning in report["warnings"]]
    assert messages[0] == "1.json: 1 of 2 entries name no recording, such as 'gone.mp4'"
    assert [message.split(":")[0] for message in messages] == ["1.json", "2.json", "3.json", "4.csv"]
    assert "expected an object that maps file names to instructions" in messages[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"control_rate": 0.0}, r"control_rate must be a positive number of steps per second \(Hz\), got 0.0"),
        ({"control_rate": -3.0}, "control_rate must be a positive"),
        ({"control_rate": float("nan")}, "control_rate must be a positive"),
        ({"frame_stride": 0}, "frame_stride must be 1 or more"),
        ({"clip_seconds": 0.0}, "clip_seconds must be a positive number"),
        ({"clip_seconds": float("inf")}, "clip_seconds must be a positive number"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(ConversionError, match=message):
        VideoFolderSettings(source="clips", **settings)


def test_folders_without_videos(tmp_path):
    with pytest.raises(ConversionError, match="source folder .*gone does not exist"):
        convert(tmp_path / "gone", tmp_path / "out")
    (tmp_path / "clips").mkdir()
    with pytest.raises(ConversionError, match="source folder .*clips holds no video"):
        convert(tmp_path / "clips", tmp_path / "out")
    for index in range(4):
        (tmp_path / "clips" / f"{index}.mp4").write_text("not a video")
    with pytest.raises(
        ConversionError, match=r"none of the 4 sources could be converted: 0.mp4 \(.*Invalid data.* and 1 more"
    ):
        convert(tmp_path / "clips", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["clips"]


def test_sample_videos(tmp_path, sample_data, check_dataset):
    report = convert(sample_data / "rt1_videos", tmp_path / "out", control_rate=3.0)
    tables = check_dataset(tmp_path / "out")
    rows = tables["train"] + tables["val"]
    assert report["sources"]["converted"] == 6
    assert sorted(row["num_steps"] for row in rows) == [29, 32, 33, 39, 41, 46]
    assert "close top drawer" in {row["language_instruction"] for row in rows}
    assert {row["control_rate"] for row in rows} == {3.0}


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("libero_videos/libero_goal_no_noops_wrist_episode_000082.mp4", 169),
        ("human_videos/lavila_mixkit-hands-of-a-baker-kneading-a-dough-42467-medium.gif", 50),
        ("calvin_videos/task_ABC_D_validation_eps_3351_3398.mp4", 48),
    ],
)
def test_sample_codecs(sample_data, name, count):
    assert len(frames(sample_data / name)) == count
