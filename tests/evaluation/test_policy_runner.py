"""The policy as rollouts ask it: units, sizes and images of its robot, and what a chunk depends on."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from como_jax.data.instructions import InstructionReader
from como_jax.data.pipeline import evaluation_batches
from como_jax.data.policy_data import make_spec, open_policy_data
from como_jax.data.transforms import decode_jpeg
from como_jax.errors import ConfigError, RunError
from como_jax.evaluation.rollouts.policy_runner import PolicyRunner, load_policy, with_sampling
from como_jax.files import write_json
from como_jax.spec.interface import POLICY_FILE, History, NormStats, PolicySpec
from como_jax.spec.normalization import AffineNormalizer
from como_jax.training import sharding
from como_jax.training.models import resolve
from como_jax.types import Observation
from tests.everyday import mostly_slow
from tests.policies.smoke_policies import FAMILIES, PolicyRun, smoke


class FakeModel(NamedTuple):
    """A model whose actions are a function of parameters, what is seen and keys."""

    sample: Callable[[Any, Observation, jax.Array], jax.Array]

    def bind(self, params: Any) -> Any:
        sample = self.sample

        class Policy:
            def sample_actions(self, observation: Observation, keys: jax.Array) -> jax.Array:
                return sample(params, observation, keys)

        return Policy()


def normalizer(offset: list[float], scale: list[float]) -> AffineNormalizer:
    return AffineNormalizer.fit("mean_std", {"mean": offset, "std": scale})


SPEC = PolicySpec(
    cameras=("image",),
    image_size=8,
    fit="crop",
    instants=2,
    stride=1,
    chunk=3,
    action_size=4,
    state_size=3,
    control_rate=10.0,
    uses_text=True,
    robots={},
)
SMALL = NormStats(normalizer([1.0, -2.0], [0.5, 4.0]), normalizer([0.0, 10.0], [1.0, 2.0]))


def fake_runner(sample: Callable[..., jax.Array], scales: NormStats = SMALL, **params: Any) -> PolicyRunner:
    reader = InstructionReader("text", lambda text: np.array([len(text)], np.int32))
    return PolicyRunner(FakeModel(sample), params, SPEC, scales, reader, sharding.make_mesh())


def fake_scene(number: int = 0, instants: int = 2, states: int = 2) -> History:
    rng = np.random.default_rng(number)
    images = [{"image": rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)} for _ in range(instants)]
    return History(images, rng.normal(size=(instants, states)).astype(np.float32), f"push the red block {number}")


def test_actions_are_in_the_units_and_of_the_size_of_the_robot() -> None:
    chunk = np.arange(12, dtype=np.float32).reshape(1, 3, 4)
    runner = fake_runner(lambda params, observation, keys: jnp.repeat(jnp.asarray(chunk), len(keys), axis=0))
    assert (runner.spec.action_size, runner.spec.state_size) == (2, 2)
    actions = runner.sample([fake_scene(), fake_scene()], [(0,), (1,)])
    expected = chunk[..., :2] * [0.5, 4.0] + [1.0, -2.0]
    np.testing.assert_allclose(actions, np.repeat(expected, 2, axis=0), rtol=1e-6)
    assert actions.dtype == np.float32


def test_states_are_normalised_and_padded_to_the_largest_of_all_robots() -> None:
    def echo(params: Any, observation: Observation, keys: jax.Array) -> jax.Array:
        assert observation.state.shape == (1, 2, 3)
        return observation.state * observation.has_state[:, None, None]

    scales = NormStats(normalizer([0.0] * 3, [1.0] * 3), SMALL.state)
    scene = fake_scene()
    [seen] = fake_runner(echo, scales).sample([scene], [(0,)])
    np.testing.assert_allclose(seen, np.pad((scene.states - [0, 10]) / [1, 2], ((0, 0), (0, 1))), rtol=1e-5)
    [blind] = fake_runner(echo, NormStats(scales.action, None)).sample([scene], [(0,)])
    np.testing.assert_array_equal(blind, np.zeros((2, 3)))


def test_other_parameters_take_the_place_of_the_first_in_a_runner_of_their_own() -> None:
    traced = []

    def sample(params: Any, observation: Observation, keys: jax.Array) -> jax.Array:
        traced.append(1)
        return jnp.full((len(keys), 3, 4), params["value"])

    runner = fake_runner(sample, value=jnp.float32(1))
    other = runner.with_params({"value": jnp.float32(3)})
    found = [asked.sample([fake_scene()], [(0,)])[0, 0, 0] for asked in (runner, other, runner)]
    assert found == [1.5, 2.5, 1.5] and len(traced) == 1


@pytest.mark.parametrize("family", mostly_slow(FAMILIES, "diffusion"))
def test_a_policy_sees_in_an_environment_what_it_saw_in_training(family: str, robot_dataset: Path) -> None:
    config = smoke(family, robot_dataset)
    data = open_policy_data(config)
    spec = make_spec(data, resolve(config, data.sizes()))
    [part] = data.parts
    # One batch over the dataset's steps, of which the first have a history that is cut short by the episode's start.
    [(batch, count)] = evaluation_batches(data.reader, num_samples=8, batch_size=8)
    steps = np.linspace(0, len(part.steps) - 1, count).astype(int)

    def scene(step: int) -> History:
        episode = part.episode[step]
        back = spec.stride * np.arange(1 - spec.instants, 1)
        records = np.maximum(step + back, part.source.start[episode])
        frames = [decode_jpeg(jpeg, 64) for jpeg in part.source.read_jpegs(records.tolist())]
        images = [{spec.cameras[0]: frame} for frame in frames]
        return History(images, part.source.state[records], part.source.instruction[episode])

    scales = NormStats(normalizer([0.0], [1.0]), next(iter(spec.robots.values())).state)
    reader = InstructionReader.make(config.text, robot_dataset)
    fields = ("images", "state", "text", "has_camera", "has_state")
    for field in fields:
        model = FakeModel(
            lambda params, seen, keys, field=field: getattr(seen, field).reshape(len(keys), -1, 1).astype(jnp.float32)
        )
        runner = PolicyRunner(model, {}, spec, scales, reader, sharding.make_mesh())
        found = runner.sample([scene(step) for step in steps], [(0,)] * count)
        # Training halves large images while it decodes them, which rounds otherwise.
        limit = 1.0 if field == "images" else 1e-6
        assert np.abs(found.ravel() - batch[field].ravel()).mean() < limit, field


@pytest.fixture(scope="module", params=mostly_slow(FAMILIES, "diffusion"))
def trained(
    request: pytest.FixtureRequest, policy_run: Callable[..., PolicyRun], robot_dataset: Path, labelled_videos: Path
) -> tuple[str, PolicyRunner]:
    """Family, and the runner of a co-trained run."""
    run = policy_run(request.param, robot_dataset, labelled_videos, **{"train.evaluate_every": 2})
    runner = load_policy(run.workdir, sharding.make_mesh())
    assert runner.step == 4
    return request.param, runner


def scenes_of(runner: PolicyRunner, *numbers: int) -> list[History]:
    return [fake_scene(number, runner.spec.instants, runner.spec.state_size) for number in numbers]


def test_a_chunk_depends_on_its_own_scene_and_seed_alone(trained: tuple[str, PolicyRunner]) -> None:
    family, runner = trained
    first = runner.sample(scenes_of(runner, 0, 1), [(0, 7), (0, 8)])
    other = runner.sample(scenes_of(runner, 0, 2), [(0, 7), (0, 9)])
    swapped = runner.sample(scenes_of(runner, 1, 0), [(0, 8), (0, 7)])
    assert first.shape == (2, runner.spec.chunk, runner.spec.action_size) and np.isfinite(first).all()
    np.testing.assert_allclose(other[0], first[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(swapped[::-1], first, rtol=1e-5, atol=1e-6)
    assert np.abs(first[0] - first[1]).max() > 1e-4

    seeded = runner.sample(scenes_of(runner, 0, 0), [(0, 7), (1, 7)])
    np.testing.assert_allclose(seeded[0], first[0], rtol=1e-5, atol=1e-6)
    # Only diffusion draws anything.
    assert (np.abs(seeded[0] - seeded[1]).max() > 1e-5) == (family == "diffusion")


@pytest.mark.parametrize("trained", ["diffusion"], indirect=True)
def test_actions_of_diffusion_keep_to_the_range_of_the_demonstrations(trained: tuple[str, PolicyRunner]) -> None:
    _, runner = trained
    [scales] = runner.spec.robots.values()
    actions = runner.sample(scenes_of(runner, *range(8)), [(number,) for number in range(8)])
    assert np.abs(scales.action(actions)).max() <= 1 + 1e-4


@pytest.mark.slow
def test_a_run_that_is_no_policy_is_refused(
    smoke_run: Callable[[str], Path], policy_run: Callable[..., PolicyRun], robot_dataset: Path, tmp_path: Path
) -> None:
    mesh = sharding.make_mesh()
    with pytest.raises(RunError, match="family 'como', which is not a policy; take one of diffusion_policy, auto"):
        load_policy(smoke_run("como"), mesh)
    with pytest.raises(RunError, match="holds no run"):
        load_policy(tmp_path, mesh)
    (tmp_path / "config.json").write_text('{"format": "como_jax", "version": 2, "kind": "policy"}')
    with pytest.raises(RunError, match="is an export for PyTorch, not a run; name the run that it was made of"):
        load_policy(tmp_path, mesh)
    run = policy_run("diffusion", robot_dataset, **{"train.stop_after": 1})
    text = (run.workdir / POLICY_FILE).read_text()
    try:
        for damage, message in ((text[:20], f"{POLICY_FILE} is damaged"), (None, f"it has no {POLICY_FILE}")):
            (run.workdir / POLICY_FILE).unlink()
            if damage:
                (run.workdir / POLICY_FILE).write_text(damage)
            with pytest.raises(RunError, match=message):
                load_policy(run.workdir, mesh)
    finally:
        (run.workdir / POLICY_FILE).write_text(text)
    with pytest.raises(ConfigError, match=f"not trained on .* 'other'; choose one of {robot_dataset.name}"):
        load_policy(run.workdir, mesh, "other")


def test_a_spec_comes_back_as_it_was_written(robot_dataset: Path, tmp_path: Path) -> None:
    config = smoke("autoregressive", robot_dataset)
    data = open_policy_data(config)
    spec = make_spec(data, resolve(config, data.sizes()))
    write_json(tmp_path / POLICY_FILE, spec.to_json())
    found, values = PolicySpec.load(tmp_path), np.linspace(-1, 1, 8).reshape(2, 4)
    assert dataclasses.replace(found, robots={}) == dataclasses.replace(spec, robots={})
    assert list(found.robots) == list(spec.robots) == [robot_dataset.name]
    for name, scales in spec.robots.items():
        np.testing.assert_array_equal(found.robots[name].action.inverse(values), scales.action.inverse(values))
        np.testing.assert_array_equal(found.robots[name].state(values), scales.state(values))


def recipe(family: str) -> ConfigDict:
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
    before = recipe(family)
    after = with_sampling(before, settings)
    assert {name: after.model[name] for name in expected} == expected
    if family == "diffusion":
        assert (after.model.diffusion.sample_steps, before.model.diffusion.sample_steps) == (5, 2)


def test_what_the_policy_does_not_have_is_refused_by_name() -> None:
    with pytest.raises(
        ConfigError, match="`sampling` temprature: this policy has temperature, flow_steps; did you mean"
    ):
        with_sampling(recipe("vla"), {"temprature": "1"})
    with pytest.raises(ConfigError, match="`sampling` temperature=hot: the value must be like 0.0"):
        with_sampling(recipe("vla"), {"temperature": "hot"})
    with pytest.raises(ConfigError, match="`sampling` width"):
        with_sampling(recipe("vla"), {"width": "8"})
