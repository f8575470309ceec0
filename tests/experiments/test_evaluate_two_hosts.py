"""Evaluations by two processes, which see the same or not."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments.evaluate import evaluate
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow


def on_two_hosts(flags: list[str], own: list[list[str]], status: int = 0) -> list[str]:
    """What two processes with two devices each say, of which each has flags of its own too."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        job = [f"--coordinator=localhost:{listener.getsockname()[1]}", "--num_processes=2"]
    command = [sys.executable, "-m", "experiments.evaluate", *flags, *job]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "2"}
    processes = [
        subprocess.Popen([*command, f"--process_id={number}", *mine], cwd=REPOSITORY, env=environment, **pipes)
        for number, mine in enumerate(own)
    ]
    try:
        # A host that waits for another in vain is told after five minutes.
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [status, status], outputs
    return outputs


def test_two_hosts_measure_what_one_does(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path: Path
) -> None:
    workdir, out = smoke_run("como"), tmp_path / "two"
    flags = [f"--workdir={workdir}", f"--data={tabletop_dataset}", f"--out={out}"]
    outputs = on_two_hosts([*flags, "--num_transitions=20", "--batch_size=6", "--num_images=2"], [[], []])
    assert "Report: " in outputs[0] and "Report: " not in outputs[1]
    sizes: dict[str, Any] = {"num_transitions": 20, "batch_size": 6, "num_images": 2}
    one = evaluate(workdir, str(tabletop_dataset), tmp_path / "one", **sizes)
    found = json.loads((out / "metrics.json").read_text())
    assert found.pop("family") == one.pop("family") == "como"
    assert found == pytest.approx(one, rel=1e-4, abs=1e-4)
    pages = [(tmp_path / name / "report.html").read_text() for name in ("one", "two")]
    assert pages[0].count("<img") == pages[1].count("<img") >= 5


def test_both_hosts_end_when_one_does_not_see_the_files(
    smoke_run: Callable[[str], Path], tabletop_dataset: Path, tmp_path: Path
) -> None:
    flags = [f"--workdir={smoke_run('como')}", f"--data={tabletop_dataset}", f"--out={tmp_path / 'out'}"]
    first, second = on_two_hosts(flags, [[], ["--data=/nowhere"]], status=2)
    assert "host 1 has failed" in first and "/nowhere is not a dataset directory" in second
