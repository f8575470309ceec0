"""Weights in the formats of other projects: one table for each."""
