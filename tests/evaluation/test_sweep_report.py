"""Tables and figure of a sweep, on metrics that were written by hand."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from ml_collections import ConfigDict
from PIL import Image

from como_jax.data.identity import identify
from como_jax.evaluation.sweeps.cells import Cell
from como_jax.evaluation.sweeps.report import (
    CellResult,
    Status,
    group_settings,
    latent_size_figure,
    read_metrics,
    read_result,
    unfinished,
    write_report,
)
from como_jax.training.run_data import write_data
from tests.data.robots import make_robot

DIMS, SEEDS = (16, 32, 64), (0, 1, 2)


def make_cell(out: Path, dim: int, seed: int, **swept: str) -> Cell:
    config = ConfigDict(
        {"family": "como", "seed": seed, "model": {"num_queries": 8, "latent_dim": dim}, "train": {"num_steps": 10}}
    )
    setting = {"model.latent_dim": str(dim), **swept}
    name = "_".join(setting.values())
    return Cell("configs/x.py:tiny", setting, seed, (), config, epath.Path(out) / name / f"seed{seed}")


def values_of(dim: int, seed: int) -> dict[str, float]:
    random = np.random.default_rng([dim, seed])
    error, similarity, gain = random.uniform(0.1, 1.0, size=3)
    held_out = {"lp_mse": error, "lp_mse_mean_action": 2.0, "s_pcfc": similarity, "psnr_gain": gain}
    return {f"eval_val/{name}": float(value) for name, value in held_out.items()}


def write_run(cell: Cell, last_step: int = 10) -> None:
    cell.workdir.mkdir(parents=True)
    (cell.workdir / "config.json").write_text(cell.config.to_json())
    lines = [{"step": step, "train/loss": 1.0 / step} for step in range(1, last_step + 1)]
    if last_step == 10:
        lines.append({"step": 10, **values_of(cell.config.model.latent_dim, cell.seed)})
    (cell.workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def results(tmp_path: Path) -> list[CellResult]:
    cells = [make_cell(tmp_path, dim, seed) for dim in DIMS for seed in SEEDS]
    for cell in cells:
        write_run(cell)
    return [read_result(cell) for cell in cells]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_has_mean_and_sample_deviation_over_seeds(results: list[CellResult], tmp_path: Path):
    write_report(tmp_path, results)
    rows = read_csv(tmp_path / "table.csv")
    assert [(row["model.latent_dim"], row["latent_size"], row["seeds"]) for row in rows] == [
        ("16", "128", "3"),
        ("32", "256", "3"),
        ("64", "512", "3"),
    ]
    for row, dim in zip(rows, DIMS, strict=True):
        for name in ("lp_mse", "s_pcfc", "psnr_gain"):
            values = [values_of(dim, seed)[f"eval_val/{name}"] for seed in SEEDS]
            np.testing.assert_allclose(float(row[f"{name}_mean"]), np.mean(values))
            np.testing.assert_allclose(float(row[f"{name}_std"]), np.sqrt(np.var(values) * 3 / 2))
        np.testing.assert_allclose(float(row["lp_mse_relative_mean"]), float(row["lp_mse_mean"]) / 2.0)
        assert row["effective_rank_mean"] == ""


def test_every_cell_and_metric_is_in_its_table(results: list[CellResult], tmp_path: Path):
    write_report(tmp_path, results)
    rows = read_csv(tmp_path / "cells.csv")
    assert len(rows) == 9 and {row["status"] for row in rows} == {"finished"}
    assert float(rows[4]["eval_val/s_pcfc"]) == values_of(32, 1)["eval_val/s_pcfc"]
    assert float(rows[4]["train/loss"]) == 0.1
    assert rows[4]["workdir"] == str(results[4].cell.workdir)


def test_cells_that_are_not_finished_count_in_no_mean_and_are_listed(tmp_path: Path):
    cells = [make_cell(tmp_path, 16, seed) for seed in range(4)]
    write_run(cells[0])
    write_run(cells[1], last_step=6)
    results = [read_result(cell) for cell in cells]
    results[3] = CellResult(cells[3], Status.FAILED, "loss not finite")
    assert [result.status for result in results[:3]] == [Status.FINISHED, Status.UNFINISHED, Status.MISSING]
    write_report(tmp_path, results)
    (row,) = read_csv(tmp_path / "table.csv")
    assert row["seeds"] == "1" and row["seeds_failed"] == "1"
    assert float(row["s_pcfc_mean"]) == values_of(16, 0)["eval_val/s_pcfc"] and row["s_pcfc_std"] == ""
    text = (tmp_path / "table.md").read_text()
    assert "| x:tiny | 16 | 1 of 4 |" in text
    assert "seed1: unfinished (step 6 of 10)" in text
    assert "seed2: not run\n" in text and "seed3: failed (loss not finite)" in text


def test_a_run_of_another_config_is_not_taken_for_the_cell(tmp_path: Path):
    cell = make_cell(tmp_path, 16, 0)
    write_run(cell)
    cell.config.model.num_queries = 4
    result = read_result(cell)
    assert result.status is Status.FAILED and "config.model.num_queries was 8 and is 4" in result.reason


def test_a_finished_cell_whose_data_have_changed_is_run_again_to_say_so(tmp_path: Path):
    data = make_robot(tmp_path / "arm")
    cells = [make_cell(tmp_path / "sweep", 16, seed) for seed in range(3)]
    for cell in cells:
        cell.config.data = {"mixture": f"{data}/=2"}
    for cell in cells[:2]:
        write_run(cell)
        (cell.workdir / "checkpoints" / "10").mkdir(parents=True)
    write_data(cells[0].workdir, {str(data): identify(data)}, {}, 0)
    write_data(cells[1].workdir, {str(data): {**identify(data), "steps of train": 1}}, {}, 0)
    results = [read_result(cell) for cell in cells]
    assert [result.status for result in results] == [Status.FINISHED, Status.FINISHED, Status.MISSING]
    assert unfinished(results) == cells[1:]
    shutil.rmtree(data)
    assert unfinished(results) == cells[2:], "data that are not here change nothing"


def test_a_label_size_that_the_run_took_from_its_data_is_no_other_config(tmp_path: Path):
    cell = make_cell(tmp_path, 16, 0)
    cell.config.model.label_size = 7
    write_run(cell)
    cell.config.model.label_size = 0
    assert read_result(cell).status is Status.FINISHED


def test_a_value_that_is_not_finite_is_not_averaged_away(tmp_path: Path):
    cells = [make_cell(tmp_path, 16, seed) for seed in (0, 1)]
    results = [
        CellResult(cell, Status.FINISHED, metrics={"eval_val/s_pcfc": value})
        for cell, value in zip(cells, (None, 0.5), strict=True)
    ]
    (setting,) = group_settings(results)
    assert np.isnan(setting.statistics("s_pcfc")[0])
    assert setting.statistics("lp_mse") == (None, None)


def test_a_line_that_a_killed_run_left_unfinished_is_not_read(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "a": 1.0}\n{"step": 1, "b": null}\n{"step": 2, "a": 0.')
    assert read_metrics(tmp_path) == {1: {"a": 1.0, "b": None}}
    assert read_metrics(tmp_path / "nothing") == {}


def test_the_figure_has_the_means_the_band_and_the_baseline(results: list[CellResult]):
    settings = group_settings(results)
    figure = latent_size_figure(settings[::-1])
    similarity, probe = figure.axes
    means = [setting.statistics("s_pcfc")[0] for setting in settings]
    np.testing.assert_allclose(similarity.lines[0].get_xydata(), np.stack([[128, 256, 512], means], axis=1))
    band = similarity.collections[0].get_paths()[0].get_extents()
    deviations = [setting.statistics("s_pcfc")[1] for setting in settings]
    np.testing.assert_allclose(band.y1, np.max(np.add(means, deviations)))
    assert similarity.get_xscale() == "log"
    assert [text.get_text() for text in probe.get_xticklabels()] == ["128", "256", "512"]
    np.testing.assert_allclose(probe.lines[1].get_ydata(), [2.0, 2.0, 2.0])
    assert probe.lines[1].get_linestyle() == "--"


def test_other_swept_fields_give_curves_of_their_own(tmp_path: Path):
    cells = [make_cell(tmp_path, dim, 0, tcl=tcl) for tcl in ("0.0", "0.004") for dim in DIMS]
    for cell in cells:
        write_run(cell)
    figure = latent_size_figure(group_settings(read_result(cell) for cell in cells))
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["x:tiny tcl=0.0", "x:tiny tcl=0.004"]


def test_the_figure_files_are_not_blank(results: list[CellResult], tmp_path: Path):
    write_report(tmp_path, results)
    image = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB")).astype(float)
    left, right = np.split(image[:, : image.shape[1] // 2 * 2], 2, axis=1)
    assert min(np.std(left), np.std(right)) > 5.0
    colors = image.reshape(-1, 3)
    assert np.any(np.ptp(colors, axis=1) > 50), "no coloured curve"
    assert (tmp_path / "figure.svg").read_text().count("<path") > 10


def test_without_a_swept_latent_size_there_is_no_figure(tmp_path: Path):
    config = ConfigDict({"model": {"latent_dim": 4}, "train": {"num_steps": 10}})
    cell = Cell("configs/x.py", {}, 0, (), config, epath.Path(tmp_path) / "seed0")
    write_report(tmp_path, [CellResult(cell, Status.FINISHED, metrics={"eval_val/s_pcfc": 0.5})])
    assert (tmp_path / "table.md").exists() and not (tmp_path / "figure.png").exists()
