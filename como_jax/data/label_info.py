"""What a labelled dataset says about its labels, of which labels.json holds more."""

from __future__ import annotations

import json
from typing import NamedTuple

from etils import epath

from como_jax.errors import DatasetError

LABELS_NAME = "labels.json"


class LabelInfo(NamedTuple):
    """Labels of one model.

    Attributes:
      parameters: digest of the model's parameters.
      latent_shape: latent tokens of a transition, and numbers of each.
      codebook_size: codes that a token chooses from; 0 where latents are continuous.
    """

    parameters: str
    latent_shape: tuple[int, int]
    codebook_size: int

    @classmethod
    def read(cls, directory: epath.PathLike) -> LabelInfo:
        """Reads a labelled dataset's file.

        Raises:
          DatasetError: there is none, or it is damaged.
        """
        path = epath.Path(directory) / LABELS_NAME
        try:
            found = json.loads(path.read_text())
            queries, size = found["latent_shape"]
            return cls(found["parameters"], (queries, size), found["codebook_size"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DatasetError(
                f"{path} cannot be read, which says what the labels are; label the dataset again with "
                f"`python -m experiments.extract_labels`: {error!r}"
            ) from error
