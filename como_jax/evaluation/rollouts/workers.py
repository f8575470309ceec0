"""Processes that each hold one environment at a time; a failure of one of them does not affect the others.

They are started as commands rather than forked or spawned by `multiprocessing`, which would import the calling program,
and JAX with it, into each. They end by themselves when the calling process ends.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from types import TracebackType

import numpy as np

from como_jax.envs.base import Environment, EnvironmentOptions, EnvironmentSpec, Observation, StepResult
from como_jax.errors import ConfigError, UsageError

MakeEnvironment = Callable[[str, EnvironmentOptions], Environment]

_CLOSING_SECONDS = 5.0


@dataclasses.dataclass(frozen=True)
class Start:
    """Asks for an episode of the environment `name`; answered by `Started`."""

    name: str
    options: EnvironmentOptions
    seed: int


@dataclasses.dataclass(frozen=True)
class Step:
    """Asks for a step, action float32 `[A]`, and for images after it; answered by `StepResult`."""

    action: np.ndarray
    render: bool = True


@dataclasses.dataclass(frozen=True)
class Started:
    """An episode has begun."""

    spec: EnvironmentSpec
    instruction: str
    observation: Observation


@dataclasses.dataclass(frozen=True)
class Refused:
    """The environment cannot be made with these options: a mistake in what was asked for, not a failure."""

    message: str


@dataclasses.dataclass(frozen=True)
class Failed:
    """The environment raised an error, or its process died or did not answer."""

    reason: str


Reply = Started | StepResult | Failed


class WorkerPool:
    """A fixed number of workers, one per slot. A worker that failed is replaced when its slot is asked again."""

    def __init__(self, count: int, make: MakeEnvironment, start_timeout: float, step_timeout: float):
        """Starts the workers.

        Args:
          count: of workers.
          make: makes environments; a function at the top of a module, which the workers import.
          start_timeout, step_timeout: seconds that a worker may take to begin an episode, and for a step.
        """
        self._make, self._timeouts = make, {Start: start_timeout, Step: step_timeout}
        self._workers: list[_Worker | None] = [_Worker(make) for _ in range(count)]
        self._limits: dict[int, tuple[float, float]] = {}

    def __len__(self) -> int:
        return len(self._workers)

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # All are told to end before any is waited for.
        workers = [worker for worker in self._workers if worker is not None]
        for worker in workers:
            worker.connection.close()
        for worker in workers:
            worker.end(_CLOSING_SECONDS if kind is None else 0.0)

    def request(self, slot: int, message: Start | Step) -> None:
        """Sends a message to a worker, which must have answered the one before."""
        worker = self._workers[slot] = self._workers[slot] or _Worker(self._make)
        timeout = self._timeouts[type(message)]
        self._limits[slot] = (time.monotonic() + timeout, timeout)
        # `gather` notices a worker that has ended.
        with contextlib.suppress(OSError):
            worker.connection.send(message)

    def gather(self) -> dict[int, Reply]:
        """Waits for the answers of all workers that were asked, by slot.

        Raises:
          ConfigError: an environment cannot be made as asked.
        """
        replies: dict[int, Reply] = {}
        while self._limits:
            now = time.monotonic()
            for slot in [slot for slot, (deadline, _) in self._limits.items() if deadline <= now]:
                replies[slot] = self._fail(slot, f"no answer within {self._limits[slot][1]:g} seconds")
            waiting = {self._workers[slot].connection: slot for slot in self._limits}
            remaining = min((deadline for deadline, _ in self._limits.values()), default=now) - now
            for ready in connection.wait(waiting, max(0.0, remaining)):
                replies[waiting[ready]] = self._receive(waiting[ready])
        return dict(sorted(replies.items()))

    def _receive(self, slot: int) -> Reply:
        try:
            reply = self._workers[slot].connection.recv()
        except (EOFError, OSError):
            return self._fail(slot, "")
        if isinstance(reply, Refused):
            raise ConfigError(reply.message)
        if isinstance(reply, Failed):
            return self._fail(slot, reply.reason)
        del self._limits[slot]
        return reply

    def _fail(self, slot: int, reason: str) -> Failed:
        """Ends a worker, for this reason; an empty one means that it ended by itself."""
        worker = self._workers[slot]
        self._workers[slot] = None
        del self._limits[slot]
        worker.connection.close()
        status = worker.end(0.0 if reason else _CLOSING_SECONDS)
        return Failed(reason or f"the worker process ended: {_describe(status)}")


class _Worker:
    """A process and the connection to it."""

    def __init__(self, make: MakeEnvironment):
        ours, theirs = socket.socketpair()
        with theirs:
            code = f"from {__name__} import serve; serve({theirs.fileno()})"
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=[theirs.fileno()],
                # In a group of its own: Ctrl-C in a terminal interrupts all processes of a group.
                process_group=0,
            )
        self.connection = connection.Connection(ours.detach())
        with contextlib.suppress(OSError):
            self.connection.send(make)

    def end(self, patience: float) -> int:
        """Kills the process unless it ends within `patience` seconds; returns the exit status, negative for signals."""
        try:
            return self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def serve(descriptor: int) -> None:
    """The worker process: answers requests from a socket until the socket closes."""
    with connection.Connection(descriptor) as requests, contextlib.suppress(EOFError, OSError):
        holder = _Holder(requests.recv())
        try:
            while True:
                requests.send(holder.answer(requests.recv()))
        finally:
            holder.close()


class _Holder:
    """Holds the environment of the last episode, which the next one may use again."""

    def __init__(self, make: MakeEnvironment):
        self._make = make
        self._wanted: tuple[str, EnvironmentOptions] | None = None
        self._environment: Environment | None = None

    def answer(self, message: Start | Step) -> Reply | Refused:
        """The answer to a message."""
        try:
            if isinstance(message, Step):
                return self._environment.step(message.action, message.render)
            try:
                environment = self._open(message.name, message.options)
            except UsageError as error:
                return Refused(str(error))
            observation = environment.reset(message.seed)
            return Started(environment.spec, environment.instruction, observation)
        except Exception as error:
            return Failed(" ".join(f"{type(error).__name__}: {error}".split()))

    def close(self) -> None:
        """Frees the environment."""
        if self._environment is not None:
            self._environment.close()
        self._wanted, self._environment = None, None

    def _open(self, name: str, options: EnvironmentOptions) -> Environment:
        if self._wanted != (name, options):
            self.close()
            self._environment = self._make(name, options)
            self._wanted = (name, options)
        return self._environment


def _describe(status: int) -> str:
    try:
        return f"exit status {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"
