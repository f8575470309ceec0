"""Coarser meshes of a compiled model, for images in which they are as good."""

from __future__ import annotations

from typing import Any

import numpy as np

# A mesh with fewer faces takes no time.
_FEW_FACES = 800
# The side of a cell: a share of the mesh's longest side, and metres, half a pixel at 1 m and 128 pixels.
_RELATIVE_CELL, _LEAST_CELL = 1 / 40, 0.004
_MESH, _COLLISION_GROUP = 7, 0


def coarsen(model: Any) -> None:
    """Leaves out details of the model's visible meshes; collisions, masses and rays on collision shapes stay the same.

    The vertices in each cell of a grid become the one nearest to their mean. Faces that shrink to a line
    or lie on another go. A renderer that is made afterwards draws what is left.
    """
    is_mesh = model.geom_type == _MESH
    collides = set(model.geom_dataid[is_mesh & (model.geom_group == _COLLISION_GROUP)].tolist())
    for mesh in range(model.nmesh):
        if model.mesh_facenum[mesh] >= _FEW_FACES and mesh not in collides:
            _coarsen(model, mesh)


def _coarsen(model: Any, mesh: int) -> None:
    first, count = model.mesh_vertadr[mesh], model.mesh_vertnum[mesh]
    vertices = model.mesh_vert[first : first + count]
    first, count = model.mesh_faceadr[mesh], model.mesh_facenum[mesh]
    old = slice(first, first + count)
    before, texture = model.mesh_face[old].copy(), model.mesh_facetexcoord[old].copy()
    faces = merged_vertices(vertices)[before]
    if (start := model.mesh_texcoordadr[mesh]) >= 0:
        points = model.mesh_texcoord[start : start + model.mesh_texcoordnum[mesh]]
        texture = moved_texture(vertices, points, before, faces, texture)
    kept = distinct_faces(faces)
    new = slice(first, first + len(kept))
    model.mesh_face[new], model.mesh_facetexcoord[new] = faces[kept], texture[kept]
    model.mesh_facenormal[new] = model.mesh_facenormal[old][kept]
    model.mesh_facenum[mesh] = len(kept)


def cell_side(vertices: np.ndarray) -> float:
    """The side of the cells of a mesh, in metres."""
    return max(_LEAST_CELL, _RELATIVE_CELL * float(np.ptp(vertices, axis=0).max()))


def merged_vertices(vertices: np.ndarray) -> np.ndarray:
    """For every vertex, `[V, 3]` in metres, the number of the one that stands for its cell, int64 `[V]`."""
    cells = np.floor((vertices - vertices.min(axis=0)) / cell_side(vertices)).astype(np.int64)
    # One number a cell; there are far fewer than 2^20 along a side.
    _, cell = np.unique(cells @ np.array([1 << 40, 1 << 20, 1]), return_inverse=True)
    count = np.bincount(cell)
    mean = np.stack([np.bincount(cell, axis) / count for axis in vertices.T], axis=1)
    order = np.lexsort((np.square(vertices - mean[cell]).sum(axis=1), cell))
    nearest = order[np.flatnonzero(np.diff(cell[order], prepend=-1))]
    return nearest[cell]


def moved_texture(
    vertices: np.ndarray, points: np.ndarray, before: np.ndarray, after: np.ndarray, texture: np.ndarray
) -> np.ndarray:
    """Which point of the texture belongs to each corner whose vertex has moved, int `[F, 3]`.

    It is that of the new vertex if it lies as near as the vertex does. Otherwise there is a seam of the texture between
    them, and the corner keeps its own.

    Args:
      vertices: `[V, 3]`.
      points: of the texture, `[P, 2]`.
      before, after: vertices of the faces, int `[F, 3]`.
      texture: points of the faces before, int `[F, 3]`.
    """
    own = np.zeros(len(vertices), texture.dtype)
    own[before.ravel()] = texture.ravel()
    lengths = np.linalg.norm(vertices[before] - vertices[np.roll(before, 1, axis=1)], axis=-1)
    in_texture = np.linalg.norm(points[texture] - points[np.roll(texture, 1, axis=1)], axis=-1)
    density = np.median(in_texture / np.maximum(lengths, np.finfo(np.float32).tiny))
    shift = np.linalg.norm(points[own[after]] - points[texture], axis=-1)
    return np.where(shift <= 2 * density * cell_side(vertices), own[after], texture)


def distinct_faces(faces: np.ndarray) -> np.ndarray:
    """Which faces, int `[F, 3]`, have three corners, and are not seen from where a face before with the same is."""
    proper = np.flatnonzero((faces != np.roll(faces, 1, axis=1)).all(axis=1))
    # Turned until the lowest corner comes first. The other way round is the other side, as of a sheet with two.
    turns = (faces[proper].argmin(axis=1)[:, None] + np.arange(3)) % 3
    _, first = np.unique(np.take_along_axis(faces[proper], turns, axis=1), axis=0, return_index=True)
    return proper[np.sort(first)]
