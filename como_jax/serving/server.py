"""A server of openpi's websocket protocol: metadata on connecting, then an observation in and actions out.

Binary messages are `como_jax.serving.protocol`'s. An answer holds `actions`, `[n, A]`, and `server_timing`, a map with
`infer_ms` of this request and `prev_total_ms` of the one before; a text message says what is wrong instead, and the
connection stays open. Every connection has a session of its own, and its first observation, one with `reset: True` or
one with another prompt begins an episode.

GET /healthz answers as long as the event loop runs, /metrics in Prometheus' format. With a token, all but /healthz
need the header `Authorization: Api-Key TOKEN`. Browsers are refused, since any page that a user visits can connect to a
server on the same machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import http
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from como_jax.errors import ConfigError, UsageError
from como_jax.serving.metrics import CONTENT_TYPE, Metrics
from como_jax.serving.observations import Observation, ObservationReader
from como_jax.serving.policy import ServedPolicy, Session
from como_jax.serving.protocol import RequestError, pack, unpack

logger = logging.getLogger(__name__)

# Of a client that sends without reading answers.
_WAITING_MESSAGES = 4


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """How to serve.

    Attributes:
      host, port: to listen at; port 0 for any that is free.
      token: that clients must send; empty for none.
      max_message: bytes of the largest message; a client that sends more is disconnected.
      grace: seconds that requests have to end when the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    token: str = ""
    max_message: int = 32 * 2**20
    grace: float = 10.0


class PolicyServer:
    """Serves one policy; the policy runs in one thread, one request after the other."""

    def __init__(self, policy: ServedPolicy, reader: ObservationReader, options: ServerOptions):
        """Takes the policy, what finds its inputs in messages, and how to serve."""
        self._policy, self._reader, self._options = policy, reader, options
        self._metrics = Metrics()
        self._greeting = pack({**policy.metadata, "observation": reader.describe()})
        self._in_progress, self._quiet = 0, asyncio.Event()
        self._quiet.set()
        self._stopping = False

    async def run(self, stop: asyncio.Event, on_listening: Callable[[int], None] = lambda port: None) -> None:
        """Serves until `stop` is set; requests that are in progress are then answered.

        Args:
          stop: set in the event loop that runs this.
          on_listening: gets the port once clients can connect.

        Raises:
          ConfigError: the port cannot be listened at.
        """
        options = self._options
        with ThreadPoolExecutor(1, "policy") as self._executor:
            serving = serve(
                self._converse,
                options.host,
                options.port,
                process_request=self._screen,
                origins=[None],
                # Pictures hardly shrink, and openpi's clients do not compress either.
                compression=None,
                max_size=options.max_message,
                max_queue=_WAITING_MESSAGES,
            )
            try:
                server = await serving
            except (OSError, OverflowError) as error:
                raise ConfigError(f"--host {options.host} --port {options.port} cannot be used: {error}") from error
            async with server:
                on_listening(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
                await self._finish()

    async def _finish(self) -> None:
        self._stopping = True
        try:
            await asyncio.wait_for(self._quiet.wait(), self._options.grace)
        except TimeoutError:
            logger.warning("Stopped with %d requests in progress.", self._in_progress)

    def _screen(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP and refuses who has no token; None lets a client in."""
        path = request.path.partition("?")[0]
        if path == "/healthz":
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self._metrics.unauthorized.inc()
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Api-Key TOKEN.\n")
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self._metrics.render())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE
            return response
        if self._stopping:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "The server is being stopped.\n")
        return None

    def _authorized(self, request: Request) -> bool:
        if not self._options.token:
            return True
        expected = f"Api-Key {self._options.token}".encode()
        given = request.headers.get_all("Authorization")
        # In a time that does not tell how much of the token is right.
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected)

    async def _converse(self, connection: ServerConnection) -> None:
        """All requests of one client."""
        client = "%s:%s" % connection.remote_address[:2]  # noqa: UP031
        logger.info("%s connected", client)
        self._metrics.opened.inc()
        with self._metrics.connections.track_inprogress():
            try:
                await self._answer_all(connection, _Conversation(self._policy.new_session(), client))
            except ConnectionClosed as error:
                logger.info("%s disconnected (%s)", client, error)

    async def _answer_all(self, connection: ServerConnection, conversation: _Conversation) -> None:
        await connection.send(self._greeting)
        last_total: float | None = None
        while not self._stopping:
            message = await connection.recv()
            begin = time.monotonic()
            self._in_progress += 1
            self._quiet.clear()
            try:
                timing = {} if last_total is None else {"prev_total_ms": 1000 * last_total}
                await connection.send(await self._answer(message, conversation, timing))
            finally:
                self._in_progress -= 1
                if not self._in_progress:
                    self._quiet.set()
            last_total = time.monotonic() - begin
            self._metrics.request_seconds.observe(last_total)
        await connection.close(CloseCode.GOING_AWAY, "The server is being stopped.")

    async def _answer(
        self, message: bytes | str, conversation: _Conversation, timing: Mapping[str, float]
    ) -> bytes | str:
        """The message to send back: bytes with actions, or text that says what is wrong."""
        try:
            if isinstance(message, str):
                raise RequestError("Observations are sent as binary messages of msgpack, not as text.")
            observation = self._reader.read(unpack(message))
            loop = asyncio.get_running_loop()
            answer, seconds = await loop.run_in_executor(self._executor, conversation.act, observation)
            self._metrics.policy_seconds.observe(seconds)
            reply = pack({**answer, "server_timing": {"infer_ms": 1000 * seconds, **timing}})
        except UsageError as error:
            self._metrics.requests.labels("refused").inc()
            logger.info("%s was refused: %s", conversation.client, error)
            return str(error)
        # Whatever a policy raises must not take the other clients with it.
        except Exception as error:
            self._metrics.requests.labels("failed").inc()
            logger.exception("The policy failed for %s", conversation.client)
            return f"The policy failed, and its episode begins anew: {type(error).__name__}: {error}"
        self._metrics.requests.labels("answered").inc()
        return reply


class _Conversation:
    """One client's session and the episode that it is in."""

    def __init__(self, session: Session, client: str):
        self.client, self._session = client, session
        self._prompt: str | None = None

    def act(self, observation: Observation) -> tuple[dict[str, Any], float]:
        """The answer, and the seconds that it took."""
        begin = time.monotonic()
        if observation.reset or observation.prompt != self._prompt:
            self._session.reset()
            self._prompt = observation.prompt
        try:
            actions = self._session.act(observation.images, observation.state, observation.prompt)
        except BaseException:
            # What it has noted of an observation that it did not act on is not known.
            self._prompt = None
            raise
        return {"actions": actions}, time.monotonic() - begin
