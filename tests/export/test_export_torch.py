"""Exports of runs: what is written, and that nothing is when something is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from como_jax.errors import ConfigError, ConversionError, OutputError, RunError
from como_jax.spec.exported import ExportedMotion
from como_jax.weights.motion import motion_table
from tests.runtime_torch.small_runs import make_run

torch = pytest.importorskip("torch")

from como_jax.export.pytorch import export, programs  # noqa: E402
from como_jax.export.pytorch.export import export_torch, write_model  # noqa: E402
from como_jax.export.pytorch.parity import TOLERANCE, refuse_large  # noqa: E402
from como_jax.runtime_torch.latent_motion import LatentMotion  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_in_one_thread")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint, of step 7."""
    folder = tmp_path_factory.mktemp("run")
    run = make_run("como")
    (folder / "config.json").write_text(run.config.to_json_best_effort())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "checkpoints" / "7" / "state", {"params": run.params, "frozen": {}})
    return folder


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_an_export_holds_what_robots_need_and_says_where_it_comes_from(workdir: Path, tmp_path: Path) -> None:
    out = tmp_path / "exported"
    parity = export_torch(workdir, out, ["pt2"])
    assert 0 < max(parity.values()) < TOLERANCE
    assert [path.name for path in tmp_path.iterdir()] == ["exported"]
    clips = frames(3, 2, 64, 64)
    latent = LatentMotion.from_pretrained(out).encode(clips).latent
    [program] = torch.export.load(out / "encode.pt2").module()(torch.from_numpy(clips))
    torch.testing.assert_close(program, latent[:, 0], rtol=1e-4, atol=1e-5)
    provenance, card = json.loads((out / "provenance.json").read_text()), (out / "README.md").read_text()
    assert provenance["step"] == 7 and provenance["config"]["encoder"]["width"] == 24
    assert "torch" in provenance["versions"]
    assert all(f"{name} | {error:.1e}" in card for name, error in parity.items())
    encoder = load_file(out / "encoder" / "model.safetensors")
    assert encoder["embeddings.patch_embeddings.projection.weight"].shape == (24, 3, 16, 16)
    assert encoder["encoder.layer.1.attention.attention.query.weight"].shape == (24, 24)


def test_an_export_that_computes_something_else_is_refused_and_leaves_nothing(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swapped(described: ExportedMotion) -> dict:
        """Two norms that take each other's place, as in a wrong table of a format."""
        table = motion_table(described)
        names = [f"encoder/blocks/layers/{norm}/scale" for norm in ("norm1", "norm2")]
        return {**table, names[0]: table[names[1]], names[1]: table[names[0]]}

    monkeypatch.setattr(export, "motion_table", swapped)
    with pytest.raises(ConversionError, match="differs between PyTorch and JAX by .* nothing was written"):
        export_torch(workdir, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


def test_differences_that_are_no_numbers_are_refused() -> None:
    refuse_large({"encode": TOLERANCE / 2})
    for error in (np.nan, np.inf, TOLERANCE):
        with pytest.raises(ConversionError, match="encode differs"):
            refuse_large({"encode": error})


def test_what_cannot_be_exported_is_said_before_anything_is_done(
    workdir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(OutputError, match="exists already"):
        export_torch(workdir, workdir)
    with pytest.raises(RunError, match="holds no run"):
        export_torch(tmp_path, tmp_path / "exported")
    with pytest.raises(ConfigError, match="`formats` has 'tflite'; each must be one of pt2, onnx"):
        export_torch(workdir, tmp_path / "exported", ["tflite"])
    monkeypatch.setattr(programs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install onnx onnxscript onnxruntime"):
        export_torch(workdir, tmp_path / "exported", ["onnx"])


def test_weights_of_released_code_are_refused(tmp_path: Path) -> None:
    run = make_run("laq", {})
    with run.config.unlocked():
        run.config.released_code = True
    with pytest.raises(ConversionError, match="holds weights of the released code"):
        write_model(run, tmp_path)
