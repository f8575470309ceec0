"""Metrics of latent motion, success of policies in simulators, sweeps over settings, and the report."""
