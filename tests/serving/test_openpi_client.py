"""The server beside the client that openpi publishes, in an environment of its own."""

from __future__ import annotations

import json

import pytest

from tests.peers import peer_python, run_peer
from tests.serving.serving_fakes import FakePolicy, serving

ASK = """
import json, sys
import numpy as np
from openpi_client.websocket_client_policy import WebsocketClientPolicy
client = WebsocketClientPolicy("localhost", int(sys.argv[1]))
image = np.zeros((3, 4, 6), np.uint8)
message = {"observation/top": image, "observation/wrist": image, "observation/state": np.arange(3.0), "prompt": ""}
answers = [client.infer(message)["actions"].tolist() for _ in range(2)]
print(json.dumps({"action_dim": client.get_server_metadata()["action_dim"], "answers": answers}))
"""


@pytest.mark.slow
def test_the_published_client_gets_its_actions() -> None:
    python = peer_python("openpi")
    with serving(FakePolicy(), max_message=2**20) as running:
        found = json.loads(run_peer(python, ASK, running.url.rpartition(":")[2]).splitlines()[-1])
    assert found["action_dim"] == 5
    assert [answer[0][1:] for answer in found["answers"]] == [[1, 0, 1, 2], [2, 0, 1, 2]]
