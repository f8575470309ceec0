"""CALVIN datasets, as published: one npz file a step, ranges of steps, and language annotations."""
