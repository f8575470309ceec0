"""Looks a dataset over, as it came or converted, and says what is wrong with it and what to do."""
