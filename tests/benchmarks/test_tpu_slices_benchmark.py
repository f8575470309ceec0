"""The table of slices: what is compiled, and what becomes of rows that are done or fail."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from como_jax.tpu.topology import open_topology
from tools.benchmarks import tpu_slices
from tools.benchmarks.tpu_slices import MODELS, SLICES

REPORT = {
    "mesh": {"data": 8, "fsdp": 1, "tensor": 1},
    "batch_per_chip": 16.0,
    "memory": {"total": 12 * 2**30, "chip": 16 * 2**30},
    "time": {"compute": 0.05, "hbm": 0.064, "ici": 0.004, "predicted": 0.064},
}


def test_names_of_slices_are_those_of_their_topologies() -> None:
    pytest.importorskip("libtpu", reason="the compiler for TPUs, [tpu], is not installed")
    for slice_ in SLICES:
        assert len(open_topology(slice_.topology).devices) == slice_.chips


def test_every_row_splits_its_batch_over_all_chips() -> None:
    for model in MODELS.values():
        for slice_ in SLICES:
            command = tpu_slices.command(model, slice_, Path("report.json"))
            (size,) = [int(part.split("=")[1]) for part in command if part.startswith("--config.data.batch_size=")]
            assert size % slice_.chips == 0


def test_a_row_says_what_the_report_does() -> None:
    line = tpu_slices.describe(MODELS["como"], SLICES[0], REPORT)
    assert line == ("| CoMo, ViT-L | v5e-8 | data=8 | 16 | 12.0 of 16 | 64 (compute 50, HBM 64, ICI 4) | 2000 |")


def test_rows_that_are_done_stay_and_those_that_fail_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "como_v5e-8.json").write_text(json.dumps(REPORT))
    monkeypatch.setattr(tpu_slices, "command", lambda *_: [sys.executable, "-c", "raise SystemExit(1)"])
    rows = [("como", SLICES[0]), ("laq", SLICES[0])]
    assert tpu_slices.compile_all(tmp_path, rows, processes=2) == ["laq_v5e-8"]
    assert tpu_slices.table(tmp_path, rows).count("v5e-8") == 1
