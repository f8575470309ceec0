"""The command from a file to a run that others start from."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from absl import flags
from safetensors.numpy import save_file

from como_jax.errors import OutputError, RunError, UsageError
from como_jax.training.checkpoint import load_params
from como_jax.training.imported import read_encoder
from como_jax.training.run import load_run
from como_jax.training.sharding import make_mesh
from como_jax.weights.importing import Options
from tools import import_weights as tool

torch = pytest.importorskip("torch")
models = pytest.importorskip("tests.weights.torch_models")

OPTIONS = Options(num_heads=3, decoder_heads=2)


@pytest.fixture(scope="module")
def mae_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mae")
    torch.save({"model": models.mae(), "epoch": 1}, folder / "mae.pth")
    tool.import_weights("mae-facebook", [folder / "mae.pth"], folder / "run", OPTIONS, tool.load_recipe)
    return folder / "run"


def test_the_command_says_what_it_did(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"model": models.mae(decoder=False), "epoch": 1}, tmp_path / "mae.pth")
    files = {"format": "mae-facebook", "input": [tmp_path / "mae.pth"], "out": tmp_path / "run", "encoder": None}
    sizes = {"image_size": 30, "num_heads": 3, "decoder_heads": 0}
    others = {"pixel_mean": [], "pixel_std": [], "separate_types": False}
    monkeypatch.setattr(flags, "FLAGS", SimpleNamespace(**files, **sizes, **others))
    tool.main([])
    assert capsys.readouterr().out.splitlines() == [
        f"{len(models.mae(decoder=False)) - 1} tensors loaded, 1 resized, 0 skipped",
        "  resized pos_embed: grid of 4 x 4 to 6 x 6, bicubic",
        "  beside the weights, left aside: epoch",
        f"Written to {tmp_path / 'run'}; use it by --config.encoder.init_from={tmp_path / 'run'}",
    ]
    assert read_encoder(tmp_path / "run")[0]["encoder/pos_embed"].shape == (1, 37, 24)


def test_an_encoder_is_taken_from_an_imported_run(mae_run: Path) -> None:
    params, fields = read_encoder(mae_run)
    expected = models.mae()
    np.testing.assert_array_equal(params["encoder/pos_embed"], expected["pos_embed"])
    kernel = params["encoder/blocks/layers/mlp/fc1/kernel"]
    np.testing.assert_array_equal(kernel[1], expected["blocks.1.mlp.fc1.weight"].T)
    assert fields == {
        "data.image_size": 20,
        **{"encoder.patch_size": 5, "encoder.width": 24, "encoder.depth": 2, "encoder.num_heads": 3},
    }
    # As --config.encoder.init_from reads it.
    shape = jax.ShapeDtypeStruct((1, 1, 24), np.float32)
    found = load_params(mae_run, {"encoder": {"cls_token": shape}})["encoder"]["cls_token"]
    np.testing.assert_array_equal(found, expected["cls_token"])


def test_the_report_says_where_all_is_from(mae_run: Path) -> None:
    report = json.loads((mae_run / "import_report.json").read_text())
    assert report["format"] == "mae-facebook" and report["beside"] == ["epoch"]
    [file] = report["files"]
    assert file["name"] == "mae.pth" and len(file["sha256"]) == 64
    tensors = {*report["loaded"], *report["resized"], *report["skipped"]}
    assert tensors == set(models.mae())


def test_a_run_without_latent_motion_says_so(mae_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="is a run of family 'mae', which has no latent motion"):
        load_run(mae_run, make_mesh())
    save_file({"a": np.ones(1, np.float32)}, tmp_path / "a.safetensors")
    with pytest.raises(OutputError, match="exists already; remove it or choose another"):
        tool.import_weights("mae-facebook", [tmp_path / "a.safetensors"], mae_run, OPTIONS, tool.load_recipe)


def test_nothing_is_written_of_a_file_that_does_not_fit(tmp_path: Path) -> None:
    tensors = models.mae()
    del tensors["blocks.1.norm2.bias"]
    torch.save(tensors | {"extra": torch.ones(1)}, tmp_path / "mae.pth")
    message = r"1 tensors are missing \(blocks\.1\.norm2\.bias\); 1 tensors have no place here \(extra\)"
    with pytest.raises(RunError, match=message):
        tool.import_weights("mae-facebook", [tmp_path / "mae.pth"], tmp_path / "out", OPTIONS, tool.load_recipe)
    assert [path.name for path in tmp_path.iterdir()] == ["mae.pth"]


def test_flags_that_mean_nothing_are_refused() -> None:
    given = SimpleNamespace(encoder=None, pixel_mean=["a"], pixel_std=[])
    with pytest.raises(UsageError, match="--pixel_mean and --pixel_std take three numbers, such as 0.5,0.5,0.5"):
        tool.read_options(given)


def test_every_format_is_documented() -> None:
    for name in tool.RUNS | tool.FILES:
        assert name in tool.__doc__.split("The input is")[0]
