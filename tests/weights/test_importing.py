"""What becomes of every tensor of a file, and the resizing of positions."""

from __future__ import annotations

import numpy as np
import pytest
from etils import epath

from como_jax.errors import RunError
from como_jax.weights.importing import Constant, Foreign, Skip, import_parameters, resize_positions
from como_jax.weights.tables import DeepTable, array, kernel
from como_jax.weights.tensors import Weights

TABLE: DeepTable = {
    "dense/kernel": (kernel("layers.{layer}.weight", (2,), (3,)), 2),
    "bias": (array("bias", 3), 1),
}
TENSORS = {
    "layers.0.weight": np.arange(6.0).reshape(3, 2),
    "layers.1.weight": -np.arange(6.0).reshape(3, 2),
    "bias": np.ones(3),
    "head.weight": np.ones(4),
}
FOREIGN = Foreign(
    family="mae",
    config={},
    table=TABLE,
    skips=(Skip(r"head\..*", "the classifier"),),
    constants={"usage": Constant(np.zeros(5), "starts anew")},
    resized={"bias": "1 to 3"},
)


def weights(**changes: np.ndarray | None) -> Weights:
    tensors = {name: value for name, value in {**TENSORS, **changes}.items() if value is not None}
    return Weights(epath.Path("a.pt"), tensors, beside=("epoch",))


def test_every_tensor_is_accounted_for() -> None:
    params, accounts = import_parameters(weights(), FOREIGN)
    assert {path: value.shape for path, value in params.items()} == {
        "dense/kernel": (2, 2, 3),
        "bias": (3,),
        "usage": (5,),
    }
    assert {value.dtype for value in params.values()} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["dense/kernel"][1], TENSORS["layers.1.weight"].T)
    assert accounts.loaded == {"layers.0.weight": "dense/kernel", "layers.1.weight": "dense/kernel"}
    assert accounts.resized == {"bias": "1 to 3"}
    assert accounts.skipped == {"head.weight": "the classifier"}
    assert accounts.filled == {"usage": "starts anew"}
    assert {*accounts.loaded, *accounts.resized, *accounts.skipped} == set(TENSORS)
    assert accounts.describe().splitlines() == [
        "2 tensors loaded, 1 resized, 1 skipped",
        "  resized bias: 1 to 3",
        "  skipped 1: the classifier",
        "  filled 1: starts anew",
        "  beside the weights, left aside: epoch",
    ]


def test_missing_and_unknown_tensors_are_both_named() -> None:
    changed = weights(**{"layers.1.weight": None, "extra": np.ones(1)})
    message = r"1 tensors are missing \(layers\.1\.weight\); 1 tensors have no place here \(extra\)"
    with pytest.raises(RunError, match=message):
        import_parameters(changed, FOREIGN)
    with pytest.raises(RunError, match=r"layers\.1\.weight is \(3, 3\) and must be \(3, 2\)"):
        import_parameters(weights(**{"layers.1.weight": np.ones((3, 3))}), FOREIGN)


@pytest.mark.parametrize(("old", "new"), [(4, 7), (7, 4), (3, 3), (14, 16)])
@pytest.mark.parametrize("antialias", [False, True])
def test_positions_are_resized_as_pytorch_does(old: int, new: int, antialias: bool) -> None:
    torch = pytest.importorskip("torch")
    table = np.random.default_rng(0).normal(size=(old * old, 5)).astype(np.float32)
    grid = torch.tensor(table.reshape(1, old, old, 5)).permute(0, 3, 1, 2)
    options = {"mode": "bicubic", "align_corners": False, "antialias": antialias}
    expected = torch.nn.functional.interpolate(grid, size=(new, new), **options)[0].flatten(1).T.numpy()
    np.testing.assert_allclose(resize_positions(table, new, antialias=antialias), expected, atol=2e-5)


def test_resizing_keeps_what_is_the_same_everywhere() -> None:
    for antialias in (False, True):
        np.testing.assert_allclose(resize_positions(np.full((16, 2), 3.0), 9, antialias=antialias), 3.0, atol=1e-5)
