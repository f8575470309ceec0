"""Builder for a folder of videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TypeVar

from como_jax.convert import images
from como_jax.convert.builder import MIN_STEPS, Item, SourceError, StepLayout, Warned
from como_jax.convert.folder import SIDECAR_SUFFIXES, FolderBuilder, FolderSettings
from como_jax.convert.images import Frame
from como_jax.convert.settings import RATE, number, positive, setting
from como_jax.convert.sources import Source
from como_jax.convert.video import VIDEO_ERRORS, VideoReader
from como_jax.names import DEFAULT_CAMERA

T = TypeVar("T")

# FFmpeg takes some of these for video, and there may be thousands of them, which need not be opened.
IGNORED_SUFFIXES = (
    *SIDECAR_SUFFIXES,
    *(".jsonl", ".tsv", ".txt", ".md", ".rst", ".log", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml", ".html"),
    *(".srt", ".vtt", ".ass", ".py", ".sh", ".npy", ".npz", ".parquet", ".pdf", ".m3u8"),
)
GUESSED_RATE = "without `control_rate`, the frame rate of the container counts, which for robot clips is often wrong"


@dataclasses.dataclass(frozen=True, kw_only=True)
class VideoFolderSettings(FolderSettings):
    """Settings of `VideoFolder`."""

    control_rate: float | None = setting(
        "steps per second (Hz), one step a frame [the frame rate of each container]", None, RATE
    )
    frame_stride: int = setting(
        "only every so many frames become a step, and the control rate is divided", 1, number(1)
    )
    clip_seconds: float = setting("longer videos are cut into episodes of this length", 20.0, positive())


class VideoFolder(FolderBuilder):
    """Every file in a folder that holds a video, cut into clips."""

    settings_class = VideoFolderSettings
    settings: VideoFolderSettings
    decoder_errors = VIDEO_ERRORS
    contents = "video"

    @property
    def layout(self) -> StepLayout:
        return StepLayout()

    def is_wanted(self, name: str) -> bool:
        """Any file may be a video, but for those whose names say that they are something else."""
        return not name.lower().endswith(IGNORED_SUFFIXES)

    def warnings(self) -> list[str]:
        """Folders that were not looked into, and sidecar files that were not understood."""
        return [*self.listing.warnings, *self.instructions.warnings]

    def episodes(self, source: Source) -> Iterator[Item]:
        """The clips of one file, in order."""
        with VideoReader(self.path(source)) as reader:
            if self.settings.control_rate is None:
                yield Warned(GUESSED_RATE)
            rate = self._control_rate(reader)
            clips = split_clips(self._frames(reader), max(MIN_STEPS, round(rate * self.settings.clip_seconds)))
            language = self.instructions.by_name.get(source.path, "")
            for index, clip in enumerate(clips):
                name, frames = f"{source.path}/{index:05d}", {DEFAULT_CAMERA: clip}
                yield images.make_episode(name, source.path, rate, frames, language=language)

    def _control_rate(self, reader: VideoReader) -> float:
        rate = self.settings.control_rate or reader.frame_rate
        if rate is None:
            raise SourceError("the container gives no frame rate; set `control_rate`")
        return rate / self.settings.frame_stride

    def _frames(self, reader: VideoReader) -> Iterator[Frame]:
        """Yields the frames that become steps."""
        for index, image in enumerate(reader.frames()):
            if index % self.settings.frame_stride == 0:
                yield images.make_frame(image, self.settings.image_size, "; ".join(reader.notes))


def split_clips(frames: Iterator[T], length: int) -> Iterator[list[T]]:
    """Cuts a stream into lists of `length`; the last one may be shorter, or longer by one."""
    clip: list[T] = []
    for frame in frames:
        clip.append(frame)
        # A clip is yielded when two more frames are there, so that no frame is left alone at the end.
        if len(clip) == length + MIN_STEPS:
            yield clip[:length]
            clip = clip[length:]
    if clip:
        yield clip
