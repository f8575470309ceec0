"""One file a recipe; every field can be overridden by a flag."""
