"""Examines a dataset, converted or not, and says what is wrong with it and what to do."""
