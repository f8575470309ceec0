"""Models without their parameters: equal settings give the same one, and it is traced once."""

import chex
import jax
import pytest
from flax import nnx

from como_jax.nn.model_def import define


class Scale(nnx.Module):
    """Multiplies by a random number times a setting."""

    def __init__(self, setting: float, *, rngs: nnx.Rngs):
        self.factor = nnx.Param(setting * self.draw(rngs.params()))

    @staticmethod
    def draw(key: jax.Array) -> jax.Array:
        """A random number."""
        return jax.random.normal(key)

    def frozen_paths(self) -> tuple[str, ...]:
        """See `ModelDef`."""
        return ("factor",)


def test_equal_settings_give_one_model() -> None:
    assert define(Scale, 2.0) is define(Scale, 2.0)
    assert define(Scale, 2.0) is not define(Scale, 3.0)


def test_a_model_is_traced_once_however_often_it_is_initialised(monkeypatch: pytest.MonkeyPatch) -> None:
    chex.clear_trace_counter()
    # What the class draws while it is traced.
    monkeypatch.setattr(Scale, "draw", staticmethod(chex.assert_max_traces(Scale.draw, n=1)))
    model = define(Scale, 5.0)
    assert model.frozen == ("factor",)
    shapes = jax.eval_shape(model.init, jax.random.key(0))
    params = [model.init(jax.random.key(seed)) for seed in (0, 0, 1)]
    chex.assert_trees_all_equal_shapes_and_dtypes(shapes, params[0])
    chex.assert_trees_all_equal(params[0], params[1])
    assert params[0]["factor"] != params[2]["factor"]
    assert float(model.bind(params[2]).factor[...]) == float(params[2]["factor"])
