"""A policy's inputs in the messages of different robots, and errors that name the field."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from como_jax.errors import ConfigError
from como_jax.serving.messages import RequestError
from como_jax.serving.observations import ObservationReader
from como_jax.serving.policy import PolicyInputs
from tests.serving.serving_fakes import INPUTS, observation

IMAGE = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)


def test_fields_are_found_where_clients_for_libero_and_aloha_put_them() -> None:
    read = ObservationReader(INPUTS).read
    libero = observation(**{"observation/top": IMAGE})
    # Channels first, and maps in maps.
    aloha = {
        "images": {"top": np.moveaxis(IMAGE, 2, 0), "wrist": IMAGE},
        "state": np.arange(3, dtype=">f8"),
        "prompt": np.array("go"),
    }
    plain = {"top": IMAGE, "wrist": IMAGE, "state": [0, 1, 2], "prompt": "go", "other": None, "reset": True}
    for message in (libero, aloha, plain):
        found = read(message)
        np.testing.assert_array_equal(found.images["top"], IMAGE)
        assert found.state.dtype == np.float32 and found.state.tolist() == [0, 1, 2]
        assert type(found.prompt) is str and found.prompt == "go"
        assert found.reset == ("reset" in message)


def test_fields_of_any_robot_can_be_named_and_parts_of_the_state_joined() -> None:
    fields = {"top": ["observation/exterior_image_1_left"], "state": ["joints", "gripper"], "prompt": ["task"]}
    reader = ObservationReader(INPUTS, fields)
    message = {
        "observation/exterior_image_1_left": IMAGE,
        "wrist": IMAGE,
        "joints": np.array([1.0, 2.0]),
        "gripper": 0.5,
        "task": "go",
    }
    found = reader.read(message)
    assert found.state.tolist() == [1.0, 2.0, 0.5] and found.prompt == "go"
    assert set(reader.describe()) == {*sum(fields.values(), []), "observation/wrist"}
    # A field that was named is not looked for elsewhere.
    with pytest.raises(RequestError, match="^observation/exterior_image_1_left is missing"):
        reader.read({**message, "observation/exterior_image_1_left": {}, "observation/top": IMAGE})


def test_a_policy_without_state_and_text_needs_none() -> None:
    reader = ObservationReader(PolicyInputs(("top",), 0, uses_text=False))
    found = reader.read({"top": IMAGE, "state": "nonsense", "prompt": 3})
    assert found.state.shape == (0,) and found.prompt == ""
    assert set(reader.describe()) == {"observation/top"}


def test_messages_without_prompt_get_the_default_one() -> None:
    reader = ObservationReader(INPUTS, default_prompt="stop")
    assert [reader.read(observation(prompt=prompt)).prompt for prompt in ("", "go")] == ["stop", "go"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"observation/top": None}, "observation/top must be an array of uint8, RGB from 0 to 255, not NoneType"),
        ({"observation/top": b"jpeg"}, "observation/top must be an array of uint8, RGB from 0 to 255, not bytes"),
        ({"observation/top": IMAGE / 255}, "observation/top must be an array of uint8, RGB from 0 to 255, not float"),
        ({"observation/wrist": IMAGE[0]}, "observation/wrist must have shape [H, W, 3], not [6, 3]"),
        ({"observation/wrist": IMAGE[:0]}, "observation/wrist must have shape [H, W, 3], not [0, 6, 3]"),
        ({"observation/state": np.zeros(4)}, "observation/state must be 3 numbers, not 4"),
        ({"observation/state": np.array([0, np.inf, 0])}, "observation/state holds numbers that are not finite"),
        ({"observation/state": [1e300, 0, 0]}, "observation/state holds numbers that are not finite"),
        ({"observation/state": [[1], [1, 2]]}, "observation/state must be a row of numbers, not list"),
        ({"observation/state": "1"}, "observation/state must be a row of numbers, not str"),
        ({"observation/state": [2**70]}, "observation/state must be a row of numbers, not list"),
        ({"prompt": 3}, "prompt must be text, not int"),
        ({"prompt": b"\xff"}, "prompt must be text; these bytes are not UTF-8"),
        ({"prompt": "a" * 5000}, "prompt has 5000 characters"),
        ({"reset": 1}, "reset must be true or false"),
        ({3: 4}, "Names of fields must be text, not int"),
        ({"a": {"a": {"a": {"a": {"a": {"a": {"a": {"a": {}}}}}}}}}, "deeper than 8"),
    ],
)
def test_what_is_wrong_with_an_observation_is_said_by_field(changes: dict[Any, Any], reason: str) -> None:
    with pytest.raises(RequestError, match=re.escape(reason)):
        ObservationReader(INPUTS).read({**observation(), **changes})


def test_what_is_missing_is_said_beside_what_there_is() -> None:
    message = observation()
    del message["observation/top"]
    with pytest.raises(RequestError, match="^observation/top or images/top .* is missing; .* observation/wrist, "):
        ObservationReader(INPUTS).read(message)
    with pytest.raises(RequestError, match="must be a map of fields, not list"):
        ObservationReader(INPUTS).read([message])


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"tip": ["a"]}, "fields has 'tip', but the policy has top, wrist, state, prompt; did you mean top?"),
        ({"top": ["a", "b"]}, "fields['top'] is 'a,b' and must name one field"),
        ({"state": ["a", ""]}, "fields['state'] is 'a,' and must name one field"),
    ],
)
def test_field_names_that_fit_no_input_are_refused(fields: dict[str, list[str]], reason: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(reason)):
        ObservationReader(INPUTS, fields)
