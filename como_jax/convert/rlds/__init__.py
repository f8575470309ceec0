"""RLDS builder directories, as written by TFDS, without TensorFlow."""
