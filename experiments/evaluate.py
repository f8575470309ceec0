"""Measures a latent-motion model on episodes that it was not trained on, and shows what its latents hold.

    python -m experiments.evaluate --workdir RUN --data DIR[,DIR] --out DIR

Writes metrics.json, with means over datasets and `DATASET/...` of each where there are several, and report.html, a
page that refers to nothing outside it. With --labelled, datasets that experiments.extract_labels labelled, it also
writes domains.json and domains.png: whether an action has the same latents in all of them (CoMo, Figure 4).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence

from absl import flags
from etils import epath

from como_jax import cli, hosts, ownership
from como_jax.errors import ConfigError
from como_jax.evaluation.latents import domains
from como_jax.evaluation.latents.probes import ProbeError
from como_jax.evaluation.latents.transitions import TransitionRunner, choose_splits, measure, open_splits, summarize
from como_jax.evaluation.report import Report, describe_measurements, transfer_strips, write_report
from como_jax.files import write_json
from como_jax.labelling.labelling import hash_params
from como_jax.training import sharding
from como_jax.training.run import Run, load_run
from como_jax.training.run_data import changed_since

FILES = ("metrics.json", "report.html")

logger = logging.getLogger("como_jax.evaluate")


def evaluate(
    workdir: epath.PathLike,
    data: str | None = None,
    out: epath.PathLike | None = None,
    *,
    num_transitions: int = 1000,
    batch_size: int = 64,
    num_images: int = 6,
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
      batch_size, num_images, probe, labelled, action_classes: see `define_flags`.

    Raises:
      UsageError: run, data and `out` do not fit together, or episodes are too few for the probe.
    """
    mesh = sharding.make_mesh()
    run = load_run(workdir, mesh)
    out = epath.Path(out or run.workdir / "report")
    notes: list[str] = []
    # Before all hosts compute together: a host that waits for a failed one in a computation would wait forever.
    with hosts.in_step(), _probe_flag_named():
        if hosts.is_first():
            ownership.claim(out, (*FILES, *(domains.FILES if labelled else ())))
        notes += changed_since(workdir) if data is None else []
        matrix = compare_domains(run, labelled, action_classes, notes)
        chosen = [choose_splits(splits, probe, notes) for splits in open_splits(run.config.data, data, notes)]
    runner, results = TransitionRunner(run.model, mesh, batch_size, with_ssim=True), []
    for item, fitting in chosen:
        logger.info("Evaluating on %s (%s)", item.name, item.split)
        num_clips = -(-num_transitions // 2)
        found = runner(run.params, item, num_clips, num_images)
        fitted = runner(run.params, fitting, num_clips) if fitting else None
        with _probe_flag_named():
            results.append(measure(item, found, fitted))
    metrics = {**summarize(results), "step": run.step, "family": run.config.family}
    strips = transfer_strips(run.model, run.params, [result.item for result in results], num_images, notes)
    facts = {"Run": str(run.workdir), "Step": str(run.step), "Family": run.config.family}
    facts |= describe_measurements(results)
    report = Report(f"Latent motion of {run.workdir.name}", facts, notes, metrics, results, strips, matrix)
    with hosts.in_step():
        if hosts.is_first():
            write_json(out / "metrics.json", metrics)
            if matrix is not None:
                domains.write_matrix(out, matrix)
            write_report(out / "report.html", report)
    for note in notes:
        logger.warning(note)
    logger.info("Report: %s", out / "report.html")
    return metrics


def compare_domains(
    run: Run, labelled: str | None, action_classes: epath.PathLike | None, notes: list[str]
) -> domains.TransferMatrix | None:
    """Compares the datasets of --labelled, if there are any."""
    if labelled is None:
        if action_classes is not None:
            raise ConfigError("--action_classes says which instructions of --labelled are one action; pass both.")
        return None
    classes = None if action_classes is None else domains.read_action_classes(action_classes)
    directories = [name.strip() for name in labelled.split(",") if name.strip()]
    return domains.compare_labelled(directories, classes, hash_params(run.params), notes)


@contextlib.contextmanager
def _probe_flag_named() -> Iterator[None]:
    """Adds to an error of the probe the flag that leaves the probe out."""
    try:
        yield
    except ProbeError as error:
        raise ProbeError(f"{error} Pass --noprobe to evaluate without the probe.") from error


def define_flags() -> None:
    """Defines the flags of the command."""
    flags.DEFINE_string("workdir", None, "Directory of a pretraining run.", required=True)
    flags.DEFINE_string("data", None, "DIR,DIR instead of the datasets that the run was trained on.")
    flags.DEFINE_string("out", None, "Gets metrics.json and report.html; RUN/report by default.")
    flags.DEFINE_integer(
        "num_transitions", 1000, "Transitions per dataset, and as many to fit the probe.", lower_bound=2
    )
    flags.DEFINE_integer("batch_size", 64, "Clips per batch; a clip has two transitions.", lower_bound=1)
    flags.DEFINE_integer("num_images", 6, "Rows of predictions in the report, of every dataset.", lower_bound=1)
    flags.DEFINE_bool("probe", True, "Whether to fit the linear probe where there are actions.")
    flags.DEFINE_string("labelled", None, "DIR,DIR: labelled datasets of several domains, to be compared.")
    flags.DEFINE_string("action_classes", None, 'FILE.json, {"INSTRUCTION": "ACTION"}: instructions of one action.')
    hosts.define_flags()


def main(arguments: Sequence[str]) -> None:
    """Reads the flags."""
    cli.no_arguments(arguments)
    hosts.connect()
    names = ("workdir", "data", "out", "num_transitions", "batch_size", "num_images", "probe")
    names = (*names, "labelled", "action_classes")
    evaluate(**{name: flags.FLAGS[name].value for name in names})


if __name__ == "__main__":
    define_flags()
    cli.run(main)
