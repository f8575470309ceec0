"""Exported policies act in PyTorch as they do in JAX, and are read back as they were."""

from __future__ import annotations

import ast
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import scipy.stats

from como_jax.envs.base import Observation
from como_jax.errors import ConversionError, RunError
from como_jax.spec.control import ControlConfig, Controller
from como_jax.weights.policies import describe_policy
from tests.runtime_torch.small_policies import ACTION_SIZE, STATE_SIZE, make_policy

torch = pytest.importorskip("torch")

from como_jax.errors import ConfigError, InputError, ModelFileError, NonFiniteError  # noqa: E402
from como_jax.export.pytorch.policy_parity import (  # noqa: E402
    SEEDS,
    PolicyReference,
    check_normalization,
    check_policy,
    draw_noise,
)
from como_jax.runtime_torch import policy as policy_module  # noqa: E402
from como_jax.runtime_torch.denoising import denoise  # noqa: E402
from como_jax.runtime_torch.noise import DrawnNoise, GivenNoise  # noqa: E402
from como_jax.runtime_torch.policy import Policy  # noqa: E402
from como_jax.runtime_torch.session import History  # noqa: E402
from como_jax.spec.policies import DiffusionConfig  # noqa: E402
from tests.everyday import mostly_slow  # noqa: E402
from tests.runtime_torch.stored_policies import EMBEDDINGS, TEXTS, store  # noqa: E402

GUIDED_FLOW = {
    "model.diffusion.kind": "flow",
    "model.instruction_dropout": 0.1,
    "model.guidance": 2.0,
    "encoder.tower": "vit",
    "encoder.pool": 2,
    "data.cameras": ("top", "wrist"),
    "data.instants": 2,
    "data.stride": 2,
}
LATENTS = {"model.latent_queries": 2, "model.latent_dim": 3}
THINKING = {**LATENTS, "model.generate_latents": True, "model.gripper_dim": 2}
DIFFUSED = {"model.latent_head": "diffusion", "model.diffusion_steps": 3}
CODED = {"model.codebook_size": 5, "model.temperature": 1.0}
TOKENS = {"text.tower": "tokens", "text.max_length": 16, "data.state_size": 0}
BINS = {
    "model.causal_text": True,
    "encoder.tower": "siglip",
    "model.num_bins": 16,
    "model.lora_rank": 2,
    "model.temperature": 1.0,
    "data.chunk": 2,
}
FLOW = {"model.action_head": "flow", "model.flow_steps": 3, "data.chunk": 2, "model.gripper_dim": 0}

# Of the other family, see the fixture `guided`.
COMPARED: dict[str, tuple[str, dict[str, Any]]] = {
    "thinking in vectors, embeddings": ("autoregressive", THINKING | DIFFUSED | EMBEDDINGS),
    "regression, a bag of words": (
        "diffusion",
        {"model.diffusion.kind": "regression", "model.diffusion.clip": 0.0, "encoder.pool": 2, "text.depth": 0},
    ),
    "drawn bins, tokens": ("vla", LATENTS | TOKENS | BINS),
}
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "denoising": ("diffusion", LATENTS),
    "thinking in codes": ("autoregressive", THINKING | CODED),
    "latents that no action reads": ("autoregressive", LATENTS),
    "flow": ("vla", FLOW),
}


class Exported(NamedTuple):
    """A policy of which only the weights and config.json are written, and what it does in JAX."""

    folder: Path
    reference: PolicyReference


def export(family: str, changes: dict[str, Any], folder: Path) -> Exported:
    """Exports a small policy, and asserts that it acts as in JAX."""
    run, spec = store(family, changes, folder)
    reference, policy = PolicyReference(run, spec), Policy.from_pretrained(folder, robot="arm")
    check_normalization(spec, policy)
    parity = check_policy(reference, policy)
    assert max(parity.values()) < 2e-5, parity
    # Not because all are alike.
    assert np.ptp(reference.chunks[..., 0]) > 1e-3
    return Exported(folder, reference)


@pytest.fixture(scope="module")
def guided(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Of a diffusion policy with two cameras and a history; not to be changed."""
    return export("diffusion", GUIDED_FLOW, tmp_path_factory.mktemp("guided"))


@pytest.mark.parametrize("variant", COMPARED)
def test_actions_are_those_of_jax_and_the_weights_can_be_read_back(variant: str, tmp_path: Path) -> None:
    export(*COMPARED[variant], tmp_path)


@pytest.mark.parametrize("variant", mostly_slow(STORED, "denoising", "thinking in codes"))
def test_weights_of_every_kind_of_head_are_loaded_and_read_back(variant: str, tmp_path: Path) -> None:
    store(*STORED[variant], tmp_path)
    policy = Policy.from_pretrained(tmp_path, robot="arm", execute=1)
    seen = observation()
    actions = [policy.act(seen, TEXTS[0]) for _ in range(2)]
    assert all(action.shape == (ACTION_SIZE,) and np.isfinite(action).all() for action in actions)


def observations(count: int, seed: int) -> list[Observation]:
    """What an environment shows, in images that have to be cut and resized."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (count, 2, 40, 60, 3), dtype=np.uint8)
    states = rng.uniform(-1, 1, (count, STATE_SIZE)).astype(np.float32)
    return [
        Observation({"top": top, "wrist": wrist}, state) for (top, wrist), state in zip(images, states, strict=True)
    ]


@pytest.mark.parametrize("ensemble", (None, 0.1))
def test_sessions_act_as_the_controllers_of_rollouts_do(guided: Exported, ensemble: float | None) -> None:
    policy = Policy.from_pretrained(guided.folder, robot="arm", execute=2, ensemble=ensemble)
    runner, keys = guided.reference.runner, guided.reference.keys
    controllers = [Controller(runner.spec, ControlConfig(2, ensemble)) for _ in TEXTS]
    sessions = [policy.new_session() for _ in TEXTS]
    noise = list(draw_noise(policy.config.model, keys))
    for step, seen in enumerate(zip(observations(7, 0), observations(7, 1), strict=True)):
        for controller, observation in zip(controllers, seen, strict=True):
            controller.observe(observation.images, observation.state)
        assert all(controller.needs_chunk() == (step % 2 == 0) for controller in controllers)
        if controllers[0].needs_chunk():
            with jax.default_matmul_precision("highest"):
                chunks = runner.sample(
                    [controller.history(text) for controller, text in zip(controllers, TEXTS, strict=True)],
                    [(seed,) for seed in SEEDS],
                )
            for controller, chunk in zip(controllers, chunks, strict=True):
                controller.add_chunk(chunk)
        for number, (session, observation, text) in enumerate(zip(sessions, seen, TEXTS, strict=True)):
            given = GivenNoise(part[number : number + 1] for part in noise)
            action = session.act({"images": observation.images, "state": observation.state}, text, given)
            np.testing.assert_allclose(action, controllers[number].next_action(), rtol=1e-4, atol=1e-5)


def observation(seed: int = 0) -> dict[str, Any]:
    [observation] = observations(1, seed)
    return {"images": dict(observation.images), "state": observation.state}


def test_equal_seeds_act_alike_and_a_reset_begins_again(guided: Exported) -> None:
    first, second, other = (
        Policy.from_pretrained(guided.folder, robot="other", execute=1, seed=seed) for seed in (1, 1, 2)
    )
    # Of this robot no states are known, and its actions are shorter.
    del (seen := observation())["state"]
    actions = [policy.act(seen, TEXTS[0]) for policy in (first, second, other)]
    assert actions[0].shape == (ACTION_SIZE - 1,) and actions[0].dtype == np.float32
    assert np.array_equal(actions[0], actions[1]) and not np.array_equal(actions[0], actions[2])
    assert first.metadata["action_size"] == ACTION_SIZE - 1 and first.metadata["state_size"] == 0
    noise = np.zeros((1, 4, ACTION_SIZE), np.float32)
    for policy in (first, second) * 2:
        policy.act(observation(1), TEXTS[0], GivenNoise([noise]))
    second.reset()
    again = [policy.act(seen, TEXTS[0], GivenNoise([noise])) for policy in (first, second)]
    assert not np.array_equal(*again), "the history before the reset is forgotten"
    second.reset()
    assert np.array_equal(second.act(seen, TEXTS[0], GivenNoise([noise])), again[1])


def test_bfloat16_acts_nearly_as_float32_and_keeps_what_training_keeps(guided: Exported) -> None:
    exact, fast = (
        Policy.from_pretrained(guided.folder, robot="arm", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    seen, noise = observation(), np.random.default_rng(0).normal(size=(1, 4, ACTION_SIZE))
    actions = [policy.act(seen, TEXTS[0], GivenNoise([noise])) for policy in (exact, fast)]
    assert 0 < np.abs(actions[0] - actions[1]).max() < 0.1 * np.abs(actions[0]).max()
    assert fast.module.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert fast.module.action.outputs.weight.dtype == fast.module.norm.weight.dtype == torch.float32


@pytest.mark.slow
def test_the_network_compiles_to_one_graph(guided: Exported) -> None:
    policy = Policy.from_pretrained(guided.folder, robot="arm")
    scene = History([observation()["images"]] * 2, np.zeros((2, STATE_SIZE), np.float32), TEXTS[0])
    with torch.inference_mode():
        context = policy.module.read(policy.observe([scene]))
        arguments = torch.zeros(1, 4, ACTION_SIZE), torch.ones(1), context
        compiled = torch.compile(policy.module.evaluate, fullgraph=True, backend="eager")(*arguments)
        torch.testing.assert_close(compiled, policy.module.evaluate(*arguments))


@pytest.mark.slow
@pytest.mark.parametrize("variant", ("denoising", "thinking in codes", "flow"))
def test_a_compiled_policy_acts_as_it_is(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store(*STORED[variant], tmp_path)
    programs: list[Any] = []

    def compile_eagerly(call: Any) -> Any:
        programs.append(call)
        return real_compile(call, backend="eager")

    real_compile = torch.compile
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    actions = []
    for compiled in (False, True):
        policy = Policy.from_pretrained(tmp_path, robot="arm", execute=1, seed=0, compile=compiled)
        actions.append([policy.act(observation(), TEXTS[0]) for _ in range(2)])
    np.testing.assert_allclose(*actions, rtol=1e-5, atol=1e-6)
    assert len(programs) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", mostly_slow(("ddpm", "flow", "regression"), "flow"))
def test_denoising_compiles_to_one_graph_that_rounds_alike(kind: str) -> None:
    config = DiffusionConfig(kind, 100, 3, "epsilon", eta=0.0, clip=1.0)

    def sample(x: torch.Tensor) -> torch.Tensor:
        return denoise(config, lambda x, time: x * time[:, None], x, GivenNoise(()))

    with torch.inference_mode():
        x = torch.linspace(-2, 2, 6).reshape(2, 3)
        assert torch.equal(torch.compile(sample, fullgraph=True, backend="eager")(x), sample(x))


BAD: dict[str, tuple[str, Any]] = {
    "observation.images must hold an image of top, wrist": ("images", None),
    "observation.images.wrist is missing; there are top": ("images", {"top": np.zeros((9, 9, 3), np.uint8)}),
    r"images.top must be an array of uint8, .* not float64 \[9, 9, 3\]": (
        "images",
        {"top": np.zeros((9, 9, 3)), "wrist": 0},
    ),
    "observation.state is missing; it must be 4 numbers": ("state", None),
    "observation.state must be 4 numbers, not 3": ("state", np.zeros(3)),
    "observation.state must be a row of numbers, not list": ("state", ["a"] * 4),
    "observation.state holds numbers that are not finite": ("state", [0.0, np.nan, 0.0, 0.0]),
}


def test_a_bad_observation_is_named_by_its_field_and_changes_nothing(guided: Exported) -> None:
    policy = Policy.from_pretrained(guided.folder, robot="arm", execute=1)
    noise = np.ones((1, 4, ACTION_SIZE), np.float32)
    for message, (field, value) in BAD.items():
        with pytest.raises(InputError, match=message):
            policy.act(observation(1) | {field: value}, TEXTS[0])
    for instruction, message in ((7, "must be text, not int"), ("long" * 99, "has 396 bytes, more than the 64")):
        with pytest.raises(InputError, match=message):
            policy.act(observation(1), instruction)
    with pytest.raises(InputError, match=r"noise of shape \[1, 4, 3\] is needed, and there is no more"):
        policy.act(observation(1), TEXTS[0], GivenNoise([]))
    with pytest.raises(NonFiniteError, match="an action that is not finite"):
        policy.act(observation(1), TEXTS[0], GivenNoise([noise * np.nan]))
    fresh = policy.new_session()
    assert fresh.plan(observation(), TEXTS[0], GivenNoise([noise])).shape == (4, ACTION_SIZE)
    fresh.reset()
    for seen in (observation(), observation(2)):
        actions = [robot.act(seen, TEXTS[0], GivenNoise([noise])) for robot in (policy, fresh)]
        assert np.array_equal(*actions)


def test_settings_and_files_that_do_not_fit_are_refused(guided: Exported, tmp_path: Path) -> None:
    for settings, message in (
        ({}, "several robot datasets; choose one of arm, other"),
        ({"robot": "arm", "execute": 5}, "`execute` 5 must lie between 0 and 4"),
        ({"robot": "arm", "ensemble": np.nan}, "`ensemble` nan must be a finite"),
        ({"robot": "arm", "dtype": torch.float16}, "float16 must be one of"),
    ):
        with pytest.raises(ConfigError, match=message):
            Policy.from_pretrained(guided.folder, **settings)
    content = json.loads((guided.folder / "config.json").read_text())
    for section, changes, message in (
        ("", {"kind": "latent_motion"}, "kind is 'latent_motion' and must be 'policy'"),
        ("", {"family": "other"}, "family 'other' must be one of diffusion_policy"),
        ("interface", {"robots": {"arm": {"action": {"offset": [0]}, "state": None}}}, "interface .* robots .*'scale'"),
        ("interface", {"robots": {}}, "interface.robots must hold at least one"),
        ("interface", {"cameras": ["top"]}, "interface.cameras is 1, which does not fit the network's 2"),
        ("interface", {"fit": "squeeze"}, "fit 'squeeze' must be one of crop, stretch"),
        ("model", {"num_heads": 3}, "model has width 32, which must be a multiple of its 3 heads"),
        ("model", {"action_size": 2}, "interface.action_size is 3, which does not fit the network's 2"),
    ):
        changed = json.loads(json.dumps(content))
        (changed[section] if section else changed).update(changes)
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelFileError, match=message):
            Policy.from_pretrained(tmp_path)


def test_what_cannot_act_is_refused_before_anything_is_written() -> None:
    run, spec = make_policy("diffusion")
    run.config.family = "como"
    with pytest.raises(ConversionError, match="family 'como' cannot be exported"):
        describe_policy(run.config, spec)
    run.config.family = "diffusion_policy"
    with pytest.raises(RunError, match="trained on latent motion alone"):
        describe_policy(run.config, dataclasses.replace(spec, robots={}))


def test_drawn_noise_is_of_its_distributions() -> None:
    noise = DrawnNoise(torch.Generator().manual_seed(0))
    normal, gumbel = noise.normal(100, 100).numpy(), noise.gumbel(100, 100).numpy()
    assert scipy.stats.kstest(normal.ravel(), "norm").pvalue > 0.01
    assert scipy.stats.kstest(gumbel.ravel(), "gumbel_r").pvalue > 0.01


def test_the_runtime_imports_nothing_that_a_robot_may_lack() -> None:
    needed = {"torch", "numpy", "cv2", "safetensors"}
    runtime = Path(policy_module.__file__).parent
    for path in (*runtime.glob("*.py"), *runtime.with_name("spec").glob("*.py")):
        # Packages of extras are imported where they are used.
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                known = name.split(".")[0] in sys.stdlib_module_names | needed
                own = name.startswith(("como_jax.runtime_torch", "como_jax.spec", "como_jax.errors"))
                assert known or own, f"{path.name} imports {name}"
