"""Converts any source of episodes to one schema: the builders, and what they share."""
