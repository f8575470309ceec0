"""Training: sharding, state, optimiser, checkpoints, writers and the loop."""
