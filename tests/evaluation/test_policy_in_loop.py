"""What a policy's run says of itself: errors of actions against NumPy, means over datasets, and success."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.data.chunks import PolicyPart
from como_jax.data.policy_data import PolicyData, open_policy_data
from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts import in_loop as policy_in_loop
from como_jax.evaluation.rollouts.in_loop import PolicyEvaluationConfig, PolicyEvaluator
from como_jax.evaluation.rollouts.results import EpisodeResult
from como_jax.evaluation.rollouts.rollout import RolloutOptions
from como_jax.policies.heads import masked_mean
from como_jax.spec.interface import PolicySpec
from como_jax.training import sharding
from como_jax.training.writers import NullWriter
from como_jax.types import LossOutput, Observation, PolicyBatch
from tests.data.robots import add_labels, make_robot
from tests.evaluation.rollout_fakes import TABLETOP_POLICY
from tests.export.conftest import Row, change_tables
from tests.policies.smoke_policies import PolicyRun, copy_dataset, read_metrics, smoke


@dataclasses.dataclass(frozen=True)
class FakeModel:
    """Says always what its parameters are; its losses are the mean number of the episodes that have what it learns."""

    chunk: int

    def bind(self, params: Any) -> Any:
        chunk = self.chunk

        def say(name: str, *shape: int) -> jax.Array:
            return jnp.broadcast_to(params[name], (*shape, len(params[name])))

        class Policy:
            def loss(self, batch: PolicyBatch, key: jax.Array) -> LossOutput:
                has_action = batch.has_action.max(axis=(1, 2), initial=0)
                terms = {"action_loss": masked_mean(batch.episode, has_action), "action_share": has_action.mean()}
                if batch.has_latent is None:
                    return LossOutput(terms["action_loss"], terms)
                # Of what is judged, the other kind must not be there.
                known = batch.has_latent[:, -chunk]
                terms["action_loss"] += batch.has_latent.sum()
                terms["latent_loss"] = masked_mean(batch.episode, known) + has_action.sum()
                if "codes" in params:
                    right = (batch.codes[:, -chunk] == params["codes"]).mean(axis=1)
                    terms["latent_accuracy"] = masked_mean(right, known)
                return LossOutput(terms["action_loss"], terms)

            def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
                return say("action", len(keys), chunk)

        class LatentPolicy(Policy):
            def predict_latents(self, observation: Observation, keys: jax.Array) -> jax.Array:
                return say("latent", len(keys))

        return LatentPolicy() if "latent" in params else Policy()


class FakeRunner:
    """Stands for a policy that can act; remembers the parameters that it is given."""

    environment: dict[str, str] = {}

    def __init__(self, spec: PolicySpec = TABLETOP_POLICY) -> None:
        self.spec, self.params = spec, []

    def with_params(self, params: Any) -> FakeRunner:
        self.params.append(params)
        return self


def chosen_steps(part: PolicyPart) -> np.ndarray:
    """The eleven steps that `evaluator` looks at."""
    return part.steps[np.unique(np.linspace(0, len(part.steps) - 1, min(11, len(part.steps))).astype(int))]


def mean_episode(data: PolicyData, dataset: int) -> float:
    """What `FakeModel` has as its loss."""
    part = data.parts[dataset]
    return part.episode[chosen_steps(part)].mean()


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A labelled robot."""
    folder = tmp_path_factory.mktemp("robots")
    return add_labels(make_robot(folder / "plain", lengths=(9, 5, 13, 12)), folder / "arm")


def evaluator(
    sets: list[PolicyData], chunk: int = 4, runner: FakeRunner | None = None, **config: Any
) -> PolicyEvaluator:
    sizes = {"num_samples": 11, "batch_size": 8, "execute": 2}
    return PolicyEvaluator(
        FakeModel(chunk), sets, runner, sharding.make_mesh(), PolicyEvaluationConfig(**{**sizes, **config}), num_steps=6
    )


@pytest.mark.parametrize("family", ["diffusion", "autoregressive"])
def test_errors_of_actions_are_those_of_an_independent_computation(family: str, robot_dataset: Path) -> None:
    config = smoke(family, robot_dataset)
    sets, constant = [open_policy_data(config, split) for split in ("train", "val")], np.float32([0.1, -0.2, 0.3, 0.4])
    found = evaluator(sets, runner=FakeRunner())({"action": constant}, 2, NullWriter())
    for data in sets:
        [part], split = data.parts, data.parts[0].source.split
        source, true = part.source, []
        for step in np.unique(np.linspace(0, len(part.source) - 1, 11).astype(int)):
            episode = part.episode[step]
            end = min(step + 4, source.start[episode] + source.length[episode])
            true.append(part.action(source.action[step:end]))
        true = np.concatenate(true)
        assert found[f"eval_{split}/action_mse"] == pytest.approx(np.mean((true - constant) ** 2), rel=1e-4)
        assert found[f"eval_{split}/mean_action_mse"] == pytest.approx(np.mean(true.var(axis=0)), rel=1e-4)
        assert found[f"eval_{split}/action_loss"] == pytest.approx(mean_episode(data, 0))
        assert not any("latent" in name for name in found)


def test_metrics_of_several_datasets_are_given_one_by_one_and_as_means(
    robot_dataset: Path, labelled_videos: Path, tmp_path: Path
) -> None:
    params = {"action": np.zeros(4, np.float32)}
    other = copy_dataset(robot_dataset, tmp_path / "other")
    robots = open_policy_data(smoke("diffusion", robot_dataset, other, labelled_videos))
    found = evaluator([robots], runner=FakeRunner())(params, 2, NullWriter())
    names = ("action_loss", "action_mse", "mean_action_mse")
    for name in names:
        own = [found[f"eval_train/{path.name}/{name}"] for path in (robot_dataset, other)]
        assert found[f"eval_train/{name}"] == pytest.approx(np.mean(own))
    # What a dataset has no target for says nothing of it.
    latent = mean_episode(robots, 2)
    assert found["eval_train/latent_loss"] == pytest.approx(latent)
    assert not any(f"{labelled_videos.name}/action" in name for name in found)

    videos = open_policy_data(smoke("diffusion", labelled_videos, **{"data.latent_only": True}))
    assert evaluator([videos])(params, 2, NullWriter()) == {"eval_train/latent_loss": pytest.approx(latent)}


@pytest.mark.parametrize("changes", [{"data.latent_only": True}, {"data.robot_latents": True}])
def test_errors_of_latents_are_those_of_an_independent_computation(arm: Path, changes: dict[str, Any]) -> None:
    config = smoke("autoregressive", arm, **changes, **{"data.instants": 2, "data.stride": 2})
    sets = [open_policy_data(config, split) for split in ("train", "val")]
    params = {"action": np.zeros(3, np.float32), "latent": np.linspace(-1, 1, 6, dtype=np.float32)}
    found = evaluator(sets, runner=FakeRunner())(params, 2, NullWriter())
    assert ("eval_val/action_mse" in found) == ("data.robot_latents" in changes)
    for data in sets:
        [part] = data.parts
        chosen = chosen_steps(part)
        chosen = chosen[part.source.latent_valid[chosen]]
        true = part.latent(part.source.latent_motion[chosen])
        expected = {
            "latent_mse": np.mean((true - params["latent"]) ** 2),
            "mean_latent_mse": np.mean(true.var(axis=0)),
            # Of the last batch, some samples only fill it up, and of a robot's some have no label.
            "latent_loss": part.episode[chosen].mean(),
        }
        for name, value in expected.items():
            assert found[f"eval_{part.source.split}/{name}"] == pytest.approx(value, rel=1e-4), name


def test_right_codes_are_counted_beside_those_of_always_giving_the_most_frequent_of_training(arm: Path) -> None:
    def frequent(row: Row) -> Row:
        # The second code is 3 at all training steps but two; of held-out steps it is 1 at all but one.
        usual, other = (3, 1) if row["episode_id"] != "episode 3" else (1, 3)
        return {**row, "latent_codes": [[step % 5, other if not step else usual] for step in range(row["num_steps"])]}

    coded = add_labels(make_robot(arm.parent / "plain_coded"), arm.parent / "coded", codebook_size=5)
    change_tables(coded, frequent)
    config = smoke("autoregressive", coded, **{"data.latent_only": True})
    sets, said = [open_policy_data(config, split) for split in ("train", "val")], np.int32([1, 1])
    found = evaluator(sets)({"codes": said, "latent": np.zeros(6, np.float32)}, 2, NullWriter())
    train = sets[0].parts[0]
    codes = train.codes[train.labelled]
    prior = [Counter(codes[:, position].tolist()).most_common(1)[0][0] for position in range(2)]
    for data in sets:
        [part], split = data.parts, data.parts[0].source.split
        true = part.codes[chosen_steps(part)]
        assert found[f"eval_{split}/latent_accuracy"] == pytest.approx(np.mean(true == said))
        assert found[f"eval_{split}/latent_prior_accuracy"] == pytest.approx(np.mean(true == prior))
    assert found["eval_train/latent_prior_accuracy"] > 0.5 > found["eval_val/latent_prior_accuracy"]
    assert not any(name.endswith("latent_mse") for name in found)


def test_labels_of_which_the_policy_learns_nothing_are_not_reported(arm: Path) -> None:
    class Blind(FakeModel):
        def bind(self, params: Any) -> Any:
            policy = super().bind(params)
            loss = policy.loss
            policy.loss = lambda batch, key: LossOutput(0.0, {"action_loss": loss(batch, key).terms["action_loss"]})
            return policy

    data = open_policy_data(smoke("autoregressive", arm, **{"data.robot_latents": True}))
    judge = PolicyEvaluator(
        Blind(4), [data], FakeRunner(), sharding.make_mesh(), PolicyEvaluationConfig(8, 8), num_steps=6
    )
    found = judge({"action": np.zeros(3, np.float32)}, 2, NullWriter())
    assert {name.split("/")[-1] for name in found} == {"action_loss", "action_mse", "mean_action_mse"}


@pytest.fixture
def rolled_out(monkeypatch: pytest.MonkeyPatch) -> list[tuple[tuple[str, ...], RolloutOptions]]:
    """Takes the place of rollouts: two of three episodes succeed, and one of the second task crashes."""
    asked: list[tuple[tuple[str, ...], RolloutOptions]] = []

    def roll_out(runner: FakeRunner, names: tuple[str, ...], environment: Any, options: RolloutOptions) -> list:
        asked.append((names, options))
        first, second = names
        return [
            *(EpisodeResult(first, episode, episode, success=episode < 2) for episode in range(3)),
            EpisodeResult(second, 0, 0, success=True),
            EpisodeResult(second, 1, 1, reason="fell"),
            EpisodeResult(second, 2, 2),
        ]

    monkeypatch.setattr(policy_in_loop, "roll_out", roll_out)
    monkeypatch.setattr(policy_in_loop, "check_rollouts", lambda *_: None)
    return asked


@pytest.mark.parametrize(("every", "due"), [(0, {6}), (4, {4, 6})])
def test_success_is_measured_when_it_is_due_and_at_the_end(
    rolled_out: list[tuple[tuple[str, ...], RolloutOptions]], every: int, due: set[int]
) -> None:
    runner = FakeRunner()
    judge = evaluator([], runner=runner, env="tabletop:reach,push", rollout_every=every, episodes=3, env_workers=1)
    found = {step: judge({"action": np.float32(step)}, step, NullWriter()) for step in (2, 4, 6)}
    assert {step for step, values in found.items() if values} == due
    assert found[6] == pytest.approx(
        {"success/tabletop:reach": 2 / 3, "success/tabletop:push": 1 / 2, "success/mean": (2 / 3 + 1 / 2) / 2}
    )
    assert [float(params["action"]) for params in runner.params] == sorted(due)
    names, options = rolled_out[-1]
    assert names == ("tabletop:reach", "tabletop:push")
    assert (options.episodes, options.workers, options.control.execute) == (3, 1, 2)


def test_a_simulator_that_is_not_there_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="there are tabletop"):
        evaluator([], runner=FakeRunner(), env="tabeltop:reach")


@pytest.mark.slow
def test_a_run_reports_its_success_in_the_environment(
    policy_run: Callable[..., PolicyRun], robot_dataset: Path
) -> None:
    changes = {"train.num_steps": 2, "evaluation.env": "tabletop:reach", "evaluation.env_workers": 1}
    run = policy_run("diffusion", robot_dataset, **changes)
    last = read_metrics(run.workdir)[2]
    assert last["success/tabletop:reach"] == last["success/mean"]
    assert last["success/mean"] in (0.0, 1.0)
