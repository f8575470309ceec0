"""The server and an exported policy take the same observations, and make the same of them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from como_jax.errors import InputError
from como_jax.serving.messages import RequestError
from como_jax.serving.observations import ObservationReader
from como_jax.serving.policy import PolicyInputs
from como_jax.spec.control import ControlConfig
from como_jax.spec.images import fit_frames
from como_jax.spec.interface import PolicySpec

session = pytest.importorskip("como_jax.runtime_torch.session", exc_type=ImportError)

IMAGE = np.arange(300, dtype=np.uint8).reshape(10, 10, 3)
STATE = [1.0, 0.0, 1.0]
SPEC = PolicySpec(("top",), 10, "crop", 1, 1, 2, 2, 3, 5.0, True, {})


def _both(image: Any, state: Any, text: Any) -> list[tuple[np.ndarray, np.ndarray, str]]:
    """What the policy gets behind the server, and in an exported policy."""
    seen = []

    def sample(histories: list[Any], noise: object) -> np.ndarray:
        seen.append(histories[0])
        return np.zeros((1, 2, 2), np.float32)

    message = {"images": {"top": image}, "state": state, "prompt": text}
    request = ObservationReader(PolicyInputs(SPEC.cameras, SPEC.state_size, uses_text=True)).read(message)
    session.Session(SPEC, ControlConfig(1, None), sample, 0).act(message, text)
    served = fit_frames(request.images["top"], SPEC.image_size, SPEC.fit)
    return [(served, request.state, request.prompt), (seen[0].images[0]["top"], seen[0].states[0], seen[0].instruction)]


@pytest.mark.parametrize(
    ("image", "state", "text", "read"),
    [
        (IMAGE, STATE, "go", "go"),
        (np.moveaxis(IMAGE, 2, 0), np.array([True, False, True]), b"go", "go"),
        (IMAGE, [True, False, True], "", ""),
        (IMAGE, np.array([1, 0, 1], np.uint8), np.bytes_("gehe hinüber".encode()), "gehe hinüber"),
        (IMAGE, np.array(STATE, ">f8"), np.array("go"), "go"),
        (IMAGE, tuple(STATE), np.array([b"go"], object), "go"),
    ],
)
def test_what_is_taken_is_read_alike(image: Any, state: Any, text: Any, read: str) -> None:
    for found, numbers, instruction in _both(image, state, text):
        np.testing.assert_array_equal(found, IMAGE)
        assert numbers.tolist() == STATE and numbers.dtype == np.float32
        assert type(instruction) is str and instruction == read


@pytest.mark.parametrize(
    ("image", "state", "text", "reason"),
    [
        (IMAGE.astype(np.float32), STATE, "go", "top must be an array of uint8, RGB from 0 to 255, not float32"),
        (b"jpeg", STATE, "go", "top must be an array of uint8, RGB from 0 to 255, not bytes"),
        (IMAGE[..., :1], STATE, "go", r"top must have shape \[H, W, 3\], not \[10, 10, 1\]"),
        (IMAGE, ["1", "0", "1"], "go", "state must be a row of numbers, not list"),
        (IMAGE, [STATE], "go", "state must be a row of numbers, not list"),
        (IMAGE, [2**70, 0, 0], "go", "state must be a row of numbers, not list"),
        (IMAGE, STATE[:2], "go", "state must be 3 numbers, not 2"),
        (IMAGE, [np.nan, 0, 0], "go", "state holds numbers that are not finite"),
        (IMAGE, STATE, b"\xff", "must be text; these bytes are not UTF-8"),
        (IMAGE, STATE, ["go"], "must be text, not list"),
        (IMAGE, STATE, "a" * 5000, "has 5000 characters; 4096 are the most"),
    ],
)
def test_what_is_refused_is_refused_alike(image: Any, state: Any, text: Any, reason: str) -> None:
    message = {"images": {"top": image}, "state": state, "prompt": text}
    with pytest.raises(RequestError, match=reason):
        ObservationReader(PolicyInputs(SPEC.cameras, SPEC.state_size, uses_text=True)).read(message)
    with pytest.raises(InputError, match=reason):
        session.Session(SPEC, ControlConfig(1, None), lambda *_: np.zeros((1, 2, 2)), 0).act(message, text)


def test_one_number_is_a_state_of_one_and_no_prompt_is_not_an_empty_one() -> None:
    reader = ObservationReader(PolicyInputs(("top",), 1, uses_text=True))
    assert reader.read({"top": IMAGE, "state": 2, "prompt": " "}).prompt == " "
    missing = "prompt or task_description is missing: the policy reads an instruction, which may be empty"
    with pytest.raises(RequestError, match=missing):
        reader.read({"top": IMAGE, "state": 2})
