"""Trajectories of the Procgen games."""
