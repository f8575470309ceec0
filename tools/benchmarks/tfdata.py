"""A tf.data loader of RLDS files as public training code has it, to compare with; needs TensorFlow."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from como_jax.data.mixture import MixturePart

_SHUFFLE_BUFFER = 10_000


def is_available() -> bool:
    """Whether TensorFlow is installed."""
    return importlib.util.find_spec("tensorflow") is not None


def write_rlds(path: Path, part: MixturePart) -> Path:
    """Writes a dataset's episodes to a TFRecord file, one record each, with the JPEGs of its steps."""
    tf = _tensorflow()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for start, length in zip(part.source.start, part.source.length, strict=True):
            jpegs = part.source.read_jpegs(range(start, start + length))
            feature = tf.train.Feature(bytes_list=tf.train.BytesList(value=jpegs))
            features = tf.train.Features(feature={"steps/observation/image": feature})
            writer.write(tf.train.Example(features=features).SerializeToString())
    return path


def batches(path: Path, gap: int, batch_size: int, image_size: int, shift: int, threads: int) -> Iterator[np.ndarray]:
    """Shuffled pairs uint8 `[B, 2, S, S, 3]`: episodes are cut into pairs, and only pairs that are drawn are decoded.

    The filter is bilinear and frames are shifted alike, as in the pipeline that this is compared with.
    """
    tf = _tensorflow()

    def pairs(record: Any) -> Any:
        steps = tf.io.parse_single_example(record, {"steps/observation/image": tf.io.VarLenFeature(tf.string)})
        jpegs = steps["steps/observation/image"].values
        return tf.data.Dataset.from_tensor_slices(tf.stack([jpegs[:-gap], jpegs[gap:]], axis=1))

    def frame(jpeg: Any, down: Any, right: Any) -> Any:
        picture = tf.io.decode_jpeg(jpeg, channels=3)
        side = tf.reduce_min(tf.shape(picture)[:2])
        picture = tf.image.resize_with_crop_or_pad(picture, side, side)
        picture = tf.cast(tf.image.resize(picture, (image_size, image_size)), tf.uint8)
        padded = tf.pad(picture, [[shift, shift], [shift, shift], [0, 0]], "SYMMETRIC")
        return tf.slice(padded, [shift + down, shift + right, 0], [image_size, image_size, 3])

    def clip(jpegs: Any) -> Any:
        down, right = tf.unstack(tf.random.uniform([2], -shift, shift + 1, tf.int32))
        return tf.stack([frame(jpegs[0], down, right), frame(jpegs[1], down, right)])

    options = tf.data.Options()
    options.threading.private_threadpool_size = threads
    dataset = tf.data.TFRecordDataset(str(path)).repeat().flat_map(pairs).shuffle(_SHUFFLE_BUFFER)
    dataset = dataset.map(clip, num_parallel_calls=threads).batch(batch_size).prefetch(2)
    return dataset.with_options(options).as_numpy_iterator()


def _tensorflow() -> Any:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    import tensorflow

    tensorflow.config.set_visible_devices([], "GPU")
    return tensorflow
