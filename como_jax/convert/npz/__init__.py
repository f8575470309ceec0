"""Trajectories in NumPy .npz files."""
