"""What the headers of video files say."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence

import av
from etils import epath

from como_jax.doctor.findings import Finding, Severity, count_of, name_some, share_of

VIDEO_SUFFIXES = (".avi", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ts", ".webm", ".wmv")
AV1_DECODERS = ("libdav1d", "libaom-av1")


@dataclasses.dataclass(frozen=True)
class VideoHeader:
    """One video file.

    Attributes:
      codec: of the pictures, by the name of the format rather than of the decoder.
      height, width: of the pictures as they are shown.
      frame_rate: of the container, or None when it does not say.
    """

    codec: str
    height: int
    width: int
    frame_rate: float | None


def find_videos(folder: epath.Path) -> list[str]:
    """Files in a folder and below whose names are those of videos, relative to the folder."""
    found = []
    for parent, _, files in folder.walk():
        found += [(parent / name).relative_to(folder).as_posix() for name in files]
    return sorted(name for name in found if name.lower().endswith(VIDEO_SUFFIXES) and "/." not in f"/{name}")


def read_header(path: epath.PathLike) -> VideoHeader | None:
    """The header of a video file, or None if it cannot be read, which shows when its frames are."""
    try:
        # Playlists must not make FFmpeg open what they name.
        with (
            epath.Path(path).open("rb") as file,
            av.open(file, options={"protocol_whitelist": "none"}) as container,
        ):
            stream = container.streams.video[0]
            context = stream.codec_context
            codec = "av1" if context.name in AV1_DECODERS else context.name
            rate = stream.average_rate or stream.guessed_rate
            return VideoHeader(codec, context.height, context.width, float(rate) if rate else None)
    except (av.error.FFmpegError, OSError, ValueError, IndexError):
        return None


def describe_codecs(headers: Iterable[VideoHeader]) -> str:
    """Codecs and how many files have each."""
    counts = Counter(header.codec for header in headers)
    return ", ".join(f"{codec} ({count_of(count, 'file')})" for codec, count in counts.most_common())


def check_decoder(headers: Sequence[VideoHeader], available: Iterable[str] = av.codecs_available) -> list[Finding]:
    """Videos that not every decoder can read."""
    num_av1 = sum(header.codec == "av1" for header in headers)
    if not num_av1:
        return []
    decoders = [name for name in AV1_DECODERS if name in set(available)]
    here = f"this PyAV has {name_some(decoders)}" if decoders else "this PyAV has none"
    return [
        Finding(
            Severity.INFO if decoders else Severity.ERROR,
            "av1",
            f"AV1, the codec of {share_of(num_av1, len(headers), 'video')}, needs a decoder such as dav1d: {here}.",
            "Convert on a machine whose PyAV has it: the wheels from PyPI do; a system's FFmpeg or OpenCV may not.",
        )
    ]
