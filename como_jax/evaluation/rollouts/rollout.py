"""Episodes of a policy in simulators, several at once, judged by success.

Every episode follows from the seed, the name of the task and the number of the episode, and so does what the policy
draws at each step. Neither other tasks nor the number of workers change it, apart from the rounding of batches of
another size on an accelerator.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from como_jax.envs.base import FIRST_ROLLOUT_SEED, SEED_STRIDE, EnvironmentOptions, EnvironmentSpec, StepResult
from como_jax.envs.registry import make_environment
from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.evaluation.rollouts.results import EpisodeResult, Recording, suite_of
from como_jax.evaluation.rollouts.workers import Failed, MakeEnvironment, Reply, Start, Started, Step, WorkerPool
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.interface import History, PolicySpec

logger = logging.getLogger(__name__)

# Simulators take seeds of 32 bits, some of them signed.
MAX_SEED = 1000
# Below this size no simulator draws anything of use.
_MIN_IMAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How many episodes, and how they are rolled out.

    Attributes:
      episodes: episodes of every task.
      workers: environments at the same time, each in a process.
      seed: another seed gives other episodes.
      control: how action chunks are carried out.
      videos: episodes of every task that are drawn at every step; None for all. Others are drawn where the policy
        looks, which changes no episode.
      step_timeout: seconds after which a worker that does not answer a step is given up.
      start_timeout: the same for the beginning of an episode, which may have to load the simulator.
    """

    episodes: int = 20
    workers: int = 2
    seed: int = 0
    control: ControlConfig = ControlConfig()
    videos: int | None = None
    step_timeout: float = 120.0
    start_timeout: float = 600.0

    def check(self) -> None:
        """Raises ConfigError for numbers out of range."""
        if not 1 <= self.episodes <= SEED_STRIDE:
            raise ConfigError(f"`episodes` {self.episodes} must lie between 1 and {SEED_STRIDE}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"`seed` {self.seed} must lie between 0 and {MAX_SEED}.")
        if self.workers < 1 or min(self.step_timeout, self.start_timeout) <= 0:
            raise ConfigError("`workers`, `step_timeout` and `start_timeout` must be positive.")


OnEpisode = Callable[[EpisodeResult, Recording], None]


def environment_seed(seed: int, episode: int) -> int:
    """The seed that an environment is reset with; demonstrations have none of these seeds."""
    return FIRST_ROLLOUT_SEED + seed * SEED_STRIDE + episode


def rendered_size(spec: PolicySpec) -> int:
    """The side of the images to render for a policy, which resizes them to the size of its model."""
    return max(spec.image_size, _MIN_IMAGE_SIZE)


def parse_settings(texts: Sequence[str]) -> dict[str, str]:
    """Settings by name, from texts NAME=VALUE.

    Raises:
      ConfigError: a text of another form.
    """
    settings = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise ConfigError(f"setting {text!r} must be NAME=VALUE.")
        settings[name] = value
    return settings


def trained_settings(trained: Mapping[str, str], names: Sequence[str], given: Mapping[str, str]) -> dict[str, str]:
    """Settings of environments: those given, and for others those under which the policy's dataset was made.

    Args:
      trained: what the dataset says about its environment: its family, and settings.
      names: of the environments.
      given: settings; there is a warning about those that differ from the dataset's.
    """
    family, own = trained.get("family"), {name: value for name, value in trained.items() if name != "family"}
    if {name.partition(":")[0] for name in names} != {family}:
        return dict(given)
    for name, value in own.items():
        if given.get(name, value) != value:
            logger.warning("The policy was trained on images and states of %s=%s, not %s.", name, value, given[name])
    return own | dict(given)


def roll_out(
    runner: PolicyRunner,
    names: Sequence[str],
    environment: EnvironmentOptions,
    options: RolloutOptions,
    on_episode: OnEpisode = lambda result, recording: None,
    make: MakeEnvironment = make_environment,
    ended: Sequence[EpisodeResult] = (),
) -> list[EpisodeResult]:
    """Rolls a policy out.

    An episode whose environment raises an error, dies or does not answer has crashed; its worker is replaced.

    Args:
      runner: of the policy.
      names: of the environments, as `como_jax.envs.registry.environment_names` returns them.
      environment: options of all environments; if it names no cameras, those of the policy are rendered.
      options: of the rollouts.
      on_episode: called with every episode as it ends, in no particular order.
      make: makes an environment; a function at the top of a module.
      ended: episodes that are known already, and are not played again.

    Returns:
      All episodes, by task and number.

    Raises:
      ConfigError: an environment does not suit the policy, or options are out of range.
      NonFiniteError: the policy returned actions that are not finite.
    """
    environment, options = _resolve(runner.spec, environment, options)
    count = max(1, min(options.workers, len(names) * options.episodes - len(ended)))
    with WorkerPool(count, make, options.start_timeout, options.step_timeout) as pool:
        _check_tasks(runner.spec, names, environment, environment_seed(options.seed, 0), pool)
        return _Rollouts(runner, environment, options, pool).run(names, on_episode, ended)


def check_rollouts(
    policy: PolicySpec,
    names: Sequence[str],
    environment: EnvironmentOptions,
    options: RolloutOptions,
    make: MakeEnvironment = make_environment,
) -> None:
    """Does the checks of `roll_out`, for a policy that will be rolled out much later.

    Raises:
      ConfigError: an environment does not suit the policy, or options are out of range.
    """
    environment, options = _resolve(policy, environment, options)
    with WorkerPool(min(options.workers, len(names)), make, options.start_timeout, options.step_timeout) as pool:
        _check_tasks(policy, names, environment, environment_seed(options.seed, 0), pool)


def check_compatible(policy: PolicySpec, environment: EnvironmentSpec, instruction: str) -> list[str]:
    """Warnings of what may harm a policy in an environment.

    Raises:
      ConfigError: the policy cannot act there.
    """
    name = environment.name
    if environment.action_size != policy.action_size:
        raise ConfigError(
            f"{name} takes actions of {environment.action_size} numbers, the policy's have {policy.action_size}."
        )
    if policy.state_size and environment.state_size != policy.state_size:
        raise ConfigError(
            f"{name} has a state of {environment.state_size} numbers, the policy was trained on {policy.state_size}."
        )
    if set(environment.cameras) != set(policy.cameras):
        raise ConfigError(
            f"{name} has the cameras {', '.join(environment.cameras)}, the policy was trained on "
            f"{', '.join(policy.cameras)}: they must be the same."
        )
    if policy.uses_text and not instruction.strip():
        raise ConfigError(f"{name} gives no instruction, and the policy needs one to act.")
    if not np.isclose(environment.control_rate, policy.control_rate, rtol=0.01):
        rates = f"{environment.control_rate:g} actions a second, and the policy was trained on {policy.control_rate:g}"
        return [f"The environment takes {rates}."]
    return []


def _resolve(
    policy: PolicySpec, environment: EnvironmentOptions, options: RolloutOptions
) -> tuple[EnvironmentOptions, RolloutOptions]:
    """Both, with the policy's values where they leave them open; raises ConfigError for values out of range."""
    options.check()
    options = dataclasses.replace(options, control=options.control.resolve(policy.chunk))
    return dataclasses.replace(environment, cameras=environment.cameras or policy.cameras), options


def _check_tasks(
    policy: PolicySpec, names: Sequence[str], environment: EnvironmentOptions, seed: int, pool: WorkerPool
) -> None:
    """Begins an episode of every task, or of one of each suite, whose tasks are alike.

    A simulator that crashes is only warned of, since it may not crash again.

    Raises:
      ConfigError: the policy cannot act in one of them, or one cannot be made.
    """
    warnings: dict[str, None] = {}
    names = list({suite_of(name) or name: name for name in reversed(names)}.values())[::-1]
    for first in range(0, len(names), len(pool)):
        batch = names[first : first + len(pool)]
        for slot, name in enumerate(batch):
            pool.request(slot, Start(name, environment, seed))
        for slot, reply in pool.gather().items():
            if isinstance(reply, Failed):
                warnings[f"{batch[slot]} could not be checked: {reply.reason}"] = None
            else:
                warnings |= dict.fromkeys(check_compatible(policy, reply.spec, reply.instruction))
    for warning in warnings:
        logger.warning(warning)


class _Rollouts:
    """All workers step by step together; the policy is asked for all of them at once."""

    def __init__(
        self, runner: PolicyRunner, environment: EnvironmentOptions, options: RolloutOptions, pool: WorkerPool
    ):
        self._runner, self._environment, self._options, self._pool = runner, environment, options, pool

    def run(self, names: Sequence[str], on_episode: OnEpisode, ended: Sequence[EpisodeResult]) -> list[EpisodeResult]:
        """All episodes of all tasks, without playing those again that have ended."""
        known = {(result.task, result.episode) for result in ended}
        wanted = ((name, episode) for name in names for episode in range(self._options.episodes))
        waiting = collections.deque(episode for episode in wanted if episode not in known)
        order = {name: number for number, name in enumerate(names)}
        playing: dict[int, _Episode] = {}
        results = list(ended)
        with (
            tqdm(total=len(waiting), unit="episode", disable=None, leave=False) as bar,
            logging_redirect_tqdm([logging.getLogger("como_jax")]),
        ):
            while waiting or playing:
                self._act(playing)
                for slot in range(len(self._pool)):
                    if slot not in playing and waiting:
                        playing[slot] = self._begin(slot, *waiting.popleft())
                for slot, reply in self._pool.gather().items():
                    result = playing[slot].receive(reply)
                    if result is not None:
                        on_episode(result, playing.pop(slot).recording())
                        results.append(result)
                        bar.update()
        return sorted(results, key=lambda result: (order[result.task], result.episode))

    def _begin(self, slot: int, name: str, episode: int) -> _Episode:
        self._pool.request(slot, Start(name, self._environment, environment_seed(self._options.seed, episode)))
        return _Episode(self._runner.spec, self._options, name, episode)

    def _act(self, playing: dict[int, _Episode]) -> None:
        """Asks every worker with an episode for its next step."""
        asking = [episode for episode in playing.values() if episode.controller.needs_chunk()]
        if asking:
            # A batch of another size would be another program to compile.
            padded = asking + [asking[-1]] * (len(self._pool) - len(asking))
            chunks = self._runner.sample(
                [episode.history() for episode in padded], [episode.chunk_seed() for episode in padded]
            )
            for episode, chunk in zip(asking, chunks, strict=False):
                episode.controller.add_chunk(chunk)
        for slot, episode in playing.items():
            self._pool.request(slot, episode.next_step())


class _Episode:
    """An episode that is being played; it has a controller once it has begun."""

    controller: Controller

    def __init__(self, policy: PolicySpec, options: RolloutOptions, name: str, number: int):
        self._policy, self._options, self._number = policy, options, number
        self._name, self._frames, self._steps, self._success = name, [], 0, False
        self._is_filmed = options.videos is None or number < options.videos
        self._spec: EnvironmentSpec | None = None
        self._instruction = ""

    def chunk_seed(self) -> tuple[int, ...]:
        """The numbers from which the policy's draws for the next chunk follow."""
        # From the name: the number of a task depends on the other tasks. 31 bits, since some integers are signed.
        task = zlib.crc32(self._name.encode()) & 0x7FFFFFFF
        return (self._options.seed, task, self._number, self.controller.steps)

    def history(self) -> History:
        """What the policy is asked about for the next chunk."""
        return self.controller.history(self._instruction)

    def next_step(self) -> Step:
        """What the worker is asked for next; the controller must have its chunk."""
        action = self.controller.next_action()
        return Step(action, self._is_filmed or self.controller.needs_images())

    def receive(self, reply: Reply) -> EpisodeResult | None:
        """Processes a worker's answer; returns the result if the episode is over."""
        if isinstance(reply, Failed):
            return self._result(reason=reply.reason)
        if isinstance(reply, Started):
            check_compatible(self._policy, reply.spec, reply.instruction)
            self._spec, self._instruction = reply.spec, reply.instruction
            self.controller = Controller(self._policy, self._options.control)
        images = reply.observation.images
        self.controller.observe(images, reply.observation.state)
        if images:
            self._frames.append(images[self._spec.cameras[0]])
        if isinstance(reply, StepResult):
            self._steps += 1
            self._success |= bool(reply.success)
            if reply.done or self._steps >= self._spec.max_steps:
                return self._result()
        return None

    def recording(self) -> Recording:
        """The frames so far."""
        return Recording(self._frames, self._spec.control_rate if self._spec else self._policy.control_rate)

    def _result(self, reason: str = "") -> EpisodeResult:
        return EpisodeResult(
            task=self._name,
            episode=self._number,
            seed=environment_seed(self._options.seed, self._number),
            instruction=self._instruction,
            steps=self._steps,
            success=self._success and not reason,
            reason=reason,
        )
