"""Examines a dataset, converted or not, and says what is wrong with it and what to do.

    python -m tools.doctor DATASET
    python -m tools.doctor clips --control_rate 3 --out clips.html --json clips.json

DATASET is a dataset made by tools.datasets, an RLDS or LeRobot dataset, or a folder of videos. A summary is printed,
and DATASET_doctor.html gets the same with figures and sample strips.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath

from como_jax import cli
from como_jax.convert.settings import check_control_rate
from como_jax.doctor.diagnosis import examine
from como_jax.doctor.findings import Severity
from como_jax.doctor.report import to_json, to_text, write_page
from como_jax.doctor.sources import open_view
from como_jax.doctor.survey import Thresholds
from como_jax.errors import ConfigError, UsageError
from como_jax.files import check_file_output, write_figures


class FaultsError(UsageError):
    """The dataset has faults, and `--strict` was passed."""


def define_flags() -> None:
    """Defines the flags of the command."""
    defaults = Thresholds()
    flags.DEFINE_string("out", None, "File that ends in .html, or a folder for it [DATASET_doctor.html].")
    flags.DEFINE_string("json", None, "JSON file with the same content.")
    flags.DEFINE_integer("max_episodes", 100, "Look at this many, evenly spread; 0 for all.", lower_bound=0)
    flags.DEFINE_float("control_rate", None, "Steps per second (Hz) of a source, where it is known better.")
    flags.DEFINE_float("gap_seconds", defaults.gap_seconds, "Time between the frames of a pair.", lower_bound=1e-3)
    flags.DEFINE_float("still", defaults.still, "A pair with less mean motion per step is still.", lower_bound=0.0)
    flags.DEFINE_float("cut", defaults.cut, "A step with more motion is a hard cut.", lower_bound=0.0)
    flags.DEFINE_bool("strict", False, "Exit with status 2 if there are errors or warnings.")


def main(arguments: Sequence[str]) -> None:
    """Examines the dataset that the command line names, and prints and writes what was found."""
    if len(arguments) != 1:
        raise ConfigError("Expected the folder of one dataset: python -m tools.doctor DATASET.")
    values = flags.FLAGS
    dataset = epath.Path(arguments[0]).expanduser()
    if values.control_rate is not None:
        check_control_rate(values.control_rate)
    page = page_path(dataset, values.out)
    for path in map(epath.Path, filter(None, (page, values.json))):
        check_file_output(path)
        check_outside(path, dataset)
    view = open_view(dataset, values.control_rate)
    thresholds = Thresholds(values.gap_seconds, values.still, values.cut)
    diagnosis = examine(view, values.max_episodes, thresholds, show_progress=True)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_page(page, diagnosis)
        if values.json:
            write_figures(values.json, to_json(diagnosis))
    except OSError as error:
        raise ConfigError(f"The report cannot be written; choose another --out or --json: {error}") from error
    print(to_text(diagnosis))
    print(f"the report is {page}")
    if values.strict and diagnosis.count(Severity.ERROR) + diagnosis.count(Severity.WARNING):
        raise FaultsError(f"{dataset} has errors or warnings, see above.")


def page_path(dataset: epath.Path, out: str | None) -> epath.Path:
    """Returns where the page is written."""
    name = f"{dataset.resolve().name}_doctor.html"
    if out is None:
        return epath.Path(name)
    path = epath.Path(out).expanduser()
    return path / name if path.is_dir() or path.suffix.lower() not in (".html", ".htm") else path


def check_outside(path: epath.Path, dataset: epath.Path) -> None:
    """Raises ConfigError if a file would be written into the dataset."""
    if dataset.is_dir() and Path(os.path.realpath(path)).is_relative_to(os.path.realpath(dataset)):
        raise ConfigError(f"{path} lies in the dataset, which is left as it is; choose another --out or --json.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
