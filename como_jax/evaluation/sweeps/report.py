"""The results of a sweep: a table of all cells, a table of settings over seeds, and curves over the latent size."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from etils import epath
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from como_jax.data.identity import Identity, identify
from como_jax.data.mixture import parse_mixture
from como_jax.errors import DatasetError, RunError
from como_jax.evaluation.sweeps.cells import Cell
from como_jax.evaluation.tables import csv_text, markdown_table
from como_jax.files import write_atomic, write_text
from como_jax.ownership import claim
from como_jax.training.run import claim_workdir
from como_jax.training.run_data import check_data

FILES = ("cells.csv", "table.csv", "table.md", "figure.png", "figure.svg")
LATENT_DIM = "model.latent_dim"
RELATIVE_LP_MSE = "lp_mse_relative"
# Column of the table, and its title there.
COLUMNS = {
    "lp_mse": "LP-MSE",
    RELATIVE_LP_MSE: "LP-MSE / mean action",
    "s_pcfc": "S-PCFC",
    "psnr_gain": "PSNR gain (dB)",
    "effective_rank": "effective rank",
}


class Status(enum.StrEnum):
    """The progress of a cell."""

    MISSING = "not run"
    UNFINISHED = "unfinished"
    FAILED = "failed"
    FINISHED = "finished"


@dataclasses.dataclass(frozen=True)
class CellResult:
    """The result of a cell.

    Attributes:
      cell: the cell.
      status: its progress.
      reason: why it failed, or how many of its steps are done.
      metrics: of its last step, by names such as `eval_val/lp_mse`; None for a value that is not finite.
    """

    cell: Cell
    status: Status
    reason: str = ""
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)

    def held_out(self, name: str) -> float | None:
        """A metric on held-out episodes: None if it was not measured, NaN if it was not finite."""
        if name == RELATIVE_LP_MSE:
            error, baseline = self.held_out("lp_mse"), self.held_out("lp_mse_mean_action")
            return error / baseline if error is not None and baseline else None
        key = f"eval_val/{name}"
        if key not in self.metrics:
            return None
        value = self.metrics[key]
        return math.nan if value is None else value


@dataclasses.dataclass(frozen=True)
class Setting:
    """The results of cells that differ in their seed alone."""

    results: tuple[CellResult, ...]

    @property
    def cell(self) -> Cell:
        """Any of them."""
        return self.results[0].cell

    def count(self, status: Status) -> int:
        """How many cells have this status."""
        return sum(result.status is status for result in self.results)

    def statistics(self, name: str) -> tuple[float | None, float | None]:
        """Mean and sample standard deviation over the finished cells; None for one that needs more of them."""
        finished = (result for result in self.results if result.status is Status.FINISHED)
        values = [value for result in finished if (value := result.held_out(name)) is not None]
        mean = float(np.mean(values)) if values else None
        return mean, float(np.std(values, ddof=1)) if len(values) > 1 else None


def read_metrics(workdir: epath.PathLike) -> dict[int, dict[str, float | None]]:
    """Everything that a run wrote to metrics.jsonl, by step, without a last line that a killed run left incomplete."""
    path = epath.Path(workdir) / "metrics.jsonl"
    found: dict[int, dict[str, float | None]] = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        found.setdefault(entry.pop("step"), {}).update(entry)
    return found


def read_result(cell: Cell) -> CellResult:
    """The result in the run directory of a cell: a run of its config is finished if its last step was evaluated."""
    if not (cell.workdir / "config.json").exists():
        return CellResult(cell, Status.MISSING)
    try:
        claim_workdir(cell.workdir, cell.config)
    except RunError as error:
        return CellResult(cell, Status.FAILED, str(error))
    metrics, last = read_metrics(cell.workdir), cell.config.train.num_steps
    if any(key.startswith("eval_") for key in metrics.get(last, ())):
        return CellResult(cell, Status.FINISHED, metrics=metrics[last])
    return CellResult(cell, Status.UNFINISHED, f"step {max(metrics, default=0)} of {last}")


def tabulate(
    cells: Sequence[Cell], out: epath.PathLike, failures: dict[epath.Path, str] | None = None
) -> list[CellResult]:
    """Reads the run directories, writes the tables and returns the results; `failures` has reasons by run directory."""
    failures = failures or {}
    results = [
        CellResult(cell, Status.FAILED, failures[cell.workdir]) if cell.workdir in failures else read_result(cell)
        for cell in cells
    ]
    write_report(out, results)
    return results


def unfinished(results: Sequence[CellResult]) -> list[Cell]:
    """The cells to run: those that are not finished, and those whose data have changed since, which will say so."""
    identities: dict[str, dict[str, Identity]] = {}
    found = []
    for result in results:
        if result.status is Status.FINISHED:
            mixture = result.cell.config.data.mixture
            if mixture not in identities:
                identities[mixture] = _identify_all(mixture)
            try:
                check_data(result.cell.workdir, identities[mixture])
            except RunError:
                found.append(result.cell)
        else:
            found.append(result.cell)
    return found


def _identify_all(mixture: str) -> dict[str, Identity]:
    """The identities of those datasets of a mixture that are there."""
    found = {}
    for entry in parse_mixture(mixture):
        with contextlib.suppress(DatasetError):
            found[str(epath.Path(entry.directory))] = identify(entry.directory)
    return found


def group_settings(results: Iterable[CellResult]) -> list[Setting]:
    """Groups results that differ in their seed alone, in the order of the first of each group."""
    groups: dict[tuple[str, ...], list[CellResult]] = {}
    for result in results:
        groups.setdefault((result.cell.recipe, *result.cell.swept.values()), []).append(result)
    return [Setting(tuple(group)) for group in groups.values()]


def write_report(out: epath.PathLike, results: Sequence[CellResult]) -> None:
    """Writes cells.csv, table.csv and table.md and, where the latent size is swept, figure.png and figure.svg."""
    out, settings = epath.Path(out), group_settings(results)
    claim(out, FILES)
    write_text(out / "cells.csv", cells_csv(results))
    write_text(out / "table.csv", table_csv(settings))
    write_text(out / "table.md", table_markdown(settings))
    measured = [setting for setting in settings if setting.statistics("s_pcfc")[0] is not None]
    if measured and LATENT_DIM in measured[0].cell.swept:
        figure = latent_size_figure(measured)
        for suffix in ("png", "svg"):
            write_atomic(out / f"figure.{suffix}", lambda file: figure.savefig(file, format=suffix, dpi=150))  # noqa: B023


def cells_csv(results: Sequence[CellResult]) -> str:
    """One line per cell: swept fields, status, and every metric of its last step."""
    names = sorted({name for result in results for name in result.metrics})
    rows = [["recipe", *results[0].cell.swept, "seed", "status", "reason", "workdir", "latent_size", *names]]
    for result in results:
        cell = result.cell
        row = [cell.recipe, *cell.swept.values(), cell.seed, result.status, result.reason, cell.workdir]
        rows.append([*row, cell.latent_size, *(result.metrics.get(name) for name in names)])
    return csv_text(rows)


def table_csv(settings: Sequence[Setting]) -> str:
    """One line per setting: `<metric>_mean` and `<metric>_std` over seeds, empty where there are too few."""
    titles = [f"{name}_{kind}" for name in COLUMNS for kind in ("mean", "std")]
    rows = [["recipe", *settings[0].cell.swept, "latent_size", "seeds", "seeds_failed", *titles]]
    for setting in settings:
        cell, counts = setting.cell, [setting.count(status) for status in (Status.FINISHED, Status.FAILED)]
        values = [value for name in COLUMNS for value in setting.statistics(name)]
        rows.append([cell.recipe, *cell.swept.values(), cell.latent_size, *counts, *values])
    return csv_text(rows)


def table_markdown(settings: Sequence[Setting]) -> str:
    """The same for people; below it the cells that are not finished, and why."""
    rows = [["recipe", *settings[0].cell.swept, "seeds", *COLUMNS.values()]]
    for setting in settings:
        seeds = f"{setting.count(Status.FINISHED)} of {len(setting.results)}"
        values = [_plus_minus(*setting.statistics(name)) for name in COLUMNS]
        rows.append([setting.cell.label, *setting.cell.swept.values(), seeds, *values])
    text = f"{markdown_table(rows)}\nHeld-out episodes; mean ± sample standard deviation over the finished seeds.\n"
    incomplete = [r for setting in settings for r in setting.results if r.status is not Status.FINISHED]
    lines = [f"- {r.cell.workdir}: {r.status}{f' ({r.reason})' if r.reason else ''}\n" for r in incomplete]
    return "".join([text, "\n", *lines] if lines else [text])


def latent_size_figure(settings: Sequence[Setting]) -> Figure:
    """S-PCFC and LP-MSE over the size of the latent, one curve per setting of all else (CoMo v1, Figure 3)."""
    figure = Figure(figsize=(9.0, 3.6), layout="constrained")
    similarity, probe = figure.subplots(1, 2)
    for number, (label, curve) in enumerate(_curves(settings).items()):
        _draw(similarity, curve, "s_pcfc", label=label, color=f"C{number}")
        _draw(probe, curve, "lp_mse", label=label, color=f"C{number}")
        _draw(probe, curve, "lp_mse_mean_action", color=f"C{number}", linestyle="--", marker="")
    probe.plot([], [], color="grey", linestyle="--", label="mean action")
    similarity.set(ylabel="S-PCFC", ylim=(min(0.0, similarity.get_ylim()[0]), 1.02))
    probe.set(ylabel="LP-MSE", ylim=(0.0, None))
    sizes = sorted({setting.cell.latent_size for setting in settings})
    for axes in (similarity, probe):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel("latent size (query tokens x numbers of each)")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure


def _curves(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Settings that differ in the latent size alone, by a label of what they have in common."""
    curves: dict[str, list[Setting]] = {}
    for setting in settings:
        others = (f"{field}={value}" for field, value in setting.cell.swept.items() if field != LATENT_DIM)
        curves.setdefault(" ".join([setting.cell.label, *others]), []).append(setting)
    return {label: sorted(curve, key=lambda setting: setting.cell.latent_size) for label, curve in curves.items()}


def _draw(axes: Axes, curve: Sequence[Setting], name: str, color: str, marker: str = "o", **style: str) -> None:
    points = [(setting.cell.latent_size, *setting.statistics(name)) for setting in curve]
    points = [(size, mean, deviation or 0.0) for size, mean, deviation in points if mean is not None]
    if not points:
        return
    size, mean, deviation = np.array(points).T
    axes.plot(size, mean, color=color, marker=marker, markersize=4, **style)
    axes.fill_between(size, mean - deviation, mean + deviation, color=color, alpha=0.15, linewidth=0)


def _plus_minus(mean: float | None, deviation: float | None) -> str:
    if mean is None:
        return "-"
    # Three digits with their trailing zeros, and no trailing point.
    text = f"{mean:#.3g}".rstrip(".")
    return text if deviation is None else f"{text} ± {deviation:.2g}"
