"""When a run is told that its codebook has collapsed."""

import logging

import pytest

from como_jax.training.watch import CollapseWatch


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
