"""The encoder of an exported motion model, opened by transformers as its users open it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from etils import epath

from como_jax.spec.images import IMAGENET_MEAN, IMAGENET_STD
from tests.runtime_torch.small_runs import make_run

torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")

from como_jax.export.pytorch.export import write_model  # noqa: E402
from como_jax.export.pytorch.hf_encoder import write_encoder  # noqa: E402
from como_jax.runtime_torch.latent_motion import LatentMotion  # noqa: E402

pytestmark = pytest.mark.usefixtures("torch_in_one_thread")


@pytest.mark.slow
def test_transformers_opens_the_encoder_by_itself(tmp_path: Path) -> None:
    run = make_run("como")
    described, _ = write_model(run, epath.Path(tmp_path))
    model = LatentMotion.from_pretrained(tmp_path)
    write_encoder(run, described.encoder, epath.Path(tmp_path / "encoder"), model)

    loaded, report = transformers.AutoModel.from_pretrained(
        tmp_path / "encoder", add_pooling_layer=False, output_loading_info=True
    )
    assert not any(report.values()), report
    frames = np.random.default_rng(1).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    pixels = transformers.AutoImageProcessor.from_pretrained(tmp_path / "encoder")(
        images=list(frames), return_tensors="pt"
    )["pixel_values"]
    expected = (frames / 255 - IMAGENET_MEAN) / IMAGENET_STD
    np.testing.assert_allclose(pixels.movedim(1, -1), expected, atol=1e-6)
    with torch.inference_mode():
        features = loaded.eval()(pixels).last_hidden_state
        ours = model.module.encoder(torch.from_numpy(expected.astype(np.float32)))
    np.testing.assert_allclose(features, ours, rtol=1e-4, atol=1e-5)
