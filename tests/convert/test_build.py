"""The command line: what a user types, and what the user reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from como_jax.convert.catalog import make_settings
from como_jax.errors import ConversionError

REPOSITORY = Path(__file__).resolve().parents[2]

RUN_AND_LIST_MODULES = """
import runpy, sys
sys.argv = ["build", *sys.argv[1:]]
try:
    runpy.run_module("tools.datasets.build", run_name="__main__", alter_sys=True)
except SystemExit as exit:
    assert not exit.code, exit.code
print("heavy modules:", sorted({"tensorflow", "torch"} & set(sys.modules)))
"""


# One process for all mistakes, since the imports take longer than finding them.
RUN_ALL = """
import contextlib, dataclasses, io, json, sys
from absl.testing import flagsaver
from como_jax import cli
from como_jax.convert import catalog
from tools.datasets import build
classes = [builder.settings_class for builder in catalog.BUILDERS.values()]
settings = {field.name for each in classes for field in dataclasses.fields(each)}
flags = {flag.name for flag in build._SETTINGS}
assert settings == flags, settings ^ flags
found = []
for arguments in json.loads(sys.argv[1]):
    sys.argv, errors = ["build", *arguments], io.StringIO()
    with flagsaver.flagsaver(), contextlib.redirect_stderr(errors):
        try:
            cli.run(build.main)
        except SystemExit as exit:
            found.append((exit.code, errors.getvalue()))
print(json.dumps(found))
"""


def run(*command: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=120
    )


def test_a_conversion_says_what_it_did_and_imports_no_other_framework(tmp_path, make_video, check_dataset):
    for name in "abcdef":
        make_video(tmp_path / "clips" / f"{name}.mp4")
    (tmp_path / "clips" / "g.mp4").write_text("not a video")
    out = tmp_path / "out"
    result = run("-c", RUN_AND_LIST_MODULES, "video_folder", "--source", tmp_path / "clips", "--out", out)
    assert result.returncode == 0, result.stderr
    check_dataset(out)
    lines = result.stdout.splitlines()
    assert lines[0] == f"dataset out in {out}: train 5 episodes, 60 steps; val 1 episodes, 12 steps"
    assert lines[1] == "left out: 1 of 7 sources"
    assert lines[2].startswith("  g.mp4: ")
    assert lines[3].startswith("warning: without --control_rate") and lines[3].endswith(" (6 sources)")
    assert lines[4] == f"the full report is {out}/conversion_report.json"
    assert lines[5] == "heavy modules: []"


def test_a_mistake_is_one_line_and_status_2(tmp_path):
    out = f"--out={tmp_path}/out"
    cases = {
        f"source folder {tmp_path}/gone does not exist\n": ["video_folder", f"--source={tmp_path}/gone"],
        "processes must be 1 or more, got 0\n": ["tabletop", "--processes=0"],
        "--beam_options needs --beam_runner\n": ["tabletop", "--beam_options=--project=p"],
        "--processes does not apply to --beam_runner, whose options say how many workers it has\n": [
            *("tabletop", "--beam_runner=SparkRunner", "--processes=2")
        ],
        "unknown tasks ['juggle']": ["tabletop", "--episodes=3", "--tasks=juggle"],
        # What the library calls a setting is a flag for whoever types it.
        "--camera does not apply to tabletop\n": ["tabletop", "--camera=a"],
        "video_folder needs --source: ": ["video_folder"],
    }
    result = run("-c", RUN_ALL, json.dumps([[*arguments, out] for arguments in cases.values()]))
    assert result.returncode == 0, result.stderr
    for message, (status, errors) in zip(cases, json.loads(result.stdout), strict=True):
        (line,) = [line for line in errors.splitlines() if line.strip() and "source/s" not in line]
        assert status == 2 and f"{line}\n".startswith(f"error: {message}")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("builder", "given", "message"),
    [
        (
            "robomimic",
            {},
            "unknown builder 'robomimic'; there are calvin, lerobot, libero, libero_sim, metaworld, npz, procgen, "
            "rlds, tabletop, video_folder",
        ),
        ("tabletop", {"camera": ("a",)}, "`camera` does not apply to tabletop"),
        ("video_folder", {"source": "clips", "episodes": 3}, "`episodes` does not apply to video_folder"),
        ("video_folder", {}, "video_folder needs `source`: "),
        ("rlds", {"control_rate": 5.0}, "rlds needs `source`: "),
    ],
)
def test_flags_that_do_not_fit_the_builder(builder, given, message):
    with pytest.raises(ConversionError) as error:
        make_settings(builder, given)
    assert str(error.value).startswith(message)
