"""The server among clients of allenai's harness vla-eval; messages are packed here by msgpack and Pillow alone."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator
from typing import Any

import msgpack
import numpy as np
import pytest
from PIL import Image
from websockets.sync.client import ClientConnection, connect

from como_jax.errors import ConfigError
from como_jax.serving.messages import RequestError, unpack
from como_jax.serving.observations import ObservationReader
from como_jax.serving.policy import PolicyInputs, PolicyOptions
from como_jax.serving.protocols import VLA_EVAL, make_protocol
from tests.peers import peer_python, run_peer
from tests.serving.serving_fakes import INPUTS, FakePolicy, Running, serving

IMAGE = np.random.default_rng(0).integers(0, 256, (4, 6, 3)).astype(np.uint8)


def coded(image: np.ndarray, coding: str = "png") -> dict[str, Any]:
    """An image as the harness sends it."""
    if coding == "raw":
        data = image.tobytes()
        return {"__image__": True, "format": coding, "data": data, "dtype": image.dtype.str, "shape": [*image.shape]}
    file = io.BytesIO()
    Image.fromarray(image).save(file, coding.upper(), quality=95)
    return {"__image__": True, "format": coding, "data": file.getvalue(), "shape": [*image.shape]}


def numbers(*values: float) -> dict[str, Any]:
    """An array as the harness sends it."""
    array = np.array(values)
    return {"__ndarray__": True, "data": array.tobytes(), "dtype": array.dtype.str, "shape": [*array.shape]}


def observed(prompt: str = "go", **changes: Any) -> dict[str, Any]:
    """An observation of its LIBERO benchmark, with the cameras of the fake policy."""
    images = {"top": coded(IMAGE), "wrist": coded(IMAGE)}
    return {"images": images, "task_description": prompt, "states": numbers(4, 5, 6), **changes}


class Harness:
    """A client."""

    def __init__(self, connection: ClientConnection):
        self._connection, self._seq = connection, 0

    def send(self, kind: str, payload: Any) -> None:
        self._seq += 1
        content = {"type": kind, "payload": payload, "seq": self._seq, "timestamp": time.time()}
        self._connection.send(msgpack.packb(content))

    def ask(self, kind: str, payload: Any) -> tuple[str, dict[str, Any]]:
        """Type and payload of the answer, which must be that to this message."""
        self.send(kind, payload)
        answer = self.receive()
        assert answer["seq"] == self._seq and abs(answer["timestamp"] - time.time()) < 60
        return answer["type"], answer["payload"]

    def receive(self) -> dict[str, Any]:
        return msgpack.unpackb(self._connection.recv(timeout=60, decode=False))

    def act(self, **changes: Any) -> list[float]:
        kind, payload = self.ask("observation", observed(**changes))
        found = payload["actions"]
        assert kind == "action" and found["__ndarray__"] is True and found["dtype"] == "<f4" and found["shape"] == [5]
        return np.frombuffer(found["data"], np.float32).tolist()


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakePolicy(), protocol=VLA_EVAL, max_message=2**20) as running:
        yield running


@pytest.fixture
def harness(server: Running) -> Iterator[Harness]:
    with connect(server.url, compression=None) as connection:
        yield Harness(connection)


def test_a_hello_is_answered_with_what_benchmarks_shall_send_and_what_the_policy_is(harness: Harness) -> None:
    kind, payload = harness.ask("hello", {"harness_version": "0.8.0", "protocol_version": 1, "benchmark": "b:B"})
    assert kind == "hello" and payload["protocol_version"] == 1
    assert payload["observation_params"] == {"send_wrist_image": True, "send_state": True}
    # The harness writes it into its results.
    assert json.loads(json.dumps(payload))["policy"]["action_dim"] == 5


def test_a_policy_of_one_camera_asks_for_no_more() -> None:
    protocol = make_protocol(VLA_EVAL, PolicyInputs(("top",), 0, uses_text=True), {}, token="")
    hello = protocol.read(msgpack.packb({"type": "hello", "payload": {"protocol_version": 1}, "seq": 3})).reply
    assert hello is not None and unpack(hello)["payload"]["observation_params"] == {}


def test_each_observation_gets_one_action_and_episodes_begin_where_the_harness_says_so(harness: Harness) -> None:
    harness.send("episode_start", {"task": {"name": "go"}, "recording": {"sid": "1"}})
    assert [harness.act()[1:] for _ in range(2)] == [[1, 4, 5, 6], [2, 4, 5, 6]]
    harness.send("episode_end", {"metrics": {"success": False}, "steps": 2})
    harness.send("episode_start", {"task": {"name": "go"}})
    assert harness.act()[1] == 1
    # An episode that the harness gave up.
    harness.send("error", {"error": "the simulator died"})
    harness.send("episode_start", {"task": {}})
    assert harness.act()[1] == 1


@pytest.mark.parametrize("coding", ["png", "raw", "jpeg"])
def test_images_are_read_as_they_were_coded(coding: str) -> None:
    smooth = np.full((16, 24, 3), (200, 100, 20), np.uint8)
    found = unpack(msgpack.packb(coded(smooth, coding)))
    assert found.dtype == np.uint8 and found.shape == smooth.shape
    np.testing.assert_allclose(found, smooth, atol=3 if coding == "jpeg" else 0)
    if coding != "jpeg":
        np.testing.assert_array_equal(unpack(msgpack.packb(coded(IMAGE, coding))), IMAGE)
        clear = np.dstack([IMAGE, IMAGE[..., :1]])
        np.testing.assert_array_equal(unpack(msgpack.packb(coded(clear, coding))), clear)


def test_both_names_of_a_state_and_of_an_instruction_are_known() -> None:
    read = ObservationReader(INPUTS).read
    images = {"top": IMAGE, "wrist": IMAGE}
    for state in ("states", "state"):
        found = read({"images": images, state: [1.0, 2, 3], "task_description": "go"})
        assert found.state.tolist() == [1, 2, 3] and found.prompt == "go"


def test_what_is_wrong_is_answered_and_costs_that_message_alone(harness: Harness) -> None:
    broken = {"top": {**coded(IMAGE), "data": coded(IMAGE)["data"][:-30]}, "wrist": coded(IMAGE)}
    for kind, payload, reason in (
        ("observation", observed(states=numbers(1, 2)), "states must be 3 numbers"),
        ("observation", {"images": {}}, "observation/top or images/top or"),
        ("observation", observed("refuse"), "prompt is beyond this policy"),
        ("observation", observed("fail"), "The policy failed, and its episode begins anew: ZeroDivisionError"),
    ):
        found, answer = harness.ask(kind, payload)
        assert found == "error" and answer["error"].startswith(reason), answer
    # Messages of which nothing is known.
    for kind, payload, reason in (
        ("observation", [1], "must be a map of type"),
        ("observation", observed(images=broken), "cannot be read as png"),
        ("hello", {"protocol_version": 2}, "protocol_version is 2; this server knows 1"),
        ("reset", {}, "type is 'reset', which vla-eval 0.8 has not"),
    ):
        harness.send(kind, payload)
        answer = harness.receive()
        assert answer["type"] == "error" and answer["seq"] == 0 and reason in answer["payload"]["error"]
    assert harness.act()[1] == 1


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format": "gif"}, "raw, png or jpeg"),
        ({"format": "jpeg"}, "cannot be read as jpeg"),
        ({"data": "text"}, "raw, png or jpeg"),
        ({"shape": [6, 4, 3]}, r"shape \[6, 4, 3\] has \[4, 6\]"),
        ({"shape": [4, 6, 4]}, "mode RGB"),
        ({"shape": [4, 6]}, r"must be \[H, W, C\]"),
        ({"shape": [100_000, 100_000, 3]}, r"must be \[H, W, C\] of at most"),
        ({"shape": "4"}, "list of sizes"),
        ({"format": "raw"}, "dtype must be of numbers"),
    ],
)
def test_images_that_are_not_what_they_say_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        unpack(msgpack.packb({**coded(IMAGE), **changes}))


def test_the_server_carries_out_chunks_and_asks_for_no_token() -> None:
    assert PolicyOptions().one_by_one() == PolicyOptions(execute=0)
    for options in (PolicyOptions(execute=3), PolicyOptions(ensemble=0.1)):
        assert options.one_by_one() == options
    with pytest.raises(ConfigError, match="`token`: clients of vla-eval cannot send one"):
        make_protocol(VLA_EVAL, INPUTS, {}, token="secret")
    with pytest.raises(ConfigError, match="`protocol` is 'grpc' and must be openpi or vla-eval"):
        make_protocol("grpc", INPUTS, {}, token="")


PLAY = """
import json, sys
import anyio
import numpy as np
from vla_eval.connection import Connection
async def play():
    async with Connection(f"ws://localhost:{sys.argv[1]}") as connection:
        image = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
        seen = {"images": {"top": image, "wrist": image}, "task_description": "go", "states": np.arange(3.0)}
        found = []
        for episode in range(2):
            await connection.start_episode({"task": {"name": "go"}})
            found += [(await connection.act(seen))["actions"].tolist() for _ in range(2)]
            await connection.end_episode({"metrics": {"success": True}})
        try:
            await connection.act({"images": {}})
        except RuntimeError as error:
            return {"params": connection.server_info["observation_params"], "actions": found, "error": str(error)}
print(json.dumps(anyio.run(play)))
"""


@pytest.mark.slow
def test_the_published_harness_plays_two_episodes(server: Running) -> None:
    python = peer_python("vla-eval")
    found = json.loads(run_peer(python, PLAY, server.url.rpartition(":")[2]).splitlines()[-1])
    assert found["params"] == {"send_wrist_image": True, "send_state": True}
    assert [action[1:] for action in found["actions"]] == [[1, 0, 1, 2], [2, 0, 1, 2]] * 2
    assert "observation/top or images/top or" in found["error"]
