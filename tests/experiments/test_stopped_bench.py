"""The policy bench from end to end, at a size that learns nothing."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY


class BenchCommand:
    """The command of a bench that writes to `out`."""

    def __init__(self, out: Path):
        flags = ("--env=smoke", f"--out={out}", "--policies=diffusion", "--arms=none", "--seeds=0", "--episodes=1")
        self._out, self._command = out, [sys.executable, "-m", "tools.policy_bench", *flags]
        self._options = {"text": True, "cwd": REPOSITORY}

    def run(self) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self._command, check=True, capture_output=True, **self._options)

    def stop_at(self, log: str) -> None:
        """Runs it until the job begins that writes this log."""
        process = subprocess.Popen(self._command, stderr=subprocess.PIPE, **self._options)
        while not (self._out / "logs" / log).exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        process.terminate()
        _, output = process.communicate(timeout=60)
        assert process.returncode == 130 and "Stopped; run the same command to go on." in output


@pytest.mark.slow
def test_a_bench_that_was_stopped_gives_the_outcomes_of_one_that_was_not(tmp_path: Path):
    once, again = tmp_path / "once", tmp_path / "again"
    whole = BenchCommand(once).run()
    stopped = BenchCommand(again)
    stopped.stop_at("rollout_diffusion_none_0.log")
    resumed = stopped.run()
    assert "rollout_diffusion_none_0 is done" in resumed.stderr and " diffusion_none_0 is done" not in resumed.stderr
    assert resumed.stdout == whole.stdout == (again / "table.md").read_text()
    rows = (again / "episodes.csv").read_text().splitlines()
    assert rows == (once / "episodes.csv").read_text().splitlines() and len(rows) == 1 + 2
