"""Exports trained models for robots, in formats of PyTorch; see `tools.export_torch`."""
