"""Builder for a folder of videos, or of folders of numbered images."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TypeVar

import numpy as np
from etils import epath

from como_jax.convert import images
from como_jax.convert.builder import MIN_STEPS, Item, LeftOut, SourceError, StepLayout, Warned
from como_jax.convert.folder import FolderBuilder, FolderSettings, num_bytes
from como_jax.convert.images import Frame
from como_jax.convert.labels import SIDECAR_SUFFIXES
from como_jax.convert.settings import RATE, number, positive, setting
from como_jax.convert.sources import Source, check_file
from como_jax.convert.timing import jumps, regular_steps, uneven_rate
from como_jax.convert.video import VIDEO_ERRORS, VideoReader, open_video
from como_jax.convert.webp import AnimatedWebp, is_animated
from como_jax.data.schema import Episode
from como_jax.errors import one_line
from como_jax.names import DEFAULT_CAMERA

T = TypeVar("T")

# FFmpeg takes some of these for video, and there may be thousands of them, which need not be opened.
IGNORED_SUFFIXES = (
    *SIDECAR_SUFFIXES,
    *(".txt", ".md", ".rst", ".log", ".yaml", ".yml", ".toml", ".ini", ".cfg", ".xml", ".html"),
    *(".srt", ".vtt", ".ass", ".py", ".sh", ".npy", ".npz", ".parquet", ".pdf", ".m3u8"),
)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
# A number at the end of the name, as in `left_v2_001.png`, or else the only number in it, as in `001_left.png`.
_NUMBERED = (
    re.compile(r"(?P<prefix>.*?)(?P<number>[0-9]{1,18})(?P<tail>)(?P<suffix>\.[A-Za-z]+)", re.DOTALL),
    re.compile(r"(?P<prefix>[^0-9]*)(?P<number>[0-9]{1,18})(?P<tail>[^0-9]*)(?P<suffix>\.[A-Za-z]+)"),
)
UNEVEN_NUMBERS = "the numbers of some images are not one step apart: there an episode ends, and another begins"
UNEVEN = "its frames are not shown equally long: some were repeated or left out, and a pause ends an episode"
UNEVEN_AT_RATE = "its frames are not shown equally long, but `control_rate` counts each of them as one step"
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
    language: str | None = setting(
        "field of the label files that holds the text; '' for none [the first of the usual ones]", None
    )


class VideoFolder(FolderBuilder):
    """Every file in a folder that holds a video, and every series of numbered images, cut into clips."""

    settings_class = VideoFolderSettings
    settings: VideoFolderSettings
    decoder_errors = VIDEO_ERRORS
    contents = "video"

    @property
    def layout(self) -> StepLayout:
        return StepLayout()

    @functools.cached_property
    def names(self) -> list[str]:
        """The files that may be videos; raises ConversionError if there are none, and no series of images."""
        members = {name for series in self.series.values() for name in series}
        names = [name for name in self.listing.files if self.is_wanted(name) and name not in members]
        return names if self.series else super().names

    @functools.cached_property
    def series(self) -> dict[str, list[str]]:
        """The numbered images of every series, by its name."""
        found = find_series(self.listing.files, self.root.name)
        # Of numbered files that are animated, each is a video.
        return {name: members for name, members in found.items() if not _is_animated(self.root / members[0])}

    @property
    def language_field(self) -> str | None:
        """What the user asked for."""
        return self.settings.language

    def is_wanted(self, name: str) -> bool:
        """Any file may be a video, but for those whose names say that they are something else."""
        return not name.lower().endswith(IGNORED_SUFFIXES)

    def sources(self) -> list[Source]:
        """One source a file, and one a series of images."""
        sizes = {name: num_bytes(self.root / members[0]) * len(members) for name, members in self.series.items()}
        splits = {name: self.splits.get(members[0]) for name, members in self.series.items()}
        series = [Source(name, splits[name], num_bytes=size) for name, size in sizes.items()]
        return sorted([*super().sources(), *series], key=lambda source: source.path)

    def warnings(self) -> list[str]:
        """Folders that were not looked into, label files that were not understood, and series of images."""
        messages = [*super().warnings(), *self.instructions.warnings]
        known, paths = self.instructions.by_name, [source.path for source in self.sources()]
        without = [path for path in paths if path not in known]
        if known and without:
            messages.append(f"{len(without)} of {len(paths)} videos have no instruction, such as {without[0]!r}")
        if self.series:
            first = next(iter(self.series))
            messages.append(f"{len(self.series)} series of numbered images were read as videos, such as {first!r}")
        return messages

    def label_files(self) -> list[str]:
        """The files of the folder that hold labels, or look as if they did."""
        return self.instructions.label_files

    def episodes(self, source: Source) -> Iterator[Item]:
        """The clips of one file or series, in order."""
        if source.path in self.series:
            yield from self._series_episodes(source)
            return
        uneven = uneven_rate(_times(self.path(source)))
        if self.settings.control_rate is None:
            yield Warned(GUESSED_RATE)
        if uneven is not None:
            yield Warned(UNEVEN if self.settings.control_rate is None else UNEVEN_AT_RATE)
        with open_video(self.path(source)) as reader:
            if uneven is None or self.settings.control_rate is not None:
                yield from self._clips(source, self._frames(reader), self._control_rate(reader.frame_rate))
            else:
                yield from self._uneven_clips(source, reader, uneven)

    def _uneven_clips(self, source: Source, reader: VideoReader | AnimatedWebp, frame_rate: float) -> Iterator[Episode]:
        """Yields episodes of a video by the times of its frames, of which `frame_rate` is the usual number a second."""
        count = 0
        for _, steps in itertools.groupby(self._steps(reader, frame_rate), key=lambda step: step[0]):
            frames = (frame for _, frame in steps)
            for episode in self._clips(source, frames, self._control_rate(frame_rate), count):
                count += 1
                yield episode

    def _clips(self, source: Source, frames: Iterator[Frame], rate: float, first: int = 0) -> Iterator[Episode]:
        """Yields episodes of frames that follow each other; `first` is the number of the first one."""
        length = max(MIN_STEPS, round(rate * self.settings.clip_seconds))
        language = self.instructions.by_name.get(source.path, "")
        for index, clip in enumerate(split_clips(frames, length), first):
            name, shown = f"{source.path}/{index:05d}", {DEFAULT_CAMERA: clip}
            yield images.make_episode(name, source.path, rate, shown, language=language)

    def _series_episodes(self, source: Source) -> Iterator[Item]:
        """The clips of a series of images; one that cannot be used ends a clip, and the next one begins another."""
        rate = self._control_rate(None)
        members = self.series[source.path]
        starts = jumps(np.array([*map(number_of, members)]))
        if starts:
            yield Warned(UNEVEN_NUMBERS)
        count, alone = 0, []
        for first, stop in itertools.pairwise([0, *starts, len(members)]):
            names = members[first : stop : self.settings.frame_stride]
            if len(names) < MIN_STEPS:
                alone += names
                continue
            for item in self._run_episodes(source, names, rate, count):
                count += isinstance(item, Episode)
                yield item
        if alone:
            named = alone[0].rpartition("/")[2]
            yield LeftOut(f"{len(alone)} image(s) have no neighbour one step before or after, such as {named}")

    def _run_episodes(self, source: Source, names: Sequence[str], rate: float, first: int) -> Iterator[Item]:
        """The clips of images whose numbers follow each other; `first` is the number of the first clip."""
        count, position = first, 0
        while position < len(names):
            run = _Run(self.root, names[position:], self.settings.image_size)
            for episode in self._clips(source, run.frames(), rate, count):
                count += 1
                yield episode
            if run.fault:
                yield LeftOut(run.fault)
            position += run.num_read

    def _control_rate(self, frame_rate: float | None) -> float:
        rate = self.settings.control_rate or frame_rate
        if rate is None:
            raise SourceError("it gives no frame rate; set `control_rate`")
        return rate / self.settings.frame_stride

    def _steps(self, reader: VideoReader | AnimatedWebp, frame_rate: float) -> Iterator[tuple[int, Frame]]:
        """Yields the frame of every step, and the number of the recording between two pauses that it belongs to."""
        before, frame = None, None
        for recording, step, image in regular_steps(reader.timed_frames(), frame_rate):
            if step % self.settings.frame_stride == 0:
                # An image that is shown for several steps is encoded once.
                if frame is None or image is not before:
                    frame = images.make_frame(image, self.settings.image_size, "; ".join(reader.notes))
                before = image
                yield recording, frame

    def _frames(self, reader: VideoReader | AnimatedWebp) -> Iterator[Frame]:
        """Yields the frames that become steps."""
        for index, image in enumerate(reader.frames()):
            if index % self.settings.frame_stride == 0:
                yield images.make_frame(image, self.settings.image_size, "; ".join(reader.notes))


def _times(path: epath.Path) -> np.ndarray | None:
    """Returns the times of the frames of a video, or None; damage shows when the frames are read."""
    with open_video(path) as reader:
        try:
            return reader.times()
        except VIDEO_ERRORS:
            return None


def _is_animated(path: epath.Path) -> bool:
    try:
        check_file(path)
        return is_animated(path)
    except VIDEO_ERRORS:
        return False


class _Run:
    """Images of a series up to the first one that cannot be used.

    Attributes:
      num_read: how many images were looked at so far.
      fault: what is wrong with the one that ended the run, or ''.
    """

    def __init__(self, root: epath.Path, names: Sequence[str], image_size: int):
        self.num_read, self.fault = 0, ""
        self._root, self._names, self._image_size = root, names, image_size

    def frames(self) -> Iterator[Frame]:
        """Yields the frames."""
        size = None
        for name in self._names:
            self.num_read += 1
            try:
                check_file(self._root / name)
                decoded = images.decode((self._root / name).read_bytes())
                if size not in (None, decoded.image.shape):
                    raise ValueError("it has another size than the images before it")
            except images.NotRgbError:
                # They will all be so.
                raise
            except (OSError, ValueError) as error:
                self.fault = f"{name.rpartition('/')[2]}: {one_line(error)}"
                return
            size = decoded.image.shape
            yield images.make_frame(decoded.image, self._image_size, decoded.note)


def find_series(files: Sequence[str], root_name: str) -> dict[str, list[str]]:
    """Finds the series of numbered images among files: same folder, same name before the number, same suffix.

    A series is called by its folder if there is no other series in it.

    Returns:
      The images of every series in the order of their numbers, by its name.
    """
    groups: dict[tuple[str, str], list[str]] = {}
    for file in files:
        match = _numbered(file)
        if match and match["suffix"].lower() in IMAGE_SUFFIXES:
            pattern = f"{match['prefix']}*{match['tail']}{match['suffix'].lower()}"
            groups.setdefault((file.rpartition("/")[0], pattern), []).append(file)
    groups = {key: members for key, members in groups.items() if len(members) >= MIN_STEPS}
    in_folder = collections.Counter(folder for folder, _ in groups)
    series = {}
    for (folder, pattern), members in groups.items():
        name = f"{folder or root_name}/{pattern}" if in_folder[folder] > 1 else folder or root_name
        series[name] = sorted(members, key=lambda member: (number_of(member), member))
    return series


def number_of(image: str) -> int:
    """Returns the number in the name of an image of a series."""
    match = _numbered(image)
    assert match is not None
    return int(match["number"])


def _numbered(image: str) -> re.Match[str] | None:
    name = image.rpartition("/")[2]
    return _NUMBERED[0].fullmatch(name) or _NUMBERED[1].fullmatch(name)


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
