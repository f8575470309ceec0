r"""Writes a labelled dataset in the format of another project, with its labels in it.

    python -m tools.labels.export rlds --data datasets/bridge_labelled --out datasets/bridge_rlds
    python -m tools.labels.export lerobot --data datasets/pusht_labelled --out datasets/pusht_lerobot

--out appears when it is complete. como_jax/export/labels/README.md describes the formats.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from absl import flags
from tqdm import tqdm

from como_jax import cli
from como_jax.data.schema import LABELS_NAME
from como_jax.errors import ConversionError, UsageError
from como_jax.export.labels import WRITERS, export_labels
from como_jax.export.labels.dataset import LabelledDataset

# The exit status that shells give to a command which Ctrl-C ended.
_INTERRUPTED = 130

_DATA = flags.DEFINE_string("data", None, "Labelled dataset.")
_OUT = flags.DEFINE_string("out", None, "Directory to be made.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Replace --out, once the new dataset is complete.")


def print_summary(kind: str, out: str, dataset: LabelledDataset) -> None:
    """Prints what was written and where."""
    sizes = [f"{split} {len(each.length)} episodes, {len(each)} steps" for split, each in dataset.splits.items()]
    print(f"dataset {dataset.name}: {'; '.join(sizes)}; cameras: {', '.join(dataset.cameras)}")
    fields = ", ".join(f"{field} ({size})" for field, size in dataset.sizes.items())
    print(f"{fields}; {int(dataset.steps('latent_valid').sum())} of {dataset.num_steps} steps have a valid label")
    if not (dataset.directory / LABELS_NAME).exists():
        print(f"warning: {dataset.directory} has no {LABELS_NAME}, so that the model of the labels is not known")
    print(f"{kind} dataset in {out}")


def main(arguments: Sequence[str]) -> None:
    """Exports a dataset with a progress bar."""
    if len(arguments) != 1 or arguments[0] not in WRITERS:
        raise UsageError(f"expected the name of one format: {', '.join(WRITERS)}")
    for name, flag in (("data", _DATA), ("out", _OUT)):
        if not flag.value:
            raise UsageError(f"--{name} is missing: {flag.help}")
    dataset = LabelledDataset(_DATA.value)
    # Log files get a line of progress every 30 seconds only.
    pace = 0.1 if sys.stderr.isatty() else 30
    num_episodes = sum(len(source.length) for source in dataset.splits.values())
    try:
        with tqdm(total=num_episodes, unit="episode", mininterval=pace) as bar:
            export_labels(dataset, arguments[0], _OUT.value, _OVERWRITE.value, bar.update)
    except OSError as error:
        raise ConversionError(f"the export failed: {error}") from error
    except KeyboardInterrupt:
        print("stopped; nothing was kept", file=sys.stderr)
        sys.exit(_INTERRUPTED)
    print_summary(arguments[0], _OUT.value, dataset)


if __name__ == "__main__":
    cli.run(main)
