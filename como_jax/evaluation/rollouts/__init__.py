"""Policies in simulators: episodes, success and what is kept of them."""
