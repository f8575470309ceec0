"""Builder for a folder of videos."""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import TypeVar

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import (
    MIN_STEPS,
    ConversionError,
    EpisodeBuilder,
    LeftOut,
    Settings,
    SourceError,
    StepLayout,
    Warned,
    check_control_rate,
)
from como_jax.convert.listing import NOT_UTF8, Listing, list_files, num_bytes
from como_jax.convert.sources import Source
from como_jax.convert.video import VIDEO_ERRORS, VideoReader
from como_jax.convert.video_folder.sidecar import SIDECAR_SUFFIXES, Instructions, read_instructions
from como_jax.data.schema import Episode, Step
from como_jax.names import DEFAULT_CAMERA

T = TypeVar("T")

# FFmpeg takes some of these for video, or would be asked in vain about thousands of files.
IGNORED_SUFFIXES = (
    *SIDECAR_SUFFIXES,
    *(
        ".jsonl",
        ".tsv",
        ".txt",
        ".md",
        ".rst",
        ".log",
        ".yaml",
        ".yml",
        ".toml",
        ".ini",
        ".cfg",
        ".xml",
        ".html",
    ),
    *(".srt", ".vtt", ".ass", ".py", ".sh", ".npy", ".npz", ".parquet", ".pdf", ".m3u8"),
)
GUESSED_RATE = "without --control_rate, the frame rate of the container counts, which for robot clips is often wrong"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoFolderSettings(Settings):
    """Settings of `VideoFolder`.

    Attributes:
      source: folder that is searched for videos, with all folders below.
      control_rate: steps per second (Hz), one step a frame; None for the frame rate of each container.
      frame_stride: only every so many frames become a step, and the control rate is divided accordingly.
      clip_seconds: longer videos are cut into consecutive episodes of this length.
    """

    source: str
    control_rate: float | None = None
    frame_stride: int = 1
    clip_seconds: float = 20.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.control_rate is not None:
            check_control_rate(self.control_rate)
        if self.frame_stride < 1:
            raise ConversionError(f"frame_stride must be 1 or more, got {self.frame_stride}")
        if not (math.isfinite(self.clip_seconds) and self.clip_seconds > 0):
            raise ConversionError(f"clip_seconds must be a positive number, got {self.clip_seconds}")


class VideoFolder(EpisodeBuilder):
    """Every file in a folder that has moving pictures, cut into clips."""

    settings_class = VideoFolderSettings
    settings: VideoFolderSettings
    decoder_errors = VIDEO_ERRORS

    @property
    def layout(self) -> StepLayout:
        """One camera and nothing else."""
        return StepLayout()

    def sources(self) -> list[Source]:
        """One source a file.

        Raises:
          ConversionError: there is no folder, or nothing in it.
        """
        root = epath.Path(self.settings.source)
        if not root.is_dir():
            raise ConversionError(f"source folder {root} does not exist")
        names = [name for name in self._listing.files if not name.lower().endswith(IGNORED_SUFFIXES)]
        if not names:
            raise ConversionError("; ".join([f"source folder {root} holds no video", *self._listing.warnings]))
        return [Source(name, num_bytes=num_bytes(root / name)) for name in names]

    def warnings(self) -> list[str]:
        """What was not looked into, and not understood in the sidecar files."""
        return [*self._listing.warnings, *self._instructions.warnings]

    def episodes(self, source: Source) -> Iterator[Episode | LeftOut | Warned]:
        """The clips of one file, in order."""
        if source.path in self._listing.unreadable:
            raise SourceError(NOT_UTF8)
        with VideoReader(epath.Path(self.settings.source) / source.path) as reader:
            if self.settings.control_rate is None:
                yield Warned(GUESSED_RATE)
            rate = self._control_rate(reader)
            clips = split_clips(self._frames(reader), max(MIN_STEPS, round(rate * self.settings.clip_seconds)))
            for index, clip in enumerate(clips):
                steps = [Step({DEFAULT_CAMERA: jpeg}) for jpeg, _ in clip]
                yield Episode(
                    episode_id=f"{source.path}/{index:05d}",
                    source_file=source.path,
                    control_rate=rate,
                    steps=steps,
                    motion=images.motion([thumbnail for _, thumbnail in clip]),
                    language_instruction=self._instructions.by_name.get(source.path, ""),
                )

    def _control_rate(self, reader: VideoReader) -> float:
        rate = self.settings.control_rate or reader.frame_rate
        if rate is None:
            raise SourceError("the container gives no frame rate; set --control_rate")
        return rate / self.settings.frame_stride

    def _frames(self, reader: VideoReader) -> Iterator[tuple[bytes, np.ndarray]]:
        """JPEG and thumbnail of every frame that becomes a step."""
        for index, frame in enumerate(reader.frames()):
            if index % self.settings.frame_stride == 0:
                frame = images.shrink(frame, self.settings.image_size)
                yield images.encode_jpeg(frame), images.thumbnail(frame)

    @functools.cached_property
    def _listing(self) -> Listing:
        return list_files(epath.Path(self.settings.source))

    @functools.cached_property
    def _instructions(self) -> Instructions:
        sidecars = [name for name in self._listing.files if name.lower().endswith(SIDECAR_SUFFIXES)]
        return read_instructions(epath.Path(self.settings.source), sidecars, [s.path for s in self.sources()])


def split_clips(frames: Iterator[T], length: int) -> Iterator[list[T]]:
    """Cuts a stream into lists of `length`, the last of which may be shorter, or longer by one."""
    clip: list[T] = []
    for frame in frames:
        clip.append(frame)
        # A clip is let go when two frames follow it, so that no frame is left alone at the end.
        if len(clip) == length + MIN_STEPS:
            yield clip[:length]
            clip = clip[length:]
    if clip:
        yield clip
