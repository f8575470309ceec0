"""The benchmark of a quantised encoder: what it quantises, and what it says of it."""

from __future__ import annotations

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from como_jax.errors import ConfigError, UsageError
from como_jax.motion.build import build_model
from como_jax.nn import mixed_precision
from configs import pretrain_como, pretrain_laq
from tools.benchmarks import quantized_encoder as benchmark


def test_the_encoder_alone_gets_other_products(monkeypatch: pytest.MonkeyPatch) -> None:
    # Without products the encoder gives every frame its positions and nothing else.
    def no_product(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.zeros((len(x), kernel.shape[1]), x.dtype)

    monkeypatch.setattr(benchmark, "quantized_matmul", lambda *_: no_product)
    config, matmul = pretrain_como.get_config("smoke"), mixed_precision.matmul
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(build_model(config).init, jax.random.key(0))
    params = jax.tree.map(lambda x: 0.1 * rng.normal(size=x.shape).astype(x.dtype), shapes)
    frames = rng.integers(0, 256, (2, 3, 32, 32, 3), np.uint8)
    found = benchmark.Model(config, params)(frames, benchmark.COMPUTATIONS["int8"])
    assert [x.shape for x in found] == [(4, 5, 32), (4, 5, 32), (4, 8, 16)]
    assert found.features.any() and not found.difference.any()
    assert np.ptp(found.latent, axis=1).all()
    assert mixed_precision.matmul is matmul


@pytest.mark.parametrize("quantize_activations", [True, False])
def test_products_are_those_of_int8(quantize_activations: bool) -> None:
    pytest.importorskip("qwix")
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(4, 32)).astype(np.float32), rng.normal(size=(32, 8)).astype(np.float32)
    # The largest number of a scale lies between two steps; here it meets zeros, whichever it is rounded to.
    x[:, :2], kernel[:2] = (4.0, 0.0), ((0.0,), (4.0,))

    def rounded(array: np.ndarray, axis: int) -> np.ndarray:
        scale = np.abs(array).max(axis=axis, keepdims=True) / 127.5
        return np.clip(np.round(array / scale), -128, 127) * scale

    matmul = benchmark.quantized_matmul("int8", "int8" if quantize_activations else None)
    wanted = (rounded(x, 1) if quantize_activations else x) @ rounded(kernel, 0)
    np.testing.assert_allclose(jax.jit(matmul)(x, kernel), wanted, rtol=1e-5, atol=1e-5)


def test_missing_qwix_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "qwix", None)
    with pytest.raises(UsageError, match="pip install qwix"):
        benchmark.quantized_matmul("int8", None)


def test_deviations_are_relative() -> None:
    true = benchmark.Motion(np.full((2, 1, 1), 4.0), np.full((2, 1, 1), 2.0), np.array([[[3.0]], [[5.0]]]))
    found = benchmark.Motion(true.features + 1.0, true.difference + 1.0, true.latent + np.array([[[0.3]], [[0.4]]]))
    # The latents lie 1 on either side of their mean, 4.
    wanted = (0.25, 0.5, 0.5 / 34**0.5, 0.1, 0.5 / 2**0.5)
    assert benchmark.deviation(found, true) == pytest.approx(wanted)
    assert benchmark.table({"int8": benchmark.Deviation(*wanted)}).endswith(
        "| int8 | 25.00% | 50.00% | 8.57% | 10.00% | 35.36% |"
    )


def test_a_model_without_a_frozen_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="family como alone, not in laq"):
        benchmark.open_model(None, pretrain_laq.get_config("smoke"))
    with pytest.raises(ConfigError, match="either --workdir, a run, or --config"):
        benchmark.open_model(None, None)
