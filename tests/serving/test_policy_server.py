"""The server among clients that behave, misbehave, die and wait, with a policy that answers at once."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

from como_jax.errors import ConfigError
from como_jax.serving.client import PolicyClient
from como_jax.serving.messages import RequestError, pack, unpack
from como_jax.serving.observations import ObservationReader
from como_jax.serving.server import PolicyServer, ServerOptions
from tests.serving.serving_fakes import FakePolicy, Running, observation, serving


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(FakePolicy(), max_message=2**20) as running:
        yield running


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and text."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def metrics(running: Running) -> dict[str, float]:
    lines = get(f"{running.http}/metrics")[1].splitlines()
    return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines if not line.startswith("#")}


def test_a_client_gets_metadata_and_then_actions_with_their_times(server: Running) -> None:
    with connect(server.url, compression=None) as connection:
        metadata = unpack(connection.recv(decode=False))
        assert metadata["action_dim"] == 5 and metadata["observation"]["observation/top"] == "uint8 RGB [H, W, 3]"
        for step in (1, 2):
            connection.send(pack(observation()))
            answer = unpack(connection.recv(decode=False))
            assert answer["actions"].dtype == np.float32 and answer["actions"][0, 1:].tolist() == [step, 0, 1, 2]
            assert answer["server_timing"]["infer_ms"] >= 0
            assert ("prev_total_ms" in answer["server_timing"]) == (step == 2)


def test_a_reset_or_another_prompt_begins_an_episode(server: Running) -> None:
    with PolicyClient(server.url) as client:
        changes: list[dict[str, Any]] = [{}, {}, {"reset": True}, {}, {"prompt": "stop"}, {"prompt": "stop"}, {}]
        steps = [client.infer(observation(**change))["actions"][0, 1] for change in changes]
    assert steps == [1, 2, 1, 2, 1, 2, 1]


def test_a_bad_request_or_a_failing_policy_costs_that_request_alone(server: Running) -> None:
    before = metrics(server)
    with PolicyClient(server.url) as client:
        client.infer(observation())
        for changes, reason in (
            ({"observation/state": np.zeros(2)}, "^observation/state must be 3 numbers"),
            ({"prompt": "refuse"}, "^prompt is beyond this policy"),
            ({"prompt": "fail"}, "^The policy failed, and its episode begins anew: ZeroDivisionError: as asked$"),
        ):
            with pytest.raises(RequestError, match=reason):
                client.infer(observation(**changes))
        assert client.infer(observation())["actions"][0, 1] == 1
        after = metrics(server)
    names = [f'como_serve_requests_total{{outcome="{outcome}"}}' for outcome in ("answered", "refused", "failed")]
    assert [after[name] - before[name] for name in names] == [2, 2, 1]
    assert after["como_serve_connections"] >= 1
    assert after["como_serve_policy_seconds_count"] - before["como_serve_policy_seconds_count"] == 2
    assert after["como_serve_request_seconds_count"] - before["como_serve_request_seconds_count"] >= 4


def test_a_thousand_fuzzed_messages_get_an_answer_each_and_leave_it_answering(server: Running) -> None:
    noise = np.random.default_rng(0)
    good = np.frombuffer(pack(observation()), np.uint8)

    def fuzzed(number: int) -> bytes | str:
        if number % 4 == 0:
            return noise.bytes(int(noise.integers(0, 200)))
        if number % 50 == 1:
            return "text" * int(noise.integers(0, 5))
        if number % 4 == 2:
            return good[: noise.integers(0, len(good))].tobytes()
        spoilt = good.copy()
        spoilt[noise.integers(0, len(good), 3)] = noise.integers(0, 256, 3)
        return spoilt.tobytes()

    refused = 0
    with connect(server.url, compression=None) as connection:
        connection.recv()
        for number in range(1000):
            connection.send(fuzzed(number))
            answer = connection.recv(timeout=60)
            refused += isinstance(answer, str)
            assert isinstance(answer, str) or "actions" in unpack(answer)
        connection.send(pack(observation()))
        assert unpack(connection.recv(timeout=60, decode=False))["actions"].shape == (1, 5)
    assert refused > 500


def test_a_message_that_is_too_large_ends_its_connection_alone(server: Running) -> None:
    with PolicyClient(server.url) as client, PolicyClient(server.url) as other:
        with pytest.raises(ConnectionClosed, match="1009"):
            other.infer({"x": bytes(2**20 + 1)})
        assert client.infer(observation())["actions"][0, 1] == 1


def test_what_is_no_websocket_is_turned_away(server: Running) -> None:
    assert get(f"{server.http}/")[0] == 426
    host, _, port = server.http.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as raw:
        raw.sendall(bytes(range(256)) + b"\r\n\r\n")
        while raw.recv(4096):
            pass
    assert get(f"{server.http}/healthz") == (200, "OK\n")


def test_pages_in_a_browser_cannot_connect(server: Running) -> None:
    with pytest.raises(InvalidStatus, match="403"):
        connect(server.url, origin=Origin("http://example.com"))


def test_clients_at_once_have_sessions_of_their_own(server: Running) -> None:
    def ask(number: int) -> np.ndarray:
        with PolicyClient(server.url) as client:
            meeting.wait()
            answers = [client.infer(observation(**{"observation/state": np.full(3, number)})) for _ in range(30)]
            return np.concatenate([answer["actions"] for answer in answers])

    meeting = threading.Barrier(2, timeout=60)
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(ask, (0, 1)))
    assert found[0][0, 0] != found[1][0, 0]
    for number, actions in enumerate(found):
        assert (actions[:, 0] == actions[0, 0]).all() and (actions[:, 2:] == number).all()
        assert actions[:, 1].tolist() == list(range(1, 31))


def test_health_is_answered_while_the_policy_is_busy_and_a_client_that_dies_meanwhile_harms_nobody() -> None:
    policy = FakePolicy()
    with serving(policy) as running:
        doomed = connect(running.url, compression=None)
        doomed.recv()
        doomed.send(pack(observation(prompt="wait")))
        assert policy.busy.wait(60)
        assert get(f"{running.http}/healthz") == (200, "OK\n")
        # As the kernel does for a process that was killed: a reset, without a word in the protocol.
        doomed.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        doomed.socket.shutdown(socket.SHUT_RD)
        doomed.socket.close()
        policy.go_on.set()
        with PolicyClient(running.url) as client:
            assert client.infer(observation())["actions"].shape == (1, 5)
            deadline = time.monotonic() + 60
            while metrics(running)["como_serve_connections"] != 1:
                assert time.monotonic() < deadline
                time.sleep(0.01)


def test_a_token_is_asked_for_everywhere_but_for_health() -> None:
    with serving(FakePolicy(), token="right") as running:
        for token in ("", "wrong", "righ", "rightt"):
            with pytest.raises(InvalidStatus, match="401"):
                PolicyClient(running.url, token)
        with pytest.raises(InvalidStatus, match="401"):
            connect(running.url, additional_headers={"Authorization": "right"})
        with PolicyClient(running.url, "right") as client:
            assert client.infer(observation())["actions"].shape == (1, 5)
        assert get(f"{running.http}/healthz")[0] == 200
        assert get(f"{running.http}/metrics")[0] == 401
        status, text = get(f"{running.http}/metrics", Authorization="Api-Key right")
        assert status == 200 and "como_serve_unauthorized_total 6.0" in text


def test_a_server_that_is_stopped_answers_what_it_was_asked_and_says_goodbye() -> None:
    policy = FakePolicy()
    with (
        serving(policy) as running,
        ThreadPoolExecutor(1) as threads,
        PolicyClient(running.url) as idle,
        PolicyClient(running.url) as client,
    ):
        asked = threads.submit(client.infer, observation(prompt="wait"))
        assert policy.busy.wait(60)
        running.ask_to_stop()
        with pytest.raises(InvalidStatus, match="503"):
            while True:
                connect(running.url).close()
        policy.go_on.set()
        assert asked.result(60)["actions"].shape == (1, 5)
        running.thread.join(60)
        assert not running.thread.is_alive()
        for one in (idle, client):
            with pytest.raises(ConnectionClosed, match="1001"):
                one.infer(observation())


def test_a_port_that_is_taken_is_named(server: Running) -> None:
    policy, port = FakePolicy(), int(server.url.rpartition(":")[2])
    second = PolicyServer(policy, ObservationReader(policy.inputs), ServerOptions(port=port))
    with pytest.raises(ConfigError, match=f"`port` {port} cannot be used"):
        asyncio.run(second.run(asyncio.Event()))


def test_serving_needs_neither_jax_nor_torch() -> None:
    code = (
        "import sys, como_jax.serving.server, como_jax.serving.client, tools.serve.__main__\n"
        "assert not sys.modules.keys() & {'jax', 'torch', 'flax', 'tensorflow'}"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
