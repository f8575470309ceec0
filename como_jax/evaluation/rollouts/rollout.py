"""Episodes of a policy in simulators, several at once, judged by success.

Every episode follows from the seed, the task's name and the episode's number, and so does what the policy draws at
each of its steps: neither other tasks nor the number of workers change it, beyond the rounding of batches of another
size on an accelerator.
"""

from __future__ import annotations

import collections
import dataclasses
import logging
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from como_jax.envs.base import FIRST_ROLLOUT_SEED, SEED_STRIDE, EnvironmentOptions, EnvironmentSpec, StepResult
from como_jax.envs.registry import make_environment
from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts.checks import check_compatible, check_tasks
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner
from como_jax.evaluation.rollouts.results import EpisodeResult
from como_jax.evaluation.rollouts.workers import Failed, MakeEnvironment, Reply, Start, Started, Step, WorkerPool
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.interface import History, PolicySpec

logger = logging.getLogger(__name__)

# Simulators take seeds of 32 bits, some of them signed.
MAX_SEED = 1000
# None of the simulators draws anything of use below it.
_MIN_IMAGE_SIZE = 64


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """How many episodes, and how.

    Attributes:
      episodes: of every task.
      workers: environments at once, each in a process.
      seed: another one gives other episodes.
      control: how chunks are carried out.
      step_timeout, start_timeout: seconds after which a worker that does not answer is given up, in a step and at the
        beginning of an episode, which may have to load the simulator.
    """

    episodes: int = 20
    workers: int = 2
    seed: int = 0
    control: ControlConfig = ControlConfig()
    step_timeout: float = 120.0
    start_timeout: float = 600.0

    def check(self) -> None:
        """Raises ConfigError for numbers out of range."""
        if not 1 <= self.episodes <= SEED_STRIDE:
            raise ConfigError(f"--episodes {self.episodes}: must lie between 1 and {SEED_STRIDE}.")
        if not 0 <= self.seed <= MAX_SEED:
            raise ConfigError(f"--seed {self.seed}: must lie between 0 and {MAX_SEED}.")
        if self.workers < 1 or min(self.step_timeout, self.start_timeout) <= 0:
            raise ConfigError("--workers and --step_timeout must be positive.")


@dataclasses.dataclass(frozen=True)
class Recording:
    """What an episode looked like.

    Attributes:
      frames: uint8 `[H, W, 3]` of the environment's first camera, at the beginning and after every step.
      rate: frames a second.
    """

    frames: Sequence[np.ndarray]
    rate: float


OnEpisode = Callable[[EpisodeResult, Recording], None]


def environment_seed(seed: int, episode: int) -> int:
    """The seed that an environment is reset with, beyond those of demonstrations."""
    return FIRST_ROLLOUT_SEED + seed * SEED_STRIDE + episode


def roll_out(
    runner: PolicyRunner,
    names: Sequence[str],
    environment: EnvironmentOptions,
    options: RolloutOptions,
    on_episode: OnEpisode = lambda result, recording: None,
    make: MakeEnvironment = make_environment,
) -> list[EpisodeResult]:
    """Rolls a policy out.

    An episode whose environment raises, dies or does not answer has crashed; its worker is replaced.

    Args:
      runner: of the policy.
      names: of the environments, as `como_jax.envs.registry.environment_names` gives them.
      environment: options of all of them; the policy's cameras are rendered where none are named.
      options: of the rollouts.
      on_episode: called with every episode as it ends, in no particular order.
      make: makes an environment; a function of a module.

    Returns:
      All episodes, by task and number.

    Raises:
      ConfigError: an environment does not suit the policy, or options that make no sense.
      NonFiniteError: the policy gave actions that are not finite.
    """
    environment, options = _resolve(runner.spec, environment, options)
    count = min(options.workers, len(names) * options.episodes)
    with WorkerPool(count, make, options.start_timeout, options.step_timeout) as pool:
        check_tasks(runner.spec, names, environment, environment_seed(options.seed, 0), pool)
        return _Rollouts(runner, environment, options, pool).run(names, on_episode)


def check_rollouts(
    policy: PolicySpec,
    names: Sequence[str],
    environment: EnvironmentOptions,
    options: RolloutOptions,
    make: MakeEnvironment = make_environment,
) -> None:
    """Does what `roll_out` does before the first episode, for those who roll out much later.

    Raises:
      ConfigError: an environment does not suit the policy, or options that make no sense.
    """
    environment, options = _resolve(policy, environment, options)
    with WorkerPool(min(options.workers, len(names)), make, options.start_timeout, options.step_timeout) as pool:
        check_tasks(policy, names, environment, environment_seed(options.seed, 0), pool)


def _resolve(
    policy: PolicySpec, environment: EnvironmentOptions, options: RolloutOptions
) -> tuple[EnvironmentOptions, RolloutOptions]:
    """Both with what they leave to the policy; raises ConfigError for values out of range."""
    options.check()
    options = dataclasses.replace(options, control=options.control.resolve(policy.chunk))
    return dataclasses.replace(environment, cameras=environment.cameras or policy.cameras), options


def picture_size(spec: PolicySpec) -> int:
    """The side of the pictures to render for a policy, which resizes them to what it sees."""
    return max(spec.image_size, _MIN_IMAGE_SIZE)


class _Rollouts:
    """All workers in lock step, and the policy asked for all of them at once."""

    def __init__(
        self, runner: PolicyRunner, environment: EnvironmentOptions, options: RolloutOptions, pool: WorkerPool
    ):
        self._runner, self._environment, self._options, self._pool = runner, environment, options, pool

    def run(self, names: Sequence[str], on_episode: OnEpisode) -> list[EpisodeResult]:
        """All episodes of all tasks."""
        waiting = collections.deque((name, episode) for name in names for episode in range(self._options.episodes))
        order = {name: number for number, name in enumerate(names)}
        playing: dict[int, _Episode] = {}
        results: list[EpisodeResult] = []
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
        """Asks every worker that plays for its next step."""
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
            self._pool.request(slot, Step(episode.controller.next_action()))


class _Episode:
    """An episode that is being played; it has a controller once it has begun."""

    controller: Controller

    def __init__(self, policy: PolicySpec, options: RolloutOptions, name: str, number: int):
        self._policy, self._options, self._number = policy, options, number
        self._name, self._frames, self._success = name, [], False
        self._spec: EnvironmentSpec | None = None
        self._instruction = ""

    def chunk_seed(self) -> tuple[int, ...]:
        """What the policy's draws for the next chunk follow from."""
        # Of the name, since a task's number would depend on what else is rolled out; 31 bits, as of signed integers.
        task = zlib.crc32(self._name.encode()) & 0x7FFFFFFF
        return (self._options.seed, task, self._number, self.controller.steps)

    def history(self) -> History:
        """What the policy is asked about for the next chunk."""
        return self.controller.history(self._instruction)

    def receive(self, reply: Reply) -> EpisodeResult | None:
        """Takes a worker's answer; gives the result once the episode is over."""
        if isinstance(reply, Failed):
            return self._result(reason=reply.reason)
        if isinstance(reply, Started):
            check_compatible(self._policy, reply.spec, reply.instruction)
            self._spec, self._instruction = reply.spec, reply.instruction
            self.controller = Controller(self._policy, self._options.control)
        self.controller.observe(reply.observation.images, reply.observation.state)
        self._frames.append(reply.observation.images[self._spec.cameras[0]])
        if isinstance(reply, StepResult):
            self._success |= bool(reply.success)
            if reply.done or self.controller.steps >= self._spec.max_steps:
                return self._result()
        return None

    def recording(self) -> Recording:
        """What has been seen."""
        return Recording(self._frames, self._spec.control_rate if self._spec else self._policy.control_rate)

    def _result(self, reason: str = "") -> EpisodeResult:
        return EpisodeResult(
            task=self._name,
            episode=self._number,
            seed=environment_seed(self._options.seed, self._number),
            instruction=self._instruction,
            steps=max(0, len(self._frames) - 1),
            success=self._success and not reason,
            reason=reason,
        )
