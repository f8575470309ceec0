"""What latent motion holds: probes, similarity, drift and transfer."""
