"""Exported policies behind the server, computed by PyTorch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError
from como_jax.serving.client import PolicyClient
from tests.runtime_torch.small_policies import ACTION_SIZE, STATE_SIZE, make_policy
from tests.serving.serving_fakes import serving

torch = pytest.importorskip("torch")

from como_jax.export.pytorch.export import write_policy  # noqa: E402
from como_jax.runtime_torch.policy import Policy  # noqa: E402
from como_jax.serving.loading import load_policy  # noqa: E402
from como_jax.serving.policy import PolicyOptions  # noqa: E402
from como_jax.weights.policies import describe_policy  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_in_one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of an exported diffusion policy."""
    folder = tmp_path_factory.mktemp("exported")
    run, spec = make_policy("diffusion", {"encoder.tower": "patch"})
    write_policy(run, describe_policy(run.config, spec), folder)
    return folder


def see(step: int) -> dict[str, object]:
    image = np.random.default_rng(step).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    return {"top": image, "state": np.full(STATE_SIZE, 0.1 * step, np.float32), "prompt": "go up"}


def test_chunks_and_queues_are_those_of_the_policy(folder: Path) -> None:
    alone = Policy.from_pretrained(folder, robot="arm", execute=2, seed=3).new_session()
    served = load_policy(folder, PolicyOptions(dataset="arm", execute=2, seed=3))
    with serving(served) as running, PolicyClient(running.url) as client:
        assert (client.metadata["action_horizon"], client.metadata["action_dim"]) == (1, ACTION_SIZE)
        for step in range(4):
            seen = see(step)
            action = alone.act({"images": {"top": seen["top"]}, "state": seen["state"]}, "go up")
            np.testing.assert_array_equal(client.infer(seen)["actions"], action[None])


def test_whole_chunks_are_given_by_default(folder: Path) -> None:
    served = load_policy(folder, PolicyOptions(dataset="arm"))
    with serving(served) as running, PolicyClient(running.url) as client:
        assert client.infer(see(0))["actions"].shape == (client.metadata["action_horizon"], ACTION_SIZE)


def test_what_cannot_be_served_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`sampling` is for runs"):
        load_policy(folder, PolicyOptions(dataset="arm", sampling={"temperature": "0.5"}))
    with pytest.raises(ConfigError, match="'leg'; choose one of arm"):
        load_policy(folder, PolicyOptions(dataset="leg"))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"config\.json"):
        load_policy(tmp_path, PolicyOptions())
