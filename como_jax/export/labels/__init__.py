"""Writes labelled datasets in the formats of other projects."""

from __future__ import annotations

from collections.abc import Callable

from etils import epath

from como_jax.export.labels.dataset import LabelledDataset
from como_jax.export.labels.lerobot import write_lerobot
from como_jax.export.labels.rlds import write_rlds
from como_jax.staging import check_apart, new_folder

WRITERS = {"rlds": write_rlds, "lerobot": write_lerobot}
"""Functions that write a `LabelledDataset` into an empty folder and call another function after every episode."""


def export_labels(
    dataset: LabelledDataset,
    kind: str,
    out: epath.PathLike,
    overwrite: bool = False,
    on_episode: Callable[[], object] = lambda: None,
) -> None:
    """Writes a labelled dataset in another format.

    Args:
      dataset: the dataset to write.
      kind: a key of `WRITERS`.
      out: the folder to be made; it appears when it is complete.
      overwrite: whether to replace an older dataset at `out`.
      on_episode: is called after every episode.

    Raises:
      UsageError: `out` cannot be used, or the dataset cannot be written in this format.
      OSError: the disk cannot be written to.
    """
    check_apart(out, dataset.directory, "`data`")
    with new_folder(out, overwrite) as folder:
        WRITERS[kind](dataset, folder, on_episode)
