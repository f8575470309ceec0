"""Measures a latent-motion model on episodes that it was not trained on, and shows what its latents hold.

    python -m experiments.evaluate --workdir RUN --data DIR[,DIR] --out DIR

Writes metrics.json, with means over datasets and `DATASET/...` of each where there are several, and report.html, a
page that refers to nothing outside it. With --labelled, datasets that experiments.extract_labels labelled, it also
writes domains.json and domains.png: whether an action has the same latents in all of them (CoMo, Figure 4).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from como_jax import cli, hosts
from como_jax.data.mixture import parse_mixture
from como_jax.data.schema import SPLITS
from como_jax.errors import ConfigError, DatasetError, RunError
from como_jax.evaluation.latents.labelled_domains import compare_labelled, write_matrix
from como_jax.evaluation.latents.probes import ProbeError
from como_jax.evaluation.latents.transitions import EvaluationSet, TransitionRunner, measure, summarize
from como_jax.evaluation.report import Report, describe_measurements, transfer_strips, write_report
from como_jax.files import write_text
from como_jax.labelling.provenance import hash_params
from como_jax.training import sharding
from como_jax.training.run import load_run

logger = logging.getLogger("como_jax.evaluate")


def evaluate(
    workdir: epath.PathLike,
    data: str | None = None,
    out: epath.PathLike | None = None,
    *,
    num_transitions: int = 1000,
    batch_size: int = 64,
    num_pictures: int = 6,
    probe: bool = True,
    labelled: str | None = None,
    action_classes: epath.PathLike | None = None,
) -> dict[str, float | int | str]:
    """Evaluates the newest checkpoint of a run, writes metrics.json and report.html and returns the metrics.

    Args:
      workdir: of the run.
      data: DIR,DIR; the run's own datasets by default.
      out: directory of the two files; `workdir`/report by default.
      num_transitions: of every dataset, held out, and as many to fit the probe on; fewer where there are fewer.
      batch_size, num_pictures, probe, labelled, action_classes: see `define_flags`.

    Raises:
      UsageError: run, data and `out` do not fit together, or episodes are too few for the probe.
    """
    mesh = sharding.make_mesh()
    run = load_run(workdir, mesh)
    out = epath.Path(out or run.workdir / "report")
    notes: list[str] = []
    if action_classes is not None and labelled is None:
        raise ConfigError("--action_classes says which instructions of --labelled are one action; pass both.")
    domains = None
    # Before all compute together, where a host that waits for one that has failed cannot be told.
    with hosts.in_step():
        make_folder(out)
        if labelled is not None:
            domains = compare_labelled(labelled, action_classes, hash_params(run.params), notes)
        chosen = [choose_splits(splits, probe, notes) for splits in open_splits(run.config, data, notes)]
    runner, results = TransitionRunner(run.model, mesh, batch_size, with_ssim=True), []
    for item, fitting in chosen:
        logger.info("Evaluating on %s (%s)", item.name, item.split)
        num_clips = -(-num_transitions // 2)
        found = runner(run.params, item, num_clips, num_pictures)
        fitted = runner(run.params, fitting, num_clips) if fitting else None
        results.append(measure(item, found, fitted))
    metrics = {**summarize(results), "step": run.step, "family": run.config.family}
    strips = transfer_strips(run.model, run.params, [result.item for result in results], num_pictures, notes)
    facts = {"Run": str(run.workdir), "Step": str(run.step), "Family": run.config.family}
    facts |= describe_measurements(results)
    report = Report(f"Latent motion of {run.workdir.name}", facts, notes, metrics, results, strips, domains)
    with hosts.in_step():
        if hosts.is_first():
            write_text(out / "metrics.json", json.dumps(metrics, indent=2, allow_nan=False) + "\n")
            if domains is not None:
                write_matrix(out, domains)
            write_report(out / "report.html", report)
    for note in notes:
        logger.warning(note)
    logger.info("Report: %s", out / "report.html")
    return metrics


def make_folder(out: epath.Path) -> None:
    """On the first host; raises RunError if it cannot be made."""
    if not hosts.is_first():
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"--out {out} cannot be written: {error}") from error


def open_splits(config: ConfigDict, data: str | None, notes: list[str]) -> list[dict[str, EvaluationSet]]:
    """The sets of every dataset, by split."""
    sets = EvaluationSet.open_all(
        parse_mixture(config.data.mixture if data is None else data),
        gap_seconds=config.data.gap_seconds,
        image_size=config.data.image_size,
        camera=config.data.camera,
        fit=config.data.fit,
        repeats=False,
        warn=notes.append,
    )
    if not sets:
        raise DatasetError(" ".join(notes))
    found: dict[str, dict[str, EvaluationSet]] = {}
    for item in sets:
        found.setdefault(item.name, {})[item.split] = item
    return list(found.values())


def choose_splits(
    splits: dict[str, EvaluationSet], probe: bool, notes: list[str]
) -> tuple[EvaluationSet, EvaluationSet | None]:
    """What is measured of a dataset, and what the probe is fitted on, if there is one.

    Raises:
      ProbeError: there are actions to probe, but not both training and held-out episodes.
    """
    item = splits.get("val") or splits["train"]
    if item.split == "train":
        notes.append(f"{item.name}: measured on training episodes, since it has no others that serve.")
    silent = any(part.source.action is None for part in splits.values())
    if silent or not probe:
        reason = "the dataset has no actions" if silent else "--noprobe was passed"
        notes.append(f"No probe of {item.name}: {reason}.")
        return item, None
    missing = [split for split in SPLITS if split not in splits]
    if missing:
        raise ProbeError(
            f"{item.source.directory}: the linear probe needs training and held-out episodes, but none of split "
            f"{missing[0]!r} serves. Pass --noprobe to do without it. {' '.join(notes)}"
        )
    return item, splits["train"]


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of a pretraining run.", required=True)
    flags.DEFINE_string("data", None, "DIR,DIR instead of the datasets that the run was trained on.")
    flags.DEFINE_string("out", None, "Gets metrics.json and report.html; RUN/report by default.")
    flags.DEFINE_integer("num_transitions", 1000, "Of every dataset, and as many to fit the probe.", lower_bound=2)
    flags.DEFINE_integer("batch_size", 64, "Clips at once; a clip has two transitions.", lower_bound=1)
    flags.DEFINE_integer("num_pictures", 6, "Rows of predictions of every dataset.", lower_bound=1)
    flags.DEFINE_bool("probe", True, "Whether to fit the linear probe where there are actions.")
    flags.DEFINE_string("labelled", None, "DIR,DIR, labelled datasets of several domains, to compare with each other.")
    flags.DEFINE_string("action_classes", None, 'FILE.json, {"INSTRUCTION": "ACTION"}: instructions of one action.')
    hosts.define_flags()


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    hosts.connect()
    names = ("workdir", "data", "out", "num_transitions", "batch_size", "num_pictures", "probe")
    names = (*names, "labelled", "action_classes")
    evaluate(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
