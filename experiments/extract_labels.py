"""Labels every step of a dataset with its latent motion, and says how far the data is from what the model knows.

    python -m experiments.extract_labels --workdir RUN --data DATASET --out LABELLED

LABELLED is the same dataset with three more columns in its episode table, `latent_motion`, `latent_valid` and, for
discrete models, `latent_codes`. Beside it lie latents.parquet, one row a step for data frames; labels.json, which
says where the labels come from; labelling_report.json with counts, unreadable images and the drift; drift.png. The same
command resumes after a kill. On several hosts, start it on each, by a launcher or with the flags of `como_jax.hosts`;
the hosts divide the shards among themselves and write to the same place.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from typing import Any

from absl import flags
from etils import epath
from tqdm import tqdm

from como_jax import cli, hosts
from como_jax.errors import ConfigError, DatasetError, UsageError
from como_jax.evaluation.latents.drift import FIGURE_NAME, drift_figure, measure_drift
from como_jax.files import write_atomic
from como_jax.labelling.labelling import DatasetLabeller, LabelSettings
from como_jax.labelling.shards import LabelShard, label_sums
from como_jax.training import sharding
from como_jax.training.run import Run, load_run

logger = logging.getLogger("como_jax.extract_labels")


def extract_labels(
    workdir: epath.PathLike,
    data: epath.PathLike,
    out: epath.PathLike,
    *,
    gap_seconds: float | None = None,
    camera: str = "",
    fit: str | None = None,
    batch_size: int = 64,
    threads: int = 8,
    drift: bool = True,
    overwrite: bool = False,
    restart: bool = False,
) -> dict[str, Any]:
    """Labels a dataset and returns the report, on the first host; see `define_flags` for the arguments.

    Raises:
      UsageError: run, data and `out` do not fit together.
    """
    run = load_run(workdir, sharding.make_mesh())
    config = run.config.data
    settings = LabelSettings(
        gap_seconds=config.gap_seconds if gap_seconds is None else gap_seconds,
        camera=camera,
        fit=fit or config.fit,
        batch_size=batch_size,
    )
    if settings.gap_seconds <= 0 or batch_size < 1:
        raise ConfigError(f"--gap_seconds {settings.gap_seconds} and --batch_size {batch_size} must be positive.")
    labeller = DatasetLabeller(run, data, out, settings, threads)

    def summarize(labelled: epath.Path, shards: list[LabelShard]) -> dict[str, Any]:
        return {"drift": report_drift(run, labelled, shards, settings) if drift else None}

    with tqdm(
        total=sum(shard.num_records for shard in labeller.shards),
        unit="step",
        disable=not hosts.is_first(),
        mininterval=0.1 if sys.stderr.isatty() else 30,
    ) as bar:
        return labeller.label(
            overwrite=overwrite,
            restart=restart,
            progress=lambda shard, notes: bar.update(shard.num_records),
            summarize=summarize,
        )


def report_drift(run: Run, labelled: epath.Path, shards: list[LabelShard], settings: LabelSettings) -> dict[str, Any]:
    """The drift as a part of the report, or why there is none: labels are useful without it."""
    try:
        new = label_sums(labelled, shards)
        if new is None:
            raise DatasetError("no step has a label to compare, since no episode is longer than one gap.")
        reference, found = measure_drift(
            run, labelled, new, gap_seconds=settings.gap_seconds, camera=settings.camera, fit=settings.fit
        )
    except UsageError as error:
        logger.warning("No drift: %s", error)
        return {"missing": str(error)}
    figure = drift_figure(reference, new, found.s_pcfc)
    write_atomic(labelled / FIGURE_NAME, lambda file: figure.savefig(file, format="png", dpi=110))
    return found.as_report()


def print_report(out: str, report: dict[str, Any]) -> None:
    """Logs what was labelled and what was not."""
    logger.info(
        "%d of %d steps of %d episodes have a latent motion; the others lie within a gap of the end of their episode%s",
        report["labelled"],
        report["steps"],
        report["episodes"],
        f", or need one of {len(report['unreadable'])} unreadable images" if report["unreadable"] else "",
    )
    for entry in report["unreadable"][:5]:
        logger.warning("unreadable: episode %s, step %d", entry["episode"], entry["step"])
    drift = report["drift"]
    if drift and "verdict" in drift:
        logger.info("Drift: %s. %s", drift["verdict"], drift["advice"])
    logger.info("Labelled dataset: %s", out)


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of the run whose model labels.", required=True)
    flags.DEFINE_string("data", None, "Dataset directory.", required=True)
    flags.DEFINE_string("out", None, "Directory of the labelled dataset, to be made.", required=True)
    flags.DEFINE_float("gap_seconds", None, "Time between the two frames of a pair [that of the run].")
    flags.DEFINE_string("camera", "", "Observation key; empty for the dataset's first camera.")
    flags.DEFINE_enum("fit", None, ("crop", "stretch"), "How images become square [as in the run].")
    flags.DEFINE_integer("batch_size", 64, "Frames at once, on all devices of a host.")
    flags.DEFINE_integer("threads", 8, "Decoding threads.")
    flags.DEFINE_bool("drift", True, "Compare the latents with those of the run's training data.")
    flags.DEFINE_bool("overwrite", False, "Replace --out, once the new dataset is complete.")
    flags.DEFINE_bool("restart", False, "Discard what a stopped labelling left, and begin anew.")
    hosts.define_flags()


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    given = flags.FLAGS
    hosts.connect()
    names = ("workdir", "data", "out", "gap_seconds", "camera", "fit", "batch_size", "threads", "drift")
    names = (*names, "overwrite", "restart")
    report = extract_labels(**{name: given[name].value for name in names})
    if report:
        print_report(given.out, report)


if __name__ == "__main__":
    define_flags()
    cli.run(main)
