"""Sweeps from end to end: what runs, what is left alone, what fails, what the tables say."""

import csv
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from como_jax.evaluation.sweeps.cells import Cell, make_cells
from como_jax.evaluation.sweeps.report import Status, tabulate
from experiments import sweep as sweep_module
from experiments.sweep import sweep
from tests.conftest import REPOSITORY

RECIPE = str(REPOSITORY / "configs" / "pretrain_como.py") + ":smoke"
FAST = ["train.num_steps=2", "train.evaluate_every=0", "evaluation.num_images=1"]


def cells_of(out: Path, dataset: Path, swept: dict[str, list[str]], fixed: list[str] = FAST, seeds=(0,)) -> list[Cell]:
    return make_cells(out, [RECIPE], swept, [f"data.mixture={dataset}", *fixed], seeds)


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def refuse_to_run(*_: object) -> None:
    raise AssertionError("a finished cell ran again")


@pytest.fixture(scope="module")
def finished(tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """A sweep of two latent sizes and two gaps, of which one is longer than any episode."""
    out = tmp_path_factory.mktemp("sweep")
    cells = cells_of(out, tabletop_dataset, {"model.latent_dim": ["4", "16"], "data.gap_seconds": ["0.5", "100.0"]})
    return out, sweep(cells, out)


@pytest.mark.slow
def test_a_failing_cell_is_listed_and_the_others_finish(finished):
    out, results = finished
    by_gap = {gap: {r.status for r in results if r.cell.swept["data.gap_seconds"] == gap} for gap in ("0.5", "100.0")}
    assert by_gap == {"0.5": {Status.FINISHED}, "100.0": {Status.FAILED}}
    rows = read_csv(out / "cells.csv")
    assert [row["status"] for row in rows] == ["finished", "failed", "finished", "failed"]
    assert "Lower data.gap_seconds" in rows[1]["reason"]
    assert "failed (" in (out / "table.md").read_text()


@pytest.mark.slow
def test_the_tables_hold_what_the_runs_measured(finished):
    out, results = finished
    table = [row for row in read_csv(out / "table.csv") if row["seeds"] == "1"]
    assert [row["latent_size"] for row in table] == [str(results[i].cell.latent_size) for i in (0, 2)]
    for row, result in zip(table, (results[0], results[2]), strict=True):
        np.testing.assert_allclose(float(row["s_pcfc_mean"]), result.metrics["eval_val/s_pcfc"])
        relative = result.metrics["eval_val/lp_mse"] / result.metrics["eval_val/lp_mse_mean_action"]
        np.testing.assert_allclose(float(row["lp_mse_relative_mean"]), relative)
    assert (out / "figure.png").stat().st_size > 0 and (out / "figure.svg").exists()


@pytest.mark.slow
def test_a_resumed_sweep_leaves_finished_cells_alone(finished, tabletop_dataset: Path, monkeypatch: pytest.MonkeyPatch):
    out, _ = finished
    table = (out / "table.csv").read_text()
    monkeypatch.setattr(sweep_module, "pretrain", refuse_to_run)
    cells = cells_of(out, tabletop_dataset, {"model.latent_dim": ["4", "16"], "data.gap_seconds": ["0.5"]})
    assert [result.status for result in sweep(cells, out)] == [Status.FINISHED] * 2
    kept = [line for line in table.splitlines() if "100.0" not in line]
    assert (out / "table.csv").read_text().splitlines() == kept


@pytest.mark.slow
def test_an_interrupted_cell_goes_on(tabletop_dataset: Path, tmp_path: Path):
    swept = {"model.latent_dim": ["16"]}
    (begun,) = sweep(cells_of(tmp_path, tabletop_dataset, swept, [*FAST, "train.stop_after=1"]), tmp_path)
    assert begun.status is Status.UNFINISHED and begun.reason == "step 1 of 2"
    (ended,) = sweep(cells_of(tmp_path, tabletop_dataset, swept), tmp_path)
    assert ended.status is Status.FINISHED
    lines = (ended.cell.workdir / "metrics.jsonl").read_text()
    assert lines.count('"train/loss"') == 2, "the first step was trained twice"


@pytest.mark.slow
def test_directories_of_another_config_are_not_taken_for_finished(finished, tabletop_dataset: Path):
    out, _ = finished
    swept = {"model.latent_dim": ["16"], "data.gap_seconds": ["0.5"]}
    cells = cells_of(out, tabletop_dataset, swept, [*FAST, "optim.learning_rate=0.5"])
    (result,) = tabulate(cells, out)
    assert result.status is Status.FAILED and "config.optim.learning_rate was" in result.reason


def test_an_error_nobody_foresaw_does_not_stop_the_sweep(
    tabletop_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def run_out_of_memory(*_: object) -> None:
        raise MemoryError("no room\nfor this")

    monkeypatch.setattr(sweep_module, "pretrain", run_out_of_memory)
    results = sweep(cells_of(tmp_path, tabletop_dataset, {}, seeds=(0, 1)), tmp_path)
    assert [result.reason for result in results] == ["MemoryError: no room for this"] * 2


def command(out: Path, dataset: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "experiments.sweep", "--config=configs/pretrain_como.py:smoke"),
        *(f"--out={out}", f"--data={dataset}", *(f"--set={text}" for text in FAST), *more),
    ]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--sweep=model.latent_dmi=3,4", "no field 'model.latent_dmi'; did you mean 'model.latent_dim'?"),
        ("--seeds=a", "--seeds a are not whole numbers"),
        ("--table_only", "out does not exist, so there is nothing to tabulate"),
        ("--out=/dev/null/sweep", "--out /dev/null/sweep cannot be written"),
        ("--workdir=x", "The directory of a sweep is --out"),
    ],
)
def test_a_mistyped_flag_is_one_line_and_status_2(refused: Callable[..., str], tmp_path: Path, flag: str, message: str):
    _, _, module, *arguments = command(tmp_path / "out", tmp_path, flag)
    written = refused(module, *arguments, imports="experiments.pretrain")
    assert message in written and "Traceback" not in written
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_give_the_tables_of_one(finished, tabletop_dataset: Path, tmp_path: Path):
    swept = ["--sweep=model.latent_dim=16", "--sweep=data.gap_seconds=0.5,100.0"]
    arguments = command(tmp_path / "out", tabletop_dataset, *swept, "--seeds=0", "--processes=2")
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=REPOSITORY)
    assert done.returncode == 1, done.stderr
    cells = read_csv(tmp_path / "out" / "cells.csv")
    assert [row["status"] for row in cells] == ["finished", "failed"]
    assert "Lower data.gap_seconds" in cells[1]["reason"] and str(tmp_path) in cells[1]["reason"]
    table = [row for row in read_csv(tmp_path / "out" / "table.csv") if row["seeds"] == "1"]
    (row,), alone = table, finished[1][2]
    assert row["model.latent_dim"] == alone.cell.swept["model.latent_dim"]
    for name in ("lp_mse", "s_pcfc", "psnr_gain"):
        # The number of threads decides the order of some sums.
        expected = alone.metrics[f"eval_val/{name}"]
        np.testing.assert_allclose(float(row[f"{name}_mean"]), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_sigterm_saves_the_running_cells_and_the_same_command_goes_on(tabletop_dataset: Path, tmp_path: Path):
    out = tmp_path / "out"
    endless = ["--set=train.log_every=1", "--seeds=0,1", "--processes=2"]
    arguments = command(out, tabletop_dataset, *endless)
    arguments[arguments.index("--set=train.num_steps=2")] = "--set=train.num_steps=100000"
    process = subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, cwd=REPOSITORY)
    runs = [out / "pretrain_como-smoke" / f"seed{seed}" for seed in range(2)]
    while not all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").read_text() for run in runs):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.terminate()
    _, output = process.communicate(timeout=60)
    assert process.returncode == 130 and "Stopped; run the same command to go on." in output
    assert all(any((run / "checkpoints").iterdir()) for run in runs)
    done = subprocess.run([*arguments, "--table_only"], text=True, cwd=REPOSITORY)
    assert done.returncode == 0
    statuses = [row["status"] for row in read_csv(out / "cells.csv")]
    assert statuses == ["unfinished"] * 2
