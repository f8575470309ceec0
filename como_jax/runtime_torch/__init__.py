"""Exported models in plain PyTorch, for robots: needs torch, NumPy, safetensors and OpenCV, and no JAX.

`como_jax.runtime_torch.latent_motion.LatentMotion` and `como_jax.runtime_torch.policy.Policy` load what `python -m
tools.export_torch` wrote. It imports `como_jax.spec` and no other part of como_jax.
"""
