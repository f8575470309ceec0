"""Where a run's numbers and images go: TensorBoard, metrics.jsonl and PNG files."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping

import numpy as np
from etils import epath
from PIL import Image
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from como_jax.files import write_atomic, write_text


class MetricWriter:
    """Writes scalars and images of one run; opening it at a step drops what was written after that step."""

    def __init__(self, workdir: epath.PathLike, resume_step: int):
        self._workdir = epath.Path(workdir)
        self._metrics = self._workdir / "metrics.jsonl"
        self._images = self._workdir / "images"
        self._images.mkdir(parents=True, exist_ok=True)
        self._keep_until(resume_step)
        board = self._workdir / "tensorboard"
        board.mkdir(parents=True, exist_ok=True)
        # The usual writer of this library has a thread: when a full disk ends that, the run waits for it forever.
        self._board = EventsWriter(str(board / "events"), "")
        start = SessionLog(status=SessionLog.START)
        self._board.write_event(Event(step=resume_step + 1, wall_time=time.time(), session_log=start))

    def has_evaluation(self, step: int) -> bool:
        """Whether there are numbers of this step beside those of training itself."""
        found: set[str] = set()
        for line in self._metrics.read_text().splitlines() if self._metrics.exists() else ():
            values = json.loads(line)
            if values["step"] == step:
                found |= values.keys()
        return any(not name.startswith(("step", "train/", "speed/")) for name in found)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one line to metrics.jsonl and a point to every curve."""
        line = json.dumps({"step": step, **{key: _strict(value) for key, value in values.items()}})
        with self._metrics.open("a") as file:
            file.write(line + "\n")
        self._show(step, *(summary.scalar(key, value) for key, value in values.items()))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a uint8 `[H, W, 3]` image."""
        path = self._images / f"{name.replace('/', '_')}_{step:07d}.png"
        write_atomic(path, lambda file: Image.fromarray(image).save(file, format="PNG"))
        self._show(step, summary.image(name, image, dataformats="HWC"))

    def close(self) -> None:
        """Flushes everything."""
        self._board.close()

    def _show(self, step: int, *shown: Summary) -> None:
        """Adds to TensorBoard."""
        for each in shown:
            self._board.write_event(Event(step=step, wall_time=time.time(), summary=each))
        self._board.flush()

    def _keep_until(self, step: int) -> None:
        if not self._metrics.exists():
            return
        kept = []
        for line in self._metrics.read_text().splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except json.JSONDecodeError:
                break  # A killed run may leave its last line unfinished.
        write_text(self._metrics, "".join(kept))


class NullWriter:
    """The writer of all hosts but the first: it writes nothing."""

    def has_evaluation(self, step: int) -> bool:
        """True, since the first host decides."""
        return True

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Does nothing."""

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Does nothing."""

    def close(self) -> None:
        """Does nothing."""


def _strict(value: float) -> float | None:
    value = float(value)
    return value if np.isfinite(value) else None
