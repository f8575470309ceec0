"""The update itself, on a model of one number."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

from como_jax.nn.model_def import ModelDef
from como_jax.training import train_state, train_step
from como_jax.training.train_state import TrainState
from como_jax.types import LossOutput


class Line(nnx.Module):
    """Predicts `slope * x`; `anchor` is meant to stay frozen."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        del rngs
        self.body = nnx.Dict(slope=nnx.Param(jnp.ones(())))
        self.anchor = nnx.Dict(point=nnx.Param(jnp.full((), 5.0)))

    def frozen_paths(self) -> tuple[str, ...]:
        return ("anchor",)

    def loss(self, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
        noise = jax.random.normal(key)
        prediction = self.body["slope"][...] * batch["x"]
        loss = jnp.mean(jnp.square(prediction - batch["y"])) + 0.0 * self.anchor["point"][...]
        return LossOutput(loss, {"noise": noise})


class MaintainedLine(Line):
    """Rounds its slope after every update, and counts what it saw."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        super().__init__(rngs)
        self.seen = nnx.Param(jnp.zeros(()))

    def frozen_paths(self) -> tuple[str, ...]:
        return ("anchor", "seen")

    def loss(self, batch: dict[str, jax.Array], key: jax.Array) -> LossOutput:
        return super().loss(batch, key)._replace(statistics={"mean_x": jnp.mean(batch["x"])})

    def update_codebook(
        self, statistics: dict[str, jax.Array], step: jax.Array, key: jax.Array
    ) -> tuple[dict[str, Any], dict[str, jax.Array]]:
        seen = self.seen[...] + statistics["mean_x"]
        return {"seen": seen, "body": {"slope": jnp.round(self.body["slope"][...])}}, {"upkeep_step": step}


@dataclasses.dataclass
class Trainer:
    """A fresh state and its step."""

    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, Any]]

    def run(self, count: int) -> list[dict[str, float]]:
        batch, found = {"x": jnp.array([1.0, 2.0]), "y": jnp.array([3.0, 6.0])}, []
        for _ in range(count):
            self.state, metrics = self.step(self.state, batch)
            found.append({name: float(value) for name, value in metrics.items()})
        return found


@pytest.fixture
def make_trainer(mesh_of: Callable[..., Mesh]) -> Callable[..., Trainer]:
    """Makes a trainer with plain gradient descent at rate 0.1."""

    def make(line: type[Line] = Line, seed: int = 0, ema_decay: float = 0.0, accumulation: int = 1) -> Trainer:
        model, optimizer, mesh = ModelDef.create(line), optax.sgd(0.1), mesh_of(1, 1, 1)
        abstract = train_state.abstract_state(model, optimizer, mesh, use_ema=ema_decay > 0)
        state = train_state.create_state(model, optimizer, abstract, seed=seed)
        step = train_step.make_train_step(
            model, optimizer, mesh, abstract, seed=seed, ema_decay=ema_decay, accumulation=accumulation
        )
        return Trainer(state, step)

    return make


def test_a_step_is_gradient_descent_and_reports_loss_and_gradient(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    [metrics] = trainer.run(1)
    # The loss is mean((s x - 3 x)^2) = 2.5 (s - 3)^2.
    assert metrics["loss"] == pytest.approx(10.0)
    assert metrics["grad_norm"] == pytest.approx(10.0)
    assert float(trainer.state.params["body"]["slope"]) == pytest.approx(1.0 + 0.1 * 10.0)
    assert int(trainer.state.step) == 1


def test_frozen_parameters_have_no_optimiser_state_and_stay(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    trainer.run(2)
    assert set(trainer.state.params) == {"body"}
    assert float(trainer.state.frozen["anchor"]["point"]) == 5.0


@pytest.mark.parametrize("accumulation", [1, 2])
def test_upkeep_sees_the_new_parameters_and_the_whole_batch(
    make_trainer: Callable[..., Trainer], accumulation: int
) -> None:
    trainer = make_trainer(MaintainedLine, accumulation=accumulation, ema_decay=0.5)
    metrics = trainer.run(2)
    # 1 -> 2 -> 2.5, which rounds to 2; the average starts anew from what upkeep puts in place.
    assert float(trainer.state.params["body"]["slope"]) == float(trainer.state.ema["body"]["slope"]) == 2.0
    assert float(trainer.state.frozen["seen"]) == pytest.approx(2 * 1.5)
    assert [entry["upkeep_step"] for entry in metrics] == [1, 2]


def test_the_moving_average_follows_the_parameters(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(ema_decay=0.75)
    expected = 1.0
    for _ in range(3):
        trainer.run(1)
        expected = 0.75 * expected + 0.25 * float(trainer.state.params["body"]["slope"])
    assert float(trainer.state.ema["body"]["slope"]) == pytest.approx(expected)
    averaged = train_state.evaluation_params(trainer.state)
    assert float(averaged["body"]["slope"]) == pytest.approx(expected)
    assert float(averaged["anchor"]["point"]) == 5.0


def test_without_a_moving_average_evaluation_uses_the_parameters(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer()
    trainer.run(1)
    assert trainer.state.ema is None
    assert train_state.evaluation_params(trainer.state)["body"] == trainer.state.params["body"]


def test_randomness_differs_by_step_and_seed_and_repeats(make_trainer: Callable[..., Trainer]) -> None:
    first, again, other = ([m["noise"] for m in make_trainer(seed=seed).run(3)] for seed in (0, 0, 1))
    assert first == again
    assert len({*first, *other}) == 6


def test_a_step_is_traced_once(make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch) -> None:
    chex.clear_trace_counter()
    monkeypatch.setattr(Line, "loss", chex.assert_max_traces(Line.loss, n=1))
    make_trainer(ema_decay=0.5).run(3)


def test_replaced_parameters_also_start_the_moving_average(make_trainer: Callable[..., Trainer]) -> None:
    state = make_trainer(ema_decay=0.5).state
    new = train_state.replace_params(state, {"body": {"slope": np.float32(7)}, "anchor": {"point": np.float32(8)}})
    assert new.params["body"]["slope"] == new.ema["body"]["slope"] == 7
    assert new.frozen["anchor"]["point"] == 8


def test_merging_undoes_partitioning() -> None:
    model = ModelDef.create(Line)
    params = model.init(jax.random.key(0))
    assert train_state.merge_params(*model.partition(params)) == params
