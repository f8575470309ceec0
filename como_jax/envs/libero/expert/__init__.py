"""A scripted expert for LIBERO's tasks."""

from como_jax.envs.libero.expert.expert import Expert

__all__ = ["Expert"]
