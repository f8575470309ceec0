"""Commands in parallel processes."""

import _thread
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest

from como_jax.processes import run_commands


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def logs(tmp_path: Path, count: int) -> list[Path]:
    return [tmp_path / "logs" / f"{number}.log" for number in range(count)]


def test_every_command_runs_once_and_its_status_and_output_are_kept(tmp_path: Path):
    commands = [python(f"import sys; print('hello {number}'); sys.exit({number % 2})") for number in range(5)]
    ended = dict(run_commands(commands, logs(tmp_path, 5), 2, os.environ))
    assert ended == {0: 0, 1: 1, 2: 0, 3: 1, 4: 0}
    assert [path.read_text() for path in logs(tmp_path, 5)] == [f"hello {number}\n" for number in range(5)]


def test_as_many_run_at_once_as_asked_for(tmp_path: Path):
    # Each waits for the other, so that they end only if both run.
    code = (
        "import pathlib, time; pathlib.Path(r'{0}').touch()\nwhile not pathlib.Path(r'{1}').exists(): time.sleep(0.01)"
    )
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    commands = [python(code.format(a, b)), python(code.format(b, a))]
    assert sorted(run_commands(commands, logs(tmp_path, 2), 2, os.environ)) == [(0, 0), (1, 0)]


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="the system pins no processes")
def test_processes_share_the_cores_equally(tmp_path: Path):
    code = "import os, time; time.sleep(0.3); print(sorted(os.sched_getaffinity(0)))"
    list(run_commands([python(code)] * 2, logs(tmp_path, 2), 2, os.environ))
    shares = [set(json.loads(path.read_text())) for path in logs(tmp_path, 2)]
    cores = os.sched_getaffinity(0)
    if len(cores) > 1:
        assert shares[0] | shares[1] == cores and not shares[0] & shares[1]
    else:
        assert shares[0] == shares[1] == cores


def test_closing_stops_what_runs_cleanly_and_starts_nothing_more(tmp_path: Path):
    code = (
        "import pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit(0)))\n"
        f"pathlib.Path(r'{tmp_path / 'ready'}').touch(); time.sleep(60)"
    )
    ended = run_commands([python("pass"), python(code), python("pass")], logs(tmp_path, 3), 1, os.environ)
    assert next(ended) == (0, 0)
    begin = time.monotonic()
    # A job in the background of a shell is started with SIGINT ignored.
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            interrupt_when(ended, tmp_path / "ready")
    finally:
        signal.signal(signal.SIGINT, previous)
    assert time.monotonic() - begin < 30
    assert logs(tmp_path, 3)[1].read_text() == "saved\n" and not logs(tmp_path, 3)[2].exists()


def interrupt_when(ended, ready: Path) -> None:
    """Raises KeyboardInterrupt in the waiting generator, as Ctrl-C does, once `ready` exists."""

    def watch() -> None:
        while not ready.exists():
            time.sleep(0.01)
        _thread.interrupt_main()

    threading.Thread(target=watch).start()
    next(ended)
