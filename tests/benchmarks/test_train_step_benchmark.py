"""The benchmark of train steps: what it times, counts and seeks."""

from __future__ import annotations

import dataclasses
import importlib
import json
from typing import Any

import jax
import pytest
from ml_collections import ConfigDict

from como_jax.errors import UsageError
from como_jax.training.flops import train_flops
from tools.benchmarks import train_step as benchmark

MEASURED = benchmark.Measurement(
    batch_size=16,
    devices=2,
    unit=benchmark.Unit("pairs", 3),
    flops=1e12,
    compile_seconds=2.0,
    step_seconds=(0.5, 1.0, 2.0),
    planned_bytes=3 * 2**30,
    temporary_bytes=2**30,
    peak_bytes=4 * 2**30,
    peak_of="device",
)


def recipe(name: str, **changes: Any) -> ConfigDict:
    """The smoke recipe with all sizes; keys of changes have two underscores for a point."""
    config = importlib.import_module(f"configs.{name}").get_config("smoke")
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    return benchmark.with_all_sizes(config)


@pytest.mark.slow
def test_a_recipe_is_timed() -> None:
    config = recipe("pretrain_como")
    found = benchmark.measure(config, windows=2, steps=2, warm_up=1)
    assert (found.batch_size, found.devices, found.unit) == (8, 2, benchmark.Unit("pairs", 1))
    assert len(found.step_seconds) == 2 and min(found.step_seconds) > 0
    assert found.flops == train_flops(config)
    # The machine's CPU keeps no count of its memory.
    assert found.peak_of == "process" and found.peak_bytes > found.planned_bytes > found.temporary_bytes > 0
    assert json.loads(json.dumps(found.to_json())) == found.to_json() | {"step_seconds": [*found.step_seconds]}


def test_the_device_is_waited_for_at_the_end_of_windows_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    events = []
    monkeypatch.setattr(jax, "block_until_ready", lambda x: events.append(f"wait for {x}") or x)

    def step(state: int, batch: str) -> tuple[int, None]:
        events.append(batch)
        return state + 1, None

    seconds = benchmark.time_windows(step, 0, "step", windows=2, steps=3, warm_up=1)
    assert events == ["step", "wait for 1", *["step"] * 3, "wait for 4", *["step"] * 3, "wait for 7"]
    assert len(seconds) == 2


def test_rates_and_shares_follow_from_times() -> None:
    found = MEASURED.to_json(peak_tflops=32.0)
    assert found["rates"] == [96.0, 48.0, 24.0] and found["median_rate"] == 48.0
    # 16 elements of 1 TFLOP in a second on two devices.
    assert found["tflops_per_second"] == 8.0 and found["mfu"] == 0.25
    text = MEASURED.describe(32.0)
    assert "48 pairs/s (24-96)" in text and "MFU 25.0% of 32" in text
    assert "peak of the device 4 GiB; allotted by XLA 3, of which temporaries 1" in text
    assert "MFU" not in MEASURED.describe()


def fake_measure(limit: int, message: str = "RESOURCE_EXHAUSTED: Out of memory") -> Any:
    def measure(batch_size: int) -> benchmark.Measurement:
        if batch_size > limit:
            raise jax.errors.JaxRuntimeError(message)
        return dataclasses.replace(MEASURED, batch_size=batch_size)

    return measure


def test_batches_double_until_memory_is_full() -> None:
    found = benchmark.search_batch(fake_measure(limit=50), first=8)
    assert [measurement.batch_size for measurement in found] == [8, 16, 32]


def test_a_first_batch_that_does_not_fit_is_refused_and_other_errors_pass() -> None:
    with pytest.raises(UsageError, match="batch_size=64 does not fit"):
        benchmark.search_batch(fake_measure(limit=50), first=64)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        benchmark.search_batch(fake_measure(limit=50, message="INTERNAL: broken"), first=8)


@pytest.mark.slow
def test_flops_are_those_of_a_unit() -> None:
    config = recipe("pretrain_mae")
    assert benchmark.describe_flops(config) == f"model GFLOP a pair: {train_flops(config) / 1e9:.4g}"
