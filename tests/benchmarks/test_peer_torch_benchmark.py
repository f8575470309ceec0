"""The comparison with plain PyTorch: that both sides are the same model, and what is made of their times."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from como_jax.errors import ConfigError, RunError, UsageError
from configs import pretrain_como, pretrain_mae
from tools.benchmarks import peer_torch_step as peer

FIGURES = {"peak_bytes": 2**30, "peak_of": "process", "version": "one"}


@pytest.mark.slow
def test_both_sides_are_the_same_model() -> None:
    torch_como = pytest.importorskip("tools.benchmarks.torch_como")
    lines = peer.check_equal(peer.plain(pretrain_como.get_config()), torch_como.describe_model)
    # Of a ViT-L, with 246 GFLOP a pair for the encoder, 76 for the Q-former and 105 for the FDM.
    assert "PyTorch 4.272441e+11" in lines[1] and len(lines) == 4


def test_other_models_are_refused() -> None:
    figures = {"parameters": 10.0, "flops": 100.0, "loss": 1.0, "gradient_norm": 2.0}
    assert len(peer.compare(figures, figures | {"flops": 100.5, "loss": 1.000001})) == 4
    for name, other in {"parameters": 11, "flops": 102.0, "loss": 1.001, "gradient_norm": 2.001}.items():
        with pytest.raises(RunError, match=f"differ in .*: JAX {figures[name]:g}, PyTorch {other:g}"):
            peer.compare(figures, figures | {name: other})


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_step_of_pytorch_learns(dtype: str) -> None:
    torch = pytest.importorskip("torch")
    torch_como = pytest.importorskip("tools.benchmarks.torch_como")
    config = peer.plain(pretrain_como.get_config("smoke"))
    config.train.dtype = dtype
    step = torch_como.make_step(config, torch.device("cpu"), compiled=False)
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (4, 2, 32, 32, 3), dtype=np.uint8))
    losses = [float(step(frames)) for _ in range(4)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_rows_are_read() -> None:
    jax_row = peer.Row.parse("jax:bfloat16:data.instants=5:train.remat=full")
    assert jax_row.changes == ("train.dtype=bfloat16", "data.instants=5", "train.remat=full")
    assert jax_row.pairs_of_clip == 4
    torch_row = peer.Row.parse("torch:float32:compile")
    assert (torch_row.changes, torch_row.compile, torch_row.pairs_of_clip) == (("train.dtype=float32",), True, 1)
    assert [peer.Row.parse(name).pairs_of_clip for name in peer.ROWS][-2:] == [4, 10]


@pytest.mark.parametrize("name", ["numpy:float32", "jax", "jax:float16", "jax:float32:fast", "torch:float32:data.x=1"])
def test_other_rows_are_refused(name: str) -> None:
    with pytest.raises(UsageError, match=f"--rows '{name}' must be"):
        peer.Row.parse(name)


def test_the_error_of_a_command_is_found() -> None:
    text = "W1 Warning: all well\nTraceback\njax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: full\n---\nFor simple"
    assert peer.last_error(text) == "jax.errors.JaxRuntimeError: RESOURCE_EXHAUSTED: full"
    assert peer.last_error("error: no such field\n") == "no such field"
    assert peer.last_error("Killed\n") == ""


def test_other_families_are_refused() -> None:
    with pytest.raises(ConfigError, match="'mae' has no counterpart"):
        peer.plain(pretrain_mae.get_config("smoke"))


def test_rows_take_turns_and_one_that_fails_does_not_hold_up_the_others() -> None:
    rows, order = [peer.Row.parse(name) for name in ("jax:float32", "jax:bfloat16", "torch:float32")], []

    def measure(row: peer.Row) -> dict[str, Any]:
        order.append(row.name)
        if row.name == "jax:bfloat16":
            raise RunError("out of memory")
        rates = [3.0, 4.0 + 2 * order.count(row.name), 9.0] if row.library == "jax" else [2.0]
        return {**FIGURES, "rates": rates, "flops": 5e11}

    found, versions = peer.measure_all(measure, rows, rounds=2)
    assert order == ["jax:float32", "jax:bfloat16", "torch:float32", "jax:float32", "torch:float32"]
    assert versions == {"jax": "one", "torch": "one"}
    lines = peer.table(found)
    assert lines[2] == "| jax:float32 | 7 (3-9) | 500 | 3.5 | 1 (process) |"
    assert lines[3] == "| jax:bfloat16 | failed: out of memory | | | |"
    assert peer.ratios(found) == ["jax:float32 / torch:float32: 3.5 (3-4)"]
