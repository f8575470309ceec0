"""A folder of videos, with or without language."""
