"""What the fast look of LIBERO leaves out."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np

from como_jax.envs.libero import meshes, render


def test_vertices_of_a_cell_become_the_one_in_its_middle() -> None:
    rng = np.random.default_rng(0)
    corners = 0.1 * np.stack(np.meshgrid([0, 1], [0, 1], [0, 1]), axis=-1).reshape(8, 3)
    # Nine vertices within two millimetres above each corner, the first of them nearest to their mean.
    around = np.concatenate([np.full((1, 3), 1e-3), *[[d, 2e-3 - d] for d in 2e-3 * rng.random((4, 3))]])
    vertices = np.concatenate([corner + around for corner in corners])
    np.testing.assert_array_equal(meshes.merged_vertices(vertices), np.repeat(np.arange(0, 72, 9), 9))


def test_faces_without_area_and_those_twice_there_go() -> None:
    faces = np.array([[0, 1, 2], [3, 3, 1], [2, 0, 1], [4, 2, 1], [5, 6, 5], [2, 1, 0]])
    np.testing.assert_array_equal(meshes.distinct_faces(faces), [0, 3, 5])


def make_model(faces: np.ndarray, vertices: np.ndarray) -> SimpleNamespace:
    """Two meshes of these faces, of which the second is for collisions too."""
    return SimpleNamespace(
        nmesh=2,
        geom_type=np.array([7, 7, 7, 6]),
        geom_group=np.array([1, 1, 0, 0]),
        geom_dataid=np.array([0, 1, 1, -1]),
        mesh_vert=np.tile(vertices, (2, 1)),
        mesh_vertadr=np.array([0, len(vertices)]),
        mesh_vertnum=np.full(2, len(vertices)),
        mesh_face=np.tile(faces, (2, 1)),
        mesh_faceadr=np.array([0, len(faces)]),
        mesh_facenum=np.full(2, len(faces)),
        mesh_facenormal=np.tile(3 + faces, (2, 1)),
        mesh_facetexcoord=np.tile(faces, (2, 1)),
        mesh_texcoord=np.tile(4 * vertices[:, :2], (2, 1)),
        mesh_texcoordadr=np.array([0, len(vertices)]),
        mesh_texcoordnum=np.full(2, len(vertices)),
    )


def test_a_mesh_gets_coarser_and_one_for_collisions_stays() -> None:
    side = np.linspace(0, 0.1, 101)
    vertices = np.stack(np.meshgrid(side, side, [0.0]), axis=-1).reshape(-1, 3)
    corner = (np.arange(100)[:, None] * 101 + np.arange(100)).reshape(-1)
    faces = np.concatenate([corner[:, None] + [0, 1, 101], corner[:, None] + [1, 102, 101]])
    model = make_model(faces, vertices)
    meshes.coarsen(model)
    left = model.mesh_facenum[0]
    assert 1000 < left < len(faces) / 10 and model.mesh_facenum[1] == len(faces)
    np.testing.assert_array_equal(model.mesh_face[len(faces) :], faces)
    # The sheet is still whole, and its texture lies on it as before.
    a, b, c = (vertices[model.mesh_face[:left, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    assert 0.009 < area < 0.0101
    np.testing.assert_array_equal(model.mesh_facetexcoord[:left], model.mesh_face[:left])
    assert (model.mesh_facenormal[:left] - 3 != model.mesh_face[:left]).any()


def test_texture_does_not_jump_over_a_seam() -> None:
    vertices = np.array([[0, 0, 0], [0.004, 0, 0], [0, 0.004, 0], [0.001, 0, 0]])
    # The last vertex is near the first one, and far from it in the texture.
    points = np.array([[0, 0], [0.4, 0], [0, 0.4], [9, 9]])
    before = np.array([[0, 1, 2], [3, 1, 2]])
    moved = meshes.moved_texture(vertices, points, before, np.array([[0, 1, 2], [0, 1, 2]]), before)
    np.testing.assert_array_equal(moved, before)


def test_shapes_outside_the_image_are_not_drawn() -> None:
    model = SimpleNamespace(cam_fovy=np.array([90.0]), geom_rbound=np.array([0.1, 0.1, 0.1, 0.1, 3.0, 0.0]))
    # A camera looks along its own -z axis.
    places = np.array([[0, 0, -1], [1.1, 0, -1], [0, -1.2, -1], [0, 0, 0.2], [0, 0, 1], [9, 9, 9]], float)
    rotation = np.array([[0.0, 0, 1], [1, 0, 0], [0, 1, 0]])
    data = SimpleNamespace(
        geom_xpos=places @ rotation.T + 4, cam_xpos=np.full((1, 3), 4.0), cam_xmat=rotation.reshape(1, 9)
    )
    outside = render._outside(model, data, 0)
    np.testing.assert_array_equal(outside, [False, False, True, True, False, False])


def test_an_earlier_scene_can_be_shown_again() -> None:
    names = ("site_rgba", *render._DRAWN_OF_DATA)
    scene = SimpleNamespace(time=0.25, **{name: np.full((2, 3), number) for number, name in enumerate(names)})
    before = render.take_scene(scene, scene)
    scene.time = 9
    for name in names:
        getattr(scene, name)[:] = -1
    render.put_scene(scene, scene, before)
    assert [getattr(scene, name)[1, 2] for name in names] == list(range(len(names))) and scene.time == 0.25
