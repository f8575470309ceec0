"""Times requests to a policy server on this machine: the round trip, the part of the policy, and the rest.

    python -m tools.benchmarks.serving --model RUN
    python -m tools.benchmarks.serving --cameras 2 --image_size 224

The server runs in its own process. Without --model, its policy answers at once, so that only the protocol is timed:
packing, the local network, unpacking and checks. One client sends images of noise, one request after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import tqdm
from absl import flags

from como_jax import cli
from como_jax.errors import RunError
from como_jax.serving.client import PolicyClient
from como_jax.serving.loading import load_policy
from como_jax.serving.observations import ObservationReader
from como_jax.serving.policy import PolicyInputs, PolicyOptions, ServedPolicy
from como_jax.serving.server import PolicyServer, ServerOptions
from tools.benchmarks.machine import describe_machine

_SHARES = (0.5, 0.95, 0.99)
_START_TIMEOUT = 600.0


class InstantPolicy:
    """A policy, and its own session, that answers zeros at once."""

    def __init__(self, cameras: int, state_size: int = 8, action_size: int = 8, chunk: int = 16):
        """Takes the sizes of observations and answers."""
        self.inputs = PolicyInputs(tuple(f"camera_{number}" for number in range(cameras)), state_size, uses_text=True)
        self.metadata: Mapping[str, Any] = {}
        self._actions = np.zeros((chunk, action_size), np.float32)

    def new_session(self) -> InstantPolicy:
        """See `ServedPolicy`."""
        return self

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        """See `Session`."""
        return self._actions

    def reset(self) -> None:
        """See `Session`."""


def _serve(model: str | None, cameras: int, ready: Connection) -> None:
    """Serves in a process; sends back the port and the inputs that the policy needs."""
    policy: ServedPolicy = InstantPolicy(cameras) if model is None else load_policy(model, PolicyOptions())
    server = PolicyServer(policy, ObservationReader(policy.inputs), ServerOptions(port=0))
    asyncio.run(server.run(asyncio.Event(), lambda port: ready.send((port, policy.inputs))))


@contextlib.contextmanager
def serving(model: str | None, cameras: int) -> Iterator[tuple[str, PolicyInputs]]:
    """The address of a server that runs in another process, and the inputs that its policy needs.

    Raises:
      RunError: it did not start.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=_serve, args=(model, cameras, there), daemon=True)
    process.start()
    there.close()
    try:
        try:
            port, inputs = here.recv() if here.poll(_START_TIMEOUT) else (None, None)
        except EOFError:
            port, inputs = None, None
        if inputs is None:
            raise RunError("The server did not start; its process says why above.")
        yield f"ws://127.0.0.1:{port}", inputs
    finally:
        process.terminate()
        process.join()


def time_requests(url: str, observation: Mapping[str, Any], count: int, warm_up: int) -> tuple[np.ndarray, np.ndarray]:
    """Seconds of every round trip, and of the policy in it, both float64 `[count]`."""
    times = np.empty((warm_up + count, 2))
    with PolicyClient(url) as client:
        for row in tqdm.tqdm(times, unit="request", disable=None, leave=False):
            begin = time.perf_counter()
            answer = client.infer(observation)
            row[:] = time.perf_counter() - begin, answer["server_timing"]["infer_ms"] / 1000
    return times[warm_up:, 0], times[warm_up:, 1]


def make_observation(inputs: PolicyInputs, height: int, width: int) -> dict[str, Any]:
    """An observation of noise, as a robot would send it."""
    noise = np.random.default_rng(0)
    images = {
        f"observation/{camera}": noise.integers(0, 256, (height, width, 3), np.uint8) for camera in inputs.cameras
    }
    return {**images, "observation/state": np.zeros(inputs.state_size, np.float32), "prompt": "pick up the cup"}


def describe(name: str, seconds: np.ndarray) -> str:
    """One row of the table."""
    cells = " | ".join(f"{1000 * np.quantile(seconds, share):.2f}" for share in _SHARES)
    return f"| {name} | {cells} | {1000 * seconds.max():.2f} |"


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("model", None, "As for tools.serve; by default a policy that answers at once.")
    flags.DEFINE_integer("cameras", 2, "Of the policy that answers at once.", lower_bound=1)
    flags.DEFINE_integer("image_size", 224, "Height of the images that are sent.", lower_bound=1)
    flags.DEFINE_integer("image_width", 0, "Their width; 0 for the height.", lower_bound=0)
    flags.DEFINE_integer("requests", 1000, "That are timed, after twenty that are not.", lower_bound=1)


def main(arguments: Sequence[str]) -> None:
    """Prints the machine and a table."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    height, width = given.image_size, given.image_width or given.image_size
    with serving(given.model, given.cameras) as (url, inputs):
        total, policy = time_requests(url, make_observation(inputs, height, width), given.requests, warm_up=20)
    print(describe_machine())
    print(f"{given.requests} requests of {len(inputs.cameras)} images of {height} x {width}")
    print("\n| ms | 50 % | 95 % | 99 % | most |\n|---|---|---|---|---|")
    for name, seconds in (("round trip", total), ("policy", policy), ("all else", total - policy)):
        print(describe(name, seconds))


if __name__ == "__main__":
    define_flags()
    cli.run(main)
