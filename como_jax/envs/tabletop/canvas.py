"""Drawing of simple shaded solids in perspective.

Everything is drawn without anti-aliasing on a canvas several times larger than the image, whose reduction
smooths all edges alike. That is faster than anti-aliased polygons and keeps thin gaps between them open.
"""

import math

import cv2
import numpy as np

Colour = tuple[int, int, int]

_FRACTION_BITS = 4


def _arc(start: float, end: float, count: int) -> np.ndarray:
    angles = np.linspace(start, end, count)
    return np.stack([np.cos(angles), np.sin(angles)], 1)


_CIRCLE = _arc(0.0, 1.9 * math.pi, 20)
_HALF_CIRCLE = _arc(-math.pi / 2, math.pi / 2, 11)


class Camera:
    """A fixed pinhole camera that looks down on the table, slightly from the right.

    Because of the turn to the side, motions along x, y and z lead in different directions in the image.
    """

    TARGET = np.array([0.01, 0.06, 0.06])
    DISTANCE = 1.5
    PITCH = math.radians(42)
    YAW = math.radians(20)
    FIELD = 0.63
    """Width that fills the image at the distance of the target, in metres."""

    def __init__(self, size: int, margin: int):
        """Sets the scale.

        Args:
            size: width of the image on the canvas, in pixels.
            margin: pixels of canvas on each side of the image.
        """
        back = np.array(
            [
                math.sin(self.YAW) * math.cos(self.PITCH),
                -math.cos(self.YAW) * math.cos(self.PITCH),
                math.sin(self.PITCH),
            ]
        )
        right = np.array([math.cos(self.YAW), math.sin(self.YAW), 0.0])
        down = np.cross(right, back)
        self.position = self.TARGET + self.DISTANCE * back
        self.focal = size / self.FIELD * self.DISTANCE
        rotation = np.stack([right, down, -back])
        intrinsics = np.array([[self.focal, 0, size / 2 + margin], [0, self.focal, size / 2 + margin], [0, 0, 1]])
        matrix = intrinsics @ rotation
        self._linear = matrix.T
        self._offset = -matrix @ self.position

    def project(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [N, 2] and pixels per metre [N] for points [N, 3] in metres."""
        image = points @ self._linear + self._offset
        depth = image[:, 2:]
        return image[:, :2] / depth, self.focal / depth[:, 0]


class Canvas:
    """An RGB image, uint8 [H, W, 3], and the camera through which solids are drawn on it."""

    def __init__(self, pixels: np.ndarray, camera: Camera):
        self.pixels = pixels
        self.camera = camera

    def polygon(self, points: np.ndarray, colour: Colour) -> None:
        """Fills a convex polygon with corners [N, 3]."""
        self._fill(self.camera.project(points)[0], colour)

    def disc(self, centre: np.ndarray, radius: float, colour: Colour) -> None:
        """Fills a level disc."""
        self.polygon(level_circle(centre, radius), colour)

    def box(self, low: np.ndarray, high: np.ndarray, colour: Colour) -> None:
        """Draws a box given by two opposite corners; its top is brightest and its side darkest."""
        x0, y0, z0 = low
        x1, y1, z1 = high
        side = x1 if self.camera.position[0] > (x0 + x1) / 2 else x0
        corners = np.array(
            [
                [x0, y0, z0], [x1, y0, z0], [x1, y0, z1], [x0, y0, z1],
                [side, y0, z0], [side, y1, z0], [side, y1, z1], [side, y0, z1],
                [x0, y0, z1], [x1, y0, z1], [x1, y1, z1], [x0, y1, z1],
            ]
        )  # fmt: skip
        pixels = self.camera.project(corners)[0]
        for face, light in ((0, 0.82), (1, 0.62), (2, 1.0)):
            self._fill(pixels[4 * face : 4 * face + 4], shaded(colour, light))

    def cylinder(self, base: np.ndarray, radius: float, height: float, colour: Colour) -> None:
        """Draws an upright cylinder with a bright top."""
        bottom = level_circle(base, radius)
        top = bottom + (0.0, 0.0, height)
        pixels = self.camera.project(np.concatenate([bottom, top]))[0]
        hull = cv2.convexHull(pixels.astype(np.float32))[:, 0]
        self._fill(hull, shaded(colour, 0.72))
        self._fill(pixels[len(bottom) :], colour)

    def ball(self, centre: np.ndarray, radius: float, colour: Colour) -> None:
        """Draws a ball with a highlight."""
        pixels, scale = self.camera.project(centre[None])
        radius = radius * scale[0]
        self._circle(pixels[0], radius, shaded(colour, 0.72))
        self._circle(pixels[0] + radius * np.array([-0.13, -0.17]), 0.76 * radius, colour)
        self._circle(pixels[0] + radius * np.array([-0.3, -0.38]), 0.26 * radius, lightened(colour, 0.6))

    def limb(self, start: np.ndarray, end: np.ndarray, radii: tuple[float, float], colour: Colour) -> None:
        """Draws a rounded, tapered rod between two points, with a lit upper side."""
        ends, scale = self.camera.project(np.array([start, end]))
        widths = np.array(radii) * scale
        x, y = (ends[1] - ends[0]).tolist()
        turn = np.array([[x, y], [-y, x]]) / max(math.hypot(x, y), 1e-6)
        cap = _HALF_CIRCLE @ turn
        around = np.concatenate([widths[1] * cap, -widths[0] * cap])
        along = np.repeat(ends[::-1], len(cap), axis=0)
        self._fill(along + around, shaded(colour, 0.72))
        self._fill(along + 0.7 * around - 0.22 * widths.mean(), colour)

    def shadow(self, points: np.ndarray, strength: float) -> None:
        """Darkens a convex polygon with corners [N, 3] by the share `strength`."""
        corners = _fixed_point(self.camera.project(points)[0])
        height, width = self.pixels.shape[:2]
        left, top, across, down = cv2.boundingRect(corners)
        right, bottom = left + across, top + down
        left, top = max(left >> _FRACTION_BITS, 0), max(top >> _FRACTION_BITS, 0)
        right, bottom = min((right >> _FRACTION_BITS) + 1, width), min((bottom >> _FRACTION_BITS) + 1, height)
        if left >= right or top >= bottom:
            return
        region = self.pixels[top:bottom, left:right]
        mask = np.zeros(region.shape[:2], np.uint8)
        corners -= np.array([left, top], np.int32) << _FRACTION_BITS
        cv2.fillConvexPoly(mask, corners, 255, shift=_FRACTION_BITS)
        cv2.copyTo(cv2.convertScaleAbs(region, alpha=1 - strength), mask, region)

    def _fill(self, pixels: np.ndarray, colour: Colour) -> None:
        cv2.fillConvexPoly(self.pixels, _fixed_point(pixels), colour, shift=_FRACTION_BITS)

    def _circle(self, centre: np.ndarray, radius: float, colour: Colour) -> None:
        x, y, r = _fixed_point(np.array([*centre, radius])).tolist()
        cv2.circle(self.pixels, (x, y), r, colour, cv2.FILLED, shift=_FRACTION_BITS)


def level_circle(centre: np.ndarray, radius: float) -> np.ndarray:
    """Corners [20, 3] of a level circle around `centre`, [3]."""
    points = np.empty((len(_CIRCLE), 3))
    points[:, :2] = centre[:2] + radius * _CIRCLE
    points[:, 2] = centre[2]
    return points


def shaded(colour: Colour, light: float) -> Colour:
    """The colour under less light."""
    return tuple(int(c * light) for c in colour)


def lightened(colour: Colour, share: float) -> Colour:
    """The colour mixed with a share of white."""
    return tuple(int(c + (255 - c) * share) for c in colour)


def _fixed_point(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * (1 << _FRACTION_BITS)).astype(np.int32)
