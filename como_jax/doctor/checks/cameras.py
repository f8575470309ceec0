"""Checks of pictures."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from como_jax.doctor.findings import Finding, Severity, share_of
from como_jax.doctor.survey import CameraSummary, Survey

BLACK = 8
"""A picture without a larger value is black; compression leaves some noise."""

_UNIFORM_CONTRAST = 1.0
_FROZEN_CHANGE = 0.02


def is_black(camera: CameraSummary) -> bool:
    """Whether no probed picture shows anything but black."""
    return camera.brightest < BLACK


def check_same_cameras(survey: Survey) -> Iterator[Finding]:
    """Cameras that some episodes have and others lack."""
    for camera in _cameras(survey):
        having = sum(camera in episode.cameras for episode in survey.episodes)
        if having < len(survey.episodes):
            yield Finding(
                Severity.WARNING,
                "missing-camera",
                f"Camera {camera!r} is only in {share_of(having, len(survey.episodes), 'episode')}.",
                "Convert the dataset without this camera, or without these episodes.",
            )


def check_resolutions(survey: Survey) -> Iterator[Finding]:
    """Cameras whose pictures differ in size."""
    for camera, summaries in _cameras(survey).items():
        sizes = sorted({(summary.resolution[1], summary.resolution[0]) for summary in summaries})
        if len(sizes) > 1:
            shapes = len({round(width / height, 2) for width, height in sizes})
            yield Finding(
                Severity.INFO,
                "mixed-resolutions",
                f"Pictures of camera {camera!r} have {len(sizes)} sizes, from {sizes[0][0]}x{sizes[0][1]} to "
                f"{sizes[-1][0]}x{sizes[-1][1]}, and {shapes} aspect ratio{'s' if shapes > 1 else ''}.",
                "Training scales all to one square; --config.data.fit chooses between cropping and padding.",
            )


def check_black(survey: Survey) -> Iterator[Finding]:
    """Cameras that show black, or one colour."""
    yield from _check_each(survey, "black-camera", "is black", is_black)
    yield from _check_each(
        survey,
        "uniform-camera",
        "shows one colour only",
        lambda camera: camera.contrast < _UNIFORM_CONTRAST and not is_black(camera),
    )


def check_frozen(survey: Survey) -> Iterator[Finding]:
    """Cameras whose picture never changes."""

    def is_frozen(camera: CameraSummary) -> bool:
        return camera.change < _FROZEN_CHANGE and camera.contrast >= _UNIFORM_CONTRAST and not is_black(camera)

    yield from _check_each(survey, "frozen-camera", "shows the same picture from beginning to end", is_frozen)


def _check_each(survey: Survey, name: str, what: str, is_faulty: Callable[[CameraSummary], bool]) -> Iterator[Finding]:
    for position, (camera, summaries) in enumerate(_cameras(survey).items()):
        faulty = sum(map(is_faulty, summaries))
        if faulty:
            everywhere = faulty == len(summaries)
            yield Finding(
                Severity.ERROR if everywhere and position == 0 else Severity.WARNING,
                name,
                f"Camera {camera!r} {what} in {share_of(faulty, len(summaries), 'episode')}.",
                "Leave this camera out with --camera when converting."
                if everywhere
                else "Look at the sample strips; leave this camera, or these episodes, out when converting.",
            )


def _cameras(survey: Survey) -> dict[str, list[CameraSummary]]:
    """Summaries of every camera, the main one first."""
    found: dict[str, list[CameraSummary]] = {}
    for episode in survey.episodes:
        for camera, summary in episode.cameras.items():
            found.setdefault(camera, []).append(summary)
    return found
