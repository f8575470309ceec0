"""A policy that answers at once, a server of it in a thread, and what a robot would send."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from como_jax.errors import ConfigError
from como_jax.serving.observations import ObservationReader
from como_jax.serving.policy import PolicyInputs, ServedPolicy
from como_jax.serving.server import PolicyServer, ServerOptions

INPUTS = PolicyInputs(cameras=("top", "wrist"), state_size=3, uses_text=True)


def observation(**changes: Any) -> dict[str, Any]:
    """What the fake policy understands."""
    image = np.zeros((4, 6, 3), np.uint8)
    fields = {"observation/top": image, "observation/wrist": image, "observation/state": np.arange(3.0)}
    return {**fields, "prompt": "go", **changes}


class FakeSession:
    """Answers with its number and how often it was asked in this episode; the prompt says what else to do."""

    def __init__(self, policy: FakePolicy, number: int):
        self._policy, self._number, self._steps = policy, number, 0

    def act(self, images: Mapping[str, np.ndarray], state: np.ndarray, prompt: str) -> np.ndarray:
        self._steps += 1
        if prompt == "refuse":
            raise ConfigError("prompt is beyond this policy.")
        if prompt == "fail":
            raise ZeroDivisionError("as asked")
        if prompt == "wait":
            self._policy.busy.set()
            assert self._policy.go_on.wait(60)
        return np.array([[self._number, self._steps, *state]], np.float32)

    def reset(self) -> None:
        self._steps = 0


class FakePolicy:
    """Attributes: busy is set while it waits, and go_on lets it end."""

    def __init__(self) -> None:
        self.inputs = INPUTS
        self.metadata: Mapping[str, Any] = {"action_dim": 5}
        self.busy, self.go_on = threading.Event(), threading.Event()
        self._numbers = itertools.count()

    def new_session(self) -> FakeSession:
        return FakeSession(self, next(self._numbers))


class Running:
    """A server that runs; `stop` ends it and waits."""

    def __init__(self, policy: ServedPolicy, options: ServerOptions):
        self._server = PolicyServer(policy, ObservationReader(policy.inputs), options)
        self._listening = threading.Event()
        self.thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.thread.start()
        assert self._listening.wait(60)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        await self._server.run(self._stop, self._on_listening)

    def _on_listening(self, port: int) -> None:
        self.url, self.http = f"ws://127.0.0.1:{port}", f"http://127.0.0.1:{port}"
        self._listening.set()

    def ask_to_stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)

    def stop(self) -> None:
        if self.thread.is_alive():
            self.ask_to_stop()
        self.thread.join(60)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def serving(policy: ServedPolicy, **options: Any) -> Iterator[Running]:
    """Serves in a thread, at a free port."""
    running = Running(policy, ServerOptions(port=0, **options))
    try:
        yield running
    finally:
        running.stop()
