"""A client of the policy server, or of openpi's own, that waits for each answer."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from websockets.sync.client import connect

from como_jax.serving.protocol import RequestError, pack, unpack


class PolicyClient:
    """One connection, and so one session; a context manager that closes it.

    Attributes:
      metadata: what the server said about its policy.
    """

    def __init__(self, url: str, token: str = ""):
        """Connects.

        Args:
          url: as in ws://localhost:8000.
          token: that the server asks for.

        Raises:
          OSError: nothing answers there.
          websockets.exceptions.InvalidStatus: the server refuses; 401 for a wrong token.
        """
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        # The server is trusted: its answers may have any size.
        self._connection = connect(url, compression=None, max_size=None, additional_headers=headers)
        self.metadata: dict[str, Any] = self._receive()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """The server's answer, with `actions` `[n, A]` and `server_timing`.

        Raises:
          RequestError: the server says what is wrong with the observation; the next may be right.
        """
        self._connection.send(pack(observation))
        return self._receive()

    def close(self) -> None:
        """Ends the session."""
        self._connection.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RequestError(answer)
        return unpack(answer)
