"""A client of the policy server, and of openpi's own server, that waits for each answer."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from websockets.sync.client import connect

from como_jax.serving.messages import RequestError, pack, unpack


class PolicyClient(contextlib.AbstractContextManager):
    """One connection, which is one session; use it in a `with` statement, whose end closes it.

    Attributes:
      metadata: what the server told about its policy.
    """

    def __init__(self, url: str, token: str = ""):
        """Connects to a server.

        Args:
          url: as in ws://localhost:8000.
          token: that the server asks for.

        Raises:
          OSError: no server answers.
          websockets.exceptions.InvalidStatus: the server refuses the connection; status 401 for a wrong token.
        """
        headers = {"Authorization": f"Api-Key {token}"} if token else None
        # The server is trusted: its answers may have any size.
        self._connection = connect(url, compression=None, max_size=None, additional_headers=headers)
        self.metadata: dict[str, Any] = self._receive()

    def infer(self, observation: Mapping[str, Any]) -> dict[str, Any]:
        """Sends an observation and returns the answer, with `actions` `[n, A]` and `server_timing`.

        Raises:
          RequestError: the server's account of what is wrong with the observation. The connection stays open.
        """
        self._connection.send(pack(observation))
        return self._receive()

    def close(self) -> None:
        """Ends the session."""
        self._connection.close()

    def __exit__(self, *error: object) -> None:
        self.close()

    def _receive(self) -> dict[str, Any]:
        answer = self._connection.recv()
        if isinstance(answer, str):
            raise RequestError(answer)
        return unpack(answer)
