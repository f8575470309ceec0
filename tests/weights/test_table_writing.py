"""Tables write what they read: every kind of entry, there and back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from etils import epath
from safetensors.numpy import save_file

from como_jax.errors import ConversionError
from como_jax.weights.tables import (
    DeepTable,
    Entry,
    array,
    entry_shape,
    flat,
    kernel,
    make_parameters,
    patches,
    qkv_bias,
    qkv_kernel,
    write_tensors,
)
from como_jax.weights.tensors import Tensors

QKV = [f"layers.{{layer}}.{part}" for part in "qkv"]
TABLE: DeepTable = {
    "array": (array("array", 2, 3), 1),
    "flat": (flat("flat", 3, 2, 4), 1),
    "kernel": (kernel("layers.{layer}.kernel", (2, 5), (3, 4)), 3),
    "patches": (patches("patches", 6, 2), 1),
    "qkv/kernel": (qkv_kernel([f"{name}.weight" for name in QKV], 8, (2, 3)), 2),
    "qkv/bias": (qkv_bias([f"{name}.bias" for name in QKV], (2, 3)), 2),
}


def random_params() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        path: rng.normal(size=entry_shape(entry, depth)).astype(np.float32) for path, (entry, depth) in TABLE.items()
    }


def test_what_is_written_and_read_again_is_what_it_was(tmp_path: Path) -> None:
    params = random_params()
    tensors = write_tensors(TABLE, params)
    assert tensors["layers.2.kernel"].shape == (12, 10) and tensors["layers.1.k.weight"].shape == (6, 8)
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    source = Tensors(epath.Path(path))
    read = make_parameters(TABLE, source)
    source.check_unread()
    assert all(np.array_equal(read[path], value) for path, value in params.items())


def test_patches_are_those_of_a_convolution() -> None:
    rng = np.random.default_rng(0)
    image, value = rng.normal(size=(2, 2, 3)), rng.normal(size=(12, 6))
    [weight] = patches("patches", 6, 2).unmake(value)
    np.testing.assert_allclose(np.einsum("ocij,ijc->o", weight, image), image.reshape(-1) @ value)


def test_parameters_and_tables_that_do_not_fit_are_refused() -> None:
    params = random_params()
    read_only = {"array": (Entry(("array",), (2, 3), np.asarray), 1)}
    cases = {
        "parameters of the model lack flat": (TABLE, {name: params[name] for name in params if name != "flat"}),
        "table of the model lack new": (TABLE, {**params, "new": np.zeros(1)}),
        r"array is \(3, 2\) and must be \(2, 3\)": (TABLE, {**params, "array": np.zeros((3, 2))}),
        "array belongs to a format that is only read": (read_only, {"array": params["array"]}),
    }
    for message, (table, given) in cases.items():
        with pytest.raises(ConversionError, match=message):
            write_tensors(table, given)
