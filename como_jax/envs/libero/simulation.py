"""One task of robosuite's Panda without images: reset, step, success and the state of the simulator."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from como_jax.envs.libero.task import Task, import_robosuite, numpy_seeded
from como_jax.errors import ConfigError

ACTION_SIZE = 7
CONTROL_RATE_HZ = 20.0
# Objects are placed a little above their support. Public evaluations wait as long (OpenVLA, arXiv 2406.09246).
SETTLING_STEPS = 10
_OPEN_AND_STILL = np.array([0, 0, 0, 0, 0, 0, -1.0])
_PLACEMENT_TRIALS = 100
# Standard deviation of the arm's joints in the official states, in radians; it is robosuite's default too.
_JOINT_NOISE = 0.02


class Simulation:
    """A scene with its arm and the operational-space controller that moves it.

    An action is the change of pose that the controller is asked for, three numbers of position and three of rotation,
    and the gripper, -1 to open and 1 to close; all in [-1, 1].

    Attributes:
      task: what is to be done.
      raw: the environment of robosuite or LIBERO, which renders nothing.
      observation: what robosuite has measured at the last step, by its names.
    """

    def __init__(self, task: Task):
        """Loads the scene.

        Raises:
          ConfigError: robosuite is not installed or cannot run.
        """
        robosuite = import_robosuite()
        self.task = task
        self.observation: Mapping[str, Any] = {}
        # Loading draws too; it must neither depend on what was drawn before nor change what is drawn after.
        with numpy_seeded(0):
            self.raw = task.build(
                robots=["Panda"],
                controller_configs=robosuite.load_controller_config(default_controller="OSC_POSE"),
                has_renderer=False,
                has_offscreen_renderer=False,
                use_camera_obs=False,
                control_freq=CONTROL_RATE_HZ,
                ignore_done=True,
                # Otherwise each reset loads the scene anew, which takes seconds.
                hard_reset=False,
            )

    def reset(self, seed: int, official: int | None = None) -> None:
        """Starts an episode, and waits until everything lies still.

        Args:
          seed: fixes all that is drawn.
          official: number of the official state to start from, counted round and round; None to draw all places by the
            problem's own rules, and the arm's joints as those of the official states are drawn.

        Raises:
          ConfigError: the scene has no official states, or others.
        """
        with numpy_seeded(seed):
            self._place()
            if official is not None:
                self._restore(official)
            elif self.task.init_states is not None:
                self._shift_arm()
            for _ in range(SETTLING_STEPS):
                self.step(_OPEN_AND_STILL)

    def step(self, action: np.ndarray) -> Mapping[str, Any]:
        """Executes an action, float64 `[7]`, after clipping it to [-1, 1]; returns the new `observation`."""
        self.observation, *_ = self.raw.step(np.clip(action, -1, 1))
        return self.observation

    def success(self) -> bool:
        """Whether the task is solved now."""
        return bool(self.raw._check_success())

    def state(self) -> np.ndarray:
        """Time, positions and velocities of everything, float64 `[S]`, as in the official states."""
        return self.raw.sim.get_state().flatten()

    @property
    def goal(self) -> list[list[str]]:
        """LIBERO's goal: predicates with their arguments, as in `["on", "bowl_1", "plate_1"]`."""
        return self.raw.parsed_problem["goal_state"]

    def close(self) -> None:
        """Frees the simulator."""
        self.raw.close()

    def _place(self) -> None:
        """Robosuite's reset, again until its objects fit beside one another."""
        from robosuite.utils.errors import RandomizationError

        for _ in range(_PLACEMENT_TRIALS):
            self._unplace_fixtures()
            with contextlib.suppress(RandomizationError):
                self.observation = self.raw.reset()
                # What it keeps of the last episode: how far the gripper was asked to close.
                gripper = self.raw.robots[0].gripper
                gripper.current_action = np.zeros_like(gripper.current_action)
                return
        raise RuntimeError(f"{self.task.name}: no place for all objects in {_PLACEMENT_TRIALS} trials")

    def _unplace_fixtures(self) -> None:
        """Puts cabinets, stoves and the like where they are when the scene is loaded.

        LIBERO adds the place of a fixture to where a region of it lies, so that what starts on a stove would lie twice
        as far from the origin if the stove still stood where the last episode had it.
        """
        model = self.raw.sim.model
        for fixture in getattr(self.raw, "fixtures_dict", {}).values():
            body = model.body_name2id(fixture.root_body)
            model.body_pos[body], model.body_quat[body] = 0.0, (1.0, 0.0, 0.0, 0.0)
        self.raw.sim.forward()

    def _shift_arm(self) -> None:
        """Turns the joints of the arm a little, which LIBERO itself does not."""
        robot, sim = self.raw.robots[0], self.raw.sim
        joints = robot._ref_joint_pos_indexes
        sim.data.qpos[joints] += np.random.normal(scale=_JOINT_NOISE, size=len(joints))
        sim.forward()
        # Otherwise the arm would turn back to where its hand was.
        robot.controller.update(force=True)
        robot.controller.reset_goal()
        self.raw._update_observables(force=True)

    def _restore(self, official: int) -> None:
        """Puts the simulator into an official state, and what robosuite derives from it."""
        states = self.task.init_states
        if states is None:
            raise ConfigError(f"{self.task.name} has no official initial states.")
        state, size = states[official % len(states)], self.state().size
        if len(state) != size:
            raise ConfigError(
                f"{self.task.name}: its initial states have {len(state)} numbers and its scene has {size}; "
                "LIBERO and its assets must be of one version: pip install --force-reinstall 'como_jax[libero]'"
            )
        sim = self.raw.sim
        sim.set_state_from_flattened(state)
        sim.forward()
        self.raw._post_process()
        self.raw._update_observables(force=True)
