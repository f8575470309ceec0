"""Measurements; each prints its figures with machine, shapes and dtype."""
