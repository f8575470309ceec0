"""How clients and the server talk: what openpi's clients send, and what allenai's harness vla-eval sends.

Both pack their messages as `como_jax.serving.messages` says, and both get their actions from the same sessions.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from como_jax.errors import ConfigError
from como_jax.serving.messages import RequestError, pack, unpack
from como_jax.serving.policy import PolicyInputs

OPENPI, VLA_EVAL = "openpi", "vla-eval"
# Of the messages of vla-eval 0.8.
_VLA_EVAL_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Incoming:
    """What a client's message asks for.

    Attributes:
      observation: to answer with actions; None if the message holds none.
      begins_episode: whether the next observation is the first of an episode.
      reply: what to send back to a message without observation; None for nothing.
      number: of the message, which its answer repeats.
    """

    observation: Any = None
    begins_episode: bool = False
    reply: bytes | None = None
    number: int = 0


class WireProtocol(Protocol):
    """What the server knows of a protocol.

    Attributes:
      greeting: what the server sends as soon as a client has connected; None for nothing.
      has_token: whether its clients can send a token.
      ping_timeout: seconds in which a client must answer a ping; None for clients that are busy for longer.
    """

    greeting: bytes | None
    has_token: bool
    ping_timeout: float | None

    def read(self, message: bytes | str) -> Incoming:
        """Reads a message.

        Raises:
          RequestError: it is damaged, or not of this protocol.
        """

    def pack_actions(self, incoming: Incoming, actions: np.ndarray, timing: Mapping[str, float]) -> bytes:
        """The answer to an observation, with actions `[n, A]` and times in milliseconds."""

    def pack_error(self, incoming: Incoming, text: str) -> bytes | str:
        """The answer that says what is wrong; `incoming` is an empty one if the message could not be read."""


class OpenPi:
    """See `WireProtocol`: observations, and answers of `actions` and `server_timing`; errors are text messages."""

    has_token = True
    ping_timeout: float | None = 20.0

    def __init__(self, inputs: PolicyInputs, metadata: Mapping[str, Any]):
        self.greeting: bytes | None = pack(metadata)

    def read(self, message: bytes | str) -> Incoming:
        """See `WireProtocol`."""
        return Incoming(observation=unpack(_binary(message)))

    def pack_actions(self, incoming: Incoming, actions: np.ndarray, timing: Mapping[str, float]) -> bytes:
        """See `WireProtocol`."""
        return pack({"actions": actions, "server_timing": timing})

    def pack_error(self, incoming: Incoming, text: str) -> bytes | str:
        """See `WireProtocol`."""
        return text


class VlaEval:
    """See `WireProtocol`: every message is a map of `type`, `payload`, `seq` and `timestamp`.

    The client says `hello` and is answered with one; `episode_start` and `episode_end` have no answer; an `observation`
    is answered by an `action` or an `error` of the same `seq`, a message that cannot be read by an `error` of 0. The
    harness asks at every control step for one action, `[A]`.
    """

    has_token = False
    # The harness answers no ping while its simulator loads a scene or takes a step.
    ping_timeout: float | None = None
    greeting: bytes | None = None

    def __init__(self, inputs: PolicyInputs, metadata: Mapping[str, Any]):
        # What its benchmarks send only if they are asked to.
        wanted = {"send_wrist_image": len(inputs.cameras) > 1, "send_state": inputs.state_size > 0}
        self._hello = {
            "protocol_version": _VLA_EVAL_VERSION,
            "model_server": "como_jax",
            "capabilities": {},
            "observation_params": {name: True for name, value in wanted.items() if value},
            # Becomes a part of the harness's results.
            "policy": dict(metadata),
        }

    def read(self, message: bytes | str) -> Incoming:
        """See `WireProtocol`."""
        content = unpack(_binary(message))
        fields = content if isinstance(content, dict) else {}
        kind, payload, number = fields.get("type"), fields.get("payload"), fields.get("seq")
        if not isinstance(kind, str) or not isinstance(payload, dict) or type(number) is not int:
            raise RequestError("A message must be a map of type, payload, seq and timestamp, as those of vla-eval are.")
        if kind == "observation":
            return Incoming(observation=payload, number=number)
        if kind == "hello":
            version = payload.get("protocol_version")
            if version != _VLA_EVAL_VERSION:
                raise RequestError(f"protocol_version is {version!r}; this server knows {_VLA_EVAL_VERSION} alone.")
            return Incoming(reply=_message("hello", self._hello, number), number=number)
        if kind in ("episode_start", "episode_end"):
            return Incoming(begins_episode=True, number=number)
        if kind == "error":
            return Incoming(number=number)
        raise RequestError(f"type is {kind[:40]!r}, which vla-eval 0.8 has not.")

    def pack_actions(self, incoming: Incoming, actions: np.ndarray, timing: Mapping[str, float]) -> bytes:
        """See `WireProtocol`."""
        return _message("action", {"actions": actions[0] if len(actions) == 1 else actions}, incoming.number)

    def pack_error(self, incoming: Incoming, text: str) -> bytes | str:
        """See `WireProtocol`."""
        return _message("error", {"error": text}, incoming.number)


PROTOCOLS: Mapping[str, Callable[[PolicyInputs, Mapping[str, Any]], WireProtocol]] = {OPENPI: OpenPi, VLA_EVAL: VlaEval}
"""By name; each is made from the inputs of a policy and from what is told to clients about it."""


def make_protocol(name: str, inputs: PolicyInputs, metadata: Mapping[str, Any], token: str) -> WireProtocol:
    """One of `PROTOCOLS`.

    Raises:
      ConfigError: there is no such protocol, or its clients cannot send the token.
    """
    if name not in PROTOCOLS:
        raise ConfigError(f"`protocol` is {name!r} and must be {' or '.join(PROTOCOLS)}.")
    protocol = PROTOCOLS[name](inputs, metadata)
    if token and not protocol.has_token:
        raise ConfigError(f"`token`: clients of {name} cannot send one; keep `host` to this machine, or use a tunnel.")
    return protocol


def _binary(message: bytes | str) -> bytes:
    if isinstance(message, str):
        raise RequestError("Observations are sent as binary messages of msgpack, not as text.")
    return message


def _message(kind: str, payload: Mapping[str, Any], number: int) -> bytes:
    return pack({"type": kind, "payload": payload, "seq": number, "timestamp": time.time()}, text_keys=True)
