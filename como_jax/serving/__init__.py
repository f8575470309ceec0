"""A trained policy behind a websocket, in the protocol that openpi's clients speak; needs neither JAX nor PyTorch."""
