"""Commands that run at the same time, each in a process of its own."""

from __future__ import annotations

import collections
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def run_commands(
    commands: Sequence[Sequence[str]], logs: Sequence[Path], count: int, environment: Mapping[str, str]
) -> Iterator[tuple[int, int]]:
    """Runs commands in their order, `count` at once, each on an equal share of this process's CPU cores.

    Those that run when the iterator is closed, by an error or Ctrl-C too, get SIGTERM and are waited for.

    Args:
      commands: program and arguments.
      logs: local files that get what each command prints.
      count: processes at once.
      environment: of the processes, as a whole.

    Yields:
      The number of a command and its exit status, negative for a signal, as soon as it ends.
    """
    waiting = collections.deque(range(len(commands)))
    running: dict[int, tuple[int, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for slot in range(count):
                if waiting and slot not in running:
                    number = waiting.popleft()
                    running[slot] = (number, _start(commands[number], logs[number], environment))
                    _pin(running[slot][1].pid, slot, count)
            time.sleep(0.1)
            for slot, (number, process) in list(running.items()):
                if process.poll() is not None:
                    del running[slot]
                    yield number, process.returncode
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()


def _start(command: Sequence[str], log: Path, environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as file:
        # In a group of its own, since Ctrl-C in a terminal goes to the whole group, and SIGTERM is the cleaner stop.
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, process_group=0)


def _pin(pid: int, slot: int, count: int) -> None:
    """Without this XLA would make as many threads in every process as the machine has cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(pid, cores[slot::count] or [cores[slot % len(cores)]])
