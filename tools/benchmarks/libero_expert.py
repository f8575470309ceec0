"""Measures how often the scripted expert solves LIBERO's tasks from their official initial states.

    python -m tools.benchmarks.libero_expert --suites libero_spatial,libero_object --states 0-49 --processes 2
    python -m tools.benchmarks.libero_expert --suites libero_goal --tasks 0,3 --states 0-9 --noise 0.05

An episode counts where the goal holds for 10 steps after the object was let go, within the steps that public
evaluations grant. Every episode is a line of a CSV file; those that stand in it are not repeated, so that a run goes on
where it was stopped. The table at the end is of all lines of that file with the same noise.
"""

from __future__ import annotations

import collections
import concurrent.futures
import csv
import multiprocessing
import time
from collections.abc import Sequence

import numpy as np
import tqdm
from absl import flags
from etils import epath

from como_jax import cli
from como_jax.envs.libero import benchmark
from como_jax.envs.libero.expert import Expert
from como_jax.envs.libero.simulation import Simulation
from como_jax.errors import UsageError, closest
from como_jax.evaluation.tables import markdown_table, wilson_interval

_COLUMNS = ("task", "state", "noise", "solved_after", "first_true_after", "steps_granted", "seconds", "reason")
_HELD = 10


def episode(simulation: Simulation, state: int, noise: float) -> dict[str, str]:
    """One line of the file: the expert from an official state, with Gaussian noise on all actions but the gripper's."""
    begin = time.process_time()
    simulation.reset(state, official=state)
    expert, rng = Expert(simulation.raw, seed=state), np.random.default_rng(state)
    granted = simulation.task.max_steps
    held, first, solved = 0, "", ""
    for step in range(1, granted + 1):
        action = expert.act().astype(float)
        action[:6] += noise * rng.standard_normal(6)
        simulation.step(action)
        held = held + 1 if simulation.success() else 0
        first = first or (str(step) if held else "")
        if expert.done and held >= _HELD:
            solved = str(step)
            break
    values = (state, noise, solved, first, granted, f"{time.process_time() - begin:.1f}", expert.reason)
    return dict(zip(_COLUMNS, (simulation.task.name, *map(str, values)), strict=True))


def run_task(task: str, states: Sequence[int], noise: float, path: str) -> int:
    """All given states of one task, each appended to the file when it is done."""
    simulation = Simulation(benchmark.load(task))
    for state in states:
        line = episode(simulation, state, noise)
        # One write a line, so that processes do not mix theirs.
        with open(path, "a", newline="") as file:
            csv.DictWriter(file, _COLUMNS).writerow(line)
    simulation.close()
    return len(states)


def read_lines(path: epath.Path, noise: float) -> list[dict[str, str]]:
    """The episodes in the file that had this noise."""
    with path.open("r") as file:
        return [line for line in csv.DictReader(file) if float(line["noise"]) == noise]


def table(lines: Sequence[dict[str, str]]) -> str:
    """Rows by task and suite: episodes, solved and held, true at any step, and the mean length of solved ones.

    Rows of suites have the 95 % Wilson interval.
    """
    rows = [["task", "episodes", "released and held", "at any step", "mean steps"]]
    groups = collections.defaultdict(list)
    for line in lines:
        groups[line["task"].partition("/")[0]].append(line)
        groups[line["task"]].append(line)
    for name in sorted(groups, key=lambda name: [part.zfill(3) for part in name.split("/")]):
        group = groups[name]
        lengths = [int(line["solved_after"]) for line in group if line["solved_after"]]
        first = sum(bool(line["first_true_after"]) for line in group)
        mean = f"{np.mean(lengths):.0f}" if lengths else "-"
        share = f"{100 * len(lengths) / len(group):.0f} %"
        if "/" not in name:
            low, high = wilson_interval(len(lengths), len(group))
            share += f", {100 * low:.0f}-{100 * high:.0f}"
        rows.append([name, str(len(group)), f"{len(lengths)} ({share})", str(first), mean])
    return markdown_table(rows)


def _numbers(text: str) -> list[int]:
    """The numbers in `0-4,9`."""
    ends = [part.split("-") for part in text.split(",")]
    if not all(end.isdecimal() for pair in ends for end in pair) or any(len(pair) > 2 for pair in ends):
        raise UsageError(f"{text!r} are no numbers; write them like 0-4,9.")
    return [number for pair in ends for number in range(int(pair[0]), int(pair[-1]) + 1)]


def define_flags() -> None:
    """The flags of this command."""
    flags.DEFINE_list("suites", ["libero_spatial", "libero_object", "libero_goal", "libero_10"], "Suites of LIBERO.")
    flags.DEFINE_string("tasks", None, "Numbers of tasks within each suite, like 0-4,9 [all].")
    flags.DEFINE_string("states", "0-49", "Numbers of official initial states.")
    flags.DEFINE_float("noise", 0.0, "Standard deviation of the noise on the actions.", lower_bound=0.0)
    flags.DEFINE_integer("processes", 1, "Processes at the same time.", lower_bound=1)
    flags.DEFINE_string("out", "libero_expert.csv", "File of results; what stands in it is not repeated.")


def main(arguments: Sequence[str]) -> None:
    """Runs what is missing and prints the table."""
    cli.no_arguments(arguments)
    values, path = flags.FLAGS, epath.Path(flags.FLAGS.out)
    for suite in values.suites:
        if suite not in benchmark.SUITES:
            raise UsageError(f"LIBERO has no suite {suite!r} of `suites`{closest(suite, benchmark.SUITES)}")
    if not path.exists():
        path.write_text(",".join(_COLUMNS) + "\n")
    done = {(line["task"], int(line["state"])) for line in read_lines(path, values.noise)}
    wanted = {}
    for suite in values.suites:
        for number in _numbers(values.tasks or f"0-{benchmark.SUITES[suite][0] - 1}"):
            task = f"{suite}/{number}"
            states = [state for state in _numbers(values.states) if (f"libero:{task}", state) not in done]
            if states:
                wanted[task] = states
    context = multiprocessing.get_context("spawn")
    with (
        concurrent.futures.ProcessPoolExecutor(values.processes, context, max_tasks_per_child=1) as pool,
        tqdm.tqdm(total=sum(map(len, wanted.values())), unit="episode", disable=None) as bar,
    ):
        running = [pool.submit(run_task, task, states, values.noise, str(path)) for task, states in wanted.items()]
        for finished in concurrent.futures.as_completed(running):
            bar.update(finished.result())
    print(table(read_lines(path, values.noise)), end="")


if __name__ == "__main__":
    define_flags()
    cli.run(main)
