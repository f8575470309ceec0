"""Images and videos as players show them; what is not 8-bit RGB never becomes so without a word."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from av.filter import Graph
from lerobot_files import TOP, WRIST, write_v2
from PIL import Image, ImageOps

from como_jax.convert import images
from como_jax.convert.lerobot.builder import DEPTH_NAME, LeRobot, LeRobotSettings
from como_jax.convert.video import CROPPED, DEEP, SEVERAL_STREAMS, STRETCHED, TILTED, VideoReader, open_video
from como_jax.convert.video_folder.builder import VideoFolder, VideoFolderSettings
from como_jax.data.episode_table import read_episode_table
from como_jax.errors import ConversionError


def quarters(height: int = 24, width: int = 32) -> np.ndarray:
    """An image whose four quarters differ, so that every way to turn it gives another one."""
    image = np.zeros((height, width, 3), np.uint8)
    image[: height // 2, : width // 2, 0] = 250
    image[: height // 2, width // 2 :, 1] = 250
    image[height // 2 :, : width // 2, 2] = 250
    return image


def write_frames(
    path: Path,
    frames: list[np.ndarray],
    pixels: str = "rgb24",
    codec: str = "ffv1",
    stored: str = "",
    prepare: Callable[[Any], None] = lambda stream: None,
) -> Path:
    """Writes frames in FFmpeg's pixel format `pixels` to a video that stores them as `stored`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(10))
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = stored or pixels
        prepare(stream)
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format=pixels)))
        container.mux(stream.encode())
    return path


def read(path: Path) -> tuple[np.ndarray, list[str]]:
    """The first frame of a video, and the notes of its reader."""
    with VideoReader(path) as reader:
        return next(reader.frames()), reader.notes


def filtered(path: Path, *filters: tuple[str, str]) -> np.ndarray:
    """The first frame as FFmpeg's own filters make it."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        graph = Graph()
        nodes = [graph.add_buffer(template=stream), *(graph.add(*each) for each in filters), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        graph.push(next(container.decode(stream)))
        return graph.pull().to_ndarray(format="rgb24")


# The filters are those that `ffmpeg` inserts for a display matrix (a, b, c, d).
@pytest.mark.parametrize(
    ("matrix", "filters"),
    [
        ((1, 0, 0, 1), []),
        ((-1, 0, 0, 1), [("hflip", "")]),
        ((1, 0, 0, -1), [("vflip", "")]),
        ((-1, 0, 0, -1), [("hflip", ""), ("vflip", "")]),
        ((0, 1, -1, 0), [("transpose", "clock")]),
        ((0, -1, 1, 0), [("transpose", "cclock")]),
        ((0, 1, 1, 0), [("transpose", "cclock_flip")]),
        ((0, -1, -1, 0), [("transpose", "clock_flip")]),
    ],
)
def test_the_whole_display_matrix_is_applied_as_ffmpeg_does(tmp_path, matrix, filters):
    a, b, c, d = matrix
    path = write_frames(
        tmp_path / "clip.mp4",
        [quarters()],
        codec="libx264rgb",
        prepare=lambda stream: stream.set_display_matrix((a, b, 0, c, d, 0, 0, 0, 1)),
    )
    shown, notes = read(path)
    expected = filtered(path, *filters)
    assert shown.shape == expected.shape == ((32, 24, 3) if b else (24, 32, 3))
    np.testing.assert_allclose(shown.astype(int), expected, atol=2)
    assert notes == []


def test_a_tilted_display_matrix_is_said(tmp_path):
    turn = lambda stream: stream.set_display_rotation(30)  # noqa: E731
    assert read(write_frames(tmp_path / "clip.mp4", [quarters()], codec="libx264rgb", prepare=turn))[1] == [TILTED]


@pytest.mark.parametrize(
    ("aspect", "scale"), [(Fraction(4, 3), "iw*sar:ih"), (Fraction(1, 2), "iw:ih/sar"), (Fraction(1), "iw:ih")]
)
def test_pixels_that_are_not_square_are_stretched_as_ffmpeg_does(tmp_path, aspect, scale):
    smooth = cv2.GaussianBlur(quarters(24, 30), (15, 15), 0)

    def prepare(stream: Any) -> None:
        stream.codec_context.sample_aspect_ratio = aspect

    path = write_frames(tmp_path / "clip.mkv", [smooth], codec="libx264rgb", prepare=prepare)
    shown, notes = read(path)
    # Buffers of the filters do not hand on what the file says of its pixels.
    expected = filtered(path, ("setsar", str(aspect)), ("scale", scale))
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 2
    assert notes == ([] if aspect == 1 else [STRETCHED])


def with_aperture(content: bytes, numbers: tuple[int, ...]) -> bytes:
    """Puts a clean aperture into an MP4 whose frames lie before its header."""
    stored = struct.pack(">I4sIIIIiIiI", 40, b"clap", *numbers)
    at = content.rindex(b"avcC") - 4
    grown = bytearray(content[:at] + stored + content[at:])
    for name in (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stsd", b"avc1"):
        place = content.rindex(name) - 4
        (size,) = struct.unpack_from(">I", grown, place)
        struct.pack_into(">I", grown, place, size + len(stored))
    return bytes(grown)


# What FFmpeg cuts off at the top, the bottom, the left and the right: its rule for `clap`, computed by hand.
@pytest.mark.parametrize(
    ("numbers", "cut"),
    [
        ((24, 1, 16, 1, 0, 1, 0, 1), (4, 4, 4, 4)),
        ((24, 1, 16, 1, -4, 1, 2, 1), (6, 2, 0, 8)),
        ((48, 2, 31, 2, 1, 2, 0, 1), (4, 5, 4, 4)),
        ((32, 1, 24, 1, 0, 1, 0, 1), None),
        ((24, 1, 16, 1, 9, 1, 0, 1), None),  # Out of the image.
        ((24, 0, 16, 1, 0, 1, 0, 1), None),
        ((64, 1, 48, 1, 0, 1, 0, 1), None),
    ],
)
def test_the_clean_aperture_is_cut_out_as_ffmpeg_does(tmp_path, numbers, cut):
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    path = write_frames(tmp_path / "clip.mp4", [noise], codec="libx264rgb")
    whole, _ = read(path)
    path.write_bytes(with_aperture(path.read_bytes(), numbers))
    shown, notes = read(path)
    top, bottom, left, right = cut or (0, 0, 0, 0)
    np.testing.assert_array_equal(shown, whole[top : 24 - bottom, left : 32 - right])
    assert notes == ([CROPPED] if cut else [])


def test_an_aperture_is_cut_out_before_an_image_is_turned(tmp_path):
    path = write_frames(
        tmp_path / "clip.mp4", [quarters()], codec="libx264rgb", prepare=lambda stream: stream.set_display_rotation(90)
    )
    path.write_bytes(with_aperture(path.read_bytes(), (16, 1, 24, 1, -8, 1, 0, 1)))
    with open_video(path) as reader:
        assert (reader.height, reader.width) == (24, 32)
        shown = next(reader.frames())
    expected = filtered(path, ("crop", "16:24:0:0:exact=1"), ("transpose", "cclock"))
    assert shown.shape == (16, 24, 3)
    np.testing.assert_allclose(shown.astype(int), expected, atol=2)


def write_animation(path: Path, milliseconds: list[int], mode: str = "RGB", exif: bytes = b"") -> Path:
    """Images that get brighter, the upper left quarter of which is white."""
    images = []
    for index in range(len(milliseconds)):
        image = np.full((24, 32, 3), 20 * index, np.uint8)
        image[:12, :16] = 255
        images.append(Image.fromarray(image).convert(mode))
    path.parent.mkdir(parents=True, exist_ok=True)
    options: dict[str, Any] = {"exif": exif} if exif else {}
    images[0].save(path, save_all=True, append_images=images[1:], duration=milliseconds, lossless=True, **options)
    return path


def test_an_animated_webp_is_a_video(tmp_path):
    with open_video(write_animation(tmp_path / "clip.webp", [100] * 5)) as reader:
        assert (reader.codec, reader.height, reader.width, reader.frame_rate) == ("webp", 24, 32, 10.0)
        times, images = zip(*reader.timed_frames(), strict=True)
    np.testing.assert_allclose(times, np.arange(5) / 10)
    assert [int(image[-1, -1, 0]) for image in images] == [0, 20, 40, 60, 80]
    assert all((image[0, 0] == 255).all() for image in images)
    assert reader.notes == []


def test_an_animated_webp_is_turned_and_its_transparency_is_said(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    with open_video(write_animation(tmp_path / "a.webp", [100] * 2, exif=exif.tobytes())) as reader:
        image = next(reader.frames())
    assert image.shape == (32, 24, 3) and (image[0, -1] == 255).all() and (image[0, 0] == 0).all()
    path = tmp_path / "b.webp"
    clear = [Image.new("RGBA", (32, 24), (90, 90, index, 40)) for index in range(2)]
    clear[0].save(path, save_all=True, append_images=clear[1:], duration=100, lossless=True, exact=True)
    with open_video(path) as reader:
        assert (next(reader.frames())[0, 0] == (90, 90, 0)).all()
        assert reader.notes == [images.TRANSPARENT]


@pytest.mark.parametrize("share", [0.6, 0.95])
def test_an_animated_webp_that_breaks_off_keeps_the_frames_before(tmp_path, share):
    path = write_animation(tmp_path / "clip.webp", [100] * 6)
    data = path.read_bytes()
    path.write_bytes(data[: round(share * len(data))])
    shown = []
    with open_video(path) as reader, pytest.raises(ValueError, match="ends in the middle, after "):
        for image in reader.frames():
            shown.append(int(image[-1, -1, 0]))
    assert 2 <= len(shown) < 6 and shown == [20 * index for index in range(len(shown))]


def test_numbered_animations_are_videos_of_their_own_times(tmp_path):
    source = tmp_path / "clips"
    for number in (1, 2):
        write_animation(source / f"{number}.webp", [100, 100, 5000, 100, 100])
        write_animation(source / "png" / f"{number}.png", [100] * 4)
    report = VideoFolder(tmp_path / "out", VideoFolderSettings(source=str(source), validation_fraction=0.0)).convert()
    rows = read_episode_table(tmp_path / "out", "train").to_pylist()
    lengths = {row["episode_id"]: (row["num_steps"], round(row["control_rate"], 6)) for row in rows}
    parts = {f"{number}.webp/{part:05d}": (steps, 10.0) for number in (1, 2) for part, steps in enumerate((3, 2))}
    assert lengths == parts | {f"png/{number}.png/00000": (4, 10.0) for number in (1, 2)}
    assert not report["left_out"]


def cover_first(content: bytes, cover: bytes) -> bytes:
    """Puts a cover before the tracks of an MP4 whose frames lie before its header, as tagging programs do."""

    def box(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), name) + content

    start = content.rindex(b"moov") - 4
    handler = box(b"hdlr", bytes(8) + b"mdirappl" + bytes(9))
    items = box(b"ilst", box(b"covr", box(b"data", struct.pack(">II", 13, 0) + cover)))
    user_data = box(b"udta", box(b"meta", bytes(4) + handler + items))
    return content[:start] + box(b"moov", user_data + content[start + 8 :])


def test_a_cover_is_not_taken_for_the_recording(tmp_path):
    moving = [np.full((24, 32, 3), 40 * step, np.uint8) for step in range(5)]
    path = write_frames(tmp_path / "clip.mp4", moving, codec="libx264rgb")
    path.write_bytes(cover_first(path.read_bytes(), images.encode_jpeg(quarters(64, 64))))
    with av.open(str(path)) as container:
        assert [stream.codec_context.name for stream in container.streams.video] == ["mjpeg", "h264"]
    with VideoReader(path) as reader:
        shown = list(reader.frames())
        assert reader.notes == []
    np.testing.assert_allclose([frame.mean() for frame in shown], [0, 40, 80, 120, 160], atol=2)


def test_of_several_streams_the_best_is_read_and_the_others_are_said(tmp_path):
    path = tmp_path / "clip.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("ffv1", rate=10) for _ in range(2)]
        for stream, size in zip(streams, (16, 64), strict=True):
            stream.height = stream.width = size
            stream.pix_fmt = "bgr0"
        for _ in range(3):
            for stream in streams:
                frame = np.full((stream.height, stream.width, 3), 100, np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        for stream in streams:
            container.mux(stream.encode())
    with av.open(str(path)) as container:
        best = container.streams.best("video")
        assert best is not None
        expected = best.codec_context.height
    image, notes = read(path)
    assert (len(image), notes) == (expected, [SEVERAL_STREAMS])


@pytest.mark.parametrize(
    ("pixels", "frame", "notes"),
    [
        ("gray", np.full((24, 32), 90, np.uint8), [images.GREY]),
        ("rgba", np.full((24, 32, 4), 90, np.uint8), [images.TRANSPARENT]),
        ("rgba", np.full((24, 32, 4), 255, np.uint8), []),
        ("rgb48le", np.full((24, 32, 3), 90 * 257, np.uint16), [DEEP]),
    ],
)
def test_videos_that_are_not_8_bit_rgb_are_noted(tmp_path, pixels, frame, notes):
    stored = {"rgba": "bgra", "rgb48le": "gbrp10le"}.get(pixels, pixels)
    path = write_frames(tmp_path / "clips" / "a.mkv", [frame] * 3, pixels, stored=stored)
    image, found = read(path)
    assert found == notes
    assert abs(image.mean() - frame[..., :3].mean() / (257 if frame.dtype == np.uint16 else 1)) < 1
    settings = VideoFolderSettings(source=str(tmp_path / "clips"), control_rate=5.0)
    report = VideoFolder(tmp_path / "out", settings).convert()
    assert [warning["message"] for warning in report["warnings"]] == [f"camera 'image': {note}" for note in notes]


@pytest.mark.parametrize(("pixels", "bits"), [("gray16le", 16), ("gray10le", 10)])
def test_depth_in_a_video_is_refused(tmp_path, pixels, bits):
    path = write_frames(tmp_path / "a.mkv", [np.full((24, 32), 900, np.uint16)] * 2, "gray16le", stored=pixels)
    with pytest.raises(images.NotRgbError, match=f"one channel of {bits} bits, as depth maps have"):
        read(path)


def encoded(image: np.ndarray, suffix: str = ".png") -> bytes:
    return cv2.imencode(suffix, image)[1].tobytes()


@pytest.mark.parametrize(
    "data",
    [
        encoded(np.full((8, 8), 900, np.uint16)),
        encoded(np.full((8, 8, 3), 900, np.uint16)),
        encoded(np.full((8, 8), 0.5, np.float32), ".tiff"),
        np.full((8, 8, 1), 900, np.uint16),
        np.full((8, 8, 3), 0.5, np.float32),
        np.full((2, 8, 8, 3), 90, np.uint8),
        np.full((8, 8), 90, np.uint8),
    ],
    ids=["png16", "rgb16", "tiff32", "uint16", "float", "stacked", "flat"],
)
def test_images_of_another_type_or_shape_are_refused(data):
    with pytest.raises(images.NotRgbError, match="an image has shape"):
        images.convert_stored(data, 64)


@pytest.mark.parametrize(
    ("data", "note"),
    [
        (encoded(np.full((8, 8), 90, np.uint8)), images.GREY),
        (encoded(np.full((8, 8), 90, np.uint8), ".jpg"), images.GREY),
        (encoded(np.full((8, 8, 4), 90, np.uint8)), images.TRANSPARENT),
        (encoded(np.full((8, 8, 4), 255, np.uint8)), ""),
        (np.full((8, 8, 1), 90, np.uint8), images.GREY),
        (encoded(np.full((8, 8, 3), 90, np.uint8)), ""),
        (encoded(np.full((8, 8, 3), 90, np.uint8), ".webp"), ""),
    ],
    ids=["grey png", "grey jpeg", "transparent", "opaque", "grey array", "png", "webp"],
)
def test_images_with_other_channels_are_noted(data, note):
    frame = images.convert_stored(data, 64)
    assert frame.note == note
    episode = images.make_episode("a", "a", 1.0, {"top": [frame, frame], "wrist": [frame, frame]})
    assert episode.notes == ((f"camera 'top': {note}", f"camera 'wrist': {note}") if note else ())


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_images_of_every_format(kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(quarters()).save(file, kind, exif=exif.tobytes())
    with Image.open(io.BytesIO(file.getvalue())) as image:
        expected = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    shown = images.decode_image(file.getvalue())
    assert shown.shape == expected.shape
    assert np.abs(shown.astype(int) - expected).mean() < 6
    # What is stored holds no orientation any more that a reader would apply, or not.
    frame = images.convert_stored(file.getvalue(), 64)
    with Image.open(io.BytesIO(frame.jpeg)) as image:
        assert image.getexif().get(0x0112, 1) == 1
        assert frame.size == image.size[::-1] == expected.shape[:2]


@pytest.mark.parametrize(
    ("pixels", "name", "fault"),
    [
        ("gray16le", "observation.images.wrist", "one channel of 16 bits"),
        ("gray", "observation.images.depth", DEPTH_NAME),
    ],
)
def test_depth_never_becomes_a_camera_of_lerobot(tmp_path, pixels, name, fault):
    source = write_v2(tmp_path / "data", cameras=(name, TOP))
    for path in source.glob(f"videos/*/{name}/*.mp4"):
        # FFmpeg goes by the content, not by the suffix.
        depth = np.full((24, 32), 90, np.uint16 if pixels == "gray16le" else np.uint8)
        write_frames(path.with_suffix(".mkv"), [depth] * 7, pixels).replace(path)
    report = LeRobot(tmp_path / "out", LeRobotSettings(source=str(source))).convert()
    (message,) = [warning["message"] for warning in report["warnings"]]
    assert message.startswith(f"camera {name!r} was left out: ") and fault in message
    chosen = LeRobotSettings(source=str(source), camera=(name.rpartition(".")[2],))
    with pytest.raises(ConversionError, match=fault):
        LeRobot(tmp_path / "other", chosen).convert()


def test_a_camera_of_depth_in_colours_is_not_the_main_one(tmp_path):
    source = write_v2(tmp_path / "data", cameras=("observation.images.depth", WRIST))
    builder = LeRobot(tmp_path / "out", LeRobotSettings(source=str(source)))
    assert list(builder.selection.cameras) == ["wrist", "depth"]
