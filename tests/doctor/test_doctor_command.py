"""The command: what it prints and writes, and where it refuses to."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from etils import epath

from tools import doctor

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def clips(tmp_path, write_clip):
    """A folder of videos with a fault: no control rate."""
    folder = tmp_path / "clips"
    for seed in range(2):
        write_clip(folder / f"<b>{seed}.mp4", seed, num_frames=20, codec="mpeg4")
    return folder


def run(*arguments: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": "", "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


class References(HTMLParser):
    """Tags and whatever a page refers to."""

    def __init__(self):
        super().__init__()
        self.tags, self.references = [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href")]


def test_it_prints_and_writes_the_same(clips, tmp_path):
    result = run("-m", "tools.doctor", clips, "--json", tmp_path / "found.json", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert lines[0] == "clips"
    assert lines[-1] == "the report is clips_doctor.html"
    found = json.loads((tmp_path / "found.json").read_text())
    page = (tmp_path / "clips_doctor.html").read_text()
    assert [finding["name"] for finding in found["findings"]][0] == "suspicious-frame-rate"
    printed = " ".join(result.stdout.split())
    for finding in found["findings"]:
        assert finding["message"] in printed and finding["advice"] in printed
    parsed = References()
    parsed.feed(page)
    assert parsed.references and all(re.match("data:image/png;base64,", uri) for uri in parsed.references)
    assert parsed.tags.count("img") == 2 + 2 and "b" not in parsed.tags
    assert len(list(clips.iterdir())) == 2


def test_strict_makes_faults_an_error(clips, tmp_path):
    result = run("-m", "tools.doctor", clips, "--strict", "--out", tmp_path, cwd=clips)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == f"error: {clips} has errors or warnings, see above."
    assert (tmp_path / "clips_doctor.html").exists()


@pytest.mark.parametrize(
    ("out", "page"),
    [("new", "new/d_doctor.html"), ("new.d/x", "new.d/x/d_doctor.html"), ("a/b.html", "a/b.html"), ("B.HTM", "B.HTM")],
)
def test_out_is_a_folder_unless_it_ends_in_html(tmp_path, monkeypatch, out, page):
    monkeypatch.chdir(tmp_path)
    assert doctor.page_path(epath.Path("d"), out) == epath.Path(page)


# One process for all mistakes, since the imports take longer than finding them.
RUN_ALL = """
import contextlib, io, json, sys
from absl.testing import flagsaver
from como_jax import cli
from tools import doctor
doctor.define_flags()
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, errors = ["doctor", *arguments], io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(errors):
        try:
            cli.run(doctor.main)
        except SystemExit as exit:
            found.append((exit.code, errors.getvalue()))
print(json.dumps(found))
"""


def test_a_mistake_is_one_line_and_status_2(clips, tmp_path):
    cases = {
        "Expected the folder of one dataset": [],
        "gone is not a folder": ["gone"],
        "lies in the dataset, which is left as it is": ["clips", "--out", "clips/report.html"],
        "control_rate must be a positive number": ["clips", "--control_rate", "-1"],
        "mine.json was not made by this project, and is not replaced": ["clips", "--json", "mine.json"],
    }
    (tmp_path / "mine.json").write_text("[1, 2]")
    result = run("-c", RUN_ALL, json.dumps(list(cases.values())), cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for message, (status, errors) in zip(cases, json.loads(result.stdout), strict=True):
        assert status == 2 and errors.startswith("error: ") and message in errors and errors.count("\n") == 1
    assert not list(tmp_path.glob("*.html"))
