"""Settings of sampling that differ from the run's."""

import importlib

import pytest
from ml_collections import ConfigDict

from como_jax.errors import ConfigError
from como_jax.evaluation.rollouts.sampling import with_sampling


def smoke(family: str) -> ConfigDict:
    return importlib.import_module(f"configs.policy_{family}").get_config("smoke")


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("diffusion", {"diffusion.sample_steps": "5", "guidance": "2"}, {"guidance": 2.0}),
        (
            "autoregressive",
            {"generate_latents": "true", "temperature": "0.5"},
            {"generate_latents": True, "temperature": 0.5},
        ),
        ("vla", {"flow_steps": "3"}, {"flow_steps": 3}),
    ],
)
def test_settings_replace_those_of_the_run(family: str, settings: dict[str, str], expected: dict[str, object]) -> None:
    before = smoke(family)
    after = with_sampling(before, settings)
    assert {name: after.model[name] for name in expected} == expected
    if family == "diffusion":
        assert (after.model.diffusion.sample_steps, before.model.diffusion.sample_steps) == (5, 2)


def test_what_the_policy_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match="--sampling temprature: this policy has temperature, flow_steps; did you mean"
    ):
        with_sampling(smoke("vla"), {"temprature": "1"})
    with pytest.raises(ConfigError, match="--sampling temperature=hot: the value must be as 0.0"):
        with_sampling(smoke("vla"), {"temperature": "hot"})
    with pytest.raises(ConfigError, match="--sampling width"):
        with_sampling(smoke("vla"), {"width": "8"})
