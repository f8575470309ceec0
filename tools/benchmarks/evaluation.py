"""Times whole evaluations of a run, with their report, at several numbers of transitions.

python -m tools.benchmarks.evaluation --workdir RUN --data DIR
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence

import numpy as np
from absl import flags
from etils import epath

from como_jax import cli
from experiments.evaluate import evaluate
from tools.benchmarks.machine import describe_machine

_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a pretraining run.")
_DATA = flags.DEFINE_string("data", None, "DIR,DIR instead of the datasets that the run was trained on.")
_COUNTS = flags.DEFINE_list("num_transitions", ["250", "500", "1000"], "Held out, and as many to fit the probe on.")


def time_evaluations(workdir: str, data: str | None, counts: Sequence[int]) -> list[tuple[int, float]]:
    """The number of transitions of each evaluation, and its seconds from opening the run to the finished report."""
    found = []
    for count in counts:
        with tempfile.TemporaryDirectory() as directory:
            begin = time.monotonic()
            metrics = evaluate(workdir, data, epath.Path(directory), num_transitions=count)
            found.append((int(metrics["transitions"]), time.monotonic() - begin))
    return found


def main(arguments: Sequence[str]) -> None:
    """Prints the machine, the times, and what one more transition costs."""
    cli.no_arguments(arguments)
    found = time_evaluations(_WORKDIR.value, _DATA.value, [int(count) for count in _COUNTS.value])
    print(describe_machine())
    for transitions, seconds in found:
        print(f"{transitions} transitions: {seconds:.1f} s, {1000 * seconds / transitions:.1f} ms each")
    if len({transitions for transitions, _ in found}) > 1:
        slope, start = np.polyfit(*np.transpose(found), 1)
        print(f"linear fit: {start:.1f} s and {1000 * slope:.1f} ms a transition")


if __name__ == "__main__":
    flags.mark_flags_as_required(["workdir"])
    cli.run(main)
