"""Runs behind the server: whole chunks, or a queue for each client."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError
from como_jax.serving.client import PolicyClient
from como_jax.serving.jax_policy import JaxPolicy
from como_jax.serving.loading import load_policy
from como_jax.serving.messages import RequestError
from como_jax.serving.policy import PolicyOptions
from como_jax.spec.control import ControlConfig, Controller
from como_jax.spec.interface import History, PolicySpec
from tests.policies.smoke_policies import PolicyRun
from tests.serving.serving_fakes import serving
from tools.serve.client import play

SPEC = PolicySpec(
    cameras=("top",),
    image_size=8,
    fit="crop",
    instants=2,
    stride=1,
    chunk=4,
    action_size=2,
    state_size=1,
    control_rate=10.0,
    uses_text=True,
    robots={},
)


class FakeRunner:
    """A policy whose chunk says which states it saw and how far ahead each action lies."""

    spec, step = SPEC, 7

    def __init__(self) -> None:
        self.seeds: list[Sequence[int]] = []

    def sample(self, scenes: Sequence[History], seeds: Sequence[Sequence[int]]) -> np.ndarray:
        [scene], ahead = scenes, np.arange(SPEC.chunk, dtype=np.float32)
        self.seeds += seeds
        if scene.instruction == "nan":
            ahead[:] = np.nan
        return np.stack([10 * scene.states.sum() + ahead, np.full(SPEC.chunk, len(self.seeds), np.float32)], 1)[None]


def see(step: int, prompt: str = "go") -> dict[str, object]:
    return {"top": np.zeros((8, 8, 3), np.uint8), "state": np.array([step]), "prompt": prompt}


def test_whole_chunks_follow_from_the_history_of_requests() -> None:
    policy = JaxPolicy(FakeRunner(), PolicyOptions())  # type: ignore[arg-type]
    with serving(policy) as running, PolicyClient(running.url) as client:
        assert {"step": 7, "action_horizon": 4, "action_dim": 2}.items() <= client.metadata.items()
        chunks = [client.infer(see(step))["actions"] for step in (1, 2, 3)]
        assert [chunk.shape for chunk in chunks] == [(4, 2)] * 3
        # The first observation stands for the one before.
        assert [chunk[:, 0].tolist() for chunk in chunks] == [[20, 21, 22, 23], [30, 31, 32, 33], [50, 51, 52, 53]]
        with pytest.raises(RequestError, match="not finite"):
            client.infer(see(4, "nan"))
        assert client.infer(see(4))["actions"][0, 0] == 80


@pytest.mark.parametrize("ensemble", [None, 0.5])
def test_two_clients_at_once_have_queues_of_their_own(ensemble: float | None) -> None:
    runner = FakeRunner()
    policy = JaxPolicy(runner, PolicyOptions(execute=2, ensemble=ensemble))  # type: ignore[arg-type]
    controllers = [Controller(SPEC, ControlConfig(2, ensemble)) for _ in range(2)]
    reference = FakeRunner()
    with serving(policy) as running, PolicyClient(running.url) as first, PolicyClient(running.url) as second:
        assert first.metadata["action_horizon"] == 1
        for step in range(7):
            for number, client in enumerate((first, second)):
                # The second began a step later.
                if step < number:
                    continue
                found = client.infer(see(step + 100 * number))["actions"]
                controller = controllers[number]
                controller.observe({}, np.array([step + 100 * number]))
                if controller.needs_chunk():
                    controller.add_chunk(reference.sample([controller.history("go")], [()])[0])
                np.testing.assert_array_equal(found, controller.next_action()[None])
    # A chunk at every other step of each, all with noise of their own.
    assert len(runner.seeds) == 4 + 3 and len(set(runner.seeds)) == 7


def test_control_that_does_not_suit_the_policy_is_refused() -> None:
    with pytest.raises(ConfigError, match="`execute` 9 must lie between 0 and 4"):
        JaxPolicy(FakeRunner(), PolicyOptions(execute=9))  # type: ignore[arg-type]


def test_a_folder_without_a_policy_is_named(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=f"{re.escape(str(tmp_path))} holds no policy; name the directory"):
        load_policy(tmp_path, PolicyOptions())


@pytest.mark.slow
def test_a_run_gives_a_client_what_it_gives_here(policy_run: Callable[..., PolicyRun], robot_dataset: Path) -> None:
    run = policy_run("diffusion", robot_dataset, **{"train.stop_after": 1})
    policy = load_policy(run.workdir, PolicyOptions(seed=3))
    assert isinstance(policy, JaxPolicy)
    runner, noise = policy.runner, np.random.default_rng(0)
    spec = runner.spec
    [camera] = spec.cameras
    image = noise.integers(0, 256, (48, 64, 3), np.uint8)
    state = noise.normal(size=spec.state_size).astype(np.float32)
    with serving(policy) as running, PolicyClient(running.url) as client:
        assert client.metadata["step"] == 1
        found = client.infer({f"observation/{camera}": image, "state": state, "prompt": "reach"})["actions"]
    scene = History([{camera: image}] * spec.instants, np.stack([state] * spec.instants), "reach")
    # The first session warmed it up.
    np.testing.assert_array_equal(found, runner.sample([scene], [(3, 1, 0)])[0])


def test_the_example_client_plays_an_episode() -> None:
    class Reacher:
        """A runner for the embedded environment, which goes nowhere."""

        spec = SPEC.__class__(**{**vars(SPEC), "cameras": ("image",), "action_size": 4, "state_size": 4})
        step = 0

        def sample(self, scenes: Sequence[History], seeds: Sequence[Sequence[int]]) -> np.ndarray:
            asked.append(scenes[0].instruction)
            return np.zeros((1, SPEC.chunk, 4), np.float32)

    asked: list[str] = []
    with serving(JaxPolicy(Reacher(), PolicyOptions())) as running, PolicyClient(running.url) as client:  # type: ignore[arg-type]
        assert not play(client, "tabletop:reach")
    assert len(asked) == 80 / SPEC.chunk and asked[0]
