"""The trace of a few steps, numbers that are not finite, and codebooks that collapse."""

from __future__ import annotations

import logging
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from como_jax.errors import NonFiniteError, RunError
from como_jax.training.monitors import TRACED_STEPS, WARM_UP_STEPS, CollapseWatch, StepTrace, check_finite
from como_jax.training.run import check_workdir, claim_workdir
from configs import pretrain_mae


@jax.jit
def double(x: jax.Array) -> jax.Array:
    return 2 * x


def run(directory: Path | str, steps: int) -> float:
    """What a run of so many steps computes."""
    x = jnp.ones(())
    with StepTrace(directory) as trace:
        for step in range(steps):
            with jax.profiler.StepTraceAnnotation("train", step_num=step):
                x = double(x)
            trace.after_step({"loss": x})
    return float(x)


def traces(directory: Path) -> list[bytes]:
    """Where TensorBoard and xprof look for them."""
    return [path.read_bytes() for path in directory.glob("plugins/profile/*/*.xplane.pb")]


@pytest.mark.parametrize("steps", [WARM_UP_STEPS + TRACED_STEPS + 2, WARM_UP_STEPS + 1])
def test_steps_after_the_warm_up_are_traced_and_numbers_stay(tmp_path: Path, steps: int) -> None:
    assert run(tmp_path / "trace", steps) == run("", steps) == 2.0**steps
    (trace,) = traces(tmp_path / "trace")
    # The program that ran, and the steps' marks.
    assert b"double" in trace and b"step_num" in trace


def test_a_run_that_fails_leaves_the_trace_of_what_it_did(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), StepTrace(tmp_path) as trace:
        for _ in range(WARM_UP_STEPS + 1):
            trace.after_step({"loss": double(jnp.ones(()))})
        raise KeyboardInterrupt
    assert len(traces(tmp_path)) == 1


def test_a_run_without_steps_enough_says_that_there_is_no_trace(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "como_jax"):
        run(tmp_path, WARM_UP_STEPS - 1)
    assert not traces(tmp_path)
    assert "No trace in" in caplog.text


def test_a_run_may_be_traced_when_it_is_resumed(tmp_path: Path) -> None:
    config = pretrain_mae.get_config("smoke")
    claim_workdir(tmp_path, config)
    config.profile = "trace"
    check_workdir(tmp_path, config)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="config.profile: .*file/trace cannot be written"):
        StepTrace(tmp_path / "file" / "trace")


def test_all_terms_that_are_not_finite_are_named() -> None:
    metrics = {"mse": jnp.float32("nan"), "tcl": jnp.zeros(()), "grad_norm": jnp.float32("inf")}
    with pytest.raises(NonFiniteError, match="Step 7: mse, grad_norm not finite"):
        check_finite(7, metrics)


def warnings_of(shares: list[float], patience: int, caplog: pytest.LogCaptureFixture) -> list[str]:
    watch = CollapseWatch(patience)
    with caplog.at_level(logging.WARNING, logger="como_jax"):
        for step, share in enumerate(shares, start=1):
            # The loop may hand over a step twice.
            watch(step, {"perplexity_share": share})
            watch(step, {"perplexity_share": share})
    return [record.getMessage() for record in caplog.records]


def test_a_codebook_that_stays_collapsed_is_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    [message] = warnings_of([0.5, 0.09, 0.05, 0.02, 0.02, 0.02], 3, caplog)
    assert "Step 4" in message and "now 2.0 %" in message


def test_a_short_dip_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    assert warnings_of([0.05, 0.05, 0.5, 0.05, 0.05], 3, caplog) == []


def test_a_second_collapse_is_warned_of_again(caplog: pytest.LogCaptureFixture) -> None:
    assert len(warnings_of([0.05, 0.05, 0.5, 0.05, 0.05], 2, caplog)) == 2


def test_a_model_without_a_codebook_is_never_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    CollapseWatch(1)(1, {"loss": 0.0})
    assert not caplog.records
