"""History, receding horizon and temporal ensembling."""

import numpy as np
import pytest

from como_jax.errors import ConfigError, NonFiniteError
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.interface import PolicySpec

SPEC = PolicySpec(
    cameras=("front",),
    image_size=4,
    fit="stretch",
    instants=3,
    stride=2,
    chunk=4,
    action_size=2,
    state_size=1,
    control_rate=10.0,
    uses_text=True,
    robots={},
)


def observe(controller: Controller, time: int) -> None:
    controller.observe({"front": np.full((4, 4, 3), time, np.uint8)}, np.array([time], np.float32))


def predict(time: int) -> np.ndarray:
    """Chunks that tell when they were made: action j of the chunk of step t is (100 t + j, -t)."""
    return np.array([(100 * time + j, -time) for j in range(SPEC.chunk)], np.float32)


def play(config: ControlConfig, steps: int) -> tuple[np.ndarray, list[int]]:
    """The actions taken, and the steps at which a chunk was asked for."""
    controller, asked, actions = Controller(SPEC, config), [], []
    for time in range(steps):
        observe(controller, time)
        if controller.needs_chunk():
            asked.append(time)
            controller.add_chunk(predict(time))
        assert not controller.needs_chunk()
        actions.append(controller.next_action())
    return np.stack(actions), asked


def test_the_history_strides_back_and_repeats_the_first_observation():
    controller = Controller(SPEC, ControlConfig(1))
    seen = []
    for time in range(7):
        observe(controller, time)
        history = controller.history("go left")
        assert history.states.shape == (3, 1) and history.states.dtype == np.float32
        assert [image["front"][0, 0, 0] for image in history.images] == history.states[:, 0].tolist()
        seen.append(history.states[:, 0].tolist())
        controller.add_chunk(predict(time))
        controller.next_action()
        # Also in a full history.
        observe(controller, 99)
        controller.forget()
        assert controller.history("").states[:, 0].tolist() == seen[-1]
    assert seen == [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 3], [0, 2, 4], [1, 3, 5], [2, 4, 6]]
    assert history.instruction == "go left"


@pytest.mark.parametrize("execute", [1, 3, 4])
def test_a_receding_horizon_follows_the_first_steps_of_every_chunk(execute: int):
    actions, asked = play(ControlConfig(execute), 10)
    assert asked == list(range(0, 10, execute))
    expected = [(100 * (t - t % execute) + t % execute, -(t - t % execute)) for t in range(10)]
    np.testing.assert_array_equal(actions, expected)
    assert actions.dtype == np.float32


@pytest.mark.parametrize("execute", [1, 2, 3])
@pytest.mark.parametrize("m", [0.0, 0.3])
def test_ensembling_weighs_all_chunks_that_cover_the_step_the_oldest_most(execute: int, m: float):
    actions, asked = play(ControlConfig(execute, m), 9)
    assert asked == list(range(0, 9, execute))
    overlapping = 0
    for time, action in enumerate(actions):
        starts = [start for start in asked if start <= time < start + SPEC.chunk]
        weights = [np.exp(-m * (start - starts[0])) for start in starts]
        total = sum(w * predict(s)[time - s].astype(float) for w, s in zip(weights, starts, strict=True))
        np.testing.assert_allclose(action, total / sum(weights), rtol=1e-6)
        overlapping += len(starts) > 1
    assert overlapping


def test_half_a_chunk_is_executed_by_default():
    assert play(ControlConfig(), 5)[1] == [0, 2, 4]
    assert ControlConfig().resolve(1).execute == 1


def test_what_does_not_suit_the_chunks_is_refused():
    with pytest.raises(ConfigError, match="`execute` 5 must lie between 0 and 4"):
        Controller(SPEC, ControlConfig(5))
    with pytest.raises(ConfigError, match="`ensemble` nan must be a finite number"):
        Controller(SPEC, ControlConfig(1, float("nan")))
    controller = Controller(SPEC, ControlConfig(1))
    with pytest.raises(RuntimeError, match="add_chunk"):
        controller.next_action()
    with pytest.raises(ValueError, match="must be"):
        controller.add_chunk(np.zeros((3, 2), np.float32))
    with pytest.raises(NonFiniteError, match="step 0"):
        controller.add_chunk(np.full((4, 2), np.nan, np.float32))
