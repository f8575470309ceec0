"""Decodes video files with PyAV, which brings its own FFmpeg."""

from __future__ import annotations

import math
from collections.abc import Iterator

import av
import cv2
import numpy as np
from av.stream import Disposition
from etils import epath

from como_jax.convert.aperture import find_aperture
from como_jax.convert.images import GREY, TRANSPARENT, NotRgbError
from como_jax.convert.sources import check_file
from como_jax.convert.webp import AnimatedWebp, is_animated_webp

VIDEO_ERRORS: tuple[type[Exception], ...] = (av.error.FFmpegError, OSError, ValueError)
# Twice the pixels of 8K video. A header can claim any size, and a decoder holds several images of that size at once.
MAX_PIXELS = 2**26
AV1_DECODERS = ("libdav1d", "libaom-av1")
_COMPLETE_SHARE = 0.95
# H.264 and its successors hold back at most so many frames to reorder them.
_MAX_REORDERED = 16
_BITS = 8
# The tangent of an angle of one degree, below which FFmpeg does not turn an image.
_TILT = math.tan(math.radians(1))
# Covers of albums and previews of a player, which are no recordings.
_NO_RECORDING = Disposition.attached_pic | Disposition.timed_thumbnails | Disposition.still_image
# Pixels that are longer or wider than this are a mistake of the header.
_MAX_ASPECT = 4.0
# The names of FFmpeg for the transfer functions of HDR video, PQ and HLG.
_HDR = (16, 18)

DEEP = "the frames have more than 8 bits a channel, of which 8 were kept"
HDR = "the frames are of high dynamic range (HDR), and their colours look dull as RGB"
CROPPED = "the edges of the frames were cut off as players do, since the file says that they are not to be shown"
STRETCHED = "the frames were stretched as players do, since the file says that their pixels are not square"
TILTED = "the file asks to turn the frames by an angle that is not a multiple of 90 degrees: the nearest one counts"
SEVERAL_STREAMS = "the file has several video streams, of which the one that players show was read"


def open_video(path: epath.PathLike) -> VideoReader | AnimatedWebp:
    """Opens a file of moving images; raises like `VideoReader`."""
    check_file(epath.Path(path))
    return AnimatedWebp(path) if is_animated_webp(path) else VideoReader(path)


class VideoReader:
    """The frames of one video file, in order; use it in a `with` statement.

    Attributes:
      codec: name of the format of the images, such as `h264` or `av1`.
      height, width: size of the images as the header gives it.
      frame_rate: average frames per second according to the container, or None if it does not say.
      notes: what the user should know of how the frames became RGB images; complete after the first frame.
    """

    def __init__(self, path: epath.PathLike):
        """Opens the file.

        Raises:
          ValueError: the file has no video, or one with more than `MAX_PIXELS` pixels.
          av.error.FFmpegError, OSError: the file cannot be read or is of an unknown format.
        """
        check_file(epath.Path(path))
        # A Python file can also read from buckets. Playlists must not make FFmpeg open the files that they name.
        self._file = epath.Path(path).open("rb")
        try:
            # FFmpeg decodes the first images while it opens a file. The encoding of titles does not matter.
            options = {"protocol_whitelist": "none", "max_pixels": str(MAX_PIXELS)}
            self._container = av.open(self._file, options=options, metadata_errors="replace")
            self._stream = self._best_video()
        except BaseException:
            self._file.close()
            raise
        # The number of frames that come out before a damaged one depends on the number of threads, and what a
        # conversion writes must not depend on the machine. The cores are used by several processes.
        self._stream.thread_count = 1
        self._stream.codec_context.options = {"max_pixels": str(MAX_PIXELS)}
        self._size: tuple[int, int] | None = None
        self.notes = [SEVERAL_STREAMS] if len(self._recordings()) > 1 else []
        decoder = self._stream.codec_context.name
        self.codec = "av1" if decoder in AV1_DECODERS else decoder
        self._crop = find_aperture(self._file, self._stream.id, self._stream.height, self._stream.width)
        self.height, self.width = self._stream.height, self._stream.width
        rate = self._stream.average_rate or self._stream.guessed_rate
        self.frame_rate = float(rate) if rate else None

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()
        self._file.close()

    def frames(self) -> Iterator[np.ndarray]:
        """Yields RGB images, uint8 `[H, W, 3]`, upright; raises like `timed_frames`."""
        for _, image in self.timed_frames():
            yield image

    def timed_frames(self) -> Iterator[tuple[float | None, np.ndarray]]:
        """Yields the time of every frame in seconds, or None, and its RGB image, uint8 `[H, W, 3]`, upright.

        Raises:
          ValueError: a frame is damaged or of another size, or the file ends too early for its container.
          av.error.FFmpegError: the decoder failed.
        """
        count, first, last = 0, None, None
        try:
            for frame in self._decoded():
                image = self._image(frame, f"frame {count}")
                first = frame.time if first is None else first
                last = frame.time
                count += 1
                yield frame.time, image
        except av.error.InvalidDataError as error:
            announced = f", although {self._stream.frames} frames were announced" if self._stream.frames else ""
            raise ValueError(f"cannot be decoded after {count} frames{announced}") from error
        if count == 0:
            raise ValueError("no frame could be decoded")
        seconds = None if first is None or last is None else last - first
        self._check_complete(count, seconds)

    def frames_between(self, begin: float, end: float) -> Iterator[np.ndarray]:
        """Yields the RGB images, uint8 `[H, W, 3]`, that are shown from `begin` to `end` seconds.

        Raises:
          ValueError: a frame is damaged or of another size.
          av.error.FFmpegError: the decoder failed.
        """
        frame_seconds = 1 / self.frame_rate if self.frame_rate else 0.0
        # FFmpeg seeks by the time at which a frame is decoded, which is earlier than the time at which it is shown.
        target = max(0.0, begin - _MAX_REORDERED * frame_seconds)
        assert self._stream.time_base is not None
        self._container.seek(math.floor(target / self._stream.time_base), stream=self._stream)
        for frame in self._decoded():
            if frame.time is None or frame.time < begin:
                continue
            if frame.time >= end:
                return
            yield self._image(frame, f"the frame at {frame.time:.3f} s")

    def times(self) -> np.ndarray | None:
        """Returns the times of all frames in seconds, `[N]` in order, without decoding; None if there are none.

        Reads the file to its end: open it anew to read its frames.
        """
        packets = [packet for packet in self._container.demux(self._stream) if packet.size and not packet.is_discard]
        if not packets or self._stream.time_base is None or any(packet.pts is None for packet in packets):
            return None
        return np.sort([float(packet.pts * self._stream.time_base) for packet in packets])

    def _recordings(self) -> list[av.VideoStream]:
        return [stream for stream in self._container.streams.video if not stream.disposition & _NO_RECORDING]

    def _best_video(self) -> av.VideoStream:
        """Returns the video stream that players show; raises ValueError if there is none that can be decoded."""
        recordings = self._recordings()
        if not recordings:
            covers = "; it holds only a cover or a preview" if self._container.streams.video else ""
            raise ValueError(f"no video stream{covers}")
        best = self._container.streams.best("video")
        stream = best if best in recordings else max(recordings, key=lambda each: each.width * each.height)
        assert isinstance(stream, av.VideoStream)
        if stream.codec_context is None:
            raise ValueError("the codec of its video is not known")
        if stream.width * stream.height > MAX_PIXELS:
            raise ValueError(f"{stream.width}x{stream.height} pixels are more than the {MAX_PIXELS} that are read")
        return stream

    def _decoded(self) -> Iterator[av.VideoFrame]:
        try:
            yield from self._container.decode(self._stream)
        except av.error.ArgumentError as error:
            # A decoder says no more about a size that is too large and that the container did not announce.
            raise ValueError(f"{error}; images of more than {MAX_PIXELS} pixels are not read") from error

    def _image(self, frame: av.VideoFrame, name: str) -> np.ndarray:
        """Returns the RGB image of a frame, upright; raises ValueError if it cannot be used."""
        if frame.is_corrupt:
            raise ValueError(f"{name} is damaged")
        size = frame.width, frame.height
        if self._size not in (None, size):
            before = "x".join(map(str, self._size))
            raise ValueError(f"{name} has {size[0]}x{size[1]} pixels, and those before it have {before}")
        self._size = size
        return self._upright(self._stretched(self._shown(self._to_rgb(frame))), frame)

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _to_rgb(self, frame: av.VideoFrame) -> np.ndarray:
        """Returns the stored image as RGB; raises NotRgbError if it is something else, such as a depth map."""
        components = frame.format.components
        colours = [component for component in components if not component.is_alpha]
        bits = max(component.bits for component in colours)
        is_grey = len(colours) == 1 and not frame.format.has_palette
        if is_grey and bits > _BITS:
            what = f"its frames have one channel of {bits} bits"
            raise NotRgbError(f"{what}, as depth maps have; only RGB images and grey ones of 8 bits are converted")
        for note, applies in ((GREY, is_grey), (DEEP, bits > _BITS), (HDR, frame.color_trc in _HDR)):
            if applies:
                self._note(note)
        if len(colours) < len(components):
            image = frame.to_ndarray(format="rgba")
            if image[..., 3].min() < np.iinfo(np.uint8).max:
                self._note(TRANSPARENT)
            return np.ascontiguousarray(image[..., :3])
        return frame.to_ndarray(format="rgb24")

    def _shown(self, image: np.ndarray) -> np.ndarray:
        """Cuts off the edges that the file says are not to be shown."""
        if self._crop is None:
            return image
        self._note(CROPPED)
        return np.ascontiguousarray(image[self._crop])

    def _stretched(self, image: np.ndarray) -> np.ndarray:
        """Makes the pixels square, by adding pixels along the side on which they are longer."""
        aspect = float(self._stream.sample_aspect_ratio or 1)
        height, width = image.shape[:2]
        size = round(width * max(aspect, 1)), round(height / min(aspect, 1))
        if size == (width, height) or not 1 / _MAX_ASPECT <= aspect <= _MAX_ASPECT:
            return image
        self._note(STRETCHED)
        return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR)

    def _upright(self, image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
        """Turns and mirrors an image as the file asks; phones, for example, store portrait video on its side."""
        stored = frame.side_data.get("DISPLAYMATRIX")
        if stored is None:
            return image
        # A pixel at column x and row y is shown at column a x + c y and row b x + d y.
        a, b, _, c, d = np.frombuffer(bytes(stored), np.int32, 5).astype(np.float64)
        if min(abs(a) + abs(d), abs(b) + abs(c)) > _TILT * max(abs(a) + abs(d), abs(b) + abs(c)):
            self._note(TILTED)
        if abs(b) + abs(c) > abs(a) + abs(d):
            image, a, d = image.swapaxes(0, 1), c, b
        return np.ascontiguousarray(image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1])

    def _check_complete(self, count: int, seconds: float | None) -> None:
        """Raises ValueError if the stream ended clearly before the end that its container announces."""
        expected = self._stream.frames
        duration = self._container.duration
        if self._stream.codec_context.name == "gif":
            self._check_gif_trailer(count)
        elif duration and seconds is not None and (expected or len(self._container.streams) == 1):
            # A trimmed video may keep hidden frames, and sound may be longer than the images. So if both the number
            # of frames and the duration are known, both must show that the end is missing.
            frame_seconds = 1 / self.frame_rate if self.frame_rate else 0.0
            full_seconds = duration / av.time_base
            too_short = seconds + frame_seconds < _COMPLETE_SHARE * full_seconds
            if too_short and (not expected or count < _COMPLETE_SHARE * expected):
                announced = f"{expected} frames" if expected else f"{full_seconds:.1f} s"
                raise ValueError(f"ends after {count} frames, although {announced} were announced")

    def _check_gif_trailer(self, count: int) -> None:
        # A GIF does not say how many frames it has, but its last byte is always the same.
        self._file.seek(-min(64, self._file.seek(0, 2)), 2)
        if not self._file.read().rstrip(b"\0\r\n").endswith(b";"):
            raise ValueError(f"ends in the middle, after {count} frames")
