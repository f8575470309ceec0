"""Evaluations from end to end: what they write, and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from como_jax.convert.catalog import BUILDERS, make_settings
from como_jax.data.episode_table import write_episodes
from como_jax.errors import ConfigError, DatasetError, OutputError, RunError
from como_jax.evaluation.latents.probes import ProbeError
from como_jax.ownership import MARK
from configs import pretrain_como, pretrain_mae
from experiments.evaluate import evaluate
from experiments.extract_labels import extract_labels
from experiments.pretrain import pretrain

SIZES = {"num_transitions": 20, "batch_size": 8, "num_images": 2}


def train(recipe, dataset: Path, workdir: Path) -> Path:
    config = recipe.get_config("smoke")
    config.update_from_flattened_dict({"data.mixture": str(dataset), "data.gap_seconds": 0.3, "train.stop_after": 1})
    pretrain(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def run(tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(pretrain_como, tabletop_dataset, tmp_path_factory.mktemp("runs") / "como")


@pytest.fixture(scope="module")
def evaluated(run: Path) -> tuple[Path, dict]:
    """Directory and metrics of an evaluation with default data and directory."""
    return run / "report", evaluate(run, **SIZES)


def without_actions(dataset: Path, directory: Path, *splits: str) -> Path:
    """A copy of a dataset, with the given splits alone, whose actions are forgotten."""
    shutil.copytree(dataset, directory)
    for path in directory.glob("episodes-*.parquet"):
        if path.stem.removeprefix("episodes-") not in splits:
            path.unlink()
            continue
        rows = pq.read_table(path).to_pylist()
        write_episodes(path, [{**row, "action": None} for row in rows])
    return directory


def test_metrics_and_page_are_written(evaluated):
    out, metrics = evaluated
    assert sorted(path.name for path in out.iterdir()) == [MARK, "metrics.json", "report.html"]
    assert json.loads((out / "metrics.json").read_text()) == metrics
    needed = {"lp_mse", "lp_mse_mean_action", "lp_r2", "s_pcfc", "s_pcfc_by_token", "psnr", "psnr_copy", "psnr_gain"}
    assert needed | {"ssim", "ssim_copy", "effective_rank", "lp_mse/0"} <= set(metrics)
    assert metrics["step"] == 1 and metrics["family"] == "como"
    assert metrics["transitions"] == 20
    assert np.mean([metrics[f"lp_mse/{k}"] for k in range(4)]) == pytest.approx(metrics["lp_mse"])
    page = (out / "report.html").read_text()
    assert "8 tokens of 16 numbers" in page and "20 transitions" in page and page.count("<img") >= 5


@pytest.mark.slow
def test_a_dataset_without_actions_gives_a_report_without_the_probe(
    run: Path, tabletop_dataset: Path, tmp_path: Path, evaluated
):
    silent = without_actions(tabletop_dataset, tmp_path / "silent", "train", "val")
    metrics = evaluate(run, str(silent), tmp_path / "out", **SIZES)
    assert not any(name.startswith("lp_") for name in metrics)
    assert metrics["psnr"] == pytest.approx(evaluated[1]["psnr"])
    assert "No probe of tabletop: the dataset has no actions." in (tmp_path / "out" / "report.html").read_text()

    both = evaluate(run, f"{silent},{tabletop_dataset}", tmp_path / "both", **SIZES)
    assert both["lp_mse"] == both["1_tabletop/lp_mse"] == pytest.approx(evaluated[1]["lp_mse"])
    assert "0_tabletop/lp_mse" not in both and both["transitions"] == 40


def test_a_dataset_without_held_out_episodes_is_measured_on_training_ones_and_labelled(
    run: Path, tabletop_dataset: Path, tmp_path: Path
):
    trained = without_actions(tabletop_dataset, tmp_path / "trained", "train")
    metrics = evaluate(run, str(trained), tmp_path / "out", **SIZES)
    assert metrics["transitions"] == 20
    page = (tmp_path / "out" / "report.html").read_text()
    assert "measured on training episodes" in page and "split train" in page


def test_too_few_episodes_for_the_probe_are_an_error_and_no_number(run: Path, tabletop_dataset: Path, tmp_path: Path):
    few = tmp_path / "few"
    BUILDERS["tabletop"](few, make_settings("tabletop", {"episodes": 2}), None).convert()
    with pytest.raises(ProbeError, match=f"{few}: the linear probe needs .*--noprobe"):
        evaluate(run, str(few), tmp_path / "out", **SIZES)
    assert not (tmp_path / "out" / "metrics.json").exists()
    metrics = evaluate(run, str(few), tmp_path / "out", **SIZES, probe=False)
    assert "lp_mse" not in metrics and metrics["psnr"] > 0


@pytest.mark.slow
def test_a_run_of_a_family_without_latent_motion_is_refused_by_name(tabletop_dataset: Path, tmp_path: Path):
    workdir = train(pretrain_mae, tabletop_dataset, tmp_path / "mae")
    with pytest.raises(RunError, match="run of family 'mae', which has no latent motion; take one of como, laq"):
        evaluate(workdir, **SIZES)


def test_a_checkpoint_of_another_shape_is_refused_by_name(run: Path, tmp_path: Path):
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    config = json.loads((copy / "config.json").read_text())
    config["model"]["latent_dim"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match=r"idm/.* is \(.*16.*\) there and \(.*5.*\) here"):
        evaluate(copy, **SIZES)

    del config["model"]["latent_dim"], config["model"]["tcl_weight"]
    config["model"]["latent_dmi"] = 5
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="config.json does not describe a model of this version: .*latent_dmi"):
        evaluate(copy, **SIZES)

    (copy / "config.json").write_text("{")
    with pytest.raises(RunError, match="config.json is damaged"):
        evaluate(copy, **SIZES)


def test_what_is_not_there_is_refused(run: Path, tabletop_dataset: Path, tmp_path: Path):
    with pytest.raises(RunError, match="`workdir` .*nothing holds no run"):
        evaluate(tmp_path / "nothing", **SIZES)
    with pytest.raises(DatasetError, match="/nowhere is not a dataset directory"):
        evaluate(run, "/nowhere", tmp_path / "out", **SIZES)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="`out` .* cannot be written"):
        evaluate(run, None, tmp_path / "file" / "out", **SIZES)


@pytest.fixture(scope="module")
def labelled(run: Path, tabletop_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two copies of the demonstrations, with labels of the run."""
    folder = tmp_path_factory.mktemp("labelled")
    first, second = folder / "robot", folder / "hand"
    extract_labels(run, tabletop_dataset, first, drift=False)
    shutil.copytree(first, second)
    return first, second


@pytest.mark.slow
def test_labelled_datasets_are_compared_by_instruction_or_class(run: Path, labelled: tuple[Path, Path], tmp_path: Path):
    text = ",".join(map(str, labelled))
    evaluate(run, None, tmp_path / "out", **SIZES, probe=False, labelled=text)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {MARK, "metrics.json", "report.html", "domains.json", "domains.png"}
    found = json.loads((out / "domains.json").read_text())
    assert found["names"] == ["robot", "hand"]
    assert found["same"][0][1] == found["same"][1][0] > found["same"][0][0], "an episode meets its copy elsewhere alone"
    assert found["gap"][0][1] == pytest.approx(found["same"][0][1] - found["other"][0][1])
    page = (out / "report.html").read_text()
    assert "Transfer between domains" in page and "Labels of robot, hand" in page and "another model" not in page

    rows = pq.read_table(labelled[0] / "episodes-train.parquet")
    instructions = sorted(set(rows["language_instruction"].to_pylist()))
    classes = tmp_path / "classes.json"
    classes.write_text(json.dumps(dict.fromkeys(instructions[:2], "one of two")))
    evaluate(run, None, tmp_path / "classed", **SIZES, probe=False, labelled=text, action_classes=classes)
    classed = json.loads((tmp_path / "classed" / "domains.json").read_text())
    assert classed["common"][0][1] == found["common"][0][1] - 1


@pytest.mark.slow
def test_labels_that_cannot_be_compared_are_refused(
    run: Path, labelled: tuple[Path, Path], tabletop_dataset: Path, tmp_path: Path
):
    def refused(error: type[Exception], message: str, *directories: Path, classes: Path | None = None) -> None:
        with pytest.raises(error, match=message):
            text = ",".join(map(str, directories))
            evaluate(run, None, tmp_path / "out", **SIZES, labelled=text or None, action_classes=classes)

    first, second = labelled
    refused(DatasetError, "1 labelled dataset cannot be compared", first)
    refused(DatasetError, "tabletop .* has no latents; label it", first, tabletop_dataset)
    refused(DatasetError, "nowhere is not a dataset directory", first, Path("/nowhere"))
    refused(ConfigError, "--action_classes .* pass both", classes=tmp_path / "classes.json")
    refused(ConfigError, "action classes .* cannot be read", *labelled, classes=tmp_path / "classes.json")
    (tmp_path / "classes.json").write_text('["push"]')
    refused(ConfigError, "classes.json must be an object of strings", *labelled, classes=tmp_path / "classes.json")

    foreign = tmp_path / "foreign"
    shutil.copytree(second, foreign)
    origin = json.loads((foreign / "labels.json").read_text())
    (foreign / "labels.json").write_text(json.dumps({**origin, "parameters": "0"}))
    refused(DatasetError, "robot and .*foreign are labelled with another model each", first, foreign)
    (foreign / "labels.json").write_text(json.dumps({**origin, "settings": {"gap_seconds": 9}}))
    refused(DatasetError, "another gap_seconds each", first, foreign)
    (foreign / "labels.json").write_text("{}")
    refused(DatasetError, "foreign/labels.json is damaged", first, foreign)
    assert not (tmp_path / "out" / "metrics.json").exists()


@pytest.mark.slow
def test_labels_of_another_model_than_the_run_are_noted(run: Path, labelled: tuple[Path, Path], tmp_path: Path):
    copies = [tmp_path / directory.name for directory in labelled]
    for directory, copy in zip(labelled, copies, strict=True):
        shutil.copytree(directory, copy)
    origin = json.loads((copies[0] / "labels.json").read_text())
    (copies[0] / "labels.json").write_text(json.dumps({**origin, "parameters": "0"}))
    (copies[1] / "labels.json").unlink()
    evaluate(run, None, tmp_path / "out", **SIZES, probe=False, labelled=",".join(map(str, copies)))
    page = (tmp_path / "out" / "report.html").read_text()
    assert "hand: it has no labels.json" in page and "of labels that another model than this made" in page


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--workdir must"),
        (["--workdir=/nowhere"], "--workdir /nowhere holds no run"),
    ],
)
def test_a_mistake_in_the_command_is_one_line_and_status_2(
    refused: Callable[..., str], arguments: list[str], message: str
):
    written = refused("experiments.evaluate", *arguments)
    assert message in written and "Traceback" not in written
