"""The page says what was measured, shows it, and needs nothing else."""

import base64
import dataclasses
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from como_jax.data.mixture import MixtureEntry
from como_jax.evaluation import figures, report
from como_jax.evaluation.latents.measures import transfer_motion
from como_jax.evaluation.latents.transitions import DatasetResult, EvaluationSet, Transitions, measure, summarize
from como_jax.evaluation.report import Report, TransferStrip, transfer_strips, write_report


class Page(HTMLParser):
    """Tags with their attributes, text, and rows of tables."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.words, self.rows, self.in_row = [], [], [], False
        self.feed(text)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
            self.in_row = True

    def handle_endtag(self, tag):
        self.in_row = self.in_row and tag != "tr"

    def handle_data(self, data):
        self.words.append(data)
        if self.in_row and data.strip():
            self.rows[-1].append(data.strip())

    def images(self) -> list[Image.Image]:
        addresses = [attributes["src"] for tag, attributes in self.tags if tag == "img"]
        return [Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))) for address in addresses]


@pytest.fixture(scope="module")
def held_out(tabletop_dataset: Path) -> EvaluationSet:
    entries = [MixtureEntry(str(tabletop_dataset))]
    return EvaluationSet.open_all(entries, gap_seconds=0.3, image_size=16, camera="", repeats=False)[1]


def made_up(num_episodes: int = 3, seed: int = 0) -> Transitions:
    """Random latents whose first number is the second dimension of the action; the others are noise."""
    rng, count = np.random.default_rng(seed), 8 * num_episodes
    past, future, back = rng.normal(size=(3, count, 2, 3))
    action = rng.normal(size=(count, 2, 6))
    action[:, 0, 1], action[:, 1, 1] = past[:, 0, 0], future[:, 0, 0]
    images = [list(rng.uniform(size=(4, 16, 16, 3))) for _ in range(2)]
    scores = np.full(count, 0.1)
    return Transitions(
        past, future, back, scores, scores, scores, scores, np.arange(count) % num_episodes, action, images
    )


def with_instructions(item: EvaluationSet, name: str, instructions: list[str]) -> EvaluationSet:
    source = object.__new__(type(item.source))
    source.__dict__.update(item.source.__dict__, instruction=instructions)
    return dataclasses.replace(item, name=name, part=dataclasses.replace(item.part, source=source))


def make_report(results: list[DatasetResult], **changes) -> Report:
    strip = TransferStrip("to and fro", np.zeros((5, 16, 16, 3), np.uint8), np.ones((5, 16, 16, 3), np.float32))
    fields = {"title": "A run", "facts": {"Step": "7"}, "notes": [], "metrics": summarize(results), "transfer": [strip]}
    return Report(**{**fields, **changes}, results=results)


def render(tmp_path: Path, made: Report) -> Page:
    write_report(tmp_path / "report.html", made)
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    return Page((tmp_path / "report.html").read_text())


@pytest.fixture(scope="module")
def result(held_out) -> DatasetResult:
    item = with_instructions(held_out, "one", ["push", "pull", "push"])
    return measure(item, made_up(), made_up(seed=1))


def test_the_page_refers_to_nothing_outside_it(tmp_path: Path, result):
    page = render(tmp_path, make_report([result]))
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "base")
        for name in ("src", "href", "srcset", "data", "action", "background"):
            assert attributes.get(name, "data:image/png;base64,").startswith("data:image/png;base64,")
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"https?:|//[a-z]|url\(|@import", re.sub(r"base64,[\w+/=]+", "", text))


def test_every_metric_stands_beside_what_good_is(tmp_path: Path, result):
    page = render(tmp_path, make_report([result]))
    rows = {row[0]: row[1:] for row in page.rows if row}
    for name, (title, good) in report.METRICS.items():
        if name in result.metrics:
            assert rows[title] == [report.format_number(result.metrics[name]), good]
    assert {"psnr", "ssim", "s_pcfc", "lp_mse", "lp_r2", "transitions"} <= set(report.METRICS) & set(result.metrics)
    assert rows["1"][2] == report.format_number(result.probe.per_dimension_r2[1])


def test_images_are_all_there(tmp_path: Path, result):
    images = render(tmp_path, make_report([result])).images()
    # Reconstructions, transfer, components, similarity, histogram.
    assert len(images) == 5
    assert images[0].size == (4 * 132, 2 * 132) and images[1].size == (5 * 100, 2 * 100)
    assert all(np.asarray(image.convert("RGB")).std() > 10 for image in images)


def test_several_datasets_have_columns_and_a_common_cloud_of_points(tmp_path: Path, held_out, result):
    silent = with_instructions(held_out, "two", ["", "", ""])
    page = render(tmp_path, make_report([result, measure(silent, made_up(seed=3), None)], notes=["No probe of two."]))
    rows = {row[0]: row[1:] for row in page.rows if row}
    assert rows["LP-MSE"][1:3] == [report.format_number(result.metrics["lp_mse"]), "–"]
    assert rows["Transitions"][:3] == ["96 in all", "48", "48"]
    assert "No probe of two." in page.text and "All datasets together" in page.text
    assert len(page.images()) == 2 + 1 + 2 + 2


def test_without_actions_the_page_says_that_there_is_nothing_to_colour_by(tmp_path: Path, held_out):
    item = with_instructions(held_out, "silent", ["", "", ""])
    page = render(tmp_path, make_report([measure(item, made_up(), None)], transfer=[]))
    assert "without a probe of its actions" in page.text and "No two clips" in page.text


def test_text_of_a_dataset_cannot_change_the_page(tmp_path: Path, held_out):
    hostile = with_instructions(held_out, "<script>alert(1)</script>", ["$x_", "$$", "<b>"])
    page = render(tmp_path, make_report([measure(hostile, made_up(), None)], title="<i>&"))
    assert not {"script", "i", "b"} & {tag for tag, _ in page.tags}
    assert "<script>alert(1)</script>" in page.text


def test_the_probe_s_best_dimensions_colour_the_components(result, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "action_figure", lambda *found: drawn.update(found=found) or figures.Figure())
    report.component_images([result])
    coordinates, shares, action, titles = drawn["found"]
    assert coordinates.shape == (48, 2) and action.shape == (48, 4) and titles[0].startswith("action 1, R² ")
    np.testing.assert_array_equal(action[:, 0], result.found.latent_action[:, 1])
    assert 0 < shares[1] <= shares[0] < 1


def test_episodes_are_ordered_by_dataset_and_instruction_and_thinned_out(held_out, monkeypatch):
    drawn = {}
    monkeypatch.setattr(figures, "similarity_figure", lambda *found: drawn.update(found=found) or figures.Figure())
    instructions = [f"task {number % 7}" for number in range(100)]
    items = [with_instructions(held_out, name, instructions) for name in "ab"]
    results = [measure(item, made_up(100, seed), None) for seed, item in enumerate(items)]
    image = report.similarity_image(results)
    matrix, labels, groups = drawn["found"]
    assert image.title == "60 of 200 episodes" and matrix.shape == (60, 60)
    assert labels == sorted(labels) and groups == sorted(groups) and set(groups) == {"a", "b"}
    latent, episode = results[0].found.latent, results[0].found.latent_episode
    first, last = (latent[episode == row].mean(axis=0) for row in (0, 0))
    assert matrix[0, 0] == pytest.approx(first @ last / np.linalg.norm(first) ** 2)


def test_motion_is_played_from_the_start_of_another_clip(held_out, make_como, como_params):
    model, notes = make_como(), []
    strips = transfer_strips(model, como_params, [held_out], 3, notes)
    assert len(strips) == 3 and not notes
    play = jax.jit(lambda params, source, first: transfer_motion(model.bind(params), source, first))
    for strip, target in zip(strips, [*strips[1:], strips[0]], strict=True):
        np.testing.assert_allclose(strip.rollout[0] * 255, target.source[0], atol=1e-3)
        expected = play(como_params, strip.source[None], target.source[None, 0])[0]
        np.testing.assert_allclose(strip.rollout, expected, atol=0.02)


def test_motion_is_played_in_the_next_dataset(held_out, make_como, como_params):
    items = [dataclasses.replace(held_out, name=name) for name in ("a", "b")]
    strips = transfer_strips(make_como(), como_params, items, 4, [])
    assert [strip.caption[0] for strip in strips] == ["a", "a", "b", "b"]
    assert ["in the scene of b" in strip.caption for strip in strips] == [True, True, False, False]


def test_short_episodes_give_short_strips_and_a_note(tabletop_dataset: Path, make_como, como_params):
    entries = [MixtureEntry(str(tabletop_dataset))]
    probe = EvaluationSet.open_all(entries, gap_seconds=0.1, image_size=16, camera="")[1].source
    # Four instants fit into the longest episode, five do not.
    gap = float(-(-probe.length.max() // 4) / probe.control_rate[0])
    item = EvaluationSet.open_all(entries, gap_seconds=gap, image_size=16, camera="")[1]
    notes: list[str] = []
    strips = transfer_strips(make_como(), como_params, [item], 2, notes)
    assert strips[0].rollout.shape == (4, 16, 16, 3)
    assert notes == ["tabletop: motion transfer over 4 frames, since its episodes are short."]
