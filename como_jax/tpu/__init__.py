"""Compiles the train step of a recipe for a TPU slice that is not there, and says what it needs and how fast it is."""
