"""Command line tools around the library."""
