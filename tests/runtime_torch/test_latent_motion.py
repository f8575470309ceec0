"""Exported motion models compute in PyTorch what they compute in JAX, and are read back as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import traverse_util

from como_jax.spec.exported import ExportedMotion
from como_jax.weights.motion import NOT_EXPORTED, motion_table
from tests.runtime_torch.small_runs import make_run, read_exported

torch = pytest.importorskip("torch")

from como_jax.errors import ConfigError, InputError  # noqa: E402
from como_jax.export.pytorch.export import write_model  # noqa: E402
from como_jax.export.pytorch.parity import TOLERANCE, Reference, check_parity, relative_error  # noqa: E402
from como_jax.runtime_torch.latent_motion import LatentMotion  # noqa: E402
from tests.everyday import mostly_slow  # noqa: E402

RGB = {"model.motion_input": "rgb_difference", "model.bottleneck.kind": "kl", "model.residual": False}
GAP = {"model.gap_weight": 1.0, "data.min_gap_fraction": 0.5}
FUTURE = {"model.motion_input": "future_only", "data.fit": "stretch"}
GRID = {"model.bottleneck.kind": "fsq", "model.bottleneck.fsq_levels": (4, 5, 3), "model.latent_dim": 3}
# The plain model is that of tests/export/test_export_torch.py.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rgb difference, gaussian, head": ("como", RGB | GAP),
    "future only, grid": ("como", FUTURE | GRID),
    "laq": ("laq", {"model.spatial_depth": 2, "model.decoder_depth": 2}),
}


@pytest.mark.parametrize("variant", mostly_slow(VARIANTS, "rgb difference, gaussian, head", "laq"))
def test_encode_and_predict_are_those_of_jax_and_the_weights_can_be_read_back(variant: str, tmp_path: Path) -> None:
    recipe, changes = VARIANTS[variant]
    run = make_run(recipe, changes)
    write_model(run, tmp_path)
    parity = check_parity(Reference(run), LatentMotion.from_pretrained(tmp_path))
    assert max(parity.values()) < TOLERANCE / 5
    params = traverse_util.flatten_dict(jax.tree.map(np.asarray, run.params), sep="/")
    kept = {path: value for path, value in params.items() if not path.startswith(tuple(NOT_EXPORTED))}
    read = read_exported(tmp_path, ExportedMotion, motion_table)[1]
    assert read.keys() == kept.keys()
    assert all(np.array_equal(read[path], value) for path, value in kept.items())


def frames(*shape: int) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (*shape, 3), dtype=np.uint8)


def test_frames_may_be_numpy_or_torch_and_of_any_memory_layout(exported: Path) -> None:
    model = LatentMotion.from_pretrained(exported)
    clips = frames(2, 3, 90, 70)
    motion = model.encode(clips)
    assert motion.latent.shape == (2, 2, *model.config.latent_shape) and motion.codes.shape == (2, 2, 3)
    reversed_twice = np.ascontiguousarray(clips[..., ::-1])[..., ::-1]
    reversed_twice.flags.writeable = False
    for same in (torch.from_numpy(clips), reversed_twice):
        assert torch.equal(model.encode(same).latent, motion.latent)
    assert model.predict(clips[:, 0], motion.latent[:, 0]).shape == (2, 64, 64, 3)


def test_bfloat16_is_near_float32_and_keeps_what_training_keeps(exported: Path) -> None:
    exact, fast = (LatentMotion.from_pretrained(exported, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    clips = frames(4, 2, 64, 64)
    latent = exact.encode(clips).latent[:, 0]
    assert fast.encode(clips).latent.dtype == torch.float32
    # Before codes are chosen.
    for call in (lambda model: model.module.infer(torch.from_numpy(clips)), lambda m: m.predict(clips[:, 0], latent)):
        wanted, found = call(exact), call(fast)
        assert found.dtype == torch.float32
        assert 1e-4 < relative_error(found.numpy(), wanted.numpy()) < 0.1
    module = fast.module
    assert module.encoder.blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert module.encoder.blocks[0].norm1.weight.dtype == module.idm.latent_out.weight.dtype == torch.float32


@pytest.mark.slow
def test_encode_and_predict_compile_to_one_graph_each(exported: Path) -> None:
    model = LatentMotion.from_pretrained(exported)
    clips = frames(1, 2, 64, 64)
    motion = model.encode(clips)
    whole = {"fullgraph": True, "backend": "eager"}
    encode, predict = (torch.compile(call, **whole) for call in (model.module.encode, model.module.predict))
    with torch.inference_mode():
        latent, codes = encode(torch.from_numpy(clips))
        drawn = predict(torch.from_numpy(clips[:, 0]), latent[:, 0])
    assert torch.equal(codes, motion.codes)
    torch.testing.assert_close(drawn, model.predict(clips[:, 0], motion.latent[:, 0]))


def test_calls_that_do_not_fit_are_refused(exported: Path) -> None:
    model = LatentMotion.from_pretrained(exported)
    clips = frames(1, 2, 64, 64)
    calls = {
        "uint8": lambda: model.encode(clips.astype(np.float32)),
        "must be .B, T, H, W, 3.": lambda: model.encode(clips[0]),
        "at least two": lambda: model.encode(clips[:, :1]),
        r"latent is .* must be \[1, 3, 16\]": lambda: model.predict(clips[:, 0], np.zeros((1, 3, 5), np.float32)),
    }
    for message, call in calls.items():
        with pytest.raises(InputError, match=message):
            call()
    with pytest.raises(ConfigError, match="float16 must be"):
        LatentMotion.from_pretrained(exported, dtype=torch.float16)
