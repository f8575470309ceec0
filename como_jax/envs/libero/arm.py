"""Robosuite's Panda behind the common interface."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult, check_action
from como_jax.envs.libero.render import LOOKS, Renderer, Scene, put_scene, take_scene
from como_jax.envs.libero.simulation import ACTION_SIZE, CONTROL_RATE_HZ, Simulation
from como_jax.envs.libero.task import Task
from como_jax.envs.libero.variation import VARIATIONS
from como_jax.errors import ConfigError, closest
from como_jax.spec.images import resize

ORIENTATIONS = ("rotate180", "flip", "stored")
# By their names in LIBERO's demonstrations, robosuite's.
CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}
# By their names in LIBERO's demonstrations, how many numbers they have.
STATES = {"ee_states": 6, "ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7, "robot_states": 9}
STARTS = ("official", "drawn")
_DEFAULT_STATE = "ee_states,gripper_states"
_DEFAULT_RENDER_SIZE = 128
_MAX_RENDER_SIZE = 1024


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown of a scene: see the settings of this package."""

    cameras: tuple[str, ...]
    image_size: int
    render_size: int
    orientation: str
    states: tuple[str, ...]
    look: str
    variations: tuple[str, ...]

    SETTINGS: ClassVar[tuple[str, ...]] = ("orientation", "state", "render_size", "look", "variation")

    @classmethod
    def of(cls, settings: Mapping[str, str], options: EnvironmentOptions) -> View:
        """Parses settings.

        Raises:
          ConfigError: a value that is none of those there are.
        """
        cameras = options.cameras or tuple(CAMERAS)
        states = tuple(filter(None, settings.get("state", _DEFAULT_STATE).split(",")))
        orientation = settings.get("orientation", ORIENTATIONS[0])
        render_size = settings.get("render_size", str(_DEFAULT_RENDER_SIZE))
        look = settings.get("look", LOOKS[0])
        variations = tuple(filter(None, settings.get("variation", "").split(",")))
        _check_known("setting variation", variations, VARIATIONS)
        _check_known("the camera", cameras, CAMERAS)
        _check_known("setting state", states, STATES)
        _check_known("setting orientation", (orientation,), ORIENTATIONS)
        _check_known("setting look", (look,), LOOKS)
        if not (render_size.isdecimal() and 0 < int(render_size) <= _MAX_RENDER_SIZE):
            raise ConfigError(f"setting render_size={render_size}: must be from 1 to {_MAX_RENDER_SIZE}.")
        return cls(cameras, options.image_size, int(render_size), orientation, states, look, variations)

    @property
    def state_size(self) -> int:
        """Numbers in a state."""
        return sum(STATES[name] for name in self.states)

    def image(self, rendered: np.ndarray) -> np.ndarray:
        """What robosuite hands out, uint8 `[H, W, 3]` with its lowest row first, turned and scaled."""
        turned = {"rotate180": rendered[::-1, ::-1], "flip": rendered[::-1], "stored": rendered}[self.orientation]
        image = np.empty((self.image_size, self.image_size, 3), np.uint8)
        resize(np.ascontiguousarray(turned), image)
        return image


class Expert(Protocol):
    """What acts in one episode; see `como_jax.envs.libero.expert`.

    Attributes:
      done: whether everything is done, and let go of.
      reason: why it has given up; empty if it has not.
    """

    done: bool
    reason: str

    def act(self) -> np.ndarray:
        """The action for the present state, float32 `[7]`."""


def make_expert(raw: Any, seed: int) -> Expert:
    """The scripted expert for an episode that has just begun in LIBERO's environment."""
    # It needs MuJoCo, which may be missing, and which chooses how to draw as it is imported.
    return importlib.import_module("como_jax.envs.libero.expert").Expert(raw, seed)


class PandaEnvironment:
    """See `como_jax.envs.base.Environment`; actions are those of `Simulation`."""

    def __init__(self, task: Task, view: View, start: str = "drawn", max_steps: int = 0):
        """Loads the scene; `start` is one of `STARTS`.

        Raises:
          ConfigError: robosuite is not installed or cannot render, or an unknown `start`.
        """
        _check_known("setting init", (start,), STARTS)
        self._view, self._official = view, start == "official"
        self._expert: Expert | None = None
        self._steps, self._seed, self._is_varied = 0, 0, False
        self.simulation = Simulation(task)
        self._renderer: Renderer | None = None
        self.spec = EnvironmentSpec(
            name=task.name,
            cameras=view.cameras,
            action_size=ACTION_SIZE,
            state_size=view.state_size,
            control_rate=CONTROL_RATE_HZ,
            max_steps=max_steps or task.max_steps,
        )

    def reset(self, seed: int) -> Observation:
        """Starts an episode, from the official state that the seed numbers or a drawn one, and lets it settle."""
        self.begin(seed)
        return Observation(self.images(), self.state())

    def begin(self, seed: int) -> None:
        """Starts an episode as `reset` does, without looking."""
        self._expert = None
        self._steps, self._seed, self._is_varied = 0, seed, False
        self.simulation.reset(seed, seed if self._official else None)

    @property
    def instruction(self) -> str:
        """What the episode asks for."""
        return self.simulation.task.instruction

    def step(self, action: np.ndarray, render: bool = True) -> StepResult:
        """Executes an action, after clipping it to [-1, 1].

        Raises:
          ValueError: the action has another shape or is not finite.
        """
        self.simulation.step(check_action(action, self.spec))
        self._steps += 1
        success = self.simulation.success()
        done = success or self._steps >= self.spec.max_steps
        images = self.images() if render or done else {}
        return StepResult(Observation(images, self.state()), success, done)

    def expert_action(self) -> np.ndarray:
        """The action of LIBERO's expert, which is made at the first call in an episode; robosuite's tasks have none."""
        if not hasattr(self.simulation.raw, "parsed_problem"):
            raise NotImplementedError(f"{self.spec.name} has no expert")
        self._expert = self._expert or make_expert(self.simulation.raw, self._seed)
        return self._expert.act()

    def close(self) -> None:
        """Frees the simulator and its renderer."""
        if self._renderer is not None:
            self._renderer.close()
        self.simulation.close()

    def images(self) -> dict[str, np.ndarray]:
        """What the cameras see now."""
        if self._renderer is None:
            sim = self.simulation.raw.sim
            names = [CAMERAS[name] for name in self._view.cameras]
            view = self._view
            self._renderer = Renderer(
                sim.model._model, sim.data._data, names, view.render_size, view.look, view.variations
            )
        if not self._is_varied:
            self._renderer.vary(self._seed)
            self._is_varied = True
        rendered = zip(self._view.cameras, self._renderer.render(), strict=True)
        return {name: self._view.image(image) for name, image in rendered}

    def scene(self) -> Scene:
        """What there is to be seen now, for `show`."""
        sim = self.simulation.raw.sim
        return take_scene(sim.model._model, sim.data._data)

    def show(self, scene: Scene) -> None:
        """Lets `images` show an earlier scene of this episode, which cannot go on after that."""
        sim = self.simulation.raw.sim
        put_scene(sim.model._model, sim.data._data, scene)

    def state(self) -> np.ndarray:
        """What the arm's sensors measure now, float32 `[S]`."""
        observation = self.simulation.observation
        states = [self._state(name, observation) for name in self._view.states]
        return np.concatenate([np.zeros(0), *states]).astype(np.float32)

    def _state(self, name: str, observation: Mapping[str, np.ndarray]) -> np.ndarray:
        """One of `STATES`, computed as LIBERO's `create_dataset.py` does."""
        position, quaternion = observation["robot0_eef_pos"], observation["robot0_eef_quat"]
        if name == "ee_pos":
            return position
        if name == "ee_ori":
            return _axis_angle(quaternion)
        if name == "ee_states":
            return np.concatenate([position, _axis_angle(quaternion)])
        if name == "joint_states":
            return self.simulation.raw.robots[0]._joint_positions
        fingers = observation["robot0_gripper_qpos"]
        return fingers if name == "gripper_states" else np.concatenate([fingers, position, quaternion])


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle of a unit quaternion (x, y, z, w); the angle is in [0, 2 pi], as in LIBERO's files."""
    vector, scalar = quaternion[:3], np.clip(quaternion[3], -1, 1)
    length = np.sqrt(1 - scalar**2)
    return vector * 0 if np.isclose(length, 0) else vector * 2 * np.arccos(scalar) / length


def _check_known(what: str, names: tuple[str, ...], known: Mapping[str, Any] | tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r} is none of {', '.join(known)}{closest(name, known)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} is named twice: {', '.join(names)}")
