"""Runs several commands at the same time, each in its own process."""

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
    """Runs commands in order, `count` at a time, each on an equal share of the CPU cores of this process.

    When the iterator is closed, also by an error or Ctrl-C, running commands get SIGTERM and are waited for.

    Args:
      commands: program and arguments of each.
      logs: local files, one for each command, for what it prints.
      count: number of processes at a time.
      environment: all environment variables of the processes.

    Yields:
      The number of a command and its exit status, negative for a signal, as soon as the command ends.
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
        # In its own process group, since Ctrl-C goes to a whole group, and SIGTERM stops a command more cleanly.
        return subprocess.Popen(command, stdout=file, stderr=file, env=environment, process_group=0)


def _pin(pid: int, slot: int, count: int) -> None:
    """Pins a process to its cores; otherwise XLA starts as many threads in each as the machine has cores."""
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(pid, cores[slot::count] or [cores[slot % len(cores)]])
