"""Exports of policy runs: what is written, and that nothing is when something is wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from como_jax.errors import ConfigError, ConversionError, OutputError
from como_jax.files import write_json
from como_jax.spec.exported import ExportedPolicy
from como_jax.spec.interface import POLICY_FILE, PolicySpec
from como_jax.weights.policies import describe_policy, policy_table
from tests.data.tokenizer_files import write_tokenizer
from tests.runtime_torch.small_policies import make_policy

torch = pytest.importorskip("torch")

from como_jax.export.pytorch import export  # noqa: E402
from como_jax.export.pytorch.export import export_torch  # noqa: E402
from como_jax.export.pytorch.policy_parity import CHUNK_TOLERANCE, PolicyReference  # noqa: E402
from como_jax.export.pytorch.programs import check_formats  # noqa: E402
from como_jax.runtime_torch.policy import Policy  # noqa: E402
from tests.runtime_torch.stored_policies import CLIP  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_in_one_thread")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a diffusion policy that reads CLIP, with one checkpoint, of step 7, that has a moving average."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = write_tokenizer(folder / "tokenizer.json", "clip")
    run, spec = make_policy("diffusion", {**CLIP, "text.depth": 1, "text.tokenizer_file": str(tokenizer)})
    (folder / "config.json").write_text(run.config.to_json_best_effort())
    write_json(folder / POLICY_FILE, spec.to_json())
    trained = jax.tree.map(jnp.asarray, run.params)
    frozen = {"observation": {"text": trained["observation"].pop("text")}}
    newest = jax.tree.map(jnp.zeros_like, trained)
    with ocp.StandardCheckpointer() as checkpointer:
        state = {"params": newest, "ema": trained, "frozen": frozen}
        checkpointer.save(folder / "checkpoints" / "7" / "state", state)
    return folder


@pytest.mark.slow
def test_an_export_acts_and_says_where_it_comes_from_and_a_wrong_one_is_refused(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PolicyReference] = []

    def make_reference(run: object, spec: PolicySpec) -> PolicyReference:
        made.append(made[0] if made else PolicyReference(run, spec))
        return made[0]

    monkeypatch.setattr(export, "PolicyReference", make_reference)
    out, spec = tmp_path / "exported", PolicySpec.load(workdir)
    parity = export_torch(workdir, out, ["pt2"])
    assert 0 < max(parity.values()) < CHUNK_TOLERANCE / 10 and (out / "step.pt2").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]

    requirements = (out / "requirements.txt").read_text()
    assert all(f"\n{name}>=" in requirements for name in ("numpy", "safetensors", "torch", "tokenizers"))
    policy = Policy.from_pretrained(out, robot="arm", seed=0)
    assert policy.metadata["cameras"] == list(spec.cameras) and policy.metadata["chunk"] == spec.chunk
    image = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    observation = {"images": dict.fromkeys(spec.cameras, image), "state": np.zeros(spec.state_size)}
    action = policy.act(observation, "push the cube")
    # The sampler clips what it makes.
    assert action.shape == (spec.action_size,) and np.abs(spec.robots["arm"].action(action)).max() <= 1 + 1e-4

    provenance, card = json.loads((out / "provenance.json").read_text()), (out / "README.md").read_text()
    assert provenance["step"] == 7 and provenance["config"]["family"] == "diffusion_policy"
    assert "pip install --no-deps como_jax && pip install -r DIRECTORY/requirements.txt" in card
    assert all(f"{name} | {error:.1e}" in card for name, error in parity.items())
    assert f'"{spec.cameras[0]}": image' in card and f"[{spec.action_size}]" in card

    def reversed_steps(described: ExportedPolicy) -> dict:
        """The steps of a chunk in the wrong order, as in a wrong table of a format."""
        table = policy_table(described)
        entry, depth = table["step_embed"]
        return {**table, "step_embed": (dataclasses.replace(entry, unmake=lambda value: [value[::-1]]), depth)}

    monkeypatch.setattr(export, "policy_table", reversed_steps)
    with pytest.raises(ConversionError, match="network, one evaluation differs between PyTorch and JAX"):
        export_torch(workdir, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists()


def test_what_cannot_be_exported_is_said_before_anything_is_done(workdir: Path, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export_torch(workdir, workdir)
    with pytest.raises(ConfigError, match="`formats` has 'tflite'; each must be one of pt2, onnx"):
        export_torch(workdir, tmp_path / "exported", ["tflite"])
    run, spec = make_policy("vla")
    described = describe_policy(run.config, spec)
    with pytest.raises(ConfigError, match="generates token after token, which is no single program"):
        check_formats(["pt2"], described)
    assert not list(tmp_path.iterdir())
