"""What all writers of ArrayRecord files by TFDS share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from etils import epath
from tensorflow_datasets.core import example_serializer


class StableSerializer(example_serializer.ExampleSerializer):
    """Gives the same bytes in every process; protobuf alone puts the fields in an order that changes with each."""

    def serialize_example(self, example: Any) -> bytes:
        return self.get_tf_example(example).SerializeToString(deterministic=True)


@contextlib.contextmanager
def disk_errors(path: epath.Path) -> Iterator[None]:
    """ArrayRecord raises RuntimeError, with the path, when it cannot write; a builder may, about something else."""
    try:
        yield
    except RuntimeError as error:
        if str(path) in str(error):
            raise OSError(f"cannot write records: {error}") from error
        raise
