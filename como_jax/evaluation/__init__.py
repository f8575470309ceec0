"""Metrics of latent motion that need no policy."""
