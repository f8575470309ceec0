"""The command, from its flags to SIGTERM."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from websockets.exceptions import InvalidStatus

from como_jax import cli
from como_jax.errors import ConfigError
from como_jax.serving.client import PolicyClient
from como_jax.serving.messages import RequestError
from tests.serving.serving_fakes import observation
from tools.serve.__main__ import read_token

# The command with a policy that needs no run.
SCRIPT = """
from como_jax import cli
from tests.serving.serving_fakes import FakePolicy
from tools.serve import __main__ as command

def load_policy(directory, options):
    assert directory == "folder" and options.execute == 2 and options.sampling == {"temperature": "0.5"}
    return FakePolicy()

command.load_policy = load_policy
command.define_flags()
cli.run(command.main)
"""


def test_flags_that_say_nothing_are_refused(tmp_path: Path) -> None:
    assert cli.parse_pairs("field", ["a=b/c", "state=d,e=f"]) == {"a": "b/c", "state": "d,e=f"}
    for texts in (["a"], ["a="], ["=b"], ["a=b", "a=c"]):
        with pytest.raises(ConfigError, match="--field .*must be NAME=VALUE"):
            cli.parse_pairs("field", texts)
    file = tmp_path / "token"
    file.write_text("secret\n")
    assert read_token(None, None) == "" and read_token("word", None) == "word"
    assert read_token(None, str(file)) == "secret"
    for token, path, reason in (
        ("word", str(file), "not both"),
        ("", None, "one word"),
        ("two words", None, "one word"),
        (None, str(tmp_path / "missing"), "cannot be read"),
    ):
        with pytest.raises(ConfigError, match=reason):
            read_token(token, path)


def test_a_policy_is_served_as_the_flags_say_until_sigterm(tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    given = ["--model=folder", "--port=0", f"--token_file={tmp_path / 'token'}", "--field=state=joints,gripper"]
    settings = ["--execute=2", "--sampling=temperature=0.5", "--max_message_mib=1"]
    command = [sys.executable, "-c", SCRIPT, *given, *settings]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            url = next(found[0] for line in process.stderr if (found := re.search(r"ws://[\d.:]+", line)))
            with pytest.raises(InvalidStatus, match="401"):
                PolicyClient(url)
            with PolicyClient(url, "secret") as client:
                with pytest.raises(RequestError, match=r"^joints \+ gripper is missing"):
                    client.infer(observation())
                answer = client.infer(observation(joints=[4.0, 5.0], gripper=6.0))
                assert answer["actions"][0, 2:].tolist() == [4, 5, 6]
                process.send_signal(signal.SIGTERM)
                assert process.wait(30) == 0
            assert "Stopped." in process.stderr.read()
        finally:
            process.kill()


def test_a_folder_that_is_no_model_ends_the_command_with_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.serve", "--model", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .* holds no policy; .*\n", done.stderr)
