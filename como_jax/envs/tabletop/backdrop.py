"""The table top and the wall behind it, plain or with a pattern that differs from episode to episode."""

import cv2
import numpy as np

from como_jax.envs.tabletop.canvas import Canvas, Colour, shaded

_TABLE: Colour = (214, 204, 188)
_WALL: Colour = (128, 142, 156)
_CORNERS = np.array([[-0.42, -0.5, 0.0], [0.42, -0.5, 0.0], [0.42, 0.34, 0.0], [-0.42, 0.34, 0.0]])
_TEXTURE_SIZE = 192


def draw_backdrop(canvas: Canvas, textured: bool, rng: np.random.Generator) -> None:
    """Fills the canvas with the wall and the table.

    Args:
        canvas: overwritten.
        textured: whether to draw random patterns instead of plain colours.
        rng: chooses the patterns.
    """
    height, width = canvas.pixels.shape[:2]
    if not textured:
        canvas.pixels[:] = _WALL
        canvas.polygon(_CORNERS - (0.0, 0.0, 0.02), shaded(_TABLE, 0.6))
        canvas.polygon(_CORNERS, _TABLE)
        return
    cv2.resize(_sample_texture(rng), (width, height), dst=canvas.pixels, interpolation=cv2.INTER_LINEAR)
    corners = canvas.camera.project(_CORNERS)[0].astype(np.float32)
    end = _TEXTURE_SIZE - 1
    source = np.array([[0, end], [end, end], [end, 0], [0, 0]], np.float32)
    transform = cv2.getPerspectiveTransform(source, corners)
    cv2.warpPerspective(
        _sample_texture(rng), transform, (width, height), canvas.pixels, borderMode=cv2.BORDER_TRANSPARENT
    )


def _sample_texture(rng: np.random.Generator) -> np.ndarray:
    """A random pattern, uint8 [_TEXTURE_SIZE, _TEXTURE_SIZE, 3]: stripes, checks or clouds of two colours."""
    first, second = rng.uniform(60, 235, (2, 3))
    axis = np.arange(_TEXTURE_SIZE) / _TEXTURE_SIZE
    angle, frequency = rng.uniform(0, np.pi), rng.uniform(4, 12)
    along = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
    across = np.cos(angle) * axis[:, None] - np.sin(angle) * axis[None, :]
    kind = rng.integers(3)
    if kind == 0:
        pattern = (np.sin(2 * np.pi * frequency * along) > 0).astype(np.float64)
    elif kind == 1:
        pattern = (np.sin(2 * np.pi * frequency * along) * np.sin(2 * np.pi * frequency * across) > 0) * 1.0
    else:
        pattern = _clouds(rng)
    pattern = 0.6 * pattern + 0.4 * _clouds(rng)
    return (first + (second - first) * pattern[..., None]).astype(np.uint8)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Smooth noise in [0, 1], [_TEXTURE_SIZE, _TEXTURE_SIZE]."""
    size = (_TEXTURE_SIZE, _TEXTURE_SIZE)
    octaves = [cv2.resize(rng.uniform(size=(n, n)), size, interpolation=cv2.INTER_LINEAR) for n in (4, 9, 24, 60)]
    return sum(octaves) / len(octaves)
