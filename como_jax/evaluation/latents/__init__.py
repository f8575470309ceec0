"""Metrics of latent motion that need no policy: probes, similarity, drift and transfer."""
