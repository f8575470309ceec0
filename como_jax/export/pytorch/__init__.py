"""Writes a trained model for robots, in PyTorch's formats; see `__main__`."""
