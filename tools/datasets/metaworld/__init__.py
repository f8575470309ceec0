"""Demonstrations in Meta-World."""
