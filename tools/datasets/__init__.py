"""Converters from any source of episodes to the one schema of `como_jax.data.schema`."""
