"""Robosuite's Panda behind the common interface."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import importlib.metadata
import logging
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any, ClassVar

import numpy as np

from como_jax.envs.base import EnvironmentOptions, EnvironmentSpec, Observation, StepResult, check_action, missing_extra
from como_jax.errors import ConfigError, closest
from como_jax.spec.images import resize

ACTION_SIZE = 7
CONTROL_RATE_HZ = 20.0
ORIENTATIONS = ("rotate180", "flip", "stored")
# By their names in LIBERO's demonstrations, robosuite's.
CAMERAS = {"agentview_rgb": "agentview", "eye_in_hand_rgb": "robot0_eye_in_hand"}
# By their names in LIBERO's demonstrations, how many numbers they have.
STATES = {"ee_states": 6, "ee_pos": 3, "ee_ori": 3, "gripper_states": 2, "joint_states": 7, "robot_states": 9}
_DEFAULT_STATE = "ee_states,gripper_states"
_DEFAULT_RENDER_SIZE = 128
_MAX_RENDER_SIZE = 1024
# Objects are placed a little above their support. Public evaluations wait as long (OpenVLA, arXiv 2406.09246).
_SETTLING_STEPS = 10
_OPEN_AND_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
_PLACEMENT_TRIALS = 100
# From here on joints have types that robosuite 1.4.0 does not recognise.
_BROKEN_MUJOCO = (3, 12)


@dataclasses.dataclass(frozen=True)
class Task:
    """What to do in which scene.

    Attributes:
      name: of environment and task, as in `robosuite:Lift`.
      instruction: in words.
      max_steps: the usual limit.
      build: makes robosuite's environment of the keyword arguments that all of its tasks share.
      init_states: float64 `[N, ...]`, flat states of the simulator to start from, of which the seed chooses one; None
        where the seed draws the start itself.
    """

    name: str
    instruction: str
    max_steps: int
    build: Callable[..., Any]
    init_states: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class View:
    """What is shown of a scene: see the settings of this package."""

    cameras: tuple[str, ...]
    image_size: int
    render_size: int
    orientation: str
    states: tuple[str, ...]

    SETTINGS: ClassVar[tuple[str, ...]] = ("orientation", "state", "render_size")

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
        _check_known("the camera", cameras, CAMERAS)
        _check_known("setting state", states, STATES)
        _check_known("setting orientation", (orientation,), ORIENTATIONS)
        if not (render_size.isdecimal() and 0 < int(render_size) <= _MAX_RENDER_SIZE):
            raise ConfigError(f"setting render_size={render_size}: must be from 1 to {_MAX_RENDER_SIZE}.")
        return cls(cameras, options.image_size, int(render_size), orientation, states)

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


class PandaEnvironment:
    """See `como_jax.envs.base.Environment`.

    An action is the change of pose that an operational-space controller is asked for, three numbers of position and
    three of rotation, and the gripper, -1 to open and 1 to close; all in [-1, 1].
    """

    def __init__(self, task: Task, view: View, max_steps: int = 0):
        """Loads the scene.

        Raises:
          ConfigError: robosuite is not installed or cannot render.
        """
        robosuite = import_robosuite()
        self._task, self._view = task, view
        self._steps = 0
        # Loading draws too; it must neither depend on what was drawn before nor change what is drawn after.
        with _numpy_seeded(0), _rendering_errors(ImportError, RuntimeError):
            self._env = task.build(
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                has_renderer=False,
                has_offscreen_renderer=True,
                use_camera_obs=True,
                camera_names=[CAMERAS[name] for name in view.cameras],
                camera_heights=view.render_size,
                camera_widths=view.render_size,
                control_freq=CONTROL_RATE_HZ,
                ignore_done=True,
            )
        self.spec = EnvironmentSpec(
            name=task.name,
            cameras=view.cameras,
            action_size=ACTION_SIZE,
            state_size=view.state_size,
            control_rate=CONTROL_RATE_HZ,
            max_steps=max_steps or task.max_steps,
        )

    def reset(self, seed: int) -> Observation:
        """Starts an episode, and waits until everything lies still."""
        self._steps = 0
        with _numpy_seeded(seed):
            self._place()
            if self._task.init_states is not None:
                self._restore(self._task.init_states[seed % len(self._task.init_states)])
            for _ in range(_SETTLING_STEPS):
                observation, *_ = self._env.step(_OPEN_AND_STILL)
        return self._observe(observation)

    @property
    def instruction(self) -> str:
        """What the episode asks for."""
        return self._task.instruction

    def step(self, action: np.ndarray) -> StepResult:
        """Executes an action, after clipping it to [-1, 1].

        Raises:
          ValueError: the action has another shape or is not finite.
        """
        action = check_action(action, self.spec)
        self._steps += 1
        observation, *_ = self._env.step(np.clip(action, -1, 1))
        success = bool(self._env._check_success())
        return StepResult(self._observe(observation), success, success or self._steps >= self.spec.max_steps)

    def expert_action(self) -> np.ndarray:
        """There is no expert."""
        raise NotImplementedError(f"{self.spec.name} has no expert")

    def close(self) -> None:
        """Frees the simulator and its renderer."""
        self._env.close()

    def _place(self) -> None:
        """Robosuite's reset, again until its objects fit beside one another."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(_PLACEMENT_TRIALS):
            with contextlib.suppress(RandomizationError):
                self._env.reset()
                return
        raise RuntimeError(f"{self.spec.name}: no place for all objects in {_PLACEMENT_TRIALS} trials")

    def _restore(self, state: np.ndarray) -> None:
        """Puts the simulator into a state, and what robosuite derives from it."""
        sim, size = self._env.sim, self._env.sim.get_state().flatten().size
        if len(state) != size:
            raise ConfigError(
                f"{self.spec.name}: its initial states have {len(state)} numbers and its scene has {size}; "
                "LIBERO's meshes and its package must be of one version."
            )
        sim.set_state_from_flattened(state)
        sim.forward()
        self._env._post_process()
        self._env._update_observables(force=True)

    def _observe(self, observation: Mapping[str, np.ndarray]) -> Observation:
        images = {name: self._view.image(observation[f"{CAMERAS[name]}_image"]) for name in self._view.cameras}
        states = [self._state(name, observation) for name in self._view.states]
        return Observation(images, np.concatenate([np.zeros(0), *states]).astype(np.float32))

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
            return self._env.robots[0]._joint_positions
        fingers = observation["robot0_gripper_qpos"]
        return fingers if name == "gripper_states" else np.concatenate([fingers, position, quaternion])


def import_robosuite() -> ModuleType:
    """Robosuite, without its advice about macros.

    Raises:
      ConfigError: it is not installed, MuJoCo is too new, or the graphics libraries that it renders with are missing.
    """
    logging.getLogger("robosuite_logs").setLevel(logging.ERROR)
    try:
        version = importlib.metadata.version("mujoco")
        if tuple(map(int, version.split(".")[:2])) >= _BROKEN_MUJOCO:
            raise ImportError(f"it does not work with MuJoCo {version}")
        # PyOpenGL fails like that where it finds no library.
        with _rendering_errors(AttributeError, OSError, RuntimeError):
            return importlib.import_module("robosuite")
    except ImportError as error:
        raise missing_extra("robosuite", "libero", error) from error


@contextlib.contextmanager
def _rendering_errors(*kinds: type[Exception]) -> Iterator[None]:
    """Turns errors of missing or useless graphics libraries into a ConfigError."""
    try:
        yield
    except kinds as error:
        raise ConfigError(
            f"robosuite cannot render ({error}); install OSMesa or EGL (Debian: apt install libosmesa6 libegl1 libgl1 "
            "libegl-mesa0 libgles2) and set MUJOCO_GL to osmesa or egl."
        ) from error


def _axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Axis times angle of a unit quaternion (x, y, z, w); the angle is in [0, 2 pi], as in LIBERO's files."""
    vector, scalar = quaternion[:3], np.clip(quaternion[3], -1, 1)
    length = np.sqrt(1 - scalar**2)
    return vector * 0 if np.isclose(length, 0) else vector * 2 * np.arccos(scalar) / length


@contextlib.contextmanager
def _numpy_seeded(seed: int) -> Iterator[None]:
    """Within, NumPy's global generator, from which robosuite draws, starts from the seed; nobody else sees it."""
    before = np.random.get_state()
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        np.random.set_state(before)


def _check_known(what: str, names: tuple[str, ...], known: Mapping[str, Any] | tuple[str, ...]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"{what} {name!r} is none of {', '.join(known)}{closest(name, known)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"{what} is named twice: {', '.join(names)}")
