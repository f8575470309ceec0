"""A server that answers a robot's observations with actions, in one of `como_jax.serving.protocols`.

Every connection has its own session. An episode begins with the first observation, where the client says so, and with
an observation that has another prompt. What is wrong with a request is its answer, and the connection stays open.

GET /healthz, which is also /health, answers as long as the event loop runs; /metrics answers in Prometheus' format. If
the server has a token, everything except /healthz needs the header `Authorization: Api-Key TOKEN`. Browsers are
refused, because any web page could otherwise connect to a server on its visitor's machine.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hmac
import http
import logging
import signal
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from como_jax.errors import ConfigError, UsageError
from como_jax.serving.observations import ObservationReader, PolicyRequest
from como_jax.serving.policy import ServedPolicy, ServedSession
from como_jax.serving.protocols import OPENPI, Incoming, make_protocol

logger = logging.getLogger(__name__)

# Messages that are queued for a client that sends without reading the answers.
_MAX_QUEUE = 4
_SIGNALS = (signal.SIGTERM, signal.SIGINT)

OUTCOMES = ("answered", "refused", "failed")
"""Of a request: actions were sent, the request was wrong, or the policy raised an error."""
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)  # Seconds.


@dataclasses.dataclass(frozen=True)
class ServerOptions:
    """Settings of a server.

    Attributes:
      host, port: address to listen at; port 0 takes any free one.
      protocol: that clients speak, one of `PROTOCOLS`.
      token: that clients must send; empty for none.
      max_message: size of the largest message in bytes; a client that sends more is disconnected.
      grace: seconds that requests in progress have to end when the server is stopped.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    protocol: str = OPENPI
    token: str = ""
    max_message: int = 32 * 2**20
    grace: float = 10.0


class Metrics:
    """Prometheus metrics of one server.

    Attributes:
      requests: number of requests, by outcome.
      request_seconds: from the arrival of a message until its answer is sent.
      policy_seconds: the part of it spent in the policy.
      connections: number of open connections.
      opened: number of connections so far.
      unauthorized: number of attempts without the right token.
    """

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self.requests = Counter("como_serve_requests", "Requests by outcome.", ["outcome"], registry=registry)
        self.request_seconds = Histogram(
            "como_serve_request_seconds", "From message to answer.", buckets=_BUCKETS, registry=registry
        )
        self.policy_seconds = Histogram(
            "como_serve_policy_seconds", "Of a request, in the policy.", buckets=_BUCKETS, registry=registry
        )
        self.connections = Gauge("como_serve_connections", "Open connections.", registry=registry)
        self.opened = Counter("como_serve_opened_connections", "Connections so far.", registry=registry)
        self.unauthorized = Counter("como_serve_unauthorized", "Attempts without the token.", registry=registry)
        # Counters that exist from the start let Prometheus see the first failure as an increase.
        for outcome in OUTCOMES:
            self.requests.labels(outcome)

    def render(self) -> str:
        """Returns all metrics in Prometheus' text format."""
        return generate_latest(self._registry).decode()


class PolicyServer:
    """Serves one policy, which runs in one thread and answers one request after the other."""

    def __init__(self, policy: ServedPolicy, reader: ObservationReader, options: ServerOptions):
        self._policy, self._reader, self._options = policy, reader, options
        self._metrics = Metrics()
        metadata = {**policy.metadata, "observation": reader.describe()}
        self._protocol = make_protocol(options.protocol, policy.inputs, metadata, options.token)
        self._in_progress, self._quiet = 0, asyncio.Event()
        self._quiet.set()
        self._stopping = False

    async def run(self, stop: asyncio.Event, on_listening: Callable[[int], None] = lambda port: None) -> None:
        """Serves until `stop` is set, then answers the requests in progress.

        Args:
          stop: is set in the event loop that runs this.
          on_listening: is called with the port as soon as clients can connect.

        Raises:
          ConfigError: the server cannot listen at this host and port.
        """
        options = self._options
        with ThreadPoolExecutor(1, "policy") as self._executor:
            serving = serve(
                self._converse,
                options.host,
                options.port,
                process_request=self._screen,
                origins=[None],
                # Compression hardly shrinks images, and clients do not compress either.
                compression=None,
                ping_timeout=self._protocol.ping_timeout,
                max_size=options.max_message,
                max_queue=_MAX_QUEUE,
            )
            try:
                server = await serving
            except (OSError, OverflowError) as error:
                raise ConfigError(f"`host` {options.host}, `port` {options.port} cannot be used: {error}") from error
            async with server:
                on_listening(next(iter(server.sockets)).getsockname()[1])
                await stop.wait()
                await self._finish()

    def run_until_signal(self) -> None:
        """Serves until SIGTERM or Ctrl-C; a second signal ends a server whose policy does not let it stop."""

        async def run() -> None:
            stop, loop = asyncio.Event(), asyncio.get_running_loop()

            def on_signal() -> None:
                stop.set()
                for number in _SIGNALS:
                    loop.remove_signal_handler(number)

            for number in _SIGNALS:
                loop.add_signal_handler(number, on_signal)
            await self.run(stop, lambda port: logger.info("Serving at ws://%s:%d", self._options.host, port))

        asyncio.run(run())
        logger.info("Stopped.")

    async def _finish(self) -> None:
        self._stopping = True
        try:
            await asyncio.wait_for(self._quiet.wait(), self._options.grace)
        except TimeoutError:
            logger.warning("Stopped with %d requests in progress.", self._in_progress)

    def _screen(self, connection: ServerConnection, request: Request) -> Response | None:
        """Answers plain HTTP requests and refuses clients without the token; returns None to let a client in."""
        path = request.path.partition("?")[0]
        if path in ("/healthz", "/health"):
            return connection.respond(http.HTTPStatus.OK, "OK\n")
        if not self._authorized(request):
            self._metrics.unauthorized.inc()
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "Send the header Authorization: Api-Key TOKEN.\n")
        if path == "/metrics":
            response = connection.respond(http.HTTPStatus.OK, self._metrics.render())
            del response.headers["Content-Type"]
            response.headers["Content-Type"] = CONTENT_TYPE_LATEST
            return response
        if self._stopping:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "The server is being stopped.\n")
        return None

    def _authorized(self, request: Request) -> bool:
        if not self._options.token:
            return True
        expected = f"Api-Key {self._options.token}".encode()
        given = request.headers.get_all("Authorization")
        # compare_digest takes the same time however much of the token is right.
        return len(given) == 1 and hmac.compare_digest(given[0].encode(errors="surrogateescape"), expected)

    async def _converse(self, connection: ServerConnection) -> None:
        """Answers all requests of one client."""
        client = "%s:%s" % connection.remote_address[:2]  # noqa: UP031
        logger.info("%s connected", client)
        self._metrics.opened.inc()
        with self._metrics.connections.track_inprogress():
            try:
                await self._answer_all(connection, _Conversation(self._policy.new_session(), client))
            except ConnectionClosed as error:
                logger.info("%s disconnected (%s)", client, error)

    async def _answer_all(self, connection: ServerConnection, conversation: _Conversation) -> None:
        if self._protocol.greeting is not None:
            await connection.send(self._protocol.greeting)
        last_total: float | None = None
        while not self._stopping:
            message = await connection.recv()
            begin = time.monotonic()
            self._in_progress += 1
            self._quiet.clear()
            try:
                timing = {} if last_total is None else {"prev_total_ms": 1000 * last_total}
                if (answer := await self._answer(message, conversation, timing)) is not None:
                    await connection.send(answer)
            finally:
                self._in_progress -= 1
                if not self._in_progress:
                    self._quiet.set()
            last_total = time.monotonic() - begin
            self._metrics.request_seconds.observe(last_total)
        await connection.close(CloseCode.GOING_AWAY, "The server is being stopped.")

    async def _answer(
        self, message: bytes | str, conversation: _Conversation, timing: Mapping[str, float]
    ) -> bytes | str | None:
        """Returns the message to send back, actions or what is wrong; None if none is expected."""
        incoming = Incoming()
        try:
            incoming = self._protocol.read(message)
            if incoming.begins_episode:
                conversation.end_episode()
            if incoming.observation is None:
                return incoming.reply
            request = self._reader.read(incoming.observation)
            loop = asyncio.get_running_loop()
            actions, seconds = await loop.run_in_executor(self._executor, conversation.act, request)
            self._metrics.policy_seconds.observe(seconds)
            reply = self._protocol.pack_actions(incoming, actions, {"infer_ms": 1000 * seconds, **timing})
        except UsageError as error:
            self._metrics.requests.labels("refused").inc()
            logger.info("%s was refused: %s", conversation.client, error)
            return self._protocol.pack_error(incoming, str(error))
        # An error of the policy must not end the connections of the other clients.
        except Exception as error:
            self._metrics.requests.labels("failed").inc()
            logger.exception("The policy failed for %s", conversation.client)
            text = f"The policy failed, and its episode begins anew: {type(error).__name__}: {error}"
            return self._protocol.pack_error(incoming, text)
        self._metrics.requests.labels("answered").inc()
        return reply


class _Conversation:
    """The session of one client and the prompt of its current episode."""

    def __init__(self, session: ServedSession, client: str):
        self.client, self._session = client, session
        self._prompt: str | None = None

    def end_episode(self) -> None:
        """Lets the next observation begin an episode."""
        self._prompt = None

    def act(self, request: PolicyRequest) -> tuple[np.ndarray, float]:
        """Returns the actions and the seconds that they took."""
        begin = time.monotonic()
        if request.reset or request.prompt != self._prompt:
            self._session.reset()
            self._prompt = request.prompt
        try:
            actions = self._session.act(request.images, request.state, request.prompt)
        except BaseException:
            # The session may have recorded only a part of this observation, so the next one begins an episode.
            self._prompt = None
            raise
        return actions, time.monotonic() - begin
