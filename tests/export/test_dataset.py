"""What a labelled dataset must hold, and how episodes are divided into files."""

import numpy as np
import pytest

from como_jax.errors import DatasetError
from como_jax.export.labels.dataset import LabelledDataset, file_numbers


def test_episodes_are_those_of_the_tables(labelled, rows_of):
    dataset = LabelledDataset(labelled)
    assert dataset.sizes["latent_motion"] == 6 and dataset.sizes["latent_codes"] == 2
    episodes = [episode for split in dataset.splits for episode in dataset.episodes(split)]
    for row, episode in zip(rows_of(labelled), episodes, strict=True):
        assert (episode.episode_id, episode.source_file) == (row["episode_id"], row["source_file"])
        assert len(episode) == len(episode.images["image"]) == row["num_steps"]
        np.testing.assert_array_equal(episode.latent_motion, row["latent_motion"])


def without_labels(row):
    return {**row, "latent_motion": None, "latent_valid": None, "latent_codes": None}


def without_codes_in_one_task(row):
    return {**row, "latent_codes": None} if row["episode_id"].startswith("reach") else row


def too_few_flags(row):
    return {**row, "latent_valid": row["latent_valid"][1:]}


def not_finite(row):
    return {**row, "latent_motion": [[float("nan")] * 6] * row["num_steps"]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_labels, r"split 'train' is not labelled: \d+ of \d+ episodes have no latent_motion"),
        (without_codes_in_one_task, r"is damaged: \d+ of \d+ episodes have no latent_codes, the others do"),
        (too_few_flags, r"is damaged: \d+ steps have latent_valid, of \d+"),
        (not_finite, "latent_motion that is not finite"),
    ],
)
def test_labels_must_be_complete(labelled, with_changed_rows, change, message):
    with pytest.raises(DatasetError, match=message):
        LabelledDataset(with_changed_rows(labelled, change))


def test_a_folder_without_a_dataset(tmp_path):
    with pytest.raises(DatasetError, match="is not a dataset directory"):
        LabelledDataset(tmp_path)


def test_files_take_whole_episodes():
    assert file_numbers([3, 3, 4, 20, 1, 9, 1], max_steps=10) == [0, 0, 0, 1, 2, 2, 3]
    assert file_numbers([], max_steps=10) == []
