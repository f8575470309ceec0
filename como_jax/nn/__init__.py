"""Layers, attention, stacks, vision and text towers that all models share."""
