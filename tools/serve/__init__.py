"""Serves a trained policy to robots that speak openpi's protocol."""
