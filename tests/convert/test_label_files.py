"""Instructions in the files that lie beside recordings: where they are found, and what one bad entry costs."""

from __future__ import annotations

import csv
import io
import json
import unicodedata
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from como_jax.convert.instructions import Instructions, read_instructions
from como_jax.convert.report import summarize
from como_jax.convert.video_folder.builder import VideoFolder, VideoFolderSettings
from como_jax.data.episode_table import read_episode_table

SSV2 = [
    {"id": "78687", "label": "holding a potato", "template": "Holding [something]", "placeholders": ["a potato"]},
    {"id": "42326", "label": "pushing a chilli", "template": "Pushing [something]", "placeholders": ["a chilli"]},
]
BOTH = {"78687": ("holding a potato",), "42326": ("pushing a chilli",)}


def read(root: Path, recordings: list[str], column: str | None = None) -> Instructions:
    """The instructions of recordings that need not exist."""
    files = sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())
    return read_instructions(epath.Path(root), files, recordings, column)


def write(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_bytes(text.encode("utf-8", "surrogateescape"))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("train.json", SSV2),
        ("labels/train.json", SSV2),
        ("annotations/deep/labels.json", {"78687": "holding a potato", "42326": "pushing a chilli"}),
        ("labels/captions.json", {"videos/78687.webm": ["holding a potato"], "42326": {"caption": "pushing a chilli"}}),
        ("annotations.json", {"info": {"year": 2026}, "annotations": [{"video_id": row["id"], **row} for row in SSV2]}),
        (
            "metadata.jsonl",
            "".join(json.dumps({"file_name": f"videos/{r['id']}.webm", "text": r["label"]}) + "\n" for r in SSV2),
        ),
        ("videos/metadata.csv", "file_name,text\n78687.webm,holding a potato\n42326.webm,pushing a chilli\n"),
        ("train.csv", "78687;holding a potato\n42326;pushing a chilli\n"),
        ("labels.tsv", "video_id\tlabel\n78687\tholding a potato\n42326\tpushing a chilli\n"),
        (
            "a.csv",
            '\ufeffpath,caption\r\n"videos\\78687.mp4","holding a potato"\r\n.\\videos\\42326.mp4,pushing a chilli\r\n',
        ),
        ("a.csv", "path,caption\n/home/me/videos/78687.webm,holding a potato\n/data/42326.mp4,pushing a chilli\n"),
    ],
)
def test_label_files_of_public_layouts_are_read(tmp_path, file, content):
    write(tmp_path / file, content)
    found = read(tmp_path, [f"videos/{name}.webm" for name in BOTH])
    assert found.by_name == {f"videos/{name}.webm": texts for name, texts in BOTH.items()}
    assert found.warnings == []
    assert found.label_files == [file]


def test_parquet_and_a_text_beside_each_recording(tmp_path):
    pq.write_table(pa.table({"file_name": ["a.mp4"], "text": ["push"]}), tmp_path / "metadata.parquet")
    write(tmp_path / "b.txt", "pull\n")
    write(tmp_path / "labels" / "c.json", {"caption": "lift", "fps": 3})
    write(tmp_path / "README.txt", "about these clips")
    found = read(tmp_path, ["a.mp4", "b.mp4", "c.mp4"])
    assert found.by_name == {"a.mp4": ("push",), "b.mp4": ("pull",), "c.mp4": ("lift",)}
    assert found.warnings == []


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_names_in_other_forms_of_unicode(tmp_path, form):
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    write(tmp_path / "l.json", {unicodedata.normalize(form, "öffnen/é.mp4"): "open"})
    recording = unicodedata.normalize(other, "öffnen/é.mp4")
    assert read(tmp_path, [recording]).by_name == {recording: ("open",)}


def test_a_name_that_could_be_several_recordings_is_not_guessed(tmp_path):
    write(tmp_path / "l.json", {"x/1.mp4": "push", "a/1": "pull"})
    found = read(tmp_path, ["a/1.mp4", "b/1.mp4"])
    assert found.by_name == {"a/1.mp4": ("pull",)}
    assert found.warnings[0] == "l.json: 1 of 2 entries name no recording, such as 'x/1.mp4'"


def test_annotations_of_parts_of_a_recording_are_not_taken_for_all_of_it(tmp_path):
    header = "video_id,start_frame,stop_frame,narration"
    write(tmp_path / "epic.csv", f"{header}\nP01,1,9,open door\nP01,9,20,close door\nP02,1,9,wash cup\n")
    found = read(tmp_path, ["P01.mp4", "P02.mp4"])
    assert found.by_name == {"P02.mp4": ("wash cup",)}
    assert "2 of 3 entries hold no instruction: 'P01' (it is about a part of the recording" in found.warnings[0]


def test_capital_letters_and_other_encodings(tmp_path):
    (tmp_path / "a.csv").write_bytes("file,text\nclip.MP4,öffne\n".encode("utf-16"))
    assert read(tmp_path, ["Clip.mp4"]).by_name == {"Clip.mp4": ("öffne",)}
    write(tmp_path / "a.csv", "file,text\nclip.MP4,open\n")
    assert read(tmp_path, ["Clip.mp4", "CLIP.mp4"]).by_name == {}


def test_several_texts_of_a_recording_are_kept_and_the_language_chooses_the_field(tmp_path):
    write(tmp_path / "a.csv", "file,text\n1,push\n1,push it\n1,push\n")
    write(tmp_path / "b.json", {"1": ["push", "shove"]})
    assert read(tmp_path, ["1.mp4"]).by_name == {"1.mp4": ("push", "push it", "shove")}
    write(tmp_path / "train.json", SSV2)
    assert read(tmp_path, ["78687.webm"], "template").by_name == {"78687.webm": ("Holding [something]",)}
    assert read(tmp_path, ["78687.webm"], "") == Instructions({}, [], [])


def test_what_looks_like_labels_and_is_not_read_is_named(tmp_path):
    write(tmp_path / "captions.xml", "<a/>")
    write(tmp_path / "train.json", [{"id": "1"}])
    write(tmp_path / "notes.txt", "nothing")
    found = read(tmp_path, ["1.mp4"])
    assert found.label_files == ["captions.xml", "train.json"]
    assert "captions.xml: not understood as language instructions: such files are not read" in found.warnings[0]
    assert "train.json: not understood as language instructions: expected a field" in found.warnings[1]


def test_a_conversion_that_loses_all_language_says_so_last(tmp_path, make_video):
    make_video(tmp_path / "clips" / "1.mp4", num_frames=3)
    write(tmp_path / "clips" / "train.json", [{"id": "1", "words": "push"}])

    def lines(**chosen: Any) -> list[str]:
        chosen = {"source": str(tmp_path / "clips"), "control_rate": 3.0} | chosen
        name = f"out_{chosen.get('language')}"
        return summarize(VideoFolder(tmp_path / name, VideoFolderSettings(**chosen)).convert(), "OUT")

    assert lines()[-1] == "NO EPISODE HAS AN INSTRUCTION, although this looks like labels: train.json"
    for language in ("words", ""):
        assert lines(language=language)[-1] == "the full report is OUT/conversion_report.json"


def test_several_texts_are_stored(tmp_path, make_video):
    make_video(tmp_path / "clips" / "1.mp4", num_frames=3)
    write(tmp_path / "clips" / "l.json", {"1": ["push", "shove"]})
    VideoFolder(tmp_path / "out", VideoFolderSettings(source=str(tmp_path / "clips"), control_rate=3.0)).convert()
    (row,) = read_episode_table(tmp_path / "out", "train").to_pylist()
    assert (row["language_instruction"], row["other_instructions"]) == ("push", ["shove"])


NAMES = ("a", "b", "c", "d")
TEXTS = {name: f'do "{name}", then\u00e4 stop' for name in NAMES}


def as_json(bad: str, damage: str) -> str:
    entries = [f"{json.dumps(name)}: {damage if name == bad else json.dumps(TEXTS[name])}" for name in NAMES]
    return "{" + ",\n".join(entries) + "}"


def as_list(bad: str, damage: str) -> str:
    rows = [
        f'{{"id": {json.dumps(name)}, "label": {damage if name == bad else json.dumps(TEXTS[name])}}}' for name in NAMES
    ]
    return "[" + ",\n".join(rows) + "]"


def as_lines(bad: str, damage: str) -> str:
    return as_list(bad, damage)[1:-1].replace("},\n", "}\n")


def as_csv(bad: str, damage: str) -> str:
    rows = io.StringIO()
    writer = csv.writer(rows)
    writer.writerow(["video", "text"])
    for name in NAMES:
        if name == bad:
            rows.write(f"{name}{damage}\n")
        else:
            writer.writerow([name, TEXTS[name]])
    return rows.getvalue()


JSON_DAMAGE = [
    "null",
    "3",
    "NaN",
    "[]",
    '""',
    '"  "',
    '"\\ud800"',
    '"\udcff"',
    "tru",
    '"open',
    '"\\x"',
    "",
    '{"x": 1}',
    "[1]",
]
CSV_DAMAGE = [",12", ",NaN", "", ",", ',"open', ',"op"en"', ",\udcff", ',"op\nen', ",\x00"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(
        [("l.json", as_json, each) for each in JSON_DAMAGE]
        + [("l.json", as_list, each) for each in JSON_DAMAGE]
        + [("l.jsonl", as_lines, each) for each in JSON_DAMAGE]
        + [("l.csv", as_csv, each) for each in CSV_DAMAGE]
    ),
    st.sampled_from(NAMES),
)
def test_any_damaged_entry_costs_that_entry_alone_and_is_listed(tmp_path, kind, bad):
    file, write_labels, damage = kind
    for path in tmp_path.iterdir():
        path.unlink()
    write(tmp_path / file, write_labels(bad, damage))
    found = read(tmp_path, [f"{name}.mp4" for name in NAMES])
    assert found.by_name == {f"{name}.mp4": (TEXTS[name],) for name in NAMES if name != bad}
    assert any(message.startswith(f"{file}: ") and "hold no instruction" in message for message in found.warnings)
    assert any(f"{quote}{bad}{quote}" in message for message in found.warnings for quote in "'\"")
