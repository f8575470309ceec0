"""What the expert knows of the scene: poses, joints, contacts and heights, read from the simulator itself.

Nothing is written to the simulator: rays are cast in a copy of its model.
"""

from __future__ import annotations

import copy
import dataclasses
import importlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from como_jax.envs.libero.expert.heights import HeightMap

_TARGET, _AROUND, _HIDDEN = 1, 0, 5
_SKY = 3.0


@dataclasses.dataclass(frozen=True)
class Joint:
    """A joint of a fixture: a drawer, a door or a knob.

    Attributes:
      index: of the joint in the model.
      body: index of the body that it moves.
      slides: whether it slides; otherwise it turns.
      axis, anchor: in the world.
      low, high: range of its value.
      value: where it stands.
    """

    index: int
    body: int
    slides: bool
    axis: np.ndarray
    anchor: np.ndarray
    low: float
    high: float
    value: float


@dataclasses.dataclass(frozen=True)
class Region:
    """A box that a goal names, in the world.

    Attributes:
      name: of the site.
      parent: name of the object that it belongs to, empty for a part of the table.
      centre, axes, size: its middle, the directions of its sides in columns, and half of their lengths.
    """

    name: str
    parent: str
    centre: np.ndarray
    axes: np.ndarray
    size: np.ndarray

    @property
    def half(self) -> np.ndarray:
        """Half of its extent along the axes of the world."""
        return np.abs(self.axes @ self.size)


class Scene:
    """LIBERO's problem, read."""

    def __init__(self, env: Any):
        """Takes a problem object of LIBERO (`BDDLBaseDomain`), after its reset."""
        self.env = env
        # Here, so that all that needs no simulator can be used without it.
        self._mujoco = importlib.import_module("mujoco")
        self.model, self.data = env.sim.model._model, env.sim.data._data
        self._ray_model = copy.copy(self.model)
        self._ray_model.geom_rgba[:, 3] = 1
        self._ray_model.geom_matid[:] = -1
        self._ray_data = self._mujoco.MjData(self._ray_model)
        self._root = np.asarray(self.model.body_rootid)
        self._solid = (self.model.geom_contype != 0) | (self.model.geom_conaffinity != 0)
        self._solid &= self.model.geom_group == 0
        robot = self._body("robot0_base")
        self._robot = (
            np.array([self._root[self.model.geom_bodyid[geom]] for geom in range(self.model.ngeom)])
            == (self._root[robot])
        )
        self._fingers = [self._geoms_below(self._body(f"gripper0_{side}finger")) for side in ("left", "right")]
        self._grip_site = env.robots[0].eef_site_id

    # The robot.

    @property
    def hand(self) -> tuple[np.ndarray, np.ndarray]:
        """Position and rotation matrix of the point between the fingertips: columns along the fingers' axis, across it,
        and forward."""
        return self.data.site_xpos[self._grip_site].copy(), self.data.site_xmat[self._grip_site].reshape(3, 3).copy()

    @property
    def opening(self) -> float:
        """Distance between the fingers, 0 to 0.08 m."""
        joints = [self.model.joint(f"gripper0_finger_joint{number}").qposadr[0] for number in (1, 2)]
        return float(np.abs(self.data.qpos[joints]).sum())

    @property
    def shoulder(self) -> np.ndarray:
        """Where the arm's reach is measured from."""
        return self.data.xpos[self._body("robot0_link0")] + np.array([0, 0, 0.333])

    def touched_by(self, geoms: set[int]) -> tuple[bool, bool]:
        """Whether the left and the right finger touch any of the geometries."""
        pairs = self.data.contact.geom[: self.data.ncon]
        return tuple(
            any((a in finger and b in geoms) or (b in finger and a in geoms) for a, b in pairs)
            for finger in self._fingers
        )

    def finger_sides(self) -> np.ndarray:
        """Directions in columns `[3, 2]` from the grip point to the left and the right finger."""
        here, axes = self.hand
        sides = [np.mean([self.data.geom_xpos[geom] for geom in finger], axis=0) - here for finger in self._fingers]
        return np.column_stack([axes[:, 0] * np.sign(side @ axes[:, 0]) for side in sides])

    def holds(self, name: str) -> bool:
        """Whether both fingers touch an object."""
        return all(self.touched_by(self.geoms(name)))

    # Objects and fixtures.

    def position(self, name: str) -> np.ndarray:
        """Of an object's body, the point that goals are judged by."""
        return self.data.xpos[self.env.obj_body_id[name]].copy()

    def rotation(self, name: str) -> np.ndarray:
        """Of an object's body, a matrix."""
        return self.data.xmat[self.env.obj_body_id[name]].reshape(3, 3).copy()

    def geoms(self, name: str) -> set[int]:
        """Collision geometries of an object or fixture."""
        return self._geoms_below(self.env.obj_body_id[name])

    def body_geoms(self, body: int) -> list[int]:
        """Collision geometries of one body alone."""
        return [geom for geom in np.flatnonzero(self.model.geom_bodyid == body) if self._solid[geom]]

    def corners(self, geoms: Iterable[int]) -> np.ndarray:
        """Corners `[K, 3]` of geometries, or of boxes around them, in the world."""
        signs = np.array(np.meshgrid([-1, 1], [-1, 1], [-1, 1])).reshape(3, -1).T
        all_corners = []
        for geom in geoms:
            centre, half = self.model.geom_aabb[geom][:3], self.model.geom_aabb[geom][3:]
            axes = self.data.geom_xmat[geom].reshape(3, 3)
            all_corners.append(self.data.geom_xpos[geom] + (centre + signs * half) @ axes.T)
        return np.concatenate(all_corners)

    def boxes_but(self, geoms: set[int]) -> list[np.ndarray]:
        """Corners `[8, 3]` of every collision geometry but some and the robot's."""
        flat = self.model.geom_type == self._mujoco.mjtGeom.mjGEOM_PLANE
        others = np.flatnonzero(self._solid & ~self._robot & ~flat)
        return [self.corners([geom]) for geom in others if geom not in geoms]

    def bottom(self, name: str) -> float:
        """Height of an object's lowest point."""
        return float(self.corners(self.geoms(name))[:, 2].min())

    def region(self, name: str) -> Region:
        """A box that a goal names."""
        site, index = self.env.object_sites_dict[name], self.model.site(name).id
        return Region(
            name,
            site.parent_name or "",
            self.data.site_xpos[index].copy(),
            self.data.site_xmat[index].reshape(3, 3).copy(),
            np.asarray(site.size, float),
        )

    def joint(self, name: str) -> Joint | None:
        """The joint that moves a fixture or the part of it that a region belongs to; None if nothing does."""
        sites = self.env.object_sites_dict
        joints = (sites[name].joints if name in sites else self.env.get_object(name).joints) or []
        if not joints:
            return None
        index = self.model.joint(joints[0]).id
        return Joint(
            index,
            int(self.model.jnt_bodyid[index]),
            self.model.jnt_type[index] == self._mujoco.mjtJoint.mjJNT_SLIDE,
            self.data.xaxis[index].copy(),
            self.data.xanchor[index].copy(),
            *map(float, self.model.jnt_range[index]),
            float(self.data.qpos[self.model.jnt_qposadr[index]]),
        )

    def is_true(self, goal: Sequence[str]) -> bool:
        """Whether LIBERO holds a goal for reached."""
        return bool(self.env._eval_predicate(list(goal)))

    # Heights.

    def tops(self, without: Iterable[int], low: np.ndarray, high: np.ndarray, cell: float) -> HeightMap:
        """Heights of boxes around all geometries but the robot's and some others: coarse, but quick to have."""
        shape = np.ceil((high - low) / cell).astype(int) + 1
        heights = np.full(shape, -np.inf)
        left_out = self._robot.copy()
        left_out[list(without)] = True
        flat = self.model.geom_type == self._mujoco.mjtGeom.mjGEOM_PLANE
        for geom in np.flatnonzero(self._solid & ~left_out & ~flat):
            corners = self.corners([geom])
            first, last = ((edge[:2] - low) / cell for edge in (corners.min(0), corners.max(0)))
            rows, columns = (slice(max(0, int(a)), max(0, int(b) + 2)) for a, b in zip(first, last, strict=True))
            heights[rows, columns] = np.maximum(heights[rows, columns], corners[:, 2].max())
        return HeightMap(low, cell, heights)

    def height_maps(
        self, centre: np.ndarray, half: float, cell: float, target: Iterable[int] = (), *, below: bool = False
    ) -> tuple[HeightMap, HeightMap]:
        """Heights of some geometries, and of all others without the robot, over a square.

        With `below` the first map has the heights of the geometries' undersides.
        """
        self._refresh(target)
        count = 2 * int(np.ceil(half / cell)) + 1
        corner = np.asarray(centre[:2], float) - cell * (count // 2)
        wanted, around = np.full((2, count, count), -np.inf)
        for row in range(count):
            for column in range(count):
                point = corner + cell * np.array([row, column])
                if target:
                    wanted[row, column] = self._ray(point, _TARGET, below)
                around[row, column] = self._ray(point, _AROUND, False)
        return HeightMap(corner, cell, wanted), HeightMap(corner, cell, around)

    def _ray(self, point: np.ndarray, group: int, below: bool) -> float:
        start, direction = (-_SKY, 1.0) if below else (_SKY, -1.0)
        groups = np.zeros(6, np.uint8)
        groups[group] = 1
        distance = self._mujoco.mj_ray(
            self._ray_model,
            self._ray_data,
            np.array([*point, start]),
            np.array([0, 0, direction]),
            groups,
            True,
            -1,
            np.zeros(1, np.int32),
        )
        return start + direction * distance if distance >= 0 else -np.inf

    def _refresh(self, target: Iterable[int]) -> None:
        model = self._ray_model
        model.geom_group[:] = np.where(self._solid & ~self._robot, _AROUND, _HIDDEN)
        model.geom_group[list(target)] = _TARGET
        model.body_pos[:], model.body_quat[:] = self.model.body_pos, self.model.body_quat
        self._ray_data.qpos[:] = self.data.qpos
        self._mujoco.mj_kinematics(model, self._ray_data)

    def _geoms_below(self, body: int) -> set[int]:
        """Collision geometries of a body and all that hangs on it."""
        inside = np.zeros(self.model.nbody, bool)
        inside[body] = True
        for child in range(body + 1, self.model.nbody):
            inside[child] = inside[self.model.body_parentid[child]]
        return {int(geom) for geom in np.flatnonzero(inside[self.model.geom_bodyid] & self._solid)}

    def _body(self, name: str) -> int:
        return self.model.body(name).id
