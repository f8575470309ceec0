"""Latent motion learned from action-free videos, and robot policies trained with it."""
