"""Damaged, odd and hostile inputs of `video_folder` and `lerobot`: all end in the report or in one clear error."""

from __future__ import annotations

import json
import os
import shutil
import struct
import wave
import zlib
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from lerobot_files import (
    LENGTHS,
    TOP,
    write_v2,
    write_v3,
    write_video,
)

from como_jax.convert.images import decode_image
from como_jax.convert.lerobot.builder import LeRobot, LeRobotSettings
from como_jax.convert.video import MAX_PIXELS, VIDEO_ERRORS, VideoReader
from como_jax.convert.video_folder.builder import VideoFolder, VideoFolderSettings
from como_jax.errors import ConversionError
from tests.everyday import mostly_slow


def convert_folder(source: Path, out: Path) -> dict[str, Any]:
    settings = VideoFolderSettings(source=str(source), control_rate=5.0, clip_seconds=1.0, validation_fraction=0.0)
    return VideoFolder(out, settings).convert()


def convert_lerobot(source: Path, out: Path) -> dict[str, Any]:
    return LeRobot(out, LeRobotSettings(source=str(source), validation_fraction=0.0)).convert()


def reasons(report: dict[str, Any], part: str = "left_out") -> dict[str, str]:
    return {entry["source"]: entry["reasons"][0] for entry in report[part]}


def messages(report: dict[str, Any]) -> list[str]:
    return [warning["message"] for warning in report["warnings"]]


def sources(rows_: list[dict[str, Any]]) -> set[str]:
    return {row["source_file"] for row in rows_}


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and has next to nothing in it."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")


def write_h264(path: Path, sizes: list[tuple[int, int]]) -> None:
    """A raw H.264 stream whose resolution may change from image to image."""
    with path.open("wb") as file:
        for index, (height, width) in enumerate(sizes):
            codec = av.CodecContext.create("libx264", "w")
            assert isinstance(codec, av.VideoCodecContext)
            codec.width, codec.height, codec.pix_fmt, codec.framerate = width, height, "yuv420p", 10
            image = av.VideoFrame.from_ndarray(np.full((height, width, 3), 20 * index, np.uint8), format="rgb24")
            for packet in [*codec.encode(image), *codec.encode(None)]:
                file.write(bytes(packet))


def write_sound(path: Path) -> None:
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(8000)
        file.writeframes(bytes(8000))


@pytest.mark.parametrize("movflags", [None, "+faststart"])
def test_truncated_mp4_at_every_place(tmp_path, make_video, check_dataset, movflags):
    source = tmp_path / "clips"
    whole = make_video(source / "whole.mp4", num_frames=20, movflags=movflags).read_bytes()
    cuts = [0, 1, 8, 40, *(round(len(whole) * share / 8) for share in range(1, 8)), len(whole) - 1]
    for cut in cuts:
        (source / f"cut_{cut:06d}.mp4").write_bytes(whole[:cut])
    report = convert_folder(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert report["sources"]["found"] == 1 + len(cuts)
    damaged = reasons(report) | reasons(report, "partially_converted")
    # The last byte may belong to nothing that is needed for the images.
    assert set(damaged) >= {f"cut_{cut:06d}.mp4" for cut in cuts[:-1]}
    assert all(damaged.values())


def test_files_that_are_not_what_their_name_says(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    make_video(source / "mp4.mp4").rename(tmp_path / "mp4.avi")
    (tmp_path / "mp4.avi").rename(source / "mp4.avi")
    make_video(source / "no_suffix.mp4").rename(source / "no_suffix")
    (source / "text.mp4").write_text("file a.mp4\n" * 100)
    (source / "concat.mp4").write_text("ffconcat version 1.0\nfile mp4.avi\n")
    (source / "stream.mp4").write_text("v=0\no=- 0 0 IN IP4 127.0.0.1\nc=IN IP4 127.0.0.1\nm=video 9 RTP/AVP 96\n")
    (source / "zero.mp4").write_bytes(b"")
    (source / "zeros.mp4").write_bytes(bytes(5000))
    (source / "image.mp4").write_bytes(cv2.imencode(".png", np.zeros((20, 30, 3), np.uint8))[1].tobytes())
    make_video(source / "one_frame.mp4", num_frames=1)
    write_sound(source / "sound.mp4")
    report = convert_folder(source, tmp_path / "out")
    assert sources(check_dataset(tmp_path / "out")["train"]) == {"mp4.avi", "no_suffix"}
    left_out = reasons(report)
    bad = {"text", "concat", "stream", "zero", "zeros", "image", "one_frame", "sound"}
    assert set(left_out) == {f"{name}.mp4" for name in bad}
    assert left_out["sound.mp4"] == "no video stream"
    assert "has 1 step(s)" in left_out["image.mp4"]
    assert "has 1 step(s)" in left_out["one_frame.mp4"]


def test_entries_of_a_folder_that_are_no_files(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    make_video(source / "clip.mp4" / "inside.mp4")
    make_video(tmp_path / "elsewhere" / "linked.mp4")
    (source / "empty.mp4").mkdir()
    (source / "link.mp4").symlink_to(tmp_path / "elsewhere" / "linked.mp4")
    (source / "folder").symlink_to(tmp_path / "elsewhere")
    (source / "up").symlink_to(source)
    (source / "root").symlink_to("/")
    (source / "dangling.mp4").symlink_to("gone.mp4")
    (source / "loop.mp4").symlink_to("loop.mp4")
    (source / "dangling.json").symlink_to("gone.json")
    os.mkfifo(source / "pipe.mp4")
    report = convert_folder(source, tmp_path / "out")
    rows_ = check_dataset(tmp_path / "out")["train"]
    assert sources(rows_) == {"clip.mp4/inside.mp4", "link.mp4", "folder/linked.mp4"}
    expected = "is not a file, or is a link without a target"
    assert reasons(report) == {"dangling.mp4": expected, "loop.mp4": expected, "pipe.mp4": expected}
    text = "\n".join(messages(report))
    assert "dangling.json: not understood" in text
    assert "2 links lead to folders that are read already or hold this one, such as 'root'" in text


def test_names_with_spaces_quotes_and_other_letters(tmp_path, make_video, check_dataset):
    source = tmp_path / 'my clips\' "folder"'
    names = [
        "a b.mp4",
        "it's.mp4",
        'say "hi".mp4',
        "öffne die Schublade.mp4",
        "开抽屉.mp4",
        "100%d.mp4",
        "new\nline.mp4",
    ]
    for name in names:
        make_video(source / name, num_frames=4)
    (source / "l.json").write_text(json.dumps(dict.fromkeys(names, "öffne 开")), encoding="utf-8")
    report = convert_folder(source, tmp_path / "out put")
    rows_ = check_dataset(tmp_path / "out put")["train"]
    assert sources(rows_) == set(names)
    assert {row["language_instruction"] for row in rows_} == {"öffne 开"}
    assert report["warnings"] == []


def test_a_name_that_is_not_utf8_is_left_out(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    good = make_video(source / "good.mp4", num_frames=4)
    try:
        shutil.copy(good, os.fsencode(source) + b"/bad_\xff.mp4")
    except OSError:
        pytest.skip("this file system takes no such names")
    report = convert_folder(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert reasons(report) == {"bad_\\xff.mp4": "its name is not valid UTF-8; rename it"}


def test_metadata_of_a_video_that_are_not_utf8_do_not_matter(tmp_path, make_video):
    path = tmp_path / "clip.mp4"
    make_video(tmp_path / "plain.mp4", num_frames=4)
    with av.open(str(tmp_path / "plain.mp4")) as plain, av.open(str(path), "w") as titled:
        titled.metadata["title"] = "T" * 12
        stream = titled.add_stream_from_template(plain.streams.video[0])
        for packet in plain.demux(video=0):
            if packet.dts is not None:
                packet.stream = stream
                titled.mux(packet)
    content = path.read_bytes()
    assert b"T" * 12 in content
    path.write_bytes(content.replace(b"T" * 12, b"\xff\xfe" * 6))
    with VideoReader(path) as reader:
        assert len(list(reader.frames())) == 4


def test_videos_of_huge_images_are_left_out(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    make_video(source / "good.mp4", num_frames=4)
    (source / "claims.mp4").write_bytes(png_header(60000, 60000))
    (source / "large.mp4").write_bytes(png_header(12000, 9000))
    write_h264(source / "wide.h264", [(16, 16)])
    report = convert_folder(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    left_out = reasons(report)
    assert set(left_out) == {"claims.mp4", "large.mp4", "wide.h264"}
    assert f"images of more than {MAX_PIXELS} pixels are not read" in left_out["large.mp4"]


def test_the_limit_of_pixels_holds_before_anything_is_decoded(tmp_path, make_video, monkeypatch):
    path = make_video(tmp_path / "clip.mp4", size=(48, 64))
    monkeypatch.setattr("como_jax.convert.video.MAX_PIXELS", 48 * 64 - 1)
    with pytest.raises(ValueError, match=r"64x48 pixels are more than the 3071 that are read"):
        VideoReader(path)
    monkeypatch.setattr("como_jax.convert.video.MAX_PIXELS", 48 * 64)
    write_h264(tmp_path / "grows.h264", [(48, 64)] * 3 + [(96, 128)] * 3)
    with VideoReader(tmp_path / "grows.h264") as reader, pytest.raises(VIDEO_ERRORS):
        list(reader.frames())


@pytest.mark.parametrize("size", [(60000, 60000), (20000, 10000)])
def test_images_of_tables_that_are_huge_are_refused(size):
    for data in (png_header(*size), huge_jpeg(*size)):
        with pytest.raises(ValueError, match=f"an image of {size[0]}x{size[1]} pixels, which are more than"):
            decode_image(data)


def huge_jpeg(width: int, height: int) -> bytes:
    data = bytearray(cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    start = data.index(b"\xff\xc0") + 5
    data[start : start + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def test_a_resolution_that_changes_inside_a_stream(tmp_path, make_video, check_dataset):
    source = tmp_path / "clips"
    source.mkdir()
    write_h264(source / "steady.h264", [(48, 64)] * 7)
    write_h264(source / "changes.h264", [(48, 64)] * 7 + [(64, 48)] * 5)
    report = convert_folder(source, tmp_path / "out")
    check_dataset(tmp_path / "out")
    assert report["sources"]["converted"] == 1
    expected = "frame 7 has 48x64 pixels, and those before it have 64x48"
    assert reasons(report, "partially_converted") == {"changes.h264": expected}


def test_resolutions_that_differ_between_videos(tmp_path, make_video, check_dataset):
    for index, size in enumerate([(16, 16), (48, 64), (64, 48), (240, 320), (2, 800)]):
        make_video(tmp_path / "clips" / f"{index}.mp4", num_frames=3, size=size)
    report = convert_folder(tmp_path / "clips", tmp_path / "out")
    assert len(check_dataset(tmp_path / "out")["train"]) == report["sources"]["converted"] == 5


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"\xff\xfe{", "a.json: not understood as language instructions: Expecting value"),
        ("a.json", b'{"0.mp4": NaN}', "a.json: not understood as language instructions: expected an object"),
        ("a.json", b"[" * 100_000, "a.json: not understood as language instructions"),
        ("a.json", b'{"0.mp4": "\\ud800"}', "a.json: not understood as language instructions"),
        ("a.json", b'{"\\ud800": "x"}', r"a.json: 1 of 1 entries name no recording, such as '\ud800'"),
        ("a.json", b'{"gone.mp4": "x", "0.mp4": "y"}', "a.json: 1 of 2 entries name no recording, such as 'gone.mp4'"),
        ("a.csv", b"file,text\n0.mp4,caf\xe9\n", "a.csv: 1 of 1 entries hold no instruction: '0.mp4'"),
        ("a.csv", b"file,text\n0.mp4,y\n1.mp4\n\n", "a.csv: 1 of 2 entries hold no instruction: '1.mp4'"),
        ("a.csv", b"", "a.csv: not understood as language instructions: expected a field"),
    ],
)
def test_sidecars_that_are_damaged_are_named(tmp_path, make_video, check_dataset, name, content, message):
    make_video(tmp_path / "clips" / "0.mp4", num_frames=3)
    (tmp_path / "clips" / name).write_bytes(content)
    report = convert_folder(tmp_path / "clips", tmp_path / "out")
    (row,) = check_dataset(tmp_path / "out")["train"]
    (warning,) = messages(report)
    assert warning.startswith(message)
    assert row["language_instruction"] in ("", "y")


def test_csv_with_a_byte_order_mark(tmp_path, make_video, check_dataset):
    make_video(tmp_path / "clips" / "0.mp4", num_frames=3)
    (tmp_path / "clips" / "a.csv").write_bytes("\ufefffile,text\r\n0.mp4,öffne\r\n".encode())
    assert convert_folder(tmp_path / "clips", tmp_path / "out")["warnings"] == []
    assert check_dataset(tmp_path / "out")["train"][0]["language_instruction"] == "öffne"


def flip_or_cut(path: Path, rng: np.random.Generator) -> None:
    """Overwrites a few bytes of a file, cuts its end off, or takes a piece out of it."""
    content = bytearray(path.read_bytes())
    kind = rng.integers(3)
    start = int(rng.integers(len(content)))
    if kind == 0:
        for place in rng.integers(len(content), size=rng.integers(1, 20)):
            content[place] = rng.integers(256)
    elif kind == 1:
        del content[start:]
    else:
        del content[start : start + int(rng.integers(1, 50))]
    path.write_bytes(content)


@pytest.fixture(scope="module")
def sound_sources(tmp_path_factory) -> dict[str, Path]:
    """One small dataset of each kind, to be copied and damaged."""
    folder = tmp_path_factory.mktemp("sound")
    for name in "ab":
        write_video(folder / "video_folder" / f"{name}.mp4", list(range(20, 220, 10)))
    (folder / "video_folder" / "words.json").write_text('{"a.mp4": "push", "b.mp4": "pull"}')
    return {
        "video_folder": folder / "video_folder",
        "v2.1": write_v2(folder / "v2", cameras=(TOP,)),
        "v3.0": write_v3(folder / "v3", cameras=(TOP,)),
    }


@pytest.mark.parametrize("seed", mostly_slow(range(30), *range(6)))
def test_bytes_that_are_wrong_end_in_the_report_or_in_one_error(tmp_path, sound_sources, check_dataset, seed):
    rng = np.random.default_rng(seed)
    kind = list(sound_sources)[seed % len(sound_sources)]
    source = shutil.copytree(sound_sources[kind], tmp_path / "data")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    flip_or_cut(files[rng.integers(len(files))], rng)
    try:
        report = (convert_folder if kind == "video_folder" else convert_lerobot)(source, tmp_path / "out")
    except ConversionError as error:
        assert "\n" not in str(error)
        assert [path.name for path in tmp_path.iterdir()] == ["data"]
    else:
        check_dataset(tmp_path / "out")
        assert report["sources"]["found"] >= (2 if kind == "video_folder" else len(LENGTHS))
